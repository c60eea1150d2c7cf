"""The maximal update parametrization (muP) for models of any kind: hyper-parameters found small hold when wide.

A model's width dimensions are those in which its parameters' shapes differ from a base model's. From them follow how
initial weights are rescaled, by how much the readout is divided, and a learning-rate multiplier for each parameter
(Yang and Hu, arXiv 2011.14522; table 8 of Yang et al., arXiv 2203.03466). Multipliers are plain floats in the
optimizer's parameter groups and one float in the readout: they are saved with the optimizer and the model, cost nothing
under `torch.compile`, and survive sharding, where attributes of parameter tensors are lost.

At the base width muP is the standard parametrization. The rules and the file format of base shapes are those of the
package mup 1.0.0, whose losses are reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensormill.errors import CheckpointError, InvalidArgument, ModelError, OutputError

__all__ = [
    "BaseShapes",
    "CoordinateCheck",
    "MuReadout",
    "ParameterScale",
    "WidthScaling",
    "attention_scale",
    "coord_check",
    "parametrize",
    "scale_attention",
]

INITIALIZED = ("fan_in", "constant", "loaded")
OPTIMIZERS = ("sgd", "adam", "adamw")
_FILE_HEAD = """\
# Base shapes of a model's parameters, one list of dimensions each.
# A number is the base size of a width dimension; null is a dimension that does not grow with the width.
"""
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
_SCALING = "_width_scaling"


def _plain_name(name: str) -> str:
    """A parameter's name without what DDP, FSDP, checkpointing and compilation add to it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    named = {_plain_name(name): weight for name, weight in model.named_parameters()}
    if named and all(name.startswith("module.") for name in named):  # DistributedDataParallel
        named = {name.removeprefix("module."): weight for name, weight in named.items()}
    return named


@dataclass(frozen=True)
class BaseShapes:
    """For each parameter, the base size of each width dimension, and None for dimensions that do not grow.

    Attributes:
        dims: {parameter name: dimensions}.
    """

    dims: Mapping[str, tuple[int | None, ...]]

    @classmethod
    def between(cls, base: nn.Module, delta: nn.Module) -> BaseShapes:
        """Width dimensions are those in which two models differ.

        Args:
            base: model of the base width. Only shapes are looked at: make it under `torch.device("meta")` to spare
                memory.
            delta: the same model, every width dimension of another size.

        Raises:
            ModelError: parameters' names or numbers of dimensions differ: depth must be the same.
        """
        shapes = {name: tuple(weight.shape) for name, weight in _named_parameters(base).items()}
        others = {name: tuple(weight.shape) for name, weight in _named_parameters(delta).items()}
        _check_same_names("the base model", set(shapes), "the other", set(others))
        dims = {}
        for name, shape in shapes.items():
            if len(shape) != len(others[name]):
                raise ModelError(
                    f"given {name} of shape {shape} and {others[name]}, expected as many dimensions in both models"
                )
            dims[name] = tuple(
                None if size == other else size for size, other in zip(shape, others[name], strict=True)
            )
        return cls(dims)

    @classmethod
    def load(cls, path: str | Path) -> BaseShapes:
        """Read a base-shape file (.bsh, YAML) of ours or of the package mup.

        Raises:
            CheckpointError: no such file, or not a mapping of names to lists of sizes.
        """
        import yaml

        try:
            with open(path, encoding="utf-8") as file:
                content = yaml.safe_load(file)
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"given base shapes {str(path)!r}, expected a readable YAML file: {error}"
            ) from error
        if not isinstance(content, dict) or not all(
            isinstance(name, str)
            and isinstance(dims, list)
            and all(size is None or (isinstance(size, int) and size > 0) for size in dims)
            for name, dims in content.items()
        ):
            raise CheckpointError(
                f"given base shapes {str(path)!r}, expected a mapping of names to lists of sizes and null"
            )
        return cls({_plain_name(name): tuple(dims) for name, dims in content.items()})

    def save(self, path: str | Path) -> None:
        """Write a base-shape file, which the package mup reads too.

        Raises:
            OutputError: the file can't be written.
        """
        import yaml

        path = Path(path)
        beside = path.with_name(path.name + ".part")
        text = _FILE_HEAD + yaml.safe_dump({name: list(dims) for name, dims in self.dims.items()}, indent=4)
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise OutputError(f"base shapes could not be written to {str(path)!r}: {error}") from error


def _check_same_names(what: str, names: set[str], other: str, others: set[str]) -> None:
    if names != others:
        extra = ", ".join(sorted(names - others)[:3]) or "none"
        missing = ", ".join(sorted(others - names)[:3]) or "none"
        raise ModelError(
            f"given parameters that only {what} has ({extra}) or only {other} ({missing}), expected the same names: "
            "models that differ in width only"
        )


@dataclass(frozen=True)
class ParameterScale:
    """How one parameter scales.

    Attributes:
        kind: "matrix" (two width dimensions), "vector" (one) or "fixed" (none).
        fan_in: multiplier of its last width dimension, size / base size; 1 for "fixed".
        fan_out: of its first width dimension.
    """

    kind: str
    fan_in: float
    fan_out: float

    def lr_multiplier(self, optimizer: str) -> float:
        """Factor of the learning rate.

        Args:
            optimizer: "sgd", "adam" or "adamw".
        """
        if self.kind == "fixed":
            return 1.0
        if optimizer == "sgd":
            return self.fan_out / self.fan_in if self.kind == "matrix" else self.fan_in
        return 1 / self.fan_in if self.kind == "matrix" else 1.0


class MuReadout(nn.Linear):
    """A linear layer from the width to outputs that do not grow with it: logits, a regression target.

    Its input is divided by `width_mult`, which `parametrize` sets. The multiplier is saved in the state dict, as
    "width_mult" beside "weight", so that loaded weights compute what they computed.

    Args:
        in_features: width.
        out_features: number of outputs.
        bias: whether to add one.
        output_mult: a constant factor of the output's weights, to be tuned like a learning rate.
        zero_init: start at zero: the model's initial outputs then do not depend on the width at all.
        device, dtype: of the weights.

    Example:
        >>> MuReadout(64, 10)(torch.ones(2, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        output_mult: float = 1.0,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.output_mult = float(output_mult)
        self.zero_init = zero_init
        self.width_mult = 1.0
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)

    @classmethod
    def of(cls, linear: nn.Linear, output_mult: float = 1.0) -> MuReadout:
        """A readout with the parameters (not copies) of a linear layer, so that tied weights stay tied."""
        readout = cls(1, 1, False, output_mult=output_mult, device="meta")
        readout.in_features, readout.out_features = linear.in_features, linear.out_features
        readout.weight = linear.weight
        readout.register_parameter("bias", linear.bias)
        return readout.train(linear.training)

    def reset_parameters(self) -> None:
        """Initialise as `nn.Linear` does, or with zeros."""
        super().reset_parameters()
        if self.zero_init:
            nn.init.zeros_(self.weight)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return super().forward(x * (self.output_mult / self.width_mult))

    def folded(self) -> nn.Linear:
        """A plain linear layer of the same function, with multipliers multiplied into a copy of the weights."""
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(self.weight * (self.output_mult / self.width_mult))
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Sizes and multipliers."""
        return f"{super().extra_repr()}, output_mult={self.output_mult:g}, width_mult={self.width_mult:g}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "width_mult"] = torch.tensor(self.width_mult, dtype=torch.float64)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        saved = state_dict.pop(prefix + "width_mult", None)  # absent from a plain linear layer's state
        if saved is not None:
            self.width_mult = float(saved)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


@dataclass(frozen=True)
class WidthScaling:
    """How a model's parameters scale with its width; made by `parametrize`.

    Attributes:
        base_shapes: what the model was compared with; save it beside the model.
        scales: {parameter name: scale}.
    """

    base_shapes: BaseShapes
    scales: Mapping[str, ParameterScale]

    def param_groups(
        self,
        model: nn.Module,
        optimizer: str,
        lr: float,
        *,
        weight_decay: float = 0.0,
        groups: Iterable[Mapping[str, Any]] | None = None,
    ) -> list[dict[str, Any]]:
        """Parameter groups for `torch.optim.SGD`, `Adam` or `AdamW` (or another optimizer of their kind).

        Adam's learning rate of matrices is divided by their width multiplier; SGD's is multiplied by the ratio of the
        multipliers of fan-out and fan-in, and by the multiplier for vectors. Weight decay changes inversely, so that
        learning rate times weight decay does not depend on the width. "lr_mult", a float, says what a group's "lr"
        was multiplied by; schedulers of torch.optim keep it, since they multiply.

        Args:
            model: the model, or what wraps it (DDP, FSDP, compiled).
            optimizer: "sgd" for optimizers that are linear in the gradient; "adam" or "adamw" for those that
                normalise it for each weight.
            lr: learning rate at the base width.
            weight_decay: at the base width.
            groups: groups of your own, each with "params" and what is special there ("lr", "weight_decay", ...).
                None: all parameters that require gradients.

        Returns:
            Groups, each with "params", "lr", "weight_decay" and "lr_mult"; order of parameters kept within a group.

        Raises:
            InvalidArgument: an unknown optimizer, or a parameter that is not of this model.
        """
        if optimizer not in OPTIMIZERS:
            raise InvalidArgument(
                f"given optimizer {optimizer!r}, expected one of {', '.join(OPTIMIZERS)}: 'adam' stands for all that "
                "normalise gradients for each weight, 'sgd' for those that don't"
            )
        if not (lr >= 0 and weight_decay >= 0):
            raise InvalidArgument(
                f"given lr={lr}, weight_decay={weight_decay}, expected numbers of at least 0"
            )
        named = _named_parameters(model)
        _check_same_names("the model", set(named), "the scaling", set(self.scales))
        names = {id(weight): name for name, weight in named.items()}
        if groups is None:
            groups = [{"params": [weight for weight in named.values() if weight.requires_grad]}]
        result: list[dict[str, Any]] = []
        for group in groups:
            settings = {"lr": lr, "weight_decay": weight_decay, **group}
            weights = settings.pop("params")
            by_multiplier: dict[float, list[Tensor]] = {}
            for weight in [weights] if isinstance(weights, Tensor) else weights:
                if id(weight) not in names:
                    raise InvalidArgument(
                        f"given a parameter of shape {tuple(weight.shape)}, expected parameters of the model"
                    )
                multiplier = self.scales[names[id(weight)]].lr_multiplier(optimizer)
                by_multiplier.setdefault(multiplier, []).append(weight)
            for multiplier, chosen in by_multiplier.items():
                result.append(
                    {
                        **settings,
                        "params": chosen,
                        "lr": settings["lr"] * multiplier,
                        "weight_decay": settings["weight_decay"] / multiplier,
                        "lr_mult": multiplier,
                    }
                )
        return result


def _scales(model: nn.Module, base: BaseShapes) -> dict[str, ParameterScale]:
    named = _named_parameters(model)
    _check_same_names("the model", set(named), "the base", set(base.dims))
    scales = {}
    for name, weight in named.items():
        shape, dims = tuple(weight.shape), base.dims[name]
        if len(shape) != len(dims):
            raise ModelError(
                f"given {name} of shape {shape}, expected {len(dims)} dimensions as in the base shapes"
            )
        multipliers = [size / d for size, d in zip(shape, dims, strict=True) if d is not None]
        if len(multipliers) > 2:
            raise ModelError(
                f"given {name} of shape {shape} with {len(multipliers)} width dimensions, expected at most 2"
            )
        if not multipliers:
            scales[name] = ParameterScale("fixed", 1.0, 1.0)
        else:
            kind = "vector" if len(multipliers) == 1 else "matrix"
            scales[name] = ParameterScale(kind, multipliers[-1], multipliers[0])
    return scales


def _is_width(base: BaseShapes, name: str, dim: int) -> bool:
    return base.dims[name][dim] is not None


def parametrize(
    model: nn.Module,
    base: nn.Module | BaseShapes | str | Path,
    delta: nn.Module | None = None,
    *,
    initialized: str = "fan_in",
    convert_readouts: bool = False,
    output_mult: float = 1.0,
) -> WidthScaling:
    """Put a freshly made model into muP, in place.

    Sets every `MuReadout`'s width multiplier and rescales initial weights; learning rates come from the result's
    `param_groups`. At the base width nothing changes. Attention logits must be scaled by 1/d instead of 1/sqrt(d) where
    the size d of heads grows: see `attention_scale` and `scale_attention`.

    Args:
        model: any module whose widths are its parameters' shapes.
        base: the model of the width at which hyper-parameters are tuned; or base shapes, or their file.
        delta: a third model in which every width dimension differs from the base's. Needed where some width dimension
            of `model` may equal the base's; without it, the width dimensions are those in which model and base differ.
        initialized: how `model` came by its weights. "fan_in": standard deviations fall as 1/sqrt(fan_in), as in
            PyTorch's own layers. "constant": the same for every width, as Hugging Face's `initializer_range` gives.
            "loaded": leave weights as they are (a checkpoint of a model in muP, or initialised by hand).
        convert_readouts: replace every `nn.Linear` that maps the width to a fixed number of outputs by a `MuReadout`
            with the same parameters (`lm_head` of a language model).
        output_mult: of the readouts that are converted.

    Returns:
        Scaling of every parameter.

    Raises:
        ModelError: parametrized before; depths differ; a readout that is no MuReadout; a parameter with more than two
            width dimensions.
        InvalidArgument: width dimensions can't be told: model and base are equally wide and there is no delta.

    Example:
        >>> def make(width):
        ...     return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), MuReadout(width, 2))
        >>> model = make(256)
        >>> scaling = parametrize(model, make(64), make(65))
        >>> optimizer = torch.optim.Adam(scaling.param_groups(model, "adam", lr=1e-3))
        >>> sorted(group["lr_mult"] for group in optimizer.param_groups)
        [0.25, 1.0]
    """
    if initialized not in INITIALIZED:
        raise InvalidArgument(f"given initialized={initialized!r}, expected one of {', '.join(INITIALIZED)}")
    if hasattr(model, _SCALING) and initialized != "loaded":
        raise ModelError(
            "given a model that was parametrized before, expected a fresh one: its weights would be rescaled twice; "
            "use initialized='loaded' to leave them"
        )
    shapes = _base_shapes(model, base, delta)
    scales = _scales(model, shapes)
    owners: dict[int, int] = {}
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    names = {id(weight): name for name, weight in _named_parameters(model).items()}
    _find_readouts(model, shapes, names, convert_readouts, output_mult)

    done: set[int] = set()

    def rescale(weight: Tensor | None, factor: float) -> None:
        if weight is not None and id(weight) not in done:
            done.add(id(weight))
            weight.mul_(factor)

    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                continue
            name = names[id(module.weight)]
            scale = scales[name]
            if isinstance(module, MuReadout):
                module.width_mult = scale.fan_in if _is_width(shapes, name, 1) else 1.0
            if initialized != "fan_in":
                continue
            fan_in = scale.fan_in if _is_width(shapes, name, 1) else 1.0
            rescale(module.bias, math.sqrt(fan_in))
            if isinstance(module, MuReadout) and owners[id(module.weight)] == 1:
                # a weight shared with an embedding has the embedding's scale, which is right as it is
                rescale(module.weight, math.sqrt(fan_in))
        if initialized == "constant":
            for name, weight in _named_parameters(model).items():
                if scales[name].kind == "matrix":
                    rescale(weight, 1 / math.sqrt(scales[name].fan_in))
    scaling = WidthScaling(shapes, scales)
    object.__setattr__(model, _SCALING, scaling)  # a mark, outside the module's own state
    return scaling


def _base_shapes(
    model: nn.Module, base: nn.Module | BaseShapes | str | Path, delta: nn.Module | None
) -> BaseShapes:
    if isinstance(base, (str, Path)):
        base = BaseShapes.load(base)
    if isinstance(base, BaseShapes):
        if delta is not None:
            raise InvalidArgument(
                "given base shapes and a delta model, expected one of the two: base shapes already tell width "
                "dimensions"
            )
        return base
    if not isinstance(base, nn.Module):
        raise InvalidArgument(
            f"given base of type {type(base).__name__}, expected a module, BaseShapes or a file of them"
        )
    shapes = BaseShapes.between(base, model if delta is None else delta)
    if not any(size is not None for dims in shapes.dims.values() for size in dims):
        raise InvalidArgument(
            "given models of equal shapes, expected a difference that tells the width dimensions; pass as delta a "
            "model of another width"
        )
    if delta is not None:
        fixed = {name: tuple(weight.shape) for name, weight in _named_parameters(base).items()}
        for name, weight in _named_parameters(model).items():
            for dim, size in enumerate(shapes.dims.get(name, ())):
                if size is None and dim < weight.ndim and weight.shape[dim] != fixed[name][dim]:
                    raise ModelError(
                        f"given {name} of shape {tuple(weight.shape)}, expected {fixed[name][dim]} in dimension {dim}, "
                        "where base and delta agree; let every width dimension of the delta differ from the base's"
                    )
    return shapes


def _find_readouts(
    model: nn.Module, shapes: BaseShapes, names: Mapping[int, str], convert: bool, output_mult: float
) -> None:
    """Convert, or refuse, plain linear layers from the width to fixed outputs."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or isinstance(module, MuReadout):
            continue
        name = names[id(module.weight)]
        if _is_width(shapes, name, 0) or not _is_width(shapes, name, 1):
            continue
        if not convert:
            raise ModelError(
                f"given {path or 'the model'}, an nn.Linear from the width to {module.out_features} outputs, expected "
                "a MuReadout there; make it one or pass convert_readouts=True"
            )
        if not path:
            raise ModelError("given a model that is one readout, expected a module that holds it")
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, MuReadout.of(module, output_mult))


def attention_scale(head_dim: int, base_head_dim: int) -> float:
    """Factor of the attention logits q.k in muP: sqrt(base_head_dim) / head_dim.

    Queries and keys become correlated in training, so that q.k grows as the head's size d, not as its root: logits are
    scaled by 1/d, with the constant that gives 1/sqrt(d) at the base. Pass it as `scale` to
    `torch.nn.functional.scaled_dot_product_attention`. Where heads keep their size and their number grows, this is the
    usual 1/sqrt(d).

    Raises:
        InvalidArgument: a size below one.

    Example:
        >>> attention_scale(16, 16), attention_scale(64, 16)
        (0.25, 0.0625)
    """
    if head_dim < 1 or base_head_dim < 1:
        raise InvalidArgument(
            f"given head_dim={head_dim}, base_head_dim={base_head_dim}, expected at least 1"
        )
    return math.sqrt(base_head_dim) / head_dim


def scale_attention(model: nn.Module, base: nn.Module) -> int:
    """Set the attention scale of muP in a model whose attention modules hold it as `scaling`, as Hugging Face's do.

    Args:
        model: changed in place.
        base: the model of the base width, same names of modules.

    Returns:
        The number of modules that have `head_dim` and `scaling`.

    Raises:
        ModelError: there is none: pass `attention_scale(...)` to your own attention.
    """
    found = 0
    bases = dict(base.named_modules())
    for name, module in model.named_modules():
        if isinstance(getattr(module, "scaling", None), float) and isinstance(
            getattr(module, "head_dim", None), int
        ):
            if name not in bases:
                raise ModelError(f"given {name} that the base model does not have, expected the same modules")
            base_dim: Any = bases[name].head_dim
            # from the base, whose scaling is 1/sqrt(d) times what factor the model has, so that calling twice is harmless
            factor: Any = bases[name].scaling
            module.scaling = factor * math.sqrt(base_dim) * attention_scale(module.head_dim, base_dim)
            found += 1
    if not found:
        raise ModelError(
            "given a model without modules that have `scaling` and `head_dim`, expected attention as in Hugging Face's "
            "models; pass attention_scale(head_dim, base_head_dim) as the scale of your own attention"
        )
    return found


@dataclass(frozen=True)
class CoordinateCheck:
    """Sizes of activations over widths, while training; made by `coord_check`.

    Attributes:
        rows: one for each width, step and module: {"width", "step", "module", "size", "change"}; size is the mean
            absolute value of the module's output on the first batch, change that of its difference to step 0; both
            are means over seeds.
    """

    rows: tuple[dict[str, Any], ...]

    def slopes(self, what: str = "change", step: int | None = None) -> dict[str, float]:
        """Exponent of width for each module, by least squares in logarithms; near 0 in muP.

        Args:
            what: "change" or "size".
            step: which step; None: the last.

        Returns:
            {module: exponent}; NaN for outputs that are zero.
        """
        if what not in ("size", "change"):
            raise InvalidArgument(f"given {what!r}, expected 'size' or 'change'")
        last = max(row["step"] for row in self.rows) if step is None else step
        points: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            if row["step"] == last:
                value = row[what]
                points.setdefault(row["module"], []).append(
                    (math.log(row["width"]), math.log(value) if value > 0 else math.nan)
                )
        slopes = {}
        for module, values in points.items():
            x = torch.tensor([p[0] for p in values], dtype=torch.float64)
            y = torch.tensor([p[1] for p in values], dtype=torch.float64)
            x = x - x.mean()
            slopes[module] = float((x * (y - y.mean())).sum() / (x * x).sum())
        return slopes

    def table(self, what: str = "change", step: int | None = None) -> str:
        """Modules by widths, with the exponent in the last column."""
        slopes = self.slopes(what, step)
        last = max(row["step"] for row in self.rows) if step is None else step
        widths = sorted({row["width"] for row in self.rows})
        values = {(row["module"], row["width"]): row[what] for row in self.rows if row["step"] == last}
        wide = max(len("module"), *(len(module) for module in slopes))
        lines = ["  ".join(["module".ljust(wide), *(f"{w:>9}" for w in widths), f"{'slope':>7}"])]
        for module, slope in slopes.items():
            cells = [f"{values[module, w]:9.3g}" for w in widths]
            lines.append("  ".join([module.ljust(wide), *cells, f"{slope:7.2f}"]))
        return "\n".join(lines)


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        output = list(output.values())
    for value in output if isinstance(output, (tuple, list)) else ():
        found = _first_tensor(value)
        if found is not None:
            return found
    return None


def coord_check(
    make: Callable[[int, int], tuple[nn.Module, torch.optim.Optimizer]],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    widths: Sequence[int],
    *,
    seeds: Sequence[int] = (0,),
    modules: Callable[[str, nn.Module], bool] | None = None,
) -> CoordinateCheck:
    """Train a few steps at several widths and record how large activations are, and how much they change.

    In muP both stay of the same size however wide the model is; a module whose line rises or falls is parametrized
    wrongly (section D.1 of arXiv 2203.03466). The readout's initial output may fall with the width: muP makes it zero
    in the limit, which is why changes are what to look at.

    Args:
        make: (width, seed) -> model and optimizer.
        loss_fn: (model, batch) -> scalar loss.
        batches: one for each step; activations are recorded on the first.
        widths: at least two.
        seeds: repeated with each, and averaged.
        modules: (name, module) -> whether to record its output; None: every module without children.

    Returns:
        The table; its `slopes` tell what is wrong.

    Raises:
        InvalidArgument: fewer than two widths, or no batch.
        ModelError: the selected modules give no tensors.

    Example:
        >>> def make(width, seed):
        ...     torch.manual_seed(seed)
        ...     net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), MuReadout(width, 1))
        ...     scaling = parametrize(net, nn.Sequential(nn.Linear(4, 8), nn.Tanh(), MuReadout(8, 1)))
        ...     return net, torch.optim.SGD(scaling.param_groups(net, "sgd", lr=0.1))
        >>> check = coord_check(make, lambda net, x: net(x).square().mean(), [torch.ones(2, 4)] * 2, [16, 32])
        >>> sorted(check.slopes())
        ['0', '1', '2']
    """
    if len(set(widths)) < 2 or not batches or not seeds:
        raise InvalidArgument(
            f"given {len(set(widths))} widths, {len(batches)} batches and {len(seeds)} seeds, expected at least two "
            "widths, one batch and one seed"
        )
    sums: dict[tuple[int, int, str], list[float]] = {}
    for width in widths:
        for seed in seeds:
            model, optimizer = make(width, seed)
            chosen = {
                name: module
                for name, module in model.named_modules()
                if (modules(name, module) if modules is not None else not list(module.children()))
            }
            start: dict[str, Tensor] = {}
            for step in range(len(batches) + 1):
                outputs = _outputs(model, chosen, loss_fn, batches[0])
                if not outputs:
                    raise ModelError(
                        "given modules without tensor outputs, expected some with; change `modules`"
                    )
                start = start or outputs
                for name, value in outputs.items():
                    size, change = value.abs().mean(), (value - start[name]).abs().mean()
                    sums.setdefault((width, step, name), []).extend((float(size), float(change)))
                if step < len(batches):
                    optimizer.zero_grad(set_to_none=True)
                    torch.autograd.backward(loss_fn(model, batches[step]))
                    optimizer.step()
    rows = [
        {
            "width": width,
            "step": step,
            "module": name,
            "size": sum(values[0::2]) / len(values[0::2]),
            "change": sum(values[1::2]) / len(values[1::2]),
        }
        for (width, step, name), values in sums.items()
    ]
    return CoordinateCheck(tuple(rows))


def _outputs(
    model: nn.Module, chosen: Mapping[str, nn.Module], loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any
) -> dict[str, Tensor]:
    """Outputs of modules in one evaluation of the loss; of a module called several times, the last."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            value = _first_tensor(output)
            if value is not None:
                outputs[name] = value.detach().double()

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in chosen.items()]
    try:
        with torch.no_grad():
            loss_fn(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs

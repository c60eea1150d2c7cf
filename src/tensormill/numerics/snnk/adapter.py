"""Adapters of a frozen model from SNNK layers: only the neurons' feature vectors are trained.

An adapter adds a small correction to a module's output (Sehanobish et al., arXiv 2310.13225, section 4.2). A Houlsby
adapter of bottleneck k trains 2 d k + k + d numbers; an SNNK adapter's way down, the random features, is fixed, and it
trains d m numbers and d gains. Names follow the adapter libraries: whatever is trained lies under `adapter`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensormill.errors import CheckpointError, InvalidArgument, ModelError
from tensormill.numerics.snnk.layer import SNNKLinear, random_features
from tensormill.numerics.snnk.spectrum import Spectrum

__all__ = ["SNNKAdapter", "adapter_parameters", "attach", "detach", "load_adapters", "save_adapters"]

_FORMAT = "tensormill.snnk.adapters.1"


class SNNKAdapter(nn.Module):
    """y = x + gain * SNNK(x), or with a bottleneck y = x + up(SNNK(x)).

    Args:
        dim: width of x.
        num_features: m.
        feature: "relu" or an activation, as `random_features` takes it.
        down: width of the bottleneck; None: the layer gives `dim` outputs, each with a trained gain.
        init: "zero": the gain, or the projection up, starts at 0 and the model as it was, the layer at the features of
            a random dense layer; "weight": the layer starts at 0 and the gain at 1, which trains faster, as the
            layer's gradient does not wait for the gain.
        normalize: inputs are scaled to this length, so that the scale of hidden states, which varies from layer to
            layer, does not matter; "auto": dim ** 0.25 for ReLU features, as in the paper's code, and 1 for others, whose size and frequency
            grow with it; None: they are taken as they are.
        seed: of the features and of the layer's start.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        **settings: of the features: projection, shift, split ("phase" unless given), A, ...

    Raises:
        InvalidArgument: sizes below 1, an unknown feature or init.

    Example:
        >>> import torch
        >>> from tensormill.numerics.snnk import SNNKAdapter
        >>> adapter = SNNKAdapter(64, 8)
        >>> x = torch.randn(2, 5, 64)
        >>> bool((adapter(x) == x).all()), sum(p.numel() for p in adapter.parameters())
        (True, 576)
    """

    up: nn.Linear | None
    gain: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_features: int,
        *,
        feature: str | Spectrum = "relu",
        down: int | None = None,
        init: str = "zero",
        normalize: float | str | None = "auto",
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if init not in ("zero", "weight"):
            raise InvalidArgument(f"given init {init!r}, expected 'zero' or 'weight'")
        if isinstance(normalize, str) and normalize != "auto":
            raise InvalidArgument(f"given normalize {normalize!r}, expected a length, 'auto' or None")
        self.settings = {
            "dim": dim,
            "num_features": num_features,
            "feature": feature,
            "down": down,
            "init": init,
            "normalize": normalize,
            "seed": seed,
            **settings,
        }
        length: Any = normalize
        if normalize == "auto":
            length = float(dim) ** 0.25 if feature == "relu" else 1.0
        generator = torch.Generator().manual_seed(seed)
        if feature != "relu":
            settings.setdefault("split", "phase")  # bounded features: an input can't blow up what was trained
        features = random_features(
            dim, num_features, feature, normalize=length, seed=seed, device=device, dtype=dtype, **settings
        )
        start = "zero" if init == "weight" and down is None else "psi"
        self.snnk = SNNKLinear(
            dim,
            dim if down is None else down,
            features,
            init=start,
            generator=generator,
            device=device,
            dtype=dtype,
        )
        self.up = self.gain = None
        if down is not None:
            self.up = nn.Linear(down, dim, device=device, dtype=dtype)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        else:
            fill = torch.zeros if init == "zero" else torch.ones
            self.gain = nn.Parameter(fill(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        y = self.snnk(x)
        if self.up is not None:
            return x + self.up(y)
        assert self.gain is not None
        return x + y * self.gain


def _adapt(module: nn.Module, arguments: Any, output: Any) -> Any:
    """Forward hook: the adapter on the output, or on the first of several. A plain function, so that models copy."""
    adapter = module.get_submodule("adapter")
    if isinstance(output, Tensor):
        return adapter(output)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return (adapter(output[0]), *output[1:])
    raise ModelError(
        f"given a module {type(module).__name__} that returns {type(output).__name__}, expected a Tensor or a tuple "
        "that starts with one; attach to another module"
    )


def _width(name: str, module: nn.Module, dim: int | None) -> int:
    """Width of a module's output: what it says of itself, or of its last linear layer."""
    if dim is not None:
        return dim
    for candidate in reversed(list(module.modules())):
        width = getattr(candidate, "out_features", None)
        if isinstance(width, int):
            return width
    raise InvalidArgument(f"given module {name} without a linear layer, expected dim=...: its output's width")


def attach(
    model: nn.Module,
    pattern: str,
    num_features: int,
    *,
    dim: int | None = None,
    freeze: bool = True,
    train_too: str | None = None,
    seed: int = 0,
    **settings: Any,
) -> list[str]:
    """Add an adapter to the output of every module whose name matches.

    The adapter becomes the child `adapter` of the module and acts through a forward hook: the names of the model's own
    state dict stay as they are, and deep copies, `state_dict`, `.to()` and `torch.compile` include it.

    Args:
        model: any module; changed in place.
        pattern: regular expression that must match a module's whole name, such as r"model\\.layers\\.\\d+\\.mlp".
        num_features: m of each adapter.
        dim: width of the outputs; None: out_features of the last linear layer within each module.
        freeze: let no other parameter of the model be trained.
        train_too: regular expression for names of further parameters to train, such as a classifier's.
        seed: of the first adapter; the i-th has seed + i.
        **settings: of `SNNKAdapter`: feature, down, init, normalize, ...

    Returns:
        The names of the adapted modules.

    Raises:
        InvalidArgument: a pattern that is no regular expression or matches nothing, a width that can't be told, or
            settings out of range.
        ModelError: a module that has an attribute `adapter` already.
    """
    names = [name for name, _ in model.named_modules() if name and _compiled(pattern).fullmatch(name)]
    # an adapter's own modules are no places for adapters
    names = [name for name in names if "adapter" not in name.split(".")]
    if not names:
        examples = ", ".join(name for name, _ in list(model.named_modules())[1:6])
        raise InvalidArgument(
            f"given pattern {pattern!r} that matches no module, expected one such as: {examples}"
        )
    further = _compiled(train_too) if train_too is not None else None
    modules = {name: model.get_submodule(name) for name in names}
    for name, module in modules.items():
        if hasattr(module, "adapter"):
            raise ModelError(
                f"given module {name} that has an adapter, expected one without; detach(model) first"
            )
    if freeze:
        model.requires_grad_(False)
    fallback = next(model.parameters(), torch.empty(0))
    for index, (name, module) in enumerate(modules.items()):
        like = next(module.parameters(), fallback)
        width = _width(name, module, dim)
        where: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        adapter = SNNKAdapter(width, num_features, seed=seed + index, **settings, **where)
        adapter.train(module.training)
        module.add_module("adapter", adapter)
        module.register_forward_hook(_adapt)
    if further is not None:
        for name, parameter in model.named_parameters():
            if further.fullmatch(name):
                parameter.requires_grad_(True)
    return names


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InvalidArgument(f"given pattern {pattern!r}, expected a regular expression: {error}") from error


def _adapters(model: nn.Module) -> dict[str, tuple[nn.Module, SNNKAdapter]]:
    """Name of the adapted module to the module and its adapter."""
    found = {}
    for name, module in model.named_modules():
        adapter = module._modules.get("adapter")
        if isinstance(adapter, SNNKAdapter):
            found[name] = (module, adapter)
    return found


def detach(model: nn.Module) -> int:
    """Take all adapters off again; the other parameters stay frozen or not, as they are.

    Returns:
        How many there were.
    """
    found = _adapters(model)
    for module, _ in found.values():
        for key, hook in list(module._forward_hooks.items()):
            if hook is _adapt:
                del module._forward_hooks[key]
        del module._modules["adapter"]
    return len(found)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' trained parameters by their full names: what an optimizer is to be given."""
    return {name: p for name, p in model.named_parameters() if "adapter" in name.split(".")}


def save_adapters(model: nn.Module, path: str | Path) -> None:
    """Write the adapters, and what is needed to attach them again, to a safetensors file.

    Args:
        model: a model with adapters.
        path: of the file; written whole or not at all.

    Raises:
        InvalidArgument: no adapters, or features that were not given by name.
    """
    from safetensors.torch import save_file

    found = _adapters(model)
    if not found:
        raise InvalidArgument("given a model without adapters, expected attach(model, ...) before")
    tensors: dict[str, Tensor] = {}
    for name, (_, adapter) in found.items():
        tensors |= {
            f"{name}.adapter.{key}": t.detach().contiguous() for key, t in adapter.state_dict().items()
        }
    try:
        text = json.dumps({name: adapter.settings for name, (_, adapter) in found.items()})
    except TypeError as error:
        raise InvalidArgument(
            "given adapters with a spectrum object as feature, expected one given by name; save state_dict() instead"
        ) from error
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, beside, metadata={"format": _FORMAT, "adapters": text})
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_adapters(model: nn.Module, path: str | Path, *, freeze: bool = True) -> list[str]:
    """Attach the adapters of a file to a model, with their trained weights.

    Args:
        model: a model with the modules that the file names, without adapters.
        path: written by `save_adapters`.
        freeze: as for `attach`.

    Returns:
        The names of the adapted modules.

    Raises:
        CheckpointError: no such file, another kind of file, or modules that the model lacks.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"given {path}, expected a file of save_adapters: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"given {path}, expected a file of save_adapters; it holds other tensors")
    described: dict[str, dict[str, Any]] = json.loads(metadata["adapters"])
    present = dict(model.named_modules())
    missing = [name for name in described if name not in present]
    if missing:
        raise CheckpointError(f"given adapters for {missing[0]}, expected a module of this name in the model")
    if freeze:
        model.requires_grad_(False)
    for name, settings in described.items():
        attach(model, re.escape(name), **settings, freeze=False)
        prefix = f"{name}.adapter."
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        try:
            model.get_submodule(name + ".adapter").load_state_dict(own)
        except RuntimeError as error:
            raise CheckpointError(
                f"given {path}, expected tensors that fit the adapter of {name}: {error}"
            ) from error
    return list(described)

"""Mixtures of experts: takes the experts of a layer apart into linear layers, each calibrated and stored by
itself.

transformers keeps the experts of a layer in two tensors, `gate_up_proj` (E, 2I, H) and `down_proj` (E, H, I),
which no method for linear layers sees, while checkpoints name the weights of each expert. `unfuse_experts`
puts an `ExpertList` in the place of such a module: the same function and, on disk, the checkpoint's own
names. Which modules these are is told by shapes and then tried: the two must give the same output. Llama 4's
tensors hold the transposes, (E, H, 2I) and (E, I, H), and its experts are called in another way.
"""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument

ProjectionNames = tuple[str, str, str]
"""What the projections of an expert are called: gate, up, down."""

#: Where an architecture has no others.
USUAL_NAMES: ProjectionNames = ("gate_proj", "up_proj", "down_proj")

# The two compute the same products; half precision may add them in another order. A wrong layout (gate and up
# exchanged, rows interleaved, a clamped activation) is off by more than 0.1.
_SAME = 2e-2
# Far beyond where architectures clamp gates (7 or 10), and float32 holds its squares.
_LARGE = 1e3


class Expert(nn.Module):
    """A gated MLP: `down(activation(gate(x)) * up(x))`.

    Args:
        gate, up, down: its projections, (I, H), (I, H) and (H, I).
        activation: applied to the gate.
        names: what the projections are called.
    """

    def __init__(
        self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, activation: nn.Module, names: ProjectionNames
    ) -> None:
        super().__init__()
        for name, projection in zip(names, (gate, up, down), strict=True):
            self.add_module(name, projection)
        self.act_fn = activation
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, H) of (tokens, H)."""
        gate, up, down = (getattr(self, name) for name in self.names)
        result: Tensor = down(self.act_fn(gate(x)) * up(x))
        return result


class ExpertList(nn.ModuleList):
    """The experts of one layer. Each runs on the tokens that the router chose it for.

    Attributes:
        stacked: whether checkpoints of the architecture hold them in two tensors, `gate_up_proj` and `down_proj`.
        transposed: whether these hold the transposes of the weights.
        apart_in: formats in which transformers reads them as single linear layers all the same.
    """

    stacked = False
    transposed = False
    apart_in: Collection[str] = ()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: (tokens, H).
            top_k_index: (tokens, k) int64, the experts of each token.
            top_k_weights: (tokens, k), their weights.

        Returns:
            (tokens, H).
        """
        output = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            token, place = torch.where(top_k_index == index)
            if token.numel():
                value = expert(hidden_states[token]) * top_k_weights[token, place, None]
                output.index_add_(0, token, value.to(output.dtype))
        return output

    def trial(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, ...]:
        """The arguments of `forward` for tokens x (tokens, H) and a choice of experts."""
        return x, top_k_index, top_k_weights


class SortedExpertList(ExpertList):
    """Experts that are called with a copy of the tokens for each of them, multiplied by its weight before and not
    after, which is zero where it isn't chosen (Llama 4).
    """

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """(E * tokens, H) of (E * tokens, H), those of the first expert first.

        The experts themselves, and whoever watches them, see the rows that aren't zero: zeros give zeros.
        """
        inputs = hidden_states.flatten(0, -2)
        (rows,) = torch.where(inputs.any(dim=-1))
        index = rows.unsqueeze(1) // (len(inputs) // len(self) or 1)
        output = super().__call__(inputs[rows], index, inputs.new_ones(index.shape))
        return torch.zeros_like(inputs).index_put((rows,), output)

    def trial(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, ...]:
        """The arguments of `forward` for tokens x (tokens, H) and a choice of experts."""
        weights = x.new_zeros(len(x), len(self)).scatter(1, top_k_index, top_k_weights)
        return ((weights.T.unsqueeze(-1) * x).flatten(0, 1),)


@torch.no_grad()
def unfuse_experts(
    model: nn.Module, only: Collection[str] | None = None, names: ProjectionNames | None = None
) -> list[str]:
    """Put an `ExpertList` in the place of every fused experts module, in place.

    The linear layers' weights are views of the fused tensors, so this takes no memory; transposed ones are copied, one
    module after the other. The function is compared on random tokens, and a module that computes something else
    (biases, a clamped or interleaved gate) stays as it is, with a warning. Random weights stand for the module's own
    once for each kind of module, and on the meta device always.

    Args:
        model: a model, or a part of one.
        only: names of the modules to take apart; None means all.
        names: of an expert's projections; None takes those of the model's checkpoints.

    Returns:
        Names of the modules taken apart.

    Raises:
        InvalidArgument: a fused weight holds NaN or infinity.
    """
    found, left = [], []
    single = names_on_disk(model)
    names = names or single or USUAL_NAMES
    known: dict[Any, bool] = {}
    for path, module in list(model.named_modules()):
        if not is_fused(module) or (only is not None and path not in only):
            continue
        experts = _take_apart(module, names)
        if (
            experts is None
            or not _is_gated(module, names, path, known)
            or not (module.down_proj.is_meta or _same_function(module, experts, path))
        ):
            left.append(path)
            continue
        experts.train(module.training)
        experts.stacked = single is None and _is_pretrained(model)
        experts.apart_in = _apart_in(module) if experts.stacked else ()
        owner, _, last = path.rpartition(".")
        setattr(model.get_submodule(owner), last, experts)
        found.append(path)
    if left:
        warnings.warn(
            f"the experts in {left[0]} ({type(model.get_submodule(left[0])).__name__}"
            f"{f', and {len(left) - 1} more' if len(left) > 1 else ''}) are not gated MLPs stored as "
            "[gate; up] without biases; they stay uncompressed",
            stacklevel=2,
        )
    return found


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts in 3-D tensors, by their shapes."""
    stacked = [value for value in module.parameters(recurse=False) if value.dim() == 3]
    return len(stacked) >= 2 and len({value.shape[0] for value in stacked}) == 1 and stacked[0].shape[0] > 1


def expert_lists(model: nn.Module) -> Iterator[tuple[str, ExpertList]]:
    """Name and module of every `ExpertList`."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertList):
            yield name, module


def routers(model: nn.Module) -> list[str]:
    """Names of what chooses and weighs experts, beside every `ExpertList`: it keeps its precision.

    These are the modules with a matrix of one row for each expert, and linear layers with as many outputs, or
    with only one (the weight of a shared expert).
    """
    found = []
    for path, experts in expert_lists(model):
        owner = path.rpartition(".")[0]
        for name, part in model.get_submodule(owner).named_modules(prefix=owner):
            weight = getattr(part, "weight", None)
            if name.startswith(f"{path}.") or not isinstance(weight, Tensor) or weight.dim() != 2:
                continue
            if weight.shape[0] in ((1, len(experts)) if isinstance(part, nn.Linear) else (len(experts),)):
                found.append(name)
    return found


def stacking_order(experts: ExpertList) -> dict[str, list[str]]:
    """The two tensors that can hold a layer's experts, and the weights, all of one size, that make up each."""
    first: Any = experts[0]
    gate, up, down = first.names
    return {
        stacked: [f"{index}.{name}.weight" for index in range(len(experts)) for name in names]
        for stacked, names in (("gate_up_proj", (gate, up)), ("down_proj", (down,)))
    }


def stack_experts(path: str, experts: ExpertList, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The two stacked tensors of the experts at `path`, from the linear layers' in `tensors`."""
    made = {
        f"{path}.{stacked}": torch.stack([tensors[f"{path}.{weight}"] for weight in weights])
        .unflatten(0, (len(experts), -1))
        .flatten(1, 2)
        for stacked, weights in stacking_order(experts).items()
    }
    return {name: value.mT.contiguous() if experts.transposed else value for name, value in made.items()}


@contextmanager
def having_stacked(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives experts those of `tensors` that `stack_experts` made, as parameters: transformers looks at their
    shapes while it writes them.
    """
    lent: list[tuple[ExpertList, str]] = []
    for path, experts in expert_lists(model):
        for name in ("gate_up_proj", "down_proj"):
            if f"{path}.{name}" in tensors:
                experts.register_parameter(name, nn.Parameter(tensors[f"{path}.{name}"], requires_grad=False))
                lent.append((experts, name))
    try:
        yield
    finally:
        for experts, name in lent:
            delattr(experts, name)


def names_on_disk(model: Any) -> ProjectionNames | None:
    """What checkpoints of a model's architecture call an expert's projections; None if they hold experts stacked.

    By transformers' own table of how it stacks what it reads.
    """
    if not _is_pretrained(model):
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping

    found: dict[str, list[str]] = {}
    for entry in get_model_conversion_mapping(model, add_legacy=False):
        sources = [part.rsplit(".", 2) for part in entry.source_patterns]
        if all(len(part) == 3 and part[0].endswith("experts.*") for part in sources):
            target = entry.target_patterns[0].rpartition(".")[2]
            found[target] = [part[1] for part in sources]
    gate_up, down = found.get("gate_up_proj", []), found.get("down_proj", [])
    if len(gate_up) != 2 or len(down) != 1:
        return None
    return gate_up[0], gate_up[1], down[0]


def _is_pretrained(model: nn.Module) -> bool:
    if "transformers" not in sys.modules:
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _apart_in(module: nn.Module) -> tuple[str, ...]:
    """By transformers' own table of modules that it replaces when it reads low-bit weights."""
    from transformers.quantizers import base

    table = getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    return tuple(
        str(getattr(method, "value", method))
        for method in table.get(type(module).__name__, {}).get("quantization_methods", ())
    )


def _take_apart(module: Any, names: ProjectionNames, *, views: bool = False) -> ExpertList | None:
    """The experts of a fused module, or None if its tensors have other shapes; transposed ones as `views` or copied."""
    weights = dict(module.named_parameters(recurse=False))
    if set(weights) != {"gate_up_proj", "down_proj"} or not isinstance(
        getattr(module, "act_fn", None), nn.Module
    ):
        return None
    gate_up, down = weights["gate_up_proj"].data, weights["down_proj"].data
    transposed = gate_up.shape == (len(down), down.shape[2], 2 * down.shape[1])
    if transposed:
        gate_up, down = gate_up.mT, down.mT
    count, hidden, inner = down.shape
    if gate_up.shape != (count, 2 * inner, hidden):
        return None

    def linear(weight: Tensor, trained: bool) -> nn.Linear:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
        made.weight = nn.Parameter(weight if views else weight.contiguous(), requires_grad=trained)
        return made

    trained = weights["gate_up_proj"].requires_grad, weights["down_proj"].requires_grad
    # Without a choice of experts beside the tokens.
    is_sorted = len(inspect.signature(_forward_of(module)).parameters) == 2
    made = (SortedExpertList if is_sorted else ExpertList)(
        Expert(
            linear(both[:inner], trained[0]),
            linear(both[inner:], trained[0]),
            linear(out, trained[1]),
            module.act_fn,
            names,
        )
        for both, out in zip(gate_up, down, strict=True)
    )
    made.transposed = transposed
    return made


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    """The class's own loop: transformers may have put a grouped product in its place, which takes no float64."""
    return inspect.unwrap(type(module).forward)


def _with_random_weights(module: Any) -> Any:
    """A copy of a fused module with random weights, in the memory of one expert: each begins one number later."""
    draw = torch.Generator().manual_seed(0)
    made = copy.copy(module)
    made._parameters = {}
    for name, weight in module.named_parameters(recurse=False):
        count, rows, columns = weight.shape
        numbers = torch.randn(rows * columns + count, generator=draw) / columns**0.5
        weights = numbers.as_strided(weight.shape, (1, columns, 1))
        made.register_parameter(name, nn.Parameter(weights, requires_grad=False))
    return made


def _is_gated(module: Any, names: ProjectionNames, path: str, known: dict[Any, bool]) -> bool:
    """Whether a module's kind computes what an `ExpertList` does: with random weights, for tokens of ordinary size and
    for some so large that a clamp shows. Tried once for each kind, which `known` remembers.
    """
    kind = type(module), type(module.act_fn), module.down_proj.shape
    if kind not in known:
        with torch.device("cpu"):  # a model that is being built may be on the meta device by default
            stand_in = _with_random_weights(module)
            apart = _take_apart(stand_in, names, views=True)
            known[kind] = apart is not None and all(
                _same_function(stand_in, apart, path, size) for size in (1.0, _LARGE)
            )
    return known[kind]


def _same_function(module: Any, experts: ExpertList, path: str, size: float = 1.0) -> bool:
    """Whether both give the same output for random tokens, each sent to two experts."""
    weight = module.down_proj
    draw = torch.Generator().manual_seed(0)
    tokens, chosen = 16, min(2, len(experts))
    first: Any = experts[0]
    x = size * torch.randn(tokens, getattr(first, first.names[2]).out_features, generator=draw).to(weight)
    ranks = torch.rand(tokens, len(experts), generator=draw).argsort(dim=1)
    shares = torch.rand(tokens, chosen, generator=draw).to(weight) + 0.1
    given = experts.trial(x, ranks[:, :chosen].to(weight.device), shares)
    try:
        expected = _forward_of(module)(module, *given)
        found = experts(*given)  # its activation may take more than the gate
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False
    if not isinstance(expected, Tensor) or expected.shape != given[0].shape:
        return False
    if not torch.isfinite(expected).all():
        raise InvalidArgument(
            f"given NaN or infinity in the experts of {path}, expected finite weights; check the checkpoint"
        )
    difference = (found - expected).float().norm()
    return bool(difference <= _SAME * expected.float().norm())

"""Linear layers of other classes, which become `nn.Linear` when a model is opened.

GPT-2 and its relatives hold theirs as transformers' `Conv1D`, with the weight as (in_features, out_features), and
Falcon has a subclass of `nn.Linear` that multiplies and adds in two steps. Methods look for `nn.Linear`, so such
layers are replaced. A layer that was a `Conv1D` still gives and takes its weight transposed in `state_dict` and
`load_state_dict`: whoever writes the model writes what its architecture reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CONV1D = ("transformers.pytorch_utils", "Conv1D")
_SUBCLASSES = (("transformers.models.falcon.modeling_falcon", "FalconLinear"),)
_TRANSPOSED = "_tensormill_transposed"
_SUBCLASSED = "_tensormill_subclassed"


def use_plain_linears(model: nn.Module) -> None:
    """Replaces, in place, every `Conv1D` and `FalconLinear` of a model by the `nn.Linear` that computes the same.

    Falcon's layers keep their parameters; the weight of a `Conv1D` is copied, layer by layer.
    """
    remember_classes(model)
    for name, module in list(model.named_modules()):
        kind = _kind(module)
        if kind == _CONV1D:
            model.set_submodule(name, _from_conv1d(module))
        elif kind in _SUBCLASSES:
            made = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            made.weight, made.bias = module.weight, module.bias
            made.train(module.training)
            model.set_submodule(name, made)


def as_linear(module: nn.Module) -> nn.Linear | None:
    """A linear layer as an `nn.Linear`: itself, one of the same shape on the meta device, or None if it is none."""
    if isinstance(module, nn.Linear):
        return module
    if _kind(module) != _CONV1D:
        return None
    weight: Tensor = module.weight  # type: ignore[assignment]
    columns, rows = weight.shape
    return nn.Linear(
        columns, rows, getattr(module, "bias", None) is not None, device="meta", dtype=weight.dtype
    )


def remember_classes(model: nn.Module) -> None:
    """Notes on a model which of its layers are `Conv1D` or `FalconLinear`, before they are replaced."""
    kinds = {name: _kind(module) for name, module in model.named_modules()}
    for key, wanted in ((_TRANSPOSED, (_CONV1D,)), (_SUBCLASSED, _SUBCLASSES)):
        names = {name for name, kind in kinds.items() if kind in wanted}
        setattr(model, key, getattr(model, key, frozenset()) | names)


def transposed(model: nn.Module) -> frozenset[str]:
    """Names of the layers whose weights the model's architecture stores as (in_features, out_features)."""
    found: frozenset[str] = getattr(model, _TRANSPOSED, frozenset())
    return found


def subclassed(model: nn.Module) -> frozenset[str]:
    """Names of the layers that the model's architecture computes from a `weight`, packed or not."""
    found: frozenset[str] = getattr(model, _SUBCLASSED, frozenset())
    return found


def store_transposed(linear: nn.Linear) -> None:
    """Makes an `nn.Linear` give and take its weight as (in_features, out_features) where states are concerned."""
    linear.register_state_dict_post_hook(_transpose_given)
    linear.register_load_state_dict_pre_hook(_transpose_taken)


def _from_conv1d(module: nn.Module) -> nn.Linear:
    weight: Tensor = module.weight  # type: ignore[assignment]
    columns, rows = weight.shape
    made = nn.Linear(columns, rows, device="meta")
    made.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)
    made.bias = module.bias  # type: ignore[assignment]
    made.train(module.training)
    store_transposed(made)
    return made


def _transpose_given(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[f"{prefix}weight"] = state[f"{prefix}weight"].T.contiguous()


def _transpose_taken(module: nn.Module, state: dict[str, Any], prefix: str, *more: Any) -> None:
    weight = state.get(f"{prefix}weight")
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        state[f"{prefix}weight"] = weight.T


def _kind(module: nn.Module) -> tuple[str, str]:
    # By name: transformers may not be imported for it.
    return type(module).__module__, type(module).__name__

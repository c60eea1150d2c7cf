"""Several linear layers that read one tensor as one: their weights stacked row-wise, once, without a second copy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tensormill.ops import tiles
from tensormill.ops.linear_wna16.module import LinearWNA16


class Side(nn.Module):
    """Linear layers that can't be stacked, one after another, their results side by side.

    Args:
        parts: layers of the same in_features.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., sum of N)."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


def stacked(parts: Sequence[nn.Module]) -> nn.Module:
    """One layer that computes what `parts` compute, side by side; exact, since each row is computed as before.

    The weights move into one tensor, of which the parts' own become views: their `state_dict` says the same as before,
    and no weight is held twice. Parts of different kinds, widths or group sizes stay apart (`Side`).

    Args:
        parts: linear layers of the same in_features, each an `nn.Linear` or a `LinearWNA16`.
    """
    if all(type(part) is nn.Linear for part in parts):
        linears = [cast(nn.Linear, part) for part in parts]
        biases = [linear.bias for linear in linears]
        if len({linear.weight.dtype for linear in linears}) == 1 and _alike(biases):
            made = nn.Linear(1, 1, bias=False, device="meta")
            made.in_features = linears[0].in_features
            made.out_features = sum(linear.out_features for linear in linears)
            weight = nn.Parameter(_moved([linear.weight for linear in linears]), requires_grad=False)
            made.weight = weight
            if biases[0] is not None:
                made.bias = nn.Parameter(_moved(biases), requires_grad=False)
            return made.eval()
    if all(type(part) is LinearWNA16 for part in parts):
        packed = [cast(LinearWNA16, part) for part in parts]
        kinds = {(layer.bits, layer.group_size, layer.layout, tuple(_kinds(layer))) for layer in packed}
        whole_tiles = all(
            layer.layout == "packed" or layer.out_features % tiles.ROWS == 0 for layer in packed
        )
        if len(kinds) == 1 and whole_tiles:
            return _stacked_low_bit(packed)
    return Side(parts)


def _kinds(layer: LinearWNA16) -> list[tuple[str, torch.dtype | None]]:
    tensors = [*layer.named_buffers(), *layer.named_parameters()]
    return [(name, tensor.dtype) for name, tensor in tensors]


def _stacked_low_bit(layers: Sequence[LinearWNA16]) -> LinearWNA16:
    """In either layout a layer's buffers have its rows, or blocks of them, as their first dimension."""
    whole = copy.copy(layers[0])
    whole._buffers, whole._parameters = dict(whole._buffers), dict(whole._parameters)
    whole.out_features = sum(layer.out_features for layer in layers)
    for name, _ in layers[0].named_buffers():
        setattr(whole, name, _moved([getattr(layer, name) for layer in layers]))
    if layers[0].bias is not None:
        whole.bias = nn.Parameter(_moved([layer.bias for layer in layers]), requires_grad=False)
    return whole.eval()


def _alike(tensors: Sequence[Tensor | None]) -> bool:
    """All absent, or all of one dtype."""
    return len({None if tensor is None else tensor.dtype for tensor in tensors}) == 1


@torch.no_grad()
def _moved(tensors: Sequence[Tensor | None]) -> Tensor:
    """The tensors' rows in one tensor, into which each of them now looks."""
    present = [tensor for tensor in tensors if tensor is not None]
    whole = torch.cat([tensor.detach() for tensor in present])
    first = 0
    for tensor in present:
        tensor.data = whole[first : first + tensor.shape[0]]
        first += tensor.shape[0]
    return whole

"""The definition of `linear_wna16` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.ops.dequantize_wna16.reference import dequantize_wna16


def linear_wna16(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """`x @ W.T + bias` with `W = (code - zero_point) * scale`, summed in float32 (float64 for float64 x).

    Args:
        x: (..., K) float.
        weight: (N, ceil(K * bits / 32)) int32, codes packed densely along K.
        scale: (N, G) float, G = ceil(K / group_size).
        zero_point: (N, G) uint8, or None for `2 ** (bits - 1)` everywhere.
        bias: (N,) float, or None.
        bits: width of a code, 1 to 8.
        group_size: columns that share a scale, -1 for the whole row; the last group may be shorter.
        layout: "packed", or "tiled" for the form that `tiles.tile_weight` makes.

    Returns:
        (..., N) in x's dtype.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    dense = dequantize_wna16(weight, scale, zero_point, x.shape[-1], bits, group_size, layout, compute)
    y = x.to(compute) @ dense.T
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype)

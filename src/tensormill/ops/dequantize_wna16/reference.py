"""The definition of `dequantize_wna16` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.ops.bit_packing import unpack_bits
from tensormill.ops.tiles import untile_weight


def dequantize_wna16(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    """Weights [N, K] as `(code - zero_point) * scale`, computed in float32 (float64 for a float64 result).

    Args:
        weight: (N, ceil(K * bits / 32)) int32, codes packed densely along K.
        scale: (N, G) float, G = ceil(K / group_size).
        zero_point: (N, G) uint8, or None for `2 ** (bits - 1)` everywhere.
        in_features: K.
        bits: width of a code, 1 to 8.
        group_size: columns that share a scale, -1 for the whole row; the last group may be shorter.
        layout: "packed", or "tiled" for the form that `untile_weight` undoes.
        dtype: of the result.

    Returns:
        (N, K) of `dtype`.
    """
    if layout == "tiled":
        weight, scale, zero_point = untile_weight(
            weight, scale, zero_point, in_features=in_features, bits=bits, group_size=group_size
        )
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    codes = unpack_bits(weight, bits, in_features).to(compute)
    columns = torch.arange(in_features, device=weight.device)
    group = columns // (in_features if group_size == -1 else group_size)  # [K]
    zero = float(1 << (bits - 1)) if zero_point is None else zero_point.to(compute)[:, group]
    return ((codes - zero) * scale.to(compute)[:, group]).to(dtype)

"""The definition of `linear_wna8` in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tensormill.ops.bit_packing import unpack_bits
from tensormill.ops.linear_wna8.planes import to_packed
from tensormill.ops.quantize_activations.reference import quantize_activations


def segment_size(in_features: int, group_size: int, x_group_size: int) -> int:
    """Columns over which integers are summed before a scale changes (the last segment may be shorter)."""
    size = math.gcd(max(group_size, 0), max(x_group_size, 0))
    return size if size > 0 else max(in_features, 1)


def linear_wna8(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    x_group_size: int,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    layout: str,
) -> Tensor:
    """`(x * x_scale) @ W.T + bias` with `W = (code - zero_point) * weight_scale`.

    Segments of K in which no scale changes are summed exactly; the sums become float32 (float64 for a float64
    `weight_scale`), are multiplied by the weight's scale and x's, and added in the order of K.

    Args:
        x: (..., K): codes of activations if there is an `x_scale`, else floats, which `quantize_activations` turns
            into codes of `x_dtype` with 8 bits, in groups of `x_group_size`.
        x_scale: (..., Gx) float32, Gx = ceil(K / x_group_size), or None.
        weight: (N, ceil(K * bits / 32)) int32, codes packed densely along K.
        weight_scale: (N, G) float, G = ceil(K / group_size).
        zero_point: (N, G) uint8, or None for `2 ** (bits - 1)` everywhere.
        bias: (N,) float, or None.
        out_features: N.
        bits: width of a weight's code, 1 to 8.
        group_size: columns that share a weight scale, -1 for the whole row; the last group may be shorter.
        x_group_size: channels of x that share a scale, -1 for all.
        x_dtype: of the activations' codes: torch.int8, or torch.float8_e4m3fn.
        dtype: of the result.
        layout: of weight, weight_scale and zero_point: "packed", or another that `planes.to_packed` knows.

    Returns:
        (..., N) of `dtype` (float64 for a float64 `weight_scale`).
    """
    if x_scale is None:
        x, x_scale = quantize_activations(x, None, None, None, 0.0, 0.0, 8, x_group_size, x_dtype)
    weight, weight_scale, zero_point = to_packed(
        weight,
        weight_scale,
        zero_point,
        rows=out_features,
        in_features=x.shape[-1],
        bits=bits,
        group_size=group_size,
        layout=layout,
    )
    compute = torch.float64 if weight_scale.dtype == torch.float64 else torch.float32
    columns = x.shape[-1]
    codes = unpack_bits(weight, bits, columns).double()
    group = max(columns, 1) if group_size == -1 else group_size
    x_group = max(columns, 1) if x_group_size == -1 else x_group_size
    total = torch.zeros((*x.shape[:-1], out_features), dtype=compute, device=x.device)
    step = segment_size(columns, group_size, x_group_size)
    for begin in range(0, columns, step):
        g, gx = begin // group, begin // x_group
        zero = float(1 << (bits - 1)) if zero_point is None else zero_point[:, g, None].double()
        part = slice(begin, begin + step)
        # float64 holds these sums exactly
        exact = x[..., part].double() @ (codes[:, part] - zero).T
        total = total + exact.to(compute) * weight_scale[:, g].to(compute) * x_scale[..., gx, None].to(
            compute
        )
    if bias is not None:
        total = total + bias.to(compute)
    return total if compute == torch.float64 else total.to(dtype)

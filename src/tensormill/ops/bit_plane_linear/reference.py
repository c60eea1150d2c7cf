"""The product of two matrices of small integers in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.ops.bit_planes import step_and_offset, unpack_codes


def bit_plane_linear(
    x: Tensor,
    weight: Tensor,
    x_sums: Tensor,
    weight_sums: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    length: int,
    x_format: str,
    weight_format: str,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """`y[m, n] = sum_g x_scale[m, g] weight_scale[n, g] sum_{k in g} x[m, k] weight[n, k]`, or without scales in int32.

    Args:
        x: (q, M, W) int32 planes.
        weight: (p, N, W) int32 planes.
        x_sums, weight_sums: (M, G), (N, G) int32; what kernels need, not used here.
        x_scale, weight_scale: (M, G), (N, G) float, or both None.
        length: K.
        x_format, weight_format: see `bit_planes`.
        group_size: columns of a group, or -1.
        dtype: of the result where there are scales (float64 scales give float64).
    """
    x_integers, weight_integers = _integers(x, length, x_format), _integers(weight, length, weight_format)
    if x_scale is None or weight_scale is None:
        # Sums of products of 8-bit integers are exact in float64.
        return (x_integers.double() @ weight_integers.double().T).int()
    wide = torch.promote_types(torch.promote_types(x_scale.dtype, weight_scale.dtype), torch.float32)
    step = length if group_size == -1 else group_size
    total = torch.zeros(x.shape[1], weight.shape[1], dtype=wide, device=x.device)
    for g in range(x_scale.shape[1]):
        part = slice(g * step, (g + 1) * step)
        exact = x_integers[:, part].double() @ weight_integers[:, part].double().T
        total += exact.to(wide) * (x_scale[:, g, None].to(wide) * weight_scale[:, g].to(wide))
    return total.to(torch.float64 if wide == torch.float64 else dtype)


def _integers(planes: Tensor, length: int, format: str) -> Tensor:
    step, offset = step_and_offset(format, planes.shape[0])
    return step * unpack_codes(planes, length).int() + offset

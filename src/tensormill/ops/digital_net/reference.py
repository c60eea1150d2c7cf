"""The definition of the points of a digital net in plain PyTorch."""

import torch
from torch import Tensor

DIGITS = {torch.float64: 52, torch.float32: 23}
"""Digits that a floating-point coordinate keeps: all numbers of that many digits have the same spacing."""


def digital_net(
    matrices: Tensor, shift: Tensor | None, start: int, n: int, bits: int, gray: bool, dtype: torch.dtype
) -> Tensor:
    """Exclusive or of the columns of the set bits of every index, cut to the digits that the dtype holds.

    Args:
        matrices: (R, d, m) int64, columns whose `bits` bits have the first digit highest.
        shift: (R, d) int64 of `bits` bits, or None.
        start: index of the first point.
        n: number of points; start + n is at most 2^m.
        bits: digits of columns and shift, 1 to 63.
        gray: whether point i has the index i ^ (i >> 1) instead of i.
        dtype: int64 for all digits as integers, float64 or float32 for numbers in [0, 1), never rounded up.

    Returns:
        (R, n, d) of that dtype.
    """
    replications, d, m = matrices.shape
    index = torch.arange(start, start + n, device=matrices.device)
    if gray:
        index = index ^ (index >> 1)
    points = torch.zeros(replications, n, d, dtype=torch.int64, device=matrices.device)
    for bit in range(m):
        points = points ^ ((index >> bit) & 1)[:, None] * matrices[:, None, :, bit]
    if shift is not None:
        points = points ^ shift[:, None]
    if dtype == torch.int64:
        return points
    kept = min(bits, DIGITS[dtype])
    return (points >> (bits - kept)).to(dtype) * 2.0**-kept

"""Blocks of points in plain PyTorch, on any device: one operation or two per coordinate.

The low bits of the index give a table of exclusive ors, the high bits give a row for each block, and a point is the
exclusive or of a row of either. The digits become the mantissa of a number in [1, 2), from which 1 is subtracted.
"""

import torch
from torch import Tensor

from tensormill.ops.digital_net.reference import DIGITS

LOW_BITS = 10
_CACHED = 1 << 15  # elements at a time on the CPU: 256 KB of doubles, half of a common second-level cache
_WORDS = {torch.float64: (torch.int64, 1023 << 52), torch.float32: (torch.int32, 127 << 23)}


def digital_net(
    matrices: Tensor, shift: Tensor | None, start: int, n: int, bits: int, gray: bool, dtype: torch.dtype
) -> Tensor:
    """See `tensormill.ops.digital_net`."""
    replications, d, m = matrices.shape
    if replications * n * d == 0:
        return matrices.new_empty((replications, n, d), dtype=dtype)
    if gray:  # i ^ (i >> 1) is linear in i: column c of the natural order also belongs to bit c + 1
        matrices = torch.cat([matrices[..., :1], matrices[..., 1:] ^ matrices[..., :-1]], -1)
    low_bits = min(LOW_BITS, m, (start + n - 1).bit_length())
    first, last = start >> low_bits, (start + n - 1) >> low_bits
    low = _aligned(matrices[..., :low_bits], low_bits)
    high = _range(matrices[..., low_bits:], first, last - first + 1)
    if shift is not None:
        high = high ^ shift[:, None]
    word = torch.int64
    if dtype != torch.int64:
        digits = DIGITS[dtype]
        word, one = _WORDS[dtype]
        low, high = (
            (w >> (bits - digits) if bits >= digits else w << (digits - bits)).to(word) for w in (low, high)
        )
        high = high | one
    blocks = last - first + 1
    result = torch.empty(replications, blocks << low_bits, d, dtype=dtype, device=matrices.device)
    parts = result.unflatten(1, (blocks, -1))  # (R, blocks, 2^low_bits, d)
    step = blocks if result.device.type != "cpu" else max(1, _CACHED // (replications * d << low_bits))
    for begin in range(0, blocks, step):
        part = parts[:, begin : begin + step]
        torch.bitwise_xor(high[:, begin : begin + step, None], low[:, None], out=part.view(word))
        if dtype != torch.int64:
            part.sub_(1)
    skipped = start - (first << low_bits)
    return result[:, skipped : skipped + n].contiguous()


def _aligned(columns: Tensor, depth: int) -> Tensor:
    """Exclusive ors of columns for the indices below 2^depth: (R, 2^depth, d)."""
    rows = columns.new_zeros(columns.shape[0], 1, columns.shape[1])
    for bit in range(depth):
        rows = torch.cat([rows, rows ^ columns[..., bit].unsqueeze(1)], 1)
    return rows


def _range(columns: Tensor, first: int, count: int) -> Tensor:
    """Exclusive ors of columns for the indices from `first` on: (R, count, d)."""
    depth = (count - 1).bit_length()
    if first % (1 << depth):  # within an aligned range twice as long, or in two of them
        offset = first % (1 << depth)
        halves = [_range(columns, first - offset, (1 << depth))]
        if offset + count > 1 << depth:
            halves.append(_range(columns, first - offset + (1 << depth), (1 << depth)))
        return torch.cat(halves, 1)[:, offset : offset + count]
    base = columns.new_zeros(columns.shape[0], columns.shape[1])
    for bit in range(first.bit_length()):
        if first >> bit & 1:
            base = base ^ columns[..., bit]
    return (_aligned(columns, depth) ^ base.unsqueeze(1))[:, :count]

"""Triton kernel: quantizes a row in two passes, of which the second finds it in the cache.

Eight neighbours make one byte of every plane, and a thread holds eight neighbours: the bytes are sums within a thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensormill.ops.bit_planes import FORMATS, group_count, words_of_row
from tensormill.ops.quantize_bit_planes.reference import SMALLEST_SCALE

_UNSIGNED, _SIGNED = (tl.constexpr(FORMATS.index(name)) for name in ("unsigned", "signed"))
_SMALLEST = tl.constexpr(SMALLEST_SCALE)
_ROUND = tl.constexpr(1.5 * 2**23)  # adding and subtracting it rounds to the nearest integer, ties to even


@triton.jit
def _quantize_kernel(
    x_ptr,
    planes_ptr,
    sums_ptr,
    scale_ptr,
    rows,
    length,
    row_bytes,
    groups,
    group_length,
    BITS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = group * group_length
    end = tl.minimum(first + group_length, length)
    x_ptr += row * length
    column = tl.arange(0, BLOCK)

    statistic = tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, BLOCK):
        value = tl.load(x_ptr + start + column, mask=start + column < end, other=0.0).to(tl.float32)
        if BITS == 1 and FORMAT != _UNSIGNED:
            statistic += tl.abs(value)
        elif FORMAT == _UNSIGNED:
            statistic = tl.maximum(statistic, value)
        else:
            statistic = tl.maximum(statistic, tl.abs(value))
    if BITS == 1 and FORMAT != _UNSIGNED:
        scale = tl.div_rn(tl.sum(statistic, 0), (end - first).to(tl.float32))
    elif FORMAT == _UNSIGNED:
        scale = tl.div_rn(tl.max(statistic, 0), (1 << BITS) - 1.0)
    elif FORMAT == _SIGNED:
        scale = tl.div_rn(tl.max(statistic, 0), (1 << (BITS - 1)) - 1.0)
    else:
        scale = tl.max(statistic, 0) * (1.0 / (1 << BITS))
    scale = tl.where(scale < _SMALLEST, 0.0, scale)
    inverse = tl.where(scale == 0.0, 0.0, tl.div_rn(1.0, tl.where(scale == 0.0, 1.0, scale)))

    HALF: tl.constexpr = 1 << (BITS - 1)
    octet = tl.arange(0, BLOCK // 8)[:, None]
    place = tl.arange(0, 8)[None, :]
    # bytes of the row's padding belong to its last group
    last_byte = tl.where(end == length, row_bytes, end // 8)
    total = tl.zeros([BLOCK // 8], tl.int32)
    for start in range(first, last_byte * 8, BLOCK):
        at = start + octet * 8 + place
        value = tl.load(x_ptr + at, mask=at < end, other=0.0).to(tl.float32)
        if FORMAT == _UNSIGNED:
            code = (tl.clamp(value * inverse, 0.0, (1 << BITS) - 1.0) + _ROUND) - _ROUND
        elif FORMAT == _SIGNED:
            code = (tl.clamp(value * inverse, -HALF + 0.0, HALF - 1.0) + _ROUND) - _ROUND + HALF
        elif BITS == 1:
            code = tl.where(value >= 0, 1.0, 0.0)
        else:
            code = tl.clamp(tl.floor(value * inverse * 0.5), -HALF + 0.0, HALF - 1.0) + HALF
        code = tl.where(at < end, code.to(tl.int32), 0)
        total += tl.sum(code, 1)
        byte_at = start // 8 + tl.arange(0, BLOCK // 8)
        for j in tl.static_range(BITS):
            byte = tl.sum(((code >> j) & 1) << place, 1)
            target = planes_ptr + (j * rows + row) * row_bytes + byte_at
            tl.store(target, byte.to(tl.uint8), mask=byte_at < last_byte)
    tl.store(sums_ptr + row * groups + group, tl.sum(total, 0))
    tl.store(scale_ptr + row * groups + group, scale)


def quantize_bit_planes(x: Tensor, bits: int, format: str, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.quantize_bit_planes`."""
    x = x.contiguous()
    rows, length = x.shape
    groups, words = group_count(length, group_size), words_of_row(length)
    planes = torch.empty((bits, rows, words), dtype=torch.int32, device=x.device)
    sums = torch.empty((rows, groups), dtype=torch.int32, device=x.device)
    scale = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    if rows > 0:
        group_length = length if group_size == -1 else group_size
        block = min(4096, max(128, triton.next_power_of_2(group_length)))
        _quantize_kernel[rows, groups](
            x,
            planes.view(torch.uint8),
            sums,
            scale,
            rows,
            length,
            4 * words,
            groups,
            group_length,
            bits,
            FORMATS.index(format),
            block,
            num_warps=max(1, min(8, block // 512)),
        )
    return planes, sums, scale

"""Triton kernel: quantizes a group of a row while a program holds it in registers, or, where it is long, in two passes
of which the second finds it in the cache.

Eight neighbours make one byte of every plane, and a thread holds eight neighbours: the bytes are sums within a thread.
From four bits on, the eight codes are transposed as an 8 x 8 matrix of bits instead.
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
_LONGEST_WHOLE = 1 << 14  # elements that a program holds in registers
_ROUND = tl.constexpr(1.5 * 2**23)  # adding and subtracting it rounds to the nearest integer, ties to even


@triton.jit
def _statistic(value, BITS: tl.constexpr, FORMAT: tl.constexpr):
    """What the scale comes from, of one element: to be summed for signs, else the largest counts."""
    if FORMAT == _UNSIGNED:
        return tl.maximum(value, 0.0)
    return tl.abs(value)


@triton.jit
def _codes(value, inverse, BITS: tl.constexpr, FORMAT: tl.constexpr):
    HALF: tl.constexpr = 1 << (BITS - 1)
    if FORMAT == _UNSIGNED:
        code = (tl.clamp(value * inverse, 0.0, (1 << BITS) - 1.0) + _ROUND) - _ROUND
    elif FORMAT == _SIGNED:
        code = (tl.clamp(value * inverse, -HALF + 0.0, HALF - 1.0) + _ROUND) - _ROUND + HALF
    elif BITS == 1:
        code = tl.where(value >= 0, 1.0, 0.0)
    else:
        code = tl.clamp(tl.floor(value * inverse * 0.5), -HALF + 0.0, HALF - 1.0) + HALF
    return code.to(tl.int32)


@triton.jit
def _store_planes(code, planes_ptr, byte_at, plane_bytes, inside, BITS: tl.constexpr):
    """Planes of (octets, 8) codes, a byte for each octet at `planes_ptr + j * plane_bytes + byte_at`."""
    place = tl.arange(0, 8)[None, :]
    if BITS < 4:
        for j in tl.static_range(BITS):
            byte = tl.sum(((code >> j) & 1) << place, 1)
            tl.store(planes_ptr + j * plane_bytes + byte_at, byte.to(tl.uint8), mask=inside)
    else:
        # Transposes bits (Hacker's Delight, section 7-3): byte j of the result has bit j of every code.
        word = tl.sum(code.to(tl.int64) << (8 * place), 1)
        swap = (word ^ (word >> 7)) & 0x00AA00AA00AA00AA
        word ^= swap ^ (swap << 7)
        swap = (word ^ (word >> 14)) & 0x0000CCCC0000CCCC
        word ^= swap ^ (swap << 14)
        swap = (word ^ (word >> 28)) & 0x00000000F0F0F0F0
        word ^= swap ^ (swap << 28)
        for j in tl.static_range(BITS):
            tl.store(planes_ptr + j * plane_bytes + byte_at, (word >> (8 * j)).to(tl.uint8), mask=inside)


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
    WHOLE: tl.constexpr,
):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = group * group_length
    end = tl.minimum(first + group_length, length)
    # bytes of the row's padding belong to its last group
    last_byte = tl.where(end == length, row_bytes, end // 8)
    MEAN: tl.constexpr = BITS == 1 and FORMAT != _UNSIGNED
    x_ptr += row * length
    octet = tl.arange(0, BLOCK // 8)
    column = octet[:, None] * 8 + tl.arange(0, 8)[None, :]

    if WHOLE:
        at = first + column
        value = tl.load(x_ptr + at, mask=at < end, other=0.0).to(tl.float32)
        statistic = _statistic(value, BITS, FORMAT)
        total = tl.sum(tl.sum(statistic, 1), 0) if MEAN else tl.max(tl.max(statistic, 1), 0)
    else:
        partial = tl.zeros([BLOCK // 8, 8], tl.float32)
        for start in range(first, end, BLOCK):
            at = start + column
            found = tl.load(x_ptr + at, mask=at < end, other=0.0).to(tl.float32)
            statistic = _statistic(found, BITS, FORMAT)
            partial = partial + statistic if MEAN else tl.maximum(partial, statistic)
        total = tl.sum(tl.sum(partial, 1), 0) if MEAN else tl.max(tl.max(partial, 1), 0)
    if MEAN:
        scale = tl.div_rn(total, (end - first).to(tl.float32))
    elif FORMAT == _UNSIGNED:
        scale = tl.div_rn(total, (1 << BITS) - 1.0)
    elif FORMAT == _SIGNED:
        scale = tl.div_rn(total, (1 << (BITS - 1)) - 1.0)
    else:
        scale = total * (1.0 / (1 << BITS))
    scale = tl.where(scale < _SMALLEST, 0.0, scale)
    inverse = tl.where(scale == 0.0, 0.0, tl.div_rn(1.0, tl.where(scale == 0.0, 1.0, scale)))

    planes_ptr += row * row_bytes
    plane_bytes = rows.to(tl.int64) * row_bytes
    if WHOLE:
        code = tl.where(first + column < end, _codes(value, inverse, BITS, FORMAT), 0)
        code_sum = tl.sum(tl.sum(code, 1), 0)
        byte_at = first // 8 + octet
        _store_planes(code, planes_ptr, byte_at, plane_bytes, byte_at < last_byte, BITS)
    else:
        sums = tl.zeros([BLOCK // 8], tl.int32)
        for start in range(first, last_byte * 8, BLOCK):
            at = start + column
            again = tl.load(x_ptr + at, mask=at < end, other=0.0).to(tl.float32)
            code = tl.where(at < end, _codes(again, inverse, BITS, FORMAT), 0)
            sums += tl.sum(code, 1)
            byte_at = start // 8 + octet
            _store_planes(code, planes_ptr, byte_at, plane_bytes, byte_at < last_byte, BITS)
        code_sum = tl.sum(sums, 0)
    tl.store(sums_ptr + row * groups + group, code_sum)
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
        whole = triton.next_power_of_2(32 * words_of_row(group_length))
        block = whole if whole <= _LONGEST_WHOLE else 4096
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
            whole <= _LONGEST_WHOLE,
            num_warps=max(1, min(16, block // 1024)),
        )
    return planes, sums, scale

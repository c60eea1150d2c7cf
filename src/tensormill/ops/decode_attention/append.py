"""Triton kernel that quantizes new keys or values and stores them in a cache: one launch, no temporaries."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensormill.ops.decode_attention.storage import KVFormat


@triton.jit
def _nearest(x):
    """Nearest integer, ties to even, of numbers below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _store_kernel(
    new,
    stored,
    scale_pointer,
    offset_pointer,
    lengths,
    counts,
    block_table,
    kv_heads,
    tokens,
    table_width,
    new_stride_b,
    new_stride_h,
    new_stride_t,
    stride_p,
    stride_h,
    stride_n,
    scale_stride_p,
    scale_stride_h,
    scale_stride_n,
    capacity,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    EXPONENTS: tl.constexpr,
    OFFSET: tl.constexpr,
    COUNTS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_T tokens of one sequence and head, one group of SIZE channels.

    With 4 bits it is SIZE channels of the first half and their partners, HALF channels on, which share bytes; if
    GROUPS is 1 they are all, with one scale.
    """
    sequence = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = tl.program_id(1) % kv_heads
    group = tl.program_id(2)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    wanted = tokens
    if COUNTS:
        wanted = tl.minimum(tokens, tl.load(counts + sequence))
    position = tl.load(lengths + sequence) + token
    ok = (token < wanted) & (position < capacity)
    page = tl.full((BLOCK_T,), 0, tl.int64) + sequence
    at = position
    if PAGE > 0:
        page = tl.load(block_table + sequence * table_width + position // PAGE, mask=ok, other=-1).to(
            tl.int64
        )
        at = position % PAGE
        ok = ok & (page >= 0)
    channel = tl.arange(0, BLOCK_D)
    mask = ok[:, None] & (channel < SIZE)[None, :]
    source = new + sequence * new_stride_b + head * new_stride_h + token.to(tl.int64)[:, None] * new_stride_t
    source += (group * SIZE + channel)[None, :]
    target = stored + page[:, None] * stride_p + head * stride_h + at[:, None] * stride_n
    target += (group * SIZE + channel)[None, :]
    x = tl.load(source, mask=mask, other=0.0)
    if BITS == 16:
        tl.store(target, x, mask=mask)
    else:
        scale_at = page * scale_stride_p + head * scale_stride_h + at * scale_stride_n + group
        x = x.to(tl.float32)
        if BITS == 4:
            y = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
            if GROUPS == 1:
                low, high = _codes(
                    x, y, scale_pointer, offset_pointer, scale_at, ok, channel < SIZE, BITS, EXPONENTS, OFFSET
                )
            else:
                low, _ = _codes(
                    x, x, scale_pointer, offset_pointer, scale_at, ok, channel < SIZE, BITS, EXPONENTS, OFFSET
                )
                high, _ = _codes(
                    y,
                    y,
                    scale_pointer,
                    offset_pointer,
                    scale_at + GROUPS // 2,
                    ok,
                    channel < SIZE,
                    BITS,
                    EXPONENTS,
                    OFFSET,
                )
            packed = (low + 8) | ((high + 8) << 4)
            tl.store(target, packed.to(tl.uint8), mask=mask)
        else:
            codes, _ = _codes(
                x, x, scale_pointer, offset_pointer, scale_at, ok, channel < SIZE, BITS, EXPONENTS, OFFSET
            )
            tl.store(target, codes.to(tl.int8), mask=mask)


@triton.jit
def _codes(
    x,
    y,
    scale_pointer,
    offset_pointer,
    at,
    ok,
    used,
    BITS: tl.constexpr,
    EXPONENTS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """int32 codes of both, which share a scale; stores scale and offset. As `quantize_kv`, to the bit."""
    TOP: tl.constexpr = 2 ** (BITS - 1) - 1
    largest = tl.maximum(tl.max(tl.abs(x), 1), tl.max(tl.abs(y), 1))
    middle = tl.zeros_like(largest)
    LOW: tl.constexpr = -TOP - 1 if OFFSET else -TOP
    if EXPONENTS:
        exponent = largest.to(tl.int32, bitcast=True) >> 23
        tl.store(scale_pointer + at, exponent.to(tl.uint8), mask=ok)
        scale = (exponent << 23).to(tl.float32, bitcast=True) * (2.0 ** (2 - BITS))
    else:
        if OFFSET:
            infinity = float("inf")
            most = tl.maximum(
                tl.max(tl.where(used[None, :], x, -infinity), 1),
                tl.max(tl.where(used[None, :], y, -infinity), 1),
            )
            least = tl.minimum(
                tl.min(tl.where(used[None, :], x, infinity), 1),
                tl.min(tl.where(used[None, :], y, infinity), 1),
            )
            exact = tl.div_rn(most / 2 - least / 2, tl.full(most.shape, TOP + 0.5, tl.float32))
            middle = (least / 2 + most / 2 + exact / 2).to(offset_pointer.dtype.element_ty)
            tl.store(offset_pointer + at, middle, mask=ok)
            middle = middle.to(tl.float32)
        else:
            exact = tl.div_rn(largest, tl.full(largest.shape, TOP, tl.float32))
        rounded = exact.to(scale_pointer.dtype.element_ty)
        tl.store(scale_pointer + at, rounded, mask=ok)
        scale = rounded.to(tl.float32)
    step = tl.where(scale == 0, float("inf"), scale)[:, None]
    # clamped first: the rounding is for small numbers
    first = _nearest(tl.minimum(tl.maximum(tl.div_rn(x - middle[:, None], step), LOW), TOP))
    second = _nearest(tl.minimum(tl.maximum(tl.div_rn(y - middle[:, None], step), LOW), TOP))
    return first.to(tl.int32), second.to(tl.int32)


def store(
    new: Tensor,
    stored: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    storage: KVFormat | None,
    lengths: Tensor,
    counts: Tensor | None,
    block_table: Tensor | None,
    capacity: int,
) -> None:
    """Store `new` (batch, kv_heads, tokens, channels) behind the tokens that `lengths` counts; see `KVCache.append`.

    Args:
        new: the cache's dtype.
        stored, scale, offset: the cache's buffers, written.
        storage: their format, None for floats.
        lengths: (batch,) int32, unchanged.
        counts: (batch,) int32 or None.
        block_table: (batch, n) int32 or None; negative entries are no pages.
        capacity: most tokens of a sequence.
    """
    batch, kv_heads, tokens, width = new.shape
    if new.numel() == 0:
        return
    new = new if new.stride(-1) == 1 else new.contiguous()
    bits, groups = (16, 1) if storage is None else (storage.bits, storage.groups(width))
    pairs = bits == 4
    size = width // groups if groups > 1 or not pairs else width // 2
    per_token = groups // 2 if pairs and groups > 1 else groups
    page = 0 if block_table is None else stored.shape[2]
    block_d = max(16, triton.next_power_of_2(size))
    block_t = max(1, min(triton.next_power_of_2(tokens), 2048 // block_d))
    with torch.cuda.device(new.device) if new.is_cuda else nullcontext():
        _store_kernel[(triton.cdiv(tokens, block_t), batch * kv_heads, per_token)](
            new,
            stored,
            stored if scale is None else scale,
            stored if offset is None else offset,
            lengths,
            lengths if counts is None else counts,
            lengths if block_table is None else block_table,
            kv_heads,
            tokens,
            0 if block_table is None else block_table.stride(0),
            *new.stride()[:3],
            *stored.stride()[:3],
            *((0, 0, 0) if scale is None else scale.stride()[:3]),
            capacity,
            BITS=bits,
            SIZE=size,
            GROUPS=groups,
            HALF=width // 2,
            EXPONENTS=storage is not None and storage.exponents,
            OFFSET=offset is not None,
            COUNTS=counts is not None,
            PAGE=page,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=4 if block_t * block_d >= 1024 else 1,
        )

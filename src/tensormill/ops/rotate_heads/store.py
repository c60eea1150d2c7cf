"""Triton kernel that rotates new heads and stores keys and values in a cache: `rotate_heads` and the copy in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tensormill.ops.overlap import overlap_options


@triton.jit
def _kernel(
    x,
    cosine,
    sine,
    positions,
    query,
    cache,
    length,
    capacity,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    mask = (head < ALL)[:, None] & (column < HALF)[None, :]
    inside = column < HALF
    place = head[:, None] * (2 * HALF) + column[None, :]
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.load(positions + row % length)
    left = tl.load(x + row * (ALL * 2 * HALF) + place, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(x + row * (ALL * 2 * HALF) + place + HALF, mask=mask, other=0.0).to(tl.float32)
    table = (row % length) * (2 * HALF) + column
    cosine_left = tl.load(cosine + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    cosine_right = tl.load(cosine + table + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    sine_left = tl.load(sine + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    sine_right = tl.load(sine + table + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    kind = query.dtype.element_ty
    # each product rounded, then the sum, as the reference's steps are
    first = (left * cosine_left).to(kind).to(tl.float32) + (-right * sine_left).to(kind).to(tl.float32)
    second = (right * cosine_right).to(kind).to(tl.float32) + (left * sine_right).to(kind).to(tl.float32)
    turned = (head < HEADS + KV_HEADS)[:, None]
    first, second = tl.where(turned, first, left).to(kind), tl.where(turned, second, right).to(kind)
    is_query = (head < HEADS)[:, None] & mask
    target = query + row * (HEADS * 2 * HALF) + place
    tl.store(target, first, mask=is_query)
    tl.store(target + HALF, second, mask=is_query)
    # [keys or values, head] of a sequence are the rows of its part of the cache
    is_stored = (head >= HEADS)[:, None] & mask
    slot = (row // length * (2 * KV_HEADS) + head - HEADS) * capacity + at
    target = cache + slot[:, None] * (2 * HALF) + column[None, :]
    tl.store(target, first, mask=is_stored)
    tl.store(target + HALF, second, mask=is_stored)


def rotate_and_store(x: Tensor, cosine: Tensor, sine: Tensor, cache: Tensor, positions: Tensor) -> Tensor:
    """`rotate_heads` of queries and keys, with keys and values written to a cache instead of being returned.

    Args:
        x: (batch, length, heads + 2 * kv_heads, head_dim): queries, keys, values.
        cosine, sine: (length, head_dim) of x's dtype.
        cache: (batch, 2, kv_heads, capacity, head_dim) of x's dtype, contiguous; written.
        positions: (length,) int64, where in the cache the tokens stand; each below the capacity.

    Returns:
        The rotated queries, (batch, length, heads, head_dim).
    """
    batch, length, heads, head_dim = x.shape
    kv_heads, capacity = cache.shape[2], cache.shape[3]
    assert cache.is_contiguous() and cache.shape[:2] == (batch, 2) and cache.dtype == x.dtype
    query = x.new_empty(batch, length, heads - 2 * kv_heads, head_dim)
    x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
    block_d = triton.next_power_of_2(head_dim // 2)
    block_h = max(1, min(triton.next_power_of_2(heads), 512 // block_d))
    _kernel[(batch * length, triton.cdiv(heads, block_h))](
        x,
        cosine,
        sine,
        positions,
        query,
        cache,
        length,
        capacity,
        HEADS=heads - 2 * kv_heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        BLOCK_D=block_d,
        BLOCK_H=block_h,
        num_warps=4,
        **overlap_options(x),
    )
    return query

"""GPU kernels of decode attention.

`_attend_kernel` walks along one line of work: all tiles of BLOCK_N tokens of all (sequence, key-value head) pairs,
one pair after another. Each program takes the same number of tiles, whatever the lengths of the sequences, which
only the device knows: so all processors are busy for one sequence as for many, and nothing waits for the host. Where
a program leaves a pair it stores a partial result (unnormalized sum, largest exponent, sum of exponentials) in slot
program + pair, which is unique because both grow along the line. `_merge_kernel` adds up a pair's partial results
in order. Heads that share a key-value head, and their new tokens, are the rows of one tensor-core product; rows
beyond BLOCK_M go to neighbouring programs, which read the same tiles at the same time.

Quantized tiles are unpacked in registers to float16, exact integers, and the products are exact in float32. A scale
of a token and head is applied after the product with the query, and to the probability before the product with the
values. That could overflow or vanish in float16, so log2 of the value's scale takes part in the running maximum:
the scaled probabilities are at most one. With several scales for a head, elements are multiplied by their scale
relative to the token's largest (or to its offset), and that one takes the part of the token's scale. Queries are
divided by their largest magnitude to fit float16.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensormill.operator import interpreting
from tensormill.ops.decode_attention.storage import bits_of

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST_SCALE = tl.constexpr(2.0**-100)  # a value's scale of 0 counts as this in the running maximum


@triton.jit
def _nibbles(codes, COMPUTE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Both halves of packed codes, less 8, as COMPUTE."""
    if ASSEMBLY:
        # a nibble in the mantissa of 1024 is 1024 + code; of the high ones, 1024 + 16 * code
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, m, n, one, bias, sixteenth, shift;
            mov.b32 m, 0x000f000f;
            mov.b32 n, 0x00f000f0;
            mov.b32 one, 0x64006400;
            mov.b32 bias, 0x64086408;
            mov.b32 sixteenth, 0x2c002c00;
            mov.b32 shift, 0xd480d480;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            lop3.b32 $0, a, m, one, 0xea;
            lop3.b32 $1, b, m, one, 0xea;
            lop3.b32 $2, a, n, one, 0xea;
            lop3.b32 $3, b, n, one, 0xea;
            sub.f16x2 $0, $0, bias;
            sub.f16x2 $1, $1, bias;
            fma.rn.f16x2 $2, $2, sixteenth, shift;
            fma.rn.f16x2 $3, $3, sixteenth, shift;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            [codes],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((codes & 15).to(tl.float32) - 8).to(COMPUTE)
        high = ((codes >> 4).to(tl.float32) - 8).to(COMPUTE)
    return low, high


@triton.jit
def _bytes(codes, COMPUTE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """int8 codes as COMPUTE."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, one, bias;
            mov.b32 one, 0x64646464;
            mov.b32 bias, 0x64806480;
            xor.b32 t, $2, 0x80808080;
            prmt.b32 $0, t, one, 0x4140;
            prmt.b32 $1, t, one, 0x4342;
            sub.f16x2 $0, $0, bias;
            sub.f16x2 $1, $1, bias;
            }
            """,
            "=&r,=&r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        return codes.to(tl.float32).to(COMPUTE)


@triton.jit
def _scales(pointer, at, mask, BITS: tl.constexpr):
    """Scales, or powers of two from stored exponents, as float32."""
    raw = tl.load(pointer + at, mask=mask, other=0)
    if pointer.dtype.element_ty == tl.uint8:
        # 2^(e - 127), and 0 for e = 0; two steps keep the smallest ones
        return (raw.to(tl.int32) << 23).to(tl.float32, bitcast=True) * (2.0 ** (2 - BITS))
    else:
        return raw.to(tl.float32)


@triton.jit
def _grouped(
    codes, ratio, shift, N: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, OFFSET: tl.constexpr
):
    """codes [N, SIZE] times ratio [N, GROUPS] (plus shift), in the codes' dtype."""
    tile = tl.reshape(codes, (N, GROUPS, SIZE // GROUPS))
    tile = tile * ratio.to(codes.dtype)[:, :, None]
    if OFFSET:
        tile = tile + shift.to(codes.dtype)[:, :, None]
    return tl.reshape(tile, (N, SIZE))


@triton.jit
def _tile(
    pointer,
    scale_pointer,
    offset_pointer,
    at,
    scale_at,
    mask,
    N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    OFFSET: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """A tile of N tokens: a tuple of its pieces [N, D0], [N, D1] as COMPUTE, and scale and offset per token.

    D0 and D1 are the pieces' bytes for 4 bits, and each piece becomes two, low nibbles and high ones.
    """
    ok = mask[:, None]
    first = tl.load(pointer + at[:, None] + tl.arange(0, D0)[None, :], mask=ok, other=0)
    second = first
    if D1 > 0:
        second = tl.load(pointer + at[:, None] + (D0 + tl.arange(0, D1))[None, :], mask=ok, other=0)
    scale = tl.zeros((N,), tl.float32)
    offset = tl.zeros((N,), tl.float32)
    if BITS == 16:
        if D1 > 0:
            pieces = (first.to(COMPUTE), second.to(COMPUTE))
        else:
            pieces = (first.to(COMPUTE),)
    else:
        if GROUPS == 1:
            scale = _scales(scale_pointer, scale_at, mask, BITS)
            if OFFSET:
                offset = tl.load(offset_pointer + scale_at, mask=mask, other=0).to(tl.float32)
            if BITS == 8:
                if D1 > 0:
                    pieces = (_bytes(first, COMPUTE, ASSEMBLY), _bytes(second, COMPUTE, ASSEMBLY))
                else:
                    pieces = (_bytes(first, COMPUTE, ASSEMBLY),)
            else:
                low, high = _nibbles(first, COMPUTE, ASSEMBLY)
                if D1 > 0:
                    low1, high1 = _nibbles(second, COMPUTE, ASSEMBLY)
                    pieces = (low, low1, high, high1)
                else:
                    pieces = (low, high)
        else:
            HALF: tl.constexpr = GROUPS if BITS == 8 else GROUPS // 2
            group = scale_at[:, None] + tl.arange(0, HALF)[None, :]
            ratio = _scales(scale_pointer, group, ok, BITS)
            norm = tl.max(tl.abs(ratio), 1)
            shift = ratio
            ratio1 = ratio
            shift1 = ratio
            if OFFSET:
                shift = tl.load(offset_pointer + group, mask=ok, other=0).to(tl.float32)
                norm = tl.maximum(norm, tl.max(tl.abs(shift), 1))
            if BITS == 4:
                ratio1 = _scales(scale_pointer, group + HALF, ok, BITS)
                norm = tl.maximum(norm, tl.max(tl.abs(ratio1), 1))
                if OFFSET:
                    shift1 = tl.load(offset_pointer + group + HALF, mask=ok, other=0).to(tl.float32)
                    norm = tl.maximum(norm, tl.max(tl.abs(shift1), 1))
            scale = norm
            inverse = (1 / tl.maximum(norm, 1e-37))[:, None]
            if BITS == 8:
                tile = _bytes(first, COMPUTE, ASSEMBLY)
                pieces = (_grouped(tile, ratio * inverse, shift * inverse, N, D0, HALF, OFFSET),)
            else:
                low, high = _nibbles(first, COMPUTE, ASSEMBLY)
                low = _grouped(low, ratio * inverse, shift * inverse, N, D0, HALF, OFFSET)
                high = _grouped(high, ratio1 * inverse, shift1 * inverse, N, D0, HALF, OFFSET)
                pieces = (low, high)
    return pieces, scale, offset


@triton.jit
def _rows_of_query(pointer, at, mask, start, SIZE: tl.constexpr):
    return tl.load(
        pointer + at[:, None] + (start + tl.arange(0, SIZE))[None, :], mask=mask[:, None], other=0.0
    )


@triton.jit
def _magnitude(piece):
    return tl.max(tl.abs(piece.to(tl.float32)), 1)


@triton.jit
def _store_piece(pointer, piece, mask, start):
    tl.store(pointer + (start + tl.arange(0, piece.shape[1]))[None, :], piece, mask=mask)


@triton.jit
def _piece_start(j: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """First channel of piece j; pieces of two sizes alternate."""
    if D1 == 0:
        return j * D0
    else:
        return j // 2 * (D0 + D1) + j % 2 * D0


@triton.jit
def _tile_counts(lengths, batch, span, BATCH_PAD: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of every sequence, and the first: with a window, of `span` tokens, not tile 0."""
    index = tl.arange(0, BATCH_PAD)
    length = tl.load(lengths + index, mask=index < batch, other=0).to(tl.int32)
    first = tl.maximum(length - span, 0) // BLOCK_N
    return tl.cdiv(length, BLOCK_N) - first, first, length


@triton.jit(do_not_specialize=["batch", "span"])
def _attend_kernel(
    query,
    key,
    value,
    key_scale,
    key_offset,
    value_scale,
    value_offset,
    lengths,
    block_table,
    partial,
    statistics,
    factor,
    cap,
    batch,
    span,
    window,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    key_stride_p,
    key_stride_h,
    key_stride_n,
    value_stride_p,
    value_stride_h,
    value_stride_n,
    key_scale_stride_p,
    key_scale_stride_h,
    key_scale_stride_n,
    value_scale_stride_p,
    value_scale_stride_h,
    value_scale_stride_n,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    KEY_OFFSET: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_OFFSET: tl.constexpr,
    SHARED: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    COMPUTE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PRECISION: tl.constexpr,
    BATCH_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    # [M] rows are (head of the group, new token); pieces of a head's channels are K0 + K1 and V0 + V1 elements
    # (bytes for 4 bits, with low and high nibbles as separate pieces).
    ROWS: tl.constexpr = GROUP * QUERIES
    KEY_PIECES: tl.constexpr = (2 if KEY_BITS == 4 else 1) * (2 if K1 > 0 else 1)
    VALUE_PIECES: tl.constexpr = (2 if VALUE_BITS == 4 else 1) * (2 if V1 > 0 else 1)
    counts, firsts, lens = _tile_counts(lengths, batch, span, BATCH_PAD, BLOCK_N)
    ends = tl.cumsum(counts, 0)
    index = tl.arange(0, BATCH_PAD)
    total = tl.sum(counts, 0) * KV_HEADS
    programs = tl.num_programs(1)
    each = tl.cdiv(total, programs)
    position = tl.program_id(1) * each
    finish = tl.minimum(position + each, total)

    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < ROWS
    token = row % QUERIES
    while position < finish:
        sequence = tl.sum((ends * KV_HEADS <= position).to(tl.int32), 0)
        here = index == sequence
        count = tl.sum(tl.where(here, counts, 0), 0)
        length = tl.sum(tl.where(here, lens, 0), 0)
        within = position - (tl.sum(tl.where(here, ends, 0), 0) - count) * KV_HEADS
        head = within // count
        tile = within - head * count
        stop = tl.minimum(count, tile + finish - position)
        first = tl.sum(tl.where(here, firsts, 0), 0)
        pair = sequence * KV_HEADS + head
        slot = (tl.program_id(1) + pair).to(tl.int64)
        position += stop - tile

        query_at = (
            sequence.to(tl.int64) * query_stride_b
            + (head * GROUP + row // QUERIES) * query_stride_h
            + token * query_stride_t
        )
        if KEY_BITS == 4:
            qs = (_rows_of_query(query, query_at, row_ok, 0, K0),)
            if K1 > 0:
                qs = qs + (_rows_of_query(query, query_at, row_ok, K0, K1),)  # noqa: RUF005
            qs = qs + (_rows_of_query(query, query_at, row_ok, K0 + K1, K0),)  # noqa: RUF005
            if K1 > 0:
                qs = qs + (_rows_of_query(query, query_at, row_ok, 2 * K0 + K1, K1),)  # noqa: RUF005
        else:
            qs = (_rows_of_query(query, query_at, row_ok, 0, K0),)
            if K1 > 0:
                qs = qs + (_rows_of_query(query, query_at, row_ok, K0, K1),)  # noqa: RUF005
        row_factor = tl.full((BLOCK_M,), 1.0, tl.float32) * factor
        query_sum = tl.zeros((BLOCK_M,), tl.float32)
        if KEY_BITS != 16:
            largest = tl.full((BLOCK_M,), 1e-37, tl.float32)
            for i in tl.static_range(KEY_PIECES):
                largest = tl.maximum(largest, _magnitude(qs[i]))
                if KEY_OFFSET and KEY_GROUPS == 1:
                    query_sum += tl.sum(qs[i].to(tl.float32), 1)
            row_factor *= largest
            query_sum /= largest
            scaled = ()
            for i in tl.static_range(KEY_PIECES):
                scaled = scaled + ((qs[i].to(tl.float32) / largest[:, None]).to(COMPUTE),)  # noqa: RUF005
            qs = scaled
        else:
            cast = ()
            for i in tl.static_range(KEY_PIECES):
                cast = cast + (qs[i].to(COMPUTE),)  # noqa: RUF005
            qs = cast

        last = length - QUERIES + token  # [M]
        maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        shift = tl.zeros((BLOCK_M,), tl.float32)
        acc = (tl.zeros((BLOCK_M, V0), tl.float32),)
        if V1 > 0:
            acc = acc + (tl.zeros((BLOCK_M, V1), tl.float32),)  # noqa: RUF005
        if VALUE_BITS == 4:
            acc = acc + (tl.zeros((BLOCK_M, V0), tl.float32),)  # noqa: RUF005
            if V1 > 0:
                acc = acc + (tl.zeros((BLOCK_M, V1), tl.float32),)  # noqa: RUF005

        key_head = key + head.to(tl.int64) * key_stride_h
        value_head = value + head.to(tl.int64) * value_stride_h
        key_scale_head = key_scale + head.to(tl.int64) * key_scale_stride_h
        key_offset_head = key_offset + head.to(tl.int64) * key_scale_stride_h
        value_scale_head = value_scale + head.to(tl.int64) * value_scale_stride_h
        value_offset_head = value_offset + head.to(tl.int64) * value_scale_stride_h
        table = block_table + sequence.to(tl.int64) * table_stride
        if PAGE == 0:
            key_head += sequence.to(tl.int64) * key_stride_p
            value_head += sequence.to(tl.int64) * value_stride_p
            key_scale_head += sequence.to(tl.int64) * key_scale_stride_p
            key_offset_head += sequence.to(tl.int64) * key_scale_stride_p
            value_scale_head += sequence.to(tl.int64) * value_scale_stride_p
            value_offset_head += sequence.to(tl.int64) * value_scale_stride_p

        for i in tl.range(tile, stop, num_stages=STAGES):
            n = (first + i) * BLOCK_N + tl.arange(0, BLOCK_N)
            n_ok = n < length
            if PAGE == 0:
                # 32 bits reach far enough, as `supports` checks
                key_at = n * key_stride_n
                value_at = n * value_stride_n
                key_scale_at = n * key_scale_stride_n
                value_scale_at = n * value_scale_stride_n
            elif PAGE % BLOCK_N == 0:
                start = (first + i) * BLOCK_N
                page = tl.load(table + start // PAGE).to(tl.int64)
                inside = start % PAGE + tl.arange(0, BLOCK_N)
                key_at = page * key_stride_p + inside * key_stride_n
                value_at = page * value_stride_p + inside * value_stride_n
                key_scale_at = page * key_scale_stride_p + inside * key_scale_stride_n
                value_scale_at = page * value_scale_stride_p + inside * value_scale_stride_n
            else:
                page = tl.load(table + n // PAGE, mask=n_ok, other=0).to(tl.int64)
                inside = n % PAGE
                key_at = page * key_stride_p + inside * key_stride_n
                value_at = page * value_stride_p + inside * value_stride_n
                key_scale_at = page * key_scale_stride_p + inside * key_scale_stride_n
                value_scale_at = page * value_scale_stride_p + inside * value_scale_stride_n

            ks, k_scale, k_offset = _tile(
                key_head,
                key_scale_head,
                key_offset_head,
                key_at,
                key_scale_at,
                n_ok,
                BLOCK_N,
                K0,
                K1,
                KEY_BITS,
                KEY_GROUPS,
                KEY_OFFSET,
                COMPUTE,
                ASSEMBLY,
            )
            x = tl.dot(qs[0], tl.trans(ks[0]), input_precision=PRECISION)
            for j in tl.static_range(1, KEY_PIECES):
                x = tl.dot(qs[j], tl.trans(ks[j]), x, input_precision=PRECISION)
            if KEY_BITS != 16:
                x = x * k_scale[None, :]
                if KEY_OFFSET and KEY_GROUPS == 1:
                    x += query_sum[:, None] * k_offset[None, :]
            x = x * row_factor[:, None]
            if CAPPED:  # cap * tanh(x), and exp2 of infinity is infinity
                x = cap * (1 - 2 / (1 + tl.exp2(x * (2 * LOG2_E))))
            visible = n[None, :] <= last[:, None]
            if WINDOW:
                visible = visible & (n[None, :] > last[:, None] - window)
            x = tl.where(visible, x, -float("inf"))

            if SHARED:
                vs = ks
                v_scale = k_scale
                v_offset = k_offset
            else:
                vs, v_scale, v_offset = _tile(
                    value_head,
                    value_scale_head,
                    value_offset_head,
                    value_at,
                    value_scale_at,
                    n_ok,
                    BLOCK_N,
                    V0,
                    V1,
                    VALUE_BITS,
                    VALUE_GROUPS,
                    VALUE_OFFSET,
                    COMPUTE,
                    ASSEMBLY,
                )
            if VALUE_BITS == 16:
                gain = 0.0
                highest = tl.max(x, 1)
            else:
                gain = tl.log2(tl.maximum(tl.abs(v_scale), LEAST_SCALE))[None, :]
                highest = tl.max(x + gain, 1)
            grown = tl.maximum(maximum, highest)
            base = tl.where(grown == -float("inf"), 0.0, grown)
            alpha = tl.exp2(maximum - base)
            maximum = grown
            # No more than 0, although x may be rounded otherwise here than above, by a multiplication and an addition at once.
            p = tl.exp2(tl.minimum(x + gain - base[:, None], 0.0) - gain)
            sums = sums * alpha[:, None] + p
            if VALUE_BITS != 16:
                if VALUE_OFFSET and VALUE_GROUPS == 1:
                    shift = shift * alpha + tl.sum(p * v_offset[None, :], 1)
                p = p * v_scale[None, :]
            weights = p.to(COMPUTE)
            grown_acc = ()
            for j in tl.static_range(VALUE_PIECES):
                piece = tl.dot(weights, vs[j], acc[j] * alpha[:, None], input_precision=PRECISION)
                grown_acc = grown_acc + (piece,)  # noqa: RUF005
            acc = grown_acc

        stored = slot * ROWS + row
        tl.store(statistics + stored * 2, maximum, mask=row_ok)
        tl.store(statistics + stored * 2 + 1, tl.sum(sums, 1), mask=row_ok)
        out = partial + stored[:, None] * VALUE_DIM
        ok = row_ok[:, None]
        for j in tl.static_range(VALUE_PIECES):
            _store_piece(out, acc[j] + shift[:, None], ok, _piece_start(j, V0, V1))


@triton.jit(do_not_specialize=["batch", "span", "programs"])
def _merge_kernel(
    partial,
    statistics,
    lengths,
    sinks,
    output,
    lse,
    batch,
    span,
    programs,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SINKS: tl.constexpr,
    BATCH_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Output of one (sequence, head, new token) from its partial results, BLOCK_S at a time."""
    ROWS: tl.constexpr = GROUP * QUERIES
    counts, _, _ = _tile_counts(lengths, batch, span, BATCH_PAD, BLOCK_N)
    ends = tl.cumsum(counts, 0)
    index = tl.arange(0, BATCH_PAD)
    each = tl.maximum(tl.cdiv(tl.sum(counts, 0) * KV_HEADS, programs), 1)
    pair = tl.program_id(0) // ROWS
    row = tl.program_id(0) % ROWS
    sequence = pair // KV_HEADS
    head = pair % KV_HEADS
    here = index == sequence
    count = tl.sum(tl.where(here, counts, 0), 0)
    begin = (tl.sum(tl.where(here, ends, 0), 0) - count) * KV_HEADS + head * count
    first = begin // each
    last = tl.where(count > 0, (begin + count - 1) // each, first - 1)

    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    maximum = -float("inf")
    total = 0.0
    if SINKS:
        maximum = tl.load(sinks + head * GROUP + row // QUERIES).to(tl.float32) * LOG2_E
        total = 1.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(first, last + 1, BLOCK_S):
        part = start + tl.arange(0, BLOCK_S)
        ok = part <= last
        at = (part + pair).to(tl.int64) * ROWS + row
        highest = tl.load(statistics + at * 2, mask=ok, other=-float("inf"))
        sums = tl.load(statistics + at * 2 + 1, mask=ok, other=0.0)
        values = tl.load(
            partial + at[:, None] * VALUE_DIM + channel[None, :],
            mask=ok[:, None] & (channel < VALUE_DIM)[None, :],
            other=0.0,
        )
        grown = tl.maximum(maximum, tl.max(highest, 0))
        base = tl.where(grown == -float("inf"), 0.0, grown)
        alpha = tl.exp2(maximum - base)
        weight = tl.exp2(highest - base)
        total = total * alpha + tl.sum(weight * sums, 0)
        acc = acc * alpha + tl.sum(weight[:, None] * values, 0)
        maximum = grown
    acc = acc / tl.where(total > 0, total, 1.0)
    # the output's rows are (sequence, head, new token), which is the order of program 0
    at = tl.program_id(0).to(tl.int64)
    tl.store(output + at * VALUE_DIM + channel, acc.to(output.dtype.element_ty), mask=channel < VALUE_DIM)
    if tl.program_id(1) == 0:
        tl.store(lse + at, (maximum + tl.log2(total)) / LOG2_E)


@dataclass(frozen=True)
class Config:
    """How `_attend_kernel` runs.

    Attributes:
        block_tokens: tokens of a tile.
        warps, stages: as Triton has them.
        programs: of each processor, at a time.
    """

    block_tokens: int
    warps: int
    stages: int
    programs: int


def configuration(rows: int, head_dim: int, bits: int, paged: bool) -> Config:
    """The configuration for `rows` query rows of a key-value head, from measurements on an H200."""
    stages = 5 if paged else 3  # looking up a page takes two stages of the pipeline
    if head_dim > 256:
        return Config(32, 8, stages, 1)
    if bits < 16:
        if rows <= 16 and head_dim <= 128:
            return Config(64, 2, stages, 4)
        return Config(64 if rows <= 32 and head_dim <= 128 else 32, 4, stages, 2)
    return Config(64 if head_dim <= 128 and head_dim % 32 == 0 else 32, 4, stages, 2)


def pieces(size: int) -> tuple[int, int] | None:
    """`size` as a power of two and a smaller one (or 0), each at least 16; None if it is no such sum."""
    if size < 16:
        return None
    first = 1 << (size.bit_length() - 1)
    rest = size - first
    return (first, rest) if rest == 0 or (rest >= 16 and rest & (rest - 1) == 0) else None


def _storage_supported(stored: Tensor, scale: Tensor | None, offset: Tensor | None) -> bool:
    bits = bits_of(stored)
    split = pieces(stored.shape[-1])
    if split is None or stored.stride(-1) != 1 or stored.shape[2] * stored.stride(2) >= 1 << 31:
        return False
    if scale is None:
        return True
    if scale.stride(-1) != 1 or (offset is not None and offset.stride() != scale.stride()):
        return False
    groups = scale.shape[-1]
    half = groups if bits == 8 else groups // 2
    return groups == 1 or (split[1] == 0 and half & (half - 1) == 0 and half > 0)


def supports(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    key_scale: Tensor | None,
    key_offset: Tensor | None,
    value_scale: Tensor | None,
    value_offset: Tensor | None,
    lengths: Tensor,
    block_table: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    value_dim: int,
    window: int,
    softcap: float,
) -> bool:
    """Heads of a power of two of channels, or the sum of two, each at least 16 (32 for 4 bits)."""
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32) or 0 in key.shape:
        return False
    if not _storage_supported(key, key_scale, key_offset):
        return False
    if value is not None:
        return _storage_supported(value, value_scale, value_offset)
    # values are whole pieces of the keys
    bits, whole = bits_of(key), key.shape[-1]
    return value_dim == query.shape[-1] or (bits != 4 and value_dim == pieces(whole)[0] and key_scale is None)


@functools.cache
def _processors(index: int | None) -> int:
    return 2 if index is None else torch.cuda.get_device_properties(index).multi_processor_count


def decode_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See `tensormill.ops.decode_attention`."""
    query, key = arguments[0], arguments[1]
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    paged = arguments[8] is not None
    return run(configuration(rows, query.shape[-1], bits_of(key), paged), *arguments)


def run(
    config: Config,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    key_scale: Tensor | None,
    key_offset: Tensor | None,
    value_scale: Tensor | None,
    value_offset: Tensor | None,
    lengths: Tensor,
    block_table: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    value_dim: int,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """`decode_attention` with a given configuration."""
    batch, heads, queries, head_dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    output = torch.empty(batch, heads, queries, value_dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    if output.numel() == 0:
        return output, lse
    if query.stride(-1) != 1:
        query = query.contiguous()
    rows = group * queries
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    row_blocks = triton.cdiv(rows, block_m)
    programs = max(1, _processors(query.device.index) * config.programs // row_blocks)
    partial, statistics = workspace(programs + batch * kv_heads, rows, value_dim, query.device)
    shared = value is None
    if shared:
        value, value_scale, value_offset = key, key_scale, key_offset
    assert value is not None
    key_bits, value_bits = min(16, bits_of(key)), min(16, bits_of(value))
    key_pieces = pieces(key.shape[-1])
    value_pieces = pieces(value.shape[-1]) if not shared or value_dim == head_dim else (value_dim, 0)
    assert key_pieces is not None and value_pieces is not None
    if query.dtype == torch.float32:
        compute = tl.float32
    elif min(key_bits, value_bits) < 16 or query.dtype == torch.float16:
        compute = tl.float16
    else:
        compute = tl.bfloat16
    span = queries + window - 1 if window else 1 << 30
    batch_pad = max(2, triton.next_power_of_2(batch))
    factor, cap = (scale / softcap, softcap * LOG2_E.value) if softcap else (scale * LOG2_E.value, 0.0)
    with _device(query):
        _attend_kernel[(row_blocks, programs)](
            query,
            key,
            value,
            key if key_scale is None else key_scale,
            key if key_offset is None else key_offset,
            value if value_scale is None else value_scale,
            value if value_offset is None else value_offset,
            lengths,
            lengths if block_table is None else block_table,
            partial,
            statistics,
            factor,
            cap,
            batch,
            span,
            window,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *((0, 0, 0) if key_scale is None else key_scale.stride()[:3]),
            *((0, 0, 0) if value_scale is None else value_scale.stride()[:3]),
            0 if block_table is None else block_table.stride(0),
            KV_HEADS=kv_heads,
            GROUP=group,
            QUERIES=queries,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            K0=key_pieces[0],
            K1=key_pieces[1],
            V0=value_pieces[0],
            V1=value_pieces[1],
            KEY_BITS=key_bits,
            KEY_GROUPS=1 if key_scale is None else key_scale.shape[-1],
            KEY_OFFSET=key_offset is not None,
            VALUE_BITS=value_bits,
            VALUE_GROUPS=1 if value_scale is None else value_scale.shape[-1],
            VALUE_OFFSET=value_offset is not None,
            SHARED=shared,
            PAGE=0 if block_table is None else key.shape[2],
            WINDOW=window > 0,
            CAPPED=softcap > 0,
            COMPUTE=compute,
            ASSEMBLY=compute != tl.float32 and not interpreting(),
            PRECISION="ieee" if compute == tl.float32 else "tf32",
            BATCH_PAD=batch_pad,
            BLOCK_M=block_m,
            BLOCK_N=config.block_tokens,
            STAGES=config.stages,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        merge(partial, statistics, lengths, sinks, output, lse, kv_heads, span, programs, config.block_tokens)
    return output, lse


def merge(
    partial: Tensor,
    statistics: Tensor,
    lengths: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    lse: Tensor,
    kv_heads: int,
    span: int,
    programs: int,
    block_tokens: int,
) -> None:
    """Launch `_merge_kernel`: writes output and lse from the partial results of `programs` programs.

    Args:
        partial, statistics: (slots, rows, value_dim) and (slots, rows, 2), float32, flat; see the module.
        lengths, sinks, output, lse: of `decode_attention`.
        span: tokens that the newest ones may see.
        block_tokens: tokens of a tile.
    """
    batch, heads, queries, value_dim = output.shape
    group = heads // kv_heads
    block_d = min(128, triton.next_power_of_2(value_dim))
    _merge_kernel[(batch * heads * queries, triton.cdiv(value_dim, block_d))](
        partial,
        statistics,
        lengths,
        lengths if sinks is None else sinks,
        output,
        lse,
        batch,
        span,
        programs,
        KV_HEADS=kv_heads,
        GROUP=group,
        QUERIES=queries,
        VALUE_DIM=value_dim,
        SINKS=sinks is not None,
        BATCH_PAD=max(2, triton.next_power_of_2(batch)),
        BLOCK_N=block_tokens,
        BLOCK_D=block_d,
        BLOCK_S=16,
        num_warps=4,
    )


def workspace(slots: int, rows: int, value_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for partial results: (partial, statistics), flat."""
    room = torch.empty(slots * rows * (value_dim + 2), dtype=torch.float32, device=device)
    return room[slots * rows * 2 :], room[: slots * rows * 2]


def _device(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()

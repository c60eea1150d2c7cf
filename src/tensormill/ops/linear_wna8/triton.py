"""GPU kernels of `linear_wna8` on the layout `planes`.

- `_gemv_kernel` (a few tokens): four products and sums of bytes at once (`dp4a`), as many bytes of weights in
  flight as memory needs.
- `_gemm_kernel` (more): a tile of y, transposed: weights are the first operand of the tensor core's product, so that
  few tokens waste little, and go from shared memory through registers, where a part's codes are masked out, into it.

Codes stay at the top of a byte, that is, times a power of two, which the scale takes back. A zero point that is not
the middle of its range is applied through the sums of the activations. Where there are too few tiles for the
machine, K is split over programs; the last to arrive adds their sums, in the order of K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensormill.operator import interpreting
from tensormill.ops.linear_wna8 import planes as layouts
from tensormill.ops.linear_wna8.reference import segment_size
from tensormill.ops.overlap import overlap_options
from tensormill.ops.quantize_activations.triton import quantize

_ROWS = tl.constexpr(layouts.ROWS)


@triton.constexpr_function
def _fields(bits):
    return [width for width in (8, 4, 2, 1) if bits & width]


@triton.constexpr_function
def _parts(bits):
    return 8 // _fields(bits)[-1]


@triton.constexpr_function
def _sub_block(bits, plane, part):
    """The sub-block, counted over all planes, that has a part's codes of a plane."""
    widths = _fields(bits)
    before = sum(_parts(bits) * width // 8 for width in widths[:plane])
    return before + part // (8 // widths[plane])


@triton.constexpr_function
def _place(bits, plane):
    """The lowest bit of a plane's field in a code at the top of a byte."""
    return 8 - sum(_fields(bits)[: plane + 1])


@triton.constexpr_function
def _shift(bits, plane, part):
    """The shift that brings a part's field from its sub-block's byte to its place; to the left, if positive."""
    width = _fields(bits)[plane]
    return _place(bits, plane) - part % (8 // width) * width


@triton.constexpr_function
def _mask(bits, plane):
    """The field's place in all four bytes of a word."""
    return (((1 << _fields(bits)[plane]) - 1) << _place(bits, plane)) * 0x01010101


@triton.constexpr_function
def _sub_blocks(bits):
    return _parts(bits) * bits // 8


@triton.constexpr_function
def _assembly(bits, part):
    """PTX for `_top_bytes`: operand 0 is the result, then a word of each plane."""
    lines = [".reg .b32 t;", ".reg .b32 r;"]
    for plane in range(len(_fields(bits))):
        shift, mask = _shift(bits, plane, part), _mask(bits, plane)
        source = f"${plane + 1}"
        if shift != 0:
            lines.append(f"{'shl' if shift > 0 else 'shr'}.b32 t, {source}, {abs(shift)};")
            source = "t"
        lines.append(f"and.b32 {'r' if plane == 0 else 't'}, {source}, {mask:#010x};")
        if plane > 0:
            lines.append("or.b32 r, r, t;")
    return "{ " + " ".join(lines) + " mov.b32 $0, r; }"


@triton.constexpr_function
def _constraints(bits):
    return "=r" + ",r" * len(_fields(bits))


@triton.jit
def _signed(word):
    """The byte that a 32-bit integer's lowest eight bits are."""
    return ((word << 24) >> 24).to(tl.int8)


@triton.jit
def _top_bytes(tiles, part: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """A part's codes, int8, each times 2^(8 - BITS), from the block's sub-blocks of bytes."""
    FIELDS: tl.constexpr = _fields(BITS)
    if BITS == 8:
        return tiles[part]
    if INTERPRETED:
        code = tl.zeros(tiles[0].shape, tl.int32)
        for plane in tl.static_range(len(FIELDS)):
            byte = tiles[_sub_block(BITS, plane, part)].to(tl.int32) & 255
            code = code | (_shifted(byte, _shift(BITS, plane, part)) & (_mask(BITS, plane) & 255))
        return _signed(code)
    words = ()
    for plane in tl.static_range(len(FIELDS)):
        words = words + (tiles[_sub_block(BITS, plane, part)],)  # noqa: RUF005 (Triton has no starred tuples)
    return tl.inline_asm_elementwise(
        _assembly(BITS, part), _constraints(BITS), words, dtype=tl.int8, is_pure=True, pack=4
    )


@triton.jit
def _fp8_bytes(tile, part: tl.constexpr):
    """A part's 4-bit codes with a sign as fp8, (code - 7.5) / 256: below 16, an fp8 byte is linear in its value."""
    if part % 2 == 0:
        byte = tl.inline_asm_elementwise(
            "{ .reg .b32 s; .reg .b32 t; shl.b32 s, $1, 4; and.b32 s, s, 0x80808080; shl.b32 t, $1, 1;"
            " and.b32 t, t, 0x0E0E0E0E; or.b32 s, s, 0x01010101; or.b32 $0, s, t; }",
            "=r,r",
            [tile],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        byte = tl.inline_asm_elementwise(
            "{ .reg .b32 s; .reg .b32 t; and.b32 s, $1, 0x80808080; shr.b32 t, $1, 3;"
            " and.b32 t, t, 0x0E0E0E0E; or.b32 s, s, 0x01010101; or.b32 $0, s, t; }",
            "=r,r",
            [tile],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    return byte.to(tl.float8e4nv, bitcast=True)


@triton.jit
def _product(
    tiles, part: tl.constexpr, x, total, BITS: tl.constexpr, KIND: tl.constexpr, INTERPRETED: tl.constexpr
):
    """total + a part's codes (BLOCK_N, WIDTH) times x (BLOCK_M, WIDTH) transposed, in the units of `_unit`."""
    if KIND == "fp8":
        total = tl.dot(_fp8_bytes(tiles[part // 2], part), tl.trans(x), total)
    elif KIND == "fp16":
        code = _top_bytes(tiles, part, BITS, INTERPRETED)
        total = tl.dot(code.to(tl.float16), tl.trans(x.to(tl.float16)), total)
    else:
        total = tl.dot(_top_bytes(tiles, part, BITS, INTERPRETED), tl.trans(x), total, out_dtype=tl.int32)
    return total


@triton.constexpr_function
def _unit(bits, kind):
    """What one in a sum of `_product` stands for."""
    return 2.0**8 if kind == "fp8" else 2.0 ** (bits - 8)


@triton.jit
def _centered(total, zero, sums, BITS: tl.constexpr, KIND: tl.constexpr, HAS_ZERO: tl.constexpr):
    """The sums as float32, with the zero point instead of the middle of the codes."""
    unit: tl.constexpr = _unit(BITS, KIND)
    middle: tl.constexpr = 2.0 ** (BITS - 1) - (0.5 if KIND == "fp8" else 0.0)
    if KIND == "int8":
        if HAS_ZERO:
            shift = (zero.to(tl.int32) - (1 << (BITS - 1))) << (8 - BITS)
            total -= shift[:, None] * sums[None, :]
    elif HAS_ZERO:
        shift = (zero.to(tl.float32) - middle) / unit
        total -= shift[:, None] * sums[None, :]
    elif KIND == "fp8":
        total -= (0.5 / unit) * sums[None, :]
    return total.to(tl.float32)


@triton.jit
def _shifted(word, shift: tl.constexpr):
    return word << shift if shift >= 0 else word >> -shift


@triton.jit
def _top_words(words, first: tl.constexpr, part: tl.constexpr, BITS: tl.constexpr):
    """As `_top_bytes`, from uint32 words, four codes in each; the block's sub-blocks begin at `first`."""
    FIELDS: tl.constexpr = _fields(BITS)
    if BITS == 8:
        return words[first + part]
    code = _shifted(words[first + _sub_block(BITS, 0, part)], _shift(BITS, 0, part)) & _mask(BITS, 0)
    for plane in tl.static_range(1, len(FIELDS)):
        word = words[first + _sub_block(BITS, plane, part)]
        code = code | (_shifted(word, _shift(BITS, plane, part)) & _mask(BITS, plane))
    return code


@triton.jit
def _load_words(weight, start, end, index, AHEAD: tl.constexpr, SUB_BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    """All sub-blocks of AHEAD blocks from `start`, as uint32 words; zero from `end` on."""
    words = ()
    for a in tl.static_range(AHEAD):
        for sub_block in tl.static_range(SUB_BLOCKS):
            offset = ((start + a) * SUB_BLOCKS + sub_block) * SIZE
            there = tl.full((SIZE,), start + a, tl.int32) < end
            word = tl.load(weight + offset + index, mask=there, other=0)
            words = words + (word.to(tl.uint32, bitcast=True),)  # noqa: RUF005
    return words


@triton.jit
def _dp4a(a, b, total, INTERPRETED: tl.constexpr):
    """total + the sum of four products of signed bytes."""
    if INTERPRETED:
        for byte in tl.static_range(4):
            left = (a.to(tl.int32, bitcast=True) << (24 - 8 * byte)) >> 24
            right = (b.to(tl.int32, bitcast=True) << (24 - 8 * byte)) >> 24
            total += left * right
        return total
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _last(counter, splits):
    """Whether this program is the last of `splits` to come here; then all that they stored can be read."""
    tl.debug_barrier()  # every thread's stores come before the release
    return tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1


# Integers of which no code depends, so that other sizes need no other kernel.
_ANY = ["M", "blocks", "groups", "group_size", "x_groups", "x_group_size", "blocks_per_split"]


@triton.jit(do_not_specialize=_ANY)
def _gemv_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    zero_point,
    bias,
    y,
    partial,
    counters,
    M,
    N,
    K,
    blocks,
    groups,
    group_size,
    x_groups,
    x_group_size,
    blocks_per_split,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    RUN: tl.constexpr,
    TOKENS: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """y of at most TOKENS x; program (i, s) takes 64 rows and `blocks_per_split` blocks, AHEAD at a time.

    A thread's words lie in a few columns, so that the sums over columns meet once, at the end. RUN parts have a
    scale in common; 0: all of K. x are words of four codes.
    """
    PARTS: tl.constexpr = _parts(BITS)
    SUB_BLOCKS: tl.constexpr = _sub_blocks(BITS)
    WORDS: tl.constexpr = WIDTH // 4
    SIZE: tl.constexpr = _ROWS * WORDS
    first = tl.program_id(0) * _ROWS
    split = tl.program_id(1)
    begin = split * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, blocks)
    last_word = tl.minimum(end * PARTS * WORDS, K // 4)
    index = tl.arange(0, SIZE)
    row = tl.minimum(first + index // WORDS, N - 1)
    column = index % WORDS
    weight += tl.program_id(0).to(tl.int64) * blocks * (SUB_BLOCKS * SIZE)
    integers = ()
    sums = ()
    floats = ()
    for _ in tl.static_range(TOKENS):
        integers = integers + (tl.zeros((SIZE,), tl.int32),)  # noqa: RUF005
        sums = sums + (tl.zeros((SIZE,), tl.int32),)  # noqa: RUF005
        floats = floats + (tl.zeros((SIZE,), tl.float32),)  # noqa: RUF005
    words = _load_words(weight, begin, end, index, AHEAD, SUB_BLOCKS, SIZE)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for start in range(begin, end, AHEAD):
        these = words
        words = _load_words(weight, start + AHEAD, end, index, AHEAD, SUB_BLOCKS, SIZE)
        for a in tl.static_range(AHEAD):
            for part in tl.static_range(PARTS):
                code = _top_words(these, a * SUB_BLOCKS, part, BITS)
                k = ((start + a) * PARTS + part) * WORDS + column
                new_integers = ()
                new_sums = ()
                for t in tl.static_range(TOKENS):
                    there = k < tl.where(t < M, last_word, 0)
                    activation = tl.load(x + t * (K // 4) + k, mask=there, other=0)
                    activation = activation.to(tl.uint32, bitcast=True)
                    new_integers = new_integers + (_dp4a(code, activation, integers[t], INTERPRETED),)  # noqa: RUF005
                    if HAS_ZERO:
                        ones = tl.full((SIZE,), 0x01010101, tl.uint32)
                        new_sums = new_sums + (_dp4a(ones, activation, sums[t], INTERPRETED),)  # noqa: RUF005
                integers = new_integers
                if HAS_ZERO:
                    sums = new_sums
                if RUN > 0 and (part + 1) % RUN == 0:
                    position = ((start + a) * PARTS + part) * WIDTH
                    group = tl.minimum(position // group_size, groups - 1)
                    gain = tl.load(weight_scale + group * N + row).to(tl.float32) * 2.0 ** (BITS - 8)
                    if HAS_ZERO:
                        zero = tl.load(zero_point + group * N + row).to(tl.int32) - (1 << (BITS - 1))
                    x_group = tl.minimum(position // x_group_size, x_groups - 1)
                    new_floats = ()
                    new_integers = ()
                    new_sums = ()
                    for t in tl.static_range(TOKENS):
                        exact = integers[t]
                        if HAS_ZERO:
                            exact -= (zero << (8 - BITS)) * sums[t]
                        x_gain = tl.load(x_scale + tl.minimum(t, M - 1) * x_groups + x_group)
                        new_floats = new_floats + (floats[t] + exact.to(tl.float32) * gain * x_gain,)  # noqa: RUF005
                        new_integers = new_integers + (tl.zeros((SIZE,), tl.int32),)  # noqa: RUF005
                        new_sums = new_sums + (tl.zeros((SIZE,), tl.int32),)  # noqa: RUF005
                    floats = new_floats
                    integers = new_integers
                    sums = new_sums
    rows = first + tl.arange(0, _ROWS)
    row_mask = rows < N
    tile = tl.program_id(0)
    if RUN == 0:
        gain = tl.load(weight_scale + rows, mask=row_mask, other=0.0).to(tl.float32) * 2.0 ** (BITS - 8)
        if HAS_ZERO:
            zero = tl.load(zero_point + rows, mask=row_mask, other=0).to(tl.int32) - (1 << (BITS - 1))
    results = ()
    for t in tl.static_range(TOKENS):
        if RUN == 0:
            exact = integers[t]
            exact = tl.sum(tl.reshape(exact, (_ROWS, WORDS)), axis=1)
            if HAS_ZERO:
                exact -= (zero << (8 - BITS)) * tl.sum(tl.reshape(sums[t], (_ROWS, WORDS)), axis=1)
            result = exact.to(tl.float32) * gain * tl.load(x_scale + tl.minimum(t, M - 1))
        else:
            result = tl.sum(tl.reshape(floats[t], (_ROWS, WORDS)), axis=1)
        results = results + (result,)  # noqa: RUF005
    if SPLIT:
        splits = tl.num_programs(1)
        local = partial + tile * splits * (TOKENS * _ROWS) + tl.arange(0, _ROWS)
        for t in tl.static_range(TOKENS):
            tl.store(local + (split * TOKENS + t) * _ROWS, results[t])
        if _last(counters + tile, splits):
            for t in tl.static_range(TOKENS):
                total = tl.zeros((_ROWS,), tl.float32)
                for s in range(splits):
                    total += tl.load(local + (s * TOKENS + t) * _ROWS, cache_modifier=".cg")
                _store_rows(y, total, bias, rows, rows < tl.where(t < M, N, 0), t, N, HAS_BIAS)
    else:
        for t in tl.static_range(TOKENS):
            _store_rows(y, results[t], bias, rows, rows < tl.where(t < M, N, 0), t, N, HAS_BIAS)


@triton.jit
def _store_rows(y, value, bias, rows, mask, token, N, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        value += tl.load(bias + rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + token * N + rows, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_ANY)
def _gemm_kernel(
    x,
    x_scale,
    weight,
    weight_scale,
    zero_point,
    x_sums,
    bias,
    y,
    partial,
    counters,
    M,
    N,
    K,
    blocks,
    groups,
    group_size,
    x_groups,
    x_group_size,
    blocks_per_split,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    X_GROUPED: tl.constexpr,
    KIND: tl.constexpr,
    SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A tile of y, transposed: [BLOCK_N rows, BLOCK_M tokens]; program axes: tokens, rows, splits of K.

    KIND: what the matrix unit multiplies, "int8" or "fp8"; or "fp16", for fp8 activations with codes that fp8 does not
    hold. RUN parts have a scale in common, and their products are summed as integers; 0: all of K. `x_sums` are the
    activations' sums by run, (runs, M), of which there is one if RUN is 0.
    """
    PARTS: tl.constexpr = _parts(BITS)
    SUB_BLOCKS: tl.constexpr = _sub_blocks(BITS)
    RUNS: tl.constexpr = PARTS // RUN if RUN > 0 else 1
    PARTS_IN_RUN: tl.constexpr = PARTS // RUNS
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows and tokens that are not there repeat the last ones; nothing is stored for them.
    token = tl.minimum(tokens, M - 1)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(rows, N - 1)
    split = tl.program_id(2)
    column = tl.arange(0, WIDTH)
    tile = (row // _ROWS).to(tl.int64) * blocks * (SUB_BLOCKS * _ROWS * WIDTH) + row % _ROWS * WIDTH
    weight += tile[:, None] + column[None, :]
    x += token[:, None].to(tl.int64) * K + column[None, :]
    begin = split * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, blocks)
    SUM: tl.constexpr = tl.int32 if KIND == "int8" else tl.float32
    HAS_SUMS: tl.constexpr = HAS_ZERO or KIND == "fp8"
    UNIT: tl.constexpr = _unit(BITS, KIND)
    sums = tl.zeros((BLOCK_N, BLOCK_M), SUM)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if RUN > 0:
        gains = _load_runs(weight_scale, begin, row, N, groups, group_size, PARTS_IN_RUN * WIDTH, RUNS)
        if HAS_ZERO:
            zeros = _load_runs(zero_point, begin, row, N, groups, group_size, PARTS_IN_RUN * WIDTH, RUNS)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for block in tl.range(begin, end):
        tiles = ()
        for sub_block in tl.static_range(SUB_BLOCKS):
            loaded = tl.load(weight + (block * SUB_BLOCKS + sub_block) * (_ROWS * WIDTH))
            tiles = tiles + (loaded,)  # noqa: RUF005
        if RUN > 0:
            # The pipeline leaves out loads of less than four bytes: these are a step ahead by hand.
            these_gains = gains
            gains = _load_runs(
                weight_scale, block + 1, row, N, groups, group_size, PARTS_IN_RUN * WIDTH, RUNS
            )
            if HAS_ZERO:
                these_zeros = zeros
                zeros = _load_runs(
                    zero_point, block + 1, row, N, groups, group_size, PARTS_IN_RUN * WIDTH, RUNS
                )
        for run in tl.static_range(RUNS):
            if RUN > 0:
                sums = tl.zeros((BLOCK_N, BLOCK_M), SUM)
            for i in tl.static_range(PARTS_IN_RUN):
                k = (block * PARTS + run * PARTS_IN_RUN + i) * WIDTH
                if WHOLE_BLOCKS:
                    activation = tl.load(x + k)
                else:
                    activation = tl.load(x + k, mask=(k + column < K)[None, :], other=0.0)
                sums = _product(tiles, run * PARTS_IN_RUN + i, activation, sums, BITS, KIND, INTERPRETED)
            if RUN > 0:
                x_sum = 0
                if HAS_SUMS:
                    x_sum = tl.load(x_sums + (block * RUNS + run) * M + token)
                zero = 0
                if HAS_ZERO:
                    zero = these_zeros[run]
                value = _centered(sums, zero, x_sum, BITS, KIND, HAS_ZERO)
                gain = these_gains[run].to(tl.float32) * UNIT
                if X_GROUPED:
                    position = (block * RUNS + run) * (PARTS_IN_RUN * WIDTH)
                    x_group = tl.minimum(position // x_group_size, x_groups - 1)
                    x_gain = tl.load(x_scale + token.to(tl.int64) * x_groups + x_group)
                    total += value * gain[:, None] * x_gain[None, :]
                else:
                    total += value * gain[:, None]
    if SPLIT:
        splits = tl.num_programs(2)
        place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        local = partial + place.to(tl.int64) * splits * (BLOCK_N * BLOCK_M)
        local += tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        if RUN > 0:
            tl.store(local + split * (BLOCK_N * BLOCK_M), total)
        else:
            tl.store(local + split * (BLOCK_N * BLOCK_M), sums)
        if not _last(counters + place, splits):
            return
        if RUN > 0:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            sums = tl.zeros((BLOCK_N, BLOCK_M), SUM)
        for s in range(splits):
            loaded = tl.load(local + s * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            if RUN > 0:
                total += loaded
            else:
                sums += loaded
    x_gain = tl.load(x_scale + token)
    if RUN == 0:
        gain = tl.load(weight_scale + row).to(tl.float32) * UNIT
        x_sum = 0
        if HAS_SUMS:
            x_sum = tl.load(x_sums + token)
        zero = 0
        if HAS_ZERO:
            zero = tl.load(zero_point + row)
        value = _centered(sums, zero, x_sum, BITS, KIND, HAS_ZERO)
        total = value * gain[:, None] * x_gain[None, :]
    elif not X_GROUPED:
        total *= x_gain[None, :]
    if HAS_BIAS:
        total += tl.load(bias + row).to(tl.float32)[:, None]
    mask = (rows < N)[:, None] & (tokens < M)[None, :]
    offsets = tokens[None, :].to(tl.int64) * N + rows[:, None]
    tl.store(y + offsets, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _load_runs(values, block, row, N, groups, group_size, COLUMNS: tl.constexpr, RUNS: tl.constexpr):
    """Scales or zero points (groups, N) of a block's runs of COLUMNS columns; past the last block, the last ones."""
    loaded = ()
    for run in tl.static_range(RUNS):
        group = tl.minimum((block * RUNS + run) * COLUMNS // group_size, groups - 1)
        loaded = loaded + (tl.load(values + group * N + row),)  # noqa: RUF005
    return loaded


@triton.jit(do_not_specialize=["M"])
def _sums_kernel(x, sums, M, K, run_columns, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """sums[run, token] of `run_columns` activations each."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0)
    run = tl.program_id(1)
    total = tl.zeros((BLOCK,), sums.dtype.element_ty)
    for start in range(0, run_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        k = run * run_columns + column
        mask = (column < run_columns) & (k < K)
        total += tl.load(x + token.to(tl.int64) * K + k, mask=mask, other=0.0).to(sums.dtype.element_ty)
    tl.store(sums + run * M + token, tl.sum(total, axis=0))


@dataclass(frozen=True)
class GemvConfig:
    """Constants of `_gemv_kernel`: blocks loaded at once, warps, splits of K."""

    ahead: int
    num_warps: int
    splits: int


@dataclass(frozen=True)
class GemmConfig:
    """Constants of `_gemm_kernel`: tile of tokens and rows, warps, pipeline stages, splits of K."""

    block_m: int
    block_n: int
    num_warps: int
    stages: int
    splits: int


Config = GemvConfig | GemmConfig

_GEMV_TOKENS = 4
_SHARED_BYTES = 220 << 10


def part_width(bits: int, segment: int) -> int:
    """Columns of a part, within a segment of one scale: a block of 128 or 256 columns."""
    width = {1: 128, 2: 64, 4: 64, 8: 32}[layouts.parts(bits)]
    while segment % width:
        width //= 2
    return width


def product(bits: int, x_dtype: torch.dtype) -> str:
    """KIND of `_gemm_kernel`."""
    if x_dtype == torch.int8:
        return "int8"
    return "fp8" if bits == 4 else "fp16"


def configuration(
    tokens: int, rows: int, columns: int, bits: int, width: int, grouped: bool = False, zeros: bool = False
) -> Config:
    """The kernel and configuration for these sizes; `grouped`: with scales that change along K, `zeros`: and zeros."""
    block = layouts.parts(bits) * width
    blocks = triton.cdiv(columns, block)
    if tokens <= _GEMV_TOKENS and columns % 4 == 0:
        tiles = triton.cdiv(rows, layouts.ROWS)
        splits = max(1, min(blocks // 2, triton.cdiv(132 * 8, tiles)))
        return GemvConfig(max(1, min(4, 8 // (layouts.parts(bits) * bits // 8))), 4, splits)
    # With groups, a tile's integers and floats are in registers, and the tokens' sums where there are zero points.
    largest = 256 if not grouped else 64 if zeros else 128
    block_m = min(largest, max(16, triton.next_power_of_2(tokens)))
    block_n = 64 if block_m <= 64 else 128
    tiles = triton.cdiv(tokens, block_m) * triton.cdiv(rows, block_n)
    programs = 132 * (4 if block_m <= 64 else 1)
    splits = max(1, min(8, programs // tiles, blocks // 4))
    bytes_a_stage = block * block_m + block * bits // 8 * block_n
    stages = max(2, min(4, _SHARED_BYTES // bytes_a_stage))
    return GemmConfig(block_m, block_n, 8 if block_n == 128 else 4, stages, splits)


def prepare(
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
) -> tuple[Any, ...]:
    """The canonical arguments with the weight in planes, and scales and zero points as (G, N)."""
    columns = x.shape[-1]
    width = part_width(bits, segment_size(128, group_size, x_group_size))
    kind = product(bits, x_dtype)
    weight = layouts.to_planes(weight, bits, columns, width, kind == "fp8")
    weight_scale = weight_scale.T.contiguous()
    zero_point = None if zero_point is None else zero_point.T.contiguous()
    name = f"signed_planes{width}" if kind == "fp8" else f"planes{width}"
    sizes = (out_features, bits, group_size, x_group_size, x_dtype, dtype, name)
    return (x, x_scale, weight, weight_scale, zero_point, bias, *sizes)


def linear(
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
    """See `reference.linear_wna8`; `layout` is "packed", whose weight is converted in each call, or `prepare`'s."""
    arguments = (x, x_scale, weight, weight_scale, zero_point, bias, out_features, bits, group_size)
    if layout == "packed":
        return linear(*prepare(*arguments, x_group_size, x_dtype, dtype, layout))
    tokens = x.numel() // x.shape[-1]
    if tokens == 0 or out_features == 0:
        return x.new_empty((*x.shape[:-1], out_features), dtype=dtype)
    width = int(layout.rpartition("planes")[2])
    grouped = weight_scale.shape[0] > 1 or x_group_size != -1 or product(bits, x_dtype) == "fp8"
    config = configuration(tokens, out_features, x.shape[-1], bits, width, grouped, zero_point is not None)
    if x_dtype != torch.int8 and isinstance(config, GemvConfig):
        config = GemmConfig(16, 64, 4, 4, config.splits)
    return run(*arguments, x_group_size, x_dtype, dtype, width, config)


def run(
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
    width: int,
    config: Config,
) -> Tensor:
    """The layer as `config` says; the weight is in planes with parts of `width` columns."""
    columns = x.shape[-1]
    tokens = x.numel() // columns
    blocks = weight.shape[1]
    blocks_per_split = triton.cdiv(blocks, config.splits)
    splits = triton.cdiv(blocks, blocks_per_split)
    if isinstance(config, GemvConfig):
        grid: tuple[int, ...] = (weight.shape[0], splits)
        tile = layouts.ROWS * triton.next_power_of_2(tokens)
    else:
        grid = (triton.cdiv(tokens, config.block_m), triton.cdiv(out_features, config.block_n), splits)
        tile = config.block_m * config.block_n
    tiles = grid[0] if isinstance(config, GemvConfig) else grid[0] * grid[1]
    overlap: bool = overlap_options(x)["OVERLAP"]
    counters = None
    if splits > 1:
        counters = torch.empty(tiles, dtype=torch.int32, device=x.device)
    if x_scale is None:
        x, x_scale = quantize(x, None, None, None, 0.0, 0.0, 8, x_group_size, x_dtype, counters=counters)
    else:
        overlap = False
        x, x_scale = x.contiguous(), x_scale.contiguous()
        if x.storage_offset() % 16:  # codes are read many at a time
            x = x.clone()
        if counters is not None:
            counters.zero_()
    segment = segment_size(columns, group_size, x_group_size)
    whole = weight_scale.shape[0] == 1 and x_scale.shape[-1] == 1
    kind = product(bits, x_dtype)
    runs_parts = 0 if whole else math.gcd(layouts.parts(bits), segment // width)
    if kind == "fp8" and whole:
        # Hopper sums products of fp8 in about 14 bits: every block is added in float32.
        runs_parts = layouts.parts(bits)
    partial = x_scale
    if splits > 1:
        exact = kind == "int8" and runs_parts == 0 and isinstance(config, GemmConfig)
        sums_dtype = torch.int32 if exact else torch.float32
        partial = torch.empty((tiles, splits, tile), dtype=sums_dtype, device=x.device)
    y = torch.empty((*x.shape[:-1], out_features), dtype=dtype, device=x.device)
    groups, x_groups = weight_scale.shape[0], x_scale.shape[-1]
    sizes = (
        tokens,
        out_features,
        columns,
        blocks,
        groups,
        group_size if groups > 1 else 1 << 30,
        x_groups,
        x_group_size if x_groups > 1 else 1 << 30,
        blocks_per_split,
    )
    common: dict[str, Any] = {
        "BITS": bits,
        "WIDTH": width,
        "RUN": runs_parts,
        "HAS_ZERO": zero_point is not None,
        "HAS_BIAS": bias is not None,
        "SPLIT": splits > 1,
        "OVERLAP": overlap,
        "INTERPRETED": interpreting(),
        "num_warps": config.num_warps,
    }
    if overlap:
        common["launch_pdl"] = True
    zero = weight_scale if zero_point is None else zero_point
    scaled = (x_scale, weight, weight_scale, zero)
    if isinstance(config, GemvConfig):
        words = (x.view(torch.int32), x_scale, weight.view(torch.int32), weight_scale, zero)
        _gemv_kernel[grid](
            *words,
            y if bias is None else bias,
            y,
            partial,
            y if counters is None else counters,
            *sizes,
            TOKENS=triton.next_power_of_2(tokens),
            AHEAD=config.ahead,
            **common,
        )
        return y
    sums = x_scale
    if zero_point is not None or kind == "fp8":
        run_columns, runs = columns, 1
        if runs_parts > 0:  # those in a last block that reaches past K, too
            run_columns, runs = runs_parts * width, blocks * layouts.parts(bits) // runs_parts
        sums_dtype = torch.int32 if kind == "int8" else torch.float32
        sums = torch.empty((runs, tokens), dtype=sums_dtype, device=x.device)
        options = {"launch_pdl": True} if overlap else {}
        _sums_kernel[(tokens, runs)](
            x,
            sums,
            tokens,
            columns,
            run_columns,
            BLOCK=min(1024, triton.next_power_of_2(run_columns)),
            OVERLAP=overlap,
            num_warps=1,
            **options,
        )
    _gemm_kernel[grid](
        x,
        *scaled,
        sums,
        y if bias is None else bias,
        y,
        partial,
        y if counters is None else counters,
        *sizes,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        WHOLE_BLOCKS=columns % (layouts.parts(bits) * width) == 0,
        X_GROUPED=x_groups > 1,
        KIND=kind,
        num_stages=config.stages,
        **common,
    )
    return y

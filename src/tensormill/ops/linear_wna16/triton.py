"""GPU kernels of `linear_wna16` and `dequantize_wna16`.

Codes are read from the canonical packed rows. A *unit* is the shortest run of codes that fills whole words: 8
codes of 4 bits in one word, 32 codes of 3 bits in three. The kernels of the layer hold units along the
columns of their tiles and extract code j of every unit at once, by shifts that are constants of the compiled
kernel; the activations are read with the stride of a unit to match, so that threads exchange nothing to
unpack.

- `_gemv_kernel` (one or two tokens): a program keeps its columns' activations in registers and walks down its
  rows.
- `_gemm_kernel` (more tokens): the weights are the first operand of the tensor core's product, so that few
  tokens waste little; the activations come from a copy permuted to [code of a unit, token, unit].
- `_dequantize_kernel`: for gradients, for many tokens, and for whatever the other two do not take.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensormill.ops.bit_packing import packed_width

# codes and words of a unit, by bits
UNITS = {1: (32, 1), 2: (16, 1), 3: (32, 3), 4: (8, 1), 5: (32, 5), 6: (16, 3), 7: (32, 7), 8: (4, 1)}


@triton.jit
def _code(words, j: tl.constexpr, BITS: tl.constexpr):
    """Code j of every unit, as uint32, from the tuple of the unit's words; stray bits above it are left."""
    position: tl.constexpr = (j * BITS) % 32
    index: tl.constexpr = (j * BITS) // 32
    code = words[index] >> position
    if position + BITS > 32:
        code = code | (words[index + 1] << (32 - position))
    return code


@triton.jit
def _one_plus(words, j: tl.constexpr, BITS: tl.constexpr):
    """1 + code / 2^BITS of every unit's code j, float32: one shift, one three-input logical operation."""
    position: tl.constexpr = (j * BITS) % 32
    index: tl.constexpr = (j * BITS) // 32
    field: tl.constexpr = 23 - BITS  # of the code's lowest bit in the mantissa
    if position + BITS > 32:
        bits = _code(words, j, BITS) << field
    elif position >= field:
        bits = words[index] >> (position - field)
    else:
        bits = words[index] << (field - position)
    return ((bits & (((1 << BITS) - 1) << field)) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _load_words(weight, offsets, columns, row_words, row_mask, WORDS: tl.constexpr):
    """The words of the units at `offsets`, a tuple of WORDS tensors; `columns` is their place in the row."""
    words = ()
    for i in tl.static_range(WORDS):
        mask = row_mask & (columns + i < row_words)
        word = tl.load(weight + offsets + i, mask=mask, other=0).to(tl.uint32, bitcast=True)
        words = words + (word,)  # noqa: RUF005 (Triton has no starred tuples)
    return words


@triton.jit
def _gemv_kernel(
    x,
    weight,
    scale,
    zero_point,
    bias,
    y,
    N,
    K,
    row_words,
    groups,
    group_size,
    rows_per_program,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    WORDS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    MERGE: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows of y for TOKENS x; program (i, c) takes rows from i * rows_per_program, units from c * BLOCK_U.

    With d = 1 + code / 2^BITS (less 1.5 if CENTERED, which keeps float32 results closer),
    code - zero = 2^BITS * d - shift with shift = 2^BITS + zero (zero - 2^(BITS - 1)), so that a group's sum
    is scale * (2^BITS * sum(d x) - shift * sum(x)). MERGE neighbouring units share a scale. With SPLIT the
    result is a float32 partial sum per c, without bias.
    """
    chunk = tl.program_id(1)
    units = chunk * BLOCK_U + tl.arange(0, BLOCK_U)
    columns = units * WORDS
    xs = ()
    sums = ()
    for t in tl.static_range(TOKENS):
        total = tl.zeros((BLOCK_U,), tl.float32)
        for j in tl.static_range(UNIT):
            k = units * UNIT + j
            activation = tl.load(x + t * K + k, mask=k < K, other=0.0).to(tl.float32)
            total += activation
            xs = xs + (activation,)  # noqa: RUF005
        if MERGE > 1:
            total = tl.sum(tl.reshape(total, (BLOCK_U // MERGE, MERGE)), axis=1)
        sums = sums + (total,)  # noqa: RUF005
    merged = chunk * (BLOCK_U // MERGE) + tl.arange(0, BLOCK_U // MERGE)
    group = merged * (MERGE * UNIT) // group_size

    first = tl.program_id(0) * rows_per_program
    for step in tl.range(0, rows_per_program, BLOCK_N, num_stages=STAGES):
        rows = first + step + tl.arange(0, BLOCK_N)
        row_mask = (rows < N) & (rows < first + rows_per_program)
        offsets = rows[:, None].to(tl.int64) * row_words + columns[None, :]
        words = _load_words(weight, offsets, columns[None, :], row_words, row_mask[:, None], WORDS)
        group_offsets = rows[:, None].to(tl.int64) * groups + group[None, :]
        group_mask = row_mask[:, None] & (group[None, :] < groups)
        scales = tl.load(scale + group_offsets, mask=group_mask, other=0.0).to(tl.float32)
        if HAS_ZERO:
            shift = tl.load(zero_point + group_offsets, mask=group_mask, other=0).to(tl.float32)
        else:
            shift = tl.full((BLOCK_N, BLOCK_U // MERGE), 2.0 ** (BITS - 1), tl.float32)
        if CENTERED:
            shift -= 2.0 ** (BITS - 1)
        else:
            shift += 2.0**BITS
        partial = ()
        for _ in tl.static_range(TOKENS):
            partial = partial + (tl.zeros((BLOCK_N, BLOCK_U), tl.float32),)  # noqa: RUF005
        for j in tl.static_range(UNIT):
            value = _one_plus(words, j, BITS)
            if CENTERED:
                value -= 1.5
            grown = ()
            for t in tl.static_range(TOKENS):
                grown = grown + (partial[t] + value * xs[t * UNIT + j][None, :],)  # noqa: RUF005
            partial = grown
        for t in tl.static_range(TOKENS):
            part = partial[t]
            if MERGE > 1:
                part = tl.sum(tl.reshape(part, (BLOCK_N, BLOCK_U // MERGE, MERGE)), axis=2)
            result = tl.sum(scales * (part * (2.0**BITS) - shift * sums[t][None, :]), axis=1)
            if SPLIT:
                tl.store(y + (chunk * TOKENS + t).to(tl.int64) * N + rows, result, mask=row_mask)
            else:
                if HAS_BIAS:
                    result += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)
                tl.store(y + t * N + rows, result.to(y.dtype.element_ty), mask=row_mask)


@triton.jit
def _gemm_kernel(
    x,
    weight,
    scale,
    zero_point,
    bias,
    y,
    M,
    N,
    units,
    row_words,
    groups,
    group_size,
    units_per_split,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A tile of y, transposed: [BLOCK_N rows, BLOCK_M tokens], by UNIT products of depth BLOCK_U a step.

    x is permuted to (UNIT, M, units). Program axes: tokens, rows, splits of K; with SPLIT, y is (splits, M,
    N) float32.
    """
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    row_mask = rows < N
    token_mask = tokens < M
    first = split * units_per_split
    last = tl.minimum(units, first + units_per_split)
    row_offsets = rows[:, None].to(tl.int64)
    token_offsets = tokens[None, :].to(tl.int64) * units
    plane = M.to(tl.int64) * units
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(first, last, BLOCK_U):
        unit = start + tl.arange(0, BLOCK_U)
        inside = unit < last
        columns = unit[None, :] * WORDS
        mask = row_mask[:, None] & inside[None, :]
        words = _load_words(weight, row_offsets * row_words + columns, columns, row_words, mask, WORDS)
        group_offsets = row_offsets * groups + (unit * UNIT // group_size)[None, :]
        scales = tl.load(scale + group_offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_ZERO:
            shift = tl.load(zero_point + group_offsets, mask=mask, other=0).to(tl.float32) * scales
        else:
            shift = scales * (2.0 ** (BITS - 1))
        x_mask = inside[:, None] & token_mask[None, :]
        x_offsets = token_offsets + unit[:, None]
        for j in tl.static_range(UNIT):
            # 2^23 + code, less 2^23: exact, and cheaper than a conversion from an integer
            magic = ((_code(words, j, BITS) & ((1 << BITS) - 1)) | 0x4B000000).to(tl.float32, bitcast=True)
            value = ((magic - 8388608.0) * scales - shift).to(x.dtype.element_ty)
            activation = tl.load(x + j * plane + x_offsets, mask=x_mask, other=0.0)
            total = tl.dot(value, activation, total)
    mask = row_mask[:, None] & token_mask[None, :]
    if SPLIT:
        offsets = (split.to(tl.int64) * M + tokens[None, :]) * N + rows[:, None]
        tl.store(y + offsets, total, mask=mask)
    else:
        if HAS_BIAS:
            total += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        offsets = tokens[None, :].to(tl.int64) * N + rows[:, None]
        tl.store(y + offsets, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _sum_splits_kernel(partial, bias, y, N, elements, splits, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """y = sum of `splits` partial results, in order, + bias."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * elements + offsets, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + offsets % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_kernel(
    weight,
    scale,
    zero_point,
    out,
    N,
    K,
    row_words,
    groups,
    group_size,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the weights; neighbouring threads read the same word and write neighbouring elements."""
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None].to(tl.int64)
    columns = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    mask = (rows < N) & (columns < K)
    # 64 bits, since K * BITS may exceed 2^31
    position = columns.to(tl.int64) * BITS
    index = position // 32
    within = (position % 32).to(tl.uint32)
    word = weight + rows * row_words + index
    code = tl.load(word, mask=mask, other=0).to(tl.uint32, bitcast=True) >> within
    if 32 % BITS != 0:
        straddles = mask & (within + BITS > 32)
        above = tl.load(word + 1, mask=straddles, other=0).to(tl.uint32, bitcast=True)
        # A shift by 32 is undefined where the code does not straddle; there `above` is 0 and the shift is 1.
        code = code | (above << tl.where(straddles, 32 - within, 1))
    group_offsets = rows * groups + columns // group_size
    value = (code & ((1 << BITS) - 1)).to(tl.float32)
    if HAS_ZERO:
        value -= tl.load(zero_point + group_offsets, mask=mask, other=0).to(tl.float32)
    else:
        value -= 2.0 ** (BITS - 1)
    value *= tl.load(scale + group_offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows * K + columns, value.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class GemvConfig:
    """Constants of `_gemv_kernel`: rows per step, units per program, warps, pipeline stages, programs."""

    block_n: int
    block_u: int
    num_warps: int
    stages: int
    programs: int


@dataclass(frozen=True)
class GemmConfig:
    """Constants of `_gemm_kernel`: tile of tokens, rows and units, warps, pipeline stages, splits of K."""

    block_m: int
    block_n: int
    block_u: int
    num_warps: int
    stages: int
    splits: int


@functools.cache
def _tuned() -> dict[str, dict[str, int]]:
    """Configurations by "gemv/tokens/bits/rows x columns" or "gemm/...", as `tune` prints them."""
    file = Path(__file__).parent / "tuned" / "sm_90.json"
    try:
        return json.loads(file.read_text())["configurations"]
    except OSError:
        return {}


def tuning_key(kernel: str, tokens: int, rows: int, columns: int, bits: int) -> str:
    """Tokens are rounded up to a power of two, so that neighbouring batches share a configuration."""
    return f"{kernel}/m{triton.next_power_of_2(tokens)}/w{bits}/{rows}x{columns}"


def gemv_config(tokens: int, rows: int, columns: int, bits: int) -> GemvConfig:
    """The configuration for these sizes: tuned if there is one, else from a heuristic."""
    if (found := _tuned().get(tuning_key("gemv", tokens, rows, columns, bits))) is not None:
        return GemvConfig(**found)
    codes, words = UNITS[bits]
    # At most 32 activations, and fewer rows for two tokens, in a thread's registers: more would spill.
    units_per_thread = max(1, min(4, 32 // (codes * tokens))) if words == 1 else 1
    units = triton.next_power_of_2(triton.cdiv(columns, codes))
    threads = min(512, max(32, units // units_per_thread))
    block_u = min(units, threads * units_per_thread)
    return GemvConfig(block_n=4 // tokens, block_u=block_u, num_warps=threads // 32, stages=3, programs=264)


def gemm_config(tokens: int, rows: int, columns: int, bits: int) -> GemmConfig:
    """The configuration for these sizes: tuned if there is one, else from a heuristic."""
    if (found := _tuned().get(tuning_key("gemm", tokens, rows, columns, bits))) is not None:
        return GemmConfig(**found)
    codes, _ = UNITS[bits]
    block_m = min(128 if codes <= 8 else 64, max(16, triton.next_power_of_2(tokens)))
    block_n = 128 if block_m == 128 else 64
    block_u = 32 if block_m <= 32 and codes <= 8 else 16
    stages = 2 if codes * block_m >= 1024 else 3
    tiles = triton.cdiv(tokens, block_m) * triton.cdiv(rows, block_n)
    steps = triton.cdiv(triton.cdiv(columns, codes), block_u)
    splits = max(1, min(8, 264 // tiles, steps // 4))
    return GemmConfig(block_m, block_n, block_u, 8 if block_m == 128 else 4, stages, splits)


# From this many tokens on, dequantizing into memory once and a product of the vendor library is faster.
_DEQUANTIZE_FROM = 1024
_GEMV_TOKENS = 2


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """See `reference.linear_wna16`."""
    rows, columns = weight.shape[0], x.shape[-1]
    flat = x.reshape(-1, columns).contiguous()
    tokens = flat.shape[0]
    codes, _ = UNITS[bits]
    whole_row = group_size == -1 or group_size >= columns
    whole_units = whole_row or group_size % codes == 0
    weight, scale = weight.contiguous(), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    if tokens == 0 or rows == 0:
        y = x.new_empty((tokens, rows))
    elif tokens <= _GEMV_TOKENS and whole_units:
        config = gemv_config(tokens, rows, columns, bits)
        y = gemv(flat, weight, scale, zero_point, bias, bits, group_size, config)
    elif x.dtype != torch.float32 and tokens < _DEQUANTIZE_FROM and whole_units:
        config = gemm_config(tokens, rows, columns, bits)
        y = gemm(flat, weight, scale, zero_point, bias, bits, group_size, config)
    else:
        dense = dequantize(weight, scale, zero_point, columns, bits, group_size, layout, x.dtype)
        y = torch.nn.functional.linear(flat, dense, None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], rows)


def gemv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    config: GemvConfig,
) -> Tensor:
    """(tokens, K) -> (tokens, N) through `_gemv_kernel`."""
    (tokens, columns), rows = x.shape, weight.shape[0]
    codes, words = UNITS[bits]
    span = columns if group_size == -1 else min(group_size, columns)
    merge = 1
    whole = scale.shape[1] == 1
    if words == 1:
        while merge < 4 and 2 * merge <= config.block_u and (whole or span % (2 * merge * codes) == 0):
            merge *= 2
    splits = triton.cdiv(triton.cdiv(columns, codes), config.block_u)
    rows_per_program = triton.cdiv(triton.cdiv(rows, max(1, config.programs // splits)), config.block_n)
    rows_per_program *= config.block_n
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    target = y if splits == 1 else torch.empty((splits, tokens, rows), dtype=torch.float32, device=x.device)
    _gemv_kernel[(triton.cdiv(rows, rows_per_program), splits)](
        x,
        weight,
        scale,
        zero_point if zero_point is not None else scale,
        bias if bias is not None else scale,
        target,
        rows,
        columns,
        weight.shape[1],
        scale.shape[1],
        # One group: every unit, also a last one that reaches past K, is in group 0.
        span if not whole else columns + codes * merge,
        rows_per_program,
        BITS=bits,
        UNIT=codes,
        WORDS=words,
        TOKENS=tokens,
        BLOCK_N=config.block_n,
        BLOCK_U=config.block_u,
        MERGE=merge,
        CENTERED=x.dtype == torch.float32,
        HAS_ZERO=zero_point is not None,
        HAS_BIAS=bias is not None,
        SPLIT=splits > 1,
        STAGES=config.stages,
        num_warps=config.num_warps,
    )
    if splits > 1:
        _sum_splits(target, bias, y)
    return y


def gemm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    config: GemmConfig,
) -> Tensor:
    """(tokens, K) -> (tokens, N) through `_gemm_kernel`."""
    (tokens, columns), rows = x.shape, weight.shape[0]
    codes, words = UNITS[bits]
    units = triton.cdiv(columns, codes)
    if units * codes != columns:
        x = torch.nn.functional.pad(x, (0, units * codes - columns))
    permuted = x.view(tokens, units, codes).permute(2, 0, 1).contiguous()
    whole = scale.shape[1] == 1
    steps = triton.cdiv(units, config.block_u)
    units_per_split = triton.cdiv(steps, config.splits) * config.block_u
    splits = triton.cdiv(units, units_per_split)
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    target = y if splits == 1 else torch.empty((splits, tokens, rows), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(tokens, config.block_m), triton.cdiv(rows, config.block_n), splits)
    _gemm_kernel[grid](
        permuted,
        weight,
        scale,
        zero_point if zero_point is not None else scale,
        bias if bias is not None else scale,
        target,
        tokens,
        rows,
        units,
        weight.shape[1],
        scale.shape[1],
        columns + codes if whole else group_size,
        units_per_split,
        BITS=bits,
        UNIT=codes,
        WORDS=words,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_U=config.block_u,
        HAS_ZERO=zero_point is not None,
        HAS_BIAS=bias is not None,
        SPLIT=splits > 1,
        num_warps=config.num_warps,
        num_stages=config.stages,
    )
    if splits > 1:
        _sum_splits(target, bias, y)
    return y


def _sum_splits(partial: Tensor, bias: Tensor | None, y: Tensor) -> None:
    elements = y.numel()
    _sum_splits_kernel[(triton.cdiv(elements, 1024),)](
        partial,
        bias if bias is not None else partial,
        y,
        y.shape[-1],
        elements,
        partial.shape[0],
        HAS_BIAS=bias is not None,
        BLOCK=1024,
        num_warps=4,
    )


def dequantize(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    """See `dequantize_wna16.reference`."""
    rows = weight.shape[0]
    assert weight.shape[1] == packed_width(in_features, bits)
    dense = torch.empty((rows, in_features), dtype=dtype, device=weight.device)
    if rows == 0:
        return dense
    weight, scale = weight.contiguous(), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    block_n, block_k = 4, 512
    # Rows on the first axis: the others are limited to 65535 programs.
    _dequantize_kernel[(triton.cdiv(rows, block_n), triton.cdiv(in_features, block_k))](
        weight,
        scale,
        zero_point if zero_point is not None else scale,
        dense,
        rows,
        in_features,
        weight.shape[1],
        scale.shape[1],
        in_features if group_size == -1 else group_size,
        BITS=bits,
        HAS_ZERO=zero_point is not None,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
    )
    return dense

"""GPU kernels of `linear_wna16` and `dequantize_wna16`.

Codes are read from the canonical packed rows. The kernels of the layer hold *units* along the columns of their
tiles: runs of at most 32 codes that fill whole words and share a scale (32 codes of 4 bits in four words, 32 of
3 bits in three). A thread loads its unit at once and extracts code j of every unit by shifts that are constants
of the compiled kernel, so that threads exchange nothing to unpack.

- `_gemv_kernel` (a few tokens): a program keeps its columns' activations in registers and walks down its rows.
  Its threads meet once, at the end: a barrier per row would leave memory idle.
- `_gemm_kernel` (more tokens): the weights are the first operand of the tensor core's product, so that few
  tokens waste little.
- `_dequantize_kernel`: for gradients, for many tokens, and for whatever the other two do not take.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensormill.ops.bit_packing import packed_width

# codes and words of the shortest unit, by bits
UNITS = {1: (32, 1), 2: (16, 1), 3: (32, 3), 4: (8, 1), 5: (32, 5), 6: (16, 3), 7: (32, 7), 8: (4, 1)}


# The bits of 1.0, an argument of the kernels: as constants in the code, this and the mask of a code would not
# both fit one three-input logical operation, and the assembler would use two.
_ONE = 0x3F800000


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
def _one_plus(words, one, j: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr):
    """1 + code / 2^s of every unit's code j, float32, the code in the mantissa of a one; see `_factor`.

    One three-input logical operation, and one shift, which with BYTES serves all codes of a byte.
    """
    position: tl.constexpr = (j * BITS) % 32
    index: tl.constexpr = (j * BITS) // 32
    # of the code's lowest bit in the mantissa
    field: tl.constexpr = 15 + position % 8 if BYTES else 23 - BITS
    if position + BITS > 32:
        bits = _code(words, j, BITS) << field
    elif position >= field:
        bits = words[index] >> (position - field)
    else:
        bits = words[index] << (field - position)
    return ((bits & (((1 << BITS) - 1) << field)) | one.to(tl.uint32)).to(tl.float32, bitcast=True)


@triton.jit
def _parts(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr):
    """The COUNT tensors (ROWS, COLUMNS) of a (ROWS, COLUMNS, COUNT) one; COUNT is a power of two, at most 32."""
    parts = (tile,)
    for level in tl.static_range(5):
        if (1 << level) < COUNT:
            # parts[i] holds the indices that end in the bits of i
            even = ()
            odd = ()
            for i in tl.static_range(1 << level):
                zero, one = tl.split(tl.reshape(parts[i], (ROWS, COLUMNS, COUNT >> (level + 1), 2)))
                even = even + (zero,)  # noqa: RUF005 (Triton has no starred tuples)
                odd = odd + (one,)  # noqa: RUF005
            parts = even + odd
    flat = ()
    for i in tl.static_range(COUNT):
        flat = flat + (tl.reshape(parts[i], (ROWS, COLUMNS)),)  # noqa: RUF005
    return flat


@triton.jit
def _joined(parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr):
    """(ROWS, COLUMNS, COUNT) of COUNT tensors (ROWS, COLUMNS): the inverse of `_parts`."""
    for level in tl.static_range(5):
        if (COUNT >> level) > 1:
            pairs = ()
            for i in tl.static_range(COUNT >> (level + 1)):
                pair = tl.join(parts[i], parts[i + (COUNT >> (level + 1))])
                pairs = pairs + (tl.reshape(pair, (ROWS, COLUMNS, 2 << level)),)  # noqa: RUF005
            parts = pairs
    return tl.reshape(parts[0], (ROWS, COLUMNS, COUNT))


@triton.jit
def _load_words(
    weight,
    step,
    left,
    start,
    row_words,
    WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """(BLOCK_N, BLOCK_U) units, from unit `start`, of every STEPS-th row from `step`: a tuple of WORDS tensors.

    Only `left` rows are there. Addresses are one-dimensional, since versions of Triton differ in the layout
    that they give to two dimensions, and a layout of their choice costs exchanges between threads.
    """
    index = tl.arange(0, BLOCK_N * BLOCK_U)
    row = index // BLOCK_U * STEPS + step
    unit = start + index % BLOCK_U
    words = ()
    if WORDS == 1 or WORDS == 2 or WORDS == 4:
        columns = unit[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        mask = (row < left)[:, None] & (columns < row_words)
        tile = tl.load(weight + row[:, None] * row_words + columns, mask=mask, other=0)
        tile = tl.reshape(tile.to(tl.uint32, bitcast=True), (BLOCK_N, BLOCK_U, WORDS))
        words = _parts(tile, BLOCK_N, BLOCK_U, WORDS)
    else:
        for i in tl.static_range(WORDS):
            column = unit * WORDS + i
            mask = (row < left) & (column < row_words)
            word = tl.load(weight + row * row_words + column, mask=mask, other=0)
            word = tl.reshape(word.to(tl.uint32, bitcast=True), (BLOCK_N, BLOCK_U))
            words = words + (word,)  # noqa: RUF005
    return words


@triton.jit
def _load_groups(
    values,
    step,
    left,
    start,
    groups,
    group_size,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """The units' scales or zero points, for the same units as `_load_words`."""
    index = tl.arange(0, BLOCK_N * BLOCK_U)
    row = index // BLOCK_U * STEPS + step
    group = (start + index % BLOCK_U) * UNIT // group_size
    loaded = tl.load(values + row * groups + group, mask=(row < left) & (group < groups), other=0)
    return tl.reshape(loaded, (BLOCK_N, BLOCK_U))


@triton.jit
def _factor(j: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr):
    """2^s of `_one_plus`."""
    return 2.0 ** (8 - (j * BITS) % 8) if BYTES else 2.0**BITS


@triton.jit(do_not_specialize=["M"])
def _gemv_kernel(
    x,
    weight,
    scale,
    zero_point,
    bias,
    y,
    M,
    N,
    K,
    row_words,
    groups,
    group_size,
    one,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    WORDS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_U: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """y of at most TOKENS x; program (i, c) takes BLOCK_N * STEPS rows and units from c * BLOCK_U.

    With d_j = 1 + code_j / f_j (less 1.5 if CENTERED, which keeps float32 results closer), a power of two f_j
    and x'_j = f_j x_j, a unit's sum is scale * (sum(d x') - sum(x') - zero * sum(x)). The rows' loads run
    AHEAD steps ahead of their use; the first are issued before x is read. With SPLIT the result is a float32
    partial sum per c, without bias.
    """
    start = tl.program_id(1) * BLOCK_U
    first = tl.program_id(0) * (BLOCK_N * STEPS)
    left = N - first
    weight += first.to(tl.int64) * row_words
    scale += first.to(tl.int64) * groups
    zero_point += first.to(tl.int64) * groups
    words = ()
    scales = ()
    zeros = ()
    for step in tl.static_range(AHEAD):
        loaded = _load_words(weight, step, left, start, row_words, WORDS, BLOCK_N, STEPS, BLOCK_U)
        words = words + (loaded,)  # noqa: RUF005
        gain = _load_groups(scale, step, left, start, groups, group_size, UNIT, BLOCK_N, STEPS, BLOCK_U)
        scales = scales + (gain,)  # noqa: RUF005
        if HAS_ZERO:
            zero = _load_groups(
                zero_point, step, left, start, groups, group_size, UNIT, BLOCK_N, STEPS, BLOCK_U
            )
            zeros = zeros + (zero,)  # noqa: RUF005

    BYTES: tl.constexpr = 32 % BITS == 0 and not CENTERED
    # 16 bytes a thread
    WIDE: tl.constexpr = min(UNIT, 128 // x.dtype.element_ty.primitive_bitwidth)
    units = start + tl.arange(0, BLOCK_U)
    xs = ()
    sums = ()
    bases = ()
    for t in tl.static_range(TOKENS):
        parts = ()
        for begin in tl.static_range(0, UNIT, WIDE):
            k = units[:, None] * UNIT + (begin + tl.arange(0, WIDE))[None, :]
            tile = tl.load(x + t * K + k, mask=k < tl.where(t < M, K, 0), other=0.0)
            parts = parts + _parts(tl.reshape(tile, (1, BLOCK_U, WIDE)), 1, BLOCK_U, WIDE)
        total = tl.zeros((1, BLOCK_U), tl.float32)
        base = tl.zeros((1, BLOCK_U), tl.float32)
        for j in tl.static_range(UNIT):
            activation = parts[j].to(tl.float32)
            scaled = activation * _factor(j, BITS, BYTES)
            total += activation
            if not CENTERED:
                base += scaled
            xs = xs + (scaled,)  # noqa: RUF005
        sums = sums + (total,)  # noqa: RUF005
        bases = bases + (base,)  # noqa: RUF005

    results = ()
    for step in tl.static_range(STEPS):
        if step + AHEAD < STEPS:
            after = step + AHEAD
            loaded = _load_words(weight, after, left, start, row_words, WORDS, BLOCK_N, STEPS, BLOCK_U)
            words = words + (loaded,)  # noqa: RUF005
            gain = _load_groups(scale, after, left, start, groups, group_size, UNIT, BLOCK_N, STEPS, BLOCK_U)
            scales = scales + (gain,)  # noqa: RUF005
            if HAS_ZERO:
                zero = _load_groups(
                    zero_point, after, left, start, groups, group_size, UNIT, BLOCK_N, STEPS, BLOCK_U
                )
                zeros = zeros + (zero,)  # noqa: RUF005
        partial = ()
        for _ in tl.static_range(TOKENS):
            partial = partial + (tl.zeros((BLOCK_N, BLOCK_U), tl.float32),)  # noqa: RUF005
        for j in tl.static_range(UNIT):
            value = _one_plus(words[step], one, j, BITS, BYTES)
            if CENTERED:
                value -= 1.5
            grown = ()
            for t in tl.static_range(TOKENS):
                grown = grown + (partial[t] + value * xs[t * UNIT + j],)  # noqa: RUF005
            partial = grown
        shift = tl.full((BLOCK_N, BLOCK_U), 2.0 ** (BITS - 1), tl.float32)
        if HAS_ZERO:
            shift = zeros[step].to(tl.float32)
        if CENTERED:
            shift -= 2.0 ** (BITS - 1)
        for t in tl.static_range(TOKENS):
            result = scales[step].to(tl.float32) * (partial[t] - (bases[t] + shift * sums[t]))
            results = results + (result,)  # noqa: RUF005

    COUNT: tl.constexpr = STEPS * TOKENS
    result = tl.sum(_joined(results, BLOCK_N, BLOCK_U, COUNT), axis=1)
    result = tl.reshape(result, (BLOCK_N * COUNT,))
    index = tl.arange(0, BLOCK_N * COUNT)
    token = index % TOKENS
    row = index // TOKENS
    mask = (row < left) & (token < M)
    row += first
    if SPLIT:
        tl.store(y + (tl.program_id(1) * M + token).to(tl.int64) * N + row, result, mask=mask)
    else:
        if HAS_BIAS:
            result += tl.load(bias + row, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + token.to(tl.int64) * N + row, result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "units_per_split"])
def _gemm_kernel(
    x,
    weight,
    scale,
    zero_point,
    bias,
    y,
    M,
    N,
    K,
    row_words,
    groups,
    group_size,
    one,
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
    """A tile of y, transposed: [BLOCK_N rows, BLOCK_M tokens], by products of depth BLOCK_U * UNIT.

    Program axes: tokens, rows, splits of K; with SPLIT, y is (splits, M, N) float32.
    """
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    split = tl.program_id(2)
    weight += first.to(tl.int64) * row_words
    scale += first.to(tl.int64) * groups
    zero_point += first.to(tl.int64) * groups
    token_mask = tokens < M
    BYTES: tl.constexpr = 32 % BITS == 0
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    begin = split * units_per_split
    end = tl.minimum(tl.cdiv(K, UNIT), begin + units_per_split)
    left = N - first
    scales = _load_groups(scale, 0, left, begin, groups, group_size, UNIT, BLOCK_N, 1, BLOCK_U)
    if HAS_ZERO:
        zeros = _load_groups(zero_point, 0, left, begin, groups, group_size, UNIT, BLOCK_N, 1, BLOCK_U)
    for start in tl.range(begin, end, BLOCK_U):
        words = _load_words(weight, 0, left, start, row_words, WORDS, BLOCK_N, 1, BLOCK_U)
        gain = scales.to(tl.float32)
        # The pipeline leaves out loads of less than four bytes: these are a step ahead by hand.
        after = start + BLOCK_U
        scales = _load_groups(scale, 0, left, after, groups, group_size, UNIT, BLOCK_N, 1, BLOCK_U)
        if HAS_ZERO:
            shift = zeros.to(tl.float32) * gain
            zeros = _load_groups(zero_point, 0, left, after, groups, group_size, UNIT, BLOCK_N, 1, BLOCK_U)
        else:
            shift = gain * (2.0 ** (BITS - 1))
        values = ()
        for j in tl.static_range(UNIT):
            # (code - zero) * scale in one operation; exact before it is rounded, if scales have 16 bits
            grown = gain * _factor(j, BITS, BYTES)
            value = _one_plus(words, one, j, BITS, BYTES) * grown - (grown + shift)
            values = values + (value.to(x.dtype.element_ty),)  # noqa: RUF005
        tile = tl.reshape(_joined(values, BLOCK_N, BLOCK_U, UNIT), (BLOCK_N, BLOCK_U * UNIT))
        k = start * UNIT + tl.arange(0, BLOCK_U * UNIT)
        offsets = tokens[:, None].to(tl.int64) * K + k[None, :]
        activation = tl.load(x + offsets, mask=token_mask[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(tile, tl.trans(activation), total)
    row = first + tl.arange(0, BLOCK_N)
    row_mask = row < N
    mask = row_mask[:, None] & token_mask[None, :]
    if SPLIT:
        offsets = (split.to(tl.int64) * M + tokens[None, :]) * N + row[:, None]
        tl.store(y + offsets, total, mask=mask)
    else:
        if HAS_BIAS:
            total += tl.load(bias + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        offsets = tokens[None, :].to(tl.int64) * N + row[:, None]
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
    """Constants of `_gemv_kernel`: rows per step, steps, steps loaded ahead, columns per program, warps."""

    block_n: int
    steps: int
    ahead: int
    block_k: int
    num_warps: int


@dataclass(frozen=True)
class GemmConfig:
    """Constants of `_gemm_kernel`: tile of tokens, rows and columns, warps, pipeline stages, splits of K."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    stages: int
    splits: int


@dataclass(frozen=True)
class DenseConfig:
    """Dequantize into memory, then the vendor library's product."""


Config = GemvConfig | GemmConfig | DenseConfig
KINDS: dict[str, type[Config]] = {"gemv": GemvConfig, "gemm": GemmConfig, "dense": DenseConfig}


@functools.cache
def _tuned() -> dict[str, dict[str, Any]]:
    """Configurations by `tuning_key`, as `tune` writes them: "kernel", a key of `KINDS`, and its fields."""
    file = Path(__file__).parent / "tuned" / "sm_90.json"
    try:
        return json.loads(file.read_text())["configurations"]
    except OSError:
        return {}


def tuning_key(tokens: int, rows: int, columns: int, bits: int) -> str:
    """Tokens are rounded up to a power of two, so that neighbouring batches share a configuration."""
    return f"m{triton.next_power_of_2(tokens)}/w{bits}/{rows}x{columns}"


def gemv_config(tokens: int, rows: int, columns: int, bits: int) -> GemvConfig:
    """A configuration for sizes that are not tuned."""
    codes, words = UNITS[bits]
    block_k = max(codes, min(triton.next_power_of_2(columns), 16384))
    # 32 columns of x in a thread's registers
    num_warps = max(1, block_k // 1024)
    block_n = 4 if tokens == 1 and words == 1 and bits < 8 else 2
    steps = 4 if rows >= 4096 else 2
    return GemvConfig(block_n, steps, 1, block_k, num_warps)


def gemm_config(tokens: int, rows: int, columns: int, bits: int) -> GemmConfig:
    """A configuration for sizes that are not tuned."""
    block_m = min(128, max(16, triton.next_power_of_2(tokens)))
    block_n = 128 if block_m == 128 else 64
    block_k = 128 if block_m <= 64 else 64
    tiles = triton.cdiv(tokens, block_m) * triton.cdiv(rows, block_n)
    # Four small programs fill a multiprocessor; partial results of many tokens cost more than they bring.
    programs = max(132, 8448 // block_m)
    splits = max(1, min(8, programs // tiles, triton.cdiv(columns, block_k) // 4))
    return GemmConfig(block_m, block_n, block_k, 8 if block_m == 128 else 4, 3, splits)


# More tokens' activations do not fit the registers.
_GEMV_TOKENS = 2
# From this many tokens on, dequantizing into memory once and a product of the vendor library is faster.
_DENSE_TOKENS = 512


def configuration(tokens: int, rows: int, columns: int, bits: int) -> Config:
    """The kernel and configuration for these sizes: tuned if there is one, else from a heuristic."""
    if (found := _tuned().get(tuning_key(tokens, rows, columns, bits))) is not None:
        return KINDS[found["kernel"]](**{name: found[name] for name in found if name != "kernel"})
    if tokens <= _GEMV_TOKENS:
        return gemv_config(tokens, rows, columns, bits)
    return gemm_config(tokens, rows, columns, bits) if tokens < _DENSE_TOKENS else DenseConfig()


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
    weight, scale = weight.contiguous(), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    if tokens == 0 or rows == 0:
        return x.new_empty((*x.shape[:-1], rows))
    config = configuration(tokens, rows, columns, bits)
    # The tensor cores have no float32.
    if x.dtype == torch.float32 and not isinstance(config, GemvConfig):
        config = DenseConfig()
    if scale.shape[1] > 1 and group_size % UNITS[bits][0] != 0:
        config = DenseConfig()
    y = run(flat, weight, scale, zero_point, bias, bits, group_size, layout, config)
    return y.view(*x.shape[:-1], rows)


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
    config: Config,
) -> Tensor:
    """(tokens, K) -> (tokens, N) as `config` says."""
    if isinstance(config, GemvConfig):
        return gemv(x, weight, scale, zero_point, bias, bits, group_size, config)
    if isinstance(config, GemmConfig):
        return gemm(x, weight, scale, zero_point, bias, bits, group_size, config)
    dense = dequantize(weight, scale, zero_point, x.shape[-1], bits, group_size, layout, x.dtype)
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


def unit(bits: int, group_size: int) -> tuple[int, int]:
    """Codes and words of the longest unit: at most 32 codes and four words, within a group (-1: any)."""
    codes, words = UNITS[bits]
    while 2 * words <= 4 and 2 * codes <= 32 and (group_size == -1 or group_size % (2 * codes) == 0):
        codes, words = 2 * codes, 2 * words
    return codes, words


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
    whole = scale.shape[1] == 1
    codes, words = unit(bits, -1 if whole else group_size)
    block_u = max(1, config.block_k // codes)
    splits = triton.cdiv(columns, block_u * codes)
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    target = y if splits == 1 else torch.empty((splits, tokens, rows), dtype=torch.float32, device=x.device)
    _gemv_kernel[(triton.cdiv(rows, config.block_n * config.steps), splits)](
        x,
        weight,
        scale,
        zero_point if zero_point is not None else scale,
        bias if bias is not None else scale,
        target,
        tokens,
        rows,
        columns,
        weight.shape[1],
        scale.shape[1],
        # One group: every unit, also a last one that reaches past K, is in group 0.
        columns + codes if whole else group_size,
        _ONE,
        BITS=bits,
        UNIT=codes,
        WORDS=words,
        TOKENS=triton.next_power_of_2(tokens),
        BLOCK_N=config.block_n,
        STEPS=config.steps,
        AHEAD=config.ahead,
        BLOCK_U=block_u,
        CENTERED=x.dtype == torch.float32,
        HAS_ZERO=zero_point is not None,
        HAS_BIAS=bias is not None,
        SPLIT=splits > 1,
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
    whole = scale.shape[1] == 1
    codes, words = unit(bits, -1 if whole else group_size)
    block_u = config.block_k // codes
    steps = triton.cdiv(columns, block_u * codes)
    steps_per_split = triton.cdiv(steps, config.splits)
    splits = triton.cdiv(steps, steps_per_split)
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    target = y if splits == 1 else torch.empty((splits, tokens, rows), dtype=torch.float32, device=x.device)
    _gemm_kernel[(triton.cdiv(tokens, config.block_m), triton.cdiv(rows, config.block_n), splits)](
        x,
        weight,
        scale,
        zero_point if zero_point is not None else scale,
        bias if bias is not None else scale,
        target,
        tokens,
        rows,
        columns,
        weight.shape[1],
        scale.shape[1],
        columns + codes if whole else group_size,
        _ONE,
        steps_per_split * block_u,
        BITS=bits,
        UNIT=codes,
        WORDS=words,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_U=block_u,
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

"""GPU kernel of `quantize_activations`: every value is read once, from memory into registers, and leaves as a byte.

A program takes some rows, or with groups and without a norm some groups of a row. Magnitudes are compared as
integers, which orders them alike, puts NaN above infinity, and is what warps reduce fastest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tensormill.ops.dequantize_wna16 import num_groups
from tensormill.ops.overlap import overlap_options
from tensormill.ops.quantize_activations.reference import LARGEST_FP8

LONGEST_ROW = 65536
_SMALLEST = (127 - 100) << 23  # the bits of 2^-100
_INFINITY = 0x7F800000


@triton.jit(do_not_specialize=["counter_count", "M"])
def _kernel(
    x,
    norm_weight,
    permutation,
    block_bits,
    codes,
    scales,
    counters,
    counter_count,
    M,
    K,
    groups,
    group_size,
    eps,
    norm_offset,
    limit,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_PERMUTATION: tl.constexpr,
    HAS_BITS: tl.constexpr,
    INTEGERS: tl.constexpr,
    HAS_COUNTERS: tl.constexpr,
    OVERLAP: tl.constexpr,
    SMALLEST: tl.constexpr,
    INFINITY: tl.constexpr,
):
    """Program (r, c): ROWS rows, GROUPS groups of at most GROUP channels (CONTIGUOUS: exactly GROUP, or one group).

    Zeroes the `counters`, 256 a program, for a kernel that follows.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    if HAS_COUNTERS:
        place = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 256 + tl.arange(0, 256)
        tl.store(counters + place, tl.zeros((256,), tl.int32), mask=place < counter_count)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = (row < M)[:, None]
    row_start = row[:, None].to(tl.int64) * K
    first = tl.program_id(1) * GROUPS
    index = tl.arange(0, GROUPS * GROUP)[None, :]
    if CONTIGUOUS:
        k = first * GROUP + index
        k_mask = k < K
    else:
        k = (first + index // GROUP) * group_size + index % GROUP
        k_mask = (index % GROUP < group_size) & (k < K)
    mask = row_mask & k_mask
    source = k
    if HAS_PERMUTATION:
        source = tl.load(permutation + k, mask=k_mask, other=0).to(tl.int32)
    value = tl.load(x + row_start + source, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        # float64, so that the order of the sum does not show
        wide = value.to(tl.float64)
        mean_square = tl.sum(wide * wide, axis=1) / K
        added = (tl.zeros((ROWS,), tl.float32) + eps).to(tl.float64)
        factor = (1.0 / tl.sqrt(mean_square + added)).to(tl.float32)
        weight = tl.load(norm_weight + source, mask=k_mask, other=0.0).to(tl.float32) + norm_offset
        value = value * factor[:, None] * weight
    group = first + tl.arange(0, GROUPS)
    if HAS_BITS:
        width = tl.load(block_bits + group, mask=group < groups, other=8).to(tl.int32)
        largest_code = ((1 << (width - 1)) - 1).to(tl.float32)[None, :]
    else:
        largest_code = tl.zeros((1, GROUPS), tl.float32) + limit
    magnitude = tl.reshape(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, (ROWS, GROUPS, GROUP))
    largest = tl.maximum(tl.max(magnitude, axis=2), SMALLEST)
    finite = largest < INFINITY
    largest = tl.where(finite, largest, SMALLEST).to(tl.float32, bitcast=True)
    largest_code = tl.broadcast_to(largest_code, (ROWS, GROUPS))
    inverse = tl.math.div_rn(largest_code, largest)
    scale = tl.where(finite, tl.math.div_rn(largest, largest_code), float("nan"))
    scaled = tl.reshape(value, (ROWS, GROUPS, GROUP)) * inverse[:, :, None]
    scaled = tl.where(finite[:, :, None], scaled, 0.0)
    if INTEGERS:
        # Adding 1.5 * 2^23 rounds half to even and leaves the integer in the lowest bits.
        code = (scaled + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        code = scaled.to(codes.dtype.element_ty)
    tl.store(codes + row_start + k, tl.reshape(code, (ROWS, GROUPS * GROUP)), mask=mask)
    scale_offsets = row[:, None].to(tl.int64) * groups + group[None, :]
    tl.store(scales + scale_offsets, scale, mask=row_mask & (group < groups)[None, :])


def geometry(channels: int, group_size: int, whole: bool) -> tuple[int, int, int, int, int]:
    """Rows and groups of a program, padded size of a group, programs along a row, warps; `whole`: rows must be."""
    groups = num_groups(channels, group_size)
    group = triton.next_power_of_2(channels if group_size == -1 else group_size)
    at_once = triton.next_power_of_2(groups)
    if not whole:
        at_once = min(at_once, -(-4096 // group))
    size = at_once * group
    rows = max(1, 1024 // size)
    warps = max(1, min(32, rows * size // 1024))
    return rows, at_once, group, triton.cdiv(groups, at_once), warps


def quantize(
    x: Tensor,
    norm_weight: Tensor | None,
    permutation: Tensor | None,
    block_bits: Tensor | None,
    eps: float,
    norm_offset: float,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    *,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_activations`.

    `counters` (int32) are zeroed on the way.
    """
    columns = x.shape[-1]
    groups = num_groups(columns, group_size)
    x = x.contiguous()
    tokens = x.numel() // max(columns, 1)
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty((*x.shape[:-1], groups), dtype=torch.float32, device=x.device)
    if tokens == 0:
        return codes, scales
    rows, at_once, group, programs, warps = geometry(columns, group_size, norm_weight is not None)
    row_programs = triton.cdiv(tokens, rows)
    if counters is not None and counters.numel() > 256 * row_programs * programs:
        counters.zero_()
        counters = None
    _kernel[(row_programs, programs)](
        x,
        x if norm_weight is None else norm_weight.contiguous(),
        x if permutation is None else permutation.contiguous(),
        x if block_bits is None else block_bits.contiguous(),
        codes,
        scales,
        scales if counters is None else counters,
        0 if counters is None else counters.numel(),
        tokens,
        columns,
        groups,
        columns if group_size == -1 else group_size,
        eps,
        norm_offset,
        LARGEST_FP8 if dtype == torch.float8_e4m3fn else 2.0 ** (bits - 1) - 1,
        ROWS=rows,
        GROUPS=at_once,
        GROUP=group,
        CONTIGUOUS=groups == 1 or group == group_size,
        HAS_NORM=norm_weight is not None,
        HAS_PERMUTATION=permutation is not None,
        HAS_BITS=block_bits is not None,
        INTEGERS=dtype == torch.int8,
        HAS_COUNTERS=counters is not None,
        SMALLEST=_SMALLEST,
        INFINITY=_INFINITY,
        num_warps=warps,
        # A product and a sum are rounded one after the other, as in the reference.
        enable_fp_fusion=False,
        **overlap_options(x),
    )
    return codes, scales

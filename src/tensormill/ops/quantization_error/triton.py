"""GPU kernel of `quantization_error`: every weight is read once for all candidates, every difference written once.

A program holds whole groups of some rows in registers and goes through the candidates. Its arithmetic is that of
`ops/quantization.py`, operation by operation; `scale_and_zero` and `round_to_grid` serve other kernels too.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensormill.ops.quantization import QuantSpec

# Adding and subtracting 1.5 * 2^23 rounds half to even up to 2^22. What is larger stays larger than any code.
_ROUND = tl.constexpr(12582912.0)
# Bits of mantissa of the dtypes that scales are rounded to.
_MANTISSA = {None: 23, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
_TILE = 2048
_COLUMNS = 1024


def grid_constants(spec: QuantSpec) -> dict[str, Any]:
    """A quantizer as the kernels take it."""
    return {
        "MAX_CODE": float(spec.max_code),
        "LEVELS": spec.levels,
        "SYMMETRIC": spec.symmetric,
        "INCLUDE_ZERO": spec.include_zero,
        "SCALE_MANTISSA": _MANTISSA[spec.scale_dtype],
        "SMALLEST": spec.smallest_scale,
    }


@triton.jit
def _clamp(x, low: tl.constexpr, high: tl.constexpr):
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scale_and_zero(
    low,
    high,
    MAX_CODE: tl.constexpr,
    LEVELS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    INCLUDE_ZERO: tl.constexpr,
    SCALE_MANTISSA: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Scales and zero points of groups from their smallest and largest weights: `group_grid`."""
    if SYMMETRIC:
        spread = tl.maximum(-low, high)
    else:
        if INCLUDE_ZERO:
            low = tl.minimum(low, 0.0)
            high = tl.maximum(high, 0.0)
        spread = high - low
    scale = tl.math.div_rn(spread, tl.zeros_like(spread) + LEVELS)
    if SCALE_MANTISSA == 10:
        scale = scale.to(tl.float16).to(tl.float32)
    elif SCALE_MANTISSA == 7:
        # In integers, which the interpreter computes rightly too.
        pattern = scale.to(tl.int32, bitcast=True)
        pattern = (pattern + 0x7FFF + ((pattern >> 16) & 1)) & -65536
        scale = tl.where(scale == scale, pattern.to(tl.float32, bitcast=True), scale)
    scale = tl.maximum(scale, SMALLEST, propagate_nan=tl.PropagateNan.ALL)
    if SYMMETRIC:
        zero = tl.zeros_like(scale) + (MAX_CODE + 1) / 2
    else:
        zero = _clamp((tl.math.div_rn(-low, scale) + _ROUND) - _ROUND, 0.0, MAX_CODE)
    return scale, zero


@triton.jit
def round_to_grid(x, scale, zero, MAX_CODE: tl.constexpr):
    """What x reads as after quantization, for scale and zero of its shape: `fake_quantize_groups`."""
    code = _clamp(((tl.math.div_rn(x, scale) + _ROUND) - _ROUND) + zero, 0.0, MAX_CODE)
    return (code - zero) * scale


@triton.jit(do_not_specialize=["candidates"])
def _kernel(
    weight,
    scales,
    result,
    N,
    K,
    group_size,
    candidates,
    plane,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    MAX_CODE: tl.constexpr,
    LEVELS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    INCLUDE_ZERO: tl.constexpr,
    SCALE_MANTISSA: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Program (r, g): ROWS rows, GROUPS groups; WHOLE: groups have exactly GROUP columns and fill the rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    index = tl.arange(0, GROUPS * GROUP)[None, :]
    first = tl.program_id(1) * GROUPS
    if WHOLE:
        k = first * GROUP + index
        source = k
        wanted = k < K
    else:
        # Columns beyond a group's last are copies of it, which change neither its minimum nor its maximum.
        inside = index % GROUP if GROUPS > 1 else index
        start = (first + index // GROUP) * group_size if GROUPS > 1 else first * group_size
        k = start + inside
        source = tl.minimum(start + tl.minimum(inside, group_size - 1), K - 1)
        wanted = (inside < group_size) & (k < K)
    rows = row < N
    start_of_row = row.to(tl.int64) * K
    w = tl.load(weight + start_of_row + source, mask=rows & (source < K), other=0.0)  # [ROWS, columns]
    target = start_of_row + k
    for _ in range(candidates):
        s = tl.load(scales + source, mask=source < K, other=1.0)  # [1, columns]
        x = tl.reshape(w * s, (ROWS, GROUPS, GROUP))
        scale, zero = scale_and_zero(
            tl.min(x, axis=2),
            tl.max(x, axis=2),
            MAX_CODE,
            LEVELS,
            SYMMETRIC,
            INCLUDE_ZERO,
            SCALE_MANTISSA,
            SMALLEST,
        )
        scale = tl.broadcast_to(scale[:, :, None], (ROWS, GROUPS, GROUP))
        zero = tl.broadcast_to(zero[:, :, None], (ROWS, GROUPS, GROUP))
        rounded = tl.reshape(round_to_grid(x, scale, zero, MAX_CODE), (ROWS, GROUPS * GROUP))
        s = tl.broadcast_to(s, (ROWS, GROUPS * GROUP))
        tl.store(result + target, tl.math.div_rn(rounded, s) - w, mask=rows & wanted)
        scales += K
        result += plane


def geometry(columns: int, size: int) -> tuple[int, int, int, int, int]:
    """Rows and groups of a program, padded size of a group, programs along a row, warps, for groups of `size`."""
    groups = triton.cdiv(columns, size)
    group = triton.next_power_of_2(size)
    at_once = min(triton.next_power_of_2(groups), max(1, _COLUMNS // group))
    rows = max(1, _TILE // (at_once * group))
    return rows, at_once, group, triton.cdiv(groups, at_once), max(4, min(16, rows * at_once * group // 512))


def quantization_error(weight: Tensor, scales: Tensor, *grid: Any) -> Tensor:
    """See `reference.quantization_error`."""
    spec = QuantSpec(*grid)
    rows, columns = weight.shape
    weight, scales = weight.contiguous(), scales.contiguous()
    result = torch.empty((len(scales), rows, columns), dtype=torch.float32, device=weight.device)
    if result.numel() == 0:
        return result
    size = spec.columns_per_group(columns)
    at_once, groups, group, programs, warps = geometry(columns, size)
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        _kernel[(triton.cdiv(rows, at_once), programs)](
            weight,
            scales,
            result,
            rows,
            columns,
            size,
            len(scales),
            rows * columns,
            ROWS=at_once,
            GROUPS=groups,
            GROUP=group,
            WHOLE=group == size and columns % size == 0,
            **grid_constants(spec),
            num_warps=warps,
            # A product and a sum are rounded one after the other, as in the reference.
            enable_fp_fusion=False,
        )
    return result

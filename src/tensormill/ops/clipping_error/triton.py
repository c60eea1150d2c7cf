"""GPU kernel of `clipping_error`: weights and Gram blocks are read once, and only errors are written.

A program holds one group of some rows in registers and the group's block of the Gram matrix in shared memory, and goes
through the ratios. The extremes of a clipped group are its clipped extremes, so that no ratio needs a reduction over
weights.

Tensor cores multiply numbers of 10 bits of mantissa (TF32). With d = c + f and S = C + F, c and C being d and S cut to
so many bits, `d S d' = (c + 2 f) C c' + c F c' + f C f' + 2 c F f'`, since S is symmetric. The first two terms are two
products of c; the others, some 2^-21 of the first, are left out.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensormill.ops.quantization import QuantSpec
from tensormill.ops.quantization_error.triton import grid_constants, round_to_grid, scale_and_zero


@triton.jit
def _coarse(x):
    """x with the 10 bits of mantissa that tensor cores multiply."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["candidates"])
def _kernel(
    weight,
    gram,
    ratios,
    result,
    N,
    K,
    groups,
    candidates,
    plane,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    MAX_CODE: tl.constexpr,
    LEVELS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    INCLUDE_ZERO: tl.constexpr,
    SCALE_MANTISSA: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Program (r, g): ROWS rows of group g; WHOLE: groups fill the rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    column = tl.arange(0, GROUP)
    k = group * GROUP + column
    if not WHOLE:
        # As in the reference: beyond the last column come copies of it, of no weight in the Gram matrix.
        k = tl.minimum(k, K - 1)
    wide = row.to(tl.int64)
    w = tl.load(weight + wide[:, None] * K + k[None, :], mask=(row < N)[:, None], other=0.0)  # [ROWS, GROUP]
    of_group = gram + group.to(tl.int64) * (GROUP * GROUP)
    block = tl.load(of_group + column[:, None] * GROUP + column[None, :])
    block_coarse = _coarse(block)
    block_fine = block - block_coarse
    smallest, greatest = tl.min(w, axis=1), tl.max(w, axis=1)
    largest = tl.maximum(-smallest, greatest)
    target = wide * groups + group
    for _ in range(candidates):
        limit = largest * tl.load(ratios)
        low = tl.minimum(tl.maximum(smallest, -limit), limit)
        high = tl.minimum(tl.maximum(greatest, -limit), limit)
        scale, zero = scale_and_zero(
            low, high, MAX_CODE, LEVELS, SYMMETRIC, INCLUDE_ZERO, SCALE_MANTISSA, SMALLEST
        )
        clipped = tl.minimum(tl.maximum(w, -limit[:, None]), limit[:, None])
        scale = tl.broadcast_to(scale[:, None], (ROWS, GROUP))
        zero = tl.broadcast_to(zero[:, None], (ROWS, GROUP))
        d = round_to_grid(clipped, scale, zero, MAX_CODE) - w
        coarse = _coarse(d)
        product = tl.dot(coarse, block_coarse, input_precision="tf32") * (2 * d - coarse)
        product += tl.dot(coarse, block_fine, input_precision="tf32") * coarse
        error = tl.sum(product, axis=1)
        tl.store(result + target, error, mask=row < N)
        ratios += 1
        result += plane


def geometry(size: int) -> tuple[int, int]:
    """Rows of a program and warps, for groups of `size`."""
    return {16: (128, 4), 32: (64, 4), 64: (64, 8), 128: (64, 8)}[size]


def clipping_error(weight: Tensor, gram: Tensor, ratios: Tensor, *grid: Any) -> Tensor:
    """See `reference.clipping_error`."""
    spec = QuantSpec(*grid)
    rows, columns = weight.shape
    size, groups = spec.columns_per_group(columns), spec.num_groups(columns)
    weight, gram, ratios = weight.contiguous(), gram.contiguous(), ratios.contiguous()
    result = torch.empty((len(ratios), rows, groups), dtype=torch.float32, device=weight.device)
    if result.numel() == 0:
        return result
    at_once, warps = geometry(size)
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        _kernel[(triton.cdiv(rows, at_once), groups)](
            weight,
            gram,
            ratios,
            result,
            rows,
            columns,
            groups,
            len(ratios),
            rows * groups,
            ROWS=at_once,
            GROUP=size,
            WHOLE=columns % size == 0,
            **grid_constants(spec),
            num_warps=warps,
            num_stages=1,
            # A product and a sum are rounded one after the other, as in the reference.
            enable_fp_fusion=False,
        )
    return result

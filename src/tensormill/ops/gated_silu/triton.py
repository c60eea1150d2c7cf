"""GPU kernel of `gated_silu`: one pass, a program per block of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tensormill.ops.overlap import overlap_options


@triton.jit
def _kernel(x, y, N, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < N
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(x + row * 2 * N + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * N + N + column, mask=mask, other=0.0).to(tl.float32)
    kind = y.dtype.element_ty
    silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(y + row * N + column, (silu * up).to(kind), mask=mask)


def gated_silu(x: Tensor) -> Tensor:
    """See `reference.reference`."""
    columns = x.shape[-1] // 2
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = y.numel() // columns
    block = 1024
    # at most 65535 programs on the second axis
    for first in range(0, rows, 65535):
        count = min(65535, rows - first)
        _kernel[(triton.cdiv(columns, block), count)](
            x.view(rows, -1)[first:],
            y.view(rows, -1)[first:],
            columns,
            BLOCK=block,
            num_warps=4,
            **overlap_options(x),
        )
    return y

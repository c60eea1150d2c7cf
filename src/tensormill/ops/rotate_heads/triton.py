"""GPU kernel of `rotate_heads`: a program turns some heads of one position, both halves of a head in one thread."""

from __future__ import annotations

import torch
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
    y,
    length,
    heads,
    rotated,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, BLOCK_D)
    mask = (head < heads)[:, None] & (column < HALF)[None, :]
    inside = column < HALF
    place = head[:, None] * (2 * HALF) + column[None, :]
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    left = tl.load(x + row * (heads * 2 * HALF) + place, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(x + row * (heads * 2 * HALF) + place + HALF, mask=mask, other=0.0).to(tl.float32)
    table = (row % length) * (2 * HALF) + column
    turned = (head < rotated)[:, None]
    cosine_left = tl.load(cosine + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    cosine_right = tl.load(cosine + table + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    sine_left = tl.load(sine + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    sine_right = tl.load(sine + table + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    kind = y.dtype.element_ty
    # each product rounded, then the sum, as the reference's steps are
    first = (left * cosine_left).to(kind).to(tl.float32) + (-right * sine_left).to(kind).to(tl.float32)
    second = (right * cosine_right).to(kind).to(tl.float32) + (left * sine_right).to(kind).to(tl.float32)
    target = y + row * (heads * 2 * HALF) + place
    tl.store(target, tl.where(turned, first, left).to(kind), mask=mask)
    tl.store(target + HALF, tl.where(turned, second, right).to(kind), mask=mask)


def rotate_heads(x: Tensor, cosine: Tensor, sine: Tensor, rotated: int) -> Tensor:
    """See `reference.reference`."""
    batch, length, heads, head_dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
    block_d = triton.next_power_of_2(head_dim // 2)
    block_h = max(1, min(triton.next_power_of_2(heads), 512 // block_d))
    _kernel[(batch * length, triton.cdiv(heads, block_h))](
        x, cosine, sine, y, length, heads, rotated,
        HALF=head_dim // 2, BLOCK_D=block_d, BLOCK_H=block_h, num_warps=4,
        **overlap_options(x),
    )  # fmt: skip
    return y

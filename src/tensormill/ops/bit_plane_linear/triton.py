"""Triton kernels: planes are expanded to bytes, which int8 tensor cores multiply. For GPUs without products of single
bits, groups, and products of so many planes that int8 is faster.

A byte holds u, or u - 128 for 8 bits; the corrections that formats need take the difference along.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tensormill.ops.bit_planes import affine_product

BLOCK_K = 128  # every group size is a multiple of it
_OFFSET = tl.constexpr(128)


@triton.jit
def _expand_kernel(planes_ptr, bytes_ptr, count, words, length, BITS: tl.constexpr, BLOCK: tl.constexpr):
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]  # among all rows'
    place = tl.arange(0, 32)[None, :]
    code = tl.zeros([BLOCK, 32], tl.int32)
    for j in tl.static_range(BITS):
        bits = tl.load(planes_ptr + j * count + word, mask=word < count, other=0)
        code += ((bits >> place) & 1) << j
    if BITS == 8:
        code -= _OFFSET
    code = tl.where(word % words * 32 + place < length, code, 0)
    tl.store(bytes_ptr + word * 32 + place, code.to(tl.int8), mask=word < count)


@triton.jit
def _gemm_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    x_sums_ptr,
    w_sums_ptr,
    x_scale_ptr,
    w_scale_ptr,
    tokens,
    rows,
    length,
    columns,
    groups,
    alpha,
    beta_x,
    beta_w,
    gamma,
    SCALED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    # programs in bands of BAND token blocks, so that those that run together share what they read
    m_blocks, n_blocks = tl.cdiv(tokens, BLOCK_M), tl.cdiv(rows, BLOCK_N)
    band = tl.program_id(0) // (BAND * n_blocks)
    height = tl.minimum(m_blocks - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * n_blocks)
    m = (band * BAND + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m_in, n_in = tl.minimum(m, tokens - 1), tl.minimum(n, rows - 1)
    x_at = x_ptr + m_in.to(tl.int64)[:, None] * columns + k[None, :]
    w_at = w_ptr + n_in.to(tl.int64)[None, :] * columns + k[:, None]
    y_at = y_ptr + m.to(tl.int64)[:, None] * rows + n[None, :]
    inside = (m < tokens)[:, None] & (n < rows)[None, :]
    if STEPS > 0:  # of BLOCK_K, in a group; 0 for whole rows
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for g in range(groups):
            dot = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            for step in tl.static_range(STEPS):
                start = (g * STEPS + step) * BLOCK_K
                inside_k = start + k < columns  # the last group may be shorter
                x_tile = tl.load(x_at + start, mask=inside_k[None, :], other=0)
                dot = tl.dot(
                    x_tile, tl.load(w_at + start, mask=inside_k[:, None], other=0), dot, out_dtype=tl.int32
                )
            x_sum, w_sum = tl.load(x_sums_ptr + m_in * groups + g), tl.load(w_sums_ptr + n_in * groups + g)
            size = tl.minimum(STEPS * BLOCK_K, length - g * STEPS * BLOCK_K)
            exact = alpha * dot + (beta_x * x_sum)[:, None] + (beta_w * w_sum + gamma * size)[None, :]
            x_scale, w_scale = _scales(x_scale_ptr, w_scale_ptr, m_in * groups + g, n_in * groups + g)
            total += exact.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
        tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        dot = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for start in tl.range(0, columns, BLOCK_K):
            dot = tl.dot(tl.load(x_at + start), tl.load(w_at + start), dot, out_dtype=tl.int32)
        x_sum, w_sum = tl.load(x_sums_ptr + m_in), tl.load(w_sums_ptr + n_in)
        exact = alpha * dot + (beta_x * x_sum)[:, None] + (beta_w * w_sum + gamma * length)[None, :]
        if SCALED:
            x_scale, w_scale = _scales(x_scale_ptr, w_scale_ptr, m_in, n_in)
            scaled = exact.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
            tl.store(y_at, scaled.to(y_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(y_at, exact, mask=inside)


@triton.jit
def _scales(x_scale_ptr, w_scale_ptr, x_at, w_at):
    return tl.load(x_scale_ptr + x_at).to(tl.float32), tl.load(w_scale_ptr + w_at).to(tl.float32)


def bit_plane_linear(
    x: Tensor,
    weight: Tensor,
    x_sums: Tensor,
    weight_sums: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    length: int,
    x_format: str,
    weight_format: str,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `reference.bit_plane_linear`."""
    scaled = x_scale is not None
    (q, tokens, words), (p, rows, _) = x.shape, weight.shape
    y = torch.empty(tokens, rows, dtype=dtype if scaled else torch.int32, device=x.device)
    if y.numel() == 0:
        return y
    alpha, beta_x, beta_w, gamma = affine_product(x_format, weight_format, q, p)
    x_zero, w_zero = 128 * (q == 8), 128 * (p == 8)
    columns = 32 * words
    block_m = min(128, max(16, triton.next_power_of_2(tokens)))
    block_n = 128 if block_m >= 64 else 64
    grid = triton.cdiv(tokens, block_m) * triton.cdiv(rows, block_n)
    _gemm_kernel[(grid,)](
        expand(x, length),
        expand(weight, length),
        y,
        x_sums.contiguous(),
        weight_sums.contiguous(),
        x_scale.contiguous() if x_scale is not None else x_sums,
        weight_scale.contiguous() if weight_scale is not None else weight_sums,
        tokens,
        rows,
        length,
        columns,
        x_sums.shape[1],
        alpha,
        beta_x + alpha * w_zero,
        beta_w + alpha * x_zero,
        gamma - alpha * x_zero * w_zero,
        scaled,
        group_size // BLOCK_K if x_sums.shape[1] > 1 else 0,
        block_m,
        block_n,
        BLOCK_K,
        8,
        num_warps=8 if block_m == 128 else 4,
        num_stages=4 if block_m < 128 else 3,
    )
    return y


def expand(planes: Tensor, length: int) -> Tensor:
    """(R, 32 W) int8: codes, less 128 if they have 8 bits; zeros beyond `length`."""
    planes = planes.contiguous()
    bits, rows, words = planes.shape
    result = torch.empty(rows, 32 * words, dtype=torch.int8, device=planes.device)
    count, block = rows * words, 256
    _expand_kernel[(triton.cdiv(count, block),)](
        planes, result, count, words, length, bits, block, num_warps=8
    )
    return result

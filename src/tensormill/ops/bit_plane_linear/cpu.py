"""The C++ kernels on CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.ops.bit_plane_linear import _cpu  # type: ignore[attr-defined]
from tensormill.ops.bit_planes import affine_product

# Pairs of planes, and pairs times tokens, from which on int8 products are faster, expanding the planes included.
_LEAST_PAIRS = 8
_LEAST_WORK = 512
_LEAST_LENGTH = 64  # `torch._int_mm` is wrong for one column


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
    pairs = x.shape[0] * weight.shape[0]
    many = pairs >= _LEAST_PAIRS and pairs * x.shape[1] >= _LEAST_WORK
    if many and length >= _LEAST_LENGTH and x_sums.shape[1] == 1 and _cpu.has_byte_products():
        y = _by_bytes(x, weight, x_sums, weight_sums, length, x_format, weight_format)
        if x_scale is None or weight_scale is None:
            return y
        return (y.float() * (x_scale.float() * weight_scale.float().T)).to(dtype)
    tensors = [t.contiguous() for t in (x, weight, x_sums, weight_sums)]
    scales = [None if s is None else s.float().contiguous() for s in (x_scale, weight_scale)]
    (q, tokens, words), (p, rows, _) = x.shape, weight.shape
    y = torch.empty(tokens, rows, dtype=torch.int32 if x_scale is None else torch.float32)
    _cpu.product(
        *(t.data_ptr() for t in tensors),
        *(0 if s is None else s.data_ptr() for s in scales),
        y.data_ptr(),
        tokens,
        rows,
        length,
        words,
        words if group_size == -1 else group_size // 32,
        q,
        p,
        *affine_product(x_format, weight_format, q, p),
        torch.get_num_threads(),
    )
    return y if x_scale is None else y.to(dtype)


def _by_bytes(
    x: Tensor,
    weight: Tensor,
    x_sums: Tensor,
    weight_sums: Tensor,
    length: int,
    x_format: str,
    weight_format: str,
) -> Tensor:
    """The exact product through int8. Sums wrap modulo 2^32, as everywhere; results fit."""
    q, p = x.shape[0], weight.shape[0]
    alpha, beta_x, beta_w, gamma = affine_product(x_format, weight_format, q, p)
    x_zero, w_zero = 128 * (q == 8), 128 * (p == 8)
    y = torch._int_mm(_expand(x, length), _expand(weight, length).T).mul_(alpha)
    y += (beta_x + alpha * w_zero) * x_sums
    y += (beta_w + alpha * x_zero) * weight_sums.T
    constant = (gamma - alpha * x_zero * w_zero) * length
    return y.add_((constant + (1 << 31)) % (1 << 32) - (1 << 31))


def _expand(planes: Tensor, length: int) -> Tensor:
    """(rows, length) int8 codes, less 128 if they have 8 bits."""
    bits, rows, words = planes.shape
    result = torch.empty(rows, length, dtype=torch.int8)
    planes = planes.contiguous()
    _cpu.expand(planes.data_ptr(), result.data_ptr(), rows, length, words, bits, torch.get_num_threads())
    return result


def instruction_set() -> str:
    """The best instruction set that may be used here: "portable", "avx2", "avx512" or one above it."""
    return str(_cpu.instruction_set())

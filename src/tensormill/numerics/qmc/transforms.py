"""Fast transforms of samples at low-discrepancy points in their natural order.

`fwht` for digital nets, `fftbr` for lattices: the Fourier transform of samples in radical-inverse order, as a
decimation in time takes them. All are orthonormal, along the last dimension, of length 2^m.

Source: Sorokin, QMCPy, arXiv 2502.14256, sections on fast transforms and fast Gram matrices.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.ops.fft_bit_reversed import fft_bit_reversed
from tensormill.ops.fft_bit_reversed.reference import bit_reversal
from tensormill.ops.hadamard_transform import hadamard_transform


def _check(x: Tensor) -> int:
    n = x.shape[-1] if x.dim() else 0
    if n < 1 or n & (n - 1):
        raise InvalidArgument(
            f"given x of shape {tuple(x.shape)}, expected a last dimension that is a power of two"
        )
    return int(n)


def fwht(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last dimension, natural order; its own inverse and adjoint.

    Args:
        x: (..., n), floating point, n a power of two.
    """
    return hadamard_transform(x, _check(x) ** -0.5)


class _BitReversal(torch.autograd.Function):
    """The permutation is its own inverse, so its gradient is a gather too, where index_select's scatters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.index_select(-1, bit_reversal(x.shape[-1], x.device))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return reverse_bits(gradients[0])


def reverse_bits(x: Tensor) -> Tensor:
    """Element i of the last dimension moves to the index with i's bits in reverse order."""
    _check(x)
    result: Tensor = _BitReversal.apply(x)
    return result


@functools.lru_cache(maxsize=16)
def _twiddles(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """exp(-i pi k / n) for k < n."""
    angles = torch.arange(n, dtype=dtype, device=device) * (-math.pi / n)
    return torch.polar(torch.ones_like(angles), angles)


def _fourier(x: Tensor, inverse: bool) -> Tensor:
    n = _check(x)
    if x.dtype not in (torch.float32, torch.float64):
        x = x.to(torch.promote_types(x.dtype, torch.complex64))
    return fft_bit_reversed(x, inverse, n**-0.5)


def fftbr(x: Tensor) -> Tensor:
    """Orthonormal Fourier transform of samples in radical-inverse (bit-reversed) order.

    Args:
        x: (..., n), real or complex, n a power of two; sample i belongs to time bit_reverse(i).

    Returns:
        (..., n) complex, frequencies in their usual order.
    """
    return _fourier(x, False)


def ifftbr(y: Tensor) -> Tensor:
    """Inverse of `fftbr`: frequencies in, samples in radical-inverse order out; (..., n) complex."""
    return _fourier(y, True)


def merge_doubling(first: Tensor, second: Tensor, kind: str) -> Tensor:
    """Transform of 2n samples from the transforms of the first n and of the n after them, in O(n).

    Args:
        first: (..., n), the transform of samples 0 to n - 1.
        second: (..., n), of samples n to 2n - 1.
        kind: "fftbr" or "fwht".

    Returns:
        (..., 2n).

    Raises:
        InvalidArgument: shapes differ, or an unknown kind.
    """
    if first.shape != second.shape:
        raise InvalidArgument(
            f"given transforms of shapes {tuple(first.shape)} and {tuple(second.shape)}, expected the same"
        )
    n = _check(first)
    if kind == "fftbr":
        second = second * _twiddles(n, second.real.dtype, second.device)
    elif kind != "fwht":
        raise InvalidArgument(f'given kind={kind!r}, expected "fftbr" or "fwht"')
    if torch.is_grad_enabled() and (first.requires_grad or second.requires_grad):
        return torch.cat([first + second, first - second], -1) * math.sqrt(0.5)
    dtype = torch.promote_types(first.dtype, second.dtype)
    result = torch.empty(*first.shape[:-1], 2 * n, dtype=dtype, device=first.device)
    torch.add(first, second, out=result[..., :n])
    torch.sub(first, second, out=result[..., n:])
    return result.mul_(math.sqrt(0.5))

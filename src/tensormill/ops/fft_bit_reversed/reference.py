"""The definition of the Fourier transform of samples in bit-reversed order, in plain PyTorch."""

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=16)
def bit_reversal(n: int, device: torch.device) -> Tensor:
    """Indices 0 to n - 1 with their log2(n) bits in reverse order, (n,) int64."""
    index = torch.zeros(1, dtype=torch.int64, device=device)
    while len(index) < n:
        index = torch.cat([2 * index, 2 * index + 1])
    return index


def fft_bit_reversed(x: Tensor, inverse: bool, scale: float) -> Tensor:
    """A permutation and `torch.fft`.

    Args:
        x: (..., n, 2), real and imaginary parts, or (..., n, 1), real; n a power of two, float32 or float64.
        inverse: the adjoint: frequencies in, samples in bit-reversed order out.
        scale: multiplies the sums.

    Returns:
        (..., n, 2) in x's dtype.
    """
    if x.numel() == 0:  # torch.fft refuses it
        return x.expand(*x.shape[:-1], 2).clone()
    values = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x[..., 0]
    order = bit_reversal(x.shape[-2], x.device)
    if inverse:
        result = torch.fft.ifft(values, norm="forward").index_select(-1, order)
    else:
        result = torch.fft.fft(values.index_select(-1, order))
    return torch.view_as_real(result * scale)

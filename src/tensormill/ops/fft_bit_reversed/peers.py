"""What the transform is timed against.

`torch.fft.fft` of the same length takes its samples in the usual order, so only its time is compared (tolerance
infinity): it is the yardstick that everybody has. With the permutation before or after it, it computes the same.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tensormill.operator import Operator, requires
from tensormill.ops.fft_bit_reversed.reference import bit_reversal


def _values(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x[..., 0].contiguous()


def _torch(x: Tensor, inverse: bool, scale: float) -> Callable[[], Tensor]:
    values = _values(x)
    return lambda: torch.fft.ifft(values) if inverse else torch.fft.fft(values)


def _torch_permuted(x: Tensor, inverse: bool, scale: float) -> Callable[[], Tensor]:
    values = _values(x)
    order = bit_reversal(x.shape[-2], x.device)

    def run() -> Tensor:
        if inverse:
            result = torch.fft.ifft(values, norm="forward").index_select(-1, order)
        else:
            result = torch.fft.fft(values.index_select(-1, order))
        return torch.view_as_real(result.mul_(scale))

    return run


def _scipy(x: Tensor, inverse: bool, scale: float) -> Callable[[], Any]:
    import scipy.fft

    values = _values(x).numpy()
    threads = torch.get_num_threads()
    transform = scipy.fft.ifft if inverse else scipy.fft.fft
    return lambda: torch.view_as_real(torch.from_numpy(transform(values, workers=threads)))


def register(operator: Operator) -> None:
    """Add every peer to the operator."""
    operator.peer("torch.fft, usual order", devices=("cpu", "cuda"), make=_torch, tolerance=math.inf)
    operator.peer("torch.fft and index_select", devices=("cpu", "cuda"), make=_torch_permuted)
    operator.peer(
        "scipy.fft, usual order", devices=("cpu",), make=_scipy, missing=requires("scipy"), tolerance=math.inf
    )

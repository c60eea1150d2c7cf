"""What the transform is timed against.

Fourier transforms compute something else of the same length and nearly the same cost, so their results are
not compared (tolerance infinity); they are the yardstick that everybody has. The others compute the same.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tensormill.operator import Operator, requires

LARGEST_MATRIX = 4096


def _rfft(x: Tensor, scale: float) -> Callable[[], Tensor]:
    return lambda: torch.fft.rfft(x)


def _fft(x: Tensor, scale: float) -> Callable[[], Tensor]:
    values = x.to(torch.complex128 if x.dtype == torch.float64 else torch.complex64)
    return lambda: torch.fft.fft(values)


def _scipy_matrix(x: Tensor, scale: float) -> Callable[[], Tensor]:
    from scipy.linalg import hadamard

    matrix = (torch.from_numpy(hadamard(x.shape[-1], dtype=float)) * scale).to(x)
    return lambda: x @ matrix


def _qmcpy(x: Tensor, scale: float) -> Callable[[], Tensor]:
    from qmcpy import fwht_torch

    factor = scale * math.sqrt(x.shape[-1])  # theirs is orthonormal
    return lambda: fwht_torch(x) * factor


def _fast_hadamard_transform(x: Tensor, scale: float) -> Callable[[], Tensor]:
    from fast_hadamard_transform import hadamard_transform

    return lambda: hadamard_transform(x, scale)


def _full_precision(x: Tensor, scale: float) -> bool:
    return x.dtype in (torch.float32, torch.float64)


def register(operator: Operator) -> None:
    """Add every peer to the operator."""
    yardstick = {"supports": _full_precision, "tolerance": math.inf}
    operator.peer("torch.fft.rfft", devices=("cpu", "cuda"), make=_rfft, **yardstick)
    operator.peer("torch.fft.fft", devices=("cpu", "cuda"), make=_fft, **yardstick)
    operator.peer(
        "scipy.linalg.hadamard matmul",
        devices=("cpu", "cuda"),
        make=_scipy_matrix,
        missing=requires("scipy"),
        supports=lambda x, scale: x.shape[-1] <= LARGEST_MATRIX,
    )
    operator.peer(
        "qmcpy.fwht_torch", devices=("cpu",), make=_qmcpy, missing=requires("qmcpy"), supports=_full_precision
    )
    operator.peer(
        "fast_hadamard_transform",
        devices=("cuda",),
        make=_fast_hadamard_transform,
        missing=requires("fast_hadamard_transform"),
        supports=lambda x, scale: x.dtype != torch.float64 and 8 <= x.shape[-1] <= 1 << 15,
    )

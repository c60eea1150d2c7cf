"""The C++ kernel on CPU tensors."""

import numpy as np
import torch
from torch import Tensor

from tensormill.ops.digital_net import _cpu  # type: ignore[attr-defined]

_KERNELS = {torch.float32: _cpu.float32, torch.float64: _cpu.float64, torch.int64: _cpu.int64}
_LARGE = 4 << 20  # bytes


def digital_net(
    matrices: Tensor, shift: Tensor | None, start: int, n: int, bits: int, gray: bool, dtype: torch.dtype
) -> Tensor:
    """See `tensormill.ops.digital_net`."""
    columns = matrices.contiguous()
    replications, d, m = columns.shape
    result = _empty((replications, n, d), dtype)
    shifts = shift.contiguous() if shift is not None else None
    _KERNELS[dtype](
        columns.data_ptr(),
        shifts.data_ptr() if shifts is not None else 0,
        result.data_ptr(),
        replications,
        d,
        m,
        start,
        n,
        bits,
        gray,
        torch.get_num_threads(),
    )
    return result


def _empty(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Memory for a result: large ones from numpy, which asks for large pages.

    Its requests also fit what was freed before to the byte. Aligned ones, as torch makes them, don't, so that calls
    take turns between two places, which the cache holds no more: 1.4 ms instead of 0.4 for 16 MB.
    """
    if shape[0] * shape[1] * shape[2] * dtype.itemsize < _LARGE:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(np.empty(shape, np.float64 if dtype.itemsize == 8 else np.float32)).view(dtype)


def instruction_set() -> str:
    """The best instruction set that may be used here: "portable", "avx2", "avx512" or one above it."""
    return str(_cpu.instruction_set())

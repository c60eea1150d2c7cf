"""The C++ kernel on CPU tensors."""

import torch
from torch import Tensor

from tensormill.ops.digital_net import _cpu  # type: ignore[attr-defined]

_KERNELS = {torch.float32: _cpu.float32, torch.float64: _cpu.float64, torch.int64: _cpu.int64}


def digital_net(
    matrices: Tensor, shift: Tensor | None, start: int, n: int, bits: int, gray: bool, dtype: torch.dtype
) -> Tensor:
    """See `tensormill.ops.digital_net`."""
    columns = matrices.contiguous()
    replications, d, m = columns.shape
    result = torch.empty((replications, n, d), dtype=dtype)
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


def instruction_set() -> str:
    """Which instructions the kernel uses here: "avx512", "avx2" or "portable"."""
    return str(_cpu.instruction_set())

"""The C++ kernel on CPU tensors."""

import torch
from torch import Tensor

from tensormill.ops.fft_bit_reversed import _cpu  # type: ignore[attr-defined]

_KERNELS = {torch.float32: _cpu.float32, torch.float64: _cpu.float64}


def fft_bit_reversed(x: Tensor, inverse: bool, scale: float) -> Tensor:
    """See `tensormill.ops.fft_bit_reversed`; x is (..., n, 2)."""
    source = x.resolve_neg().contiguous()
    result = torch.empty_like(source)
    n = source.shape[-2]
    if source.numel() > 0:
        _KERNELS[x.dtype](
            source.data_ptr(),
            result.data_ptr(),
            source.numel() // (2 * n),
            n.bit_length() - 1,
            inverse,
            scale,
            torch.get_num_threads(),
        )
    return result


def instruction_set() -> str:
    """Which instructions the kernel uses here: "avx512", "avx2" or "portable"."""
    return str(_cpu.instruction_set())

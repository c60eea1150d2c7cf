"""The C++ kernel on CPU tensors."""

import torch
from torch import Tensor

from tensormill.ops.hadamard_transform import _cpu  # type: ignore[attr-defined]

_KERNELS = {
    torch.float32: _cpu.float32,
    torch.float64: _cpu.float64,
    torch.float16: _cpu.float16,
    torch.bfloat16: _cpu.bfloat16,
}


def hadamard_transform(x: Tensor, scale: float) -> Tensor:
    """See `tensormill.ops.hadamard_transform`."""
    source = x.detach().resolve_neg().contiguous()
    result = torch.empty_like(source)
    n = source.shape[-1]
    if source.numel() > 0:
        _KERNELS[x.dtype](
            source.data_ptr(),
            result.data_ptr(),
            source.numel() // n,
            n.bit_length() - 1,
            scale,
            torch.get_num_threads(),
        )
    return result


def instruction_set() -> str:
    """The best instruction set that may be used here: "portable", "avx2", "avx512" or one above it."""
    return str(_cpu.instruction_set())

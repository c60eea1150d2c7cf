"""The C++ kernel on CPU tensors."""

import torch
from torch import Tensor

from tensormill.ops.fft_bit_reversed import _cpu  # type: ignore[attr-defined]

_COMPLEX = {torch.float32: _cpu.float32, torch.float64: _cpu.float64}
_REAL = {torch.float32: _cpu.real_float32, torch.float64: _cpu.real_float64}
_LEAST_REAL = 1 << _cpu.least_real_bits()


def fft_bit_reversed(x: Tensor, inverse: bool, scale: float) -> Tensor:
    """See `tensormill.ops.fft_bit_reversed`; x is (..., n, 1 or 2)."""
    n, parts = x.shape[-2:]
    real = parts == 1 and not inverse and n >= _LEAST_REAL
    if parts == 1 and not real:
        x = torch.nn.functional.pad(x, (0, 1))
    source = x.resolve_neg().contiguous()
    result = source.new_empty(*source.shape[:-1], 2) if real else torch.empty_like(source)
    if result.numel() == 0:
        return result
    count, bits, threads = result.numel() // (2 * n), n.bit_length() - 1, torch.get_num_threads()
    addresses = source.data_ptr(), result.data_ptr()
    if real:
        _REAL[x.dtype](*addresses, count, bits, scale, threads)
    else:
        _COMPLEX[x.dtype](*addresses, count, bits, inverse, scale, threads)
    return result


def instruction_set() -> str:
    """The best instruction set that may be used here: "portable", "avx2", "avx512" or one above it."""
    return str(_cpu.instruction_set())

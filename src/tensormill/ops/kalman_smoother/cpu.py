"""The C++ kernel on CPU tensors."""

import torch
from torch import Tensor

from tensormill.ops.kalman_smoother import _cpu  # type: ignore[attr-defined]

_KERNELS = {torch.float32: _cpu.float32, torch.float64: _cpu.float64}


def kalman_smoother(*arguments: Tensor) -> tuple[Tensor, ...]:
    """See `tensormill.ops.kalman_smoother`."""
    inputs = [a.detach().resolve_neg().contiguous() for a in arguments]
    transition, emission = inputs[0], inputs[2]
    batch, steps, size, _ = transition.shape
    vectors, matrices = (batch, steps, size), (batch, steps, size, size)
    results = tuple(transition.new_empty(shape) for shape in (vectors, matrices) * 3 + ((batch,),))
    _KERNELS[transition.dtype](
        *(t.data_ptr() for t in (*inputs, *results)),
        batch,
        steps,
        size,
        emission.shape[0],
        torch.get_num_threads(),
    )
    return results


def instruction_set() -> str:
    """The best instruction set that may be used here: "portable", "avx2", "avx512" or one above it."""
    return str(_cpu.instruction_set())

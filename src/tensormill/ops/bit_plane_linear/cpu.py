"""The C++ kernels on CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.ops.bit_plane_linear import _cpu  # type: ignore[attr-defined]
from tensormill.ops.bit_planes import affine_product


def bit_plane_linear(
    x: Tensor,
    weight: Tensor,
    x_sums: Tensor,
    weight_sums: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    length: int,
    x_format: str,
    weight_format: str,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `reference.bit_plane_linear`."""
    tensors = [t.contiguous() for t in (x, weight, x_sums, weight_sums)]
    scales = [None if s is None else s.float().contiguous() for s in (x_scale, weight_scale)]
    (q, tokens, words), (p, rows, _) = x.shape, weight.shape
    y = torch.empty(tokens, rows, dtype=torch.int32 if x_scale is None else torch.float32)
    _cpu.product(
        *(t.data_ptr() for t in tensors),
        *(0 if s is None else s.data_ptr() for s in scales),
        y.data_ptr(),
        tokens,
        rows,
        length,
        words,
        words if group_size == -1 else group_size // 32,
        q,
        p,
        *affine_product(x_format, weight_format, q, p),
        torch.get_num_threads(),
    )
    return y if x_scale is None else y.to(dtype)


def instruction_set() -> str:
    """Which instructions the kernels use here: "avx512", "avx2" or "portable"."""
    return str(_cpu.instruction_set())

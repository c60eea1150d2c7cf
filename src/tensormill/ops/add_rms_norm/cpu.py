"""CPU kernel of `add_rms_norm`: one pass over a row, and a second while it is in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.ops.add_rms_norm import _cpu  # type: ignore[attr-defined]

_KERNELS = {torch.float32: _cpu.float32, torch.bfloat16: _cpu.bfloat16}


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.reference`."""
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    y, total = torch.empty_like(x), torch.empty_like(x)
    columns = x.shape[-1]
    if columns:
        _KERNELS[x.dtype](
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            y.data_ptr(),
            total.data_ptr(),
            x.numel() // columns,
            columns,
            eps,
            torch.get_num_threads(),
        )
    return y, total

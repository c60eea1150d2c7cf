"""CPU kernel of `rotate_heads`: one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.ops.rotate_heads import _cpu  # type: ignore[attr-defined]

_KERNELS = {torch.float32: _cpu.float32, torch.bfloat16: _cpu.bfloat16}


def rotate_heads(x: Tensor, cosine: Tensor, sine: Tensor, rotated: int) -> Tensor:
    """See `reference.reference`."""
    x, cosine, sine = x.contiguous(), cosine.contiguous(), sine.contiguous()
    y = torch.empty_like(x)
    if y.numel():
        pointers = (x.data_ptr(), cosine.data_ptr(), sine.data_ptr(), y.data_ptr())
        batch, length, heads, head_dim = x.shape
        _KERNELS[x.dtype](*pointers, batch, length, heads, rotated, head_dim, torch.get_num_threads())
    return y

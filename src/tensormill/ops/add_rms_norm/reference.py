"""The definition of residual sum and RMS norm in plain PyTorch."""

import torch
from torch import Tensor


def reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `tensormill.ops.add_rms_norm`.

    Args:
        x, residual: (..., hidden_size).
        weight: (hidden_size,).
        eps: added to the mean square.

    Returns:
        `(y, h)`, each (..., hidden_size).
    """
    total = x + residual
    wide = total if x.dtype == torch.float64 else total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype), total

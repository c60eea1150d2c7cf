"""The definition of rotary position embedding over stacked heads in plain PyTorch."""

import torch
from torch import Tensor


def reference(x: Tensor, cosine: Tensor, sine: Tensor, rotated: int) -> Tensor:
    """See `tensormill.ops.rotate_heads`.

    Args:
        x: (batch, length, heads, head_dim).
        cosine, sine: (length, head_dim).
        rotated: how many heads are rotated.

    Returns:
        Like x.
    """
    turned, rest = x[:, :, :rotated], x[:, :, rotated:]
    left, right = turned.chunk(2, dim=-1)
    half = torch.cat([-right, left], dim=-1)
    turned = turned * cosine[:, None] + half * sine[:, None]
    return torch.cat([turned, rest], dim=2)

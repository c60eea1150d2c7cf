"""Merging attention over parts of a cache (splits, devices, pages on disk) into attention over all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument


def merge_attention(outputs: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint parts of a cache, from the attention over each.

    `output = sum_i exp(lse_i - lse) output_i` with `lse = log(sum_i exp(lse_i))`. It is associative, so that parts
    may be merged in any order, and a part that nothing is seen of (lse -inf) changes nothing. A sink belongs to one
    part only.

    Args:
        outputs: (parts, ..., value_dim), floating point.
        lse: (parts, ...), natural log-sum-exp as `decode_attention(..., return_lse=True)` gives it.

    Returns:
        (..., value_dim) in the dtype of outputs, and (...) in the dtype of lse. Differentiable.

    Raises:
        InvalidArgument: the shapes do not fit together.

    >>> output, lse = merge_attention(torch.tensor([[1.0], [3.0]]), torch.zeros(2))
    >>> output.item(), round(lse.item(), 4)
    (2.0, 0.6931)
    """
    if outputs.dim() < 1 or outputs.shape[:-1] != lse.shape or lse.dim() < 1 or len(lse) == 0:
        raise InvalidArgument(
            f"given outputs of shape {tuple(outputs.shape)} and lse of shape {tuple(lse.shape)}, expected"
            " (parts, ..., value_dim) and (parts, ...)"
        )
    wide = torch.promote_types(lse.dtype, torch.float32)
    whole = torch.logsumexp(lse.to(wide), dim=0)
    weight = torch.exp(lse.to(wide) - torch.where(whole == -torch.inf, 0.0, whole))
    merged = (outputs.to(wide) * weight[..., None]).sum(0)
    return merged.to(outputs.dtype), whole.to(lse.dtype)

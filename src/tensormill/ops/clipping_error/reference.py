"""The definition of `clipping_error` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.ops.quantization import QuantSpec, ScaleRule, fake_quantize_groups, split_groups


def clipping_error(
    weight: Tensor,
    gram: Tensor,
    ratios: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_rule: ScaleRule,
    include_zero: bool,
    scale_dtype: torch.dtype | None,
) -> Tensor:
    """The output error `d S d^T` of each group, d what quantization changes once the group is clipped.

    What a group reads as is computed in float32, every operation rounded; products and sums in the dtype of `gram`.

    Args:
        weight: (N, K).
        gram: (G, group, group) S of each group.
        ratios: (C,) shares of a group's largest magnitude; what exceeds one is clamped to it.
        bits, group_size, symmetric, scale_rule, include_zero, scale_dtype: `QuantSpec.grid`. The last group may be
            shorter; its rows and columns of `gram` beyond the last are then 0.

    Returns:
        (C, N, G) in the dtype of `gram`.
    """
    spec = QuantSpec(bits, group_size, symmetric, scale_rule, include_zero, scale_dtype)
    groups = split_groups(weight.float(), spec)  # [N, G, group]
    largest = groups.abs().amax(dim=-1, keepdim=True)
    errors = gram.new_empty((len(ratios), *groups.shape[:2]))
    for error, ratio in zip(errors, ratios.float(), strict=True):
        limit = largest * ratio
        rounded = fake_quantize_groups(groups.clamp(-limit, limit), spec)
        d = rounded.sub_(groups).transpose(0, 1).to(gram.dtype)  # [G, N, group]
        error.copy_(torch.bmm(d, gram).mul_(d).sum(dim=-1).T)
    return errors

"""The definition of `quantization_error` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.ops.quantization import (
    QuantSpec,
    ScaleRule,
    fake_quantize_groups,
    join_groups,
    split_groups,
)


def quantization_error(
    weight: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_rule: ScaleRule,
    include_zero: bool,
    scale_dtype: torch.dtype | None,
) -> Tensor:
    """`fake_quantize(weight * s) / s - weight` for each row s of `scales`, in float32, every operation rounded.

    Args:
        weight: (N, K).
        scales: (C, K), positive.
        bits, group_size, symmetric, scale_rule, include_zero, scale_dtype: `QuantSpec.grid`. The last group may be
            shorter.

    Returns:
        (C, N, K) float32.
    """
    spec = QuantSpec(bits, group_size, symmetric, scale_rule, include_zero, scale_dtype)
    original, factors = weight.float(), scales.float().unsqueeze(1)  # [N, K], [C, 1, K]
    rounded = fake_quantize_groups(split_groups(original * factors, spec), spec)
    return join_groups(rounded, weight.shape[1]).div(factors).sub_(original)

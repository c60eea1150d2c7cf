"""Scales in float16, which is what AutoAWQ and GPTQ checkpoints hold.

Writing never rounds a scale: what was measured is what the file says. `round_scales` rounds them in the model,
before it is measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tensormill.compress.formats.checkpoint_format import compressed_linears
from tensormill.errors import ModelError

if TYPE_CHECKING:
    from tensormill.ops.linear_wna16.module import LinearWNA16

#: Largest relative change of a scale by rounding: what bfloat16 would do. Normal numbers change by 2^-11.
TOLERANCE = 2.0**-8


def exact_scales(module: LinearWNA16, name: str, format_name: str) -> Tensor:
    """The scales (N, G) in float16, equal to the module's.

    Groups whose weights are all zero may have any scale: theirs becomes the nearest positive float16.

    Raises:
        ModelError: a scale isn't a float16 number; the layer is named.
    """
    scale = module.weight_scale.detach()
    half = _half(scale)
    wrong = half.double() != scale.double()
    if bool(wrong.any()):
        wrong &= ~_zero_groups(module)
    if bool(wrong.any()):
        raise ModelError(
            f"{name} has scales that float16 doesn't hold exactly, such as {_first(scale, wrong):.6g}, and "
            f"{format_name} checkpoints hold float16; round them with float16_scales.round_scales(model), or "
            "save as compressed-tensors"
        )
    return half


@torch.no_grad()
def round_scales(model: nn.Module) -> None:
    """Rounds the scales of every low-bit linear to float16, in place; codes stay.

    Raises:
        ModelError: a scale would overflow, or change by more than `TOLERANCE`; nothing is changed then.
    """
    rounded = {}
    for name, module in compressed_linears(model).items():
        scale = module.weight_scale.double()
        half = _half(module.weight_scale)
        wrong = ~((half.double() - scale).abs() <= TOLERANCE * scale.abs())
        if bool(wrong.any()):
            wrong &= ~_zero_groups(module)
        if bool(wrong.any()):
            raise ModelError(
                f"{name} has the scale {_first(scale, wrong):.3g}, which float16 can't hold; save it as "
                "compressed-tensors"
            )
        rounded[name] = half
    for name, module in compressed_linears(model).items():
        module.weight_scale = rounded[name]


def _half(scale: Tensor) -> Tensor:
    half = scale.to(torch.float16)
    smallest = torch.tensor(2.0**-24, dtype=torch.float16, device=scale.device)
    # Positive scales stay positive, so that no reader divides by zero.
    return torch.where((half == 0) & (scale > 0), smallest, half)


def _zero_groups(module: LinearWNA16) -> Tensor:
    """(N, G) bool: every code equals the zero point, so that every weight is 0."""
    codes, groups = module.codes(), module.weight_scale.shape[1]
    size = module.in_features if module.group_size == -1 else module.group_size
    missing = groups * size - module.in_features
    if missing > 0:
        codes = torch.cat([codes, codes[:, -1:].expand(-1, missing)], dim=1)
    low, high = torch.aminmax(codes.view(codes.shape[0], groups, -1), dim=-1)
    zero = module.weight_zero_point
    middle = torch.full_like(low, 1 << (module.bits - 1)) if zero is None else zero
    return (low == middle) & (high == middle)


def _first(scale: Tensor, chosen: Tensor) -> float:
    return float(scale[chosen][0])

"""Quantizing rows of floats to bit planes in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.ops.bit_planes import code_sums, group_count, pack_codes

SMALLEST_SCALE = 2.0**-126  # below it a reciprocal could be infinite: the group counts as zero


def quantize_bit_planes(x: Tensor, bits: int, format: str, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Planes, sums and scales of x; see `tensormill.ops.quantize_bit_planes`.

    Computed in float32 whatever x is, and in one order, so that codes are the same on every device.
    """
    rows, length = x.shape
    groups = group_count(length, group_size)
    step = max(1, length if group_size == -1 else group_size)
    values = torch.nn.functional.pad(x.float(), (0, groups * step - length)).view(rows, groups, step)
    magnitude = values if format == "unsigned" else values.abs()
    largest = magnitude.amax(-1).clamp_min(0) if step and length else values.new_zeros(rows, groups)
    if format == "unsigned":
        scale = largest / _number((1 << bits) - 1, largest)
    elif format == "signed":
        scale = largest / _number((1 << (bits - 1)) - 1, largest)
    elif bits == 1:
        count = torch.full((groups,), step, device=x.device)
        count[-1] = length - (groups - 1) * step
        scale = magnitude.sum(-1) / count
    else:
        scale = largest * 2.0**-bits
    scale = torch.where(scale < SMALLEST_SCALE, 0.0, scale)
    inverse = torch.where(scale == 0, 0.0, 1 / scale)[..., None]
    if format == "unsigned":
        codes = (values * inverse).round().clamp(0, (1 << bits) - 1)
    elif format == "signed":
        half = 1 << (bits - 1)
        codes = (values * inverse).round().clamp(-half, half - 1) + half
    elif bits == 1:
        codes = (values >= 0).float()
    else:
        half = 1 << (bits - 1)
        codes = (values * inverse * 0.5).floor().clamp(-half, half - 1) + half
    packed = codes.to(torch.uint8).view(rows, groups * step)[:, :length]
    planes = pack_codes(packed, bits)
    return planes, code_sums(planes, length, group_size), scale


def _number(value: int, like: Tensor) -> Tensor:
    """As a tensor: on GPUs, dividing by a Python number multiplies with its reciprocal, which rounds twice."""
    return like.new_full((), value)

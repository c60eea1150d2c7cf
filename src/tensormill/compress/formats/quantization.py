"""Weight matrices in uniform integer quantization: codes with one scale (and zero point) per row and group of columns.

The grid itself, how scales, zero points and codes follow from weights, is defined in `tensormill.ops.quantization`.

>>> weight = torch.tensor([[0.0, 0.5, 1.0, 1.5]])
>>> quantize_weight(weight, QuantSpec(bits=2, group_size=4)).codes
tensor([[0, 1, 2, 3]], dtype=torch.uint8)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.ops.quantization import (
    QuantSpec,
    ScaleRule,
    Tail,
    fake_quantize_groups,
    group_grid,
    join_groups,
    round_to_codes,
    split_groups,
)

__all__ = [
    "QuantSpec",
    "QuantizedWeight",
    "ScaleRule",
    "Tail",
    "check_weight",
    "fake_quantize",
    "fake_quantize_groups",
    "group_grid",
    "join_groups",
    "quantize_weight",
    "round_to_codes",
    "split_groups",
]


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix: `weight = (codes - zero_point) * scale`.

    Attributes:
        codes: (N, K) uint8, each in [0, 2^bits - 1].
        scale: (N, G) in `spec.scale_dtype`.
        zero_point: (N, G) uint8, or None when `spec.symmetric`.
        spec: how it was made.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantSpec

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights (N, K), computed in float32, in `dtype` (None: the scale's)."""
        groups = split_groups(self.codes.float(), self.spec)
        if self.zero_point is None:
            groups -= 1 << (self.spec.bits - 1)
        else:
            groups -= self.zero_point.float().unsqueeze(-1)
        groups *= self.scale.float().unsqueeze(-1)
        return join_groups(groups, self.codes.shape[-1]).to(dtype or self.scale.dtype)


def quantize_weight(weight: Tensor, spec: QuantSpec, clip: Tensor | None = None) -> QuantizedWeight:
    """Round a weight matrix to nearest (ties to even).

    Args:
        weight: (N, K), any floating-point dtype; computed in float32.
        spec: the quantizer.
        clip: (N, G) largest magnitude kept per group; weights beyond it are clamped first. None clamps
            nothing.

    Raises:
        InvalidArgument: not a float matrix, NaN or infinity, a group size that doesn't divide, or a scale
            that `spec.scale_dtype` can't hold.
    """
    check_weight(weight, spec)
    groups = split_groups(weight.float(), spec)
    if clip is not None:
        if clip.shape != groups.shape[:2]:
            raise InvalidArgument(
                f"given clip of shape {tuple(clip.shape)}, expected {tuple(groups.shape[:2])}"
            )
        limit = clip.float().unsqueeze(-1)
        groups = groups.clamp(-limit, limit)
    spec = spec if spec.scale_dtype is not None else replace(spec, scale_dtype=weight.dtype)
    scale, zero = group_grid(groups, spec)
    if not torch.isfinite(scale).all():
        raise InvalidArgument(
            f"given weights up to {weight.abs().max():.3g}, whose scale overflows {spec.scale_dtype}; "
            "use a scale_dtype with a larger range"
        )
    codes = round_to_codes(groups, scale, zero, spec)
    zero_point = None if spec.symmetric else zero.squeeze(-1).to(torch.uint8)
    return QuantizedWeight(
        codes=join_groups(codes, weight.shape[1]).to(torch.uint8),
        scale=scale.squeeze(-1).to(spec.scale_dtype),
        zero_point=zero_point,
        spec=spec,
    )


def fake_quantize(weight: Tensor, spec: QuantSpec, clip: Tensor | None = None) -> Tensor:
    """What `weight` (N, K) reads as after quantization, in its own dtype.

    >>> fake_quantize(torch.tensor([[0.0, 0.9, 2.2, 3.0]]), QuantSpec(bits=2, group_size=-1))
    tensor([[0., 1., 2., 3.]])
    """
    return quantize_weight(weight, spec, clip).dequantize(weight.dtype)


def check_weight(weight: Tensor, spec: QuantSpec, name: str = "weight") -> None:
    """Raise `InvalidArgument`, with `name`, if `weight` isn't a finite float matrix that `spec` can cut.

    Of a weight on the meta device only shape and dtype are known.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise InvalidArgument(
            f"given {name} of shape {tuple(weight.shape)} and {weight.dtype}, expected a float matrix [N, K]"
        )
    spec.check(weight.shape[1], name)
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise InvalidArgument(
            f"given NaN or infinity in {name}, expected finite weights; check the checkpoint"
        )

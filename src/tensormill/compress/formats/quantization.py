"""Uniform integer quantization of weight matrices, with one scale (and zero point) per row and group of
columns.

A weight `w` of a group becomes the code `q = clamp(round(w / s) + z, 0, 2^bits - 1)` and is read back as
`(q - z) * s`. Symmetric quantizers have the fixed zero point `2^(bits-1)`, asymmetric ones an integer of
their own per group. The projects of the field differ in how `s` is computed; `QuantSpec` states every choice.

>>> weight = torch.tensor([[0.0, 0.5, 1.0, 1.5]])
>>> quantize_weight(weight, QuantSpec(bits=2, group_size=4)).codes
tensor([[0, 1, 2, 3]], dtype=torch.uint8)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument

ScaleRule = Literal["absmax/half_range", "absmax/qmax"]
Tail = Literal["error", "smaller"]

_SCALE_RULES = ("absmax/half_range", "absmax/qmax")
_TAILS = ("error", "smaller")


@dataclass(frozen=True)
class QuantSpec:
    """How a weight matrix [N, K] is quantized.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: columns that share a scale, or -1 for a whole row.
        symmetric: fixed zero point `2^(bits-1)` instead of one per group.
        scale_rule: symmetric scale. "absmax/half_range" divides the largest magnitude by `(2^bits - 1) / 2`
            and uses the whole range of codes (compressed-tensors); "absmax/qmax" divides by `2^(bits-1) - 1`,
            so that the largest weight is exact and the lowest code unused (AutoAWQ, FlexQ).
        include_zero: widen an asymmetric group's range to contain 0. Without it a group of one sign saturates
            at its far end, because the zero point is itself a code (llm-awq does that).
        scale_dtype: dtype in which scales are stored; None takes the weight's. Codes are computed with the
            rounded scale.
        tail: what happens when `group_size` doesn't divide K: "error", or "smaller" for a shorter last group.

    Raises:
        InvalidArgument: a field is outside its range.
    """

    bits: int
    group_size: int = 128
    symmetric: bool = False
    scale_rule: ScaleRule = "absmax/half_range"
    include_zero: bool = True
    scale_dtype: torch.dtype | None = None
    tail: Tail = "error"

    def __post_init__(self) -> None:
        if not (isinstance(self.bits, int) and 2 <= self.bits <= 8):
            raise InvalidArgument(f"given bits={self.bits!r}, expected an integer from 2 to 8")
        if not isinstance(self.group_size, int) or (self.group_size != -1 and self.group_size < 1):
            raise InvalidArgument(
                f"given group_size={self.group_size!r}, expected a positive integer, or -1 for whole rows"
            )
        if self.scale_rule not in _SCALE_RULES:
            raise InvalidArgument(
                f"given scale_rule={self.scale_rule!r}, expected one of {list(_SCALE_RULES)}"
            )
        if self.tail not in _TAILS:
            raise InvalidArgument(f"given tail={self.tail!r}, expected one of {list(_TAILS)}")
        if self.scale_dtype is not None and not self.scale_dtype.is_floating_point:
            raise InvalidArgument(
                f"given scale_dtype={self.scale_dtype}, expected a floating-point dtype or None"
            )

    @property
    def max_code(self) -> int:
        """Largest code, `2^bits - 1`."""
        return (1 << self.bits) - 1

    def columns_per_group(self, in_features: int) -> int:
        """Columns of a full group in a row of `in_features`."""
        return in_features if self.group_size == -1 else min(self.group_size, in_features)

    def num_groups(self, in_features: int) -> int:
        """Groups of a row of `in_features`, a shorter last one included."""
        return -(-in_features // self.columns_per_group(in_features))

    def check(self, in_features: int, name: str = "weight") -> None:
        """Raise `InvalidArgument`, listing the sizes that work, if `in_features` can't be cut in groups."""
        if self.tail == "smaller" or self.group_size == -1 or in_features % self.group_size == 0:
            return
        valid = [size for size in range(16, in_features) if in_features % size == 0]
        raise InvalidArgument(
            f"given group_size={self.group_size} for {name} with {in_features} input features, "
            f"expected a divisor: use one of {[*valid, -1]}, or tail='smaller' for a shorter last group"
        )

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight of a row: codes, scales (16 bits if not said), zero points."""
        scale_bits = 16 if self.scale_dtype is None else self.scale_dtype.itemsize * 8
        per_group = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + per_group * self.num_groups(in_features) / in_features


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


def group_grid(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group.

    Args:
        groups: (..., group) float32, weights of one group along the last dimension.
        spec: the quantizer; scales are rounded to its `scale_dtype` (None: kept in float32).

    Returns:
        scale and zero point, (..., 1) float32 each; the zero point holds integers.
    """
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    if spec.symmetric:
        largest = torch.maximum(-low, high)
        levels = spec.max_code / 2 if spec.scale_rule == "absmax/half_range" else spec.max_code // 2
        scale = largest / levels
    else:
        if spec.include_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / spec.max_code
    dtype = spec.scale_dtype or torch.float32
    # Rounded before any code is computed: whoever reads the checkpoint has only the rounded scale.
    smallest = max(torch.finfo(dtype).tiny * torch.finfo(dtype).eps, torch.finfo(torch.float32).tiny)
    scale = scale.to(dtype).float().clamp_(min=smallest)
    if spec.symmetric:
        return scale, torch.full_like(scale, 1 << (spec.bits - 1))
    return scale, (-low / scale).round_().clamp_(0, spec.max_code)


def round_to_codes(groups: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """Codes, as float32, of `groups` (..., group) on the grid of `scale` and `zero` (..., 1)."""
    return (groups / scale).round_().add_(zero).clamp_(0, spec.max_code)


def fake_quantize_groups(groups: Tensor, spec: QuantSpec) -> Tensor:
    """`fake_quantize` without checks on float32 `groups` (..., group): the inner loop of every search."""
    scale, zero = group_grid(groups, spec)
    return round_to_codes(groups, scale, zero, spec).sub_(zero).mul_(scale)


def split_groups(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Cut rows (..., K) in groups (..., G, group); a short last group is filled with copies of the last
    column.

    Copies, not zeros, since they change neither minimum nor maximum of the group they fill.
    """
    columns = weight.shape[-1]
    size, groups = spec.columns_per_group(columns), spec.num_groups(columns)
    missing = groups * size - columns
    if missing:
        weight = torch.cat([weight, weight[..., -1:].expand(*weight.shape[:-1], missing)], dim=-1)
    return weight.reshape(*weight.shape[:-1], groups, size)


def join_groups(groups: Tensor, columns: int) -> Tensor:
    """The rows (..., columns) that `split_groups` cut in (..., G, group)."""
    return groups.flatten(-2)[..., :columns]

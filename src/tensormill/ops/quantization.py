"""The grid of uniform integer quantization: the definition that operators, methods and formats share.

A weight `w` of a group becomes the code `q = clamp(round(w / s) + z, 0, 2^bits - 1)` and is read back as
`(q - z) * s`. Symmetric quantizers have the fixed zero point `2^(bits-1)`, asymmetric ones an integer of
their own per group. The projects of the field differ in how `s` is computed; `QuantSpec` states every choice.

Everything is float32 and every operation rounded on its own, so that all devices and kernels find the same codes.

>>> spec = QuantSpec(bits=2, group_size=4)
>>> fake_quantize_groups(torch.tensor([[0.0, 0.9, 2.2, 3.0]]), spec)
tensor([[0., 1., 2., 3.]])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument

ScaleRule = Literal["absmax/half_range", "absmax/qmax"]
Tail = Literal["error", "smaller"]
Grid = tuple[int, int, bool, ScaleRule, bool, torch.dtype | None]
"""The fields of a `QuantSpec` that determine codes and scales, in the order in which operators take them."""

GRID_SCHEMA = (
    "int bits, int group_size, bool symmetric, str scale_rule, bool include_zero, ScalarType? scale_dtype"
)

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

    @property
    def levels(self) -> float:
        """What a group's range (symmetric: its largest magnitude) is divided by to give the scale."""
        if not self.symmetric:
            return float(self.max_code)
        return self.max_code / 2 if self.scale_rule == "absmax/half_range" else float(self.max_code // 2)

    @property
    def smallest_scale(self) -> float:
        """The smallest positive number of `scale_dtype` that is a normal float32."""
        kind = torch.finfo(self.scale_dtype or torch.float32)
        return max(kind.tiny * kind.eps, torch.finfo(torch.float32).tiny)

    @property
    def grid(self) -> Grid:
        """The fields that determine codes and scales: `QuantSpec(*spec.grid, tail=...)` has the same ones."""
        rule = self.scale_rule
        return self.bits, self.group_size, self.symmetric, rule, self.include_zero, self.scale_dtype

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
        spread = torch.maximum(-low, high)
    else:
        if spec.include_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        spread = high - low
    # By a tensor: a GPU multiplies with the inverse of a number, which rounds twice.
    scale = spread / spread.new_full((), spec.levels)
    # Rounded before any code is computed: whoever reads the checkpoint has only the rounded scale.
    scale = scale.to(spec.scale_dtype or torch.float32).float().clamp_(min=spec.smallest_scale)
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

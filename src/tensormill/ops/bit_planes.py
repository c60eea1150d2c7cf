"""Integers of 1 to 8 bits as packed bit planes: plane j holds bit j of every code.

A row of K integers is stored as `bits` rows of bits. Bit k of a plane is bit `k % 32` of word `k // 32`; rows are
padded with zero bits to whole 128-bit pieces, so that each starts on 16 bytes. A plane holds bits of the *unsigned*
code u in [0, 2 ** bits); a format says which integer u stands for, always `step * u + offset`:

| format | integer | range at b bits |
|---|---|---|
| "unsigned" | u | 0 ... 2^b - 1 |
| "signed" | u - 2^(b-1): two's complement with its top bit flipped | -2^(b-1) ... 2^(b-1) - 1 |
| "bipolar" | 2 u - (2^b - 1): every bit counts +1 or -1 (arXiv 2409.17870) | odd numbers from -(2^b - 1) to 2^b - 1 |

So products of all formats come from `sum_k u_x[k] u_w[k]`, the sums of the codes, and constants. Bipolar has no zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument

Format = Literal["unsigned", "signed", "bipolar"]
FORMATS: tuple[str, ...] = get_args(Format)
ROW_BITS = 128  # rows are padded to a multiple of this; group sizes are multiples of it


@dataclass(frozen=True)
class BitPlanes:
    """A matrix of R rows of K small integers, as bit planes; made by `pack_planes` or `quantize_bit_planes`.

    Attributes:
        planes: (bits, R, W) int32, W = 4 * ceil(K / 128); bits beyond K are zero.
        sums: (R, G) int32, sums of the unsigned codes in each group, G = ceil(K / group_size).
        scale: (R, G) float, what one unit of the integers is worth in each group; None for plain integers.
        length: K.
        format: "unsigned", "signed" or "bipolar".
        group_size: columns of a group, a multiple of 128; -1 for the whole row.
    """

    planes: Tensor
    sums: Tensor
    scale: Tensor | None
    length: int
    format: Format
    group_size: int = -1

    @property
    def bits(self) -> int:
        return self.planes.shape[0]

    @property
    def rows(self) -> int:
        return self.planes.shape[1]

    def integers(self) -> Tensor:
        """(R, K) int32, the integers themselves."""
        step, offset = step_and_offset(self.format, self.bits)
        return step * unpack_codes(self.planes, self.length).int() + offset

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(R, K), integers times scales.

        Raises:
            InvalidArgument: there are no scales.
        """
        if self.scale is None:
            raise InvalidArgument("given planes without scales, expected scaled ones; use integers()")
        scale = expand_groups(self.scale.float(), self.length, self.group_size)
        return (self.integers() * scale).to(dtype)

    def to(self, device: torch.device | str) -> BitPlanes:
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, planes=self.planes.to(device), sums=self.sums.to(device), scale=scale)

    def regrouped(self, group_size: int) -> BitPlanes:
        """The same matrix in groups that divide the present ones: scales are repeated, sums counted anew.

        Raises:
            InvalidArgument: groups of `group_size` do not lie within the present ones.
        """
        if group_size == self.group_size:
            return self
        if group_size == -1 or (self.group_size != -1 and self.group_size % group_size):
            raise InvalidArgument(
                f"given group_size={group_size}, expected one that divides {self.group_size}; pack the codes again"
            )
        sums = code_sums(self.planes, self.length, group_size)
        scale = self.scale
        if scale is not None:
            group = torch.arange(sums.shape[1], device=scale.device) * group_size
            scale = scale[:, group // (self.group_size if self.group_size != -1 else self.length)]
        return replace(self, sums=sums, scale=scale, group_size=group_size)


def step_and_offset(format: str, bits: int) -> tuple[int, int]:
    """(step, offset) with integer = step * u + offset.

    >>> step_and_offset("bipolar", 2), step_and_offset("signed", 2)
    ((2, -3), (1, -2))
    """
    if format == "unsigned":
        return 1, 0
    if format == "signed":
        return 1, -(1 << (bits - 1))
    return 2, 1 - (1 << bits)


def affine_product(x_format: str, weight_format: str, q: int, p: int) -> tuple[int, int, int, int]:
    """(alpha, beta_x, beta_w, gamma) of `x.w = alpha u_x.u_w + beta_x sum(u_x) + beta_w sum(u_w) + gamma K`."""
    (x_step, x_offset), (w_step, w_offset) = step_and_offset(x_format, q), step_and_offset(weight_format, p)
    return x_step * w_step, x_step * w_offset, w_step * x_offset, x_offset * w_offset


def integer_range(format: str, bits: int) -> tuple[int, int]:
    """Least and largest integer of a format."""
    step, offset = step_and_offset(format, bits)
    return offset, step * ((1 << bits) - 1) + offset


def words_of_row(length: int) -> int:
    """int32 words of a row of `length` bits."""
    return ROW_BITS // 32 * -(-length // ROW_BITS)


def group_count(length: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-length // group_size)


def expand_groups(values: Tensor, length: int, group_size: int) -> Tensor:
    """(R, G) to (R, length): each column gets its group's value."""
    if group_size == -1:
        return values.expand(-1, length)
    return values.repeat_interleave(group_size, dim=1)[:, :length]


def check_format(format: str, bits: int) -> None:
    """Raises InvalidArgument unless format and bits are ones that planes can have."""
    if format not in FORMATS:
        raise InvalidArgument(f"given format={format!r}, expected one of {', '.join(FORMATS)}")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise InvalidArgument(f"given bits={bits!r}, expected an integer from 1 to 8")


def check_group_size(group_size: int) -> None:
    """Raises InvalidArgument unless it is -1 or a positive multiple of 128."""
    if group_size != -1 and (group_size < ROW_BITS or group_size % ROW_BITS):
        raise InvalidArgument(
            f"given group_size={group_size}, expected a multiple of {ROW_BITS}, or -1 for whole rows"
        )


def pack_planes(
    integers: Tensor,
    bits: int,
    format: Format = "signed",
    *,
    scale: Tensor | None = None,
    group_size: int = -1,
) -> BitPlanes:
    """Packs a matrix of small integers into bit planes; `BitPlanes.integers` is the inverse.

    Args:
        integers: (R, K), any integer dtype.
        bits: width of an integer, 1 to 8.
        format: which integers the codes stand for; see the module.
        scale: (R, G) float, or (R,) for whole rows; None for plain integers.
        group_size: columns that share a scale, a multiple of 128, or -1 for the whole row.

    Raises:
        InvalidArgument: wrong dtype or shape, or an integer that the format does not have.

    >>> packed = pack_planes(torch.tensor([[-3, 1, 3]]), 2, "bipolar")
    >>> packed.planes[..., 0].tolist(), packed.integers().tolist()
    ([[4], [6]], [[-3, 1, 3]])
    """
    check_format(format, bits)
    check_group_size(group_size)
    if integers.dim() != 2 or integers.is_floating_point() or integers.is_complex():
        raise InvalidArgument(
            f"given integers of {integers.dtype} and shape {tuple(integers.shape)}, expected an integer matrix (R, K)"
        )
    step, offset = step_and_offset(format, bits)
    codes = (integers.int() - offset) // step
    if integers.numel() and not integers.is_meta:
        low, high = integer_range(format, bits)
        if bool(((integers < low) | (integers > high)).any()):
            raise InvalidArgument(
                f"given integers from {int(integers.min())} to {int(integers.max())}, expected {low} to {high} "
                f"for {bits} bits, {format}"
            )
        if step == 2 and bool((codes * step + offset != integers).any()):
            raise InvalidArgument("given even integers, expected odd ones: bipolar codes have no others")
    rows, length = integers.shape
    groups = group_count(length, group_size)
    if scale is not None:
        scale = scale[:, None] if scale.dim() == 1 else scale
        if tuple(scale.shape) != (rows, groups) or not scale.is_floating_point():
            raise InvalidArgument(
                f"given scale of {scale.dtype} and shape {tuple(scale.shape)}, expected floats ({rows}, {groups})"
            )
    planes = pack_codes(codes.to(torch.uint8), bits)
    return BitPlanes(planes, code_sums(planes, length, group_size), scale, length, format, group_size)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(R, K) uint8 below 2 ** bits to (bits, R, W) int32 planes."""
    rows, length = codes.shape
    words = words_of_row(length)
    octets = torch.nn.functional.pad(codes, (0, 32 * words - length)).view(rows, 4 * words, 8)
    planes = torch.empty((bits, rows, 4 * words), dtype=torch.uint8, device=codes.device)
    for j in range(bits):
        byte = torch.zeros_like(planes[j])
        for place in range(8):
            byte |= ((octets[..., place] >> j) & 1) << place
        planes[j] = byte
    return planes.view(torch.int32)


def unpack_codes(planes: Tensor, length: int) -> Tensor:
    """(bits, R, W) int32 planes to (R, length) uint8 codes."""
    bits, rows, words = planes.shape
    octets = planes.contiguous().view(torch.uint8)
    codes = torch.zeros((rows, 4 * words, 8), dtype=torch.uint8, device=planes.device)
    for j in range(bits):
        for place in range(8):
            codes[..., place] |= ((octets[j] >> place) & 1) << j
    return codes.view(rows, 32 * words)[:, :length].contiguous()


def code_sums(planes: Tensor, length: int, group_size: int) -> Tensor:
    """(R, G) int32: sums of the unsigned codes in each group, from counts of bits."""
    bits, rows, words = planes.shape
    groups = group_count(length, group_size)
    per_group = words if group_size == -1 else group_size // 32
    total = torch.zeros((rows, groups * per_group), dtype=torch.int32, device=planes.device)
    for j in range(bits):
        total[:, :words] += popcount(planes[j]) << j
    return total.view(rows, groups, per_group).sum(-1, dtype=torch.int32)


def popcount(words: Tensor) -> Tensor:
    """Number of set bits of each int32, as int32."""
    pairs = words - ((words >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    return (octets & 0xFF) + ((octets >> 8) & 0xFF) + ((octets >> 16) & 0xFF) + (octets >> 24)

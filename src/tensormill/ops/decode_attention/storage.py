"""How keys and values are stored: 16-bit floats, integers with scales, or block floating point.

An integer format stores an element x of a group of `group_size` channels of one token and head as

    x = code * scale + offset,    -2^(bits-1) <= code < 2^(bits-1),

where a symmetric format has no offset. Block floating point is the same with a power of two for the scale, of
which only the 8-bit exponent is stored: `scale = 2^(exponent - 127 - (bits - 2))`, where `exponent` is the
exponent field of the largest magnitude in the block read as float32, and codes are clamped to
+-(2^(bits-1) - 1) (arXiv 2403.20137; "BFP12" is 4 bits, "BFP16" is 8). Codes of 8 bits are int8. Codes of 4 bits
are stored as code + 8, two in a uint8: the low nibbles are the first half of the head's channels, the high ones
the second half, so that whole registers unpack with one mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument


@dataclass(frozen=True)
class KVFormat:
    """A quantized format of keys or values.

    Attributes:
        bits: of a code, 4 or 8.
        group_size: channels of a token and head that share a scale; -1 for all of them.
        symmetric: no offset; always so with `exponents`.
        exponents: block floating point: scales are powers of two, stored as 8-bit exponents.
    """

    bits: int
    group_size: int = -1
    symmetric: bool = False
    exponents: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise InvalidArgument(
                f"given bits={self.bits!r}, expected 4 or 8; leave the format out for floats"
            )
        if self.group_size != -1 and self.group_size < 1:
            raise InvalidArgument(f"given group_size={self.group_size}, expected a positive number or -1")
        if self.exponents and not self.symmetric:
            raise InvalidArgument("block floating point has no offset: exponents=True needs symmetric=True")

    def groups(self, head_dim: int) -> int:
        """Number of scales of a token and head.

        Raises:
            InvalidArgument: the group size does not divide the head, or half of it in a format of 4 bits.
        """
        size = head_dim if self.group_size == -1 else self.group_size
        if self.bits == 4 and head_dim % 2:
            raise InvalidArgument(f"given head_dim={head_dim}, expected an even one for codes of 4 bits")
        whole = head_dim // 2 if self.bits == 4 and size != head_dim else head_dim
        if whole % size:
            what = "half of the head's" if whole != head_dim else "the head's"
            raise InvalidArgument(
                f"given group_size={size}, expected a divisor of {what} {whole} channels, or -1"
            )
        return head_dim // size


INT8 = KVFormat(8)
INT4 = KVFormat(4)
BFP12 = KVFormat(4, 32, symmetric=True, exponents=True)
BFP16 = KVFormat(8, 32, symmetric=True, exponents=True)


def quantize_kv(
    x: Tensor, storage: KVFormat, scale_dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize keys or values.

    Scales are rounded to `scale_dtype` before codes are computed with them, rounding is to nearest, ties to even.
    An asymmetric group spans its minimum to its maximum. Infinite and NaN elements are not representable and give
    arbitrary codes.

    Args:
        x: (..., head_dim), floating point.
        storage: the format.
        scale_dtype: of scales and offsets; block floating point has uint8 exponents instead.

    Returns:
        codes: (..., head_dim) int8, or (..., head_dim / 2) uint8 for 4 bits.
        scale: (..., groups).
        offset: (..., groups), or None if the format is symmetric.

    Raises:
        InvalidArgument: x is not floating point, or the group size does not fit its last dimension.

    >>> codes, scale, offset = quantize_kv(torch.tensor([[-1.0, 0.0, 0.5, 1.0]]), KVFormat(8, symmetric=True))
    >>> codes.tolist(), scale.shape, offset
    ([[-127, 0, 64, 127]], torch.Size([1, 1]), None)
    """
    if not x.is_floating_point() or x.dim() == 0:
        raise InvalidArgument(
            f"given x of {x.dtype} and shape {tuple(x.shape)}, expected floats (..., head_dim)"
        )
    groups = storage.groups(x.shape[-1])
    wide = x.to(torch.float32).unflatten(-1, (groups, -1))
    top = 2 ** (storage.bits - 1) - 1
    offset = None
    if storage.exponents:
        largest = wide.abs().amax(-1)
        scale = (largest.view(torch.int32) >> 23).to(torch.uint8)
        # a block of subnormal numbers has the exponent 0 and is stored as zeros
        step = torch.where(scale == 0, torch.inf, bfp_scale(scale, storage.bits, torch.float32))
        codes = (wide / step[..., None]).round().clamp(-top, top)
    else:
        if storage.symmetric:
            scale, low, middle = wide.abs().amax(-1) / top, -top, torch.zeros((), device=x.device)
        else:
            least, most = wide.amin(-1), wide.amax(-1)
            # halves first: the difference of two large numbers may overflow
            scale, low = (most / 2 - least / 2) / (top + 0.5), -top - 1
            middle = least / 2 + most / 2 + scale / 2
            offset = middle.to(scale_dtype)
            middle = offset.float()
        scale = scale.to(scale_dtype)
        step = torch.where(scale == 0, torch.inf, scale.float())
        centered = wide - middle[..., None] if offset is not None else wide
        codes = (centered / step[..., None]).round().clamp(low, top)
    codes = codes.flatten(-2).to(torch.int8)
    return (pack_nibbles(codes) if storage.bits == 4 else codes), scale, offset


def dequantize_kv(codes: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Inverse of `quantize_kv`, up to rounding: (..., head_dim) in `dtype`; the format follows from the dtypes.

    Args:
        codes: (..., head_dim) int8, or (..., head_dim / 2) uint8.
        scale: (..., groups) floating point, or uint8 exponents.
        offset: (..., groups) floating point, or None.
        dtype: in which to compute.
    """
    bits = bits_of(codes)
    values = (unpack_nibbles(codes) if bits == 4 else codes).to(dtype)
    step = bfp_scale(scale, bits, dtype) if scale.dtype == torch.uint8 else scale.to(dtype)
    grouped = values.unflatten(-1, (scale.shape[-1], -1)) * step[..., None]
    if offset is not None:
        grouped = grouped + offset.to(dtype)[..., None]
    return grouped.flatten(-2)


def bits_of(codes: Tensor) -> int:
    """Bits of a stored element, from its dtype."""
    return {torch.uint8: 4, torch.int8: 8}.get(codes.dtype, codes.dtype.itemsize * 8)


def bfp_scale(exponent: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """`2^(exponent - 127 - (bits - 2))`, and 0 for the exponent 0."""
    power = torch.exp2(exponent.to(dtype) - (127 + bits - 2))
    return torch.where(exponent == 0, 0.0, power)


def pack_nibbles(codes: Tensor) -> Tensor:
    """(..., n) int8 codes from -8 to 7 -> (..., n / 2) uint8."""
    low, high = (codes + 8).to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`."""
    return torch.cat([packed & 15, packed >> 4], dim=-1).to(torch.int8) - 8

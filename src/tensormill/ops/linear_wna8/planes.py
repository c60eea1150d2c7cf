"""The layout "planes" of packed weights, in which four bytes of a word are codes of four neighbouring columns.

A code of b bits is split from the top into fields of 4, 2 and 1 bits (6 = 4 + 2; 8 bits are one field). Its top bit
is inverted first, which makes it the two's complement of `code - 2 ** (b - 1)`; or, "with a sign", it becomes a sign
and the lower bits of `|code - 2 ** (b - 1) + 1/2|`. K is cut into *parts* of `width`
columns. Byte i of a plane's sub-block holds the fields of column i of 8 / field neighbouring parts, the first part
lowest. So a part's codes, four at a time and at the top of four bytes, are a shift and a mask per plane, and a part
is multiplied with a plain slice of the activations:

    4 bits:  byte i = part 1, column i | part 0, column i
    6 bits:  two sub-blocks (parts 0, 1 and 2, 3) of upper fields, one of the lower fields of parts 3, 2, 1, 0

Parts that share bytes are a *block*; rows are taken 64 at a time. A tile of 64 rows and a block is contiguous,
its planes and their sub-blocks one after the other, each (64, width) bytes; tiles of the same rows follow along K.
Rows and columns are filled up with zero bytes, whose scales and activations are not there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.ops.bit_packing import pack_bits, unpack_bits
from tensormill.ops.tiles import untile_weight

ROWS = 64


def fields(bits: int) -> tuple[int, ...]:
    """Widths of a code's fields, from the top.

    >>> fields(7), fields(8)
    ((4, 2, 1), (8,))
    """
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def parts(bits: int) -> int:
    """Parts in a block."""
    return 8 // fields(bits)[-1]


def tile_bytes(bits: int, width: int) -> int:
    return ROWS * width * parts(bits) * bits // 8


def to_planes(weight: Tensor, bits: int, in_features: int, width: int, sign: bool = False) -> Tensor:
    """Packed rows (N, ceil(K * bits / 32)) int32 as (ceil(N / 64), blocks, tile_bytes) int8."""
    rows, count = weight.shape[0], parts(bits)
    tiles, blocks = -(-rows // ROWS), -(-in_features // (count * width))
    planes = torch.empty((tiles, blocks, tile_bytes(bits, width)), dtype=torch.uint8, device=weight.device)
    for tile in range(0, tiles, 64):  # bounds the temporaries
        some = weight[tile * ROWS : (tile + 64) * ROWS]
        codes = _recoded(unpack_bits(some, bits, in_features), bits, sign)
        missing = (-some.shape[0]) % ROWS
        codes = torch.nn.functional.pad(codes, (0, blocks * count * width - in_features, 0, missing))
        cut = codes.view(-1, ROWS, blocks, count, width)
        done, below = [], bits
        for field in fields(bits):
            below -= field
            value = (cut >> below) & ((1 << field) - 1)
            value = value.unflatten(
                3, (-1, 8 // field)
            )  # [tiles, ROWS, blocks, sub-blocks, parts of a byte, width]
            shift = torch.arange(0, 8, field, dtype=torch.uint8, device=weight.device)[:, None]
            # the sum of disjoint bits
            byte = (value << shift).sum(-2, dtype=torch.uint8)
            done.append(byte.permute(0, 2, 3, 1, 4).flatten(2))
        planes[tile : tile + 64] = torch.cat(done, dim=2)
    return planes.view(torch.int8)


def from_planes(
    planes: Tensor, bits: int, rows: int, in_features: int, width: int, sign: bool = False
) -> Tensor:
    """The inverse of `to_planes`."""
    tiles, blocks, _ = planes.shape
    codes = torch.zeros((tiles, ROWS, blocks, parts(bits), width), dtype=torch.uint8, device=planes.device)
    begin, below = 0, bits
    for field in fields(bits):
        below -= field
        size = ROWS * width * parts(bits) * field // 8
        byte = planes[:, :, begin : begin + size].view(torch.uint8)
        byte = byte.unflatten(2, (-1, ROWS, 1, width)).permute(0, 3, 1, 2, 4, 5)
        shift = torch.arange(0, 8, field, dtype=torch.uint8, device=planes.device)[:, None]
        codes |= ((byte >> shift) & ((1 << field) - 1)).flatten(3, 4) << below
        begin += size
    flat = codes.view(tiles * ROWS, -1)[:rows, :in_features]
    top = 1 << (bits - 1)
    negative = flat >= top if sign else torch.zeros_like(flat, dtype=torch.bool)
    return pack_bits(torch.where(negative, flat ^ (2 * top - 1), flat ^ top), bits)


def to_packed(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    rows: int,
    in_features: int,
    bits: int,
    group_size: int,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight, scales and zero points in canonical rows from any layout of `linear_wna8`.

    `layout` is "packed"; "planes<w>" or "signed_planes<w>", with parts of w columns and scales and zero points (G, N);
    or "tiled", of kind "i8" (`ops/tiles.py`).
    """
    if layout == "packed":
        return weight, scale, zero_point
    if layout == "tiled":
        return untile_weight(
            weight,
            scale,
            zero_point,
            in_features=in_features,
            bits=bits,
            group_size=group_size,
            kind="i8",
        )
    sign, width = layout.startswith("signed"), int(layout.rpartition("planes")[2])
    packed = from_planes(weight, bits, rows, in_features, width, sign)
    return packed, scale.T.contiguous(), None if zero_point is None else zero_point.T.contiguous()


def _recoded(codes: Tensor, bits: int, sign: bool) -> Tensor:
    top = 1 << (bits - 1)
    if not sign:
        return codes ^ top
    return torch.where(codes < top, codes ^ (2 * top - 1), codes ^ top)

"""The layout "tiled" of a packed weight: codes lie as the tensor cores' fragments want them.

A weight (N, K) is padded to multiples of 64 rows and 128 columns and cut into tiles of 16 rows x 64 columns. Blocks of
64 rows follow one another; within a block, 64 columns follow 64 columns; within those, four tiles of 16 rows. So
64 rows x 64 columns, and any number of columns after them, are contiguous. A tile is 32 lanes x `bits` words.

Lane 4 g + t holds 32 codes of rows g and g + 8:

- kind "f16", for 16-bit activations, the A fragments of four m16n8k16 products: 16 registers (step s, register
  r = 0..3) of two codes h: row g + 8 (r & 1), column 16 s + 8 (r >> 1) + 2 t + h.
- kind "i8", for 8-bit activations, those of two m16n8k32 products: 8 registers of four codes b: row g + 8 (r & 1),
  column 32 s + 16 (r >> 1) + 4 t + b.

Register i = 4 s + r with its codes in lanes of L bits (16 or 8) becomes a *field*: its codes stand at bit p + L h of a
word. The L // bits fields that fit a word whole fill words 0 to bits - 1, one word after another. The L % bits bits
that each word has to spare form, in order, as many codes again: the fields that are left. Nothing is wasted, and most
codes need one logical operation (`linear_wna16/dequantize.cuh`).

In memory a tile has the lanes' words in loads as wide as can be: words 0..3 of lane 0, those of lane 1, ..., then
words 4..7; a remainder as two words a lane, then one.

Scales and zero points: block of 64 rows, then group, then 64 values, of which 8 g + 2 i + h is that of row
16 i + 8 h + g, so that a lane finds its rows side by side. Groups of 32 and 64 are padded to whole 128 columns.

Tensors keep the canonical number of rows N as their first dimension, so that shapes say what is in them; where N or K
are no multiples, a row is longer and the end of the tensor unused.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.ops.bit_packing import pack_bits, unpack_bits

Kind = Literal["f16", "i8"]

ROWS, COLUMNS = 64, 128  # what a weight is padded to
_LANE_BITS = {"f16": 16, "i8": 8}
# Codes handled at a time: bounds the temporaries.
_CHUNK_CODES = 1 << 24


def can_tile(in_features: int, group_size: int) -> bool:
    """Whether weights with this group size have a tiled form: groups of 32, 64, multiples of 128, or whole rows."""
    return in_features > 0 and (
        group_size in (-1, 32, 64) or group_size % COLUMNS == 0 or group_size >= in_features
    )


def tiled_groups(in_features: int, group_size: int) -> int:
    """Groups of a row in the tiled form."""
    if group_size == -1 or group_size >= in_features:
        return 1
    padded = -(-in_features // COLUMNS) * COLUMNS
    return -(-padded // group_size)


def tiled_shape(rows: int, in_features: int, bits: int) -> tuple[int, int]:
    """Shape of the tiled weight of (rows, in_features) codes."""
    blocks = -(-rows // ROWS)
    words = blocks * ROWS * (-(-in_features // COLUMNS) * COLUMNS) * bits // 32
    return rows, -(-words // max(rows, 1))


def tiled_group_shape(rows: int, in_features: int, group_size: int) -> tuple[int, int]:
    """Shape of tiled scales and zero points."""
    values = -(-rows // ROWS) * ROWS * tiled_groups(in_features, group_size)
    return rows, -(-values // max(rows, 1))


def tile_weight(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    in_features: int,
    bits: int,
    group_size: int,
    kind: Kind = "f16",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tiled form of a packed weight (N, ceil(K * bits / 32)) with scales and zero points (N, G).

    Raises:
        InvalidArgument: the group size has no tiled form.
    """
    _check_group_size(in_features, group_size)
    rows = weight.shape[0]
    tiled = torch.zeros(tiled_shape(rows, in_features, bits), dtype=torch.int32, device=weight.device)
    blocks = tiled.view(-1)[: _block_words(in_features, bits) * -(-rows // ROWS)].view(
        -1, _block_words(in_features, bits)
    )
    for first, last in _chunks(rows, in_features):
        codes = unpack_bits(weight[first:last], bits, in_features)
        blocks[first // ROWS : -(-last // ROWS)] = _tile_codes(codes, bits, kind)
    groups = tiled_groups(in_features, group_size)
    zero = None if zero_point is None else _tile_groups(zero_point, groups)
    return tiled, _tile_groups(scale, groups), zero


def untile_weight(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    in_features: int,
    bits: int,
    group_size: int,
    kind: Kind = "f16",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The packed form of a tiled weight: the inverse of `tile_weight`."""
    _check_group_size(in_features, group_size)
    rows = weight.shape[0]
    words = _block_words(in_features, bits)
    blocks = weight.reshape(-1)[: words * -(-rows // ROWS)].view(-1, words)
    packed = [
        pack_bits(
            _untile_codes(blocks[first // ROWS : -(-last // ROWS)], bits, kind)[: last - first, :in_features],
            bits,
        )
        for first, last in _chunks(rows, in_features)
    ]
    canonical = 1 if group_size == -1 else -(-in_features // group_size)
    groups = tiled_groups(in_features, group_size)
    zero = None if zero_point is None else _untile_groups(zero_point, groups)[:, :canonical].contiguous()
    joined = torch.cat(packed) if packed else weight.new_empty(0, -(-in_features * bits // 32))
    return joined, _untile_groups(scale, groups)[:, :canonical].contiguous(), zero


def _check_group_size(in_features: int, group_size: int) -> None:
    if not can_tile(in_features, group_size):
        raise InvalidArgument(
            f"given group_size={group_size}, expected 32, 64, a multiple of {COLUMNS} or -1 for the tiled layout;"
            ' keep layout="packed"'
        )


def _block_words(in_features: int, bits: int) -> int:
    return ROWS * (-(-in_features // COLUMNS) * COLUMNS) * bits // 32


def _chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK_CODES // max(columns, 1) // ROWS) * ROWS
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def _lane_loads(bits: int) -> list[tuple[int, int]]:
    """(first word, words) of the loads that a lane needs for its words."""
    found, first = [], 0
    for width in (4, 4, 2, 1):
        if bits - first >= width:
            found.append((first, width))
            first += width
    return found


def _signed(mask: int) -> int:
    return mask - (1 << 32) if mask >= 1 << 31 else mask


def _pieces(bits: int, lane_bits: int) -> list[tuple[int, int, int, int, int]]:
    """Where fields are: (register, lowest bit of the code, width, word, lowest bit in the word's lanes)."""
    whole = lane_bits // bits
    found = [(i, 0, bits, i // whole, i % whole * bits) for i in range(whole * bits)]
    spare = lane_bits - whole * bits
    for i in range(whole * bits, lane_bits):
        bit = 0
        while bit < bits:
            word, offset = divmod((i - whole * bits) * bits + bit, spare)
            width = min(spare - offset, bits - bit)
            found.append((i, bit, width, word, whole * bits + offset))
            bit += width
    return found


def _tile_codes(codes: Tensor, bits: int, kind: Kind) -> Tensor:
    """(rows, K) uint8 -> (blocks of 64 rows, words) int32."""
    rows, columns = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -columns % COLUMNS, 0, -rows % ROWS))
    lane_bits = _LANE_BITS[kind]
    per_register = 32 // lane_bits
    # [block, i, row half, g, 64 columns, s, column half, t, h]
    parts = codes.view(-1, 4, 2, 8, codes.shape[1] // 64, lane_bits // 4, 2, 4, per_register)
    # [block, 64 columns, i, (g, t) = lane, (s, column half, row half) = register, h]
    parts = parts.permute(0, 4, 1, 3, 7, 5, 6, 2, 8).reshape(
        -1, codes.shape[1] // 64, 4, 32, lane_bits, per_register
    )
    registers = torch.zeros(parts.shape[:-1], dtype=torch.int32, device=codes.device)
    for h in range(per_register):
        registers |= parts[..., h].to(torch.int32) << (lane_bits * h)
    words = torch.zeros((*parts.shape[:-2], bits), dtype=torch.int32, device=codes.device)
    lanes = sum(1 << (lane_bits * h) for h in range(per_register))
    for register, bit, width, word, position in _pieces(bits, lane_bits):
        piece = (registers[..., register] >> bit) & _signed(((1 << width) - 1) * lanes)
        words[..., word] |= piece << position
    loads = [words[..., first : first + width].flatten(-2) for first, width in _lane_loads(bits)]
    return torch.cat(loads, dim=-1).view(parts.shape[0], -1)


def _untile_codes(blocks: Tensor, bits: int, kind: Kind) -> Tensor:
    """(blocks of 64 rows, words) int32 -> (rows, K) uint8, both padded."""
    lane_bits = _LANE_BITS[kind]
    per_register = 32 // lane_bits
    tiles = blocks.reshape(blocks.shape[0], -1, 4, 32 * bits)
    words = torch.cat(
        [
            tiles[..., 32 * first : 32 * (first + width)].unflatten(-1, (32, width))
            for first, width in _lane_loads(bits)
        ],
        dim=-1,
    )
    registers = torch.zeros((*words.shape[:-1], lane_bits), dtype=torch.int32, device=blocks.device)
    lanes = sum(1 << (lane_bits * h) for h in range(per_register))
    for register, bit, width, word, position in _pieces(bits, lane_bits):
        piece = (words[..., word] >> position) & _signed(((1 << width) - 1) * lanes)
        registers[..., register] |= piece << bit
    codes = torch.stack(
        [(registers >> (lane_bits * h)) & ((1 << bits) - 1) for h in range(per_register)], dim=-1
    ).to(torch.uint8)
    # [block, 64 columns, i, g, t, s, column half, row half, h]
    parts = codes.view(-1, tiles.shape[1], 4, 8, 4, lane_bits // 4, 2, 2, per_register)
    return parts.permute(0, 2, 7, 3, 1, 5, 6, 4, 8).reshape(blocks.shape[0] * ROWS, -1)


def _tile_groups(values: Tensor, groups: int) -> Tensor:
    """(N, G) -> (N, ...) in the tiled order, padded with 0."""
    rows = values.shape[0]
    padded = torch.nn.functional.pad(values, (0, groups - values.shape[1], 0, -rows % ROWS))
    ordered = padded.view(-1, 4, 2, 8, groups).permute(0, 4, 3, 1, 2).reshape(-1)
    width = -(-ordered.numel() // max(rows, 1))
    return torch.nn.functional.pad(ordered, (0, rows * width - ordered.numel())).view(rows, width)


def _untile_groups(values: Tensor, groups: int) -> Tensor:
    """The inverse of `_tile_groups`: (N, groups)."""
    rows = values.shape[0]
    blocks = -(-rows // ROWS)
    ordered = values.reshape(-1)[: blocks * ROWS * groups].view(blocks, groups, 8, 4, 2)
    return ordered.permute(0, 3, 4, 2, 1).reshape(blocks * ROWS, groups)[:rows]

"""Packs unsigned codes of 1 to 8 bits into int32 words and back, on any device.

The canonical layout is *dense*: code ``i`` occupies bits ``i * bits ... (i + 1) * bits - 1`` of the row's
bit stream, least significant bit first, so that codes of 3, 5, 6 and 7 bits straddle words. It equals the
layout of compressed-tensors from 0.19 on. The *padded* layout of its earlier releases puts ``32 // bits``
codes in a word and leaves the rest of the word empty; both are the same for 1, 2, 4 and 8 bits.

Eight codes of ``bits`` bits fill exactly ``bits`` bytes. The dense functions therefore read eight codes as
one 64-bit word and close (or open) the gaps between them with three shift-and-mask steps. Words are
little-endian.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument

Layout = Literal["dense", "padded"]

# Codes handled at a time: bounds the temporaries to about a hundred MiB however large the tensor is.
_CHUNK_CODES = 1 << 24


def packed_width(count: int, bits: int, layout: Layout = "dense") -> int:
    """Number of int32 words that hold ``count`` codes.

    >>> packed_width(64, 6), packed_width(64, 6, "padded")
    (12, 13)
    """
    _check_bits(bits)
    if layout == "dense":
        return -(-count * bits // 32)
    return -(-count // (32 // bits))


def packed_layout(width: int, bits: int, count: int) -> Layout:
    """Tells the two layouts apart by the packed width of a row of ``count`` codes.

    Short rows (for example 100 codes of 3 bits) can have the same width in both; they are taken as dense.

    Raises:
        InvalidArgument: ``width`` fits neither layout.
    """
    if width == packed_width(count, bits, "dense"):
        return "dense"
    if width == packed_width(count, bits, "padded"):
        return "padded"
    raise InvalidArgument(
        f"{count} codes of {bits} bits are packed in {width} words, expected {packed_width(count, bits)} "
        f"(dense) or {packed_width(count, bits, 'padded')} (padded); check bits and the unpacked size"
    )


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Packs codes densely along the last dimension.

    Args:
        codes: (..., count), uint8, every value below ``2 ** bits``.
        bits: width of a code, 1 to 8.

    Returns:
        (..., ceil(count * bits / 32)), int32; unused bits of the last word are zero.

    Raises:
        InvalidArgument: wrong dtype, bits out of range, or a code that needs more bits.

    >>> pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4)
    tensor([801], dtype=torch.int32)
    """
    _check_codes(codes, bits)
    count = codes.shape[-1]
    words = packed_width(count, bits)
    packed = torch.empty((*codes.shape[:-1], words), dtype=torch.int32, device=codes.device)
    if packed.numel() == 0 or packed.is_meta:
        return packed
    codes_rows = codes.reshape(-1, count)
    packed_rows = packed.view(-1, words)
    for rows, first in _chunks(codes_rows.shape[0], count):
        part = codes_rows[rows, first : first + _CHUNK_CODES]
        _check_range(part, bits)
        first_word = first * bits // 32
        part_words = packed_width(part.shape[1], bits)
        packed_rows[rows, first_word : first_word + part_words] = _close_gaps(part, bits, part_words)
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits`.

    Args:
        packed: (..., ceil(count * bits / 32)), int32.
        bits: width of a code, 1 to 8.
        count: number of codes in a row.

    Returns:
        (..., count), uint8.

    Raises:
        InvalidArgument: wrong dtype, bits out of range, or a width that does not belong to ``count`` codes.

    >>> unpack_bits(torch.tensor([801], dtype=torch.int32), 4, 3)
    tensor([1, 2, 3], dtype=torch.uint8)
    """
    _check_packed(packed, bits, count, "dense")
    words = packed.shape[-1]
    codes = torch.empty((*packed.shape[:-1], count), dtype=torch.uint8, device=packed.device)
    if codes.numel() == 0 or codes.is_meta:
        return codes
    packed_rows = packed.reshape(-1, words)
    codes_rows = codes.view(-1, count)
    for rows, first in _chunks(packed_rows.shape[0], count):
        part_count = min(_CHUNK_CODES, count - first)
        first_word = first * bits // 32
        part = packed_rows[rows, first_word : first_word + packed_width(part_count, bits)]
        codes_rows[rows, first : first + part_count] = _open_gaps(part, bits, part_count)
    return codes


def pack_bits_padded(codes: Tensor, bits: int) -> Tensor:
    """Packs ``32 // bits`` codes into each word along the last dimension (compressed-tensors before 0.19).

    Args:
        codes: (..., count), uint8, every value below ``2 ** bits``.
        bits: width of a code, 1 to 8.

    Returns:
        (..., ceil(count / (32 // bits))), int32.
    """
    _check_codes(codes, bits)
    _check_range(codes, bits)
    per_word = 32 // bits
    count = codes.shape[-1]
    words = packed_width(count, bits, "padded")
    codes = torch.nn.functional.pad(codes, (0, words * per_word - count))
    codes = codes.reshape(*codes.shape[:-1], words, per_word)
    packed = torch.zeros(codes.shape[:-1], dtype=torch.int32, device=codes.device)
    for position in range(per_word):
        packed |= codes[..., position].to(torch.int32) << (position * bits)
    return packed


def unpack_bits_padded(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits_padded`: (..., ceil(count / (32 // bits))) int32 to (..., count) uint8."""
    _check_packed(packed, bits, count, "padded")
    per_word = 32 // bits
    codes = torch.empty((*packed.shape, per_word), dtype=torch.uint8, device=packed.device)
    for position in range(per_word):
        codes[..., position] = (packed >> (position * bits)) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count].contiguous()


def _chunks(rows: int, count: int) -> list[tuple[slice, int]]:
    """Blocks of at most ``_CHUNK_CODES`` codes as (row slice, first column); first is a multiple of 32."""
    rows_at_once = max(1, _CHUNK_CODES // max(count, 1))
    return [
        (slice(row, row + rows_at_once), first)
        for row in range(0, rows, rows_at_once)
        for first in range(0, count, _CHUNK_CODES)
    ]


def _close_gaps(codes: Tensor, bits: int, words: int) -> Tensor:
    """(rows, count) uint8 -> (rows, words) int32."""
    rows, count = codes.shape
    octets = -(-count // 8)
    packed = torch.zeros((rows, words * 4), dtype=torch.uint8, device=codes.device)
    if bits == 8:
        packed[:, :count] = codes
        return packed.view(torch.int32)
    # Copied even where aligned: a view as int64 needs storage that a slice need not have.
    lanes = torch.zeros((rows, octets * 8), dtype=torch.uint8, device=codes.device)
    lanes[:, :count] = codes
    octet = lanes.view(torch.int64)  # [rows, octets]
    for width, lane in ((bits, 8), (2 * bits, 16), (4 * bits, 32)):
        low = _lane_mask(width, 2 * lane)
        octet = (octet & low) | ((octet >> (lane - width)) & (low << width))
    filled = octet.view(torch.uint8).view(rows, octets, 8)[:, :, :bits].reshape(rows, octets * bits)
    used = min(filled.shape[1], packed.shape[1])
    packed[:, :used] = filled[:, :used]
    return packed.view(torch.int32)


def _open_gaps(packed: Tensor, bits: int, count: int) -> Tensor:
    """(rows, words) int32 -> (rows, count) uint8."""
    rows, words = packed.shape
    stream = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return stream[:, :count]
    octets = -(-count // 8)
    stream = torch.nn.functional.pad(stream, (0, max(0, octets * bits - words * 4)))[:, : octets * bits]
    lanes = torch.zeros((rows, octets, 8), dtype=torch.uint8, device=packed.device)
    lanes[:, :, :bits] = stream.reshape(rows, octets, bits)
    octet = lanes.view(torch.int64)  # [rows, octets, 1]
    for width, lane in ((4 * bits, 32), (2 * bits, 16), (bits, 8)):
        low = _lane_mask(width, 2 * lane)
        octet = (octet & low) | ((octet & (low << width)) << (lane - width))
    return octet.view(torch.uint8).view(rows, octets * 8)[:, :count]


def _lane_mask(width: int, lane: int) -> int:
    """The lowest ``width`` bits of every ``lane``-bit lane of a 64-bit word."""
    return sum(((1 << width) - 1) << start for start in range(0, 64, lane))


def _check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise InvalidArgument(f"given bits={bits!r}, expected an integer from 1 to 8")


def _check_codes(codes: Tensor, bits: int) -> None:
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise InvalidArgument(
            f"given codes of {codes.dtype}, expected torch.uint8; convert signed codes by adding"
            f" {1 << (bits - 1)}"
        )
    if codes.dim() == 0:
        raise InvalidArgument("given a scalar, expected codes with at least one dimension")


def _check_range(codes: Tensor, bits: int) -> None:
    if bits < 8 and codes.numel() and not codes.is_meta:
        largest = int(codes.max())
        if largest >= 1 << bits:
            raise InvalidArgument(
                f"given the code {largest}, expected codes below {1 << bits} for {bits} bits"
            )


def _check_packed(packed: Tensor, bits: int, count: int, layout: Layout) -> None:
    _check_bits(bits)
    if packed.dtype != torch.int32:
        raise InvalidArgument(f"given packed words of {packed.dtype}, expected torch.int32")
    if packed.dim() == 0:
        raise InvalidArgument("given a scalar, expected packed words with at least one dimension")
    expected = packed_width(count, bits, layout)
    if packed.shape[-1] != expected:
        raise InvalidArgument(
            f"given {packed.shape[-1]} packed words, expected {expected} for {count} codes of {bits} bits "
            f"in the {layout} layout"
        )

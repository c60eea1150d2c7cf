"""Packing is a bijection, agrees with a bit-by-bit oracle and with compressed-tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.errors import InvalidArgument
from tensormill.ops import bit_packing
from tensormill.ops.bit_packing import (
    pack_bits,
    pack_bits_padded,
    packed_layout,
    packed_width,
    unpack_bits,
    unpack_bits_padded,
)

ALL_BITS = range(1, 9)
COUNTS = [1, 7, 8, 9, 13, 31, 32, 33, 63, 64, 100, 257]


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


def packed_bit_by_bit(row: list[int], bits: int) -> list[int]:
    stream = sum(code << (i * bits) for i, code in enumerate(row))
    words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(-(-len(row) * bits // 32))]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_dense_packing_matches_the_bit_stream_and_returns(data):
    bits = data.draw(st.integers(1, 8))
    row = data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=150))
    codes = torch.tensor(row, dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.tolist() == packed_bit_by_bit(row, bits)
    assert torch.equal(unpack_bits(packed, bits, len(row)), codes)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    lead=st.lists(st.integers(0, 3), max_size=3),
    count=st.integers(0, 80),
    seed=st.integers(0, 2**16),
    layout=st.sampled_from(["dense", "padded"]),
)
def test_round_trip_for_any_shape(bits, lead, count, seed, layout):
    pack, unpack = (pack_bits, unpack_bits) if layout == "dense" else (pack_bits_padded, unpack_bits_padded)
    codes = random_codes((*lead, count), bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (*lead, packed_width(count, bits, layout))
    assert torch.equal(unpack(packed, bits, count), codes)


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 8), blocks=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_every_bit_pattern_is_a_packed_row(bits, blocks, seed):
    """The other direction of the bijection: 32 codes fill ``bits`` words without a spare bit."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(-(2**31), 2**31, (3, blocks * bits), dtype=torch.int64, generator=generator)
    packed = packed.to(torch.int32)
    assert torch.equal(pack_bits(unpack_bits(packed, bits, 32 * blocks), bits), packed)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("count", COUNTS)
def test_dense_packing_equals_compressed_tensors(bits, count):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes((5, count), bits, seed=count)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits)
    assert torch.equal(pack_bits(codes, bits), theirs)
    assert torch.equal(helpers.unpack_from_int32(pack_bits(codes, bits), bits, signed.shape), signed)
    along_rows = helpers.pack_to_int32(signed.T.contiguous(), bits, packed_dim=0)
    assert torch.equal(pack_bits(codes, bits).T, along_rows)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_inputs_may_be_strided_offset_and_larger_than_a_chunk(bits, monkeypatch):
    codes = random_codes((7, 333), bits)
    packed = pack_bits(codes, bits)
    strided = random_codes((333, 7), bits).T
    assert torch.equal(pack_bits(strided, bits), pack_bits(strided.contiguous(), bits))
    offset = torch.cat([codes.new_zeros(3), codes.flatten()])[3:].view(7, 333)
    assert torch.equal(pack_bits(offset, bits), packed)
    sliced = torch.cat([packed[:, :1], packed], dim=1)[:, 1:]
    assert torch.equal(unpack_bits(sliced, bits, 333), codes)
    for chunk in (32, 64, 333 * 2):
        monkeypatch.setattr(bit_packing, "_CHUNK_CODES", max(32, chunk // 32 * 32))
        assert torch.equal(pack_bits(codes, bits), packed)
        assert torch.equal(unpack_bits(packed, bits, 333), codes)


def test_inputs_stay_unchanged_and_spare_bits_are_zero():
    codes = torch.full((2, 5), 7, dtype=torch.uint8)
    before = codes.clone()
    packed = pack_bits(codes, 3)
    assert torch.equal(codes, before)
    assert packed.tolist() == [[0x7FFF], [0x7FFF]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_both_layouts_agree_where_codes_divide_a_word(bits):
    codes = random_codes((4, 100), bits)
    assert torch.equal(pack_bits(codes, bits), pack_bits_padded(codes, bits))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_layouts_are_told_apart_by_width(bits):
    codes = random_codes((4, 256), bits)
    for layout, packed in (("dense", pack_bits(codes, bits)), ("padded", pack_bits_padded(codes, bits))):
        assert packed_layout(packed.shape[-1], bits, 256) == layout
    with pytest.raises(InvalidArgument, match="packed in 3 words"):
        packed_layout(3, bits, 256)


def test_meta_tensors_keep_shapes():
    packed = pack_bits(torch.empty(4, 100, dtype=torch.uint8, device="meta"), 6)
    assert packed.is_meta and packed.shape == (4, 19)
    assert unpack_bits(packed, 6, 100).shape == (4, 100)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_bits(torch.zeros(4, dtype=torch.int8), 4), "expected torch.uint8"),
        (lambda: pack_bits(torch.zeros(4, dtype=torch.uint8), 9), "1 to 8"),
        (lambda: pack_bits(torch.zeros(4, dtype=torch.uint8), 0), "1 to 8"),
        (lambda: pack_bits(torch.tensor([16], dtype=torch.uint8), 4), "code 16, expected codes below 16"),
        (lambda: pack_bits_padded(torch.tensor([64], dtype=torch.uint8), 6), "expected codes below 64"),
        (lambda: pack_bits(torch.tensor(1, dtype=torch.uint8), 4), "scalar"),
        (lambda: unpack_bits(torch.zeros(4, dtype=torch.int64), 4, 32), "expected torch.int32"),
        (lambda: unpack_bits(torch.zeros(4, dtype=torch.int32), 4, 33), "expected 5"),
        (lambda: unpack_bits_padded(torch.zeros(3, dtype=torch.int32), 6, 20), "expected 4"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(call, message):
    with pytest.raises(InvalidArgument, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)

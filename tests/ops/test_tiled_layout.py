"""The layout "tiled": a bijection, what it promises to kernels, the operators and the layer in it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.errors import InvalidArgument
from tensormill.ops import tiles
from tensormill.ops.bit_packing import pack_bits, unpack_bits
from tensormill.ops.dequantize_wna16 import dequantize_wna16
from tensormill.ops.linear_wna16 import linear_wna16
from tensormill.ops.linear_wna16.module import LinearWNA16


def random_weight(rows, columns, bits, group_size, zeros=True):
    groups = 1 if group_size == -1 else -(-columns // group_size)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    zero = torch.randint(0, 1 << bits, (rows, groups), dtype=torch.uint8) if zeros else None
    return codes, torch.rand(rows, groups), zero


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 400),
    bits=st.integers(1, 8),
    group_size=st.sampled_from([-1, 32, 64, 128, 256]),
    kind=st.sampled_from(["f16", "i8"]),
    zeros=st.booleans(),
)
def test_tiling_is_a_bijection(rows, columns, bits, group_size, kind, zeros):
    codes, scale, zero = random_weight(rows, columns, bits, group_size, zeros)
    options = {"in_features": columns, "bits": bits, "group_size": group_size, "kind": kind}
    packed = pack_bits(codes, bits)
    tiled = tiles.tile_weight(packed, scale, zero, **options)
    assert tuple(tiled[0].shape) == tiles.tiled_shape(rows, columns, bits)
    assert tuple(tiled[1].shape) == tiles.tiled_group_shape(rows, columns, group_size)
    back = tiles.untile_weight(*tiled, **options)
    assert torch.equal(back[0], packed)
    assert torch.equal(back[1], scale)
    assert back[2] is None if zero is None else torch.equal(back[2], zero)
    if rows % 64 == 0 and columns % 128 == 0:
        assert tiled[0].shape == packed.shape and tiled[1].shape == scale.shape


@pytest.mark.parametrize("kind", ["f16", "i8"])
def test_fragments_lie_as_described(kind):
    """Four bits in words: the description in the module, spelled out for every lane of a tile in the middle."""
    codes = torch.randint(0, 16, (128, 256), dtype=torch.uint8)
    tiled, _, _ = tiles.tile_weight(
        pack_bits(codes, 4), torch.ones(128, 1), None, in_features=256, bits=4, group_size=-1, kind=kind
    )
    block, chunk, i = 1, 2, 3  # rows 64 + 48..63, columns 128..191
    start = block * 64 * 256 // 8 + (chunk * 4 + i) * 128
    tile = tiled.view(-1)[start : start + 128].view(32, 4).to(torch.int64) & 0xFFFFFFFF
    ours = codes[64 * block + 16 * i :, 64 * chunk :]
    lane_bits, wide = (16, 16) if kind == "f16" else (8, 32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for register in range(lane_bits):
            step, r = divmod(register, 4)
            word, field = divmod(register, lane_bits // 4)
            for h in range(32 // lane_bits):
                row = g + 8 * (r & 1)
                column = wide * step + wide // 2 * (r >> 1) + 32 // lane_bits * t + h
                code = int(tile[lane, word]) >> (4 * field + lane_bits * h) & 15
                assert code == ours[row, column]


def test_scales_of_a_lane_lie_side_by_side():
    scale = torch.arange(128 * 2.0).view(128, 2)
    _, tiled, _ = tiles.tile_weight(
        torch.zeros(128, 256 // 8, dtype=torch.int32), scale, None, in_features=256, bits=4, group_size=128
    )
    for row in range(128):
        block, within = divmod(row, 64)
        i, h, g = within // 16, within // 8 % 2, within % 8
        for group in range(2):
            assert tiled.view(-1)[(block * 2 + group) * 64 + 8 * g + 2 * i + h] == scale[row, group]


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(64, 128, 128), (100, 300, 32), (7, 1000, -1)])
def test_operators_take_it(rows, columns, group_size):
    codes, scale, zero = random_weight(rows, columns, 3, group_size)
    tiled = tiles.tile_weight(
        pack_bits(codes, 3), scale, zero, in_features=columns, bits=3, group_size=group_size
    )
    options = {"bits": 3, "group_size": group_size}
    dense = dequantize_wna16(pack_bits(codes, 3), scale, zero, in_features=columns, **options)
    again = dequantize_wna16(*tiled, in_features=columns, layout="tiled", **options)
    assert torch.equal(again, dense)
    x = torch.randn(2, 3, columns, requires_grad=True)
    y = linear_wna16(x, *tiled, layout="tiled", **options)
    torch.testing.assert_close(y, x @ dense.T, rtol=1e-4, atol=1e-3)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, dense.sum(0).expand_as(x), rtol=1e-4, atol=1e-3)
    compiled = torch.compile(
        lambda x: linear_wna16(x, *tiled, layout="tiled", **options), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x), y)


def test_refusals_say_what_to_do():
    codes, scale, zero = random_weight(64, 256, 4, 96)
    packed = pack_bits(codes, 4)
    with pytest.raises(InvalidArgument, match=r'group_size=96, expected 32, 64, .*keep layout="packed"'):
        tiles.tile_weight(packed, scale, zero, in_features=256, bits=4, group_size=96)
    with pytest.raises(InvalidArgument, match="group_size=96"):
        linear_wna16(torch.randn(1, 256), packed, scale, zero, bits=4, group_size=96, layout="tiled")
    with pytest.raises(InvalidArgument, match=r"given layout='woven', expected one of \['packed', 'tiled'\]"):
        linear_wna16(torch.randn(1, 256), packed, scale, zero, bits=4, group_size=96, layout="woven")
    with pytest.raises(InvalidArgument, match="words a row"):
        linear_wna16(torch.randn(1, 300), packed, scale, zero, bits=4, group_size=128, layout="tiled")


class TestLayer:
    def make(self, rows=100, columns=300, symmetric=False):
        codes, scale, zero = random_weight(rows, columns, 4, 128, not symmetric)
        return LinearWNA16.from_codes(
            codes, scale, zero, bits=4, group_size=128, bias=torch.randn(rows)
        ), codes

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_is_the_same_layer(self, symmetric):
        layer, codes = self.make(symmetric=symmetric)
        x = torch.randn(3, 300)
        y, dense, before = layer(x), layer.dequantize(), {k: v.clone() for k, v in layer.state_dict().items()}
        kept = [layer.weight_packed, layer.weight_scale, layer.weight_zero_point]
        assert layer.to_layout("tiled") is layer and "tiled" in repr(layer)
        assert "weight_packed" not in dict(layer.named_buffers())  # one copy only
        torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-3)
        assert torch.equal(layer.codes(), codes) and torch.equal(layer.dequantize(), dense)
        after = layer.state_dict()
        assert sorted(after) == sorted(before) and all(torch.equal(after[k], before[k]) for k in before)
        for wanted, name in zip(kept, ("weight_packed", "weight_scale", "weight_zero_point"), strict=True):
            found = getattr(layer, name)
            assert found is None if wanted is None else torch.equal(found, wanted)
        layer.to_layout("packed")
        assert torch.equal(layer(x), y) and torch.equal(layer.weight_packed, kept[0])
        assert sorted(layer.state_dict()) == sorted(before)

    @pytest.mark.parametrize("tiled", [False, True])
    def test_loads_a_canonical_state_dict(self, tiled):
        source, _ = self.make()
        target, _ = self.make()
        if tiled:
            source.to_layout("tiled")
        target.to_layout("tiled").load_state_dict(source.state_dict())
        assert target.layout == "tiled"
        x = torch.randn(2, 300)
        torch.testing.assert_close(target(x), source(x), rtol=1e-4, atol=1e-3)

    def test_is_converted_copied_and_pickled(self):
        layer, _ = self.make()
        layer.to_layout("tiled")
        x = torch.randn(2, 300)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other.layout == "tiled" and torch.equal(other(x), layer(x))
        half = copy.deepcopy(layer).to(torch.bfloat16)
        assert half.weight_scale_tiled.dtype == torch.bfloat16 and half.weight_tiled.dtype == torch.int32
        assert half.weight_scale.dtype == torch.bfloat16

    def test_keeps_what_cannot_be_tiled(self):
        codes, scale, _ = random_weight(8, 40, 4, 10)
        layer = LinearWNA16.from_codes(codes, scale, None, bits=4, group_size=10)
        with pytest.raises(InvalidArgument, match="group_size=10"):
            layer.to_layout("tiled")
        assert layer.layout == "packed" and torch.equal(layer.codes(), codes)
        assert torch.equal(unpack_bits(layer.weight_packed, 4, 40), codes)
        with pytest.raises(InvalidArgument, match='expected "packed" or "tiled"'):
            layer.to_layout("woven")


def test_the_fastest_layout_on_a_cpu_is_packed():
    layer = LinearWNA16(256, 64, bits=4, group_size=128)
    assert layer.to_fastest_layout(torch.float16).layout == "packed"
    assert layer.to_layout("tiled").to_fastest_layout(torch.float16).layout == "packed"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_fastest_layout_on_a_gpu_is_tiled_for_16_bits():
    layer = LinearWNA16(256, 64, bits=4, group_size=128).cuda()
    assert layer.to_fastest_layout(torch.float16).layout == "tiled"
    assert layer.to_fastest_layout(torch.float32).layout == "packed"

"""What is special to layers with 8-bit activations; the battery does the comparison with the reference."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from emulation.triton_kernels import hopper_reports, needs_compiler
from tensormill.errors import InvalidArgument
from tensormill.operator import interpreting
from tensormill.ops import OPERATORS, linear_wna8, quantize_activations, use_implementation
from tensormill.ops.bit_packing import pack_bits
from tensormill.ops.correctness import deviation
from tensormill.ops.linear_wna8.module import LinearWNA8
from tensormill.ops.linear_wna8.planes import from_planes, to_planes
from tensormill.ops.linear_wna16.module import LinearWNA16
from tensormill.ops.tiles import tile_weight

operator = OPERATORS["linear_wna8"]


def weight(rows, columns, bits, group_size, symmetric, seed=0, scale=None):
    """Codes, float weights, and the operator's canonical weight arguments."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-columns // group_size)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    if scale is None:
        scale = torch.rand(rows, groups, generator=generator) + 0.5
    zero = torch.full((rows, groups), 1 << (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zero = torch.randint(0, 1 << bits, (rows, groups), generator=generator, dtype=torch.uint8)
    size = columns if group_size == -1 else group_size
    wide = [t.double().repeat_interleave(size, 1)[:, :columns] for t in (zero, scale)]
    dense = (codes.double() - wide[0]) * wide[1]
    return dense, (pack_bits(codes, bits), scale, None if symmetric else zero)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 8),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 300),
    st.booleans(),
    st.integers(0, 1 << 30),
)
def test_integers_are_exact(bits, tokens, rows, columns, symmetric, seed):
    dense, arguments = weight(rows, columns, bits, -1, symmetric, seed, torch.ones(rows, 1))
    x = torch.randint(-128, 128, (tokens, columns), generator=torch.Generator().manual_seed(seed))
    one = torch.ones(tokens, 1)
    y = linear_wna8(x.to(torch.int8), *arguments, bits=bits, group_size=-1, x_scale=one, dtype=torch.float32)
    assert torch.equal(y.double(), x.double() @ dense.T)


@pytest.mark.parametrize("x_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("group_size", "x_group_size"), [(-1, -1), (128, -1), (-1, 64), (32, 128), (24, 36)])
def test_scales_multiply_codes(x_dtype, group_size, x_group_size):
    dense, arguments = weight(21, 300, 5, group_size, False)
    x = torch.randn(2, 3, 300)
    codes, scale = quantize_activations(x, dtype=x_dtype, group_size=x_group_size)
    size = 300 if x_group_size == -1 else x_group_size
    dequantized = codes.double() * scale.double().repeat_interleave(size, -1)[..., :300]
    options = {"bits": 5, "group_size": group_size, "x_group_size": x_group_size}
    y = linear_wna8(codes, *arguments, x_scale=scale, dtype=torch.float32, **options)
    assert deviation(y, dequantized @ dense.T, 1e-5) is None
    # floats are quantized alike
    assert torch.equal(linear_wna8(x, *arguments, x_dtype=x_dtype, **options), y)


def test_close_to_the_layer_with_16_bits():
    """8-bit activations of Gaussian values cost about 1 % of the result; outliers in groups of their own little more."""
    dense, arguments = weight(64, 512, 4, 128, True)
    x = torch.randn(50, 512)
    x[:, :3] *= 100
    exact = x.double() @ dense.T
    for x_group_size, allowed in ((-1, 0.1), (32, 0.015)):
        y = linear_wna8(x, *arguments, bits=4, group_size=128, x_group_size=x_group_size)
        assert (y - exact).norm() / exact.norm() < allowed


def test_mixed_blocks():
    """COMET: after a permutation, outliers' blocks have 8 bits, the others 4, in one product."""
    columns = 512
    dense, _ = weight(40, columns, 4, 128, True)
    x = torch.randn(30, columns, generator=torch.Generator().manual_seed(5))
    x[:, ::64] *= 40
    order = torch.argsort(x.abs().amax(0), descending=True, stable=True)
    bits = torch.tensor([8, 4, 4, 4], dtype=torch.uint8)
    options = {"group_size": 128, "permutation": order, "block_bits": bits}
    codes, scale = quantize_activations(x, **options)
    assert codes[:, :128].abs().max() == 127 and codes[:, 128:].abs().max() == 7
    # the weight's columns are permuted once, before they are quantized
    permuted = dense[:, order]
    group = permuted.unflatten(1, (-1, 128))
    weight_scale = group.abs().amax(-1) / 7
    weight_codes = (group / weight_scale[..., None]).round().clamp(-8, 7) + 8
    packed = pack_bits(weight_codes.flatten(1).to(torch.uint8), 4)
    y = linear_wna8(
        codes, packed, weight_scale.float(), bits=4, group_size=128, x_scale=scale, x_group_size=128
    )
    quantized = ((weight_codes - 8) * weight_scale[..., None]).flatten(1)
    exact = x[:, order].double() @ quantized.T
    assert (y - exact).norm() / exact.norm() < 0.05
    narrow, narrow_scale = quantize_activations(x, bits=4, group_size=128)
    unsorted = (narrow.double() * narrow_scale.double().repeat_interleave(128, 1)) @ quantized[
        :, order.argsort()
    ].T
    assert (unsorted - exact).norm() / exact.norm() > 0.05


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    ("rows", "columns", "width"), [(64, 512, 64), (100, 1000, 32), (1, 1, 128), (4100, 70, 64)]
)
def test_planes_are_a_bijection(bits, rows, columns, width):
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    planes = to_planes(packed, bits, columns, width)
    assert planes.dtype == torch.int8 and planes.dim() == 3
    assert torch.equal(from_planes(planes, bits, rows, columns, width), packed)
    signed = to_planes(packed, bits, columns, width, sign=True)
    assert torch.equal(from_planes(signed, bits, rows, columns, width, sign=True), packed)


def test_planes_of_six_bits():
    """Byte i of an upper sub-block: columns i of two neighbouring parts; of the lower one: of four."""
    codes = torch.arange(256).remainder(64).to(torch.uint8)[None].expand(64, 256).contiguous()
    tile = to_planes(pack_bits(codes, 6), 6, 256, 64).view(torch.uint8).view(3, 64, 64)
    signed = (codes ^ 32)[0].view(4, 64)
    upper, lower = signed >> 2, signed & 3
    assert torch.equal(tile[0, 5], upper[0] | upper[1] << 4)
    assert torch.equal(tile[1, 5], upper[2] | upper[3] << 4)
    assert torch.equal(tile[2, 5], lower[0] | lower[1] << 2 | lower[2] << 4 | lower[3] << 6)


class TestLayer:
    def layer(self, symmetric=False, **more):
        _, (packed, scale, zero) = weight(24, 192, 4, 64, symmetric)
        half = {"in_features": 192, "bits": 4, "group_size": 64}
        bias = nn.Parameter(torch.randn(24))
        return LinearWNA16.from_packed(packed, scale, zero, bias=bias, **half), more

    @pytest.mark.parametrize("more", [{}, {"x_group_size": 64}, {"x_dtype": torch.float8_e4m3fn}])
    def test_from_wna16(self, more):
        wide, _ = self.layer()
        layer = LinearWNA8.from_wna16(wide, **more)
        assert layer.weight_packed is wide.weight_packed and layer.bias is wide.bias
        x = torch.randn(2, 5, 192)
        tensors = (layer.weight_packed, layer.weight_scale, layer.weight_zero_point, layer.bias)
        assert torch.equal(layer(x), linear_wna8(x, *tensors, bits=4, group_size=64, **more))
        codes, scale = quantize_activations(x, dtype=layer.x_dtype, group_size=layer.x_group_size)
        assert torch.equal(layer(codes, scale), layer(x))
        assert (layer(x) - wide(x)).norm() / wide(x).norm() < (0.02 if "x_dtype" not in more else 0.06)
        assert "x_dtype" in repr(layer) and sorted(layer.state_dict()) == sorted(wide.state_dict())

    def test_state_dict_and_dtype(self):
        wide, _ = self.layer(symmetric=True)
        layer = LinearWNA8.from_wna16(wide)
        new = LinearWNA8(192, 24, bits=4, group_size=64, symmetric=True)
        x = torch.randn(3, 192)
        before = new(x)
        new.load_state_dict(layer.state_dict())
        assert torch.equal(new(x), layer(x)) and not torch.equal(before, new(x))
        half = copy.deepcopy(layer).half()
        assert half.weight_scale.dtype == torch.float16 and half(x.half()).dtype == torch.float16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16

    @pytest.mark.parametrize("order", ["planes64", "signed_planes64", "tiled"])
    def test_one_copy_in_the_order_of_the_implementation(self, order, monkeypatch):
        """Made once, in place; state dicts, loading, dtypes and `to_layout` are those of canonical rows."""
        made = []

        def prepare(*arguments):
            made.append(1)
            x, x_scale, packed, scale, zero, *rest = arguments
            if order == "tiled":
                sizes = {"in_features": 192, "bits": 4, "group_size": 64}
                tensors = tile_weight(packed, scale, zero, kind="i8", **sizes)
            else:
                tensors = (to_planes(packed, 4, 192, 64, order.startswith("signed")), scale.T, zero.T)
            return (x, x_scale, *tensors, *rest[:-1], order)

        monkeypatch.setitem(operator.find("reference").__dict__, "prepare", prepare)
        layer = LinearWNA8.from_wna16(self.layer()[0])
        x = torch.randn(4, 192)
        before = {name: t.clone() for name, t in layer.state_dict().items()}
        tensors = (layer.weight_packed, layer.weight_scale, layer.weight_zero_point, layer.bias)
        with use_implementation(linear_wna8="reference"):
            expected = linear_wna8(x, *tensors, bits=4, group_size=64)
            assert torch.equal(layer(x), expected) and torch.equal(layer(x), expected)
            assert made == [1] and layer.layout == order and f'"{order}"' in repr(layer)
            assert all(name.endswith("_ordered") for name, _ in layer.named_buffers())
            after = layer.state_dict()
            assert sorted(after) == sorted(before) and all(torch.equal(after[k], before[k]) for k in before)
            assert torch.equal(copy.deepcopy(layer)(x), expected)
            layer.load_state_dict({**before, "weight_scale": 2 * before["weight_scale"]})
            assert torch.allclose(layer(x) - layer.bias, 2 * (expected - layer.bias), rtol=1e-4, atol=1e-4)
            assert made == [1, 1]
            assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
            assert layer.to_layout("packed").layout == "packed"
            assert torch.equal(layer.weight_packed, before["weight_packed"])

    def test_compiles(self):
        layer = LinearWNA8.from_wna16(self.layer()[0])
        x = torch.randn(4, 192)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))

    def test_refusals(self):
        layer = LinearWNA8.from_wna16(self.layer()[0])
        with pytest.raises(InvalidArgument, match=r"expected floats \(\.\.\., 192\) on cpu"):
            layer(torch.zeros(2, 191))
        with pytest.raises(InvalidArgument, match=r"expected torch\.int8 \(\.\.\., 192\)"):
            layer(torch.zeros(2, 192), torch.ones(2, 1))
        with pytest.raises(InvalidArgument, match=r"expected torch\.int8 or torch\.float8_e4m3fn"):
            LinearWNA8(192, 24, bits=4, group_size=64, x_dtype=torch.float16)
        with pytest.raises(InvalidArgument, match=r"expected \"packed\"; call prepare\(\)"):
            layer.to_layout("tiled")
        assert layer.to_layout("packed") is layer


@pytest.mark.parametrize(
    ("group_size", "x_group_size", "symmetric", "taken"),
    [
        (-1, -1, False, True),
        (-1, 128, True, True),
        (128, 128, True, True),
        (384, 256, True, True),
        (1024, 512, False, True),  # one group each
        (128, 128, False, False),
        (-1, 128, False, False),
        (128, 64, True, False),
        (64, -1, True, False),
    ],
)
def test_groups_that_the_cuda_kernel_takes(group_size, x_group_size, symmetric, taken):
    _, (packed, scale, zero) = weight(8, 512, 4, group_size, symmetric)
    sizes = (8, 4, group_size, x_group_size, torch.int8, torch.float16, "packed")
    given = (torch.zeros(2, 512), None, packed, scale, None if symmetric else zero, None, *sizes)
    assert operator.find("cuda").supports(*given) is taken


@pytest.mark.parametrize(
    ("group_size", "layout"), [(24, "packed"), (7, "packed"), (32, "tiled"), (-1, "tiled")]
)
def test_conversion_hands_on_what_the_tiled_layout_cannot_hold(group_size, layout):
    groups = 1 if group_size == -1 else -(-300 // group_size)
    x, weight = torch.zeros(2, 300).half(), torch.zeros(11, 38, dtype=torch.int32)
    given = (x, None, weight, torch.ones(11, groups), None, None, 11, 4, group_size, -1)
    prepared = operator.find("cuda").prepare(*given, torch.int8, torch.float16, "packed")
    assert prepared[-1] == layout and (prepared[2] is weight) == (layout == "packed")


def test_refusals_say_what_to_do():
    _, (packed, scale, zero) = weight(8, 256, 4, 64, False)
    x = torch.zeros(2, 256)
    sizes = {"bits": 4, "group_size": 64}
    with pytest.raises(InvalidArgument, match=r"torch\.int8 without x_scale"):
        linear_wna8(x.to(torch.int8), packed, scale, zero, **sizes)
    with pytest.raises(InvalidArgument, match=r"x_scale .* expected torch\.float32 of shape \(2, 4\)"):
        linear_wna8(x.to(torch.int8), packed, scale, zero, x_scale=torch.ones(2, 1), x_group_size=64, **sizes)
    with pytest.raises(InvalidArgument, match=r"torch\.float32, expected torch\.int8"):
        linear_wna8(x, packed, scale, zero, x_scale=torch.ones(2, 1), **sizes)
    with pytest.raises(InvalidArgument, match="32 words a row"):
        linear_wna8(x[:, 1:], packed, scale, zero, bits=5, group_size=64)
    with pytest.raises(InvalidArgument, match=r"bias .* expected floats \(8,\)"):
        linear_wna8(x, packed, scale, zero, torch.zeros(9), **sizes)
    with pytest.raises(InvalidArgument, match=r"65536 columns of 8 bits .* at most 65535: use groups"):
        linear_wna8(
            torch.zeros(1, 65536),
            torch.zeros(1, 16384, dtype=torch.int32),
            torch.ones(1, 1),
            bits=8,
            group_size=-1,
        )
    with pytest.raises(InvalidArgument, match="bias on meta and x on cpu"):
        linear_wna8(x, packed, scale, zero, torch.zeros(8, device="meta"), **sizes)


@pytest.mark.parametrize(
    "mistake", ["zero point forgotten", "a token's scale", "a tail of K", "one code by one"]
)
def test_tolerance_catches_planted_errors(mistake):
    dense, (packed, scale, zero) = weight(64, 1000, 4, 64, False)
    x = torch.randn(32, 1000, generator=torch.Generator().manual_seed(1))
    y = linear_wna8(x, packed, scale, zero, bits=4, group_size=64)
    codes, x_scale = quantize_activations(x)
    wide = scale.repeat_interleave(64, 1)[:, :1000].double()
    expected = (codes.double() * x_scale) @ dense.T
    tolerance = operator.tolerance(torch.float32, {"in_features": 1000, "dtype": "float16"})
    assert deviation(y.half(), expected, tolerance) is None
    wrong = {
        "zero point forgotten": expected + 0.02 * x_scale.double() * codes.double() @ wide.T,
        "a token's scale": expected * torch.where(torch.arange(32) == 3, 1.1, 1.0)[:, None],
        "a tail of K": (codes[:, :960].double() * x_scale) @ dense[:, :960].T,
        "one code by one": expected + 10 * x_scale.double() * (codes[:, 7, None] * wide[:, 7]),
    }[mistake]
    assert deviation(wrong.half(), expected, tolerance) is not None


COMPILE = """
kernels = import_module("tensormill.ops.linear_wna8.triton")
types = {"x": "*i8", "x_scale": "*fp32", "weight": "*i8", "weight_scale": "*fp16", "zero_point": "*fp16",
         "x_sums": "*fp32", "bias": "*fp16", "y": "*fp16", "partial": "*fp32", "counters": "*i32"}
common = {"HAS_ZERO": False, "HAS_BIAS": False, "OVERLAP": True, "INTERPRETED": False}

def check(kernel, warps, stages, types, constants):
    built = build(kernel, types, constants, even=("N", "K"), num_warps=warps, num_stages=stages, launch_pdl=True)
    print(json.dumps({"shared": built.metadata.shared, "spills": count(built, SPILLS),
                      "products": count(built, r"\\b(?:IGMMA|QGMMA|IDP)\\b")}))

def gemm(bits, width, run, block_m, block_n, warps, stages, kind="int8"):
    x = "*i8" if kind == "int8" else "*fp8e4nv"
    check(kernels._gemm_kernel, warps, stages, {**types, "x": x},
          {**common, "KIND": kind, "BITS": bits, "WIDTH": width, "RUN": run, "BLOCK_M": block_m, "BLOCK_N": block_n,
           "WHOLE_BLOCKS": True, "X_GROUPED": False, "SPLIT": False})

gemm(4, 64, 0, 256, 128, 8, 4)
gemm(4, 64, 2, 128, 128, 8, 4)
gemm(6, 64, 0, 16, 64, 4, 4)
gemm(4, 64, 2, 128, 128, 8, 4, "fp8")
check(kernels._gemv_kernel, 4, 3, {**types, "x": "*i32", "weight": "*i32"},
      {**common, "BITS": 6, "WIDTH": 64, "RUN": 0, "TOKENS": 1, "AHEAD": 2, "SPLIT": True})
"""


@needs_compiler
def test_compiles_for_hopper():
    """Products on the units meant, nothing spilled, shared memory that fits."""
    reports = hopper_reports(COMPILE)
    assert len(reports) == 5
    for report in reports:
        assert report["shared"] <= 227 << 10, report
        assert report["spills"] in (0, None), report
        assert report["products"] is None or report["products"] > 0, report


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a CUDA device")
class TestOnGpu:
    """What the battery does not reach: kinds that dispatch leaves to the reference, and large tiles."""

    @pytest.mark.parametrize("x_dtype", [torch.int8, torch.float8_e4m3fn])
    @pytest.mark.parametrize("bits", range(1, 9))
    @pytest.mark.parametrize(
        ("tokens", "group_size", "symmetric"), [(1, 64, False), (20, 128, True), (300, -1, False)]
    )
    def test_triton_kernels(self, x_dtype, bits, tokens, group_size, symmetric):
        kernels = pytest.importorskip("tensormill.ops.linear_wna8.triton")
        _, arguments = weight(300, 1000, bits, group_size, symmetric)
        packed, scale, zero = (None if t is None else t.cuda() for t in arguments)
        x = torch.randn(tokens, 1000, device="cuda").half()
        sizes = (300, bits, group_size, -1, x_dtype, torch.float16, "packed")
        given = (x, None, packed, scale.half(), zero, None, *sizes)
        y = kernels.linear(*given)
        wide = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in given]
        assert deviation(y, operator.reference(*wide), 4e-3) is None

    def test_layer_in_a_cuda_graph(self):
        _, (packed, scale, _) = weight(512, 1024, 4, 128, True)
        half = {"in_features": 1024, "bits": 4, "group_size": 128}
        layer = LinearWNA8.from_wna16(LinearWNA16.from_packed(packed, scale.half(), None, **half)).cuda()
        x = torch.randn(3, 1024, device="cuda").half()
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)

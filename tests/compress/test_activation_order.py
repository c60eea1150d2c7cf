"""Linears in activation order: their weights by the definition, products, gradients, what makes no order."""

from __future__ import annotations

import copy

import pytest
import torch
from format_cases import quantized, source_file, weight_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tensormill.compress.formats.activation_order import ActivationOrderLinear, input_order_of
from tensormill.compress.formats.autogptq import GPTQ_V1, GPTQ_V2
from tensormill.compress.formats.checkpoint_format import Scheme
from tensormill.errors import CheckpointError, InvalidArgument

UNITS = {2: 16, 3: 32, 4: 8, 8: 4}

pytestmark = pytest.mark.filterwarnings("ignore:.*zero points of:UserWarning")


def ordered_case(bits, rows, columns, group_size, seed=0):
    """A layer's tensors with a random order, and its weight (N, K) by the definition."""
    codes, scale, zero = quantized(bits, rows, columns, group_size, seed)
    draw = torch.Generator().manual_seed(seed + 1)
    index = (torch.arange(columns) // group_size)[torch.randperm(columns, generator=draw)]
    tensors = GPTQ_V2.pack_weight(codes, scale, zero, bits, group_size)
    tensors["g_idx"] = index.int()
    weight = (codes.float() - zero.float()[:, index]) * scale.float()[:, index]
    return tensors, weight


def load_layer(tensors, bits, group_size, **more):
    return GPTQ_V2.unpack_linear({**tensors, **more}, Scheme(bits, group_size, False, True), "layer")


@pytest.mark.parametrize("bits", UNITS)
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(32, 96, 32), (96, 288, 8), (32, 32, 16)])
def test_weights_and_products_are_those_of_the_definition(bits, rows, columns, group_size):
    tensors, weight = ordered_case(bits, rows, columns, group_size)
    bias = torch.randn(rows)
    layer = load_layer(tensors, bits, group_size, bias=bias).requires_grad_(False)
    assert type(layer) is ActivationOrderLinear
    assert torch.equal(layer.dequantize(torch.float32), weight)
    assert torch.equal(layer.group_index(), tensors["g_idx"])
    x = torch.randn(2, 3, columns)
    expected = functional.linear(x.double(), weight.double(), bias.double())
    found = layer.float()(x)
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 1e-6 * columns**0.5
    # The packed form isn't the weight without the order.
    assert not torch.equal(layer.codes()[:, layer.input_order.argsort()], layer.codes())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_and_shapes_of_the_input(dtype):
    tensors, weight = ordered_case(4, 16, 64, 16)
    layer = load_layer(tensors, 4, 16).to(dtype)
    assert layer.input_order.dtype == torch.int32
    for shape in ((64,), (1, 64), (0, 64), (13, 64)):
        x = torch.randn(shape).to(dtype)
        found, expected = layer(x), functional.linear(x.double(), weight.to(dtype).double())
        assert found.shape == expected.shape and found.dtype == dtype
        assert float((found - expected).norm()) <= (1e-2 if dtype != torch.float64 else 1e-6) * float(
            expected.norm() + 1e-9
        )


def test_gradients_reach_the_input_in_its_own_order():
    tensors, weight = ordered_case(4, 16, 64, 16)
    layer = load_layer(tensors, 4, 16).float()
    x = torch.randn(5, 64, requires_grad=True)
    y = torch.randn(5, 16)
    (layer(x) * y).sum().backward()
    torch.testing.assert_close(x.grad, y @ weight, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused():
    layer = load_layer(ordered_case(4, 16, 64, 16)[0], 4, 16)
    for x in (torch.randn(2, 65), torch.randn(2, 63), torch.zeros(2, 64, dtype=torch.int64)):
        with pytest.raises(InvalidArgument, match=r"\(\.\.\., 64\)"):
            layer(x)


def test_state_copies_and_tracing():
    tensors, _ = ordered_case(4, 16, 64, 16)
    layer = load_layer(tensors, 4, 16).float()
    x = torch.randn(3, 64)
    other = ActivationOrderLinear(64, 16, bits=4, group_size=16, bias=False)
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer), torch.compile(layer, backend="eager", fullgraph=True)):
        assert torch.equal(same(x), layer(x))
    fresh = ActivationOrderLinear(64, 16, bits=4, group_size=16, device="meta")
    assert fresh.input_order.is_meta and fresh.bias is not None


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(list(UNITS)),
    version=st.sampled_from([GPTQ_V1, GPTQ_V2]),
    rows=st.integers(1, 2),
    groups=st.integers(2, 4),
    seed=st.integers(0, 2**16),
)
def test_read_and_written_again_nothing_changes(bits, version, rows, groups, seed):
    unit = UNITS[bits]
    codes, scale, zero = quantized(bits, rows * unit, groups * unit, unit, seed)
    tensors = version.pack_weight(codes, scale, zero, bits, unit)
    draw = torch.Generator().manual_seed(seed)
    tensors["g_idx"] = tensors["g_idx"][torch.randperm(groups * unit, generator=draw)]
    layer = version.unpack_linear(tensors, Scheme(bits, unit, False, True), "layer")
    again = version.pack_linear(layer, "layer")
    assert again.keys() == tensors.keys()
    for part, tensor in tensors.items():
        assert torch.equal(again[part], tensor) and again[part].dtype == tensor.dtype, part


@pytest.mark.parametrize("bits", UNITS)
def test_autogptq_computes_the_same(bits):
    """Its torch path for ordered layers, on an identity matrix."""
    theirs = source_file("auto_gptq", "nn_modules", "qlinear", "qlinear_cuda.py")
    codes, scale, zero = quantized(bits, 64, 96, 32)
    zero = zero.clamp(min=1)
    tensors = GPTQ_V1.pack_weight(codes, scale, zero, bits, 32)
    tensors["g_idx"] = tensors["g_idx"][torch.randperm(96, generator=torch.Generator().manual_seed(bits))]
    layer = theirs.QuantLinear(bits, 32, 96, 64, bias=False)
    layer.load_state_dict(tensors)
    expected = layer(torch.eye(96, dtype=torch.float16)).float().T
    found = GPTQ_V1.unpack_linear(tensors, Scheme(bits, 32, False, True), "layer")
    torch.testing.assert_close(found.dequantize(torch.float32), expected, rtol=1e-3, atol=0)
    assert not torch.equal(expected, weight_of(codes, scale, zero, 32))


def test_orders():
    assert input_order_of(torch.arange(6) // 2, 2, "g_idx") is None
    assert input_order_of(torch.zeros(6, dtype=torch.int32), -1, "g_idx") is None
    assert input_order_of(torch.tensor([0, 0, 0, 1, 1]), 3, "g_idx") is None  # A shorter last group.
    assert input_order_of(torch.tensor([1, 0, 1, 0, 0]), 3, "g_idx").tolist() == [1, 3, 4, 0, 2]
    for index, message in (
        ([0, 0, 0, 1], "g_idx puts 3 columns in group 0, expected 2"),
        ([0, 0, 0, 0], "g_idx puts 4 columns in group 0, expected 2"),
        ([0, 0, 1, 2], "g_idx puts 1 columns in group 1, expected 2"),
        ([-1, 0, 0, 1], "g_idx puts 1 columns in group 1, expected 2"),
        ([0, 0, 1, 10**9], "g_idx puts 1 columns in group 1, expected 2"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            input_order_of(torch.tensor(index), 2, "g_idx")
        assert "\n" not in str(caught.value)

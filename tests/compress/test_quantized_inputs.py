"""FlexQ and COMET: layers that quantize their inputs by block, and the methods that choose widths and orders."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from tensormill.compress import comet, flexq, rtn
from tensormill.compress.calibration import Calibration
from tensormill.compress.checkpoint import save_compressed
from tensormill.compress.comet import COMETConfig, plan_inputs, round_weight
from tensormill.compress.flexq import FlexQConfig, input_errors, most_sensitive, quantize_inputs
from tensormill.compress.formats.quantization import QuantSpec
from tensormill.compress.quantized_inputs import (
    BlockQuantizedLinear,
    OrderedBlockQuantizedLinear,
    with_quantized_input,
)
from tensormill.errors import InvalidArgument, ModelError
from tensormill.ops.linear_wna8.module import LinearWNA8
from tensormill.ops.linear_wna16.module import LinearWNA16


@pytest.fixture(params=range(2))
def generator(request):
    return torch.Generator().manual_seed(request.param + 40)


def tiny(layers=2, **more):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        **more,
    )
    return LlamaForCausalLM(config).eval()


def tokens(samples=4, length=24):
    return Calibration(torch.randint(0, 60, (samples, length), generator=torch.Generator().manual_seed(7)))


def packed(rows, columns, bits, group, generator, symmetric=True):
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    groups = -(-columns // group)
    scale = torch.rand(rows, groups, generator=generator) + 0.5
    zero = None if symmetric else torch.randint(0, 1 << bits, (rows, groups), generator=generator).byte()
    return LinearWNA16.from_codes(codes, scale, zero, bits=bits, group_size=group, bias=torch.randn(rows))


def slow_blocks(x, bits, size):
    """Channels block by block, in float64 but for the largest magnitude and scale."""
    parts = []
    for part, width in zip(x.split(size, dim=-1), bits, strict=True):
        limit = 2.0 ** (width - 1) - 1
        largest = part.abs().amax(-1, keepdim=True)
        parts.append((part * (limit / largest)).round() * (largest / limit))
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize(("columns", "size", "symmetric"), [(96, 32, True), (100, 32, False), (64, 64, True)])
def test_the_layer_is_a_dense_product_with_quantized_inputs(columns, size, symmetric, generator):
    plain = packed(9, columns, 4, size, generator, symmetric)
    bits = torch.tensor([8, 4, 6, 2])[: -(-columns // size)]
    x = torch.randn(2, 5, columns, generator=generator)
    expected = functional.linear(slow_blocks(x, bits.tolist(), size), plain.dequantize(), plain.bias)
    layer = with_quantized_input(plain, bits, size)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-3)
    assert layer.weight_packed is plain.weight_packed and layer.bias is plain.bias
    widths = [min(size, columns - size * i) for i in range(len(bits))]
    average = sum(n * b for n, b in zip(widths, bits.tolist(), strict=True)) / columns
    assert layer.average_input_bits() == pytest.approx(average)
    codes, scale = layer.quantize_input(x)
    torch.testing.assert_close(layer(codes, scale), layer(x))


def test_eight_bits_everywhere_is_the_layer_of_the_operator(generator):
    plain = packed(8, 96, 6, 32, generator)
    x = torch.randn(3, 96, generator=generator)
    wanted = LinearWNA8.from_wna16(plain, x_group_size=32)(x)
    assert torch.equal(with_quantized_input(plain, 8, 32)(x), wanted)


def test_an_order_moves_columns_and_channels_alike(generator):
    """Permuting the weight's columns and the input is the identity but for what shares a block."""
    order = torch.randperm(96, generator=generator)
    plain = packed(8, 96, 4, 32, generator)
    layer = with_quantized_input(plain, torch.tensor([8, 8, 4]), 32, order)
    x = torch.randn(4, 96, generator=generator)
    in_order = with_quantized_input(plain, torch.tensor([8, 8, 4]), 32)
    assert torch.equal(layer(x), in_order(x[:, order]))
    assert torch.equal(layer.dequantize()[:, order], plain.dequantize())
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x)) and isinstance(layer, OrderedBlockQuantizedLinear)


@pytest.mark.parametrize(
    ("bits", "size", "order"),
    [
        (1, 32, None),
        (9, 32, None),
        (torch.tensor([4, 4]), 32, None),
        (4, 32, torch.zeros(96, dtype=torch.long)),
    ],
)
def test_widths_and_orders_that_do_not_fit(bits, size, order, generator):
    with pytest.raises(InvalidArgument):
        with_quantized_input(packed(4, 96, 4, 32, generator), bits, size, order)
    with pytest.raises(InvalidArgument, match="expected floats"):
        with_quantized_input(packed(4, 96, 4, 32, generator), 4, 32)(torch.randn(2, 95))


def layers_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, BlockQuantizedLinear)}


def test_flexq_gives_sensitive_layers_the_wide_input():
    model, calibration = tiny(), tokens()
    with torch.no_grad():
        wanted = model(calibration.tokens).logits
    report = flexq.apply(model, FlexQConfig(group_size=32), None)
    layers = layers_of(model)
    assert len(layers) == 14 and report.method == "flexq"
    for name, layer in layers.items():
        expected = 8 if name.endswith("down_proj") else 6
        assert layer.average_input_bits() == expected and layer.bits == 6
    assert {layer.details["input_bits"] for layer in report.layers} == {6, 8}
    with torch.no_grad():
        found = model(calibration.tokens).logits
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.1


def test_flexq_auto_follows_the_measured_errors():
    model, calibration = tiny(), tokens()
    with torch.no_grad():  # an outlier that q, k and v of the first block read with small weights
        block = model.model.layers[0]
        block.input_layernorm.weight[5] = 200.0
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(block.self_attn, name).weight[:, 5] /= 200
    report = flexq.apply(
        model, FlexQConfig(group_size=32, sensitive="auto", sensitive_share=0.2), calibration
    )
    wide = {layer.name for layer in report.layers if layer.details["input_bits"] == 8}
    worst = max(report.layers, key=lambda layer: layer.details["input_error_at_6_bits"])
    assert worst.name in wide and "layers.0.self_attn" in worst.name
    for layer in report.layers:
        assert layer.details["input_error_at_8_bits"] < layer.details["input_error_at_6_bits"]


def test_input_errors_against_the_layer_itself():
    model, calibration = tiny(layers=1), tokens(samples=3)
    name = "model.layers.0.mlp.down_proj"
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = input_errors(model, [name], calibration, (4, 8), 32)[name]
    hook.remove()
    x, weight = torch.cat(seen).double(), model.get_submodule(name).weight.detach().double()
    for bits in (4, 8):
        moved = slow_blocks(x.float(), [bits] * 3, 32).double() - x
        expected = (moved @ weight.T).square().sum() / (x @ weight.T).square().sum()
        assert found[bits] == pytest.approx(float(expected), rel=1e-3)


def test_most_sensitive_stays_in_the_budget():
    errors, costs = {"a": 3.0, "b": 2.0, "c": 1.0}, {"a": 5.0, "b": 1.0, "c": 2.0}
    assert most_sensitive(errors, costs, 0.0) == set()
    assert most_sensitive(errors, costs, 0.4) == {"b", "c"}
    assert most_sensitive(errors, costs, 1.0) == {"a", "b", "c"}


def test_inputs_of_a_model_compressed_otherwise():
    model = tiny()
    rtn.apply(model, rtn.RTNConfig(bits=4, group_size=32))
    before = {name: m.dequantize() for name, m in model.named_modules() if isinstance(m, LinearWNA16)}
    made = quantize_inputs(model, 8, 32)
    assert made.keys() == before.keys() == layers_of(model).keys()
    assert all(torch.equal(layer.dequantize(), before[name]) for name, layer in made.items())
    with pytest.raises(ModelError, match="compress it first"):
        quantize_inputs(tiny(), 8, 32)


@pytest.mark.parametrize(
    "settings", [{"activation_bits": 9}, {"activation_bits": 8, "sensitive_bits": 6}, {"sensitive": "x"}]
)
def test_flexq_refuses(settings):
    with pytest.raises(InvalidArgument):
        FlexQConfig(**settings)


def test_flexq_auto_needs_tokens():
    with pytest.raises(InvalidArgument, match="calibration"):
        flexq.apply(tiny(), FlexQConfig(group_size=32, sensitive="auto"))


def test_outliers_are_gathered():
    magnitude = torch.ones(128)
    magnitude[::16] = 50
    order, bits = plan_inputs(magnitude, COMETConfig(group_size=16))
    assert bits.tolist() == [8] + [4] * 7
    assert set(order[:8].tolist()) == set(range(0, 128, 16))
    none, in_place = plan_inputs(magnitude, COMETConfig(group_size=16, permute=False))
    assert none is None and in_place.tolist() == [8] * 8
    for share, wide in ((0.0, 0), (0.16, 2), (1.0, 8)):
        for permute in (True, False):
            config = COMETConfig(group_size=16, wide_share=share, permute=permute)
            assert int((plan_inputs(magnitude, config)[1] == 8).sum()) == wide
    counts = [
        int((plan_inputs(magnitude.cumsum(0), COMETConfig(group_size=16, outlier_ratio=ratio))[1] == 8).sum())
        for ratio in (1.0, 1.5, 1.9, 3.0)
    ]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_comet_on_a_model_with_outliers(rounding):
    """Mixed widths repair what 4 bits everywhere break; the weight in its own order is the rounded one."""
    model, calibration = tiny(), tokens(8)
    with torch.no_grad():
        for block in model.model.layers:
            for norm, readers in (
                (
                    block.input_layernorm,
                    [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj],
                ),
                (block.post_attention_layernorm, [block.mlp.gate_proj, block.mlp.up_proj]),
            ):
                norm.weight[::23] *= 60
                for reader in readers:
                    reader.weight[:, ::23] /= 60
        wanted = model(calibration.tokens).logits
    errors = {}
    for name, share in (("mixed", None), ("four", 0.0)):
        other = copy.deepcopy(model)
        config = COMETConfig(group_size=16, wide_share=share, rounding=rounding)
        report = comet.apply(other, config, calibration)
        assert len(layers_of(other)) == len(report.layers) == 14
        for layer in report.layers:
            wide, blocks = layer.details["wide_blocks"], layer.details["blocks"]
            assert 0 <= wide <= blocks and layer.details["input_bits"] == pytest.approx(4 + 4 * wide / blocks)
        with torch.no_grad():
            found = other(calibration.tokens).logits
        errors[name] = float((found - wanted).norm() / wanted.norm())
    assert errors["mixed"] < 0.7 * errors["four"]


def test_rounding_follows_the_settings(generator):
    weight, x = torch.randn(8, 64, generator=generator), torch.randn(300, 64, generator=generator)
    gram, spec = x.T @ x / 300, QuantSpec(bits=3, group_size=32, symmetric=True)
    losses = {
        (rounding, clip): float(
            ((round_weight(weight, gram, spec, clip=clip, rounding=rounding).dequantize() - weight) @ x.T)
            .square()
            .sum()
        )
        for rounding in ("nearest", "gptq")
        for clip in (False, True)
    }
    assert losses["nearest", True] <= losses["nearest", False]
    assert losses["gptq", True] < losses["nearest", True]


@pytest.mark.parametrize("settings", [{"wide_share": 1.5}, {"outlier_ratio": 0.5}, {"rounding": "up"}])
def test_comet_refuses(settings):
    with pytest.raises(InvalidArgument):
        COMETConfig(**settings)


def test_saved_weights_are_those_of_the_layers(tmp_path):
    """What is written is weights alone, with the order as GPTQ's files have it."""
    import tensormill

    model, calibration = tiny(), tokens()
    comet.apply(model, COMETConfig(group_size=16), calibration)
    save_compressed(model, None, None, tmp_path / "saved")
    loaded = tensormill.load(str(tmp_path / "saved"))
    for name, layer in layers_of(model).items():
        torch.testing.assert_close(loaded.get_submodule(name).dequantize(torch.float32), layer.dequantize())

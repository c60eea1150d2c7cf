import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.compress.formats import QuantizedWeight, QuantSpec, fake_quantize, quantize_weight
from tensormill.errors import InvalidArgument

specs = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 1, 7, 16, 32, 1000]),
    symmetric=st.booleans(),
    scale_rule=st.sampled_from(["absmax/half_range", "absmax/qmax"]),
    scale_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    tail=st.just("smaller"),
)
shapes = st.tuples(st.integers(1, 9), st.sampled_from([1, 13, 32, 63, 100]))


def random_weight(shape: tuple[int, int], seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * spread


def per_column(quantized: QuantizedWeight, values: torch.Tensor) -> torch.Tensor:
    """Group values (N, G) repeated for each column."""
    columns = quantized.codes.shape[1]
    return values.repeat_interleave(quantized.spec.columns_per_group(columns), dim=1)[:, :columns]


def check_invariants(weight: torch.Tensor, quantized: QuantizedWeight) -> None:
    """Codes in range, read back as the definition says, and no weight further away than half a step."""
    spec = quantized.spec
    codes, scale = quantized.codes, per_column(quantized, quantized.scale.float())
    zero = quantized.zero_point
    zero = torch.tensor(float(2 ** (spec.bits - 1))) if zero is None else per_column(quantized, zero.float())
    assert codes.dtype == torch.uint8
    assert int(codes.max()) <= spec.max_code
    read = quantized.dequantize(torch.float32)
    assert torch.equal(read, (codes.float() - zero) * scale)
    low, high = (0 - zero) * scale, (spec.max_code - zero) * scale
    inside = weight.float().clamp(low, high)
    assert ((read - inside).abs() <= scale * 0.5 * (1 + 1e-4)).all()
    # What lies beyond the grid's ends comes from rounding zero point (half a step) and scale (half an ulp).
    kind = torch.finfo(quantized.scale.dtype)
    allowed = 0.51 * scale + spec.max_code * kind.eps * scale.clamp(min=kind.tiny)
    assert ((weight.float() - inside).abs() <= allowed).all()


@settings(max_examples=200, deadline=None)
@given(spec=specs, shape=shapes, seed=st.integers(0, 99), spread=st.sampled_from([1e-3, 1.0, 50.0]))
def test_weights_are_read_back_within_half_a_step(spec, shape, seed, spread):
    weight = random_weight(shape, seed, spread)
    check_invariants(weight, quantize_weight(weight, spec))


@settings(max_examples=100, deadline=None)
@given(spec=specs, shape=shapes, seed=st.integers(0, 99))
def test_what_was_read_back_keeps_its_value_on_the_same_grid(spec, shape, seed):
    quantized = quantize_weight(random_weight(shape, seed), spec)
    scale = per_column(quantized, quantized.scale.float())
    zero = quantized.zero_point
    zero = 2 ** (spec.bits - 1) if zero is None else per_column(quantized, zero.float())
    again = (quantized.dequantize(torch.float32) / scale).round() + zero
    assert torch.equal(again, quantized.codes.float())


@pytest.mark.parametrize("planted", ["scale", "code", "zero_point"])
def test_the_invariants_catch_a_planted_error(planted):
    weight = random_weight((4, 64), 1)
    good = quantize_weight(weight, QuantSpec(4, 32))
    parts = {"codes": good.codes.clone(), "scale": good.scale.clone(), "zero_point": good.zero_point.clone()}
    if planted == "scale":
        parts["scale"][2, 1] *= 1.1
    elif planted == "code":
        parts["codes"][1, 40] ^= 1
    else:
        parts["zero_point"][3, 0] += 1
    with pytest.raises(AssertionError):
        check_invariants(weight, QuantizedWeight(spec=good.spec, **parts))


def test_codes_are_computed_with_the_scale_as_stored():
    # The group's scale is 1 + 3/1024, which bfloat16 stores as 1: 7.515 must become code 8, not 7.
    weight = torch.tensor([[15 * (1 + 3 / 1024), 0.0, 7.515, 1.0]])
    quantized = quantize_weight(weight, QuantSpec(4, -1, scale_dtype=torch.bfloat16))
    assert quantized.scale.item() == 1
    assert quantized.codes.tolist() == [[15, 0, 8, 1]]


@pytest.mark.parametrize("rule", ["absmax/half_range", "absmax/qmax"])
def test_symmetric_scale_rules(rule):
    weight = torch.tensor([[-3.0, 1.0, 2.0, 0.0]])
    quantized = quantize_weight(weight, QuantSpec(4, -1, symmetric=True, scale_rule=rule))
    assert quantized.scale.item() == pytest.approx(3 / (7.5 if rule == "absmax/half_range" else 7))
    assert quantized.zero_point is None
    assert quantized.codes[0, 3] == 8


def test_a_group_of_one_sign_saturates_only_without_zero():
    weight = torch.tensor([[0.5, 0.6, 0.7, 0.8]])
    assert fake_quantize(weight, QuantSpec(4, -1)).sub(weight).abs().max() < 0.03
    narrow = fake_quantize(weight, QuantSpec(4, -1, include_zero=False))
    assert narrow.tolist() == [pytest.approx([0.3] * 4)]


def test_zeros_stay_zeros_and_tiny_scales_do_not_vanish():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        weight = torch.zeros(2, 32, dtype=dtype)
        weight[1] = torch.finfo(dtype).tiny
        for symmetric in (False, True):
            quantized = quantize_weight(weight, QuantSpec(4, 32, symmetric))
            assert (quantized.scale > 0).all()
            assert (quantized.dequantize()[0] == 0).all()


def test_scales_below_the_normal_numbers_of_float16_keep_their_precision():
    weight = random_weight((8, 64), 0, 1e-3)
    rounded = fake_quantize(weight, QuantSpec(8, 64, scale_dtype=torch.float16))
    exact = fake_quantize(weight, QuantSpec(8, 64))
    assert (rounded - weight).norm() < 1.2 * (exact - weight).norm()


def test_clip_clamps_before_rounding():
    weight = random_weight((3, 64), 0)
    clip = torch.full((3, 2), 0.5)
    expected = quantize_weight(weight.clamp(-0.5, 0.5), QuantSpec(3, 32))
    clipped = quantize_weight(weight, QuantSpec(3, 32), clip)
    assert torch.equal(clipped.codes, expected.codes)
    with pytest.raises(InvalidArgument, match=r"expected \(3, 2\)"):
        quantize_weight(weight, QuantSpec(3, 32), torch.ones(3, 1))


def test_ragged_tail_is_a_smaller_group():
    weight = random_weight((5, 100), 0)
    whole = quantize_weight(weight, QuantSpec(4, 32, tail="smaller"))
    tail = quantize_weight(weight[:, 96:], QuantSpec(4, -1))
    assert whole.scale.shape == (5, 4)
    assert torch.equal(whole.codes[:, 96:], tail.codes)
    assert torch.equal(whole.scale[:, 3:], tail.scale)


def test_a_group_size_that_does_not_divide_names_those_that_do():
    with pytest.raises(InvalidArgument, match=r"group_size=128 .* 96 input features.*\[16, 24, 32, 48, -1\]"):
        quantize_weight(torch.ones(2, 96), QuantSpec(4, 128))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = torch.ones(4, 32)
    weight[3, 5] = bad
    with pytest.raises(InvalidArgument, match="NaN or infinity"):
        quantize_weight(weight, QuantSpec(4, 32))


def test_a_scale_too_large_for_its_dtype_is_refused():
    with pytest.raises(InvalidArgument, match=r"overflows torch\.float16"):
        quantize_weight(torch.full((1, 32), 1e7), QuantSpec(4, 32, scale_dtype=torch.float16))


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 1},
        {"bits": 9},
        {"bits": 4.0},
        {"bits": 4, "group_size": 0},
        {"bits": 4, "scale_rule": "max"},
        {"bits": 4, "tail": "pad"},
        {"bits": 4, "scale_dtype": torch.int8},
    ],
)
def test_specs_out_of_range_are_refused(arguments):
    with pytest.raises(InvalidArgument, match="expected"):
        QuantSpec(**arguments)


def test_bits_per_weight():
    assert QuantSpec(4, 128, symmetric=True).bits_per_weight(4096) == 4.125
    assert QuantSpec(4, 128).bits_per_weight(4096) == 4 + 20 / 128
    assert QuantSpec(3, 32, scale_dtype=torch.float32).bits_per_weight(32) == 3 + 35 / 32


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_agrees_with_compressed_tensors(bits, symmetric):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args = quantization.QuantizationArgs(
        num_bits=bits, type="int", strategy="group", group_size=32, symmetric=symmetric
    )
    weight = random_weight((16, 128), bits)
    groups = weight.unflatten(1, (4, 32))
    scale, zero = helpers.calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    expected = lifecycle.fake_quantize(weight, scale, zero, args)
    quantized = quantize_weight(weight, QuantSpec(bits, 32, symmetric))
    assert torch.allclose(quantized.scale, scale, rtol=1e-6)
    if not symmetric:
        assert torch.equal(quantized.zero_point.int(), zero.int() + 2 ** (bits - 1))
    assert torch.allclose(quantized.dequantize(), expected, atol=1e-6)

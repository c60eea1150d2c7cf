import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, tiny_model, tokens

from tensormill.compress.calibration import Calibration
from tensormill.compress.formats import QuantSpec, quantize_weight
from tensormill.compress.formats.quantization import group_grid
from tensormill.compress.gptq import GPTQConfig, apply, gptq_quantize, inverse_factor, ordered_factor
from tensormill.compress.output_error import output_error
from tensormill.errors import InvalidArgument
from tensormill.ops.linear_wna16.module import LinearWNA16


def correlated_gram(features: int, seed: int = 0, rank: int = 8) -> torch.Tensor:
    """Of inputs that vary mostly in a few directions, as a language model's do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1000, rank, generator=generator) @ torch.randn(rank, features, generator=generator)
    x += 0.3 * torch.randn(1000, features, generator=generator)
    return x.T @ x / len(x)


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(weight: torch.Tensor, quantized, gram: torch.Tensor) -> float:
    return output_error(weight, quantized.dequantize(torch.float32), gram)


def optimal_brain_quantization(
    weight: torch.Tensor, gram: torch.Tensor, spec: QuantSpec, clip: bool
) -> torch.Tensor:
    """The definition, in float64: round a column, move the later ones to their optimum, and so on.

    With `clip`, a group's range is the one of the search's candidates with the least loss, errors absorbed.
    """
    columns = weight.shape[1]
    size = spec.columns_per_group(columns)
    hessian = gram.double() + 0.01 * gram.diagonal().mean().double() * torch.eye(columns, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[column:, column:]) for column in range(columns)]
    remaining, result = weight.double().clone(), torch.empty_like(weight)
    for column in range(columns):
        if column % size == 0:
            ahead = remaining[:, column : column + size]
            loss = torch.tensor([1 / inverse[0, 0] for inverse in inverses[column : column + size]])
            largest = ahead.abs().amax(dim=1, keepdim=True)
            best = torch.full((len(weight), 1), torch.inf, dtype=torch.float64)
            for step in range(28 if clip else 1):
                limit = largest * (1 - step / 40)
                scale, zero = group_grid(ahead.clamp(-limit, limit).float(), spec)
                codes = ((ahead / scale).round() + zero).clamp(0, spec.max_code)
                lost = (((codes - zero) * scale - ahead).square() * loss).sum(dim=1, keepdim=True)
                if step == 0:
                    scales, zeros = scale, zero
                scales, zeros = torch.where(lost < best, scale, scales), torch.where(lost < best, zero, zeros)
                best = torch.minimum(best, lost)
        current = remaining[:, column]
        codes = ((current.float() / scales[:, 0]).round() + zeros[:, 0]).clamp(0, spec.max_code)
        result[:, column] = (codes - zeros[:, 0]) * scales[:, 0]
        inverse = inverses[column]
        move = (current - result[:, column]) / inverse[0, 0]
        remaining[:, column:] -= move[:, None] * inverse[0]
    return result


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("group_size", [16, 32, 48, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_is_optimal_brain_quantization_in_order(group_size, symmetric, clip):
    weight, gram = random_weight(24, 96), correlated_gram(96)
    spec = QuantSpec(4, group_size, symmetric)
    found = gptq_quantize(weight, gram, spec, clip=clip).dequantize()
    expected = optimal_brain_quantization(weight, gram, spec, clip)
    # Rounding decides within float32's error of a tie now and then, always of the zero point of a range that is cut
    # at both ends; a wrong update moves most of the codes.
    ties = clip and not symmetric
    assert torch.isclose(found, expected, atol=1e-4).float().mean() > (0.85 if ties else 0.97)
    assert output_error(weight, found, gram) == pytest.approx(output_error(weight, expected, gram), rel=0.05)


@pytest.mark.parametrize(
    ("features", "group_size"), [(300, 128), (300, 100), (513, -1), (260, 32), (100, 256)]
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_it_beats_rounding_on_correlated_inputs(features, group_size, bits):
    weight, gram = random_weight(32, features), correlated_gram(features)
    spec = QuantSpec(bits, group_size, tail="smaller")
    rounded = error(weight, quantize_weight(weight, spec), gram)
    assert error(weight, gptq_quantize(weight, gram, spec), gram) < 0.6 * rounded
    assert error(weight, gptq_quantize(weight, gram, spec, act_order=True), gram) < 0.6 * rounded


@settings(max_examples=40, deadline=None)
@given(
    features=st.integers(1, 200),
    group_size=st.sampled_from([-1, 16, 32, 128]),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    scale=st.floats(1e-4, 1e4),
)
def test_with_independent_inputs_it_is_rounding(features, group_size, bits, symmetric, act_order, scale):
    weight = random_weight(5, features)
    spec = QuantSpec(bits, group_size, symmetric, tail="smaller")
    found = gptq_quantize(weight, scale * torch.eye(features), spec, act_order=act_order, clip=False)
    expected = quantize_weight(weight, spec)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    if not symmetric:
        assert torch.equal(found.zero_point, expected.zero_point)


def test_dead_columns_are_rounded_and_disturb_nothing():
    weight, gram = random_weight(8, 96), correlated_gram(96)
    dead = torch.tensor([0, 17, 95])
    gram[dead] = 0
    gram[:, dead] = 0
    for act_order in (False, True):
        quantized = gptq_quantize(weight, gram, QuantSpec(4, 32), act_order=act_order, clip=False)
        step = quantized.scale.repeat_interleave(32, dim=1)[:, dead]
        assert ((quantized.dequantize() - weight)[:, dead].abs() <= step * 0.501 + 1e-6).all()
        assert error(weight, quantized, gram) < error(weight, quantize_weight(weight, QuantSpec(4, 32)), gram)
    silent = gptq_quantize(weight, torch.zeros(96, 96), QuantSpec(4, 32), clip=False)
    assert torch.equal(silent.codes, quantize_weight(weight, QuantSpec(4, 32)).codes)


def test_rows_are_independent():
    weight, gram = random_weight(10, 160), correlated_gram(160)
    together = gptq_quantize(weight, gram, QuantSpec(3, 32)).codes
    apart = torch.cat([gptq_quantize(rows, gram, QuantSpec(3, 32)).codes for rows in weight.split(4)])
    assert (together == apart).float().mean() > 0.999


def test_the_order_of_columns_leaves_groups_in_place():
    weight, gram = random_weight(4, 128), correlated_gram(128)
    gram *= torch.outer(*[torch.linspace(0.1, 3, 128)] * 2)
    quantized = gptq_quantize(weight, gram, QuantSpec(4, 32), act_order=True, clip=False)
    plain = quantize_weight(weight, QuantSpec(4, 32))
    assert torch.equal(quantized.scale, plain.scale)
    assert torch.equal(quantized.zero_point, plain.zero_point)


@pytest.mark.parametrize("features", [1, 5, 64])
def test_the_factor_belongs_to_the_inverse(features):
    gram = correlated_gram(features)
    factor = inverse_factor(gram, 0.01).double()
    regular = gram.double() + 0.01 * gram.diagonal().mean().double() * torch.eye(features)
    assert torch.allclose(factor, factor.triu())
    assert torch.allclose(factor.T @ factor @ regular, torch.eye(features, dtype=torch.float64), atol=1e-4)


@pytest.mark.parametrize("act_order", [False, True])
def test_an_error_costs_the_variance_given_later_columns(act_order):
    """By Schur complements, in float64; and so much of GPTQ's own errors remains in the output."""
    torch.manual_seed(0)
    x = torch.randn(200, 24) @ torch.randn(24, 24)
    gram = x.T @ x / len(x)
    order, _, variance = ordered_factor(gram, 1e-8, act_order)
    assert sorted(order.tolist()) == list(range(24))
    assert not act_order or (gram.diagonal()[order].diff() <= 0).all()
    exact = gram.double() + 1e-8 * gram.diagonal().double().mean() * torch.eye(24)
    for place, column in enumerate(order.tolist()):
        later = order[place + 1 :]
        explained = exact[column, later] @ torch.linalg.solve(exact[later][:, later], exact[later, column])
        expected = exact[column, column] - explained
        assert variance[column].item() == pytest.approx(expected.item(), rel=2e-3)


def test_a_singular_gram_matrix_is_damped_until_it_works():
    gram = torch.ones(300, 300)
    gram[0, 0] -= 0.5  # Rounding of long sums leaves slightly negative eigenvalues.
    assert inverse_factor(gram, 1e-8).isfinite().all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_lose_less_than_by_rounding(architecture, dtype):
    model = tiny_model(architecture, dtype=dtype)
    report = apply(model, GPTQConfig(bits=3, group_size=32), Calibration(tokens(32)))
    assert len(report.layers) == (12 if architecture == "opt" else 14)
    assert all(layer.nmse < layer.loss_rtn for layer in report.layers)
    assert not any(type(part) is torch.nn.Linear for part in model.get_submodule(_blocks(model)).modules())
    assert model(tokens()).logits.isfinite().all()
    assert model(tokens()).logits.dtype == dtype


def _blocks(model: torch.nn.Module) -> str:
    return next(name for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList))


@pytest.mark.parametrize("settings", [{"act_order": True}, {"true_sequential": True}, {"inputs": "original"}])
def test_variants_lose_less_than_rounding_too(settings):
    report = apply(
        tiny_model("mistral"), GPTQConfig(bits=3, group_size=32, **settings), Calibration(tokens(32))
    )
    assert sum(layer.nmse for layer in report.layers) < 0.8 * sum(layer.loss_rtn for layer in report.layers)


def test_ragged_groups():
    model = tiny_model("llama")
    report = apply(model, GPTQConfig(bits=4, group_size=40, tail="smaller"), Calibration(tokens(32)))
    assert all(layer.nmse < layer.loss_rtn for layer in report.layers)
    assert isinstance(model.model.layers[0].mlp.down_proj, LinearWNA16)


@pytest.mark.parametrize(
    "settings",
    [
        {"damping": 0.0},
        {"inputs": "both"},
        {"true_sequential": True, "inputs": "original"},
        {"clip": "maybe"},
        {"clip_grid": 0},
        {"clip_max_shrink": 1.5},
        {"symmetric": 1},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(InvalidArgument, match="expected"):
        GPTQConfig(**settings)

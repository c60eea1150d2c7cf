import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, Block, BlockModel, OnePlusNorm, tiny_model, tokens
from torch import nn

from tensormill.compress.awq import (
    AWQConfig,
    apply,
    candidate_scales,
    golden_section,
    search_scales,
    weight_magnitude,
)
from tensormill.compress.block_calls import BlockCall
from tensormill.compress.calibration import Calibration, inject_outliers, stream_blocks
from tensormill.compress.clipping import gram_blocks, keep_helpful_rows, search_clip
from tensormill.compress.formats import QuantSpec, fake_quantize
from tensormill.compress.output_error import (
    gram_loss,
    module_loss,
    output_error,
    sample_loss,
    squared_outputs,
)
from tensormill.compress.structure import discover
from tensormill.errors import InvalidArgument, ModelError
from tensormill.ops.linear_wna16.module import LinearWNA16


def outlier_inputs(features: int = 96, count: int = 400, seed: int = 0) -> torch.Tensor:
    """(count, features), some channels far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator)
    return x * (1 + 30 * (torch.rand(features, generator=generator) > 0.95))


def random_weight(rows: int = 24, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def gram_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


SPEC = QuantSpec(4, 32)


@pytest.mark.parametrize("panel", [1, 40, 96, 200])
@pytest.mark.parametrize("shape", [(24,), (1,), (3, 5)])
def test_outputs_are_squared_in_panels_too(panel, shape, monkeypatch):
    monkeypatch.setattr("tensormill.compress.output_error._PANEL", {"cpu": panel})
    x = outlier_inputs().double()
    weight = torch.randn(*shape, 96, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    before = weight.clone()
    expected = (weight @ x.T).square().mean(dim=-1)
    assert torch.allclose(squared_outputs(weight, gram_of(x)), expected, rtol=1e-10)
    assert torch.equal(weight, before)


def test_scales_follow_the_papers_formula():
    x_mean, w_mean = torch.tensor([1.0, 4.0, 16.0]), torch.tensor([0.5, 0.25, 1.0])
    plain = candidate_scales(x_mean, w_mean, torch.tensor([0.0, 0.5, 1.0]), duo=False)
    assert torch.allclose(plain, torch.tensor([[1.0, 1, 1], [0.5, 1, 2], [0.25, 1, 4]]))
    duo = candidate_scales(x_mean, w_mean, torch.tensor([0.5]), duo=True)[0]
    raw = x_mean.sqrt() / (w_mean.sqrt() + 1e-4)
    assert torch.allclose(duo, raw / (raw.max() * raw.min()).sqrt())


def test_scales_of_silent_channels_are_finite():
    for x_mean in (torch.zeros(4), torch.tensor([0.0, 1e-30, 1.0, 1e30])):
        for duo in (False, True):
            scales = candidate_scales(x_mean, torch.zeros(4), torch.linspace(0, 1, 5), duo)
            assert scales.isfinite().all()
            assert (scales > 0).all()


def test_with_both_terms_scales_undo_a_rescaled_channel():
    generator = torch.Generator().manual_seed(0)
    x_mean, w_mean = torch.rand(32, generator=generator) + 0.1, torch.rand(32, generator=generator) + 0.1
    factor = 2.0 ** torch.randint(-3, 4, (32,), generator=generator)
    before = candidate_scales(x_mean, w_mean, torch.linspace(0, 1, 9), duo=True)
    after = candidate_scales(x_mean * factor, w_mean / factor, torch.linspace(0, 1, 9), duo=True) / factor
    ratio = after / before
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=5e-3)


def test_weight_magnitude_is_relative_to_the_group():
    weight = torch.tensor([[1.0, 2.0, 30.0, 60.0], [-4.0, 1.0, 0.0, 0.0]])
    found = weight_magnitude([weight[:1], weight[1:]], QuantSpec(4, 2))
    assert torch.allclose(found, torch.tensor([0.75, 0.625, 0.25, 0.5]))


@settings(max_examples=30, deadline=None)
@given(
    columns=st.sampled_from([32, 63, 96]),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group_size=st.sampled_from([16, 32, -1]),
)
def test_gram_loss_is_the_explicit_loss(columns, bits, symmetric, group_size):
    x, weights = outlier_inputs(columns), [random_weight(8, columns), random_weight(5, columns, 1)]
    spec = QuantSpec(bits, group_size, symmetric, tail="smaller")
    scales = torch.rand(3, columns, generator=torch.Generator().manual_seed(2)) + 0.5
    by_gram = gram_loss(weights, gram_of(x), spec)(scales)
    by_samples = sample_loss(weights, x, spec)(scales)
    for index, scale in enumerate(scales):
        explicit = sum(
            ((x.double() @ (fake_quantize(w * scale, spec).double() / scale - w.double()).T) ** 2).sum()
            / ((x.double() @ w.double().T) ** 2).sum()
            for w in weights
        )
        assert by_gram[index].item() == pytest.approx(explicit.item(), rel=1e-3)
        assert by_samples[index].item() == pytest.approx(explicit.item(), rel=1e-3)


def test_gram_loss_does_not_depend_on_its_chunks(monkeypatch):
    x, weights = outlier_inputs(), [random_weight()]
    scales = torch.rand(5, 96) + 0.5
    whole = gram_loss(weights, gram_of(x), SPEC)(scales)
    for limit in (1, 96 * 7, 96 * 24 * 2):
        monkeypatch.setattr("tensormill.compress.output_error._SEARCH_NUMBERS", {"cpu": limit})
        assert torch.allclose(gram_loss(weights, gram_of(x), SPEC)(scales), whole, rtol=1e-4)
        with monkeypatch.context() as patch:  # several candidates at once, as on a GPU
            patch.setattr("tensormill.compress.output_error._CANDIDATES", {"cpu": 4})
            assert torch.allclose(gram_loss(weights, gram_of(x), SPEC)(scales), whole, rtol=1e-4)


def test_scales_are_judged_by_what_later_columns_leave():
    """With conditional variances the loss is the sum of d^2 times them; on a GPU's chunks, too."""
    x, weights = outlier_inputs(), [random_weight(), random_weight(5, 96, 1)]
    scales, variances = torch.rand(5, 96) + 0.5, [torch.rand(96), torch.rand(96)]
    found = gram_loss(weights, gram_of(x), SPEC, None, variances)(scales)
    for index, scale in enumerate(scales):
        explicit = sum(
            ((fake_quantize(w * scale, SPEC).double() / scale - w.double()) ** 2 @ variance.double()).sum()
            / ((x.double() @ w.double().T) ** 2).sum()
            * len(x)
            for w, variance in zip(weights, variances, strict=True)
        )
        assert found[index].item() == pytest.approx(explicit.item(), rel=1e-3)


def test_the_module_objective_is_the_linears_if_nothing_follows():
    linear = nn.Linear(96, 24)
    x = outlier_inputs()
    scales = torch.rand(2, 96) + 0.5
    by_module = module_loss(linear, [linear], [BlockCall((x,), {})], SPEC)
    with torch.no_grad():
        weight = linear.weight.data.clone()
        relative = by_module(scales) / (x @ weight.T).square().sum(1).mean()
        assert torch.allclose(relative, sample_loss([weight], x, SPEC)(scales), rtol=1e-3)
    assert torch.equal(linear.weight.data, weight)


@pytest.mark.parametrize("duo_scaling", [False, True, "both"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_search_never_loses_to_rounding_and_wins_with_outliers(duo_scaling, bits):
    x, weight, spec = outlier_inputs(), random_weight(), QuantSpec(bits, 32)
    loss = gram_loss([weight], gram_of(x), spec)
    found = search_scales(
        x.abs().mean(0), weight_magnitude([weight], spec), loss, duo_scaling=duo_scaling, refine=6
    )
    assert found.loss_identity == pytest.approx(loss(torch.ones(1, 96)).item())
    assert found.loss == pytest.approx(loss(found.scale[None]).item())
    assert found.loss == min(value for _, _, value in found.curve)
    assert found.loss < 0.7 * found.loss_identity
    assert len(found.curve) == {False: 20, True: 21, "both": 40}[duo_scaling] + 6


def test_nothing_is_scaled_where_nothing_helps():
    # A loss that any scaling raises, whatever the grid: as with so many bits that rounding is exact.
    found = search_scales(
        torch.rand(16) + 0.1,
        torch.rand(16) + 0.1,
        lambda scales: (scales.log().square().sum(1)).sqrt(),
    )
    assert torch.equal(found.scale, torch.ones(16))
    assert (found.exponent, found.loss) == (0.0, 0.0)


def test_refinement_comes_closer_to_the_optimum():
    x_mean = torch.tensor([1.0, 16.0])

    def loss(scales: torch.Tensor) -> torch.Tensor:
        exponent = (scales[:, 1] / scales[:, 0]).log() / math.log(16)
        return (exponent - 0.333).square()

    coarse = search_scales(x_mean, torch.ones(2), loss, duo_scaling=False, refine=0)
    fine = search_scales(x_mean, torch.ones(2), loss, duo_scaling=False, refine=10)
    assert coarse.exponent == pytest.approx(0.35)
    assert fine.exponent == pytest.approx(0.333, abs=2e-3)


def test_golden_section_narrows_to_the_minimum():
    seen = []

    def function(r: float) -> float:
        seen.append(r)
        return (r - 0.42) ** 2

    golden_section(function, 0.0, 1.0, 12)
    assert len(seen) == 12
    assert seen[-1] == pytest.approx(0.42, abs=0.01)


def explicit_clip(weight: torch.Tensor, x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Section 3.3 of the note in loops: every row, group and candidate by itself."""
    size = spec.columns_per_group(weight.shape[1])
    clip = torch.empty(len(weight), spec.num_groups(weight.shape[1]))
    alone = QuantSpec(spec.bits, -1, spec.symmetric)
    for n, row in enumerate(weight):
        for g, group in enumerate(row.split(size)):
            inputs = x[:, g * size : g * size + len(group)]
            largest = group.abs().max()
            errors = []
            for step in range(10):
                limit = largest * (1 - step / 20)
                d = fake_quantize(group.clamp(-limit, limit)[None], alone)[0] - group
                errors.append((inputs @ d).square().mean())
            clip[n, g] = largest * (1 - torch.stack(errors).argmin().item() / 20)
    return clip


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("columns", [96, 80])
def test_clip_search_is_the_search_of_every_group(bits, columns):
    x, weight, spec = outlier_inputs(columns), random_weight(7, columns), QuantSpec(bits, 32, tail="smaller")
    found = search_clip(weight, gram_blocks(gram_of(x), spec), spec, clip_grid=20, clip_max_shrink=0.5)
    assert torch.allclose(found, explicit_clip(weight, x, spec), rtol=1e-4)


def test_clipping_never_raises_a_groups_error_nor_a_rows():
    x, weight, spec = outlier_inputs(), random_weight(), QuantSpec(3, 32)
    gram = gram_of(x)
    blocks = gram_blocks(gram, spec)
    clip = search_clip(weight, blocks, spec)
    largest = weight.unflatten(1, (3, 32)).abs().amax(-1)
    assert (clip <= largest).all()
    assert (clip >= 0.3 * largest).all()

    def group_errors(limit: torch.Tensor) -> torch.Tensor:
        d = (fake_quantize(weight, spec, limit) - weight).unflatten(1, (3, 32))
        return torch.einsum("ngi,gij,ngj->ng", d, blocks, d)

    assert (group_errors(clip) <= group_errors(largest) * (1 + 1e-5)).all()
    assert group_errors(clip).sum() < 0.9 * group_errors(largest).sum()

    def row_errors(limit: torch.Tensor) -> torch.Tensor:
        d = fake_quantize(weight, spec, limit) - weight
        return ((d @ gram) * d).sum(1)

    kept = keep_helpful_rows(weight, clip, gram, spec)
    assert (row_errors(kept) <= row_errors(largest) * (1 + 1e-5)).all()
    assert (row_errors(kept) <= row_errors(clip) * (1 + 1e-5)).all()


def total(report, field: str = "nmse") -> float:
    return sum(getattr(layer, field) for layer in report.layers)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_lose_less_than_by_rounding(architecture, dtype):
    model = tiny_model(architecture, dtype=dtype)
    before = {name: parameter.dtype for name, parameter in model.named_parameters()}
    inject_outliers(model, 0.03, 16.0)
    report = apply(model, AWQConfig(bits=4, group_size=32), Calibration(tokens(16)))
    # Linears that share scales can lose a little for one another; the sum can't.
    assert total(report) < 0.7 * total(report, "loss_rtn")
    for name, part in model.named_modules():
        assert type(part) is not nn.Linear or name == "lm_head"
        if isinstance(part, LinearWNA16):
            assert part.weight_scale.dtype == dtype
    assert all(parameter.dtype == before.get(name, dtype) for name, parameter in model.named_parameters())
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_absorbing_errors_loses_less_than_rounding_to_nearest(symmetric):
    model = tiny_model("qwen2")
    inject_outliers(model, 0.03, 16.0)
    errors = {}
    for rounding, act_order in (("nearest", True), ("gptq", False), ("gptq", True)):
        config = AWQConfig(bits=3, group_size=32, symmetric=symmetric, rounding=rounding, act_order=act_order)
        errors[rounding, act_order] = total(apply(copy.deepcopy(model), config, Calibration(tokens(16))))
    for act_order in (False, True):
        assert errors["gptq", act_order] < 0.9 * errors["nearest", True]


def test_reported_errors_are_those_of_the_compressed_layers():
    model = tiny_model("qwen2")
    original, batch = copy.deepcopy(model), Calibration(tokens(16))
    report = apply(model, AWQConfig(bits=4, group_size=32), batch)
    errors = {layer.name: layer.nmse for layer in report.layers}
    readers = {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"}
    for block in stream_blocks(original, discover(original), batch):
        statistics = block.observe()
        for name, norm in readers.items():
            old, new = (which.get_submodule(block.name) for which in (original, model))
            scale = (old.get_submodule(norm).weight / new.get_submodule(norm).weight).detach()
            found = output_error(
                old.get_submodule(name).weight.detach(),
                new.get_submodule(name).dequantize(torch.float32) / scale,
                statistics[name].gram,
            )
            assert found == pytest.approx(errors[block.full_name(name)], rel=1e-3)


def test_a_rescaled_channel_costs_nothing():
    clean = tiny_model("llama")
    injected = copy.deepcopy(clean)
    inject_outliers(injected, 0.05, 64.0)
    batch = Calibration(tokens(16))
    config = AWQConfig(bits=4, group_size=32)
    reports = [apply(model, config, batch) for model in (clean, injected)]
    assert total(reports[1], "loss_rtn") > 1.3 * total(reports[0], "loss_rtn")
    assert total(reports[1]) < 1.1 * total(reports[0])


@pytest.mark.parametrize("objective", ["gram", "linear", "module"])
@pytest.mark.parametrize("architecture", ["mistral", "opt"])
def test_objectives(objective, architecture):
    model = tiny_model(architecture)
    inject_outliers(model, 0.05, 32.0)
    config = AWQConfig(bits=4, group_size=32, objective=objective, n_grid=8, refine=0)
    report = apply(model, config, Calibration(tokens(16)))
    assert total(report) < 0.6 * total(report, "loss_rtn")


def test_the_curve_of_the_search_is_reported():
    report = apply(
        tiny_model("llama"), AWQConfig(bits=3, group_size=32, n_grid=5, refine=0), Calibration(tokens())
    )
    details = {layer.name: layer.details for layer in report.layers}
    query = details["model.layers.0.self_attn.q_proj"]
    assert query["producer"] == "input_layernorm"
    assert len(query["curve"]) == 10
    assert query["loss_over_rtn"] == min(loss for _, _, loss in query["curve"]) <= 1
    assert details["model.layers.0.self_attn.k_proj"]["scaled_with"] == "self_attn.q_proj"
    assert 0 < details["model.layers.0.mlp.down_proj"]["clipped_groups"] <= 1
    import json

    json.dumps(report.to_dict())


def test_query_and_key_are_clipped_unless_told_not_to():
    for asked in (False, True):
        report = apply(
            tiny_model("llama"), AWQConfig(bits=3, group_size=32, clip_scores=asked), Calibration(tokens())
        )
        clipped = {
            layer.name.rpartition(".")[2] for layer in report.layers if "clipped_groups" in layer.details
        }
        assert clipped >= {"v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"}
        assert ({"q_proj", "k_proj"} <= clipped) == asked


def test_skipped_layers_keep_the_function():
    model = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        before = model(tokens()).logits
    config = AWQConfig(bits=8, group_size=32, only=["k_proj", "down_proj"])
    report = apply(model, config, Calibration(tokens()))
    assert len(report.layers) == 4
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    with torch.no_grad():
        after = model(tokens()).logits
    assert (after - before).norm() / before.norm() < 0.05


def test_one_plus_weight_norms():
    torch.manual_seed(0)
    model = BlockModel(*(Block(nn.ReLU(), OnePlusNorm()) for _ in range(2)))
    reference = copy.deepcopy(model)
    apply(model, AWQConfig(bits=8, group_size=32), Calibration(tokens(16)))
    assert not torch.equal(model.blocks[0].norm.weight, reference.blocks[0].norm.weight)
    with torch.no_grad():
        a, b = model(tokens()), reference(tokens())
    assert (a - b).norm() / b.norm() < 0.02


def test_a_model_without_edges_tells_the_graph_and_the_way_out():
    model = BlockModel(Block(nn.GELU(), nn.Identity()))
    with pytest.raises(ModelError, match=r"found blocks\.0: no edge.*first; second.*pass mappings="):
        apply(model, AWQConfig(group_size=32), Calibration(tokens()))


def test_mappings_by_hand():
    mappings = [{"producer": "input_layernorm", "consumers": [f"self_attn.{name}_proj" for name in "qkv"]}]
    report = apply(
        tiny_model("llama"), AWQConfig(group_size=32, mappings=mappings, clip=False), Calibration(tokens())
    )
    scaled = [layer.name for layer in report.layers if "producer" in layer.details]
    assert scaled == [f"model.layers.{index}.self_attn.q_proj" for index in range(2)]


@pytest.mark.parametrize(
    "settings",
    [
        {"n_grid": 0},
        {"refine": 1},
        {"refine": -1},
        {"duo_scaling": "half"},
        {"objective": "block"},
        {"rounding": "stochastic"},
        {"damping": 0.0},
        {"clip_max_shrink": 1.0},
        {"clip_grid": 0},
        {"mappings": "llama"},
        {"mappings": []},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(InvalidArgument, match="expected"):
        AWQConfig(**settings)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_built_in_model_loses_less_than_by_rounding():
    transformers = pytest.importorskip("transformers")
    from tensormill.compress.rtn import RTNConfig
    from tensormill.compress.rtn import apply as round_to_nearest
    from tensormill.data import python_source
    from tensormill.models import python_lm

    tokenizer = transformers.AutoTokenizer.from_pretrained(python_lm.path())
    original = transformers.AutoModelForCausalLM.from_pretrained(python_lm.path(), dtype=torch.bfloat16)
    batch = Calibration.from_text(python_source.calibration_text(), tokenizer, samples=32, length=256)
    held_out = "\n\n".join(python_source.heldout_text().values())
    windows = Calibration.from_text(held_out, tokenizer, samples=32, length=256).tokens

    @torch.no_grad()
    def window_losses(model: nn.Module) -> torch.Tensor:
        logits = copy.deepcopy(model).float()(windows).logits[:, :-1]
        return nn.functional.cross_entropy(logits.mT, windows[:, 1:], reduction="none").mean(1)

    rounded, injected = copy.deepcopy(original), copy.deepcopy(original)
    inject_outliers(injected.float(), 0.01, (8.0, 64.0))
    injected.to(torch.bfloat16)
    rounded_injected = copy.deepcopy(injected)
    losses = {"original": window_losses(original)}
    for name, model in {"rounded": rounded, "rounded, outliers": rounded_injected}.items():
        round_to_nearest(model, RTNConfig(bits=3), None)
        losses[name] = window_losses(model)
    for name, model in {"awq": original, "awq, outliers": injected}.items():
        apply(model, AWQConfig(bits=3), batch)
        losses[name] = window_losses(model)
    gain = losses["rounded"] - losses["awq"]
    assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5
    gap = (losses["rounded, outliers"] - losses["original"]).mean()
    assert (losses["rounded, outliers"] - losses["awq, outliers"]).mean() > 0.35 * gap

"""The measuring code of AWQ's claims: what is chosen, rounded and counted, against slow obvious versions."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tensormill.compress import peers
from tensormill.compress.calibration import Calibration
from tensormill.compress.evaluate import Evaluation
from tensormill.compress.formats.quantization import QuantSpec, fake_quantize
from tensormill.errors import InvalidArgument, ModelError
from tensormill.models.decoding import dense_copy, random_llama
from tensormill.models.decoding.synthetic import Shape
from tensormill.papers.awq import decoding, robustness, search_cost
from tensormill.papers.awq.quality import QualityComparison, shortfalls
from tensormill.papers.awq.robustness import difference_of_rises, rise
from tensormill.papers.awq.salience import (
    StepChanges,
    changed_weights,
    round_but,
    round_scaled,
    salient_channels,
    step_changes,
)
from tensormill.papers.awq.subjects import docstrings, english_text
from tensormill.papers.catalogue import Run, find_paper


@pytest.fixture(params=range(3))
def generator(request):
    return torch.Generator().manual_seed(request.param + 100)


def evaluation(window_nll):
    return Evaluation(float(window_nll.mean().exp()), 0.0, 100, 100, window_nll.double())


def test_every_claim_is_there_in_order():
    assert list(find_paper("awq").claims) == ["C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8"]


@pytest.mark.parametrize(
    ("channels", "fraction", "count"), [(384, 0.01, 4), (100, 0.01, 1), (13, 0.01, 1), (7, 0.5, 4)]
)
def test_salient_channels_are_the_largest(channels, fraction, count, generator):
    score = torch.rand(channels, generator=generator)
    chosen = salient_channels(score, fraction)
    assert len(chosen) == count == len(set(chosen.tolist()))
    rest = [index for index in range(channels) if index not in set(chosen.tolist())]
    assert score[chosen].min() >= score[rest].max()


def test_round_but_spares_the_channels_and_no_others(generator):
    weight = torch.randn(5, 50, generator=generator)
    spec = QuantSpec(bits=3, group_size=16, tail="smaller")
    before, channels = weight.clone(), torch.tensor([0, 17, 49])
    found, rounded = round_but(weight, channels, spec), fake_quantize(weight, spec)
    for column in range(50):
        expected = weight if column in (0, 17, 49) else rounded
        assert torch.equal(found[:, column], expected[:, column])
    assert torch.equal(weight, before)


def slow_step_changes(weight, channels, scale, bits, group):
    """Group by group, in Python's own floats."""
    changed = counted = with_channel = 0
    ratios, ratios_with_channel = 0.0, 0.0
    for row in weight.tolist():
        for start in range(0, len(row), group):
            columns = range(start, min(start + group, len(row)))
            before = [row[column] for column in columns]
            after = [row[column] * (scale if column in channels else 1) for column in columns]
            steps = [(max(0, *values) - min(0, *values)) / (2**bits - 1) for values in (before, after)]
            counted += 1
            changed += not math.isclose(*steps, rel_tol=1e-6)
            ratios += steps[1] / steps[0]
            if any(column in channels for column in columns):
                with_channel += 1
                ratios_with_channel += steps[1] / steps[0]
    return (
        changed / counted,
        changed / with_channel,
        ratios / counted,
        ratios_with_channel / with_channel / scale,
    )


@pytest.mark.parametrize(
    ("columns", "group", "scale"), [(64, 16, 2.0), (50, 16, 1.5), (33, 8, 4.0), (20, 20, 1.25)]
)
def test_step_changes_against_a_slow_count(columns, group, scale, generator):
    weight = torch.randn(7, columns, generator=generator)
    channels = torch.randperm(columns, generator=generator)[:3]
    spec = QuantSpec(bits=3, group_size=group, tail="smaller")
    found = step_changes(weight, channels, scale, spec)
    share, share_with_channel, mean_ratio, predicted = slow_step_changes(
        weight, set(channels.tolist()), scale, 3, group
    )
    assert found.share == pytest.approx(share)
    assert found.share_with_channel == pytest.approx(share_with_channel)
    assert found.mean_ratio == pytest.approx(mean_ratio, rel=1e-5)
    assert found.predicted == pytest.approx(predicted, rel=1e-5)
    error, scaled_error = (fake_quantize(weight, spec) - weight).abs(), None
    scaled_error = (round_scaled(weight, channels, scale, spec) - weight).abs()
    assert found.error_scaled == pytest.approx(
        float(scaled_error[:, channels].mean() / error[:, channels].mean()), rel=1e-5
    )


def test_a_scale_of_one_changes_nothing_and_parts_add_up(generator):
    spec = QuantSpec(bits=3, group_size=8)
    one, two = (torch.randn(4, 24, generator=generator) for _ in range(2))
    channels = torch.tensor([3, 9])
    same = step_changes(one, channels, 1.0, spec)
    assert (same.share, same.mean_ratio, same.error_scaled, same.error_others) == (0, 1, 1, 1)
    together = step_changes(torch.cat([one, two]), channels, 3.0, spec)
    added = StepChanges() + step_changes(one, channels, 3.0, spec) + step_changes(two, channels, 3.0, spec)
    for name in ("share", "share_with_channel", "mean_ratio", "predicted", "error_scaled", "error_others"):
        assert getattr(added, name) == pytest.approx(getattr(together, name)), name
    assert added.share > 0


def test_changed_weights_come_back_even_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    before = model[1].weight.detach().clone()

    def fail():
        with changed_weights(model, {"1": torch.zeros(2, 2)}):
            assert not model[1].weight.any()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(model[1].weight, before)


def test_rises_and_their_difference(generator):
    """A method whose foreign calibration costs 0.3 nats a window, beside one that it costs 0.1."""
    base = 2 + torch.rand(40, generator=generator)
    noise = [0.01 * torch.randn(40, generator=generator) for _ in range(2)]
    small = rise(evaluation(base), evaluation(base + 0.1 + noise[0]))
    large = rise(evaluation(base), evaluation(base + 0.3 + noise[1]))
    expected = float((base.double() + 0.1 + noise[0]).mean().exp() - base.double().mean().exp())
    assert small.perplexity.estimate == pytest.approx(expected, rel=1e-5)
    assert small.perplexity.low < expected < small.perplexity.high
    difference = difference_of_rises(small, large)
    assert difference.estimate == pytest.approx(-0.2, abs=0.01) and difference.excludes_zero
    # The oracle: the spread of window differences over the root of their number.
    gaps = small.window_nll - large.window_nll
    assert difference.high - difference.low == pytest.approx(3.92 * float(gaps.std()) / 40**0.5, rel=0.2)
    assert not difference_of_rises(small, small).excludes_zero


def test_shortfalls_name_what_is_missing(generator):
    hard = 2 + torch.rand(30, generator=generator)
    scores = {
        "original": evaluation(hard),
        "rtn": evaluation(hard + 0.2),
        "awq": evaluation(hard + 0.12),
        "awq, gptq rounding": evaluation(hard + 0.1),
        "worse": evaluation(hard + 0.15),
        "better": evaluation(hard + 0.05),
    }
    assert shortfalls(QualityComparison("m", [], scores, ("worse",), 0), 0.3) == []
    (only,) = shortfalls(QualityComparison("m", [], scores, ("worse", "better"), 0), 0.3)
    assert "better is better" in only
    (only,) = shortfalls(QualityComparison("m", [], scores, (), 0), 0.9)
    assert "of the gap closed" in only
    scores["awq"] = scores["awq, gptq rounding"] = scores["rtn"]
    assert any(
        "not significantly better" in text
        for text in shortfalls(QualityComparison("m", [], scores, (), 0), 0)
    )


def test_the_objectives_agree_on_a_tiny_model():
    """The Gram search finds the explicit search's scales; no objective loses more than no scaling by its own loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    losses = search_cost.chosen_losses(model.eval(), Calibration(torch.randint(0, 50, (4, 32))), bits=3)
    assert len(losses.explicit["gram"]) >= 2
    assert abs(losses.excess) < 0.01
    for ours, none in zip(losses.explicit["gram"], losses.explicit["identity"], strict=True):
        assert 0 < ours <= none * 1.001
    for ours, none in zip(losses.module["module"], losses.module["identity"], strict=True):
        assert ours <= none * 1.001
    assert any("explicit loss of the scales by gram" in row.what for row in losses.rows())


def test_docstrings_are_prose_and_hold_nothing_that_is_judged():
    from tensormill.data.python_source import heldout_text

    text = docstrings()
    assert len(text) > 200_000
    judged = heldout_text()["shlex"]
    assert not any(line in text for line in judged.splitlines() if len(line) > 60)
    name, prose = english_text()
    assert name and len(prose) >= len(text) // 2


def test_peers_that_are_not_installed_say_so(monkeypatch):
    assert set(peers.installed()) <= set(peers.PEERS)
    missing = peers.Peer("no_such_module", "no-such-package", "awq", lambda *a, **k: None)
    assert not missing.is_installed
    with pytest.raises(ModelError, match="pip install no-such-package"):
        missing(None, None, bits=4, group_size=128)
    monkeypatch.setattr(peers, "PEERS", {"gone": missing})
    assert peers.installed() == {}


def test_defaults_and_options_of_peers_are_told_apart():
    defaults = {name for name, peer in peers.PEERS.items() if not peer.settings}
    assert defaults == {"llm-compressor awq", "llm-compressor gptq", "hqq"}
    assert json.dumps([dict(peer.settings) for peer in peers.PEERS.values()])


@pytest.mark.parametrize("name", peers.PEERS)
def test_an_installed_peer_leaves_the_model_and_lands_near_it(name):
    """Runs where the peer is installed: close to the original, on a grid of 16 values per group, original untouched."""
    peer = peers.PEERS[name]
    if not peer.is_installed:
        pytest.skip(f"{peer.distribution} is not installed")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tokens = torch.randint(0, 50, (6, 16))
    run = peer(model, Calibration(tokens), bits=4, group_size=32)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        wanted, found = model(tokens).logits, run.model(tokens).logits
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.3
    weight = run.model.model.layers[0].mlp.gate_proj.weight
    groups = weight.view(-1, 32) if peer.settings.get("axis") != 0 else weight.reshape(32, -1).T
    assert max(len(group.unique()) for group in groups) <= 16
    assert run.seconds > 0 and run.memory.bytes > 0
    if peer.method == "hqq":
        with pytest.raises(InvalidArgument, match="symmetric"):
            peer(model, Calibration(tokens), bits=4, group_size=32, symmetric=True)


def test_our_compressors_leave_the_subject(monkeypatch):
    """C5 compresses copies: AWQ folds scales into norms, and the next method must not see them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    subject = type("Subject", (), {"group_size": 128, "model": model})()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    compressors = robustness.our_compressors(subject)
    assert list(compressors) == ["awq", "gptq", "awq, gptq rounding"]
    for compress in compressors.values():
        made = compress(model, Calibration(torch.randint(0, 50, (2, 16))))
        assert made is not model
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_decoding_is_timed_beside_both_dense_sides(monkeypatch):
    shape = Shape(hidden_size=64, intermediate_size=128, layers=1, heads=2, kv_heads=1, vocabulary=300)
    model = random_llama(shape, bits=4, group_size=32, dtype=torch.float32)
    monkeypatch.setattr(decoding, "_builtin", lambda run: (model, dense_copy(model)))
    monkeypatch.setattr(decoding, "WANTED", {"quick": 1e9})
    found = decoding.decoding(Run("quick", "cpu", 0))
    assert not found.holds and "batch 1" in found.reason
    step, first, weights = found.rows
    sides = {"transformers, dense", "prepared, dense"}
    assert set(step.peers) == set(first.peers) == set(weights.peers) == sides
    assert step.spread[0] <= step.value <= step.spread[1]
    assert weights.value < weights.peers["prepared, dense"]

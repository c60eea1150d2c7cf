"""The peers that SNNK is measured beside do what their names say, within the parameters they are given."""

import copy

import pytest
import torch
from torch import nn

from tensormill.papers.catalogue import Run
from tensormill.papers.snnk import estimator, layers
from tensormill.papers.snnk.adapters import _adapted
from tensormill.papers.snnk.paper import PAPER


def count(parameters):
    return sum(p.numel() for p in parameters)


def test_claims_are_listed_in_order():
    assert list(PAPER.claims) == ["C1", "C2", "C3", "C4"]


def test_low_rank_of_full_rank_is_the_layer():
    linear, x = nn.Linear(12, 9), torch.randn(5, 12)
    torch.testing.assert_close(layers._low_rank(linear, 9)(x), linear(x))
    error = (
        layers._low_rank(linear, 4)[1].weight @ layers._low_rank(linear, 4)[0].weight - linear.weight
    ).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(linear.weight)[4:].norm())


def test_candidates_keep_the_budget():
    dense = layers._network((6, 32, 32, 4), 0, "cpu")
    x, outside = torch.randn(50, 6), count(dense[0].parameters()) + count(dense[4].parameters())
    budget = 32 * 33 // 3
    nets = layers._candidates(dense, x, budget, 0)
    assert len(nets) == 6
    for name, net in nets.items():
        assert net(x).shape == (50, 4)
        assert 0.65 * budget < count(net.parameters()) - outside <= budget, name
    whole = layers._candidates(dense, x, 32 * 33, 0)["neurons pruned, retrained"]
    torch.testing.assert_close(whole(x), dense(x))  # nothing is pruned: only the order changes


@pytest.mark.parametrize(
    ("method", "size", "each"),
    [
        ("snnk", 4, 2 * (16 * 4 + 16)),
        ("snnk-sin", 2, 2 * (16 * 4 + 16)),
        ("houlsby", 3, 2 * (2 * 16 * 3 + 3 + 16)),
        ("lora-attention", 2, 2 * (32 + 24 + 24 + 32)),
        ("lora-all", 1, 32 + 24 + 24 + 32 + 3 * 40),
    ],
)
def test_adapters_start_as_the_model(method, size, each):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    adapted = copy.deepcopy(model)
    parameters = _adapted(adapted, method, size, 0)
    ids = torch.randint(0, 30, (2, 5))
    torch.testing.assert_close(adapted(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    assert count(parameters) == 2 * each == count(p for p in adapted.parameters() if p.requires_grad)
    adapted(ids).logits.square().sum().backward()
    assert any(float(p.grad.abs().max()) > 0 for p in parameters)


def test_draws_are_the_estimate():
    x, w = estimator._neurons(Run(), 3, 0.5)
    features = estimator._features("gelu", 40, 0.5, 1, Run(), "qmc")
    torch.testing.assert_close(estimator._draws(features, x, w).mean(-1), features.estimate(x, w)[0])

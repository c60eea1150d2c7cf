"""Parametrizations, their regimes, and exact limits of linear networks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tensormill.errors import InvalidArgument, ModelError
from tensormill.numerics.infinite_width_features import (
    ABC,
    ABCNetwork,
    FiniteLinear1,
    InfiniteLinear1,
    Linear1Config,
    classify,
)


@pytest.mark.parametrize(
    ("name", "layers", "regime", "r"),
    [
        ("sp", 1, "kernel", 1.5),  # only the last layer moves the function
        ("sp", 3, "kernel", 0.5),
        ("ntp", 1, "kernel", 0.5),
        ("ntp", 4, "kernel", 0.5),
        ("mfp", 1, "feature learning", 0.0),
        ("mup", 1, "feature learning", 0.0),
        ("mup", 5, "feature learning", 0.0),
    ],
)
def test_presets_have_their_regimes(name, layers, regime, r):
    found = classify(ABC.preset(name, layers))
    assert found.name == regime
    assert found.r == pytest.approx(r, abs=1e-12)
    assert found.reasons


def test_standard_parametrization_with_constant_learning_rate_blows_up():
    sp = ABC.preset("sp", 2)
    found = classify(ABC(sp.a, sp.b, 0.0))
    assert found.name == "unstable"
    assert any("r = -1 < 0" in reason for reason in found.reasons)
    assert any("2 a_3 + c" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("abc", "word"),
    [
        (ABC((0, 0, 0), (0.5, 0.5, 0.5), 1), "a_1 \\+ b_1 = 0.5, not 0"),
        (ABC((0, 0, 0), (0, 0, 0.5), 1), "a_2 \\+ b_2 = 0, not 0.5"),
        (ABC((0, 0, 0), (0, 0.5, 0), 1), "the output explodes at the start"),
    ],
)
def test_training_an_unstable_parametrization_names_the_inequality(abc, word):
    with pytest.raises(InvalidArgument, match=word):
        ABCNetwork(abc, 3, 8, 2)
    assert ABCNetwork(abc, 3, 8, 2, allow_unstable=True)(torch.ones(1, 3)).shape == (1, 2)


def test_trivial_parametrization():
    mup = ABC.preset("mup", 2)
    found = classify(ABC(mup.a, mup.b, 0.5))
    assert (found.stable, found.nontrivial, found.name) == (True, False, "trivial")


exponents = st.integers(-4, 4).map(lambda k: k / 4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(exponents, exponents), min_size=2, max_size=4), exponents, exponents)
def test_classification_does_not_see_the_shift(layers, c, theta):
    abc = ABC(tuple(a for a, _ in layers), tuple(b for _, b in layers), c)
    one, other = classify(abc), classify(abc.shifted(theta))
    assert one.r == pytest.approx(other.r, abs=1e-12)
    assert (one.name, one.stable, one.nontrivial) == (other.name, other.stable, other.nontrivial)
    # never both: the dichotomy
    assert not (one.kernel and one.feature_learning)
    assert one.nontrivial == (one.kernel or one.feature_learning)


def train(network, optimizer, x, y, steps):
    outputs = []
    for _ in range(steps):
        outputs.append(network(x))
        loss = (outputs[-1] - y).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return torch.stack(outputs).detach()


def test_shift_gives_the_same_trajectory():
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    runs = []
    for theta in (0.0, 0.5, -0.75):
        network = ABCNetwork(ABC.preset("mup", 2).shifted(theta), 5, 33, 2, seed=3, dtype=torch.float64)
        runs.append(train(network, network.sgd(0.1), x, y, 10))
    assert (runs[0][-1] - runs[0][0]).abs().max() > 1e-2
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=1e-11, atol=1e-12)


def test_features_of_the_last_layer_give_the_output():
    network = ABCNetwork(ABC.preset("ntp", 2), 4, 9, 3, torch.relu, seed=1)
    x = torch.randn(6, 4)
    *_, last = network.features(x)
    expected = torch.relu(last) @ network.weights[-1].mT / 3
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize(
    "arguments",
    [((0.0,), (0.0, 0.0), 0.0), ((0.0,), (0.0,), 0.0), ((math.inf, 0), (0, 0), 0), ((0, 0), (0, "x"), 0)],
)
def test_bad_exponents(arguments):
    with pytest.raises(InvalidArgument):
        ABC(*arguments)


def test_bad_presets_and_shifts():
    with pytest.raises(InvalidArgument, match="mfp"):
        ABC.preset("mfp", 2)
    with pytest.raises(InvalidArgument, match="one of"):
        ABC.preset("kaiming")
    with pytest.raises(InvalidArgument, match="at least 1"):
        ABC.preset("mup", 0)
    with pytest.raises(InvalidArgument, match="one number"):
        ABC.preset("mup").shifted([1.0, 2.0])
    with pytest.raises(InvalidArgument, match="at least 1"):
        ABCNetwork(ABC.preset("mup"), 3, 0, 1)


def batches(config, steps, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(config.outputs, config.inputs, generator=generator, dtype=dtype)
    for _ in range(steps):
        x = torch.randn(16, config.inputs, generator=generator, dtype=dtype)
        yield x, x @ target.mT + 0.5


def fit(network, config, *, steps=30, seed=0, clip=None, **settings):
    optimizer = torch.optim.SGD(network.parameters(), **{"lr": 0.05, **settings})
    for x, y in batches(config, steps, seed, network.u.dtype):
        optimizer.zero_grad()
        torch.autograd.backward((network(x) - y).square().mean())
        if clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
    x, _ = next(iter(batches(config, 1, seed + 1, network.u.dtype)))
    return network(x).detach()


SETTINGS = [
    {},
    {"momentum": 0.9, "lr": 0.01},
    {"momentum": 0.8, "nesterov": True, "lr": 0.01},
    {"weight_decay": 0.05},
    {"clip": 0.3, "lr": 0.2},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_wide_networks_approach_the_limit(setting, bias):
    config = Linear1Config(5, 3, sigma_u=0.9, sigma_v=0.6, alpha=1.2, bias=bias, output_bias=bias / 2)
    limit = fit(InfiniteLinear1(config, dtype=torch.float64), config, **setting)
    distance = {}
    for width in (64, 4096):
        errors = []
        for seed in range(3):
            network = FiniteLinear1(config, width, seed=seed, dtype=torch.float64)
            errors.append(float((fit(network, config, **setting) - limit).norm() / limit.norm()))
        distance[width] = sum(errors) / 3
    # 64 times the width: 8 times nearer
    assert distance[4096] < 0.04
    assert 4 < distance[64] / distance[4096] < 16


def test_the_limit_is_exact_where_omega_is_orthonormal():
    """With a width of at least d + o and orthonormal columns, finite and infinite networks agree to rounding."""
    config = Linear1Config(4, 2, sigma_v=0.5, bias=1.0)
    limit = InfiniteLinear1(config, dtype=torch.float64)
    network = FiniteLinear1(config, 11, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(11, 6, dtype=torch.float64))
    with torch.no_grad():
        network.u.copy_(q @ limit.u)
        network.v.copy_(limit.v @ q.mT)
    for setting in SETTINGS:
        torch.testing.assert_close(
            fit(network, config, **setting), fit(limit, config, **setting), rtol=1e-10, atol=1e-11
        )


def test_limit_starts_at_zero_and_adam_would_leave_the_span():
    limit = InfiniteLinear1(Linear1Config(7, 3, bias=1.0))
    assert limit(torch.randn(20, 7)).abs().max() == 0
    assert limit(torch.randn(2, 3, 7)).shape == (2, 3, 3)


def test_sample_before_training_is_the_network_of_that_seed():
    config = Linear1Config(5, 2, sigma_u=2.0, sigma_v=0.1)
    sampled, fresh = InfiniteLinear1(config).sample(50, seed=4), FiniteLinear1(config, 50, seed=4)
    torch.testing.assert_close(sampled.u, fresh.u)
    torch.testing.assert_close(sampled.v, fresh.v)
    wide = FiniteLinear1(config, 40_000, seed=0)
    assert float(wide.u.detach().std()) * math.sqrt(40_000) == pytest.approx(2.0, rel=0.02)
    assert float(wide.v.detach().std()) * math.sqrt(40_000) == pytest.approx(0.1, rel=0.02)


def test_sample_after_training_computes_what_the_limit_does_and_trains_on():
    config = Linear1Config(4, 3, bias=0.5, output_bias=1.0)
    limit = InfiniteLinear1(config, dtype=torch.float64)
    fit(limit, config)
    x = torch.randn(9, 4, dtype=torch.float64)
    networks = [limit.sample(20_000, seed=seed) for seed in range(3)]
    for network in networks:
        assert float((network(x) - limit(x)).detach().norm() / limit(x).detach().norm()) < 0.05
    after = fit(networks[0], config)
    expected = fit(limit, config)
    assert float((after - expected).norm() / expected.norm()) < 0.05


def test_state_dict_gradcheck_and_dtypes():
    config = Linear1Config(3, 2, bias=1.0)
    limit = InfiniteLinear1(config, dtype=torch.float64)
    fit(limit, config, steps=3)
    other = InfiniteLinear1(config, dtype=torch.float64)
    other.load_state_dict(limit.state_dict())
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(other(x), limit(x))
    assert torch.autograd.gradcheck(limit, x)
    assert (
        InfiniteLinear1(config, dtype=torch.bfloat16)(torch.ones(1, 3, dtype=torch.bfloat16)).dtype
        == torch.bfloat16
    )


def test_limit_of_a_model():
    linear = nn.Sequential(nn.Linear(4, 99), nn.Identity(), nn.Linear(99, 2, bias=False))
    limit = InfiniteLinear1.of(linear, sigma_v=0.25)
    assert limit.config == Linear1Config(4, 2, sigma_v=0.25, bias=1.0)
    for model in (
        nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2)),
        nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 9), nn.Linear(9, 2)),
        nn.Linear(4, 2),
    ):
        with pytest.raises(ModelError, match="one hidden layer only"):
            InfiniteLinear1.of(model)


def test_bad_limit_arguments():
    with pytest.raises(InvalidArgument, match="at least 1"):
        Linear1Config(0, 2)
    with pytest.raises(InvalidArgument, match="sigma_u"):
        Linear1Config(2, 2, sigma_u=-1)
    with pytest.raises(InvalidArgument, match="nothing would ever move"):
        Linear1Config(2, 2, sigma_u=0, sigma_v=0)
    with pytest.raises(InvalidArgument, match="last dimension"):
        InfiniteLinear1(Linear1Config(3, 2))(torch.ones(2, 4))
    with pytest.raises(InvalidArgument, match="width=0"):
        InfiniteLinear1(Linear1Config(3, 2)).sample(0)

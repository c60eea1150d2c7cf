"""Random features: their inner products are unbiased, and their error falls with the root of their number."""

from __future__ import annotations

import pytest
import torch

from tensormill.errors import InvalidArgument, ModelError
from tensormill.numerics.ntk import RandomFeatures
from tensormill.numerics.ntk.infinite import (
    Activation,
    Conv,
    Dense,
    Erf,
    Flatten,
    LayerNorm,
    ReLU,
    Residual,
    Sequential,
)

NETWORKS = {
    "relu": Sequential(Dense(2**0.5, 0.1), ReLU(), Dense(2**0.5, 0.1), ReLU(), Dense(1.0, 0.2)),
    "erf": Sequential(Dense(1.5), Erf(), Dense(1.2), Activation("tanh"), Dense()),
    "residual": Sequential(Dense(1.2, 0.1), Residual(ReLU(), Dense(1.1)), LayerNorm(), Erf(), Dense()),
}


@pytest.mark.parametrize("get", ["nngp", "ntk"])
@pytest.mark.parametrize("name", NETWORKS)
def test_mean_of_draws_is_the_kernel(name, get):
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = NETWORKS[name].kernel(x, get=get)
    grams = []
    for seed in range(6):
        features = RandomFeatures(NETWORKS[name], 1024, get, seed)(x)
        grams.append(features @ features.T)
    error = float((torch.stack(grams).mean(0) - expected).norm() / expected.norm())
    # Monte Carlo: the deviation is about 2 or 3 over the root of all directions; a wrong factor shows as 0.3 and more.
    assert error < 10 / (6 * 1024) ** 0.5


@pytest.mark.parametrize("get", ["nngp", "ntk"])
def test_error_of_one_draw_falls_with_the_root_of_the_count(get):
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = NETWORKS["relu"].kernel(x, get=get)
    squares = []
    for count in (32, 512):
        each = []
        for seed in range(40):
            features = RandomFeatures(NETWORKS["relu"], count, get, seed)(x)
            each.append(float((features @ features.T - expected).square().sum()))
        squares.append(sum(each))
    assert 1.5 < (squares[0] / squares[1]) ** 0.5 < 9  # 4, with 40 draws each


def test_same_map_for_all_inputs_and_types():
    features = RandomFeatures(NETWORKS["relu"], 64, seed=3)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    whole = features(x)
    torch.testing.assert_close(torch.cat([features(x[:2]), features(x[2:])]), whole)
    torch.testing.assert_close(features(x.double()).float(), whole, rtol=1e-4, atol=1e-5)
    assert not torch.equal(RandomFeatures(NETWORKS["relu"], 64, seed=4)(x), whole)
    assert features(x.reshape(6, 2, 2)).equal(whole)


def test_bad_input():
    with pytest.raises(ModelError, match="dense layers"):
        RandomFeatures(Sequential(Conv(3), ReLU(), Flatten(), Dense()), 8)
    with pytest.raises(InvalidArgument, match="at least 1"):
        RandomFeatures(NETWORKS["relu"], 0)
    with pytest.raises(InvalidArgument, match="expected 'nngp'"):
        RandomFeatures(NETWORKS["relu"], 8, "both")

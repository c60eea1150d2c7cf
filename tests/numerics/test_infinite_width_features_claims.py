"""The measuring code of the claims, on tiny sizes."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch

from tensormill.numerics.infinite_width_features import ABC, ABCNetwork, Accuracy
from tensormill.papers.catalogue import Run
from tensormill.papers.infinite_width_features import (
    PAPER,
    dichotomy,
    few_shot,
    limit,
    transfer,
    word_vectors,
)


def test_all_claims_are_listed_in_order():
    assert list(PAPER.claims) == ["C1", "C2", "C3", "C4", "C5", "C6"]


@pytest.mark.parametrize(
    "abc",
    [
        ABC.preset("mup", 2),
        ABC.preset("ntp", 2),
        ABC.preset("sp", 2),
        ABC((-0.25, 0.25, 0.5), (0.25, 0.25, 0.25), 0),
    ],
)
def test_networks_that_share_a_matrix_are_networks(abc):
    """All cells at once, with a low-rank second layer, against each as a module trained by SGD."""
    width, seed = 33, 3
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, y = draw(dichotomy.INPUTS, dichotomy.BATCH), draw(dichotomy.OUTPUTS, dichotomy.BATCH)
    g1, g3, g2 = draw(width, dichotomy.INPUTS), draw(dichotomy.OUTPUTS, width), draw(width, width)
    network = ABCNetwork(
        abc, dichotomy.INPUTS, width, dichotomy.OUTPUTS, allow_unstable=True, dtype=torch.float64
    )
    with torch.no_grad():
        for weight, value, b in zip(network.weights, (g1, g2, g3), abc.b, strict=True):
            weight.copy_(value * width**-b)
    optimizer = network.sgd(dichotomy.ETA)
    expected: dict[str, float] = {}
    start = None
    for _ in range(dichotomy.STEPS + 1):
        values = {**dict(zip(("h1", "h2"), network.features(x.mT), strict=True)), "f": network(x.mT)}
        values = {name: value.detach() for name, value in values.items()}
        start = start or values
        for name, value in values.items():
            expected.setdefault(name, float(value.square().mean().sqrt()))
            change = float((value - start[name]).square().mean().sqrt())
            expected["d" + name] = max(expected.get("d" + name, 0.0), change)
        optimizer.zero_grad()
        torch.autograd.backward((network(x.mT) - y.mT).square().sum() / 2 / dichotomy.BATCH)
        optimizer.step()
    found = dichotomy.changes([ABC.preset("mup", 2), abc], width, seed=seed, device="cpu")
    assert {name: float(value[1]) for name, value in found.items()} == pytest.approx(expected, rel=1e-9)


def test_regimes_from_powers():
    flat = {"h1": 0.0, "h2": 0.01, "f": -0.5, "dh1": 0.0, "dh2": 0.0, "df": 0.0}
    assert dichotomy.measured_regime(flat) == "feature learning"
    assert dichotomy.measured_regime({**flat, "dh2": -0.5}) == "kernel"
    assert dichotomy.measured_regime({**flat, "dh2": -0.5, "df": -0.5}) == "trivial"
    for name in ("h1", "f", "dh1", "dh2", "df"):
        assert dichotomy.measured_regime({**flat, name: 0.5}) == "unstable"
        assert dichotomy.measured_regime({**flat, name: math.inf}) == "unstable"
    assert dichotomy.measured_regime({**flat, "h2": -0.5}) == "unstable"  # it vanishes
    cells = dichotomy.grid(full=False)
    assert len(cells) == len(set(cells)) and all(cell.c == 0 for cell in cells)


def test_distance_to_the_limit_shrinks():
    found = limit.distances(limit.SETTINGS["momentum"], [32, 512], 3, "cpu", 0)
    assert found[1][0] < found[0][0] / 2 and len(found[0][1]) == 3


def test_optimum_is_the_vertex_of_a_parabola():
    rates = [2.0**k for k in range(-6, 0)]
    losses = {lr: (math.log2(lr) + 3.3) ** 2 for lr in rates}
    assert transfer.optimum(losses) == pytest.approx(2.0**-3.3)
    assert transfer.optimum({0.5: 2.0, 1.0: 1.0}) == 1.0  # at the edge
    assert transfer.optimum({0.25: 2.0, 0.5: 1.0, 1.0: math.inf}) == 0.5


def test_search_stops_between_worse_neighbours():
    class Bowl:
        def final_loss(self, width, parametrization, lr):
            return abs(math.log2(lr) + 9)

    losses = transfer.search(Bowl(), 32, "mup", -6)
    assert set(losses) == {2.0**k for k in range(-10, -4)}
    assert transfer.optimum(losses) == pytest.approx(2.0**-9)


def test_language_models_agree_at_the_base_width():
    subject = transfer.Subject(Run())
    tokens = subject.tokens[: transfer.WINDOW][None]
    mup, groups = subject.model(transfer.BASE, "mup", 0)
    sp, none = subject.model(transfer.BASE, "sp", 0)
    assert none is None and groups is not None and [g["lr"] for g in groups] == [1.0]
    torch.testing.assert_close(mup(tokens), sp(tokens))


def test_intervals():
    values = torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0]])
    mean, low, high = word_vectors.interval(values)
    assert mean == 62.5 and low < mean < high
    one = Accuracy(0.5, 0.4, 0.6, 10)
    found = few_shot.merged([one, Accuracy(0.7, 0.6, 0.8, 10)])
    assert astuple(found) == pytest.approx((0.6, 0.5, 0.7, 20))


def test_gensim_takes_our_settings():
    pytest.importorskip("gensim")
    from tensormill.numerics.infinite_width_features import CBOWConfig, Corpus, planted_analogies

    text, asked = planted_analogies(6, 3, 200, fillers=4)
    corpus = Corpus.of(text)
    questions = torch.tensor([corpus.index(question) for question in asked])
    config = CBOWConfig(window=6, negatives=5, subsample=0, epochs=3)
    accuracy, speed = word_vectors.best_of_gensim(text, corpus, questions, 8, config, 0)
    assert 0 <= accuracy <= 100 and speed > 0

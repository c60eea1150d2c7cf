"""What FunBaT's claims are measured with: the slow rival learns, peers answer, the wrong rule is wrong."""

from __future__ import annotations

import pytest
import torch

from tensormill.numerics.state_space import MaternBundle
from tensormill.papers import funbat
from tensormill.papers.funbat import PAPER


def test_claims_are_defined():
    assert list(PAPER.claims) == ["C1", "C2", "C3", "C4", "C5", "C6"]


@pytest.mark.parametrize("cp", [True, False])
def test_the_schedule_in_loops_learns(cp):
    generator = torch.Generator().manual_seed(0)
    x = (8 * torch.rand(300, 3, generator=generator, dtype=torch.float64)).round() / 8
    y = (1 + x[:, 0]) * torch.cos(2 * x[:, 1]) * (2 - x[:, 2])
    slow = funbat._LoopFunBat(x, y, 1 if cp else 2, 0.5, 1.0, cp)
    for _ in range(40):
        slow.sweep()
    found = (slow.products([0, 1, 2])[0].mT @ slow.core).flatten()
    assert float((found - y).square().mean()) < 0.05 * float(y.var())


def test_fused_neighbours_are_overconfident_or_off():
    """At points between data the fused rule differs from the exact one; far from data it does not matter."""
    points = torch.linspace(0, 1, 8, dtype=torch.float64)
    values = torch.sin(9 * points)
    precision = torch.full((8, 1, 1), 100.0, dtype=torch.float64)
    posterior = MaternBundle(points, "matern32", 0.3, 1.0).smooth(precision, 100 * values[:, None])
    asked = torch.tensor([0.07, 0.5, 0.9], dtype=torch.float64)
    exact = posterior.at(asked)[0][:, 0]
    assert float((funbat._fused_neighbours(posterior, asked) - exact).abs().max()) > 1e-3


def test_dense_process_interpolates():
    x = torch.linspace(0, 1, 9, dtype=torch.float64)
    y = torch.cos(4 * x)
    mean, variance = funbat._dense(x, y, x, 2.5, 0.3, 1e-10)
    torch.testing.assert_close(mean, y, rtol=0, atol=1e-6)
    assert bool((variance.abs() < 1e-6).all())


def test_least_squares_of_rank_one_is_exact_on_rank_one():
    grid = torch.cartesian_prod(*(torch.linspace(0, 1, n, dtype=torch.float64) for n in (4, 5, 3)))
    y = (1 + grid[:, 0]) * (2 - grid[:, 1]) * torch.exp(grid[:, 2])
    train, test = funbat._rank_one_least_squares(grid[::2], y[::2], grid[1::2], y[1::2])
    assert train < 1e-8 and test < 1e-8


def test_masked_tucker_completes_a_smooth_field():
    pytest.importorskip("tensorly")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4000, 3, generator=generator, dtype=torch.float64)
    y = (1 + x[:, 0]) * (2 - x[:, 1]) * (1 + x[:, 2])
    found = funbat._masked_tucker(x[:3500], y[:3500], x[3500:], (8, 8, 8), 1)
    assert funbat._rmse(found, y[3500:]) < 0.4 * float(y.std())


def test_sparse_process_answers():
    pytest.importorskip("gpytorch")
    x = torch.rand(300, 3, dtype=torch.float64)
    before = torch.get_rng_state()
    mean, variance = funbat._svgp(x, x.sum(1), x[:20], 1.5, 0.3, 3, 0)
    assert mean.shape == (20,) and bool((variance > 0).all())
    assert torch.equal(before, torch.get_rng_state())
    assert 0 <= funbat._coverage(mean, variance, x.sum(1)[:20]) <= 1


def test_synthetic_field_has_unit_variance():
    x, y, clean = funbat._field(2000, 0.1, 0)
    assert x.shape == (2000, 3)
    assert float(clean.std()) == pytest.approx(1.0)
    assert float((y - clean).std()) == pytest.approx(0.1, rel=0.1)

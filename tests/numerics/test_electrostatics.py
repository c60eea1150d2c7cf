"""Quadratures of Newton's and Yukawa's kernels, long and short range, energy and forces against direct summation."""

from __future__ import annotations

import doctest
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.errors import DataError, InvalidArgument
from tensormill.numerics import electrostatics
from tensormill.numerics.electrostatics import (
    GaussianSum,
    MultiParticlePotential,
    direct_sum,
    long_range_cp,
    long_range_potential,
    newton_quadrature,
    perturbed_lattice,
    protein_like,
    read_pqr,
    yukawa_quadrature,
)


def cloud(n, seed=0, dtype=torch.float64, side=1.0):
    generator = torch.Generator().manual_seed(seed)
    positions = side * (torch.rand(n, 3, generator=generator, dtype=torch.float64) - 0.5)
    charges = torch.randn(n, generator=generator, dtype=torch.float64)
    return charges.to(dtype), positions.to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.0, 50.0),
    st.floats(-4, 1),
    st.floats(0.1, 4),
    st.floats(-12.5, -1),
)
def test_quadratures_keep_their_tolerance(screening, low, span, digits):
    r_min, r_max, tol = 10**low, 10 ** (low + span), 10**digits
    kernel = yukawa_quadrature(screening, r_min, r_max, tol)
    r = torch.logspace(math.log10(r_min), math.log10(r_max), 500, dtype=torch.float64).clamp(r_min, r_max)
    error = (kernel(r) - kernel.kernel(r)).abs() * r
    assert float(error.max()) <= tol + 1e-14
    assert all(a < b for a, b in itertools.pairwise(kernel.exponents)) and min(kernel.weights) > 0


def test_merging_the_widest_gaussians_saves_terms():
    # 80 terms reach 3.1e-7 on this range without it
    kernel = newton_quadrature(1e-2, 3.4, 3e-7)
    assert len(kernel) <= 45
    r = torch.logspace(-2, math.log10(3.4), 2000, dtype=torch.float64)
    assert float((kernel(r) * r - 1).abs().max()) <= 3e-7


def test_long_range_terms_add_up_to_shifted_gaussians():
    charges, positions = cloud(7)
    kernel = newton_quadrature(1e-2, 3.5, 1e-6).long_range(5.0)
    assert max(kernel.exponents) <= 5.0
    weights, factors = long_range_cp(charges, positions, kernel)
    assert weights.shape == (7 * len(kernel),)
    x = cloud(20, seed=1)[1]
    terms = slice(3, len(weights) - 2)
    for mode, factor in enumerate(factors):
        assert torch.equal(factor(x[:, mode], terms), factor(x[:, mode], slice(0, len(weights)))[:, terms])
    product = math.prod(factor(x[:, k], slice(0, len(weights))) for k, factor in enumerate(factors))
    torch.testing.assert_close(product @ weights, direct_sum(charges, positions, x, kernel))


@pytest.mark.parametrize("screening", [0.0, 3.0])
def test_compressed_long_range_agrees_with_its_direct_sum(screening):
    charges, positions = cloud(60)
    kernel = yukawa_quadrature(screening, 1e-2, 3.5, 1e-8).long_range(4.0)
    potential = long_range_potential(charges, positions, kernel, [(-1, 1)] * 3, tol=1e-6, block=100)
    x = cloud(300, seed=2, side=1.9)[1]
    exact = direct_sum(charges, positions, x, kernel)
    assert float((potential(x) - exact).abs().max() / exact.abs().max()) < 1e-5
    assert potential.error_estimate(200).relative < 1e-5


@pytest.mark.parametrize("screening", [0.0, 2.0])
@pytest.mark.parametrize("t_cut", [None, 6.0])
def test_potential_energy_and_forces_agree_with_all_pairs(screening, t_cut):
    charges, positions = cloud(120, seed=3)
    tol = 1e-6
    potential = MultiParticlePotential(charges, positions, t_cut=t_cut, tol=tol, screening=screening)
    kernel = lambda r: torch.exp(-screening * r) / r  # noqa: E731
    scale = float(charges.abs().sum())  # over lengths of about 1

    moving = positions.clone().requires_grad_()
    pairs = torch.triu_indices(120, 120, 1)
    r = (moving[pairs[0]] - moving[pairs[1]]).square().sum(-1).sqrt()
    energy = (charges[pairs[0]] * charges[pairs[1]] * kernel(r)).sum()
    (slope,) = torch.autograd.grad(energy, moving)
    assert abs(float(potential.energy() - energy.detach())) < 20 * tol * scale * float(charges.abs().max())
    assert float((potential.forces() + slope).abs().max()) < 300 * tol * scale * float(charges.abs().max())

    x = cloud(200, seed=4)[1]
    exact = direct_sum(charges, positions, x, kernel)
    assert float((potential(x) - exact).abs().max()) < 20 * tol * scale
    x.requires_grad_()
    (slope,) = torch.autograd.grad(direct_sum(charges, positions, x, kernel).sum(), x)
    # slopes are larger by the sharpest Gaussian's t
    field = potential.field(x.detach())
    assert float((field + slope).abs().max()) < 20 * tol * scale * 10 * potential.kernel.exponents[-1]


def test_potential_is_differentiable_at_charges_too():
    charges, positions = cloud(30, seed=8)
    potential = MultiParticlePotential(charges, positions, tol=1e-6)
    x = torch.cat((positions[:5], cloud(10, seed=9)[1])).requires_grad_()
    (slope,) = torch.autograd.grad(potential(x).sum(), x)
    field = potential.field(x.detach())
    torch.testing.assert_close(slope, -field, rtol=0, atol=1e-9 * float(field.abs().max()))


def test_cutoff_does_not_matter():
    charges, positions = cloud(40, seed=5)
    values = [MultiParticlePotential(charges, positions, t_cut=t, tol=1e-8).at_charges() for t in (3.0, 6.0)]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-5)


def test_one_charge_feels_nothing_and_two_feel_coulombs_law():
    one = MultiParticlePotential(torch.ones(1).double(), torch.zeros(1, 3).double(), tol=1e-6)
    assert abs(float(one.energy())) < 1e-5 and float(one.forces().abs().max()) < 1e-5
    for distance in (0.01, 0.3, 1.0):
        x = torch.tensor([[0.0, 0, 0], [distance, 0, 0]], dtype=torch.float64)
        two = MultiParticlePotential(torch.tensor([1.0, -2.0]).double(), x, [(-2, 2)] * 3, tol=1e-7)
        assert float(two.energy()) == pytest.approx(-2 / distance, rel=1e-5)
        expected = torch.tensor([[2.0, 0, 0], [-2.0, 0, 0]]).double() / distance**2
        torch.testing.assert_close(two.forces(), expected, rtol=1e-4, atol=1e-4)


def test_energy_follows_charges_and_lengths():
    charges, positions = cloud(50, seed=6)
    first = MultiParticlePotential(charges, positions, tol=1e-7).energy()
    scaled = MultiParticlePotential(3 * charges, 10 * positions, tol=1e-7).energy()
    torch.testing.assert_close(scaled, 0.9 * first, rtol=1e-5, atol=1e-3)


def test_float32():
    charges, positions = cloud(50, dtype=torch.float32)
    potential = MultiParticlePotential(charges, positions, tol=1e-4)
    exact = direct_sum(charges, positions, positions, potential.kernel.kernel)
    assert potential.long.dtype == torch.float32
    assert float((potential.at_charges() - exact).abs().max() / exact.abs().max()) < 1e-3


def test_protein_like_chain():
    charges, positions = protein_like(200, seed=1)
    assert charges.shape == (1200,) and positions.shape == (1200, 3)
    chain = positions.reshape(200, 6, 3)[:, 0]
    steps = torch.linalg.vector_norm(chain.diff(dim=0), dim=1)
    torch.testing.assert_close(steps, torch.full_like(steps, 3.8))
    apart = torch.cdist(chain, chain) + 99 * (torch.arange(200)[:, None] - torch.arange(200)).abs().le(1)
    assert float(apart.min()) > 3.0  # the walk may have to squeeze past itself
    gyration = (chain - chain.mean(0)).square().sum(1).mean().sqrt()
    assert 0.5 < float(gyration) / (2.2 * 200**0.38) < 1.6
    sites = charges.reshape(200, 6)
    assert set(sites[:, 5].tolist()) == {-1.0, 0.0, 1.0}
    assert sites[:, :5].sum(1).abs().max() < 1e-12
    assert torch.equal(protein_like(200, seed=1)[1], positions)


def test_lattice():
    charges, positions = perturbed_lattice(4, displacement=0.0)
    assert charges.shape == (64,) and float(charges.sum()) == 0 and float(positions.max()) == 0.75
    charges, positions = perturbed_lattice(6, vacancies=0.2, alternating=False, seed=3)
    assert 120 < len(charges) == len(positions) < 216 and bool((charges == 1).all())


def test_pqr(tmp_path):
    path = tmp_path / "x.pqr"
    path.write_text(
        "REMARK made up\nATOM      1  N   ALA A   1      11.104   6.134  -6.504 -0.4157 1.8240\n"
        "HETATM    2  ZN   ZN     2       1.0 2.0 3.0 2.0 1.1\nTER\n"
    )
    charges, positions = read_pqr(path)
    assert charges.tolist() == [-0.4157, 2.0]
    assert positions.tolist() == [[11.104, 6.134, -6.504], [1.0, 2.0, 3.0]]
    path.write_text("ATOM 1 N ALA 1 x y z q r\n")
    with pytest.raises(DataError, match="line 1"):
        read_pqr(path)
    path.write_text("END\n")
    with pytest.raises(DataError, match="ATOM"):
        read_pqr(path)
    with pytest.raises(DataError, match="readable"):
        read_pqr(tmp_path / "none.pqr")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: newton_quadrature(1.0, 0.5), "0 < r_min < r_max"),
        (lambda: newton_quadrature(0.1, 1.0, 1e-15), "1e-13"),
        (lambda: yukawa_quadrature(-1.0, 0.1, 1.0), "screening"),
        (lambda: newton_quadrature(0.1, 1.0).long_range(1e-9), "smallest exponent"),
        (lambda: direct_sum(*cloud(3), torch.ones(3).double(), torch.sqrt), "expected .M, 3."),
        (lambda: long_range_cp(cloud(3)[0], cloud(4)[1], newton_quadrature(0.1, 1.0)), "expected .N,."),
        (lambda: long_range_cp(cloud(3)[0].float(), cloud(3)[1], newton_quadrature(0.1, 1.0)), "one float dtype"),
        (lambda: MultiParticlePotential(cloud(3)[0] * math.nan, cloud(3)[1]), "infinite or NaN"),
        (lambda: MultiParticlePotential(*cloud(3), [(0.0, 0.01)] * 3), "expected them inside"),
        (lambda: MultiParticlePotential(*cloud(3), [(-1.0, 1.0)] * 2), "expected .3, 2."),
        (lambda: protein_like(0), "residues=0"),
        (lambda: perturbed_lattice(3, vacancies=1.0), "vacancies"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()


def test_examples_in_docstrings():
    assert isinstance(newton_quadrature(0.1, 1.0), GaussianSum)
    assert doctest.testmod(electrostatics).failed == 0

"""Matern chains against arbitrary precision, against dense Gaussian processes and against GPyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.errors import InvalidArgument
from tensormill.numerics.state_space import (
    KERNELS,
    MaternBundle,
    matern_ssm,
    matern_stationary,
    stack_functions,
)

every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def kernel_matrix(kernel, lengthscale, outputscale, a, b):
    d = (a[:, None] - b[None, :]).abs() * math.sqrt(2 * KERNELS[kernel]) / lengthscale
    polynomial = {"matern12": 1, "matern32": 1 + d, "matern52": 1 + d + d * d / 3}[kernel]
    return outputscale * polynomial * torch.exp(-d)


def companion(size):
    """(d/dx + 1)^size as a first-order system: the equation with lam = 1."""
    matrix = torch.diag(torch.ones(size - 1, dtype=torch.float64), 1)
    matrix[-1] = -torch.tensor([math.comb(size, i) for i in range(size)], dtype=torch.float64)
    return matrix


@every_kernel
@pytest.mark.parametrize("gap", [1e-8, 1e-4, 0.03, 1.0, 40.0])
def test_steps_in_arbitrary_precision(kernel, gap):
    mpmath = pytest.importorskip("mpmath")
    size = round(KERNELS[kernel] + 0.5)
    step = matern_ssm(kernel, 0.7, 1.0, torch.tensor(gap, dtype=torch.float64))
    with mpmath.workdps(80):
        x = mpmath.mpf(gap) * mpmath.sqrt(mpmath.mpf(2 * KERNELS[kernel])) / mpmath.mpf(0.7)
        transition = mpmath.expm(mpmath.matrix(companion(size).tolist()) * x)
        stationary = mpmath.eye(size)
        if size == 3:
            stationary[1, 1], stationary[0, 2], stationary[2, 0] = (
                mpmath.mpf(1) / 3,
                -mpmath.mpf(1) / 3,
                -mpmath.mpf(1) / 3,
            )
        noise = stationary - transition * stationary * transition.T
        for i in range(size):
            for j in range(size):
                for actual, expected in ((step.transition, transition), (step.process_noise, noise)):
                    error = abs(mpmath.mpf(float(actual[i, j])) / expected[i, j] - 1)
                    assert error < 1e-14 * (1 + float(x) / 4), (
                        f"element {i}, {j}: relative error {mpmath.nstr(error, 3)}"
                    )


@every_kernel
def test_no_gap_changes_nothing(kernel):
    step = matern_ssm(kernel, 0.1, 2.0, torch.zeros(3, dtype=torch.float64))
    size = step.transition.shape[-1]
    assert torch.equal(step.transition, torch.eye(size, dtype=torch.float64).expand(3, size, size))
    assert not step.process_noise.any()


@every_kernel
@settings(max_examples=30, deadline=None)
@given(st.floats(1e-6, 20), st.floats(1e-6, 20), st.floats(0.01, 100))
def test_two_steps_are_one(kernel, first, second, lengthscale):
    one, two, both = (
        matern_ssm(kernel, lengthscale, 1.5, torch.tensor(gap, dtype=torch.float64))
        for gap in (first, second, first + second)
    )
    torch.testing.assert_close(two.transition @ one.transition, both.transition, rtol=1e-10, atol=1e-13)
    noise = two.transition @ one.process_noise @ two.transition.mT + two.process_noise
    torch.testing.assert_close(noise, both.process_noise, rtol=1e-10, atol=1e-13)


@every_kernel
def test_gradients_of_steps(kernel):
    scales = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 1.7)]
    gaps = torch.tensor([0.01, 0.2, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, g: matern_ssm(kernel, a, b, g)[:2], (*scales, gaps))


@every_kernel
def test_float32_is_float64_rounded(kernel):
    gaps = torch.logspace(-5, 1, 40)
    for narrow, wide in zip(
        matern_ssm(kernel, 0.5, 1.0, gaps), matern_ssm(kernel, 0.5, 1.0, gaps.double()), strict=True
    ):
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-6)


def test_stacked_functions_are_independent():
    chain, emission = stack_functions(matern_ssm("matern32", 0.5, 1.0, torch.rand(4, dtype=torch.float64)), 3)
    assert chain.transition.shape == (4, 6, 6) and emission.shape == (3, 6)
    one = matern_ssm("matern32", 0.5, 1.0, torch.rand(4, dtype=torch.float64))
    assert torch.equal(emission @ chain.stationary @ emission.T, torch.eye(3, dtype=torch.float64))
    assert torch.equal(chain.stationary[3:, 3:], one.stationary[1, 1] * torch.eye(3, dtype=torch.float64))


@every_kernel
@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_equals_dense_process(kernel, noise):
    """Mean, variance and evidence at the data, between and beyond them."""
    generator = torch.Generator().manual_seed(5)
    points = torch.rand(120, generator=generator, dtype=torch.float64).sort().values
    values = torch.sin(9 * points) + 0.1 * torch.randn(120, generator=generator, dtype=torch.float64)
    asked = torch.cat([torch.linspace(-0.5, 1.5, 41, dtype=torch.float64), points[::7]])
    known = MaternBundle(points, kernel, 0.2, 1.3).smooth(
        torch.full((120, 1, 1), 1 / noise, dtype=torch.float64), values[:, None] / noise
    )
    gram = kernel_matrix(kernel, 0.2, 1.3, points, points) + noise * torch.eye(120, dtype=torch.float64)
    cross = kernel_matrix(kernel, 0.2, 1.3, asked, points)
    solved = torch.linalg.solve(gram, torch.cat([values[:, None], cross.T], 1))
    mean, covariance = known.at(asked, chunk=13)
    torch.testing.assert_close(mean[:, 0], cross @ solved[:, 0], rtol=0, atol=1e-8)
    variance = 1.3 - (cross * solved[:, 1:].T).sum(1)
    torch.testing.assert_close(covariance[:, 0, 0], variance, rtol=0, atol=1e-8)
    evidence = known.log_evidence - (values @ values / noise + 120 * math.log(2 * math.pi * noise)) / 2
    expected = -(values @ solved[:, 0] + torch.logdet(gram) + 120 * math.log(2 * math.pi)) / 2
    torch.testing.assert_close(evidence, expected, rtol=1e-7, atol=1e-6)
    at_data, _ = known.at(points)
    torch.testing.assert_close(at_data, known.mean, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("kernel", "nu"), [("matern12", 0.5), ("matern32", 1.5), ("matern52", 2.5)])
def test_equals_gpytorch_kernel(kernel, nu):
    gpytorch = pytest.importorskip("gpytorch")
    points = torch.rand(30, 1, dtype=torch.float64)
    theirs = gpytorch.kernels.MaternKernel(nu=nu).double()
    theirs.lengthscale = 0.3
    expected = theirs(points).to_dense().detach()
    torch.testing.assert_close(
        kernel_matrix(kernel, 0.3, 1.0, points[:, 0], points[:, 0]), expected, rtol=1e-6, atol=1e-6
    )
    gaps = (points[:, 0] - points[0, 0]).abs()
    covariance = matern_ssm(kernel, 0.3, 1.0, gaps).transition @ matern_stationary(kernel, 1.0, gaps)
    torch.testing.assert_close(covariance[:, 0, 0], expected[0], rtol=1e-6, atol=1e-6)


def test_correlated_potentials():
    """Two functions seen only as their sum: each one's posterior is that of a process of twice the noise and signal."""
    points = torch.linspace(0, 1, 20, dtype=torch.float64)
    values = torch.cos(5 * points)
    precision = torch.full((20, 2, 2), 100.0, dtype=torch.float64)
    both = MaternBundle(points, "matern32", 0.3, 1.0, 2).smooth(
        precision, 100 * values[:, None].expand(20, 2)
    )
    gram = 2 * kernel_matrix("matern32", 0.3, 1.0, points, points)
    total = gram @ torch.linalg.solve(gram + 0.01 * torch.eye(20, dtype=torch.float64), values)
    torch.testing.assert_close(both.mean.sum(1), total, rtol=0, atol=1e-9)
    torch.testing.assert_close(both.mean[:, 0], both.mean[:, 1], rtol=0, atol=1e-9)


def test_refusals():
    gaps = torch.ones(2, dtype=torch.float64)
    with pytest.raises(InvalidArgument, match="expected one of matern12"):
        matern_ssm("rbf", 1.0, 1.0, gaps)
    with pytest.raises(InvalidArgument, match="lengthscale=-1"):
        matern_ssm("matern12", -1, 1.0, gaps)
    with pytest.raises(InvalidArgument, match="outputscale"):
        matern_ssm("matern12", 1.0, math.nan, gaps)
    with pytest.raises(InvalidArgument, match="ascending"):
        matern_ssm("matern12", 1.0, 1.0, -gaps)
    with pytest.raises(InvalidArgument, match="float32 or float64"):
        matern_ssm("matern12", 1.0, 1.0, gaps.long())
    with pytest.raises(InvalidArgument, match="each once"):
        MaternBundle(torch.tensor([0.0, 0.0, 1.0]), "matern12", 1.0, 1.0)
    with pytest.raises(InvalidArgument, match="single number"):
        matern_ssm("matern12", torch.ones(2), 1.0, gaps)

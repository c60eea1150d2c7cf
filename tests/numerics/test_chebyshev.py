"""Chebyshev series against numpy and scipy, polynomials, and gradcheck."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import chebyshev as oracle

from tensormill.errors import InvalidArgument
from tensormill.numerics import chebyshev

SIZES = [2, 3, 4, 13, 64, 129, 257]
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, factor=100.0):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    scale = max(float(expected.abs().max()), 1e-300)
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=factor * torch.finfo(actual.dtype).eps * scale, check_stride=False
    )


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_coefficients_are_inverse_along_any_dimension(m, dtype):
    values = randn(3, m, 2, dtype=dtype)
    for dim in (1, -2):
        coefficients = chebyshev.vals2coeffs(values, dim)
        assert coefficients.dtype == dtype
        close(chebyshev.coeffs2vals(coefficients, dim), values, 500)
    close(chebyshev.vals2coeffs(chebyshev.coeffs2vals(values, 1), 1), values, 500)


@pytest.mark.parametrize("m", SIZES)
def test_vals2coeffs_is_a_dct_of_type_one(m):
    fft = pytest.importorskip("scipy.fft")
    values = randn(m)
    expected = fft.dct(values.numpy()[::-1], type=1) / (m - 1)
    expected[[0, -1]] /= 2
    close(chebyshev.vals2coeffs(values), expected, 300)


@pytest.mark.parametrize("m", SIZES)
def test_nodes_are_numpys_ascending_and_end_at_the_ends(m):
    close(chebyshev.nodes(m), oracle.chebpts2(m), 10)
    x = chebyshev.nodes(m, (-0.3, 2.7))
    assert x[0] == -0.3 and x[-1] == 2.7 and bool((x.diff() > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [1, *SIZES])
def test_basis_and_evaluation_agree_with_numpy(m, dtype):
    x = torch.rand(101, dtype=torch.float64, generator=torch.Generator().manual_seed(m)) * 2 - 1
    x = x.to(dtype)
    close(chebyshev.basis(x, m), oracle.chebvander(x.double().numpy(), m - 1), 3 * m * m)
    c = randn(m, 3)
    expected = oracle.chebval(x.double().numpy(), c.numpy()).T
    close(chebyshev.evaluate(c.to(dtype), x), expected, 3 * m * m)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.floats(-50, 50), st.floats(0.01, 100), st.integers(0, 10**6))
def test_polynomials_below_the_degree_are_reproduced(m, a, width, seed):
    domain = (a, a + width)
    powers = randn(m, seed=seed)
    to_unit = lambda x: (2 * x - (domain[0] + domain[1])) / (domain[1] - domain[0])  # noqa: E731
    polynomial = lambda x: torch.as_tensor(oracle.chebval(to_unit(x).numpy(), powers.numpy()))  # noqa: E731
    c = chebyshev.vals2coeffs(polynomial(chebyshev.nodes(m, domain)))
    x = a + width * torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    # A point is known to the rounding of its absolute value, over the width; slopes are below m^2.
    slack = 1e-15 * m**2 * (10 + abs(a) / width) * 10
    error = chebyshev.evaluate(c[:, None], x, domain)[:, 0] - polynomial(x)
    assert float(error.abs().max()) <= slack * float(powers.abs().sum())


@pytest.mark.parametrize("m", [1, 2, 3, 4, 13, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_calculus_agrees_with_numpy(m, dtype):
    c = randn(2, m, dtype=dtype, seed=m)
    domain = (-0.5, 3.0)
    high = c.to(torch.complex128 if c.is_complex() else torch.float64).numpy()
    expected = np.stack([oracle.chebder(row, scl=2 / 3.5) for row in high])
    close(chebyshev.differentiate(c, 1, domain), expected, 10 * m)
    antiderivative = [oracle.chebint(row, scl=3.5 / 2) for row in high]
    expected = [oracle.chebval(1, row) - oracle.chebval(-1, row) for row in antiderivative]
    torch.testing.assert_close(chebyshev.integrate(c, -1, domain), torch.tensor(np.array(expected), dtype=dtype),
                               rtol=0, atol=50 * torch.finfo(dtype).eps * float(c.abs().sum()))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_of_first_and_second_order(dtype):
    x = torch.tensor([-1.0, -0.3, 0.4, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    c = randn(6, 2, dtype=dtype).requires_grad_()
    evaluate = lambda c, x: chebyshev.evaluate(c, x, (-1.5, 1.25))  # noqa: E731
    assert torch.autograd.gradcheck(evaluate, (c, x))
    assert torch.autograd.gradgradcheck(evaluate, (c, x))
    values = randn(7, 2, dtype=dtype).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: chebyshev.vals2coeffs(v, 0), (values,))
    assert torch.autograd.gradcheck(lambda v: chebyshev.coeffs2vals(v, 0), (values,))
    assert torch.autograd.gradcheck(lambda v: chebyshev.differentiate(v, 0), (values,))
    assert torch.autograd.gradcheck(lambda v: chebyshev.integrate(v, 0), (values,))


def test_interpolation_agrees_with_scipys_barycentric():
    interpolate = pytest.importorskip("scipy.interpolate")
    x = chebyshev.nodes(20, (0.0, 2.0))
    values = torch.exp(x).sin()
    points = torch.linspace(0, 2, 37, dtype=torch.float64)
    expected = interpolate.BarycentricInterpolator(x.numpy(), values.numpy())(points.numpy())
    close(chebyshev.evaluate(chebyshev.vals2coeffs(values)[:, None], points, (0.0, 2.0))[:, 0], expected, 1e3)


def test_resampling_by_splines_is_exact_on_cubics_and_by_waves_on_waves():
    x = torch.linspace(-1, 2, 9, dtype=torch.float64)
    points = torch.linspace(-1.2, 2.2, 17, dtype=torch.float64)
    cubic = lambda x: 1 + x - 2 * x**2 + 0.5 * x**3  # noqa: E731
    values = torch.stack([cubic(x), -cubic(x)])
    close(chebyshev.resample(values, x, points, 1), torch.stack([cubic(points), -cubic(points)]), 1e3)
    for n in (7, 8):
        grid = 0.3 + torch.arange(n, dtype=torch.float64) * (2.5 / n)
        wave = lambda x: 1 + torch.sin(2 * math.pi * 3 * x / 2.5) - torch.cos(2 * math.pi * x / 2.5)  # noqa: E731
        close(chebyshev.resample(wave(grid), grid, points, 0, period=2.5), wave(points), 1e3)
        v = wave(grid).requires_grad_()
        assert torch.autograd.gradcheck(
            lambda v, g=grid: chebyshev.resample(v, g, points, 0, period=2.5), (v,)
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chebyshev.nodes(1), "m=1"),
        (lambda: chebyshev.nodes(3, (1.0, 1.0)), "a < b"),
        (lambda: chebyshev.nodes(3, (0.0, math.inf)), "finite"),
        (lambda: chebyshev.vals2coeffs(torch.ones(3), 2), "dim=2"),
        (lambda: chebyshev.vals2coeffs(torch.ones(3, dtype=torch.int64)), "floating"),
        (lambda: chebyshev.basis(torch.ones(3), 0), "m=0"),
        (lambda: chebyshev.evaluate(torch.ones(3), torch.ones(3)), "expected .m, r."),
        (lambda: chebyshev.resample(torch.ones(3), torch.arange(3), torch.ones(1)), "at least 4"),
        (lambda: chebyshev.resample(torch.ones(4), torch.tensor([0, 2, 1, 3]), torch.ones(1)), "ascending"),
        (lambda: chebyshev.resample(torch.ones(4), torch.tensor([0, 1, 3, 4]), torch.ones(1), period=4.0), "uniform"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()


def test_examples_in_docstrings():
    assert doctest.testmod(chebyshev).failed == 0

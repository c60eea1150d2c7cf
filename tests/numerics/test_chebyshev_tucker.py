"""Chebyshev-Tucker functions: exactness, tolerances, invariances, calculus against autograd, files, bad input."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import chebyshev as oracle

from tensormill.errors import CheckpointError, InvalidArgument
from tensormill.numerics import chebyshev, chebyshev_tucker
from tensormill.numerics.chebyshev_tucker import ChebTucker, cell_centres
from tensormill.numerics.factorized import TuckerTensor

BOX = [(-1.0, 1.0), (0.0, 2.5), (-3.0, -1.0)]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def inside(n, box=BOX, seed=0, dtype=torch.float64):
    low, high = torch.tensor(box, dtype=torch.float64).unbind(1)
    unit = torch.rand(n, len(box), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (low + (high - low) * unit).to(dtype)


def bump(x):
    """Smooth, not separable, the same in no two variables."""
    return 1 / (1.5 + torch.sin(x[..., 0] + 0.5 * x[..., 1 % x.shape[-1]]) * torch.cos(0.7 * x[..., -1]))


def gaussians(n, seed, box=BOX):
    centres, widths, weights = (
        inside(n, box, seed),
        0.5 + inside(n, [(0, 1)], seed + 1)[:, 0],
        randn(n, seed=seed + 2),
    )

    def f(x):
        return (weights * torch.exp(-(x[..., None, :] - centres).square().sum(-1) * widths)).sum(-1)

    factors = [
        lambda x, part, k=k: torch.exp(-widths[part] * (x[:, None] - centres[part, k]) ** 2) for k in range(3)
    ]
    return f, weights, factors


def largest(f, exact, x):
    return float((f(x) - exact(x)).abs().max() / exact(x).abs().max())


@pytest.mark.parametrize("method", ["hosvd", "hooi", "aca"])
def test_polynomials_are_reproduced(method):
    c = randn(5, 4, 3)

    def polynomial(x):
        t = [(2 * x[:, k] - a - b) / (b - a) for k, (a, b) in enumerate(BOX)]
        return torch.as_tensor(oracle.chebval3d(*[v.numpy() for v in t], c.numpy()))

    f = ChebTucker.from_function(polynomial, BOX, m=(6, 5, 5), tol=1e-13, method=method)
    x = inside(200)
    assert largest(f, polynomial, x) < 1e-12
    assert f.lengths == (5, 4, 3)
    for factor in f.coefficients.factors:
        torch.testing.assert_close(
            factor.mT @ factor, torch.eye(factor.shape[1], dtype=torch.float64), rtol=0, atol=1e-11
        )


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 20), st.sampled_from([1e-2, 1e-4, 1e-7, 1e-10]), st.integers(0, 10**6))
def test_error_is_below_the_tolerance_on_random_gaussians(n, tol, seed):
    f, weights, factors = gaussians(n, seed)
    grid = torch.cartesian_prod(*[chebyshev.nodes(20, ab) for ab in BOX])
    rms = float(f(grid).square().mean().sqrt())
    for approximate in (
        ChebTucker.from_function(f, BOX, tol=tol),
        ChebTucker.from_cp(weights, factors, BOX, tol=tol, block=7),
    ):
        found = approximate.error_estimate(300, function=f, seed=seed)
        # rms error over rms value is what tol bounds, at Chebyshev-weighted points and up to what interpolation adds
        assert found.rms <= 3 * tol * rms
        assert found.scale > 0 and found.relative == found.maximum / found.scale
        assert approximate.accuracy.compression == tol
        assert float(found.maximum) <= 3 * approximate.accuracy.sup_bound


def test_separable_function_has_rank_one_and_symmetric_one_equal_ranks():
    f = ChebTucker.from_function(
        lambda x: torch.exp(x[:, 0]) * torch.sin(3 * x[:, 1]) / (4 + x[:, 2]), BOX, tol=1e-10
    )
    assert f.ranks == (1, 1, 1)
    g = ChebTucker.from_function(lambda x: torch.sin(2 * x.sum(-1)).exp(), [(-1, 1)] * 3, m=33, tol=1e-8)
    assert max(g.ranks) - min(g.ranks) <= 1  # the last mode gets what the others left of the tolerance
    assert ChebTucker.from_function(lambda x: 0 * x[:, 0], BOX).ranks == (1, 1, 1)


@pytest.mark.parametrize("d", [1, 2, 4])
def test_other_numbers_of_variables(d):
    box = [(-1, 1.5)] * d
    for method in ("hosvd", "aca"):
        f = ChebTucker.from_function(bump, box, m=25, tol=1e-5, method=method)
        x = inside(100, box)
        assert largest(f, bump, x) < 1e-4
        value, slope = f.value_and_grad(x)
        torch.testing.assert_close(value, f(x))
        assert slope.shape == (100, d)


def test_permuted_variables_permute_the_core():
    f = ChebTucker.from_function(bump, BOX, m=25, rank=4, tol=1e-14, chop=False)
    p = ChebTucker.from_function(
        lambda x: bump(x[:, [1, 2, 0]]), [BOX[2], BOX[0], BOX[1]], m=25, rank=4, tol=1e-14, chop=False
    )
    x = inside(50)
    # sequential truncation depends on the order of modes, by no more than the truncation itself
    assert largest(lambda x: p(x[:, [2, 0, 1]]), f, x) < 10 * largest(f, bump, x)


def test_cross_approximation_needs_fewer_values():
    asked = 0

    def counted(x):
        nonlocal asked
        asked += len(x)
        return bump(x)

    f = ChebTucker.from_function(counted, BOX, m=65, tol=1e-6, method="aca")
    assert f.accuracy.samples == asked < 65**3 / 2
    assert largest(f, bump, inside(300)) < 1e-5
    full = ChebTucker.from_function(bump, BOX, m=65, tol=1e-6)
    assert all(abs(a - b) <= 1 for a, b in zip(f.ranks, full.ranks, strict=True))


def test_adaptive_resolves_each_variable_and_warns_at_a_kink():
    f = ChebTucker.from_function(lambda x: torch.cos(25 * x[:, 0]) + x[:, 1] * x[:, 2], BOX, tol=1e-9)
    assert f.lengths[0] > 33 and f.lengths[1] <= 3
    assert largest(f, lambda x: torch.cos(25 * x[:, 0]) + x[:, 1] * x[:, 2], inside(200)) < 1e-8
    with pytest.warns(UserWarning, match="not resolved at m_max=33"):
        ChebTucker.from_function(lambda x: (x[:, 0] - 0.1).abs() + x[:, 1] + x[:, 2], BOX, tol=1e-6, m_max=33)


@pytest.mark.parametrize("n", [128, 200])
def test_algorithms_3_and_4_agree_and_grids_converge(n):
    f, weights, factors = gaussians(12, 5)
    tables = [factor(cell_centres(n, ab), slice(0, 12)) for factor, ab in zip(factors, BOX, strict=True)]
    reduced = ChebTucker.from_cp(weights, tables, BOX, m=33, tol=1e-6)
    whole = ChebTucker.from_cp(weights, tables, BOX, m=33, tol=1e-6, method="full")
    polished = ChebTucker.from_cp(weights, tables, BOX, m=33, tol=1e-6, n_als=3)
    assert polished.ranks == reduced.ranks
    x = inside(300)
    scale = float(f(x).abs().max())
    assert float((reduced(x) - whole(x)).abs().max()) < 1e-5 * scale
    assert float((polished(x) - whole(x)).abs().max()) < 1e-5 * scale
    assert max(abs(a - b) for a, b in zip(reduced.ranks, whole.ranks, strict=True)) <= 1
    assert largest(reduced, f, x) < 1e-5  # the spline's error, of fourth order in the cell

    if n == 128:
        sides = torch.meshgrid(*[cell_centres(40, ab) for ab in BOX], indexing="ij")
        from_grid = ChebTucker.from_grid(f(torch.stack(sides, -1)), BOX, m=25, tol=1e-6)
        assert largest(from_grid, f, x) < 1e-3


def test_periodic_and_vertex_grids():
    wave = lambda x: torch.sin(math.pi * x[..., 0]) * torch.cos(2 * math.pi * x[..., 1])  # noqa: E731
    box = [(-1.0, 1.0), (0.0, 1.0)]
    for grid in ("cells", "vertices"):
        axes = [cell_centres(16, ab) if grid == "cells" else ab[0] + (ab[1] - ab[0]) / 16 * torch.arange(16).double()
                for ab in box]  # fmt: skip
        values = wave(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1))
        f = ChebTucker.from_grid(values, box, m=25, tol=1e-9, grid=grid, periodic=True)
        assert f.ranks == (1, 1) and largest(f, wave, inside(100, box)) < 1e-8
    cubic = lambda x: (1 + x[..., 0] ** 3) * (x[..., 1] - x[..., 1] ** 2)  # noqa: E731
    axes = [torch.linspace(*ab, 9, dtype=torch.float64) for ab in box]
    values = cubic(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1))
    for grid in ("vertices", axes):
        f = ChebTucker.from_grid(values, box, tol=1e-10, grid=grid)
        assert largest(f, cubic, inside(100, box)) < 1e-8


def test_rescaled_terms_give_the_same_function():
    _, weights, factors = gaussians(12, 5)
    tables = [factor(cell_centres(100, ab), slice(0, 12)) for factor, ab in zip(factors, BOX, strict=True)]
    scales = torch.logspace(-30, 30, 12, dtype=torch.float64)
    a = ChebTucker.from_cp(weights, tables, BOX, m=33, tol=1e-7)
    b = ChebTucker.from_cp(
        weights / scales, [tables[0] * scales, tables[1], tables[2]], BOX, m=33, tol=1e-7, block=5
    )
    assert a.ranks == b.ranks and a.lengths == b.lengths
    x = inside(50)
    torch.testing.assert_close(a(x), b(x), rtol=0, atol=1e-11 * float(a(x).abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluation_in_any_shape_and_on_grids(dtype):
    f = ChebTucker.from_function(bump, BOX, m=25, tol=1e-5, dtype=dtype)
    assert f.dtype == dtype
    x = inside(24, dtype=dtype)
    value = f(x)
    rounding = 2000 * torch.finfo(dtype).eps
    for shape in ((24,), (4, 6), (2, 3, 4), ()):
        points = x[: max(1, math.prod(shape))].reshape(*shape, 3)
        torch.testing.assert_close(
            f(points), value[: max(1, math.prod(shape))].reshape(shape), rtol=0, atol=rounding
        )
    assert f(x[:0]).shape == (0,) and f.grad(x[:0]).shape == (0, 3)
    axes = [x[:3, 0], x[:5, 1], 7]
    grid = f.on_grid(axes)
    assert isinstance(grid, TuckerTensor) and grid.shape == (3, 5, 7)
    points = torch.cartesian_prod(axes[0], axes[1], cell_centres(7, BOX[2], dtype=dtype)).reshape(3, 5, 7, 3)
    torch.testing.assert_close(grid.full(), f(points), rtol=0, atol=rounding)
    torch.testing.assert_close(grid[:, 2].full(), f(points[:, 2]), rtol=0, atol=rounding)


def test_evaluation_agrees_with_numpy():
    f = ChebTucker.from_function(bump, BOX, m=17, tol=1e-5)
    x = inside(20)
    t = [((2 * x[:, k] - a - b) / (b - a)).numpy() for k, (a, b) in enumerate(BOX)]
    expected = oracle.chebval3d(*t, f.coefficients.full().numpy())
    torch.testing.assert_close(f(x), torch.from_numpy(expected), rtol=0, atol=1e-13)


def test_complex_functions():
    wave = lambda x: torch.polar(torch.ones_like(x[..., 0]), 2 * x.sum(-1)) + bump(x)  # noqa: E731
    for method in ("hosvd", "aca"):
        f = ChebTucker.from_function(wave, BOX, m=25, tol=1e-6, method=method)
        assert f.dtype == torch.complex128
        assert largest(f, wave, inside(100)) < 1e-5


def test_gradient_agrees_with_autograd_and_gradcheck_passes():
    f = ChebTucker.from_function(bump, BOX, m=17, tol=1e-4)
    x = torch.cat((inside(6), torch.tensor([[a for a, _ in BOX], [b for _, b in BOX]], dtype=torch.float64)))
    x.requires_grad_()
    (slope,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    torch.testing.assert_close(f.grad(x), slope, rtol=0, atol=1e-11)
    for k in range(3):
        torch.testing.assert_close(f.diff(k)(x), slope[:, k], rtol=0, atol=1e-11)
    twice = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)[0][:, 1]
    torch.testing.assert_close(f.diff(0).diff(1)(x), twice, rtol=0, atol=1e-10)
    torch.testing.assert_close(f.diff(1, order=2)(x), f.diff(1).diff(1)(x))
    few = inside(3, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(f, (few,)) and torch.autograd.gradgradcheck(f, (few,))
    core = f.coefficients.core.clone().requires_grad_()
    rebuilt = lambda core: ChebTucker(TuckerTensor(core, f.coefficients.factors), f.domain)(few.detach())  # noqa: E731
    assert torch.autograd.gradcheck(rebuilt, (core,))


def test_integrals_against_gauss_legendre():
    f = ChebTucker.from_function(bump, BOX, m=33, tol=1e-10)
    import numpy as np

    t, w = np.polynomial.legendre.leggauss(40)
    points, weights = [], []
    for a, b in BOX:
        points.append(torch.from_numpy(0.5 * (a + b) + 0.5 * (b - a) * t))
        weights.append(torch.from_numpy(0.5 * (b - a) * w))
    values = bump(torch.cartesian_prod(*points)).reshape(40, 40, 40)
    exact = torch.einsum("abc,a,b,c->", values, *weights)
    assert abs(float(f.integrate() - exact)) < 1e-8
    partial = f.integrate([0, -1])
    assert partial.ndim == 1 and partial.domain == (BOX[1],)
    expected = torch.einsum("abc,a,c->b", values, weights[0], weights[2])
    torch.testing.assert_close(partial(points[1][:, None]), expected, rtol=0, atol=1e-8)


def test_arithmetic_and_rounding():
    f = ChebTucker.from_function(bump, BOX, m=33, tol=1e-9)
    g = ChebTucker.from_function(lambda x: torch.cos(x.sum(-1)), BOX, m=17, tol=1e-9)
    x = inside(100)
    torch.testing.assert_close((2 * f - g / 4)(x), 2 * f(x) - 0.25 * g(x), rtol=0, atol=1e-12)
    total = f + f
    assert total.ranks == tuple(2 * r for r in f.ranks)
    rounded = total.round(1e-8)
    assert all(a <= b for a, b in zip(rounded.ranks, f.ranks, strict=True))
    assert largest(rounded, lambda x: 2 * f(x), x) < 1e-7
    assert float((f - f).norm()) < 1e-13 * float(f.norm())
    coarse = f.round(1e-3)
    assert coarse.num_stored < f.num_stored and float((coarse - f).norm()) <= 1e-3 * float(f.norm())
    assert coarse.nbytes == 8 * coarse.num_stored and "ranks=" in repr(coarse)


def test_points_outside():
    f = ChebTucker.from_function(bump, BOX, m=9, tol=1e-2)
    x = torch.tensor([[0.0, 1.0, -2.0], [2.0, 1.0, -2.0]], dtype=torch.float64)
    with pytest.raises(InvalidArgument, match=r"given a point \[2.0, 1.0, -2.0\] outside"):
        f(x)
    assert f(x, outside="nan").isnan().tolist() == [False, True]
    assert f.grad(x, outside="nan").isnan().all(1).tolist() == [False, True]
    assert f(x, outside="clamp")[1] == f(torch.tensor([[1.0, 1.0, -2.0]]).double())[0]
    assert torch.isfinite(f(torch.tensor([[1.0 + 1e-13, 2.5, -1.0]]).double())).all()


def test_save_and_load(tmp_path):
    f = ChebTucker.from_function(bump, BOX, m=17, tol=1e-6)
    f.save(tmp_path / "f.safetensors")
    g = ChebTucker.load(tmp_path / "f.safetensors")
    assert g.domain == f.domain and torch.equal(g.coefficients.core, f.coefficients.core)
    torch.testing.assert_close(g(inside(9)), f(inside(9)), rtol=0, atol=1e-14)
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]
    content = (tmp_path / "f.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-9])
    (tmp_path / "noise").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    from safetensors.torch import save_file

    save_file({"core": torch.ones(1)}, tmp_path / "other")
    for name in ("cut", "noise", "other", "missing"):
        with pytest.raises(CheckpointError):
            ChebTucker.load(tmp_path / name)
    with pytest.raises(OSError):
        f.save(tmp_path / "no" / "folder")


def test_scalar_functions_and_progress():
    told = []
    f = ChebTucker.from_function(
        lambda x, y: math.exp(x * y), [(0, 1), (0, 1)], m=9, vectorized=False, progress=told.append
    )
    assert told == ["sampling at 9 x 9 nodes"]
    assert largest(f, lambda x: torch.exp(x.prod(-1)), inside(20, [(0, 1)] * 2)) < 1e-6
    assert f.to(dtype=torch.float32)(torch.rand(5, 2)).dtype == torch.float32


def test_float32_with_a_small_tolerance_warns():
    with pytest.warns(UserWarning, match="use float64"):
        ChebTucker.from_function(bump, BOX, m=5, tol=1e-8, dtype=torch.float32)


ONE = torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChebTucker.from_function(bump, BOX, m=1), "m=1"),
        (lambda: ChebTucker.from_function(bump, BOX, m=(3, 3)), "or 3 of them"),
        (lambda: ChebTucker.from_function(bump, BOX, m="many"), "'adaptive'"),
        (lambda: ChebTucker.from_function(bump, BOX, tol=0), "tol=0"),
        (lambda: ChebTucker.from_function(bump, BOX, m=5, rank=0), "rank=0"),
        (lambda: ChebTucker.from_function(bump, BOX, method="svd"), "given method 'svd'"),
        (lambda: ChebTucker.from_function(bump, [], m=5), "given domain"),
        (lambda: ChebTucker.from_function(bump, [(1, 0)], m=5), "a < b"),
        (lambda: ChebTucker.from_function(lambda x: x, BOX, m=5), "vectorized=False"),
        (lambda: ChebTucker.from_function(lambda x: 1 / x[:, 0], BOX, m=5), r"not finite at \[0.0"),
        (lambda: ChebTucker.from_grid(torch.ones(4, 4).double(), BOX), "3 dimensions"),
        (lambda: ChebTucker.from_grid(math.nan * torch.ones(4).double(), [(0, 1)]), "non-finite value at grid index"),
        (lambda: ChebTucker.from_grid(torch.ones(4).double(), [(0, 1)], grid="nodes"), "given grid"),
        (lambda: ChebTucker.from_cp(ONE[:0], [torch.ones(4, 0).double()], [(0, 1)]), "at least one term"),
        (lambda: ChebTucker.from_cp(ONE, [torch.ones(4, 2).double()], [(0, 1)]), "expected .n, R."),
        (lambda: ChebTucker.from_cp(ONE, [], [(0, 1)]), "given 0 factors"),
        (lambda: ChebTucker.from_cp(ONE, [torch.ones(4, 1).double()], [(0, 1)], method="x"), "'reduced'"),
        (lambda: ChebTucker.from_cp(ONE, [torch.ones(4, 1).double()], [(0, 1)], block=0), "block=0"),
        (lambda: ChebTucker.from_cp(ONE, [lambda x, part: x], [(0, 1)], m=5), "returns"),
        (lambda: ChebTucker.from_cp(ONE, [lambda x, part: x[:, None] / 0], [(0, 1)], m=5), "NaN"),
    ],
)  # fmt: skip
def test_bad_constructions_are_refused(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()


def test_bad_use_is_refused():
    f = ChebTucker.from_function(bump, BOX, m=9, tol=1e-2)
    g = ChebTucker.from_function(bump, BOX[:2], m=9, tol=1e-2)
    for call, message in [
        (lambda: f(torch.ones(3, 2).double()), "expected .*3"),
        (lambda: f(torch.ones(3)), "float64"),
        (lambda: f(inside(2), outside="wrap"), "'clamp'"),
        (lambda: f + g, "expected a ChebTucker on"),
        (lambda: f.diff(3), "given mode 3"),
        (lambda: f.integrate(5), "given modes"),
        (lambda: f.on_grid([3, 3]), "given 2 axes"),
        (lambda: f.on_grid([3, 3, torch.ones(2, 2)]), "axis 2"),
        (lambda: f.on_grid([3, 3, torch.ones(2)]), "outside the box"),
        (lambda: (f + f).error_estimate(), "no function"),
        (lambda: f.error_estimate(0), "n=0"),
        (lambda: f.round(-1), "tol=-1"),
        (lambda: ChebTucker(f.coefficients, BOX[:2]), "as many"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            call()


def test_examples_in_docstrings():
    assert doctest.testmod(chebyshev_tucker).failed == 0

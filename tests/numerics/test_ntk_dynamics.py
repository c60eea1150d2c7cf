"""Training dynamics against neural-tangents' frozen predictions, step-by-step descent, scipy, and their limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tensormill.errors import InvalidArgument
from tensormill.numerics.ntk import (
    empirical_ntk,
    largest_stable_rate,
    predict_mse,
    predict_mse_ensemble,
    predict_ode,
)
from tensormill.numerics.ntk.infinite import Dense, Erf, Sequential

F64 = torch.float64
REFERENCE = np.load(Path(__file__).with_name("ntk_reference") / "kernels.npz")
NETWORK = Sequential(Dense(1.5, 0.1), Erf(), Dense(1.3, 0.2), Erf(), Dense(1.0))


def problem(n=6, m=4, outputs=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=F64, generator=generator)

    x, z, y = draw(n, 3), draw(m, 3), draw(n, outputs)
    k_dd, k_td = NETWORK.kernel(x, get="ntk"), NETWORK.kernel(z, x, "ntk")
    return k_dd, k_td, y, draw(n, outputs), draw(m, outputs)


@pytest.mark.parametrize(
    ("get", "label", "t"),
    [("ntk", "3", 3.0), ("ntk", "100", 100.0), ("ntk", "inf", None), ("nngp", "inf", None)],
)
def test_neural_tangents(get, label, t):
    """neural-tangents averages its loss over inputs and outputs, so its time runs slower by the number of outputs."""
    x, z, y = (torch.tensor(REFERENCE[name]) for name in ("x1", "x2", "predict/y"))
    nngp = [NETWORK.kernel(a, b, "nngp") for a, b in ((x, None), (z, x), (z, None))]
    ntk = [NETWORK.kernel(a, b, "ntk") for a, b in ((x, None), (z, x))] if get == "ntk" else [None, None]
    time = None if t is None else t / y.shape[1]
    found = predict_mse_ensemble(*nngp, y, *ntk, t=time, lr=0.7, diag_reg=1e-3)
    expected = torch.tensor(REFERENCE[f"predict/{get}/{label}/mean"])
    torch.testing.assert_close(found.mean, expected, rtol=1e-7, atol=1e-8)
    covariance = torch.tensor(REFERENCE[f"predict/{get}/{label}/covariance"])
    torch.testing.assert_close(found.covariance, covariance, rtol=1e-7, atol=1e-8)


def test_limits():
    k_dd, k_td, y, f0, f0_test = problem()
    torch.testing.assert_close(predict_mse(k_dd, y, t=0, f0_train=f0), f0)
    torch.testing.assert_close(predict_mse(k_dd, y, k_td, 0, f0_train=f0, f0_test=f0_test), f0_test)
    torch.testing.assert_close(predict_mse(k_dd, y, f0_train=f0), y)
    regression = k_td @ torch.linalg.solve(k_dd, y)
    torch.testing.assert_close(predict_mse(k_dd, y, k_td), regression, rtol=1e-6, atol=1e-6)
    late = predict_mse(k_dd, y, k_td, 1e12)
    torch.testing.assert_close(late, regression, rtol=1e-6, atol=1e-6)
    ridge = k_td @ torch.linalg.solve(k_dd + 0.1 * k_dd.diagonal().mean() * torch.eye(6, dtype=F64), y)
    torch.testing.assert_close(predict_mse(k_dd, y, k_td, diag_reg=0.1), ridge)


def test_descent_is_what_stepping_gives():
    k_dd, k_td, y, f0, f0_test = problem()
    lr = 0.6 * largest_stable_rate(k_dd)
    f, g = f0.clone(), f0_test.clone()
    for _ in range(37):
        residual = f - y
        f, g = f - lr * k_dd @ residual / 6, g - lr * k_td @ residual / 6
    torch.testing.assert_close(predict_mse(k_dd, y, t=37, lr=lr, f0_train=f0, rule="descent"), f)
    found = predict_mse(k_dd, y, k_td, 37, lr, f0, f0_test, rule="descent")
    torch.testing.assert_close(found, g)


@pytest.mark.parametrize("blocks", [False, True])
def test_flow_solves_its_equation(blocks):
    """Against scipy's integrator, at several times at once; with and without a kernel entry for each output."""
    k_dd, k_td, y, f0, f0_test = problem()
    if blocks:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 2)).double()
        x, z = torch.randn(6, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
        k_dd, k_td = empirical_ntk(module, x), empirical_ntk(module, z, x)
    times = [3.0, 0.0, 50.0]
    for cross, start in ((None, f0), (k_td, f0_test)):
        closed = predict_mse(k_dd, y, cross, times, 0.7, f0, f0_test)
        assert closed.shape == (3, *start.shape)
        integrated = predict_ode(k_dd, y, "mse", times, cross, 0.7, f0, f0_test)
        torch.testing.assert_close(closed, integrated, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(closed[1], start)


def test_cross_entropy():
    """Against small steps of descent on the loss that torch defines; with classes, probabilities, and as a callable."""
    k_dd, k_td, _, f0, f0_test = problem(outputs=3)
    classes = torch.tensor([0, 1, 2, 1, 0, 2])
    f, g = f0.clone(), f0_test.clone()
    steps = 4000
    for _ in range(steps):
        leaf = f.requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(leaf, classes), leaf)
        f, g = f.detach() - 5.0 / steps * k_dd @ gradient, g - 5.0 / steps * k_td @ gradient
    one_hot = nn.functional.one_hot(classes).double()
    found = predict_ode(k_dd, classes, "cross_entropy", 5.0, f0_train=f0)
    torch.testing.assert_close(found, f, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        predict_ode(k_dd, one_hot, t=5.0, k_td=k_td, f0_train=f0, f0_test=f0_test), g, rtol=1e-3, atol=1e-3
    )
    by_hand = predict_ode(k_dd, one_hot, nn.functional.cross_entropy, 5.0, f0_train=f0)
    torch.testing.assert_close(by_hand, found, rtol=1e-5, atol=1e-6)


def test_ensemble_of_linearized_networks():
    """Mean and covariance against 4000 draws of f_0 from the prior that each follow `predict_mse`."""
    generator = torch.Generator().manual_seed(1)
    x, z = (torch.randn(n, 3, dtype=F64, generator=generator) for n in (5, 4))
    y = torch.randn(5, 1, dtype=F64, generator=generator)
    nngp, ntk = NETWORK.kernel(torch.cat([x, z]))
    prior = torch.linalg.cholesky(nngp + 1e-10 * torch.eye(9, dtype=F64))
    f0 = prior @ torch.randn(9, 4000, dtype=F64, generator=generator)
    for t in (0.0, 2.0, 1e3):
        draws = predict_mse(ntk[:5, :5], y.expand(5, 4000), ntk[5:, :5], t, f0_train=f0[:5], f0_test=f0[5:])
        found = predict_mse_ensemble(nngp[:5, :5], nngp[5:, :5], nngp[5:, 5:], y, ntk[:5, :5], ntk[5:, :5], t)
        scale = float(found.covariance.diagonal().max().sqrt())
        assert float((draws.mean(1) - found.mean[:, 0]).abs().max()) < 5 * scale / 4000**0.5
        torch.testing.assert_close(
            torch.cov(draws), found.covariance, rtol=0, atol=5 * scale**2 * (2 / 4000) ** 0.5
        )
        torch.testing.assert_close(found.deviation, found.covariance.diagonal().sqrt())
    trained = predict_mse_ensemble(nngp[:5, :5], nngp[:5, :5], nngp[:5, :5], y, ntk[:5, :5], ntk[:5, :5])
    torch.testing.assert_close(trained.mean, y)  # no doubt is left at the training inputs
    assert float(trained.covariance.abs().max()) < 1e-8
    assert predict_mse_ensemble(
        nngp[:5, :5], nngp[5:, :5], nngp[5:, 5:], y, t=[1.0, 2.0]
    ).covariance.shape == (2, 4, 4)


def test_equal_inputs():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=F64)
    y = torch.tensor([[1.0], [3.0], [0.0]], dtype=F64)
    kernel = NETWORK.kernel(x, get="ntk")
    with pytest.raises(InvalidArgument, match="smallest eigenvalue"):
        predict_mse(kernel, y, kernel)
    late = predict_mse(kernel, y, kernel, 1e6)
    torch.testing.assert_close(late[:2], torch.full((2, 1), 2.0, dtype=F64), rtol=1e-6, atol=1e-6)


def test_float32():
    k_dd, k_td, y, f0, f0_test = problem()
    found = predict_mse(*(v.float() for v in (k_dd, y, k_td)), 5.0, 1.0, f0.float(), f0_test.float())
    expected = predict_mse(k_dd, y, k_td, 5.0, 1.0, f0, f0_test)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


K, Y = torch.eye(3, dtype=F64), torch.ones(3, 1, dtype=F64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: predict_mse(K, Y, t=-1), ">= 0"),
        (lambda: predict_mse(K, Y, t=[1.0, float("nan")]), ">= 0"),
        (lambda: predict_mse(K, Y, lr=0), "positive"),
        (lambda: predict_mse(K, Y, diag_reg=-1), "diag_reg"),
        (lambda: predict_mse(K, Y[:2]), "expected"),
        (lambda: predict_mse(K, Y[:, 0]), "training inputs, outputs"),
        (lambda: predict_mse(K, Y, K[:, :2]), "k_td"),
        (lambda: predict_mse(K, Y.float()), "like k_dd"),
        (lambda: predict_mse(K * float("nan"), Y), "not finite"),
        (lambda: predict_mse(K, Y, t=1, lr=6.0, rule="descent"), "diverges"),
        (lambda: predict_mse(K, Y, t=1.5, rule="descent"), "whole numbers"),
        (lambda: predict_mse(K, Y, t=1, rule="newton"), "expected one of"),
        (lambda: predict_mse(K, Y, f0_train=Y[:2]), "f0_train"),
        (lambda: predict_mse(K, Y, K, t=1, f0_test=Y[:2]), "f0_test"),
        (lambda: predict_mse_ensemble(K, K, K, Y, K), "both or neither"),
        (lambda: predict_mse_ensemble(K, K, K[:2], Y), "NNGP"),
        (lambda: predict_ode(K, Y, "hinge"), "expected"),
        (lambda: predict_ode(K, torch.ones(3, dtype=torch.int64)), "classes"),
        (lambda: predict_ode(K, Y, t=float("inf")), "finite times"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()

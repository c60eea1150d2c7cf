"""Gaussian moments of activations against quadrature in polar coordinates, Price's theorem, and themselves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tensormill.errors import InvalidArgument
from tensormill.numerics.dual_activations import (
    Polynomial,
    activation_function,
    activation_names,
    dual_activation,
)

F64 = torch.float64
CLOSED = [
    "relu",
    "leaky_relu",
    "abs",
    "sign",
    "step",
    "erf",
    "sin",
    "cos",
    "exp",
    "gaussian",
    "gelu",
    "identity",
    "square",
]
SMOOTH = ["erf", "sin", "cos", "exp", "gaussian", "gelu", "identity", "square"]
CUBIC = Polynomial((0.3, -1.0, 0.5, 0.2))
KINKS = {
    "relu": [0.0, 1.0],
    "leaky_relu": [0.01, 1.0],
    "abs": [-1.0, 1.0],
    "sign": [0.0, 0.0],
    "step": [0.0, 0.0],
}


def polar(f, g, q, r, c, angles=60, radii=240):
    """E[f(u) g(v)] with u = sqrt(q) rho cos(phi), v = sqrt(r) rho cos(phi - theta); smooth between the kinks in phi."""
    theta = math.acos(c)
    edges = sorted(
        {(a % (2 * math.pi)) for a in (math.pi / 2, -math.pi / 2, theta + math.pi / 2, theta - math.pi / 2)}
    )
    edges = [*edges, edges[0] + 2 * math.pi]
    x, w = np.polynomial.legendre.leggauss(angles)
    y, v = np.polynomial.legendre.leggauss(radii)
    rho, weight = 6.5 * (y + 1), 6.5 * v
    total = 0.0
    for low, high in itertools.pairwise(edges):
        phi = (low + high) / 2 + (high - low) / 2 * x
        one = f(math.sqrt(q) * rho[:, None] * np.cos(phi))
        two = g(math.sqrt(r) * rho[:, None] * np.cos(phi - theta))
        total += (one * two * (weight * rho * np.exp(-rho * rho / 2))[:, None] * w).sum() * (high - low) / 2
    return total / (2 * math.pi)


def derivative(activation, order):
    """The derivative as a function of arrays: by autograd, or the slopes beside a kink."""
    if order and activation in KINKS:
        left, right = KINKS[activation]
        return lambda u: np.where(u > 0, right, left)
    function = activation_function(activation) if isinstance(activation, str) else activation

    def values(u):
        t = torch.tensor(u, dtype=F64, requires_grad=True)
        y = function(t)
        for _ in range(order):
            y = (
                torch.autograd.grad(y.sum(), t, create_graph=True)[0]
                if y.requires_grad
                else torch.zeros_like(t)
            )
        return y.detach().numpy()

    return values


PAIRS = [
    (1.0, 1.0, 0.3),
    (0.2, 1.7, -0.85),
    (1.3, 0.6, 0.999),
    (0.9, 0.9, -1.0),
    (2.0, 0.5, 1.0),
    (1.0, 1.0, 0.0),
]


def tensors(q, r, c, dtype=F64):
    return (torch.tensor(value, dtype=dtype) for value in (q, r, c * math.sqrt(q * r)))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("activation", [*CLOSED, CUBIC], ids=str)
def test_closed_forms(activation, pair):
    orders = [(0, 0), (0, 1), (1, 0), (1, 1)]
    if activation in SMOOTH or activation is CUBIC:
        orders += [(0, 2), (2, 0)]
    for i, j in orders:
        if activation in ("sign", "step") and (i or j):
            continue
        method = "auto" if activation == "gelu" and 1 in (i, j) and i != j else "exact"
        found = float(dual_activation(activation, (i, j), method)(*tensors(*pair)))
        expected = polar(derivative(activation, i), derivative(activation, j), *pair)
        # On the diagonal a kinked derivative's angle is known to sqrt(eps) only.
        loose = activation in KINKS and abs(pair[2]) == 1 and i + j > 0
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-7 if loose else 1e-10), (i, j)


@pytest.mark.parametrize(
    "activation", ["relu", "leaky_relu", "abs", "sign", "step", nn.LeakyReLU(0.3)], ids=str
)
def test_delta_functions(activation):
    """Orders with delta functions, by Price's theorem from the orders below."""
    q, r, s = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.7, 1.6, 0.4))
    stepped = activation in ("sign", "step")
    first = dual_activation(activation, (0, 0))(q, r, s)
    by_q, by_r, by_s = torch.autograd.grad(first, (q, r, s))
    torch.testing.assert_close(dual_activation(activation, (1, 1))(q, r, s), by_s)
    if not stepped:
        torch.testing.assert_close(dual_activation(activation, (0, 2))(q, r, s), 2 * by_r)
        torch.testing.assert_close(dual_activation(activation, (2, 0))(q, r, s), 2 * by_q)
        slope = torch.autograd.grad(dual_activation(activation, (1, 1))(q, r, s), s)[0]
        torch.testing.assert_close(dual_activation(activation, (2, 2))(q, r, s), slope)


@pytest.mark.parametrize("activation", [*SMOOTH, CUBIC, "tanh", "silu"], ids=str)
def test_price(activation):
    """d/ds E[f g] = E[f' g'] and 2 d/dr E[f g] = E[f g''], on and off the diagonal."""
    for pair in PAIRS:
        q, r, s = (t.requires_grad_() for t in tensors(*pair))
        _, by_r, by_s = torch.autograd.grad(dual_activation(activation)(q, r, s), (q, r, s))
        torch.testing.assert_close(dual_activation(activation, (1, 1))(q, r, s), by_s, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(
            dual_activation(activation, (0, 2))(q, r, s), 2 * by_r, rtol=1e-7, atol=1e-9
        )


@pytest.mark.parametrize("method", ["hermite", "quadrature"])
@pytest.mark.parametrize("activation", ["erf", "sin", "gaussian", "gelu", CUBIC], ids=str)
def test_numerical_methods(activation, method):
    q, r = torch.tensor([0.3, 1.0, 2.0], dtype=F64)[:, None], torch.tensor([0.5, 1.5], dtype=F64)
    s = 0.999 * (q * r).sqrt() * torch.tensor([1.0, -0.4], dtype=F64)
    for order in ((0, 0), (1, 1)):
        exact = dual_activation(activation, order)(q, r, s)
        found = dual_activation(activation, order, method)(q, r, s)
        torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)


def test_methods_agree_without_closed_form():
    q, r = torch.tensor([0.2, 1.0, 3.0], dtype=F64)[:, None], torch.tensor([0.7, 2.0], dtype=F64)
    s = 0.9 * (q * r).sqrt()
    for activation in ("tanh", "silu", "softplus", lambda u: torch.tanh(u) + u**2):
        for order in ((0, 0), (1, 1), (0, 2)):
            series = dual_activation(activation, order, "hermite")(q, r, s)
            grid = dual_activation(activation, order, "quadrature")(q, r, s)
            torch.testing.assert_close(series, grid, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "abs", *SMOOTH, "tanh"], ids=str)
def test_gradients(activation):
    q, r = (
        torch.tensor([0.3, 1.2], dtype=F64, requires_grad=True),
        torch.tensor([0.9], dtype=F64, requires_grad=True),
    )
    s = torch.tensor([[0.1, -0.4], [0.3, 0.2]], dtype=F64, requires_grad=True)
    for order in ((0, 0), (1, 1)):
        dual = dual_activation(activation, order)
        assert torch.autograd.gradcheck(dual, (q, r, s))
        if activation != "tanh":
            assert torch.autograd.gradgradcheck(dual, (q, r, s))


@pytest.mark.parametrize("activation", ["relu", "abs", "erf", "gelu", "tanh"])
@pytest.mark.parametrize("order", [(0, 0), (1, 1)])
def test_gradient_at_equal_inputs(activation, order):
    """Kernels of x against x': finite, right gradients where x = x' (0 along a kink of the kernel)."""
    other = torch.randn(5, dtype=F64, generator=torch.Generator().manual_seed(1))
    dual = dual_activation(activation, order)

    def kernel(x):
        return dual(x @ x, other @ other, x @ other)

    kinked = order == (1, 1) and activation in KINKS  # |x - x'|, known to sqrt(eps) only
    x = other.clone().requires_grad_()
    torch.autograd.backward(kernel(x))
    for step in torch.eye(5, dtype=F64):
        slope = (kernel(other + 1e-5 * step) - kernel(other - 1e-5 * step)) / 2e-5
        assert float(x.grad @ step) == pytest.approx(float(slope), rel=1e-5, abs=1e-4 if kinked else 1e-6)


def test_kinks_in_callables():
    """An unknown function with kinks is integrated with the right gradient, though its second derivative is a delta."""
    q, r, s = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.7, 1.6, 0.4))
    numbers = []
    for activation in (lambda u: u.clamp(min=0), "relu"):
        value = dual_activation(activation)(q, r, s)
        numbers.append(torch.stack([value, *torch.autograd.grad(value, (q, r, s))]))
    torch.testing.assert_close(numbers[0], numbers[1], rtol=1e-1, atol=1e-2)
    assert abs(float((numbers[0] - numbers[1]).detach()[0])) < 2e-3


@pytest.mark.parametrize("activation", CLOSED)
def test_float32(activation):
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(200, 4, dtype=F64, generator=generator) * 0.7 for _ in range(2))
    q, r, s = ((a * b).sum(1) for a, b in ((x, x), (y, y), (x, y)))
    dual = dual_activation(activation)
    torch.testing.assert_close(
        dual(q.float(), r.float(), s.float()).double(), dual(q, r, s), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("activation", ["relu", "erf", "sign", "gelu", "abs", "sin", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_extreme_variances(activation, dtype):
    """Zero, tiny and huge variances, and covariances beyond sqrt(q r) by rounding: finite values and gradients."""
    scale = torch.tensor([0.0, 1e-20, 1e-6, 1.0, 1e6, 1e15], dtype=dtype)
    q, r = scale[:, None].clone().requires_grad_(), scale[None].clone().requires_grad_()
    s = (scale.sqrt()[:, None] * scale.sqrt() * (1 + torch.finfo(dtype).eps)).requires_grad_()
    for order in ((0, 0), (1, 1)):
        if activation == "sign" and order == (1, 1):
            continue
        value = dual_activation(activation, order)(q, r, s)
        assert value.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), (q, r, s)))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["relu", "erf", "abs", "sin", "gelu", "gaussian", "step"]),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_dual_kernels_are_positive_semidefinite(activation, points, dimensions, seed):
    x = torch.randn(points, dimensions, dtype=F64, generator=torch.Generator().manual_seed(seed))
    gram = x @ x.T
    q = gram.diagonal()
    kernel = dual_activation(activation)(q[:, None], q, gram)
    torch.testing.assert_close(kernel, kernel.T)
    assert float(torch.linalg.eigvalsh(kernel)[0]) > -1e-9 * float(kernel.diagonal().max())


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(-1, 1), st.floats(0.1, 3), st.floats(0.1, 3))
def test_relu_is_homogeneous(q, r, c, a, b):
    q, r, s = tensors(q, r, c)
    dual = dual_activation("relu")
    torch.testing.assert_close(
        dual(a * a * q, b * b * r, a * b * s), a * b * dual(q, r, s), rtol=1e-9, atol=1e-9
    )


def test_known_functions_take_their_closed_form():
    q, r, s = tensors(0.8, 1.1, 0.2)
    for activation, name in [
        (torch.relu, "relu"),
        (nn.ReLU(), "relu"),
        (nn.GELU(), "gelu"),
        (torch.erf, "erf"),
    ]:
        assert dual_activation(activation, method="exact")(q, r, s) == dual_activation(name)(q, r, s)
    with pytest.raises(InvalidArgument, match="no closed form"):
        dual_activation(nn.GELU("tanh"), method="exact")
    for name in activation_names():
        assert dual_activation(name)(q, r, s).isfinite()


def test_empty_and_broadcast():
    dual = dual_activation("tanh")
    assert dual(*(torch.ones(0, dtype=F64),) * 3).shape == (0,)
    q, r = torch.ones(3, 1, dtype=F64), torch.ones(1, 2, dtype=F64)
    for method in ("hermite", "quadrature"):
        assert dual_activation("tanh", method=method)(q, r, torch.tensor(0.5, dtype=F64)).shape == (3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dual_activation("swishish"), "expected one of"),
        (lambda: dual_activation("relu", (0, -1)), "integers"),
        (lambda: dual_activation("relu", method="exactly"), "expected one of"),
        (lambda: dual_activation("tanh", method="exact"), "no closed form"),
        (lambda: dual_activation("relu", (0, 2), "quadrature"), "delta"),
        (lambda: dual_activation(3), "function of tensors"),
        (lambda: Polynomial([]), "at least one"),
        (lambda: dual_activation("relu")(1.0, 1.0, 1.0), "float32 or float64"),
        (lambda: dual_activation("relu")(torch.ones(2), torch.ones(3), torch.ones(1)), "broadcast"),
        (lambda: dual_activation("relu")(torch.ones(2), torch.ones(2).double(), torch.ones(1)), "one dtype"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()

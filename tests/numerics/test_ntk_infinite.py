"""Kernels of infinitely wide networks against neural-tangents' frozen arrays, a direct recursion, and invariants."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tensormill.errors import InvalidArgument, ModelError
from tensormill.numerics.dual_activations import Polynomial
from tensormill.numerics.ntk.infinite import (
    GELU,
    Activation,
    AvgPool,
    Conv,
    Dense,
    Dropout,
    Erf,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    ReLU,
    Residual,
    Sequential,
    from_module,
)

F64 = torch.float64
REFERENCE = np.load(Path(__file__).with_name("ntk_reference") / "kernels.npz")


def two_layers(activation, deviations):
    return Sequential(Dense(*deviations[0]), activation, Dense(*deviations[1]))


DENSE = {
    "relu": Sequential(Dense(1.5, 0.1), ReLU(), Dense(1.3, 0.2), ReLU(), Dense(1.0, 0.1)),
    "erf": Sequential(Dense(1.5, 0.1), Erf(), Dense(1.3, 0.2), Erf(), Dense(1.0)),
    "gelu": Sequential(Dense(1.2, 0.1), GELU(), Dense(1.3, 0.2), GELU(), Dense(1.0, 0.1)),
    "leaky_relu": two_layers(Activation(nn.LeakyReLU(0.1)), [(1.5, 0.1), (1.0, 0.1)]),
    "abs": Sequential(Dense(1.0, 0.3), Activation("abs"), Dense(1.0, 0.1), Activation("abs"), Dense()),
    "sin": two_layers(Activation("sin"), [(1.1, 0.1), (1.4, 0.1)]),
    "cos": two_layers(Activation("cos"), [(1.1, 0.1), (1.4, 0.1)]),
    "exp": two_layers(Activation("exp"), [(0.5, 0.1), (1.0, 0.1)]),
    "gaussian": two_layers(Activation("gaussian"), [(1.5, 0.1), (1.0, 0.1)]),
    "polynomial": two_layers(Activation(Polynomial([0.3, -1.0, 0.5, 0.2])), [(1.0, 0.1), (1.0, 0.1)]),
    "sign": two_layers(Activation("sign"), [(1.5, 0.1), (1.0, 0.1)]),
    "residual": Sequential(
        Dense(1.5, 0.1), Residual(ReLU(), Dense(1.2, 0.1), Erf(), Dense(1.1)), ReLU(), Dense(1.0, 0.1)
    ),
    "layer_norm": Sequential(Dense(1.5, 0.1), LayerNorm(), ReLU(), Dense(1.2), LayerNorm(), Dense()),
    "dropout": Sequential(Dense(1.5, 0.1), ReLU(), Dropout(0.25), Dense(1.2, 0.1), Erf(), Dense()),
}
CONVOLUTIONAL = {
    "flatten": Sequential(Conv(3, 1.4, 0.1), ReLU(), Conv(3, 1.2, 0.2), ReLU(), Flatten(), Dense(1.1, 0.1)),
    "valid": Sequential(
        Conv(3, 1.4, 0.1, padding="valid"),
        Erf(),
        Conv(2, 1.2, 0.2, padding="valid"),
        ReLU(),
        Flatten(),
        Dense(),
    ),
    "circular": Sequential(
        Conv(3, 1.4, 0.1, padding="circular"),
        GELU(),
        Conv(3, 1.2, 0.2, padding="circular"),
        Flatten(),
        Dense(),
    ),
    "global_pool": Sequential(
        Conv(3, 1.4, 0.1), ReLU(), Conv(3, 1.2, 0.2), ReLU(), GlobalAvgPool(), Dense(1.1, 0.1)
    ),
    "circular_pool": Sequential(
        Conv(3, 1.4, 0.1, padding="circular"),
        Erf(),
        Conv(3, 1.1, 0.1, padding="circular"),
        ReLU(),
        GlobalAvgPool(),
        Dense(),
    ),
    "average_pool": Sequential(
        Conv(3, 1.4, 0.1), ReLU(), AvgPool(2), Conv(3, 1.2, 0.2), ReLU(), Flatten(), Dense()
    ),
    "strided": Sequential(
        Conv(3, 1.4, 0.1, stride=2),
        ReLU(),
        Conv(2, 1.2, 0.2, padding="valid"),
        ReLU(),
        GlobalAvgPool(),
        Dense(),
    ),
    "resnet": Sequential(
        Conv(3, 1.4, 0.1),
        Residual(ReLU(), Conv(3, 1.2, 0.1), ReLU(), Conv(3, 1.1, 0.1)),
        LayerNorm(),
        ReLU(),
        AvgPool(2, 1),
        Flatten(),
        Dense(1.0, 0.1),
    ),
}


def inputs(group):
    names = ("x1", "x2") if group == "dense" else ("images1", "images2")
    arrays = [torch.tensor(REFERENCE[name]) for name in names]
    return arrays if group == "dense" else [a.permute(0, 3, 1, 2) for a in arrays]


@pytest.mark.parametrize("get", ["nngp", "ntk"])
@pytest.mark.parametrize(
    ("group", "name"), [("dense", name) for name in DENSE] + [("conv", name) for name in CONVOLUTIONAL]
)
def test_neural_tangents(group, name, get):
    network = (DENSE if group == "dense" else CONVOLUTIONAL)[name]
    x1, x2 = inputs(group)
    for suffix, other in (("12", x2), ("11", None)):
        expected = torch.tensor(REFERENCE[f"{group}/{name}/{get}{suffix}"])
        kinked = get == "ntk" and group == "dense"  # the angle between equal inputs, known to sqrt(eps)
        tolerance = 2e-7 if kinked else 1e-9
        torch.testing.assert_close(network.kernel(x1, other, get), expected, rtol=tolerance, atol=tolerance)
        # and the tiles, and the path that keeps a graph
        tiled = network.kernel(x1, other, get, batch=2)
        torch.testing.assert_close(tiled, expected, rtol=tolerance, atol=tolerance)
        graph = network.kernel(x1.clone().requires_grad_(), other, get, batch=2)
        assert graph.requires_grad
        torch.testing.assert_close(graph.detach(), expected, rtol=tolerance, atol=tolerance)


def test_float32():
    for group, networks in (("dense", DENSE), ("conv", CONVOLUTIONAL)):
        x1, x2 = inputs(group)
        for name, network in networks.items():
            for one, two in zip(network.kernel(x1.float(), x2.float()), network.kernel(x1, x2), strict=True):
                assert one.dtype == torch.float32
                torch.testing.assert_close(one.double(), two, rtol=2e-3, atol=2e-3, msg=name)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "erf", "residual", "layer_norm"])
def test_gradients_of_inputs(name):
    x1 = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    x2 = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: DENSE[name].kernel(a, b), (x1, x2))


@pytest.mark.parametrize("name", ["relu", "erf"])
def test_gradient_where_inputs_are_equal(name):
    """The covariance is smooth at x = x'; the tangent kernel of ReLU has a kink there, whose mean slope is taken."""
    network = DENSE[name]
    other = torch.randn(1, 3, dtype=F64, generator=torch.Generator().manual_seed(3))
    for get in ("nngp", "ntk"):
        x = other.clone().requires_grad_()
        network.kernel(x, other, get).sum().backward()
        for k in range(3):
            step = torch.zeros(1, 3, dtype=F64)
            step[0, k] = 1e-5
            slope = (
                float(network.kernel(other + step, other, get) - network.kernel(other - step, other, get))
                / 2e-5
            )
            assert float(x.grad[0, k]) == pytest.approx(slope, rel=1e-4, abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["relu", "erf", "gelu", "abs", "sin", "residual", "layer_norm"]),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(0, 2**31),
)
def test_symmetric_positive_semidefinite_and_zonal(name, points, features, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(points, features, dtype=F64, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(features, features, dtype=F64, generator=generator))
    for kernel, rotated in zip(DENSE[name].kernel(x), DENSE[name].kernel(x @ rotation), strict=True):
        assert torch.equal(kernel, kernel.T)
        assert float(torch.linalg.eigvalsh(kernel)[0]) > -1e-7 * float(kernel.diagonal().max())
        torch.testing.assert_close(kernel, rotated, rtol=1e-6, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(1, 6))
def test_relu_networks_without_bias_are_homogeneous(a, b, depth):
    generator = torch.Generator().manual_seed(depth)
    x, y = (torch.randn(3, 4, dtype=F64, generator=generator) for _ in range(2))
    network = Sequential(*[layer for _ in range(depth) for layer in (Dense(1.4), ReLU())], Dense())
    for scaled, kernel in zip(network.kernel(a * x, b * y), network.kernel(x, y), strict=True):
        torch.testing.assert_close(scaled, a * b * kernel, rtol=1e-9, atol=1e-9)


def test_deep_relu_tangent_kernel_of_one_input():
    """On the diagonal, with W_std^2 = 2 and no bias: NNGP |x|^2/d, NTK that times the number of dense layers."""
    x = torch.randn(1, 6, dtype=F64, generator=torch.Generator().manual_seed(4))
    norm = float(x.square().mean())
    for depth in (1, 3, 7):
        hidden = [layer for _ in range(depth) for layer in (Dense(math.sqrt(2)), ReLU())]
        nngp, ntk = Sequential(*hidden, Dense(math.sqrt(2))).kernel(x)
        assert float(nngp) == pytest.approx(2 * norm, rel=1e-12)
        assert float(ntk) == pytest.approx(2 * norm * (depth + 1), rel=1e-12)


def test_convolution_of_one_pixel_is_dense():
    x, y = (t[:, :, None, None] for t in inputs("dense"))
    one = Sequential(Conv(1, 1.4, 0.1), ReLU(), Conv(1, 1.2, 0.2), Erf(), GlobalAvgPool(), Dense(1.1, 0.1))
    two = Sequential(Dense(1.4, 0.1), ReLU(), Dense(1.2, 0.2), Erf(), Dense(1.1, 0.1))
    for a, b in zip(one.kernel(x, y), two.kernel(x.flatten(1), y.flatten(1)), strict=True):
        torch.testing.assert_close(a, b)


def test_sequences_have_kernels_too():
    """One axis of positions gives what two axes with a height of 1 give, and circular kernels ignore common shifts."""
    x = torch.randn(3, 2, 7, dtype=F64, generator=torch.Generator().manual_seed(5))
    network = Sequential(Conv(3, 1.4, 0.1, padding="circular"), ReLU(), Conv(3, 1.2, padding="circular"))
    pooled = Sequential(network, ReLU(), GlobalAvgPool(), Dense())
    per_position = network.kernel(x, get="ntk")
    assert per_position.shape == (3, 3, 7)
    torch.testing.assert_close(network.kernel(x.roll(2, -1), get="ntk"), per_position.roll(2, -1))
    torch.testing.assert_close(pooled.kernel(x, x.roll(3, -1), "ntk"), pooled.kernel(x, x, "ntk"))


@pytest.mark.parametrize("parametrization", ["ntk", "standard"])
@pytest.mark.parametrize("name", ["relu", "residual", "layer_norm", "resnet", "strided", "circular"])
def test_covariance_of_finite_networks(name, parametrization):
    """The second moment of outputs over 4000 output units: each is an independent draw in the last layer's weights."""
    group = "dense" if name in DENSE else "conv"
    network = {**DENSE, **CONVOLUTIONAL}[name]
    x = inputs(group)[0]
    wide = 2000 if group == "dense" else 300
    with torch.no_grad():
        f = network.finite(wide, x.shape[1:], 4000, parametrization, seed=7)(x.float()).double()
    found = f @ f.T / f.shape[1]
    expected = network.kernel(x, get="nngp")
    scale = expected.diagonal().sqrt()
    # Monte Carlo over outputs: standard error about sqrt(2 / 4000) = 0.022; the width adds about as much.
    assert float(((found - expected) / scale / scale[:, None]).abs().max()) < 0.2


def test_from_module():
    image, flat = inputs("conv")[0], inputs("dense")[0]
    for networks, x in ((DENSE, flat), (CONVOLUTIONAL, image)):
        for name, network in networks.items():
            if name in ("sign", "polynomial"):
                continue
            module = network.finite(8, x.shape[1:], seed=0, dtype=F64)
            for found, expected in zip(from_module(module).kernel(x), network.kernel(x), strict=True):
                torch.testing.assert_close(found, expected, msg=name)
    user = nn.Sequential(nn.Linear(7, 4000), nn.ReLU(), nn.Linear(4000, 500), nn.GELU(), nn.Linear(500, 1))
    nngp = from_module(user).kernel(flat.float(), get="nngp")
    third = Sequential(Dense(3**-0.5), ReLU(), Dense(3**-0.5), GELU(), Dense(3**-0.5))
    expected = Sequential(Dense(1.4), ReLU(), Dense(1.2), GELU(), Dense(1.1)).kernel(flat.float(), get="nngp")
    torch.testing.assert_close(
        from_module(user, 1.4, 0.0).kernel(flat.float(), get="nngp").shape, expected.shape
    )
    assert nngp.shape == third.kernel(flat.float(), get="nngp").shape
    convolutional = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 3, padding="same"), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    assert from_module(convolutional).kernel(image, get="ntk").shape == (3, 3)


def test_finite_networks_are_seeded_and_ordinary_modules():
    network = DENSE["residual"]
    x = inputs("dense")[0].float()
    one, two = (network.finite(16, 7, 3, seed=5) for _ in range(2))
    assert torch.equal(one(x), two(x))
    assert one(x).shape == (5, 3)
    other = network.finite(16, 7, 3, seed=6)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    shared = Dense(1.4)
    assert Sequential(shared, ReLU(), shared).finite(16, 7, 3, seed=0)(x).shape == (5, 3)


def test_zero_input_warns():
    x = torch.zeros(2, 3)
    x[1] = 1
    with pytest.warns(UserWarning, match="all zeros"):
        kernel = Sequential(Dense(), ReLU(), Dense()).kernel(x, get="ntk")
    assert kernel.isfinite().all() and kernel[0, 0] == 0 and kernel[0, 1] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sequential(Dense(), Erf(), Dense()).kernel(x)


def test_empty_and_extreme():
    network = DENSE["relu"]
    assert network.kernel(torch.zeros(0, 7), get="ntk").shape == (0, 0)
    assert network.kernel(torch.ones(2, 7), torch.zeros(0, 7), get="ntk").shape == (2, 0)
    big = torch.tensor([[1e15], [-1e15], [1e-15]])
    assert network.kernel(big, get="ntk").isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Sequential(), InvalidArgument, "at least one layer"),
        (lambda: Dense(-1.0), InvalidArgument, ">= 0"),
        (lambda: Conv(2), InvalidArgument, "odd size"),
        (lambda: Conv(3, padding="reflect"), InvalidArgument, "circular"),
        (lambda: Dropout(1.0), InvalidArgument, "below 1"),
        (lambda: AvgPool(0), InvalidArgument, "positive"),
        (lambda: Residual(Dense(), ReLU()), InvalidArgument, "fresh weights"),
        (lambda: Activation("swoosh"), InvalidArgument, "expected one of"),
        (lambda: Sequential(ReLU(), Dense()).kernel(torch.ones(2, 3)), ModelError, "not Gaussian"),
        (lambda: Sequential(LayerNorm(), Dense()).kernel(torch.ones(2, 3)), ModelError, "not Gaussian"),
        (lambda: Dense().kernel(torch.ones(2, 3, 4)), ModelError, "Flatten"),
        (lambda: Conv(3).kernel(torch.ones(2, 3)), ModelError, "before Flatten"),
        (lambda: GlobalAvgPool().kernel(torch.ones(2, 3)), ModelError, "before Flatten"),
        (lambda: Conv(3, padding="valid").kernel(torch.ones(2, 3, 2, 2)), InvalidArgument, "window"),
        (lambda: Dense().kernel(torch.ones(2, 3), torch.ones(2, 4)), InvalidArgument, "trailing shape"),
        (lambda: Dense().kernel(torch.ones(2, 3), torch.ones(2, 3).double()), InvalidArgument, "dtype"),
        (lambda: Dense().kernel(torch.full((2, 3), math.nan)), InvalidArgument, "finite"),
        (lambda: Dense().kernel(torch.ones(2, 3, dtype=torch.int64)), InvalidArgument, "float32 or float64"),
        (lambda: Dense().kernel(torch.ones(2)), InvalidArgument, "inputs, features"),
        (lambda: Dense().kernel(torch.ones(2, 3), get="both"), InvalidArgument, "nngp"),
        (lambda: Dense().kernel(torch.ones(2, 3), batch=0), InvalidArgument, "at least 1"),
        (lambda: Dense().finite(0, 3), InvalidArgument, "positive"),
        (lambda: Dense().finite(4, 3, parametrization="mup"), InvalidArgument, "standard"),
        (lambda: Dense().finite(4, (3, 2, 2)), InvalidArgument, "Flatten"),
        (lambda: ReLU().finite(4, 3), ModelError, "at least one"),
        (lambda: from_module(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))), ModelError, "inputs of a batch"),
        (lambda: from_module(nn.LSTM(2, 2)), ModelError, "not known"),
        (lambda: from_module(nn.Conv2d(2, 2, 3, dilation=2)), ModelError, "dilation"),
        (lambda: from_module(nn.Sequential()), ModelError, "without layers"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()

"""Empirical tangent kernels: three methods against one another, closed forms, and modules that try to mislead them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tensormill.errors import InvalidArgument, ModelError
from tensormill.numerics.ntk.empirical import _between_positions, _between_weights, _Call, empirical_ntk
from tensormill.numerics.ntk.infinite import (
    Conv,
    Dense,
    Erf,
    Flatten,
    GlobalAvgPool,
    ReLU,
    Residual,
    Sequential,
)

F64 = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Twice(nn.Module):
    """A layer that is called twice, on sequences, with in-place activations and parameters of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        h = self.inner(x).relu_()
        h = self.norm(self.inner(h)) * self.scale
        return self.out(torch.tanh_(h)).mean(1)


class Tied(nn.Module):
    """Two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


class Merged(nn.Module):
    """A layer whose first axis is inputs times positions, and a parameter used as a function."""

    def __init__(self):
        super().__init__()
        self.mixed, self.functional = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.mixed(x.reshape(-1, 4)).sin().reshape(len(x), 3, 4)
        return nn.functional.linear(h, self.functional.weight).sum(1)


class SequenceFirst(nn.Module):
    """A layer whose first axis has as many positions as there are inputs."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.inner(x.transpose(0, 1))).sum(0)


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return build().double()


MODULES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 11), nn.ReLU(inplace=True), nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 3)), (5,)),
    "no bias": (lambda: nn.Sequential(nn.Linear(5, 9, bias=False), nn.GELU(), nn.Linear(9, 1)), (5,)),
    "scaled": (lambda: Sequential(Dense(1.4, 0.1), ReLU(), Residual(Dense(1.1), Erf(), Dense(1.2, 0.3)), Erf(), Dense()).finite(13, 5, 2), (5,)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 2, stride=2, padding_mode="circular", padding=1),
            nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(2),
        ),
        (2, 5, 6),
    ),
    "conv 1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding="same", dilation=2), nn.GELU(), nn.Conv1d(4, 2, 3), nn.Flatten(), nn.LazyLinear(3)),
        (2, 7),
    ),
    "scaled conv": (
        lambda: Sequential(Conv(3, 1.4, 0.1), ReLU(), Conv(3, 1.1, padding="circular"), ReLU(), GlobalAvgPool(), Dense(1, 0.1)).finite(4, (2, 4, 5), 2),
        (2, 4, 5),
    ),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)), (4, 4, 4)),
    "twice": (Twice, (4, 6)),
    "tied": (Tied, (4,)),
    "merged": (Merged, (3, 4)),
    "sequence first": (SequenceFirst, (3, 4)),
}  # fmt: skip


def module_and_inputs(name, dtype=F64):
    build, shape = MODULES[name]
    torch.manual_seed(0)
    module = build()
    module(torch.zeros(1, *shape))  # lazy layers get their sizes
    generator = torch.Generator().manual_seed(1)
    x1, x2 = (torch.randn(count, *shape, dtype=dtype, generator=generator) for count in (3, 2))
    return module.to(dtype), x1, x2


@pytest.mark.parametrize("name", MODULES)
def test_methods_agree(name):
    module, x1, x2 = module_and_inputs(name)
    for trace in (False, True):
        expected = empirical_ntk(module, x1, x2, "jacobian", trace)
        for method in ("ntvp", "structured", "auto"):
            torch.testing.assert_close(empirical_ntk(module, x1, x2, method, trace), expected, **EXACT)
        both = torch.cat([x1, x2])
        square = empirical_ntk(module, both, None, "structured", trace)
        torch.testing.assert_close(square[:3, 3:], expected, **EXACT)
        for method in ("jacobian", "structured"):
            torch.testing.assert_close(
                empirical_ntk(module, both, None, method, trace, batch=2), square, **EXACT
            )
        if not trace:
            matrix = square.transpose(1, 2).flatten(0, 1).flatten(1)
            torch.testing.assert_close(matrix, matrix.T, **EXACT)
            assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-9 * float(matrix.diagonal().max())
            mean = expected.diagonal(dim1=-2, dim2=-1).mean(-1)
            torch.testing.assert_close(empirical_ntk(module, x1, x2, trace_outputs=True), mean, **EXACT)
    assert all(p.grad is None for p in module.parameters())


def test_gradients_one_by_one():
    """Against gradients of single outputs, without any of the machinery."""
    module, x1, x2 = module_and_inputs("conv")
    parameters = list(module.parameters())

    def gradient(x, output):
        grads = torch.autograd.grad(module(x[None])[0, output], parameters)
        return torch.cat([g.flatten() for g in grads])

    kernel = empirical_ntk(module, x1, x2)
    for a in range(3):
        for b in range(2):
            for i in range(2):
                for j in range(2):
                    expected = gradient(x1[a], i) @ gradient(x2[b], j)
                    assert float(kernel[a, b, i, j]) == pytest.approx(float(expected), rel=1e-10)


def test_position_and_weight_contractions_agree(monkeypatch):
    generator = torch.Generator().manual_seed(2)

    def call(n, t):
        return _Call(
            torch.randn(n, t, 5, dtype=F64, generator=generator),
            torch.randn(n, 3, t, 4, dtype=F64, generator=generator),
        )

    one, two = call(4, 6), call(3, 2)
    for limit in (1 << 25, 50):
        monkeypatch.setattr("tensormill.numerics.ntk.empirical._GRAM_ELEMENTS", limit)
        for trace in (False, True):
            torch.testing.assert_close(
                _between_positions(one, two, trace), _between_weights(one, two, trace), **EXACT
            )


def test_linear_model():
    """f = W x / sqrt(d): the kernel is <x, x'> / d times the identity."""
    module = Dense().finite(1, 5, 3, seed=0, dtype=F64)
    x = torch.randn(4, 5, dtype=F64, generator=torch.Generator().manual_seed(3))
    expected = (x @ x.T / 5)[:, :, None, None] * torch.eye(3, dtype=F64)
    for method in ("jacobian", "ntvp", "structured"):
        torch.testing.assert_close(empirical_ntk(module, x, method=method), expected, **EXACT)


def test_frozen_parameters_do_not_count():
    module, x1, x2 = module_and_inputs("mlp")
    module[0].weight.requires_grad_(False)
    module[2].bias.requires_grad_(False)
    expected = empirical_ntk(module, x1, x2, "jacobian")
    torch.testing.assert_close(empirical_ntk(module, x1, x2, "structured"), expected, **EXACT)
    module.requires_grad_(False)
    with pytest.raises(ModelError, match="require gradients"):
        empirical_ntk(module, x1)


@pytest.mark.parametrize(
    "network",
    [
        Sequential(Dense(1.4, 0.1), ReLU(), Dense(1.3, 0.2), Erf(), Dense(1.0, 0.1)),
        Sequential(Conv(3, 1.4, 0.1), ReLU(), Conv(3, 1.2, 0.1), ReLU(), Flatten(), Dense()),
        Sequential(
            Conv(3, 1.4, 0.1, padding="circular"),
            ReLU(),
            Conv(3, 1.2),
            ReLU(),
            GlobalAvgPool(),
            Dense(1.0, 0.1),
        ),
    ],
    ids=["dense", "flatten", "pooled"],
)
def test_wide_networks_approach_the_infinite_kernel(network):
    shape = (6,) if isinstance(network.layers[0], Dense) else (3, 4, 4)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(4))
    width = 4096 if len(shape) == 1 else 256
    expected = network.kernel(x, get="ntk")
    draws = [
        empirical_ntk(network.finite(width, shape, seed=seed), x, trace_outputs=True) for seed in range(4)
    ]
    error = (torch.stack(draws).mean(0) - expected).norm() / expected.norm()
    assert float(error) < 3 / (4 * width) ** 0.5  # Monte Carlo with 4 draws; the constant is about 1


def test_float32_and_no_inputs():
    module, x1, x2 = module_and_inputs("conv", torch.float32)
    kernel = empirical_ntk(module, x1, x2)
    assert kernel.dtype == torch.float32
    torch.testing.assert_close(
        kernel.double(), empirical_ntk(module.double(), x1.double(), x2.double()), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(InvalidArgument, match="no inputs"):
        empirical_ntk(module, x1.double(), x2[:0].double())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: empirical_ntk(m, x, method="exact"), InvalidArgument, "expected one of"),
        (lambda m, x: empirical_ntk(m, x, x[:, :2]), InvalidArgument, "trailing shape"),
        (lambda m, x: empirical_ntk(m, x, batch=0), InvalidArgument, "at least 1"),
        (lambda m, x: empirical_ntk(m, [1.0]), InvalidArgument, "tensor"),
        (
            lambda m, x: empirical_ntk(nn.Sequential(m, nn.BatchNorm1d(3)).double(), x),
            ModelError,
            "batch normalization",
        ),
        (
            lambda m, x: empirical_ntk(nn.Sequential(m, nn.Flatten(0)), x),
            ModelError,
            "output is not a tensor",
        ),
        (lambda m, x: empirical_ntk(nn.Sequential(m, nn.Dropout(0.5)), x), ModelError, "dropout"),
    ],
)
def test_bad_input(call, error, message):
    module, x1, _ = module_and_inputs("mlp")
    with pytest.raises(error, match=message):
        call(module, x1)


def test_batch_normalization_in_evaluation_is_a_scale():
    module = seeded(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    ).eval()
    x = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(empirical_ntk(module, x), empirical_ntk(module, x, method="jacobian"), **EXACT)

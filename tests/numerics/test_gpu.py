"""Every room of numerics on a GPU: the results of the CPU, and tensors that stay on the device."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tensormill.numerics import qmc
from tensormill.numerics.chebyshev_tucker import ChebTucker
from tensormill.numerics.electrostatics import MultiParticlePotential, protein_like
from tensormill.numerics.factorized import sthosvd
from tensormill.numerics.funbat import FunctionalTucker
from tensormill.numerics.gaussian_process import GaussianProcess
from tensormill.numerics.infinite_width_features import (
    CBOW,
    CBOWConfig,
    Corpus,
    InfiniteCBOW,
    MuReadout,
    parametrize,
    train_cbow,
)
from tensormill.numerics.ntk import empirical_ntk, infinite, predict_mse
from tensormill.numerics.snnk import SNNKLinear, bundle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = "cuda"


def uniform(*size: int) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(len(size)), dtype=torch.float64)


def assert_equal(on_device: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert on_device.device.type == DEVICE
    torch.testing.assert_close(on_device.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["lattice", "net"])
def test_gram_products_and_solves(kind):
    y = uniform(2**12, 3)
    results = []
    for device in ("cpu", DEVICE):
        if kind == "lattice":
            points = qmc.Lattice(3, seed=0, device=device).points(2**12)
            kernel = qmc.ShiftInvariantKernel(3, alpha=2)
        else:
            points = qmc.DigitalNet(3, seed=0, device=device).points(2**12)
            kernel = qmc.DigitalShiftInvariantKernel(3, alpha=2)
        gram = qmc.FastGram(points, kernel.to(device).requires_grad_(False), noise=1e-3)
        bigger = gram.extend()
        results.append(
            (gram.matmul(y.to(device)), gram.solve(y.to(device)), bigger.solve(y.repeat(2, 1).to(device)))
        )
    for ours, expected in zip(results[1], results[0], strict=True):
        assert_equal(ours, expected, 1e-7)


def test_gaussian_process_learns():
    points = qmc.Lattice(2, seed=0, device=DEVICE).points(2**12)
    x = points.values
    y = torch.sin(2 * math.pi * x[:, 0])
    process = GaussianProcess(qmc.ShiftInvariantKernel(2, alpha=2).to(DEVICE), noise=1e-3)
    process.fit(points, y, steps=5, learning_rate=0.1)
    prediction = process.predict(x[:50])
    assert_equal(prediction.mean.detach(), y[:50].cpu(), 1e-2)


def test_replicated_points_lie_on_the_device():
    sample = qmc.DigitalNet(3, seed=1, device=DEVICE, replications=8).sample(1024)
    expected = qmc.DigitalNet(3, seed=1, replications=8).sample(1024)
    assert_equal(sample, expected, 0.0)


@pytest.mark.parametrize("projection", ["iid", "orthogonal", "hadamard", "qmc"])
def test_snnk_layer(projection):
    torch.manual_seed(0)
    x = 0.2 * torch.randn(64, 16)
    layer = SNNKLinear.from_linear(nn.Linear(16, 8), "cos", num_features=128, inputs=x, projection=projection)
    expected = layer(x)
    expected.square().mean().backward()
    gradient = layer.weight.grad.clone()
    layer.zero_grad()
    on_device = layer.to(DEVICE)(x.to(DEVICE))
    on_device.square().mean().backward()
    assert_equal(on_device.detach(), expected.detach(), 1e-4)
    assert_equal(layer.weight.grad, gradient, 1e-4)


def test_bundled_net_is_fitted():
    torch.manual_seed(0)
    x = 0.5 * torch.randn(800, 6)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2]], -1)

    class Cosine(nn.Module):
        activation_name = "cos"

        def forward(self, x):
            return x.cos()

    network = nn.Sequential(nn.Linear(6, 32), Cosine(), nn.Linear(32, 2)).to(DEVICE)
    bundled = bundle(network, 128, calibration=x.to(DEVICE))
    bundled.fit(x.to(DEVICE), y.to(DEVICE), ridge=1e-3)
    prediction = bundled(x.to(DEVICE)).detach()
    assert prediction.device.type == DEVICE
    assert (prediction.cpu() - y).square().mean() < 0.2 * y.var()


def test_infinite_kernels_dense_and_convolutional():
    dense = infinite.Sequential(
        infinite.Dense(W_std=2**0.5, b_std=0.1), infinite.ReLU(), infinite.Dense(2**0.5, 0.1)
    )
    x = uniform(20, 10) - 0.5
    for ours, expected in zip(dense.kernel(x.to(DEVICE)), dense.kernel(x), strict=True):
        assert_equal(ours, expected)


def test_empirical_kernel():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LayerNorm(256), nn.Linear(256, 3)
    ).double()
    images = uniform(5, 1, 8, 8)
    expected = empirical_ntk(model, images)
    ours = empirical_ntk(model.to(DEVICE), images.to(DEVICE))
    assert_equal(ours, expected)
    targets = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0, 1]]
    later = predict_mse(ours, targets.to(DEVICE), t=1e-2, lr=1.0)
    assert_equal(later, predict_mse(expected, targets, t=1e-2, lr=1.0), 1e-7)


def test_mup_training_step():
    def mlp(width):
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), MuReadout(width, 1))

    torch.manual_seed(0)
    model = mlp(64).to(DEVICE)
    groups = parametrize(model, mlp(16), mlp(32)).param_groups(model, "adam", lr=0.01)
    optimizer = torch.optim.Adam(groups)
    x = torch.randn(256, 8, device=DEVICE)
    losses = []
    for _ in range(30):
        loss = (model(x)[:, 0] - x[:, 0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_word_vectors_are_trained():
    corpus = Corpus.of([["one", "two", "three", "four", "five", "six"]] * 200)
    config = CBOWConfig(epochs=3, batch=32, window=2, negatives=3, subsample=0.0)
    for model in (CBOW(6, 8, device=DEVICE), InfiniteCBOW(6, device=DEVICE)):
        losses = train_cbow(model, corpus, config)
        assert losses[-1] < losses[0] and model.input.device.type == DEVICE


def test_functional_tucker_fits_as_on_the_cpu():
    coords = uniform(300, 2)
    values = torch.sin(7 * coords[:, 0]) * coords[:, 1]
    settings = {"rank": 2, "lengthscale": 0.4, "n_iter": 10, "seed": 0}
    expected = FunctionalTucker(**settings).fit(coords, values).predict(coords, return_var=True)
    model = FunctionalTucker(**settings, device=DEVICE).fit(coords, values)
    for ours, theirs in zip(model.predict(coords.to(DEVICE), return_var=True), expected, strict=True):
        assert_equal(ours, theirs, 1e-5)


def test_chebyshev_tucker():
    def runge(x):
        return 1 / (1 + (x[:, 0] + 0.5 * x[:, 1] - x[:, 2]) ** 2)

    f = ChebTucker.from_function(runge, [(-1, 1), (0, 2), (-1, 1)], tol=1e-8, device=DEVICE)
    x = uniform(500, 3).to(DEVICE)
    assert_equal(f(x), runge(x).cpu(), 1e-6)
    assert_equal(f.grad(x), f.to("cpu").grad(x.cpu()), 1e-7)


def test_electrostatics():
    charges, positions = protein_like(20, seed=0)
    ours = MultiParticlePotential(charges.to(DEVICE), positions.to(DEVICE), tol=1e-6)
    expected = MultiParticlePotential(charges, positions, tol=1e-6)
    points = positions[::5] + 1.0
    assert_equal(ours(points.to(DEVICE)), expected(points), 1e-4)
    assert_equal(ours.forces(), expected.forces(), 1e-3)


def test_tucker_tensors():
    dense = uniform(20, 1) * uniform(30) + 1.0
    small = sthosvd(dense.to(DEVICE), tol=1e-10)
    assert small.ranks == (2, 2)
    assert_equal((small + small).round(1e-10).full(), 2 * dense)

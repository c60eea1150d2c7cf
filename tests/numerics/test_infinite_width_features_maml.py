"""Kernel limits in function space, MAML over batches of tasks, and the characters it is measured on."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensormill.data import real_data_dir
from tensormill.errors import CheckpointError, DataError, InvalidArgument, ModelError
from tensormill.numerics.infinite_width_features import FiniteLinear1, InfiniteLinear1, Linear1Config
from tensormill.numerics.infinite_width_features.glyphs import load_omniglot, procedural_strokes, rotated
from tensormill.numerics.infinite_width_features.kernels import InfiniteKernel1, Kernel1Config
from tensormill.numerics.infinite_width_features.maml import (
    EpisodicSampler,
    KernelMAML,
    MAMLConfig,
    Tasks,
    adapt,
    meta_evaluate,
    meta_gradient,
    meta_train,
)


class Wide(nn.Module):
    """The network whose limit InfiniteKernel1 is, with an even start: two halves of opposite sign cancel."""

    def __init__(self, config, width, function, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.config, self.function = config, function
        u, b = torch.randn(width // 2, config.inputs).double(), torch.randn(width // 2).double()
        v = torch.randn(config.outputs, width // 2).double()
        self.u = nn.Parameter(torch.cat((u, u)), requires_grad=config.kind == "ntk")
        self.b = nn.Parameter(torch.cat((b, b)), requires_grad=config.kind == "ntk")
        self.v = nn.Parameter(torch.cat((v, -v), dim=1))

    def forward(self, x):
        c = self.config
        hidden = c.sigma_u / math.sqrt(c.inputs) * x @ self.u.mT + c.sigma_b * self.b
        return c.sigma_v / math.sqrt(self.u.shape[0]) * self.function(hidden) @ self.v.mT


@pytest.mark.parametrize("kind", ["ntk", "gp"])
@pytest.mark.parametrize("activation", ["relu", "identity", "erf"])
def test_a_wide_network_follows_its_kernel(kind, activation):
    config = Kernel1Config(4, 2, kind, activation, sigma_u=1.2, sigma_v=0.8, sigma_b=0.3)
    function = {"relu": torch.relu, "identity": lambda x: x, "erf": torch.erf}[activation]
    wide = Wide(config, 8192, function)
    kernel = InfiniteKernel1(config, dtype=torch.float64)
    optimizer = torch.optim.SGD([w for w in wide.parameters() if w.requires_grad], lr=0.3)
    generator = torch.Generator().manual_seed(1)
    test = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    for _ in range(5):
        x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(2, (6,), generator=generator)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(wide(x), y))
        optimizer.step()
        kernel.train_step(x, lambda f, y=y: F.cross_entropy(f, y), lr=0.3)
    expected = wide(test).detach()
    assert float((kernel(test) - expected).norm() / expected.norm()) < 0.06  # some 1/sqrt(8192), times a few


def test_kernel_of_a_linear_network_is_known():
    x, z = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for kind, factor in (("gp", 1), ("ntk", 2)):
        network = InfiniteKernel1(
            Kernel1Config(3, 1, kind, "identity", sigma_u=1.5, sigma_v=0.5), dtype=torch.float64
        )
        torch.testing.assert_close(network.kernel(x, z), factor * 0.25 * 2.25 / 3 * x @ z.mT)
    relu = InfiniteKernel1(Kernel1Config(3, 1, "gp", "relu"), dtype=torch.float64)
    torch.testing.assert_close(relu.kernel(x).diag(), x.square().sum(1) / 6)  # E[relu(u)^2] = q / 2
    torch.testing.assert_close(relu.kernel(2 * x, 3 * z), 6 * relu.kernel(x, z))


def trained(steps=4, **settings):
    network = InfiniteKernel1(Kernel1Config(5, 3, normalize=True), dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (7,), generator=generator)
        network.train_step(x, lambda f, y=y: F.cross_entropy(f, y), lr=0.5, **settings)
    return network


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}])
def test_restoring_is_as_if_nothing_happened(settings):
    network = trained(**settings)
    x = torch.randn(6, 5, dtype=torch.float64)
    before, saved = network(x), network.checkpoint()
    network.train_step(x, lambda f: f.square().sum() + f.sum(), lr=0.3, **settings)
    assert not torch.allclose(network(x), before)
    network.restore(saved)
    torch.testing.assert_close(network(x), before, rtol=1e-14, atol=1e-15)
    assert len(network) == 28


def test_merging_keeps_the_function():
    network = trained()
    x = torch.randn(7, 5, dtype=torch.float64)
    for _ in range(3):
        network.train_step(x, lambda f: (f - 1).square().mean(), lr=0.5)
    before = network(x)
    saved = network.checkpoint()
    network.merge()
    assert len(network) == 35
    torch.testing.assert_close(network(x), before)
    with pytest.raises(InvalidArgument, match="merge"):
        network.restore(saved)


def test_clipping_bounds_the_step_in_parameter_space():
    network, clipped = trained(1), trained(1, clip=1e-2)
    step = clipped.coefficients
    norm = (step * (clipped.kernel(clipped.inputs) @ step)).sum().sqrt()
    assert float(norm) == pytest.approx(0.5e-2, rel=1e-3)
    ratio = step / network.coefficients
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))


def test_weight_decay_shrinks_the_function():
    network = trained()
    x = torch.randn(6, 5, dtype=torch.float64)
    before = network(x)
    network.step(x, torch.zeros(6, 3), lr=0.5, weight_decay=0.2)
    torch.testing.assert_close(network(x), 0.9 * before)


def test_kernel_state_and_batches():
    network = trained()
    other = InfiniteKernel1(network.config, dtype=torch.float64)
    other.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(other(x), torch.stack([network(one) for one in x]))
    torch.testing.assert_close(network.kernel(x)[1], network.kernel(x[1]))
    zero = network.kernel(torch.zeros(1, 5), torch.ones(1, 5))
    assert torch.isfinite(zero).all() and float(zero.abs().max()) == 0
    single = InfiniteKernel1(network.config, dtype=torch.float32)
    single.load_state_dict(network.state_dict())
    torch.testing.assert_close(single(x.float()), network(x).float(), rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointError):
        InfiniteKernel1(Kernel1Config(4, 3)).load_state_dict(network.state_dict())


def test_bad_kernel_arguments():
    for arguments in ((0, 1), (1, 1, "nngp"), (1, 1, "ntk", "nothing"), (1, 1, "ntk", "relu", -1.0)):
        with pytest.raises(InvalidArgument):
            Kernel1Config(*arguments)
    network = trained()
    with pytest.raises(InvalidArgument, match="expected"):
        network(torch.ones(3, 4))
    with pytest.raises(InvalidArgument, match="gradient"):
        network.step(torch.ones(3, 5), torch.ones(2, 3), 0.1)
    with pytest.raises(InvalidArgument, match="product"):
        network.step(torch.ones(3, 5), torch.ones(3, 3), 1.0, weight_decay=1.0)


def sampler(seed=0, classes=12, examples=7, dtype=torch.float64, queries=3, noise=0.4):
    generator = torch.Generator().manual_seed(9)
    means = torch.randn(classes, 1, 9, generator=generator, dtype=dtype)
    images = means + noise * torch.randn(classes, examples, 9, generator=generator, dtype=dtype)
    return EpisodicSampler(images, ways=4, shots=2, queries=queries, seed=seed)


def test_episodes_are_what_they_say():
    source = sampler()
    tasks = source.sample(50)
    assert tasks.support_x.shape == (50, 8, 9) and tasks.query_x.shape == (50, 12, 9)
    index = torch.cat((tasks.support_index, tasks.query_index), 1)
    assert all(len(set(row)) == 20 for row in index.tolist())  # distinct examples
    classes, labels = index // 7, torch.cat((tasks.support_y, tasks.query_y), 1)
    for row, label in zip(classes, labels, strict=True):
        by_label = [set(row[label == k].tolist()) for k in range(4)]
        assert all(len(one) == 1 for one in by_label) and len(set.union(*by_label)) == 4
    assert torch.equal(source.pool[tasks.query_index], tasks.query_x)
    assert {c for row in classes.tolist() for c in row} == set(range(12))
    state = source.state_dict()
    again = source.sample(3).query_index
    source.load_state_dict(state)
    assert torch.equal(source.sample(3).query_index, again)
    for bad in ({"ways": 13}, {"shots": 5, "queries": 3}, {"shots": 0}):
        with pytest.raises(InvalidArgument):
            EpisodicSampler(source.images, **{"ways": 4, **bad})
    with pytest.raises(InvalidArgument, match="classes, examples"):
        EpisodicSampler(torch.ones(4, 4))


def plain_gradient(model, tasks, config):
    """MAML task by task with nothing but autograd."""
    names = [name for name, _ in model.named_parameters()]
    total, mean = None, 0.0
    for t in range(tasks.support_x.shape[0]):
        original = [w.detach().clone().requires_grad_() for w in model.parameters()]
        weights = original
        for _ in range(config.inner_steps):
            loss = F.cross_entropy(
                torch.func.functional_call(
                    model, dict(zip(names, weights, strict=True)), (tasks.support_x[t],)
                ),
                tasks.support_y[t],
            )
            gradients = torch.autograd.grad(loss, weights, create_graph=not config.first_order)
            weights = [w - config.inner_lr * g for w, g in zip(weights, gradients, strict=True)]
        loss = F.cross_entropy(
            torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (tasks.query_x[t],)),
            tasks.query_y[t],
        )
        gradients = torch.autograd.grad(loss, weights if config.first_order else original)
        total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
        mean += loss.item()
    count = tasks.support_x.shape[0]
    return mean / count, {name: g / count for name, g in zip(names, total, strict=True)}


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
def test_batched_gradient_is_that_of_a_loop(first_order, steps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 4)).double()
    config = MAMLConfig(inner_lr=0.5, inner_steps=steps, first_order=first_order)
    tasks = sampler().sample(5)
    loss, gradients = meta_gradient(model, tasks, config)
    expected_loss, expected = plain_gradient(model, tasks, config)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)


def test_training_improves_and_does_not_touch_the_graph():
    config = Linear1Config(9, 4, sigma_v=0.25, bias=1.0)
    model = InfiniteLinear1(config, dtype=torch.float64)
    settings = MAMLConfig(inner_lr=0.4, test_steps=5, meta_lr=0.5, tasks=8, schedule=((0.5, 0.5),))
    before = meta_evaluate(model, sampler(5), settings, 60, batch=25)
    reports = []
    history = meta_train(model, sampler(), settings, 40, progress=lambda step, loss: reports.append(step))
    after = meta_evaluate(model, sampler(5), settings, 60)
    assert len(history) == 40 and reports[-1] == 40
    assert sum(history[-5:]) < sum(history[:5])
    assert after.mean > before.mean and after.low < after.mean < after.high and after.tasks == 60
    assert all(weight.grad is None for weight in model.parameters())


def test_wide_linear_networks_meta_learn_what_the_limit_does():
    config = Linear1Config(9, 4, sigma_v=0.25)
    settings = MAMLConfig(meta_lr=0.5, tasks=4)
    limit = InfiniteLinear1(config, dtype=torch.float64)
    wide = FiniteLinear1(config, 4096, dtype=torch.float64)
    expected = meta_train(limit, sampler(), settings, 15)
    found = meta_train(wide, sampler(), settings, 15)
    assert found == pytest.approx(expected, abs=0.03)
    assert expected[-1] < expected[0] - 0.1


def gram_of(kernel, a, b=None):
    return kernel.kernel(a.pool, None if b is None else b.pool)


def test_kernel_maml_is_maml_with_checkpoint_and_restore():
    train_tasks, test_tasks = sampler(1), sampler(2)
    kernel = InfiniteKernel1(Kernel1Config(9, 4), dtype=torch.float64)
    config = MAMLConfig(inner_lr=0.5, inner_steps=2, test_steps=3, meta_lr=0.7, tasks=3, clip=0.2)
    fast = KernelMAML(gram_of(kernel, train_tasks), 4)
    history = fast.train(train_tasks, config, 4)

    slow_tasks, losses = sampler(1), []
    for _ in range(4):
        tasks = slow_tasks.sample(3)
        queries, gradients, loss_sum = [], [], 0.0
        for t in range(3):
            saved = kernel.checkpoint()
            for _ in range(2):
                kernel.train_step(
                    tasks.support_x[t], lambda f, y=tasks.support_y[t]: F.cross_entropy(f, y), lr=0.5
                )
            outputs = kernel(tasks.query_x[t]).requires_grad_()
            loss = F.cross_entropy(outputs, tasks.query_y[t])
            gradients.append(torch.autograd.grad(loss, outputs)[0] / 3)
            queries.append(tasks.query_x[t])
            loss_sum += loss.item()
            kernel.restore(saved)
        kernel.step(torch.cat(queries), torch.cat(gradients), 0.7, clip=0.2)
        losses.append(loss_sum / 3)
    assert history == pytest.approx(losses, rel=1e-9)
    gram = gram_of(kernel, test_tasks)
    found = fast.evaluate(test_tasks, gram, gram_of(kernel, test_tasks, train_tasks), config, 40)
    assert 0.5 < found.mean <= 1
    x = test_tasks.pool
    torch.testing.assert_close(gram_of(kernel, test_tasks, train_tasks) @ fast.coefficients, kernel(x))


def test_linear_kernel_maml_is_a_linear_model():
    """The gp kernel of a linear network: MAML of f(x) = W x, from W = 0, with lr scaled by the kernel's constant."""
    train_tasks = sampler(1)
    kernel = InfiniteKernel1(Kernel1Config(9, 4, "gp", "identity"), dtype=torch.float64)
    config = MAMLConfig(inner_lr=0.5, meta_lr=0.7, tasks=3, clip=0.1)
    history = KernelMAML(gram_of(kernel, train_tasks), 4).train(train_tasks, config, 6)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 9, dtype=torch.float64))

        def forward(self, x):
            return x @ self.weight.mT / 3

    assert meta_train(Scaled(), sampler(1), config, 6) == pytest.approx(history, rel=1e-6)


def test_bad_maml_arguments():
    for bad in (
        {"inner_steps": 0},
        {"tasks": 0},
        {"test_steps": 0},
        {"inner_lr": 0.0},
        {"momentum": 1.0},
        {"clip": 0.0},
    ):
        with pytest.raises(InvalidArgument):
            MAMLConfig(**bad)
    kernel = KernelMAML(torch.eye(84, dtype=torch.float64), 4)
    with pytest.raises(InvalidArgument, match="second-order"):
        kernel.train(sampler(), MAMLConfig(first_order=False), 1)
    with pytest.raises(InvalidArgument, match="same images"):
        kernel.train(sampler(classes=11), MAMLConfig(), 1)
    with pytest.raises(InvalidArgument, match="square"):
        KernelMAML(torch.ones(3, 4), 2)
    with pytest.raises(ModelError, match="batch normalisation"):
        meta_gradient(nn.Sequential(nn.BatchNorm1d(9)), sampler().sample(1), MAMLConfig())
    model = nn.Linear(9, 4, dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="became"):
        meta_train(model, sampler(), MAMLConfig(tasks=2), 2)


def test_adapt_leaves_the_model():
    model = nn.Linear(9, 4).double()
    before = copy.deepcopy(model.state_dict())
    tasks: Tasks = sampler().sample(1)
    weights = adapt(
        model, dict(model.named_parameters()), tasks.support_x[0], tasks.support_y[0], lr=0.1, steps=2
    )
    assert not torch.equal(weights["weight"], model.weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_strokes():
    images = procedural_strokes(6, 5, size=14, seed=1)
    assert images.shape == (6, 5, 196) and float(images.min()) >= 0 and float(images.max()) <= 1
    assert torch.equal(images, procedural_strokes(6, 5, size=14, seed=1))
    means = images.mean(1, keepdim=True)
    within = float((images - means).square().sum(-1).mean())
    between = float((means - means.mean(0)).square().sum(-1).mean())
    assert between > 0.3 * within  # drawers differ, characters differ too
    turned = rotated(images)
    assert turned.shape == (24, 5, 196) and torch.equal(turned[:6], images)
    again = images
    for _ in range(4):
        again = rotated(again)[6:12]
    assert torch.equal(again, images)
    with pytest.raises(InvalidArgument):
        rotated(torch.ones(1, 1, 5))
    with pytest.raises(InvalidArgument):
        procedural_strokes(0)


def test_omniglot(tmp_path):
    pytest.importorskip("PIL")
    with pytest.raises(DataError):
        load_omniglot(folder=tmp_path)
    (tmp_path / "broken.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="readable zip"):
        load_omniglot(("broken.zip",), folder=tmp_path)
    root = real_data_dir()
    if root is None or not (root / "omniglot").is_dir():
        pytest.skip("no Omniglot in the real data")
    images, names = load_omniglot(("images_background_small1.zip",), size=14)
    assert images.shape == (len(names), 20, 196) and len(names) > 100
    assert 0.03 < float(images.mean()) < 0.3 and float(images.max()) <= 1

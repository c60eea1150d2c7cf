"""MAML: a starting point from which a few gradient steps learn a new task, over batches of tasks at once.

Each task has a support set, on which the inner steps train a copy of the model, and a query set, whose loss after them
is what the outer step improves (Finn et al., arXiv 1703.03400). First-order MAML takes the query loss's gradient at the
adapted weights as the outer gradient; second-order MAML differentiates through the inner steps. In first order, all
tasks of a batch are adapted together (`torch.func.vmap`). For kernel limits, whose function is linear in its parameters, tasks live in
function space and need the Gram matrix of the images alone (Yang and Hu, arXiv 2011.14522, section 9).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from tensormill.errors import InvalidArgument, ModelError

__all__ = [
    "Accuracy",
    "EpisodicSampler",
    "KernelMAML",
    "MAMLConfig",
    "Tasks",
    "adapt",
    "meta_evaluate",
    "meta_gradient",
    "meta_train",
]

Parameters = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MAMLConfig:
    """How to train a starting point.

    Attributes:
        inner_lr: learning rate of the inner steps.
        inner_steps: their number, at training.
        test_steps: at evaluation; None: as at training.
        meta_lr: learning rate of the outer SGD.
        tasks: tasks in an outer step.
        first_order: whether to leave out derivatives of the inner steps.
        clip: largest norm of the outer gradient; None: any.
        momentum: of the outer SGD.
        schedule: (share of the training done, factor of meta_lr from there on) pairs.
    """

    inner_lr: float = 0.4
    inner_steps: int = 1
    test_steps: int | None = None
    meta_lr: float = 0.1
    tasks: int = 32
    first_order: bool = True
    clip: float | None = 0.5
    momentum: float = 0.0
    schedule: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.inner_steps < 1 or self.tasks < 1 or (self.test_steps is not None and self.test_steps < 1):
            raise InvalidArgument(
                f"given inner_steps={self.inner_steps}, test_steps={self.test_steps}, tasks={self.tasks}, expected at "
                "least 1 each"
            )
        if not (self.inner_lr > 0 and self.meta_lr > 0 and 0 <= self.momentum < 1):
            raise InvalidArgument(
                f"given inner_lr={self.inner_lr}, meta_lr={self.meta_lr}, momentum={self.momentum}, expected rates "
                "above 0 and a momentum in [0, 1)"
            )
        if self.clip is not None and not self.clip > 0:
            raise InvalidArgument(f"given clip={self.clip}, expected a number above 0 or None")

    @property
    def steps_at_test(self) -> int:
        """Inner steps at evaluation."""
        return self.inner_steps if self.test_steps is None else self.test_steps

    def factor(self, done: float) -> float:
        """Factor of meta_lr when this share of the training is done."""
        return next((f for since, f in sorted(self.schedule, reverse=True) if done >= since), 1.0)


@dataclass(frozen=True)
class Tasks:
    """A batch of classification tasks.

    Attributes:
        support_x: (tasks, ways x shots, ...).
        support_y: (tasks, ways x shots) int64, below ways.
        query_x: (tasks, ways x queries, ...).
        query_y: (tasks, ways x queries) int64.
        support_index, query_index: where the images lie in the sampler's list of images, (tasks, ways x shots) and
            (tasks, ways x queries) int64.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    support_index: Tensor
    query_index: Tensor


class EpisodicSampler:
    """Draws tasks: a few classes each, with distinct examples of each for support and query.

    Args:
        images: (classes, examples, ...): as many examples of every class.
        ways: classes in a task.
        shots: support examples of each.
        queries: query examples of each.
        seed: of the draws.

    Raises:
        InvalidArgument: fewer classes than ways, or fewer examples than shots and queries together.

    Example:
        >>> sampler = EpisodicSampler(torch.randn(20, 6, 16), ways=5, shots=1, queries=3)
        >>> tasks = sampler.sample(8)
        >>> tasks.support_x.shape, tasks.query_y.shape
        (torch.Size([8, 5, 16]), torch.Size([8, 15]))
    """

    def __init__(
        self, images: Tensor, ways: int = 5, shots: int = 1, queries: int = 5, *, seed: int = 0
    ) -> None:
        if images.ndim < 3:
            raise InvalidArgument(
                f"given images of shape {tuple(images.shape)}, expected (classes, examples, ...)"
            )
        if min(ways, shots, queries) < 1 or images.shape[0] < ways or images.shape[1] < shots + queries:
            raise InvalidArgument(
                f"given {images.shape[0]} classes of {images.shape[1]} examples, expected at least {ways} classes of "
                f"{shots} + {queries}"
            )
        self.images = images
        self.ways, self.shots, self.queries = ways, shots, queries
        self._generator = torch.Generator(images.device).manual_seed(seed)

    @property
    def pool(self) -> Tensor:
        """(classes x examples, ...): the list of images that indices refer to."""
        return self.images.flatten(0, 1)

    def sample(self, tasks: int) -> Tasks:
        """Draw tasks.

        Args:
            tasks: how many.
        """
        classes, examples = self.images.shape[:2]
        device = self.images.device

        def choose(rows: int, among: int, wanted: int) -> Tensor:
            scores = torch.rand(rows, among, generator=self._generator, device=device)
            return scores.topk(wanted, dim=1).indices

        chosen = choose(tasks, classes, self.ways)  # [tasks, ways]
        wanted = self.shots + self.queries
        example = choose(tasks * self.ways, examples, wanted).view(tasks, self.ways, wanted)
        index = chosen[:, :, None] * examples + example
        support, query = index[:, :, : self.shots].flatten(1), index[:, :, self.shots :].flatten(1)
        label = torch.arange(self.ways, device=device)
        pool = self.pool
        return Tasks(
            pool[support],
            label.repeat_interleave(self.shots).expand(tasks, -1),
            pool[query],
            label.repeat_interleave(self.queries).expand(tasks, -1),
            support,
            query,
        )

    def state_dict(self) -> dict[str, Any]:
        """State of the generator."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken."""
        self._generator.set_state(state["generator"])


@dataclass(frozen=True)
class Accuracy:
    """Mean accuracy over tasks, as a fraction, and its 95% confidence interval."""

    mean: float
    low: float
    high: float
    tasks: int

    @classmethod
    def of(cls, per_task: Tensor) -> Accuracy:
        """From (tasks,) accuracies, by the normal approximation."""
        values = per_task.double()
        mean = float(values.mean())
        half = 1.959964 * float(values.std()) / math.sqrt(values.numel()) if values.numel() > 1 else math.inf
        return cls(mean, mean - half, mean + half, values.numel())


def adapt(
    model: nn.Module,
    parameters: Parameters,
    x: Tensor,
    y: Tensor,
    *,
    lr: float,
    steps: int,
    first_order: bool = True,
    loss_fn: Loss = F.cross_entropy,
) -> Parameters:
    """Weights after inner steps of SGD on one task.

    Args:
        model: called with these weights instead of its own; no dropout, no batch statistics.
        parameters: {name: weight}.
        x: (batch, ...) support inputs.
        y: (batch,) labels, or whatever the loss takes.
        lr: inner learning rate.
        steps: inner steps.
        first_order: whether the result's derivative treats the steps' gradients as constants.
        loss_fn: (outputs, y) -> scalar.
    """

    def loss(weights: Parameters) -> Tensor:
        return loss_fn(functional_call(model, weights, (x,)), y)

    for _ in range(steps):
        gradients = grad(loss)(parameters)
        if first_order:
            gradients = {name: g.detach() for name, g in gradients.items()}
        parameters = {name: weight - lr * gradients[name] for name, weight in parameters.items()}
    return parameters


def _parameters(model: nn.Module) -> Parameters:
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in model.modules()):
        raise ModelError(
            "given a model with batch normalisation that keeps running statistics, expected none: tasks are adapted "
            "together; use LayerNorm or track_running_stats=False"
        )
    return {name: weight.detach() for name, weight in model.named_parameters()}


def meta_gradient(
    model: nn.Module, tasks: Tasks, config: MAMLConfig, *, loss_fn: Loss = F.cross_entropy
) -> tuple[Tensor, Parameters]:
    """Mean query loss after adaptation, and its outer gradient.

    Args:
        model: see `adapt`.
        tasks: a batch.
        config: inner learning rate and steps, first or second order.
        loss_fn: (outputs, labels) -> scalar.

    Returns:
        The loss and {name: gradient}.
    """
    parameters = _parameters(model)

    def inner(weights: Parameters, x: Tensor, y: Tensor) -> Parameters:
        return adapt(
            model,
            weights,
            x,
            y,
            lr=config.inner_lr,
            steps=config.inner_steps,
            first_order=config.first_order,
            loss_fn=loss_fn,
        )

    def query_loss(weights: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(functional_call(model, weights, (x,)), y)

    if config.first_order:
        adapted = vmap(inner, in_dims=(None, 0, 0))(parameters, tasks.support_x, tasks.support_y)
        gradients, losses = vmap(grad_and_value(query_loss))(adapted, tasks.query_x, tasks.query_y)
        return losses.mean(), {name: g.mean(0) for name, g in gradients.items()}

    def whole(weights: Parameters, x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        return query_loss(inner(weights, x, y), query_x, query_y)

    # One task after another: under vmap, torch's second derivatives of layer_norm with weights of their own for each
    # task are wrong (torch 2.11; tests/numerics/test_infinite_width_features_maml.py compares with a loop).
    losses, gradients = [], None
    for task in zip(tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y, strict=True):
        gradient, loss = grad_and_value(whole)(parameters, *task)
        losses.append(loss)
        if gradients is None:
            gradients = gradient
        else:
            gradients = {name: g + gradient[name] for name, g in gradients.items()}
    assert gradients is not None
    return torch.stack(losses).mean(), {name: g / len(losses) for name, g in gradients.items()}


def meta_train(
    model: nn.Module,
    sampler: EpisodicSampler,
    config: MAMLConfig,
    steps: int,
    *,
    loss_fn: Loss = F.cross_entropy,
    progress: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a model's starting point in place, by SGD.

    Args:
        model: see `adapt`.
        sampler: of tasks.
        config: settings.
        steps: outer steps.
        loss_fn: (outputs, labels) -> scalar.
        progress: called with the step and its loss after each tenth of the steps.

    Returns:
        The mean query loss of every step.

    Raises:
        ModelError: the loss is no longer finite.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=config.meta_lr, momentum=config.momentum)
    history = []
    weights = dict(model.named_parameters())
    report = max(1, steps // 10)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = config.meta_lr * config.factor(step / steps)
        loss, gradients = meta_gradient(model, sampler.sample(config.tasks), config, loss_fn=loss_fn)
        for name, weight in weights.items():
            weight.grad = gradients[name]
        if config.clip is not None:
            nn.utils.clip_grad_norm_(weights.values(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(loss)
        if (step + 1) % report == 0 or step + 1 == steps:
            value = float(loss)
            if not math.isfinite(value):
                raise ModelError(
                    f"the loss became {value} by step {step + 1}; lower meta_lr or inner_lr, or clip"
                )
            if progress is not None:
                progress(step + 1, value)
    return torch.stack(history).tolist() if history else []


@torch.no_grad()
def meta_evaluate(
    model: nn.Module,
    sampler: EpisodicSampler,
    config: MAMLConfig,
    tasks: int,
    *,
    batch: int = 100,
    loss_fn: Loss = F.cross_entropy,
) -> Accuracy:
    """Accuracy on the queries of new tasks, after adaptation to their support sets.

    Args:
        model: see `adapt`.
        sampler: of tasks.
        config: inner learning rate and `test_steps`.
        tasks: how many.
        batch: tasks adapted at once.
        loss_fn: of the inner steps.
    """
    parameters = _parameters(model)

    def accuracy(x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        adapted = adapt(
            model, parameters, x, y, lr=config.inner_lr, steps=config.steps_at_test, loss_fn=loss_fn
        )
        return (functional_call(model, adapted, (query_x,)).argmax(-1) == query_y).double().mean()

    results = []
    for start in range(0, tasks, batch):
        drawn = sampler.sample(min(batch, tasks - start))
        results.append(vmap(accuracy)(drawn.support_x, drawn.support_y, drawn.query_x, drawn.query_y))
    return Accuracy.of(torch.cat(results))


class KernelMAML:
    """First-order MAML of a kernel limit, in function space: coefficients of the images that tasks are drawn from.

    The function is f(x) = sum_j K(x, x_j) c_j over the training images x_j. An inner step adds -lr dloss/df at the
    support images, an outer step the queries' -meta_lr dloss/df after adaptation; the same as MAML of the infinitely
    wide network.

    Args:
        gram: (images, images) the kernel among the training sampler's `pool`.
        outputs: o, the number of ways.

    Raises:
        InvalidArgument: a matrix that is not square.
    """

    def __init__(self, gram: Tensor, outputs: int) -> None:
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
            raise InvalidArgument(f"given a Gram matrix of shape {tuple(gram.shape)}, expected a square one")
        self.gram = gram
        self.coefficients = gram.new_zeros(gram.shape[0], outputs)

    @staticmethod
    def _deltas(outputs: Tensor, labels: Tensor) -> Tensor:
        """Derivative of the mean cross-entropy of each task in its outputs (tasks, batch, o)."""
        targets = F.one_hot(labels, outputs.shape[-1]).to(outputs)
        return (outputs.softmax(-1) - targets) / outputs.shape[-2]

    def _adapted(
        self, start: Tensor, gram: Tensor, tasks: Tasks, lr: float, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Query outputs after adaptation, and the support's coefficients (tasks, batch, o).

        start: (images, o) outputs before adaptation; gram: among the same images.
        """
        support, query = tasks.support_index, tasks.query_index
        inner = gram[support[:, :, None], support[:, None, :]]
        cross = gram[query[:, :, None], support[:, None, :]]
        coefficients = start.new_zeros(*support.shape, start.shape[-1])
        for _ in range(steps):
            outputs = start[support] + inner @ coefficients
            coefficients = coefficients - lr * self._deltas(outputs, tasks.support_y)
        return start[query] + cross @ coefficients, coefficients

    def train(self, sampler: EpisodicSampler, config: MAMLConfig, steps: int) -> list[float]:
        """Outer steps.

        Args:
            sampler: of tasks, whose pool the Gram matrix is of.
            config: settings, first order, no momentum.
            steps: outer steps.

        Returns:
            The mean query loss of every step.

        Raises:
            InvalidArgument: second order or momentum, or a sampler of another number of images.
        """
        if not config.first_order or config.momentum:
            raise InvalidArgument(
                "given second-order MAML or momentum with a kernel, expected first_order=True and momentum=0"
            )
        if sampler.pool.shape[0] != self.gram.shape[0]:
            raise InvalidArgument(
                f"given a sampler of {sampler.pool.shape[0]} images and a Gram matrix of {self.gram.shape[0]}, "
                "expected the same images"
            )
        history = []
        for step in range(steps):
            tasks = sampler.sample(config.tasks)
            start = self.gram.new_zeros(self.gram.shape[0], self.coefficients.shape[1])
            touched = torch.cat((tasks.support_index, tasks.query_index), dim=1).flatten()
            start[touched] = self.gram[touched] @ self.coefficients
            outputs, _ = self._adapted(start, self.gram, tasks, config.inner_lr, config.inner_steps)
            history.append(F.cross_entropy(outputs.flatten(0, 1), tasks.query_y.flatten()))
            index = tasks.query_index.flatten()
            deltas = (self._deltas(outputs, tasks.query_y) / config.tasks).flatten(0, 1)
            if config.clip is not None:
                square = (deltas * (self.gram[index[:, None], index] @ deltas)).sum()
                deltas = deltas * (config.clip / (square.clamp_min(0).sqrt() + 1e-6)).clamp(max=1.0)
            # several tasks may share an image: their deltas add up
            gradient = torch.zeros_like(self.coefficients).index_add_(0, index, deltas)
            self.coefficients -= config.meta_lr * config.factor(step / steps) * gradient
        return torch.stack(history).tolist() if history else []

    def evaluate(
        self, sampler: EpisodicSampler, gram: Tensor, cross: Tensor, config: MAMLConfig, tasks: int
    ) -> Accuracy:
        """Accuracy on new tasks of other images.

        Args:
            sampler: of tasks.
            gram: (images, images) the kernel among the sampler's pool.
            cross: (images, training images) the kernel between its pool and the training images.
            config: inner learning rate and `test_steps`.
            tasks: how many.
        """
        drawn = sampler.sample(tasks)
        outputs, _ = self._adapted(
            cross @ self.coefficients, gram, drawn, config.inner_lr, config.steps_at_test
        )
        return Accuracy.of((outputs.argmax(-1) == drawn.query_y).double().mean(-1))

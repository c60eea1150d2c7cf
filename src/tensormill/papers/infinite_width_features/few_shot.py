"""C4 and C6: few-shot learning by width, from two neurons to infinitely many, beside kernels; kernels alone."""

from __future__ import annotations

import importlib.util
import itertools
from typing import TYPE_CHECKING, Any

from tensormill.papers._threads import one_thread
from tensormill.papers.catalogue import Measurement, Row, Run
from tensormill.papers.curves import Curve
from tensormill.papers.infinite_width_features.paper import PAPER

if TYPE_CHECKING:
    from torch import Tensor

    from tensormill.numerics.infinite_width_features import Accuracy, MAMLConfig

WAYS = 5
KERNELS = {
    "ReLU NTK": ("ntk", "relu"),
    "ReLU GP": ("gp", "relu"),
    "linear NTK": ("ntk", "identity"),
    "linear GP": ("gp", "identity"),
}


def characters(run: Run) -> tuple[Tensor, Tensor, Tensor, str]:
    """Images (classes, 20, pixels) to train, to choose settings and to test on, of different characters; their origin."""
    import torch

    from tensormill.data import real_data_dir
    from tensormill.numerics.infinite_width_features import load_omniglot, procedural_strokes

    size = 28 if run.scale == "full" else 14
    root = real_data_dir()
    if root is not None and (root / "omniglot").is_dir() and importlib.util.find_spec("PIL") is not None:
        images, _ = load_omniglot(size=size)
        what = "Omniglot's small background sets (242 characters; the paper's has 964 to train on)"
    else:
        images = procedural_strokes(240, size=size, seed=run.seed)
        what = "generated strokes instead of Omniglot, which is not present"
    order = torch.randperm(images.shape[0], generator=torch.Generator().manual_seed(run.seed))
    images = images[order].to(run.device)
    train, validation = round(0.62 * len(images)), round(0.13 * len(images))
    return images[:train], images[train : train + validation], images[train + validation :], what


class Subject:
    """Data and settings that all models share."""

    def __init__(self, run: Run) -> None:
        from tensormill.numerics.infinite_width_features import EpisodicSampler, MAMLConfig, rotated

        full = run.scale == "full"
        self.run = run
        train, validation, test, self.what = characters(run)
        self.train, self.validation, self.test = rotated(train), validation, test
        # what kernels are meta-trained on, which changes little: fewer images, since their Gram matrix is held
        self.plain = self.train if full else train[:60]
        self.steps = 5000 if full else 500
        self.tasks = 32 if full else 16
        self.test_tasks = 2000 if full else 600
        self.seeds = 3 if full else 1
        self.config = MAMLConfig(
            inner_lr=0.4,
            inner_steps=1,
            test_steps=20,
            meta_lr=1.0,
            tasks=self.tasks,
            clip=1.0,
            schedule=((0.6, 0.3), (0.85, 0.1)),
        )
        self.sampler = EpisodicSampler

    def draw(self, images: Tensor, seed: int) -> Any:
        """A sampler of 5-way 1-shot tasks."""
        return self.sampler(images, WAYS, 1, 5, seed=self.run.seed + seed)

    def network(self, width: int | None) -> list[Accuracy]:
        """Accuracy on the test tasks of a linear network after MAML, for each seed; width None: the limit."""
        from tensormill.numerics.infinite_width_features import (
            FiniteLinear1,
            InfiniteLinear1,
            Linear1Config,
            meta_evaluate,
            meta_train,
        )

        found = []
        config = Linear1Config(self.train.shape[-1], WAYS, sigma_v=1 / 8, bias=1.0)
        for seed in range(self.seeds):
            options: dict[str, Any] = {"device": self.run.device}
            model = (
                InfiniteLinear1(config, **options)
                if width is None
                else FiniteLinear1(config, width, seed=self.run.seed + seed, **options)
            )
            meta_train(model, self.draw(self.train, 100 + seed), self.config, self.steps)
            found.append(
                meta_evaluate(model, self.draw(self.test, 1), self.config, self.test_tasks, batch=200)
            )
        return found

    def kernel(self, kind: str, activation: str) -> tuple[Accuracy, Accuracy, dict[str, Any]]:
        """Accuracy of a kernel limit before and after MAML, and the settings that did best on validation characters."""
        from dataclasses import replace

        from tensormill.numerics.infinite_width_features import InfiniteKernel1, Kernel1Config, KernelMAML

        pixels = self.train.shape[-1]

        def build(**settings: Any) -> InfiniteKernel1:
            return InfiniteKernel1(
                Kernel1Config(pixels, WAYS, kind, activation, **settings), device=self.run.device
            )

        def config(lr: float) -> MAMLConfig:
            return replace(self.config, inner_lr=lr)

        best: tuple[float, float, dict[str, Any]] = (-1.0, 0.0, {})
        pool = self.validation.flatten(0, 1)
        for normalize, sigma_b in itertools.product((True, False), (0.0, 0.5)):
            settings = {"normalize": normalize, "sigma_b": sigma_b}
            gram = build(**settings).kernel(pool)
            scale = float(gram.diagonal().mean())
            for relative in (0.1, 0.4, 1.6, 6.4):
                score = KernelMAML(gram, WAYS).evaluate(
                    self.draw(self.validation, 2), gram, gram, config(relative / scale), 150
                )
                best = max(best, (score.mean, relative / scale, settings), key=lambda item: item[0])
        _, lr, settings = best
        network = build(**settings)
        train, test = self.plain.flatten(0, 1), self.test.flatten(0, 1)
        learner = KernelMAML(network.kernel(train), WAYS)
        gram, cross = network.kernel(test), network.kernel(test, train)
        before = learner.evaluate(self.draw(self.test, 1), gram, cross, config(lr), self.test_tasks)
        learner.train(self.draw(self.plain, 100), config(lr), self.steps)
        after = learner.evaluate(self.draw(self.test, 1), gram, cross, config(lr), self.test_tasks)
        return before, after, {"inner_lr": lr, **settings}


def throughput(subject: Subject) -> tuple[float, float]:
    """Tasks a second whose outer gradient is taken, in a batch and one after another; medians of five."""
    import statistics
    import time
    from dataclasses import fields

    import torch

    from tensormill.numerics.infinite_width_features import (
        InfiniteLinear1,
        Linear1Config,
        Tasks,
        meta_gradient,
    )

    config = Linear1Config(subject.train.shape[-1], WAYS, sigma_v=1 / 8, bias=1.0)
    model = InfiniteLinear1(config, device=subject.run.device)
    tasks = subject.draw(subject.train, 3).sample(subject.tasks)
    single = [
        Tasks(*(getattr(tasks, f.name)[t : t + 1] for f in fields(Tasks))) for t in range(subject.tasks)
    ]

    def seconds(batches: list[Tasks]) -> float:
        times = []
        for _ in range(6):
            start = time.perf_counter()
            for batch in batches:
                meta_gradient(model, batch, subject.config)
            if subject.run.device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    return subject.tasks / seconds([tasks]), subject.tasks / seconds(single)


def kernels(subject: Subject, run: Run, share: float) -> tuple[list[Row], dict[str, Accuracy]]:
    """Rows and accuracies of the four kernel limits; share: of the claim's work."""
    rows, results = [], {}
    for number, (name, (kind, activation)) in enumerate(KERNELS.items()):
        run.progress(name, share * number / len(KERNELS))
        before, after, settings = subject.kernel(kind, activation)
        results[name] = after
        rows.append(_row(name, after, {**settings, "tasks": after.tasks}))
        rows.append(_row(f"{name}, not meta-trained", before, settings))
    return rows, results


def merged(accuracies: list[Accuracy]) -> Accuracy:
    """Over seeds: the mean, with the interval of a single seed: all are tested on the same tasks."""
    from tensormill.numerics.infinite_width_features import Accuracy

    count = len(accuracies)
    mean = sum(a.mean for a in accuracies) / count
    half = sum(a.high - a.mean for a in accuracies) / count
    return Accuracy(mean, mean - half, mean + half, sum(a.tasks for a in accuracies))


@PAPER.claim(
    "C4",
    figure="omniglot",
    criterion=(
        "all kernels and width 2 are below the muP limit with 95 % intervals that do not overlap, and no finite width "
        "is above the limit with such an interval"
    ),
    measures=(
        "tensormill.numerics.infinite_width_features.maml",
        "tensormill.numerics.infinite_width_features.limits",
        "tensormill.numerics.infinite_width_features.kernels",
        "tensormill.numerics.infinite_width_features.glyphs",
        "tensormill.numerics.dual_activations",
    ),
)
@one_thread()
def few_shot(run: Run) -> Measurement:
    """5-way 1-shot accuracy after first-order MAML, all on the same test tasks of characters never seen.

    Settings are those of the limit for all widths; kernels choose inner learning rate, bias and normalisation on
    validation characters. Quick: 14 x 14 pixels, 500 outer steps of 16 tasks. Full: 28 x 28 pixels, 5000 steps of 32
    tasks, widths to 2048, three seeds: half an hour on a GPU with 8 GB.
    """
    subject = Subject(run)
    widths: list[int | None] = (
        [2, 8, 32, None] if run.scale == "quick" else [2, 4, 8, 32, 128, 512, 2048, None]
    )
    rows, results = kernels(subject, run, 1 / 3)
    by_width = []
    for number, width in enumerate(widths):
        run.progress(
            "limit" if width is None else f"width {width}",
            (1 + 2 * number / len(widths)) / 3,
        )
        name = "muP limit" if width is None else f"width {width}"
        results[name] = merged(subject.network(width))
        rows.append(_row(name, results[name], {"width": width, "seeds": subject.seeds}))
        if width is not None:
            by_width.append((width, 100 * results[name].mean))
    batched, single = throughput(subject)
    rows.append(
        Row(
            "tasks a second in a training step of the limit", batched, "tasks/s", peers={"one by one": single}
        )
    )
    limit = results["muP limit"]
    holds = (
        max(results[name].high for name in KERNELS) < limit.low
        and results["width 2"].high < limit.low
        and all(results[f"width {width}"].low <= limit.high for width, _ in by_width)
    )
    reason = ", ".join(f"{name} {100 * a.mean:.1f}" for name, a in results.items()) + f" %; {subject.what}"
    sizes = [width for width, _ in by_width]
    curves = [
        Curve("finite", sizes, [value for _, value in by_width], "width", "% accuracy"),
        Curve("muP limit", sizes, [100 * limit.mean] * len(sizes), "width", "% accuracy"),
    ]
    return Measurement(rows, holds=holds, reason=reason, repeats=subject.seeds, curves=curves)


@PAPER.claim(
    "C6",
    figure="omniglot-ntk",
    statement="Few-shot accuracy of kernel limits: ReLU networks are above linear ones",
    criterion="each ReLU kernel is above each linear one with 95 % intervals that do not overlap",
    measures=(
        "tensormill.numerics.infinite_width_features.kernels",
        "tensormill.numerics.infinite_width_features.glyphs",
        "tensormill.numerics.dual_activations",
    ),
)
@one_thread()
def kernel_order(run: Run) -> Measurement:
    """The kernels of C4 among themselves; the paper reads about 41.7 % for linear and 47.7 % for ReLU."""
    subject = Subject(run)
    rows, results = kernels(subject, run, 1.0)
    linear = max(accuracy.high for name, accuracy in results.items() if name.startswith("linear"))
    relu = min(accuracy.low for name, accuracy in results.items() if name.startswith("ReLU"))
    reason = ", ".join(f"{name} {100 * a.mean:.1f}" for name, a in results.items())
    return Measurement(rows, holds=linear < relu, reason=f"{reason} %; {subject.what}")


def _row(name: str, accuracy: Accuracy, setting: dict[str, Any]) -> Row:
    spread = (100 * accuracy.low, 100 * accuracy.high)
    return Row(name, 100 * accuracy.mean, "% accuracy", spread=spread, setting=setting)

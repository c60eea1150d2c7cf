"""The kernel that governs training of infinitely wide networks."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tensormill.papers.catalogue import Figure, Measurement, Paper, Row, Run
from tensormill.papers.curves import Curve, fit_exponent

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tensormill.numerics.ntk.infinite import Layer

PAPER = Paper(
    slug="ntk",
    title="Neural Tangent Kernel: Convergence and Generalization in Neural Networks",
    authors="Jacot et al.",
    arxiv="1806.07572",
    room="numerics",
    figures=(
        Figure(
            "kernel-spread",
            "The kernel's spread over initialisations shrinks from width 500 to this width",
            10000,
            "width",
            "4 ReLU layers on the unit circle, 10 initialisations; curves only",
            verified=False,
        ),
        Figure(
            "regression",
            "Ensembles of finite networks match the Gaussian prediction from width",
            1000,
            "width",
            "4 points, 10/50/90 percentiles; curves only",
            verified=False,
        ),
        Figure(
            "mnist-decay",
            "The error along a principal component of MNIST decays at the predicted rate at width",
            10000,
            "width",
            "second component; curves only",
            verified=False,
        ),
    ),
)

_SOURCES = ("tensormill.numerics.ntk", "tensormill.numerics.dual_activations")


def _relu_network(hidden: int, W_std: float = math.sqrt(2), b_std: float = 0.1) -> Layer:
    """`hidden` ReLU layers and a linear output."""
    from tensormill.numerics.ntk.infinite import Dense, ReLU, Sequential

    layers = [layer for _ in range(hidden) for layer in (Dense(W_std, b_std), ReLU())]
    return Sequential(*layers, Dense(W_std, b_std))


def _circle(count: int, dtype: Any = None) -> Tensor:
    """Equally spaced points on the circle of radius sqrt(2), whose mean square is 1."""
    import torch

    angle = torch.arange(count, dtype=dtype or torch.float32) * (2 * math.pi / count)
    return math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1)


def _digits(run: Run) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 digits in random order, each scaled to mean square 1; and their classes."""
    import torch
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float64)
    x = x / x.square().mean(1, keepdim=True).sqrt()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(run.seed))
    return x[order].to(run.device), torch.tensor(data.target)[order].to(run.device)


def _fastest(call: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Least seconds of a call; the first does not count, unless it takes more than half a second."""
    from tensormill.measure import synchronize

    seconds: list[float] = []
    for _ in range(repeats + 1):
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds if seconds[0] > 0.5 else seconds[1:])


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(value * value for value in values))


@PAPER.claim(
    "C1",
    figure="kernel-spread",
    statement="The empirical kernel tends to the analytic one as 1/sqrt(width), and moves less in training the wider",
    unit="exponent",
    paper_value=-0.5,
    criterion="Relative error at initialisation falls with width to the power -0.5 +- 0.05; drift during training falls "
    "with a power of -0.4 or steeper",
    needs={"full": ()},
    measures=_SOURCES,
)
def convergence(run: Run) -> Measurement:
    """Three ReLU layers, bias 0.1 as in the paper, points on the circle; root mean square over initialisations."""
    import torch

    from tensormill.numerics.ntk import empirical_ntk

    # W_std = 1 as in the paper.
    network = _relu_network(3, 1.0, 0.1)
    x = _circle(8).to(run.device)
    exact = network.kernel(x, get="ntk")
    seeds = {32: 300, 64: 300, 128: 300, 256: 200, 512: 128, 1024: 64, 2048: 32}
    if run.scale == "full":
        seeds |= {2048: 100, 4096: 64, 8192: 32}
    rows: list[Row] = []
    errors = []
    for width, count in seeds.items():
        run.progress(f"kernels of {count} networks of width {width}", len(rows) / 14)
        each = []
        for seed in range(count):
            module = network.finite(width, 2, seed=run.seed + 1000 * width + seed).to(run.device)
            found = empirical_ntk(module, x, trace_outputs=True)
            each.append(float((found - exact).norm() / exact.norm()))
        errors.append(_root_mean_square(each))
        setting = {"width": width, "initialisations": count}
        rows.append(Row(f"error at initialisation, width {width}", errors[-1], "relative", setting=setting))
    initial = fit_exponent(list(seeds), errors)

    steps, draws = 200, 8
    target = (x[:, :1] * x[:, 1:]).contiguous()
    widths = (32, 64, 128, 256, 512, *((1024, 2048) if run.scale == "full" else ()))
    drifts = []
    for width in widths:
        run.progress(f"training width {width}", 0.6)
        each = []
        for seed in range(draws):
            module = network.finite(width, 2, seed=run.seed + 7000 * width + seed).to(run.device)
            before = empirical_ntk(module, x, trace_outputs=True)
            optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
            for _ in range(steps):
                optimizer.zero_grad()
                ((module(x) - target).square().sum() / (2 * len(x))).backward()
                optimizer.step()
            after = empirical_ntk(module, x, trace_outputs=True)
            each.append(float((after - before).norm() / before.norm()))
        drifts.append(_root_mean_square(each))
        training = {"width": width, "steps": steps, "lr": 1.0}
        rows.append(Row(f"drift in {steps} steps, width {width}", drifts[-1], "relative", setting=training))
    drift = fit_exponent(widths, drifts)
    rows.append(
        Row("power of the error at initialisation", initial.value, "exponent", (initial.low, initial.high))
    )
    rows.append(Row("power of the drift", drift.value, "exponent", (drift.low, drift.high)))
    holds = abs(initial.value + 0.5) <= 0.05 and drift.value <= -0.4
    curves = [
        Curve("at initialisation", list(seeds), errors, "width", "relative change", initial),
        Curve("drift in training", widths, drifts, "width", "relative change", drift),
    ]
    reason = f"error ~ width^{initial}, drift ~ width^{drift}; 8 points on the circle"
    return Measurement(rows, holds, reason, repeats=min(seeds.values()), curves=curves)


def _trained(
    network: Layer,
    width: int,
    seeds: Sequence[int],
    x: Tensor,
    y: Tensor,
    probe: Tensor,
    lr: float,
    times: Sequence[int],
) -> Tensor:
    """Outputs (networks, times, points) on x and probe of networks trained at the same time by gradient descent."""
    import torch

    modules: list[nn.Module] = [
        network.finite(width, x.shape[1], seed=seed, dtype=x.dtype).to(x.device) for seed in seeds
    ]
    parameters, _ = torch.func.stack_module_state(modules)
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}

    def call(values: dict[str, Tensor], points: Tensor) -> Tensor:
        return torch.func.functional_call(modules[0], values, (points,))[:, 0]

    every = torch.func.vmap(call, (0, None))
    both = torch.cat([x, probe])
    seen = []
    for step in range(max(times) + 1):
        if step in times:
            with torch.no_grad():
                seen.append(every(leaves, both))
        loss = (every(leaves, x) - y[:, 0]).square().sum() / (2 * len(x))
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        with torch.no_grad():
            for leaf, gradient in zip(leaves.values(), gradients, strict=True):
                leaf.sub_(gradient, alpha=lr)
    return torch.stack(seen, 1)


def _twenty_times(last: int) -> list[int]:
    """Twenty different numbers of steps from 1 to `last`, about evenly spaced on a logarithmic axis."""
    chosen: list[int] = []
    for k in range(20):
        chosen.append(max(round(last ** (k / 19)), chosen[-1] + 1 if chosen else 1))
    return chosen


@PAPER.claim(
    "C2",
    figure="regression",
    statement="Wide networks train along the closed form: their distance from it falls as 1/sqrt(width), and ensembles "
    "fill the predicted band",
    unit="exponent",
    paper_value=-0.5,
    criterion="Largest distance over 20 times falls with width to the power -0.5 +- 0.15 and is below 10% at the widest; "
    "rates of decay along the first five eigenvectors are within 10% there; an ensemble's 10/50/90 percentiles are within 0.35 "
    "standard deviations of the prediction on average",
    needs=("python:sklearn",),
    measures=_SOURCES,
    peers=("scikit-learn",),
)
def dynamics(run: Run) -> Measurement:
    """Digits on the sphere, odd against even; each network from its own start; and the paper's four points."""
    import torch

    from tensormill.numerics.ntk import largest_stable_rate, predict_mse, predict_mse_ensemble

    full = run.scale == "full"
    network = _relu_network(2)
    x, classes = _digits(run)
    count = 32
    train, test = x[:count], x[count : 2 * count]
    y = (classes[:count, None] % 2).double() * 2 - 1
    kernel, cross = network.kernel(train, get="ntk"), network.kernel(test, train, "ntk")
    # A tenth of what is stable: the first eigenvector then takes several steps, and its rate can be seen.
    lr = 0.1 * largest_stable_rate(kernel)
    times = _twenty_times(100)
    values, vectors = torch.linalg.eigh(kernel)
    rows: list[Row] = []
    distances, rate_error = [], math.inf
    widths = (64, 128, 256, 512, 1024, *((2048, 4096) if full else ()))
    for width in widths:
        run.progress(f"digits, width {width}", len(rows) / 10)
        draws = 64 if full else max(8, min(96, 12_288 // width))
        seeds = [run.seed + 100 * width + k for k in range(draws)]
        arguments = (train.float(), y.float(), test.float(), lr, [0, *times])
        found = _trained(network, width, seeds, *arguments).double()
        start, later = found[:, 0], found[:, 1:]
        each = []
        for f0, f in zip(start, later, strict=True):
            predicted = predict_mse(
                kernel,
                y,
                cross,
                [float(t) for t in times],
                lr,
                f0[:count, None],
                f0[count:, None],
                rule="descent",
            )[..., 0]
            away = (f[:, count:] - predicted).norm(dim=1) / (predicted - f0[count:]).norm(dim=1)
            each.append(float(away.max()))
        distances.append(_root_mean_square(each))
        rows.append(
            Row(
                f"digits, width {width}",
                distances[-1],
                "relative",
                setting={"width": width, "networks": draws},
            )
        )
        rate_error = _rate_error(found[..., :count] - y[:, 0], [0, *times], values, vectors, lr)
    exponent = fit_exponent(widths, distances)
    rows.append(Row(f"error of the first five decay rates, width {widths[-1]}", rate_error, "relative"))

    # The paper's picture: four points on the circle, an ensemble against its 10th, 50th and 90th percentile.
    network = _relu_network(3, math.sqrt(2), 0.1)
    points, probe = _circle(4).to(run.device)[[0, 1, 2]], _circle(24).to(run.device)
    target = torch.tensor([[0.5], [-0.5], [0.3]], device=run.device)
    nngp, ntk = network.kernel(torch.cat([points, probe]).double())
    lr = 0.1 * largest_stable_rate(ntk[:3, :3])
    bands = {}
    for width in (32, 256, *((1024,) if full else ())):
        run.progress(f"ensemble of width {width}", 0.9)
        steps = 200
        seeds = [run.seed + 50_000 + k for k in range(60)]
        found = _trained(network, width, seeds, points, target, probe, lr, [steps])[:, 0, 3:].double()
        band = predict_mse_ensemble(
            nngp[:3, :3], nngp[3:, :3], nngp[3:, 3:], target.double(), ntk[:3, :3], ntk[3:, :3], float(steps), lr,
            rule="descent",
        )  # fmt: skip
        away = []
        wide = band.deviation > 0.05 * band.deviation.max()  # at the training points there is no band left
        for share, z in ((0.1, -1.2816), (0.5, 0.0), (0.9, 1.2816)):
            expected = band.mean[:, 0] + z * band.deviation
            away.append(((found.quantile(share, dim=0) - expected).abs() / band.deviation)[wide].mean())
        bands[width] = float(torch.stack(away).mean())
        rows.append(
            Row(
                f"circle, 60 networks of width {width}: percentiles off by",
                bands[width],
                "deviations",
                setting={"width": width},
            )
        )
    rows.append(Row("power of the distance", exponent.value, "exponent", (exponent.low, exponent.high)))
    widest = bands[max(bands)]
    holds = abs(exponent.value + 0.5) <= 0.15 and distances[-1] < 0.1 and rate_error < 0.1 and widest < 0.35
    reason = (
        f"distance ~ width^{exponent}, {100 * distances[-1]:.1f}% at width {widths[-1]}; decay rates off by "
        f"{100 * rate_error:.1f}%, percentiles by {widest:.2f} deviations; digits instead of MNIST"
    )
    curve = Curve(
        "distance from the closed form", widths, distances, "width", "largest relative distance", exponent
    )
    return Measurement(rows, holds, reason, repeats=8, curves=[curve])


def _rate_error(residuals: Tensor, times: Sequence[int], values: Tensor, vectors: Tensor, lr: float) -> float:
    """Median relative error of the decay along the first five eigenvectors, against (1 - lr lambda / N)^t."""
    import torch

    errors = []
    steps = torch.tensor(times, dtype=residuals.dtype, device=residuals.device)
    for k in range(1, 6):
        coefficients = (residuals @ vectors[:, -k]).abs()  # [networks, times]
        expected = -math.log1p(-min(lr * float(values[-k]) / len(values), 0.99))
        for series in coefficients:
            kept = series > 0.05 * series[0]
            kept = kept.cumprod(0).bool()  # until the first that is too small
            if int(kept.sum()) < 3:
                continue
            t, log = steps[kept], series[kept].log()
            slope = ((t - t.mean()) * (log - log.mean())).sum() / (t - t.mean()).square().sum()
            errors.append(abs(float(-slope) / expected - 1))
    return statistics.median(errors) if errors else math.inf


def _plain_recursion(x: Tensor, hidden: int, w: float, b: float) -> Tensor:
    """The tangent kernel as the paper's theorem 1 reads, on whole matrices."""
    import torch

    s = w * (x @ x.T) / x.shape[1] + b
    t = s
    for _ in range(hidden):
        q = s.diagonal()
        scale = (q[:, None] * q).sqrt()
        cosine = (s / scale).clamp(-1, 1)
        angle = torch.acos(cosine)
        s = w * scale / (2 * math.pi) * (torch.sin(angle) + (math.pi - angle) * cosine) + b
        t = s + w * t * (math.pi - angle) / (2 * math.pi)
    return t


@PAPER.claim(
    "C3",
    statement="The analytic kernel of N inputs, in tiles that stay in the cache, against the recursion on whole matrices",
    unit="x",
    criterion="At least 3 times as fast as the plain recursion at the largest N for each depth, time growing as N^2 +- 0.2, "
    "and the same values to 1e-3",
    measures=_SOURCES,
)
def analytic_speed(run: Run) -> Measurement:
    """Float32, 64 features, one thread on a CPU; the limit is the Gram matrix and one write of the result."""
    import torch

    from tensormill.measure import warn_if_busy

    warn_if_busy()
    full = run.scale == "full"
    sizes = (1400, 2000, 2800, 4000, *((8000, 12_000) if full else ()))
    depths = (3, 9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[Row] = []
    curves, ratios, worst, powers = [], [], 0.0, []
    try:
        for hidden in depths:
            network = _relu_network(hidden)
            ours, plain = [], []
            for n in sizes:
                run.progress(f"{hidden} hidden layers, {n} inputs", len(rows) / (2 * len(sizes)))
                generator = torch.Generator().manual_seed(run.seed)
                x = torch.randn(n, 64, generator=generator).to(run.device)
                ours.append(_fastest(lambda x=x, f=network: f.kernel(x, get="ntk"), run.device, 9))  # type: ignore[misc]
                plain.append(_fastest(lambda x=x, h=hidden: _plain_recursion(x, h, 2.0, 0.01), run.device, 1))  # type: ignore[misc]
                limit = _fastest(lambda x=x: x @ x.T, run.device)  # type: ignore[misc]
                setting = {"inputs": n, "hidden_layers": hidden, "dtype": "float32"}
                rows.append(
                    Row(f"{hidden} hidden layers, {n} inputs", ours[-1], "s", peers={"plain recursion": plain[-1]},
                        limit=limit, setting=setting)
                )  # fmt: skip
            x = x[:500].double()
            both = network.kernel(x.float(), get="ntk").double(), _plain_recursion(x, hidden, 2.0, 0.01)
            worst = max(worst, float((both[0] - both[1]).norm() / both[1].norm()))
            exponent = fit_exponent(sizes, ours)
            powers.append(exponent.value)
            ratios.append(plain[-1] / ours[-1])
            names = f"{hidden} hidden layers"
            curves.append(Curve(names, sizes, ours, "inputs", "seconds", exponent))
            curves.append(
                Curve(
                    f"{names}, plain recursion", sizes, plain, "inputs", "seconds", fit_exponent(sizes, plain)
                )
            )
            rows.append(Row(f"{names}: gain at {sizes[-1]} inputs", ratios[-1], "x"))
    finally:
        torch.set_num_threads(threads)
    rows.append(Row("largest relative difference", worst, "relative"))
    holds = min(ratios) >= 3 and all(abs(p - 2) <= 0.2 for p in powers) and worst < 1e-3
    reason = f"gains {', '.join(f'{r:.1f}' for r in ratios)} with {', '.join(map(str, depths))} hidden layers, powers "
    return Measurement(rows, holds, reason + ", ".join(f"{p:.2f}" for p in powers), repeats=3, curves=curves)


def _jacobian_recipe(module: nn.Module, x: Tensor) -> Tensor:
    """PyTorch's tutorial, first way: Jacobians of all parameters by jacrev, contracted with einsum."""
    import torch

    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def one(values: dict[str, Tensor], point: Tensor) -> Tensor:
        return torch.func.functional_call(module, values, (point[None],))[0]

    jacobians = [
        j.flatten(2) for j in torch.func.vmap(torch.func.jacrev(one), (None, 0))(parameters, x).values()
    ]
    return torch.stack([torch.einsum("Naf,Mbf->NMab", j, j) for j in jacobians]).sum(0)


def _product_recipe(module: nn.Module, x: Tensor) -> Tensor:
    """PyTorch's tutorial, second way: a vjp and a jvp for each pair, on the columns of the identity."""
    from tensormill.numerics.ntk import empirical_ntk

    return empirical_ntk(module, x, x.clone(), "ntvp")


def _convolutional(channels: int, outputs: int) -> nn.Module:
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * channels, outputs),
    )  # fmt: skip


@PAPER.claim(
    "C4",
    statement="Empirical kernels from structured derivatives against torch.func's two recipes",
    unit="x",
    criterion="At least 10 times the faster recipe on dense networks of width 512 and more, at least twice on "
    "convolutional ones, and the same values to 1e-4",
    measures=_SOURCES,
    peers=("torch",),
)
def empirical_speed(run: Run) -> Measurement:
    """16 inputs, float32, one thread on a CPU: three dense layers, and three convolutions on 8 x 8 images."""
    import torch
    from torch import nn

    from tensormill.measure import warn_if_busy
    from tensormill.numerics.ntk import empirical_ntk

    warn_if_busy()
    cases = [("dense", width, 1) for width in (128, 256, 512, 1024)]
    cases += [("dense", 512, 10), ("convolutional", 32, 1), ("convolutional", 32, 10)]
    if run.scale == "full":
        cases += [("dense", 2048, 1), ("dense", 1024, 10), ("convolutional", 128, 10)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[Row] = []
    gains: dict[tuple[str, int, int], float] = {}
    times: dict[str, list[float]] = {"ours": [], "torch.func": []}
    worst = 0.0
    try:
        for case in cases:
            kind, width, outputs = case
            run.progress(f"{kind}, width {width}, {outputs} outputs", len(rows) / len(cases))
            torch.manual_seed(run.seed)
            if kind == "dense":
                module: nn.Module = nn.Sequential(
                    nn.Linear(64, width),
                    nn.ReLU(),
                    nn.Linear(width, width),
                    nn.ReLU(),
                    nn.Linear(width, outputs),
                )
                x = torch.randn(16, 64)
            else:
                module, x = _convolutional(width, outputs), torch.randn(16, 1, 8, 8)
            module, x = module.to(run.device), x.to(run.device)
            calls: dict[str, Callable[[], Tensor]] = {
                "ours": lambda m=module, x=x: empirical_ntk(m, x),  # type: ignore[misc]
                "jacrev and einsum": lambda m=module, x=x: _jacobian_recipe(m, x),  # type: ignore[misc]
                "jvp of vjp": lambda m=module, x=x: _product_recipe(m, x),  # type: ignore[misc]
            }
            seconds = {
                name: _fastest(call, run.device, 5 if name == "ours" else 1) for name, call in calls.items()
            }
            ours = seconds.pop("ours")
            expected = calls["jacrev and einsum"]()
            worst = max(worst, float((calls["ours"]() - expected).norm() / expected.norm()))
            gains[case] = min(seconds.values()) / ours
            setting = {"kind": kind, "width": width, "outputs": outputs, "inputs": 16}
            rows.append(
                Row(f"{kind}, width {width}, {outputs} outputs", ours, "s", peers=seconds, setting=setting)
            )
            if kind == "dense" and outputs == 1:
                times["ours"].append(ours)
                times["torch.func"].append(min(seconds.values()))
    finally:
        torch.set_num_threads(threads)
    for (kind, width, outputs), gain in gains.items():
        rows.append(Row(f"gain, {kind}, width {width}, {outputs} outputs", gain, "x"))
    rows.append(Row("largest relative difference", worst, "relative"))
    widths = [width for kind, width, outputs in cases if kind == "dense" and outputs == 1]
    curves = [
        Curve(name, widths, values, "width", "seconds", fit_exponent(widths, values))
        for name, values in times.items()
    ]
    dense = min(gain for (kind, width, _), gain in gains.items() if kind == "dense" and width >= 512)
    convolutional = min(gain for (kind, *_), gain in gains.items() if kind != "dense")
    holds = dense >= 10 and convolutional >= 2 and worst < 1e-4
    reason = (
        f"least gain {dense:.1f} on dense networks from width 512, {convolutional:.1f} on convolutional ones"
    )
    return Measurement(rows, holds, reason, repeats=2, curves=curves)


@PAPER.claim(
    "C5",
    statement="Kernel regression by m random features: error falls as 1/sqrt(m), time grows linearly in N",
    unit="exponent",
    paper_value=-0.5,
    criterion="Error of the kernel falls with m to the power -0.5 +- 0.1, time of the solve grows with N to a power of at "
    "most 1.3, and test accuracy is within 2 points of the exact kernel's at the largest m",
    needs=("python:sklearn",),
    measures=_SOURCES,
    peers=("scikit-learn",),
)
def random_features(run: Run) -> Measurement:
    """Digits on the sphere, tangent kernel of two ReLU layers; Nystroem gets as many components as we have features."""
    import torch
    from sklearn.kernel_approximation import Nystroem

    from tensormill.numerics.ntk import RandomFeatures

    full = run.scale == "full"
    network = _relu_network(2)
    x, classes = _digits(run)
    train, test = x[:1200], x[1200:]
    labels = torch.nn.functional.one_hot(classes[:1200], 10).double() - 0.1
    kernel, cross = network.kernel(train, get="ntk"), network.kernel(test, train, "ntk")
    ridge = 1e-3 * float(kernel.diagonal().mean())
    unseen = test[:100]
    held = network.kernel(unseen, get="ntk")

    def accuracy(outputs: Tensor) -> float:
        return 100 * float((outputs.argmax(1) == classes[1200:]).double().mean())

    def solved(features: Tensor, targets: Tensor) -> Tensor:
        gram = features.T @ features
        gram.diagonal().add_(ridge)
        return torch.cholesky_solve(features.T @ targets, torch.linalg.cholesky(gram))

    identity = torch.eye(len(train), dtype=x.dtype, device=x.device)
    exact = accuracy(cross @ torch.linalg.solve(kernel + ridge * identity, labels))
    rows = [Row("test accuracy, exact kernel", exact, "%")]
    counts = (64, 128, 256, 512, 1024, *((2048, 4096) if full else ()))
    errors, nystroem, best = [], [], 0.0
    for m in counts:
        run.progress(f"{m} directions", len(rows) / 12)
        each, correct = [], []
        for seed in range(40):
            few = RandomFeatures(network, m, seed=run.seed + seed)(unseen)
            each.append(float((few @ few.T - held).norm() / held.norm()))
        for seed in range(3):
            features = RandomFeatures(network, m, seed=run.seed + seed)
            ours = features(train)
            correct.append(accuracy(features(test) @ solved(ours, labels)))
        size = ours.shape[1]
        # The inputs are in random order: the first ones are the random choice that it would make.
        chosen = min(size, len(train))
        peer = Nystroem(kernel="precomputed", n_components=chosen, random_state=run.seed)
        peer.fit(kernel[:chosen, :chosen].cpu().numpy())
        theirs = torch.as_tensor(peer.transform(cross[:100, :chosen].cpu().numpy()), device=x.device)
        nystroem.append(float((theirs @ theirs.T - held).norm() / held.norm()))
        errors.append(_root_mean_square(each))
        best = statistics.fmean(correct)
        setting = {"directions": m, "features": size}
        rows.append(
            Row(
                f"error of the kernel, m = {m}",
                errors[-1],
                "relative",
                peers={"Nystroem": nystroem[-1]},
                setting=setting,
            )
        )
        rows.append(Row(f"test accuracy, m = {m}", best, "%", (min(correct), max(correct)), setting=setting))
    slope = fit_exponent(counts, errors)

    sizes = (2000, 4000, 8000, 16_000, *((32_000, 64_000) if full else ()))
    ours_time, exact_time = [], []
    features = RandomFeatures(network, 128, seed=run.seed)
    for n in sizes:
        run.progress(f"solving {n} inputs", 0.8)
        many = torch.randn(n, 64, dtype=torch.float32, generator=torch.Generator().manual_seed(run.seed)).to(
            run.device
        )
        targets = many[:, :10].contiguous()
        ours_time.append(_fastest(lambda a=many, b=targets: solved(features(a), b), run.device))  # type: ignore[misc]
        if n <= (4000 if not full else 16_000):
            exact_time.append(_fastest(lambda a=many, b=targets: _exact_solve(network, a, b), run.device, 1))  # type: ignore[misc]
        rows.append(
            Row(f"kernel regression of {n} inputs", ours_time[-1], "s",
                peers={"exact kernel": exact_time[-1]} if len(exact_time) == len(ours_time) else {}, setting={"inputs": n})
        )  # fmt: skip
    growth = fit_exponent(sizes, ours_time)
    curves = [
        Curve("random features", counts, errors, "directions m", "relative error of the kernel", slope),
        Curve("Nystroem", counts, nystroem, "directions m", "relative error of the kernel"),
        Curve("random features, m = 128", sizes, ours_time, "inputs", "seconds", growth),
        Curve("exact kernel", sizes[: len(exact_time)], exact_time, "inputs", "seconds"),
    ]
    holds = abs(slope.value + 0.5) <= 0.1 and growth.value <= 1.3 and best >= exact - 2
    reason = (
        f"error ~ m^{slope}, time ~ N^{growth}; accuracy {best:.1f}% with m = {counts[-1]}, {exact:.1f}% exact; Nystroem, "
        "which chooses its features from the data, is nearer to the kernel"
        if nystroem[-1] < errors[-1]
        else f"error ~ m^{slope}, time ~ N^{growth}; accuracy {best:.1f}% with m = {counts[-1]}, {exact:.1f}% exact"
    )
    return Measurement(rows, holds, reason, repeats=3, curves=curves)


def _exact_solve(network: Layer, x: Tensor, y: Tensor) -> Tensor:
    import torch

    kernel = network.kernel(x, get="ntk")
    kernel.diagonal().add_(1e-3 * float(kernel.diagonal().mean()))
    return torch.cholesky_solve(y, torch.linalg.cholesky(kernel))


@PAPER.claim(
    "C6",
    statement="Digits: the tangent kernel against the NNGP kernel, an RBF support-vector machine and trained networks",
    unit="%",
    criterion="Test accuracy of the tangent kernel is at most one point below the support-vector machine's and at most one "
    "point below the widest trained network's",
    needs=("python:sklearn",),
    measures=_SOURCES,
    peers=("scikit-learn",),
)
def accuracy(run: Run) -> Measurement:
    """1000 training images, 797 test images; ridge, C and gamma chosen by validation on 250 of the former."""
    import torch
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    full = run.scale == "full"
    x, classes = _digits(run)
    n = 1000
    labels = torch.nn.functional.one_hot(classes[:n], 10).double() - 0.1
    network = _relu_network(2)
    rows: list[Row] = []
    found: dict[str, float] = {}

    def correct(outputs: Tensor, truth: Tensor) -> float:
        return 100 * float((outputs.argmax(1) == truth).double().mean())

    for name, get in (("NTK", "ntk"), ("NNGP", "nngp")):
        run.progress(name, len(rows) / 10)
        kernel = network.kernel(x, get=get)

        def regression(fit: slice, predict: slice, ridge: float, kernel: Tensor = kernel) -> Tensor:
            block = kernel[fit, fit].clone()
            block.diagonal().add_(ridge * float(kernel.diagonal().mean()))
            return kernel[predict, fit] @ torch.linalg.solve(block, labels[fit])

        ridges = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
        chosen = max(
            ridges, key=lambda r: correct(regression(slice(0, 750), slice(750, n), r), classes[750:n])
        )
        found[name] = correct(regression(slice(0, n), slice(n, None), chosen), classes[n:])
        rows.append(Row(name, found[name], "%", setting={"ridge": chosen}))

    run.progress("support-vector machine", 0.4)
    inputs, truth = x.cpu().numpy(), classes.cpu().numpy()
    scale = 1 / (64 * float(x[:n].var()))
    grid = {"C": [1, 10, 100], "gamma": [scale * f for f in (0.3, 1, 3)]}
    search = GridSearchCV(SVC(), grid, cv=3, n_jobs=1).fit(inputs[:n], truth[:n])
    found["RBF SVM"] = 100 * float(search.score(inputs[n:], truth[n:]))
    rows.append(
        Row("RBF SVM", found["RBF SVM"], "%", setting={k: float(v) for k, v in search.best_params_.items()})
    )

    widths = (8, 32, 128, 512, *((2048,) if full else ()))
    widest = 0.0
    for width in widths:
        run.progress(f"network of width {width}", 0.6)
        each = []
        for seed in range(3):
            module = network.finite(width, 64, 10, "standard", run.seed + seed).to(run.device)
            each.append(
                _trained_accuracy(module, x.float(), classes, n, 3000 if full else 600, run.seed + seed)
            )
        widest = statistics.fmean(each)
        setting = {"width": width, "initialisations": len(each)}
        rows.append(Row(f"network of width {width}", widest, "%", (min(each), max(each)), setting=setting))
    holds = found["NTK"] >= found["RBF SVM"] - 1 and found["NTK"] >= widest - 1
    named = ", ".join(f"{name} {value:.1f}%" for name, value in found.items())
    return Measurement(
        rows, holds, f"{named}, network of width {widths[-1]} {widest:.1f}%; digits instead of MNIST", 3
    )


def _trained_accuracy(module: nn.Module, x: Tensor, classes: Tensor, n: int, steps: int, seed: int) -> float:
    """Test accuracy after Adam with a rate of 0.001 on the cross-entropy of batches of 100."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(n, (100,), generator=generator).to(x.device)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x[batch]), classes[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return 100 * float((module(x[n:]).argmax(1) == classes[n:]).double().mean())

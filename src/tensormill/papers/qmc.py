"""Randomised low-discrepancy points, and kernel methods in n log n on them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from tensormill.papers._threads import one_thread
from tensormill.papers.catalogue import Figure, Measurement, Paper, Row, Run
from tensormill.papers.curves import Curve, fit_exponent

if TYPE_CHECKING:
    from torch import Tensor

    from tensormill.numerics.qmc import Measure

PAPER = Paper(
    slug="qmc",
    title=(
        "QMCPy: A Python Software for Randomized Low-Discrepancy Sequences, Quasi-Monte Carlo, and Fast "
        "Kernel Methods"
    ),
    authors="Sorokin",
    arxiv="2502.14256",
    room="numerics",
    figures=(
        Figure(
            "gram-exponent",
            "Gram products and solves cost n log n instead of n^2 and n^3",
            1,
            "exponent",
            "shift-invariant kernels on lattices, digitally so on nets",
        ),
        Figure(
            "rmse-lattice",
            "Integration error with low-discrepancy points decays with this power of n",
            -1.0,
            "exponent",
            "plain Monte Carlo -0.5",
            verified=False,
        ),
        Figure(
            "rmse-scrambled",
            "Integration error with scrambled nets decays with this power of n",
            -1.5,
            "exponent",
            "smooth integrands",
            verified=False,
        ),
        Figure(
            "doubling",
            "Doubling the points updates the transform in linear time",
            1,
            "exponent",
            "derivation",
        ),
    ),
)

_ROOM = "tensormill.numerics.qmc"
_MILLISECONDS = 1e3


@contextmanager
def _like_with_like() -> Iterator[None]:
    """One thread on the CPU: qmcpy's code has no more, and comparisons should be of the algorithms."""
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # qmcpy's and ours about numbers of points
        yield


def _has(module: str) -> bool:
    from tensormill.operator import requires

    return requires(module)() is None


def _samples(n: int, device: str, seed: int) -> Tensor:
    import torch

    return torch.randn(
        n, dtype=torch.float64, device=device, generator=torch.Generator(device).manual_seed(seed)
    )


@PAPER.claim(
    "C1",
    statement="The Walsh-Hadamard transform of samples on a digital net takes a fraction of qmcpy's time",
    unit="x",
    criterion="At least 30 times faster than the faster of qmcpy's two implementations for 2^18 doubles, on one thread",
    needs=("cpu", "python:qmcpy"),
    measures=(_ROOM + ".transforms", "tensormill.ops.hadamard_transform"),
    peers=("qmcpy",),
)
def walsh_hadamard(run: Run) -> Measurement:
    """The limit is reading and writing every double once."""
    import torch
    from qmcpy import fwht as numpy_fwht
    from qmcpy import fwht_torch

    from tensormill import measure
    from tensormill.numerics import qmc
    from tensormill.ops import OPERATORS
    from tensormill.roofline import ceilings

    machine = ceilings(run.device)
    operator = OPERATORS["hadamard_transform"]
    rows: list[Row] = []
    ratio, rounds = 0.0, 0
    with _like_with_like():
        for log_n in (14, 18) if run.scale == "quick" else (10, 14, 18, 20, 22):
            run.progress(f"2^{log_n} doubles")
            x = _samples(1 << log_n, run.device, run.seed)
            array = x.numpy()
            if not torch.allclose(qmc.fwht(x), torch.from_numpy(numpy_fwht(array))):
                raise AssertionError("the transforms differ")
            timings = measure.time_together(
                {
                    "tensormill": [lambda x=x: qmc.fwht(x)],  # type: ignore[misc]
                    "qmcpy torch": [lambda x=x: fwht_torch(x)],  # type: ignore[misc]
                    "qmcpy numpy": [lambda a=array: numpy_fwht(a)],  # type: ignore[misc]
                    "torch.fft": [lambda x=x: torch.fft.fft(x)],  # type: ignore[misc]
                },
                run.device,
                seconds=0.3,
            )
            ours = timings["tensormill"]
            peers = {name: t.seconds for name, t in timings.items() if name != "tensormill"}
            cost = operator.cost({**operator.shape_defaults, "rows": 1, "n": 1 << log_n, "dtype": "float64"})
            rows.append(
                Row(
                    f"2^{log_n} doubles: time",
                    _MILLISECONDS * ours.seconds,
                    "ms",
                    (_MILLISECONDS * ours.low, _MILLISECONDS * ours.high),
                    {name: _MILLISECONDS * s for name, s in peers.items()},
                    _MILLISECONDS * machine.limit_seconds(cost),
                    {"log_n": log_n},
                )
            )
            best = min(peers["qmcpy torch"], peers["qmcpy numpy"]) / ours.seconds
            rows.append(Row(f"2^{log_n} doubles: faster than qmcpy", best, "x", setting={"log_n": log_n}))
            if log_n == 18:
                ratio = best
            rounds = ours.rounds
    return Measurement(rows, ratio >= 30, f"{ratio:.0f} times qmcpy at 2^18", rounds)


@PAPER.claim(
    "C2",
    statement="The Fourier transform of samples in radical-inverse order costs no more than one in the usual order",
    paper_value=1.0,
    unit="x",
    criterion=(
        "At most 1.1 times torch.fft.fft of the same samples, real and complex, at 2^12, 2^14, 2^16 and 2^18, on one "
        "thread"
    ),
    needs=("cpu",),
    measures=(_ROOM + ".transforms", "tensormill.ops.fft_bit_reversed"),
    peers=("torch", "qmcpy"),
)
def fourier_bit_reversed(run: Run) -> Measurement:
    """Both without a permutation: torch's transform gets its samples in the usual order."""
    import torch

    from tensormill import measure
    from tensormill.numerics import qmc

    rows: list[Row] = []
    ratios, rounds = [], 0
    with _like_with_like():
        for log_n in (12, 14, 16, 18) if run.scale == "quick" else (12, 14, 16, 18, 20, 22):
            for kind in ("real", "complex"):
                run.progress(f"2^{log_n} {kind} samples")
                x = _samples(1 << log_n, run.device, run.seed)
                x = x if kind == "real" else x.to(torch.complex128)
                calls: dict[str, list[Callable[[], object]]] = {
                    "tensormill": [lambda x=x: qmc.fftbr(x)],  # type: ignore[misc]
                    "torch.fft, usual order": [lambda x=x: torch.fft.fft(x)],  # type: ignore[misc]
                }
                if _has("qmcpy"):
                    from qmcpy import fftbr_torch

                    calls["qmcpy"] = [lambda x=x: fftbr_torch(x)]  # type: ignore[misc]
                timings = measure.time_together(calls, run.device, seconds=0.3)
                ours = timings["tensormill"]
                peers = {n: _MILLISECONDS * t.seconds for n, t in timings.items() if n != "tensormill"}
                setting = {"log_n": log_n, "samples": kind}
                rows.append(
                    Row(
                        f"2^{log_n} {kind} samples: time",
                        _MILLISECONDS * ours.seconds,
                        "ms",
                        (_MILLISECONDS * ours.low, _MILLISECONDS * ours.high),
                        peers,
                        setting=setting,
                    )
                )
                ratio = ours.seconds / timings["torch.fft, usual order"].seconds
                rows.append(Row(f"2^{log_n} {kind} samples: over torch.fft", ratio, "x", setting=setting))
                if log_n <= 18:
                    ratios.append(ratio)
                rounds = ours.rounds
    worst = max(ratios)
    return Measurement(rows, worst <= 1.1, f"at most {worst:.2f} times torch.fft", rounds)


def _structured(kind: str, d: int, seed: int, device: str):  # type: ignore[no-untyped-def]
    """A sequence and the kernel that is fast on it."""
    from tensormill.numerics import qmc

    if kind == "lattice":
        return qmc.Lattice(d, seed=seed, device=device), qmc.ShiftInvariantKernel(d, 2).to(device)
    return qmc.DigitalNet(d, seed=seed, device=device), qmc.DigitalShiftInvariantKernel(d, 2).to(device)


@PAPER.claim(
    "C3",
    figure="gram-exponent",
    criterion=(
        "Seconds of a solve grow like (n log n)^p with p at most 1.1 up to n = 2^18, the relative residual there is "
        "below 1e-8, and solve and log-determinant agree with dense Cholesky to 1e-8 at n = 2^11"
    ),
    measures=(_ROOM, "tensormill.numerics.gaussian_process"),
    peers=("qmcpy",),
)
def gram_solve(run: Run) -> Measurement:
    """Solves of one right-hand side, lattice and net, d = 4, order 2, noise 1e-4; and a step of learning."""
    import torch

    from tensormill import measure
    from tensormill.numerics import qmc
    from tensormill.numerics.gaussian_process import DenseGram, log_marginal_likelihood

    quick = run.scale == "quick"
    sizes = [1 << m for m in range(13, 19 if quick else 21)]
    dense_sizes = [1 << m for m in range(8, 12 if quick else 14)]
    rows: list[Row] = []
    curves: list[Curve] = []
    holds = True
    worst = 0.0
    with _like_with_like():
        for kind in ("lattice", "net"):
            sequence, kernel = _structured(kind, 4, run.seed, run.device)
            seconds, steps = [], []
            for n in sizes:
                run.progress(f"{kind}, {n} points")
                y = _samples(n, run.device, run.seed)
                with torch.no_grad():
                    gram = qmc.FastGram(sequence.points(n), kernel, 1e-4)
                    timing = measure.time_together({"s": [partial(gram.solve, y)]}, run.device, seconds=0.25)
                    seconds.append(timing["s"].seconds)
                    residual = float((gram.matmul(gram.solve(y)) - y).norm() / y.norm())

                def step(n: int = n, y: Tensor = y, sequence=sequence, kernel=kernel) -> None:  # type: ignore[no-untyped-def]
                    kernel.zero_grad()
                    log_marginal_likelihood(qmc.FastGram(sequence.points(n), kernel, 1e-4), y).backward()

                steps.append(measure.time_together({"s": [step]}, run.device, seconds=0.1)["s"].seconds)
            rows.append(Row(f"{kind}: relative residual at {sizes[-1]} points", residual, "relative"))
            operations = [n * math.log2(n) for n in sizes]
            exponent = fit_exponent(operations, seconds)
            worst = max(worst, exponent.value)
            holds = holds and exponent.value <= 1.1 and residual < 1e-8
            rows.append(
                Row(
                    f"{kind}: power of n log n in the seconds of a solve",
                    exponent.value,
                    "exponent",
                    (exponent.low, exponent.high),
                )
            )
            rows.append(Row(f"{kind}: solve with {sizes[-1]} points", _MILLISECONDS * seconds[-1], "ms"))
            rows.append(
                Row(
                    f"{kind}: likelihood and its gradient, {sizes[-1]} points",
                    _MILLISECONDS * steps[-1],
                    "ms",
                )
            )
            curves.append(Curve(f"{kind}, solve", operations, seconds, "n log2 n", "seconds", exponent))
            curves.append(
                Curve(
                    f"{kind}, likelihood and gradient",
                    operations,
                    steps,
                    "n log2 n",
                    "seconds",
                    fit_exponent(operations, steps),
                )
            )
        dense_seconds = []
        for n in dense_sizes:
            run.progress(f"dense, {n} points")
            y = _samples(n, run.device, run.seed)
            with torch.no_grad():
                gram = qmc.FastGram(sequence.points(n), kernel, 1e-4)
                matrix = gram.to_dense()
                call = lambda m=matrix, y=y: DenseGram(m).solve(y)  # type: ignore[misc]  # noqa: E731
                dense_seconds.append(
                    measure.time_together({"s": [call]}, run.device, seconds=0.1)["s"].seconds
                )
        expected = DenseGram(matrix)
        difference = float((gram.solve(y) - expected.solve(y)).norm() / expected.solve(y).norm())
        determinant = float((gram.logdet() / expected.logdet() - 1).abs())
    holds = holds and difference < 1e-8 and determinant < 1e-8
    exponent = fit_exponent(dense_sizes, dense_seconds)
    rows += [
        Row(f"net against dense Cholesky, {n} points: relative difference of solves", difference, "relative"),
        Row(f"net against dense Cholesky, {n} points: of log-determinants", determinant, "relative"),
        Row(
            "dense Cholesky: power of n in the seconds",
            exponent.value,
            "exponent",
            (exponent.low, exponent.high),
        ),
        Row(f"dense Cholesky and solve, {n} points", _MILLISECONDS * dense_seconds[-1], "ms"),
    ]
    operations = [n * math.log2(n) for n in dense_sizes]
    curves.append(Curve("dense Cholesky", operations, dense_seconds, "n log2 n", "seconds"))
    return Measurement(rows, holds, f"powers of n log n up to {worst:.2f}", curves=curves)


@PAPER.claim(
    "C4",
    statement="Points are made faster than qmcpy's compiled code makes them",
    unit="x",
    criterion=(
        "At least 3 times qmcpy's points per second for each of: scrambled Sobol', shifted lattice (2^16 points, 32 "
        "dimensions), permuted Halton (2^14, 8), nested uniform scrambling (2^12, 4); one thread, doubles"
    ),
    needs=("cpu", "python:qmcpy"),
    measures=(_ROOM,),
    peers=("qmcpy", "torch", "scipy"),
)
def generation(run: Run) -> Measurement:
    """Everybody's generator is set up outside the timing; the limit is the bandwidth of writing the doubles."""
    import qmcpy
    import torch
    from scipy.stats import qmc as scipy_qmc

    from tensormill import measure
    from tensormill.numerics import qmc
    from tensormill.roofline import Cost, ceilings

    machine = ceilings(run.device)
    n, d = 1 << 16, 32
    sobol = torch.quasirandom.SobolEngine(d, scramble=True, seed=1)
    scipy_sobol = scipy_qmc.Sobol(d, scramble=True)
    scipy_halton = scipy_qmc.Halton(8, scramble=True)
    cases: list[tuple[str, int, int, qmc.Sequence, object, dict[str, Callable[[], object]]]] = [
        ("scrambled Sobol' (LMS and shift)", n, d, qmc.DigitalNet(d, seed=1),
         qmcpy.DigitalNetB2(d, randomize="LMS DS", seed=1),
         {"torch": lambda: (sobol.reset(), sobol.draw(n, dtype=torch.float64)),
          "scipy": lambda: (scipy_sobol.reset(), scipy_sobol.random(n))}),
        ("shifted lattice", n, d, qmc.Lattice(d, seed=1), qmcpy.Lattice(d, randomize="SHIFT", seed=1), {}),
        ("permuted Halton", 1 << 14, 8, qmc.Halton(8, seed=1), qmcpy.Halton(8, randomize="PERM", seed=1),
         {"scipy": lambda: (scipy_halton.reset(), scipy_halton.random(1 << 14))}),
        ("nested uniform scrambling", 1 << 12, 4, qmc.DigitalNet(4, randomize="nus", seed=1),
         qmcpy.DigitalNetB2(4, randomize="NUS", seed=1), {}),
    ]  # fmt: skip
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    share_of_limit: dict[str, float] = {}
    with _like_with_like():
        for what, count, dimensions, ours, theirs, others in cases:
            run.progress(what)
            fast: dict[str, list[Callable[[], object]]] = {
                "tensormill": [lambda s=ours, c=count: s.sample(c)],  # type: ignore[misc]
            }
            slow = {
                "qmcpy": [lambda s=theirs, c=count: s(c, warn=False)],
                **{k: [f] for k, f in others.items()},
            }  # type: ignore[misc]
            timings = measure.time_together({**fast, **slow}, run.device, seconds=0.3)  # type: ignore[dict-item]
            size = count * dimensions
            rate = {name: size / t.seconds / 1e6 for name, t in timings.items()}
            limit = machine.limit_seconds(Cost({}, bytes_read=0, bytes_written=8 * size))
            setting = {"n": count, "d": dimensions}
            rows.append(
                Row(f"{what}: coordinates per second", rate.pop("tensormill"), "million/s",
                    peers=rate, limit=size / limit / 1e6, setting=setting)
            )  # fmt: skip
            share_of_limit[what] = limit / timings["tensormill"].seconds
            ratios[what] = timings["qmcpy"].seconds / timings["tensormill"].seconds
            rows.append(Row(f"{what}: faster than qmcpy", ratios[what], "x", setting=setting))
    least = min(ratios, key=lambda name: ratios[name])
    reason = (
        f"least: {ratios[least]:.1f} times, {least}, at {share_of_limit[least]:.0%} of memory's bandwidth of writing the "
        "doubles (a result that fits the last-level cache can be faster)"
    )
    return Measurement(rows, ratios[least] >= 3, reason)


def _rmse(
    draw: Callable[[int, int], Tensor], f: Callable[[Tensor], Tensor], exact: float, n: int, repeats: int
) -> float:
    """Root mean square error over `repeats` randomisations, 16 at a time."""
    import torch

    errors = []
    for first in range(0, repeats, 16):
        points = draw(n, first)
        errors.append(f(points.flatten(0, 1)).unflatten(0, points.shape[:2]).mean(1) - exact)
    return float(torch.cat(errors).square().mean().sqrt())


@PAPER.claim(
    "C5",
    figure="rmse-scrambled",
    statement="Errors fall like n^-1/2, n^-1, n^-3/2, n^-2: Monte Carlo, lattice, scrambled net, net of order 2",
    criterion=(
        "Fitted powers of n: Monte Carlo within 0.1 of -0.5, shifted lattice at most -0.9, scrambled net at most -1.4, "
        "interlaced net of order 2 at most -1.9, for a smooth product in 2 dimensions"
    ),
    measures=(_ROOM + ".digital_net", _ROOM + ".lattice", _ROOM + ".randomization", _ROOM + ".sequence"),
)
def accuracy(run: Run) -> Measurement:
    """Root mean square error over randomisations; f = product of x e^x, whose integral is 1."""
    import torch

    from tensormill.numerics import qmc

    d, quick = 2, run.scale == "quick"
    repeats = 64 if quick else 256
    sizes = [1 << m for m in range(6, 15 if quick else 18)]

    def f(x: Tensor) -> Tensor:
        return (x * x.exp()).prod(-1)

    def monte_carlo(n: int, first: int) -> Tensor:
        generator = torch.Generator(run.device).manual_seed(run.seed + first)
        return torch.rand(16, n, d, dtype=torch.float64, generator=generator, device=run.device)

    def of(make: Callable[..., qmc.Sequence], **options: object) -> Callable[[int, int], Tensor]:
        return lambda n, first: make(
            d, replications=16, seed=run.seed + first, device=run.device, **options
        ).sample(n)

    cases = {
        "Monte Carlo": (monte_carlo, -0.6, -0.4),
        "shifted lattice": (of(qmc.Lattice), -math.inf, -0.9),
        "scrambled net (LMS and shift)": (of(qmc.DigitalNet), -math.inf, -1.4),
        "scrambled net (Owen)": (of(qmc.DigitalNet, randomize="nus"), -math.inf, -1.4),
        "net of order 2": (of(qmc.DigitalNet, alpha=2), -math.inf, -1.9),
    }
    rows: list[Row] = []
    curves: list[Curve] = []
    failed = []
    for what, (draw, low, high) in cases.items():
        run.progress(what)
        own = sizes if what != "scrambled net (Owen)" else sizes[:7]
        errors = [_rmse(draw, f, 1.0, n, repeats) for n in own]
        exponent = fit_exponent(own, errors)
        curves.append(Curve(what, own, errors, "points", "root mean square error", exponent))
        rows.append(Row(f"{what}: power of n", exponent.value, "exponent", (exponent.low, exponent.high)))
        rows.append(Row(f"{what}: error with {own[-1]} points", errors[-1], "RMS error"))
        if not low <= exponent.value <= high:
            failed.append(what)
    reason = f"outside: {', '.join(failed)}" if failed else "every power within its range"
    return Measurement(rows, not failed, reason, repeats, curves)


@PAPER.claim(
    "C6",
    figure="doubling",
    criterion="Seconds grow like n^p with p at most 1.1, and the result is the whole transform's to 1e-12",
    measures=(_ROOM + ".transforms",),
)
def doubling(run: Run) -> Measurement:
    """Merging the transforms of n old and n new samples, beside transforming all 2n again."""
    from tensormill import measure
    from tensormill.numerics import qmc

    sizes = [1 << m for m in range(12, 19 if run.scale == "quick" else 23)]
    rows: list[Row] = []
    curves: list[Curve] = []
    holds = True
    with _like_with_like():
        for kind, transform in (("fwht", qmc.fwht), ("fftbr", qmc.fftbr)):
            merged, whole, difference = [], [], 0.0
            for n in sizes:
                run.progress(f"{kind}, {n} samples")
                x = _samples(2 * n, run.device, run.seed)
                first, second = transform(x[:n]), transform(x[n:])
                calls: dict[str, list[Callable[[], object]]] = {
                    "merge": [lambda a=first, b=second, k=kind: qmc.merge_doubling(a, b, k)],  # type: ignore[misc]
                    "whole": [lambda x=x, t=transform: t(x)],  # type: ignore[misc]
                }
                timings = measure.time_together(calls, run.device, seconds=0.1)
                merged.append(timings["merge"].seconds)
                whole.append(timings["whole"].seconds)
                gap = (qmc.merge_doubling(first, second, kind) - transform(x)).abs().max()
                difference = max(difference, float(gap))
            exponent = fit_exponent(sizes, merged)
            holds = holds and exponent.value <= 1.1 and difference < 1e-12
            rows += [
                Row(f"{kind}: power of n in the seconds of merging", exponent.value, "exponent", (exponent.low, exponent.high)),
                Row(f"{kind}: merging {sizes[-1]} and {sizes[-1]}", _MILLISECONDS * merged[-1], "ms",
                    peers={"the whole transform": _MILLISECONDS * whole[-1]}),
                Row(f"{kind}: largest difference to the whole transform", difference, "difference"),
            ]  # fmt: skip
            curves.append(
                Curve(f"{kind}, merge", sizes, merged, "samples before doubling", "seconds", exponent)
            )
            curves.append(Curve(f"{kind}, whole", sizes, whole, "samples before doubling", "seconds"))
    return Measurement(rows, holds, "", curves=curves)


def _integrands() -> dict[str, tuple[Callable[[Tensor], Tensor], Measure, float, float]]:
    """Name: (integrand, measure, exact integral, absolute tolerance)."""
    import torch

    from tensormill.numerics import qmc

    def oscillating(x: Tensor) -> Tensor:  # Genz
        return torch.cos(
            2 * math.pi * 0.3 + (x * torch.tensor([1.5, 1.0, 0.5], dtype=x.dtype, device=x.device)).sum(-1)
        )

    value = complex(math.cos(0.6 * math.pi), math.sin(0.6 * math.pi))
    for a in (1.5, 1.0, 0.5):
        value *= (complex(math.cos(a), math.sin(a)) - 1) / complex(0, a)

    def corner_peak(x: Tensor) -> Tensor:  # Genz, all coefficients 1
        return (1 + x.sum(-1)).pow(-4)

    # By inclusion and exclusion: the integral of (1 + sum x)^-(d+1) is 1/d! sum_k (-1)^k C(d, k) / (1 + k)
    corner = sum((-1) ** k * math.comb(3, k) / (1 + k) for k in range(4)) / math.factorial(3)

    def continuous(x: Tensor) -> Tensor:  # Genz
        return torch.exp(-2 * (x - 0.4).abs()).prod(-1)

    side = (1 - math.exp(-0.8)) / 2 + (1 - math.exp(-1.2)) / 2

    def keister(x: Tensor) -> Tensor:
        return math.pi**1.5 * torch.cos(x.norm(dim=-1))

    radius = torch.linspace(0, 12, 200_001, dtype=torch.float64)
    radial = torch.cos(radius) * torch.exp(-(radius**2)) * radius**2
    return {
        "oscillating": (oscillating, qmc.Uniform(3), value.real, 1e-4),
        "corner peak": (corner_peak, qmc.Uniform(3), corner, 1e-4),
        "continuous": (continuous, qmc.Uniform(3), side**3, 3e-4),
        "Keister": (
            keister,
            qmc.Gaussian(3, 0.0, 0.5),
            4 * math.pi * float(torch.trapezoid(radial, radius)),
            5e-3,
        ),
    }


@PAPER.claim(
    "C7",
    statement="Stopping rules keep the tolerance that they were asked for",
    unit="%",
    criterion=(
        "The observed error is within the tolerance in at least 99 % of all runs of each rule, and in at least 95 % for "
        "every integrand; every run converges"
    ),
    measures=(_ROOM,),
    peers=("qmcpy",),
)
def guaranteed_tolerance(run: Run) -> Measurement:
    """Four integrands with known integrals; the confidence asked for is 99 %."""
    from tensormill.numerics import qmc

    repeats = 50 if run.scale == "quick" else 400
    cases = _integrands()
    rows: list[Row] = []
    holds = True
    reasons = []
    with _like_with_like():
        peer = _qmcpy_points(cases["Keister"][3]) if run.device == "cpu" and _has("qmcpy") else None
        for rule in ("rqmc", "net", "lattice", "bayes", "bayes_lattice"):
            kept_by_all: list[bool] = []
            for what, (f, measure, exact, tolerance) in cases.items():
                run.progress(f"{rule}, {what}")
                results = [
                    qmc.integrate(
                        f, measure, abs_tol=tolerance, rule=rule, seed=run.seed + i, device=run.device
                    )
                    for i in range(repeats)
                ]
                kept = [abs(float(r.value) - exact) <= tolerance for r in results]
                converged = all(r.converged for r in results)
                kept_by_all += kept
                share = 100 * sum(kept) / repeats
                points = sorted(r.points for r in results)[repeats // 2]
                rows.append(
                    Row(
                        f"{rule}, {what}, tolerance {tolerance}: kept", share, "%", setting={"points": points}
                    )
                )
                peers = {"qmcpy CubQMCNetG": peer} if peer and (rule, what) == ("net", "Keister") else {}
                rows.append(Row(f"{rule}, {what}: points, median", points, "points", peers=peers))
                holds = holds and share >= 95 and converged
            overall = 100 * sum(kept_by_all) / len(kept_by_all)
            rows.append(Row(f"{rule}: kept, all integrands", overall, "%"))
            holds = holds and overall >= 99
            reasons.append(f"{rule} {overall:.1f} %")
    return Measurement(rows, holds, ", ".join(reasons), repeats)


def _qmcpy_points(tolerance: float) -> float:
    """Points that qmcpy's rule of the same kind takes for Keister's integral in 3 dimensions."""
    import qmcpy

    problem = qmcpy.Keister(qmcpy.DigitalNetB2(3, seed=7))
    _, data = qmcpy.CubQMCNetG(problem, abs_tol=tolerance).integrate()
    return float(data.n_total)


@PAPER.claim(
    "C8",
    statement="On a GPU the Walsh-Hadamard transform runs at the memory's speed",
    unit="% of the bandwidth",
    criterion=(
        "At least 70 % of the measured bandwidth, reading and writing every value once, for 256 transforms of 2^18 "
        "values at once in float32 and 64 in float64"
    ),
    needs=("cuda",),
    measures=("tensormill.ops.hadamard_transform", "tensormill.measure"),
)
def walsh_hadamard_on_gpu(run: Run) -> Measurement:
    """Shorter and longer transforms, and a single one, are shown beside the two that decide."""
    import torch

    from tensormill import measure
    from tensormill.ops import OPERATORS
    from tensormill.ops.hadamard_transform import hadamard_transform
    from tensormill.roofline import ceilings

    machine = ceilings(run.device)
    operator = OPERATORS["hadamard_transform"]
    generator = torch.Generator(run.device).manual_seed(run.seed)
    cases = [(256, 18, "float32"), (64, 18, "float64"), (16384, 12, "float32"), (16384, 12, "bfloat16")]
    if run.scale == "full":
        cases += [(256, 18, "float16"), (1, 18, "float64"), (1, 24, "float32"), (4096, 7, "bfloat16")]
    rows: list[Row] = []
    shares: list[float] = []
    for i, (batch, log_n, dtype) in enumerate(cases):
        what = f"{batch} x 2^{log_n} {dtype}"
        run.progress(what, i / len(cases))
        n = 1 << log_n
        x = torch.randn(batch, n, generator=generator, device=run.device, dtype=torch.float32).to(
            getattr(torch, dtype)
        )
        scale = 1 / math.sqrt(n)
        # a few rows are enough to see whether it is right, and the reference takes log2(n) copies
        expected = operator.reference(x[:4].double(), scale)
        deviation = (hadamard_transform(x, scale)[:4].double() - expected).norm() / expected.norm()
        if not deviation <= operator.tolerance(x.dtype, {}):
            raise AssertionError(f"{what}: relative error {float(deviation):.1e}")
        copies = [x, *(x.clone() for _ in range(measure.copies_past_cache([x], run.device) - 1))]
        timing = measure.time_together(
            {"tensormill": [lambda x=x, s=scale: hadamard_transform(x, s) for x in copies]},  # type: ignore[misc]
            run.device,
            seconds=0.3,
        )["tensormill"]
        cost = operator.cost({**operator.shape_defaults, "rows": batch, "n": n, "dtype": dtype})
        limit = cost.bytes_moved / machine.bandwidth
        share = 100 * limit / timing.seconds
        rows.append(Row(what, share, "%", setting={"bytes": cost.bytes_moved}))
        rows.append(
            Row(
                f"{what}: time",
                1e6 * timing.seconds,
                "us",
                (1e6 * timing.low, 1e6 * timing.high),
                limit=1e6 * limit,
            )
        )
        shares.append(share)
    least = min(shares[:2])
    return Measurement(rows, least >= 70, f"{least:.0f} % of {machine.bandwidth / 1e12:.2f} TB/s")

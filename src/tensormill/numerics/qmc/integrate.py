"""Integrals to a tolerance: sampling goes on, doubling the points, until an error bound is met.

Rules, and what their bound rests on:

- "rqmc": independent randomisations and Student's t interval; holds with the confidence asked for as far as the means
  of randomised points are normal. The confidence is shared out over all looks, so that stopping at the first success
  doesn't spoil it. (Owen and L'Ecuyer's practice; Sorokin, arXiv 2502.14256.)
- "net", "lattice": one randomised sequence; the bound comes from the decay of the integrand's Walsh or Fourier
  coefficients, seen in the fast transform of the samples. Certain for integrands in a cone (whose coefficients don't
  hide at high frequencies); a look at the cone's necessary conditions is made, and a violation reported.
  (Hickernell and Jimenez Rugama 2016; Jimenez Rugama and Hickernell 2016.)
- "bayes", "bayes_lattice": the integrand as a Gaussian process with a kernel that nets or lattices make fast, its
  hyperparameter by maximum likelihood; a credible interval. (Jagadeeswaran and Hickernell 2019, 2022.)
- "mc": independent samples: a pilot, an inflated standard deviation, and one run of the size that it asks for.
  (Hickernell, Jiang, Liu and Owen 2013.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.numerics.qmc.digital_net import DigitalNet
from tensormill.numerics.qmc.kernels import DigitalShiftInvariantKernel, ProductKernel, ShiftInvariantKernel
from tensormill.numerics.qmc.lattice import Lattice
from tensormill.numerics.qmc.measures import PERIODIZATIONS, Measure, Uniform, periodize
from tensormill.numerics.qmc.randomization import draw_seed
from tensormill.numerics.qmc.sequence import Sequence
from tensormill.numerics.qmc.transforms import fftbr, fwht, merge_doubling

RULES = ("rqmc", "net", "lattice", "bayes", "bayes_lattice", "mc")
_LAG = 4  # the bound looks at coefficients 2^(m-5) to 2^(m-4), as the sources do
_INFLATION = 1.2  # of the pilot's standard deviation

Integrand = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class IntegrationSettings:
    """How `integrate` samples.

    Args:
        confidence: of the bounds of "rqmc", "bayes" and "mc"; above 0.5, below 1.
        replications: independent randomisations of "rqmc", 2 or more.
        initial: points of the first look (per replication), a power of two, 2^5 or more.
        maximum: points at most (per replication), a power of two.
        periodization: of the lattice rules, see `periodize`; ignored by the others.
        alpha: order of the net of "rqmc" (above 1: higher order), and of the kernel of the Bayesian rules.
        chunk: points evaluated at a time.
    """

    confidence: float = 0.99
    replications: int = 16
    initial: int = 1 << 8
    maximum: int = 1 << 22
    periodization: str = "sidi2"
    alpha: int | None = None
    chunk: int = 1 << 18

    def __post_init__(self) -> None:
        if not 0.5 < self.confidence < 1:
            raise InvalidArgument(
                f"given confidence {self.confidence}, expected more than 0.5 and less than 1"
            )
        if self.replications < 2:
            raise InvalidArgument(f"given {self.replications} replications, expected 2 or more")
        for name in ("initial", "maximum"):
            value = getattr(self, name)
            if value < 32 or value & (value - 1):
                raise InvalidArgument(f"given {name}={value}, expected a power of two of 32 or more")
        if self.maximum < self.initial:
            raise InvalidArgument(f"given maximum={self.maximum} below initial={self.initial}, expected more")
        if self.periodization not in PERIODIZATIONS:
            raise InvalidArgument(
                f"given periodization {self.periodization!r}, expected one of {', '.join(PERIODIZATIONS)}"
            )
        if self.chunk < 1:
            raise InvalidArgument(f"given chunk={self.chunk}, expected 1 or more")


@dataclass(frozen=True)
class IntegrationResult:
    """An integral and how well it is known.

    Args:
        value: the estimate, a scalar or (k,) for k integrands; differentiable if the integrand's values were.
        error_bound: of the value, same shape.
        points: evaluations of the integrand.
        converged: whether every bound is within its tolerance.
        rule: that was used.
        warnings: what speaks against the bound, if anything does.
    """

    value: Tensor
    error_bound: Tensor
    points: int
    converged: bool
    rule: str
    warnings: tuple[str, ...] = field(default=())


def integrate(
    f: Integrand,
    measure: Measure | int,
    *,
    abs_tol: float = 1e-3,
    rel_tol: float = 0.0,
    rule: str = "net",
    settings: IntegrationSettings | None = None,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, float], None] | None = None,
) -> IntegrationResult:
    """Integral of f against a measure, to within max(abs_tol, rel_tol * |integral|).

    Args:
        f: maps points (n, d), float64, to values (n,), or (n, k) for k integrands at once.
        measure: see `tensormill.numerics.qmc.measures`; a number d stands for the unit cube.
        abs_tol: absolute tolerance, 0 or more.
        rel_tol: relative tolerance, 0 or more and below 1.
        rule: "net", "lattice", "rqmc", "bayes", "bayes_lattice" or "mc".
        settings: sample sizes, confidence, replications and so on.
        seed: of the randomisation; None draws one from torch's generator.
        device: where points are made and f is called.
        progress: called with the number of evaluations and the largest ratio of a bound to its tolerance.

    Returns:
        The estimate with its bound; `converged` is False where the maximum of points came first.

    Raises:
        InvalidArgument: tolerances that can't be met, an unknown rule, or values of f of a wrong shape or not finite.

    Example:
        >>> from tensormill.numerics import qmc
        >>> result = qmc.integrate(lambda x: x.prod(-1), 3, abs_tol=1e-5, seed=1)
        >>> abs(float(result.value) - 0.125) < 1e-5
        True
    """
    settings = settings or IntegrationSettings()
    measure = Uniform(measure) if isinstance(measure, int) else measure
    if not (abs_tol >= 0 and 0 <= rel_tol < 1 and abs_tol + rel_tol > 0):
        raise InvalidArgument(
            f"given abs_tol={abs_tol}, rel_tol={rel_tol}, expected 0 or more (relative below 1), not both 0"
        )
    if rule not in RULES:
        raise InvalidArgument(f"given rule={rule!r}, expected one of {', '.join(RULES)}")
    target = _Target(f, measure, abs_tol, rel_tol, settings, rule, progress)
    seed = draw_seed(seed)
    if rule == "rqmc":
        return _replicated(target, seed, device)
    if rule == "mc":
        return _independent(target, seed, device)
    return _single_sequence(target, seed, device)


@dataclass
class _Target:
    f: Integrand
    measure: Measure
    abs_tol: float
    rel_tol: float
    settings: IntegrationSettings
    rule: str
    progress: Callable[[int, float], None] | None

    def evaluate(self, u: Tensor) -> Tensor:
        """Values (n, k) at points (n, d) of the unit cube."""
        parts = []
        for chunk in u.split(self.settings.chunk):
            weight = None
            if self.rule in ("lattice", "bayes_lattice"):
                chunk, weight = periodize(chunk, self.settings.periodization)
            values = self.f(self.measure.transform(chunk))
            if not isinstance(values, Tensor) or values.dim() not in (1, 2) or values.shape[0] != len(chunk):
                given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise InvalidArgument(
                    f"given an integrand that maps points {tuple(chunk.shape)} to {given}, expected ({len(chunk)},) or "
                    f"({len(chunk)}, k)"
                )
            self.vector = values.dim() == 2
            values = values.double().reshape(len(chunk), -1)
            if weight is not None:  # at the edges the weight is 0 and the integrand may be infinite
                values = torch.where(weight[:, None] > 0, values * weight[:, None], 0.0)
            parts.append(values)
        result = torch.cat(parts)
        if not bool(torch.isfinite(result).all()):
            raise InvalidArgument(
                "given an integrand with values that are not finite, expected numbers; a transform that moves its "
                "singularity to the edge, or a truncation, may help"
            )
        return result

    def within(self, value: Tensor, bound: Tensor, evaluations: int) -> bool:
        """Whether every bound is within its tolerance, judged by the smallest integral that the bound allows."""
        value, bound = value.detach(), bound.detach()
        tolerance = (self.rel_tol * (value.abs() - bound).clamp_min(0)).clamp_min(self.abs_tol)
        ratio = float((bound / tolerance.clamp_min(1e-300)).max())
        if self.progress is not None:
            self.progress(evaluations, ratio)
        return ratio <= 1

    def result(
        self, value: Tensor, bound: Tensor, points: int, converged: bool, warnings: tuple[str, ...] = ()
    ) -> IntegrationResult:
        if not self.vector:
            value, bound = value[0], bound[0]
        return IntegrationResult(value, bound.detach(), points, converged, self.rule, warnings)


def _normal_quantile(confidence: float) -> float:
    return float(torch.special.ndtri(torch.tensor(0.5 + confidence / 2, dtype=torch.float64)))


def _student_quantile(confidence: float, freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + confidence / 2))


def _replicated(target: _Target, seed: int, device: torch.device | str) -> IntegrationResult:
    settings = target.settings
    count = settings.replications
    net = DigitalNet(
        target.measure.d, alpha=settings.alpha or 1, replications=count, seed=seed, device=device
    )
    looks = (settings.maximum // settings.initial).bit_length()
    quantile = _student_quantile(1 - (1 - settings.confidence) / looks, count - 1)
    n, sums = 0, None
    while True:
        new = settings.initial if n == 0 else n
        points = net.sample(new, n)
        values = target.evaluate(points.flatten(0, 1)).unflatten(0, (count, new)).sum(1)
        sums = values if sums is None else sums + values
        n += new
        means = sums / n
        bound = quantile * means.std(0) / math.sqrt(count)
        converged = target.within(means.mean(0), bound, n * count)
        if converged or 2 * n > settings.maximum:
            return target.result(means.mean(0), bound, n * count, converged)


def _independent(target: _Target, seed: int, device: torch.device | str) -> IntegrationResult:
    settings, d = target.settings, target.measure.d
    generator = torch.Generator(device).manual_seed(seed)
    quantile = _normal_quantile(settings.confidence)

    def draw(n: int) -> Tensor:
        return target.evaluate(torch.rand(n, d, dtype=torch.float64, generator=generator, device=device))

    pilot = draw(max(1024, settings.initial))
    mean, deviation = pilot.detach().mean(0), _INFLATION * pilot.detach().std(0)
    tolerance = (target.rel_tol * mean.abs()).clamp_min(target.abs_tol)
    wanted = float((quantile * deviation / tolerance.clamp_min(1e-300)).square().max())
    n = int(min(max(wanted, 1024), settings.maximum)) + 1
    total: Tensor | None = None
    done = 0
    while done < n:  # the pilot is not used again: it chose the size
        part = min(settings.chunk, n - done)
        values = draw(part).sum(0)
        total, done = values if total is None else total + values, done + part
        if target.progress is not None:
            target.progress(len(pilot) + done, n / done)
    assert total is not None
    value, bound = total / n, quantile * deviation / math.sqrt(n)
    return target.result(value, bound, n + len(pilot), target.within(value, bound, n + len(pilot)))


def _single_sequence(target: _Target, seed: int, device: torch.device | str) -> IntegrationResult:
    settings, d = target.settings, target.measure.d
    lattice = target.rule in ("lattice", "bayes_lattice")
    bayes = target.rule in ("bayes", "bayes_lattice")
    sequence: Sequence = (
        Lattice(d, seed=seed, device=device) if lattice else DigitalNet(d, seed=seed, device=device)
    )
    maximum = min(settings.maximum, sequence.max_points)
    kernel = _kernel(target, d).to(sequence.device) if bayes else None
    n, total, transformed = 0, None, None
    cones: list[_Cone] = []
    while True:
        new = settings.initial if n == 0 else n
        values = target.evaluate(sequence.sample(new, n))
        total = values.sum(0) if total is None else total + values.sum(0)
        transform, kind = (fftbr, "fftbr") if lattice else (fwht, "fwht")
        part = transform(values.detach().mT.contiguous())  # (k, new)
        transformed = part if transformed is None else merge_doubling(transformed, part, kind)
        n += new
        value = total / n
        if kernel is not None:
            bound = torch.stack([_credible(target, sequence, kernel, row, n) for row in transformed])
        else:
            cones = cones or [_Cone() for _ in transformed]
            bound = torch.stack([c.bound(row, n) for c, row in zip(cones, transformed, strict=True)])
        converged = target.within(value, bound, n)
        if converged or 2 * n > maximum:
            outside = any(c.violated for c in cones)
            warnings = (
                ("the coefficients decay in a way that the bound's assumptions exclude: it may be too small",)
                if outside
                else ()
            )
            return target.result(value, bound, n, converged, warnings)


class _Cone:
    """Bound from sums of coefficients, and the necessary conditions on them, over the looks at one integrand."""

    def __init__(self) -> None:
        self.low: dict[int, float] = {}
        self.high: dict[int, float] = {}
        self.violated = False

    def bound(self, transformed: Tensor, n: int) -> Tensor:
        """The bound after n samples, from their orthonormal transform (n,)."""
        m = n.bit_length() - 1
        coefficients = transformed.abs() / math.sqrt(n)
        ordered = coefficients[_decay_order(coefficients, m)]
        for level in range(max(1, m - _LAG), m + 1):
            total = float(ordered[1 << (level - 1) : 1 << level].sum())
            ratio = _fudge(m - level) / (1 + _fudge(m - level))
            self.low[level] = max(self.low.get(level, 0.0), total / (1 + ratio))
            self.high[level] = min(self.high.get(level, math.inf), total / (1 - ratio))
            rounding = 1e-12 * float(coefficients[0])
            if self.low[level] > self.high[level] + rounding:
                self.violated = True
        level = max(0, m - _LAG - 1)
        bound: Tensor = _fudge(m) * ordered[1 << level : 2 << level].sum()
        return bound


def _fudge(m: int) -> float:
    return 5 * 2.0**-m


def _decay_order(magnitudes: Tensor, m: int) -> Tensor:
    """An order of the coefficients in which they fall off, that respects aliasing.

    Coefficients k and k + 2^l are seen as one by 2^l samples; of each pair the larger comes first, from the top level
    down, with all that alias with them.
    """
    order = torch.arange(1 << m, device=magnitudes.device)
    for level in range(m - 1, 0, -1):
        pairs = order.view(-1, 2, 1 << level)
        first, second = pairs[0]
        flip = magnitudes[second] > magnitudes[first]
        flip[0] = False
        order = torch.where(flip, pairs.flip(1), pairs).flatten()
    return order


def _kernel(target: _Target, d: int) -> ProductKernel:
    alpha = target.settings.alpha
    kernel: ProductKernel
    if target.rule == "bayes_lattice":
        kernel = ShiftInvariantKernel(d, 2 if alpha is None else alpha)
    else:
        kernel = DigitalShiftInvariantKernel(d, 1 if alpha is None else alpha)
    return kernel.requires_grad_(False)


@torch.no_grad()
def _credible(
    target: _Target, sequence: Sequence, kernel: ProductKernel, transformed: Tensor, n: int
) -> Tensor:
    """Half-width of the credible interval after n samples, the common weight of the kernel fitted to them."""
    power = transformed.abs().square()[1:]
    points = sequence.sample(n)

    def eigenvalues(log_weight: float) -> tuple[Tensor, Tensor]:
        kernel.log_weights.fill_(log_weight)
        column = kernel.excess(points, points[:1])
        spectrum = fwht(column) if kernel.structure == "net" else fftbr(column).real
        spectrum = spectrum * math.sqrt(n)
        return spectrum[1:].clamp_min(torch.finfo(column.dtype).tiny), column.sum().clamp_min(0)

    def loss(log_weight: float) -> float:
        rest, excess = eigenvalues(log_weight)
        quadratic = float((power / rest).mean())
        return math.log(max(quadratic, 1e-300)) + float((rest.log().sum() + torch.log(n + excess)) / n)

    best = _golden_section(loss, math.log(1e-3), math.log(1e2))
    rest, excess = eigenvalues(best)
    # Variance of the integral: s^2 (1 - n / lambda_1), lambda_1 = n + excess; s^2 the likelihood's.
    scale = (power / rest).sum() / n
    quantile = _normal_quantile(target.settings.confidence)
    return quantile * torch.sqrt(scale * excess / (n + excess))


def _golden_section(function: Callable[[float], float], low: float, high: float, steps: int = 16) -> float:
    """A minimum of a function of one variable, to 1/2000 of the interval."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = function(a), function(b)
    for _ in range(steps):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = function(b)
    return a if at_a < at_b else b

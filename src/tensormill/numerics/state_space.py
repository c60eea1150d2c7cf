"""Gaussian processes on a line as Markov chains: Matern kernels of order 1/2, 3/2 and 5/2.

A Matern process solves a linear stochastic differential equation, so its value and first derivatives at sorted points
are a Gaussian Markov chain, and inference costs O(T) with `tensormill.ops.kalman_smoother` where a kernel matrix costs
O(T^3) (Hartikainen and Sarkka, Kalman filtering and smoothing solutions to temporal Gaussian process regression models,
2010).

With lam = sqrt(2 nu) / lengthscale the state is (u, u'/lam, u''/lam^2): derivatives in units of the lengthscale, so that
transitions depend on lam dt alone and no entry is large. The noise of a step is a combination of incomplete gamma
functions without cancellation; `P_inf - A P_inf A'`, the textbook's form, has no correct digit at small steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.ops.kalman_smoother import Smoothed, kalman_smoother
from tensormill.ops.kalman_smoother.gaussians import predicted, through, updated

__all__ = [
    "KERNELS",
    "BundlePosterior",
    "MaternBundle",
    "StateSpace",
    "matern_ssm",
    "matern_stationary",
    "stack_functions",
]

KERNELS = {"matern12": 0.5, "matern32": 1.5, "matern52": 2.5}
"""Names of the kernels and their smoothness nu; the state has nu + 1/2 entries."""


class StateSpace(NamedTuple):
    """A chain's steps.

    Attributes:
        transition: (..., S, S).
        process_noise: (..., S, S), symmetric.
        stationary: (S, S), covariance of the state at any one point.
    """

    transition: Tensor
    process_noise: Tensor
    stationary: Tensor


def _order(kernel: str) -> float:
    if kernel not in KERNELS:
        raise InvalidArgument(f"given kernel {kernel!r}, expected one of {', '.join(KERNELS)}")
    return KERNELS[kernel]


def _positive(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    number = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if number.dim() != 0:
        raise InvalidArgument(f"given {name} of shape {tuple(number.shape)}, expected a single number")
    if not isinstance(value, Tensor) and not (math.isfinite(value) and value > 0):
        raise InvalidArgument(f"given {name}={value}, expected a finite number above zero")
    return number


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def matern_stationary(kernel: str, outputscale: Tensor | float, like: Tensor) -> Tensor:
    """Covariance of the state at one point, (S, S): it does not depend on the lengthscale.

    Args:
        kernel: "matern12", "matern32" or "matern52".
        outputscale: variance of the process.
        like: a tensor whose dtype and device the result has.
    """
    nu = _order(kernel)
    scale = _positive("outputscale", outputscale, like)
    if nu < 2:
        return scale * torch.eye(round(nu + 0.5), dtype=like.dtype, device=like.device)
    entries = [[1.0, 0.0, -1 / 3], [0.0, 1 / 3, 0.0], [-1 / 3, 0.0, 1.0]]
    return scale * torch.tensor(entries, dtype=like.dtype, device=like.device)


def matern_ssm(
    kernel: str, lengthscale: Tensor | float, outputscale: Tensor | float, gaps: Tensor
) -> StateSpace:
    """Transitions and noise of a Matern process over gaps between neighbouring points.

    Differentiable in lengthscale, outputscale and gaps. The noise has full relative accuracy for gaps however small;
    a gap of zero gives the identity and no noise.

    Args:
        kernel: "matern12", "matern32" or "matern52".
        lengthscale: as in `k(d) = outputscale * exp(-d / lengthscale)` for matern12; in the unit of gaps.
        outputscale: variance of the process.
        gaps: (...), float32 or float64, not negative.

    Returns:
        `StateSpace` with S = 1, 2 or 3.

    Raises:
        InvalidArgument: an unknown kernel, a scale that is not positive, or gaps that are no floating-point tensor or
            are negative (checked for tensors on the CPU).

    Example:
        >>> import torch
        >>> from tensormill.numerics.state_space import matern_ssm
        >>> step = matern_ssm("matern32", 1.0, 2.0, torch.tensor(1e-6, dtype=torch.float64))
        >>> f"{step.process_noise[0, 0]:.6e}"  # 2 (4/3) (sqrt(3) 1e-6)^3
        '1.385640e-17'
    """
    nu = _order(kernel)
    if not isinstance(gaps, Tensor) or gaps.dtype not in (torch.float32, torch.float64):
        raise InvalidArgument("given gaps that are no float32 or float64 tensor, expected one; convert them")
    if gaps.device.type == "cpu" and bool((gaps < 0).any()):
        raise InvalidArgument("given a negative gap, expected points in ascending order; sort them")
    scale = _positive("outputscale", outputscale, gaps)
    x = gaps * (math.sqrt(2 * nu) / _positive("lengthscale", lengthscale, gaps))
    y = 2 * x
    decay = torch.exp(-x)
    stationary = matern_stationary(kernel, outputscale, gaps)
    if nu == 0.5:
        return StateSpace(decay[..., None, None], (-scale * torch.expm1(-y))[..., None, None], stationary)
    g = [
        torch.exp(-y) * y**n / math.factorial(n) for n in range(5)
    ]  # P(n, y) - P(n + 1, y) of the gamma function
    if nu == 1.5:
        transition = decay[..., None, None] * _matrix([[1 + x, x], [-x, 1 - x]])
        p3 = torch.special.gammainc(torch.full_like(y, 3), y)
        noise = _matrix([[p3, g[2]], [g[2], p3 + 2 * g[1]]])
        return StateSpace(transition, scale * noise, stationary)
    half = x * x / 2
    transition = decay[..., None, None] * _matrix(
        [
            [1 + x + half, x + 2 * half, half],
            [-half, 1 + x - 2 * half, x - half],
            [half - x, 2 * half - 3 * x, 1 - 2 * x + half],
        ]
    )
    p5 = torch.special.gammainc(torch.full_like(y, 5), y)
    q02 = (2 * g[3] - 4 * g[4] - p5) / 3
    q11 = (4 * g[3] - 2 * g[4] + p5) / 3
    q12 = 4 / 3 * g[2] - 2 * g[3] + g[4]
    q22 = 8 / 3 * g[1] - 8 / 3 * g[2] + 4 * g[3] + p5
    noise = _matrix([[p5, g[4], q02], [g[4], q11, q12], [q02, q12, q22]])
    return StateSpace(transition, scale * noise, stationary)


def stack_functions(chain: StateSpace, count: int) -> tuple[StateSpace, Tensor]:
    """`count` independent functions as one chain, and the emission that reads their values.

    Args:
        chain: of one function, S states.
        count: number of functions r.

    Returns:
        The chain of r S states (all values first, then all first derivatives, ...) and H, (r, r S).
    """
    size = chain.stationary.shape[-1]
    identity = torch.eye(count, dtype=chain.stationary.dtype, device=chain.stationary.device)

    def widened(matrix: Tensor) -> Tensor:
        wide = torch.einsum("...ij,ab->...iajb", matrix, identity)
        return wide.reshape(*matrix.shape[:-2], size * count, size * count)

    emission = torch.eye(count, size * count, dtype=identity.dtype, device=identity.device)
    return StateSpace(*(widened(m) for m in chain)), emission


class MaternBundle:
    """Independent Matern functions on a line, all with one kernel, at sorted points.

    Args:
        points: (D,), float64 or float32, strictly ascending.
        kernel: "matern12", "matern32" or "matern52".
        lengthscale: in the unit of points.
        outputscale: variance of each function.
        count: number of functions r.

    Raises:
        InvalidArgument: the points are not strictly ascending, or see `matern_ssm`.
    """

    def __init__(
        self,
        points: Tensor,
        kernel: str,
        lengthscale: Tensor | float,
        outputscale: Tensor | float,
        count: int = 1,
    ) -> None:
        if points.dim() != 1 or points.shape[0] < 1:
            raise InvalidArgument(f"given points of shape {tuple(points.shape)}, expected (D,) with D >= 1")
        gaps = torch.diff(points, prepend=points[:1])
        if points.device.type == "cpu" and bool((gaps[1:] <= 0).any()):
            raise InvalidArgument(
                "given points that do not ascend, expected each once in ascending order; use unique"
            )
        self.points = points
        self.kernel, self.lengthscale, self.outputscale, self.count = kernel, lengthscale, outputscale, count
        self.chain, self.emission = self._steps(gaps)

    def _steps(self, gaps: Tensor) -> tuple[StateSpace, Tensor]:
        return stack_functions(matern_ssm(self.kernel, self.lengthscale, self.outputscale, gaps), self.count)

    def smooth(self, precision: Tensor, information: Tensor) -> BundlePosterior:
        """Posterior under Gaussian potentials `exp(-u'Lu/2 + h'u)` on the r values at every point.

        Args:
            precision: (D, r, r), L; zero where nothing is known.
            information: (D, r), h; for observations y of noise variance v, L = 1/v and h = y/v.
        """
        start = self.chain.stationary.new_zeros(self.chain.stationary.shape[0])
        found = kalman_smoother(
            self.chain.transition,
            self.chain.process_noise,
            self.emission,
            precision,
            information,
            start,
            self.chain.stationary,
        )
        return BundlePosterior(self, found)


class BundlePosterior:
    """What is known about a bundle of functions, at its points and between and beyond them.

    Attributes:
        mean: (D, r) at the bundle's points.
        covariance: (D, r, r) likewise.
        log_evidence: () of the potentials.
    """

    def __init__(self, bundle: MaternBundle, found: Smoothed) -> None:
        self.bundle, self.found = bundle, found
        r = bundle.count
        self.mean, self.covariance = found.mean[:, :r], found.covariance[:, :r, :r]
        self.log_evidence = found.log_evidence

    def at(self, points: Tensor, chunk: int = 1 << 16) -> tuple[Tensor, Tensor]:
        """Mean (Q, r) and covariance (Q, r, r) of the values at any points, exactly.

        The state at a point is what the filter says from the left, carried over the gap, times what the future filter
        says from the right: no potential counts twice. Before the first point the left is the prior, behind the last one
        the right is silent.

        Args:
            points: (Q,), any order, inside the data's range or outside.
            chunk: points at once, which bounds the memory.
        """
        parts = [self._at(part) for part in points.split(max(1, chunk))]
        return torch.cat([m for m, _ in parts]), torch.cat([c for _, c in parts])

    def _at(self, points: Tensor) -> tuple[Tensor, Tensor]:
        bundle, found, r = self.bundle, self.found, self.bundle.count
        count = bundle.points.shape[0]
        right = torch.searchsorted(bundle.points, points.contiguous(), right=True)
        left = right - 1
        first, last = left < 0, right >= count
        left, right = left.clamp_min(0), right.clamp_max(count - 1)
        stationary = bundle.chain.stationary
        mean = torch.where(first[:, None], 0, found.filtered_mean[left])
        covariance = torch.where(first[:, None, None], stationary, found.filtered_covariance[left])
        chain, _ = bundle._steps((points - bundle.points[left]).clamp_min(0))
        mean, covariance = predicted(mean, covariance, chain.transition, chain.process_noise)
        information = torch.where(last[:, None], 0, found.future_information[right])
        precision = torch.where(last[:, None, None], 0, found.future_precision[right])
        chain, _ = bundle._steps((bundle.points[right] - points).clamp_min(0))
        mean, covariance = updated(
            mean,
            covariance,
            *reversed(through(information, precision, chain.transition, chain.process_noise)),
        )
        return mean[:, :r], covariance[:, :r, :r]

"""Variable transforms: from points of the unit cube to the measure that an integrand is integrated against.

A measure maps u in [0, 1)^d to x; the integral of f against it is the mean of f(x(u)). Periodising transforms make
an integrand periodic, which lattices need for their fast convergence.

Sources: Sorokin, QMCPy, arXiv 2502.14256 (true measures); Caflisch, Monte Carlo and quasi-Monte Carlo methods, 1998
(Brownian motion); Hickernell, Obtaining O(N^(-2+eps)) convergence for lattice quadrature rules, 2002 (baker's
transform); Sidi, A new variable transformation for numerical integration, 1993.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Numbers
from typing import Protocol

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument

_SMALLEST = 2.0**-54  # half of the smallest step of a point: where 0 itself would map to minus infinity


class Measure(Protocol):
    """What `integrate` needs of a measure."""

    d: int

    def transform(self, u: Tensor) -> Tensor:
        """Points (..., d) of the unit cube to points (..., d) of the measure."""
        ...


def _vector(values: float | Numbers[float] | Tensor, d: int, name: str) -> Tensor:
    result = torch.as_tensor(values, dtype=torch.float64)
    if result.dim() > 1 or result.numel() not in (1, d):
        raise InvalidArgument(f"given {name} of shape {tuple(result.shape)}, expected a number or ({d},)")
    return result.expand(d)


class Uniform:
    """Uniform distribution over a box: the mean of f, which times the volume is its integral.

    Args:
        d: dimensions.
        lower: lower bounds, a number or (d,).
        upper: upper bounds.

    Raises:
        InvalidArgument: upper is not above lower.
    """

    def __init__(
        self,
        d: int,
        lower: float | Numbers[float] | Tensor = 0.0,
        upper: float | Numbers[float] | Tensor = 1.0,
    ):
        self.d = d
        self.lower, self.upper = _vector(lower, d, "lower"), _vector(upper, d, "upper")
        if not bool((self.upper > self.lower).all()):
            raise InvalidArgument("given bounds where upper is not above lower, expected lower < upper")

    @property
    def volume(self) -> float:
        """Volume of the box."""
        return float((self.upper - self.lower).prod())

    def transform(self, u: Tensor) -> Tensor:
        """Points (..., d) of the unit cube to the box."""
        lower, upper = self.lower.to(u), self.upper.to(u)
        return lower + (upper - lower) * u


class Gaussian:
    """Normal distribution, by the inverse distribution function and a root of the covariance.

    Args:
        d: dimensions.
        mean: a number or (d,).
        covariance: a variance, (d,) variances, or a (d, d) matrix.
        decomposition: "pca" (principal axes, the largest first: low-discrepancy points are best in their first
            dimensions) or "cholesky".

    Raises:
        InvalidArgument: the covariance is not positive (semi)definite or has a wrong shape.

    Example:
        >>> import torch
        >>> from tensormill.numerics import qmc
        >>> qmc.Gaussian(1, mean=3.0, covariance=4.0).transform(torch.tensor([[0.5]]))
        tensor([[3.]])
    """

    def __init__(
        self,
        d: int,
        mean: float | Numbers[float] | Tensor = 0.0,
        covariance: float | Numbers[float] | Tensor = 1.0,
        decomposition: str = "pca",
    ):
        if decomposition not in ("pca", "cholesky"):
            raise InvalidArgument(f'given decomposition={decomposition!r}, expected "pca" or "cholesky"')
        self.d = d
        self.mean = _vector(mean, d, "mean")
        given = torch.as_tensor(covariance, dtype=torch.float64)
        if given.dim() < 2:
            given = torch.diag(_vector(given, d, "covariance"))
        if given.shape != (d, d) or not torch.allclose(given, given.mT):
            raise InvalidArgument(f"given a covariance {tuple(given.shape)}, expected symmetric ({d}, {d})")
        self.covariance = given
        self.root = _root(given, decomposition)

    def transform(self, u: Tensor) -> Tensor:
        """Points (..., d) of the unit cube to the normal distribution."""
        edge = _SMALLEST if u.dtype == torch.float64 else 2.0**-25
        # A periodized point may round to 1, which no sequence has.
        normal = torch.special.ndtri(u.clamp(edge, 1 - torch.finfo(u.dtype).eps / 2))
        if bool(torch.count_nonzero(self.root - torch.diag(self.root.diagonal()))):
            return normal @ self.root.mT.to(u) + self.mean.to(u)
        return normal * self.root.diagonal().to(u) + self.mean.to(u)


def _root(covariance: Tensor, decomposition: str) -> Tensor:
    """A (d, d) with A A' the covariance."""
    if not bool(torch.count_nonzero(covariance - torch.diag(covariance.diagonal()))):
        if bool((covariance.diagonal() < 0).any()):
            raise InvalidArgument("given a negative variance, expected 0 or more")
        return torch.diag(covariance.diagonal().sqrt())
    if decomposition == "cholesky":
        root, info = torch.linalg.cholesky_ex(covariance)
        if int(info):
            raise InvalidArgument(
                'given a covariance that is not positive definite, expected one; use decomposition="pca" for '
                "a singular one"
            )
        return root
    values, vectors = torch.linalg.eigh(covariance)
    if float(values[0]) < -1e-10 * float(values[-1].abs()):
        raise InvalidArgument(
            f"given a covariance with eigenvalue {float(values[0]):.2e}, expected a positive semidefinite one"
        )
    return (vectors * values.clamp_min(0).sqrt()).flip(-1)


class BrownianMotion(Gaussian):
    """Brownian motion at given times: `start + drift t + sqrt(diffusion) W_t`.

    Args:
        times: (d,) increasing, above 0.
        start: value at time 0.
        drift: per unit of time.
        diffusion: variance per unit of time.
        decomposition: "pca" or "cholesky" (steps one after the other).

    Raises:
        InvalidArgument: times don't increase from above 0.
    """

    def __init__(
        self,
        times: Numbers[float] | Tensor,
        start: float = 0.0,
        drift: float = 0.0,
        diffusion: float = 1.0,
        decomposition: str = "pca",
    ):
        t = torch.as_tensor(times, dtype=torch.float64)
        if t.dim() != 1 or not len(t) or float(t[0]) <= 0 or bool((t.diff() <= 0).any()):
            raise InvalidArgument("given times that don't increase from above 0, expected them to")
        self.times = t
        super().__init__(
            len(t), start + drift * t, diffusion * torch.minimum(t[:, None], t[None]), decomposition
        )


PERIODIZATIONS = ("none", "tent", "sidi1", "sidi2", "sidi3", "sidi4")


def periodize(u: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Change of variables after which any integrand is periodic, and its weight.

    Args:
        u: (..., d) in [0, 1).
        kind: "tent" (baker's: continuous), "sidi1" to "sidi4" (weights proportional to a power of sin(pi u) that
            vanishes at the ends: the higher, the smoother, and the larger the variation), or "none".

    Returns:
        x (..., d) in [0, 1], and w (...): the integral of f is that of f(x(u)) w(u).

    Raises:
        InvalidArgument: an unknown kind.
    """
    pi = math.pi
    if kind == "none":
        return u, torch.ones_like(u[..., 0])
    if kind == "tent":
        return 1 - (2 * u - 1).abs(), torch.ones_like(u[..., 0])
    sine = torch.sin(pi * u)
    if kind == "sidi1":
        x, w = (1 - torch.cos(pi * u)) / 2, pi / 2 * sine
    elif kind == "sidi2":
        x, w = u - torch.sin(2 * pi * u) / (2 * pi), 2 * sine**2
    elif kind == "sidi3":
        x, w = (8 - 9 * torch.cos(pi * u) + torch.cos(3 * pi * u)) / 16, 3 * pi / 4 * sine**3
    elif kind == "sidi4":
        x = u - (8 * torch.sin(2 * pi * u) - torch.sin(4 * pi * u)) / (12 * pi)
        w = 8 / 3 * sine**4
    else:
        raise InvalidArgument(f"given periodization {kind!r}, expected one of {', '.join(PERIODIZATIONS)}")
    return x.clamp(0, 1), w.prod(-1)

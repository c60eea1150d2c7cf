"""Search for generating vectors of rank-1 lattices: component by component in n log n per component, and Korobov.

The odd numbers modulo 2^p are plus or minus the powers of 5. The kernel is even, so on exponents the error of
every candidate is a cyclic correlation of the products so far with the kernel, by FFT; levels p = 0 to m add up
to lattices of 2^m points, and the criterion is the worst ratio, over the levels wanted, to that level's best.

Sources: Nuyens and Cools, Fast component-by-component construction, a reprise for different kernels, 2006; Cools,
Kuo and Nuyens, Constructing embedded lattice rules for multivariate integration, 2006.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Numbers

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.numerics.qmc.kernels import bernoulli_kernel


def product_weights(d: int, weights: Numbers[float] | Tensor | None) -> Tensor:
    """Weights given, or 1 / j^2 for j = 1 to d: (d,) float64."""
    if weights is None:
        return torch.arange(1, d + 1, dtype=torch.float64).pow(-2)
    result = torch.as_tensor(weights, dtype=torch.float64)
    if result.shape != (d,) or bool((result <= 0).any()):
        raise InvalidArgument(f"given weights of shape {tuple(result.shape)}, expected {d} positive numbers")
    return result


def lattice_error(
    vector: Numbers[int] | Tensor,
    log2_points: int,
    weights: Numbers[float] | Tensor | None = None,
    alpha: int = 1,
) -> float:
    """Worst-case error of a lattice over the unit ball of a weighted Korobov space.

    Args:
        vector: d integers.
        log2_points: 2^log2_points points.
        weights: d product weights; None for 1 / j^2.
        alpha: smoothness; the kernel has degree 2 * alpha.
    """
    z = torch.as_tensor(vector, dtype=torch.int64)
    gamma, n = product_weights(len(z), weights), 1 << log2_points
    index = torch.arange(n)
    excess = torch.zeros(n, dtype=torch.float64)  # product - 1, so that small errors keep their digits
    for weight, component in zip(gamma, z, strict=True):
        factor = weight * bernoulli_kernel(((index * component) & (n - 1)).double() / n, alpha)
        excess = excess + factor * (1 + excess)
    return math.sqrt(max(0.0, float(excess.mean())))


def component_by_component(
    d: int,
    log2_points: int,
    *,
    first: int = 10,
    weights: Numbers[float] | Tensor | None = None,
    alpha: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Generating vector whose lattices of 2^first to 2^log2_points points are all good.

    Args:
        d: components, at most 2^(log2_points - 2).
        log2_points: largest lattice, 4 to 24.
        first: smallest lattice that counts (limited to log2_points).
        weights: d product weights; None for 1 / j^2.
        alpha: smoothness.
        progress: called with the number of components found.

    Returns:
        (d,) int64, odd numbers below 2^log2_points, no two equal or of sum 2^log2_points.

    Raises:
        InvalidArgument: an argument out of range.

    Example:
        >>> from tensormill.numerics.qmc import component_by_component
        >>> component_by_component(2, 6)
        tensor([ 1, 19])
    """
    if not 4 <= log2_points <= 24:
        raise InvalidArgument(f"given log2_points={log2_points}, expected 4 to 24")
    if not 1 <= d <= 1 << (log2_points - 2):
        raise InvalidArgument(
            f"given d={d}, expected 1 to {1 << (log2_points - 2)} for this number of points"
        )
    first = max(2, min(first, log2_points))
    gamma = product_weights(d, weights)
    powers = [1]
    for _ in range((1 << (log2_points - 2)) - 1):
        powers.append(powers[-1] * 5 & ((1 << log2_points) - 1))
    exponents = torch.tensor(powers)
    kernel = []  # of level p at the powers of 5 modulo 2^p
    for level in range(2, log2_points + 1):
        x = (exponents[: 1 << (level - 2)] & ((1 << level) - 1)).double() / (1 << level)
        kernel.append(bernoulli_kernel(x, alpha))
    transforms = [torch.fft.rfft(k) for k in kernel]
    at_zero, at_half = (
        float(k) for k in bernoulli_kernel(torch.tensor([0.0, 0.5], dtype=torch.float64), alpha)
    )
    # Products minus 1, so that the small errors of large lattices keep their digits.
    zero = half = 0.0
    excess = [torch.zeros_like(k) for k in kernel]
    used = torch.zeros(len(exponents), dtype=torch.bool)
    found = []
    for j in range(d):
        weight = float(gamma[j])
        if j == 0:
            chosen = 0  # every odd number gives the same error in one dimension
        else:
            total = torch.tensor(
                [zero + half + weight * ((1 + zero) * at_zero + (1 + half) * at_half)], dtype=torch.float64
            )
            worst: Tensor | None = None
            for index, values in enumerate(excess):
                level = index + 2
                if level > 2:
                    total = total.repeat(2)
                    worst = worst.repeat(2) if worst is not None else None
                spectrum = torch.fft.rfft(1 + values).conj() * transforms[index]
                sums = torch.fft.irfft(spectrum, n=len(values))
                total = total + 2 * (values.sum() + weight * sums)
                if level >= first:
                    errors = total.clamp_min(1e-300)
                    ratio = errors / errors.min()
                    worst = ratio if worst is None else torch.maximum(worst, ratio)
            assert worst is not None
            chosen = int(worst.masked_fill(used, math.inf).argmin())
        used[chosen] = True
        found.append(powers[chosen])
        zero += weight * at_zero * (1 + zero)
        half += weight * at_half * (1 + half)
        excess = [e + weight * k.roll(-chosen) * (1 + e) for e, k in zip(excess, kernel, strict=True)]
        if progress is not None:
            progress(j + 1)
    return torch.tensor(found)


def korobov(
    d: int,
    log2_points: int,
    *,
    weights: Numbers[float] | Tensor | None = None,
    alpha: int = 1,
    candidates: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Best generating vector (1, a, a^2, ...) modulo 2^log2_points over odd a.

    Args:
        d: components.
        log2_points: the lattice has 2^log2_points points; at most 24.
        weights: d product weights; None for 1 / j^2.
        alpha: smoothness.
        candidates: how many a to try, drawn at random; None tries all: 2^(log2_points - 2) times n * d operations.
        seed: of the draw.

    Raises:
        InvalidArgument: an argument out of range.
    """
    if not 2 <= log2_points <= 24:
        raise InvalidArgument(f"given log2_points={log2_points}, expected 2 to 24")
    if d < 1:
        raise InvalidArgument(f"given d={d}, expected 1 or more")
    n = 1 << log2_points
    # a and -a give the same points up to reflection, so half of the odd numbers are enough
    odd = torch.arange(1, max(2, n // 2), 2)
    if candidates is not None and candidates < len(odd):
        order = torch.randperm(len(odd), generator=torch.Generator().manual_seed(seed))
        odd = odd[order[:candidates]]
    best, chosen = math.inf, torch.ones(d, dtype=torch.int64)
    for a in odd.tolist():
        vector = torch.tensor([pow(a, j, n) for j in range(d)])
        error = lattice_error(vector, log2_points, weights, alpha)
        if error < best:
            best, chosen = error, vector
    return chosen

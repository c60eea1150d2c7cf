"""Chebyshev interpolation in one variable: nodes, values and coefficients, evaluation, calculus, resampling.

A series is sum_k c_k T_k(t), t in [-1, 1] the image of [a, b]. Nodes are of the second kind (both ends included) and
ascend; the maps between values and coefficients are DCTs of type 1, by FFT, and exact up to rounding. Every function
works along one dimension of a tensor of any dtype (complex series too), on any device, and is differentiable.

Source: Trefethen, Approximation Theory and Approximation Practice (2013), chapters 2, 3 and 19.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensormill.errors import InvalidArgument

__all__ = [
    "basis",
    "coeffs2vals",
    "differentiate",
    "evaluate",
    "integrate",
    "nodes",
    "resample",
    "vals2coeffs",
]

Interval = tuple[float, float]


def nodes(
    m: int,
    domain: Interval = (-1.0, 1.0),
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The m >= 2 Chebyshev nodes of the second kind of [a, b], ascending: (m,).

    Raises:
        InvalidArgument: m below 2, or an empty or infinite interval.

    Example:
        >>> nodes(3, (0.0, 4.0))
        tensor([0., 2., 4.], dtype=torch.float64)
    """
    if not isinstance(m, int) or m < 2:
        raise InvalidArgument(f"given m={m!r}, expected an integer >= 2: the nodes include both ends")
    a, b = checked_interval(domain)
    # The sine of angles symmetric about 0: nodes are symmetric to the last bit, and the middle one is exact.
    angle = torch.arange(1 - m, m, 2, dtype=torch.float64) * (math.pi / (2 * (m - 1)))
    t = angle.sin()
    x = 0.5 * (a + b) + 0.5 * (b - a) * t
    x[0], x[-1] = a, b
    return x.to(dtype=dtype, device=device)


def vals2coeffs(values: Tensor, dim: int = -1) -> Tensor:
    """Coefficients of the interpolant through values at `nodes`, along `dim`.

    Example:
        >>> vals2coeffs(nodes(4) ** 2)
        tensor([0.5000, 0.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    if values.is_complex():
        return torch.complex(vals2coeffs(values.real, dim), vals2coeffs(values.imag, dim))
    m = _checked_length(values, dim)
    if m == 1:
        return values
    flipped = values.movedim(dim, -1).flip(-1)  # the FFT wants cos order: descending nodes
    even = torch.cat((flipped, flipped[..., 1:-1].flip(-1)), dim=-1)  # period 2 (m - 1)
    coefficients = torch.fft.rfft(even).real / (m - 1)
    halves = torch.ones(m, dtype=values.dtype, device=values.device)
    halves[0] = halves[-1] = 0.5
    return (coefficients * halves).movedim(-1, dim)


def coeffs2vals(coefficients: Tensor, dim: int = -1) -> Tensor:
    """Values at `nodes` of a series, along `dim`: the inverse of `vals2coeffs`."""
    if coefficients.is_complex():
        return torch.complex(coeffs2vals(coefficients.real, dim), coeffs2vals(coefficients.imag, dim))
    m = _checked_length(coefficients, dim)
    if m == 1:
        return coefficients
    doubles = torch.full((m,), 0.5, dtype=coefficients.dtype, device=coefficients.device)
    doubles[0] = doubles[-1] = 1.0
    half = coefficients.movedim(dim, -1) * doubles
    even = torch.cat((half, half[..., 1:-1].flip(-1)), dim=-1)
    return torch.fft.rfft(even).real.flip(-1).movedim(-1, dim)


def basis(x: Tensor, m: int, domain: Interval = (-1.0, 1.0)) -> Tensor:
    """T_0 to T_{m-1} at points x (...) of [a, b]: (..., m). By the recurrence, so outside it extrapolates.

    Example:
        >>> basis(torch.tensor([0.5]), 4)
        tensor([[ 1.0000,  0.5000, -0.5000, -1.0000]])
    """
    if not isinstance(m, int) or m < 1:
        raise InvalidArgument(f"given m={m!r}, expected an integer >= 1")
    return evaluate(torch.eye(m, dtype=x.dtype, device=x.device), x.reshape(-1), domain).reshape(*x.shape, m)


def evaluate(coefficients: Tensor, x: Tensor, domain: Interval = (-1.0, 1.0)) -> Tensor:
    """Many series at many points: coefficients (m, r), x (M,) -> (M, r).

    Gradients of any order with respect to both; that with respect to x evaluates the differentiated series, and costs
    as much as the evaluation.

    Raises:
        InvalidArgument: shapes other than these.

    Example:
        >>> evaluate(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 3.0]), (0.0, 4.0))
        tensor([[-1.],
                [ 2.]])
    """
    if coefficients.ndim != 2 or coefficients.shape[0] < 1 or x.ndim != 1 or x.is_complex():
        raise InvalidArgument(
            f"given coefficients {tuple(coefficients.shape)} and x {tuple(x.shape)} of {x.dtype}, expected (m, r) and "
            "real (M,)"
        )
    a, b = checked_interval(domain)
    return _Evaluate.apply((2 * x - (a + b)) / (b - a), coefficients)  # type: ignore[no-any-return]


class _Evaluate(torch.autograd.Function):
    """T(t) C. The Chebyshev matrix is made again in the backward pass: t is all that is kept of the points."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, coefficients: Tensor) -> Tensor:
        ctx.save_for_backward(t, coefficients)
        return _vandermonde(t, coefficients.shape[0]).to(coefficients.dtype) @ coefficients

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        t, coefficients = ctx.saved_tensors
        for_t = for_coefficients = None
        if ctx.needs_input_grad[0]:
            slope = _Evaluate.apply(t, differentiate(coefficients, 0))
            for_t = (gradient * slope.conj()).sum(-1).real
        if ctx.needs_input_grad[1]:
            for_coefficients = _Project.apply(t, gradient, coefficients.shape[0])
        return for_t, for_coefficients


class _Project(torch.autograd.Function):
    """T(t)^T G: the adjoint of `_Evaluate` in its coefficients."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, gradient: Tensor, m: int) -> Tensor:
        ctx.save_for_backward(t, gradient)
        ctx.m = m
        return _vandermonde(t, m).mT.to(gradient.dtype) @ gradient

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        t, gradient = ctx.saved_tensors
        for_t = for_gradient = None
        if ctx.needs_input_grad[0]:
            slope = _Evaluate.apply(t, differentiate(outer, 0))
            for_t = (gradient.conj() * slope).sum(-1).real
        if ctx.needs_input_grad[1]:
            for_gradient = _Evaluate.apply(t, outer)
        return for_t, for_gradient, None


def _vandermonde(t: Tensor, m: int) -> Tensor:
    """T_k(t): (M, m); rows of the transpose are written one after the other."""
    rows = t.new_empty(m, t.shape[0])
    rows[0] = 1
    if m > 1:
        rows[1] = t
    twice = 2 * t
    for k in range(2, m):
        torch.mul(twice, rows[k - 1], out=rows[k]).sub_(rows[k - 2])
    return rows.mT


def differentiate(coefficients: Tensor, dim: int = 0, domain: Interval = (-1.0, 1.0)) -> Tensor:
    """Coefficients of the derivative along `dim`: m - 1 of them (at least 1).

    Example:
        >>> differentiate(torch.tensor([0.0, 0.0, 1.0]))
        tensor([0., 4.])
    """
    m = _checked_length(coefficients, dim)
    a, b = checked_interval(domain)
    if m == 1:
        return torch.zeros_like(coefficients)
    k = torch.arange(m, dtype=torch.float64, device=coefficients.device)
    # T_k' = 2 k (T_{k-1} + T_{k-3} + ...), with T_0 halved
    matrix = 2.0 * k[None, :] * ((k[None, :] - k[:-1, None]) % 2 == 1) * (k[None, :] > k[:-1, None])
    matrix[0] *= 0.5
    matrix = (matrix * (2 / (b - a))).to(coefficients.dtype)
    return torch.tensordot(matrix, coefficients, dims=([1], [dim])).movedim(0, dim)


def integrate(coefficients: Tensor, dim: int = 0, domain: Interval = (-1.0, 1.0)) -> Tensor:
    """Integral over [a, b] along `dim`, which disappears.

    Example:
        >>> integrate(torch.tensor([1.0, 5.0, 0.0]), domain=(0.0, 3.0))
        tensor(3.)
    """
    m = _checked_length(coefficients, dim)
    a, b = checked_interval(domain)
    k = torch.arange(m, dtype=torch.float64, device=coefficients.device)
    weights = torch.where(k % 2 == 0, (b - a) / (1 - k * k), torch.zeros_like(k))
    return torch.tensordot(weights.to(coefficients.dtype), coefficients, dims=([0], [dim]))


def resample(
    values: Tensor,
    x: Tensor | Sequence[float],
    points: Tensor,
    dim: int = 0,
    *,
    period: float | None = None,
) -> Tensor:
    """Values at `points` of an interpolant through values on another grid, along `dim`.

    Args:
        values: (..., n, ...), n >= 4; n >= 1 if periodic. float or complex.
        x: (n,), ascending. Beyond its ends the last cubic goes on (half a cell for cell-centred grids).
        points: (m,).
        period: None: cubic spline (not-a-knot). A number: trigonometric interpolation with this period, x uniform.

    Returns:
        (..., m, ...), linear in values; differentiable when periodic. Splines are solved on the CPU, by scipy.

    Raises:
        InvalidArgument: shapes that don't fit, x not ascending, or not uniform when periodic.
    """
    grid = torch.as_tensor(x, dtype=torch.float64)
    n = values.shape[dim]
    if grid.shape != (n,) or n < (1 if period else 4) or bool((grid.diff() <= 0).any()):
        raise InvalidArgument(
            f"given x {tuple(grid.shape)} for {n} values, expected {n} ascending coordinates, at least 4"
        )
    if period is None:
        from scipy.interpolate import CubicSpline

        real = values.detach().movedim(dim, 0).cpu().numpy()
        spline = CubicSpline(grid.cpu().numpy(), real.astype(np.result_type(real, np.float64)))
        result = torch.from_numpy(spline(points.detach().cpu().double().numpy()))
        return result.to(dtype=values.dtype, device=values.device).movedim(0, dim)
    step = period / n
    if not torch.allclose(grid.diff(), torch.full_like(grid.diff(), step), rtol=1e-6, atol=0):
        raise InvalidArgument(f"given x that is not uniform, expected steps of period / n = {step}")
    offsets = (points.detach().cpu().double()[:, None] - grid.cpu()[None, :]) * (2 * math.pi / period)
    frequencies = torch.arange(1, (n - 1) // 2 + 1, dtype=torch.float64)
    kernel = torch.ones_like(offsets)
    for k in frequencies.tolist():
        kernel += 2 * torch.cos(k * offsets)
    if n % 2 == 0:
        kernel += torch.cos(n / 2 * offsets)
    matrix = (kernel / n).to(dtype=values.dtype, device=values.device)
    return torch.tensordot(matrix, values, dims=([1], [dim])).movedim(0, dim)


def checked_interval(domain: Sequence[float]) -> Interval:
    """(a, b) as floats, a < b.

    Raises:
        InvalidArgument: anything else.
    """
    if len(domain) != 2 or not all(math.isfinite(v) for v in domain) or not domain[0] < domain[1]:
        raise InvalidArgument(f"given interval {tuple(domain)}, expected finite (a, b) with a < b")
    return float(domain[0]), float(domain[1])


def _checked_length(tensor: Tensor, dim: int) -> int:
    if not -tensor.ndim <= dim < tensor.ndim or tensor.shape[dim] < 1:
        raise InvalidArgument(
            f"given a tensor {tuple(tensor.shape)} and dim={dim}, expected one or more entries along dim"
        )
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise InvalidArgument(f"given dtype {tensor.dtype}, expected a floating-point or complex one")
    return tensor.shape[dim]

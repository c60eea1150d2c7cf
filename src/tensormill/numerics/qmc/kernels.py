"""Kernels that depend on differences alone: shift-invariant for lattices, digitally shift-invariant for nets.

    K(x, z) = S prod_j (1 + gamma_j k(x_j, z_j)),    k of mean zero over [0, 1)

with k a Bernoulli polynomial of x - z mod 1, or a low-order Walsh kernel of the exclusive or of x and z. Both are
reproducing kernels of functions with alpha square-integrable derivatives (periodic, for the former).

Sources: Sorokin, QMCPy, arXiv 2502.14256 (order 4 of the Walsh kernels); Baldeaux, Dick, Leobacher, Nuyens and
Pillichshammer, Efficient calculation of the worst-case error and (fast) component-by-component construction of higher
order polynomial lattice rules, 2012 (orders 2 and 3); Wahba, Spline Models, 1990 (Bernoulli).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence as Numbers
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument
from tensormill.numerics.qmc.sequence import PointSet

if TYPE_CHECKING:
    from tensormill.numerics.qmc.gram import FastGram

_BERNOULLI = {  # coefficients from the highest degree down
    2: "1 -1 1/6",
    4: "1 -2 1 0 -1/30",
    6: "1 -3 5/2 0 -1/2 0 1/42",
    8: "1 -4 14/3 0 -7/3 0 2/3 0 -1/30",
    10: "1 -5 15/2 0 -7 0 5 0 -3/2 0 5/66",
}
_BITS = 52  # digits of a point that the Walsh kernels look at: all that a float64 in [0, 1) surely has
_CHUNK = 1 << 22  # elements of a kernel matrix computed at a time


def bernoulli_kernel(delta: Tensor, alpha: int) -> Tensor:
    """`(-1)^(alpha+1) (2 pi)^(2 alpha) / (2 alpha)! B_(2 alpha)(delta)`: Fourier coefficients |h|^(-2 alpha).

    Args:
        delta: differences modulo 1, in [0, 1).
        alpha: 1 to 5.
    """
    degree = 2 * alpha
    factor = (-1) ** (alpha + 1) * (2 * math.pi) ** degree / math.factorial(degree)
    coefficients = [factor * float(Fraction(c)) for c in _BERNOULLI[degree].split()]
    value = torch.full_like(delta, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * delta + coefficient
    return value


def walsh_kernel(delta: Tensor, alpha: int) -> Tensor:
    """Sum over k >= 1 of the Walsh functions of delta, weighted with 2 to minus the sum of k's alpha highest digits'
    positions (alpha 1: `6 (1/6 - 2^(floor(log2 delta) - 1))`).

    Args:
        delta: exclusive or of two points, float64 in [0, 1), a multiple of 2^-52.
        alpha: 1 to 4.
    """
    _, exponent = torch.frexp(delta)
    equal = delta == 0
    beta = (1 - exponent).to(delta.dtype).masked_fill(equal, 0)  # minus floor(log2 delta)
    power = torch.exp2(-beta).masked_fill(equal, 0)  # 2^floor(log2 delta)
    if alpha == 1:
        return 1 - 3 * power
    if alpha == 2:
        return -beta * delta + 2.5 * (1 - power) - 1
    squares = power * power
    if alpha == 3:
        return beta * delta**2 - 5 * (1 - power) * delta + 43 / 18 * (1 - squares) - 1
    signs = torch.zeros_like(delta)
    digits = (delta * 2.0**_BITS).long()
    for position in range(18):  # 2^-54 beside 1 is nothing
        bit = (digits >> (_BITS - 1 - position)) & 1
        signs += (1 - 2 * bit).to(delta.dtype) * 2.0 ** (-3 * position)
    return (
        -2 / 3 * beta * delta**3
        + 5 * (1 - power) * delta**2
        - 43 / 9 * (1 - squares) * delta
        + 701 / 294 * (1 - squares * power)
        + beta * (signs / 48 - 1 / 42)
        - 1
    )


class ProductKernel(nn.Module):
    """A product over dimensions of `1 + gamma_j k(x_j, z_j)`, with positive parameters held as logarithms.

    Args:
        d: dimensions.
        alpha: order of k; or several, for a mixture of these orders with weights of their own in every dimension,
            which start equal and sum to 1.
        weights: gamma: a number, or (d,); None for 2^(1/d) - 1, which keeps the product of the order of 1.
        scale: S.

    Parameters `log_weights` (d,), `log_scale` () and, for a mixture, `mixture_logits` (d, orders) are learnt by
    gradients; set `requires_grad_(False)` on what should stay.

    Raises:
        InvalidArgument: an argument out of range.
    """

    structure: str
    orders_known: range

    def __init__(
        self,
        d: int,
        alpha: int | Numbers[int] = 2,
        weights: float | Numbers[float] | Tensor | None = None,
        scale: float = 1.0,
    ):
        super().__init__()
        if not isinstance(d, int) or d < 1:
            raise InvalidArgument(f"given d={d!r}, expected a number of dimensions, 1 or more")
        orders = (alpha,) if isinstance(alpha, int) else tuple(alpha)
        known = self.orders_known
        if not orders or any(order not in known for order in orders):
            raise InvalidArgument(f"given alpha={alpha!r}, expected orders from {known[0]} to {known[-1]}")
        if weights is None:
            weights = 2 ** (1 / d) - 1
        gamma = torch.as_tensor(weights, dtype=torch.float64).detach().clone()
        if gamma.dim() > 1 or gamma.numel() not in (1, d) or not bool((gamma > 0).all()):
            raise InvalidArgument(
                f"given weights {tuple(gamma.shape)}, expected a positive number or {d} of them"
            )
        if not scale > 0:
            raise InvalidArgument(f"given scale={scale!r}, expected a positive number")
        self.d, self.orders = d, orders
        self.log_weights = nn.Parameter(gamma.expand(d).log().clone())
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float64))
        if len(orders) > 1:
            self.mixture_logits = nn.Parameter(torch.zeros(d, len(orders), dtype=torch.float64))

    @abstractmethod
    def _difference(self, x: Tensor, z: Tensor) -> Tensor:
        """What the kernel is a function of, elementwise, of coordinates that broadcast."""

    @abstractmethod
    def _one_dimension(self, delta: Tensor, alpha: int) -> Tensor:
        """k of order alpha, elementwise."""

    def _checked(self, x: Tensor | PointSet) -> Tensor:
        values = x.values if isinstance(x, PointSet) else x
        if values.dim() != 2 or values.shape[-1] != self.d:
            raise InvalidArgument(f"given points of shape {tuple(values.shape)}, expected (n, {self.d})")
        return values

    def excess(self, x: Tensor, z: Tensor) -> Tensor:
        """`K / S - 1` for points (..., d) that broadcast, without cancellation: (...)."""
        weights = self.log_weights.exp()
        mixture = torch.softmax(self.mixture_logits, -1) if len(self.orders) > 1 else None
        result: Any = None
        for j in range(self.d):  # d tensors of (...), instead of one of (..., d)
            delta = self._difference(x[..., j], z[..., j])
            parts = [self._one_dimension(delta, order) for order in self.orders]
            value = parts[0]
            if mixture is not None:
                value = torch.stack(parts, -1) @ mixture[j]
            factor = weights[j] * value
            result = factor if result is None else result + factor * (1 + result)
        return result

    def forward(self, x: Tensor | PointSet, z: Tensor | PointSet) -> Tensor:
        """Kernel matrix (a, b) of points (a, d) and (b, d).

        Raises:
            InvalidArgument: points of another shape or, for Walsh kernels, not float64.
        """
        first, second = self._checked(x), self._checked(z)
        return self.log_scale.exp() * (1 + self.excess(first.unsqueeze(1), second.unsqueeze(0)))

    def diagonal(self, x: Tensor) -> Tensor:
        """K(x, x) for points (a, d): (a,)."""
        values = self._checked(x)
        return self.log_scale.exp() * (1 + self.excess(values, values))

    def gram(self, points: PointSet, noise: float | Tensor = 0.0) -> FastGram:
        """The Gram matrix at structured points; this is what `GaussianProcess` calls."""
        from tensormill.numerics.qmc.gram import FastGram

        return FastGram(points, self, noise)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"d={self.d}, alpha={self.orders if len(self.orders) > 1 else self.orders[0]}"


class ShiftInvariantKernel(ProductKernel):
    """Kernel of x - z modulo 1 by Bernoulli polynomials, for lattices; alpha 1 to 5.

    See `ProductKernel` for the arguments. Differentiable with respect to points as well, 2 * alpha - 1 times.

    Example:
        >>> import torch
        >>> from tensormill.numerics import qmc
        >>> kernel = qmc.ShiftInvariantKernel(1, alpha=1, weights=1.0)
        >>> x = torch.tensor([[0.0], [0.5]], dtype=torch.float64)
        >>> kernel(x, x).detach().round(decimals=3)
        tensor([[ 4.2900, -0.6450],
                [-0.6450,  4.2900]], dtype=torch.float64)
    """

    structure = "lattice"
    orders_known = range(1, 6)

    def _difference(self, x: Tensor, z: Tensor) -> Tensor:
        delta = x - z
        return delta - delta.detach().floor()

    def _one_dimension(self, delta: Tensor, alpha: int) -> Tensor:
        return bernoulli_kernel(delta, alpha)


class DigitalShiftInvariantKernel(ProductKernel):
    """Kernel of the exclusive or of x and z by Walsh functions, for digital nets in base 2; alpha 1 to 4.

    See `ProductKernel` for the arguments. Points are float64 and are read as 52 binary digits.

    Example:
        >>> import torch
        >>> from tensormill.numerics import qmc
        >>> kernel = qmc.DigitalShiftInvariantKernel(1, alpha=1, weights=1.0)
        >>> x = torch.tensor([[0.0], [0.5]], dtype=torch.float64)
        >>> kernel(x, x).detach()
        tensor([[2.0000, 0.5000],
                [0.5000, 2.0000]], dtype=torch.float64)
    """

    structure = "net"
    orders_known = range(1, 5)

    def _checked(self, x: Tensor | PointSet) -> Tensor:
        values = super()._checked(x)
        if values.dtype != torch.float64:
            raise InvalidArgument(
                f"given points of {values.dtype}, expected float64, whose digits the kernel compares; make the net with "
                "dtype=torch.float64"
            )
        return values

    def _difference(self, x: Tensor, z: Tensor) -> Tensor:
        scale = 2.0**_BITS
        return ((x * scale).long() ^ (z * scale).long()).double() / scale

    def _one_dimension(self, delta: Tensor, alpha: int) -> Tensor:
        return walsh_kernel(delta, alpha)

"""Dual activations: E[f^(i)(u) f^(j)(v)] of a nonlinearity f under a centred Gaussian pair (u, v).

With (u, v) ~ N(0, [[q, s], [s, r]]), the moment of order (0, 0) carries the covariance of an infinitely wide network
through a nonlinearity, order (1, 1) its tangent kernel (Jacot et al., arXiv 1806.07572, theorem 1; Cho and Saul, NeurIPS
2009), and order (0, 2) appears in feature-learning limits. Closed forms where they exist, otherwise a series in Hermite
polynomials or quadrature. All are elementwise, broadcast, run on any device in float32 or float64, and are
differentiable in q, r and s, also on the diagonal s = sqrt(q r), where naive formulas have infinite slope.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument

__all__ = ["Polynomial", "activation_function", "activation_names", "dual_activation"]

Moment = Callable[[Tensor, Tensor, Tensor], Tensor]
Scalar = Callable[[Tensor], Tensor]

METHODS = ("auto", "exact", "hermite", "quadrature")

# The trapezoidal rule: for functions that are analytic in a strip its error falls exponentially with 1/step, where
# Gauss-Hermite rules of as many nodes fall with the root of their number (Trefethen, arXiv 2101.09501). The density
# of a standard Gaussian is below 1e-21 at the ends, which leaves room for growing activations.
_REACH, _NODES = 10.0, 97
_HERMITE_TERMS = 96
_CHUNK = 1 << 22  # values of the activation held at once by two-dimensional quadrature


@dataclass(frozen=True)
class Polynomial:
    """The activation sum_k coefficients[k] u^k, for `dual_activation` and as a function of tensors.

    Attributes:
        coefficients: of the powers 0, 1, 2, ..., finite numbers.
    """

    coefficients: tuple[float, ...]

    def __init__(self, coefficients: Sequence[float]) -> None:
        values = tuple(float(c) for c in coefficients)
        if not values or not all(map(math.isfinite, values)):
            raise InvalidArgument(
                f"given coefficients {coefficients!r}, expected at least one, all finite, lowest power first"
            )
        object.__setattr__(self, "coefficients", values)

    def __call__(self, u: Tensor) -> Tensor:
        total = torch.full_like(u, self.coefficients[-1])
        for c in reversed(self.coefficients[:-1]):
            total = total * u + c
        return total

    def derivative(self, order: int = 1) -> Polynomial:
        """The polynomial's derivative of this order."""
        values = list(self.coefficients)
        for _ in range(order):
            values = [k * c for k, c in enumerate(values)][1:] or [0.0]
        return Polynomial(values)


@dataclass(frozen=True)
class _Linear:
    """a u + b |u| + c sign(u) + d: ReLU, leaky ReLU, absolute value, sign and step."""

    a: float = 0.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0


def _gaussian(u: Tensor) -> Tensor:
    return torch.exp(-u * u)


def _identity(u: Tensor) -> Tensor:
    return u


def _step(u: Tensor) -> Tensor:
    return 0.5 * (1 + torch.sign(u))


_FUNCTIONS: dict[str, Scalar] = {
    "identity": _identity,
    "square": torch.square,
    "relu": torch.relu,
    "leaky_relu": nn.functional.leaky_relu,
    "abs": torch.abs,
    "sign": torch.sign,
    "step": _step,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "exp": torch.exp,
    "gaussian": _gaussian,
    "gelu": nn.functional.gelu,
    "gelu_tanh": functools.partial(nn.functional.gelu, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "softplus": nn.functional.softplus,
    "elu": nn.functional.elu,
    "hardtanh": nn.functional.hardtanh,
}
_SAME_FUNCTION: dict[Any, str] = {
    nn.functional.relu: "relu",
    torch.abs: "abs",
    torch.special.erf: "erf",
    nn.functional.tanh: "tanh",
    nn.functional.sigmoid: "sigmoid",
    **{function: name for name, function in _FUNCTIONS.items()},
}
_MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
}


def activation_names() -> tuple[str, ...]:
    """Names that `dual_activation` and `activation_function` know."""
    return tuple(_FUNCTIONS)


def activation_function(name: str) -> Scalar:
    """The elementwise function of this name; "gaussian" is exp(-u^2), "step" has the value 1/2 at 0.

    Raises:
        InvalidArgument: no activation has this name.
    """
    if name not in _FUNCTIONS:
        raise InvalidArgument(
            f"given activation {name!r}, expected one of {', '.join(_FUNCTIONS)}; "
            "or pass a function of tensors, which is integrated numerically"
        )
    return _FUNCTIONS[name]


def dual_activation(
    activation: str | Scalar, order: tuple[int, int] = (0, 0), method: str = "auto"
) -> Moment:
    """The function (q, r, s) -> E[f^(i)(u) f^(j)(v)], (u, v) ~ N(0, [[q, s], [s, r]]), order = (i, j).

    q, r and s broadcast against one another; the result has their common shape and dtype. Derivatives of functions with
    kinks are those of distributions: order (0, 2) of "relu" counts the delta function at 0. Those of a callable come
    from autograd, which does not see delta functions: give a callable with kinks orders up to 1 only, and expect three
    digits of its moments, two of their gradients. Gradients in q, r and s
    need no derivative beyond the first in each argument.

    Example:
        >>> dual = dual_activation("relu")
        >>> one = torch.tensor(1.0, dtype=torch.float64)
        >>> round(float(dual(one, one, one)), 6)  # E[relu(u)^2]
        0.5

    Args:
        activation: a name (`activation_names()`), a `Polynomial`, a torch function or activation module that is known
            ("relu", `torch.relu`, `torch.nn.LeakyReLU(0.2)` ... take their closed form), or any elementwise function.
        order: derivatives of f in u and in v.
        method: "exact", the closed form; "hermite", a series of 96 Hermite polynomials (some hundred operations a
            pair: the way for large kernels); "quadrature", on 97 x 97 points (the accurate way near q, r of 10 and
            more); "auto", exact if there is a closed form of this order, else quadrature.

    Returns:
        A function of q, r (variances, >= 0) and s (covariance, |s| <= sqrt(q r); beyond, it is clipped).

    Raises:
        InvalidArgument: an unknown name, method or order, or "exact" without a closed form.
    """
    if method not in METHODS:
        raise InvalidArgument(f"given method {method!r}, expected one of {', '.join(METHODS)}")
    if len(order) != 2 or any(not isinstance(k, int) or k < 0 for k in order):
        raise InvalidArgument(f"given order {order!r}, expected two integers >= 0: derivatives in u and in v")
    i, j = order
    recognised, function = _recognise(activation)
    if method in ("auto", "exact"):
        closed = _closed_form(recognised, i, j)
        if closed is not None:
            return _checked(closed)
        if method == "exact":
            raise InvalidArgument(
                f"given method 'exact' for {activation!r} of order {order}, which has no closed form here; "
                "use 'quadrature' or 'hermite'"
            )
    evaluate = _hermite if method == "hermite" else _quadrature
    if isinstance(recognised, _Linear) and max(order) > 1:
        raise InvalidArgument(
            f"given method {method!r} for {activation!r} of order {order}, expected orders up to 1: the second "
            "derivative is a delta function; use method 'exact'"
        )
    f, g = _derivative(function, i), _derivative(function, j)

    def numerical(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
        return _NumericalMoment.apply(q, r, s, f, g, evaluate)  # type: ignore[no-any-return]

    return _checked(numerical)


def _recognise(activation: str | Scalar) -> tuple[Any, Scalar]:
    """What has a closed form (a name, a Polynomial or a _Linear, else None), and the function itself."""
    if isinstance(activation, Polynomial):
        return activation, activation
    if isinstance(activation, str):
        return _named(activation), activation_function(activation)
    if not callable(activation):
        raise InvalidArgument(f"given activation {activation!r}, expected a name or a function of tensors")
    if isinstance(activation, nn.LeakyReLU):
        return _leaky(activation.negative_slope), activation
    if isinstance(activation, nn.GELU):
        return ("gelu" if activation.approximate == "none" else None), activation
    name = (
        _MODULES.get(type(activation)) if isinstance(activation, nn.Module) else _known_function(activation)
    )
    return (_named(name) if name else None), activation


def _known_function(activation: Scalar) -> str | None:
    try:
        return _SAME_FUNCTION.get(activation)
    except TypeError:  # not hashable
        return None


def _leaky(slope: float) -> _Linear:
    return _Linear(a=(1 + slope) / 2, b=(1 - slope) / 2)


def _named(name: str) -> Any:
    kinked = {
        "relu": _leaky(0.0),
        "leaky_relu": _leaky(0.01),
        "abs": _Linear(b=1.0),
        "sign": _Linear(c=1.0),
        "step": _Linear(c=0.5, d=0.5),
    }
    polynomials = {"identity": Polynomial((0, 1)), "square": Polynomial((0, 0, 1))}
    return kinked.get(name) or polynomials.get(name) or name


def _checked(moment: Moment) -> Moment:
    def dual(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
        for name, value in (("q", q), ("r", r), ("s", s)):
            if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
                given = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise InvalidArgument(f"given {name} of type {given}, expected a float32 or float64 tensor")
        if not q.dtype == r.dtype == s.dtype:
            raise InvalidArgument(f"given q, r, s of {q.dtype}, {r.dtype}, {s.dtype}, expected one dtype")
        try:
            torch.broadcast_shapes(q.shape, r.shape, s.shape)
        except RuntimeError as error:
            raise InvalidArgument(
                f"given q, r, s of shapes {tuple(q.shape)}, {tuple(r.shape)}, {tuple(s.shape)}, expected shapes "
                "that broadcast"
            ) from error
        return moment(q, r, s)

    return dual


# Closed forms ----------------------------------------------------------------------------------------------------


def _closed_form(recognised: Any, i: int, j: int) -> Moment | None:
    if isinstance(recognised, Polynomial):
        return functools.partial(_polynomial_moment, recognised.derivative(i), recognised.derivative(j))
    if isinstance(recognised, _Linear):
        return _linear_moment(recognised, i, j)
    if recognised in ("sin", "cos"):
        shift = int(recognised == "cos")
        return functools.partial(_sine_moment, i + shift, j + shift)
    if recognised == "exp":
        return _exp_moment
    if recognised == "erf":
        return _mirrored(_ERF, i, j)
    if recognised == "gaussian":  # exp(-u^2) is sqrt(pi)/2 times the derivative of erf
        moment = _mirrored(_ERF, i + 1, j + 1)
        return moment and _scaled(moment, math.pi / 4)
    if recognised == "gelu":
        return _mirrored(_GELU, i, j)
    return None


def _scaled(moment: Moment, factor: float) -> Moment:
    return lambda q, r, s: factor * moment(q, r, s)


def _mirrored(table: dict[tuple[int, int], Moment], i: int, j: int) -> Moment | None:
    """The entry (i, j), or (j, i) with u and v exchanged."""
    if (i, j) in table:
        return table[i, j]
    swapped = table.get((j, i))
    return swapped and (lambda q, r, s: swapped(r, q, s))


def _determinant(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """q r - s^2, never negative by rounding, with the gradient of the unclipped expression."""
    value = q * r - s * s
    return value + (value.clamp(min=0) - value).detach()


def _polynomial_moment(f: Polynomial, g: Polynomial, q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """Isserlis: E[u^m v^n] = sum over the number k of mixed pairs of the pairings times s^k q^((m-k)/2) r^((n-k)/2)."""
    q, r, s = torch.broadcast_tensors(q, r, s)
    total = torch.zeros_like(s)
    for m, a in enumerate(f.coefficients):
        for n, b in enumerate(g.coefficients):
            if a * b == 0 or (m + n) % 2:
                continue
            for k in range(m % 2, min(m, n) + 1, 2):
                x, y = (m - k) // 2, (n - k) // 2
                ways = math.factorial(m) * math.factorial(n)
                ways //= 2 ** (x + y) * math.factorial(x) * math.factorial(y) * math.factorial(k)
                total = total + a * b * ways * s**k * q**x * r**y
    return total


def _decay(exponent: Tensor) -> Tensor:
    """exp of a number that is at most 0 but for rounding."""
    return torch.exp(exponent + (exponent.clamp(max=0) - exponent).detach())


def _sine_moment(i: int, j: int, q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """sin(u + i pi/2) sin(v + j pi/2) = (cos(difference) - cos(sum)) / 2."""
    near, far = ((1, 0, -1, 0)[k % 4] for k in (i - j, i + j))
    middle = -(q + r) / 2
    if near == far:
        small = s.abs() < 1  # sinh keeps the digits that the difference of two exponentials loses
        few = torch.exp(middle) * torch.sinh(torch.where(small, s, 0.0))
        many = (_decay(middle + s) - _decay(middle - s)) / 2
        return near * torch.where(small, few, many)
    return (near * _decay(middle + s) - far * _decay(middle - s)) / 2


def _exp_moment(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    return torch.exp((q + r) / 2 + s)


def _erf_determinant(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """(1 + 2q)(1 + 2r) - 4s^2 without cancellation."""
    return 1 + 2 * (q + r) + 4 * _determinant(q, r, s)


def _erf_00(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    return (2 / math.pi) * torch.atan2(2 * s, _erf_determinant(q, r, s).sqrt())


def _erf_11(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    return (4 / math.pi) * _erf_determinant(q, r, s).rsqrt()


def _erf_02(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    return (-8 / math.pi) * s / (1 + 2 * r) * _erf_determinant(q, r, s).rsqrt()


def _erf_22(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    return (16 / math.pi) * s * _erf_determinant(q, r, s) ** -1.5


def _erf_13(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    return (-8 / math.pi) * (1 + 2 * q) * _erf_determinant(q, r, s) ** -1.5


def _erf_33(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    d = _erf_determinant(q, r, s)
    return (16 / math.pi) * (d**-1.5 + 12 * s * s * d**-2.5)


def _zero(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    return torch.zeros_like(q * r * s)


_ERF: dict[tuple[int, int], Moment] = {
    (0, 0): _erf_00,
    (0, 1): _zero,
    (1, 1): _erf_11,
    (0, 2): _erf_02,
    (1, 2): _zero,
    (2, 2): _erf_22,
    (1, 3): _erf_13,
    (2, 3): _zero,
    (3, 3): _erf_33,
}


def _gelu_parts(q: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E[Phi(u) Phi(v)], E[phi(u) phi(v)], (1 + q)(1 + r) - s^2, and the polynomial that goes with the second."""
    d = 1 + q + r + _determinant(q, r, s)
    both = 0.25 + torch.atan2(s, d.sqrt()) / (2 * math.pi)
    density = d.rsqrt() / (2 * math.pi)
    polynomial = _determinant(q, r, s) + s * s * (1 / (1 + q) + 1 / (1 + r))
    return both, density, d, polynomial


def _gelu_00(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    # Stein's identity on u Phi(u) v Phi(v), once in u and once in v.
    both, density, _, polynomial = _gelu_parts(q, r, s)
    return s * both + density * polynomial


def _gelu_11(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    # Price's theorem: the derivative of order (0, 0) by s.
    both, density, d, polynomial = _gelu_parts(q, r, s)
    return both + density * s * (2 / (1 + q) + 2 / (1 + r) - 1 + polynomial / d)


def _gelu_02(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    # Price's theorem: twice the derivative of order (0, 0) by r.
    _, density, d, polynomial = _gelu_parts(q, r, s)
    b = 1 + r
    return density * (2 * q - s * s / b - 2 * (s / b) ** 2 - (1 + q) / d * polynomial)


_GELU: dict[tuple[int, int], Moment] = {(0, 0): _gelu_00, (1, 1): _gelu_11, (0, 2): _gelu_02}


# Functions with a kink: everything follows from sqrt(q r - s^2) and the angle between u and v -------------------------


def _sine_and_cosine(q: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sin and cos of the angle between u and v, and sqrt(q r).

    Angles that rounding of s alone could make (sin^2 < 4 eps) count as 0, so that x against x is exact.
    """
    scale = q.clamp(min=0).sqrt() * r.clamp(min=0).sqrt()
    cosine = torch.where(scale > 0, s / scale.clamp(min=torch.finfo(s.dtype).tiny), 0.0).clamp(-1, 1)
    square = (1 - cosine) * (1 + cosine)
    sine = torch.where(square > 4 * torch.finfo(s.dtype).eps, square, 0.0).sqrt()
    return sine, cosine, scale


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where the denominator is 0: the value between the two slopes of a kink."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))


class _Root(torch.autograd.Function):
    """sqrt(q r - s^2); its gradient is 0 where it is 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
        sine, _, scale = _sine_and_cosine(q, r, s)
        return sine * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, r, s = ctx.saved_tensors
        per_root = gradient * _over(torch.ones_like(s), _Root.apply(q, r, s))
        return per_root * r / 2, per_root * q / 2, -per_root * s


class _SignMoment(torch.autograd.Function):
    """E[sign(u) sign(v)] = (2/pi) asin(c); at c = 1 its slope is infinite and is taken as 0, the kink's mean."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
        sine, cosine, _ = _sine_and_cosine(q, r, s)
        return (2 / math.pi) * torch.atan2(cosine, sine)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, r, s = ctx.saved_tensors
        per_root = gradient * (2 / math.pi) * _over(torch.ones_like(s), _Root.apply(q, r, s))
        along = -per_root * s / 2
        return _over(along, q), _over(along, r), per_root


class _AbsMoment(torch.autograd.Function):
    """E[|u| |v|] = (2/pi) (sqrt(q r - s^2) + s asin(c)); its gradient is finite on the diagonal."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, r: Tensor, s: Tensor) -> Tensor:
        sine, cosine, scale = _sine_and_cosine(q, r, s)
        return (2 / math.pi) * scale * (sine + cosine * torch.atan2(cosine, sine))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, r, s = ctx.saved_tensors
        root = gradient * _Root.apply(q, r, s) / math.pi
        return _over(root, q), _over(root, r), gradient * _SignMoment.apply(q, r, s)


def _linear_moment(f: _Linear, i: int, j: int) -> Moment | None:
    """Moments of a u + b |u| + c sign(u) + d; its derivative is a + b sign(u) + 2c delta(u), and so on."""
    if f.c == 0 and f.d == 0:
        table = _kink_moments(f.a, f.b)
    else:
        table = _step_moments(f.c, f.d)
    return _mirrored(table, i, j)


def _kink_moments(a: float, b: float) -> dict[tuple[int, int], Moment]:
    mean = math.sqrt(2 / math.pi)
    return {
        (0, 0): lambda q, r, s: a * a * s + b * b * _apply(_AbsMoment, q, r, s),
        (0, 1): lambda q, r, s: a * b * mean * (q.sqrt() + _over(s, r.sqrt())),
        (1, 1): lambda q, r, s: a * a + b * b * _apply(_SignMoment, q, r, s),
        (0, 2): lambda q, r, s: (2 * b * b / math.pi) * _over(_apply(_Root, q, r, s), r),
        (1, 2): lambda q, r, s: (2 * a * b / math.sqrt(2 * math.pi)) * r.rsqrt() + 0 * (q + s),
        (2, 2): lambda q, r, s: (2 * b * b / math.pi) / _apply(_Root, q, r, s),
    }


def _step_moments(c: float, d: float) -> dict[tuple[int, int], Moment]:
    return {
        (0, 0): lambda q, r, s: d * d + c * c * _apply(_SignMoment, q, r, s),
        (0, 1): lambda q, r, s: (2 * c * d / math.sqrt(2 * math.pi)) * r.rsqrt() + 0 * (q + s),
        (1, 1): lambda q, r, s: (2 * c * c / math.pi) / _apply(_Root, q, r, s),
    }


def _apply(function: type[torch.autograd.Function], q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    return function.apply(*torch.broadcast_tensors(q, r, s))  # type: ignore[no-any-return, no-untyped-call]


# Everything else ---------------------------------------------------------------------------------------------------


def _derivative(function: Scalar, order: int) -> Scalar:
    """The derivative of an elementwise function, by autograd."""
    for _ in range(order):
        function = functools.partial(_slope, function)
    return function


def _slope(function: Scalar, u: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = u if u.requires_grad else u.detach().requires_grad_()  # a slope of a slope keeps its graph
        value = function(leaf)
        if not value.requires_grad:  # a constant
            return torch.zeros_like(u)
        (slope,) = torch.autograd.grad(value.sum(), leaf, create_graph=True, allow_unused=True)
    return torch.zeros_like(u) if slope is None else slope


def _tangent(function: Scalar, u: Tensor) -> Tensor:
    """u f'(u)."""
    return u * _slope(function, u)


@functools.lru_cache(maxsize=8)
def _rule(device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the trapezoidal rule for a standard Gaussian; the weights sum to 1."""
    nodes = torch.linspace(-_REACH, _REACH, _NODES, dtype=torch.float64)
    weights = torch.exp(-nodes * nodes / 2)
    return nodes.to(device), (weights / weights.sum()).to(device)


@functools.lru_cache(maxsize=8)
def _hermite_table(device: torch.device) -> Tensor:
    """weights x normalized Hermite polynomials at the nodes, (terms, nodes)."""
    nodes, weights = _rule(torch.device("cpu"))
    rows = [torch.ones_like(nodes), nodes]
    for k in range(1, _HERMITE_TERMS - 1):
        rows.append((nodes * rows[k] - math.sqrt(k) * rows[k - 1]) / math.sqrt(k + 1))
    return (torch.stack(rows) * weights).to(device)


def _quadrature(f: Scalar, g: Scalar, q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """E[f(u) g(v)] on a grid of two independent Gaussians z, y: u = sqrt(q) z, v = sqrt(r) (c z + sqrt(1 - c^2) y)."""
    nodes, weights = (t.to(s.dtype) for t in _rule(s.device))
    sine, cosine, _ = _sine_and_cosine(q, r, s)
    shape = s.shape
    q, r, sine, cosine = (t.reshape(-1) for t in (q.clamp(min=0).sqrt(), r.clamp(min=0).sqrt(), sine, cosine))
    results = []
    step = max(1, _CHUNK // _NODES**2)
    for start in range(0, q.numel(), step):
        part = slice(start, start + step)
        direction = cosine[part, None, None] * nodes[:, None] + sine[part, None, None] * nodes
        inner = g(r[part, None, None] * direction).detach() @ weights  # [chunk, nodes of z]
        results.append((f(q[part, None] * nodes).detach() * inner) @ weights)
    return torch.cat(results).reshape(shape) if results else s.clone()


def _hermite(f: Scalar, g: Scalar, q: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """E[f(u) g(v)] = sum_k a_k b_k c^k with the Hermite coefficients of f(sqrt(q) z) and g(sqrt(r) z) (Mehler)."""
    nodes, _ = _rule(s.device)
    table = _hermite_table(s.device)
    _, cosine, _ = _sine_and_cosine(q, r, s)
    ours, theirs = (
        (h(x.clamp(min=0).sqrt().double()[..., None] * nodes).detach() @ table.T).to(s.dtype)
        for h, x in ((f, q), (g, r))
    )
    total = torch.zeros_like(cosine)
    for k in reversed(range(_HERMITE_TERMS)):
        total = total * cosine + ours[..., k] * theirs[..., k]
    return total


class _NumericalMoment(torch.autograd.Function):
    """E[f(u) g(v)]; gradients are moments again.

    By s: E[f' g'] (Price). By q at fixed correlation: E[u f'(u) g(v)] / (2q), so that functions with kinks need no
    second derivative, and nothing is singular at c = 1.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, r: Tensor, s: Tensor, f: Scalar, g: Scalar, evaluate: Any) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(q, r, s)
        ctx.functions = f, g, evaluate
        shape = torch.broadcast_shapes(q.shape, r.shape, s.shape)
        if evaluate is _quadrature:
            q, r = q.expand(shape), r.expand(shape)
        return evaluate(f, g, q, r, s.expand(shape))  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, r, s = ctx.saved_tensors
        f, g, evaluate = ctx.functions
        apply = _NumericalMoment.apply
        slopes = apply(q, r, s, functools.partial(_slope, f), functools.partial(_slope, g), evaluate)
        by_s = gradient * slopes
        by_q = by_r = None
        if ctx.needs_input_grad[0]:
            along = apply(q, r, s, functools.partial(_tangent, f), g, evaluate)
            by_q = _over(gradient * along - by_s * s, 2 * q).sum_to_size(q.shape)
        if ctx.needs_input_grad[1]:
            along = apply(q, r, s, f, functools.partial(_tangent, g), evaluate)
            by_r = _over(gradient * along - by_s * s, 2 * r).sum_to_size(r.shape)
        return by_q, by_r, by_s.sum_to_size(s.shape), None, None, None

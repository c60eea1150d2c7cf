"""Infinitely wide networks: a small algebra of layers whose kernels follow exact recursions.

As the width grows, a network's output at initialisation becomes a Gaussian process with covariance S (the NNGP kernel),
and gradient descent on its parameters becomes kernel gradient descent with the tangent kernel T (NTK; Jacot et al., arXiv
1806.07572). Layer by layer, with (u, v) the Gaussian pair of covariance S:

    dense, convolution    S <- W_std^2 S + b_std^2,      T <- W_std^2 T + S
    activation            S <- E[f(u) f(v)],             T <- T E[f'(u) f'(v)]

in the parametrization W_std / sqrt(fan_in) W a + b_std b with W, b ~ N(0, 1). Convolutions carry S for each pixel, and
for each pair of pixels where a pooling follows (Novak et al., ICLR 2019; Arora et al., NeurIPS 2019).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument, ModelError
from tensormill.numerics.dual_activations import _Linear, _recognise, activation_function, dual_activation
from tensormill.numerics.ntk import finite

__all__ = [
    "GELU",
    "Activation",
    "AvgPool",
    "Conv",
    "Dense",
    "Dropout",
    "Erf",
    "Flatten",
    "GlobalAvgPool",
    "Layer",
    "LayerNorm",
    "ReLU",
    "Residual",
    "Sequential",
    "from_module",
]  # fmt: skip

# A float32 tile of 512 x 512: measured on two-megabyte L2 caches, the best between dispatch costs and cache misses.
_TILE_ELEMENTS = 1 << 18
_PAIR_ELEMENTS = 1 << 22


@dataclass
class _State:
    """Covariances of a tile of N x M pairs of inputs between two layers.

    nngp, ntk: (N, M), (N, M, *positions) or, if `pairs`, (N, M, *positions, *positions); ntk None: not wanted.
    q, r: the same of each input with itself, (N, ...) and (M, ...); one object if the tile is symmetric.
    """

    nngp: Tensor
    ntk: Tensor | None
    q: Tensor
    r: Tensor
    positions: tuple[int, ...]
    pairs: bool
    gaussian: bool = False
    same: Tensor | None = None  # (N, M), True where both inputs are the same one
    owned: bool = False  # whether the tile may be overwritten

    def map(self, function: Callable[[Tensor, int], Tensor], **changes: Any) -> _State:
        """Apply a linear map of the positions; the function is told how many leading axes are inputs."""
        q = function(self.q, 1)
        return replace(
            self,
            nngp=function(self.nngp, 2),
            ntk=None if self.ntk is None else function(self.ntk, 2),
            q=q,
            r=q if self.r is self.q else function(self.r, 1),
            **changes,
        )

    def variances(self) -> tuple[Tensor, Tensor]:
        """Variance at each position, (N, *positions) and (M, *positions)."""
        if not (self.pairs and self.positions):
            return self.q, self.r
        return _diagonal(self.q, len(self.positions)), _diagonal(self.r, len(self.positions))


def _diagonal(value: Tensor, axes: int) -> Tensor:
    """(..., *positions, *positions) -> (..., *positions)."""
    lead = value.shape[: value.dim() - 2 * axes]
    positions = value.shape[value.dim() - axes :]
    count = math.prod(positions)
    return value.reshape(*lead, count, count).diagonal(dim1=-2, dim2=-1).reshape(*lead, *positions)


class Layer:
    """A layer of an infinitely wide network, or a composition of layers."""

    def _forward(self, state: _State) -> _State:
        raise NotImplementedError

    def _build(self, shape: tuple[int, ...], builder: finite.Builder) -> tuple[nn.Module, tuple[int, ...]]:
        raise NotImplementedError

    def _leaves(self) -> list[Layer]:
        return [self]

    def _final_linear(self) -> int | None:
        """Id of the linear layer that gives the output, None if something nonlinear or nothing follows it."""
        return None

    def kernel(
        self,
        x1: Tensor,
        x2: Tensor | None = None,
        get: str | Sequence[str] = ("nngp", "ntk"),
        batch: int | None = None,
    ) -> Any:
        """Covariance ("nngp") and tangent kernel ("ntk") of the infinitely wide network between inputs.

        Args:
            x1: (N, features) or (N, channels, *positions), float32 or float64.
            x2: (M, ...) of the same trailing shape; None: x1 against itself, computed on one triangle.
            get: "nngp", "ntk", or a sequence of them.
            batch: inputs of x1 and of x2 in a tile; None: so many that a tile stays in the cache.

        Returns:
            (N, M), or (N, M, *positions) for a network that ends with positions; a tuple of such if `get` is a sequence.
            Differentiable in x1 and x2.

        Raises:
            InvalidArgument: inputs whose shapes, dtypes or values do not fit, or an unknown kernel name.
            ModelError: layers in an order that has no Gaussian limit.
        """
        wanted = (get,) if isinstance(get, str) else tuple(get)
        if not wanted or any(name not in ("nngp", "ntk") for name in wanted):
            raise InvalidArgument(f"given get={get!r}, expected 'nngp', 'ntk' or a sequence of them")
        _check_inputs(x1, x2)
        if batch is not None and batch < 1:
            raise InvalidArgument(f"given batch={batch}, expected at least 1, or None")
        leaves = self._leaves()
        positions = tuple(x1.shape[2:])
        pairs = bool(positions) and any(isinstance(leaf, AvgPool | GlobalAvgPool) for leaf in leaves)
        if batch is None:
            per_pair = math.prod(positions) ** (2 if pairs else 1)
            elements = _PAIR_ELEMENTS if positions else _TILE_ELEMENTS
            batch = max(1, math.isqrt(elements // max(1, per_pair)))
        if any(isinstance(leaf, Activation) and leaf.kinked for leaf in leaves):
            for x in (x1,) if x2 is None else (x1, x2):
                if not bool(x.detach().flatten(1).any(dim=1).all()):
                    warnings.warn(
                        "an input is all zeros: its kernel with others is what biases give", stacklevel=2
                    )
        grad = torch.is_grad_enabled() and (x1.requires_grad or (x2 is not None and x2.requires_grad))
        dropped = any(isinstance(leaf, Dropout) for leaf in leaves)

        def tile(a: slice, b: slice) -> tuple[Tensor, ...]:
            one = x1[a]
            two = one if x2 is None and a == b else (x1 if x2 is None else x2)[b]
            state = _input_state(one, two, pairs, "ntk" in wanted)
            state.owned = not grad
            if dropped and x2 is None:
                rows = torch.arange(a.start, a.start + one.shape[0], device=x1.device)
                columns = torch.arange(b.start, b.start + two.shape[0], device=x1.device)
                state.same = rows[:, None] == columns
            state = self._forward(state)
            nngp, ntk = state.nngp, state.ntk
            if state.pairs and state.positions:
                nngp = _diagonal(nngp, len(state.positions))
                ntk = None if ntk is None else _diagonal(ntk, len(state.positions))
            values = tuple(nngp if name == "nngp" else _or_zero(ntk, nngp) for name in wanted)
            if two is one:  # rows and columns are scaled in turn: symmetric up to rounding, made exact
                values = tuple((value + value.transpose(0, 1)) / 2 for value in values)
            return values

        kernels = _assemble(tile, x1.shape[0], None if x2 is None else x2.shape[0], batch, len(wanted), grad)
        return kernels[0] if isinstance(get, str) else kernels

    def finite(
        self,
        width: int,
        inputs: int | Sequence[int],
        out_features: int = 1,
        parametrization: str = "ntk",
        seed: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> nn.Module:
        """The network at this width, drawn from its prior, as a module to train.

        Args:
            width: features of hidden dense layers and channels of hidden convolutions.
            inputs: shape of one input: features, or (channels, *positions).
            out_features: features of the last dense layer.
            parametrization: "ntk", W_std / sqrt(fan_in) W a + b_std b with standard normal W and b, whose empirical
                kernel tends to `kernel`; "standard", the same function drawn with W ~ N(0, W_std^2 / fan_in), whose
                kernel grows with the width.
            seed: of the draw; None: torch's global generator.
            dtype: of the parameters.

        Raises:
            InvalidArgument: sizes that are not positive, an unknown parametrization, or layers that do not fit the
                shape.
        """
        shape = (inputs,) if isinstance(inputs, int) else tuple(inputs)
        if width < 1 or out_features < 1 or not shape or min(shape) < 1:
            raise InvalidArgument(
                f"given width={width}, inputs={inputs!r}, out_features={out_features}, expected positive sizes"
            )
        if parametrization not in finite.PARAMETRIZATIONS:
            raise InvalidArgument(
                f"given parametrization {parametrization!r}, expected one of {', '.join(finite.PARAMETRIZATIONS)}"
            )
        linear = [leaf for leaf in self._leaves() if isinstance(leaf, Dense | Conv)]
        last = self._final_linear()
        uses = sum(id(leaf) == last for leaf in linear)
        builder = finite.Builder(width, out_features, last, uses, parametrization, seed, dtype)
        if not linear:
            raise ModelError("given a network without a dense or convolutional layer, expected at least one")
        module, _ = self._build(shape, builder)
        return module


def _or_zero(ntk: Tensor | None, nngp: Tensor) -> Tensor:
    return torch.zeros_like(nngp) if ntk is None else ntk


def _check_inputs(x1: Tensor, x2: Tensor | None) -> None:
    for name, x in (("x1", x1), ("x2", x2)):
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise InvalidArgument(f"given {name} of type {given}, expected a float32 or float64 tensor")
        if x.dim() < 2 or 0 in x.shape[1:]:
            raise InvalidArgument(
                f"given {name} of shape {tuple(x.shape)}, expected (inputs, features) or (inputs, channels, *positions)"
            )
        if not bool(x.detach().isfinite().all()):
            raise InvalidArgument(f"given {name} with values that are not finite; remove these inputs")
    if x2 is not None and (x1.shape[1:] != x2.shape[1:] or x1.dtype != x2.dtype or x1.device != x2.device):
        raise InvalidArgument(
            f"given inputs of shapes {tuple(x1.shape)} and {tuple(x2.shape)}, {x1.dtype} and {x2.dtype}, on "
            f"{x1.device} and {x2.device}, expected the same trailing shape, dtype and device"
        )


def _input_state(x1: Tensor, x2: Tensor, pairs: bool, ntk: bool) -> _State:
    channels, positions = x1.shape[1], tuple(x1.shape[2:])

    def gram(a: Tensor, b: Tensor) -> Tensor:
        if not positions:
            return a @ b.T / channels
        a, b = a.flatten(2), b.flatten(2)
        if not pairs:
            return torch.einsum("ncp,mcp->nmp", a, b).reshape(len(a), len(b), *positions) / channels
        return torch.einsum("ncp,mcr->nmpr", a, b).reshape(len(a), len(b), *positions, *positions) / channels

    def own(a: Tensor) -> Tensor:
        if not (positions and pairs):
            return a.square().mean(1)
        a = a.flatten(2)
        return torch.einsum("ncp,ncr->npr", a, a).reshape(len(a), *positions, *positions) / channels

    q = own(x1)
    nngp = gram(x1, x2)
    r = q if x2 is x1 else own(x2)
    return _State(nngp, torch.zeros_like(nngp) if ntk else None, q, r, positions, pairs)


def _assemble(
    tile: Callable[[slice, slice], tuple[Tensor, ...]],
    rows: int,
    columns: int | None,
    batch: int,
    count: int,
    grad: bool,
) -> tuple[Tensor, ...]:
    """Whole kernels from tiles; with columns None, the lower triangle is the mirrored upper one."""
    total = rows if columns is None else columns
    down = [slice(k, min(k + batch, rows)) for k in range(0, rows, batch)] or [slice(0, 0)]
    across = [slice(k, min(k + batch, total)) for k in range(0, total, batch)] or [slice(0, 0)]
    if len(down) == len(across) == 1:
        return tile(down[0], across[0])
    if grad:
        table = [[tile(a, b) for b in across] for a in down]
        return tuple(torch.cat([torch.cat([t[k] for t in row], 1) for row in table]) for k in range(count))
    out: list[Tensor] = []
    for i, a in enumerate(down):
        for b in across[i:] if columns is None else across:
            values = tile(a, b)
            if not out:
                out = [value.new_empty(rows, total, *value.shape[2:]) for value in values]
            for whole, value in zip(out, values, strict=True):
                whole[a, b] = value
                if columns is None and a != b:
                    whole[b, a] = value.transpose(0, 1)
    return tuple(out)


@dataclass(frozen=True, eq=False)
class Dense(Layer):
    """Fully connected layer, W_std / sqrt(fan_in) W a + b_std b.

    Attributes:
        W_std, b_std: standard deviations of the prior, >= 0; sqrt(2) keeps the variance through ReLU.
        features: width of this layer in `finite`; None: the network's width, or `out_features` for the last layer.
    """

    W_std: float = 1.0
    b_std: float = 0.0
    features: int | None = None

    def __post_init__(self) -> None:
        _check_deviations(self.W_std, self.b_std)

    def _forward(self, state: _State) -> _State:
        if state.positions:
            raise ModelError(
                f"given a dense layer on positions {state.positions}, expected features; put Flatten or GlobalAvgPool before it"
            )
        return _linear_layer(state, self.W_std, self.b_std)

    def _build(self, shape: tuple[int, ...], builder: finite.Builder) -> tuple[nn.Module, tuple[int, ...]]:
        if len(shape) != 1:
            raise InvalidArgument(
                f"given a dense layer on inputs of shape {shape}, expected Flatten before it"
            )
        features = self.features or builder.features(self)
        return builder.dense(shape[0], features, self.W_std, self.b_std), (features,)

    def _final_linear(self) -> int | None:
        return id(self)


def _check_deviations(W_std: float, b_std: float) -> None:
    if not (math.isfinite(W_std) and math.isfinite(b_std) and W_std >= 0 and b_std >= 0):
        raise InvalidArgument(f"given W_std={W_std}, b_std={b_std}, expected finite numbers >= 0")


def _linear_layer(state: _State, W_std: float, b_std: float) -> _State:
    """S <- W_std^2 S + b_std^2, T <- W_std^2 T + S."""
    w, b = W_std**2, b_std**2
    q = w * state.q + b
    r = q if state.r is state.q else w * state.r + b
    if state.owned:
        nngp = state.nngp
        if w != 1:
            nngp.mul_(w)
        if b:
            nngp.add_(b)
        ntk = None if state.ntk is None else torch.add(nngp, state.ntk, alpha=w, out=state.ntk)
    else:
        nngp = w * state.nngp + b
        ntk = None if state.ntk is None else w * state.ntk + nngp
    return replace(state, nngp=nngp, ntk=ntk, q=q, r=r, gaussian=True)


@dataclass(frozen=True, eq=False)
class Conv(Layer):
    """Convolution over the trailing axes of (inputs, channels, *positions), channels to infinity.

    Attributes:
        size: of the window along each axis, an odd number if padding is "same" or "circular".
        W_std, b_std: standard deviations of the prior; weights are scaled by 1 / sqrt(channels x window).
        stride: of the window.
        padding: "same" (zeros), "valid" or "circular".
        channels: of this layer in `finite`; None: the network's width.
    """

    size: int
    W_std: float = 1.0
    b_std: float = 0.0
    stride: int = 1
    padding: str = "same"
    channels: int | None = None

    def __post_init__(self) -> None:
        _check_deviations(self.W_std, self.b_std)
        if self.size < 1 or self.stride < 1:
            raise InvalidArgument(f"given size={self.size}, stride={self.stride}, expected positive integers")
        if self.padding not in ("same", "valid", "circular"):
            raise InvalidArgument(f"given padding {self.padding!r}, expected 'same', 'valid' or 'circular'")
        if self.padding != "valid" and self.size % 2 == 0:
            raise InvalidArgument(
                f"given size={self.size} with padding {self.padding!r}, expected an odd size"
            )

    def _forward(self, state: _State) -> _State:
        if not state.positions:
            raise ModelError(
                "given a convolution on features, expected positions; it must come before Flatten"
            )
        if self.padding == "circular" and min(state.positions) < self.size // 2:
            raise InvalidArgument(
                f"given positions {state.positions}, expected at least {self.size // 2} along each axis for a "
                f"circular window of {self.size}"
            )
        axes = len(state.positions)

        def windows(value: Tensor, lead: int) -> Tensor:
            for k in range(axes):
                dims = (lead + k, lead + axes + k) if state.pairs else (lead + k,)
                value = self._window_mean(value, dims)
            return value

        positions = tuple(self._length(n) for n in state.positions)
        averaged = state.map(windows, positions=positions)
        return _linear_layer(averaged, self.W_std, self.b_std)

    def _length(self, n: int) -> int:
        length = (n if self.padding != "valid" else n - self.size + 1) - 1
        if length < 0:
            raise InvalidArgument(
                f"given {n} positions, expected at least the window of {self.size}; pad the input"
            )
        return length // self.stride + 1

    def _window_mean(self, value: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Mean over a window that moves along one axis, or along both axes of pixel pairs together."""
        n = value.shape[dims[0]]
        half = self.size // 2
        padded = value
        if self.padding != "valid" and half:
            for d in dims:
                if self.padding == "circular":
                    padded = torch.cat(
                        [padded.narrow(d, n - half, half), padded, padded.narrow(d, 0, half)], d
                    )
                else:
                    shape = list(padded.shape)
                    shape[d] = half
                    border = padded.new_zeros(shape)
                    padded = torch.cat([border, padded, border], d)
        length = self._length(n)
        total: Tensor | None = None
        for offset in range(self.size):
            moved = padded
            for d in dims:
                index = [slice(None)] * moved.dim()
                index[d] = slice(offset, offset + (length - 1) * self.stride + 1, self.stride)
                moved = moved[tuple(index)]
            total = moved if total is None else total + moved
        assert total is not None
        return total / self.size

    def _build(self, shape: tuple[int, ...], builder: finite.Builder) -> tuple[nn.Module, tuple[int, ...]]:
        if len(shape) not in (2, 3):
            raise InvalidArgument(
                f"given inputs of shape {shape} to a convolution, expected (channels, 1 or 2 axes)"
            )
        channels = self.channels or builder.features(self)
        module = builder.conv(
            shape[0], channels, len(shape) - 1, self.size, self.stride, self.padding, self.W_std, self.b_std
        )
        return module, (channels, *(self._length(n) for n in shape[1:]))

    def _final_linear(self) -> int | None:
        return id(self)


@dataclass(frozen=True, eq=False)
class Activation(Layer):
    """An elementwise nonlinearity, through its dual activation.

    Attributes:
        function: what `tensormill.numerics.dual_activations.dual_activation` takes: a name, a torch function or module, a
            Polynomial, or any elementwise function.
        method: its method; "auto" takes the closed form if there is one, and otherwise a series in Hermite polynomials,
            which is the way for large kernels.
    """

    function: str | Callable[[Tensor], Tensor]
    method: str = "auto"
    kinked: bool = field(init=False, repr=False)
    _dual: Any = field(init=False, repr=False)
    _slope_dual: Any = field(init=False, repr=False)
    _linear: _Linear | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        recognised, _ = _recognise(self.function)
        linear = recognised if isinstance(recognised, _Linear) else None
        duals = []
        for order in ((0, 0), (1, 1)):
            if self.method != "auto":
                duals.append(dual_activation(self.function, order, self.method))
                continue
            try:
                duals.append(dual_activation(self.function, order, "exact"))
            except InvalidArgument:
                duals.append(dual_activation(self.function, order, "hermite"))
        object.__setattr__(self, "kinked", linear is not None)
        object.__setattr__(self, "_dual", duals[0])
        object.__setattr__(self, "_slope_dual", duals[1])
        fused = linear is not None and linear.c == linear.d == 0 and self.method in ("auto", "exact")
        object.__setattr__(self, "_linear", linear if fused else None)
        if linear is not None and (linear.c or linear.d):
            # The derivative of sign and step is 0 almost everywhere: no gradient passes them.
            object.__setattr__(self, "_slope_dual", lambda q, r, s: torch.zeros_like(q * r * s))

    def _forward(self, state: _State) -> _State:
        if not state.gaussian:
            raise ModelError(
                "given an activation on what is not Gaussian, expected a dense or convolutional layer before it"
            )
        axes = len(state.positions)
        q, r = state.variances()
        rows, columns = q, r
        if state.pairs and axes:
            ones = (1,) * axes
            rows = q.reshape(q.shape[0], 1, *q.shape[1:], *ones)
            columns = r.reshape(1, r.shape[0], *ones, *r.shape[1:])
        else:
            rows, columns = q[:, None], r[None]
        if self._linear is not None and state.owned:
            nngp, ntk = _kinked_in_place(self._linear, rows, columns, state.nngp, state.ntk)
        else:
            slope = None if state.ntk is None else self._slope_dual(rows, columns, state.nngp)
            nngp = self._dual(rows, columns, state.nngp)
            ntk = None if slope is None or state.ntk is None else state.ntk * slope
        own_q = self._own(state.q, q, axes, state.pairs)
        own_r = own_q if state.r is state.q else self._own(state.r, r, axes, state.pairs)
        return replace(state, nngp=nngp, ntk=ntk, q=own_q, r=own_r, gaussian=False)

    def _own(self, covariance: Tensor, variance: Tensor, axes: int, pairs: bool) -> Tensor:
        if not (pairs and axes):
            return self._dual(variance, variance, variance)
        ones = (1,) * axes
        n = variance.shape[0]
        return self._dual(
            variance.reshape(n, *variance.shape[1:], *ones),
            variance.reshape(n, *ones, *variance.shape[1:]),
            covariance,
        )

    def _build(self, shape: tuple[int, ...], builder: finite.Builder) -> tuple[nn.Module, tuple[int, ...]]:
        function = activation_function(self.function) if isinstance(self.function, str) else self.function
        return finite.Elementwise(function), shape


def _kinked_in_place(
    f: _Linear, q: Tensor, r: Tensor, nngp: Tensor, ntk: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One layer of a u + b |u| in eleven passes over a tile that is overwritten.

    With n = -c, phi = acos(n) = pi - theta and m = 2b^2/pi phi + a^2 - b^2: K' = m, and
    K = sqrt(q r) (2b^2/pi sqrt(1 - n^2) - n m). Cosines within rounding of 1 count as 1, as in `dual_activation`.
    """
    eps = torch.finfo(nngp.dtype).eps
    tiny = torch.finfo(nngp.dtype).tiny
    rows, columns = q.clamp(min=0).sqrt(), r.clamp(min=0).sqrt()
    weight, constant = 2 * f.b**2 / math.pi, f.a**2 - f.b**2
    negative = nngp.mul_(torch.where(rows > 0, -1 / rows.clamp(min=tiny), 0.0))
    negative.mul_(torch.where(columns > 0, 1 / columns.clamp(min=tiny), 0.0)).clamp_(max=1)
    nn.functional.threshold(negative, -1 + 2 * eps, -1.0, inplace=True)
    angle = torch.acos(negative)
    if weight != 1:
        angle.mul_(weight)
    if constant:
        angle.add_(constant)
    if ntk is not None:
        ntk.mul_(angle)
    product = angle.mul_(negative)
    sine = negative.square_().neg_().add_(1).sqrt_()
    torch.add(product.neg_(), sine, alpha=weight, out=nngp)
    nngp.mul_(rows).mul_(columns)
    return nngp, ntk


def ReLU() -> Activation:
    """max(u, 0)."""
    return Activation("relu")


def Erf() -> Activation:
    """The error function."""
    return Activation("erf")


def GELU() -> Activation:
    """u Phi(u), the exact one."""
    return Activation("gelu")


@dataclass(frozen=True, eq=False)
class Flatten(Layer):
    """(channels, *positions) to features: kernels average over positions."""

    def _forward(self, state: _State) -> _State:
        axes = len(state.positions)
        if not axes:
            return state

        def mean(value: Tensor, lead: int) -> Tensor:
            value = _diagonal(value, axes) if state.pairs else value
            return value.flatten(lead).mean(-1)

        return state.map(mean, positions=(), pairs=False)

    def _build(self, shape: tuple[int, ...], builder: finite.Builder) -> tuple[nn.Module, tuple[int, ...]]:
        return nn.Flatten(), (math.prod(shape),)


@dataclass(frozen=True, eq=False)
class AvgPool(Layer):
    """Average over windows without padding.

    Attributes:
        size: of the window along each axis.
        stride: None: the size.
    """

    size: int
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or (self.stride is not None and self.stride < 1):
            raise InvalidArgument(f"given size={self.size}, stride={self.stride}, expected positive integers")

    def _forward(self, state: _State) -> _State:
        if not state.positions:
            raise ModelError("given a pooling on features, expected positions; it must come before Flatten")
        positions = self._pooled(state.positions)

        def windows(value: Tensor, lead: int) -> Tensor:
            for d in range(lead, value.dim()):
                value = value.unfold(d, self.size, self.stride or self.size).mean(-1)
            return value

        return state.map(windows, positions=positions)

    def _pooled(self, positions: tuple[int, ...]) -> tuple[int, ...]:
        if min(positions) < self.size:
            raise InvalidArgument(f"given positions {positions}, expected at least the window of {self.size}")
        return tuple((n - self.size) // (self.stride or self.size) + 1 for n in positions)

    def _build(self, shape: tuple[int, ...], builder: finite.Builder) -> tuple[nn.Module, tuple[int, ...]]:
        kind = {2: nn.AvgPool1d, 3: nn.AvgPool2d}.get(len(shape))
        if kind is None:
            raise InvalidArgument(
                f"given inputs of shape {shape} to a pooling, expected (channels, 1 or 2 axes)"
            )
        return kind(self.size, self.stride or self.size), (shape[0], *self._pooled(shape[1:]))


@dataclass(frozen=True, eq=False)
class GlobalAvgPool(Layer):
    """Average over all positions: kernels average over all pairs of positions."""

    def _forward(self, state: _State) -> _State:
        if not state.positions:
            raise ModelError("given a pooling on features, expected positions; it must come before Flatten")
        return state.map(lambda value, lead: value.flatten(lead).mean(-1), positions=(), pairs=False)

    def _build(self, shape: tuple[int, ...], builder: finite.Builder) -> tuple[nn.Module, tuple[int, ...]]:
        return finite.GlobalAvgPool(), (shape[0],)


@dataclass(frozen=True, eq=False)
class LayerNorm(Layer):
    """Normalization over the features or channels of each position, without learned scale.

    Attributes:
        eps: added to the variance.
    """

    eps: float = 1e-5

    def _forward(self, state: _State) -> _State:
        if not state.gaussian:
            raise ModelError(
                "given a layer norm on what is not Gaussian, expected a dense or convolutional layer before it"
            )
        axes = len(state.positions)
        q, r = (((value + self.eps).rsqrt()) for value in state.variances())

        def scaled(value: Tensor, one: Tensor, two: Tensor) -> Tensor:
            """one: (N, *positions), two: (M, *positions), or the same object for (N, ...)."""
            ones = (1,) * axes
            if not (state.pairs and axes):
                return value * (one * two if value.dim() == 1 + axes else one[:, None] * two[None])
            if value.dim() == 1 + 2 * axes:
                return value * one.reshape(*one.shape, *ones) * two.reshape(len(two), *ones, *two.shape[1:])
            return (
                value
                * one.reshape(len(one), 1, *one.shape[1:], *ones)
                * two.reshape(1, len(two), *ones, *two.shape[1:])
            )

        own_q = scaled(state.q, q, q)
        return replace(
            state,
            nngp=scaled(state.nngp, q, r),
            ntk=None if state.ntk is None else scaled(state.ntk, q, r),
            q=own_q,
            r=own_q if state.r is state.q else scaled(state.r, r, r),
        )

    def _build(self, shape: tuple[int, ...], builder: finite.Builder) -> tuple[nn.Module, tuple[int, ...]]:
        return finite.ChannelNorm(self.eps), shape


@dataclass(frozen=True, eq=False)
class Dropout(Layer):
    """Dropout in training mode, with masks that are independent between inputs and positions.

    Attributes:
        rate: probability of dropping, at least 0 and below 1. Kernels of an input with itself grow by 1 / (1 - rate).
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise InvalidArgument(f"given rate={self.rate}, expected at least 0 and below 1")

    def _forward(self, state: _State) -> _State:
        factor = 1 / (1 - self.rate)
        axes = len(state.positions)
        mask: Tensor | None = None  # True where both positions are the same
        if state.pairs and axes:
            count = math.prod(state.positions)
            eye = torch.eye(count, dtype=torch.bool, device=state.q.device)
            mask = eye.reshape(*state.positions, *state.positions)

        def grown(value: Tensor, same: Tensor | None) -> Tensor:
            if same is None:
                return value * factor if mask is None else torch.where(mask, value * factor, value)
            chosen = same.reshape(*same.shape, *(1,) * (value.dim() - 2))
            return torch.where(chosen if mask is None else chosen & mask, value * factor, value)

        q = grown(state.q, None)
        same = state.same
        return replace(
            state,
            nngp=state.nngp if same is None else grown(state.nngp, same),
            ntk=state.ntk if same is None or state.ntk is None else grown(state.ntk, same),
            q=q,
            r=q if state.r is state.q else grown(state.r, None),
            gaussian=False if self.rate else state.gaussian,
        )

    def _build(self, shape: tuple[int, ...], builder: finite.Builder) -> tuple[nn.Module, tuple[int, ...]]:
        return nn.Dropout(self.rate), shape


class Sequential(Layer):
    """Layers one after another.

    Example:
        >>> network = Sequential(Dense(2**0.5), ReLU(), Dense())
        >>> x = torch.eye(2, dtype=torch.float64)
        >>> network.kernel(x, get="nngp").round(decimals=4).tolist()
        [[0.5, 0.1592], [0.1592, 0.5]]
    """

    def __init__(self, *layers: Layer) -> None:
        if not layers or not all(isinstance(layer, Layer) for layer in layers):
            raise InvalidArgument(f"given layers {layers!r}, expected at least one layer of this module")
        self.layers = layers

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.layers))})"

    def _forward(self, state: _State) -> _State:
        for layer in self.layers:
            state = layer._forward(state)
        return state

    def _leaves(self) -> list[Layer]:
        return [leaf for layer in self.layers for leaf in layer._leaves()]

    def _final_linear(self) -> int | None:
        for layer in reversed(self.layers):
            if not isinstance(layer, Flatten | AvgPool | GlobalAvgPool):
                return layer._final_linear()
        return None

    def _build(self, shape: tuple[int, ...], builder: finite.Builder) -> tuple[nn.Module, tuple[int, ...]]:
        modules = []
        for layer in self.layers:
            module, shape = layer._build(shape, builder)
            modules.append(module)
        return nn.Sequential(*modules), shape


class Residual(Layer):
    """The sum of a branch and of its input, or of a shortcut: kernels of independent branches add.

    Args:
        layers: the branch, in order; it must end with a dense or convolutional layer, whose fresh weights make it
            independent of the shortcut.
        shortcut: None: the input itself.

    Raises:
        InvalidArgument: a branch that ends otherwise.
    """

    def __init__(self, *layers: Layer, shortcut: Layer | None = None) -> None:
        self.branch = Sequential(*layers)
        self.shortcut = shortcut
        if self.branch._final_linear() is None:
            raise InvalidArgument(
                f"given the branch {self.branch!r}, expected a dense or convolutional layer at its end: without "
                "fresh weights it is not independent of the shortcut"
            )

    def __repr__(self) -> str:
        inner = repr(self.branch).removeprefix("Sequential")
        return (
            f"Residual{inner}"
            if self.shortcut is None
            else f"Residual{inner[:-1]}, shortcut={self.shortcut!r})"
        )

    def _forward(self, state: _State) -> _State:
        owned = state.owned
        copy = replace(state, nngp=state.nngp.clone(), ntk=None if state.ntk is None else state.ntk.clone())
        branch = self.branch._forward(copy if owned else state)
        base = state if self.shortcut is None else self.shortcut._forward(state)
        if branch.positions != base.positions or branch.pairs != base.pairs:
            raise ModelError(
                f"given a branch with positions {branch.positions} and a shortcut with {base.positions}, expected "
                "the same; put a shortcut with the same strides and pooling beside the branch"
            )
        q = base.q + branch.q
        return replace(
            base,
            nngp=base.nngp + branch.nngp,
            ntk=None if base.ntk is None or branch.ntk is None else base.ntk + branch.ntk,
            q=q,
            r=q if state.r is state.q else base.r + branch.r,
            gaussian=base.gaussian and branch.gaussian,
        )

    def _leaves(self) -> list[Layer]:
        return self.branch._leaves() + ([] if self.shortcut is None else self.shortcut._leaves())

    def _build(self, shape: tuple[int, ...], builder: finite.Builder) -> tuple[nn.Module, tuple[int, ...]]:
        branch, after = self.branch._build(shape, builder)
        shortcut: nn.Module = nn.Identity()
        if self.shortcut is not None:
            shortcut, shape = self.shortcut._build(shape, builder)
        if after != shape:
            raise InvalidArgument(
                f"given a branch with outputs of shape {after} and a shortcut with {shape}, expected the same; "
                "give the layer before it the network's width, or a shortcut with a dense or convolutional layer"
            )
        return finite.Sum(branch, shortcut), after


# Networks that exist already -----------------------------------------------------------------------------------------


def from_module(module: nn.Module, W_std: float | None = None, b_std: float | None = None) -> Sequential:
    """The infinite-width limit of a module's architecture.

    Supported: `nn.Sequential` of linear layers, convolutions (no groups or dilation), known activations, Flatten, average
    pooling, LayerNorm, Dropout and Identity, and what `Layer.finite` makes. The kernel is that of the NTK parametrization.

    Args:
        module: the network; its weights are read for their spread only.
        W_std: None: each layer's own, sqrt(fan_in) times the root mean square of its weights.
        b_std: None: each layer's own, the root mean square of its bias.

    Raises:
        ModelError: a module without a known limit; batch normalization couples the inputs of a batch.
    """
    layers = _converted(module, W_std, b_std)
    if not layers:
        raise ModelError(f"given {type(module).__name__} without layers, expected at least one")
    return Sequential(*layers)


def _converted(module: nn.Module, W_std: float | None, b_std: float | None) -> list[Layer]:
    if isinstance(module, nn.Sequential):
        return [layer for child in module for layer in _converted(child, W_std, b_std)]
    if isinstance(module, finite.Sum):
        shortcut = _converted(module.shortcut, W_std, b_std)
        branch = _converted(module.branch, W_std, b_std)
        return [Residual(*branch, shortcut=Sequential(*shortcut) if shortcut else None)]
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        w, b = finite.deviations(module)
        w, b = w if W_std is None else W_std, b if b_std is None else b_std
        if isinstance(module, nn.Linear):
            return [Dense(w, b)]
        return [_converted_conv(module, w, b)]
    if isinstance(module, nn.Identity):
        return []
    if isinstance(module, nn.Flatten):
        return [Flatten()]
    if isinstance(module, nn.AvgPool1d | nn.AvgPool2d):
        return [AvgPool(_single(module.kernel_size, module), _single(module.stride, module))]
    if isinstance(module, finite.GlobalAvgPool):
        return [GlobalAvgPool()]
    if isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d) and module.output_size in (
        1,
        (1, 1),
        (1,),
    ):
        return [GlobalAvgPool()]  # and a Flatten after it changes nothing
    if isinstance(module, finite.ChannelNorm | nn.LayerNorm):
        return [LayerNorm(module.eps)]
    if isinstance(module, nn.Dropout):
        return [Dropout(module.p)] if module.p else []
    if isinstance(module, finite.Elementwise):
        return [Activation(module.function)]
    if type(module).__module__ == "torch.nn.modules.activation":
        return [Activation(module)]
    why = (
        "it couples the inputs of a batch"
        if "BatchNorm" in type(module).__name__
        else "its limit is not known here"
    )
    raise ModelError(
        f"given a module {type(module).__name__}: {why}; expected dense and convolutional layers, activations, "
        "pooling, LayerNorm and Dropout in nn.Sequential, or compose infinite.Sequential by hand"
    )


def _single(value: Any, module: nn.Module) -> int:
    values = set(value) if isinstance(value, tuple | list) else {value}
    if len(values) != 1:
        raise ModelError(f"given {module}, expected the same size along every axis")
    return int(values.pop())


def _converted_conv(module: nn.Conv1d | nn.Conv2d, W_std: float, b_std: float) -> Conv:
    size = _single(module.kernel_size, module)
    if module.groups != 1 or _single(module.dilation, module) != 1:
        raise ModelError(f"given {module}, expected one group and no dilation")
    padding = module.padding if isinstance(module.padding, str) else _single(module.padding, module)
    if padding in ("same", size // 2) and size % 2:
        kind = "circular" if module.padding_mode == "circular" else "same"
        kind = "valid" if padding == 0 else kind
    elif padding in (0, "valid"):
        kind = "valid"
    else:
        raise ModelError(f"given {module}, expected padding of half the window, or none")
    if kind == "same" and module.padding_mode != "zeros":
        raise ModelError(f"given {module}, expected padding_mode 'zeros' or 'circular'")
    return Conv(size, W_std, b_std, _single(module.stride, module), kind)

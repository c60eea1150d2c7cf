"""Random features of inputs and of weights whose inner product is, on average, a neuron: f(w.x + b).

`URF` (universal random features; Sehanobish et al., arXiv 2310.13225, section 3) writes f by its Fourier transform,

    f(w.x + b) = Re E_xi [ c(xi)/p(xi) exp(2 pi i xi b) exp(u.v) ],   u = alpha x,  v = beta w,  alpha beta = 2 pi i xi,

and every exponential by a Gaussian g: exp(u.v) = E_g [L_g(u) L_g(v)] with

    L_g(z) = (1 - 4A)^(d/4) exp(A |g|^2 + sqrt(1 - 4A) g.z - z.z/2),   A < 1/8, z.z without conjugation.

x meets w only in an inner product of m complex numbers, so weights can be given, and trained, as those numbers.
`ReLUFeatures` (section 3.3) takes max(Gx, s) of both sides; on average that is an arc-cosine kernel, not a ReLU neuron.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument
from tensormill.numerics.snnk.projections import draw
from tensormill.numerics.snnk.spectrum import FourierSeries, SpectralDensity, Spectrum, spectrum_of

__all__ = ["URF", "RandomFeatures", "ReLUFeatures", "arc_cosine_kernel"]


class RandomFeatures(nn.Module):
    """A pair of feature maps with phi(x).psi(w, b) = kernel(x, w, b) on average.

    The random draws are buffers: they are in the state dict, move with the module and take no gradient, so that weights
    trained on these features and the features themselves are saved and loaded together.

    Attributes:
        in_features: d.
        num_features: m, the number of random draws.
        feature_size: real numbers that a feature vector has: m, or 2m where the features are complex.
        normalize: inputs and weights are scaled to this length first; None: they are taken as they are.
    """

    def __init__(
        self, in_features: int, num_features: int, feature_size: int, normalize: float | None
    ) -> None:
        super().__init__()
        if normalize is not None and not (normalize > 0 and math.isfinite(normalize)):
            raise InvalidArgument(f"given normalize={normalize}, expected a positive length or None")
        self.in_features = in_features
        self.num_features = num_features
        self.feature_size = feature_size
        self.normalize = normalize

    def phi(self, x: Tensor) -> Tensor:
        """Features of inputs: (..., d) to (..., feature_size)."""
        raise NotImplementedError

    def psi(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Features of neurons: (out, d) and (out,) to (out, feature_size)."""
        raise NotImplementedError

    def kernel(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """What `estimate` is on average: (..., d), (out, d), (out,) to (..., out)."""
        raise NotImplementedError

    def estimate(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """phi(x) psi(weight, bias)^T: (..., d), (out, d), (out,) to (..., out)."""
        return self.phi(x) @ self.psi(weight, bias).mT

    def forward(self, x: Tensor) -> Tensor:
        """`phi`."""
        return self.phi(x)

    def _prepared(self, name: str, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise InvalidArgument(f"given {name} of {given}, expected a real floating-point Tensor")
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise InvalidArgument(
                f"given {name} of shape {tuple(x.shape)}, expected (..., {self.in_features})"
            )
        if self.normalize is None:
            return x
        return nn.functional.normalize(x, dim=-1) * self.normalize

    def _checked_bias(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.dim() != 2:
            raise InvalidArgument(f"given weight of shape {tuple(weight.shape)}, expected (out, in_features)")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise InvalidArgument(
                f"given bias of shape {tuple(bias.shape)} with weight of shape {tuple(weight.shape)}, expected "
                f"({weight.shape[0]},)"
            )


def _real(x: Tensor) -> Tensor:
    """At least float32: exponentials of half-precision arguments would keep two digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class URF(RandomFeatures):
    """Universal random features of an activation.

    A complex feature is two real numbers, its real and its imaginary part, so a feature vector has 2m of them:
    `phi(x) @ psi(w, b).mT` is the real part of the complex product.

    Args:
        in_features: d.
        num_features: m.
        activation: a name in `tensormill.numerics.snnk.ACTIVATIONS`, a `FourierSeries` or a `SpectralDensity`.
        projection: how the vectors g are drawn: "iid", "orthogonal", "hadamard", "sorf" (biased) or "qmc".
        split: how 2 pi i xi = alpha beta is divided: "even", alpha and beta in phase (the paper's principal root), or
            "phase", alpha imaginary and beta real: then |phi| depends on |x| only, as random Fourier features do.
        A: below 1/8; 0 gives plain features, "auto" the value that is best for `norms` (negative: FAVOR++, Likhosherstov
            et al., arXiv 2205.15317, for complex arguments).
        norms: typical |x| and |w|, for which alpha and beta are balanced, A = "auto" is chosen and the frequencies of
            a series are sampled. Any values give an unbiased estimator.
        normalize: scale x and w to this length first.
        seed: of all draws.
        device: of the buffers.
        dtype: of the buffers; draws are made in float64.

    Raises:
        InvalidArgument: an unknown activation, projection or split, sizes below 1, A of 1/8 or more.

    Example:
        >>> import torch
        >>> from tensormill.numerics.snnk import URF
        >>> x, w = torch.full((1, 4), 0.3), torch.full((1, 4), 0.5)
        >>> features = URF(4, 4096, "cos", projection="orthogonal", dtype=torch.float64)
        >>> abs(float(features.estimate(x.double(), w.double())) - 0.825) < 0.02  # cos(0.6)
        True
    """

    log_scale: Tensor
    phi_table: Tensor
    psi_table: Tensor
    phase: Tensor

    def __init__(
        self,
        in_features: int,
        num_features: int,
        activation: str | Spectrum = "cos",
        *,
        projection: str = "iid",
        split: Literal["even", "phase"] = "even",
        A: float | Literal["auto"] = 0.0,
        norms: tuple[float, float] = (1.0, 1.0),
        normalize: float | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_features, 2 * num_features, normalize)
        self.spectrum = spectrum_of(activation)
        if split not in ("even", "phase"):
            raise InvalidArgument(f"given split {split!r}, expected 'even' or 'phase'")
        if len(norms) != 2 or not all(n > 0 and math.isfinite(n) for n in norms):
            raise InvalidArgument(f"given norms={norms}, expected two positive lengths, of x and of w")
        generator = torch.Generator().manual_seed(seed)
        self.projection, uniform = draw(projection, num_features, in_features, generator)
        self.split = split
        self.norms = (float(norms[0]), float(norms[1]))
        if normalize is not None:
            self.norms = (float(normalize), float(normalize))
        self.balance = (self.norms[1] / self.norms[0]) ** 0.5
        self._angle = math.pi / 4 if split == "even" else math.pi / 2
        self.A = self._best_A() if A == "auto" else float(A)
        if not self.A < 0.125:
            raise InvalidArgument(
                f"given A={A}, expected less than 1/8 (the features' variance is infinite there)"
            )
        omega, amplitude, phase = self._sampled(uniform)
        lengths = self.projection.dense().square().sum(-1)
        log_scale = (
            0.25 * in_features * math.log1p(-4 * self.A) + self.A * lengths - 0.5 * math.log(num_features)
        )
        beta = math.pi / 2 - self._angle
        self.register_buffer("phi_table", self._table(omega, self.balance, self._angle))
        self.register_buffer("psi_table", self._table(omega, 1 / self.balance, beta))
        self.register_buffer("log_scale", torch.stack([log_scale, log_scale + amplitude.log()]))
        self.register_buffer("phase", torch.stack([phase, omega]))
        self.to(device=device, dtype=dtype or torch.get_default_dtype())

    def _table(self, omega: Tensor, stretch: float, angle: float) -> Tensor:
        """Factors of g.x and |x|^2 in the real part and in the imaginary part of log L_g(sqrt(omega) stretch e^(i angle) x)."""
        slope = math.sqrt(1 - 4 * self.A) * stretch * omega.sqrt()
        square = -0.5 * stretch**2 * omega
        # exact zeros where cos(pi/2) would leave 6e-17: they multiply |x|^2, which may be large
        c, s, c2, s2 = (
            round(v, 15) for v in (math.cos(angle), math.sin(angle), math.cos(2 * angle), math.sin(2 * angle))
        )
        return torch.stack([slope * c, square * c2, slope * s, square * s2])

    def _sampled(self, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """2 pi xi, |c/p| and the angle of c/p for every draw, (m,) each."""
        spectrum = self.spectrum
        if isinstance(spectrum, FourierSeries):
            omega, size, angle, probability = self._series()
            index = torch.searchsorted(probability.cumsum(0)[:-1].contiguous(), uniform)
            return omega[index], (size / probability)[index], angle[index]
        xi = spectrum.proposal.icdf(uniform).to(torch.float64)
        ratio = spectrum.tau(xi).to(torch.complex128) / spectrum.proposal.log_prob(xi).exp()
        if not bool(torch.view_as_real(ratio).isfinite().all()):
            raise InvalidArgument(
                f"{spectrum.name}: given tau over proposal that is not finite, expected a proposal that is positive "
                "wherever tau is not 0"
            )
        # xi < 0 has the same real part as its conjugate at |xi|
        return 2 * math.pi * xi.abs(), ratio.abs(), ratio.angle() * xi.sign()

    def _series(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """2 pi xi, |c|, the angle of c and the probability of every frequency that a series has."""
        assert isinstance(self.spectrum, FourierSeries)
        omega = 2 * math.pi * torch.tensor(self.spectrum.frequencies, dtype=torch.float64)
        coefficients = torch.tensor(self.spectrum.coefficients, dtype=torch.complex128)
        kept = coefficients != 0
        omega, coefficients = omega[kept], coefficients[kept]
        size = coefficients.abs()
        # |c| times the root of a sample's second moment, for x orthogonal to w, is the best law of the frequencies
        x2, w2 = (torch.tensor(n**2, dtype=torch.float64) for n in self.norms)
        logits = (
            size.log() + 0.5 * self._log_moments(omega, x2, w2, torch.zeros((), dtype=torch.float64))[0].real
        )
        return omega, size, coefficients.angle(), torch.softmax(logits, 0)

    def _log_moments(self, omega: Tensor, x2: Tensor, w2: Tensor, xw: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of E|L_g(u) L_g(v)|^2 (real, as complex) and of E (L_g(u) L_g(v))^2 for |x|^2, |w|^2 and x.w.

        From E exp(4A |g|^2 + 2 s g.q) = (1 - 8A)^(-d/2) exp(2 s^2 q.q / (1 - 8A)), with s^2 = 1 - 4A.
        """
        A, d, t2 = self.A, self.in_features, self.balance**2
        factor = d * math.log1p(-4 * A) - 0.5 * d * math.log1p(-8 * A)
        k = (1 - 4 * A) / (1 - 8 * A)
        c, s = math.cos(self._angle), math.sin(self._angle)
        real_squared = c * c * t2 * x2 + s * s * w2 / t2 + 2 * c * s * xw
        difference = math.cos(2 * self._angle) * (t2 * x2 - w2 / t2)
        modulus = factor + omega * (2 * k * real_squared - difference)
        turn = complex(math.cos(2 * self._angle), math.sin(2 * self._angle))
        squares = turn * (t2 * x2) + (-turn.conjugate()) * (w2 / t2)
        square = factor + omega * ((2 * k - 1) * squares + 4j * k * xw)
        return modulus.to(torch.complex128), square

    def _best_A(self) -> float:
        """Least second moment at the norms, x orthogonal to w: 16 d A^2 - (2d - 4 phi) A - phi = 0, phi = |Re(u + v)|^2."""
        d = self.in_features
        if isinstance(self.spectrum, FourierSeries):
            sizes = [abs(c) for c in self.spectrum.coefficients]
            mean = sum(s * xi for s, xi in zip(sizes, self.spectrum.frequencies, strict=True)) / sum(sizes)
        else:
            uniform = (torch.arange(999, dtype=torch.float64) + 0.5) / 999
            mean = float(self.spectrum.proposal.icdf(uniform).abs().mean())
        c, s = math.cos(self._angle), math.sin(self._angle)
        x2, w2 = self.norms[0] ** 2 * self.balance**2, self.norms[1] ** 2 / self.balance**2
        phi = 2 * math.pi * mean * (c * c * x2 + s * s * w2)
        half = 2 * d - 4 * phi
        return (half - math.sqrt(half**2 + 64 * d * phi)) / (32 * d)

    def _features(
        self, x: Tensor, table: Tensor, log_scale: Tensor, turn: Tensor | None, sign: float
    ) -> Tensor:
        wide = _real(x)
        projected = self.projection(wide)
        squared = wide.square().sum(-1, keepdim=True)
        table = table.to(wide.dtype)
        size = torch.exp(projected * table[0] + squared * table[1] + log_scale.to(wide.dtype))
        angle = projected * table[2] + squared * table[3]
        if turn is not None:
            angle = angle + turn.to(wide.dtype)
        return torch.cat([size * angle.cos(), size * angle.sin() * sign], dim=-1).to(x.dtype)

    def phi(self, x: Tensor) -> Tensor:
        """Features of inputs.

        Args:
            x: (..., d), float; half precision is computed in float32 and rounded once.

        Returns:
            (..., 2m), x's dtype: real parts, then imaginary parts.

        Raises:
            InvalidArgument: another last dimension, or x is not real.
        """
        return self._features(self._prepared("x", x), self.phi_table, self.log_scale[0], None, 1.0)

    def psi(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Features of neurons.

        Args:
            weight: (out, d), float.
            bias: (out,); None: 0.

        Returns:
            (out, 2m): real parts, then imaginary parts with the sign that makes the product with phi its real part.

        Raises:
            InvalidArgument: shapes that don't fit.
        """
        weight = self._prepared("weight", weight)
        self._checked_bias(weight, bias)
        turn = self.phase[0] if bias is None else self.phase[0] + _real(bias).unsqueeze(-1) * self.phase[1]
        return self._features(weight, self.psi_table, self.log_scale[1], turn, -1.0)

    def kernel(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """f(weight x + bias), f being the series itself where one stands for the activation.

        Args:
            x: (..., d).
            weight: (out, d).
            bias: (out,).

        Returns:
            (..., out).
        """
        x, weight = self._prepared("x", x), self._prepared("weight", weight)
        self._checked_bias(weight, bias)
        return self.spectrum(nn.functional.linear(x, weight, bias))

    def variance(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Exact variance of `estimate` over independent draws, projection "iid": the other kinds are measured against it.

        With Z one draw's complex term: Var = (E|Z|^2 + Re E Z^2 - 2 f^2) / (2m), each mean over g in closed form, over
        a series' frequencies as a sum and over a density's by quadrature.

        Args:
            x: (n, d).
            weight: (out, d).
            bias: (out,).

        Returns:
            (n, out), float64; infinite where the second moment is.

        Raises:
            InvalidArgument: shapes that don't fit.
        """
        x, weight = self._prepared("x", x).double(), self._prepared("weight", weight).double()
        self._checked_bias(weight, bias)
        xw = x @ weight.mT
        b = torch.zeros_like(weight[:, 0]) if bias is None else bias.double()
        x2, w2 = x.square().sum(-1).unsqueeze(-1).expand_as(xw), weight.square().sum(-1).expand_as(xw)
        if isinstance(self.spectrum, FourierSeries):
            second = self._series_second_moment(x2, w2, xw, b)
        else:
            second = self._density_second_moment(x2, w2, xw, b)
        return (second - self.spectrum(xw + b).square()) / self.num_features

    def _series_second_moment(self, x2: Tensor, w2: Tensor, xw: Tensor, b: Tensor) -> Tensor:
        """E (Re Z)^2, (n, out)."""
        omega, size, angle, probability = (v.to(xw.device) for v in self._series())
        modulus, square = self._log_moments(omega, x2.unsqueeze(-1), w2.unsqueeze(-1), xw.unsqueeze(-1))
        turn = 2j * (angle + omega * b.unsqueeze(-1))
        return 0.5 * ((modulus.exp() + (square + turn).exp()).real * (size**2 / probability)).sum(-1)

    def _density_second_moment(self, x2: Tensor, w2: Tensor, xw: Tensor, b: Tensor) -> Tensor:
        """E (Re Z)^2, (n, out), by quadrature over xi; infinite where the integrand grows."""
        from scipy.integrate import quad

        spectrum = self.spectrum
        assert isinstance(spectrum, SpectralDensity)

        def integrand(xi: float, *arguments: float) -> tuple[float, float]:
            """Logarithm of the part of |Z|^2, and the real part's share of it."""
            point = torch.tensor(xi, dtype=torch.float64)
            tau, log_p = complex(spectrum.tau(point)), float(spectrum.proposal.log_prob(point))
            if tau == 0:
                return -math.inf, 0.0
            omega = 2 * math.pi * abs(xi)
            moments = [torch.tensor(v, dtype=torch.float64) for v in arguments[:3]]
            modulus, square = self._log_moments(torch.tensor(omega, dtype=torch.float64), *moments)
            angle = math.atan2(tau.imag, tau.real) * (1 if xi >= 0 else -1)
            turn = 2 * (angle + omega * arguments[3])
            ratio = complex(square) + 1j * turn - complex(modulus)
            share = 0.5 * (1 + math.exp(min(ratio.real, 0.0)) * math.cos(ratio.imag))
            return 2 * math.log(abs(tau)) - log_p + complex(modulus).real, share

        def moment(*arguments: float) -> float:
            # tails are exponential or lighter: where the integrand still grows this far out, it does not stop
            tail = [integrand(xi, *arguments)[0] for xi in (20.0, 40.0)]
            if tail[1] > -math.inf and tail[1] >= tail[0]:
                return math.inf

            def value(xi: float) -> float:
                log, share = integrand(xi, *arguments)
                return math.exp(log) * share if log < 700 else math.inf

            return sum(quad(value, *ends, limit=200)[0] for ends in ((-40.0, 0.0), (0.0, 40.0)))

        flat = [v.expand_as(xw).flatten().tolist() for v in (x2, w2, xw, b)]
        values = [moment(*arguments) for arguments in zip(*flat, strict=True)]
        return torch.tensor(values, dtype=torch.float64, device=xw.device).reshape(xw.shape)

    def relative_std(self, x_norm: float, weight_norm: float) -> float:
        """Predicted standard deviation of an estimate over the activation's root mean square.

        For x orthogonal to w, and arguments spread evenly over [-|x||w|, |x||w|]. Above 1 the estimate says little; it
        grows exponentially with the norms.

        Args:
            x_norm: |x|.
            weight_norm: |w|.
        """
        x, w = torch.zeros(2, 1, max(self.in_features, 2), dtype=torch.float64)
        x2, w2 = (torch.full((1, 1), n**2, dtype=torch.float64) for n in (x_norm, weight_norm))
        zero = x[:, :1] * w[:, :1]
        moment = (
            self._series_second_moment
            if isinstance(self.spectrum, FourierSeries)
            else self._density_second_moment
        )
        second = float(moment(x2, w2, zero, zero[0]))
        grid = torch.linspace(-1, 1, 201, dtype=torch.float64) * (x_norm * weight_norm)
        typical = float(self.spectrum(grid).square().mean().sqrt())
        at_zero = float(self.spectrum(zero))
        deviation = math.sqrt(max(second - at_zero**2, 0.0) / self.num_features)
        return deviation / typical if typical else math.inf

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.num_features}, {self.spectrum.name!r}, split={self.split!r}, A={self.A:.4g}"


def arc_cosine_kernel(x: Tensor, weight: Tensor) -> Tensor:
    """E over g ~ N(0, I) of relu(g.x) relu(g.w) = |x| |w| (sin t + (pi - t) cos t) / (2 pi), t the angle between them.

    Cho and Saul, Kernel methods for deep learning (2009), order 1.

    Args:
        x: (..., d).
        weight: (out, d).

    Returns:
        (..., out); 0 where a vector is 0.

    Raises:
        InvalidArgument: last dimensions that differ.
    """
    if x.shape[-1] != weight.shape[-1]:
        raise InvalidArgument(
            f"given x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)}, expected equal last dimensions"
        )
    lengths = x.norm(dim=-1, keepdim=True) * weight.norm(dim=-1)
    cosine = (x @ weight.mT / lengths.clamp_min(torch.finfo(x.dtype).tiny)).clamp(-1, 1)
    angle = torch.acos(cosine)
    return lengths * ((1 - cosine**2).sqrt() + (math.pi - angle) * cosine) / (2 * math.pi)


class ReLUFeatures(RandomFeatures):
    """Rectified projections max(Gx, s) / sqrt(m) of inputs and weights.

    For s = 0 their inner product is on average the arc-cosine kernel of order 1, |x||w| (sin t + (pi - t) cos t)/(2 pi)
    with t the angle between x and w: not a ReLU neuron, but a layer of its own. With a bias, x gets a further
    coordinate 1 and w the further coordinate b.

    Args:
        in_features: d.
        num_features: m.
        shift: s, the least value of a feature; below 0 it lets negative values through (the paper uses -5 where a
            trained layer is replaced).
        bias: whether psi takes a bias.
        projection: "iid", "orthogonal", "hadamard", "sorf" or "qmc".
        normalize: scale x and w to this length first; the paper's code takes d ** 0.25.
        seed: of the projection.
        device: of the buffers.
        dtype: of the buffers.

    Raises:
        InvalidArgument: an unknown projection, sizes below 1, a shift that is not finite.
    """

    def __init__(
        self,
        in_features: int,
        num_features: int,
        *,
        shift: float = 0.0,
        bias: bool = False,
        projection: str = "orthogonal",
        normalize: float | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_features, num_features, normalize)
        if not math.isfinite(shift):
            raise InvalidArgument(f"given shift={shift}, expected a finite number")
        self.shift = float(shift)
        self.bias = bias
        generator = torch.Generator().manual_seed(seed)
        self.projection, _ = draw(projection, num_features, in_features + bias, generator)
        self.to(device=device, dtype=dtype or torch.get_default_dtype())

    def _rectified(self, x: Tensor) -> Tensor:
        return self.projection(x).clamp_min(self.shift) * self.num_features**-0.5

    def _extended(self, x: Tensor, last: Tensor | float) -> Tensor:
        if not self.bias:
            return x
        if isinstance(last, float):
            return nn.functional.pad(x, (0, 1), value=last)
        return torch.cat([x, last.to(x).unsqueeze(-1)], dim=-1)

    def phi(self, x: Tensor) -> Tensor:
        """Features of inputs: (..., d) to (..., m), x's dtype.

        Raises:
            InvalidArgument: another last dimension, or x is not real.
        """
        return self._rectified(self._extended(self._prepared("x", x), 1.0))

    def _neurons(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = self._prepared("weight", weight)
        self._checked_bias(weight, bias)
        if bias is not None and not self.bias:
            raise InvalidArgument(
                "given a bias to features without one, expected ReLUFeatures(..., bias=True)"
            )
        return self._extended(weight, 0.0 if bias is None else bias)

    def psi(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Features of neurons: (out, d) and (out,) to (out, m).

        Raises:
            InvalidArgument: shapes that don't fit, or a bias where the features have none.
        """
        return self._rectified(self._neurons(weight, bias))

    def kernel(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The arc-cosine kernel: (..., d), (out, d), (out,) to (..., out).

        Raises:
            InvalidArgument: a shift other than 0, for which there is no closed form.
        """
        if self.shift != 0:
            raise InvalidArgument(f"given shift={self.shift}, expected 0: other shifts have no closed form")
        return arc_cosine_kernel(self._extended(self._prepared("x", x), 1.0), self._neurons(weight, bias))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.num_features}, shift={self.shift}, bias={self.bias}"

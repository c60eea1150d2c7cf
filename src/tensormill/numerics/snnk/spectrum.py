"""Activations by their Fourier transform: f(z) = Re of a sum or integral of c(xi) exp(2 pi i xi z) over xi >= 0.

A real function's spectrum at -xi is the conjugate of that at xi, so half of it says everything and sampling a pair
(xi, -xi), as the paper does, gives the same real part twice. sin and cos have one frequency; a Gaussian and the
hyperbolic secant have densities (`SpectralDensity`); tanh, ReLU, GELU and the like have spectra that are no functions,
and get a Fourier series that equals them on an interval (`FourierSeries.fit`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument

__all__ = ["ACTIVATIONS", "FourierSeries", "HyperbolicSecant", "SpectralDensity", "Spectrum", "spectrum_of"]

_TURN = 2 * math.pi


@dataclass(frozen=True)
class FourierSeries:
    """f(z) = sum over k of Re(coefficients[k] exp(2 pi i frequencies[k] z)).

    Args:
        name: shown in messages.
        frequencies: per unit of z, each at least 0.
        coefficients: complex, one for each frequency.
        bound: |z| up to which the series stands for the function it was fitted to; infinite when it is exact.
        error: largest difference from that function within the bound.
        function: that function; None: the series itself.
    """

    name: str
    frequencies: tuple[float, ...]
    coefficients: tuple[complex, ...]
    bound: float = math.inf
    error: float = 0.0
    function: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.frequencies or len(self.frequencies) != len(self.coefficients):
            raise InvalidArgument(
                f"{self.name}: given {len(self.frequencies)} frequencies and {len(self.coefficients)} coefficients, "
                "expected one coefficient for each of at least one frequency"
            )
        if not all(xi >= 0 and math.isfinite(xi) for xi in self.frequencies):
            raise InvalidArgument(
                f"{self.name}: given a frequency below 0, expected the half spectrum; fold xi < 0 into its conjugate"
            )
        if not any(self.coefficients):
            raise InvalidArgument(f"{self.name}: given coefficients that are all 0, expected one that is not")

    def __call__(self, z: Tensor) -> Tensor:
        """The series at z, any shape, float."""
        angles = _TURN * torch.tensor(self.frequencies, dtype=z.dtype, device=z.device) * z.unsqueeze(-1)
        coefficients = torch.tensor(self.coefficients, dtype=torch.complex128)
        real, imaginary = (part.to(z) for part in (coefficients.real, coefficients.imag))
        return angles.cos() @ real - angles.sin() @ imaginary

    @classmethod
    def fit(
        cls,
        function: Callable[[Tensor], Tensor],
        *,
        bound: float = 4.0,
        harmonics: int = 8,
        stretch: float = 2.0,
        ridge: float = 1e-5,
        name: str = "function",
    ) -> FourierSeries:
        """A short series that equals a function on [-bound, bound] and is free outside.

        Least squares at Chebyshev points for a series of period 2 stretch bound (a Fourier extension; Huybrechs, SIAM
        J. Numer. Anal. 47, 2010): as nothing is asked of it outside, no jump at the ends of the period slows its
        convergence, and few, low frequencies are needed. Low matters: the estimator's variance grows exponentially
        with the frequency. The ridge keeps the coefficients, which enter the variance too, from growing large.

        Args:
            function: of a float64 tensor, elementwise, real.
            bound: half of the interval.
            harmonics: number of frequencies beside 0.
            stretch: period over 2 bound, above 1.
            ridge: weight of the squared coefficients, for one of the points, at least 0.
            name: shown in messages.

        Raises:
            InvalidArgument: a setting out of its range, or a function that is not finite on the interval.

        Example:
            >>> import torch
            >>> series = FourierSeries.fit(torch.tanh, bound=3.0, harmonics=8)
            >>> series.error < 1e-2
            True
        """
        if not (bound > 0 and math.isfinite(bound)) or harmonics < 1 or stretch <= 1 or ridge < 0:
            raise InvalidArgument(
                f"given bound={bound}, harmonics={harmonics}, stretch={stretch}, ridge={ridge}, expected bound > 0, "
                "harmonics >= 1, stretch > 1, ridge >= 0"
            )
        count = 40 * (harmonics + 1)
        z = bound * torch.cos(math.pi * (torch.arange(count, dtype=torch.float64) + 0.5) / count)
        values = function(z).to(torch.float64)
        if values.shape != z.shape or not bool(values.isfinite().all()):
            raise InvalidArgument(
                f"{name}: given a function that is not finite and elementwise on [-{bound}, {bound}], expected one "
                "real number for each z; choose a smaller bound"
            )
        frequencies = torch.arange(harmonics + 1, dtype=torch.float64) / (2 * stretch * bound)
        angles = _TURN * frequencies * z.unsqueeze(-1)
        columns = torch.cat([angles.cos(), -angles[:, 1:].sin()], dim=-1)
        weights = columns.new_full((columns.shape[1],), (ridge * count) ** 0.5).diag()
        rows = torch.cat([columns, weights])
        right = torch.cat([values, values.new_zeros(len(weights))]).unsqueeze(-1)
        solution = torch.linalg.lstsq(rows, right, driver="gelsd").solution.squeeze(-1)
        imaginary = torch.cat([solution.new_zeros(1), solution[harmonics + 1 :]])
        fitted = cls(
            name,
            tuple(frequencies.tolist()),
            tuple(torch.complex(solution[: harmonics + 1], imaginary).tolist()),
            bound,
            function=function,
        )
        grid = torch.linspace(-bound, bound, 4001, dtype=torch.float64)
        error = float((fitted(grid) - function(grid)).abs().max())
        return cls(name, fitted.frequencies, fitted.coefficients, bound, error, function)


@dataclass(frozen=True)
class SpectralDensity:
    """f(z) = integral over the real line of tau(xi) exp(2 pi i xi z), sampled from a proposal by importance.

    Args:
        name: shown in messages.
        tau: the Fourier transform of f, real or complex, of float64 frequencies; tau(-xi) is the conjugate of tau(xi).
        proposal: law of the frequencies on the whole line, with `icdf` and `log_prob`, as `torch.distributions` have
            them; positive wherever tau is not 0.
        function: f; None: not known in closed form.
    """

    name: str
    tau: Callable[[Tensor], Tensor]
    proposal: Any
    function: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not (hasattr(self.proposal, "icdf") and hasattr(self.proposal, "log_prob")):
            raise InvalidArgument(
                f"{self.name}: given a proposal of type {type(self.proposal).__name__}, expected icdf and log_prob; "
                "use one of torch.distributions, such as Normal or Laplace"
            )

    def __call__(self, z: Tensor) -> Tensor:
        """f at z.

        Raises:
            InvalidArgument: no function was given.
        """
        if self.function is None:
            raise InvalidArgument(f"{self.name}: given no function beside tau, expected function=...")
        return self.function(z)


Spectrum = FourierSeries | SpectralDensity


class HyperbolicSecant:
    """The law with density pi sech(pi^2 xi), the Fourier transform of sech."""

    def icdf(self, uniform: Tensor) -> Tensor:
        """Inverse of the distribution function."""
        return torch.tan(math.pi / 2 * uniform).log() / math.pi**2

    def log_prob(self, xi: Tensor) -> Tensor:
        """Logarithm of the density."""
        y = (math.pi**2 * xi).abs()
        return math.log(2 * math.pi) - y - torch.log1p(torch.exp(-2 * y))


def _gauss() -> SpectralDensity:
    proposal = torch.distributions.Normal(
        torch.zeros((), dtype=torch.float64), torch.tensor(1 / _TURN, dtype=torch.float64)
    )
    return SpectralDensity(
        "gauss",
        lambda xi: math.sqrt(_TURN) * torch.exp(-0.5 * (_TURN * xi) ** 2),
        proposal,
        lambda z: torch.exp(-0.5 * z**2),
    )


def _sech() -> SpectralDensity:
    return SpectralDensity(
        "sech",
        lambda xi: math.pi / torch.cosh(math.pi**2 * xi),
        HyperbolicSecant(),
        lambda z: 1 / torch.cosh(z),
    )


# On [-4, 4]: beyond it pre-activations of a normalized layer are rare, and a series that reaches further needs no
# lower frequencies but more of them.
_FITTED: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "softplus": nn.functional.softplus,
    "relu": torch.relu,
}

ACTIVATIONS: tuple[str, ...] = ("cos", "sin", "gauss", "sech", *_FITTED)
"""Names that `spectrum_of` knows."""


def spectrum_of(activation: str | Spectrum) -> Spectrum:
    """The spectrum of an activation.

    Args:
        activation: a name in `ACTIVATIONS`, or a spectrum, which is returned. tanh, sigmoid, gelu, silu, softplus and
            relu are series that hold for |z| up to 4; fit your own with `FourierSeries.fit` for another interval.

    Raises:
        InvalidArgument: a name without a known spectrum.
    """
    if isinstance(activation, (FourierSeries, SpectralDensity)):
        return activation
    if activation == "cos":
        return FourierSeries("cos", (1 / _TURN,), (1 + 0j,), function=torch.cos)
    if activation == "sin":
        return FourierSeries("sin", (1 / _TURN,), (-1j,), function=torch.sin)
    if activation == "gauss":
        return _gauss()
    if activation == "sech":
        return _sech()
    if activation in _FITTED:
        return FourierSeries.fit(_FITTED[activation], name=activation)
    close = get_close_matches(str(activation), ACTIVATIONS, 1)
    hint = (
        f"did you mean {close[0]!r}?" if close else "fit a series with FourierSeries.fit(function, bound=...)"
    )
    raise InvalidArgument(
        f"given activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}, or a FourierSeries or "
        f"SpectralDensity; {hint}"
    )

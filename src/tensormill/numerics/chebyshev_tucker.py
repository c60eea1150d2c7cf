"""Functions of several variables on a box as a Tucker tensor of Chebyshev coefficients: mesh-free, small, exact calculus.

f(x_1, ..., x_d) ~ sum_{a, b, ...} core[a, b, ...] v_1a(x_1) v_2b(x_2) ...,  v_ka a Chebyshev series of degree < m_k.

A function is sampled at a tensor grid of Chebyshev nodes (some hundred per variable, not thousands), an exact linear map
turns values into coefficients, and these are compressed; so what is stored is a function, evaluated anywhere, on any
grid, with its gradient. A sum of separable terms (CP), such as the long-range part of a potential of many charges, is
interpolated factor by factor, in blocks, and never sampled on a grid.

Source: Benner, Khoromskij, Khoromskaia, Sun, arXiv 2503.01696; its algorithms 1 to 4 are `ChebTucker.from_function`,
`from_grid`, `from_cp(method="full")` and `from_cp(method="reduced")`. The cross approximation follows Chebfun3F
(Dolgov, Kressner, Stroessner 2021).
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensormill.errors import CheckpointError, InvalidArgument
from tensormill.numerics import chebyshev
from tensormill.numerics.factorized import (
    CPTensor,
    FactorSpectra,
    TuckerTensor,
    contract_rows,
    hooi,
    mode_product,
    sthosvd,
    unfold,
)

__all__ = ["Accuracy", "ChebTucker", "Factor", "SampledError"]

Domain = Sequence[Sequence[float]]
Function = Callable[..., Any]
Factor = Tensor | Callable[[Tensor, slice], Tensor]
"""One mode of a CP sum: values (n, R) on a grid, or a function of points (m,) and a slice of the terms: (m, terms)."""

_FIRST_M = 17
_TAIL = 0.05
_SHARE = 0.9  # of tol goes to the ranks where chopping takes the rest
_SLAB = 1 << 18
_BLOCK_NUMBERS = 1 << 21
_FORMAT = "tensormill.chebyshev_tucker.1"


@dataclass(frozen=True)
class Accuracy:
    """What is known of the error from the construction itself.

    Attributes:
        tails: per mode, norm of the last twentieth of the coefficients (at least two) over the norm of all: how far the
            interpolation has converged. About the rounding of the dtype for a resolved function.
        compression: bound on the compression error, relative to the Frobenius norm of the coefficients; infinite where there
            is none: with a given rank, and by cross approximation.
        sup_bound: bound on the largest compression error over the box, absolute: |T_k| <= 1, so it is
            sqrt(number of coefficients) times the Frobenius error; mostly far too large.
        samples: how many values of the function were asked for.
    """

    tails: tuple[float, ...]
    compression: float
    sup_bound: float
    samples: int


@dataclass(frozen=True)
class SampledError:
    """Error at random points of the box.

    Attributes:
        maximum, rms: absolute errors.
        scale: largest absolute value of the reference at the same points.
        points: how many points.
    """

    maximum: float
    rms: float
    scale: float
    points: int

    @property
    def relative(self) -> float:
        """Largest error over largest value."""
        return self.maximum / self.scale if self.scale > 0 else (math.inf if self.maximum > 0 else 0.0)


@dataclass(frozen=True, eq=False, repr=False)
class ChebTucker:
    """A function on a box in functional Tucker format.

    Made by `from_function`, `from_grid`, `from_cp` or `load`; `tol` is everywhere relative to the Frobenius norm of the
    coefficient tensor, which is close to the root mean square of the function, and so of the order of the sup norm.

    Args:
        coefficients: Tucker tensor of shape (m_1, ..., m_d): core, and factors whose columns are Chebyshev series.
        domain: (a, b) per variable.
        accuracy: what the construction knows of its error; None after arithmetic and `load`.
        reference: the function that was approximated, where there is one.

    Example:
        >>> import torch
        >>> f = ChebTucker.from_function(lambda x: torch.exp(-x.square().sum(-1)), [(-1, 1)] * 3, m=33, tol=1e-10)
        >>> f.ranks
        (1, 1, 1)
        >>> bool((f(torch.zeros(3, dtype=torch.float64)) - 1).abs() < 1e-9)
        True
    """

    coefficients: TuckerTensor
    domain: tuple[tuple[float, float], ...]
    accuracy: Accuracy | None = None
    reference: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "domain", _checked_domain(self.domain))
        if self.coefficients.ndim != len(self.domain):
            raise InvalidArgument(
                f"given coefficients of {self.coefficients.ndim} modes and a domain of {len(self.domain)} intervals, "
                "expected as many"
            )

    # Constructions

    @classmethod
    def from_function(
        cls,
        f: Function,
        domain: Domain,
        m: int | Sequence[int] | str = "adaptive",
        tol: float = 1e-7,
        rank: int | Sequence[int] | None = None,
        *,
        method: str = "hosvd",
        n_als: int = 5,
        vectorized: bool = True,
        m_max: int = 257,
        chop: bool = True,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        seed: int = 0,
        progress: Callable[[str], None] | None = None,
    ) -> ChebTucker:
        """Approximate a function that can be evaluated anywhere (algorithm 1).

        Args:
            f: points (M, d) -> values (M,), real or complex; or, with `vectorized=False`, d floats -> a number.
            domain: (a, b) per variable.
            m: nodes per variable, one number or d; "adaptive": from 17, m - 1 doubles in every variable that is not
                resolved yet, until the last twentieth of its coefficients is below tol of the norm.
            tol: relative to the Frobenius norm of the coefficients.
            rank: largest ranks.
            method: "hosvd" (sequentially truncated), "hooi" (then `n_als` sweeps of alternating least squares), or "aca":
                cross approximation, which asks for O(d m r^(d-1)) values in place of m^d.
            n_als: sweeps for "hooi".
            vectorized: whether f takes many points at once.
            m_max: where "adaptive" stops, with a warning.
            chop: drop trailing coefficients that together are below tol / 10.
            dtype, device: of the points that f gets.
            seed: of the first fibres of "aca".
            progress: told what is sampled.

        Raises:
            InvalidArgument: bad m, tol, rank, method or domain; f returns the wrong shape or non-finite values.
        """
        box = _checked_domain(domain)
        tol = _checked_tol(tol, dtype)
        if method not in ("hosvd", "hooi", "aca"):
            raise InvalidArgument(f"given method {method!r}, expected 'hosvd', 'hooi' or 'aca'")
        evaluate = _sampler(f, vectorized)
        sizes, adaptive = _sizes(m, len(box), m_max)
        samples = 0
        while True:
            if progress:
                progress(f"sampling at {' x '.join(map(str, sizes))} nodes")
            grids = [
                chebyshev.nodes(n, ab, dtype=dtype, device=device) for n, ab in zip(sizes, box, strict=True)
            ]
            if method == "aca":
                tensor, asked = _cross(evaluate, grids, tol / 4, rank, seed)
                samples += asked
                factors = [chebyshev.vals2coeffs(u, 0) for u in tensor.factors]
                tucker = TuckerTensor(tensor.core, tuple(factors)).orthogonalize()
                norms = [torch.linalg.vector_norm(unfold(mode_product(tucker.core, u, k), k), dim=1)
                         for k, u in enumerate(tucker.factors)]  # fmt: skip
            else:
                dense = _sample(evaluate, grids)
                samples += dense.numel()
                for k in range(dense.ndim):
                    dense = chebyshev.vals2coeffs(dense, k)
                norms = [torch.linalg.vector_norm(unfold(dense, k), dim=1) for k in range(dense.ndim)]
            tails = _tails(norms)
            unresolved = [t > tol for t in tails]
            if not (adaptive and any(unresolved)) or not _double(sizes, unresolved, m_max, tails, tol):
                break
        share = _SHARE * tol if chop else tol
        if method == "aca":
            compressed = tucker.round(share, rank)
        else:
            compressed = (
                hooi(dense, share, rank, sweeps=n_als) if method == "hooi" else sthosvd(dense, share, rank)
            )
        if chop:
            compressed = _chop(compressed, tol)
        bounded = rank is None and method != "aca"
        return cls(compressed, box, _accuracy(compressed, tails, tol, bounded, samples), evaluate)

    @classmethod
    def from_grid(
        cls,
        values: Tensor,
        domain: Domain,
        m: int | Sequence[int] | None = None,
        tol: float = 1e-7,
        rank: int | Sequence[int] | None = None,
        *,
        grid: str | Sequence[Tensor] = "cells",
        periodic: bool | Sequence[bool] = False,
        chop: bool = True,
    ) -> ChebTucker:
        """Approximate values on a full tensor grid (algorithm 2); for grids that fit in memory.

        Args:
            values: (n_1, ..., n_d).
            domain: (a, b) per variable.
            m: nodes per variable. None: as many as grid points, at most 129.
            tol, rank, chop: as `from_function`.
            grid: "cells" (x_i = a + (i + 1/2) h), "vertices" (both ends included), or d ascending coordinate arrays.
            periodic: per variable: trigonometric in place of spline interpolation, with the interval as period.
                A periodic grid of "vertices" does not repeat its first point.

        Raises:
            InvalidArgument: shapes that don't fit, fewer than 4 points, non-finite values.
        """
        box = _checked_domain(domain)
        tol = _checked_tol(tol, values.dtype)
        if values.ndim != len(box):
            raise InvalidArgument(f"given values {tuple(values.shape)}, expected {len(box)} dimensions")
        if not bool(torch.isfinite(values).all()):
            where = (~torch.isfinite(values)).nonzero()[0].tolist()
            raise InvalidArgument(f"given a non-finite value at grid index {where}, expected finite values")
        around = [periodic] * len(box) if isinstance(periodic, bool) else list(periodic)
        sizes = [min(n, 129) for n in values.shape] if m is None else _sizes(m, len(box), 0)[0]
        dense = values
        for k, ((a, b), wraps) in enumerate(zip(box, around, strict=True)):
            x = _grid(grid, k, values.shape[k], a, b, wraps)
            points = chebyshev.nodes(sizes[k], (a, b))
            dense = chebyshev.resample(dense, x, points, k, period=b - a if wraps else None)
        for k in range(dense.ndim):
            dense = chebyshev.vals2coeffs(dense, k)
        norms = [torch.linalg.vector_norm(unfold(dense, k), dim=1) for k in range(dense.ndim)]
        compressed = sthosvd(dense, _SHARE * tol if chop else tol, rank)
        if chop:
            compressed = _chop(compressed, tol)
        return cls(compressed, box, _accuracy(compressed, _tails(norms), tol, rank is None, values.numel()))

    @classmethod
    def from_cp(
        cls,
        weights: Tensor,
        factors: Sequence[Factor],
        domain: Domain,
        m: int | Sequence[int] | str = "adaptive",
        tol: float = 1e-7,
        rank: int | Sequence[int] | None = None,
        *,
        method: str = "reduced",
        block: int = 2048,
        m_max: int = 1025,
        chop: bool = True,
        n_als: int = 0,
        progress: Callable[[str], None] | None = None,
    ) -> ChebTucker:
        """Approximate a sum of R separable terms, sum_r weights[r] u_1r(x_1) u_2r(x_2) ... (algorithms 3 and 4).

        Args:
            weights: (R,).
            factors: per mode, values (n, R) on the cell-centred grid of the interval (at least 4 points, a cubic spline
                takes them to the nodes), or a function of points (m,) and a slice of terms that gives (m, terms).
            domain: (a, b) per variable.
            m: nodes per variable; "adaptive": as `from_function`, judged by the rows of the scaled factors.
            tol, rank, chop: as `from_function`.
            method: "reduced" works on the factors alone, in blocks: memory O(m block + r^d), however many terms.
                "full" adds up the m^d tensor first: only for small m, as a check.
            block: terms at a time.
            m_max: where "adaptive" stops, with a warning.
            n_als: sweeps of HOOI over the core, which lower the error at the ranks that it gets.
            progress: told which block is worked on.

        Raises:
            InvalidArgument: no terms, weights and factors that don't fit, non-finite values, bad m, tol, rank or method.
        """
        box = _checked_domain(domain)
        tol = _checked_tol(tol, weights.dtype)
        if weights.ndim != 1 or weights.shape[0] < 1:
            raise InvalidArgument(
                f"given weights {tuple(weights.shape)}, expected (R,) with at least one term"
            )
        if len(factors) != len(box):
            raise InvalidArgument(
                f"given {len(factors)} factors, expected one for each of {len(box)} intervals"
            )
        for k, factor in enumerate(factors):
            if isinstance(factor, Tensor) and (factor.ndim != 2 or factor.shape[1] != weights.shape[0]):
                raise InvalidArgument(
                    f"given factor {k} {tuple(factor.shape)} and {weights.shape[0]} weights, expected (n, R)"
                )
        if method not in ("reduced", "full"):
            raise InvalidArgument(f"given method {method!r}, expected 'reduced' or 'full'")
        if not isinstance(block, int) or block < 1:
            raise InvalidArgument(f"given block={block!r}, expected a positive number of terms")
        source = _Terms(weights, factors, box, block, progress)
        sizes, adaptive = _sizes(m, len(box), m_max)
        samples = 0
        while True:
            maps = [
                chebyshev.vals2coeffs(torch.eye(n, dtype=weights.dtype, device=weights.device), 0)
                for n in sizes
            ]
            spectra = FactorSpectra(source.blocks(sizes), maps)
            samples += weights.shape[0] * sum(sizes)
            tails = _tails([spectra.row_norms(k) for k in range(len(box))])
            unresolved = [t > tol for t in tails]
            if not (adaptive and any(unresolved)) or not _double(sizes, unresolved, m_max, tails, tol):
                break
        share = _SHARE * tol if chop else tol
        if method == "full":
            dense = weights.new_zeros(sizes)
            for part in source.blocks(sizes):
                dense += part.full()
            for k in range(len(box)):
                dense = chebyshev.vals2coeffs(dense, k)
            compressed = hooi(dense, share, rank, sweeps=n_als)
        else:
            compressed = spectra.compress(lambda: source.blocks(sizes), share, rank, sweeps=n_als)
        if chop:
            compressed = _chop(compressed, tol)
        reference = source.evaluate if all(callable(f) for f in factors) else None
        return cls(compressed, box, _accuracy(compressed, tails, tol, rank is None, samples), reference)

    # Evaluation

    def __call__(self, x: Tensor, *, outside: str = "raise") -> Tensor:
        """Values at points.

        Args:
            x: (..., d), real, in the dtype and on the device of the coefficients. Gradients of any order.
            outside: "raise" refuses points outside the box (and so waits for a GPU); "nan" gives NaN there, "clamp" the
                value at the nearest point of the box, and neither waits.

        Returns:
            (...).
        """
        inside, flat = self._points(x, outside)
        parts = [
            contract_rows(self.coefficients.core, self._rows(part, self.coefficients.factors))
            for part in flat.split(self._block())
        ]
        values = torch.cat(parts) if parts else flat.new_zeros(0, dtype=self.dtype)
        if inside is not None:
            values = values.where(inside, torch.full_like(values, math.nan))
        return values.reshape(x.shape[:-1])

    def grad(self, x: Tensor, *, outside: str = "raise") -> Tensor:
        """Gradient at points (..., d): (..., d), from the differentiated series. `outside` as for a call."""
        return self.value_and_grad(x, outside=outside)[1]

    def value_and_grad(self, x: Tensor, *, outside: str = "raise") -> tuple[Tensor, Tensor]:
        """Values (...) and gradients (..., d) at points (..., d), for about twice the cost of the values."""
        inside, flat = self._points(x, outside)
        factors, core = self.coefficients.factors, self.coefficients.core
        both = [
            torch.cat((u, _padded(chebyshev.differentiate(u, 0, ab), u.shape[0])), dim=1)
            for u, ab in zip(factors, self.domain, strict=True)
        ]
        values, gradients = [], []
        for part in flat.split(self._block()):
            pairs = [r.split(u.shape[1], 1) for r, u in zip(self._rows(part, both), factors, strict=True)]
            found, slopes = _contract_with_slopes(core, [p[0] for p in pairs], [p[1] for p in pairs])
            values.append(found)
            gradients.append(slopes)
        value = torch.cat(values) if values else flat.new_zeros(0, dtype=self.dtype)
        gradient = torch.cat(gradients) if gradients else flat.new_zeros(0, self.ndim, dtype=self.dtype)
        if inside is not None:
            value = value.where(inside, torch.full_like(value, math.nan))
            gradient = gradient.where(inside[:, None], torch.full_like(gradient, math.nan))
        return value.reshape(x.shape[:-1]), gradient.reshape(x.shape)

    def on_grid(self, axes: Sequence[Tensor | int]) -> TuckerTensor:
        """The function on a tensor grid, still in Tucker format: `.full()`, or slices of it, give numbers.

        Args:
            axes: per variable, points (n,), or n for the cell-centred uniform grid of n points.
        """
        if len(axes) != self.ndim:
            raise InvalidArgument(f"given {len(axes)} axes, expected {self.ndim}")
        factors = []
        for k, axis in enumerate(axes):
            a, b = self.domain[k]
            if isinstance(axis, int):
                axis = cell_centres(axis, (a, b), dtype=self.real_dtype, device=self.device)
            if axis.ndim != 1:
                raise InvalidArgument(f"given axis {k} {tuple(axis.shape)}, expected (n,)")
            x = _contained(axis.to(self.real_dtype)[:, None], ((a, b),), "raise")[1][:, 0]
            factors.append(chebyshev.evaluate(self.coefficients.factors[k], x, (a, b)))
        return TuckerTensor(self.coefficients.core, tuple(factors))

    def _rows(self, x: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
        return [
            chebyshev.evaluate(u, x[:, k], ab)
            for k, (u, ab) in enumerate(zip(factors, self.domain, strict=True))
        ]

    def _points(self, x: Tensor, outside: str) -> tuple[Tensor | None, Tensor]:
        if x.ndim < 1 or x.shape[-1] != self.ndim:
            raise InvalidArgument(f"given points {tuple(x.shape)}, expected (..., {self.ndim})")
        if x.dtype != self.real_dtype or x.device != self.device:
            raise InvalidArgument(
                f"given points of {x.dtype} on {x.device}, expected {self.real_dtype} on {self.device}: move them, or the "
                "function with .to()"
            )
        return _contained(x.reshape(-1, self.ndim), self.domain, outside)

    def _block(self) -> int:
        return max(64, _BLOCK_NUMBERS // max(math.prod(self.ranks[:-1]), *self.lengths))

    # Calculus and arithmetic

    def diff(self, mode: int, order: int = 1) -> ChebTucker:
        """The partial derivative in variable `mode`, exact for the approximation."""
        if not -self.ndim <= mode < self.ndim or order < 0:
            raise InvalidArgument(
                f"given mode {mode}, order {order}, expected -{self.ndim} to {self.ndim - 1} and order >= 0"
            )
        mode %= self.ndim
        factors = list(self.coefficients.factors)
        for _ in range(order):
            factors[mode] = chebyshev.differentiate(factors[mode], 0, self.domain[mode])
        return self._derived(TuckerTensor(self.coefficients.core, tuple(factors)))

    def integrate(self, modes: int | Sequence[int] | None = None) -> Any:
        """Integral over some variables: a number (0-dimensional tensor) if over all, else a `ChebTucker` of the others."""
        wanted = range(self.ndim) if modes is None else ([modes] if isinstance(modes, int) else list(modes))
        if any(not -self.ndim <= k < self.ndim for k in wanted):
            raise InvalidArgument(f"given modes {list(wanted)}, expected -{self.ndim} to {self.ndim - 1}")
        gone = {k % self.ndim for k in wanted}
        core = self.coefficients.core
        for k in sorted(gone, reverse=True):
            row = chebyshev.integrate(self.coefficients.factors[k], 0, self.domain[k])
            core = torch.tensordot(core, row, dims=([k], [0]))
        kept = [k for k in range(self.ndim) if k not in gone]
        if not kept:
            return core
        factors = tuple(self.coefficients.factors[k] for k in kept)
        return ChebTucker(TuckerTensor(core, factors), tuple(self.domain[k] for k in kept))

    def __add__(self, other: ChebTucker) -> ChebTucker:
        """Exact sum on the same box; ranks add up, `round` makes them small again."""
        if not isinstance(other, ChebTucker) or other.domain != self.domain:
            raise InvalidArgument(
                f"given {getattr(other, 'domain', other)!r}, expected a ChebTucker on {self.domain}"
            )
        lengths = [max(a, b) for a, b in zip(self.lengths, other.lengths, strict=True)]
        return self._derived(_extended(self.coefficients, lengths) + _extended(other.coefficients, lengths))

    def __sub__(self, other: ChebTucker) -> ChebTucker:
        return self + (-other)

    def __neg__(self) -> ChebTucker:
        return self * -1

    def __mul__(self, scale: Any) -> ChebTucker:
        """Multiply by a number."""
        return self._derived(self.coefficients * scale)

    __rmul__ = __mul__

    def __truediv__(self, scale: Any) -> ChebTucker:
        return self * (1 / scale)

    def round(
        self, tol: float = 1e-7, rank: int | Sequence[int] | None = None, *, chop: bool = True
    ) -> ChebTucker:
        """Smaller ranks, and with `chop` fewer coefficients, within tol of the Frobenius norm."""
        tol = _checked_tol(tol, self.real_dtype)
        compressed = self.coefficients.round(_SHARE * tol if chop else tol, rank)
        return self._derived(_chop(compressed, tol) if chop else compressed)

    def norm(self) -> Tensor:
        """Frobenius norm of the coefficients, to which `tol` is relative."""
        return self.coefficients.norm()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ChebTucker:
        """The same function on another device, in another dtype."""
        return replace(self, coefficients=self.coefficients.to(device, dtype), reference=None)

    def _derived(self, coefficients: TuckerTensor) -> ChebTucker:
        return ChebTucker(coefficients, self.domain)

    # What it is

    @property
    def ndim(self) -> int:
        """Number of variables."""
        return len(self.domain)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Tucker ranks."""
        return self.coefficients.ranks

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of Chebyshev coefficients per variable."""
        return self.coefficients.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the coefficients and values."""
        return self.coefficients.dtype

    @property
    def real_dtype(self) -> torch.dtype:
        """Dtype of the points."""
        return torch.empty(0, dtype=self.dtype).real.dtype

    @property
    def device(self) -> torch.device:
        """Device of the coefficients."""
        return self.coefficients.device

    @property
    def num_stored(self) -> int:
        """Numbers that are stored."""
        return self.coefficients.num_stored

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        return self.coefficients.nbytes

    def error_estimate(
        self,
        n: int = 1000,
        *,
        function: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> SampledError:
        """Error at n uniformly random points of the box, which are not nodes.

        Args:
            n: number of points.
            function: points (n, d) -> values (n,); the one that was approximated by default.
            seed: of the points.

        Raises:
            InvalidArgument: there is no reference, as after `from_grid`, `load` and arithmetic.
        """
        function = function or self.reference
        if function is None:
            raise InvalidArgument(
                "given no function to compare with, expected one: what this approximates is not kept"
            )
        if not isinstance(n, int) or n < 1:
            raise InvalidArgument(f"given n={n!r}, expected a positive number of points")
        unit = torch.rand(n, self.ndim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        low, high = torch.tensor(self.domain, dtype=torch.float64).unbind(1)
        x = (low + (high - low) * unit).to(dtype=self.real_dtype, device=self.device)
        with torch.no_grad():
            exact = function(x)
            error = (self(x, outside="clamp") - exact).abs()
        return SampledError(
            float(error.max()), float(error.double().square().mean().sqrt()), float(exact.abs().max()), n
        )

    def __repr__(self) -> str:
        box = " x ".join(f"[{a:g}, {b:g}]" for a, b in self.domain)
        return f"ChebTucker({box}, lengths={self.lengths}, ranks={self.ranks}, {self.num_stored} numbers of {self.dtype})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; it appears whole or not at all."""
        from safetensors.torch import save_file

        tensors = {"core": self.coefficients.core.detach().contiguous()}
        tensors |= {f"factors.{k}": u.detach().contiguous() for k, u in enumerate(self.coefficients.factors)}
        target = Path(path)
        handle, name = tempfile.mkstemp(prefix=target.name, suffix=".tmp", dir=target.parent)
        os.close(handle)
        try:
            save_file(tensors, name, {"format": _FORMAT, "domain": json.dumps(self.domain)})
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> ChebTucker:
        """Read what `save` wrote.

        Raises:
            CheckpointError: missing, damaged, or another kind of file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise CheckpointError(f"given {path}, expected a file that ChebTucker.save wrote")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            domain = json.loads(metadata["domain"])
            factors = tuple(tensors[f"factors.{k}"] for k in range(len(domain)))
            return cls(TuckerTensor(tensors["core"], factors), tuple(map(tuple, domain)))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"given {path}, expected a file that ChebTucker.save wrote: {error}"
            ) from error


def cell_centres(
    n: int,
    domain: chebyshev.Interval,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Midpoints of n equal cells of [a, b], ascending: (n,)."""
    if n < 1:
        raise InvalidArgument(f"given n={n}, expected at least one cell")
    a, b = domain
    centres = a + (torch.arange(n, dtype=torch.float64) + 0.5) * ((b - a) / n)
    return centres.to(dtype=dtype, device=device)


# Constructions in parts


class _Terms:
    """A CP sum whose factors are tables or functions, as values at any number of nodes, block by block."""

    def __init__(
        self,
        weights: Tensor,
        factors: Sequence[Factor],
        domain: tuple[tuple[float, float], ...],
        block: int,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.weights, self.factors, self.domain = weights, factors, domain
        self.block, self.progress = block, progress

    def blocks(self, sizes: Sequence[int]) -> Iterator[CPTensor]:
        dtype, device = self.weights.real.dtype, self.weights.device
        points = [
            chebyshev.nodes(n, ab, dtype=dtype, device=device)
            for n, ab in zip(sizes, self.domain, strict=True)
        ]
        terms = self.weights.shape[0]
        for start in range(0, terms, self.block):
            if self.progress:
                self.progress(f"terms {start} to {min(start + self.block, terms)} of {terms}")
            part = slice(start, min(start + self.block, terms))
            yield CPTensor(self.weights[part], tuple(self.values(k, x, part) for k, x in enumerate(points)))

    def values(self, mode: int, x: Tensor, part: slice) -> Tensor:
        factor = self.factors[mode]
        if isinstance(factor, Tensor):
            grid = cell_centres(factor.shape[0], self.domain[mode])
            return chebyshev.resample(factor[:, part].to(self.weights.dtype), grid, x, 0)
        result = factor(x, part)
        expected = (x.shape[0], part.stop - part.start)
        if not isinstance(result, Tensor) or tuple(result.shape) != expected:
            raise InvalidArgument(
                f"given a factor {mode} that returns {tuple(getattr(result, 'shape', ()))} for {x.shape[0]} points and "
                f"terms {part.start} to {part.stop - 1}, expected {expected}"
            )
        return result.to(self.weights.dtype)

    def evaluate(self, x: Tensor) -> Tensor:
        """The sum itself at points (M, d)."""
        total = torch.zeros(x.shape[0], dtype=self.weights.dtype, device=x.device)
        block = max(1, min(self.block, _BLOCK_NUMBERS // max(1, x.shape[0])))
        for start in range(0, self.weights.shape[0], block):
            part = slice(start, min(start + block, self.weights.shape[0]))
            product = self.values(0, x[:, 0], part)
            for k in range(1, len(self.domain)):
                product = product * self.values(k, x[:, k], part)
            total = total + product @ self.weights[part]
        return total


def _contract_with_slopes(
    core: Tensor, rows: Sequence[Tensor], slopes: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """`contract_rows` (M,), and the d contractions in which one mode's rows are replaced by its slopes (M, d).

    The core meets the rows and the slopes of the last mode only; what follows works on (M, r_0 ... r_{k}) states.
    """
    points, d = rows[0].shape[0], core.ndim
    matrix = core.reshape(-1, core.shape[-1]).mT
    state, pending = rows[-1] @ matrix, [slopes[-1] @ matrix]
    for k in range(d - 2, -1, -1):
        shape = (points, math.prod(core.shape[:k]), core.shape[k])
        pending = [torch.bmm(p.reshape(shape), rows[k][:, :, None])[:, :, 0] for p in pending]
        pending.insert(0, torch.bmm(state.reshape(shape), slopes[k][:, :, None])[:, :, 0])
        state = torch.bmm(state.reshape(shape), rows[k][:, :, None])[:, :, 0]
    return state[:, 0], torch.cat(pending, dim=1)


def _sampler(f: Function, vectorized: bool) -> Callable[[Tensor], Tensor]:
    """f on points (M, d), its result checked."""

    def evaluate(points: Tensor) -> Tensor:
        if vectorized:
            values = f(points)
        else:
            values = torch.tensor([f(*row) for row in points.tolist()])
            values = values.to(
                device=points.device, dtype=values.dtype if values.is_complex() else points.dtype
            )
        if not isinstance(values, Tensor) or values.shape != points.shape[:1]:
            raise InvalidArgument(
                f"given a function that returns {tuple(getattr(values, 'shape', ()))} for points {tuple(points.shape)}, "
                f"expected a tensor {(points.shape[0],)}; for a function of single numbers pass vectorized=False"
            )
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            node = points[~finite][0].tolist()
            raise InvalidArgument(f"given a function that is not finite at {node}, expected finite values")
        return values if values.is_complex() else values.to(points.dtype)

    return evaluate


def _sample(evaluate: Callable[[Tensor], Tensor], grids: Sequence[Tensor]) -> Tensor:
    """Values on the tensor grid, in slabs of points."""
    shape = tuple(len(g) for g in grids)
    parts = []
    for flat in torch.arange(math.prod(shape), device=grids[0].device).split(_SLAB):
        columns: list[Tensor] = []
        for grid in reversed(grids):
            columns.append(grid[flat % len(grid)])
            flat = flat // len(grid)
        parts.append(evaluate(torch.stack(columns[::-1], dim=-1)))
    return torch.cat(parts).reshape(shape)


def _cross(
    evaluate: Callable[[Tensor], Tensor],
    grids: Sequence[Tensor],
    tol: float,
    rank: int | Sequence[int] | None,
    seed: int,
    sweeps: int = 8,
) -> tuple[TuckerTensor, int]:
    """Tucker cross approximation of the values on a tensor grid, from fibres; and the number of values it took.

    Each mode keeps a set of indices. The fibres of mode k through the index sets of the others span its factor (SVD), whose
    rows are chosen anew by LU pivoting (discrete empirical interpolation). Random indices, added to every set for as long as
    sweeps go on, find what the chosen rows miss; the sweeps end when random fibres agree with the interpolant.
    """
    d = len(grids)
    shape = [len(g) for g in grids]
    device = grids[0].device
    generator = torch.Generator().manual_seed(seed)
    most = shape if rank is None else ([rank] * d if isinstance(rank, int) else list(rank))
    asked = 0

    def sampled(sets: Sequence[Tensor]) -> Tensor:
        nonlocal asked
        values = _sample(evaluate, [g[s] for g, s in zip(grids, sets, strict=True)])
        asked += values.numel()
        return values

    def with_random(chosen: Tensor, k: int, extra: int) -> Tensor:
        others = torch.ones(shape[k], dtype=torch.bool)
        others[chosen.cpu()] = False
        free = others.nonzero()[:, 0]
        added = free[torch.randperm(len(free), generator=generator)[:extra]].to(device)
        return torch.cat((chosen, added))

    sets = [torch.randperm(n, generator=generator)[: min(n, 6)].to(device) for n in shape]
    factors: list[Tensor] = []
    for sweep in range(sweeps):
        factors = []
        for k in range(d):
            around = [with_random(s, j, 3) if j != k else s for j, s in enumerate(sets)]
            around[k] = torch.arange(shape[k], device=device)
            fibres = unfold(sampled(around), k)
            left, values, _ = torch.linalg.svd(fibres, full_matrices=False)
            floor = tol * float(torch.linalg.vector_norm(values)) / math.sqrt(d)
            tails = values.double().square().flip(0).cumsum(0).flip(0).sqrt()
            kept = min(max(1, int((tails > floor).sum())), most[k])
            factors.append(left[:, :kept])
            permutation = torch.linalg.lu(left[:, :kept]).P
            sets[k] = permutation[:, :kept].real.argmax(0)
        core = sampled(sets)
        for k in range(d):
            core = mode_product(core, torch.linalg.inv(factors[k][sets[k]]), k)
        found = TuckerTensor(core, tuple(factors))
        test = torch.stack([torch.randint(n, (500,), generator=generator) for n in shape], dim=-1).to(device)
        exact = evaluate(torch.stack([g[test[:, k]] for k, g in enumerate(grids)], dim=-1))
        asked += len(test)
        error = float(torch.linalg.vector_norm(found.at(test) - exact))
        if error <= tol * max(float(torch.linalg.vector_norm(exact)), 1e-300) or (
            rank is not None and sweep >= 2
        ):
            return found, asked
    warnings.warn(
        f"cross approximation: after {sweeps} sweeps random values still differ by {error:.1e}; use method='hosvd', or a "
        "larger tol",
        stacklevel=3,
    )
    return found, asked


def _tails(norms: Sequence[Tensor]) -> list[float]:
    """Norm of the last twentieth (at least two) of each mode's rows over the norm of all, given row norms (m,)."""
    result = []
    for rows in norms:
        whole = float(torch.linalg.vector_norm(rows))
        last = float(torch.linalg.vector_norm(rows[-max(2, math.ceil(_TAIL * len(rows))) :]))
        result.append(last / whole if whole > 0 else 0.0)
    return result


def _double(
    sizes: list[int], unresolved: Sequence[bool], m_max: int, tails: Sequence[float], tol: float
) -> bool:
    """Double m - 1 where a variable is not resolved; False, with a warning, if all of those are at m_max."""
    before = list(sizes)
    for k, needed in enumerate(unresolved):
        if needed:
            sizes[k] = min(2 * sizes[k] - 1, m_max)
    if sizes == before:
        warnings.warn(
            f"not resolved at m_max={m_max} nodes: the last coefficients are {max(tails):.1e} of the norm, tol is {tol:.1e}; "
            "raise m_max or tol, or look for a kink",
            stacklevel=3,
        )
        return False
    return True


def _chop(tensor: TuckerTensor, tol: float) -> TuckerTensor:
    """Drop trailing coefficients that are together below a tenth of tol, an equal share in each mode."""
    whole = float(torch.linalg.vector_norm(tensor.core))  # the factors are orthonormal
    factors = []
    for k, factor in enumerate(tensor.factors):
        rows = torch.linalg.vector_norm(unfold(mode_product(tensor.core, factor, k), k), dim=1)
        tails = rows.double().square().flip(0).cumsum(0).flip(0).sqrt()
        kept = max(1, int((tails > (1 - _SHARE) * tol * whole / math.sqrt(tensor.ndim)).sum()))
        factors.append(factor[:kept])
    return TuckerTensor(tensor.core, tuple(factors))


def _accuracy(
    tensor: TuckerTensor, tails: Sequence[float], tol: float, bounded: bool, samples: int
) -> Accuracy:
    bound = tol if bounded else math.inf
    coefficients = math.prod(tensor.shape)
    norm = float(torch.linalg.vector_norm(tensor.core))
    return Accuracy(tuple(tails), bound, bound * norm * math.sqrt(coefficients), samples)


def _extended(tensor: TuckerTensor, lengths: Sequence[int]) -> TuckerTensor:
    return TuckerTensor(
        tensor.core, tuple(_padded(u, n) for u, n in zip(tensor.factors, lengths, strict=True))
    )


def _padded(matrix: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(matrix, (0, 0, 0, length - matrix.shape[0]))


def _contained(
    x: Tensor, domain: Sequence[tuple[float, float]], outside: str
) -> tuple[Tensor | None, Tensor]:
    """Points (M, d) clamped to the box, and for "nan" which of them were in it."""
    if outside not in ("raise", "nan", "clamp"):
        raise InvalidArgument(f"given outside={outside!r}, expected 'raise', 'nan' or 'clamp'")
    low, high = torch.tensor(domain, dtype=x.dtype).to(x.device).unbind(1)
    if outside == "clamp":
        return None, x.clamp(low, high)
    slack = (high - low) * max(1e-12, 8 * torch.finfo(x.dtype).eps)
    inside = ((x >= low - slack) & (x <= high + slack)).all(-1)
    if outside == "nan":
        return inside, x.clamp(low, high)
    if not bool(inside.all()):
        first = x.detach()[~inside][0].tolist()
        raise InvalidArgument(
            f"given a point {first} outside the box {[tuple(ab) for ab in domain]}, expected points inside; or choose "
            "outside='clamp' or 'nan'"
        )
    return None, x


# Checks


def _checked_domain(domain: Domain) -> tuple[tuple[float, float], ...]:
    intervals = domain.tolist() if isinstance(domain, Tensor) else list(domain)
    if not intervals or any(not hasattr(ab, "__len__") for ab in intervals):
        raise InvalidArgument(f"given domain {domain!r}, expected (a, b) for each variable")
    return tuple(chebyshev.checked_interval(tuple(ab)) for ab in intervals)


def _checked_tol(tol: float, dtype: torch.dtype) -> float:
    if not (isinstance(tol, (int, float)) and math.isfinite(tol) and tol > 0):
        raise InvalidArgument(f"given tol={tol!r}, expected a positive number relative to the norm")
    if dtype in (torch.float32, torch.complex64) and tol < 1e-6:
        warnings.warn(
            f"given tol={tol:.0e} with {dtype}, which keeps about 1e-6 at best; use float64", stacklevel=3
        )
    return float(tol)


def _sizes(m: int | Sequence[int] | str, ndim: int, m_max: int) -> tuple[list[int], bool]:
    if m == "adaptive":
        if not isinstance(m_max, int) or m_max < 2:
            raise InvalidArgument(f"given m_max={m_max!r}, expected an integer >= 2")
        return [min(_FIRST_M, m_max)] * ndim, True
    sizes = [m] * ndim if isinstance(m, int) else (list(m) if not isinstance(m, str) else [])
    if len(sizes) != ndim or any(not isinstance(n, int) or n < 2 for n in sizes):
        raise InvalidArgument(
            f"given m={m!r}, expected 'adaptive', an integer >= 2, or {ndim} of them (nodes include both ends)"
        )
    return sizes, False  # type: ignore[return-value]


def _grid(grid: str | Sequence[Tensor], k: int, n: int, a: float, b: float, periodic: bool) -> Tensor:
    if isinstance(grid, str):
        if grid == "cells":
            return cell_centres(n, (a, b))
        if grid == "vertices":
            if periodic:
                return a + (b - a) / n * torch.arange(n, dtype=torch.float64)
            return torch.linspace(a, b, n, dtype=torch.float64)
        raise InvalidArgument(
            f"given grid {grid!r}, expected 'cells', 'vertices' or coordinates per variable"
        )
    return torch.as_tensor(grid[k], dtype=torch.float64)

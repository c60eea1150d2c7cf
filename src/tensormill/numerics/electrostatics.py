"""Newton and Yukawa potentials of many charges: a smooth long-range part as `ChebTucker`, a short-range part summed directly.

A kernel is a sum of Gaussians by the trapezoidal rule in u = log t,

    1 / r              = 2 / sqrt(pi) int exp(u) exp(-exp(2 u) r^2) du
    exp(-k r) / r      = 2 / sqrt(pi) int exp(u) exp(-exp(2 u) r^2 - k^2 exp(-2 u) / 4) du.

The wide Gaussians (t <= t_cut) of all charges make a sum of separable terms, which is compressed into one function on a
box. What is left of the kernel, K(r) - sum_{t <= t_cut} w exp(-t^2 r^2), falls off like exp(-t_cut^2 r^2) and is summed
over neighbours. Lengths and charges have any units; with charges in e and lengths in angstrom, `COULOMB_KCAL` times an
energy is in kcal/mol.

Source: Benner, Khoromskij, Khoromskaia, Sun, arXiv 2503.01696, and the range-separated format of Benner, Khoromskaia,
Khoromskij (2018). New here: the infinitely many widest Gaussians are merged into one that keeps their two first moments,
which leaves about a third of the terms.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tensormill.errors import DataError, InvalidArgument
from tensormill.numerics.chebyshev_tucker import ChebTucker, Factor

__all__ = [
    "COULOMB_KCAL",
    "GaussianSum",
    "MultiParticlePotential",
    "direct_sum",
    "long_range_cp",
    "long_range_potential",
    "newton_quadrature",
    "perturbed_lattice",
    "protein_like",
    "read_pqr",
    "yukawa_quadrature",
]

COULOMB_KCAL = 332.06371
"""Coulomb's constant in kcal/mol angstrom / e^2 (the value of the CHARMM and NAMD families is 332.0636 to 332.0637)."""

_PAIRS = 1 << 22
"""Pairs of a point and a charge in one piece of a direct sum (32 MB per temporary in float64)."""


@dataclass(frozen=True)
class GaussianSum:
    """K(r) ~ sum_k weights[k] exp(-(exponents[k] r)^2) on [r_min, r_max].

    Attributes:
        exponents: t, ascending (inverse lengths).
        weights: positive.
        screening: k of the Yukawa kernel exp(-k r) / r; 0 is Newton's 1 / r.
        r_min, r_max: where it holds.
        tol: largest error there, relative to 1 / r.
    """

    exponents: tuple[float, ...]
    weights: tuple[float, ...]
    screening: float
    r_min: float
    r_max: float
    tol: float

    def __len__(self) -> int:
        return len(self.exponents)

    def __call__(self, r: Tensor) -> Tensor:
        """The sum at distances (...)."""
        squares = r * r
        total = torch.zeros_like(r)
        for t, w in zip(self.exponents, self.weights, strict=True):
            total = total + w * torch.exp(-(t * t) * squares)
        return total

    def kernel(self, r: Tensor) -> Tensor:
        """The kernel itself, exp(-k r) / r, at distances (...)."""
        return torch.exp(-self.screening * r) / r

    def long_range(self, t_cut: float) -> GaussianSum:
        """The Gaussians with t <= t_cut: smooth on the length 1 / t_cut.

        Raises:
            InvalidArgument: none is that wide.
        """
        kept = [(t, w) for t, w in zip(self.exponents, self.weights, strict=True) if t <= t_cut]
        if not kept:
            raise InvalidArgument(
                f"given t_cut={t_cut}, expected at least the smallest exponent {self.exponents[0]:.3g}"
            )
        exponents, weights = zip(*kept, strict=True)
        return GaussianSum(exponents, weights, self.screening, self.r_min, self.r_max, self.tol)

    def short_range_radius(self, tol: float) -> float:
        """Distance from which K(r) minus this sum is below tol / r, when this is a long-range part.

        (The next Gaussian, a step of the rule sharper, and all sharper ones add up to about erfc(t r) / r.)
        """
        return _inverse_erfc(tol) / self.exponents[-1]


def newton_quadrature(r_min: float, r_max: float, tol: float = 1e-7) -> GaussianSum:
    """Gaussians for 1 / r on [r_min, r_max] with relative error at most tol.

    The step of the trapezoidal rule follows from its exact error, |error| r = 2 sqrt(1 / cosh(pi^2 / h)) (a Fourier
    transform of the integrand); the sharpest Gaussian from erfc(t r_min); the widest ones are merged into one.

    Raises:
        InvalidArgument: not 0 < r_min < r_max, or tol outside [1e-13, 0.1].

    Example:
        >>> import torch
        >>> kernel = newton_quadrature(0.01, 3.5, 1e-6)
        >>> r = torch.logspace(-2, 0.5, 100, dtype=torch.float64)
        >>> bool(((kernel(r) * r - 1).abs() < 1e-6).all())
        True
    """
    return yukawa_quadrature(0.0, r_min, r_max, tol)


def yukawa_quadrature(screening: float, r_min: float, r_max: float, tol: float = 1e-7) -> GaussianSum:
    """Gaussians for exp(-screening r) / r on [r_min, r_max]; the error is at most tol / r.

    Args and errors: as `newton_quadrature`; screening >= 0 is an inverse length.
    """
    if not 0 < r_min < r_max < math.inf:
        raise InvalidArgument(f"given r_min={r_min}, r_max={r_max}, expected 0 < r_min < r_max")
    if not 1e-13 <= tol <= 0.1:
        raise InvalidArgument(f"given tol={tol}, expected 1e-13 to 0.1")
    if not 0 <= screening < math.inf:
        raise InvalidArgument(f"given screening={screening}, expected a finite number >= 0")
    share = tol / 4  # the rule, the sharp end, the merged wide end; a quarter is left for rounding and slack
    step = math.pi**2 / math.acosh((2 / share) ** 2)
    sharpest = _inverse_erfc(share) / r_min * math.exp(0.5 * step)
    widest = share / (10 * r_max)  # beyond it even the sum of all is nothing
    count = math.ceil(math.log(sharpest / widest) / step)
    exponents = [sharpest * math.exp(-step * k) for k in range(count, -1, -1)]
    weights = [2 / math.sqrt(math.pi) * step * t * math.exp(-((screening / (2 * t)) ** 2)) for t in exponents]
    # Merge the widest: sum w exp(-t^2 r^2) ~ W exp(-s^2 r^2) with the same sum of w and of w t^2.
    merged = 1
    for count in range(2, len(exponents)):
        pairs = list(zip(exponents[:count], weights[:count], strict=True))
        whole = sum(w for _, w in pairs)
        second = sum(w * t**2 for t, w in pairs)
        fourth = sum(w * t**4 for t, w in pairs)
        if whole > 0 and 0.5 * r_max**5 * abs(fourth - second**2 / whole) > share:
            break
        merged = count
    whole = sum(weights[:merged])
    second = sum(w * t**2 for t, w in zip(exponents[:merged], weights[:merged], strict=True))
    if whole > 0:
        exponents = [math.sqrt(second / whole), *exponents[merged:]]
        weights = [whole, *weights[merged:]]
    else:
        exponents, weights = exponents[merged:], weights[merged:]
    used = [(t, w) for t, w in zip(exponents, weights, strict=True) if w > 0]
    used = used or [(sharpest, sys.float_info.min)]  # so strong a screening that nothing is left in range
    exponents, weights = [t for t, _ in used], [w for _, w in used]
    return GaussianSum(tuple(exponents), tuple(weights), screening, r_min, r_max, tol)


def long_range_cp(
    charges: Tensor, positions: Tensor, kernel: GaussianSum
) -> tuple[Tensor, tuple[Factor, ...]]:
    """sum_i q_i sum_k w_k exp(-t_k^2 |x - x_i|^2) as separable terms, one for each charge and Gaussian, charge by charge.

    Args:
        charges: (N,).
        positions: (N, d), any d.
        kernel: the Gaussians, mostly `quadrature.long_range(t_cut)`.

    Returns:
        weights (N K,) and d functions of points and a slice of the terms, as `ChebTucker.from_cp` takes them: no factor is
        held in memory.
    """
    charges, positions = _checked_charges(charges, positions)
    t = torch.tensor(kernel.exponents, dtype=charges.dtype, device=charges.device)
    w = torch.tensor(kernel.weights, dtype=charges.dtype, device=charges.device)
    squares = t * t

    def factor(axis: int) -> Callable[[Tensor, slice], Tensor]:
        centres = positions[:, axis]

        def values(x: Tensor, terms: slice) -> Tensor:
            index = torch.arange(terms.start, terms.stop, device=charges.device)
            offsets = x[:, None] - centres[index // len(t)]
            return torch.exp(-squares[index % len(t)] * offsets * offsets)

        return values

    return (charges[:, None] * w).reshape(-1), tuple(factor(axis) for axis in range(positions.shape[1]))


def long_range_potential(
    charges: Tensor,
    positions: Tensor,
    kernel: GaussianSum,
    domain: Sequence[Sequence[float]],
    m: int | Sequence[int] | str = "adaptive",
    tol: float = 1e-7,
    *,
    block: int = 2048,
    progress: Callable[[str], None] | None = None,
) -> ChebTucker:
    """The long-range potential as a function on a box: `ChebTucker.from_cp` of `long_range_cp`.

    Memory is that of a block of terms and of the result, for any number of charges; time is linear in it.
    """
    weights, factors = long_range_cp(charges, positions, kernel)
    return ChebTucker.from_cp(weights, factors, domain, m, tol, block=block, progress=progress)


def direct_sum(
    charges: Tensor,
    positions: Tensor,
    points: Tensor,
    kernel: GaussianSum | Callable[[Tensor], Tensor],
) -> Tensor:
    """Potential sum_j q_j K(|x - x_j|) at points (M, d), by all M N pairs in pieces: (M,). Differentiable.

    Args:
        charges: (N,).
        positions: (N, d).
        points: (M, d). A pair at distance 0 counts with K(0): finite for a `GaussianSum`, left out otherwise.
        kernel: a function of distances (...).
    """
    charges, positions = _checked_charges(charges, positions)
    if points.ndim != 2 or points.shape[1] != positions.shape[1]:
        raise InvalidArgument(f"given points {tuple(points.shape)}, expected (M, {positions.shape[1]})")
    singular = not isinstance(kernel, GaussianSum)
    parts = []
    for part in points.split(max(1, _PAIRS // max(1, len(charges)))):
        squares = (part[:, None] - positions[None]).square().sum(-1)
        if singular:
            same = squares == 0
            distance = squares.where(~same, torch.ones_like(squares)).sqrt()
            values = kernel(distance).where(~same, torch.zeros_like(distance))
        else:
            values = torch.zeros_like(squares)
            for t, w in zip(kernel.exponents, kernel.weights, strict=True):  # type: ignore[union-attr]
                values = values + w * torch.exp(-(t * t) * squares)
        parts.append(values @ charges)
    return torch.cat(parts) if parts else points.new_zeros(0)


class MultiParticlePotential:
    """The potential of N charges in a box: compressed long-range part, direct short-range part; energy and forces.

    Args:
        charges: (N,), float64 recommended.
        positions: (N, d), inside the box.
        domain: (a, b) per axis. None: the smallest box around the charges, wider by `margin` on each side.
        t_cut: sharpest Gaussian of the long-range part, an inverse length. Larger: fewer neighbours, larger ranks.
            None: such that the short range holds about 120 neighbours at the mean density.
        tol: of the quadrature (relative to 1 / r), of the compression, and of what the short range leaves out.
        screening: k of exp(-k r) / r; 0 for 1 / r.
        margin: as above; None: a tenth of the longest side.
        m, block, progress: as `ChebTucker.from_cp`.

    Attributes:
        long: the long-range part, a `ChebTucker`.
        kernel: its Gaussians.
        cutoff: radius of the short range.

    Example:
        >>> charges, positions = protein_like(10, seed=0)
        >>> potential = MultiParticlePotential(charges, positions, tol=1e-5)
        >>> exact = direct_sum(charges, positions, positions, potential.kernel.kernel)
        >>> bool((potential.at_charges() - exact).abs().max() < 1e-3 * exact.abs().max())
        True
    """

    def __init__(
        self,
        charges: Tensor,
        positions: Tensor,
        domain: Sequence[Sequence[float]] | None = None,
        *,
        t_cut: float | None = None,
        tol: float = 1e-7,
        screening: float = 0.0,
        margin: float | None = None,
        m: int | Sequence[int] | str = "adaptive",
        block: int = 2048,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.charges, self.positions = _checked_charges(charges, positions)
        low, high = self.positions.min(0).values, self.positions.max(0).values
        if domain is None:
            longest = float((high - low).max()) or 1.0
            wide = 0.1 * longest if margin is None else margin
            domain = list(zip((low - wide).tolist(), (high + wide).tolist(), strict=True))
        box = torch.tensor([list(ab) for ab in domain], dtype=torch.float64)
        if box.shape != (self.positions.shape[1], 2):
            raise InvalidArgument(f"given domain {tuple(box.shape)}, expected ({self.positions.shape[1]}, 2)")
        if bool((low.cpu() < box[:, 0]).any()) or bool((high.cpu() > box[:, 1]).any()):
            raise InvalidArgument(
                f"given charges from {low.tolist()} to {high.tolist()} and box {box.tolist()}, expected them inside"
            )
        sides = box[:, 1] - box[:, 0]
        diagonal = float(sides.square().sum().sqrt())
        if t_cut is None:
            volume = float(sides.prod()) / len(self.charges)
            reach = min((120 * volume * 3 / (4 * math.pi)) ** (1 / 3), 0.5 * float(sides.min()))
            t_cut = _inverse_erfc(tol) / reach
        reach = _inverse_erfc(tol) / t_cut
        quadrature = yukawa_quadrature(screening, min(0.5 * reach, 0.5 * diagonal), diagonal, tol)
        self.kernel = quadrature.long_range(max(t_cut, quadrature.exponents[0]))
        self.cutoff = self.kernel.short_range_radius(tol)
        self.tol = tol
        self.long = long_range_potential(
            self.charges, self.positions, self.kernel, box.tolist(), m, tol, block=block, progress=progress
        )

    def __call__(self, points: Tensor) -> Tensor:
        """Potential at points (M, d) of the box, (M,), differentiable. At a charge, without its own (infinite) part."""
        return self._both(points)[0]

    def field(self, points: Tensor) -> Tensor:
        """Field -grad of the potential at points (M, d): (M, d). At a charge, without its own part."""
        return -self._both(points)[1]

    def at_charges(self) -> Tensor:
        """Potential of all other charges at each charge: (N,)."""
        return self(self.positions)

    def energy(self) -> Tensor:
        """Interaction energy sum_{i < j} q_i q_j K(|x_i - x_j|)."""
        return 0.5 * (self.charges @ self.at_charges())

    def forces(self) -> Tensor:
        """Force on each charge, -gradient of the energy: (N, d)."""
        return self.charges[:, None] * self.field(self.positions)

    def _both(self, points: Tensor) -> tuple[Tensor, Tensor]:
        values, slopes = self.long.value_and_grad(points)
        values, slopes = values.clone(), slopes.clone()
        own = sum(self.kernel.weights)
        for rows, columns in self._neighbours(points):
            offsets = points[rows] - self.positions[columns]
            squares = offsets.square().sum(-1)
            same = squares == 0
            safe = squares.where(~same, torch.ones_like(squares)).sqrt()
            short, slope = self._short(safe)
            q = self.charges[columns]
            # A charge at the point itself: its kernel is left out, so its long-range part goes, whose slope is 0 there.
            values.index_add_(0, rows, q * short.where(~same, torch.full_like(short, -own)))
            along = q * slope.where(~same, torch.zeros_like(slope)) / safe
            slopes.index_add_(0, rows, along[:, None] * offsets)
        return values, slopes

    def _short(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """K(r) minus the long-range Gaussians, and its derivative in r."""
        k = self.kernel.screening
        value = torch.exp(-k * r) / r
        slope = -value * (k + 1 / r)
        squares = r * r
        for t, w in zip(self.kernel.exponents, self.kernel.weights, strict=True):
            part = w * torch.exp(-(t * t) * squares)
            value = value - part
            slope = slope + 2 * t * t * r * part
        return value, slope

    def _neighbours(self, points: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices of points and of charges within the cutoff, in pieces; the search is scipy's k-d tree, on the CPU."""
        from scipy.spatial import cKDTree

        charges = cKDTree(self.positions.detach().cpu().double().numpy())
        piece = max(1, _PAIRS // max(1, len(self.charges)))
        for start in range(0, len(points), piece):
            some = cKDTree(points[start : start + piece].detach().cpu().double().numpy())
            pairs = some.sparse_distance_matrix(charges, self.cutoff, output_type="ndarray")
            rows = torch.from_numpy(pairs["i"].astype("int64")).to(points.device) + start
            yield rows, torch.from_numpy(pairs["j"].astype("int64")).to(points.device)


# Charges


def protein_like(
    residues: int, seed: int = 0, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A made-up chain molecule with the geometry and charges of a protein's scale; not a protein.

    A self-avoiding walk of C-alpha atoms, 3.8 angstrom apart and never closer than 4 angstrom to others, that turns back
    towards its centre so that it stays globular; on each the four backbone atoms with peptide partial charges (N -0.42,
    H 0.27, C 0.60, O -0.57, the C-alpha balances) and a side-chain site of charge 1, -1 or 0 in turn with the frequencies
    of charged residues (about a quarter), 2.5 angstrom out.

    Args:
        residues: at least 1.
        seed: of the walk.
        dtype: of the result.

    Returns:
        charges (6 residues,) in e; positions (6 residues, 3) in angstrom.
    """
    if not isinstance(residues, int) or residues < 1:
        raise InvalidArgument(f"given residues={residues!r}, expected a positive integer")
    generator = torch.Generator().manual_seed(seed)

    def directions(count: int) -> Tensor:
        v = torch.randn(count, 3, generator=generator, dtype=torch.float64)
        return v / torch.linalg.vector_norm(v, dim=1, keepdim=True)

    chain = torch.zeros(residues, 3, dtype=torch.float64)
    radius = 2.4 * residues ** (1 / 3) + 4.0  # of gyration of globular proteins: about 2.2 N^0.38 angstrom
    for k in range(1, residues):
        tries = chain[k - 1] + 3.8 * directions(64)
        apart = torch.cdist(tries, chain[: max(1, k - 1)]).min(1).values if k > 1 else torch.full((64,), 9.0)
        outside = (torch.linalg.vector_norm(tries, dim=1) - radius).clamp_min(0)
        penalty = 10 * (4.0 - apart.to(tries.dtype)).clamp_min(0) + outside
        chain[k] = tries[penalty.argmin()]
    offsets = torch.stack([1.45 * directions(residues), 2.0 * directions(residues), 1.52 * directions(residues),
                           2.4 * directions(residues), 2.5 * directions(residues)], dim=1)  # fmt: skip
    positions = torch.cat((chain[:, None], chain[:, None] + offsets), dim=1)
    backbone = torch.tensor([0.1217, -0.4157, 0.2719, 0.5973, -0.5752, 0.0], dtype=torch.float64)
    charges = backbone.repeat(residues, 1)
    kind = torch.rand(residues, generator=generator)
    sign = torch.where(torch.arange(residues) % 2 == 0, 1.0, -1.0).double()
    charges[:, 5] = torch.where(kind < 0.25, sign, torch.zeros_like(sign))
    return charges.reshape(-1).to(dtype), positions.reshape(-1, 3).to(dtype)


def perturbed_lattice(
    cells: int,
    *,
    displacement: float = 0.05,
    vacancies: float = 0.0,
    alternating: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """A simple cubic lattice of about cells^3 charges in [-1, 1]^3, displaced, some missing.

    Args:
        cells: sites per axis.
        displacement: standard deviation, in lattice constants.
        vacancies: share of sites that are empty.
        alternating: charges +1 and -1 as in rock salt, else all +1.
        seed, dtype: of the result.

    Returns:
        charges (N,) and positions (N, 3), which may leave the box by displacement.
    """
    if not isinstance(cells, int) or cells < 1 or not 0 <= vacancies < 1 or displacement < 0:
        raise InvalidArgument(
            f"given cells={cells!r}, vacancies={vacancies}, displacement={displacement}, expected cells >= 1, vacancies "
            "in [0, 1) and displacement >= 0"
        )
    generator = torch.Generator().manual_seed(seed)
    index = torch.cartesian_prod(*[torch.arange(cells)] * 3).reshape(-1, 3)
    noise = torch.randn(len(index), 3, generator=generator, dtype=torch.float64)
    positions = (2 * (index + 0.5 + displacement * noise) / cells) - 1
    charges = torch.where(index.sum(1) % 2 == 0, 1.0, -1.0) if alternating else torch.ones(len(index))
    kept = torch.rand(len(index), generator=generator) >= vacancies
    kept[0] = True
    return charges[kept].to(dtype), positions[kept].to(dtype)


def read_pqr(path: str | Path, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Charges (N,) in e and positions (N, 3) in angstrom of a PQR file (as PDB2PQR writes it).

    ATOM and HETATM lines, separated by blanks, end with x y z charge radius.

    Raises:
        DataError: no file, no atoms, or a line that does not end in five numbers.
    """
    charges, positions = [], []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"given {path}, expected a readable PQR file: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.startswith(("ATOM", "HETATM")):
            try:
                x, y, z, charge, _ = map(float, line.split()[-5:])
            except ValueError:
                raise DataError(
                    f"{path}, line {number}: given {line.strip()!r}, expected an atom that ends in x y z charge radius"
                ) from None
            charges.append(charge)
            positions.append((x, y, z))
    if not charges:
        raise DataError(f"given {path}, expected ATOM or HETATM lines")
    return torch.tensor(charges, dtype=dtype), torch.tensor(positions, dtype=dtype)


def _checked_charges(charges: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    if positions.ndim != 2 or charges.shape != positions.shape[:1] or len(charges) < 1:
        raise InvalidArgument(
            f"given charges {tuple(charges.shape)} and positions {tuple(positions.shape)}, expected (N,) and (N, d), N >= 1"
        )
    if charges.dtype != positions.dtype or not charges.is_floating_point():
        raise InvalidArgument(
            f"given charges of {charges.dtype} and positions of {positions.dtype}, expected one float dtype"
        )
    if not bool(torch.isfinite(charges).all()) or not bool(torch.isfinite(positions).all()):
        raise InvalidArgument("given charges or positions that are infinite or NaN, expected finite ones")
    return charges, positions


def _inverse_erfc(value: float) -> float:
    """x >= 0 with erfc(x) = value, 0 < value <= 1; by bisection, as erfc falls strictly."""
    low, high = 0.0, 27.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if math.erfc(middle) > value else (low, middle)
    return high

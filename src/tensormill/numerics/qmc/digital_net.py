"""Digital nets in base 2: Sobol' sequences and others, plain, scrambled and of higher order.

Coordinate j of point i is the exclusive or of the columns of generating matrix C_j that belong to the set bits of
i. Floating-point values are the first 52 digits, never rounded up: they stay below 1, and their exclusive or is
that of the integers they come from, which fast Gram matrices rely on.

Sources: Sorokin, QMCPy, arXiv 2502.14256, sections on digital nets; Joe and Kuo, Constructing Sobol sequences with
better two-dimensional projections, 2008 (direction numbers); Dick, 2008 and 2011 (higher order by interlacing).
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.numerics.qmc import randomization
from tensormill.numerics.qmc.randomization import BITS
from tensormill.numerics.qmc.sequence import Sequence, blocks
from tensormill.ops.digital_net import operator as digital_net

RANDOMIZATIONS = ("lms_ds", "lms", "ds", "nus", None)
_TABLE = Path(__file__).parent / "tables" / "joe_kuo.npz"


@functools.cache
def _joe_kuo_table() -> tuple[np.ndarray, np.ndarray]:
    with np.load(_TABLE) as table:
        return table["polynomials"].astype(np.int64), table["initial"].astype(np.int64)


@functools.cache
def joe_kuo_matrices(d: int, bits: int = 32) -> Tensor:
    """Generating matrices of the Sobol' sequence with the direction numbers of Joe and Kuo (6.21201).

    Args:
        d: dimensions.
        bits: digits and columns: 2^bits points.

    Returns:
        (d, bits) int64, columns with the first digit as the highest of `bits` bits.

    Raises:
        InvalidArgument: d is above the table, or bits above 62.
    """
    polynomials, initial = _joe_kuo_table()
    if not 1 <= d <= len(polynomials):
        raise InvalidArgument(
            f"given {d} dimensions, expected at most {len(polynomials)}, which the table of direction numbers has; "
            "pass matrices of your own"
        )
    if not 1 <= bits <= 62:
        raise InvalidArgument(f"given bits={bits}, expected 1 to 62")
    numbers = np.zeros((d, bits), dtype=np.int64)
    numbers[0] = 1
    degrees = np.array([int(p).bit_length() - 1 for p in polynomials[:d]])
    for degree in np.unique(degrees[degrees > 0]):
        rows = np.flatnonzero(degrees == degree)
        polynomial = polynomials[rows]
        known = min(degree, bits)
        numbers[rows, :known] = initial[rows, :known]
        for k in range(degree, bits):
            # m_k = 2^s m_(k-s) ^ m_(k-s) ^ 2 a_1 m_(k-1) ^ ... ^ 2^(s-1) a_(s-1) m_(k-s+1)
            value = numbers[rows, k - degree] ^ (numbers[rows, k - degree] << degree)
            for a in range(1, degree):
                value ^= ((polynomial >> (degree - a)) & 1) * (numbers[rows, k - a] << a)
            numbers[rows, k] = value
    return torch.from_numpy(numbers << (bits - 1 - np.arange(bits)))


class DigitalNet(Sequence):
    """Digital net or sequence in base 2.

    Args:
        d: dimensions.
        matrices: "joe_kuo" (Sobol'), or generating matrices (alpha * d, m) int64: columns, each with the first digit
            as the highest of `bits` bits.
        randomize: "lms_ds" (linear matrix scrambling and digital shift), "lms", "ds", "nus" (Owen's nested uniform
            scrambling) or None.
        alpha: order; above 1 the net of alpha * d dimensions is scrambled and interlaced, and integrands with alpha
            square-integrable derivatives converge like n^-alpha. Not for matrices interlaced already.
        order: "natural" (radical inverse) or "gray": blocks of a power of two hold the same points in either.
        replications: None, or the number of independent randomisations.
        bits: digits of the columns given as matrices (32 for "joe_kuo").
        seed: of the randomisation; None draws one from torch's generator.
        device: where points are made.
        dtype: of the points, float64 (52 digits) or float32 (23 digits).

    Raises:
        InvalidArgument: an argument out of range, or alpha * d above the table.

    Example:
        >>> from tensormill.numerics import qmc
        >>> qmc.DigitalNet(2, randomize=None).sample(4)
        tensor([[0.0000, 0.0000],
                [0.5000, 0.5000],
                [0.2500, 0.7500],
                [0.7500, 0.2500]], dtype=torch.float64)
    """

    def __init__(
        self,
        d: int,
        matrices: str | Tensor = "joe_kuo",
        *,
        randomize: str | None = "lms_ds",
        alpha: int = 1,
        order: str = "natural",
        replications: int | None = None,
        bits: int = 32,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ):
        super().__init__(d, replications=replications, seed=seed, device=device, dtype=dtype)
        if randomize not in RANDOMIZATIONS:
            raise InvalidArgument(
                f'given randomize={randomize!r}, expected "lms_ds", "lms", "ds", "nus" or None'
            )
        if order not in ("natural", "gray"):
            raise InvalidArgument(f'given order={order!r}, expected "natural" or "gray"')
        if not isinstance(alpha, int) or not 1 <= alpha <= 8:
            raise InvalidArgument(f"given alpha={alpha!r}, expected an integer from 1 to 8")
        if isinstance(matrices, str):
            if matrices != "joe_kuo":
                raise InvalidArgument(f'given matrices={matrices!r}, expected "joe_kuo" or a tensor')
            matrices, bits = joe_kuo_matrices(alpha * d), 32
        self.randomize, self.alpha, self.order = randomize, alpha, order
        self.structure = None if randomize == "nus" else "net"
        self.columns = self._checked(matrices, bits)
        self.max_points = 1 << self.columns.shape[1]
        self._columns_bits = bits
        replicas = self._count
        self.bits = bits if randomize is None and alpha == 1 else BITS
        self._base_bits = self.bits if alpha == 1 else max(bits, -(-BITS // alpha))
        if randomize in ("lms", "lms_ds"):
            linear = randomization.linear_matrix_scramble(
                self.columns, bits, self._base_bits, self.seed, replicas
            )
        else:
            linear = (self.columns << (self._base_bits - bits)).expand(replicas, -1, -1)
        if alpha > 1 and randomize != "nus":
            linear = randomization.interlace(linear.mT, alpha, self._base_bits).mT
        self._linear = linear.contiguous()
        self._digits = self._base_bits if randomize == "nus" else self.bits
        self._shift: Tensor | None = None
        if randomize in ("ds", "lms_ds"):
            self._shift = randomization.random_bits(
                self.seed, 3, replicas, d, bits=self.bits, device=self.device
            )

    def _checked(self, matrices: Tensor, bits: int) -> Tensor:
        if matrices.dtype != torch.int64 or matrices.dim() != 2 or matrices.shape[0] < self.alpha * self.d:
            raise InvalidArgument(
                f"given matrices {tuple(matrices.shape)} of {matrices.dtype}, expected int64 of at least "
                f"{self.alpha * self.d} rows (alpha * d) and a column per bit of the index"
            )
        if not 1 <= bits <= BITS or not 1 <= matrices.shape[1] <= 62:
            raise InvalidArgument(
                f"given bits={bits} and {matrices.shape[1]} columns, expected at most 63 bits and 62 columns"
            )
        if bool((matrices < 0).any()) or bool((matrices >> bits if bits < BITS else matrices * 0).any()):
            raise InvalidArgument(f"given matrices with columns of more than {bits} bits; pass their bits=")
        return matrices[: self.alpha * self.d].to(self.device)

    def generating_matrices(self) -> Tensor:
        """Columns after scrambling and interlacing, (R, d, m) int64 of `bits` bits; not for "nus".

        Raises:
            InvalidArgument: nested uniform scrambling is not linear.
        """
        if self.randomize == "nus":
            raise InvalidArgument('given randomize="nus", expected a linear scrambling; use "lms_ds"')
        return self._linear.clone()

    def _net(self, n: int, start: int, dtype: torch.dtype) -> Tensor:
        """Points with the linear scrambling and the shift: (R, n, d), or (R, n, alpha * d) before a nested scrambling."""
        return digital_net(self._linear, self._shift, start, n, self._digits, self.order == "gray", dtype)

    def integers(self, n: int, start: int = 0) -> Tensor:
        """Points `start` to `start + n - 1` as integers of `bits` bits, first digit highest: (n, d) or (R, n, d)."""
        self._check_range(n, start)
        values = self._integers(n, start)
        return values if self.replications is not None else values[0]

    def _integers(self, n: int, start: int) -> Tensor:
        points = self._net(n, start, torch.int64)
        if self.randomize != "nus":
            return points
        result = torch.empty(self._count, n, self.d, dtype=torch.int64, device=self.device)
        for _, begin, end, offset in blocks(start, n):
            part = slice(offset, offset + end - begin)
            scrambled = randomization.nested_uniform_scramble(points[:, part], self._base_bits, self.seed)
            if self.alpha > 1:
                scrambled = randomization.interlace(scrambled, self.alpha, self._base_bits)
            result[:, part] = scrambled
        return result

    def _values(self, n: int, start: int) -> Tensor:
        if self.randomize != "nus":
            return self._net(n, start, self.dtype)
        # The digits become the mantissa of a number in [1, 2), from which 1 is subtracted: exact, and no conversion.
        double = self.dtype == torch.float64
        digits, integer = (52, torch.int64) if double else (23, torch.int32)
        one = 1023 << 52 if double else 127 << 23
        words = (self._integers(n, start) >> (self.bits - digits)).to(integer) | one
        return words.view(self.dtype).sub_(1)

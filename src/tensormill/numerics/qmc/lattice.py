"""Rank-1 lattices, and the search for their generating vectors.

Point i is `phi(i) * z mod 1`, phi the radical inverse in base 2, z a vector of odd integers: any power of two of
them is a lattice, and each is contained in the next.

Sources: Sorokin, QMCPy, arXiv 2502.14256; Cools, Kuo, Nuyens, Constructing embedded lattice rules for multivariate
integration, 2006 (the criterion); Nuyens and Cools, Fast component-by-component construction, 2006 (by FFT).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Numbers
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.numerics.qmc import randomization
from tensormill.numerics.qmc.sequence import LOW_BITS, Sequence, bit_reverse, combine

_TABLE = Path(__file__).parent / "tables" / "lattice.npz"


@functools.cache
def shipped_generating_vector() -> Tensor:
    """The vector that `Lattice` takes by default: int64, for up to 2^20 points.

    `component_by_component(len(vector), 20)` finds it again: product weights 1/j^2, embedded from 2^10 to 2^20.
    """
    with np.load(_TABLE) as table:
        return torch.from_numpy(table["vector"].astype(np.int64))


class Lattice(Sequence):
    """Rank-1 lattice with a random shift modulo 1.

    Args:
        d: dimensions.
        gen_vector: "cbc" (shipped: see `shipped_generating_vector`), "random" (1 and random odd numbers), or integers,
            at least d of them.
        shift: whether points are shifted at random.
        order: "natural" (radical inverse), "gray", or "linear" (i / n * z, for n points at once).
        log2_max_points: points are made for up to 2 to this power; 20 for "cbc", 32 for "random", needed with a
            vector of your own.
        replications: None, or the number of independent shifts.
        seed: of the shift; None draws one from torch's generator.
        device: where points are made.
        dtype: of the points.

    Raises:
        InvalidArgument: an argument out of range.

    Example:
        >>> from tensormill.numerics import qmc
        >>> qmc.Lattice(2, [1, 3], shift=False, log2_max_points=2).sample(4)
        tensor([[0.0000, 0.0000],
                [0.5000, 0.5000],
                [0.2500, 0.7500],
                [0.7500, 0.2500]], dtype=torch.float64)
    """

    structure = "lattice"

    def __init__(
        self,
        d: int,
        gen_vector: str | Numbers[int] | Tensor = "cbc",
        *,
        shift: bool = True,
        order: str = "natural",
        log2_max_points: int | None = None,
        replications: int | None = None,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ):
        super().__init__(d, replications=replications, seed=seed, device=device, dtype=dtype)
        if order not in ("natural", "gray", "linear"):
            raise InvalidArgument(f'given order={order!r}, expected "natural", "gray" or "linear"')
        self.order = order
        self.gen_vector, self._log2 = self._vector(gen_vector, log2_max_points)
        self.max_points = 1 << self._log2
        self.shift = torch.zeros(self._count, d, dtype=torch.float64, device=self.device)
        if shift:
            self.shift = randomization.random_unit(self.seed, 4, self._count, d, device=self.device)

    def _vector(self, given: str | Numbers[int] | Tensor, log2_max_points: int | None) -> tuple[Tensor, int]:
        default: int | None = None
        if isinstance(given, str):
            if given == "cbc":
                vector, default = shipped_generating_vector(), 20
            elif given == "random":
                words = randomization.random_bits(self.seed, 5, self.d, bits=32)
                vector, default = torch.cat([torch.ones(1, dtype=torch.int64), words[1:] | 1]), 32
            else:
                raise InvalidArgument(f'given gen_vector={given!r}, expected "cbc", "random" or integers')
            if log2_max_points is not None and log2_max_points > default:
                raise InvalidArgument(
                    f'given log2_max_points={log2_max_points}, expected at most {default} for "{given}"'
                )
        else:
            vector = torch.as_tensor(given)
            if vector.dtype.is_floating_point or vector.dim() != 1 or bool((vector < 0).any()):
                raise InvalidArgument("given gen_vector, expected one dimension of integers, 0 or more")
            if log2_max_points is None:
                raise InvalidArgument("given a gen_vector of your own, expected log2_max_points with it")
        log2 = log2_max_points if log2_max_points is not None else default
        assert log2 is not None
        if not 1 <= log2 <= 32:
            raise InvalidArgument(f"given log2_max_points={log2}, expected 1 to 32")
        if len(vector) < self.d:
            raise InvalidArgument(
                f"given d={self.d}, expected at most {len(vector)}, the length of the generating vector; search a "
                "longer one with component_by_component"
            )
        return vector[: self.d].to(self.device, torch.int64) & ((1 << log2) - 1), log2

    def _multiples(self, index: Tensor, bits: int) -> Tensor:
        """phi(index) * z mod 1 as float64, exact: (..., d)."""
        numerators = bit_reverse(index, bits) if self.order != "linear" else index
        return ((numerators.unsqueeze(-1) * self.gen_vector) & ((1 << bits) - 1)).double() * 2.0**-bits

    def _values(self, n: int, start: int) -> Tensor:
        if self.order == "linear":
            if start or n & (n - 1) or n < 1:
                raise InvalidArgument(
                    f'given n={n}, start={start} in order "linear", expected a power of two from 0'
                )
            bits = n.bit_length() - 1
        elif self.order == "gray":
            return self._gray(n, start)
        else:
            bits = self._log2
        size = 1 << LOW_BITS
        first, last = start >> LOW_BITS, max(start, start + n - 1) >> LOW_BITS
        high = torch.arange(first, last + 1, device=self.device) * size
        low = torch.arange(min(n, size) if first == last and start % size == 0 else size, device=self.device)
        # phi is additive over disjoint sets of bits, and "linear" over all numbers.
        shifted = torch.frac(self._multiples(high, bits) + self.shift.unsqueeze(1))
        low_values = self._multiples(low, bits).unsqueeze(0)

        def apply(a: Tensor, b: Tensor, out: Tensor) -> None:
            if out.dtype == torch.float64:
                torch.add(a, b, out=out)
                out.frac_()
            else:  # rounding to float32 must not reach 1
                out.copy_(torch.frac(a + b).clamp_max_(1 - 2.0**-24))

        return combine(shifted, low_values, start, n, self.dtype, apply)

    def _gray(self, n: int, start: int) -> Tensor:
        # Digits of the two halves of a Gray index overlap by one, so that a sum of tables won't do.
        index = torch.arange(start, start + n, device=self.device)
        values = torch.frac(self._multiples(index ^ (index >> 1), self._log2) + self.shift.unsqueeze(1))
        return values if self.dtype == torch.float64 else values.clamp_max_(1 - 2.0**-24).to(self.dtype)

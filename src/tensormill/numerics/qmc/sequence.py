"""What lattices, digital nets and Halton sequences share: how they are asked for points.

Point i is computed from i alone. A block of 1024 consecutive points is one row of a table combined with another
table of 1024 rows, so that a point costs an operation or two per coordinate, in cache, on any device.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.numerics.qmc.randomization import draw_seed

LOW_BITS = 10
"""A block has 2^10 points: with 32 coordinates in double precision, 256 KB."""

_CACHED = 1 << 15
"""Elements combined at a time: 256 KB of doubles, half of a common second-level cache."""

DTYPES = (torch.float64, torch.float32)


class Sequence(ABC):
    """A sequence of points in [0, 1)^d, randomised `replications` times.

    Attributes:
        d: dimensions.
        replications: None for one, whose points are (n, d); a number R, for points of (R, n, d).
        seed: what the randomisation was drawn from.
        position: index of the next point that `random` gives.
    """

    structure: str | None = None
    """"lattice" or "net" where differences of points don't see the randomisation, so that `FastGram` works."""

    max_points: int

    def __init__(
        self,
        d: int,
        *,
        replications: int | None,
        seed: int | None,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        if isinstance(d, bool) or not isinstance(d, int) or d < 1:
            raise InvalidArgument(f"given d={d!r}, expected a number of dimensions, 1 or more")
        if replications is not None and (not isinstance(replications, int) or replications < 1):
            raise InvalidArgument(f"given replications={replications!r}, expected None or 1 or more")
        if dtype not in DTYPES:
            raise InvalidArgument(f"given dtype {dtype}, expected torch.float64 or torch.float32")
        self.d = d
        self.replications = replications
        self.seed = draw_seed(seed)
        self.device = torch.device(device)
        self.dtype = dtype
        self.position = 0

    @property
    def _count(self) -> int:
        return self.replications or 1

    @abstractmethod
    def _values(self, n: int, start: int) -> Tensor:
        """Points start to start + n - 1, (R, n, d), in self.dtype."""

    def sample(self, n: int, start: int = 0) -> Tensor:
        """Points `start` to `start + n - 1`.

        Args:
            n: number of points; a power of two keeps the balance, and another number is warned about.
            start: index of the first.

        Returns:
            (n, d), or (R, n, d) with replications, in [0, 1), of the sequence's dtype and device.

        Raises:
            InvalidArgument: n or start is out of range.
        """
        self._check_range(n, start)
        values = self._values(n, start)
        return values if self.replications is not None else values[0]

    def _check_range(self, n: int, start: int) -> None:
        if not isinstance(n, int) or n < 0 or not isinstance(start, int) or start < 0:
            raise InvalidArgument(f"given n={n!r}, start={start!r}, expected integers of 0 or more")
        if start + n > self.max_points:
            raise InvalidArgument(
                f"given points up to {start + n}, expected at most {self.max_points}, which this "
                f"{type(self).__name__} is made for"
            )
        if start == 0 and n & (n - 1):
            warnings.warn(
                f"{n} points lose the balance that a power of two has; take {1 << n.bit_length()}",
                stacklevel=3,
            )

    def random(self, n: int = 1) -> Tensor:
        """The next n points, (n, d) or (R, n, d), as scipy's engines give them."""
        if self.position == 0:
            self._check_range(n, 0)
        elif self.position + n > self.max_points:
            self._check_range(n, self.position)
        values = self._values(n, self.position)
        self.position += n
        return values if self.replications is not None else values[0]

    def fast_forward(self, n: int) -> Sequence:
        """Skip n points; nothing is computed."""
        self.position += n
        return self

    def reset(self) -> Sequence:
        """Start again at point 0."""
        self.position = 0
        return self

    def points(self, n: int) -> PointSet:
        """The first n points with their structure, for `FastGram`."""
        return PointSet(self, n)


@dataclass(frozen=True)
class PointSet:
    """The first n points of a sequence, which still know where they come from.

    Args:
        sequence: without replications.
        n: a power of two.

    Raises:
        InvalidArgument: the sequence has replications, or n is not a power of two or too many.
    """

    sequence: Sequence
    n: int

    def __post_init__(self) -> None:
        if self.sequence.replications is not None:
            raise InvalidArgument(
                f"given a sequence with {self.sequence.replications} replications, expected one without; make it with "
                "replications=None"
            )
        if not isinstance(self.n, int) or self.n < 1 or self.n & (self.n - 1):
            raise InvalidArgument(f"given {self.n} points, expected a power of two")
        if self.n > self.sequence.max_points:
            raise InvalidArgument(f"given {self.n} points, expected at most {self.sequence.max_points}")

    def __len__(self) -> int:
        return self.n

    @property
    def values(self) -> Tensor:
        """(n, d) in [0, 1)."""
        return self.sequence.sample(self.n)

    @property
    def log_n(self) -> int:
        """Base-2 logarithm of n."""
        return self.n.bit_length() - 1

    def doubled(self) -> PointSet:
        """The first 2n points."""
        return PointSet(self.sequence, 2 * self.n)


def blocks(start: int, n: int) -> Iterator[tuple[int, int, int, int]]:
    """(high, first low, last low + 1, offset) of the blocks of 2^LOW_BITS that cover start to start + n - 1."""
    size, index = 1 << LOW_BITS, start
    while index < start + n:
        high = index >> LOW_BITS
        stop = min((high + 1) << LOW_BITS, start + n)
        yield high, index - (high << LOW_BITS), stop - (high << LOW_BITS), index - start
        index = high * size + size


def combine(
    high: Tensor,
    low: Tensor,
    start: int,
    n: int,
    dtype: torch.dtype,
    apply: Callable[[Tensor, Tensor, Tensor], object],
) -> Tensor:
    """Combine each row of `high` with all rows of `low`.

    Args:
        high: (R, blocks, d), a row for every block from the one that `start` is in.
        low: (R or 1, 2^LOW_BITS, or n where there are fewer points from 0 on, d).
        start: index of the first point.
        n: number of points.
        dtype: of the result.
        apply: called with parts of high, of low, and of the result to fill; shapes broadcast.

    Returns:
        (R, n, d).
    """
    replications, _, d = high.shape
    size = 1 << LOW_BITS
    first = start >> LOW_BITS
    whole = start % size == 0 and n % size == 0
    if high.device.type != "cpu":
        if whole:
            result = torch.empty(replications, n, d, dtype=dtype, device=high.device)
            apply(high.unsqueeze(2), low.unsqueeze(1), result.unflatten(1, (-1, size)))
            return result
        result = torch.empty(replications, n, d, dtype=dtype, device=high.device)
    else:  # numpy asks for large pages, which halves the time of large results
        result = torch.from_numpy(
            np.empty((replications, n, d), np.float64 if dtype.itemsize == 8 else np.float32)
        )
        result = result.view(dtype)
    # Rows are glued together until they are long enough for the inner loop to be worth its start.
    glued = 1 << max(0, math.ceil(math.log2(64 / d)))
    together = max(1, _CACHED // (size * d)) if whole else 1
    for replication in range(replications):
        table, target = low[replication % low.shape[0]], result[replication]
        if whole:
            rows, table = high[replication].repeat(1, glued).unsqueeze(1), table.view(-1, glued * d)
            parts = target.view(-1, size // glued, glued * d)
            for block in range(0, len(rows), together):
                chosen = slice(block, block + together)
                apply(rows[chosen], table, parts[chosen])
            continue
        for block, begin, end, offset in blocks(start, n):
            part = target[offset : offset + end - begin]
            apply(high[replication, block - first], table[begin:end], part)
    return result


def bit_reverse(index: Tensor, bits: int) -> Tensor:
    """Integers with their lowest `bits` bits in reverse order."""
    result = torch.zeros_like(index)
    for bit in range(bits):
        result |= ((index >> bit) & 1) << (bits - 1 - bit)
    return result

"""Which width for which layers, so that the loss is least within a size and a time: a knapsack with one choice each.

The loss of a model is taken to be the sum over its layers of the loss that each causes alone. Then the best choices
for every size come out of one pass over the layers: partial choices are kept unless another is no larger, no slower
and no worse. With few of them that is exact; beyond a limit they are thinned to the best in each of many narrow ranges
of size (and time), with their own sizes kept, so that no limit is ever overstepped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tensormill.errors import InvalidArgument

# Partial choices kept at most. The built-in model's front is the same with four times as many.
_MOST = 1 << 14


@dataclass(frozen=True)
class Option:
    """A width that layers may get, and what is expected of it.

    Attributes:
        bits: Width of a code.
        loss: How much worse the model becomes, at least 0; losses of different layers add up.
        bytes: Of the packed weights with their scales and zero points.
        seconds: Of the layers' products for one token; 0 where not measured.
    """

    bits: int
    loss: float
    bytes: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Unit:
    """Layers that get the same width, and the widths to choose from.

    Attributes:
        layers: Full names.
        options: At least one; narrow first.
    """

    layers: tuple[str, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Allocation:
    """A width for each unit, and the sums over the options chosen.

    Attributes:
        bits: A width per unit, in the units' order.
        loss, bytes, seconds: Sums, see `Option`.
    """

    bits: tuple[int, ...]
    loss: float
    bytes: float
    seconds: float


def allocation_of(units: Sequence[Unit], bits: Sequence[int]) -> Allocation:
    """The allocation with these widths.

    Raises:
        InvalidArgument: Another number of widths than units, or a width that a unit doesn't offer.
    """
    if len(bits) != len(units):
        raise InvalidArgument(f"given {len(bits)} widths for {len(units)} units, expected one each")
    chosen = []
    for unit, width in zip(units, bits, strict=True):
        found = [option for option in unit.options if option.bits == width]
        if not found:
            raise InvalidArgument(
                f"given {width} bits for {unit.layers[0]}, expected one of {[o.bits for o in unit.options]}"
            )
        chosen.append(found[0])
    return Allocation(
        tuple(bits),
        sum(option.loss for option in chosen),
        sum(option.bytes for option in chosen),
        sum(option.seconds for option in chosen),
    )


def uniform_allocations(units: Sequence[Unit]) -> list[Allocation]:
    """One width for all units, for every width that all of them offer, narrow first."""
    shared = set.intersection(*({option.bits for option in unit.options} for unit in units))
    return [allocation_of(units, [bits] * len(units)) for bits in sorted(shared)]


def pareto_front(
    units: Sequence[Unit], *, max_seconds: float | None = None, most: int = _MOST
) -> list[Allocation]:
    """The allocations that lose least at their size, from the smallest to the one with the least loss.

    Args:
        units: At least one.
        max_seconds: Leave out what takes longer.
        most: Partial choices kept; the result is exact while there are no more.

    Returns:
        Bytes strictly rise and losses strictly fall. Empty if everything takes longer than `max_seconds`.

    Example:
        >>> first = Unit(("a",), (Option(2, 1.0, 10), Option(4, 0.1, 20)))
        >>> second = Unit(("b",), (Option(2, 5.0, 10), Option(4, 0.5, 20)))
        >>> [allocation.bits for allocation in pareto_front([first, second])]
        [(2, 2), (2, 4), (4, 4)]

    Raises:
        InvalidArgument: No units, a unit without options, or a loss, size or time that isn't finite.
    """
    if not units or not all(unit.options for unit in units):
        raise InvalidArgument(
            "given no units to choose for, or one without options, expected at least one each"
        )
    tables = [
        np.array([[o.bytes, o.seconds, o.loss] for o in unit.options], dtype=np.float64) for unit in units
    ]
    if not all(np.isfinite(table).all() and (table >= 0).all() for table in tables):
        raise InvalidArgument("given an option with a loss, size or time that is negative or no number")
    timed = max_seconds is not None
    # The least time of the units still to come: what can't be finished in time is dropped at once.
    fastest = np.array([table[:, 1].min() for table in tables])
    ahead = fastest.sum() - fastest.cumsum()
    states = np.zeros((1, 3))
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for table, rest in zip(tables, ahead, strict=True):
        count = len(table)
        grown = (states[:, None, :] + table[None, :, :]).reshape(-1, 3)
        kept = np.arange(len(grown))
        if max_seconds is not None:
            # A part in 10^9: sums in another order than the caller's differ by rounding.
            kept = kept[grown[:, 1] + rest <= max_seconds * (1 + 1e-9)]
        if not timed:
            kept = kept[_undominated(grown[kept])]
        if len(kept) > most:
            kept = kept[_thinned(grown[kept], most, timed)]
        if not len(kept):
            return []
        states = grown[kept]
        history.append(((kept // count).astype(np.int32), (kept % count).astype(np.uint8)))
    last = _undominated(states)
    chosen = np.empty((len(units), len(last)), dtype=np.int64)
    at = last
    for row in range(len(units) - 1, -1, -1):
        parents, options = history[row]
        chosen[row] = np.array([option.bits for option in units[row].options])[options[at]]
        at = parents[at]
    return [
        Allocation(tuple(bits), loss, size, seconds)
        for bits, (size, seconds, loss) in zip(chosen.T.tolist(), states[last].tolist(), strict=True)
    ]


def _undominated(states: np.ndarray) -> np.ndarray:
    """Indices of the states (bytes, seconds, loss) whose loss no smaller or equal one reaches, by bytes."""
    order = np.lexsort((states[:, 1], states[:, 2], states[:, 0]))
    losses = states[order, 2]
    before = np.concatenate(([np.inf], np.minimum.accumulate(losses)[:-1]))
    found: np.ndarray = order[losses < before]
    return found


def _thinned(states: np.ndarray, most: int, timed: bool) -> np.ndarray:
    """Indices of about `most` states: the least loss in each cell of size (and time), the smallest, the fastest."""

    def cells(values: np.ndarray, count: int) -> np.ndarray:
        span = values.max() - values.min()
        found: np.ndarray = np.minimum((values - values.min()) / (span or 1.0) * count, count - 1).astype(
            np.int64
        )
        return found

    if timed:
        side = max(2, int(most**0.5))
        cell = cells(states[:, 0], side) * side + cells(states[:, 1], side)
    else:
        cell = cells(states[:, 0], most)
    order = np.lexsort((states[:, 2], cell))
    first = np.concatenate(([True], np.diff(cell[order]) > 0))
    ends = [int(np.argmin(states[:, 0])), int(np.argmin(states[:, 1]))]
    return np.unique(np.concatenate((order[first], ends)))

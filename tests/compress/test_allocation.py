"""Choosing widths: every allocation of small instances is tried, and the front must be what that gives."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.compress.allocation import (
    Option,
    Unit,
    allocation_of,
    pareto_front,
    uniform_allocations,
)
from tensormill.errors import InvalidArgument

WIDTHS = (2, 3, 4, 6, 8)


@st.composite
def instances(draw, most=5):
    units = []
    for index in range(draw(st.integers(1, most))):
        widths = sorted(draw(st.sets(st.sampled_from(WIDTHS), min_size=1, max_size=4)))
        options = tuple(
            Option(
                bits,
                loss=draw(st.integers(0, 40)) / 8,
                bytes=float(draw(st.integers(0, 30))),
                seconds=draw(st.integers(0, 20)) / 4,
            )
            for bits in widths
        )
        units.append(Unit((f"layer{index}",), options))
    return units


def every_allocation(units):
    for bits in itertools.product(*([option.bits for option in unit.options] for unit in units)):
        yield allocation_of(units, bits)


@settings(deadline=None, max_examples=150)
@given(units=instances(), limit=st.none() | st.integers(0, 100))
def test_the_front_is_that_of_all_allocations(units, limit):
    seconds = None if limit is None else limit / 4
    possible = [one for one in every_allocation(units) if seconds is None or one.seconds <= seconds]
    front = pareto_front(units, max_seconds=seconds)
    expected = {
        (one.bytes, one.loss)
        for one in possible
        if not any(
            (o.bytes <= one.bytes and o.loss < one.loss) or (o.bytes < one.bytes and o.loss <= one.loss)
            for o in possible
        )
    }
    assert [(one.bytes, one.loss) for one in front] == sorted(expected)
    for one in front:
        assert one == allocation_of(units, one.bits)
        assert seconds is None or one.seconds <= seconds


def model_like(units: int, seed: int):
    """Losses that fall by four per bit, sizes that rise with it, times that don't quite."""
    import random

    draw = random.Random(seed)
    found = []
    for index in range(units):
        size, weight = draw.choice([384, 1280]), draw.lognormvariate(0, 1.5)
        found.append(
            Unit(
                (f"layer{index}",),
                tuple(
                    Option(b, weight * 4.0**-b, size * (b + 0.2) + draw.random(), size * (b + draw.random()))
                    for b in WIDTHS
                ),
            )
        )
    return found


@pytest.mark.parametrize("timed", [False, True])
def test_thinning_costs_next_to_nothing_and_keeps_the_limit(timed):
    units = model_like(7, 3)
    seconds = 7 * 384 * 6.0 if timed else None
    possible = [one for one in every_allocation(units) if seconds is None or one.seconds <= seconds]
    front = pareto_front(units, max_seconds=seconds, most=300)
    assert all(seconds is None or one.seconds <= seconds for one in front)
    for share in (0.2, 0.5, 0.8):
        low, high = front[0].bytes, front[-1].bytes
        size = low + share * (high - low)
        best = min(one.loss for one in possible if one.bytes <= size)
        found = min(one.loss for one in front if one.bytes <= size)
        assert best <= found <= 1.05 * best


def test_a_large_model_takes_seconds_and_beats_one_width_for_all():
    units = model_like(224, 5)
    front = pareto_front(units, most=4096)
    assert all(a.bytes < b.bytes and a.loss > b.loss for a, b in itertools.pairwise(front))
    for uniform in uniform_allocations(units)[1:-1]:
        found = min(one.loss for one in front if one.bytes <= uniform.bytes)
        assert found < 0.9 * uniform.loss
    assert front[0].bits == (2,) * 224 and front[-1].bits == (8,) * 224


def test_a_width_that_is_larger_and_worse_is_never_chosen():
    units = [Unit(("a",), (Option(2, 1.0, 10), Option(3, 2.0, 12), Option(4, 0.5, 15)))]
    assert [one.bits for one in pareto_front(units)] == [(2,), (4,)]


def test_uniform_widths_are_those_that_all_units_offer():
    units = [
        Unit(("a",), (Option(2, 1.0, 10, 1.0), Option(4, 0.5, 15, 2.0))),
        Unit(("b",), (Option(4, 0.25, 5, 3.0), Option(8, 0.0, 9, 4.0))),
    ]
    (only,) = uniform_allocations(units)
    assert (only.bits, only.loss, only.bytes, only.seconds) == ((4, 4), 0.75, 20, 5.0)


def test_too_little_time_leaves_nothing():
    assert pareto_front([Unit(("a",), (Option(4, 0.5, 15, 2.0),))], max_seconds=1.0) == []


def test_what_makes_no_sense_is_refused():
    unit = Unit(("a",), (Option(4, 0.5, 15),))
    with pytest.raises(InvalidArgument, match="no units"):
        pareto_front([])
    with pytest.raises(InvalidArgument, match="without options"):
        pareto_front([unit, Unit(("b",), ())])
    with pytest.raises(InvalidArgument, match="no number"):
        pareto_front([Unit(("a",), (Option(4, float("nan"), 15),))])
    with pytest.raises(InvalidArgument, match="given 3 bits for a"):
        allocation_of([unit], [3])
    with pytest.raises(InvalidArgument, match="given 2 widths for 1 units"):
        allocation_of([unit], [4, 4])

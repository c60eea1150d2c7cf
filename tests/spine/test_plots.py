"""Ticks, number formats and the SVG itself: well-formed, complete, nothing outside, nothing that isn't
finite.
"""

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tensormill.errors import InvalidArgument
from tensormill.plots import (
    PLOT_STYLE,
    TONES,
    Bar,
    Cell,
    GridRow,
    Pair,
    PairGroup,
    Point,
    Series,
    bar_plot,
    format_value,
    grid_plot,
    line_plot,
    log_ticks,
    nice_ticks,
    pair_plot,
)

NASTY = "<b onload='x'>\"&</b>"
FINITE = st.floats(-1e6, 1e6, allow_nan=False)
POSITIVE = st.floats(1e-6, 1e6)
ANY = st.floats(1e-6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf])


def shapes(svg):
    """All elements; the SVG must parse and have finite numbers only."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        for name, value in element.attrib.items():
            if name not in ("class", "aria-label"):
                assert not re.search(r"nan|inf", value), (element.tag, name, value)
    return root


def named(root, tag):
    return [element for element in root.iter() if element.tag.endswith("}" + tag)]


def inside(root):
    _, _, width, height = map(float, root.get("viewBox").split())
    for circle in named(root, "circle"):
        x, y = float(circle.get("cx")), float(circle.get("cy"))
        assert -10 <= x <= width and -10 <= y <= height
    for line in named(root, "line"):
        for name in ("x1", "x2"):
            assert -10 <= float(line.get(name)) <= width
        for name in ("y1", "y2"):
            assert -10 <= float(line.get(name)) <= height


@given(low=FINITE, high=FINITE, count=st.integers(2, 10))
def test_ticks_are_inside_even_and_few(low, high, count):
    low, high = min(low, high), max(low, high)
    assume(high - low > 1e-9 * max(1.0, abs(low), abs(high)))
    ticks = nice_ticks(low, high, count)
    slack = 1e-6 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert len(ticks) <= count + 1
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert all(math.isclose(step, steps[0], rel_tol=1e-3) for step in steps)


@given(low=POSITIVE, factor=st.floats(1.01, 1e8))
def test_log_ticks_are_inside_in_order_and_few(low, factor):
    ticks = log_ticks(low, low * factor)
    assert ticks == sorted(ticks) and len(set(ticks)) == len(ticks)
    assert all(low * (1 - 1e-6) <= tick <= low * factor * (1 + 1e-6) for tick in ticks)
    assert 1 <= len(ticks) <= 14


def test_ticks_are_the_expected_ones():
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert nice_ticks(2.0, 4.6, 6) == [2, 2.5, 3, 3.5, 4, 4.5]
    assert nice_ticks(3, 3) == [3]
    assert log_ticks(1e-4, 1) == [1e-4, 1e-3, 1e-2, 1e-1, 1]
    assert log_ticks(20, 70) == [20, 30, 40, 50, 60, 70]


@pytest.mark.parametrize("ends", [(1, 0), (math.nan, 1), (0, math.inf)])
def test_ticks_refuse_bad_ranges(ends):
    with pytest.raises(InvalidArgument):
        nice_ticks(*ends)
    with pytest.raises(InvalidArgument):
        log_ticks(*ends)
    with pytest.raises(InvalidArgument):
        log_ticks(0, 1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\N{EN DASH}"),
        (math.nan, "NaN"),
        (math.inf, "infinite"),
        (-math.inf, "-infinite"),
        (0, "0"),
        (5.4321, "5.43"),
        (-0.5, "-0.500"),
        (9.996, "10.0"),
        (999.6, "1,000"),
        (12345.6, "12,346"),
        (0.0123, "0.0123"),
        (1.234e-5, "1.23e-05"),
        (3e12, "3.00e+12"),
    ],
)
def test_numbers_are_readable(value, text):
    assert format_value(value) == text


@given(value=st.floats(1e-8, 1e12), digits=st.integers(2, 6))
def test_numbers_keep_their_digits(value, digits):
    shown = float(format_value(value, digits).replace(",", ""))
    assert math.isclose(shown, value, rel_tol=0.51 * 10.0 ** (1 - digits))


def test_lines_show_every_point_with_its_title():
    series = [
        Series("RTN", [Point(2, 10.0, "two"), Point(4, 6.0, "four")], "rtn"),
        Series("AWQ", [Point(4, 5.8)], "awq"),
    ]
    svg = line_plot(series, x_label="bits per weight", y_label="perplexity", reference=("original", 5.6))
    root = shapes(svg)
    inside(root)
    texts = [element.text for element in named(root, "text")]
    assert {"bits per weight", "perplexity", "RTN", "AWQ", "original"} <= set(texts)
    titles = [element.text for element in named(root, "title")]
    assert titles == ["original: 5.600", "two", "four", "AWQ: 4.00, 5.800"]
    circles = [c for c in named(root, "circle") if c.get("class") == "mark rtn"][:2]
    assert float(circles[0].get("cy")) < float(circles[1].get("cy"))  # the higher value stands higher
    assert float(circles[0].get("cx")) < float(circles[1].get("cx"))


def test_a_wide_range_gets_a_logarithmic_axis_and_says_so():
    points = [Point(2, 900.0), Point(3, 30.0), Point(4, 6.0)]
    wide = line_plot([Series("a", points)], x_label="x", y_label="y")
    narrow = line_plot([Series("a", points[2:])], x_label="x", y_label="y")
    assert "y (log scale)" in wide and "(log scale)" not in narrow
    negative = line_plot([Series("a", [Point(0, -5.0), Point(1, 900.0)])], x_label="x", y_label="y")
    assert "(log scale)" not in negative
    shapes(negative)


@given(
    points=st.lists(st.tuples(ANY, ANY), max_size=6),
    level=ANY,
    labels=st.lists(st.text(max_size=30), min_size=1, max_size=4),
)
def test_any_values_give_a_sound_line_plot(points, level, labels):
    series = [Series(re.sub(r"[^ -~]", "", label), [Point(x, y) for x, y in points]) for label in labels]
    svg = line_plot(series, x_label="x", y_label="y", reference=("level", level))
    drawable = any(math.isfinite(x) and math.isfinite(y) for x, y in points)
    assert bool(svg) == drawable
    if svg:
        inside(shapes(svg))


@given(pairs=st.lists(st.tuples(ANY, ANY), max_size=8), groups=st.integers(1, 30))
def test_any_values_give_a_sound_pair_plot(pairs, groups):
    bands = [PairGroup(f"kind_{i}", [Pair(*pair) for pair in pairs]) for i in range(groups)]
    svg = pair_plot(bands, before="a", after="b", y_label="loss")
    finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
    assert bool(svg) == bool(finite)
    if svg:
        root = shapes(svg)
        inside(root)
        assert len(named(root, "title")) == groups * len(finite)


def test_pairs_show_direction_and_names():
    svg = pair_plot(
        [PairGroup("q_proj", [Pair(0.2, 0.1, "first"), Pair(0.1, 0.3)])],
        before="RTN",
        after="AWQ",
        y_label="loss",
    )
    root = shapes(svg)
    stems = [line.get("class") for line in named(root, "line") if "stem" in line.get("class")]
    assert stems == ["stem better", "stem worse"]
    assert [title.text for title in named(root, "title")] == ["first", "RTN 0.100, AWQ 0.300"]
    assert "q_proj" in [text.text for text in named(root, "text")]


def test_bars_are_in_proportion():
    svg = bar_plot(
        [Bar("before", 40.0, "40 MB", "original"), Bar("after", 10.0, "10 MB", "awq")], title="size"
    )
    root = shapes(svg)
    long, short = (float(bar.get("width")) for bar in named(root, "rect"))
    assert long == pytest.approx(4 * short, rel=0.01)
    assert {"size", "before", "after", "40 MB", "10 MB"} <= {text.text for text in named(root, "text")}
    assert bar_plot([], title="size") == ""
    shapes(bar_plot([Bar("a", math.nan, "NaN"), Bar("b", -1.0, "-1"), Bar("c", 0.0, "0")], title="odd"))


def test_texts_are_escaped():
    plots = (
        line_plot(
            [Series(NASTY, [Point(1, 2, NASTY)])],
            x_label=NASTY,
            y_label=NASTY,
            reference=(NASTY, 1.0),
            description=NASTY,
        ),
        pair_plot([PairGroup(NASTY, [Pair(1, 2, NASTY)])], before=NASTY, after=NASTY, y_label=NASTY),
        bar_plot([Bar(NASTY, 1.0, NASTY, "awq", NASTY)], title=NASTY, description=NASTY),
    )
    for svg in plots:
        root = shapes(svg)
        assert not named(root, "b")
        assert NASTY in [element.text for element in root.iter()]


def test_style_covers_every_tone_in_light_and_dark():
    light, dark = PLOT_STYLE.split("@media (prefers-color-scheme: dark)")
    for tone in TONES:
        assert f"--{tone}:" in light and f"--{tone}:" in dark and f".plot .{tone}.mark" in light
    assert light.count("{") == light.count("}") and dark.count("{") == dark.count("}")


@given(
    rows=st.lists(st.lists(st.none() | ANY, min_size=1, max_size=90), min_size=1, max_size=5),
)
def test_a_grid_has_a_cell_for_every_number(rows):
    grid = [GridRow(NASTY, [None if value is None else Cell(value) for value in values]) for values in rows]
    svg = grid_plot(grid, title=NASTY)
    finite = [v for values in rows for v in values if v is not None and math.isfinite(v)]
    if not finite:
        assert svg == ""
        return
    root = shapes(svg)
    cells = [rect for rect in named(root, "rect") if rect.get("class") == "cell"]
    assert len(cells) == len(finite) == len(named(root, "title"))
    _, _, width, height = map(float, root.get("viewBox").split())
    for cell in cells:
        assert 0 <= float(cell.get("x")) <= width - float(cell.get("width"))
        assert 0 <= float(cell.get("y")) <= height - float(cell.get("height"))
    shades = [float(cell.get("fill-opacity")) for cell in cells]
    assert shades[finite.index(max(finite))] == max(shades)


def test_a_grid_without_rows_is_nothing():
    assert grid_plot([], title="bits") == ""


@given(names=st.lists(st.text("abcdefgh ", min_size=1, max_size=50), min_size=1, max_size=12))
def test_a_legend_of_any_length_stays_inside(names):
    svg = line_plot(
        [Series(name, [Point(1, 2), Point(2, 3)]) for name in names], x_label="x", y_label="y", width=520
    )
    root = shapes(svg)
    for text in named(root, "text"):
        if text.get("text-anchor") == "start":
            assert float(text.get("x")) >= 0 and float(text.get("y")) < 320
    marks = re.findall(r"translate\(([-\d.]+) ([-\d.]+)\)", svg)
    assert len(marks) == len(names)
    assert all(float(x) >= 8 and float(y) >= 8 for x, y in marks)
    assert len(set(marks)) == len(names)  # none on top of another

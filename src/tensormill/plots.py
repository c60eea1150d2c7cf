"""Small plots as inline SVG: lines, before-and-after pairs, bars; no script, no font and no file from
elsewhere.

Colours and type come from CSS classes, for which `PLOT_STYLE` has rules for light and dark; a page puts it in
its style sheet once. Every mark has a title, which browsers show on hovering and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from tensormill.errors import InvalidArgument

__all__ = [
    "PLOT_STYLE",
    "Bar",
    "Cell",
    "GridRow",
    "Pair",
    "PairGroup",
    "Point",
    "Series",
    "bar_plot",
    "format_value",
    "grid_plot",
    "line_plot",
    "log_ticks",
    "method_label",
    "method_series",
    "nice_ticks",
    "pair_plot",
]

TONES = ("original", "rtn", "gptq", "awq", "other")

# Okabe and Ito's colour-blind-safe hues, lightened for dark backgrounds.
PLOT_STYLE = (
    """\
.plot { display: block; width: 100%; height: auto; overflow: visible; font: 12px/1 system-ui, sans-serif;
  --ink: #1f2933; --soft: #5f6b7a; --grid: #e3e7ec; --band: #f5f7f9; --original: #6b7785; --rtn: #d55e00;
  --gptq: #00875f; --awq: #0069b4; --other: #a8508a; }
.plot text { fill: var(--soft); }
.plot .strong { fill: var(--ink); font-weight: 600; }
.plot .grid { stroke: var(--grid); stroke-width: 1; }
.plot .axis { stroke: var(--soft); stroke-width: 1; }
.plot .band { fill: var(--band); }
.plot .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.plot .reference { stroke-width: 1.5; stroke-dasharray: 6 4; }
.plot .mark { stroke: none; }
.plot .hollow { fill: none; stroke-width: 1.5; }
.plot .stem { stroke-width: 1.5; opacity: 0.45; }
.plot .better { stroke: var(--awq); }
.plot .worse { stroke: var(--rtn); }
.plot .cell { fill: var(--awq); stroke: none; }
"""
    + "".join(
        f".plot .{tone}.mark, .plot .{tone}.bar {{ fill: var(--{tone}); }}\n"
        f".plot .{tone}.line, .plot .{tone}.reference, .plot .{tone}.hollow {{ stroke: var(--{tone}); }}\n"
        for tone in TONES
    )
    + """\
@media (prefers-color-scheme: dark) {
  .plot { --ink: #e6eaef; --soft: #9aa7b5; --grid: #2d3742; --band: #1b222a; --original: #9aa7b5; --rtn:
    #f0883e; --gptq: #3fc79a; --awq: #58a6ff; --other: #d28bc0; }
}
"""
)

_TEXT_WIDTH = 6.6  # of an average character at 12 px, and of one in bold
_BOLD_WIDTH = 7.4


@dataclass(frozen=True)
class Point:
    """A point of a line: position, what hovering shows, and whether a ring marks it."""

    x: float
    y: float
    title: str = ""
    ringed: bool = False


@dataclass(frozen=True)
class Series:
    """Markers, joined by a line or not; `tone` is one of `TONES`; `fit` is drawn dashed, between its points."""

    name: str
    points: Sequence[Point]
    tone: str = "other"
    joined: bool = True
    fit: Sequence[Point] = ()


@dataclass(frozen=True)
class Pair:
    """The same quantity before and after, and what hovering shows."""

    before: float
    after: float
    title: str = ""


@dataclass(frozen=True)
class PairGroup:
    """Pairs that stand together under one label."""

    label: str
    pairs: Sequence[Pair]


@dataclass(frozen=True)
class Bar:
    """A horizontal bar, the text at its end, and what hovering shows; `tone` is one of `TONES`."""

    label: str
    value: float
    text: str
    tone: str = "other"
    title: str = ""


@dataclass(frozen=True)
class Cell:
    """A number in a grid, and what hovering shows."""

    value: float
    title: str = ""


@dataclass(frozen=True)
class GridRow:
    """Cells that stand in a row under one label; None leaves a gap."""

    label: str
    cells: Sequence[Cell | None]


def method_label(method: str) -> str:
    """How a method is called in plots and tables: short names are abbreviations.

    Example:
        >>> method_label("awq"), method_label("original"), method_label("awq:rounding=gptq:n_grid=40")
        ('AWQ', 'original', 'AWQ, rounding gptq, n_grid 40')
    """
    name, *settings = method.split(":")
    named = [setting.replace("=", " ") for setting in settings]
    return ", ".join([name.upper() if len(name) <= 4 else name, *named])


def method_series(points: Iterable[tuple[str, Point]]) -> list[Series]:
    """A line for each method, in its own colour, in the order in which methods first appear.

    Args:
        points: Methods' names, each with one point.
    """
    lines: dict[str, list[Point]] = {}
    for method, point in points:
        lines.setdefault(method, []).append(point)
    return [
        Series(method_label(method), found, method if method in TONES else "other")
        for method, found in lines.items()
    ]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) inside [low, high], about `count` of them.

    Example:
        >>> nice_ticks(0.0, 10.0, 5)
        [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]

    Raises:
        InvalidArgument: An end that isn't finite, or low above high.
    """
    _check_range(low, high)
    if low == high:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Rounding to the step's own digits turns 0.30000000000000004 into 0.3.
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(i * step, digits) + 0.0 for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers inside [low, high] for a logarithmic axis: decades, with 2 and 5 or all digits if few
    fit.

    Raises:
        InvalidArgument: An end that isn't finite and above zero, or low above high.
    """
    _check_range(low, high)
    if low <= 0:
        raise InvalidArgument(
            f"given the range {low} to {high}, expected ends above 0 for a logarithmic axis"
        )
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, (last - first) // 6)
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        values = [digit * 10.0**power for power in range(first, last + 1, stride) for digit in digits]
        ticks = [float(f"{v:.6g}") for v in values if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        if len(ticks) >= (3 if digits == (1,) else 4):
            return ticks
    return nice_ticks(low, high) if len(ticks) < 3 else ticks


def _check_range(low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise InvalidArgument(f"given the range {low} to {high}, expected finite ends in order")


def format_value(value: float | None, digits: int = 3) -> str:
    """A number for people: `digits` significant digits, thousands separated, NaN and infinity by name.

    Example:
        >>> format_value(12345.6), format_value(0.00001234), format_value(5.4321), format_value(math.nan)
        ('12,346', '1.23e-05', '5.43', 'NaN')
    """
    if value is None:
        return "\N{EN DASH}"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 10.0 ** (1 - digits) * 0.1 or size >= 1e9:
        return f"{value:.{digits - 1}e}"
    rounded = float(f"{value:.{digits - 1}e}") if size < 10 ** (digits - 1) else round(value)
    places = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{places}f}"


def _tick_label(value: float) -> str:
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:e}".split("e")
        number = f"{float(mantissa):g}"
        return f"{number}e{int(exponent)}"
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:g}"


class _Axis:
    """Maps values to pixels, linearly or by logarithm."""

    def __init__(self, values: Iterable[float], start: float, end: float, *, log: bool, pad: float) -> None:
        found = list(values)
        low, high = min(found), max(found)
        self.log = log
        if log:
            low, high = math.log10(low), math.log10(high)
        span = high - low or (0.3 if log else abs(high) * 0.2 or 1.0)
        if high == low:
            low, high = low - span / 2, high + span / 2
        self.low, self.high = low - pad * span, high + pad * span
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        position = math.log10(value) if self.log else value
        return self.start + (position - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        if self.log:
            return log_ticks(10.0**self.low, 10.0**self.high)
        return nice_ticks(self.low, self.high, count)


def _wants_log(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > 3


def _svg(width: int, height: int, description: str, body: Iterable[str]) -> str:
    text = escape(description, quote=True)
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{text}" '
        f'xmlns="http://www.w3.org/2000/svg">\n' + "\n".join(body) + "\n</svg>"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", extra: str = "", css: str = "") -> str:
    css = f' class="{css}"' if css else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{css}{extra}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def _rectangle(x: float, y: float, width: float, height: float, css: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{css}"/>'


def _titled(shape: str, title: str) -> str:
    return f"<g>{shape}<title>{escape(title)}</title></g>" if title else shape


def _marker(kind: int, x: float, y: float, css: str, size: float = 4.5) -> str:
    """Circle, square, triangle, diamond: series differ in shape as well as in colour."""
    if kind % 4 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" class="{css}"/>'
    corners = {
        1: ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
        2: ((0, -1.15), (1.05, 0.8), (-1.05, 0.8)),
        3: ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    }[kind % 4]
    points = " ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" class="{css}"/>'


def _frame(left: float, right: float, bottom: float, y_axis: _Axis) -> list[str]:
    parts = []
    for tick in y_axis.ticks(5):
        y = y_axis(tick)
        parts.append(_line(left, y, right, y, "grid"))
        parts.append(_text(left - 8, y + 4, _tick_label(tick), anchor="end"))
    parts.append(_line(left, bottom, right, bottom, "axis"))
    return parts


def _heading(
    y_label: str, log: bool, right: float, entries: Sequence[tuple[str, str]]
) -> tuple[list[str], float]:
    """The y axis's name at the left and a legend at the right, on one line if they fit, else the name below as
    many lines of legend as it takes; and where the plot begins.

    The name stands above its axis, not turned: it is read at a glance and never meets the tick labels. A
    legend entry is a marker, drawn around the origin, and a name.
    """
    label = y_label + (" (log scale)" if log else "")
    rows: list[list[tuple[str, str, float]]] = [[]]
    for marker, name in entries:
        width = len(name) * _TEXT_WIDTH + 32
        if rows[-1] and sum(entry[2] for entry in rows[-1]) + width > right:
            rows.append([])
        rows[-1].append((marker, name, width))
    fits = len(rows) == 1 and len(label) * _BOLD_WIDTH + sum(entry[2] for entry in rows[0]) <= right
    parts = []
    for number, row in enumerate(rows):
        x, y = right, 14.0 + 20 * number
        for marker, name, width in reversed(row):
            parts.append(_text(x - width + 32, y, name))
            parts.append(f'<g transform="translate({x - width + 20:.1f} {y - 4:.1f})">{marker}</g>')
            x -= width
    bottom = 14.0 if fits else 18.0 + 20 * len(rows)
    parts.append(_text(0, bottom, label, css="strong"))
    return parts, bottom + 20


def line_plot(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    reference: tuple[str, float] | None = None,
    description: str = "",
    width: int = 520,
    height: int = 320,
    log_x: bool = False,
) -> str:
    """Lines with markers; the y axis is logarithmic where its values span more than a factor of three.

    Args:
        series: The lines; points that aren't finite are left out.
        x_label: What x is, with its unit.
        y_label: What y is, with its unit.
        reference: Name and height of a dashed level line.
        description: What a screen reader says.
        width: In CSS pixels.
        height: In CSS pixels.
        log_x: Whether the x axis is logarithmic where all x are above zero.

    Returns:
        One ``<svg>`` element; the empty string if nothing can be drawn.
    """
    drawn = [
        (kind, one, [p for p in one.points if math.isfinite(p.x) and math.isfinite(p.y)])
        for kind, one in enumerate(series)
    ]
    drawn = [(kind, one, points) for kind, one, points in drawn if points]
    if not drawn:
        return ""
    level = reference[1] if reference is not None and math.isfinite(reference[1]) else None
    ys = [p.y for _, _, points in drawn for p in points] + ([level] if level is not None else [])
    xs = [p.x for _, _, points in drawn for p in points]
    left, right, bottom = 52.0, width - 12.0, height - 44.0
    log = _wants_log(ys)
    entries = [(_marker(kind, 0, 0, f"mark {one.tone}"), one.name) for kind, one, _ in drawn]
    if reference is not None and level is not None:
        entries.insert(0, (_line(-8, 0, 6, 0, "reference original"), reference[0]))
    parts, top = _heading(y_label, log, right, entries)
    y_axis = _Axis(ys, bottom, top, log=log, pad=0.08)
    x_axis = _Axis(xs, left, right, log=log_x and min(xs) > 0, pad=0.06)
    parts += _frame(left, right, bottom, y_axis)
    for tick in x_axis.ticks(6):
        parts.append(_line(x_axis(tick), bottom, x_axis(tick), bottom + 5, "axis"))
        parts.append(_text(x_axis(tick), bottom + 18, _tick_label(tick), anchor="middle"))
    parts.append(_text((left + right) / 2, height - 6, x_label, anchor="middle"))
    if reference is not None and level is not None:
        line = _line(left, y_axis(level), right, y_axis(level), "reference original")
        parts.append(_titled(line, f"{reference[0]}: {format_value(level, 4)}"))
    for kind, one, points in drawn:
        if one.joined:
            path = " ".join(f"{x_axis(p.x):.1f},{y_axis(p.y):.1f}" for p in sorted(points, key=lambda p: p.x))
            parts.append(f'<polyline points="{path}" class="line {one.tone}"/>')
        fit = [p for p in one.fit if math.isfinite(p.x) and math.isfinite(p.y) and not (log and p.y <= 0)]
        if len(fit) > 1:
            path = " ".join(f"{x_axis(p.x):.1f},{y_axis(p.y):.1f}" for p in fit)
            parts.append(f'<polyline points="{path}" class="reference {one.tone}" fill="none"/>')
        for p in points:
            marker = _marker(kind, x_axis(p.x), y_axis(p.y), f"mark {one.tone}")
            title = p.title or f"{one.name}: {format_value(p.x)}, {format_value(p.y, 4)}"
            if p.ringed:
                marker += _marker(0, x_axis(p.x), y_axis(p.y), f"hollow {one.tone}", 8.5)
            parts.append(_titled(marker, title))
    return _svg(width, height, description or f"{y_label} against {x_label}", parts)


def pair_plot(
    groups: Sequence[PairGroup],
    *,
    before: str,
    after: str,
    y_label: str,
    description: str = "",
    width: int = 1040,
    height: int = 340,
) -> str:
    """A stem from "before" (hollow) to "after" (filled) for each pair, in labelled bands.

    The y axis is logarithmic where the values span more than a factor of three.

    Args:
        groups: The bands, from left to right; pairs that aren't finite are left out.
        before: Name of the hollow marks.
        after: Name of the filled marks.
        y_label: What y is, with its unit.
        description: What a screen reader says.
        width: In CSS pixels.
        height: In CSS pixels.

    Returns:
        One ``<svg>`` element; the empty string if nothing can be drawn.
    """
    bands = [
        (group.label, [p for p in group.pairs if math.isfinite(p.before) and math.isfinite(p.after)])
        for group in groups
    ]
    bands = [(label, pairs) for label, pairs in bands if pairs]
    values = [value for _, pairs in bands for p in pairs for value in (p.before, p.after)]
    if not values:
        return ""
    left, right, bottom = 60.0, width - 12.0, height - 34.0
    step = (right - left) / sum(len(pairs) + 1 for _, pairs in bands)
    widest = max(len(label) * _TEXT_WIDTH for label, _ in bands)
    turned = any(len(label) * _TEXT_WIDTH > step * (len(pairs) + 1) for label, pairs in bands)
    if turned:
        bottom = height - 24 - min(110.0, widest * 0.75)
    log = _wants_log(values)
    entries = [(_marker(0, 0, 0, "hollow rtn", 4), before), (_marker(0, 0, 0, "mark awq"), after)]
    parts, top = _heading(y_label, log, right, entries)
    y_axis = _Axis(values, bottom, top, log=log, pad=0.06)
    x, labelled = left, -math.inf
    marks: list[str] = []
    size = max(1.6, min(4.5, step * 0.38))
    for number, (label, pairs) in enumerate(bands):
        span = step * (len(pairs) + 1)
        if number % 2 == 0:
            parts.append(_rectangle(x, top, span, bottom - top, "band"))
        middle = x + span / 2
        if turned and middle < labelled + 14:
            pass  # no room for its label; hovering still names it
        elif turned:
            labelled = middle
            turn = f' transform="rotate(-40 {middle:.1f} {bottom + 16:.1f})"'
            marks.append(_text(middle, bottom + 16, label, anchor="end", extra=turn))
        else:
            marks.append(_text(middle, bottom + 20, label, anchor="middle"))
        for i, p in enumerate(pairs):
            at = x + step * (i + 1)
            low, high = y_axis(p.before), y_axis(p.after)
            shape = _line(at, low, at, high, "stem " + ("worse" if p.after > p.before else "better"))
            shape += _marker(0, at, low, "hollow rtn", size * 0.85) + _marker(0, at, high, "mark awq", size)
            title = p.title or f"{before} {format_value(p.before)}, {after} {format_value(p.after)}"
            marks.append(_titled(shape, title))
        x += span
    parts += _frame(left, right, bottom, y_axis)
    parts += marks
    return _svg(width, height, description or f"{y_label} of each layer, {before} and {after}", parts)


def bar_plot(bars: Sequence[Bar], *, title: str, description: str = "", width: int = 520) -> str:
    """Horizontal bars from zero, each with its value written at the end.

    Args:
        bars: From top to bottom; a value that isn't finite or is below zero has no bar, only its text.
        title: What is shown, with its unit.
        description: What a screen reader says.
        width: In CSS pixels.

    Returns:
        One ``<svg>`` element; the empty string without bars.
    """
    if not bars:
        return ""
    left = 14 + max(len(bar.label) for bar in bars) * _TEXT_WIDTH
    room = width - left - 16 - max(len(bar.text) for bar in bars) * _BOLD_WIDTH
    longest = max((bar.value for bar in bars if math.isfinite(bar.value)), default=0.0)
    height = 34 + 32 * len(bars)
    parts = [_text(0, 14, title, css="strong")]
    for i, bar in enumerate(bars):
        y = 30 + 32 * i
        share = bar.value / longest if longest > 0 and math.isfinite(bar.value) else 0.0
        length = max(0.0, share) * max(40.0, room)
        shape = _rectangle(left, y, max(length, 1.0), 22, f"bar {bar.tone}")
        parts.append(_text(left - 10, y + 15, bar.label, anchor="end"))
        parts.append(_titled(shape, bar.title or f"{bar.label}: {bar.text}"))
        parts.append(_text(left + length + 8, y + 15, bar.text, css="strong"))
    parts.append(_line(left, 26, left, height - 4, "axis"))
    return _svg(width, height, description or title, parts)


def grid_plot(rows: Sequence[GridRow], *, title: str, description: str = "", width: int = 1040) -> str:
    """Numbers in a grid, darker where larger, each written in its cell.

    Args:
        rows: From top to bottom; values that aren't finite are left out.
        title: What is shown, with its unit.
        description: What a screen reader says.
        width: In CSS pixels at most.

    Returns:
        One ``<svg>`` element; the empty string without a finite value.
    """
    values = [
        cell.value for row in rows for cell in row.cells if cell is not None and math.isfinite(cell.value)
    ]
    if not values:
        return ""
    low, high = min(values), max(values)
    columns = max(len(row.cells) for row in rows)
    left = 14 + max(len(row.label) for row in rows) * _TEXT_WIDTH
    size = max(9.0, min(34.0, (width - left - 8) / columns))
    height = 26.0
    parts = [_text(0, 14, title, css="strong")]
    for number, row in enumerate(rows):
        y = 28 + number * height
        parts.append(_text(left - 10, y + 16, row.label, anchor="end"))
        for column, cell in enumerate(row.cells):
            if cell is None or not math.isfinite(cell.value):
                continue
            x = left + column * size
            share = (cell.value - low) / ((high - low) or 1.0)
            box = _rectangle(x + 0.5, y, size - 1, height - 2, "cell")
            shape = box.replace("/>", f' fill-opacity="{0.12 + 0.5 * share:.2f}"/>')
            shape += _text(x + size / 2, y + 16, _tick_label(cell.value), anchor="middle", css="strong")
            parts.append(_titled(shape, cell.title or f"{row.label}: {format_value(cell.value)}"))
    # A page scales plots to its width: a small grid must not become a large one.
    whole = max(left + columns * size + 8, 14 + len(title) * _BOLD_WIDTH, 520.0)
    return _svg(math.ceil(whole), math.ceil(34 + len(rows) * height), description or title, parts)

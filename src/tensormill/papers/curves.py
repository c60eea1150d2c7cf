"""Curves of a measurement: values along a size, and the power of the size with which they grow or fall."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensormill.errors import DataError, InvalidArgument

FEWEST_SIZES = 4


@dataclass(frozen=True)
class Exponent:
    """`y ~ factor * x ** value`; `low` to `high` is the interval of `value` at `confidence`."""

    value: float
    low: float
    high: float
    factor: float
    confidence: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Curve:
    """Measured values along a size, drawn on logarithmic axes; curves with equal labels share a plot.

    Args:
        name: what was measured ("solve", "dense Cholesky").
        x: sizes.
        y: values, one for each size.
        x_label: what x is, with its unit ("points").
        y_label: what y is, with its unit ("seconds").
        exponent: what `fit_exponent` found for a curve that should be a power, else None.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    x_label: str
    y_label: str
    exponent: Exponent | None = None

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or not len(self.x):
            raise InvalidArgument(
                f"curve {self.name!r}: given {len(self.x)} sizes and {len(self.y)} values, expected as many, and some"
            )
        if not (self.name and self.x_label and self.y_label):
            raise InvalidArgument(f"curve {self.name!r}: given an empty name or label, expected all three")

    def to_json(self) -> dict[str, Any]:
        """The curve as it is recorded.

        Raises:
            DataError: a size or value that isn't a finite number.
        """
        document: dict[str, Any] = {"name": self.name, "x_label": self.x_label, "y_label": self.y_label}
        for axis in ("x", "y"):
            document[axis] = [float(value) for value in getattr(self, axis)]
            if not all(map(math.isfinite, document[axis])):
                raise DataError(f"curve {self.name!r}: {axis} is {document[axis]}, expected finite numbers")
        if self.exponent is not None:
            e = self.exponent
            document["exponent"] = {
                "value": e.value,
                "low": e.low,
                "high": e.high,
                "factor": e.factor,
                "confidence": e.confidence,
            }
        return document


def fit_exponent(x: Sequence[float], y: Sequence[float], confidence: float = 0.95) -> Exponent:
    """The power p in `y ~ c * x ** p`, by least squares of log y on log x, with its Student-t interval.

    The interval says how well a power describes these points. It knows nothing of errors that the points
    share, or of a power that changes beyond them.

    Args:
        x: sizes above zero, at least four different ones.
        y: values above zero.
        confidence: of the interval.

    Raises:
        InvalidArgument: fewer sizes, lengths that differ, a confidence outside (0, 1), or something that is not above zero and
            finite.

    >>> fit_exponent([1, 2, 4, 8], [3, 12, 48, 192]).value
    2.0
    """
    from scipy import stats

    if len(x) != len(y) or len(set(x)) < FEWEST_SIZES:
        raise InvalidArgument(
            f"given {len(set(x))} different sizes and {len(y)} values, expected at least {FEWEST_SIZES}, and one value each"
        )
    if not all(math.isfinite(value) and value > 0 for value in (*x, *y)):
        raise InvalidArgument(f"given sizes {list(x)} and values {list(y)}, expected all finite and above 0")
    if not 0 < confidence < 1:
        raise InvalidArgument(f"given confidence {confidence}, expected one between 0 and 1")
    u, v = ([math.log(value) for value in values] for values in (x, y))
    slope, intercept = statistics.linear_regression(u, v)
    centre = statistics.fmean(u)
    residuals = sum((b - intercept - slope * a) ** 2 for a, b in zip(u, v, strict=True))
    error = math.sqrt(residuals / (len(u) - 2) / sum((a - centre) ** 2 for a in u))
    margin = error * float(stats.t.ppf((1 + confidence) / 2, len(u) - 2))
    value = round(slope, 12)
    return Exponent(value, value - margin, value + margin, math.exp(intercept), confidence)


def curve_plots(curves: Sequence[Mapping[str, Any]]) -> list[str]:
    """Recorded curves as SVG, one plot for each pair of labels; fitted powers are dashed."""
    from tensormill.plots import TONES, Point, Series, line_plot

    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for curve in curves:
        panels.setdefault((curve["x_label"], curve["y_label"]), []).append(curve)
    drawn = []
    for (x_label, y_label), panel in panels.items():
        series = []
        for number, curve in enumerate(panel):
            points = [Point(x, y) for x, y in zip(curve["x"], curve["y"], strict=True)]
            power = curve.get("exponent")
            name, fit = curve["name"], []
            if power is not None:
                fit = [
                    Point(x, power["factor"] * x ** power["value"])
                    for x in (min(curve["x"]), max(curve["x"]))
                ]
            tone = TONES[(3, 1, 2, 4, 0)[number % 5]]
            series.append(Series(name, points, tone, joined=power is None, fit=fit))
        drawn.append(
            line_plot(
                series, x_label=f"{x_label} (log scale)", y_label=y_label, width=720, height=360, log_x=True
            )
        )
    return [svg for svg in drawn if svg]

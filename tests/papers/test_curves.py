"""The fitted power of a curve, and what becomes of curves in records and pages."""

import math
import random
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensormill.errors import DataError, InvalidArgument
from tensormill.papers.catalogue import Curve, Measurement, Paper, Row
from tensormill.papers.curves import curve_plots, fit_exponent
from tensormill.papers.page import exponents, to_html
from tensormill.papers.records import read_records
from tensormill.papers.reproduce import reproduce

SIZES = [64, 128, 512, 4096, 32768]


@given(power=st.floats(-4, 4), factor=st.floats(1e-6, 1e6))
def test_a_power_is_found(power, factor):
    found = fit_exponent(SIZES, [factor * x**power for x in SIZES])
    assert found.value == pytest.approx(power, abs=1e-9)
    assert found.factor == pytest.approx(factor, rel=1e-6)
    assert found.low <= found.value <= found.high
    assert found.high - found.low < 1e-6


def test_the_interval_covers_as_often_as_it_says():
    generator = random.Random(1)
    covered = 0
    for _ in range(400):
        y = [x**0.5 * math.exp(generator.gauss(0, 0.1)) for x in SIZES]
        found = fit_exponent(SIZES, y, confidence=0.9)
        covered += found.low <= 0.5 <= found.high
    assert 0.85 < covered / 400 < 0.95


@pytest.mark.parametrize(
    ("x", "y", "confidence"),
    [
        ([1, 2, 4], [1, 2, 4], 0.95),
        ([1, 2, 2, 2], [1, 2, 2, 2], 0.95),
        ([1, 2, 4, 8], [1, 2, 4], 0.95),
        ([1, 2, 4, 8], [1, 2, 0, 8], 0.95),
        ([1, 2, 4, math.nan], [1, 2, 4, 8], 0.95),
        ([1, 2, 4, 8], [1, 2, 4, 8], 1.0),
    ],
)
def test_what_is_no_power_is_refused(x, y, confidence):
    with pytest.raises(InvalidArgument, match="given"):
        fit_exponent(x, y, confidence)


def test_a_curve_needs_names_and_as_many_values_as_sizes():
    for change in ({"name": ""}, {"y": [1.0]}, {"x": [], "y": []}, {"y_label": ""}):
        with pytest.raises(InvalidArgument):
            Curve(**{"name": "a", "x": [1, 2], "y": [1, 2], "x_label": "n", "y_label": "s", **change})
    with pytest.raises(DataError, match="finite"):
        Curve("a", [1, 2], [1, math.inf], "n", "s").to_json()


def curves():
    ours = [1e-6 * x for x in SIZES]
    return [
        Curve("ours", SIZES, ours, "points", "seconds", fit_exponent(SIZES, ours)),
        Curve("dense", SIZES, [1e-9 * x**2 for x in SIZES], "points", "seconds"),
        Curve("error", SIZES, [1 / x for x in SIZES], "points", "relative error"),
    ]


def test_curves_with_equal_labels_share_a_plot():
    plots = curve_plots([curve.to_json() for curve in curves()])
    assert len(plots) == 2
    shared = ElementTree.fromstring(plots[0])
    texts = [element.text for element in shared.iter() if element.tag.endswith("text")]
    assert {"ours", "dense", "points (log scale)", "seconds (log scale)"} <= set(texts)
    lines = [element.get("class") for element in shared.iter() if element.tag.endswith("polyline")]
    assert sum(line.startswith("reference") for line in lines) == 1  # the fit of the one that has one


def test_curves_are_recorded_and_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORMILL_RESULTS", str(tmp_path))
    paper = Paper(slug="toy", title="A <toy>", authors="Doe", arxiv="2401.00002", room="ops", figures=())

    @paper.claim("C1", statement="Linear", unit="exponent", criterion="linear in the points")
    def linear(run):
        found = curves()
        return Measurement([Row("exponent", found[0].exponent.value, "exponent")], True, curves=found)

    result = reproduce(paper, device="cpu")
    (record,) = read_records("toy")
    assert record.curves == result["claims"][0]["curves"] == [curve.to_json() for curve in curves()]
    (sentence,) = exponents(record.curves)
    assert sentence.startswith("ours: seconds ~ points^1.000 (1.000 to 1.000 at 95%, 5 sizes)")
    page = to_html(result)
    assert page.count("<svg") == 2 and sentence in page and "A &lt;toy&gt;" in page and "holds" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")

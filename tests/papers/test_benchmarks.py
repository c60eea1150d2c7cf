"""Recorded benchmarks of operators."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from tensormill.errors import DataError
from tensormill.ops.benchmark import Row
from tensormill.papers import benchmarks
from tensormill.papers.benchmarks import operator_sources, read_operator_records, record_benchmark

OPERATOR = "hadamard_transform"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORMILL_RESULTS", str(tmp_path))
    return tmp_path


def rows(*lengths: int, rows: int = 4, seconds: float = 2e-6) -> list[Row]:
    return [
        Row(
            {"rows": rows, "n": n, "dtype": "float32"},
            "cpu",
            seconds,
            1e-6,
            3e-6,
            1e-7,
            {"p": 2.0},
            {"p": 4e-6},
        )
        for n in lengths
    ]


def test_a_record_grows_and_is_read_again(folder):
    sources = operator_sources(OPERATOR)
    path = record_benchmark(OPERATOR, rows(64, 128), "cpu", sources)
    assert path.parent == folder / "operators" and path.name.startswith(f"{OPERATOR}-")
    record_benchmark(OPERATOR, rows(128, 256, seconds=5e-6), "cpu", sources)
    (record,) = read_operator_records()
    assert {row["shape"]["n"]: row["seconds"] for row in record.rows} == {64: 2e-6, 128: 5e-6, 256: 5e-6}
    assert not record.stale and record.versions["torch"]


def test_rows_of_another_source_are_dropped():
    sources = operator_sources(OPERATOR)
    changed = dict.fromkeys(sources, "0")
    record_benchmark(OPERATOR, rows(64), "cpu", changed)
    assert read_operator_records()[0].stale
    record_benchmark(OPERATOR, rows(128), "cpu", sources)
    (record,) = read_operator_records()
    assert [row["shape"]["n"] for row in record.rows] == [128] and not record.stale


def test_plots_stand_alone_one_for_each_setting():
    path = record_benchmark(
        OPERATOR, rows(64, 128, 256) + rows(64, 128, 256, rows=8), "cpu", operator_sources(OPERATOR)
    )
    plots = sorted(path.with_suffix("").glob("*.svg"))
    assert [plot.stem for plot in plots] == ["rows-4", "rows-8"]
    for plot in plots:
        text = plot.read_text()
        assert ElementTree.fromstring(text).tag.endswith("svg") and "tensormill" in text and "limit" in text


def test_without_a_dimension_that_varies_there_is_no_plot():
    path = record_benchmark(OPERATOR, rows(64), "cpu", operator_sources(OPERATOR))
    assert not path.with_suffix("").exists()
    assert benchmarks.benchmark_plots(read_operator_records()[0]) == {}


@pytest.mark.parametrize("text", ["", "[]", '{"operator": "x"}'])
def test_a_damaged_record_is_named(folder, text):
    (folder / "operators").mkdir()
    (folder / "operators" / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json"):
        read_operator_records()


def test_records_are_json_with_provenance(folder):
    path = record_benchmark(OPERATOR, rows(64), "cpu", operator_sources(OPERATOR))
    document = json.loads(path.read_text())
    assert {"device", "date", "versions", "sources", "rows", "revision"} <= set(document)

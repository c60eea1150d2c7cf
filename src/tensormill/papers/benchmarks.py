"""Recorded benchmarks of operators: `results/operators/<operator>-<device>.json`, and their plots beside them.

A record has a row for every shape and implementation, with the roofline limit and the peers' times of the same run,
and where it was made: device, versions, date, and a hash of each source that it vouches for. Measuring more shapes with
the same sources on the same device adds to the record; whatever another source measured is dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tensormill.errors import DataError, OutputError
from tensormill.ops.benchmark import Row, format_shape
from tensormill.papers.records import (
    device_label,
    foreign_sources,
    git_revision,
    hash_sources,
    results_folder,
    results_folders,
    versions,
)
from tensormill.plots import PLOT_STYLE, Point, Series, line_plot

#: What a benchmark depends on besides the operator's own folder.
_MEASURED = ("tensormill.ops.benchmark", "tensormill.measure")
_PEERS = ("humming-kernels", "gemlite", "onnxruntime")


@dataclass(frozen=True)
class OperatorRecord:
    """A recorded benchmark of one operator on one device.

    Attributes:
        operator: its name.
        device: what the device is called; device_kind is cpu or cuda.
        threads: of the CPU.
        date: UTC, of the latest measurement.
        versions, revision: of what ran.
        sources: hash by file of what was measured.
        rows: `benchmark.Row`s as JSON.
    """

    operator: str
    device: str
    device_kind: str
    threads: int
    date: str
    versions: dict[str, str]
    revision: str | None
    sources: dict[str, str]
    rows: list[dict[str, Any]]

    @property
    def stale(self) -> bool:
        """Whether a measured source has changed since."""
        foreign = foreign_sources(self.device_kind)
        now, then = (
            {name: value for name, value in files.items() if Path(name).suffix not in foreign}
            for files in (operator_sources(self.operator), self.sources)
        )
        return now != then


def operator_sources(operator: str) -> dict[str, str]:
    """Hash of every source that a benchmark of the operator measures, by its path."""
    return hash_sources((f"tensormill.ops.{operator}", *_MEASURED), f"operator {operator}")


def record_benchmark(operator: str, rows: Sequence[Row], device: str, sources: dict[str, str]) -> Path:
    """Write measured rows into the operator's record for this device, and its plots; returns the record's path.

    Args:
        operator: its name.
        rows: what `benchmark` returned.
        device: a torch device.
        sources: `operator_sources` taken before the run.

    Raises:
        OutputError: it can't be written; nothing is left behind.
    """
    import torch

    from tensormill.roofline import device_name

    record = OperatorRecord(
        operator,
        device_name(device),
        torch.device(device).type,
        torch.get_num_threads(),
        datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions(_PEERS),
        git_revision(),
        sources,
        [row.to_json() for row in rows],
    )
    path = results_folder() / "operators" / f"{operator}-{device_label(record.device)}.json"
    if path.is_file():
        before = read_operator_record(path)
        if before.sources == sources:
            measured = {_key(row) for row in record.rows}
            kept = [row for row in before.rows if _key(row) not in measured]
            record = OperatorRecord(**{**asdict(record), "rows": kept + record.rows})
    _write(path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")
    for name, svg in benchmark_plots(record).items():
        _write(path.with_suffix("") / f"{name}.svg", svg)
    return path


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return format_shape(row["shape"]), row["implementation"]


def _write(path: Path, text: str) -> None:
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise OutputError(f"given {path} for results, which can't be written ({error.strerror})") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def read_operator_record(path: Path) -> OperatorRecord:
    """Read one record.

    Raises:
        DataError: the file can't be read or isn't a record.
    """
    try:
        return OperatorRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"given {path}, expected a recorded benchmark ({type(error).__name__}: {error}); delete it and measure "
            "again with: tensormill bench --record"
        ) from error


def read_operator_records() -> list[OperatorRecord]:
    """All recorded benchmarks, by operator and device.

    Raises:
        DataError: a file among them isn't one.
    """
    found = {
        path.name: path
        for folder in results_folders()
        for path in sorted((folder / "operators").glob("*.json"))
    }
    return [read_operator_record(path) for _, path in sorted(found.items())]


def benchmark_plots(record: OperatorRecord) -> dict[str, str]:
    """Plots of time against the dimension that varies most, one for each setting of the others, by file name.

    Each is an SVG that stands alone: our fastest implementation, the limit, and every peer.
    """
    if not record.rows:
        return {}
    names = {name for row in record.rows for name in row["shape"]}
    counted = {name: len({repr(row["shape"].get(name)) for row in record.rows}) for name in names}
    numeric = [
        name for name in names if all(type(row["shape"].get(name)) in (int, float) for row in record.rows)
    ]
    if not numeric:
        return {}
    along = max(sorted(numeric), key=lambda name: counted[name])
    if counted[along] < 3:
        return {}
    panels: dict[tuple[tuple[str, Any], ...], list[dict[str, Any]]] = {}
    for row in record.rows:
        setting = tuple((k, v) for k, v in row["shape"].items() if k != along)
        panels.setdefault(setting, []).append(row)
    varying = {name for name in names if name != along and counted[name] > 1}
    return {
        _slug(setting, varying): _standing_alone(_panel(rows, along, setting, varying))
        for setting, rows in panels.items()
        if len({row["shape"][along] for row in rows}) > 2
    }


def _slug(setting: Iterable[tuple[str, Any]], varying: set[str]) -> str:
    chosen = [f"{name}-{value}" for name, value in setting if name in varying]
    return device_label("-".join(chosen)) or "all"


def _panel(
    rows: Sequence[dict[str, Any]], along: str, setting: Iterable[tuple[str, Any]], varying: set[str]
) -> str:
    by_x: dict[float, dict[str, Any]] = {}
    for row in rows:
        x = row["shape"][along]
        if x not in by_x or row["seconds"] < by_x[x]["seconds"]:
            by_x[x] = row
    peers = sorted({peer for row in by_x.values() for peer in row["peer_seconds"]})
    lines = [
        Series("tensormill", [Point(x, 1e6 * row["seconds"]) for x, row in by_x.items()], "awq"),
        Series("limit", [Point(x, 1e6 * row["limit_seconds"]) for x, row in by_x.items()], "original"),
    ]
    tones = ("rtn", "gptq", "other")
    for i, peer in enumerate(peers):
        points = [
            Point(x, 1e6 * row["peer_seconds"][peer])
            for x, row in by_x.items()
            if peer in row["peer_seconds"]
        ]
        lines.append(Series(peer, points, tones[i % len(tones)]))
    title = ", ".join(f"{name} {value}" for name, value in setting if name in varying)
    return line_plot(
        lines,
        x_label=along.replace("_", " "),
        y_label=f"microseconds{': ' + title if title else ''}",
        log_x=True,
        width=640,
        height=380,
    )


def _standing_alone(svg: str) -> str:
    head, _, rest = svg.partition(">\n")
    return f"{head}>\n<style>{PLOT_STYLE}</style>\n{rest}\n"

"""Measure a paper's claims again on this machine, and list what has been measured."""

from __future__ import annotations

import importlib.util
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tensormill.errors import InvalidArgument, TensormillError
from tensormill.papers import records
from tensormill.papers.catalogue import (
    SCALES,
    Claim,
    ClaimNotMeasurable,
    Paper,
    Run,
    all_papers,
    find_paper,
)

Progress = Callable[[str, float | None], None]

_log = logging.getLogger(__name__)


def reproduce(
    slug: str | Paper,
    scale: str = "quick",
    device: str | None = None,
    claims: Sequence[str] | None = None,
    record: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the claims of one paper.

    A claim that can't be measured here, or that raises, is reported with `holds` None and the reason, and
    doesn't stop the others.

    Args:
        slug: a paper's slug, or a paper.
        scale: "quick" (a laptop CPU, about a minute) or "full".
        device: torch device; None takes the first GPU if there is one, else the CPU.
        claims: ids of the claims to measure; None measures all.
        record: write each measured claim to the results folder.
        progress: called with a message and the share done (0 to 1, None when unknown).

    Returns:
        {paper, title, device, scale, status, claims: [{id, statement, criterion, paper_value, unit, holds, reason,
        seconds, rows, curves}]}; a row is {what, value, unit} and, where measured, spread, peers, limit and
        setting; a curve is {name, x, y, x_label, y_label} and, where a power was fitted, exponent. `status` is
        "planned" and `claims` empty for a paper that has no claim yet.

    Raises:
        InvalidArgument: an unknown paper, scale, claim, or a device that isn't there.
        OutputError: the results folder can't be written; found before anything is measured.
    """
    from tensormill.roofline import device_name

    paper = slug if isinstance(slug, Paper) else find_paper(slug)
    if scale not in SCALES:
        raise InvalidArgument(f"given scale {scale!r}, expected one of {', '.join(SCALES)}")
    device = _checked_device(device)
    chosen = _chosen(paper, claims)
    say: Progress = progress or (lambda message, fraction: None)
    if not paper.claims:
        say(f"{paper.slug}: planned, it has no claim to measure yet", 1.0)
    elif record:
        records.check_writable()
    # A damaged record stops the run here and not after the measuring.
    records.read_records(paper.slug)
    measured = []
    for index, claim in enumerate(chosen):
        share = _Share(say, f"{paper.slug} {claim.id}", index, len(chosen))
        measured.append(_measure(claim, Run(scale, device, report=share), record))
    return {
        "paper": paper.slug,
        "title": paper.title,
        "device": device_name(device),
        "scale": scale,
        "status": records.status(paper, records.read_records(paper.slug)),
        "claims": measured,
    }


class _Share:
    """Progress of one claim, shown as its share of the whole run."""

    def __init__(self, say: Progress, name: str, index: int, count: int) -> None:
        self.say, self.name, self.index, self.count = say, name, index, count

    def __call__(self, message: str, fraction: float | None) -> None:
        inside = min(max(fraction or 0.0, 0.0), 1.0)
        self.say(f"{self.name}: {message}", (self.index + inside) / self.count)


def _measure(claim: Claim, run: Run, record: bool) -> dict[str, Any]:
    result: dict[str, Any] = {
        "id": claim.id,
        "statement": claim.statement,
        "criterion": claim.criterion,
        "paper_value": claim.paper_value,
        "unit": claim.unit,
        "holds": None,
        "reason": _obstacle(claim, run),
        "seconds": None,
        "rows": [],
        "curves": [],
    }
    if result["reason"]:
        run.progress(result["reason"], 1.0)
        return result
    run.progress("measuring", 0.0)
    try:
        sources = records.source_hashes(claim)
        start = time.perf_counter()
        measurement = claim.function(run)
        made = records.make_record(
            claim,
            measurement,
            scale=run.scale,
            device=run.device,
            seconds=time.perf_counter() - start,
            sources=sources,
        )
    except ClaimNotMeasurable as error:
        result["reason"] = f"not measured: {error}"
    except Exception as error:
        _log.debug("claim %s of %s", claim.id, claim.paper, exc_info=True)
        result["reason"] = f"not measured: {_one_line(error)}"
    else:
        result.update(
            holds=made.holds, reason=made.reason, seconds=made.seconds, rows=made.rows, curves=made.curves
        )
        if record:
            run.progress(f"recorded in {records.write_record(made)}", 1.0)
        return result
    run.progress(result["reason"], 1.0)
    return result


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, TensormillError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{where}"


def _obstacle(claim: Claim, run: Run) -> str:
    """Why a claim can't run here; empty when it can."""
    if run.scale not in claim.scales:
        return f"not measured: it has no {run.scale} scale; run it with scale {' or '.join(claim.scales)}"
    missing = [problem for need in claim.needed(run.scale) if (problem := _missing(need, run.device))]
    return f"not measured: {run.scale} scale needs {', '.join(missing)}" if missing else ""


def _missing(need: str, device: str) -> str:
    kind, _, name = need.partition(":")
    if kind in ("cpu", "cuda"):
        return "" if device.partition(":")[0] == kind else f"device {kind}, given {device}"
    if kind == "python":
        try:
            found = importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):
            found = False
        return "" if found else f"the Python module {name} (not installed)"
    from tensormill.data import real_data_dir

    folder = real_data_dir()
    if folder is not None and (folder / name).is_dir():
        return ""
    return f"the data folder {name} (set TENSORMILL_DATA to the folder that holds it)"


def _chosen(paper: Paper, ids: Sequence[str] | None) -> list[Claim]:
    if ids is None:
        return list(paper.claims.values())
    if isinstance(ids, str):
        raise InvalidArgument(f"given claims={ids!r}, expected a list of ids")
    for id in ids:
        if id not in paper.claims:
            known = ", ".join(paper.claims) or "none yet (planned)"
            raise InvalidArgument(f"given claim {id!r} of {paper.slug}, expected one of: {known}")
    return [claim for id, claim in paper.claims.items() if id in ids]


def _checked_device(device: str | None) -> str:
    import torch

    if device is None:
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(f"given device {device!r}, expected cpu, cuda or cuda:<index>") from error
    if parsed.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"given device {device!r}, expected cpu, cuda or cuda:<index>")
    if parsed.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = parsed.index or 0
        if index >= count:
            raise InvalidArgument(
                f"given device {device!r}, expected one of the {count} GPUs of this machine; use cpu"
            )
        return f"cuda:{index}"
    return "cpu"


def papers() -> list[dict[str, Any]]:
    """The catalogue as `tensormill papers --json` prints it, in alphabetical order of slug.

    Returns:
        [{slug, title, arxiv, year, status, claims: [{id, statement, paper_value, unit, scale, holds, device,
        stale}]}]. A claim has one entry per recorded run; one that has none has a single entry whose scale,
        holds and device are None.

    Raises:
        DataError: a file in a results folder isn't a record.
    """
    recorded: dict[str, list[records.Record]] = {}
    for item in records.read_records():
        recorded.setdefault(item.paper, []).append(item)
    return [_entry(paper, recorded.get(paper.slug, [])) for paper in all_papers()]


def _entry(paper: Paper, recorded: Sequence[records.Record]) -> dict[str, Any]:
    claims = []
    for claim in paper.claims.values():
        what = {
            "id": claim.id,
            "statement": claim.statement,
            "paper_value": claim.paper_value,
            "unit": claim.unit,
        }
        runs = [item for item in recorded if item.claim == claim.id]
        claims += [
            {**what, "scale": run.scale, "holds": run.holds, "device": run.device, "stale": run.stale(claim)}
            for run in runs
        ]
        if not runs:
            claims.append({**what, "scale": None, "holds": None, "device": None, "stale": False})
    return {
        "slug": paper.slug,
        "title": paper.title,
        "arxiv": paper.arxiv,
        "year": paper.year,
        "status": records.status(paper, recorded),
        "claims": claims,
    }

"""The catalogue: what each paper claims, and the functions that measure those claims on this machine.

One file per paper, `tensormill/papers/<slug>.py` (or a package of that name), defines `PAPER = Paper(...)` with the
figures the paper publishes. The catalogue is the listing of that package: there is no central list to edit. A module whose name
starts with an underscore is shared measuring code, not a paper.

A claim is a function in the paper's file under the decorator `PAPER.claim`. It gets a `Run` (scale, device,
progress) and returns a `Measurement` (measured rows, whether the criterion holds, and why):

    @PAPER.claim(
        "C1",
        figure="speedup",                             # or statement=, paper_value=, unit=
        criterion="at least 1.8x on this device",     # what "holds" means, in one sentence
        scales=("quick", "full"),                     # what the function can run
        needs={"full": ("cuda",)},                    # what a scale can't do without
        measures=("tensormill.ops.linear_wna16",),    # the source that the record vouches for
        peers=("torch",),                             # distributions whose versions are recorded
    )
    def kernel_speed(run: Run) -> Measurement:
        from tensormill import measure                # heavy imports stay inside
        ...
        return Measurement([Row("4096 x 4096", ratio, "x", peers={"torch": 1.0})], holds=ratio >= 1.8)

A claim that can't be measured here raises `ClaimNotMeasurable(reason)`. No number is typed as a result: rows
come from measurements, and a paper's status from recorded runs (`tensormill.papers.records.status`).
`docs/claims.md` walks through an example.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tensormill.errors import InvalidArgument, TensormillError
from tensormill.papers.curves import Curve

SCALES = ("quick", "full")
"""`quick` runs on a laptop CPU within about a minute; `full` says in `needs` what it needs."""

ROOMS = ("compress", "models", "parallel", "codegen", "hardware", "numerics", "metrics", "data", "ops")

_MECHANISM = frozenset({"benchmarks", "catalogue", "curves", "page", "records", "reproduce"})
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_ARXIV = re.compile(r"\d{2}(0[1-9]|1[0-2])\.\d{4,5}")
_NEED = re.compile(r"cpu|cuda|python:[\w.]+|data:[\w.-]+")

PaperValue = int | float | str | None


class ClaimNotMeasurable(TensormillError):
    """A claim can't be measured on this machine; the message is the reason that is reported."""


@dataclass(frozen=True)
class Figure:
    """A figure that a paper publishes, carried as data.

    Args:
        id: short name, unique within the paper.
        statement: what the figure says, in one sentence.
        paper_value: the published value, a number wherever it is one; None if the paper states none.
        unit: unit of the value ("x" for a ratio, "%" for a percentage).
        setup: hardware, model, data and baseline of the paper's own measurement.
        verified: False when the value was not checked against the paper's text.
    """

    id: str
    statement: str
    paper_value: PaperValue
    unit: str
    setup: str
    verified: bool = True

    def __post_init__(self) -> None:
        if not _IDENTIFIER.fullmatch(self.id):
            raise InvalidArgument(f"given figure id {self.id!r}, expected letters, digits, '.', '_', '-'")
        for name in ("statement", "unit", "setup"):
            if not getattr(self, name).strip():
                raise InvalidArgument(f"figure {self.id!r}: given an empty {name}, expected text; fill it in")


@dataclass(frozen=True)
class Row:
    """One measured value.

    Args:
        what: the setting, as a person reads it ("W4 g128, plain").
        value: the measured number, in `unit`.
        unit: unit of value, peers and limit.
        spread: (low, high) of the repeats or of a bootstrap interval, in `unit`.
        peers: the same quantity for each peer measured in the same run, in `unit`.
        limit: the best that this device allows (roofline), in `unit`.
        setting: the same setting as `what`, machine-readable.
    """

    what: str
    value: float
    unit: str
    spread: tuple[float, float] | None = None
    peers: Mapping[str, float] = field(default_factory=dict)
    limit: float | None = None
    setting: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """What a claim's function returns.

    Args:
        rows: the measured rows, at least one.
        holds: whether the claim's criterion holds on these rows.
        reason: one sentence: what decided it, and which substitute was measured when the paper's own data or
            hardware can't be had.
        repeats: how often each value was measured.
        curves: values along a size, with the power of it that was fitted; drawn in the report.
    """

    rows: Sequence[Row]
    holds: bool
    reason: str = ""
    repeats: int = 1
    curves: Sequence[Curve] = ()


@dataclass(frozen=True)
class Run:
    """What a claim's function is told: `scale` (quick or full), `device` ("cpu", "cuda:0") and a seed."""

    scale: str = "quick"
    device: str = "cpu"
    seed: int = 0
    report: Callable[[str, float | None], None] | None = field(default=None, repr=False)

    def progress(self, message: str, fraction: float | None = None) -> None:
        """Say what is going on; fraction: share done, 0 to 1, None when unknown."""
        if self.report is not None:
            self.report(message, fraction)


MeasuringFunction = Callable[[Run], Measurement]


@dataclass(frozen=True)
class Claim:
    """A claim and the function that measures it; made by the decorator `Paper.claim`."""

    paper: str
    id: str
    statement: str
    paper_value: PaperValue
    unit: str
    criterion: str
    scales: tuple[str, ...]
    needs: Mapping[str, tuple[str, ...]]
    measures: tuple[str, ...]
    peers: tuple[str, ...]
    function: MeasuringFunction = field(repr=False, compare=False)

    def needed(self, scale: str) -> tuple[str, ...]:
        """What this scale can't do without: "cpu", "cuda", "python:<module>", "data:<folder>"."""
        return self.needs.get(scale, ())


@dataclass(frozen=True)
class Paper:
    """A paper: its identity, the figures it publishes, the room that holds its method, and its claims.

    Args:
        slug: name of the paper's file here, and of its method's file in the room.
        title: as published.
        authors: short name ("Lin et al.").
        arxiv: identifier on arXiv ("2306.00978"); the year is read from it.
        room: the package of tensormill that holds the method.
        figures: what the paper publishes.
    """

    slug: str
    title: str
    authors: str
    arxiv: str
    room: str
    figures: tuple[Figure, ...]
    claims: dict[str, Claim] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.slug.isidentifier():
            raise InvalidArgument(f"given paper slug {self.slug!r}, expected a Python module name")
        if not self.title.strip() or not self.authors.strip():
            raise InvalidArgument(f"paper {self.slug}: given no title or no authors, expected both")
        if not _ARXIV.fullmatch(self.arxiv):
            raise InvalidArgument(f"paper {self.slug}: given arXiv id {self.arxiv!r}, expected YYMM.NNNNN")
        if self.room not in ROOMS:
            known = ", ".join(ROOMS)
            raise InvalidArgument(f"paper {self.slug}: given room {self.room!r}, expected one of {known}")
        ids = [figure.id for figure in self.figures]
        if len(set(ids)) != len(ids):
            raise InvalidArgument(f"paper {self.slug}: given figure ids {ids}, expected each once")

    @property
    def year(self) -> int:
        """Year of the first version on arXiv."""
        return 2000 + int(self.arxiv[:2])

    def figure(self, id: str) -> Figure:
        """The figure of this id.

        Raises:
            InvalidArgument: there is none.
        """
        for figure in self.figures:
            if figure.id == id:
                return figure
        known = ", ".join(figure.id for figure in self.figures) or "none"
        raise InvalidArgument(f"paper {self.slug}: given figure {id!r}, expected one of: {known}")

    def claim(
        self,
        id: str,
        *,
        criterion: str,
        figure: str | None = None,
        statement: str | None = None,
        paper_value: PaperValue = None,
        unit: str | None = None,
        scales: Sequence[str] = SCALES,
        needs: Sequence[str] | Mapping[str, Sequence[str]] = (),
        measures: Sequence[str] = (),
        peers: Sequence[str] = (),
    ) -> Callable[[MeasuringFunction], MeasuringFunction]:
        """Decorator that attaches a measuring function to this paper as a claim.

        Args:
            id: unique within the paper, used as a folder name ("C1").
            criterion: what "holds" means, in one sentence.
            figure: id of the figure that the claim repeats; its statement, value and unit hold unless given.
            statement: the claim in one sentence.
            paper_value: the paper's value, None when it states no number.
            unit: unit of paper_value.
            scales: the scales that the function can run, of "quick" and "full".
            needs: what every scale needs, or {scale: needs}. "cuda" or "cpu": a run on that kind of device;
                "python:<module>": a module that can be imported; "data:<folder>": a folder of the real data.
            measures: source that a record vouches for: modules and packages (with all that is in them), or
                "<package>/<pattern>" for chosen files of one ("tensormill.ops.linear_wna16/cpu.cpp"). The
                claim's own function and what the paper's file shares between claims always count.
            peers: distributions measured beside, whose versions are recorded.

        Raises:
            InvalidArgument: an id used twice, an unknown figure, scale or need, or no statement or unit.
        """
        source = self.figure(figure) if figure is not None else None
        if source is not None:
            statement = statement or source.statement
            unit = unit or source.unit
            paper_value = source.paper_value if paper_value is None else paper_value
        where = f"paper {self.slug}, claim {id!r}"
        if not _IDENTIFIER.fullmatch(id):
            raise InvalidArgument(f"{where}: given this id, expected letters, digits, '.', '_', '-'")
        if not statement or not unit or not criterion.strip():
            raise InvalidArgument(f"{where}: given no statement, unit or criterion, expected all three")
        if not scales or any(scale not in SCALES for scale in scales):
            raise InvalidArgument(f"{where}: given scales {list(scales)}, expected some of {list(SCALES)}")
        by_scale = needs if isinstance(needs, Mapping) else dict.fromkeys(scales, needs)
        for scale, wanted in by_scale.items():
            if scale not in scales:
                raise InvalidArgument(f"{where}: given needs for {scale!r}, expected a scale of the claim")
            for need in wanted:
                if isinstance(wanted, str) or not _NEED.fullmatch(need):
                    raise InvalidArgument(
                        f"{where}: given needs {wanted!r}, "
                        "expected a tuple of cpu, cuda, python:<module>, data:<folder>"
                    )
        for name, value in (("measures", measures), ("peers", peers)):
            if isinstance(value, str):
                raise InvalidArgument(f"{where}: given {name}={value!r}, expected a tuple of names")
        metadata = {
            "paper": self.slug,
            "id": id,
            "statement": statement,
            "paper_value": paper_value,
            "unit": unit,
            "criterion": criterion,
            "scales": tuple(scales),
            "needs": {scale: tuple(wanted) for scale, wanted in by_scale.items()},
            "measures": tuple(measures),
            "peers": tuple(peers),
        }

        def attach(function: MeasuringFunction) -> MeasuringFunction:
            if id in self.claims:
                raise InvalidArgument(f"{where}: given this id twice, expected each once; rename one")
            self.claims[id] = Claim(**metadata, function=function)  # type: ignore[arg-type]
            return function

        return attach


def slugs() -> list[str]:
    """Slugs of all papers, in alphabetical order, without importing their files."""
    return _modules(Path(__file__).parent)


def _modules(folder: Path) -> list[str]:
    found = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return sorted(name for name in found if name not in _MECHANISM and not name.startswith("_"))


def find_paper(slug: str) -> Paper:
    """The paper of this slug.

    Raises:
        InvalidArgument: there is none; the message names the closest slugs.
    """
    if slug not in slugs():
        raise InvalidArgument(
            f"given paper {slug!r}, expected a slug of the catalogue; "
            + _suggest(slug, slugs(), "see all with: tensormill papers")
        )
    module = importlib.import_module(f"tensormill.papers.{slug}")
    paper = getattr(module, "PAPER", None)
    if not isinstance(paper, Paper) or paper.slug != slug:
        raise InvalidArgument(
            f"given tensormill/papers/{slug}.py, expected PAPER = Paper(slug={slug!r}, ...) in it; "
            "name shared code with a leading underscore"
        )
    return paper


def all_papers() -> list[Paper]:
    """Every paper, in alphabetical order of slug."""
    return [find_paper(slug) for slug in slugs()]


def _suggest(given: str, known: Iterable[str], otherwise: str) -> str:
    close = get_close_matches(given.lower().replace("-", "_"), list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else otherwise

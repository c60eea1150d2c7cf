"""Recorded runs: `results/<paper>/<claim>/<scale>-<device>.json`, with the source they vouch for.

A record holds what was measured (rows, whether the criterion holds, the reason) and its provenance: versions,
git revision, device, date, repeats, seconds, and one hash per source file measured. A record whose files hash
differently now is stale. Hashes ignore what can't change a measurement: comments, docstrings, blank lines,
line ends, the formatting of JSON, the other claims of the paper's file and its catalogue entry; a record from a
GPU doesn't depend on the C++ of CPU kernels, nor one from a CPU on CUDA sources.

A paper's status is one of

- `planned`: it has no claim, or nothing is recorded;
- `holds`: every claim has a record of the present source, and all those records hold;
- `partly holds`: some of the records of the present source hold; others don't, or a claim has none;
- `does not hold`: there are records of the present source and none holds;
- `stale`: there are records, but the source of every one has changed since.

Records live in `TENSORMILL_RESULTS` if set, else in `results/` of the checkout that the package runs from. An
installed package reads the records it came with and the user's own, and writes to
`$XDG_DATA_HOME/tensormill/results` (`~/.local/share/tensormill/results`).
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import math
import os
import platform
import re
import subprocess
import tempfile
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

from tensormill.errors import DataError, InvalidArgument, OutputError
from tensormill.papers.catalogue import Claim, Measurement, Paper, PaperValue, Row

STATUSES = ("planned", "holds", "partly holds", "does not hold", "stale")

_PACKAGE = Path(__file__).resolve().parents[1]
_C_FAMILY = frozenset({".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh"})
_SOURCES = _C_FAMILY | {".py", ".json", ".yaml", ".yml", ".toml", ".v", ".sv", ".js", ".wgsl", ".mlir"}
# What can't change a measurement on a GPU, and on a CPU.
_HOST_ONLY = frozenset({".c", ".cc", ".cpp", ".h", ".hpp"})
_DEVICE_ONLY = frozenset({".cu", ".cuh"})
_C_COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\')|//[^\n]*|/\*.*?\*/', re.DOTALL)


@dataclass(frozen=True)
class Record:
    """One recorded run of one claim.

    `sources` maps each measured file to the hash it had and `source_hash` sums them up; `device` is the
    device's name, `device_kind` cpu or cuda; `seconds` is the time that the whole claim took; `date` is UTC.
    """

    paper: str
    claim: str
    scale: str
    statement: str
    paper_value: PaperValue
    unit: str
    criterion: str
    rows: list[dict[str, Any]]
    holds: bool
    reason: str
    device: str
    device_kind: str
    date: str
    repeats: int
    seconds: float
    versions: dict[str, str]
    revision: str | None
    threads: int
    source_hash: str
    sources: dict[str, str]
    schema: int = 1
    curves: list[dict[str, Any]] = field(default_factory=list)
    path: Path | None = field(default=None, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The record as it is written; `path` is where it lies and not part of it."""
        document = asdict(self)
        del document["path"]
        if not self.curves:
            del document["curves"]
        return document

    def changed_files(self, claim: Claim) -> list[str]:
        """Measured files that have changed, appeared or vanished since the record was made."""
        try:
            now = source_hashes(claim)
        except InvalidArgument:
            return sorted(self.sources) or [f"measures of {claim.id}"]
        foreign = foreign_sources(self.device_kind)
        now, then = (
            {name: value for name, value in files.items() if Path(name).suffix not in foreign}
            for files in (now, self.sources)
        )
        if checkout() is None:  # an installed package comes without its own C++
            then = {
                name: value
                for name, value in then.items()
                if name in now or not (_compiled(name) and name.startswith(f"{_PACKAGE.name}/"))
            }
        return sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))

    def stale(self, claim: Claim) -> bool:
        """Whether the measured source has changed since the record was made."""
        return bool(self.changed_files(claim))


def make_record(
    claim: Claim,
    measurement: Measurement,
    *,
    scale: str,
    device: str,
    seconds: float,
    sources: Mapping[str, str],
) -> Record:
    """A record of one run.

    Args:
        claim: the claim measured.
        measurement: what its function returned.
        scale: quick or full.
        device: torch device of the run ("cpu", "cuda:0").
        seconds: time that the claim took.
        sources: `source_hashes(claim)` taken before the run.

    Raises:
        DataError: there are no rows, or one has no unit or a value that isn't a finite number.
    """
    import torch

    from tensormill.roofline import device_name

    return Record(
        paper=claim.paper,
        claim=claim.id,
        scale=scale,
        statement=claim.statement,
        paper_value=claim.paper_value,
        unit=claim.unit,
        criterion=claim.criterion,
        rows=[row_to_json(row) for row in _checked(measurement).rows],
        holds=bool(measurement.holds),
        reason=measurement.reason,
        device=device_name(device),
        device_kind=torch.device(device).type,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        repeats=int(measurement.repeats),
        seconds=round(seconds, 3),
        versions=versions(claim.peers),
        revision=git_revision(),
        threads=torch.get_num_threads(),
        source_hash=_digest(json.dumps(dict(sources), sort_keys=True).encode()),
        sources=dict(sources),
        curves=[curve.to_json() for curve in measurement.curves],
    )


def _checked(measurement: Measurement) -> Measurement:
    if not isinstance(measurement, Measurement):
        raise DataError(f"the claim returned {type(measurement).__name__}, expected a Measurement")
    if not measurement.rows:
        raise DataError("the claim returned no rows, expected at least one measured row")
    return measurement


def row_to_json(row: Row) -> dict[str, Any]:
    """A row as it is recorded and printed: what, value and unit, and what else was measured.

    Raises:
        DataError: no unit, or a value, peer or limit that isn't a finite number.
    """
    if not row.what or not row.unit:
        raise DataError(f"given the row {row.what!r} with unit {row.unit!r}, expected both")
    document: dict[str, Any] = {"what": row.what, "value": _number(row.value, row.what), "unit": row.unit}
    if row.spread is not None:
        low, high = row.spread
        document["spread"] = [_number(low, row.what), _number(high, row.what)]
    if row.peers:
        document["peers"] = {name: _number(value, f"{row.what}, {name}") for name, value in row.peers.items()}
    if row.limit is not None:
        document["limit"] = _number(row.limit, f"{row.what}, limit")
    if row.setting:
        document["setting"] = dict(row.setting)
    return document


def _number(value: Any, what: str) -> float | int:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"row {what!r}: measured {value!r}, expected a finite number")
    return value


# Where records live


def checkout() -> Path | None:
    """The checkout that the package runs from, None when it is installed."""
    for folder in (_PACKAGE.parent.parent, _PACKAGE.parent):
        try:
            text = (folder / "pyproject.toml").read_text(encoding="utf-8")
        except OSError:
            continue
        if re.search(r"""^name\s*=\s*["']tensormill["']""", text, re.MULTILINE):
            return folder
    return None


def results_folders() -> list[Path]:
    """Folders that records are read from; of two records of one run the later folder's counts."""
    override = os.environ.get("TENSORMILL_RESULTS")
    if override:
        return [Path(override)]
    root = checkout()
    if root is not None:
        return [root / "results"]
    home = os.environ.get("XDG_DATA_HOME")
    data = Path(home) if home else Path.home() / ".local" / "share"
    return [_PACKAGE / "papers" / "results", data / "tensormill" / "results"]


def results_folder() -> Path:
    """The folder that records are written to."""
    return results_folders()[-1]


def record_path(record: Record, folder: Path | None = None) -> Path:
    """Where a record belongs: `<folder>/<paper>/<claim>/<scale>-<device>.json`."""
    label = device_label(record.device)
    label = label if label.startswith(record.device_kind) else f"{record.device_kind}-{label}"
    return (folder or results_folder()) / record.paper / record.claim / f"{record.scale}-{label}.json"


def page_path(paper: str, scale: str, device: str) -> Path:
    """Where the page of a recorded run belongs: `<results>/<paper>/<scale>-<device>.html`."""
    return results_folder() / paper / f"{scale}-{device_label(device)}.html"


def device_label(device: str) -> str:
    """A device's name, or another text, as part of a file's name."""
    name = device.lower().replace("(r)", "").replace("(tm)", "")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def check_writable(folder: Path | None = None) -> None:
    """Fail before minutes of measuring, not after.

    Raises:
        OutputError: nothing can be written into the results folder.
    """
    folder = folder or results_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from error


def write_record(record: Record, folder: Path | None = None) -> Path:
    """Write a record, whole or not at all, and return its path.

    Raises:
        OutputError: it can't be written; nothing is left behind.
    """
    path = record_path(record, folder)
    text = json.dumps(record.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private to its owner; a record is for everybody.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return path


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"given {path} for results, which can't be written ({error.strerror or error}); "
        "set TENSORMILL_RESULTS to a writable folder"
    )


def read_record(path: Path) -> Record:
    """Read one record.

    Raises:
        DataError: the file can't be read or isn't a record.
    """
    names = {item.name for item in fields(Record)} - {"path"}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = {name: document[name] for name in names - {"curves"}}
        return Record(**found, curves=document.get("curves", []), path=path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"given {path}, expected a recorded run ({type(error).__name__}: {error}); "
            "delete it and measure again with: tensormill reproduce"
        ) from error


def read_records(slug: str | None = None) -> list[Record]:
    """All records, or those of one paper, sorted by paper, claim, scale (quick first) and device.

    Raises:
        DataError: a file in a results folder isn't a record.
    """
    found: dict[tuple[str, str, str], Record] = {}
    for folder in results_folders():
        for path in sorted(folder.glob(f"{slug or '*'}/*/*.json")):
            record = read_record(path)
            found[(record.paper, record.claim, path.name)] = record
    return [record for _, record in sorted(found.items(), key=lambda item: _order(item[1]))]


def _order(record: Record) -> tuple[str, str, bool, str]:
    return (record.paper, record.claim, record.scale != "quick", record.device)


def status(paper: Paper, records: Iterable[Record]) -> str:
    """Status of a paper, derived from its records; see the head of this module for what each means.

    Records of other papers and of claims that no longer exist don't count.
    """
    own = [item for item in records if item.paper == paper.slug and item.claim in paper.claims]
    if not own:
        return "planned"
    fresh = [item for item in own if not item.stale(paper.claims[item.claim])]
    if not fresh:
        return "stale"
    if not any(item.holds for item in fresh):
        return "does not hold"
    complete = {item.claim for item in fresh} == set(paper.claims)
    return "holds" if complete and all(item.holds for item in fresh) else "partly holds"


# What was measured: source and environment


def source_hashes(claim: Claim) -> dict[str, str]:
    """Hash of every source file that a claim measures, by its path below the package's parent folder.

    Raises:
        InvalidArgument: `measures` names something that doesn't exist.
    """
    hashes = hash_sources(claim.measures, f"paper {claim.paper}, claim {claim.id}")
    own = inspect.getsourcefile(claim.function)
    if own is not None and Path(own).is_file():
        path = Path(own).resolve()
        name = path.relative_to(_PACKAGE.parent).as_posix() if path.is_relative_to(_PACKAGE) else path.name
        hashes.pop(name, None)
        hashes[f"{name}#{claim.id}"] = _hash_claim(path, claim.function.__name__, *_stamp(path))
    return hashes


def hash_sources(measures: Iterable[str], what: str) -> dict[str, str]:
    """Hash of every source file of some modules, by its path below the package's parent folder.

    Args:
        measures: modules, packages, or "<package>/<pattern>" for chosen files of one.
        what: who measures them, for the error.

    Raises:
        InvalidArgument: one of them doesn't exist.
    """
    hashes: dict[str, str] = {}
    for name in measures:
        base, files = _files_of(name, what)
        for path in files:
            hashes[path.relative_to(base).as_posix()] = _hash_file(path, *_stamp(path))
    return hashes


def foreign_sources(device_kind: str) -> frozenset[str]:
    """Suffixes of sources that can't change a measurement on that kind of device."""
    return _DEVICE_ONLY if device_kind == "cpu" else _HOST_ONLY


def _files_of(name: str, what: str) -> tuple[Path, list[Path]]:
    module, _, pattern = name.partition("/")
    base = _base_of(module)
    location = base.joinpath(*module.split(".")) if base is not None else None
    files: list[Path] = []
    if location is not None and location.is_dir():
        chosen = location.glob(pattern) if pattern else location.rglob("*")
        files = sorted(
            path
            for path in chosen
            if path.is_file() and "__pycache__" not in path.parts and (pattern or path.suffix in _SOURCES)
        )
    elif location is not None and not pattern and location.with_suffix(".py").is_file():
        files = [location.with_suffix(".py")]
    if not files and base == _PACKAGE.parent and checkout() is None and _compiled(pattern):
        return base, []
    if not files or base is None:
        raise InvalidArgument(
            f"{what}: given measures={name!r}, which doesn't exist; "
            "expected a module, a package, or '<package>/<pattern>'"
        )
    return base, files


def _compiled(name: str) -> bool:
    """Whether a source is compiled into an installed package, which then comes without it."""
    return Path(name).suffix in _C_FAMILY


def _base_of(module: str) -> Path | None:
    """Folder that holds the top-level package; found without importing anything."""
    top = module.partition(".")[0]
    if top == _PACKAGE.name:
        return _PACKAGE.parent
    spec = importlib.util.find_spec(top) if top.isidentifier() else None
    if spec is None or spec.origin is None:
        return None
    origin = Path(spec.origin)
    return origin.parent.parent if spec.submodule_search_locations else origin.parent


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@lru_cache(maxsize=4096)
def _hash_file(path: Path, modified: int, size: int) -> str:
    return _digest(normalise(path.read_bytes(), path.suffix))


@lru_cache(maxsize=1024)
def _hash_claim(path: Path, function: str, modified: int, size: int) -> str:
    return _digest(normalise(path.read_bytes(), ".py", keep_claim=function))


def normalise(content: bytes, suffix: str, keep_claim: str | None = None) -> bytes:
    """Source without what can't change a measurement; the same on every Python version and platform.

    Args:
        content: bytes of the file.
        suffix: its suffix, with the dot; a file of an unknown kind is left as it is.
        keep_claim: for a paper's file, the claim function to keep; other claims and `PAPER` are dropped.
    """
    if suffix not in _SOURCES:
        return content
    text = content.decode("utf-8", errors="replace").replace("\r\n", "\n")
    if suffix == ".json":
        with contextlib.suppress(ValueError):
            return json.dumps(json.loads(text), sort_keys=True).encode()
    if suffix == ".py":
        text = _strip_python(text, keep_claim)
    elif suffix in _C_FAMILY:
        text = _C_COMMENT.sub(lambda match: match.group(1) or " ", text)
    lines = (line.rstrip() for line in text.split("\n"))
    return "\n".join(line for line in lines if line).encode()


def _strip_python(text: str, keep_claim: str | None) -> str:
    """Blank out by position: the printed forms of tokens and trees differ between Python versions."""
    try:
        tree = ast.parse(text)
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (SyntaxError, tokenize.TokenError):
        return text
    lines = [bytearray(line.encode()) for line in text.split("\n")]
    spans = [_span(node) for node in _docstrings(tree)]
    if keep_claim is not None:
        spans += [_span(node) for node in tree.body if _belongs_elsewhere(node, keep_claim)]
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row = token.start[0]
            columns = [len(token.line[: position[1]].encode()) for position in (token.start, token.end)]
            spans.append((row, columns[0], row, columns[1]))
    for first, start, last, end in spans:
        for row in range(first, last + 1):
            line = lines[row - 1]
            left = start if row == first else 0
            right = end if row == last else len(line)
            line[left:right] = b" " * (right - left)
    return "\n".join(line.decode() for line in lines)


def _docstrings(tree: ast.Module) -> Iterable[ast.stmt]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield first


def _belongs_elsewhere(node: ast.stmt, keep_claim: str) -> bool:
    if isinstance(node, ast.FunctionDef):
        is_claim = any(
            isinstance(decorator, ast.Call)
            and isinstance(decorator.func, ast.Attribute)
            and decorator.func.attr == "claim"
            for decorator in node.decorator_list
        )
        return is_claim and node.name != keep_claim
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "Paper"
    )


def _span(node: ast.stmt) -> tuple[int, int, int, int]:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    first, start = node.lineno, node.col_offset
    if decorators:
        first, start = decorators[0].lineno, 0
    return first, start, node.end_lineno or node.lineno, node.end_col_offset or 0


def versions(peers: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python, of what tensormill stands on and of the peers, as far as installed."""
    found = {"python": platform.python_version()}
    for name in dict.fromkeys(("torch", "triton", "transformers", "tensormill", *peers)):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name == "tensormill":
                version = getattr(importlib.import_module(name), "__version__", None)
                found.update({name: version} if version else {})
    return found


def git_revision() -> str | None:
    """Commit of the checkout, with "-dirty" when tracked files differ from it; None when there is none."""
    root = checkout()
    if root is None:
        return None
    answers = []
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=30, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        answers.append(done.stdout.strip())
    return answers[0] + ("-dirty" if answers[1] else "")

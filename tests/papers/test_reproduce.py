"""Measuring claims again: the answer's shape, claims that can't be measured, the guide's code."""

import re
from pathlib import Path

import pytest
import torch

from tensormill.errors import DataError, InvalidArgument, OutputError
from tensormill.papers import records
from tensormill.papers import reproduce as module
from tensormill.papers.catalogue import ClaimNotMeasurable, Figure, Measurement, Paper, Row
from tensormill.papers.reproduce import papers, reproduce

GUIDE = Path(__file__).parents[2] / "docs" / "claims.md"


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORMILL_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture
def paper():
    """A paper with claims that hold, don't hold, can't be measured here, crash, and need what isn't there."""
    paper = Paper(
        "toy", "A toy", "Doe", "2401.00001", "ops", (Figure("speed", "Fast", 2.0, "x", "one core"),)
    )

    @paper.claim("good", figure="speed", criterion="c")
    def good(run):
        run.progress("working", 0.5)
        return Measurement([Row("sum", sum([1, 2]), "x", limit=4.0)], holds=True, reason="three", repeats=2)

    @paper.claim("bad", figure="speed", criterion="c")
    def bad(run):
        return Measurement([Row("sum", 1 + 0.5, "x")], holds=False)

    @paper.claim("impossible", figure="speed", criterion="c")
    def impossible(run):
        raise ClaimNotMeasurable("the moon is not in the right phase")

    @paper.claim("crash", figure="speed", criterion="c")
    def crash(run):
        raise RuntimeError("first line\nsecond line")

    @paper.claim("empty", figure="speed", criterion="c")
    def empty(run):
        return Measurement([], holds=True)

    @paper.claim("large", figure="speed", criterion="c", scales=("full",), needs=("cuda",))
    def large(run):
        raise AssertionError("must not run")

    @paper.claim(
        "needy", figure="speed", criterion="c", needs=("python:no_such_module", "data:no_such_folder", "cuda")
    )
    def needy(run):
        raise AssertionError("must not run")

    return paper


def by_id(result):
    return {claim["id"]: claim for claim in result["claims"]}


def test_the_shape_is_the_contract(paper):
    result = reproduce(paper, device="cpu")
    assert list(result) == ["paper", "title", "device", "scale", "status", "claims"]
    assert result["paper"] == "toy" and isinstance(result["device"], str)
    for claim in result["claims"]:
        assert list(claim) == [
            "id", "statement", "criterion", "paper_value", "unit", "holds", "reason", "seconds", "rows", "curves",
        ]  # fmt: skip
        for row in claim["rows"]:
            assert list(row)[:3] == ["what", "value", "unit"]
            assert set(row) <= {"what", "value", "unit", "spread", "peers", "limit", "setting"}
    good = by_id(result)["good"]
    assert good["holds"] is True and good["reason"] == "three"
    assert (good["statement"], good["paper_value"], good["unit"]) == ("Fast", 2.0, "x")
    assert good["rows"] == [{"what": "sum", "value": 3, "unit": "x", "limit": 4.0}]


def test_what_cannot_be_measured_says_why_and_stops_nothing(paper):
    claims = by_id(reproduce(paper, device="cpu"))
    assert list(claims) == ["good", "bad", "impossible", "crash", "empty", "large", "needy"]
    assert claims["bad"]["holds"] is False
    for name, reason in (
        ("impossible", "not measured: the moon is not in the right phase"),
        ("crash", r"not measured: RuntimeError: first line second line \(test_reproduce.py:\d+\)"),
        ("empty", "not measured: the claim returned no rows.*"),
        ("large", "not measured: it has no quick scale; run it with scale full"),
        (
            "needy",
            "not measured: quick scale needs the Python module no_such_module.*no_such_folder.*device cuda.*",
        ),
    ):
        assert claims[name]["holds"] is None
        assert claims[name]["rows"] == []
        assert re.fullmatch(reason, claims[name]["reason"]), claims[name]["reason"]
    full = by_id(reproduce(paper, "full", "cpu", ["large"]))
    assert full["large"]["reason"] == "not measured: full scale needs device cuda, given cpu"


def test_only_measured_claims_are_recorded(paper, results):
    reproduce(paper, device="cpu")
    assert sorted(path.parent.name for path in results.rglob("*.json")) == ["bad", "good"]
    (good,) = [record for record in records.read_records("toy") if record.claim == "good"]
    assert (good.scale, good.holds, good.repeats, good.device_kind) == ("quick", True, 2, "cpu")
    assert good.seconds >= 0


def test_nothing_is_recorded_unless_wanted(paper, results):
    assert reproduce(paper, device="cpu", claims=["good"], record=False)["claims"][0]["holds"] is True
    assert not results.exists()


def test_a_later_run_replaces_the_record(paper, results):
    for _ in range(2):
        reproduce(paper, device="cpu", claims=["good"])
    assert len(list(results.rglob("*.json"))) == 1


def test_chosen_claims(paper):
    result = reproduce(paper, device="cpu", claims=["bad", "good"])
    assert [claim["id"] for claim in result["claims"]] == ["good", "bad"]
    with pytest.raises(InvalidArgument, match="expected one of: good, bad"):
        reproduce(paper, claims=["goodness"])
    with pytest.raises(InvalidArgument, match="list of ids"):
        reproduce(paper, claims="good")


def test_an_interrupt_is_not_a_reason(paper):
    @paper.claim("interrupted", figure="speed", criterion="c")
    def interrupted(run):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(paper, device="cpu", claims=["interrupted"])


def test_progress_tells_claim_and_share(paper):
    heard = []
    reproduce(paper, device="cpu", progress=lambda message, share: heard.append((message, share)))
    assert ("toy good: working", 0.5 / 7) in heard
    shares = [share for _, share in heard]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert any(message.startswith("toy good: recorded in ") for message, _ in heard)
    assert any(message.startswith("toy crash: not measured") for message, _ in heard)


def test_the_status_comes_from_the_records(paper):
    assert reproduce(paper, device="cpu", claims=["good"])["status"] == "partly holds"
    only = Paper("toy", "A toy", "Doe", "2401.00001", "ops", paper.figures)
    only.claims["good"] = paper.claims["good"]
    assert reproduce(only, device="cpu", record=False)["status"] == "holds"


def test_a_planned_paper_says_so():
    planned = Paper("toy", "A toy", "Doe", "2401.00001", "ops", ())
    heard = []
    result = reproduce(planned, device="cpu", progress=lambda message, share: heard.append(message))
    assert (result["status"], result["claims"]) == ("planned", [])
    assert heard == ["toy: planned, it has no claim to measure yet"]
    with pytest.raises(InvalidArgument, match="none yet"):
        reproduce(planned, claims=["C1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slug": "awk"}, "did you mean awq"),
        ({"slug": "awq", "scale": "huge"}, "expected one of quick, full"),
        ({"slug": "awq", "device": "toaster"}, "toaster"),
        ({"slug": "awq", "device": "meta"}, "meta"),
        ({"slug": "awq", "device": "cuda:99"}, "GPUs"),
    ],
)
def test_what_a_caller_gets_wrong(arguments, message):
    with pytest.raises(InvalidArgument, match=message) as caught:
        reproduce(**arguments)
    assert "\n" not in str(caught.value)


def test_the_device_is_chosen(paper):
    devices = []

    @paper.claim("where", figure="speed", criterion="c")
    def where(run):
        devices.append(run.device)
        return Measurement([Row("one", len(devices), "x")], holds=bool(devices))

    reproduce(paper, claims=["where"], record=False)
    assert devices == ["cuda:0" if torch.cuda.is_available() else "cpu"]


def test_an_unwritable_folder_stops_before_measuring(paper, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TENSORMILL_RESULTS", str(tmp_path / "file"))
    heard = []
    with pytest.raises(OutputError):
        reproduce(paper, device="cpu", progress=lambda message, share: heard.append(message))
    assert heard == []


def test_a_damaged_record_stops_before_measuring(paper, results):
    (results / "toy" / "good").mkdir(parents=True)
    (results / "toy" / "good" / "quick-cpu.json").write_text("{}")
    heard = []
    with pytest.raises(DataError, match="delete it"):
        reproduce(paper, device="cpu", progress=lambda message, share: heard.append(message))
    assert heard == []


def test_source_is_hashed_before_the_run(paper, monkeypatch):
    """An edit while a claim runs must make its record stale, not fresh."""
    now = {"file": "before"}

    @paper.claim("edits", figure="speed", criterion="c")
    def edits(run):
        now["file"] = "after"
        return Measurement([Row("one", len(now), "x")], holds=bool(now))

    monkeypatch.setattr(records, "source_hashes", lambda claim: dict(now))
    reproduce(paper, device="cpu", claims=["edits"])
    (record,) = records.read_records("toy")
    assert record.sources == {"file": "before"}
    assert record.stale(paper.claims["edits"])


def test_the_catalogue_is_the_contract(results):
    entries = papers()
    assert len(entries) == 47
    assert [entry["slug"] for entry in entries] == sorted(entry["slug"] for entry in entries)
    for entry in entries:
        assert list(entry) == ["slug", "title", "arxiv", "year", "status", "claims"]
        assert entry["status"] == "planned"
        for claim in entry["claims"]:
            assert (claim["scale"], claim["holds"], claim["device"], claim["stale"]) == (
                None,
                None,
                None,
                False,
            )


def test_the_catalogue_lists_each_recorded_run(paper, monkeypatch):
    monkeypatch.setattr(module, "all_papers", lambda: [paper])
    reproduce(paper, "quick", "cpu")
    reproduce(paper, "full", "cpu", ["good"])
    (entry,) = papers()
    keys = ["id", "statement", "paper_value", "unit", "scale", "holds", "device", "stale"]
    assert all(list(claim) == keys for claim in entry["claims"])
    good = [
        (claim["scale"], claim["holds"], claim["stale"]) for claim in entry["claims"] if claim["id"] == "good"
    ]
    assert good == [("quick", True, False), ("full", True, False)]
    assert [claim["device"] for claim in entry["claims"] if claim["id"] == "large"] == [None]
    assert entry["status"] == "partly holds"
    monkeypatch.setattr(records, "source_hashes", lambda claim: {"file": "changed"})
    (entry,) = papers()
    assert entry["status"] == "stale"
    assert all(claim["stale"] for claim in entry["claims"] if claim["device"])


def test_the_guide_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "claims.md", "exec"), {"__name__": "guide"})

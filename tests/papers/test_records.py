"""Records: written whole or not at all, read back equal, and stale exactly when measured source changes."""

import importlib
import itertools
import json
import os
import re
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensormill.errors import DataError, InvalidArgument, OutputError
from tensormill.papers import records
from tensormill.papers.catalogue import Measurement, Row
from tensormill.papers.records import (
    make_record,
    normalise,
    read_record,
    read_records,
    record_path,
    results_folders,
    row_to_json,
    source_hashes,
    status,
    write_record,
)

PAPER_FILE = '''
"""A toy paper."""

from tensormill.papers.catalogue import Figure, Measurement, Paper, Row

PAPER = Paper(
    slug="toy", title="A toy", authors="Doe", arxiv="2401.00001", room="ops",
    figures=(Figure("speed", "It is fast", 2.0, "x", "one core"),),
)


def shared():
    return 40


@PAPER.claim("C1", figure="speed", criterion="above one", measures=("{package}.method", "{package}.ops"))
def first(run):
    """Measure the first thing."""
    return Measurement([Row("one", shared() + 2.0, "x")], holds=True)


@PAPER.claim("C2", figure="speed", criterion="above one", scales=("quick",))
def second(run):
    return Measurement([Row("two", 2.0, "x")], holds=False)
'''
METHOD = '''
def scale(value):
    """Double a value."""
    # twice
    return 2 * value
'''
CPP = """
// a kernel
int f(int x) { /* add */ return x + 1; }
const char* name = "// not a comment";
"""
counter = itertools.count()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package with a paper, a method and an operator's folder, and an empty results folder."""
    package = f"toy_package_{next(counter)}"
    root = tmp_path / "source" / package
    (root / "ops" / "tuned").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "paper.py").write_text(PAPER_FILE.replace("{package}", package))
    (root / "method.py").write_text(METHOD)
    (root / "ops" / "__init__.py").write_text("")
    (root / "ops" / "cpu.cpp").write_text(CPP)
    (root / "ops" / "tuned" / "sm_90.json").write_text('{"tile": 64, "stages": 3}')
    monkeypatch.syspath_prepend(root.parent)
    monkeypatch.setenv("TENSORMILL_RESULTS", str(tmp_path / "results"))
    paper = importlib.import_module(f"{package}.paper").PAPER
    yield paper, root
    for name in [name for name in sys.modules if name.startswith(package)]:
        del sys.modules[name]


def recorded(claim, holds=True, **changes):
    measurement = Measurement([Row("one", 1.5, "x", spread=(1, 2), peers={"torch": 1.0})], holds, "why", 3)
    record = make_record(
        claim, measurement, scale="quick", device="cpu", seconds=0.1234567, sources=source_hashes(claim)
    )
    return replace(record, **changes)


def edit(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_a_record_is_read_back_equal(toy):
    paper, _ = toy
    record = recorded(paper.claims["C1"])
    path = write_record(record)
    assert read_record(path) == record
    assert read_records("toy") == [record] == read_records()
    assert read_records("awq") == []


def test_a_record_says_where_it_comes_from(toy):
    paper, root = toy
    record = recorded(paper.claims["C1"])
    assert record.statement == "It is fast"
    assert (record.paper_value, record.unit, record.repeats, record.reason) == (2.0, "x", 3, "why")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record.date)
    assert record.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record.versions["torch"] == torch.__version__
    assert {"tensormill"} <= record.versions.keys()
    assert record.device and record.device_kind == "cpu"
    assert record.rows == [
        {"what": "one", "value": 1.5, "unit": "x", "spread": [1, 2], "peers": {"torch": 1.0}}
    ]
    assert set(record.sources) == {
        f"{root.name}/method.py",
        f"{root.name}/ops/__init__.py",
        f"{root.name}/ops/cpu.cpp",
        f"{root.name}/ops/tuned/sm_90.json",
        "paper.py#C1",
    }


def test_the_path_carries_the_setting(toy, tmp_path):
    paper, _ = toy
    record = recorded(paper.claims["C1"], device="Intel(R) Xeon(R) 8481C, 2 threads")
    expected = tmp_path / "results" / "toy" / "C1" / "quick-cpu-intel-xeon-8481c-2-threads.json"
    assert record_path(record) == expected
    gpu = replace(record, device="NVIDIA H200", device_kind="cuda", scale="full")
    assert record_path(gpu).name == "full-cuda-nvidia-h200.json"
    assert write_record(record) == expected
    assert os.stat(expected).st_mode & 0o444 == 0o444


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("method.py", "2 * value", "3 * value"),
        ("ops/cpu.cpp", "x + 1", "x + 2"),
        ("ops/cpu.cpp", "// not a comment", "// another string"),
        ("ops/tuned/sm_90.json", "64", "128"),
        ("paper.py", "+ 2.0", "+ 3.0"),
        ("paper.py", "return 40", "return 41"),
    ],
)
def test_a_change_of_what_was_measured_makes_it_stale(toy, file, before, after):
    paper, root = toy
    claim = paper.claims["C1"]
    record = recorded(claim)
    assert record.changed_files(claim) == []
    edit(root / file, before, after)
    assert record.stale(claim)
    (changed,) = record.changed_files(claim)
    assert changed.partition("#")[0].endswith(file)


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("method.py", "# twice", "# the value, twice"),
        ("method.py", '"""Double a value."""', '"""Return\n\n    twice the value.\n    """'),
        ("method.py", "def scale", "\n\n\ndef scale"),
        ("method.py", "2 * value", "2 * value  # here"),
        ("ops/cpu.cpp", "// a kernel", "// the\n// kernel"),
        ("ops/cpu.cpp", "/* add */", "/* add\n one */"),
        ("ops/cpu.cpp", "\n", "\r\n"),
        ("ops/tuned/sm_90.json", '{"tile": 64, "stages": 3}', '{\n "stages": 3,\n "tile": 64\n}\n'),
        ("paper.py", 'Row("two", 2.0', 'Row("two", 4.0'),
        ("paper.py", 'title="A toy"', 'title="Another toy"'),
        ("paper.py", '"""Measure the first thing."""', '"""Measure it."""'),
    ],
)
def test_a_change_that_cannot_matter_does_not(toy, file, before, after):
    paper, root = toy
    claim = paper.claims["C1"]
    record = recorded(claim)
    edit(root / file, before, after)
    assert record.changed_files(claim) == []


def test_files_that_appear_or_vanish_make_it_stale(toy):
    paper, root = toy
    claim = paper.claims["C1"]
    record = recorded(claim)
    (root / "ops" / "triton.py").write_text("TILE = 64\n")
    assert record.changed_files(claim) == [f"{root.name}/ops/triton.py"]
    (root / "ops" / "triton.py").unlink()
    (root / "ops" / "notes.md").write_text("no source")
    assert not record.stale(claim)
    (root / "ops" / "cpu.cpp").unlink()
    assert record.changed_files(claim) == [f"{root.name}/ops/cpu.cpp"]


def test_a_record_from_a_gpu_does_not_depend_on_the_cpus_kernels(toy):
    paper, root = toy
    claim = paper.claims["C1"]
    record = recorded(claim, device_kind="cuda")
    edit(root / "ops" / "cpu.cpp", "x + 1", "x + 2")
    assert not record.stale(claim)
    (root / "ops" / "cpu.h").write_text("int x;\n")
    assert not record.stale(claim)
    (root / "ops" / "gpu.cu").write_text("int x;\n")
    assert record.changed_files(claim) == [f"{root.name}/ops/gpu.cu"]
    assert f"{root.name}/ops/gpu.cu" not in recorded(claim).changed_files(claim)


def test_measures_that_no_longer_exist_make_it_stale(toy):
    paper, root = toy
    claim = paper.claims["C1"]
    record = recorded(claim)
    (root / "method.py").unlink()
    with pytest.raises(InvalidArgument, match="method"):
        source_hashes(claim)
    assert record.stale(claim)


def test_chosen_files_of_a_package(toy):
    paper, root = toy
    (root / "ops" / "weights.bin").write_bytes(b"\x00\xff")
    claim = replace(paper.claims["C1"], measures=(f"{root.name}.ops/*.bin", f"{root.name}.ops/cpu.cpp"))
    names = [name for name in source_hashes(claim) if "#" not in name]
    assert names == [f"{root.name}/ops/weights.bin", f"{root.name}/ops/cpu.cpp"]
    before = source_hashes(claim)
    (root / "ops" / "weights.bin").write_bytes(b"\x00\xfe\x00")
    assert source_hashes(claim) != before
    with pytest.raises(InvalidArgument, match=r"no\.where"):
        source_hashes(replace(claim, measures=("no.where",)))


def test_the_package_measures_itself():
    from tensormill.papers.catalogue import Claim

    claim = Claim("toy", "C1", "s", 1, "x", "c", ("quick",), {}, ("tensormill.errors",), (), len)
    with pytest.raises(TypeError):
        source_hashes(claim)
    claim = replace(claim, function=recorded)
    assert set(source_hashes(claim)) == {"tensormill/errors.py", "test_records.py#C1"}


comments = st.text(st.characters(codec="utf-8", exclude_characters="\n\r\f\x1c\x1d\x1e\x85\u2028\u2029"))


@given(comment=comments, blank=st.integers(0, 3), spaces=st.integers(0, 5))
def test_comments_never_count_and_values_always_do(comment, blank, spaces):
    source = "x = 'ü' + '#'{}\n{}def f(a):\n    return a + {}\n"
    plain = normalise(source.format("", "", 1).encode(), ".py")
    comment = comment.replace("\0", "")
    dressed = source.format(f"  # {comment}" + " " * spaces, "\n" * blank, 1)
    assert normalise(dressed.encode(), ".py") == plain
    assert normalise(dressed.replace("a + 1", "a + 2").encode(), ".py") != plain


def test_strings_that_look_like_comments_count():
    cuda = 'SOURCE = """\n#define TILE {}\n"""\n'
    assert normalise(cuda.format(1).encode(), ".py") != normalise(cuda.format(2).encode(), ".py")
    assert normalise(b"f('a # b')\n", ".py") != normalise(b"f('a # c')\n", ".py")
    assert normalise(b"def f(:\n", ".py") != normalise(b"def g(:\n", ".py")
    assert normalise(b"{broken", ".json") == b"{broken"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, None, "1.0", torch.tensor(float("nan"))])
def test_what_is_not_a_finite_number_is_refused(value):
    with pytest.raises(DataError, match="finite number"):
        row_to_json(Row("one", value, "x"))
    with pytest.raises(DataError):
        row_to_json(Row("one", 1.0, "x", peers={"peer": value}))


def test_rows_take_tensors_and_need_units():
    assert row_to_json(Row("one", torch.tensor(2.0), "x")) == {"what": "one", "value": 2.0, "unit": "x"}
    with pytest.raises(DataError, match="unit"):
        row_to_json(Row("one", 1.0, ""))


@pytest.mark.parametrize("wrong", [Measurement([], holds=True), [Row("one", 1.0, "x")], None])
def test_a_claim_must_return_measured_rows(toy, wrong):
    paper, _ = toy
    with pytest.raises(DataError, match="expected"):
        make_record(paper.claims["C1"], wrong, scale="quick", device="cpu", seconds=1, sources={})


def test_status_is_derived(toy):
    paper, root = toy
    first, second = paper.claims["C1"], paper.claims["C2"]
    good, bad = recorded(first), recorded(first, holds=False)
    other, other_bad = recorded(second), recorded(second, holds=False)
    assert status(paper, []) == "planned"
    assert status(paper, [good, other]) == "holds"
    assert status(paper, [good]) == "partly holds"
    assert status(paper, [good, other_bad]) == "partly holds"
    assert status(paper, [good, replace(bad, scale="full"), other]) == "partly holds"
    assert status(paper, [bad]) == status(paper, [bad, other_bad]) == "does not hold"
    assert status(paper, [replace(good, claim="gone"), replace(good, paper="other")]) == "planned"
    edit(root / "method.py", "2 * value", "3 * value")
    assert status(paper, [good]) == "stale"
    assert status(paper, [good, other]) == "partly holds"
    edit(root / "paper.py", "return 40", "return 41")
    assert status(paper, [good, other]) == "stale"
    assert {"planned", "holds", "partly holds", "does not hold", "stale"} == set(records.STATUSES)


def test_a_failed_write_leaves_the_old_record(toy, monkeypatch):
    paper, _ = toy
    record = recorded(paper.claims["C1"])
    path = write_record(record)
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    for function in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(records.os, function, full)
            with pytest.raises(OutputError, match="No space left"):
                write_record(replace(record, reason="new"))
        assert path.read_bytes() == before
        assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_an_interrupted_write_leaves_nothing_behind(toy, monkeypatch):
    paper, _ = toy

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(records.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_record(recorded(paper.claims["C1"]))
    assert [path for path in records.results_folder().rglob("*") if path.is_file()] == []


def test_an_unwritable_folder_is_one_clear_error(toy, tmp_path):
    paper, _ = toy
    (tmp_path / "file").write_text("in the way")
    for attempt in (
        lambda: records.check_writable(tmp_path / "file" / "results"),
        lambda: write_record(recorded(paper.claims["C1"]), tmp_path / "file" / "results"),
    ):
        with pytest.raises(OutputError, match="TENSORMILL_RESULTS") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    records.check_writable(tmp_path / "new" / "results")
    assert list((tmp_path / "new" / "results").iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"paper": "toy"}'])
def test_a_damaged_record_is_named(toy, text):
    paper, _ = toy
    path = write_record(recorded(paper.claims["C1"]))
    path.write_text(text)
    with pytest.raises(DataError, match=re.escape(str(path))) as caught:
        read_records()
    assert "\n" not in str(caught.value)


def test_a_record_of_a_later_version_is_read(toy):
    paper, _ = toy
    record = recorded(paper.claims["C1"])
    path = write_record(record)
    path.write_text(json.dumps({**json.loads(path.read_text()), "new field": 1}))
    assert read_record(path) == record


def test_a_checkout_keeps_its_own_results(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORMILL_RESULTS", raising=False)
    package = tmp_path / "src" / "tensormill"
    package.mkdir(parents=True)
    monkeypatch.setattr(records, "_PACKAGE", package)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "something-else"\n')
    assert records.checkout() is None
    (tmp_path / "pyproject.toml").write_text(textwrap.dedent('[project]\nname = "tensormill"\n'))
    assert records.checkout() == tmp_path
    assert results_folders() == [tmp_path / "results"]


def test_an_installed_package_adds_the_users_records(toy, tmp_path, monkeypatch):
    paper, _ = toy
    monkeypatch.delenv("TENSORMILL_RESULTS")
    monkeypatch.setattr(records, "_PACKAGE", tmp_path / "site-packages" / "tensormill")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    packaged, own = results_folders()
    assert packaged == tmp_path / "site-packages" / "tensormill" / "papers" / "results"
    assert own == tmp_path / "data" / "tensormill" / "results" == records.results_folder()
    shipped = recorded(paper.claims["C1"], reason="shipped")
    write_record(shipped, packaged)
    write_record(replace(shipped, device="Another CPU"), packaged)
    assert len(read_records("toy")) == 2
    write_record(replace(shipped, reason="measured here"))
    assert sorted(record.reason for record in read_records("toy")) == ["measured here", "shipped"]
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert records.results_folder() == tmp_path / "home" / ".local" / "share" / "tensormill" / "results"


def test_an_installed_package_comes_without_compiled_sources(toy, monkeypatch):
    paper, root = toy
    monkeypatch.setattr(records, "_PACKAGE", root)
    claim = replace(paper.claims["C1"], measures=(f"{root.name}.ops", f"{root.name}.ops/cpu.cpp"))
    record = recorded(claim)
    (root / "ops" / "cpu.cpp").unlink()
    assert not record.stale(claim)
    (root / "ops" / "tuned" / "sm_90.json").unlink()
    assert record.changed_files(claim) == [f"{root.name}/ops/tuned/sm_90.json"]
    (root.parent / "pyproject.toml").write_text('name = "tensormill"')
    missing = replace(claim, measures=(f"{root.name}.ops",))
    assert f"{root.name}/ops/cpu.cpp" in record.changed_files(missing)


def test_records_are_sorted(toy):
    paper, _ = toy
    record = recorded(paper.claims["C1"])
    for scale, device in (("full", "B"), ("quick", "B"), ("quick", "A")):
        write_record(replace(record, scale=scale, device=device))
    write_record(recorded(paper.claims["C2"]))
    found = [(item.claim, item.scale, item.device) for item in read_records("toy")]
    assert found[:3] == [("C1", "quick", "A"), ("C1", "quick", "B"), ("C1", "full", "B")]
    assert found[3][0] == "C2"

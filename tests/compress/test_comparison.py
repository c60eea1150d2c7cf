"""Methods compared: one sweep, honest marks, whole outputs."""

from __future__ import annotations

import io
import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from packed_models import compress_linears, refused, save_source, tiny_model

from tensormill.compress import checkpoint, comparison, sweep
from tensormill.compress.comparison import MethodComparison, Row, compare, pareto
from tensormill.compress.evaluate import evaluate_models
from tensormill.compress.footprint import checkpoint_bytes, model_bytes, stored_bytes
from tensormill.compress.pipeline import compress
from tensormill.compress.sweep import plan, share_unchanged
from tensormill.errors import CheckpointError, DataError, InvalidArgument, OutputError, RecipeError

rich_console = pytest.importorskip("rich.console")

ROW = (
    "method", "bits", "group_size", "bytes", "bits_per_weight", "perplexity", "kl", "top1_agreement",
    "tokens_per_second", "seconds", "pareto",
)  # fmt: skip
SMALL = {"group_size": 32, "samples": 2, "max_tokens": 600}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_source(tiny_model("llama"), tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    draw = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(f"word{draw.randrange(126)}" for _ in range(4000)))
    return file


@pytest.fixture(scope="module")
def found(source, words, tmp_path_factory) -> tuple[MethodComparison, Path]:
    folder = tmp_path_factory.mktemp("out") / "all"
    texts = {"calibration_text": [words], "text": [words]}
    return compare(source, bits=[4, 2], output=folder, **texts, **SMALL), folder


def sample(**changes) -> MethodComparison:
    """Invented figures; they stand for no measurement."""
    rows = [
        Row("original", None, None, 33_000_000, 16.0, 4.13, None, None, 86.0, None, True),
        Row("rtn", 3, 128, 9_000_000, 3.15, 5.99, 0.44, 0.745, 68.0, 7.0, False),
        Row("awq", 3, 128, 9_000_000, 3.15, 5.00, 0.25, 0.81, 73.0, 154.0, True),
        Row("rtn", 2, 128, 7_000_000, 2.13, math.inf, math.nan, 0.01, 73.0, 7.0, False),
    ]
    evaluation = {"tokens": 8188, "bytes": 26_000, "windows": 4, "window": 2048, "text_sha256": "0" * 64}
    return replace(MethodComparison("some/model", "a text", rows, evaluation), **changes)


def printed(one: MethodComparison, width=80) -> str:
    stream = io.StringIO()
    one.print(rich_console.Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


def test_rows_are_the_original_and_every_configuration(found):
    rows = found[0].rows
    assert [(row.method, row.bits) for row in rows] == [
        ("original", None), ("rtn", 2), ("gptq", 2), ("awq", 2), ("rtn", 4), ("gptq", 4), ("awq", 4),
    ]  # fmt: skip
    original = rows[0]
    assert original.kl is None and original.seconds is None and original.bits_per_weight == 32.0
    assert any(row.pareto for row in rows)
    for row in rows[1:]:
        assert row.group_size == 32 and row.bits < row.bits_per_weight < row.bits + 2
        assert row.bytes < original.bytes and row.kl > 0 and 0 <= row.top1_agreement <= 1
        assert row.seconds > 0 and row.tokens_per_second > 0
    assert len({row.bytes for row in rows}) == 3  # the same width takes the same room


def test_a_row_says_what_compress_would_report(found, source, words, tmp_path):
    report = compress(
        source, "gptq", bits=4, group_size=32, calibration_samples=2, calibration_length=64, output=tmp_path / "out",
        calibration_text=[words], text=[words], max_tokens=600,
    )  # fmt: skip
    row = next(row for row in found[0].rows if (row.method, row.bits) == ("gptq", 4))
    assert row.perplexity == pytest.approx(report.perplexity["compressed"], rel=1e-5)
    assert row.kl == pytest.approx(report.kl, rel=1e-3)
    assert row.top1_agreement == report.top1_agreement
    assert row.bits_per_weight == report.bits_per_weight
    header = checkpoint.inspect_checkpoint(tmp_path / "out").nbytes
    assert row.bytes == header < report.bytes_after == checkpoint_bytes(tmp_path / "out")
    assert found[0].rows[0].bytes == checkpoint.inspect_checkpoint(source).nbytes


def test_outputs_hold_the_document_and_a_page_that_stands_alone(found):
    one, folder = found
    assert {path.name for path in folder.iterdir()} == {"compare.json", "compare.html"}
    document = json.loads((folder / "compare.json").read_text())
    assert document == one.to_dict()
    assert list(document)[:3] == ["model", "text", "rows"]
    assert all(tuple(row) == ROW for row in document["rows"])
    assert document["evaluation"]["tokens"] == found[0].evaluation["tokens"] == 9 * 63
    assert document["calibration"]["samples"] == 2
    assert len(document["speed"]["spread"]) == len(one.rows)
    html = (folder / "compare.html").read_text()
    assert html.count("<svg") == 2 and "<script" not in html and "<link" not in html
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) == {"http://www.w3.org/2000/svg"}
    for cell in ("AWQ", "GPTQ", "perplexity", "567 tokens", "2 windows of 64 tokens"):
        assert cell in html


def test_the_original_is_evaluated_once_and_calibration_is_read_once(source, words, monkeypatch, tmp_path):
    calls = {"evaluate": 0, "read": 0}

    def counted_evaluate(*arguments, **settings):
        calls["evaluate"] += 1
        return evaluate_models(*arguments, **settings)

    def counted_read(*arguments, **settings):
        calls["read"] += 1
        return sweep_calibration(*arguments, **settings)

    sweep_calibration = sweep.calibration_for
    monkeypatch.setattr(sweep, "evaluate_models", counted_evaluate)
    monkeypatch.setattr(sweep, "calibration_for", counted_read)
    compare(
        source, methods=["gptq", "rtn"], bits=[2, 3, 4], output=tmp_path / "o", calibration_text=[words],
        text=[words], **SMALL,
    )  # fmt: skip
    assert calls == {"evaluate": 1, "read": 1}


def test_candidates_share_what_is_unchanged():
    original, candidate = tiny_model("llama"), compress_linears(tiny_model("llama"), 4, 32, False)
    before = model_bytes(candidate)
    share_unchanged(candidate, original)
    assert candidate.model.embed_tokens.weight is original.model.embed_tokens.weight
    assert candidate.lm_head.weight is original.lm_head.weight
    assert model_bytes(candidate) == before
    changed = tiny_model("llama")
    with torch.no_grad():
        changed.model.norm.weight.add_(1)
    share_unchanged(changed, original)
    assert changed.model.norm.weight is not original.model.norm.weight


@pytest.mark.parametrize("tied", [True, False])
def test_stored_bytes_are_those_of_a_checkpoint(tmp_path, tied):
    model = tiny_model("llama", tied=tied)
    save_source(model, tmp_path / "model")
    assert stored_bytes(model) == checkpoint.inspect_checkpoint(tmp_path / "model").nbytes


def test_the_model_is_left_as_it_was(source, words, tmp_path, monkeypatch):
    opened = checkpoint.open_model(source)
    before = {name: tensor.clone() for name, tensor in opened[0].state_dict().items()}
    monkeypatch.setattr(comparison, "open_with_tokenizer", lambda *arguments: opened)
    compare(
        source,
        bits=[3],
        methods=["awq"],
        output=tmp_path / "o",
        calibration_text=[words],
        text=[words],
        **SMALL,
    )
    after = opened[0].state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_progress_runs_from_zero_to_one(source, words, tmp_path):
    shares, messages = [], []

    def progress(message, share):
        messages.append(message)
        if share is not None:
            shares.append(share)

    compare(
        source, methods=["rtn", "gptq"], bits=[4], output=tmp_path / "o", calibration_text=[words],
        text=[words], progress=progress, **SMALL,
    )  # fmt: skip
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    assert any("gptq at 4 bits" in message for message in messages)
    assert any("speed" in message for message in messages)


# --- the front


def test_no_row_is_marked_that_another_beats():
    assert pareto([(10, 5.0, None)]) == [True]
    assert pareto([(10, 5.0, None), (10, 4.0, None)]) == [False, True]
    assert pareto([(10, 5.0, None), (10, 5.0, None)]) == [True, True]
    assert pareto([(10, math.inf, None), (20, 5.0, None), (5, math.nan, None)]) == [False, True, False]


def test_only_a_clear_difference_in_speed_counts():
    slow, fast, both = (8.0, 10.0), (11.0, 13.0), (9.0, 12.0)
    assert pareto([(10, 5.0, fast), (10, 4.0, slow)]) == [True, True]
    assert pareto([(10, 5.0, both), (10, 4.0, slow)]) == [False, True]  # overlapping repeats are noise
    assert pareto([(10, 5.0, fast), (10, 5.0, slow)]) == [True, False]


def test_marks_are_never_all_lost():
    draw = random.Random(1)
    for _ in range(300):
        rows = []
        for _ in range(draw.randint(1, 9)):
            low = draw.choice((5, 7, 9))
            spread = None if draw.random() < 0.2 else (low, low + draw.choice((1, 3)))
            rows.append((draw.randint(1, 3), float(draw.randint(1, 3)), spread))
        marks = pareto(rows)
        assert any(marks)
        smallest = min(rows[i][:2] for i in range(len(rows)))
        assert any(mark for mark, row in zip(marks, rows, strict=True) if row[:2] == smallest)


# --- forms


def test_the_table_fits_a_terminal_and_marks_the_best():
    rows = sample().rows
    text = printed(sample(rows=[*rows, replace(rows[2], method="awq:rounding=gptq:n_grid=40", pareto=False)]))
    lines = text.splitlines()
    assert "AWQ, " in text and "rounding" in text and "gptq, " in text and "n_grid" in text
    assert "perplexity" in lines[0] and "tokens/s" in lines[0]
    assert "AWQ *" in text and "RTN *" not in text and "8,188 tokens in 4 windows" in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text and "infinite" in text
    assert all(len(line) <= 80 for line in lines)


def test_what_is_no_number_is_null_in_json_and_named_on_the_page():
    document = json.loads(sample().to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["rows"][3]["perplexity"] is None and document["rows"][3]["kl"] is None
    html = sample().to_html()
    assert "Not drawn" in html and "RTN, 2 bits" in html


def test_names_of_the_user_are_escaped():
    nasty = "<script>alert('x')</script> & [bold]b[/bold]"
    one = sample(model=nasty, text=nasty, environment={nasty: nasty})
    parser = HTMLParser()
    parser.feed(one.to_html())
    assert "<script" not in one.to_html()
    assert nasty in printed(one, width=2000)


def test_a_gguf_source_is_said():
    fields = {"quantized": True, "file_bytes": 98_000_000, "types": "Q4_1 (79 %)", "dtype": "float32"}
    one = sample(source=fields)
    assert "quantized already: Q4_1" in one.to_html() and "Q4_1" in printed(one)


# --- refusals


def test_plans_are_checked():
    assert "no method" in refused(lambda: plan([], [4]), InvalidArgument)
    assert "no bit width" in refused(lambda: plan(["rtn"], []), InvalidArgument)
    assert "rtn more than once" in refused(lambda: plan(["rtn", "awq", "rtn"], [4]), InvalidArgument)
    assert "width 3 more than once" in refused(lambda: plan(["rtn"], [3, 3]), InvalidArgument)
    assert "magic" in refused(lambda: plan(["rtn", "magic"], [4]), RecipeError)
    assert "bits=9" in refused(lambda: plan(["rtn"], [4, 9]), InvalidArgument)
    assert "NAME=VALUE" in refused(lambda: plan(["awq:rounding"], [4]), InvalidArgument)
    assert "'speed'" in refused(lambda: plan(["awq:speed=1"], [4]), RecipeError)
    assert "rounding" in refused(lambda: plan(["awq:rounding=up"], [4]), InvalidArgument)
    assert "no bits in it" in refused(lambda: plan(["rtn:bits=3"], [4]), InvalidArgument)


def test_settings_follow_a_methods_name():
    steps = plan(["awq", "awq:rounding=gptq:act_order=false:group_size=32"], [4, 3], group_size=16)
    assert [step.config.bits for step in steps] == [3, 3, 4, 4]
    one, other = (step.config for step in steps[:2])
    assert (one.rounding, one.act_order, one.group_size) == ("nearest", True, 16)
    assert (other.rounding, other.act_order, other.group_size) == ("gptq", False, 32)


def test_variants_have_rows_of_their_own(source, words, tmp_path):
    methods = ["awq", "awq:clip=false", "rtn"]
    texts = {"calibration_text": [words], "text": [words]}
    found = compare(source, methods=methods, bits=[3, 4], output=tmp_path / "out", **texts, **SMALL)
    assert [row.method for row in found.rows] == ["original", *methods, *methods]
    assert [row.bits for row in found.rows] == [None, 3, 3, 3, 4, 4, 4]
    assert "AWQ, clip false" in found.to_html()
    assert found.rows[1].kl != found.rows[2].kl


def test_bad_input_is_refused_before_any_work(source, words, tmp_path, monkeypatch):
    def never(*arguments, **settings):
        pytest.fail("work was begun")

    monkeypatch.setattr(comparison, "sweep", never)
    out = tmp_path / "out"
    refused(lambda: compare(source, group_size=48, output=out), InvalidArgument)
    refused(lambda: compare(source, max_tokens=1, output=out), InvalidArgument)
    refused(lambda: compare(source, samples=0, output=out), InvalidArgument)
    refused(lambda: compare(source, text=[tmp_path / "no.txt"], output=out), DataError)
    refused(lambda: compare(source, calibration_text=[tmp_path / "no.txt"], output=out), DataError)
    refused(lambda: compare(tmp_path / "nowhere", output=out), CheckpointError)
    words_file = tmp_path / "file"
    words_file.write_text("x")
    assert "is a file" in refused(lambda: compare(source, output=words_file), OutputError)
    out.mkdir()
    (out / "compare.json").write_text("old")
    assert "overwrite" in refused(lambda: compare(source, output=out), OutputError)
    assert (out / "compare.json").read_text() == "old"


def test_overwriting_replaces_the_files_and_nothing_else(source, words, tmp_path):
    (tmp_path / "compare.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    compare(source, methods=["rtn"], bits=[4], output=tmp_path, overwrite=True, text=[words], **SMALL)
    assert json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "compare.html", "notes.txt"}

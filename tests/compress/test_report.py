"""The report says what was measured, in all its forms, and nothing else."""

import io
import json
import math
import os
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

from tensormill.compress.evaluate import Comparison, Evaluation, Interval
from tensormill.compress.report import (
    CompressionReport,
    CurvePoint,
    LayerLoss,
    environment,
    format_bytes,
)
from tensormill.compress.speed import Speed
from tensormill.errors import InvalidArgument, OutputError

rich_console = pytest.importorskip("rich.console")
pytest.importorskip("jinja2")

CONTRACT = [
    "model",
    "method",
    "output",
    "bytes_before",
    "bytes_after",
    "bits_per_weight",
    "seconds",
    "peak_memory_bytes",
    "perplexity",
    "bits_per_byte",
    "kl",
    "tokens_per_second",
]
KINDS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def sample_report(blocks=8) -> CompressionReport:
    """Invented figures of a plausible size: they show what a page looks like and stand for no measurement."""
    generator = random.Random(0)
    layers = []
    for block in range(blocks):
        for number, kind in enumerate(KINDS):
            rtn = 10 ** (-2.4 + 0.12 * number * (-1) ** number + 0.05 * block + generator.gauss(0, 0.12))
            gain = generator.uniform(0.35, 1.05)
            layers.append(LayerLoss(f"model.layers.{block}.{kind}", 4, rtn * gain, rtn))
    curve = [
        CurvePoint(method, bits + 0.156, 5.62 * (1 + share * 4.0 ** (4 - bits)))
        for method, share in (("rtn", 0.052), ("gptq", 0.031), ("awq", 0.024))
        for bits in (2, 3, 4, 6, 8)
    ]
    speed = {
        "original": Speed(118.0, 1450.0, 32, 128, 5, (112.0, 121.0), (1410.0, 1470.0)),
        "compressed": Speed(203.0, 1390.0, 32, 128, 5, (196.0, 207.0), (1350.0, 1440.0)),
    }
    return CompressionReport(
        model="builtin:python-lm",
        method="awq",
        output="python-lm-awq-w4",
        bytes_before=32_871_424,
        bytes_after=10_402_816,
        bits_per_weight=4.156,
        seconds=31.4,
        peak_memory_bytes=1_243_000_000,
        perplexity={"original": 5.6213, "rtn": 5.9136, "compressed": 5.7562},
        bits_per_byte={"original": 0.7431, "rtn": 0.7649, "compressed": 0.7533},
        kl=0.0187,
        tokens_per_second={name: one.decode for name, one in speed.items()},
        top1_agreement=0.9321,
        recipe={"method": "awq", "bits": 4, "group_size": 128, "symmetric": False, "clip": True},
        difference_to_original=Interval(0.1219, 0.1482, 0.1349, 0.95, 146),
        difference_to_rtn=Interval(-0.1771, -0.1389, -0.1574, 0.95, 146),
        layers=layers,
        curve=curve,
        speed=speed,
        evaluation={
            "text": "standard library, 15 held-out modules (Python 3.11.7)",
            "text_sha256": "0" * 64,
            "tokens": 149_358,
            "bytes": 501_112,
            "windows": 146,
            "window": 1024,
            "byte_rule": "pieces",
        },
        environment={
            "device": "a CPU, 2 threads",
            "date": "2026-01-02T03:04:05+00:00",
            "seed": 0,
            "torch": "2.13.0",
        },
    )


class Page(HTMLParser):
    """Collects the page's text and every address it would load, and checks that tags are balanced."""

    VOID = ("meta", "link", "br", "img", "hr", "input", "rect", "line", "circle", "polygon", "polyline")

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.addresses, self.tags = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster"):
                self.addresses.append(value)
            assert not name.startswith("on"), f"script in {tag} {name}"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def text_of(html):
    return re.sub(r"\s+", " ", " ".join(Page(html).text))


def printed(report, width=200):
    stream = io.StringIO()
    report.print(rich_console.Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


def findings(report, level=None):
    return " ".join(finding.text for finding in report.findings() if level in (None, finding.level))


def test_json_has_the_contract_first():
    document = json.loads(sample_report().to_json())
    assert list(document)[: len(CONTRACT)] == CONTRACT
    assert set(document["perplexity"]) == set(document["bits_per_byte"]) == {"original", "rtn", "compressed"}
    assert set(document["tokens_per_second"]) == {"original", "compressed"}
    assert document["perplexity"]["compressed"] == 5.7562
    assert document["bytes_after"] == 10_402_816 and isinstance(document["bytes_after"], int)
    assert document["layers"][0].keys() == {"name", "bits", "nmse", "loss_rtn"}
    assert document["curve"][0].keys() == {"method", "bits_per_weight", "perplexity"}
    assert document["perplexity_difference"]["to_rtn"]["significant"] is True
    assert document["evaluation"]["text_sha256"] == "0" * 64


def test_json_keeps_its_keys_when_little_was_measured():
    report = replace(
        sample_report(),
        perplexity={},
        bits_per_byte={},
        kl=None,
        tokens_per_second={},
        layers=[],
        curve=[],
        speed={},
    )
    document = json.loads(report.to_json())
    assert list(document)[: len(CONTRACT)] == CONTRACT
    assert document["perplexity"] == {"original": None, "rtn": None, "compressed": None}
    assert document["tokens_per_second"] == {"original": None, "compressed": None}


def test_values_that_are_no_numbers_are_null_in_json_and_named_elsewhere():
    report = replace(
        sample_report(),
        perplexity={"original": 5.6213, "rtn": math.inf, "compressed": math.nan},
        kl=math.nan,
        layers=[LayerLoss("model.layers.0.mlp.up_proj", 2, math.nan, 0.1)],
        curve=[CurvePoint("rtn", 2.1, math.inf), CurvePoint("rtn", 3.1, 8.0)],
        recipe={"factor": math.inf},
    )
    document = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["perplexity"]["rtn"] is None and document["perplexity"]["compressed"] is None
    assert document["kl"] is None and document["recipe"]["factor"] is None
    assert document["layers"][0]["nmse"] is None
    for text in (printed(report), text_of(report.to_html())):
        assert "NaN" in text and "infinite" in text
    assert "not usable" in findings(report, "warning")
    assert "model.layers.0.mlp.up_proj" in findings(report, "warning")
    assert "RTN at 2.10 bits: infinite" in text_of(report.to_html())
    assert not re.search(r'="[^"]*(nan|inf)[^"]*"', re.sub(r'aria-label="[^"]*"', "", report._quality_plot()))


def test_json_takes_numbers_of_torch_and_paths(tmp_path):
    report = replace(
        sample_report(),
        kl=torch.tensor(0.25),
        recipe={"output": tmp_path, "grid": (1, 2)},
        environment={"x": {1}},
    )
    document = json.loads(report.to_json())
    assert document["kl"] == 0.25
    assert document["recipe"] == {"output": str(tmp_path), "grid": [1, 2]}
    assert document["environment"] == {"x": [1]}


def test_page_stands_alone():
    html = sample_report().to_html()
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.addresses == []
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert page.tags.count("svg") == 4
    # The only address is the name of SVG's namespace, which nothing loads.
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in html and "url(" not in html
    assert "prefers-color-scheme: dark" in html


def test_page_and_terminal_hold_the_numbers():
    report = sample_report()
    page, terminal = text_of(report.to_html()), printed(report)
    for number in (
        "5.621",
        "5.914",
        "5.756",
        "0.7533",
        "32.9 MB",
        "10.4 MB",
        "3.16\N{MULTIPLICATION SIGN}",
        "203",
        "93.2 %",
        "0.0187",
    ):
        assert number in page, number
        assert number in terminal, number
    for number in ("146", "149,358", "501,112", "2026-01-02", "group_size: 128", "q_proj", "0" * 64):
        assert number in page, number
    for layer in report.layers:
        assert layer.name in page
    assert report.output in terminal


def test_names_of_the_user_are_escaped():
    nasty = "<script>alert('x')</script> & \"q\" [bold]b[/bold]"
    report = replace(
        sample_report(),
        model=nasty,
        output=f"/tmp/{nasty}",
        method=nasty,
        recipe=nasty,
        layers=[LayerLoss(f"{nasty}.0.{nasty}", 4, 0.1, 0.2)],
        curve=[CurvePoint(nasty, 4.0, 6.0)],
        evaluation={"text": nasty},
        environment={nasty: nasty},
    )
    html = report.to_html()
    page = Page(html)
    assert "script" not in page.tags and "<script" not in html
    assert nasty in " ".join(page.text)
    assert nasty in printed(report, width=2000)
    assert json.loads(report.to_json())["model"] == nasty


def test_better_than_rounding_is_said_with_its_interval():
    text = findings(sample_report(), "good")
    assert "Better than round-to-nearest" in text and "54 % of its loss recovered" in text
    assert "\N{MINUS SIGN}0.18 to \N{MINUS SIGN}0.14" in text and "95 %" in text
    assert "Perplexity rises by 2.4 %" in findings(sample_report(), "note")
    assert findings(sample_report(), "warning") == ""


def test_an_interval_that_holds_zero_is_no_difference():
    nothing = Interval(-0.01, 0.02, 0.004, 0.95, 146)
    report = replace(sample_report(), difference_to_original=nothing, difference_to_rtn=nothing)
    text = findings(report)
    assert "No significant difference to the original" in text
    assert "No significant difference to round-to-nearest" in text
    assert "Better" not in text and "rises" not in text


def test_worse_than_rounding_is_a_warning():
    worse = replace(
        sample_report(),
        perplexity={"original": 5.6, "rtn": 5.9, "compressed": 6.3},
        difference_to_rtn=Interval(0.3, 0.5, 0.4, 0.95, 146),
    )
    assert "Worse than round-to-nearest" in findings(worse, "warning")
    assert "! Worse" in printed(worse)
    assert 'class="warning"' in worse.to_html()


def test_without_windows_nothing_is_claimed():
    unknown = Interval(math.nan, math.nan, 0.1, 0.95, 1)
    for interval in (None, unknown):
        report = replace(sample_report(), difference_to_original=interval, difference_to_rtn=interval)
        text = findings(report)
        assert "too few windows" in text and "Better" not in text and "rises" not in text
        report.to_html()
    few = replace(
        sample_report(), difference_to_rtn=Interval(-0.3, -0.1, -0.2, 0.95, 4), difference_to_original=None
    )
    assert "4 windows only" in findings(few, "note")


def speeds(before, after, spread=0.02):
    def one(value):
        around = (value * (1 - spread), value * (1 + spread))
        return Speed(value, 10 * value, 32, 128, 5, around, (10 * around[0], 10 * around[1]))

    pair = {"original": one(before), "compressed": one(after)}
    return {"speed": pair, "tokens_per_second": {name: speed.decode for name, speed in pair.items()}}


@pytest.mark.parametrize(
    ("before", "after", "spread", "level", "words"),
    [
        (100, 150, 0.02, "good", "1.50\N{MULTIPLICATION SIGN} faster"),
        (100, 50, 0.02, "warning", "2.00\N{MULTIPLICATION SIGN} slower on this device"),
        (100, 103, 0.001, "note", "About as fast"),
        (100, 150, 0.5, "note", "No clear difference in speed"),
    ],
)
def test_speed_is_called_what_it_is(before, after, spread, level, words):
    report = replace(sample_report(), **speeds(before, after, spread))
    said = findings(report, level)
    assert said.count(words) == 2
    assert "decoding at batch 1" in said and "reading a prompt of 128 tokens" in said


def test_growth_and_lost_layers_are_said():
    report = replace(sample_report(), bytes_after=40_000_000)
    assert "Not smaller" in findings(report, "warning")
    layers = [LayerLoss("a", 4, 0.3, 0.2), LayerLoss("b", 4, 0.1, 0.2), LayerLoss("c", 4, 0.2, None)]
    assert "1 of 2 layers lose more" in findings(replace(report, layers=layers), "note")


def test_rounding_is_not_compared_with_itself():
    report = replace(sample_report(), method="rtn", difference_to_rtn=None)
    assert "ound-to-nearest" not in findings(report)


def test_a_report_of_almost_nothing_has_all_forms(tmp_path):
    report = CompressionReport(
        model="m",
        method="rtn",
        output="o",
        bytes_before=0,
        bytes_after=0,
        bits_per_weight=math.nan,
        seconds=0.0,
        peak_memory_bytes=0,
        perplexity={},
        bits_per_byte={},
        kl=None,
        tokens_per_second={},
    )
    assert "Quality was not measured" in findings(report)
    text_of(report.to_html())
    printed(report)
    report.write(tmp_path)


def test_a_compression_without_evaluation_says_so():
    fields = {name: getattr(sample_report(), name) for name in CONTRACT[:8]}
    layers = [LayerLoss("model.layers.0.mlp.up_proj", 4, None, None)]
    report = CompressionReport.without_evaluation(layers=layers, **fields)
    document = json.loads(report.to_json())
    assert list(document)[: len(CONTRACT)] == CONTRACT
    assert document["perplexity"] == {"original": None, "rtn": None, "compressed": None}
    assert document["layers"][0]["nmse"] is None
    assert "Quality was not measured" in findings(report)
    page = Page(report.to_html())
    assert "model.layers.0.mlp.up_proj" in page.text and page.tags.count("svg") == 1  # the sizes
    printed(report)


def test_a_curve_with_its_own_original_is_drawn_alone():
    curve = [CurvePoint("original", 16.0, 7.25), CurvePoint("rtn", 4.2, 7.5), CurvePoint("awq", 4.2, 7.4)]
    plot = replace(sample_report(), curve=curve)._quality_plot()
    titles = re.findall(r"<title>([^<]*)</title>", plot)
    # The report's own perplexities come from other windows and must not be mixed in.
    assert titles == ["original: 7.250", "RTN, 4.20 bits: 7.500", "AWQ, 4.20 bits: 7.400"]
    alone = replace(sample_report(), curve=[])._quality_plot()
    assert (
        "original: 5.621" in alone and "AWQ, 4.16 bits: 5.756" in alone and "RTN, 4.16 bits: 5.914" in alone
    )


def evaluation(losses, comparison=None):
    nll = torch.tensor(losses, dtype=torch.float64)
    return Evaluation(float(nll.mean().exp()), 0.75, 93, 300, nll, 32, "pieces", "ab" * 32, comparison)


def test_report_from_evaluations():
    base = torch.linspace(1.5, 2.0, 20).tolist()
    evaluations = {
        "original": evaluation(base),
        "rtn": evaluation([loss + 0.05 + 0.002 * (i % 3) for i, loss in enumerate(base)]),
        "compressed": evaluation(
            [loss + 0.02 + 0.002 * (i % 2) for i, loss in enumerate(base)], Comparison(0.01, 0.9)
        ),
    }
    fields = {
        name: getattr(sample_report(), name)
        for name in ("model", "output", "bytes_before", "bytes_after", "bits_per_weight", "seconds")
    }
    report = CompressionReport.from_evaluations(
        evaluations,
        text="a text",
        layers=[SimpleNamespace(name="a", bits=4, nmse=0.1, loss_rtn=0.2, seconds=1.0)],
        speeds=speeds(100, 150)["speed"],
        method="awq",
        peak_memory_bytes=5,
        **fields,
    )
    assert report.difference_to_original.low > 0 > report.difference_to_rtn.high
    assert (report.kl, report.top1_agreement) == (0.01, 0.9)
    assert report.tokens_per_second == {"original": 100, "compressed": 150}
    assert report.layers == [LayerLoss("a", 4, 0.1, 0.2)]
    assert report.evaluation["text_sha256"] == "ab" * 32 and report.evaluation["windows"] == 20
    text_of(report.to_html())
    rounded = {name: evaluations[name] for name in ("original", "compressed")}
    alone = CompressionReport.from_evaluations(rounded, method="rtn", peak_memory_bytes=5, **fields)
    assert alone.perplexity["rtn"] == alone.perplexity["compressed"] and alone.difference_to_rtn is None
    with pytest.raises(InvalidArgument, match="compressed"):
        CompressionReport.from_evaluations({"original": evaluations["original"]}, **fields)


def test_files_are_whole(tmp_path):
    target = tmp_path / "deep" / "folder"
    paths = sample_report().write(target)
    assert [path.name for path in paths] == ["report.json", "report.html"]
    assert json.loads(paths[0].read_text(encoding="utf-8"))["method"] == "awq"
    assert text_of(paths[1].read_text(encoding="utf-8"))
    assert sorted(path.name for path in target.iterdir()) == ["report.html", "report.json"]
    replace(sample_report(), method="gptq").write(target)
    assert json.loads(paths[0].read_text(encoding="utf-8"))["method"] == "gptq"


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    sample_report().write(tmp_path)
    before = (tmp_path / "report.json").read_text(encoding="utf-8")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left") as caught:
        replace(sample_report(), method="gptq").write(tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_directory_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be written"):
        sample_report().write(tmp_path / "file" / "folder")


def test_environment_says_where_and_when():
    found = environment("cpu", seed=3)
    assert found["seed"] == 3 and found["torch"] and found["python"] and found["device"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])
    json.dumps(found)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_terminal_can_print_it(encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    report = replace(sample_report(), model="mod\u00e8le-\u2603")
    report.print(rich_console.Console(file=stream, width=120, color_system=None))
    stream.flush()
    text = raw.getvalue().decode(encoding)
    assert "10.4 MB" in text and ("->" in text) == (encoding != "utf-8")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (999_600, "1.00 MB"),
        (4.2e9, "4.20 GB"),
        (5e13, "50.0 TB"),
    ],
)
def test_bytes_for_people(count, text):
    assert format_bytes(count) == text

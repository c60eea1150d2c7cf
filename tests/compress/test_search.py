"""The whole search on tiny models: budgets are kept, the choice is a recipe, and what contradicts is refused."""

import itertools
import json
import math
import random
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from packed_models import save_source
from tiny_models import tiny_model

from tensormill.compress import compress, search
from tensormill.compress.checkpoint import load
from tensormill.compress.footprint import bits_per_weight, checkpoint_bytes
from tensormill.compress.formats.checkpoint_format import compressed_linears
from tensormill.compress.formats.registry import FORMATS
from tensormill.compress.recipe import parse_recipe
from tensormill.compress.search import CalibrationTexts
from tensormill.errors import DataError, InvalidArgument, ModelError, RecipeError

pytestmark = pytest.mark.filterwarnings("ignore:.*zero points of:UserWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save_source(tiny_model("llama", vocab_size=128), tmp_path_factory.mktemp("search") / "model")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    draw = random.Random(1)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("\n".join(" ".join(f"word{draw.randrange(126)}" for _ in range(8)) for _ in range(900)))
    return file


REAL_TIMES = search.linear_times


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Timing real kernels takes seconds: a millisecond each, but four at 3 bits."""

    def times(model, groups, widths, config, progress=None):
        return {
            group: {bits: (4e-3 if bits == 3 else 1e-3) * len(group.names) for bits in widths}
            for group in groups
        }

    monkeypatch.setattr(search, "linear_times", times)


@pytest.fixture
def run(source, words, tmp_path):
    def call(budget, method="rtn", **settings):
        given = {"group_size": 32, "evaluate": False, "max_tokens": 600, **settings}
        if method != "rtn":
            given |= {"calibration_samples": 4, "calibration_length": 48}
        return compress(
            source, method, budget=budget, calibration_text=[words], text=[words], output=tmp_path / "out",
            overwrite=True, **given,
        )  # fmt: skip

    return call


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_size_is_kept_and_used_up(run, tmp_path, method):
    report = run("4.6bpw", method)
    assert 4.3 < report.bits_per_weight <= 4.6
    found = report.search
    assert found.chosen.bits_per_weight == pytest.approx(report.bits_per_weight, rel=1e-9)
    assert found.rounding == method and found.measure == "layers"
    # The finished model has the widths that the report names.
    model = load(tmp_path / "out")
    widths = {f"{one.block}.{name}": one.bits for one in found.groups for name in one.names}
    assert {name: layer.bits for name, layer in compressed_linears(model).items()} == widths
    assert len(set(widths.values())) > 1
    assert bits_per_weight(model) == pytest.approx(report.bits_per_weight)
    assert {layer.name: layer.bits for layer in report.layers} == widths


def test_bytes_are_those_of_the_files(run, tmp_path):
    report = run("112kB")
    assert report.bytes_after == checkpoint_bytes(tmp_path / "out") <= 112_000
    found = report.search
    assert report.bytes_after <= found.chosen.bytes <= report.bytes_after + 4000
    larger = [point for point in found.front if point.bytes > found.chosen.bytes]
    assert larger and all(point.bytes > 112_000 for point in larger)


def test_the_front_falls_and_no_single_width_is_below_it(run):
    found = run("5bpw").search
    assert all(
        a.bytes < b.bytes and a.predicted_kl > b.predicted_kl for a, b in itertools.pairwise(found.front)
    )
    assert [next(iter(point.widths)) for point in found.uniform] == [2, 3, 4, 5, 6, 7, 8]
    # Shown is every thirtieth part of the range of sizes.
    step = (found.front[-1].bytes - found.front[0].bytes) / 30
    for single in found.uniform:
        best = min(p.predicted_kl for p in found.front if p.bytes <= single.bytes + step)
        assert best <= single.predicted_kl * (1 + 1e-9)
    assert sum(point.chosen for point in found.front) == 1


def test_a_perplexity_is_measured_not_predicted(run):
    report = run("ppl+3%")
    found = report.search
    measured = [point for point in found.front if point.measured is not None]
    limit = 1.03 * found.original_perplexity
    assert found.chosen.measured["perplexity"] <= limit
    # The next smaller point that was tried doesn't meet it, or the choice is the smallest of all.
    smaller = [point for point in measured if point.bytes < found.chosen.bytes]
    assert found.chosen is found.front[0] or smaller[-1].measured["perplexity"] > limit
    assert len(measured) <= math.ceil(math.log2(search._SHOWN)) + 2


@pytest.fixture
def harmful(monkeypatch):
    """Finished models whose perplexity, from 10, rises thrice as fast as predicted; says how many were measured."""
    measured = []

    def measure(self, allocations, samples, progress):
        self.original, self.tokens = 10.0, 100
        measured.extend(allocations)
        return {one.bits: {"perplexity": 10 * math.exp(3 * one.loss), "kl": one.loss} for one in allocations}

    monkeypatch.setattr(search._Prober, "measure", measure)
    return measured


@pytest.mark.parametrize("percent", [0.1, 2, 10, 60, 1000])
def test_bisection_finds_the_smallest_point_that_keeps_a_perplexity(run, harmful, percent):
    found = run(f"ppl+{percent}%").search
    keeping = [p for p in found.front if 10 * math.exp(3 * p.predicted_kl) <= 10 * (1 + percent / 100)]
    assert found.chosen is keeping[0]
    assert len(harmful) <= math.ceil(math.log2(search._SHOWN)) + 2
    rise = next(note for note in found.notes() if "perplexity there" in note)
    assert 0 <= float(rise.split()[4]) <= percent
    assert percent < 1000 or found.chosen is found.front[0]


def test_a_perplexity_that_nothing_keeps_is_refused(run, harmful):
    with pytest.raises(
        InvalidArgument, match=r"ppl\+0.00001%, which no point of the front meets.* at ppl\+\d"
    ):
        run("ppl+0.00001%", widths=[2])


def test_a_speed_is_kept_by_prediction(run, monkeypatch):
    """The fixture's kernels: 3 bits take four times as long as the others."""
    monkeypatch.setattr(search, "_seconds_besides", lambda *arguments: 6e-3)
    # 14 layers of a millisecond and 6 ms besides: 50 tokens a second at most.
    found = run("4.2bpw,49tok/s").search
    assert found.chosen.tokens_per_second == pytest.approx(50)
    assert 3 not in found.chosen.widths
    assert 3 in run("4.2bpw").search.chosen.widths
    fastest = run("49tok/s").search
    assert fastest.chosen.widths == {8: 8}
    with pytest.raises(InvalidArgument, match=r"the fastest decodes 50 tok/s"):
        run("60tok/s")


def test_real_kernels_are_timed(run, monkeypatch):
    monkeypatch.setattr(search, "linear_times", REAL_TIMES)
    found = run("5bpw,1tok/s").search
    assert all(point.milliseconds > 0 for point in found.front)
    assert found.chosen.tokens_per_second > 1


def test_the_recipe_gives_the_same_widths_again(run, source, words, tmp_path):
    import yaml

    report = run("4.6bpw", "gptq", evaluate=True)
    text = yaml.safe_dump(json.loads(json.dumps(report.to_dict()["recipe"])))
    (tmp_path / "recipe.yaml").write_text(text)
    assert parse_recipe(text)[0].config.bits_by_layer == report.search.step.config.bits_by_layer
    again = compress(
        source,
        recipe=tmp_path / "recipe.yaml",
        calibration_text=[words],
        output=tmp_path / "again",
        evaluate=False,
    )
    assert [(layer.name, layer.bits) for layer in again.layers] == [
        (layer.name, layer.bits) for layer in report.layers
    ]
    assert again.search is None


def test_the_report_shows_what_was_chosen_from(run, tmp_path):
    report = run("4.6bpw", evaluate=True)
    found = report.search
    measured = [point for point in (*found.front, *found.uniform) if point.measured is not None]
    assert found.chosen in measured and len(measured) >= 4 and found.probe_tokens > 100
    document = json.loads((tmp_path / "out" / "report.json").read_text())["search"]
    assert [point["bytes"] for point in document["front"]] == [point.bytes for point in found.front]
    assert sum(point["chosen"] for point in document["front"]) == 1
    assert document["groups"][0]["losses"].keys() == set("2345678")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Choice of widths" in page and "front, predicted" in page
    for svg in (found.front_plot(), found.width_plot()):
        root = ElementTree.fromstring(svg)
        assert svg in page and "nan" not in svg
        titles = [part for part in root.iter() if part.tag.endswith("title")]
        assert len(titles) >= 8
    assert any("chosen" in (part.text or "") for part in ElementTree.fromstring(found.front_plot()).iter())


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(run, tmp_path, name):
    mixes = name != "awq"
    report = run("5.3bpw", format=name)
    assert report.bits_per_weight <= 5.3
    assert (len(report.search.chosen.widths) > 1) == mixes
    model = load(tmp_path / "out")
    assert bits_per_weight(model) == pytest.approx(report.bits_per_weight)
    assert report.bytes_after <= report.search.chosen.bytes
    found = [next(iter(point.widths)) for point in report.search.uniform]
    assert found == {"compressed-tensors": [2, 3, 4, 5, 6, 7, 8], "awq": [4]}.get(name, [2, 3, 4, 8])


def test_widths_to_choose_from(run):
    found = run("5.5bpw", widths=[8, 4]).search
    assert found.widths == (4, 8) and set(found.chosen.widths) == {4, 8}
    with pytest.raises(InvalidArgument, match="given bits=9"):
        run("5bpw", widths=[4, 9])
    with pytest.raises(ModelError, match="given 3 bits for a checkpoint in the format awq"):
        run("5bpw", widths=[3], format="awq")
    with pytest.raises(InvalidArgument, match="widths to choose from without a budget"):
        run(None, widths=[4])


@pytest.mark.parametrize(
    ("budget", "settings", "error", "message"),
    [
        (
            "2.5bpw",
            {},
            InvalidArgument,
            r"budget 2.5bpw, expected 3.062bpw to 9.25bpw: what 2, 3, 4, 5, 6, 7 or 8 bits",
        ),
        ("10bpw", {}, InvalidArgument, "expected 3.062bpw to 9.25bpw"),
        ("20kB", {}, InvalidArgument, r"expected 0\.\d+MB to 0\.\d+MB"),
        ("1GB", {}, InvalidArgument, "expected 0"),
        ("5bpw", {"bits": 4}, InvalidArgument, "given bits and a budget"),
        ("5bpw", {"bits_by_layer": {"*": 4}}, InvalidArgument, "given bits_by_layer and a budget"),
        ("5", {}, InvalidArgument, "given '5' as a budget"),
        ("5bpw", {"skip": ["*"]}, ModelError, "skip every linear layer"),
        ("5bpw", {"group_size": 48}, InvalidArgument, "group_size=48"),
    ],
)
def test_what_contradicts_is_refused(run, tmp_path, monkeypatch, budget, settings, error, message):
    monkeypatch.setattr(search, "measure_sensitivity", lambda *a, **k: pytest.fail("worked"))
    with pytest.raises(error, match=message):
        run(budget, **settings)
    assert not (tmp_path / "out").exists()


def test_a_recipe_and_a_budget_are_refused(source, tmp_path):
    (tmp_path / "recipe.yaml").write_text("- method: rtn\n")
    with pytest.raises(RecipeError, match="given a recipe and a budget"):
        compress(source, recipe=tmp_path / "recipe.yaml", budget="4bpw", output=tmp_path / "out")


def test_the_kept_back_text_is_apart_from_the_other():
    lines = [f"line {i} of the text" for i in range(4000)]
    texts = CalibrationTexts.of(["\n".join(lines[:1500]), "\n".join(lines[1500:])])
    kept, used = set(texts.kept_back.split("\n")), set("\n".join(texts.method).split("\n"))
    whole = set(lines)
    assert len(kept & whole) == pytest.approx(500, abs=15) and not kept & used & whole
    assert len((kept | used) & whole) > 3950
    unbroken = CalibrationTexts.of(["x" * 1000])
    assert len(unbroken.kept_back) == 125 and len(unbroken.method[0]) == 875


def test_too_little_calibration_text_is_refused(run, words):
    words.write_text(words.read_text()[:400])
    with pytest.raises(DataError, match="calibration text"):
        run("5bpw")

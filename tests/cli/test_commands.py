"""The commands as a user calls them: results, the JSON contract, help."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

COMPRESS = {
    "model", "method", "output", "bytes_before", "bytes_after", "bits_per_weight", "seconds", "peak_memory_bytes",
    "perplexity", "bits_per_byte", "kl", "tokens_per_second",
}  # fmt: skip
SMALL = ("--group-size", 32, "--set", "calibration_samples=4", "--set", "calibration_length=48")


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_compress_evaluate_generate(tensormill, tiny, words, tmp_path, method):
    text = ("--calibration", words, "--text", words)
    done = tensormill("compress", tiny, "--method", method, *SMALL, *text, "--output", "small", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert set(report) >= COMPRESS
    assert report["method"] == method
    assert report["output"] == "small"
    assert report["bytes_after"] < report["bytes_before"]
    assert set(report["perplexity"]) == {"original", "rtn", "compressed"}
    assert all(value > 1 for value in report["perplexity"].values())
    assert 4 < report["bits_per_weight"] < 6
    assert set(report["tokens_per_second"]) == {"original", "compressed"}
    written = json.loads((tmp_path / "small" / "report.json").read_text())
    assert written["perplexity"] == report["perplexity"]
    assert "<svg" in (tmp_path / "small" / "report.html").read_text()

    done = tensormill("evaluate", "small", "--text", words, "--json")
    assert done.code == 0, done.err
    evaluation = json.loads(done.out)
    assert set(evaluation) >= {"perplexity", "bits_per_byte", "tokens", "text"}
    assert evaluation["perplexity"] == pytest.approx(report["perplexity"]["compressed"], rel=1e-4)

    done = tensormill("generate", "small", "--prompt", "word1 word2", "--tokens", 4, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["tokens"] <= 4


def test_a_warning_is_one_line(tensormill, tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(
        {**tensors, "odd.weight": torch.ones(3)}, model / "model.safetensors", metadata={"format": "pt"}
    )
    done = tensormill("compress", model, "--method", "rtn", *SMALL[:2], "--no-evaluate", "-o", "small")
    assert done.code == 0
    warned = [line for line in done.err.splitlines() if not line.lstrip()[:1].isdigit()]
    assert len(warned) == 1 and warned[0].startswith("tensormill: warning: ") and "odd.weight" in warned[0]


@pytest.mark.parametrize("name", ["awq", "gptq", "gptq_v2"])
def test_other_formats_are_written_and_used(tensormill, tiny, words, tmp_path, name):
    done = tensormill(
        "compress", tiny, "--method", "rtn", *SMALL[:2], "--format", name, "--text", words, "-o", "small", "--json"
    )  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads(done.out)
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == name.partition("_")[0]

    done = tensormill("evaluate", "small", "--text", words, "--json")
    assert done.code == 0, done.err
    measured = json.loads(done.out)["perplexity"]
    assert measured == pytest.approx(report["perplexity"]["compressed"], rel=1e-4)
    assert tensormill("generate", "small", "--prompt", "word1", "--tokens", 2, "--json").code == 0


def test_a_recipe_names_a_format(tensormill, tiny, tmp_path):
    (tmp_path / "recipe.yaml").write_text("- format: gptq\n- {method: rtn, bits: 3, group_size: 32}\n")
    done = tensormill("compress", tiny, "--recipe", "recipe.yaml", "--no-evaluate", "-o", "small", "--json")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq" and config["bits"] == 3


def test_a_budget(tensormill, tiny, words, tmp_path):
    text = ("--calibration", words, "--text", words, "--max-tokens", 600)
    call = ("compress", tiny, "--method", "rtn", *SMALL[:2], *text, "--budget", "5bpw", "--widths", "3,4,8")
    done = tensormill(*call, "--json", "-o", "small")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["bits_per_weight"] <= 5 and report["search"]["candidates"] == [3, 4, 8]
    assert len({group["bits"] for group in report["search"]["groups"]}) > 1
    assert sum(point["chosen"] for point in report["search"]["front"]) == 1
    assert "sensitivity" in done.err

    done = tensormill(*call)
    assert done.code == 0, done.err
    assert "Budget 5bpw" in done.out and "KL predicted" in done.out and "all 4" in done.out
    assert (tmp_path / "model-rtn-5bpw-g32" / "report.html").exists()


def test_report_for_people(tensormill, tiny, words):
    done = tensormill("compress", tiny, "--method", "rtn", *SMALL[:2], "--text", words, "-o", "small")
    assert done.code == 0, done.err
    assert "smaller" in done.out
    assert "report.html" in done.out


def test_recipe(tensormill, tiny, words, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "- method: rtn\n  bits: 8\n  group_size: 32\n  only: ['*.down_proj']\n"
        "- method: gptq\n  bits: 3\n  group_size: 32\n  skip: [lm_head, '*.down_proj']\n"
        "  calibration_samples: 4\n  calibration_length: 48\n"
    )
    done = tensormill(
        "compress",
        tiny,
        "--recipe",
        "recipe.yaml",
        "--calibration",
        words,
        "--no-evaluate",
        "-o",
        "small",
        "--json",
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["method"] == "rtn+gptq"


def test_curve_has_every_method(tensormill, tiny, words):
    done = tensormill(
        "compress", tiny, "--method", "rtn", "--group-size", 32, "--calibration", words, "--text", words,
        "--no-evaluate", "--curve", "4", "-o", "small", "--json",
    )  # fmt: skip
    # 128 windows of 512 tokens, the default of GPTQ and AWQ, don't fit in this text: said in one line
    assert done.code == 2
    assert "calibration text" in done.err.splitlines()[-1]


def test_compare(tensormill, tiny, words, tmp_path):
    call = (
        "compare", tiny, "--methods", "rtn,awq", "--bits", "4,3", "--group-size", 32, "--samples", 2,
        "--calibration", words, "--text", words, "--max-tokens", 500, "--output", "both",
    )  # fmt: skip
    done = tensormill(*call, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert list(document)[:3] == ["model", "text", "rows"] and document["model"] == str(tiny)
    assert [(row["method"], row["bits"]) for row in document["rows"]] == [
        ("original", None), ("rtn", 3), ("awq", 3), ("rtn", 4), ("awq", 4),
    ]  # fmt: skip
    for row in document["rows"]:
        assert list(row) == [
            "method", "bits", "group_size", "bytes", "bits_per_weight", "perplexity", "kl", "top1_agreement",
            "tokens_per_second", "seconds", "pareto",
        ]  # fmt: skip
    assert json.loads((tmp_path / "both" / "compare.json").read_text()) == document
    assert "awq at 3 bits" in done.err
    done = tensormill(*call)
    assert done.code == 2 and "compare.json" in done.err
    done = tensormill(*call, "--overwrite")
    assert done.code == 0, done.err
    assert "perplexity" in done.out and "compare.html" in done.out and "tokens in" in done.out


def test_gguf(tensormill, words, tmp_path):
    pytest.importorskip("gguf")
    from gguf_models import write_gguf

    write_gguf(tmp_path / "tiny.gguf")
    text = ("--text", words, "--max-tokens", 2000)
    done = tensormill("compress", "tiny.gguf", "--method", "rtn", *SMALL[:2], *text, "-o", "small", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["source"]["types"].startswith("Q4_1") and report["perplexity"]["original"] > 1
    done = tensormill("evaluate", "tiny.gguf", *text, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["perplexity"] == pytest.approx(report["perplexity"]["original"], rel=1e-4)
    call = ("compare", "tiny.gguf", "--methods", "rtn", "--bits", 4, "--group-size", 32, *text, "--json")
    done = tensormill(*call)
    assert done.code == 0, done.err
    compared = json.loads(done.out)
    assert compared["source"] == report["source"] and compared["rows"][0]["bytes"] == report["bytes_before"]
    assert (tmp_path / "tiny-compare" / "compare.html").is_file()
    done = tensormill("generate", "tiny.gguf", "--prompt", "word1", "--tokens", 3, "--json")
    assert done.code == 0, done.err


def test_ops(tensormill):
    done = tensormill("ops", "--json")
    rows = json.loads(done.out)
    assert {"linear_wna16", "hadamard_transform", "ngram_matches"} <= {row["name"] for row in rows}
    for row in rows:
        assert {"name", "implementations", "available"} <= set(row)
        assert "reference" in row["available"]
    assert "hadamard_transform" in tensormill("ops").out


def test_bench(tensormill, tmp_path, monkeypatch):
    from tensormill import roofline

    machine = roofline.Ceilings("test", 1e10, 1e10, {"fp32": 1e11})
    monkeypatch.setattr("tensormill.ops.benchmark.ceilings", lambda device: machine)
    call = ("bench", "hadamard_transform", "--shape", "n=256", "--seconds", 0.02, "--device", "cpu")
    done = tensormill(*call, "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert rows
    for row in rows:
        assert {"shape", "implementation", "seconds", "limit_seconds", "ratio_to_peer"} <= set(row)
        assert row["shape"]["n"] == 256
        assert row["seconds"] > 0
    assert tensormill(*call).code == 0


def test_papers(tensormill):
    rows = json.loads(tensormill("papers", "--json").out)
    assert len(rows) == 47
    for row in rows:
        assert set(row) >= {"slug", "title", "arxiv", "year", "status", "claims"}
        for claim in row["claims"]:
            keys = {"id", "statement", "paper_value", "unit", "scale", "holds", "device", "stale"}
            assert keys <= set(claim)
    assert "awq" in tensormill("papers").out
    assert tensormill("papers", "ntk").out.startswith("Neural Tangent Kernel")
    assert [row["slug"] for row in json.loads(tensormill("papers", "ntk", "--json").out)] == ["ntk"]
    assert "did you mean awq" in tensormill("papers", "awqq").err
    wrong = tensormill("papers", "--status", "bogus")
    assert wrong.code == 2 and "expected one of: planned, holds" in wrong.err


def test_reproduce_a_planned_paper(tensormill):
    done = tensormill("reproduce", "smash", "--json", "--device", "cpu")
    assert done.code == 0, done.err
    assert json.loads(done.out)["claims"] == []


def test_help_is_instant_and_imports_no_torch():
    code = "import sys; sys.argv = ['tensormill', '--help']\nimport tensormill.cli.app as a\ntry:\n a.main()\nexcept SystemExit:\n pass\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("compress", "compare", "evaluate", "generate", "ops", "bench", "papers", "reproduce"):
        assert command in done.stdout


def test_version(tensormill):
    import tensormill as package

    assert package.__version__ in tensormill("--version").out


@pytest.fixture
def toy_paper(monkeypatch, tmp_path):
    from tensormill.papers import reproduce
    from tensormill.papers.catalogue import Measurement, Paper, Row

    monkeypatch.setenv("TENSORMILL_RESULTS", str(tmp_path / "results"))
    paper = Paper(slug="toy", title="A toy", authors="Doe", arxiv="2401.00002", room="ops", figures=())

    @paper.claim("C1", statement="One is one", unit="x", criterion="equal")
    def equal(run):
        return Measurement([Row("one", 1, "x")], holds=True)

    @paper.claim("C2", statement="Two is more", unit="x", criterion="above one")
    def more(run):
        return Measurement([Row("two", 2, "x")], holds=True)

    monkeypatch.setattr(reproduce, "find_paper", lambda slug: paper)


def test_reproduce_writes_a_page(tensormill, toy_paper, tmp_path):
    run = ("reproduce", "toy", "--device", "cpu")
    done = tensormill(*run, "--json")
    assert done.code == 0 and json.loads(done.out)["claims"][0]["holds"], done.err
    (page,) = (tmp_path / "results" / "toy").glob("quick-*.html")
    assert "One is one" in page.read_text(encoding="utf-8")

    assert tensormill(*run, "--claim", "C2").code == 0  # the page keeps the claim recorded before
    text = page.read_text(encoding="utf-8")
    assert text.index("One is one") < text.index("Two is more") and text.count("<h2>") == 2

    taken = tmp_path / "page.html"
    taken.write_text("mine")
    done = tensormill(*run, "--page", taken)
    assert done.code == 2 and "page.html" in done.err and taken.read_text() == "mine"
    done = tensormill(*run, "--page", taken, "--overwrite", "--no-record")
    assert done.code == 0 and str(taken) in done.out and "One is one" in taken.read_text()

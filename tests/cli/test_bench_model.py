"""`tensormill bench-model` as a user calls it."""

import json

import pytest

SHORT = ("--new-tokens", 3, "--repeats", 1, "--prompt-tokens", 6, "--device", "cpu")


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    from tensormill import roofline

    machine = roofline.Ceilings("test", 1e10, 1e10, {"fp32": 1e11})
    monkeypatch.setattr("tensormill.roofline.ceilings", lambda device: machine)


def test_beside_a_baseline(tensormill, tiny, tmp_path):
    call = (
        "bench-model",
        tiny,
        "--bits",
        4,
        "--group-size",
        32,
        "--baseline",
        "fp32",
        "--batch",
        "1,2",
        *SHORT,
    )
    done = tensormill(*call, "--json", "--page", "speed.html")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["model"] == str(tiny) and document["bandwidth"] == 1e10
    assert [(row["name"], row["path"], row["batch"]) for row in document["rows"]] == [
        ("W4", "prepared", 1), ("fp32", "plain", 1), ("fp32", "prepared", 1),
        ("W4", "prepared", 2), ("fp32", "plain", 2), ("fp32", "prepared", 2),
    ]  # fmt: skip
    first = document["rows"][0]
    assert {
        "first_token_seconds", "prefill", "decode", "decode_spread", "step_seconds", "weight_bytes", "cache_bytes",
        "model_bytes", "peak_memory_bytes", "limit", "of_the_limit", "captured", "setup_seconds", "note",
    } <= set(first)  # fmt: skip
    assert set(first["faster_than"]) == {"fp32 plain", "fp32 prepared"}
    assert first["weight_bytes"] < document["rows"][1]["weight_bytes"]
    assert "decoding: batch" in done.err
    assert "<svg" in (tmp_path / "speed.html").read_text()
    done = tensormill(*call, "--page", "speed.html")
    assert done.code == 2 and "speed.html" in done.err
    done = tensormill(*call, "--page", "speed.html", "--overwrite")
    assert done.code == 0, done.err
    assert "W4 faster" in done.out and "fp32 plain" in done.out and "batch 2" in done.out


def test_a_compressed_checkpoint_and_its_source(tensormill, tiny, tmp_path):
    done = tensormill(
        "compress", tiny, "--method", "rtn", "--group-size", 32, "--no-evaluate", "-o", "small", "--json"
    )
    assert done.code == 0, done.err
    for baseline in (tiny, "bf16"):
        done = tensormill("bench-model", "small", "--baseline", baseline, *SHORT, "--json")
        assert done.code == 0, done.err
        rows = json.loads(done.out)["rows"]
        assert [row["name"] for row in rows][1:] == ["bf16" if baseline == "bf16" else "baseline"] * 2
        assert rows[0]["weight_bytes"] < rows[1]["weight_bytes"]
    done = tensormill("bench-model", "small", "--bits", 4, *SHORT)
    assert done.code == 2 and "compressed already" in done.err


def test_a_random_model_with_a_rounded_head(tensormill, monkeypatch):
    from tensormill.models.decoding import synthetic

    shape = synthetic.Shape(64, 96, 2, 4, 2, 120)
    monkeypatch.setattr(synthetic, "SHAPES", {"small": shape})
    options = ("--bits", 3, "--group-size", 32, "--symmetric", "--lm-head-bits", 8, "--baseline", "fp32")
    done = tensormill("bench-model", "random:small", *options, *SHORT, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["conditions"]["weights"] == "3 bits, group size 32, symmetric; lm_head 8 bits"
    low, dense = document["rows"][:2]
    # codes of 3 bits in words, a scale for 32 of them, 8 bits for the output layer, against 32 for everything
    assert low["weight_bytes"] < dense["weight_bytes"] / 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("random:llama-9b",), "llama-8b"),
        (("builtin:python-lm", "--batch", "x"), "--batch"),
        (("builtin:python-lm", "--batch", "0", "--repeats", "1"), "batches"),
        (("builtin:python-lm", "--baseline", "fp12"), "fp16, bf16, fp32"),
        (("builtin:python-lm", "--prompt-tokens", "4000"), "context"),
        (("no-such-folder",), "no-such-folder"),
    ],
)
def test_bad_input(tensormill, options, said):
    done = tensormill("bench-model", *options, "--device", "cpu")
    assert done.code == 2 and said in done.err.splitlines()[-1] and not done.out

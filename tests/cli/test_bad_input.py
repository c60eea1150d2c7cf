"""Bad input ends in one clear line on stderr, exit code 2 (130 for an interrupt), and nothing half-written."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

RTN = ("--method", "rtn", "--group-size", 32)


def refused(done, *words: str, code: int = 2) -> None:
    assert done.code == code, (done.code, done.err)
    assert done.out == ""
    lines = [line for line in done.err.splitlines() if not line.lstrip()[:1].isdigit()]  # less progress lines
    assert len(lines) == 1, done.err
    assert lines[0].startswith("tensormill: ")
    for word in words:
        assert word in lines[0]


@pytest.fixture
def model(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture(autouse=True)
def nothing_left(tmp_path):
    yield
    left = {path.name for path in tmp_path.iterdir()} - {"model", "text.txt", "done", "recipe.yaml"}
    assert not left, f"left behind: {left}"


def test_not_a_model(tensormill, tmp_path, model):
    refused(tensormill("compress", tmp_path / "nowhere", *RTN), "nowhere doesn't exist")
    (model / "config.json").unlink()
    refused(tensormill("compress", model, *RTN, "-o", "out"), "config.json")
    refused(tensormill("compress", "builtin:nothing", *RTN), "builtin")


def test_truncated(tensormill, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(tensormill("compress", model, *RTN, "-o", "out"), "model.safetensors")


def test_damaged(tensormill, model):
    weights = model / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", 1 << 60) + weights.read_bytes()[8:])
    refused(tensormill("evaluate", model), "model.safetensors")


def test_missing_shard(tensormill, model):
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00002-of-00002.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tensormill("compress", model, *RTN, "-o", "out"), "model-00002-of-00002.safetensors")


def test_nan_weight(tensormill, model):
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    refused(tensormill("compress", model, *RTN, "-o", "out"), "model.layers.1.mlp.up_proj.weight")


def test_quantized_already(tensormill, model):
    assert tensormill("compress", model, *RTN, "--no-evaluate", "-o", "done").code == 0
    refused(tensormill("compress", "done", *RTN, "-o", "out"), "quantized")


def test_group_size(tensormill, model):
    refused(tensormill("compress", model, "--method", "rtn", "--group-size", 48, "-o", "out"), "48", "64")
    refused(tensormill("compress", model, "--method", "rtn", "--group-size", 0, "-o", "out"), "0")
    refused(tensormill("compress", model, "--bits", 9, "-o", "out"), "9")


def test_format(tensormill, model, tmp_path):
    refused(tensormill("compress", model, *RTN, "--format", "exl2", "-o", "out"), "'exl2'", "gptq_v2")
    refused(tensormill("compress", model, *RTN, "--format", "awq", "--bits", 8, "-o", "out"), "8 bits", "awq")
    (tmp_path / "recipe.yaml").write_text("- format: exl2\n- method: rtn\n")
    refused(tensormill("compress", model, "--recipe", "recipe.yaml", "-o", "out"), "'exl2'")


def test_budget(tensormill, model, words, tmp_path):
    text = ("--calibration", words, "-o", "out")
    refused(tensormill("compress", model, *RTN, "--budget", "4.25", *text), "'4.25'", "4.25bpw", "9MB")
    refused(tensormill("compress", model, *RTN, "--budget", "1bpw", *text), "1bpw", "3.062bpw to 9.25bpw")
    refused(tensormill("compress", model, *RTN, "--budget", "9GB", *text), "9GB", "MB to 0.")
    refused(tensormill("compress", model, *RTN, "--budget", "5bpw", "--bits", 4, *text), "bits and a budget")
    refused(tensormill("compress", model, *RTN, "--budget", "5bpw", "--widths", "4,x", *text), "--widths")
    refused(tensormill("compress", model, *RTN, "--widths", "4", *text), "without a budget")
    (tmp_path / "recipe.yaml").write_text("- method: rtn\n")
    call = ("compress", model, "--recipe", "recipe.yaml", "--budget", "5bpw", *text)
    refused(tensormill(*call), "recipe and a budget")


def test_empty_calibration_text(tensormill, model, tmp_path):
    (tmp_path / "text.txt").write_text("")
    refused(
        tensormill("compress", model, "--calibration", "text.txt", "--group-size", 32, "-o", "out"),
        "text.txt",
    )
    refused(tensormill("evaluate", model, "--text", "missing.txt"), "missing.txt")


def test_full_disk(tensormill, model, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensormill.compress.checkpoint._save_pretrained", full)
    refused(tensormill("compress", model, *RTN, "--no-evaluate", "-o", "out"), "disk is full")


def test_interrupt(tensormill, model, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("tensormill.compress.checkpoint._save_pretrained", interrupted)
    refused(tensormill("compress", model, *RTN, "--no-evaluate", "-o", "out"), "interrupted", code=130)


def test_an_interrupted_or_failed_comparison_leaves_nothing(tensormill, model, words, monkeypatch):
    call = (
        "compare", model, "--methods", "rtn", "--bits", 4, "--group-size", 32, "--text", words, "--max-tokens", 200,
        "-o", "out",
    )  # fmt: skip

    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tensormill.compress.sweep.measure_speed", interrupted)
        refused(tensormill(*call), "interrupted", code=130)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        refused(tensormill(*call), "No space left")


def test_output_that_exists(tensormill, model, tmp_path):
    assert tensormill("compress", model, *RTN, "--no-evaluate", "-o", "done").code == 0
    before = sorted(path.name for path in (tmp_path / "done").iterdir())
    refused(tensormill("compress", model, *RTN, "--no-evaluate", "-o", "done"), "done", "overwrite")
    assert sorted(path.name for path in (tmp_path / "done").iterdir()) == before
    assert tensormill("compress", model, *RTN, "--no-evaluate", "-o", "done", "--overwrite").code == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("compress", "model", "--method", "magic"), "magic"),
        (("compress", "model", "--set", "colour=red"), "colour"),
        (("compress", "model", "--set", "colour"), "NAME=VALUE"),
        (("compare", "model", "--methods", "awq:rounding"), "NAME=VALUE"),
        (("compare", "model", "--methods", "awq:rounding=up"), "rounding='up'"),
        (("compress", "model", "--device", "tpu"), "tpu"),
        (("compress", "model", "--dtype", "int3"), "int3"),
        (("compress", "model", "--curve", "two"), "two"),
        (("compress", "model", "--curve", "3,9"), "bits=9"),
        (("compress", "model", "--recipe", "nothing.yaml"), "nothing.yaml"),
        (("compare", "model", "--methods", "rtn,magic"), "magic"),
        (("compare", "model", "--methods", "rtn,rtn"), "rtn"),
        (("compare", "model", "--methods", ","), "no method"),
        (("compare", "model", "--bits", "3,9"), "bits=9"),
        (("compare", "model", "--bits", "3,1"), "bits=1"),
        (("compare", "model", "--bits", "four"), "--bits"),
        (("compare", "model", "--bits", ""), "no bit width"),
        (("compare", "model", "--bits", "4,4"), "4"),
        (("compare", "model", "--group-size", 48), "48"),
        (("compare", "model", "--samples", 0), "--samples"),
        (("compare", "model", "--group-size", 32, "--max-tokens", 1), "max_tokens"),
        (("compare", "model", "--group-size", 32, "--text", "missing.txt"), "missing.txt"),
        (("compare", "model", "--group-size", 32, "--calibration", "missing.txt"), "missing.txt"),
        (("compare", "nowhere"), "nowhere"),
        (("bench", "nothing"), "nothing"),
        (("bench", "hadamard_transform", "--shape", "colour=3"), "colour"),
        (("bench", "hadamard_transform", "-i", "fpga"), "fpga"),
        (("compress", "model", "--colour", "red"), "--colour"),
        (("compress", "model", "--bits", "four"), "--bits"),
        (("mill",), "mill"),
        (("reproduce", "nothing"), "nothing"),
        (("reproduce", "awq", "--scale", "huge"), "huge"),
        (("generate", "model", "--device", "cuda:99"), "cuda"),
    ],
)
def test_bad_arguments(tensormill, model, arguments, word):
    if "cuda:99" in arguments and torch.cuda.is_available():
        pytest.skip("asks for a device beyond those here")
    refused(tensormill(*arguments), word)


@pytest.mark.parametrize(
    ("operator", "shape", "word"),
    [
        ("linear_wna8", "x_group_size=0", "sizes that linear_wna8 takes"),
        ("linear_wna8", "tokens=-2", "sizes that linear_wna8 takes"),
        ("clipping_error", "bits=9", "bits=9"),
    ],
)
def test_shapes_that_an_operator_cannot_have(tensormill, operator, shape, word):
    done = tensormill("bench", operator, "--device", "cpu", "--shape", shape)
    *progress, last = done.err.splitlines()
    assert done.code == 2 and done.out == ""
    assert last.startswith("tensormill: ") and word in last
    assert all(line.startswith((operator, "note: ")) for line in progress)


def test_damaged_gguf(tensormill, tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(3))
    for command in ("compress", "evaluate", "generate"):
        refused(tensormill(command, "model.gguf"), "model.gguf is truncated or damaged")
    (tmp_path / "model.gguf").unlink()


def test_contradictory_recipe(tensormill, model, tmp_path):
    (tmp_path / "recipe.yaml").write_text("- method: rtn\n  bits: 8\n- method: awq\n  bits: 4\n")
    refused(tensormill("compress", model, "--recipe", "recipe.yaml", "-o", "out"), "rtn", "awq")

"""From disk to disk: the same result as in memory bit for bit, whatever is killed in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from tensormill.compress import compress, journal
from tensormill.compress.checkpoint import inspect_checkpoint, load
from tensormill.compress.report import CompressionReport
from tensormill.errors import CheckpointError, InvalidArgument, ModelError, OutputError
from tensormill.models.random_llama import random_llama_checkpoint

LAYERS = 3
SIZES = {
    "layers": LAYERS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "heads": 4,
    "kv_heads": 2,
    "vocabulary": 300,
    "max_positions": 64,
}
SETTINGS = {"group_size": 32, "calibration_samples": 5, "calibration_length": 24, "evaluate": False}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text("\n".join(f"line {number}: {number * number % 997} is a number" for number in range(200)))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return random_llama_checkpoint(tmp_path_factory.mktemp("models") / "shards", **SIZES)


@pytest.fixture
def run(text, tmp_path):
    def compress_to(name: str, model: Path, method: str = "awq", **settings) -> CompressionReport:
        settings = {**SETTINGS, "calibration_text": [text], "stream": True, **settings}
        return compress(model, method, output=tmp_path / name, **settings)

    return compress_to


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same(first: Path, second: Path) -> None:
    one, other = tensors(first), tensors(second)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name
    configs = [json.loads((place / "config.json").read_text()) for place in (first, second)]
    assert configs[0] == configs[1]
    names = [{file.name for file in place.iterdir()} for place in (first, second)]
    assert {name for name in names[0] ^ names[1] if not name.startswith("model")} == set()


def losses(report: CompressionReport) -> list[tuple]:
    return [(layer.name, layer.bits, layer.nmse, layer.loss_rtn) for layer in report.layers]


@pytest.mark.parametrize(
    ("method", "format", "dtype", "settings"),
    [
        ("rtn", "compressed-tensors", torch.float16, {"symmetric": True}),
        ("rtn", "awq", torch.bfloat16, {}),
        ("rtn", "gptq", torch.float32, {"bits": 2}),
        ("awq", "compressed-tensors", torch.float32, {"bits": 3, "group_size": -1}),
        ("awq", "awq", torch.float32, {"only": ["*.layers.1.*", "down_proj"]}),
        ("awq", "gptq_v2", torch.bfloat16, {"objective": "module", "objective_samples": 2}),
        ("gptq", "compressed-tensors", torch.bfloat16, {"true_sequential": True}),
        ("gptq", "awq", torch.float16, {"inputs": "original"}),
        ("gptq", "gptq_v2", torch.float32, {"act_order": True}),
    ],
)
def test_same_as_in_memory_bit_for_bit(method, format, dtype, settings, run, tmp_path, monkeypatch):
    monkeypatch.setattr("tensormill.compress.calibration._CHUNK_TOKENS", {"cpu": 2 * 24})
    model = random_llama_checkpoint(tmp_path / "model", **SIZES, dtype=dtype)
    expected = run("memory", model, method, format=format, stream=False, **settings)
    found = run("disk", model, method, format=format, **settings)
    assert_same(tmp_path / "memory", tmp_path / "disk")
    assert losses(found) == losses(expected)
    assert found.bits_per_weight == expected.bits_per_weight
    assert found.recipe == expected.recipe
    assert sorted(os.listdir(tmp_path)) == ["disk", "memory", "model"]


def test_an_output_layer_can_be_compressed_too(run, model, tmp_path):
    for name, stream in (("memory", False), ("disk", True)):
        run(name, model, stream=stream, skip=[])
    assert_same(tmp_path / "memory", tmp_path / "disk")
    assert "lm_head.weight_packed" in tensors(tmp_path / "disk")


@pytest.mark.parametrize("architecture", ["llama", "opt", "qwen2", "gemma2", "phi3"])
def test_other_architectures_with_tied_embeddings_in_one_file(architecture, run, model, tmp_path):
    source = tmp_path / "source"
    tiny_model(architecture, dtype=torch.bfloat16, vocab_size=300).save_pretrained(source)
    for file in model.glob("tokenizer*"):
        shutil.copy(file, source)
    for name, stream in (("memory", False), ("disk", True)):
        run(name, source, stream=stream)
    assert_same(tmp_path / "memory", tmp_path / "disk")
    tokens = torch.arange(20)[None]
    logits = [load(tmp_path / name)(tokens).logits for name in ("memory", "disk")]
    assert torch.equal(*logits)


def test_another_dtype_than_the_files(run, model, tmp_path):
    for name, stream in (("memory", False), ("disk", True)):
        run(name, model, stream=stream, dtype=torch.float32)
    assert_same(tmp_path / "memory", tmp_path / "disk")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["awq", "gptq", "rtn"])
@pytest.mark.parametrize("at", [1, 3, 4, 6])
def test_a_run_that_ends_anywhere_goes_on(method, at, run, model, tmp_path, monkeypatch):
    expected = {layer.name for layer in run("whole", model, method).layers}
    replace, calls = os.replace, []

    def fail(source, target) -> None:
        calls.append(Path(target).name)
        if len(calls) == at:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(journal.os, "replace", fail)
    with pytest.raises(Killed):
        run("again", model, method)
    monkeypatch.setattr(journal.os, "replace", replace)
    assert not (tmp_path / "again").exists()
    report = run("again", model, method)
    assert_same(tmp_path / "whole", tmp_path / "again")
    assert {layer.name for layer in report.layers} == expected
    assert not (tmp_path / "again.unfinished").exists()

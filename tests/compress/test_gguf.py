"""GGUF files are opened dequantized, compressed to ordinary checkpoints, and refused in one line if anything is wrong."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf_models import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import refused

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from tensormill.compress import compress, gguf
from tensormill.compress.checkpoint import load, open_model
from tensormill.compress.footprint import checkpoint_bytes, stored_bytes
from tensormill.errors import CheckpointError, InvalidArgument, OutputError

TOKENS = torch.arange(3, 43).reshape(2, 20)
RTN = {"group_size": 32, "evaluate": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A sound file; tests copy it before they damage it."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def file(whole, tmp_path) -> Path:
    return Path(shutil.copy(whole, tmp_path / "model.gguf"))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_the_header_is_read_without_weights(whole):
    info = gguf.read_header(whole)
    assert info.architecture == "llama" and info.nbytes == whole.stat().st_size
    matrices = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 96 * 64 * 3)
    assert info.weights == {"Q4_1": matrices, "F32": 2 * 128 * 64 + 5 * 64}
    assert info.quantized and info.describe() == "Q4_1 (79 %), F32 (21 %)"
    assert info.metadata["llama.block_count"] == 2 and info.metadata["tokenizer.ggml.tokens"] == 128


def test_a_gguf_file_opens_as_an_ordinary_model(whole):
    from gguf import GGUFReader, dequantize

    model, tokenizer = open_model(whole)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} and not model.training
    stored = {
        tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(whole).tensors
    }
    torch.testing.assert_close(
        model.model.layers[1].mlp.up_proj.weight.detach(), torch.tensor(stored["blk.1.ffn_up.weight"])
    )
    torch.testing.assert_close(model.lm_head.weight.detach(), torch.tensor(stored["output.weight"]))
    assert tokenizer.decode(tokenizer("word3 word14")["input_ids"]) == "word3 word14"
    assert "gguf" not in model.config.to_json_string().lower() and "Tiny" not in model.config.to_json_string()
    assert open_model(str(whole), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_no_bar_of_transformers_is_shown(whole, capfd):
    open_model(whole)
    assert capfd.readouterr().err == ""


def test_an_opened_file_can_be_saved_by_transformers_alone(whole, tmp_path):
    from transformers import AutoModelForCausalLM

    model, _ = open_model(whole)
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", local_files_only=True)
    assert torch.equal(logits(again), logits(model))


def test_the_result_is_a_complete_checkpoint(whole, tmp_path):
    """Plain transformers loads it, in a process without this package, with the same logits."""
    pytest.importorskip("compressed_tensors")
    report = compress(whole, "rtn", output=tmp_path / "small", **RTN)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert "gguf" not in json.dumps(config).lower()
    assert report.bytes_after == checkpoint_bytes(tmp_path / "small")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
options = {"local_files_only": True}
model = AutoModelForCausalLM.from_pretrained("small", dtype=torch.float32, **options)
assert GenerationConfig.from_pretrained("small", **options).eos_token_id == 1
assert AutoTokenizer.from_pretrained("small", **options)("word3 x")["input_ids"] == [100, 20, 96, 89]
torch.save(model(torch.arange(3, 43).reshape(2, 20)).logits.detach(), "logits.pt")
assert "tensormill" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = logits(load(tmp_path / "small")), torch.load(tmp_path / "logits.pt")
    assert (theirs - ours).norm() / ours.norm() < 1e-5
    tokenizer = open_model(whole)[1]
    assert tokenizer("word3 x")["input_ids"] == [100, 20, 96, 89]


def test_the_report_says_what_the_original_was(whole, tmp_path):
    report = compress(whole, "rtn", output=tmp_path / "small", **RTN)
    model, _ = open_model(whole)
    assert report.bytes_before == stored_bytes(model) == sum(4 * p.numel() for p in model.parameters())
    assert report.source == {
        "format": "gguf",
        "file_bytes": whole.stat().st_size,
        "quantized": True,
        "types": "Q4_1 (79 %), F32 (21 %)",
        "weights_by_type": dict(gguf.read_header(whole).weights),
        "dtype": "float32",
    }
    written = json.loads((tmp_path / "small" / "report.json").read_text())
    assert written["source"] == report.source
    page = (tmp_path / "small" / "report.html").read_text()
    for words in ("GGUF file of", "quantized already", "Q4_1 (79 %)", "dequantized to float32"):
        assert words in page
    # Embeddings and head in float32 outweigh what rounding saves: said, not hidden.
    assert any("Not smaller than the GGUF file itself" in f.text for f in report.findings()) == (
        report.bytes_after >= whole.stat().st_size
    )


def test_floats_in_a_gguf_file_are_not_called_quantized(tmp_path):
    info = gguf.read_header(write_gguf(tmp_path / "half.gguf", kind="F16"))
    assert not info.quantized and set(info.weights) == {"F16", "F32"}
    report = compress(tmp_path / "half.gguf", "rtn", output=tmp_path / "small", **RTN)
    assert not any("quantized already" in finding.text for finding in report.findings())


def test_the_output_is_named_after_the_file(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compress("model.gguf", "rtn", **RTN).output == "model-rtn-w4-g32"
    assert (tmp_path / "model-rtn-w4-g32" / "config.json").is_file()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError):
        compress("model.gguf", "rtn", output=tmp_path, overwrite=True, **RTN)
    assert file.is_file()


def test_a_file_without_vocabulary_has_no_tokenizer(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", vocabulary=False)
    assert open_model(file)[1] is None
    assert "vocabulary" in refused(
        lambda: compress(file, "rtn", output=tmp_path / "o", **RTN), InvalidArgument
    )


def test_a_missing_package_names_the_extra(file, monkeypatch):
    find = gguf.importlib.util.find_spec
    for missing in ("gguf", "accelerate"):
        monkeypatch.setattr(
            gguf.importlib.util,
            "find_spec",
            lambda name, *rest, missing=missing: None if name == missing else find(name, *rest),
        )
        text = refused(lambda: open_model(file))
        assert f"needs the package {missing}" in text and "tensormill[gguf]" in text


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 100, 3000, -1])
def test_a_truncated_file_is_refused(file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    text = refused(lambda: open_model(file))
    assert "truncated" in text or "not a GGUF file" in text


def test_what_is_not_gguf_is_refused(file, tmp_path):
    file.write_bytes(b"PK\x03\x04" + bytes(1000))
    assert "not a GGUF file" in refused(lambda: open_model(file))
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(lambda: open_model(file))
    assert "give model.gguf itself" in refused(lambda: open_model(tmp_path))
    assert "doesn't exist" in refused(lambda: open_model(tmp_path / "nowhere.gguf"))
    assert "is a file" in refused(lambda: load(file))


@pytest.mark.parametrize(("version", "word"), [(1, "version 1"), (99, "version 99"), (3 << 24, "big-endian")])
def test_other_versions_are_refused(file, version, word):
    raw = bytearray(file.read_bytes())
    raw[4:8] = struct.pack("<I", version)
    file.write_bytes(raw)
    assert word in refused(lambda: open_model(file))


def test_counts_beyond_the_file_are_not_believed(file):
    for place in (8, 16):
        raw = bytearray(file.read_bytes())
        raw[place : place + 8] = struct.pack("<Q", 1 << 60)
        file.write_bytes(raw)
        refused(lambda: open_model(file))


def test_a_number_of_blocks_that_the_tensors_contradict_is_refused(tmp_path):
    """Before transformers builds them all."""
    file = write_gguf(tmp_path / "model.gguf", blocks=1 << 30)
    assert "tensors of 2 blocks" in refused(lambda: open_model(file))


def test_parts_are_refused(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", more=lambda writer: writer.add_uint16("split.count", 3))
    text = refused(lambda: open_model(file))
    assert "3 parts" in text and "--merge" in text


@pytest.mark.parametrize("architecture", ["clip", "nothing", "t5"])
def test_an_architecture_that_transformers_does_not_read_is_named(tmp_path, architecture):
    file = write_gguf(tmp_path / "model.gguf", architecture=architecture)
    assert architecture in refused(lambda: open_model(file))


def test_a_missing_tensor_is_named(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", leave_out="blk.1.ffn_up.weight")
    assert "model.layers.1.mlp.up_proj.weight" in refused(lambda: open_model(file))


@pytest.mark.parametrize("kind", ["Q8_0", "F32"])
def test_nan_is_named(tmp_path, kind):
    file = write_gguf(tmp_path / "model.gguf", kind=kind, spoil="output_norm.weight")
    assert "model.norm.weight" in refused(lambda: open_model(file))
    assert open_model(file, check_finite=False)[0] is not None


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damaged_byte_of_the_header_makes_another_error(whole, tmp_path_factory, data):
    """Read as before or refused, never another exception."""
    raw = bytearray(whole.read_bytes())
    raw[data.draw(st.integers(0, 6000))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    file.write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        gguf.read_header(file)


def test_nothing_is_written_for_a_damaged_file(file, tmp_path):
    file.write_bytes(file.read_bytes()[:-40])
    refused(lambda: compress(file, "rtn", output=tmp_path / "small", **RTN))
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf"}

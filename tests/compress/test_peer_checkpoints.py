"""What AutoAWQ and AutoGPTQ write loads in ours with the peer's logits, and is written again as it was."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tensormill.compress.checkpoint import load, save_compressed
from tensormill.ops.linear_wna16.module import LinearWNA16

FROZEN = Path(__file__).parent / "peer_checkpoints"
CASES = sorted(folder.name for folder in FROZEN.iterdir() if folder.is_dir())
# The peer's float16 numbers are computed with in float32 by both: sums of at most 96 products in another
# order, through two layers.
TOLERANCE = 1e-5
# Float16 all through: activations rounded by 2^-11 at each step, on weights that make the layers steep.
HALF_TOLERANCE = 5e-3


def relative_error(folder: Path, dtype: torch.dtype = torch.float32) -> float:
    """Of our logits, relative to the size of what `expected.safetensors` says."""
    model = load(folder, dtype=dtype)
    layers = [module for module in model.modules() if isinstance(module, LinearWNA16)]
    assert len(layers) == 7 * model.config.num_hidden_layers
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    assert logits.dtype == dtype
    return float((logits.float() - expected["logits"]).norm() / expected["logits"].norm())


def check_round_trip(folder: Path, output: Path) -> None:
    """Loaded and saved in its own format, a checkpoint has the peer's tensors bit for bit."""
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    save_compressed(load(folder), None, folder, output, format=found["quant_method"])
    theirs, ours = (load_file(path / "model.safetensors") for path in (folder, output))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key
    written = json.loads((output / "config.json").read_text())["quantization_config"]
    same = {"quant_method", "bits", "group_size", "zero_point", "version", "sym", "desc_act"} & found.keys()
    assert {key: written[key] for key in same} == {key: found[key] for key in same}


def test_both_peers_are_there():
    methods = [json.loads((FROZEN / name / "config.json").read_text()) for name in CASES]
    found = [config["quantization_config"]["quant_method"] for config in methods]
    assert found.count("awq") == 2 and found.count("gptq") == 4


@pytest.mark.parametrize("name", CASES)
def test_frozen_checkpoints_give_the_peers_logits(name):
    assert relative_error(FROZEN / name) < TOLERANCE
    assert relative_error(FROZEN / name, torch.float16) < HALF_TOLERANCE


@pytest.mark.parametrize("part", ["scales", "qzeros", "qweight"])
@pytest.mark.parametrize("name", CASES)
def test_a_changed_tensor_would_be_seen(name, part, tmp_path):
    """The comparison can fail: one scale 5 % larger, or one bit of a word of zero points or of codes."""
    folder = tmp_path / name
    shutil.copytree(FROZEN / name, folder)
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in sorted(tensors) if key.endswith(f"v_proj.{part}"))
    if part == "scales":
        tensors[key][0, 0] *= 1.05
    else:
        tensors[key][0, 0] ^= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert relative_error(folder) > 3 * TOLERANCE


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("gptq")])
def test_zero_points_one_off_would_be_seen(name, tmp_path):
    """The same tensors read as version 2, which doesn't add 1."""
    folder = tmp_path / name
    shutil.copytree(FROZEN / name, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").write_text(json.dumps(config))
    assert relative_error(folder) > 100 * TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_written_again_they_are_the_same(name, tmp_path):
    check_round_trip(FROZEN / name, tmp_path / "again")


@pytest.mark.slow
def test_new_checkpoints_give_the_peers_logits(tmp_path):
    """From other random weights, in a process of their own: the peers need a changed transformers."""
    if any(importlib.util.find_spec(peer) is None for peer in ("awq", "auto_gptq")):
        pytest.skip("AutoAWQ and AutoGPTQ are not both installed")
    script = Path(__file__).with_name("write_peer_checkpoints.py")
    subprocess.run([sys.executable, script, tmp_path, str(torch.seed() % 1000)], check=True)
    for name in CASES:
        assert relative_error(tmp_path / name) < TOLERANCE
        check_round_trip(tmp_path / name, tmp_path / f"{name}-again")

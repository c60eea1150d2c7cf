"""What llm-compressor writes loads in ours, with the logits of the peer's own dequantized weights."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from write_llmcompressor_checkpoints import CASES, write

from tensormill.compress.checkpoint import load
from tensormill.ops.linear_wna16.module import LinearWNA16

FROZEN = Path(__file__).parent / "llmcompressor_checkpoints"
# float32 sums of at most 48 products in another order, through two layers.
TOLERANCE = 1e-5

needs_llmcompressor = pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None, reason="llm-compressor is not installed"
)


def relative_error(folder: Path) -> float:
    """Of our logits, relative to the size of what `expected.safetensors` says."""
    model = load(folder)
    assert (
        sum(isinstance(module, LinearWNA16) for module in model.modules())
        == 7 * model.config.num_hidden_layers
    )
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    return float((logits - expected["logits"]).norm() / expected["logits"].norm())


@pytest.mark.parametrize("name", CASES)
def test_frozen_checkpoints_give_the_peers_logits(name):
    assert relative_error(FROZEN / name) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_a_changed_scale_would_be_seen(name, tmp_path):
    """The comparison can fail: one scale of one layer, 5 % larger."""
    folder = tmp_path / name
    shutil.copytree(FROZEN / name, folder)
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in sorted(tensors) if key.endswith("v_proj.weight_scale"))
    tensors[key][0, 0] *= 1.05
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert relative_error(folder) > 3 * TOLERANCE


@needs_llmcompressor
@pytest.mark.parametrize("name", CASES)
def test_new_checkpoints_give_the_peers_logits(name, tmp_path):
    sizes = {"vocab_size": 67, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    write(tmp_path / name, seed=torch.seed() % 1000, group_size=32, **sizes, **CASES[name])
    assert relative_error(tmp_path / name) < TOLERANCE

"""What AutoAWQ, AutoGPTQ and GPTQModel write loads in ours with the peer's logits, and is written again as it was."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import compress_linears, tiny_model
from read_with_gptqmodel import TOKENS
from safetensors.torch import load_file, save_file
from write_gptqmodel_checkpoints import save_tokenizer

from tensormill.compress.checkpoint import load, save_compressed
from tensormill.compress.formats.activation_order import ActivationOrderLinear
from tensormill.compress.formats.registry import format_of
from tensormill.ops.linear_wna16.module import LinearWNA16

FROZEN = Path(__file__).parent / "peer_checkpoints"
CASES = sorted(folder.name for folder in FROZEN.iterdir() if folder.is_dir())
OF_GPTQ = [name for name in CASES if name.startswith("gptq")]
# The peer's float16 numbers are computed with in float32 by both: sums of at most 96 products in another
# order, through two layers.
TOLERANCE = 1e-5
# Float16 all through: activations rounded by 2^-11 at each step, on weights that make the layers steep.
HALF_TOLERANCE = 5e-3


def relative_error(folder: Path, dtype: torch.dtype = torch.float32) -> float:
    """Of our logits, relative to the size of what `expected.safetensors` says."""
    model = load(folder, dtype=dtype)
    layers = [module for module in model.modules() if isinstance(module, LinearWNA16)]
    packed = [key for key in load_file(weights_of(folder)) if key.endswith(".qweight")]
    assert len(layers) == len(packed) > 0
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    assert logits.dtype == dtype
    return float((logits.float() - expected["logits"]).norm() / expected["logits"].norm())


def weights_of(folder: Path) -> Path:
    """Its one weight file, which AutoGPTQ may have given a name of its own."""
    return next(file for file in folder.glob("*.safetensors") if file.name != "expected.safetensors")


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def change_settings(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def check_round_trip(folder: Path, output: Path) -> None:
    """Loaded and saved in its own format, a checkpoint has the peer's tensors bit for bit."""
    found = settings_of(folder)
    layout = format_of(found)
    save_compressed(load(folder), None, folder, output, format=layout.name)
    theirs, ours = (load_file(weights_of(path)) for path in (folder, output))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key
    written = settings_of(output)
    same = {"quant_method", "checkpoint_format", "zero_point", "version", "desc_act"} & found.keys()
    assert {key: written[key] for key in same} == {key: found[key] for key in same}
    parsed = [layout.parse_config(config) for config in (found, written)]
    for name in {key.removesuffix(".qweight") for key in theirs if key.endswith(".qweight")}:
        scheme, again = (layout.scheme_of(name, one) for one in parsed)
        assert (again.bits, again.group_size) == (scheme.bits, scheme.group_size), name


def test_all_peers_are_there():
    found = [format_of(settings_of(FROZEN / name)).name for name in CASES]
    assert found.count("awq") == 2 and found.count("gptq") == 6 and found.count("gptq_v2") == 5
    assert sum("gptqmodel" in str(settings_of(FROZEN / name).get("meta")) for name in CASES) == 6


def test_orders_and_rules_are_really_there():
    """What the cases are named for: they would load as well if the peers had ignored it."""
    for name, ordered in (("gptq-order", 7), ("gptqmodel-order", 7), ("gptqmodel-dynamic", 9)):
        layers = [type(module) for module in load(FROZEN / name).modules()]
        assert layers.count(ActivationOrderLinear) == ordered, name
    model = load(FROZEN / "gptqmodel-dynamic")
    found = {
        (name.rpartition(".")[2], module.bits, module.group_size)
        for name, module in model.named_modules()
        if isinstance(module, LinearWNA16)
    }
    assert found == {
        *((name, 4, 32) for name in ("q_proj", "v_proj", "gate_proj", "up_proj")),
        ("o_proj", 2, -1),
        ("down_proj", 8, 16),
        ("down_proj", 3, 32),
    }
    assert type(model.model.layers[0].self_attn.k_proj) is torch.nn.Linear


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
    tensors = load_file(weights_of(folder))
    key = next(key for key in sorted(tensors) if key.endswith((f"v_proj.{part}", f"c_attn.{part}")))
    if part == "scales":
        tensors[key][0, 0] *= 1.05
    else:
        tensors[key][0, 0] ^= 2
    save_file(tensors, weights_of(folder), metadata={"format": "pt"})
    assert relative_error(folder) > 3 * TOLERANCE


@pytest.mark.filterwarnings("ignore:.*zero points of:UserWarning")
@pytest.mark.parametrize("name", OF_GPTQ)
def test_zero_points_one_off_would_be_seen(name, tmp_path):
    """The same tensors read as the other version: the first adds 1, the second doesn't."""
    folder = tmp_path / name
    shutil.copytree(FROZEN / name, folder)
    version = format_of(settings_of(folder)).name
    other = "gptq" if version == "gptq_v2" else "gptq_v2"
    change_settings(folder, checkpoint_format=other, format=other)
    assert relative_error(folder) > 100 * TOLERANCE


@pytest.mark.parametrize("name", [name for name in OF_GPTQ if "order" in name])
def test_another_order_would_be_seen(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(FROZEN / name, folder)
    tensors = load_file(weights_of(folder))
    for key, tensor in tensors.items():
        if key.endswith("up_proj.g_idx"):
            tensors[key] = tensor.flip(0)
    save_file(tensors, weights_of(folder), metadata={"format": "pt"})
    assert relative_error(folder) > 100 * TOLERANCE


@pytest.mark.parametrize("name", OF_GPTQ)
def test_gptq_is_written_as_compressed_tensors_too(name, tmp_path):
    """Orders and widths of single layers included; only the unused zero points of a symmetric layer go."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layers in activation order|.*are Conv1D")
        save_compressed(load(FROZEN / name), None, FROZEN / name, tmp_path / "packed")
    expected = load_file(FROZEN / name / "expected.safetensors")
    with torch.no_grad():
        logits = load(tmp_path / "packed", dtype=torch.float32)(expected["tokens"]).logits
    assert float((logits - expected["logits"]).norm() / expected["logits"].norm()) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_written_again_they_are_the_same(name, tmp_path):
    check_round_trip(FROZEN / name, tmp_path / "again")


@pytest.mark.slow
def test_new_checkpoints_give_the_peers_logits(tmp_path):
    """From other random weights, in a process of their own: the peers need a changed transformers."""
    if any(importlib.util.find_spec(peer) is None for peer in ("awq", "auto_gptq")):
        pytest.skip("AutoAWQ and AutoGPTQ are not both installed")
    check_new("write_peer_checkpoints.py", tmp_path)


@pytest.mark.slow
def test_new_checkpoints_of_gptqmodel_give_its_logits(tmp_path):
    if importlib.util.find_spec("gptqmodel") is None:
        pytest.skip("GPTQModel is not installed")
    check_new("write_gptqmodel_checkpoints.py", tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*zero points of:UserWarning")
def test_gptqmodel_reads_ours(tmp_path):
    """Its whole loader, on both versions, layers of several widths and group sizes, an order, and a GPT-2."""
    if importlib.util.find_spec("gptqmodel") is None:
        pytest.skip("GPTQModel is not installed")
    mixed = compress_linears(tiny_model("llama", dtype=torch.float16), 4, 32, False, only="self_attn")
    for part in ("gate_proj", "up_proj"):  # together, as its loader may fuse them
        compress_linears(mixed, 8, 16, False, only=part)
    compress_linears(mixed, 3, -1, True, only="1.mlp.down_proj")
    plain = compress_linears(tiny_model("llama", dtype=torch.float16), 4, 32, True)
    made = {"plain-gptq": plain, "plain-gptq_v2": plain, "mixed-gptq_v2": mixed}
    for name in ("gptq-order", "gptqmodel-dynamic", "gptqmodel-gpt2"):
        made[f"{name}-gptq_v2"] = load(FROZEN / name)
    for name, model in made.items():
        folder = save_compressed(model, None, None, tmp_path / name, format=name.rpartition("-")[2])
        save_tokenizer(folder, model.config.vocab_size)
    script, found = Path(__file__).with_name("read_with_gptqmodel.py"), tmp_path / "logits.safetensors"
    subprocess.run([sys.executable, script, found, *(tmp_path / name for name in made)], check=True)
    for name, logits in load_file(found).items():
        with torch.no_grad():
            expected = load(tmp_path / name, dtype=torch.float32)(TOKENS).logits
        assert float((logits - expected).norm() / expected.norm()) < TOLERANCE, name


def check_new(script: str, tmp_path: Path) -> None:
    path = Path(__file__).with_name(script)
    subprocess.run([sys.executable, path, tmp_path, str(torch.seed() % 1000)], check=True)
    for name in sorted(folder.name for folder in tmp_path.iterdir()):
        assert relative_error(tmp_path / name) < TOLERANCE
        check_round_trip(tmp_path / name, tmp_path / f"{name}-again")

"""After `import tensormill`, transformers itself loads packed checkpoints with low-bit linears."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packed_models import ARCHITECTURES, TOKENS, compress_linears, logits, relative_error, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

from tensormill.compress import transformers_hook
from tensormill.compress.checkpoint import load, save_compressed
from tensormill.compress.formats.compressed_tensors import compressed_linears, quantization_config

SOURCE = Path(transformers_hook.__file__).parents[2]
METHOD = "compressed-tensors"


@pytest.fixture(autouse=True)
def hook():
    """Installed before each test and, for the rest of the session, after it."""
    transformers_hook.install()
    yield
    transformers_hook.install()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = compress_linears(tiny_model("qwen2"), 3, 32, False)
    return save_compressed(model, None, None, tmp_path_factory.mktemp("packed") / "w3"), logits(model)


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_import_is_light():
    out = run("import sys, tensormill; print([m for m in ('torch', 'transformers') if m in sys.modules])")
    assert out.strip() == "[]"


@pytest.mark.parametrize("order", ["tensormill, transformers", "transformers.quantizers.auto, tensormill"])
def test_either_import_order_and_no_compressed_tensors(saved, tmp_path, order):
    """The package compressed-tensors is hidden: the hook must not need it."""
    script = (
        "import sys; sys.modules['compressed_tensors'] = None\n"
        f"import {order}\n"
        "import torch\n"
        "from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print({type(m).__name__ for n, m in model.named_modules() if n.endswith('_proj')})\n"
        f"logits = model(torch.tensor({TOKENS.tolist()})).logits.detach().contiguous()\n"
        "save_file({'logits': logits}, sys.argv[2])\n"
    )
    out = run(script, str(saved[0]), str(tmp_path / "logits"))
    assert out.strip().splitlines()[-1] == "{'LinearWNA16'}"
    assert relative_error(load_file(tmp_path / "logits")["logits"], saved[1]) < 1e-6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_from_pretrained_gives_low_bit_linears(tmp_path, architecture):
    model = compress_linears(tiny_model(architecture, tied=True), 4, 32, True)
    folder = save_compressed(model, None, None, tmp_path / "w4")
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(compressed_linears(loaded)) == set(compressed_linears(model))
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert relative_error(logits(loaded), logits(model)) < 1e-6
    class_name = type(model).__name__
    direct = getattr(transformers, class_name).from_pretrained(folder)
    assert relative_error(logits(direct), logits(model)) < 1e-6


def test_device_map_is_accepted(saved):
    pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(saved[0], device_map="cpu")
    assert relative_error(logits(model), saved[1]) < 1e-6


def test_scales_keep_their_dtype(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0], dtype=torch.bfloat16)
    linear = next(iter(compressed_linears(model).values()))
    assert linear.weight_scale.dtype == torch.float32 and linear.bias.dtype == torch.bfloat16


def test_save_pretrained_writes_the_packed_form_again(saved, tmp_path):
    AutoModelForCausalLM.from_pretrained(saved[0]).save_pretrained(tmp_path / "again")
    first, second = (
        load_file(saved[0] / "model.safetensors"),
        load_file(tmp_path / "again" / "model.safetensors"),
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((saved[0] / "config.json").read_text())["quantization_config"]
    assert relative_error(logits(load(tmp_path / "again")), saved[1]) < 1e-6


def test_dequantize_gives_plain_linears(saved):
    model = AutoModelForCausalLM.from_pretrained(saved[0])
    dense = model.dequantize()
    assert not compressed_linears(dense) and type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert relative_error(logits(dense), saved[1]) < 1e-5


def test_a_caller_s_dequantize_is_obeyed(saved):
    pytest.importorskip("compressed_tensors")
    known = inspect.signature(transformers.CompressedTensorsConfig).parameters
    option = {"dequantize": True} if "dequantize" in known else {"run_compressed": False}
    config = transformers.CompressedTensorsConfig(**option)
    with pytest.warns(UserWarning, match="quantization_config"):
        model = AutoModelForCausalLM.from_pretrained(saved[0], quantization_config=config)
    assert not compressed_linears(model)
    assert relative_error(logits(model), saved[1]) < 1e-5


def test_what_we_cannot_run_is_left_to_transformers():
    pytest.importorskip("compressed_tensors")
    config = quantization_config(compress_linears(tiny_model("llama"), 4, 32, True))
    ours = auto.AutoQuantizationConfig.from_dict(config)
    assert type(ours).__module__.startswith("tensormill")
    original = transformers.CompressedTensorsConfig
    for change in ({"format": "int-quantized"}, {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}):
        assert type(auto.AutoQuantizationConfig.from_dict({**config, **change})) is original
    theirs = auto.AutoHfQuantizer.from_config(original.from_dict({**config, "format": "int-quantized"}))
    assert type(theirs).__name__ == "CompressedTensorsHfQuantizer"


def test_install_and_uninstall_are_idempotent():
    transformers_hook.uninstall()
    originals = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], auto.AUTO_QUANTIZER_MAPPING[METHOD]
    assert originals[0] is transformers.CompressedTensorsConfig
    transformers_hook.install()
    entry = auto.AUTO_QUANTIZER_MAPPING[METHOD]
    transformers_hook.install()
    assert auto.AUTO_QUANTIZER_MAPPING[METHOD] is entry is not originals[1]
    transformers_hook.uninstall()
    transformers_hook.uninstall()
    assert (auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], auto.AUTO_QUANTIZER_MAPPING[METHOD]) == originals
    assert not any(type(finder).__module__ == transformers_hook.__name__ for finder in sys.meta_path)

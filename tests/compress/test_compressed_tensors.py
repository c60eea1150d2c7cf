"""The on-disk format is that of the compressed-tensors package; plain transformers computes our logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import ARCHITECTURES, TOKENS, compress_linears, logits, relative_error, tiny_model
from safetensors.torch import load_file, save_file

from tensormill.compress.checkpoint import load, save_compressed
from tensormill.compress.formats import compressed_tensors as packed_format
from tensormill.compress.formats.compressed_tensors import PackedScheme
from tensormill.compress.formats.quantization import QuantSpec, quantize_weight
from tensormill.errors import CheckpointError, ModelError
from tensormill.ops.bit_packing import pack_bits_padded, unpack_bits

# float32 sums of at most 96 products in another order, through two layers.
TOLERANCE = 1e-5

CASES = {
    f"{architecture}-{'tied' if tied else 'untied'}-w{bits}-{'sym' if symmetric else 'asym'}": {
        "architecture": architecture,
        "tied": tied,
        "bits": bits,
        "group_size": 32,
        "symmetric": symmetric,
    }
    for architecture in ARCHITECTURES
    for tied in (False, True)
    for bits, symmetric in [(4, tied), (8, not tied)]
}
CASES |= {
    f"llama-w{bits}-{'sym' if symmetric else 'asym'}-{'channel' if group == -1 else f'g{group}'}": {
        "architecture": "llama",
        "tied": False,
        "bits": bits,
        "group_size": group,
        "symmetric": symmetric,
    }
    for bits in range(2, 9)
    for symmetric, group in [(False, 32), (True, 32), (False, -1)]
}
# 100 columns: rows of packed words that end in the middle of a word.
CASES["llama-w3-ragged"] = {
    "architecture": "llama",
    "tied": False,
    "bits": 3,
    "group_size": -1,
    "symmetric": False,
    "mlp": 100,
}
CASES["qwen2-head"] = {
    "architecture": "qwen2",
    "tied": False,
    "bits": 4,
    "group_size": 32,
    "symmetric": False,
    "head": True,
}

PLAIN = """
import json, sys, warnings
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
assert "tensormill" not in sys.modules
folders, tokens, out = json.loads(sys.stdin.read())
found = {}
for name, folder in folders.items():
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not any(type(module).__module__.startswith("tensormill") for module in model.modules())
    with torch.no_grad():
        found[name] = model(torch.tensor(tokens)).logits.float().contiguous()
save_file(found, out)
"""


def build(architecture, tied, bits, group_size, symmetric, mlp=96, head=False):
    return compress_linears(
        tiny_model(architecture, tied=tied, mlp=mlp), bits, group_size, symmetric, head=head
    )


def build_mixed(symmetric=True):
    """4 bits in attention; 8 bits, with zero points if asked for, in the MLP."""
    model = compress_linears(tiny_model("llama"), 4, 32, True, only="self_attn")
    return compress_linears(model, 8, 32, symmetric, only="mlp")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of every case's checkpoint and the logits of the model that was saved."""
    root = tmp_path_factory.mktemp("packed")
    models = {name: build(**case) for name, case in CASES.items()} | {"mixed": build_mixed()}
    expected = {name: logits(model) for name, model in models.items()}
    folders = {name: save_compressed(model, None, None, root / name) for name, model in models.items()}
    return folders, expected


@pytest.fixture(scope="module")
def plain_logits(saved, tmp_path_factory):
    """Logits of plain transformers with compressed-tensors, in a process that never sees tensormill."""
    pytest.importorskip("compressed_tensors")
    out = tmp_path_factory.mktemp("plain") / "logits.safetensors"
    request = json.dumps(
        [{name: str(folder) for name, folder in saved[0].items()}, TOKENS.tolist(), str(out)]
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN], input=request, text=True, capture_output=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


@pytest.mark.parametrize("name", [*CASES, "mixed"])
def test_plain_transformers_computes_the_same_logits(name, saved, plain_logits):
    assert relative_error(plain_logits[name], saved[1][name]) < TOLERANCE


@pytest.mark.parametrize("name", [*CASES, "mixed"])
def test_load_computes_the_same_logits(name, saved):
    model = load(saved[0][name])
    compressed = packed_format.compressed_linears(model)
    assert compressed
    assert [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)] == (
        [] if "head" in name else ["lm_head"]
    )
    assert relative_error(logits(model), saved[1][name]) < TOLERANCE


def test_several_schemes_with_zero_points_load_here(tmp_path):
    """Plain transformers can't load this one; see `quantization_config`."""
    model = build_mixed(symmetric=False)
    folder = save_compressed(model, None, None, tmp_path / "mixed")
    assert relative_error(logits(load(folder)), logits(model)) < TOLERANCE


def test_tolerance_notices_a_zero_point_off_by_one(saved, tmp_path):
    """Planted error: the zero points of one layer of eight-bit codes, moved by one."""
    name = "qwen2-tied-w8-asym"
    tensors = load_file(saved[0][name] / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight_zero_point"
    tensors[key] = tensors[key] ^ 0x01010101
    (tmp_path / "config.json").write_text((saved[0][name] / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert relative_error(logits(load(tmp_path)), saved[1][name]) > 20 * TOLERANCE


def test_tied_embeddings_are_stored_once(saved):
    tensors = load_file(saved[0]["llama-tied-w4-sym"] / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors and "lm_head.weight" not in tensors
    model = load(saved[0]["llama-tied-w4-sym"])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tensor_names_and_shapes_on_disk(saved):
    tensors = load_file(saved[0]["qwen2-untied-w4-asym"] / "model.safetensors")
    layer = {key.rpartition(".")[2]: tensors[key] for key in tensors if "layers.1.self_attn.k_proj" in key}
    assert {key: (tuple(value.shape), value.dtype) for key, value in layer.items()} == {
        "weight_packed": ((32, 8), torch.int32),
        "weight_scale": ((32, 2), torch.float32),
        "weight_zero_point": ((4, 2), torch.int32),
        "weight_shape": ((2,), torch.int64),
        "bias": ((32,), torch.float32),
    }
    assert layer["weight_shape"].tolist() == [32, 64]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_layer_agrees_with_the_package(bits, symmetric):
    """Our tensors, decompressed by compressed-tensors, are our dequantized weights."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationScheme

    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(bits))
    found = quantize_weight(weight, QuantSpec(bits, 32, symmetric))
    config = PackedScheme(bits, 32, symmetric).to_config(["Linear"])
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = compressor.decompress(packed_format.pack_quantized(found), QuantizationScheme(**config))
    torch.testing.assert_close(theirs["weight"], found.dequantize(), rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 70),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([-1, 16, 32]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_packing_a_layer_is_a_bijection(bits, rows, groups, group_size, symmetric, seed):
    columns = 37 if group_size == -1 else groups * group_size
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    spec = QuantSpec(bits, group_size, symmetric, scale_dtype=torch.float32)
    found = quantize_weight(weight, spec)
    again = packed_format.unpack_quantized(
        packed_format.pack_quantized(found), PackedScheme(bits, group_size, symmetric)
    )
    assert torch.equal(again.codes, found.codes) and torch.equal(again.scale, found.scale)
    assert again.spec == found.spec
    if symmetric:
        assert again.zero_point is None
    else:
        assert torch.equal(again.zero_point, found.zero_point)


@pytest.mark.parametrize("symmetric", [False, True])
def test_padded_packing_of_older_releases_is_read(symmetric, tmp_path):
    model = compress_linears(tiny_model("llama"), 6, 32, symmetric)
    folder = save_compressed(model, None, None, tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    for key in list(tensors):
        name = key.removesuffix(".weight_packed")
        if name == key:
            continue
        rows, columns = tensors[f"{name}.weight_shape"].tolist()
        tensors[key] = pack_bits_padded(unpack_bits(tensors[key], 6, columns), 6)
        if not symmetric:
            zero = f"{name}.weight_zero_point"
            unpacked = unpack_bits(tensors[zero].T.contiguous(), 6, rows)
            tensors[zero] = pack_bits_padded(unpacked, 6).T.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert relative_error(logits(load(folder)), logits(model)) < TOLERANCE


def test_configuration_of_one_and_of_several_schemes():
    one = packed_format.quantization_config(compress_linears(tiny_model("llama"), 4, 32, False))
    assert one["ignore"] == ["lm_head"]
    assert one["config_groups"]["group_0"]["targets"] == ["Linear"]
    several = packed_format.quantization_config(build_mixed())
    targets = [set(group["targets"]) for group in several["config_groups"].values()]
    assert len(targets) == 2 and all(
        "model.layers.0" in name or "layers.1" in name for t in targets for name in t
    )
    channel = packed_format.quantization_config(compress_linears(tiny_model("llama"), 8, -1, True))
    weights = channel["config_groups"]["group_0"]["weights"]
    assert weights["strategy"] == "channel" and weights["group_size"] is None
    parsed = packed_format.parse_config(channel)
    assert parsed.schemes == (PackedScheme(8, -1, True),)


def test_a_group_that_is_a_whole_row_is_of_the_same_scheme(tmp_path):
    # vLLM wants one scheme for the projections of an expert, of which some rows may be exactly a group long.
    model = compress_linears(tiny_model("llama", mlp=128), 4, 64, False)
    (group,) = packed_format.quantization_config(model)["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["weights"]["group_size"] == 64
    folder = save_compressed(model, None, None, tmp_path / "model")
    assert torch.equal(logits(load(folder)), logits(model))


def test_names_beat_patterns_beat_classes():
    schemes = [PackedScheme(bits, -1, True) for bits in (2, 4, 8)]
    config = packed_format.PackedConfig(
        tuple(zip([("Linear",), (r"re:.*mlp\..*",), ("a.mlp.up",)], schemes, strict=True)),
        ("re:.*skip", "head"),
    )
    linear = torch.nn.Linear(2, 2)
    assert config.scheme_of("a.q", linear).bits == 2
    assert config.scheme_of("a.mlp.down", linear).bits == 4
    assert config.scheme_of("a.mlp.up", linear).bits == 8
    assert config.scheme_of("a.mlp.skip", linear) is None
    assert config.scheme_of("head", linear) is None
    assert config.scheme_of("a.q", torch.nn.Conv1d(1, 1, 1)) is None


def test_what_the_format_cannot_hold_is_refused():
    from tensormill.ops.linear_wna16.module import LinearWNA16

    shorter = quantize_weight(torch.randn(4, 40), QuantSpec(4, 32, tail="smaller"))
    linear = LinearWNA16.from_codes(
        shorter.codes, shorter.scale, shorter.zero_point, bits=4, group_size=32, bias=None
    )
    with pytest.raises(ModelError, match="layer has 40 input features in groups of 32"):
        packed_format.scheme_of_linear("layer", linear)
    with pytest.raises(ModelError, match="no compressed linear"):
        packed_format.quantization_config(tiny_model("llama"))


GROUP = PackedScheme(4, 32, True).to_config(["Linear"])
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": GROUP},
}


def changed(**weights):
    return {**CONFIG, "config_groups": {"group_0": {**GROUP, "weights": {**GROUP["weights"], **weights}}}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq"}, "quantized with 'awq'"),
        ({**CONFIG, "format": "int-quantized"}, "has the format 'int-quantized'"),
        ({**CONFIG, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**CONFIG, "config_groups": {}}, "no config_groups"),
        ({**CONFIG, "config_groups": {"W4A16": ["Linear"]}}, "W4A16"),
        (changed(num_bits=16), "num_bits=16"),
        (changed(type="float"), "integer"),
        (changed(strategy="tensor"), "strategy 'tensor'"),
        (
            {**CONFIG, "config_groups": {"group_0": {**GROUP, "input_activations": {"num_bits": 8}}}},
            "input_activ",
        ),
    ],
)
def test_configurations_of_others_are_refused_in_one_line(config, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        packed_format.parse_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("weight_packed", torch.zeros(4, 7, dtype=torch.int32), "weight_packed has shape"),
        ("weight_scale", torch.zeros(4, 3), "weight_scale has shape"),
        ("weight_shape", torch.tensor([4, -64]), "weight_shape is"),
        ("weight_zero_point", torch.zeros(2, 2, dtype=torch.int32), "weight_zero_point has shape"),
        ("weight_zero_point", None, "layer has no weight_zero_point"),
        ("weight_g_idx", None, "layer has no weight_g_idx"),
        (
            "weight_g_idx",
            torch.zeros(60, dtype=torch.int32),
            r"weight_g_idx has shape \(60,\), expected \(64,\)",
        ),
        ("weight_g_idx", torch.zeros(64, dtype=torch.int32), "weight_g_idx puts 64 columns in group 0"),
        ("weight_g_idx", torch.arange(64).flip(0) // 32, "weight_g_idx orders columns by activation"),
    ],
)
def test_contradicting_tensors_are_refused(tensor, value, message):
    tensors = packed_format.pack_quantized(quantize_weight(torch.randn(4, 64), QuantSpec(4, 32)))
    scheme = PackedScheme(4, 32, False, ordered=tensor == "weight_g_idx")
    tensors[tensor] = value
    if value is None:
        del tensors[tensor]
    with pytest.raises(CheckpointError, match=message):
        packed_format.unpack_weight(tensors, scheme, "layer")


@pytest.mark.parametrize("actorder", ["group", "dynamic", True, "weight", "static", False, None])
def test_orders_of_columns_are_told_apart(actorder):
    ordered = actorder in ("group", "dynamic", True)
    parsed = packed_format.parse_config(changed(actorder=actorder))
    assert parsed.schemes == (PackedScheme(4, 32, True, ordered),)
    assert ("actorder" in parsed.schemes[0].to_config(["Linear"])["weights"]) == ordered


def test_paths_may_be_given_as_text(saved):
    folder: Path = saved[0]["llama-w3-ragged"]
    assert packed_format.compressed_linears(load(str(folder)))


@pytest.mark.parametrize("preset", ["W4A16", "W4A16_ASYM"])
def test_the_package_s_own_configurations_are_read(preset):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = quantization.QuantizationConfig(config_groups={preset: ["Linear"]}, format="pack-quantized")
    parsed = packed_format.parse_config(json.loads(config.model_dump_json()))
    assert parsed.schemes == (PackedScheme(4, 128, "ASYM" not in preset),)

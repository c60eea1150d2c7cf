"""Every checkpoint format by the same doors: saving, loading, transformers, damaged files, the whole job."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packed_models import ARCHITECTURES, compress_linears, logits, refused, save_source, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

from tensormill.compress import compress, transformers_hook
from tensormill.compress.checkpoint import is_compressed, load, open_model, save_compressed
from tensormill.compress.formats.checkpoint_format import compressed_linears
from tensormill.compress.formats.float16_scales import round_scales
from tensormill.compress.formats.registry import FORMATS, METHODS, format_named, format_of
from tensormill.compress.recipe import parse_recipe
from tensormill.errors import InvalidArgument, ModelError, RecipeError

WEIGHTS = "model.safetensors"
LAYER = "model.layers.1.mlp.down_proj"
OTHERS = [name for name in FORMATS if name != "compressed-tensors"]
CASES = [
    (name, bits, group_size, symmetric)
    for name, widths in {"awq": (4,), "gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8)}.items()
    for bits in widths
    for group_size, symmetric in ((32, False), (32, True), (-1, bits == 4))
]

pytestmark = pytest.mark.filterwarnings("ignore:.*zero points of:UserWarning")


def build(architecture="llama", bits=4, group_size=32, symmetric=False, tied=False, **more):
    model = compress_linears(tiny_model(architecture, tied=tied, **more), bits, group_size, symmetric)
    round_scales(model)
    return model


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with zero points, saved in every format; tests copy what they damage."""
    root = tmp_path_factory.mktemp("formats")
    return {name: save_compressed(build(), None, None, root / name, format=name) for name in FORMATS}


@pytest.fixture
def folder(saved, tmp_path):
    return lambda name: Path(shutil.copytree(saved[name], tmp_path / "damaged", dirs_exist_ok=True))


def test_registry():
    assert tuple(transformers_hook._METHODS) == METHODS
    for name, found in FORMATS.items():
        assert format_named(name) is found and found.name == name
    assert "expected one of ['compressed-tensors', 'awq'" in refused(
        lambda: format_named("gguf"), InvalidArgument
    )
    assert "quantized with 'fp8'" in refused(lambda: format_of({"quant_method": "fp8"}))


@pytest.mark.parametrize(("name", "bits", "group_size", "symmetric"), CASES)
def test_a_format_changes_nothing(tmp_path, name, bits, group_size, symmetric):
    """Logits of the model loaded from this format and from compressed-tensors are equal to the last bit."""
    model = build("qwen2", bits, group_size, symmetric)
    expected = load(save_compressed(model, None, None, tmp_path / "packed"))
    found = load(save_compressed(model, None, None, tmp_path / "other", format=name))
    assert torch.equal(logits(found), logits(expected))
    assert not found.training and set(compressed_linears(found)) == set(compressed_linears(model))
    for layer, module in compressed_linears(model).items():
        again = found.get_submodule(layer)
        assert torch.equal(again.weight_packed, module.weight_packed)
        assert torch.equal(again.weight_scale, module.weight_scale)
        assert again.symmetric == symmetric and again.weight_scale.dtype == torch.float16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", OTHERS)
def test_tied_embeddings_biases_and_shards(tmp_path, name, architecture):
    model = build(architecture, tied=True)
    folder = save_compressed(model, None, None, tmp_path / "shards", format=name, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(load(folder)), logits(model))
    direct = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(direct), logits(model))
    assert direct.get_output_embeddings().weight is direct.get_input_embeddings().weight


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_one_format_is_saved_in_another(tmp_path, saved, name):
    model = load(saved[name])
    again = load(save_compressed(model, None, None, tmp_path / "packed"))
    assert torch.equal(logits(again), logits(load(saved["compressed-tensors"])))
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize("name", OTHERS)
def test_save_pretrained_writes_the_same_form_again(tmp_path, saved, name):
    AutoModelForCausalLM.from_pretrained(saved[name]).save_pretrained(tmp_path / "again")
    first, second = load_file(saved[name] / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    configs = [json.loads((path / "config.json").read_text()) for path in (saved[name], tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OTHERS)
def test_the_source_dtype_is_kept_and_scales_are_float16(tmp_path, name, dtype):
    """Scales of a bfloat16 model are float16 numbers: nothing is rounded, nothing has to be asked for."""
    source = save_source(tiny_model("qwen2", dtype=dtype), tmp_path / "source")
    model, tokenizer = open_model(source)
    compress_linears(model, 4, 32, False)
    packed = save_compressed(model, tokenizer, source, tmp_path / "packed")
    other = save_compressed(model, tokenizer, source, tmp_path / "other", format=name)
    for key, tensor in load_file(other / WEIGHTS).items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float16 if key.endswith("scales") else dtype), key
    first, second = load(packed), load(other)
    assert second.dtype == dtype
    for layer, module in compressed_linears(first).items():
        scale = second.get_submodule(layer).weight_scale
        assert torch.equal(scale.float(), module.weight_scale.float())
    assert torch.equal(logits(load(packed, dtype=torch.float32)), logits(load(other, dtype=torch.float32)))


def test_float32_scales_are_refused_before_anything_is_written(tmp_path):
    model = compress_linears(tiny_model("llama"), 4, 32, False)
    text = refused(
        lambda: save_compressed(model, None, None, tmp_path / "out" / "w4", format="awq"), ModelError
    )
    assert "float16" in text and "round_scales" in text
    assert not (tmp_path / "out").exists()
    refused(lambda: save_compressed(model, None, None, tmp_path / "out", format="exl2"), InvalidArgument)


def test_mixed_widths_and_a_compressed_head(tmp_path):
    mixed = compress_linears(tiny_model("llama"), 4, 32, True, only="self_attn")
    compress_linears(mixed, 8, 32, True, only="mlp")
    text = refused(lambda: save_compressed(mixed, None, None, tmp_path / "w", format="gptq"), ModelError)
    assert "4 and 8 bits" in text
    head = compress_linears(tiny_model("qwen2"), 4, 32, False, head=True)
    round_scales(head)
    assert "lm_head" in refused(
        lambda: save_compressed(head, None, None, tmp_path / "w", format="awq"), ModelError
    )
    folder = save_compressed(head, None, None, tmp_path / "w", format="gptq_v2")
    assert torch.equal(logits(load(folder)), logits(head))


@pytest.mark.parametrize("name", OTHERS)
def test_layers_left_alone_stay_as_they_are(tmp_path, name):
    model = compress_linears(tiny_model("opt"), 4, 32, False, only="fc")
    round_scales(model)
    folder = save_compressed(model, None, None, tmp_path / "w", format=name)
    loaded = load(folder)
    assert torch.equal(logits(loaded), logits(model))
    assert type(loaded.model.decoder.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_a_bias_that_the_architecture_does_not_have(tmp_path, saved):
    """Some writers give every layer a bias of zeros; one that isn't zero counts."""
    folder = Path(shutil.copytree(saved["gptq"], tmp_path / "copy"))
    edit_tensors(folder, lambda tensors: tensors.update({f"{LAYER}.bias": torch.zeros(64)}))
    assert torch.equal(logits(load(folder)), logits(load(saved["gptq"])))
    edit_tensors(folder, lambda tensors: tensors[f"{LAYER}.bias"].fill_(0.5))
    assert load(folder).get_submodule(LAYER).bias.tolist() == [0.5] * 64


@pytest.mark.parametrize("name", OTHERS)
def test_tolerance_notices_a_zero_point_off_by_one(folder, saved, name):
    """Planted error: one bit of one layer's packed zero points."""
    damaged = folder(name)
    edit_tensors(damaged, lambda tensors: tensors[f"{LAYER}.qzeros"].bitwise_xor_(0x11111111))
    assert not torch.equal(logits(load(damaged)), logits(load(saved[name])))


# --- damaged and foreign files


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("name", OTHERS)
def test_load_names_a_missing_part(folder, name, part):
    damaged = folder(name)
    edit_tensors(damaged, lambda tensors: tensors.pop(f"{LAYER}.{part}"))
    assert f"no tensor {LAYER}.{part}" in refused(lambda: load(damaged))


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("name", OTHERS)
def test_load_names_a_misshapen_part(folder, name, part):
    damaged = folder(name)
    key = f"{LAYER}.{part}"
    edit_tensors(damaged, lambda tensors: tensors.update({key: tensors[key][:, :-1].clone()}))
    assert f"{key} has shape" in refused(lambda: load(damaged))
    edit_tensors(damaged, lambda tensors: tensors.update({key: tensors[key].to(torch.int64)}))
    assert f"{key} is I64" in refused(lambda: load(damaged))


@pytest.mark.parametrize("name", OTHERS)
def test_load_refuses_a_config_of_another_checkpoint(folder, name):
    for change in ({"group_size": 16}, {"group_size": 48}, {"bits": 8}, {"bits": 6}):
        damaged = folder(name)
        edit_config(damaged, **change)
        refused(lambda d=damaged: load(d))
    damaged = folder(name)
    config = json.loads((damaged / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (damaged / "config.json").write_text(json.dumps(config))
    assert "the model has no linear model.layers.1" in refused(lambda: load(damaged))


def test_load_refuses_a_method_of_another_checkpoint(folder, saved):
    """The three tensors have the same names in both: shapes tell them apart."""
    damaged = folder("gptq")
    shutil.copy(saved["awq"] / WEIGHTS, damaged / WEIGHTS)
    assert "has shape" in refused(lambda: load(damaged))
    damaged = folder("gptq")
    shutil.copy(saved["compressed-tensors"] / WEIGHTS, damaged / WEIGHTS)
    assert "no qweight" in refused(lambda: load(damaged))


def test_layers_that_the_architecture_ignores_are_not_missed(folder, saved, monkeypatch):
    """Extra prediction layers, say, which transformers' models leave out on purpose."""
    copy = folder("awq")
    parts = ("qweight", "qzeros", "scales")
    edit_tensors(
        copy,
        lambda found: found.update({f"mtp.0.{part}": found[f"{LAYER}.{part}"].clone() for part in parts}),
    )
    assert "the model has no linear mtp.0" in refused(lambda: load(copy))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    assert torch.equal(logits(load(copy)), logits(load(saved["awq"])))


def test_load_refuses_activation_order_and_infinite_scales(folder):
    damaged = folder("gptq")
    edit_config(damaged, desc_act=True)
    assert load(damaged)  # The order on disk is the plain one.
    edit_tensors(
        damaged, lambda tensors: tensors.update({f"{LAYER}.g_idx": tensors[f"{LAYER}.g_idx"].flip(0)})
    )
    assert f"{LAYER}.g_idx orders columns by activation" in refused(lambda: load(damaged))
    damaged = folder("awq")
    edit_tensors(damaged, lambda tensors: tensors[f"{LAYER}.scales"].fill_(float("inf")))
    assert f"{LAYER}.scales" in refused(lambda: load(damaged))


@pytest.mark.parametrize("name", OTHERS)
def test_a_compressed_model_is_not_compressed_again(saved, name):
    assert is_compressed(saved[name])
    text = refused(lambda: open_model(saved[name]))
    assert "already quantized" in text and "tensormill.load(path)" in text


# --- transformers


@pytest.mark.parametrize("name", ["awq", "gptq"])
def test_transformers_goes_first_where_it_can_run_the_format(monkeypatch, saved, name):
    """GPTQModel installed: from_pretrained is transformers' own, tensormill.load is ours all the same."""
    config = json.loads((saved[name] / "config.json").read_text())["quantization_config"]
    assert type(auto.AutoQuantizationConfig.from_dict(config)).__module__.startswith("tensormill")
    find_spec = transformers_hook.importlib.util.find_spec

    def found(package, *more):
        return find_spec("json") if package == "gptqmodel" else find_spec(package, *more)

    monkeypatch.setattr(transformers_hook.importlib.util, "find_spec", found)
    original = {"awq": transformers.AwqConfig, "gptq": transformers.GPTQConfig}[name]
    assert type(auto.AutoQuantizationConfig.from_dict(config)) is original
    with transformers_hook.preferring_low_bit():
        assert type(auto.AutoQuantizationConfig.from_dict(config)) is not original
    assert type(auto.AutoQuantizationConfig.from_dict(config)) is original


def test_what_we_cannot_run_is_left_to_transformers(saved):
    config = json.loads((saved["awq"] / "config.json").read_text())["quantization_config"]
    assert (
        type(auto.AutoQuantizationConfig.from_dict({**config, "version": "gemv"})) is transformers.AwqConfig
    )
    config = json.loads((saved["gptq"] / "config.json").read_text())["quantization_config"]
    dynamic = {"dynamic": {"+:.*up_proj": {"bits": 8}}}
    assert type(auto.AutoQuantizationConfig.from_dict({**config, **dynamic})) is transformers.GPTQConfig


# --- the whole job


def test_recipes_name_a_format():
    recipe = parse_recipe("- format: gptq_v2\n- {method: rtn, bits: 3}")
    assert recipe.format == "gptq_v2" and [step.method for step in recipe] == ["rtn"]
    assert parse_recipe("- method: rtn").format is None
    for text, message in (
        ("- format: gguf\n- method: rtn", "'gguf', expected one of"),
        ("- format: [awq]\n- method: rtn", "expected one of"),
        ("- format: awq", "no method"),
        ("- format: awq\n- format: gptq\n- method: rtn", "expected one"),
    ):
        assert message in refused(lambda t=text: parse_recipe(t), RecipeError)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_source(tiny_model("llama"), tmp_path_factory.mktemp("job") / "model")


@pytest.mark.parametrize("name", OTHERS)
def test_compress_writes_the_format(tmp_path, source, name):
    """Scales of the float32 model are rounded before it is measured, so that file and report agree."""
    report = compress(source, "rtn", group_size=32, format=name, output=tmp_path / "out", evaluate=False)
    model = load(report.output)
    assert (
        format_of(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]).name
        == name
    )
    original = compress_linears(tiny_model("llama"), 4, 32, False)
    round_scales(original)
    assert torch.equal(logits(model), logits(original))


def test_compress_refuses_before_any_work(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "tensormill.compress.pipeline.calibration_for", lambda *arguments: pytest.fail("worked")
    )

    def run(**settings):
        return lambda: compress(source, "rtn", **{"group_size": 32, "evaluate": False, **settings})

    assert "'exl2'" in refused(run(format="exl2"), InvalidArgument)
    assert "given 3 bits" in refused(run(format="awq", bits=3), ModelError)
    assert "lm_head is the output layer" in refused(run(format="awq", skip=[]), ModelError)
    assert "groups of 40 with a shorter last group" in refused(
        run(format="gptq", group_size=40, tail="smaller"), ModelError
    )
    odd = save_source(tiny_model("llama", mlp=100), tmp_path / "odd")
    assert "100 output features, expected a multiple of 8" in refused(
        lambda: compress(odd, "rtn", group_size=-1, format="awq", evaluate=False), ModelError
    )
    (tmp_path / "recipe.yaml").write_text(
        "- format: gptq\n- {method: rtn, bits: 8, group_size: 32, only: ['*.down_proj']}\n"
        "- {method: rtn, bits: 4, group_size: 32, skip: [lm_head, '*.down_proj']}\n"
    )
    text = refused(lambda: compress(source, recipe="recipe.yaml", evaluate=False), ModelError)
    assert "4 and 8 bits" in text
    text = refused(lambda: compress(source, recipe="recipe.yaml", format="awq", evaluate=False), RecipeError)
    assert "give one of them" in text
    assert {path.name for path in tmp_path.iterdir()} == {"odd", "recipe.yaml"}


def test_from_pretrained_does_not_need_other_packages(saved):
    assert not {"gptqmodel", "awq", "auto_gptq", "optimum"} & set(sys.modules)
    for name in OTHERS:
        model = AutoModelForCausalLM.from_pretrained(saved[name])
        assert torch.equal(logits(model), logits(load(saved["compressed-tensors"])))
        dense = model.dequantize()
        assert not compressed_linears(dense)

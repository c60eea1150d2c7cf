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
from tensormill.compress.formats.activation_order import ActivationOrderLinear
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


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_mixed_widths_and_group_sizes(tmp_path, name):
    mixed = compress_linears(tiny_model("llama"), 4, 32, True, only="self_attn")
    compress_linears(mixed, 8, 16, False, only="gate_proj")
    compress_linears(mixed, 2, -1, True, only="up_proj")
    round_scales(mixed)
    folder = save_compressed(mixed, None, None, tmp_path / "mixed", format=name)
    loaded = load(folder)
    assert torch.equal(logits(loaded), logits(mixed))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(mixed))
    loaded.save_pretrained(tmp_path / "again")
    first, second = load_file(folder / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    text = refused(lambda: save_compressed(mixed, None, None, tmp_path / "w", format="awq"), ModelError)
    assert "given 8 bits" in text
    edit_config(folder, dynamic={})
    assert "gate_proj.qweight has shape" in refused(lambda: load(folder))


def test_mixed_widths_in_awq_and_a_compressed_head(tmp_path):
    mixed = compress_linears(tiny_model("llama"), 4, 32, True, only="self_attn")
    compress_linears(mixed, 4, 16, True, only="mlp")
    text = refused(lambda: save_compressed(mixed, None, None, tmp_path / "w", format="awq"), ModelError)
    assert "expected one group size" in text
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


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_an_order_of_columns_is_loaded_and_kept(tmp_path, folder, name):
    """In the file's own format bit for bit, in compressed-tensors with the same logits, in awq not at all."""
    ordered = folder(name)
    edit_config(ordered, desc_act=True)
    plain = logits(load(ordered))  # The order on disk is the plain one, whatever is claimed.
    edit_tensors(
        ordered, lambda tensors: tensors.update({f"{LAYER}.g_idx": tensors[f"{LAYER}.g_idx"].flip(0)})
    )
    model = load(ordered)
    assert type(model.get_submodule(LAYER)) is ActivationOrderLinear
    assert not torch.equal(logits(model), plain)
    again = save_compressed(model, None, ordered, tmp_path / "again", format=name)
    first, second = load_file(ordered / WEIGHTS), load_file(again / WEIGHTS)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert json.loads((again / "config.json").read_text())["quantization_config"]["desc_act"] is True
    with pytest.warns(UserWarning, match="compressed-tensors from 0.20 on"):
        packed = save_compressed(model, None, ordered, tmp_path / "packed")
    assert type(load(packed).get_submodule(LAYER)) is ActivationOrderLinear
    assert torch.equal(logits(load(packed)), logits(model))
    assert "activation order" in refused(
        lambda: save_compressed(model, None, None, tmp_path / "awq", format="awq"), ModelError
    )
    dense = AutoModelForCausalLM.from_pretrained(ordered).dequantize()
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-4)


def test_load_refuses_a_damaged_order(folder):
    damaged, key = folder("gptq"), f"{LAYER}.g_idx"
    for change, message in (
        (lambda index: index * 0, f"{key} puts 96 columns in group 0, expected 32"),
        (lambda index: index + 7, f"{key} puts 0 columns in group 0"),
        (lambda index: index[:-1].clone(), f"{key} has shape (95,), expected (96,)"),
        (lambda index: index.half(), f"{key} is F16"),
    ):
        damaged = folder("gptq")
        edit_tensors(damaged, lambda tensors, c=change: tensors.update({key: c(tensors[key])}))
        assert message in refused(lambda d=damaged: load(d))
    damaged = folder("gptq")
    edit_tensors(damaged, lambda tensors: tensors.pop(key))
    assert load(damaged)
    edit_config(damaged, desc_act=True)
    assert f"{LAYER} has no g_idx" in refused(lambda: load(damaged))


@pytest.mark.parametrize("found", [[4], "gptq", 4])
def test_load_refuses_a_configuration_that_is_none(folder, found):
    damaged = folder("gptq")
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, "quantization_config": found}))
    text = refused(lambda: load(damaged))
    assert f"a quantization_config that is a {type(found).__name__}, expected settings by name" in text
    assert text == refused(lambda: open_model(damaged))


@pytest.mark.parametrize("name", OTHERS)
def test_settings_that_say_nothing_of_the_file_are_not_heeded(folder, saved, name):
    other = folder(name)
    edit_config(other, damp_percent=0.1, static_groups=True, frobnicate=3, meta={"quantizer": ["else:1"]})
    assert torch.equal(logits(load(other)), logits(load(saved[name])))


def test_load_refuses_infinite_scales(folder):
    damaged = folder("awq")
    edit_tensors(damaged, lambda tensors: tensors[f"{LAYER}.scales"].fill_(float("inf")))
    assert f"{LAYER}.scales" in refused(lambda: load(damaged))


@pytest.mark.parametrize("name", OTHERS)
def test_a_compressed_model_is_not_compressed_again(saved, name):
    assert is_compressed(saved[name])
    text = refused(lambda: open_model(saved[name]))
    assert "already quantized" in text and "tensormill.load(path)" in text


# --- AutoGPTQ's own file names


def by_autogptq(folder: Path, **changes) -> Path:
    """A version 1 checkpoint as AutoGPTQ lays it out, its configuration in a file of its own only."""
    config = json.loads((folder / "config.json").read_text())
    own = {**config.pop("quantization_config"), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(own))
    name = own.get("model_file_base_name") or f"gptq_model-{own['bits']}bit-{own['group_size']}g"
    (folder / WEIGHTS).rename(folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("base", [None, "weights-of-mine"])
def test_autogptq_s_own_file_names_are_found(tmp_path, folder, saved, base):
    found = by_autogptq(folder("gptq"), model_file_base_name=base, quant_method=None, checkpoint_format=None)
    assert is_compressed(found)
    assert "already quantized (gptq)" in refused(lambda: open_model(found))
    model = load(found)
    assert torch.equal(logits(model), logits(load(saved["gptq"])))
    again = save_compressed(model, None, found, tmp_path / "again", format="gptq")
    first, second = load_file(saved["gptq"] / WEIGHTS), load_file(again / WEIGHTS)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not {"transformers_weights"} & json.loads((again / "config.json").read_text()).keys()
    model.save_pretrained(tmp_path / "by-transformers")
    assert torch.equal(logits(load(tmp_path / "by-transformers")), logits(model))


def test_the_usual_name_goes_first(folder, saved):
    both = folder("gptq")
    shutil.copy(both / WEIGHTS, both / "gptq_model-4bit-32g.safetensors")
    edit_tensors(both, lambda tensors: tensors[f"{LAYER}.scales"].mul_(2))
    assert not torch.equal(logits(load(both)), logits(load(saved["gptq"])))
    (both / WEIGHTS).unlink()
    assert torch.equal(logits(load(both)), logits(load(saved["gptq"])))


def test_autogptq_s_own_shards_are_found(tmp_path, saved):
    folder = save_compressed(
        load(saved["gptq"]), None, None, tmp_path / "shards", format="gptq", max_shard_size="20KB"
    )
    (folder / "model.safetensors.index.json").rename(folder / "gptq_model-4bit-32g.safetensors.index.json")
    assert torch.equal(logits(load(folder)), logits(load(saved["gptq"])))


def test_damaged_configurations_of_autogptq_are_refused(folder):
    damaged = by_autogptq(folder("gptq"))
    file = damaged / "quantize_config.json"
    for text, message in (
        ("{", "quantize_config.json is not valid JSON"),
        ("[4]", "quantize_config.json is no configuration of AutoGPTQ"),
        ("{}", f"expected {WEIGHTS}"),
        ('{"bits": 4, "group_size": 64}', "has no weights"),
    ):
        file.write_text(text)
        assert message in refused(lambda: load(damaged))
    (damaged / "gptq_model-4bit-32g.safetensors").rename(damaged / "gptq_model-4bit-64g.safetensors")
    assert "groups of 64" in refused(lambda: load(damaged))
    file.unlink()
    assert "has no weights" in refused(lambda: load(damaged))


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
    dynamic = {"dynamic": {"+:.*up_proj": {"bits": 5}}}
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


def test_compress_writes_layers_of_two_widths(tmp_path, source):
    report = compress(
        source,
        "rtn",
        bits_by_layer={"down_proj": 8},
        group_size=32,
        format="gptq_v2",
        output=tmp_path / "out",
        evaluate=False,
    )
    model = load(report.output)
    widths = {name.rpartition(".")[2]: module.bits for name, module in compressed_linears(model).items()}
    assert widths.pop("down_proj") == 8 and set(widths.values()) == {4}


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
    text = refused(lambda: compress(source, recipe="recipe.yaml", format="awq", evaluate=False), RecipeError)
    assert "give one of them" in text
    (tmp_path / "recipe.yaml").write_text((tmp_path / "recipe.yaml").read_text().replace("gptq", "awq"))
    text = refused(lambda: compress(source, recipe="recipe.yaml", evaluate=False), ModelError)
    assert "given 8 bits" in text
    assert {path.name for path in tmp_path.iterdir()} == {"odd", "recipe.yaml"}


def test_from_pretrained_does_not_need_other_packages(saved):
    assert not {"gptqmodel", "awq", "auto_gptq", "optimum"} & set(sys.modules)
    for name in OTHERS:
        model = AutoModelForCausalLM.from_pretrained(saved[name])
        assert torch.equal(logits(model), logits(load(saved["compressed-tensors"])))
        dense = model.dequantize()
        assert not compressed_linears(dense)

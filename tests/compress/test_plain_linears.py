"""GPT-2's and Falcon's layers as `nn.Linear`: same logits, same states, and the whole job from folder to folder."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from packed_models import TOKENS, logits, refused, relative_error, save_source
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tensormill.compress import compress
from tensormill.compress.checkpoint import load, open_model
from tensormill.compress.formats.checkpoint_format import compressed_linears
from tensormill.compress.plain_linears import as_linear, transposed, use_plain_linears
from tensormill.errors import TensormillError

SIZES = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FALCON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 96,
    "bias": True,
}


def original(name: str) -> nn.Module:
    if name == "gpt2":
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, n_inner=96, **SIZES)
    else:
        config = transformers.FalconConfig(**FALCON, **SIZES)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {name: save_source(original(name), root / name) for name in ("gpt2", "falcon")}


@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_nothing_changes_but_the_classes(name):
    model = original(name)
    expected = logits(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    use_plain_linears(model)
    kinds = {type(module) for module in model.modules() if as_linear(module) is not None}
    assert kinds == {nn.Linear}
    assert relative_error(logits(model), expected) < 1e-6
    for same in (model, copy.deepcopy(model)):
        found = same.state_dict()
        assert list(found) == list(state)
        assert all(
            torch.equal(found[key], tensor) and found[key].is_contiguous() for key, tensor in state.items()
        )
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    model.load_state_dict(state)
    assert relative_error(logits(model), expected) < 1e-6
    assert bool(transposed(model)) == (name == "gpt2")
    use_plain_linears(model)
    assert bool(transposed(model)) == (name == "gpt2")


def test_other_models_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    layers = list(model)
    use_plain_linears(model)
    assert list(model) == layers and not transposed(model)
    assert as_linear(model[0]) is model[0] and as_linear(model[1]) is None


@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_an_opened_model_is_written_as_its_architecture_reads_it(sources, tmp_path, name):
    model, tokenizer = open_model(sources[name])
    assert tokenizer is not None
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(path / "model.safetensors") for path in (sources[name], tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.filterwarnings("ignore:.*are Conv1D:UserWarning", "ignore:.*zero points:UserWarning")
@pytest.mark.parametrize("format", ["compressed-tensors", "gptq_v2"])
@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_from_folder_to_folder(sources, tmp_path, name, format):
    report = compress(
        sources[name], "rtn", group_size=32, skip=["lm_head", "*.1.*"], format=format, output=tmp_path / "out",
        evaluate=False,
    )  # fmt: skip
    model = load(report.output)
    layers = compressed_linears(model)
    assert len(layers) == 4 and all(".0." in layer for layer in layers)
    # Of what was left alone, the files hold what the source does; the rest follows it to within rounding.
    source, written = (load_file(path / "model.safetensors") for path in (sources[name], tmp_path / "out"))
    kept = [key for key in source if key in written]
    assert sum(".1." in key for key in kept) == sum(".1." in key for key in source)
    assert all(torch.equal(source[key], written[key]) for key in kept)
    expected = logits(AutoModelForCausalLM.from_pretrained(sources[name]))
    assert relative_error(logits(model), expected) < 0.3
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(report.output)), logits(model))
    for layer, module in layers.items():
        weight = source[f"{layer}.weight"].T if name == "gpt2" else source[f"{layer}.weight"]
        assert relative_error(module.dequantize(torch.float32), weight) < 0.12, layer
    dense = model.dequantize()
    assert relative_error(logits(dense), logits(load(report.output))) < 1e-5
    assert {key: tensor.shape for key, tensor in dense.state_dict().items() if key in source} == {
        key: tensor.shape for key, tensor in source.items()
    }


def test_formats_whose_readers_know_no_conv1d_warn(sources, tmp_path):
    for format in ("awq", "compressed-tensors"):
        with pytest.warns(UserWarning, match="are Conv1D in transformers, for which readers of"):
            compress(
                sources["gpt2"], "rtn", group_size=32, format=format, output=tmp_path / format, evaluate=False
            )
    assert json.loads((tmp_path / "awq" / "config.json").read_text())["model_type"] == "gpt2"
    assert torch.isfinite(load(tmp_path / "awq")(TOKENS).logits).all()


def test_streaming_is_refused_in_one_line(sources, tmp_path):
    text = refused(
        lambda: compress(sources["gpt2"], "rtn", stream=True, output=tmp_path / "out", evaluate=False),
        TensormillError,
    )
    assert "GPT2LMHeadModel" in text and not (tmp_path / "out").exists()

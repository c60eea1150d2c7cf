import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model, tokens

from tensormill.compress.calibration import Calibration
from tensormill.compress.formats import QuantSpec, fake_quantize
from tensormill.compress.methods import METHODS
from tensormill.compress.rtn import RTNConfig, apply
from tensormill.errors import InvalidArgument, ModelError
from tensormill.ops.linear_wna16.module import LinearWNA16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_of_the_blocks_is_rounded(architecture, dtype):
    model = tiny_model(architecture, dtype=dtype)
    before = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    report = apply(model, RTNConfig(bits=4, group_size=32), None)
    rounded = {name for name, module in model.named_modules() if isinstance(module, LinearWNA16)}
    assert rounded == before.keys() - {"lm_head"}
    assert {layer.name for layer in report.layers} == rounded
    for name in rounded:
        layer = model.get_submodule(name)
        assert layer.weight_scale.dtype == dtype
        expected = fake_quantize(before[name].weight.detach(), QuantSpec(4, 32))
        assert torch.equal(layer.dequantize(dtype), expected)
        assert (layer.bias is None) == (before[name].bias is None)
        if layer.bias is not None:
            assert torch.equal(layer.bias, before[name].bias)
    assert model(tokens()).logits.isfinite().all()


def test_with_calibration_it_reports_output_errors():
    errors = {}
    for bits in (3, 4, 8):
        report = apply(tiny_model("llama"), RTNConfig(bits=bits, group_size=32), Calibration(tokens()))
        errors[bits] = sum(layer.nmse for layer in report.layers) / len(report.layers)
        assert all(layer.nmse == layer.loss_rtn for layer in report.layers)
    # A bit more halves the step, and so quarters the error.
    assert errors[3] / errors[4] == pytest.approx(4.5, rel=0.3)
    assert errors[8] < errors[4] / 200


def test_the_report_is_plain_data():
    import json

    report = apply(tiny_model("llama"), RTNConfig(group_size=32), None)
    assert json.loads(json.dumps(report.to_dict()))["config"]["group_size"] == 32


def test_skip_and_only_choose_layers():
    def touched(**settings) -> set[str]:
        report = apply(tiny_model("llama"), RTNConfig(group_size=32, **settings), None)
        return {layer.name.removeprefix("model.layers.") for layer in report.layers}

    assert touched(only=["o_proj"]) == {"0.self_attn.o_proj", "1.self_attn.o_proj"}
    assert touched(only=["*.layers.1.mlp.*"], skip=["down_proj"]) == {"1.mlp.gate_proj", "1.mlp.up_proj"}
    with pytest.warns(UserWarning, match="compressed no layer"):
        assert touched(skip=["*"]) == set()


def test_an_untied_head_can_be_rounded_a_tied_one_not():
    report = apply(tiny_model("llama", tie_word_embeddings=False), RTNConfig(group_size=32, skip=[]), None)
    assert "lm_head" in {layer.name for layer in report.layers}
    with pytest.raises(ModelError, match=r"lm_head, which shares its weight.*add 'lm_head' to skip"):
        apply(tiny_model("llama"), RTNConfig(group_size=32, skip=[]), None)


def test_what_does_not_fit_is_refused_before_anything_changes():
    model = tiny_model("llama")
    with pytest.raises(
        InvalidArgument, match=r"group_size=64 for model\.layers\.0\.mlp\.down_proj.*\[16, 24"
    ):
        apply(model, RTNConfig(group_size=64), None)
    model.model.layers[1].mlp.up_proj.weight.data[5, 5] = float("nan")
    with pytest.raises(InvalidArgument, match=r"NaN or infinity in model\.layers\.1\.mlp\.up_proj"):
        apply(model, RTNConfig(group_size=32), None)
    assert not any(isinstance(module, LinearWNA16) for module in model.modules())


def test_a_model_that_is_compressed_already_is_refused():
    model = tiny_model("llama")
    apply(model, RTNConfig(group_size=32), None)
    with pytest.raises(ModelError, match="compressed already"):
        apply(model, RTNConfig(group_size=32), None)


def test_progress_is_told():
    seen = []
    apply(
        tiny_model("llama"),
        RTNConfig(group_size=32),
        Calibration(tokens()),
        lambda message, fraction: seen.append((message, fraction)),
    )
    assert seen[0] == ("block 1 of 2", 0.0)
    assert seen[-1][1] == 1.0


def test_the_registry_has_every_method():
    assert list(METHODS) == ["rtn", "gptq", "awq"]
    for name, (config_class, method) in METHODS.items():
        assert config_class().bits == 4
        assert method.__module__ == f"tensormill.compress.{name}"


@pytest.mark.parametrize(
    "settings",
    [{"bits": 1}, {"group_size": 0}, {"skip": "lm_head"}, {"calibration_samples": 0}, {"tail": "pad"}],
)
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_settings_out_of_range_are_refused(method, settings):
    with pytest.raises(InvalidArgument, match="expected"):
        METHODS[method][0](**settings)

import pytest
from tiny_models import tiny_model, tokens

from tensormill.compress.awq import AWQConfig
from tensormill.compress.calibration import Calibration
from tensormill.compress.methods import METHODS
from tensormill.compress.recipe import Step, parse_recipe, read_recipe
from tensormill.compress.rtn import RTNConfig
from tensormill.errors import InvalidArgument, RecipeError

TWO_STEPS = """
- method: awq
  bits: 4
  group_size: 32
  skip: [lm_head, down_proj]
- method: gptq
  bits: 8
  group_size: 32
  only: [down_proj]
"""


def test_steps_are_read_in_order(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TWO_STEPS)
    steps = read_recipe(path)
    assert [step.method for step in steps] == ["awq", "gptq"]
    assert steps[0].config == AWQConfig(bits=4, group_size=32, skip=["lm_head", "down_proj"])
    assert Step.of("rtn") == Step("rtn", RTNConfig())


def test_steps_for_different_layers_run_one_after_the_other():
    model = tiny_model("qwen2")
    touched = []
    for step in parse_recipe(TWO_STEPS):
        report = METHODS[step.method][1](model, step.config, Calibration(tokens(16)))
        touched.append({(layer.name.rpartition(".")[2], layer.bits) for layer in report.layers})
    assert touched[1] == {("down_proj", 8)}
    assert ("down_proj", 4) not in touched[0]
    assert len(touched[0]) == 6


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("", "holds nothing, expected a list of steps"),
        ("method: awq", "holds a dict, expected a list"),
        ("- awq", "given a str as step 1, expected settings with a 'method'"),
        ("- bits: 4", "step 1, expected settings with a 'method'"),
        ("- method: awk", r"step 1: given method 'awk', expected one of \['rtn', 'gptq', 'awq'\]"),
        ("- method: [awq]", "step 1: given method"),
        ("- {method: rtn, bit: 4}", "step 1: given 'bit' for rtn.*valid settings: bits, group_size"),
        ("- {method: rtn, bits: 40}", "step 1: given bits=40, expected an integer from 2 to 8"),
        ("- {method: rtn, bits: four}", "step 1: given bits='four'"),
        ("- {method: rtn", "no YAML in line"),
        ("- method: rtn\n- method: awq", r"steps 1 \(rtn\) and 2 \(awq\), which"),
        (
            [
                {"method": "rtn", "only": ["*.mlp.*"]},
                {"method": "awq", "only": ["model.layers.0.mlp.up_proj"]},
            ],
            r"steps 1 \(rtn\) and 2 \(awq\)",
        ),
    ],
)
def test_recipes_that_make_no_sense_are_refused(recipe, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe)


def test_disjoint_layers_are_no_conflict():
    parse_recipe([{"method": "rtn", "only": ["q_proj"]}, {"method": "awq", "only": ["o_proj", "*.mlp.*"]}])
    parse_recipe([{"method": "rtn", "only": ["q_proj"]}, {"method": "awq", "skip": ["q_proj"]}])


def test_a_recipe_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="can't be read"):
        read_recipe(tmp_path / "missing.yaml")


BY_LAYER = {"*.0.self_attn.v_proj": 8, "down_proj": 2, "model.layers.1.*": 6}


@pytest.mark.parametrize("method", list(METHODS))
def test_one_step_gives_layers_widths_of_their_own(method):
    model = tiny_model("llama")
    step = Step.of(method, {"bits": 4, "group_size": 32, "bits_by_layer": BY_LAYER})
    report = METHODS[method][1](model, step.config, Calibration(tokens(16)))
    found = {layer.name.removeprefix("model.layers."): layer.bits for layer in report.layers}
    for name, bits in found.items():
        assert model.get_submodule(f"model.layers.{name}").bits == bits
    assert found["0.self_attn.v_proj"] == 8 and found["0.self_attn.q_proj"] == 4
    # The first that fits counts: "down_proj" before "model.layers.1.*".
    assert found["0.mlp.down_proj"] == found["1.mlp.down_proj"] == 2
    assert {bits for name, bits in found.items() if name[0] == "1" and "down" not in name} == {6}
    assert report.to_dict()["config"]["bits_by_layer"] == BY_LAYER


@pytest.mark.parametrize("method", list(METHODS))
def test_equal_widths_by_layer_change_nothing(method):
    """Widths given layer by layer, all the same, give what one width gives."""
    plain, by_layer = tiny_model("llama"), tiny_model("llama")
    shared = {"group_size": 32}
    step = Step.of(method, {"bits": 3, **shared})
    METHODS[method][1](plain, step.config, Calibration(tokens(16)))
    step = Step.of(method, {"bits": 8, "bits_by_layer": {"*": 3}, **shared})
    METHODS[method][1](by_layer, step.config, Calibration(tokens(16)))
    for name, value in plain.state_dict().items():
        assert value.equal(by_layer.state_dict()[name])


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"q_proj": 9}, "bits=9"),
        ({"q_proj": "four"}, "bits='four'"),
        (["q_proj"], "bits_by_layer=.*expected layer names or patterns with widths"),
        ({3: 4}, "bits_by_layer=.*expected layer names"),
    ],
)
def test_widths_by_layer_that_make_no_sense_are_refused(widths, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe([{"method": "rtn", "bits_by_layer": widths}])


def test_widths_for_layers_that_are_not_there_are_refused():
    step = Step.of("rtn", {"group_size": 32, "bits_by_layer": {"*.query": 8}})
    with pytest.raises(InvalidArgument, match=r"bits_by_layer for '\*\.query', which fits no layer"):
        METHODS["rtn"][1](tiny_model("llama"), step.config)

import pytest
from tiny_models import tiny_model, tokens

from tensormill.compress.awq import AWQConfig
from tensormill.compress.calibration import Calibration
from tensormill.compress.methods import METHODS
from tensormill.compress.recipe import Step, parse_recipe, read_recipe
from tensormill.compress.rtn import RTNConfig
from tensormill.errors import RecipeError

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

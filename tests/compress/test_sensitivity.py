"""Losses of layers rounded alone: what they are, what they leave as it was, and which layers they find important."""

import copy

import pytest
import torch
from architectures import architecture_model
from tiny_models import ARCHITECTURES, tiny_model, tokens

from tensormill.compress import precision, sensitivity
from tensormill.compress.calibration import Calibration, stream_blocks
from tensormill.compress.evaluate import compare
from tensormill.compress.experts import unfuse_experts
from tensormill.compress.formats import QuantSpec, fake_quantize
from tensormill.compress.methods import METHODS
from tensormill.compress.recipe import Step
from tensormill.compress.sensitivity import LayerGroup, layer_groups, measure_sensitivity
from tensormill.compress.structure import BlockStructure, ModelStructure, discover, linear_in
from tensormill.errors import InvalidArgument, ModelError

SETTINGS = {"group_size": 32}
CALIBRATION = Calibration(tokens(8, 24))


def measured(model, widths, method="rtn", measure="layers", **settings):
    step = Step.of(method, {**SETTINGS, **settings})
    structure = discover(model)
    groups = layer_groups(model, structure, step.config)
    return measure_sensitivity(model, structure, groups, widths, step, CALIBRATION, measure=measure)


def directly(model, names, bits):
    """The divergence of a copy with these layers rounded, by the evaluation's own code."""
    changed = copy.deepcopy(model)
    for name in names:
        linear = linear_in(changed, name)
        linear.weight.data = fake_quantize(linear.weight.data, QuantSpec(bits, 32))
    windows = CALIBRATION.tokens[:: sensitivity._STRIDE]
    # The last position of a window is scored here and not there: one token more for it.
    return compare(model, changed, torch.cat([windows, windows[:, :1]], dim=1)).kl


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_are_those_of_a_rounded_copy(architecture):
    model = tiny_model(architecture)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measured(model, [2, 4])
    assert found.run == (2, 4) and found.measure == "layers" and found.tokens == 2 * 24
    layers = [name for group in found.losses for name in group.layers]
    assert sorted(layers) == sorted(
        name for name, part in model.named_modules() if type(part) is torch.nn.Linear and name != "lm_head"
    )
    for group, losses in found.losses.items():
        for bits, loss in losses.items():
            assert loss == pytest.approx(directly(model, group.layers, bits), rel=1e-3, abs=1e-9)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("architecture", ["glm_moe_dsa", "gemma3n"])
def test_blocks_that_leave_something_for_others_are_run(architecture):
    """In GLM-5 which tokens to attend to, in Gemma 3n keys and values: passed by, they would leave nothing."""
    model = architecture_model(architecture)
    unfuse_experts(model)
    found = measured(model, [3], skip=["lm_head", "*.mlp.*", "*per_layer*", "*laurel*", "*altup*"])
    assert found.losses
    for group, losses in found.losses.items():
        assert losses[3] == pytest.approx(directly(model, group.layers, 3), rel=1e-3, abs=1e-9)


def test_layers_that_read_one_tensor_stay_together():
    model = tiny_model("llama")
    groups = layer_groups(model, discover(model), Step.of("rtn", {"skip": ["lm_head", "down_proj"]}).config)
    assert [group.names for group in groups][:3] == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
    ]
    assert len(groups) == 6
    with pytest.raises(ModelError, match="skip every linear layer"):
        layer_groups(model, discover(model), Step.of("rtn", {"skip": ["*"]}).config)


@pytest.mark.parametrize("measure", ["layers", "blocks"])
def test_an_important_layer_is_found(measure):
    """The second block's output projection is made to count: its outputs large, those of the first block small."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight *= 0.01
        model.model.layers[0].mlp.down_proj.weight *= 0.01
        model.model.layers[1].mlp.down_proj.weight *= 10
    losses = {group.layers: found[3] for group, found in measured(model, [3], measure=measure).losses.items()}
    important = losses["model.layers.1.mlp.down_proj",]
    assert important > 20 * losses["model.layers.0.mlp.down_proj",]
    assert important > 20 * losses["model.layers.0.self_attn.o_proj",]


def test_wide_widths_follow_from_narrow_ones():
    """8 bits have steps 17 times finer than 4 bits, and losses about 289 times smaller: as when they are run."""
    model = tiny_model("llama")
    followed = measured(model, [4, 6, 8])
    assert followed.run == (4,)
    for group, losses in followed.losses.items():
        for bits in (6, 8):
            assert losses[bits] == pytest.approx(directly(model, group.layers, bits), rel=0.5)
        assert losses[4] > losses[6] > losses[8] > 0
    assert measured(model, [6, 8]).run == (6,)


def test_blocks_share_what_they_lose_together():
    model = tiny_model("llama")
    found = measured(model, [2, 3, 4], measure="blocks")
    assert found.run == (3,) and found.rounding == "rtn"
    for block in ("model.layers.0", "model.layers.1"):
        groups = [group for group in found.losses if group.block == block]
        total = sum(found.losses[group][3] for group in groups)
        together = directly(model, [name for group in groups for name in group.layers], 3)
        assert total == pytest.approx(together, rel=1e-3)
        for group in groups:
            assert found.losses[group][2] > found.losses[group][3] > found.losses[group][4]


@pytest.mark.parametrize(("seconds", "expected"), [(1e9, "layers"), (0.0, "blocks")])
def test_the_measure_follows_from_its_cost(monkeypatch, seconds, expected):
    monkeypatch.setattr(sensitivity, "_PATIENCE", seconds)
    assert measured(tiny_model("opt"), [4], measure="auto").measure == expected


def test_an_output_layer_outside_the_blocks_is_measured_too():
    model = tiny_model("llama", tie_word_embeddings=False)
    found = measured(model, [2, 3], skip=[])
    losses = found.losses[LayerGroup("", ("lm_head",))]
    assert losses[2] == pytest.approx(directly(model, ["lm_head"], 2), rel=1e-3)
    assert losses[2] > losses[3] > 0


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_method_s_own_rounding_is_what_it_makes_of_the_layer(method):
    """Compressed for real, a block's layers read as `rounded` says, in the coordinates of the unchanged model."""
    model = tiny_model("llama")
    settings = {**SETTINGS, "bits": 3, **({"inputs": "original"} if method == "gptq" else {})}
    step, structure = Step.of(method, settings), discover(model)
    block = next(iter(stream_blocks(model, structure, CALIBRATION)))
    statistics = block.observe()
    weights = {}
    for names in block.structure.input_groups:
        weights.update(METHODS.rounded(method)(block, names, 3, step.config, statistics))
    approximated = copy.deepcopy(model.model.layers[0])
    for name, weight in weights.items():
        linear_in(approximated, name).weight.data = weight
    done = copy.deepcopy(model)
    METHODS[method][1](done, step.config, CALIBRATION)
    call = block.calls[0]
    hidden = block.hidden[0]
    expected, found = call.run(done.model.layers[0], hidden), call.run(approximated, hidden)
    original = call.run(model.model.layers[0], hidden)
    # Not equal: a group clipped at both ends has a zero point halfway between two codes, and the last bit of its
    # rows' scale decides which one it is.
    assert (found - expected).norm() < 0.1 * (expected - original).norm()


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_model_too_large_for_float32_is_run_in_its_own_dtype(monkeypatch, method):
    """Losses are those of float32, but for the rounding of 16-bit activations."""
    wide = measured(tiny_model("llama"), [2], method)
    monkeypatch.setattr(sensitivity, "_FLOAT32_BYTES", 0)
    monkeypatch.setattr(precision, "has_fast_matmul", lambda *arguments: True)
    seen = []
    forward = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, *rest: seen.append(x.dtype) or forward(x, *rest)
    )
    model = tiny_model("llama", dtype=torch.bfloat16)
    narrow = measured(model, [2], method)
    assert seen.count(torch.bfloat16) > 100
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    for group, losses in narrow.losses.items():
        assert losses[2] == pytest.approx(wide.losses[group][2], rel=0.3)


def test_experts_of_a_block_stay_together():
    names = [f"experts.{i}.{part}" for i in range(3) for part in ("gate", "up", "down")]
    block = torch.nn.Module()
    block.experts = torch.nn.ModuleList(
        torch.nn.ModuleDict({part: torch.nn.Linear(32, 32) for part in ("gate", "up", "down")})
        for _ in range(3)
    )
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([block])
    groups = tuple(
        group
        for i in range(3)
        for group in ((f"experts.{i}.gate", f"experts.{i}.up"), (f"experts.{i}.down",))
    )
    structure = ModelStructure((BlockStructure("blocks.0", tuple(names), groups, (), (), 0),), ())
    found = layer_groups(model, structure, Step.of("rtn").config)
    assert [len(group.names) for group in found] == [6, 3]
    assert found[1].layers == tuple(f"blocks.0.experts.{i}.down" for i in range(3))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InvalidArgument, match="no width"):
        measured(tiny_model("llama"), [])
    with pytest.raises(InvalidArgument, match="given measure='guess'"):
        measured(tiny_model("llama"), [4], measure="guess")

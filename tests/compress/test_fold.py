import copy

import pytest
import torch
from tiny_models import ARCHITECTURES, Block, BlockModel, OnePlusNorm, tiny_model, tokens
from torch import nn

from tensormill.compress.block_calls import record_calls
from tensormill.compress.fold import fold
from tensormill.compress.structure import discover
from tensormill.errors import InvalidArgument


def random_scales(block: nn.Module, edge, seed: int = 0) -> torch.Tensor:
    channels = block.get_submodule(edge.consumers[0]).in_features // edge.repeats
    generator = torch.Generator().manual_seed(seed)
    return 4 ** (torch.rand(channels, generator=generator, dtype=torch.float64) * 2 - 1)


def outputs(model: nn.Module, structure) -> list[torch.Tensor]:
    """The logits, and every block's output for the same random hidden states.

    Logits alone would hide errors below 1e-7: norms of transformers round their input to float32.
    """
    with torch.no_grad():
        result = [getattr(model(tokens()), "logits", None)]
        result = [model(tokens())] if result[0] is None else result
        names = [block.name for block in structure.blocks]
        hidden, calls, _ = record_calls(model, names, tokens())
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=hidden.dtype)
        for name, call in zip(names, calls, strict=True):
            result.append(call.run(model.get_submodule(name), noise))
    return result


def change(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(after, before, strict=True))


def fold_all(model: nn.Module, structure) -> None:
    for block in structure.blocks:
        module = model.get_submodule(block.name)
        for edge in block.mappings:
            fold(module, edge, random_scales(module, edge))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "phi3"])
def test_folding_changes_nothing(architecture):
    model = tiny_model(architecture, dtype=torch.float64)
    structure = discover(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = outputs(model, structure)
    fold_all(model, structure)
    assert change(before, outputs(model, structure)) < 1e-10
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert not any("embed" in name or "lm_head" in name for name in changed)
    assert len(changed) >= 2 * 4 + 2


def test_folding_into_one_plus_weight_norms_changes_nothing():
    torch.manual_seed(0)
    model = BlockModel(Block(nn.ReLU(), OnePlusNorm()), Block(nn.ReLU(), OnePlusNorm())).double()
    structure = discover(model)
    assert [edge.offset for edge in structure.blocks[0].mappings] == [1.0, 0.0]
    before = outputs(model, structure)
    fold_all(model, structure)
    assert change(before, outputs(model, structure)) < 1e-10


def test_gemmas_norm_computes_in_float32_and_agrees_to_that():
    model = tiny_model("gemma2", dtype=torch.float64)
    structure = discover(model)
    before = outputs(model, structure)
    fold_all(model, structure)
    assert change(before, outputs(model, structure)) < 1e-5


@pytest.mark.parametrize("planted", ["bias", "offset", "repeats", "consumer"])
def test_a_planted_error_is_seen(planted):
    model = tiny_model("qwen2", dtype=torch.float64)
    structure = discover(model)
    before = outputs(model, structure)
    module = model.model.layers[0]
    norm_edge, value_edge = structure.blocks[0].mappings[:2]
    if planted == "bias":
        bias = module.self_attn.v_proj.bias.data.clone()
        fold(module, value_edge, random_scales(module, value_edge))
        module.self_attn.v_proj.bias.data = bias
    elif planted == "offset":
        wrong = copy.copy(norm_edge)
        object.__setattr__(wrong, "offset", 1.0)
        fold(module, wrong, random_scales(module, norm_edge))
    elif planted == "repeats":
        scale = random_scales(module, value_edge)
        fold(module, value_edge, scale)
        weight = module.self_attn.o_proj.weight.data
        weight.div_(value_edge.expand(scale)).mul_(scale.repeat(2))
    else:
        fold(module, norm_edge, random_scales(module, norm_edge))
        module.self_attn.k_proj.weight.data[:, 3] *= 1.01
    assert change(before, outputs(model, structure)) > 1e-6


def test_a_norm_kept_in_bfloat16_costs_nothing():
    model = tiny_model("llama", dtype=torch.bfloat16).float()
    structure = discover(model)
    before = outputs(model, structure)
    naive = copy.deepcopy(model)
    edge = structure.blocks[0].mappings[0]
    scale = random_scales(model.model.layers[0], edge)
    fold(model.model.layers[0], edge, scale, stored_dtype=torch.bfloat16)
    fold(naive.model.layers[0], edge, scale)
    for folded in (model, naive):
        norm = folded.model.layers[0].input_layernorm
        norm.weight.data = norm.weight.data.bfloat16().float()
    assert change(before, outputs(model, structure)) < 1e-5
    assert change(before, outputs(naive, structure)) > 1e-4


def test_zero_norm_weights_survive():
    model = tiny_model("llama", dtype=torch.float64)
    model.model.layers[0].input_layernorm.weight.data[:5] = 0
    structure = discover(model)
    before = outputs(model, structure)
    module = model.model.layers[0]
    edge = structure.blocks[0].mappings[0]
    fold(module, edge, random_scales(module, edge), stored_dtype=torch.bfloat16)
    assert change(before, outputs(model, structure)) < 1e-10


@pytest.mark.parametrize("bad", [torch.ones(3), torch.zeros(64), torch.full((64,), float("nan"))])
def test_bad_scales_are_refused(bad):
    model = tiny_model("llama")
    edge = discover(model).blocks[0].mappings[0]
    with pytest.raises(InvalidArgument, match="64 positive finite numbers"):
        fold(model.model.layers[0], edge, bad)

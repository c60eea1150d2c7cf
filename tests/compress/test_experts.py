"""Experts of a layer as linear layers: the same function, their own tokens, routers as readers."""

import copy
import json

import pytest
import torch
import transformers
from architectures import VOCABULARY, architecture_model, stacked_on_disk
from packed_models import relative_error, save_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tensormill.compress import awq, compress, gptq, rtn
from tensormill.compress.calibration import Calibration, CalibrationBlock, stream_blocks
from tensormill.compress.checkpoint import load, save_compressed
from tensormill.compress.experts import (
    ExpertList,
    SortedExpertList,
    expert_lists,
    routers,
    stack_experts,
    unfuse_experts,
)
from tensormill.compress.formats.float16_scales import round_scales
from tensormill.compress.formats.quantization import QuantSpec, fake_quantize
from tensormill.compress.methods import METHODS
from tensormill.compress.output_error import gram_loss, output_error, sample_loss
from tensormill.compress.recipe import parse_recipe
from tensormill.compress.structure import discover
from tensormill.errors import InvalidArgument, ModelError

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")
TOKENS = torch.randint(0, VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(3))
SMALL = {"group_size": 16, "n_grid": 4, "clip_grid": 8}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS[:2]).logits


def opened(name: str, **options) -> nn.Module:
    model = architecture_model(name, **options)
    unfuse_experts(model)
    return model


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("name", MIXTURES)
def test_taken_apart_they_compute_the_same(name, seed):
    model = architecture_model(name, seed=seed, dtype=torch.float64)
    model.set_experts_implementation("eager")  # the grouped product takes no float64
    expected = logits(model)
    fused = sum(1 for part in model.modules() if "Experts" in type(part).__name__)
    names = unfuse_experts(model)
    assert len(names) == fused == len(list(expert_lists(model))) > 0
    assert relative_error(logits(model), expected) < 1e-14
    assert unfuse_experts(model) == []


def test_the_weights_are_not_copied():
    model = architecture_model("qwen3_moe")
    stacked = model.model.layers[0].mlp.experts.down_proj
    opened_layer = model.model.layers[0].mlp
    unfuse_experts(model)
    assert isinstance(opened_layer.experts, ExpertList)
    for index, expert in enumerate(opened_layer.experts):
        assert expert.down_proj.weight.data_ptr() == stacked[index].data_ptr()


def llama4_experts(seed: int = 0) -> nn.ModuleDict:
    """The experts of one layer as transformers has them, in float64."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextExperts

    torch.manual_seed(seed)
    made = Llama4TextExperts(Llama4TextConfig(hidden_size=24, intermediate_size=40, num_local_experts=3))
    for weight in made.parameters():
        nn.init.normal_(weight)
    return nn.ModuleDict({"experts": made.double()})


def sorted_inputs(tokens: int, chosen: int) -> Tensor:
    """A copy of the tokens for each of 3 experts, zero but in `chosen` of them."""
    draw = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 24, generator=draw, dtype=torch.float64)
    ranks = torch.rand(tokens, 3, generator=draw).argsort(dim=1)
    weights = torch.rand(tokens, 3, generator=draw, dtype=torch.float64) * (ranks < chosen)
    return (weights.T.unsqueeze(-1) * x).flatten(0, 1)


@pytest.mark.parametrize(("tokens", "chosen"), [(1, 1), (7, 1), (7, 3)])
def test_sorted_experts_compute_the_same_and_have_the_same_gradients(tokens, chosen):
    """Llama 4's: transposed weights, tokens multiplied before."""
    fused, apart = llama4_experts(), llama4_experts()
    assert unfuse_experts(apart) == ["experts"]
    assert isinstance(apart["experts"], SortedExpertList) and apart["experts"].transposed
    results = []
    for model in (fused, apart):
        x = sorted_inputs(tokens, chosen).requires_grad_()
        y = model["experts"](x)
        (y * torch.linspace(-1, 1, 24, dtype=y.dtype)).sum().backward()
        results.append((y, x.grad))
    torch.testing.assert_close(*(y for y, _ in results), rtol=1e-12, atol=1e-12)
    # Where an expert isn't chosen, its input is no function of anything.
    used = sorted_inputs(tokens, chosen).any(dim=-1)
    torch.testing.assert_close(*(grad[used] for _, grad in results), rtol=1e-12, atol=1e-12)
    stacked = dict(fused["experts"].named_parameters())
    gate = stacked["gate_up_proj"].grad.mT[:, :40]
    for index, expert in enumerate(apart["experts"]):
        found = expert.gate_proj.weight.grad
        torch.testing.assert_close(
            torch.zeros_like(gate[index]) if found is None else found, gate[index], rtol=1e-12, atol=1e-12
        )


def test_transposed_experts_are_stacked_again():
    model = llama4_experts()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unfuse_experts(model)
    assert all(weight.is_contiguous() for weight in model.parameters())
    found = stack_experts("experts", model["experts"], model.state_dict())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_sorted_experts_see_their_tokens_alone():
    model = opened("llama4")
    seen: list[tuple[Tensor, Tensor]] = []
    for block in stream_blocks(model, discover(model), Calibration(TOKENS)):
        if block.name.endswith(".1"):
            break
        block.observe()
    part = block.module.get_submodule("feed_forward.experts")
    hook = part.register_forward_pre_hook(lambda _m, args: seen.append(args[:2]))
    for call, hidden in zip(block.calls, block.hidden, strict=True):
        call.run(block.module, hidden)
    hook.remove()
    x, index = (torch.cat(parts) for parts in zip(*seen, strict=True))
    own = [x[index[:, 0] == number] for number in range(4)]
    assert sum(map(len, own)) == TOKENS.numel(), "each token is sent to one expert"
    few = min(map(len, own))
    assert few < max(map(len, own)), "the test needs experts on both sides"
    statistics = block.observe(tokens_per_feature=(few + 1) / 64)
    for number, x in enumerate(own):
        found = statistics[f"feed_forward.experts.{number}.gate_proj"]
        starved = len(x) == few
        assert found.routed == (few if starved else None)
        x = torch.cat(own) if starved else x
        assert found.tokens == len(x)
        assert torch.allclose(found.gram, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("format", "stacked"), [("compressed-tensors", False), ("gptq", True)])
def test_untouched_experts_lie_as_transformers_reads_them_in_each_format(format, stacked, tmp_path):
    """Llama 4: transformers takes them apart itself where it reads compressed-tensors, and nowhere else."""
    model = architecture_model("llama4")
    rtn.apply(model, rtn.RTNConfig(group_size=32, symmetric=True, only=["*.self_attn.*"]))
    round_scales(model)
    folder = save_compressed(model, None, None, tmp_path / "attention", format=format)
    names = load_file(folder / "model.safetensors").keys()
    assert ("model.layers.1.feed_forward.experts.gate_up_proj" in names) == stacked
    assert ("model.layers.1.feed_forward.experts.3.up_proj.weight" in names) != stacked
    assert relative_error(logits(load(folder)), logits(model)) < 1e-5
    if not stacked:
        found = AutoModelForCausalLM.from_pretrained(folder)
        assert relative_error(logits(found), logits(model)) < 1e-5


def test_routers_are_found():
    assert routers(opened("qwen2_moe")) == [
        "model.layers.1.mlp.gate",
        "model.layers.1.mlp.shared_expert_gate",
    ]
    assert routers(architecture_model("llama")) == []


class GatedUnit(nn.Module):
    """An activation of both projections, as Inkling 2 has it."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return nn.functional.silu(gate) * up


class Stacked(nn.Module):
    """Experts as transformers stores them; `order` is how gate and up share the first tensor."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.act_fn = order, GatedUnit() if order == "unit" else nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 24, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 12))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for token, chosen in enumerate(top_k_index):
            for place, expert in enumerate(chosen):
                both = self.gate_up_proj[expert] @ hidden_states[token]
                gate, up = (both[::2], both[1::2]) if self.order == "interleaved" else both.chunk(2)
                gate, up = (up, gate) if self.order == "up first" else (gate, up)
                if "clamped" in self.order:
                    gate = gate.clamp(max=10.0 if self.order == "clamped far out" else 0.5)
                inner = self.act_fn(gate, up) if self.order == "unit" else self.act_fn(gate) * up
                total[token] += top_k_weights[token, place] * (self.down_proj[expert] @ inner)
        return total


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_another_function_of_the_same_shapes_is_left_alone(device):
    """On the meta device, where a model without its weights is, with random weights instead."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Stacked("gate first")}).to(device)
    assert unfuse_experts(model) == ["experts"]
    assert all(weight.device.type == device for weight in model.parameters())
    for order in ("interleaved", "up first", "clamped", "clamped far out", "unit"):
        model = nn.ModuleDict({"experts": Stacked(order)}).to(device)
        with pytest.warns(UserWarning, match="the experts in experts .Stacked. are not gated MLPs"):
            assert unfuse_experts(model) == []
        assert isinstance(model["experts"], Stacked)


def test_nan_in_the_experts_is_named():
    model = architecture_model("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:, 0, 0] = float("nan")
    with pytest.raises(InvalidArgument, match=r"model\.layers\.1\.mlp\.experts"):
        unfuse_experts(model)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_blocks_see_what_they_see_in_the_model(name):
    model = opened(name)
    with torch.no_grad():
        expected = model(TOKENS, output_hidden_states=True).hidden_states
    blocks = stream_blocks(model, discover(model), Calibration(TOKENS))
    for block, wanted in zip(blocks, expected, strict=False):
        assert relative_error(torch.cat(block.hidden), wanted) < 1e-5
        block.observe()


def observed(model: nn.Module, tokens: Tensor, tokens_per_feature: float):
    """The last block with its statistics, and what its experts read: (tokens, H), (tokens, k) their experts."""
    for block in stream_blocks(model, discover(model), Calibration(tokens)):
        seen: list[tuple[Tensor, Tensor]] = []
        part = block.module.get_submodule("mlp.experts")
        hook = part.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append((args[0], args[1])))
        for call, hidden in zip(block.calls, block.hidden, strict=True):
            call.run(block.module, hidden)
        hook.remove()
        statistics = block.observe(tokens_per_feature=tokens_per_feature)
    return statistics, block, torch.cat([x for x, _ in seen]), torch.cat([index for _, index in seen])


def test_statistics_are_those_of_the_routed_tokens():
    statistics, block, x, index = observed(opened("qwen3_moe"), TOKENS, 0)
    for number, expert in enumerate(block.module.mlp.experts):
        own = x[(index == number).any(dim=1)]
        found = statistics[f"mlp.experts.{number}.gate_proj"]
        assert found.tokens == len(own) and found.routed is None
        assert torch.allclose(found.gram, own.T @ own / len(own), rtol=1e-4, atol=1e-5)
        assert statistics[f"mlp.experts.{number}.up_proj"] is found
        inner = torch.nn.functional.silu(expert.gate_proj(own)) * expert.up_proj(own)
        gram = (inner.T @ inner / len(own)).detach()
        assert torch.allclose(statistics[f"mlp.experts.{number}.down_proj"].gram, gram, rtol=1e-3, atol=1e-4)


def test_an_expert_of_few_tokens_is_shown_all_of_them():
    # 96 tokens of 192 in gate and up
    statistics, block, x, index = observed(opened("qwen3_moe"), TOKENS, 1.5)
    counts = [(index == number).any(dim=1).sum().item() for number in range(4)]
    assert min(counts) < 96 < max(counts), "the test needs experts on both sides"
    everything = x.T @ x / len(x)
    shared = set()
    for number, expert in enumerate(block.module.mlp.experts):
        found = statistics[f"mlp.experts.{number}.gate_proj"]
        assert found.routed == (counts[number] if counts[number] < 96 else None)
        down = statistics[f"mlp.experts.{number}.down_proj"]
        assert down.routed == (counts[number] if counts[number] < 48 else None)
        if found.routed is not None:
            assert found.tokens == len(x)
            assert torch.allclose(found.gram, everything, rtol=1e-4, atol=1e-5)
            shared.add(id(found.gram))
        if down.routed is not None:
            inner = torch.nn.functional.silu(expert.gate_proj(x)) * expert.up_proj(x)
            assert torch.allclose(down.gram, (inner.T @ inner / len(x)).detach(), rtol=1e-3, atol=1e-4)
    assert len(shared) == 1, "one matrix for all experts that share it"


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_reports_name_the_experts_of_few_tokens_and_what_is_left_out(method):
    config = {
        "rtn": rtn.RTNConfig(group_size=16),
        "gptq": gptq.GPTQConfig(group_size=16),
        "awq": awq.AWQConfig(**SMALL),
    }[method]
    apply = {"rtn": rtn.apply, "gptq": gptq.apply, "awq": awq.apply}[method]
    report = apply(architecture_model("deepseek_v3"), config, Calibration(TOKENS[:2]))
    few = {
        layer.name: layer.details["routed_tokens"]
        for layer in report.layers
        if layer.details.get("calibrated_on")
    }
    assert few and all(".experts." in name for name in few) and min(few.values()) == 0
    assert report.left_out == ("model.layers.1.mlp.gate", "model.layers.2.mlp.gate")
    json.dumps(report.to_dict())


def test_joint_losses_weigh_linears_by_the_tokens_they_see():
    torch.manual_seed(0)
    spec = QuantSpec(3, 8)
    weights = [torch.randn(6, 16), torch.randn(5, 16)]
    inputs = [torch.randn(40, 16), torch.randn(30, 16) * torch.linspace(0.1, 4, 16)]
    grams = [x.T @ x / len(x) for x in inputs]
    scales = torch.rand(3, 16) + 0.5

    def one(index: int, scale: Tensor) -> float:
        weight, x = weights[index], inputs[index]
        error = x @ (fake_quantize(weight * scale, spec) / scale - weight).T
        return float(error.square().sum() / (x @ weight.T).square().sum())

    expected = torch.tensor([one(0, scale) + 0.25 * one(1, scale) for scale in scales])
    assert torch.allclose(gram_loss(weights, grams, spec, [1.0, 0.25])(scales), expected, rtol=1e-3)
    assert torch.allclose(sample_loss(weights, inputs, spec, [1.0, 0.25])(scales), expected, rtol=1e-3)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "linear", "objective_samples": 2},
        {"objective": "module", "objective_samples": 2, "duo_scaling": False},
        {"duo_scaling": True, "refine": 3},
    ],
    ids=["linear", "module", "duo"],
)
def test_every_setting_of_awq_works(name, settings):
    report = awq.apply(
        architecture_model(name), awq.AWQConfig(bits=3, **SMALL, **settings), Calibration(TOKENS)
    )
    assert sum(layer.nmse for layer in report.layers) < sum(layer.loss_rtn for layer in report.layers)
    assert any(
        layer.details.get("largest_scale", 1) > 1 for layer in report.layers if ".experts." in layer.name
    )


def test_mappings_by_hand_name_all_experts_by_a_star():
    model = opened("qwen3_moe")
    given = [
        {"producer": "mlp.experts.*.up_proj", "consumers": ["mlp.experts.*.down_proj"]},
        {
            "producer": "post_attention_layernorm",
            "consumers": ["mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"],
        },
    ]
    found = discover(model, given).blocks[0].mappings
    automatic = {str(edge): edge for edge in discover(model).blocks[0].mappings}
    assert len(found) == 5 and found[-1].readers == ("mlp.gate",)
    for edge in found:
        assert set(edge.consumers) == set(automatic[str(edge)].consumers)
    given[1]["consumers"].pop()
    with pytest.raises(ModelError, match="which would change the output"):
        discover(model, given)
    given[0]["producer"] = "mlp.experts.*.gate_proj"
    with pytest.raises(ModelError, match="which would change the output"):
        discover(model, given[:1])


def test_experts_that_are_skipped_keep_their_names_and_numbers(tmp_path):
    """Half of a layer's experts packed, the others not; and one layer not packed at all."""
    model = architecture_model("qwen3_moe")
    rtn.apply(
        model, rtn.RTNConfig(group_size=16, symmetric=True, skip=["lm_head", "*.experts.[01].*", "*.1.mlp.*"])
    )
    expected = logits(model)
    folder = save_compressed(model, None, None, tmp_path / "some")
    stored = load_file(folder / "model.safetensors")
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in stored
    assert "model.layers.0.mlp.experts.2.gate_proj.weight_packed" in stored
    ignored = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.experts.1.up_proj"} <= set(ignored)
    assert relative_error(logits(load(folder)), expected) < 1e-5
    again = save_compressed(load(folder), None, None, tmp_path / "again")
    assert load_file(again / "model.safetensors").keys() == stored.keys()


def test_untouched_experts_are_read_by_plain_transformers(tmp_path):
    model = architecture_model("mixtral")
    rtn.apply(model, rtn.RTNConfig(group_size=16, symmetric=True, only=["*.self_attn.*"]))
    folder = save_compressed(model, None, None, tmp_path / "attention")
    stored = load_file(folder / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in stored
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert not list(expert_lists(found))
    assert relative_error(logits(found), logits(model)) < 1e-5


def test_the_usual_names_are_read_too(tmp_path):
    """llm-compressor's linearize_moe writes them for Mixtral."""
    model = architecture_model("mixtral")
    rtn.apply(model, rtn.RTNConfig(group_size=16, symmetric=True))
    folder = save_compressed(model, None, None, tmp_path / "mixtral")
    tensors = load_file(folder / "model.safetensors")
    for name, other in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        tensors = {key.replace(f".{name}.", f".{other}."): value for key, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert relative_error(logits(load(folder)), logits(model)) < 1e-5


def test_architectures_that_store_experts_stacked(tmp_path):
    """Experts left alone go back into one tensor; packed ones are announced as readable here only."""
    model = stacked_on_disk()
    skip = ["lm_head", "*.layers.0.mlp.*"]
    rtn.apply(model, rtn.RTNConfig(group_size=16, symmetric=True, skip=skip))
    with pytest.warns(UserWarning, match="from stacked tensors only"):
        folder = save_compressed(model, None, None, tmp_path / "some")
    names = load_file(folder / "model.safetensors").keys()
    assert "model.language_model.layers.0.mlp.experts.gate_up_proj" in names
    assert "model.language_model.layers.1.mlp.experts.0.gate_proj.weight_packed" in names
    assert relative_error(logits(load(folder)), logits(model)) < 1e-5

    model = stacked_on_disk()
    rtn.apply(model, rtn.RTNConfig(group_size=16, symmetric=True, only=["*.self_attn.*"]))
    folder = save_compressed(model, None, None, tmp_path / "attention")
    found = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    assert not list(expert_lists(found))
    assert relative_error(logits(found), logits(model)) < 1e-5


def test_two_steps_on_one_mixture():
    """The second finds blocks of which the first left nothing to do (a dense one), and half-done experts."""
    model = architecture_model("deepseek_v3")
    expected = logits(model)
    steps = parse_recipe("""
- {method: awq, bits: 8, group_size: 16, n_grid: 3, clip_grid: 4, skip: [lm_head, "*.experts.*.down_proj"]}
- {method: gptq, bits: 8, group_size: 16, only: ["*.experts.*.down_proj"]}
""")
    counts = []
    for step in steps:
        report = METHODS[step.method][1](model, step.config, Calibration(TOKENS))
        counts.append(len(report.layers))
    assert counts == [8 + 2 * (5 + 16 + 3), 16]
    change = (logits(model) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert change.median() < 0.03


def test_the_whole_job(tmp_path):
    """Opened from disk, compressed beside its original and round-to-nearest, written, opened again."""
    architecture_model("deepseek_v3", vocab_size=128).save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    (tmp_path / "text.txt").write_text(" ".join(f"word{(7 * i * i + i) % 126}" for i in range(400)))
    common = {
        "calibration_text": [tmp_path / "text.txt"],
        "text": [tmp_path / "text.txt"],
        "max_tokens": 200,
        "device": "cpu",
    }
    report = compress(
        tmp_path / "source",
        "awq",
        output=tmp_path / "out",
        group_size=16,
        symmetric=True,
        n_grid=4,
        calibration_samples=4,
        calibration_length=24,
        **common,
    )
    assert report.perplexity["compressed"] > 1 and report.few_tokens
    assert report.left_out == ("model.layers.1.mlp.gate", "model.layers.2.mlp.gate")
    assert any("experts saw few calibration tokens" in finding.text for finding in report.findings())
    found = load(tmp_path / "out")
    tokens = TOKENS[:1]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert relative_error(plain(tokens).logits, found(tokens).logits) < 1e-5


def test_true_sequential_observes_all_experts_at_once(monkeypatch):
    runs: list[list[str]] = []
    observe = CalibrationBlock.observe

    def counting(self, linears=None, **options):
        runs.append(list(linears))
        return observe(self, linears, **options)

    monkeypatch.setattr(CalibrationBlock, "observe", counting)
    config = gptq.GPTQConfig(bits=3, group_size=16, true_sequential=True)
    report = gptq.apply(architecture_model("qwen3_moe"), config, Calibration(TOKENS))
    assert [len(names) for names in runs] == [3, 1, 8, 4] * 2
    assert len(report.layers) == 32
    assert sum(layer.nmse for layer in report.layers) < 0.8 * sum(layer.loss_rtn for layer in report.layers)


def test_names_on_disk_are_the_checkpoints_own(tmp_path):
    model = architecture_model("mixtral")
    before = copy.deepcopy(model)
    before.save_pretrained(tmp_path / "before")
    rtn.apply(model, rtn.RTNConfig(group_size=16, symmetric=True, skip=[]))
    folder = save_compressed(model, None, None, tmp_path / "after")
    original = {name.removesuffix(".weight") for name in load_file(tmp_path / "before" / "model.safetensors")}
    packed = {
        name.removesuffix(".weight_packed")
        for name in load_file(folder / "model.safetensors")
        if name.endswith(".weight_packed")
    }
    assert packed < original and "model.layers.1.block_sparse_moe.experts.2.w3" in packed


def test_gptq_on_few_tokens_of_its_own_would_lose_to_rounding():
    """Why it takes all tokens of a layer for an expert with fewer than two per feature."""
    torch.manual_seed(0)
    size, spec = 128, QuantSpec(3, 32)
    channels = torch.linalg.qr(torch.randn(size, size))[0] * torch.arange(1, size + 1).float() ** -0.25
    own = channels @ torch.diag(torch.randn(size).div(2).exp())
    true, weight = own @ own.T, torch.randn(48, size)

    def error(gram: Tensor) -> float:
        return output_error(weight, gptq.gptq_quantize(weight, gram, spec).dequantize(torch.float32), true)

    rounded = output_error(weight, fake_quantize(weight, spec), true)
    few = torch.randn(size // 2, size) @ own.T
    many = torch.randn(8 * size, size) @ own.T
    layer = 0.9 * channels @ channels.T + 0.1 * true
    assert error(few.T @ few / len(few)) > rounded > error(layer)
    assert error(many.T @ many / len(many)) < error(layer)

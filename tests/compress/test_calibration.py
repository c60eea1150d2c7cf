import copy
import re

import pytest
import torch
from architectures import architecture_model
from tiny_models import (
    ARCHITECTURES,
    Block,
    BlockModel,
    HandingBlock,
    HandingModel,
    OnePlusNorm,
    tiny_model,
    tokens,
)
from torch import Tensor, nn

from tensormill.compress import awq, rtn
from tensormill.compress.block_calls import Handed
from tensormill.compress.calibration import (
    Calibration,
    GramAccumulator,
    inject_outliers,
    stream_blocks,
)
from tensormill.compress.experts import unfuse_experts
from tensormill.compress.structure import discover
from tensormill.errors import DataError, InvalidArgument, ModelError


class Letters:
    """A tokenizer: one token a character."""

    calls = 0

    def __call__(self, text: str, **_options) -> dict[str, list[int]]:
        self.calls += len(text)
        return {"input_ids": [ord(letter) for letter in text]}


def test_text_becomes_windows_of_the_asked_size():
    text = "abcdefghij" * 10
    windows = Calibration.from_text([text, text], Letters(), samples=4, length=25).tokens
    assert windows.shape == (4, 25)
    assert windows.dtype == torch.int64
    joined = (text + "\n\n" + text).encode()
    assert bytes(windows[0].tolist()) == joined[:25]
    assert bytes(windows[3].tolist()) == joined[150:175]


def test_long_text_is_sampled_from_all_over_without_tokenizing_it_whole():
    text = "".join(f"line {index:06d} of the text\n" for index in range(100_000))
    tokenizer = Letters()
    windows = Calibration.from_text(text, tokenizer, samples=32, length=64).tokens
    assert windows.shape == (32, 64)
    assert tokenizer.calls < len(text) / 10
    seen = [int(re.search(r"line (\d{6})", bytes(window.tolist()).decode())[1]) for window in windows]
    assert seen == sorted(seen)
    assert seen[0] < 4_000
    assert seen[-1] > 90_000


@pytest.mark.parametrize("text", ["", " \n\t", []])
def test_empty_text_is_refused(text):
    with pytest.raises(DataError, match="empty calibration text"):
        Calibration.from_text(text, Letters())


def test_short_text_says_how_much_is_missing():
    with pytest.raises(DataError, match=r"100 tokens, expected at least 160 \(4 samples x 40.*at most 2"):
        Calibration.from_text("a" * 100, Letters(), samples=4, length=40)


def test_bad_tokens_are_refused():
    with pytest.raises(DataError, match="non-empty int64"):
        Calibration(torch.zeros(0, 5, dtype=torch.int64))
    model = tiny_model("llama")
    structure = discover(model)
    with pytest.raises(DataError, match="at most the model's 128"):
        next(stream_blocks(model, structure, Calibration(tokens(1, 129))))
    with pytest.raises(DataError, match="model's own tokenizer"):
        next(stream_blocks(model, structure, Calibration(torch.full((1, 8), 97))))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2"])
@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_blocks_see_what_they_see_in_the_model(architecture, inputs, monkeypatch):
    monkeypatch.setattr("tensormill.compress.calibration._CHUNK_TOKENS", {"cpu": 3 * 24})
    model = tiny_model(architecture)
    batch = tokens(7)
    with torch.no_grad():
        expected = model(batch, output_hidden_states=True).hidden_states
    seen = []
    for block in stream_blocks(model, discover(model), Calibration(batch), inputs=inputs):
        seen.append(torch.cat(block.hidden))
        block.observe()
    assert [len(chunk) for chunk in block.hidden] == [3, 3, 1]
    assert len(seen) == 2
    for got, wanted in zip(seen, expected, strict=False):
        assert torch.allclose(got, wanted, atol=1e-5 * wanted.abs().max())


@pytest.mark.parametrize("architecture", ["glm_moe_dsa", "handing"])
@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_blocks_get_what_the_one_before_gives(architecture, inputs, monkeypatch):
    """In GLM-5, which tokens to attend to; over several chunks, of which no more than two blocks' are kept."""
    monkeypatch.setattr("tensormill.compress.calibration._CHUNK_TOKENS", {"cpu": 3 * 24})
    torch.manual_seed(0)
    handing = architecture == "handing"
    model = HandingModel(*(HandingBlock() for _ in range(4))) if handing else architecture_model(architecture)
    unfuse_experts(model)
    batch, seen = tokens(7), []
    structure = discover(model)
    blocks = [model.get_submodule(block.name) for block in structure.blocks]
    hooks = [block.register_forward_pre_hook(lambda _m, args: seen.append(args[0])) for block in blocks]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    held = []
    for wanted, block in zip(
        seen, stream_blocks(model, structure, Calibration(batch), inputs=inputs), strict=True
    ):
        assert torch.allclose(torch.cat(block.hidden), wanted, atol=1e-5 * wanted.abs().max())
        block.observe()
        given = [value for call in block.calls for value in [*call.args, *call.kwargs.values()]]
        held.append([value for value in given if isinstance(value, Handed)])
        assert all(handed.value is not None for handed in held[-1])
        assert all(handed.value is None for earlier in held[:-2] for handed in earlier)
    assert [len(handed) for handed in held] == [0, *[3] * (len(blocks) - 1)]


class InSinglePrecision(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.eye(x.shape[-1])


def chain(between) -> BlockModel:
    torch.manual_seed(0)
    return BlockModel(*(Block(nn.ReLU(), OnePlusNorm()) for _ in range(3)), between=between).eval()


OFFSET = torch.linspace(-1, 1, 32)


@pytest.mark.parametrize("between", [lambda x: x + OFFSET, lambda x: x.add_(OFFSET)])
@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_what_a_model_adds_between_its_blocks_is_seen(between, inputs):
    model, batch = chain(between), tokens(3)
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _module, args: seen.append(args[0].clone()))
    model(batch)
    expected = seen[:3]
    for wanted, block in zip(
        expected, stream_blocks(model, discover(model), Calibration(batch), inputs=inputs), strict=True
    ):
        assert torch.equal(torch.cat(block.hidden), wanted)
        block.observe()


def test_another_change_between_blocks_is_refused_where_inputs_matter():
    model = chain(lambda x: x / 2)
    with pytest.raises(ModelError, match=r"between blocks\.0 and blocks\.1 by more than adding"):
        awq.apply(model, awq.AWQConfig(group_size=16), Calibration(tokens()))
    assert len(rtn.apply(model, rtn.RTNConfig(group_size=16), None).layers) == 6
    single = chain(lambda x: x)
    single.blocks[1].activation = InSinglePrecision()
    with pytest.raises(ModelError, match=r"given blocks\.1, which fails on hidden states in float64"):
        discover(single)
    broken = chain(lambda x: x.missing)
    with pytest.raises(
        ModelError, match=r"fails outside of its blocks \(AttributeError: .*, expected one that"
    ):
        discover(broken)


def test_a_changed_block_feeds_the_next_only_if_asked():
    batch = Calibration(tokens(2))

    def second_input(inputs: str) -> torch.Tensor:
        model = tiny_model("llama")
        for block in stream_blocks(model, discover(model), batch, inputs=inputs):
            before = torch.cat(block.hidden)
            block.observe()
            block.module.mlp.down_proj.weight.data.mul_(1.5)
        return before

    assert not torch.allclose(second_input("original"), second_input("compressed"))


def test_statistics_are_those_of_the_inputs():
    model = tiny_model("llama")
    inputs: dict[str, list[torch.Tensor]] = {}
    names = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]
    layer = model.model.layers[1]
    for name in names:
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: inputs.setdefault(name, []).append(args[0])
        )
    batch = tokens(5)
    with torch.no_grad():
        model(batch)
    expected = {name: torch.cat(values).flatten(0, 1).double() for name, values in inputs.items()}
    *_, block = stream_blocks(model, discover(model), Calibration(batch), inputs="compressed")
    found = block.observe()
    assert found["self_attn.q_proj"] is found["self_attn.v_proj"]
    for name in names:
        x = expected[name]
        assert found[name].tokens == len(x) == 5 * 24
        assert torch.allclose(found[name].gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        assert torch.allclose(found[name].mean_abs.double(), x.abs().mean(0), rtol=1e-5)
        assert torch.allclose(found[name].second_moment.double(), x.square().mean(0), rtol=1e-5)
    scale = torch.rand(64) + 0.5
    divided = found["self_attn.q_proj"]
    divided.divide(scale)
    x = expected["self_attn.q_proj"] / scale
    assert torch.allclose(divided.gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_observing_some_layers_stops_after_them():
    model = tiny_model("llama")
    block = next(stream_blocks(model, discover(model), Calibration(tokens()), inputs="compressed"))
    runs = []
    block.module.mlp.register_forward_hook(lambda *_: runs.append(1))
    found = block.observe(["self_attn.o_proj"])
    assert found.keys() == {"self_attn.o_proj"}
    assert not runs
    assert block.outputs is None


def test_modules_inputs_can_be_kept(monkeypatch):
    monkeypatch.setattr("tensormill.compress.calibration._CHUNK_TOKENS", {"cpu": 2 * 24})
    model = tiny_model("llama")
    block = next(stream_blocks(model, discover(model), Calibration(tokens(6)), inputs="compressed"))
    block.observe(capture=["self_attn", "mlp"], capture_samples=3)
    assert [len(call.args[0]) for call in block.captured["mlp"]] == [2, 2]
    attention = block.captured["self_attn"][0]
    with torch.no_grad():
        output = block.module.self_attn(*attention.args, **attention.kwargs)[0]
    assert output.shape == (2, 24, 64)


@pytest.mark.parametrize("features", [1, 100, 385, 800])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_matrices_are_exact_in_float32(features, dtype):
    generator = torch.Generator().manual_seed(0)
    chunks = [torch.randn(50, features, generator=generator).to(dtype) for _ in range(3)]
    accumulator = GramAccumulator(features, torch.device("cpu"))
    for chunk in chunks:
        accumulator.add(chunk)
    x = torch.cat(chunks).double()
    found = accumulator.finish()
    expected = x.T @ x / len(x)
    assert torch.equal(found.gram, found.gram.T)
    # 16-bit inputs take a faster product, which must not round: 1e-6 is float32's sum, bfloat16's is 1e-3.
    assert (found.gram.double() - expected).norm() < 1e-6 * expected.norm()
    assert torch.get_float32_matmul_precision() == "highest"


def test_nan_in_an_activation_names_the_layer():
    model = tiny_model("llama")
    structure = discover(model)
    model.model.layers[1].self_attn.o_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(InvalidArgument, match=r"input of model\.layers\.1\.mlp\.gate_proj and model"):
        [block.observe() for block in stream_blocks(model, structure, Calibration(tokens()))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mixture", [False, True])
def test_injected_outliers_change_activations_but_not_the_function(architecture, mixture):
    model = tiny_model(architecture, dtype=torch.float64)
    with torch.no_grad():
        before = model(tokens()).logits
    injected = copy.deepcopy(model)
    changed = inject_outliers(injected, 0.02, 64.0 if mixture else (32.0, 64.0), seed=3, mixture=mixture)
    assert len(changed) == (2 if mixture else 4)
    with torch.no_grad():
        after = injected(tokens()).logits
    assert (after - before).norm() / before.norm() < 1e-10
    reader = {"opt": "self_attn.out_proj"}.get(architecture, "self_attn.o_proj") if mixture else None
    reader = reader or "self_attn.q_proj"

    def gram(which) -> torch.Tensor:
        block = next(stream_blocks(which, discover(which), Calibration(tokens(16)), inputs="compressed"))
        return block.observe()[reader].gram

    old, new = gram(model), gram(injected)

    def channel_outlier(gram: torch.Tensor) -> float:
        return (gram.diagonal().max() / gram.diagonal().median()).item() ** 0.5

    def direction_outlier(gram: torch.Tensor) -> float:
        values = torch.linalg.eigvalsh(gram)
        return (values[-1] / values.median()).item() ** 0.5

    if mixture:
        # One direction a head stands out, but no channel more than by chance.
        assert direction_outlier(new) > 8 * direction_outlier(old)
        assert channel_outlier(new) < 5
    else:
        assert channel_outlier(new) > 8 * channel_outlier(old)


def test_injection_is_deterministic_and_bounded():
    first, second = tiny_model("llama"), tiny_model("llama")
    inject_outliers(first, seed=1)
    inject_outliers(second, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    for arguments in ({"fraction": 0.0}, {"factor": 0.5}, {"factor": (64.0, 8.0)}):
        with pytest.raises(InvalidArgument, match="expected a fraction"):
            inject_outliers(first, **arguments)


def test_injection_into_a_model_without_norms_is_refused():
    from tiny_models import Block, BlockModel

    bare = BlockModel(Block(torch.nn.GELU(), torch.nn.Identity()))
    with pytest.raises(ModelError, match="no norms that feed linear layers"):
        inject_outliers(bare)

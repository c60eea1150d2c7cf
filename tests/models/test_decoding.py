"""Prepared decoders say what transformers says, token by token, and the runner's paths agree."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tensormill.compress import rtn
from tensormill.compress.checkpoint import open_model
from tensormill.errors import InvalidArgument, ModelError
from tensormill.models.decoding import (
    GreedyRunner,
    PlainDecoder,
    compare_decoding,
    dense_copy,
    greedy_tokens,
    prepare_for_decoding,
    random_llama,
    stream_greedy,
    why_not_prepared,
)
from tensormill.models.decoding.report import DecodingReport
from tensormill.models.decoding.speed import model_bytes, weight_bytes
from tensormill.models.decoding.stacking import Side, stacked
from tensormill.models.decoding.synthetic import Shape
from tensormill.ops.linear_wna16.module import LinearWNA16

VOCABULARY = 89
SMALL = Shape(hidden_size=64, intermediate_size=96, layers=3, heads=4, kv_heads=2, vocabulary=VOCABULARY)


def tiny(kind: str = "llama", **options) -> nn.Module:
    """Two layers of 48 channels with every weight away from its initial value."""
    import transformers

    names = {
        "llama": "LlamaConfig",
        "mistral": "MistralConfig",
        "qwen2": "Qwen2Config",
        "qwen3": "Qwen3Config",
    }
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
        **options,
    }
    if kind == "mistral":
        sizes.setdefault("sliding_window", None)
    torch.manual_seed(len(kind))
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, names[kind])(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            grown = parameter + 0.3 * torch.randn_like(parameter) if parameter.dim() == 1 else 8 * parameter
            parameter.copy_(grown)
    return model.eval()


def prompt(batch: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def generated(model: nn.Module, tokens: torch.Tensor, count: int, **options) -> torch.Tensor:
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        **options,
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_says_what_transformers_says(kind, tied):
    model = tiny(kind, tie_word_embeddings=tied)
    tokens = prompt(3, 9)
    with torch.no_grad():
        expected = model(tokens).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = generated(model, tokens, 20)
    decoder = prepare_for_decoding(model)
    for made in (decoder, PlainDecoder(model)):
        runner = GreedyRunner(made, 3, 29)
        torch.testing.assert_close(runner.prefill(tokens), expected[:, -1], rtol=1e-4, atol=1e-4)
        runner.decode(19)
        assert torch.equal(runner.tokens(), wanted)
        runner.prefill(tokens[:, :4])  # a second prompt, shorter than what the cache still holds
        runner.decode(5)
        assert torch.equal(runner.tokens(), generated(model, tokens[:, :4], 6))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_longer_rotary_embedding():
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = tiny(rope_parameters=scaled)
    assert torch.equal(greedy_tokens(model, prompt(), 40), generated(model, prompt(), 40))


def test_the_step_under_a_mask_is_the_step_over_what_is_there():
    decoder = prepare_for_decoding(tiny())
    tokens, cache = prompt(2, 11), decoder.new_cache(2, 40)
    decoder.prefill(tokens, cache)
    arguments = (tokens[:, :1], torch.tensor([11]), cache)
    torch.testing.assert_close(decoder.step(*arguments), decoder.step(*arguments, 12), rtol=1e-5, atol=1e-5)


def test_low_bit_weights_in_sixteen_bits():
    """Logits, not tokens: another number of tokens at a time is another order of sums, which may decide a tie."""
    model = random_llama(SMALL, bits=4, group_size=32, dtype=torch.bfloat16)
    tokens = generated(model, prompt(2, 8), 12)
    with torch.no_grad():
        expected = model(tokens).logits[:, 7:19].float()
    for decoder in (PlainDecoder(model), prepare_for_decoding(model)):
        cache = decoder.new_cache(2, 20)
        logits = [decoder.prefill(tokens[:, :8], cache)]
        for position in range(8, 19):
            step = (tokens[:, position : position + 1], torch.tensor([position]), cache, position + 1)
            logits.append(decoder.step(*step))
        error = (torch.stack(logits, 1).float() - expected).norm() / expected.norm()
        assert error < 2e-2


def test_the_built_in_model_after_rounding():
    model, _ = open_model("builtin:python-lm", dtype=torch.float32)
    rtn.apply(model, rtn.RTNConfig(bits=4))
    tokens = torch.randint(0, 4096, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(greedy_tokens(model, tokens, 24), generated(model, tokens, 24))


def test_stream_ends_at_a_stop_and_penalizes_repetition():
    model = tiny()
    tokens = prompt(1, 6)
    for penalty in (1.0, 1.3):
        wanted = generated(model, tokens, 15, repetition_penalty=penalty)[0, 6:].tolist()
        assert list(stream_greedy(model, tokens[0], 15, repetition_penalty=penalty)) == wanted
        stop = wanted[4]
        cut = list(stream_greedy(model, tokens[0], 15, stop=[stop], repetition_penalty=penalty))
        assert cut == wanted[: wanted.index(stop) + 1]
    assert list(stream_greedy(model, tokens[0], 1)) == generated(model, tokens, 1)[0, 6:].tolist()


@pytest.mark.parametrize("bias", [False, True])
def test_stacked_weights_are_the_parts_own(bias):
    parts = [nn.Linear(32, rows, bias=bias) for rows in (5, 3, 7)]
    expected = torch.cat([part.weight.detach().clone() for part in parts])
    whole = stacked(parts)
    assert torch.equal(whole.weight, expected)
    parts[1].weight.data.fill_(2.0)  # no copy: what the part holds, the stack holds
    assert (whole.weight[5:8] == 2).all()
    assert not any(parameter.requires_grad for parameter in whole.parameters())


@pytest.mark.parametrize("symmetric", [False, True])
def test_stacked_codes_are_the_parts_own(symmetric):
    def part(rows: int, bits: int = 3) -> LinearWNA16:
        zero = None if symmetric else torch.randint(0, 8, (rows, 4), dtype=torch.uint8)
        codes = torch.randint(0, 1 << bits, (rows, 64), dtype=torch.uint8)
        return LinearWNA16.from_codes(codes, torch.rand(rows, 4), zero, bits=bits, group_size=16)

    parts = [part(5), part(3), part(7)]
    x = torch.randn(2, 64)
    expected = torch.cat([one(x) for one in parts], dim=-1)
    whole = stacked(parts)
    assert isinstance(whole, LinearWNA16)
    assert torch.equal(whole(x), expected)
    assert (
        parts[2].weight_packed.untyped_storage().data_ptr()
        == whole.weight_packed.untyped_storage().data_ptr()
    )
    assert torch.equal(torch.cat([one(x) for one in parts], dim=-1), expected)


@pytest.mark.parametrize("rows", [(64, 128), (64, 32)])
def test_tiled_weights_are_stacked_by_blocks_of_rows(rows):
    parts = [
        LinearWNA16.from_codes(
            torch.randint(0, 16, (count, 96), dtype=torch.uint8),
            torch.rand(count, 3),
            torch.randint(0, 16, (count, 3), dtype=torch.uint8),
            bits=4,
            group_size=32,
        )
        for count in rows
    ]
    x = torch.randn(2, 96)
    expected = torch.cat([part(x) for part in parts], dim=-1)
    before = [part.weight_packed.clone() for part in parts]
    for part in parts:
        part.to_layout("tiled")
    whole = stacked(parts)
    assert isinstance(whole, Side if rows[1] % 64 else LinearWNA16)
    torch.testing.assert_close(whole(x), expected, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(part.weight_packed, codes) for part, codes in zip(parts, before, strict=True))


def test_what_can_not_be_stacked_stays_apart():
    packed = LinearWNA16.from_codes(
        torch.randint(0, 8, (4, 32), dtype=torch.uint8), torch.rand(4, 2), None, bits=3, group_size=16
    )
    dense = nn.Linear(32, 6, bias=False)
    whole = stacked([packed, dense])
    assert isinstance(whole, Side)
    x = torch.randn(3, 32)
    assert torch.equal(whole(x), torch.cat([packed(x), dense(x)], dim=-1))
    assert isinstance(stacked([dense, nn.Linear(32, 6, bias=True)]), Side)


def test_prepared_models_are_written_as_before(tmp_path):
    from safetensors.torch import load_file, save_file

    model = random_llama(SMALL, bits=4, group_size=32, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepare_for_decoding(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model_bytes(model) == sum(
        t.numel() * t.element_size() for t in (*before.values(), *buffers(model))
    )


def buffers(model: nn.Module) -> list[torch.Tensor]:
    """The buffers that a state dict leaves out."""
    return [tensor for name, tensor in model.named_buffers() if name not in model.state_dict()]


def test_refusals():
    import transformers

    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11))
    assert "gpt2" in why_not_prepared(gpt2)
    with pytest.raises(ModelError, match="PlainDecoder"):
        prepare_for_decoding(gpt2)
    assert "sliding" in why_not_prepared(tiny("mistral", sliding_window=16))
    assert "gelu" in why_not_prepared(tiny(hidden_act="gelu"))
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "dynamic" in why_not_prepared(tiny(rope_parameters=dynamic))
    with pytest.raises(ModelError, match="past_key_values"):
        PlainDecoder(nn.Linear(3, 3))
    runner = GreedyRunner(prepare_for_decoding(tiny()), 2, 10)
    with pytest.raises(InvalidArgument, match="1 to 9"):
        runner.prefill(prompt(2, 10))
    runner.prefill(prompt(2, 7))
    with pytest.raises(InvalidArgument, match="at most 10"):
        runner.decode(3)
    with pytest.raises(InvalidArgument, match="capacity"):
        GreedyRunner(runner.decoder, 1, 1)
    with pytest.raises(InvalidArgument, match="GPU"):
        GreedyRunner(runner.decoder, 1, 8, graph=True)
    with pytest.raises(InvalidArgument, match="llama-8b"):
        random_llama("llama-9b")
    with pytest.raises(InvalidArgument, match="group_size"):
        random_llama(SMALL, bits=4, group_size=128)
    with pytest.raises(InvalidArgument, match="new tokens"):
        greedy_tokens(tiny(), prompt(), 0)


def test_other_architectures_run_as_they_are():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.GPTNeoXForCausalLM(config).eval()
    assert torch.equal(greedy_tokens(model, prompt(), 9), generated(model, prompt(), 9))


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False)])
def test_a_dense_copy_says_the_same(bits, symmetric):
    model = random_llama(SMALL, bits=bits, group_size=32, symmetric=symmetric, dtype=torch.float32)
    copy = dense_copy(model)
    kinds = [type(module) for module in copy.modules()]
    assert LinearWNA16 not in kinds
    assert copy.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert torch.equal(greedy_tokens(copy, prompt(), 10), greedy_tokens(model, prompt(), 10))
    half = dense_copy(model, torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half(prompt()).logits.isfinite().all()
    # Codes, scales and zero points of blocks, and 32-bit norms and outer layers, against 32 bits for all of it.
    assert model_bytes(model) < model_bytes(copy) / 2
    assert weight_bytes(copy) == model_bytes(copy) - VOCABULARY * 64 * 4


def test_speeds_side_by_side():
    model = random_llama(SMALL, bits=4, group_size=32, dtype=torch.float32)
    dense = dense_copy(model)
    seen = []
    decoders = {"low-bit": prepare_for_decoding(model), "dense": PlainDecoder(dense)}
    rows = compare_decoding(
        decoders,
        batches=(1, 2),
        prompt_tokens=(5,),
        new_tokens=3,
        repeats=2,
        bandwidth=1e10,
        progress=lambda message, share: seen.append(share),
    )
    assert [(row.name, row.path, row.batch) for row in rows] == [
        ("low-bit", "prepared", 1), ("dense", "plain", 1), ("low-bit", "prepared", 2), ("dense", "plain", 2),
    ]  # fmt: skip
    for row in rows:
        assert row.decode == pytest.approx(row.batch / row.step_seconds)
        assert row.decode_spread[0] <= row.decode <= row.decode_spread[1]
        assert row.limit == pytest.approx(row.batch * 1e10 / (row.weight_bytes + row.cache_bytes))
        # keys and values of three layers and two heads of 16, for the prompt, the first token and half of the rest
        assert row.cache_bytes == 2 * 3 * row.batch * 2 * 16 * 7 * 4
        assert not row.captured and row.note is None and row.peak_memory_bytes is None
    assert rows[0].weight_bytes < rows[1].weight_bytes
    assert seen == sorted(seen) and seen[0] >= 0 and seen[-1] <= 1

    report = DecodingReport("random", rows, {"device": "here"}, 1e10)
    document = json.loads(json.dumps(report.to_dict()))
    assert document["rows"][0]["faster_than"] == {
        "dense plain": pytest.approx(rows[0].decode / rows[1].decode)
    }
    page = report.to_html()
    assert "<svg" in page and "dense plain" in page and "batch size" in page
    with pytest.raises(InvalidArgument, match="repeats"):
        compare_decoding(decoders, repeats=0)
    with pytest.raises(InvalidArgument, match="context"):
        compare_decoding({"tiny": PlainDecoder(tiny())}, prompt_tokens=(250,), new_tokens=10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("make", [PlainDecoder, prepare_for_decoding])
def test_replayed_steps_say_what_transformers_says(bits, make):
    model, _ = open_model("builtin:python-lm", dtype=torch.float32, device="cuda")
    if bits is not None:
        rtn.apply(model, rtn.RTNConfig(bits=bits))
    tokens = torch.randint(0, 4096, (3, 33), generator=torch.Generator().manual_seed(1)).cuda()
    wanted = generated(model, tokens, 48)
    runner = GreedyRunner(make(model), 3, 81)
    assert runner.captured, runner.why_not_captured
    for _ in range(2):
        runner.prefill(tokens)
        runner.decode(47)
        assert torch.equal(runner.tokens(), wanted)

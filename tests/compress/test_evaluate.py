"""Perplexity, bytes, divergence, intervals, sizes and speed against direct computations."""

import gc
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tensormill.compress import evaluate as ev
from tensormill.compress import footprint, speed
from tensormill.compress import text as text_module
from tensormill.data import real_data_dir
from tensormill.errors import CheckpointError, DataError, InvalidArgument, ModelError, TensormillError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

VOCABULARY = 320
SAMPLE = "def naïve(x):\n    return x + '☃🙂'\n\nclass Ünit:\n    pass\n" * 12


def real_model_folder() -> Path:
    root = real_data_dir()
    if root is None or not (root / "tinyllamas" / "stories260K").is_dir():
        pytest.skip("tinyllamas/stories260K is absent: set TENSORMILL_DATA to the folder of real data")
    return root / "tinyllamas"


def tiny_llama(seed=0, *, dtype=torch.float32, positions=64, vocab_size=VOCABULARY, **options):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.3,  # far from uniform predictions
        **options,
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def tiny_model(family):
    torch.manual_seed(1)
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "llama":
        return tiny_llama()
    if family == "gemma2":  # soft-capped logits: something happens after the head
        config = transformers.Gemma2Config(
            **common,
            intermediate_size=48,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            final_logit_softcapping=2.0,
            initializer_range=0.5,
        )
        return transformers.Gemma2ForCausalLM(config).eval()
    if family == "opt":
        config = transformers.OPTConfig(
            **common, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64, init_std=0.3
        )
        return transformers.OPTForCausalLM(config).eval()
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
        )
        return transformers.GPT2LMHeadModel(config).eval()
    raise AssertionError(family)


class Unsplittable(nn.Module):
    """A language model without an inner model: the evaluation has to run it whole."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, use_cache=False):
        return self.inner(input_ids=input_ids, use_cache=use_cache)


class TamperingModel(transformers.LlamaForCausalLM):
    """Its logits depend on the whole sequence after the inner model, so that slices would be wrong."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits.mean(dim=1, keepdim=True)
        return output


def byte_level_tokenizer(*, merges=True, add_prefix_space=False, trim_offsets=True, bos=None):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    core.decoder = decoders.ByteLevel()
    special = [bos] if bos else []
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY if merges else 256 + len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    core.train_from_iterator([SAMPLE], trainer)
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small run fastest on one thread, most of all where other processes use the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


def direct_window_nll(model, windows):
    """Mean loss per window in float64 with nothing but softmax and indexing."""
    model = model.double()
    losses = []
    for window in windows:
        logits = model(input_ids=window[None]).logits[0].double()
        probabilities = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
        picked = [probabilities[i, window[i + 1]] for i in range(len(window) - 1)]
        losses.append(-torch.stack(picked).log().mean())
    return torch.stack(losses)


# The float32 logits of two small layers differ from float64 by about 1e-6 of their size (a few units).
FLOAT32 = 2e-5


@torch.no_grad()
def test_perplexity_equals_direct_computation(tokenizer):
    model = tiny_llama()
    result = ev.evaluate(model, tokenizer, SAMPLE, window=32)
    ids = torch.tensor(tokenizer(SAMPLE)["input_ids"])
    count = len(ids) // 32
    expected = direct_window_nll(model, ids[: count * 32].view(count, 32))
    assert result.windows == count > 3
    assert result.tokens == count * 31
    torch.testing.assert_close(result.window_nll, expected, rtol=FLOAT32, atol=FLOAT32)
    assert result.perplexity == pytest.approx(float(expected.mean().exp()), rel=1e-4)
    # A planted error of the kind this must catch: one window left out.
    assert abs(float(expected[:-1].mean() - expected.mean())) > FLOAT32 * 10


@torch.no_grad()
def test_bits_per_byte_equals_direct_computation(tokenizer):
    model = tiny_llama()
    result = ev.evaluate(model, tokenizer, SAMPLE, window=16)
    ids = torch.tensor(tokenizer(SAMPLE)["input_ids"])
    windows = ids[: len(ids) // 16 * 16].view(-1, 16)
    # Bytes of a byte-level token: one per character of its piece.
    scored = sum(len(piece) for row in windows for piece in tokenizer.convert_ids_to_tokens(row[1:].tolist()))
    assert result.bytes == scored
    nats = direct_window_nll(model, windows).sum() * 15
    assert result.bits_per_byte == pytest.approx(float(nats) / math.log(2) / scored, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_uniform_logits_give_the_vocabulary(tokenizer, dtype):
    model = tiny_llama(dtype=dtype)
    nn.init.zeros_(model.lm_head.weight)
    result = ev.evaluate(model, tokenizer, SAMPLE, window=32)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(
        math.log2(VOCABULARY) * result.tokens / result.bytes, rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_agrees_with_itself(tokenizer, dtype):
    model = tiny_llama(dtype=dtype)
    ids = text_module.tokenize_text(tokenizer, SAMPLE).ids
    result = ev.compare(model, model, ids, window=32)
    assert result.kl == 0
    assert result.top1_agreement == 1


@torch.no_grad()
def test_divergence_equals_direct_formula(tokenizer):
    original, other = tiny_llama(0), tiny_llama(0)
    generator = torch.Generator().manual_seed(2)
    for parameter in other.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    other.lm_head.weight *= 1.5
    ids = text_module.tokenize_text(tokenizer, SAMPLE).ids
    result = ev.compare(original, other, ids, window=32)
    windows = text_module.split_windows(ids, 32)
    p = original.double()(input_ids=windows).logits[:, :-1].softmax(-1)
    q = other.double()(input_ids=windows).logits[:, :-1].softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert result.tokens == kl.numel()
    assert result.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    torch.testing.assert_close(result.window_kl, kl.mean(1), rtol=1e-3, atol=1e-7)
    assert result.top1_agreement == pytest.approx(
        float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-9
    )
    reverse = (q * (q / p).log()).sum(-1).mean()
    assert abs(float(reverse) - result.kl) > 1e-2 * result.kl  # the direction matters and is told apart


def test_ruled_out_tokens_add_nothing_to_the_divergence():
    score = ev.Score(torch.zeros(1), torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    original = torch.tensor([[[0.5, 0.5, 0.0]]]).log()
    ev._add_divergence(score, slice(0, 1), original, original)
    assert score.kl.item() == 0
    ev._add_divergence(score, slice(0, 1), original, torch.tensor([[[1.0, 0.0, 0.0]]]).log())
    assert score.kl.item() == math.inf


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2"])
def test_every_family_splits_and_slices_change_nothing(family, tokenizer, monkeypatch):
    model = tiny_model(family)
    ids = text_module.tokenize_text(tokenizer, SAMPLE).ids
    with torch.no_grad():
        split = ev._SplitModel(model, ids[None, :8])
    assert split.body is not None
    whole = ev.evaluate(Unsplittable(model), tokenizer, SAMPLE, window=64)
    monkeypatch.setattr(ev, "_LOGITS_BUDGET_BYTES", 4 * 3 * VOCABULARY * 5)  # five positions at a time
    sliced = ev.evaluate(model, tokenizer, SAMPLE, window=64, batch_size=1)
    torch.testing.assert_close(sliced.window_nll, whole.window_nll, rtol=FLOAT32, atol=FLOAT32)
    assert "forward" not in model.base_model.__dict__  # left as it was


def test_logits_stay_small(tokenizer, monkeypatch):
    model = tiny_llama()
    sizes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[1]))
    monkeypatch.setattr(ev, "_LOGITS_BUDGET_BYTES", 4 * 3 * VOCABULARY * 4)
    ev.evaluate(model, tokenizer, SAMPLE, window=64, batch_size=1)
    sizes = sizes[4:]  # the first four are the check of the split
    windows = len(tokenizer(SAMPLE)["input_ids"]) // 64
    assert max(sizes) == 4 and sum(sizes) == windows * (63 + 1)


def test_a_model_that_does_not_split_is_run_whole(tokenizer, monkeypatch):
    model = TamperingModel(tiny_llama().config).eval()
    ids = text_module.tokenize_text(tokenizer, SAMPLE).ids
    with torch.no_grad():
        assert ev._SplitModel(model, ids[None, :8]).body is None
    monkeypatch.setattr(ev, "_LOGITS_BUDGET_BYTES", 4 * 3 * VOCABULARY * 5)
    result = ev.evaluate(model, tokenizer, SAMPLE, window=32)
    expected = ev.evaluate(Unsplittable(model), tokenizer, SAMPLE, window=32)
    torch.testing.assert_close(result.window_nll, expected.window_nll, rtol=FLOAT32, atol=FLOAT32)


def test_batches_and_models_together_change_nothing(tokenizer):
    models = {"other": tiny_llama(1), "original": tiny_llama(0)}
    together = ev.evaluate_models(models, tokenizer, SAMPLE, reference="original", window=32, batch_size=3)
    assert list(together) == ["other", "original"]
    assert together["original"].comparison is None
    for name, model in models.items():
        alone = ev.evaluate(model, tokenizer, SAMPLE, window=32, batch_size=1)
        torch.testing.assert_close(together[name].window_nll, alone.window_nll, rtol=FLOAT32, atol=FLOAT32)
    ids = text_module.tokenize_text(tokenizer, SAMPLE).ids
    pair = ev.compare(models["original"], models["other"], ids, window=32)
    assert together["other"].comparison.kl == pytest.approx(pair.kl, rel=1e-5)
    assert together["other"].comparison.top1_agreement == pair.top1_agreement


def test_modes_and_progress_are_as_they_should_be(tokenizer):
    model = tiny_llama(attention_dropout=0.5).train()
    model.lm_head.eval()
    calls = []
    first = ev.evaluate(
        model, tokenizer, SAMPLE, window=32, batch_size=2, progress=lambda text, done: calls.append(done)
    )
    assert model.training and not model.lm_head.training
    assert calls[0] == 0 and calls[-1] == 1 and calls == sorted(calls)
    assert torch.equal(
        first.window_nll, ev.evaluate(model, tokenizer, SAMPLE, window=32, batch_size=2).window_nll
    )
    assert not first.window_nll.requires_grad


def test_broken_models_give_nan_not_an_error(tokenizer):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    result = ev.evaluate(model, tokenizer, SAMPLE, window=32)
    assert math.isnan(result.perplexity) and math.isnan(result.bits_per_byte)


@given(tokens=st.integers(2, 60), window=st.integers(2, 70))
def test_windows_are_exact(tokens, window):
    ids = torch.arange(tokens)
    rows = text_module.split_windows(ids, window)
    length = min(tokens, window)
    assert rows.shape == (max(1, tokens // window), length)
    assert torch.equal(rows.flatten(), ids[: rows.numel()])
    assert tokens - rows.numel() < length


def test_windows_follow_text_context_and_limit(tokenizer):
    model = tiny_llama(positions=48)
    total = len(tokenizer(SAMPLE)["input_ids"])
    result = ev.evaluate(model, tokenizer, SAMPLE)  # 2048 asked for, the context is 48
    assert (result.window, result.windows) == (48, total // 48)
    limited = ev.evaluate(model, tokenizer, SAMPLE, max_tokens=100)
    assert (limited.window, limited.windows, limited.tokens) == (48, 2, 94)
    short = ev.evaluate(model, tokenizer, "a b c")
    assert (short.window, short.windows) == (len(tokenizer("a b c")["input_ids"]), 1)
    short = ev.evaluate(model, tokenizer, SAMPLE, max_tokens=20)
    assert (short.window, short.windows) == (20, 1)


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_byte_counts_are_exact_on_any_text(text):
    tokenizer = _CACHE.setdefault("plain", byte_level_tokenizer())
    tokenized = text_module.tokenize_text(tokenizer, text)
    assert tokenized.byte_rule == "pieces"
    pieces = tokenizer.convert_ids_to_tokens(tokenized.ids.tolist())
    assert tokenized.byte_counts.tolist() == [len(piece) for piece in pieces]
    assert int(tokenized.byte_counts.sum()) == len(text.encode())


_CACHE: dict[str, object] = {}


@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_offsets_account_for_every_byte(text):
    tokenizer = _CACHE.setdefault("untrimmed", byte_level_tokenizer(trim_offsets=False))
    encoded = tokenizer(text, return_offsets_mapping=True)
    counts = text_module._bytes_by_offsets(text, encoded["offset_mapping"])
    assert sum(counts) == len(text.encode())
    assert min(counts) >= 0
    estimated = text_module._bytes_by_decoding(
        tokenizer, encoded["input_ids"], [False] * len(counts), len(text.encode())
    )
    assert sum(estimated) == len(text.encode())


def test_a_character_cut_in_pieces_shares_its_bytes():
    tokenizer = byte_level_tokenizer(merges=False)
    encoded = tokenizer("a☃é", return_offsets_mapping=True)
    assert text_module._bytes_by_offsets("a☃é", encoded["offset_mapping"]) == [1] * 6


@pytest.mark.parametrize("trim", [True, False])
def test_special_and_prefixed_tokens_stand_for_no_bytes(trim):
    with_bos = text_module.tokenize_text(byte_level_tokenizer(bos="<s>"), SAMPLE)
    assert with_bos.byte_counts[0] == 0 and int(with_bos.byte_counts.sum()) == len(SAMPLE.encode())
    prefixed = text_module.tokenize_text(
        byte_level_tokenizer(add_prefix_space=True, trim_offsets=trim), SAMPLE
    )
    assert prefixed.byte_rule == "pieces" and int(prefixed.byte_counts.sum()) == len(SAMPLE.encode())


def test_a_special_token_written_in_the_text_counts_its_bytes():
    text = "def f():<s>\n    pass"
    tokenized = text_module.tokenize_text(byte_level_tokenizer(bos="<s>"), text)
    assert tokenized.byte_rule == "pieces" and int(tokenized.byte_counts.sum()) == len(text.encode())
    assert (tokenized.ids == 0).sum() == 2


def test_a_tokenizer_that_changes_the_text_falls_back_to_offsets():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = {word: i for i, word in enumerate(["<unk>", "the", "cafe", "is", "shut"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    tokenized = text_module.tokenize_text(tokenizer, "The Café  is shut")
    assert tokenized.byte_rule == "offsets"
    assert tokenized.byte_counts.tolist() == [3, 6, 4, 5]  # each with the spaces before it; é has two bytes


def test_several_texts_are_one_with_an_empty_line_between():
    assert (
        text_module.join_texts(["a", "b"])
        == text_module.join_texts({"x": "a", "y": "b"})
        == text_module.join_texts("a\n\nb")
    )
    assert text_module.text_sha256(["a", "b"]) == text_module.text_sha256("a\n\nb")
    assert (
        text_module.text_sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_files_are_read_as_they_are(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_bytes("zwei\r\nZeilen ☃".encode())
    second.write_bytes(b"more")
    assert text_module.read_texts([first, str(second)]) == {
        str(first): "zwei\r\nZeilen ☃",
        str(second): "more",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"ok \xff\xfe", "not UTF-8 at byte 3"),
    ],
)
def test_unusable_files_are_refused(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        text_module.read_texts([path])
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_unusable_texts_are_refused(tmp_path, tokenizer):
    model = tiny_llama()
    with pytest.raises(DataError, match="directory"):
        text_module.read_texts([tmp_path])
    with pytest.raises(DataError, match="at least one path"):
        text_module.read_texts([])
    for empty in ("", " \n", [], {}, ["", ""]):
        with pytest.raises(DataError, match="empty"):
            ev.evaluate(model, tokenizer, empty)
    with pytest.raises(DataError, match="surrogate"):
        ev.evaluate(model, tokenizer, "a\udc80b")
    with pytest.raises(DataError, match="at least 2"):
        ev.evaluate(model, tokenizer, "a")
    with pytest.raises(DataError, match="belongs to the model"):
        ev.evaluate(tiny_llama(vocab_size=40), tokenizer, SAMPLE)


@pytest.mark.parametrize(
    "options", [{"window": 1}, {"max_tokens": 1}, {"batch_size": 0}, {"window": 0}], ids=lambda o: str(o)
)
def test_settings_out_of_range_are_refused(tokenizer, options):
    with pytest.raises(InvalidArgument):
        ev.evaluate(tiny_llama(), tokenizer, SAMPLE, **options)


def test_comparisons_that_make_no_sense_are_refused(tokenizer):
    model = tiny_llama()
    with pytest.raises(InvalidArgument, match="reference"):
        ev.evaluate_models({"a": model}, tokenizer, SAMPLE, reference="b")
    with pytest.raises(InvalidArgument, match="model"):
        ev.evaluate_models({}, tokenizer, SAMPLE)
    with pytest.raises(InvalidArgument, match="int64"):
        ev.compare(model, model, torch.zeros(8))
    with pytest.raises(DataError):
        ev.compare(model, model, torch.zeros(0, 8, dtype=torch.long))
    with pytest.raises(InvalidArgument, match="vocabularies"):
        ev.compare(model, tiny_llama(vocab_size=VOCABULARY + 8), torch.arange(16))


@pytest.mark.parametrize("statistic", ["nll", "perplexity"])
def test_bootstrap_interval_covers_the_truth(statistic):
    """Known difference, shared window difficulty: a 90 % interval holds it in about 90 % of trials."""
    generator = torch.Generator().manual_seed(0)
    trials, windows, gap = 200, 40, 0.05
    population = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    truth = gap
    if statistic == "perplexity":
        truth = math.exp(2 + gap) - math.exp(2)
    held = 0
    for trial in range(trials):
        shared, own = population[:, trial * windows : (trial + 1) * windows]
        base = 2 + 0.02 * shared
        interval = ev.paired_bootstrap(
            base + gap + 0.1 * own, base, statistic=statistic, confidence=0.9, resamples=500, seed=trial
        )
        held += interval.low <= truth <= interval.high
    # Binomial spread of 200 trials at 0.9 is 0.021; the percentile interval at 40 windows covers about 0.89.
    assert 0.82 <= held / trials <= 0.96


def test_bootstrap_is_paired_seeded_and_honest():
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(50, generator=generator, dtype=torch.float64)
    near = base + 0.01 + 0.001 * torch.randn(50, generator=generator, dtype=torch.float64)
    interval = ev.paired_bootstrap(near, base, statistic="nll")
    assert interval.excludes_zero and 0.009 < interval.low < 0.01 < interval.high < 0.011
    assert interval == ev.paired_bootstrap(near, base, statistic="nll")
    assert interval != ev.paired_bootstrap(near, base, statistic="nll", seed=1)
    reverse = ev.paired_bootstrap(base, near, statistic="nll")
    assert reverse.estimate == -interval.estimate and reverse.high < 0
    shuffled = near[torch.randperm(50, generator=generator)]
    assert not ev.paired_bootstrap(
        shuffled, base, statistic="nll"
    ).excludes_zero  # pairing is what tells them apart
    same = ev.paired_bootstrap(base, base)
    assert (same.low, same.estimate, same.high) == (0, 0, 0) and not same.excludes_zero
    single = ev.paired_bootstrap(base[:1], near[:1])
    assert math.isnan(single.low) and not single.excludes_zero
    assert math.isnan(ev.paired_bootstrap(base.clone().fill_(math.nan), near).high)


@pytest.mark.parametrize(
    "options", [{"confidence": 0.0}, {"confidence": 1.0}, {"resamples": 0}, {"statistic": "median"}], ids=str
)
def test_bootstrap_refuses_bad_settings(options):
    with pytest.raises(InvalidArgument):
        ev.paired_bootstrap(torch.zeros(3), torch.zeros(3), **options)


def test_bootstrap_refuses_unpaired_losses():
    for other in (torch.zeros(4), torch.zeros(3, 1), torch.zeros(0)):
        with pytest.raises(InvalidArgument):
            ev.paired_bootstrap(torch.zeros(3), other)
    with pytest.raises(InvalidArgument):
        ev.paired_bootstrap(torch.zeros(0), torch.zeros(0))


def test_model_bytes_counts_shared_memory_once():
    model = tiny_llama(tie_word_embeddings=False)
    tied = tiny_llama(tie_word_embeddings=True)
    assert footprint.model_bytes(model) - footprint.model_bytes(tied) == VOCABULARY * 32 * 4
    assert footprint.model_bytes(tiny_llama(dtype=torch.bfloat16)) < 0.52 * footprint.model_bytes(model)
    module = nn.Module()
    module.whole = nn.Parameter(torch.zeros(10))
    module.register_buffer("view", module.whole.detach()[2:6])
    module.register_buffer("other", torch.zeros(3, dtype=torch.uint8))
    assert footprint.model_bytes(module) == 43
    with torch.device("meta"):
        assert footprint.model_bytes(nn.Linear(8, 4)) == (32 + 4) * 4


def test_checkpoint_bytes_counts_weights(tmp_path):
    with pytest.raises(CheckpointError, match="no weight file"):
        footprint.checkpoint_bytes(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model-1.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "model-2.safetensors").write_bytes(b"x" * 5)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 99)  # the same weights once more
    assert footprint.checkpoint_bytes(tmp_path) == 15
    assert footprint.checkpoint_bytes(tmp_path / "model-1.safetensors") == 10


def test_peak_memory_sees_an_allocation():
    gc.collect()  # what is freed in between would hide the allocation
    footprint.reset_peak_memory("cpu")
    before = footprint.peak_memory().host_bytes
    block = torch.ones(256 << 20, dtype=torch.uint8)
    after = footprint.peak_memory().host_bytes
    assert block[-1] == 1
    assert before > 0 and after > before
    assert footprint.peak_memory().bytes > 0 and footprint.peak_memory("cpu").device_bytes == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_gives_the_same(tokenizer):
    models = {"original": tiny_llama(0), "other": tiny_llama(1)}
    expected = ev.evaluate_models(models, tokenizer, SAMPLE, reference="original", window=32)
    footprint.reset_peak_memory("cuda")
    result = ev.evaluate_models(models, tokenizer, SAMPLE, reference="original", window=32, device="cuda")
    for name in models:
        # TF32 is off by default, so float32 sums differ by rounding only.
        torch.testing.assert_close(result[name].window_nll, expected[name].window_nll, rtol=1e-4, atol=1e-4)
    assert result["other"].comparison.kl == pytest.approx(expected["other"].comparison.kl, rel=1e-3)
    memory = footprint.peak_memory("cuda")
    assert memory.bytes == memory.device_bytes > 0
    assert speed.tokens_per_second(models["other"], prompt_tokens=8, new_tokens=4, repeats=2).decode > 0


def test_speed_is_measured_with_a_cache():
    model = tiny_llama()
    lengths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    calls = []
    speeds = speed.measure_speed(
        {"a": model, "b": model},
        prompt_tokens=8,
        new_tokens=3,
        repeats=2,
        progress=lambda *a: calls.append(a),
    )
    assert lengths == [8, 1, 1, 1] * 2 * 3  # two models, one warm-up and two repeats
    assert len(calls) == 2
    for measured in speeds.values():
        assert measured.decode > 0 and measured.prefill > 0
        assert measured.decode_spread[0] <= measured.decode <= measured.decode_spread[1]
        assert measured.prefill_spread[0] <= measured.prefill <= measured.prefill_spread[1]
        assert (measured.new_tokens, measured.prompt_tokens, measured.repeats) == (3, 8, 2)
    short = speed.tokens_per_second(tiny_llama(positions=16), new_tokens=4, repeats=1)
    assert short.prompt_tokens == 12  # shortened to fit the context
    given = speed.tokens_per_second(model, prompt=torch.arange(5), new_tokens=2, repeats=1)
    assert given.prompt_tokens == 5


def test_speed_refuses_what_it_cannot_measure():
    model = tiny_llama(positions=16)
    for options in ({"new_tokens": 0}, {"repeats": 0}, {"prompt_tokens": 0}, {"new_tokens": 16}):
        with pytest.raises(InvalidArgument):
            speed.tokens_per_second(model, **options)
    with pytest.raises(InvalidArgument, match="context"):
        speed.tokens_per_second(model, prompt=torch.arange(15), new_tokens=2)
    with pytest.raises(InvalidArgument, match="shape"):
        speed.tokens_per_second(model, prompt=torch.zeros(1, 3, dtype=torch.long))

    class Cacheless(Unsplittable):
        def forward(self, input_ids, use_cache=False):
            return self.inner(input_ids=input_ids, use_cache=False)

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

    with pytest.raises(ModelError, match="cache"):
        speed.tokens_per_second(Cacheless(model), prompt_tokens=4, new_tokens=2)
    assert issubclass(ModelError, TensormillError)


def test_real_model_reaches_its_known_loss():
    """stories260K is known to lose 1.266 nats a token on these stories, each read from its beginning."""
    folder = real_model_folder()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "stories260K")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "stories260K")
    text = next(iter(text_module.read_texts([folder / "tinystories_sample.txt"]).values()))
    nats = tokens = 0.0
    for story in text.split("<|endoftext|>"):
        if story.strip():
            result = ev.evaluate(model, tokenizer, story.strip())
            nats += float(result.window_nll.mean()) * result.tokens
            tokens += result.tokens
            assert result.byte_rule == "pieces"
    assert nats / tokens == pytest.approx(1.266, abs=0.02)
    half = transformers.AutoModelForCausalLM.from_pretrained(folder / "stories260K", dtype=torch.bfloat16)
    pair = ev.evaluate_models({"full": model, "half": half}, tokenizer, text, reference="full")
    assert 0 < pair["half"].comparison.kl < 0.01
    assert pair["half"].comparison.top1_agreement > 0.97
    assert pair["half"].perplexity == pytest.approx(pair["full"].perplexity, rel=0.02)

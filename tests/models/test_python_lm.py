"""The built-in language model: its architecture, tokenizer, corpus, baselines, training script and weights."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.data.python_source import HELDOUT_MODULES, heldout_text, stdlib_dir
from tensormill.errors import CheckpointError, DataError, InvalidArgument
from tensormill.models import python_lm
from tensormill.models.python_lm import train as script
from tensormill.models.python_lm.architecture import Llama, LlamaShape
from tensormill.models.python_lm.baselines import ngram_bits, token_byte_lengths, xz_bits_per_byte
from tensormill.models.python_lm.corpus import END_OF_TEXT, make_tokenizer, split_spaces
from tensormill.models.python_lm.export import export_model, finalize, shard

SMALL = LlamaShape(
    vocabulary=300, hidden_size=64, intermediate_size=96, layers=3, heads=4, kv_heads=2, context=128
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(heldout_text().values(), 1024)


def randomised(shape=SMALL):
    """A model whose every part matters: norms away from one, attention away from uniform."""
    torch.manual_seed(0)
    model = Llama(shape)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(
                torch.rand_like(weight) + 0.5 if weight.ndim == 1 else 0.2 * torch.randn_like(weight)
            )
    return model


def hugging_face(model):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**{k: v for k, v in model.shape.config(0).items() if "dtype" not in k})
    twin = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert missing in ([], ["lm_head.weight"])
    assert unexpected == []
    twin.tie_weights()
    return twin


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_equal_those_of_transformers(kv_heads, expand):
    shape = LlamaShape(**{**SMALL.__dict__, "kv_heads": kv_heads})
    model = randomised(shape)
    model.expand_kv(expand)
    tokens = torch.randint(shape.vocabulary, (3, 100))
    with torch.no_grad():
        ours, theirs = model(tokens), hugging_face(model)(tokens).logits
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() < 1e-5 * scale * math.sqrt(shape.hidden_size)
    with torch.no_grad():  # planted: a wrong rotary base must show
        wrong = Llama(LlamaShape(**{**shape.__dict__, "rope_theta": 20_000.0}))
        wrong.load_state_dict(model.state_dict())
        assert (wrong(tokens) - theirs).abs().max() > 1e-2 * scale


def test_logits_are_causal():
    model = randomised()
    tokens = torch.randint(SMALL.vocabulary, (1, 40))
    changed = tokens.clone()
    changed[0, 30] = (changed[0, 30] + 1) % SMALL.vocabulary
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :30], after[:, :30])
    assert not torch.allclose(before[:, 30:], after[:, 30:])


def test_bf16_stream_stays_close():
    model = randomised()
    tokens = torch.randint(SMALL.vocabulary, (2, 64))
    with torch.no_grad():
        exact = model(tokens)
        model.stream = torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(tokens)
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).norm() < 0.03 * exact.norm()


def test_default_shape_is_the_one_promised():
    shape = LlamaShape()
    with torch.device("meta"):
        model = Llama(shape)
    count = sum(weight.numel() for weight in model.parameters())
    assert 15e6 < count < 17e6
    assert shape.hidden_size % 128 == shape.intermediate_size % 128 == 0
    assert shape.head_dim == 64
    assert shape.kv_heads * shape.head_dim % 128 == 0


def test_impossible_shapes():
    with pytest.raises(InvalidArgument, match="heads"):
        LlamaShape(heads=5)
    with pytest.raises(InvalidArgument, match="kv_heads"):
        LlamaShape(kv_heads=4)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_every_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    if END_OF_TEXT not in text:
        lengths = token_byte_lengths(tokenizer, 1024)
        assert lengths[ids].sum() == len(text.encode())


def test_source_survives_and_is_short(tokenizer):
    text = "\n\n".join(heldout_text().values())
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert len(text.encode()) / len(ids) > 2.5
    assert tokenizer.encode("x = 120").tokens[-3:] == ["1", "2", "0"]
    assert tokenizer.encode("\n        return").tokens[0] == "Ċ" + 8 * "Ġ"
    assert tokenizer.token_to_id(END_OF_TEXT) == 0


def test_vocabulary_that_the_text_can_not_fill():
    with pytest.raises(DataError, match="lower the vocabulary"):
        make_tokenizer(["x = 1"], 1024)


def test_split_spaces_changes_the_tokens_and_not_the_text(tokenizer):
    text = heldout_text()["queue"]
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    space = tokenizer.token_to_id("Ġ")
    rest = np.full(1024, -1)
    for token, index in tokenizer.get_vocab().items():
        if token.startswith("Ġ") and token[1:].isalpha():
            rest[index] = tokenizer.get_vocab().get(token[1:], -1)
    for share in (0.0, 0.1, 1.0):
        out = split_spaces(ids, space, rest, share, np.random.default_rng(0))
        assert tokenizer.decode(out.tolist(), skip_special_tokens=False) == text
        expected = share * (rest[ids] >= 0).sum()
        assert len(out) - len(ids) == pytest.approx(expected, rel=0.3, abs=1)


def plain_ngram(train, test, vocabulary, order):
    """The same model, written as a recursion over dictionaries."""

    def probability(word, context):
        lower = 1 / vocabulary if context is None else probability(word, context[1:] if context else None)
        if context is None:
            return lower
        followers = {}
        size = len(context)
        for i in range(len(train) - size):
            if tuple(train[i : i + size]) == tuple(context):
                followers[train[i + size]] = followers.get(train[i + size], 0) + 1
        total, kinds = sum(followers.values()), len(followers)
        if not total:
            return lower
        return (followers.get(word, 0) + kinds * lower) / (total + kinds)

    def backed(word, context):
        return probability(word, context)

    out = []
    for i, word in enumerate(test):
        context = tuple(test[max(0, i - order + 1) : i])
        out.append(-math.log2(backed(word, context)))
    return out


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), vocabulary=st.integers(2, 6), order=st.integers(1, 4))
def test_ngram_equals_its_recursion(seed, vocabulary, order):
    generator = np.random.default_rng(seed)
    train = generator.integers(vocabulary, size=60).astype(np.uint16)
    test = generator.integers(vocabulary, size=12).astype(np.uint16)
    ours = ngram_bits(train, test, vocabulary, order)
    np.testing.assert_allclose(
        ours, plain_ngram(train.tolist(), test.tolist(), vocabulary, order), rtol=1e-12
    )


def test_ngram_probabilities_sum_to_one():
    train = np.random.default_rng(0).integers(5, size=200).astype(np.uint16)
    for context in ([1, 2], [4, 4]):
        total = sum(2 ** -ngram_bits(train, np.array([*context, w], np.uint16), 5, 3)[-1] for w in range(5))
        assert total == pytest.approx(1, rel=1e-12)
    with pytest.raises(InvalidArgument, match="64"):
        ngram_bits(train, train, 4096, 6)


def test_xz():
    assert xz_bits_per_byte("a" * 100_000) < 0.05
    assert 1 < xz_bits_per_byte("\n\n".join(heldout_text().values())) < 2.5


def test_bits_per_byte_of_a_uniform_model():
    tokens = torch.arange(103) % 4
    lengths = torch.tensor([1, 2, 3, 4])
    score = script.bits_per_byte(lambda x: torch.zeros(*x.shape, 16), tokens, lengths, window=10)
    scored = [tokens[i] for i in range(100) if i % 10]
    assert score["windows"] == 10
    assert score["scored_tokens"] == 90
    assert score["scored_bytes"] == sum(int(lengths[t]) for t in scored)
    assert score["bits_per_byte"] == pytest.approx(4 * 90 / score["scored_bytes"])
    assert score["perplexity"] == pytest.approx(16)
    with pytest.raises(DataError, match="window"):
        script.bits_per_byte(lambda x: x, tokens[:5], lengths, window=10)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=40), limit=st.integers(100, 400))
def test_shards_keep_order_and_limit(sizes, limit):
    weights = {f"w{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    parts = shard(weights, limit)
    assert [name for part in parts for name in part] == list(weights)
    assert all(part and sum(t.numel() for t in part.values()) <= limit for part in parts)
    assert len(parts) <= 2 * math.ceil(sum(sizes) / limit)


def test_shard_of_an_oversized_tensor():
    with pytest.raises(CheckpointError, match="at most 10 bytes"):
        shard({"w": torch.zeros(11, dtype=torch.uint8)}, 10)


def test_names(monkeypatch, tmp_path):
    assert python_lm.resolve(tmp_path) == tmp_path
    assert python_lm.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match="only built-in model"):
        python_lm.resolve("builtin:other")
    monkeypatch.setattr(python_lm, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(CheckpointError, match="reinstall"):
        python_lm.path()


def test_export_loads_in_transformers(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    shape = LlamaShape(**{**SMALL.__dict__, "vocabulary": 1024})
    model = randomised(shape)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    out = tmp_path / "out"
    files = export_model(
        model.state_dict(), shape, tmp_path / "tokenizer.json", out, {}, end_of_text=END_OF_TEXT
    )
    assert len(files) <= 8
    assert not list(out.glob(".*"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
        tokens = torch.randint(1024, (2, 50))
        torch.testing.assert_close(loaded(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    text = heldout_text()["shlex"] + "\t\r\n é 漢字 \x00 12345 " + " ".join(["x"] * 3)
    ids = theirs(text).input_ids
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert theirs.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == 0
    with pytest.raises(CheckpointError, match="no evaluation"):
        finalize(out)
    with pytest.raises(CheckpointError, match="training script"):
        finalize(tmp_path)


def arguments(out, work, **changed):
    settings = {
        "hidden": 64,
        "mlp": 64,
        "layers": 1,
        "heads": 2,
        "kv-heads": 1,
        "vocabulary": 400,
        "context": 64,
        "short-window": 32,
        "batch-tokens": 256,
        "workers": 1,
        "max-steps": 6,
        "minutes": 1,
        "device": "cpu",
        "source": stdlib_dir() / "json",
        **changed,
    }
    return ["--out", str(out), "--work", str(work), *(f"--{k}={v}" for k, v in settings.items())]


@pytest.mark.slow
def test_script_from_sources_to_model(tmp_path):
    """The whole script in a process of its own, and the model card of what it wrote."""
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tensormill.models.python_lm.train"]
    done = subprocess.run(
        [*command, *arguments(out, tmp_path / "work")],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stderr
    record = json.loads((out / "training.json").read_text())
    assert record["status"] == "finished"
    assert record["training"]["steps"] == 6
    assert record["heldout"]["modules"] == list(HELDOUT_MODULES)
    assert record["baselines"]["xz"]["bits_per_byte"] < record["baselines"]["ngram"]["bits_per_byte"] < 8
    assert len(list(out.iterdir())) <= 8
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    prompt = transformers.AutoTokenizer.from_pretrained(out)("def ", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt.input_ids.shape[1]

    # with the corpus and the state of the first run, more steps continue it
    more = arguments(out, tmp_path / "work", **{"max-steps": 9})
    assert subprocess.run([*command, *more], capture_output=True, timeout=250, check=False).returncode == 0
    record = json.loads((out / "training.json").read_text())
    assert record["training"]["steps"] == 9
    assert next(entry["step"] for entry in record["curve"] if "loss" in entry) == 6

    # a second session: new data, the same tokenizer, from the exported weights
    second = tmp_path / "second"
    changed = {"init": out, "extra-source": stdlib_dir() / "logging", "extra-weight": 2, "short-until": 0}
    session = arguments(second, tmp_path / "work2", **changed)
    done = subprocess.run([*command, *session], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((second / "training.json").read_text())
    assert (second / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    assert [earlier["training"]["steps"] for earlier in record["earlier_sessions"]] == [9]
    assert record["corpus"]["extra_files"] > 0
    first_loss = record["earlier_sessions"][0]["curve"][0]["loss"]
    assert next(entry["loss"] for entry in record["curve"] if "loss" in entry) < first_loss
    out = second

    finalize(out)
    card = (out / "README.md").read_text()
    assert "Session 2" in card
    assert f"{record['heldout']['bits_per_byte']:.4f}" in card
    for name in HELDOUT_MODULES:
        assert name in card
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 0
    assert (out / "curve.svg").read_text().startswith("<svg")


def test_script_refuses_what_can_not_work(tmp_path, capsys):
    assert script.main(arguments(tmp_path / "out", tmp_path / "work", heads=3)) == 2
    assert "heads to divide" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert script.main(arguments(tmp_path / "out", tmp_path / "work", source=empty)) == 2
    assert "no corpus could be made" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


try:
    WEIGHTS = python_lm.path()
except CheckpointError:
    WEIGHTS = None
needs_weights = pytest.mark.skipif(WEIGHTS is None, reason="this checkout has no trained weights")


@needs_weights
def test_the_shipped_files():
    sizes = {file.name: file.stat().st_size for file in WEIGHTS.iterdir()}
    assert max(sizes.values()) < 16 * 2**20
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } <= set(sizes)
    config = json.loads((WEIGHTS / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
    index = json.loads((WEIGHTS / "model.safetensors.index.json").read_text())
    assert 15e6 < index["metadata"]["total_parameters"] < 17e6
    assert set(index["weight_map"].values()) == {name for name in sizes if name.endswith(".safetensors")}
    record = json.loads((WEIGHTS / "training.json").read_text())
    assert record["status"] == "finished"


@needs_weights
def test_the_shipped_model_is_as_good_as_its_card():
    """A few windows of held-out text, within what a few windows can tell."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(WEIGHTS)
    text = "\n\n".join(heldout_text().values())
    ids = tokenizer(text, verbose=False).input_ids
    assert tokenizer.decode(ids) == text
    lengths = torch.from_numpy(token_byte_lengths(tokenizer.backend_tokenizer, model.config.vocab_size))
    tokens = torch.tensor(ids)
    windows = tokens[: len(tokens) // 2048 * 2048].view(-1, 2048)[::15]
    with torch.no_grad():
        score = script.bits_per_byte(
            lambda x: model(x).logits, windows.flatten(), lengths, window=2048, chunk=1
        )
    record = json.loads((WEIGHTS / "training.json").read_text())
    assert abs(score["bits_per_byte"] - record["heldout"]["bits_per_byte"]) < 0.12
    assert score["bits_per_byte"] < record["baselines"]["ngram"]["bits_per_byte"]


@needs_weights
@pytest.mark.parametrize("prompt", ["def ", "import ", "class Stack:\n    def "])
def test_the_shipped_model_writes_python(prompt):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(WEIGHTS)
    inputs = tokenizer(prompt, return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=32, do_sample=False)[0])
    assert text.startswith(prompt)
    name = text[len(prompt) :].split("(")[0].split("\n")[0].split(".")[0].strip()
    assert name.isidentifier(), text

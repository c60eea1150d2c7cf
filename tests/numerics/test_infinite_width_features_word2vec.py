"""CBOW against a word-by-word reference, gensim's files, and its own limit."""

from __future__ import annotations

import math

import pytest
import torch

from tensormill.errors import CheckpointError, DataError, InvalidArgument, OutputError
from tensormill.numerics.infinite_width_features.word2vec import (
    CBOW,
    CBOWConfig,
    Corpus,
    InfiniteCBOW,
    analogy_accuracy,
    load_word_vectors,
    planted_analogies,
    save_word_vectors,
    train_cbow,
)


def word_by_word(model, context, mask, target, noise, lr, config):
    """word2vec's update, one position after another, as loops."""
    u, v = model.input, model.output
    for row in range(context.shape[0]):
        words = [int(w) for w, use in zip(context[row], mask[row], strict=True) if use]
        if not words:
            continue
        hidden = sum(u[w] for w in words) / len(words)
        gradient = torch.zeros_like(hidden)
        pairs = [(int(target[row]), 1.0)] + [(int(w), 0.0) for w in noise[row] if w != target[row]]
        for word, label in pairs:
            logit = (hidden @ v[word]).clamp(-config.logit_clip, config.logit_clip)
            g = (label - torch.sigmoid(logit)) * lr
            gradient += g * v[word]
            v[word] = (1 - lr * config.weight_decay) * v[word] + g * hidden
        for word in words:
            u[word] = (1 - lr * config.weight_decay) * u[word] + gradient / len(words)


def started(vocabulary=40, width=7, seed=0):
    model = CBOW(vocabulary, width, seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed + 1)
    model.output += torch.randn(model.output.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_a_batch_of_disjoint_rows_is_the_sequence(weight_decay):
    config = CBOWConfig(weight_decay=weight_decay, logit_clip=1.5)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    context = order[:12].view(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    target, noise = order[12:15], order[15:30].view(3, 5)
    one, other = started(), started()
    loss = one.step(context, mask, target, noise, 0.2, config)
    word_by_word(other, context, mask, target, noise, 0.2, config)
    torch.testing.assert_close(one.input, other.input)
    torch.testing.assert_close(one.output, other.output)
    assert torch.isfinite(loss)
    assert torch.equal(one.output[target[2]], started().output[target[2]])  # no context: left alone


def test_the_step_is_the_gradient_of_its_loss():
    """Without decay, overlapping rows included: the update is -lr times the derivative of the summed loss."""
    config = CBOWConfig(weight_decay=0.0)
    generator = torch.Generator().manual_seed(5)
    context = torch.randint(12, (6, 4), generator=generator)
    mask = torch.randint(2, (6, 4), generator=generator)
    mask[:, 0] = 1
    target = torch.randint(12, (6,), generator=generator)
    for noise, weight in (
        (torch.randint(12, (6, 5), generator=generator), 1.0),
        (torch.randint(12, (8,), generator=generator), 25 / 8),
    ):
        model = started(12)
        u, v = model.input.clone().requires_grad_(), model.output.clone().requires_grad_()
        hidden = (u[context] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        rows = noise if noise.ndim == 2 else noise.expand(6, -1)
        logits = (hidden[:, None] * v[rows]).sum(-1)
        losses = -torch.nn.functional.logsigmoid((hidden * v[target]).sum(-1)).sum()
        losses = losses - weight * (torch.nn.functional.logsigmoid(-logits) * (rows != target[:, None])).sum()
        torch.autograd.backward(losses)
        loss = model.step(context, mask, target, noise, 0.1, config)
        assert float(loss) == pytest.approx(float(losses.detach()) / 6)
        torch.testing.assert_close(model.input, u.detach() - 0.1 * u.grad)
        torch.testing.assert_close(model.output, v.detach() - 0.1 * v.grad)


def tiny_corpus():
    text, questions = planted_analogies(6, 3, 300, fillers=5)
    corpus = Corpus.of(text)
    return corpus, torch.tensor([corpus.index(question) for question in questions])


def test_finite_widths_approach_the_limit():
    corpus, _ = tiny_corpus()
    config = CBOWConfig(window=3, negatives=4, epochs=2, subsample=0, batch=32)
    limit = InfiniteCBOW(len(corpus.words))
    train_cbow(limit, corpus, config)
    expected = limit.input @ limit.output.mT
    distance = []
    for width in (64, 1024, 16384):
        model = CBOW(len(corpus.words), width, seed=1)
        train_cbow(model, corpus, config)
        distance.append(float((model.input @ model.output.mT - expected).norm() / expected.norm()))
    # 16 times the width: 4 times nearer
    assert distance[2] < 0.1
    assert 2.5 < distance[0] / distance[1] < 6.5 and 2.5 < distance[1] / distance[2] < 6.5


def test_a_sample_of_the_limit_computes_what_it_does():
    corpus, _ = tiny_corpus()
    limit = InfiniteCBOW(len(corpus.words))
    train_cbow(limit, corpus, CBOWConfig(window=3, epochs=1, subsample=0))
    sample = limit.sample(20_000, seed=2)
    expected = limit.input @ limit.output.mT
    assert float((sample.input @ sample.output.mT - expected).norm() / expected.norm()) < 0.1


def test_training_is_repeatable_and_resumable_and_learns():
    corpus, questions = tiny_corpus()
    config = CBOWConfig(
        window=6, negatives=6, epochs=20, subsample=0, batch=32, shared_negatives=24, weight_decay=0
    )
    model, again = InfiniteCBOW(len(corpus.words)), InfiniteCBOW(len(corpus.words))
    seen = []
    history = train_cbow(model, corpus, config, progress=lambda done, loss: seen.append((done, loss)))
    assert history == train_cbow(again, corpus, config)
    assert torch.equal(model.input, again.input)
    assert len(history) == 20 and history[-1] < history[0] and 50 < len(seen) <= 120
    assert all(0 <= done < 1 and math.isfinite(loss) for done, loss in seen)
    assert float(analogy_accuracy(model.input, questions).mean()) > 0.8
    third = InfiniteCBOW(len(corpus.words))
    third.load_state_dict(model.state_dict())
    assert torch.equal(third.output, model.output)
    with pytest.raises(CheckpointError):
        CBOW(5, 3).load_state_dict(model.state_dict())


def test_subsampling_and_sentences():
    # contexts never cross sentences: words of one-word sentences have none, and nothing moves
    alone = Corpus.of([[word] for word in "abcabc"])
    model = CBOW(3, 4)
    before = model.input.clone()
    history = train_cbow(model, alone, CBOWConfig(epochs=1, subsample=0))
    assert torch.equal(model.input, before) and history == [0.0]
    # with a threshold far below all frequencies nearly everything is dropped, and nothing breaks
    corpus, _ = tiny_corpus()
    train_cbow(CBOW(len(corpus.words), 4), corpus, CBOWConfig(epochs=1, subsample=1e-12))


def test_corpus():
    corpus = Corpus.of([["the", "cat"], ["the", "dog", "the"], ["rare"]], min_count=1, max_words=3)
    assert corpus.words == ("the", "cat", "dog") and corpus.counts.tolist() == [3, 1, 1]
    assert corpus.ids.tolist() == [0, 1, 0, 2, 0] and corpus.sentence.tolist() == [0, 0, 1, 1, 1]
    assert corpus.index(["dog", "the"]) == [2, 0]
    with pytest.raises(DataError, match="rare"):
        corpus.index(["rare"])
    with pytest.raises(DataError, match="min_count"):
        Corpus.of([["a", "b"]], min_count=2)
    with pytest.raises(InvalidArgument, match="corpus of 3"):
        train_cbow(CBOW(4, 2), corpus, CBOWConfig())


def test_analogies_with_known_vectors():
    # a regular grid: every analogy holds exactly
    vectors = torch.tensor([[x, y, 1.0] for x in (0.0, 1.0) for y in (0.0, 1.0, 2.0)])
    unit = torch.nn.functional.normalize(vectors, dim=1)
    questions = torch.tensor([[0, 1, 3, 4], [0, 3, 1, 4], [4, 4, 0, 1]])
    right = analogy_accuracy(unit, questions)
    assert right[2] == 0 or float(unit[0] @ unit[1]) == max(float(unit[0] @ unit[k]) for k in (1, 2, 3, 5))
    for (a, b, c, answer), found in zip(questions.tolist(), right, strict=True):
        scores = (unit[b] - unit[a] + unit[c]) @ unit.mT
        scores[[a, b, c]] = -math.inf
        assert bool(found) == (int(scores.argmax()) == answer)
    assert torch.equal(right, analogy_accuracy(unit, questions, batch=1))
    assert analogy_accuracy(unit, questions[:0]).shape == (0,)
    with pytest.raises(InvalidArgument, match="below 4"):
        analogy_accuracy(unit, questions, restrict=4)
    with pytest.raises(InvalidArgument, match="integers"):
        analogy_accuracy(unit, questions.float())


def test_planted_questions_are_all_different_and_right():
    text, questions = planted_analogies(3, 3, 50, fillers=2, seed=4)
    assert len(questions) == len(set(questions)) == 3 * 2 * 3 * 2
    for question in questions:
        (e1, a1), (e2, a2), (e3, a3), (e4, a4) = (word.split(".") for word in question)
        assert e1 == e2 != e3 == e4 and a1 == a3 != a2 == a4
    assert all(len(sentence) == 7 for sentence in text)
    assert (text, questions) == planted_analogies(3, 3, 50, fillers=2, seed=4)
    assert len(planted_analogies(40, 4, 1)[1]) == 2000
    with pytest.raises(InvalidArgument):
        planted_analogies(1, 4)
    with pytest.raises(InvalidArgument, match="probability"):
        planted_analogies(2, 2, noise=1.5)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_wrong_signs_are_as_many_as_asked_for(noise):
    text, _ = planted_analogies(50, 2, 2000, noise=noise)
    wrong = total = 0
    for sentence in text:
        (word,) = (w for w in sentence if w[0] == "e" and w[1].isdigit())
        entity = word.split(".")[0][1:]
        signs = [w.removeprefix("entity").split(".")[0] for w in sentence if w.startswith("entity")]
        total += len(signs)
        wrong += sum(sign != entity for sign in signs)
    assert total == 6000 and wrong / total == pytest.approx(noise * 49 / 50, abs=0.03)


@pytest.mark.parametrize("binary", [False, True])
def test_files_are_word2vecs(tmp_path, binary):
    words, vectors = ("eins", "zwölf", "три"), torch.randn(3, 5)
    path = tmp_path / "vectors"
    save_word_vectors(path, words, vectors, binary=binary)
    assert [one.name for one in tmp_path.iterdir()] == ["vectors"]
    found, values = load_word_vectors(path, binary=binary)
    assert found == words and torch.equal(values, vectors)
    keyed = pytest.importorskip("gensim.models").KeyedVectors
    theirs = keyed.load_word2vec_format(str(path), binary=binary)
    assert tuple(theirs.index_to_key) == words
    torch.testing.assert_close(torch.tensor(theirs.vectors), vectors, rtol=1e-6, atol=0)
    other = tmp_path / "theirs"
    theirs.save_word2vec_format(str(other), binary=binary)
    found, values = load_word_vectors(other, binary=binary)
    assert found == words
    torch.testing.assert_close(values, vectors, rtol=1e-6, atol=1e-7)


def test_bad_files(tmp_path):
    path = tmp_path / "vectors"
    save_word_vectors(path, ["a", "b"], torch.ones(2, 3), binary=True)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        load_word_vectors(path, binary=True)
    path.write_text("2 3\na 1 2 3\n")
    with pytest.raises(CheckpointError):
        load_word_vectors(path)
    with pytest.raises(CheckpointError):
        load_word_vectors(tmp_path / "none")
    with pytest.raises(InvalidArgument, match="without spaces"):
        save_word_vectors(path, ["a b"], torch.ones(1, 3))
    with pytest.raises(InvalidArgument, match="1 words"):
        save_word_vectors(path, ["a"], torch.ones(2, 3))
    with pytest.raises(OutputError):
        save_word_vectors(tmp_path / "no" / "folder", ["a"], torch.ones(1, 3))


def test_what_does_not_fit_in_memory_is_refused():
    with pytest.raises(InvalidArgument, match="GB"):
        InfiniteCBOW(3_000_000)
    with pytest.raises(InvalidArgument, match="at least 2 words"):
        CBOW(1, 3)
    for bad in (
        {"window": 0},
        {"lr": 0.0},
        {"weight_decay": -1.0},
        {"shared_negatives": 0},
        {"final_lr": 2.0},
    ):
        with pytest.raises(InvalidArgument):
            CBOWConfig(**bad)

"""BLEU against NLTK and sacreBLEU, on random ragged token ids; and its invariants, errors and warnings."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.errors import InvalidArgument
from tensormill.metrics import Bleu, Scoring, bleu_reward, corpus_bleu, sentence_bleu

pytestmark = pytest.mark.filterwarnings("ignore:.*BLEU:UserWarning", "ignore:.*look padded:UserWarning")

METHODS = [f"method{i}" for i in range(8)]
EXACT = 1e-12  # both sides finish in float64; a handful of logarithms and exponentials, each to about 1e-16

WEIGHTS = [
    (0.25, 0.25, 0.25, 0.25),
    (1.0,),
    (0.5, 0.5),
    (0.1, 0.3, 0.5, 0.1),
    (0.2, 0.2, 0.2, 0.2, 0.2),
    (0.0, 0.5, 0.5, 0.0, 0.0, 0.0),
]


@st.composite
def corpora(draw, shortest_reference=1, at_most=4):
    """Candidates with one to four references each, from a vocabulary of 2 to 50000; much in common, or little."""
    vocabulary = draw(st.sampled_from([2, 3, 10, 1000, 50_000]))
    longest = draw(st.sampled_from([4, 12, 64]))
    token = st.integers(0, vocabulary - 1)
    pairs = []
    for _ in range(draw(st.integers(1, at_most))):
        references = draw(
            st.lists(st.lists(token, min_size=shortest_reference, max_size=longest), min_size=1, max_size=4)
        )
        candidate = draw(st.lists(token, max_size=longest))
        if draw(st.booleans()):  # a piece of a reference inside, so that high orders match
            source = draw(st.sampled_from(references))
            start = draw(st.integers(0, len(source)))
            candidate = (candidate[:3] + source[start:] + candidate[3:])[:64]
        pairs.append((candidate, references))
    return [c for c, _ in pairs], [r for _, r in pairs]


def nltk_score(function, references, candidate, weights, method, **options):
    """NLTK's score; NaN where it refuses (method6 without a matching trigram)."""
    bleu_score = pytest.importorskip("nltk.translate.bleu_score")
    smoothing = getattr(bleu_score.SmoothingFunction(), method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return float(getattr(bleu_score, function)(references, candidate, weights, smoothing, **options))
        except AssertionError:
            return math.nan


def assert_equal(actual, expected, what):
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        same = math.isnan(ours) and math.isnan(theirs)
        assert same or abs(ours - theirs) <= EXACT, f"{what}: {ours!r} and not {theirs!r}"


def usable(method, weights):
    return method != "method6" or len(weights) >= 3


@settings(max_examples=40, deadline=None)
@given(corpora(), st.sampled_from(WEIGHTS), st.booleans())
def test_sentences_equal_nltk(corpus, weights, auto_reweigh):
    candidates, references = corpus
    for method in METHODS:
        if not usable(method, weights):
            continue
        ours = sentence_bleu(
            candidates, references, weights=weights, smoothing=method, auto_reweigh=auto_reweigh
        )
        theirs = [
            nltk_score("sentence_bleu", r, c, weights, method, auto_reweigh=auto_reweigh)
            for c, r in zip(candidates, references, strict=True)
        ]
        assert_equal(ours.tolist(), theirs, method)


@settings(max_examples=30, deadline=None)
@given(corpora(), st.sampled_from(WEIGHTS))
def test_corpus_equals_nltk(corpus, weights):
    candidates, references = corpus
    for method in METHODS:
        if usable(method, weights):
            ours = corpus_bleu(candidates, references, weights=weights, smoothing=method)
            theirs = nltk_score("corpus_bleu", references, candidates, weights, method)
            assert_equal([float(ours)], [theirs], method)


def test_several_sets_of_weights_equal_nltk():
    bleu_score = pytest.importorskip("nltk.translate.bleu_score")
    candidate, references = [1, 2, 3, 4, 5, 6, 1, 2], [[1, 2, 3, 9, 5, 6, 1], [2, 3, 4, 5]]
    sets = [(1 / 2, 1 / 2), (1 / 3, 1 / 3, 1 / 3), (1 / 5,) * 5]
    for method in METHODS:
        theirs = bleu_score.sentence_bleu(
            references, candidate, sets, getattr(bleu_score.SmoothingFunction(), method)
        )
        assert_equal(
            sentence_bleu([candidate], [references], weights=sets, smoothing=method)[0].tolist(),
            theirs,
            method,
        )
        assert_equal(
            corpus_bleu([candidate], [references], weights=sets, smoothing=method).tolist(), theirs, method
        )


def sacrebleu_metric(**options):
    return pytest.importorskip("sacrebleu").BLEU(tokenize="none", force=True, **options)


def words(ids):
    return " ".join(map(str, ids))


@settings(max_examples=40, deadline=None)
@given(
    corpora(),
    st.sampled_from(["none", "floor", "add-k", "exp"]),
    st.sampled_from([None, 0.01, 2.0]),
    st.sampled_from([1, 2, 4, 6]),
    st.booleans(),
)
def test_equals_sacrebleu(corpus, smoothing, value, orders, effective):
    candidates, references = corpus
    value = value if smoothing in ("floor", "add-k") else None
    metric = sacrebleu_metric(
        smooth_method=smoothing, smooth_value=value, max_ngram_order=orders, effective_order=effective
    )
    chosen = {
        "dialect": "sacrebleu",
        "smoothing": smoothing,
        "smooth_value": value,
        "weights": (1 / orders,) * orders,
        "effective_order": effective,
    }
    theirs = [
        metric.sentence_score(words(c), [words(one) for one in r]).score / 100
        for c, r in zip(candidates, references, strict=True)
    ]
    assert_equal(sentence_bleu(candidates, references, **chosen).tolist(), theirs, smoothing)
    most = max(map(len, references))
    streams = [[words(r[k]) if k < len(r) else None for r in references] for k in range(most)]
    whole = metric.corpus_score([words(c) for c in candidates], streams).score / 100
    assert_equal([float(corpus_bleu(candidates, references, **chosen))], [whole], smoothing)


def test_a_planted_error_is_caught():
    """One match too many in 1024 tokens, or the wrong closest length, moves the score far beyond the tolerance."""
    candidate = list(range(1024))
    reference = [*range(1023), 5000]
    right = nltk_score("sentence_bleu", [reference], candidate, WEIGHTS[0], "method1")
    assert abs(float(sentence_bleu([candidate], [[reference]])[0]) - right) <= EXACT
    for wrong in ([[*reference[:-1], 1023]], [reference + [1] * 2]):
        assert abs(float(sentence_bleu([candidate], [wrong])[0]) - right) > 1e6 * EXACT


@settings(max_examples=25, deadline=None)
@given(corpora())
def test_invariants(corpus):
    candidates, references = corpus
    scores = sentence_bleu(candidates, references)
    assert bool(((scores >= 0) & (scores <= 1)).all())
    turned = [list(reversed(r)) for r in references]
    assert torch.equal(sentence_bleu(candidates, turned), scores), "the order of references matters"
    twice = [r + r for r in references]
    assert torch.equal(sentence_bleu(candidates, twice), scores), "a reference given twice matters"
    mapped = sentence_bleu(
        [[2**62 - 7 * t for t in c] for c in candidates],
        [[[2**62 - 7 * t for t in x] for x in r] for r in references],
    )
    assert torch.equal(mapped, scores), "the ids themselves matter"


def test_identity_is_one():
    ids = torch.randint(0, 50_000, (5, 40), dtype=torch.int32)
    for method in ("method0", "method1", "method2", "method3", "method4"):
        torch.testing.assert_close(
            sentence_bleu(ids, ids, smoothing=method), torch.ones(5, dtype=torch.float64)
        )
    assert float(corpus_bleu(ids, ids, percent=True)) == pytest.approx(100)


def test_no_matching_token_is_zero_under_every_smoothing():
    for method in METHODS:
        assert float(sentence_bleu([[1, 2, 3, 4]], [[[5, 6, 7]]], smoothing=method)) == 0
    assert float(sentence_bleu([[]], [[[5, 6, 7]]])) == 0


def test_closest_length_ties_and_absent_references():
    tokens = torch.arange(13)
    references = tokens.expand(1, 3, 13)
    candidate = tokens[None, :12]
    tie = sentence_bleu(candidate, references, None, torch.tensor([[13, 11, 0]]))
    assert float(tie) == pytest.approx(1.0)  # 11 is taken, so there is no penalty
    for absent in (0, -1):
        one = sentence_bleu(candidate, references, None, torch.tensor([[13, absent, absent]]))
        assert float(one) == pytest.approx(math.exp(1 - 13 / 12))


def test_padding_by_value_is_trailing_only():
    lists = sentence_bleu([[7, 0, 8, 9, 4], [3, 0]], [[[7, 0, 8, 9]], [[3, 0, 5]]])
    candidates = torch.tensor([[7, 0, 8, 9, 4, 0], [3, 2, 0, 0, 0, 0]])
    references = torch.tensor([[[7, 0, 8, 9, 0]], [[3, 2, 5, 0, 0]]])
    padded = sentence_bleu(candidates, references, pad_id=0)
    assert float(padded[0]) == float(lists[0])
    assert float(padded[1]) == float(sentence_bleu([[3, 2]], [[[3, 2, 5]]]))


def test_groups_share_their_references():
    torch.manual_seed(0)
    candidates, references = torch.randint(0, 5, (3, 4, 20)), torch.randint(0, 5, (3, 2, 25))
    lengths, reference_lengths = torch.randint(0, 21, (3, 4)), torch.randint(0, 26, (3, 2))
    shared = sentence_bleu(candidates, references, lengths, reference_lengths)
    assert shared.shape == (3, 4)
    repeated = sentence_bleu(
        candidates.flatten(0, 1),
        references.repeat_interleave(4, 0),
        lengths.flatten(),
        reference_lengths.repeat_interleave(4, 0),
    )
    assert torch.equal(shared.flatten(), repeated)


def test_metric_over_batches_equals_corpus():
    generator = torch.Generator().manual_seed(1)
    candidates = torch.randint(0, 4, (12, 15), generator=generator)
    references = torch.randint(0, 4, (12, 3, 15), generator=generator)
    lengths = torch.randint(0, 16, (12,), generator=generator)
    reference_lengths = torch.randint(1, 16, (12, 3), generator=generator)
    for chosen in [{"smoothing": m} for m in METHODS] + [{"dialect": "sacrebleu"}]:
        whole = corpus_bleu(candidates, references, lengths, reference_lengths, **chosen)
        parts, other = Bleu(**chosen), Bleu(**chosen)
        for start, metric in ((0, parts), (4, parts), (8, other)):
            part = slice(start, start + 4)
            metric.update(candidates[part], references[part], lengths[part], reference_lengths[part])
        parts.merge(other)
        assert torch.equal(parts.compute(), whole)
        parts.reset()
        assert float(parts.compute()) == 0
    with pytest.raises(InvalidArgument, match="other settings"):
        Bleu().merge(Bleu(smoothing="exp"))


def _rank(rank, port, folder):
    import torch.distributed as distributed

    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    metric = Bleu(smoothing="method7")
    if rank < 2:  # the third rank has seen nothing
        metric.update([[1, 2, 3, 4, 5 + rank]], [[[1, 2, 3, 4, 5]]])
    metric.all_reduce()
    torch.save(metric.compute(), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_all_reduce(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=3)
    whole = corpus_bleu([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]], [[[1, 2, 3, 4, 5]]] * 2, smoothing="method7")
    for rank in range(3):
        assert torch.equal(torch.load(f"{tmp_path}/{rank}.pt"), whole)


def test_strict_zero_and_method6():
    candidate, references = [[1, 2, 3, 4, 5]], [[[1, 2, 9, 4, 5]]]
    assert 0 < float(sentence_bleu(candidate, references, smoothing="none")) < 1e-70
    assert float(sentence_bleu(candidate, references, smoothing="none", strict=True)) == 0
    assert math.isnan(float(sentence_bleu(candidate, references, smoothing="method6")))
    with pytest.raises(InvalidArgument, match="trigram"):
        sentence_bleu(candidate, references, smoothing="method6", on_undefined="raise")
    with pytest.raises(InvalidArgument, match="at least 3"):
        Scoring(smoothing="method6", weights=(0.5, 0.5))


def test_reward():
    reward = bleu_reward("answers", smoothing="method3")
    assert reward.__name__ == "bleu"
    ids = [[1, 2, 3, 4], [1, 2, 9, 9]]
    answers = [[1, 2, 3, 4], [[1, 2, 3], [4]]]
    scores = reward(prompts=["a", "b"], completion_ids=ids, answers=answers, trainer_state=None)
    assert scores[0] == 1.0 and 0 < scores[1] < 1 and all(isinstance(s, float) for s in scores)
    tensor = bleu_reward("answers", pad_id=0)(
        completion_ids=torch.tensor(ids), answers=torch.tensor([[1, 2, 3, 4]] * 2)
    )
    assert tensor.shape == (2,) and tensor.dtype == torch.float32
    with pytest.raises(InvalidArgument, match="answers"):
        reward(completion_ids=ids, prompts=["a", "b"])


def test_nested_tensor_and_small_dtypes():
    rows = [torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2])]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    references = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    expected = sentence_bleu([r.tolist() for r in rows], references)
    assert torch.equal(sentence_bleu(jagged, references), expected)
    assert torch.equal(sentence_bleu([r.to(torch.int16) for r in rows], references.to(torch.uint8)), expected)


def test_signature_names_what_matters():
    assert (
        Scoring()
        .signature()
        .startswith("tok:ids|dialect:nltk|orders:4|smooth:method1[0.1]|eff:no|version:tensormill-")
    )
    text = Scoring(dialect="sacrebleu", smoothing="add-k", percent=True).signature(2)
    assert text.startswith(
        "nrefs:2|tok:ids|dialect:sacrebleu|orders:4|smooth:add-k[1]|eff:sentences|range:100|"
    )
    assert "weights:0.9,0.1" in Scoring(weights=(0.9, 0.1)).signature()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"smoothing": "metod3"}, "did you mean 'method3'"),
        ({"smoothing": "addk"}, "did you mean 'add-k'"),
        ({"dialect": "sacrebleu", "smoothing": "method5"}, "use dialect 'nltk'"),
        ({"dialect": "sacre"}, "did you mean 'sacrebleu'"),
        ({"smothing": "exp"}, "did you mean 'smoothing'"),
        ({"weights": ()}, "0 weights"),
        ({"weights": (1 / 9,) * 9}, "1 to 8"),
        ({"weights": (math.nan, 1.0)}, "finite"),
        ({"weights": "abc"}, "numbers"),
        ({"dialect": "sacrebleu", "weights": (0.9, 0.1)}, "equal"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"k": 0}, "positive"),
        ({"effective_order": True}, "sacrebleu"),
        ({"smooth_value": 1.0}, "epsilon, alpha and k"),
        ({"strict": True}, "method0"),
        ({"dtype": torch.int32}, "floating-point"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(InvalidArgument, match=message):
        sentence_bleu([[1, 2]], [[[1, 2]]], **settings)


@pytest.mark.parametrize(
    ("candidates", "references", "lengths", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 1, 3).long(), None, "integer token ids"),
        (torch.ones(2, 3).long(), torch.ones(3, 1, 3).long(), None, "2 candidates and 3 sets"),
        (torch.ones(2, 3).long(), torch.ones(2, 0, 3).long(), None, "0 references"),
        (
            torch.ones(2, 3).long(),
            torch.ones(2, 1, 3).long(),
            torch.tensor([3, 4]),
            "given 4 in candidate_lengths",
        ),
        (torch.ones(2, 3).long(), torch.ones(2, 1, 3).long(), torch.tensor([3.0, 2.0]), "integers"),
        (torch.ones(2, 3).long(), torch.ones(2, 1, 3).long(), torch.tensor([3]), "shape"),
        ([[1, 2], [3]], [[[1]], []], None, "0 references"),
        ([[1.5, 2]], [[[1]]], None, "no integers"),
        ([[2**70]], [[[1]]], None, "64-bit"),
        ("text", [[[1]]], None, "lists of token ids"),
        ([["a"]], [[[1]]], None, "expected token ids"),
        ([[1]], [[[1], 2]], None, "one level"),
    ],
)
def test_bad_input_is_refused(candidates, references, lengths, message):
    with pytest.raises(InvalidArgument, match=message):
        sentence_bleu(candidates, references, lengths)


def test_warnings():
    with pytest.warns(UserWarning, match="sum to 0.5"):
        sentence_bleu([[1, 2]], [[1, 2]], weights=(0.25, 0.25))
    with pytest.warns(UserWarning, match="without smoothing"):
        sentence_bleu([[1, 2]], [[1, 2]], smoothing="none")
    padded = torch.tensor([[4, 5, 6, 0, 0], [7, 0, 0, 0, 0]])
    with pytest.warns(UserWarning, match="look padded"):
        sentence_bleu(padded, torch.arange(10).view(2, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sentence_bleu(padded, torch.arange(10).view(2, 5), pad_id=0)


def test_shapes_and_dtypes_of_results():
    empty = torch.zeros(0, 5, dtype=torch.int64)
    assert sentence_bleu(empty, torch.zeros(0, 2, 5, dtype=torch.int64)).shape == (0,)
    assert sentence_bleu([[1, 2]], [[1, 2]], dtype=torch.float32).dtype == torch.float32
    sets = ((1.0,), (0.5, 0.5))
    assert sentence_bleu([[1, 2], [3, 4]], [[1, 2], [3, 5]], weights=sets).shape == (2, 2)
    assert corpus_bleu([[1, 2]], [[1, 2]], weights=sets).shape == (2,)
    assert corpus_bleu([[1, 2]], [[1, 2]]).shape == ()


def test_compiles_without_a_break():
    candidates, references = torch.randint(0, 5, (4, 12)), torch.randint(0, 5, (4, 2, 12))
    compiled = torch.compile(lambda c, r: sentence_bleu(c, r), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(candidates, references), sentence_bleu(candidates, references))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu_and_is_captured():
    generator = torch.Generator().manual_seed(3)
    candidates = torch.randint(0, 9, (16, 100), generator=generator)
    references = torch.randint(0, 9, (16, 2, 90), generator=generator)
    lengths, reference_lengths = torch.randint(0, 101, (16,)), torch.randint(-1, 91, (16, 2))
    inputs = [t.cuda() for t in (candidates, references, lengths, reference_lengths)]
    for chosen in [{"smoothing": m} for m in METHODS] + [
        {"dialect": "sacrebleu"},
        {"auto_reweigh": True},
        {"weights": (0.1, 0.3, 0.6)},
    ]:
        expected = sentence_bleu(candidates, references, lengths, reference_lengths, **chosen)
        sentence_bleu(*inputs, **chosen)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            scores = sentence_bleu(*inputs, **chosen)
        graph.replay()
        torch.testing.assert_close(scores.cpu(), expected, rtol=0, atol=EXACT, equal_nan=True)

"""BLEU per sentence on token ids, computed in batches on the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tensormill.papers.catalogue import ClaimNotMeasurable, Figure, Measurement, Paper, Row, Run

if TYPE_CHECKING:
    from torch import Tensor

    from tensormill.measure import Timing

PAPER = Paper(
    slug="tensor_bleu",
    title=(
        "TensorBLEU: Vectorized GPU-based BLEU Score Implementation for Per-Sentence In-Training Evaluation"
    ),
    authors="Filipek",
    arxiv="2510.05485",
    room="metrics",
    figures=(
        Figure(
            "a100-256",
            "Faster than NLTK on 256 sentences of 1024 tokens, A100",
            40.2,
            "x",
            "19 ms against 764 ms; NLTK in a loop on the host; mean of 5 runs",
        ),
        Figure(
            "a100-32",
            "Faster than NLTK on 32 sentences of 1024 tokens, A100",
            11.9,
            "x",
            "same",
        ),
        Figure(
            "t4-128-256",
            "Faster than NLTK on 128 sentences of 256 tokens, T4",
            10.2,
            "x",
            "same",
        ),
        Figure(
            "t4-128-1024",
            "Faster than NLTK on 128 sentences of 1024 tokens, T4",
            13.4,
            "x",
            "same",
        ),
        Figure(
            "a100-time",
            "Time for 512 sentences of 1024 tokens, A100",
            41,
            "ms",
            "NLTK 1525 ms",
        ),
        Figure(
            "agreement",
            "Largest difference to NLTK",
            1e-06,
            "BLEU",
            "as the paper says; its released code departs from NLTK in several cases",
        ),
    ),
)

_SOURCES = ("tensormill.metrics.bleu", "tensormill.ops.ngram_matches")
_OFFICIAL = "rxlm"
_MEGABYTE = 1e6


def _inputs(batch: int, length: int, references: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Candidates (batch, length) with seven of ten tokens of their first reference, and the references.

    Token frequencies are Zipf-like over 32000 ids; 0 does not occur (it is the official code's padding).
    """
    import torch

    from tensormill.ops import OPERATORS

    operator = OPERATORS["ngram_matches"]
    sizes = {"batch": batch, "candidate_length": length, "references": references, "reference_length": length}
    generator = torch.Generator(device).manual_seed(seed)
    shape = {**operator.shape_defaults, **sizes, "offset": 1}
    candidates, _, sets, _, _ = operator.inputs(shape, torch.device(device), generator)
    return candidates, sets


def _nltk_loop(candidates: Tensor, references: Tensor, method: str = "method1") -> Callable[[], list[float]]:
    """NLTK's sentence_bleu in a loop; the lists of Python integers are made here, outside the timing."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = getattr(SmoothingFunction(), method)
    pairs = list(zip(references.tolist(), candidates.tolist(), strict=True))
    return lambda: [sentence_bleu(sets, one, smoothing_function=smoothing) for sets, one in pairs]


def _official() -> Callable[..., Any] | None:
    """The released tensor_sentence_bleu, or None where its package is not installed."""
    from tensormill.operator import requires

    if requires("rxlm.metrics.tensorbleu")() is not None:
        return None
    from rxlm.metrics.tensorbleu import tensor_sentence_bleu

    function: Callable[..., Any] = tensor_sentence_bleu
    return function


def _speed(
    run: Run, cases: Sequence[tuple[int, int, int]]
) -> tuple[list[Row], dict[tuple[int, int, int], Any], int]:
    """Time sentence BLEU, NLTK and the official code on (batch, length, references); rows, ratios, rounds.

    Ratios are taken between the 10th percentiles: a busy host delays single calls of a millisecond by a multiple.
    """
    import torch

    from tensormill import measure
    from tensormill.metrics import sentence_bleu
    from tensormill.ops import OPERATORS
    from tensormill.roofline import ceilings

    official = _official()
    machine = ceilings(run.device)
    operator = OPERATORS["ngram_matches"]
    rows: list[Row] = []
    ratios = {}
    rounds = 0
    for index, (batch, length, count) in enumerate(cases):
        what = f"{batch} sentences of {length} tokens, {count} reference{'s' if count > 1 else ''}"
        run.progress(what, index / len(cases))
        candidates, references = _inputs(batch, length, count, run.device, run.seed)
        loop = _nltk_loop(candidates, references)
        difference = (
            sentence_bleu(candidates, references).cpu() - torch.tensor(loop(), dtype=torch.float64)
        ).abs()
        if float(difference.max()) > 1e-9:
            raise ClaimNotMeasurable(
                f"the scores of {what} differ from NLTK's by {float(difference.max()):.1e}"
            )
        calls: dict[str, list[Callable[[], object]]] = {
            "tensormill": [lambda c=candidates, r=references: sentence_bleu(c, r)]  # type: ignore[misc]
        }
        on_gpu = run.device.startswith("cuda")
        dense = 8 * batch * batch * length * (1 + count)  # bytes of each of the official code's count tensors
        if official is not None and dense <= (6 << 30 if on_gpu else 1 << 27):
            calls["official"] = [
                lambda c=candidates, r=references: official(c, r, smoothing_method="floor")  # type: ignore[misc]
            ]
        host = {"nltk": [loop]}
        if on_gpu:
            timings = measure.time_together(calls, run.device, seconds=0.2)
            timings |= measure.time_together(host, "cpu", seconds=0.05)
        else:  # in turn, until each has had its time: a budget that is large for the fast is long for the slow
            timings = measure.time_together({**calls, **host}, "cpu", seconds=0.05)
        rounds = min(t.rounds for t in timings.values())
        cost = operator.cost({**operator.shape_defaults, "batch": batch, "candidate_length": length,
                              "references": count, "reference_length": length})  # fmt: skip
        ratios[batch, length, count] = {
            name: t.seconds / timings["tensormill"].seconds for name, t in timings.items()
        }
        rows += _speed_rows(what, (batch, length, count), timings, machine.limit_seconds(cost))
    return rows, ratios, rounds


def _speed_rows(what: str, case: tuple[int, int, int], timings: dict[str, Timing], limit: float) -> list[Row]:
    ours = timings["tensormill"]
    setting = dict(zip(("batch", "length", "references"), case, strict=True))
    peers = {name: 1e3 * t.seconds for name, t in timings.items() if name != "tensormill"}
    rows = [
        Row(
            f"{what}: time",
            1e3 * ours.seconds,
            "ms",
            (1e3 * ours.low, 1e3 * ours.high),
            peers,
            1e3 * limit,
            setting,
        )
    ]
    for name, label in (("nltk", "NLTK"), ("official", "the official implementation")):
        if name in timings:
            rows.append(
                Row(
                    f"{what}: faster than {label}", timings[name].seconds / ours.seconds, "x", setting=setting
                )
            )
    return rows


def _without_official() -> str:
    return (
        ""
        if _official() is not None
        else f"; the official implementation ({_OFFICIAL}) is not installed here"
    )


@PAPER.claim(
    "C1",
    figure="a100-256",
    criterion="At least 500 times NLTK on 256 sentences of 1024 tokens, and 50 times the official code where it runs",
    scales=("full",),
    needs=("cuda", "python:nltk"),
    measures=_SOURCES,
    peers=("nltk", _OFFICIAL),
)
def speed_on_gpu(run: Run) -> Measurement:
    """Per-sentence BLEU, ids on the GPU, against NLTK's loop on the host of the same machine."""
    cases = [
        (256, 1024, 1),
        (16, 1024, 1),
        (32, 256, 1),
        (32, 1024, 1),
        (512, 1024, 1),
        (64, 1024, 4),
        (1024, 256, 1),
    ]
    rows, ratios, rounds = _speed(run, cases)
    main = ratios[256, 1024, 1]
    official = [r["official"] for r in ratios.values() if "official" in r]
    holds = main["nltk"] >= 500 and all(r >= 50 for r in official)
    least = (
        f", at least {min(official):.0f} times the official implementation"
        if official
        else _without_official()
    )
    return Measurement(rows, holds, f"{main['nltk']:.0f} times NLTK at 256 x 1024{least}", rounds)


@PAPER.claim(
    "C2",
    statement="Faster than NLTK on the CPU too, on one core",
    unit="x",
    criterion="At least 50 times NLTK for 1024 tokens on one thread, and faster than the official code",
    scales=("quick", "full"),
    needs=("cpu", "python:nltk"),
    measures=_SOURCES,
    peers=("nltk", _OFFICIAL),
)
def speed_on_one_core(run: Run) -> Measurement:
    """The paper has no figure for the CPU; its code is slower than NLTK there."""
    import torch

    from tensormill.measure import warn_if_busy

    cases = [(256, 1024, 1), (32, 1024, 1), (32, 256, 1), (16, 1024, 4)]
    if run.scale == "full":
        cases += [(64, 64, 1), (256, 4096, 1)]
    warn_if_busy()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows, ratios, rounds = _speed(run, cases)
    finally:
        torch.set_num_threads(threads)
    least = min(r["nltk"] for (_, length, _), r in ratios.items() if length == 1024)
    holds = least >= 50 and all(r.get("official", 2.0) > 1 for r in ratios.values())
    return Measurement(
        rows, holds, f"at least {least:.0f} times NLTK at 1024 tokens{_without_official()}", rounds
    )


def _peak_bytes(call: Callable[[], object], device: str) -> int:
    """Bytes above what was held before that the call needs at its highest, its result included."""
    import ctypes
    import gc

    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or freed memory would be used again, unseen
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts again
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except OSError as error:
        raise ClaimNotMeasurable(f"this system does not tell a process its peak memory: {error}") from error


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


@PAPER.claim(
    "C3",
    statement="Memory grows linearly with the batch, where the released code holds batch x distinct n-grams",
    unit="MB",
    criterion="At most 50 MB above the inputs for 512 sentences of 1024 tokens, at most doubling when the batch doubles",
    scales=("quick", "full"),
    measures=_SOURCES,
    peers=(_OFFICIAL,),
)
def memory(run: Run) -> Measurement:
    """Peak memory above the inputs; the official code is measured at small batches (it needs gigabytes at 512)."""
    from tensormill.metrics import sentence_bleu

    official = _official()
    full = run.scale == "full"
    length = 1024
    batches = (64, 128, 256, 512)
    official_batches = (32, 64, 128, 256) if full else (8, 16, 32)
    sentence_bleu(
        *_inputs(2, length, 1, run.device, run.seed)
    )  # code and constants are loaded before the measuring
    rows: list[Row] = []
    peaks = []
    for batch in batches:
        run.progress(f"{batch} sentences", batch / (2 * batches[-1]))
        candidates, references = _inputs(batch, length, 1, run.device, run.seed)
        peak = _peak_bytes(lambda c=candidates, r=references: sentence_bleu(c, r), run.device)  # type: ignore[misc]
        peaks.append(peak)
        setting = {"batch": batch, "length": length}
        rows.append(Row(f"{batch} sentences of {length} tokens", peak / _MEGABYTE, "MB", setting=setting))
    if official is not None:
        for batch in official_batches:
            candidates, references = _inputs(batch, length, 1, run.device, run.seed)
            peak = _peak_bytes(lambda c=candidates, r=references: official(c, r), run.device)  # type: ignore[misc]
            setting = {"batch": batch, "length": length}
            rows.append(
                Row(
                    f"{batch} sentences of {length} tokens, official", peak / _MEGABYTE, "MB", setting=setting
                )
            )
    # A megabyte of slack: allocators round up, and small peaks are mostly that.
    linear = all(after <= 2 * before + _MEGABYTE for before, after in itertools.pairwise(peaks))
    holds = linear and peaks[-1] <= 50 * _MEGABYTE
    reason = f"{peaks[-1] / _MEGABYTE:.1f} MB at {batches[-1]} sentences"
    return Measurement(rows, holds, reason + _without_official())


def _random_corpora(count: int, seed: int) -> list[tuple[list[list[int]], list[list[list[int]]]]]:
    """Batches of 50 ragged candidates of 0 to 64 ids with one to four references, vocabularies of 2 to 50000."""
    import random

    draw = random.Random(seed)
    corpora = []
    for index in range(count):
        vocabulary = (2, 3, 10, 1000, 50_000)[index % 5]
        longest = (5, 20, 64)[index % 3]
        candidates, references = [], []
        for _ in range(50):
            sets = [
                [draw.randrange(1, vocabulary + 1) for _ in range(draw.randint(1, longest))]
                for _ in range(draw.randint(1, 4))
            ]
            candidate = [draw.randrange(1, vocabulary + 1) for _ in range(draw.randint(0, longest))]
            if draw.random() < 0.6:  # a piece of a reference inside, so that high orders match
                source = draw.choice(sets)
                candidate = (candidate[:3] + source[draw.randrange(len(source)) :] + candidate[3:])[:64]
            candidates.append(candidate)
            references.append(sets)
        corpora.append((candidates, references))
    return corpora


def _nltk_or_nan(function: Callable[..., Any], *arguments: Any) -> float:
    try:
        return float(function(*arguments))
    except AssertionError:  # method6 without a matching trigram
        return float("nan")


def _worst(ours: Tensor, theirs: Sequence[float]) -> float:
    """Largest difference; infinite where only one of the two is undefined."""
    import torch

    expected = torch.tensor(theirs, dtype=torch.float64)
    ours = ours.reshape(-1).cpu()
    if not torch.equal(ours.isnan(), expected.isnan()):
        return float("inf")
    return float((ours - expected).nan_to_num(0.0).abs().max()) if len(theirs) else 0.0


@PAPER.claim(
    "C4",
    figure="agreement",
    statement="Scores equal NLTK's in all smoothings, and sacreBLEU's in all modes",
    criterion="No score differs from NLTK's or sacreBLEU's by more than 1e-12",
    scales=("quick", "full"),
    needs=("python:nltk", "python:sacrebleu"),
    measures=_SOURCES,
    peers=("nltk", "sacrebleu", _OFFICIAL),
)
def exactness(run: Run) -> Measurement:
    """Random ragged cases, sentence and corpus scores; and how the released code departs from NLTK on them."""
    import warnings

    corpora = _random_corpora(250 if run.scale == "full" else 12, run.seed)
    cases = 50 * len(corpora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NLTK warns of each order without a match
        rows = _against_nltk(run, corpora, cases) + _against_sacrebleu(run, corpora, cases)
        departures = _departures(run, corpora, cases)
    worst = max(row.value for row in rows)
    reason = f"largest difference {worst:.1e} over {cases} sentences for each setting{_without_official()}"
    return Measurement(rows + departures, worst <= 1e-12, reason)


def _on_device(run: Run, corpus: tuple[list[list[int]], list[list[list[int]]]]) -> tuple[Tensor, ...]:
    """Candidates, references, candidate lengths, reference lengths on the device of the run."""
    from tensormill.metrics.bleu import _padded

    candidates, lengths = _padded("candidates", corpus[0])
    references, reference_lengths = _padded("references", corpus[1])
    return tuple(t.to(run.device) for t in (candidates, references, lengths, reference_lengths))


def _against_nltk(run: Run, corpora: Sequence[Any], cases: int) -> list[Row]:
    from nltk.translate import bleu_score

    from tensormill.metrics import corpus_bleu, sentence_bleu

    weights = (0.25,) * 4
    rows: list[Row] = []
    for method in [f"method{i}" for i in range(8)]:
        run.progress(f"NLTK {method}", len(rows) / 20)
        smoothing = getattr(bleu_score.SmoothingFunction(), method)
        sentences = corpus = 0.0
        for candidates, references in corpora:
            tensors = _on_device(run, (candidates, references))
            theirs = [
                _nltk_or_nan(bleu_score.sentence_bleu, sets, one, weights, smoothing)
                for one, sets in zip(candidates, references, strict=True)
            ]
            sentences = max(sentences, _worst(sentence_bleu(*tensors, smoothing=method), theirs))
            whole = _nltk_or_nan(bleu_score.corpus_bleu, references, candidates, weights, smoothing)
            corpus = max(corpus, _worst(corpus_bleu(*tensors, smoothing=method), [whole]))
        setting = {"peer": "nltk", "smoothing": method, "cases": cases}
        rows.append(Row(f"NLTK {method}, sentences", sentences, "BLEU", setting=setting))
        rows.append(Row(f"NLTK {method}, corpus", corpus, "BLEU", setting=setting))
    return rows


def _against_sacrebleu(run: Run, corpora: Sequence[Any], cases: int) -> list[Row]:
    import sacrebleu

    from tensormill.metrics import corpus_bleu, sentence_bleu

    def words(ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    rows: list[Row] = []
    for smoothing in ("none", "floor", "add-k", "exp"):
        run.progress(f"sacreBLEU {smoothing}", 0.6 + len(rows) / 20)
        for effective in (True, False):
            metric = sacrebleu.BLEU(
                tokenize="none", force=True, smooth_method=smoothing, effective_order=effective
            )
            chosen: dict[str, Any] = {
                "dialect": "sacrebleu",
                "smoothing": smoothing,
                "effective_order": effective,
            }
            worst = 0.0
            for candidates, references in corpora:
                tensors = _on_device(run, (candidates, references))
                pairs = [
                    (words(one), [words(x) for x in sets])
                    for one, sets in zip(candidates, references, strict=True)
                ]
                scores = [
                    metric._aggregate_and_compute(
                        metric._extract_corpus_statistics([one], [[x] for x in sets])
                    ).score
                    for one, sets in pairs
                ]
                worst = max(
                    worst, _worst(sentence_bleu(*tensors, **chosen), [score / 100 for score in scores])
                )
                most = max(len(sets) for _, sets in pairs)
                streams: list[Any] = [
                    [sets[k] if k < len(sets) else None for _, sets in pairs] for k in range(most)
                ]
                whole = metric.corpus_score([one for one, _ in pairs], streams).score / 100
                worst = max(worst, _worst(corpus_bleu(*tensors, **chosen), [whole]))
            what = f"sacreBLEU {smoothing}{', effective order' if effective else ''}, sentences and corpus"
            setting = {
                "peer": "sacrebleu",
                "smoothing": smoothing,
                "effective_order": effective,
                "cases": cases,
            }
            rows.append(Row(what, worst, "BLEU", setting=setting))
    return rows


def _departures(run: Run, corpora: Sequence[Any], cases: int) -> list[Row]:
    """How often and how far the released code departs from NLTK, given padding of 0 (no id is 0)."""
    from nltk.translate import bleu_score

    official = _official()
    if official is None:
        return []
    rows: list[Row] = []
    names = {"none": "method0", "floor": "method1", "add-k": "method2", "exp": "method3"}
    for smoothing, method in names.items():
        run.progress(f"official {smoothing}", 0.9)
        function = getattr(bleu_score.SmoothingFunction(), method)
        worst, wrong = 0.0, 0
        for candidates, references in corpora:
            ids, sets_of_ids, _, _ = _on_device(run, (candidates, references))
            scores = official(ids, sets_of_ids, smoothing_method=smoothing).tolist()
            for score, one, sets in zip(scores, candidates, references, strict=True):
                away = abs(score - bleu_score.sentence_bleu(sets, one, smoothing_function=function))
                worst, wrong = max(worst, away), wrong + (away > 1e-6)
        setting = {"implementation": "official", "smoothing": smoothing, "cases": cases}
        rows.append(
            Row(f"official code, {smoothing}: departs from NLTK {method} by over 1e-6", 100 * wrong / cases, "%",
                setting=setting)
        )  # fmt: skip
        rows.append(Row(f"official code, {smoothing}: largest departure", worst, "BLEU", setting=setting))
    return rows

"""C1 and C7: what AWQ loses, beside round-to-nearest, GPTQ, and the quantizers that people use today."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensormill.papers.awq.paper import PAPER
from tensormill.papers.awq.subjects import SOURCES, Subject, builtin_subjects, smollm2
from tensormill.papers.catalogue import ClaimNotMeasurable, Measurement, Row, Run

if TYPE_CHECKING:
    from tensormill.compress.evaluate import Evaluation
    from tensormill.compress.peers import Peer

METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "rtn": ("rtn", {}),
    "gptq": ("gptq", {"clip": False}),
    "gptq, clip": ("gptq", {}),
    "awq": ("awq", {}),
    "awq, gptq rounding": ("awq", {"rounding": "gptq"}),
}
"""Ours by name: method and settings."""
OURS = ("awq", "awq, gptq rounding")
BITS = (4, 3)
GAP_WANTED = {"plain": (0.0, 0.0), "outliers": (0.5, 0.35), "SmolLM2-135M": (0.5, 0.35)}
"""Share of the gap between round-to-nearest and the original to close at 4 and 3 bits; the mixture is only shown."""


_SOURCES = (
    *SOURCES,
    "tensormill.compress.awq",
    "tensormill.compress.gptq",
    "tensormill.compress.rtn",
    "tensormill.compress.clipping",
    "tensormill.ops.clipping_error",
    "tensormill.compress.output_error",
    "tensormill.ops.quantization_error",
    "tensormill.compress.peers",
)
_PEERS = ("llmcompressor", "compressed-tensors", "hqq")
_CRITERION = (
    "AWQ's perplexity is below round-to-nearest's with a paired 95 % interval that excludes zero; with outliers it closes "
    "at least 50 % (4 bits) and 35 % (3 bits) of the gap; and it is not significantly above that of the best peer "
    "installed, each at the better of its options (ours: rounding to nearest, or as GPTQ does)"
)


@PAPER.claim(
    "C1",
    figure="int4-perplexity",
    statement="AWQ loses less quality than round-to-nearest, and no more than the peers, at 4 and at 3 bits",
    criterion=f"on the built-in model at 4 and 3 bits in groups of 128, {_CRITERION}",
    measures=_SOURCES,
    peers=_PEERS,
)
def quality(run: Run) -> Measurement:
    """Perplexity of the built-in model, untouched and with injected outliers, after RTN, GPTQ, AWQ and the peers.

    Injected outliers are exactly what scale folding can undo, so they are reported beside the untouched model and,
    at full scale, beside the mixture of value heads, which no channel scale undoes. Peers get the same windows: on the
    untouched model with all their options, on the others with their defaults. At quick scale only GPTQ and HQQ take
    part, on the untouched model, since llm-compressor's AWQ takes a CPU many minutes.
    """
    from tensormill.compress.peers import installed

    full = run.scale == "full"
    variants = ("plain", "outliers", "mixture") if full else ("plain", "outliers")
    subjects = list(builtin_subjects(run, variants, None if full else 16384))
    peers = {name: installed(options=False) if full else {} for name in variants}
    peers["plain"] = installed() if full else installed(("gptq", "hqq"), options=False)
    return _judged(run, subjects, peers, samples=128 if full else 32)


@PAPER.claim(
    "C7",
    figure="int4-perplexity",
    statement="The same on SmolLM2-135M, a trained model with outliers of its own, and WikiText-2",
    criterion=f"at 4 and 3 bits in groups of 64 (its width is 576), {_CRITERION}",
    scales=("full",),
    measures=_SOURCES,
    peers=_PEERS,
)
def quality_on_smollm2(run: Run) -> Measurement:
    """Perplexity of SmolLM2-135M on WikiText-2's test text, calibrated on the validation text.

    Its weights come from a 4-bit file in groups of 32 with real minima; its dequantized form is the original here, and
    no setting measured falls on the grid of that file.
    """
    from tensormill.compress.peers import installed

    subject = smollm2(run)
    if isinstance(subject, str):
        raise ClaimNotMeasurable(subject)
    return _judged(run, [subject], {subject.name: installed()}, samples=128)


def _judged(
    run: Run, subjects: Sequence[Subject], peers: Mapping[str, Mapping[str, Peer]], samples: int
) -> Measurement:
    """All subjects at all widths, and what fell short."""
    rows: list[Row] = []
    failures: list[str] = []
    for i, subject in enumerate(subjects):
        for j, bits in enumerate(BITS):
            run.progress(f"{subject.name}, {bits} bits", (len(BITS) * i + j) / (len(BITS) * len(subjects)))
            comparison = compare_methods(run, subject, bits, peers[subject.name], samples)
            rows += comparison.rows
            if subject.name in GAP_WANTED:
                failures += shortfalls(comparison, GAP_WANTED[subject.name][j])
    notes = [] if any(peers.values()) else ["no peer is installed"]
    reason = "; ".join(
        [*failures, *notes] or ["better than round-to-nearest everywhere, and the gaps are closed"]
    )
    return Measurement(rows, holds=not failures, reason=reason)


@dataclass(frozen=True)
class QualityComparison:
    """Rows of every method on one model at one width, and what the criterion needs of them."""

    label: str
    rows: list[Row]
    scores: Mapping[str, Evaluation]
    peers: tuple[str, ...]
    seed: int


def compare_methods(
    run: Run, subject: Subject, bits: int, peers: Mapping[str, Peer], samples: int
) -> QualityComparison:
    """Compress copies of a model with every method and peer on the same windows, and evaluate all on the same text."""
    import copy

    from tensormill.compress.evaluate import evaluate_models, paired_bootstrap
    from tensormill.compress.methods import METHODS as REGISTRY

    calibration = subject.calibration(samples)
    models = {"original": subject.model}
    for name, (method, options) in METHODS.items():
        run.progress(f"{subject.name}, {bits} bits: {name}", None)
        config, apply = REGISTRY[method]
        models[name] = copy.deepcopy(subject.model)
        settings = config(bits=bits, group_size=subject.group_size, **options)
        apply(models[name], settings, None if method == "rtn" else calibration, None)
    for name, peer in peers.items():
        run.progress(f"{subject.name}, {bits} bits: {name}", None)
        models[name] = peer(subject.model, calibration, bits=bits, group_size=subject.group_size).model
    window = 1024 if subject.name.startswith("SmolLM2") else 2048
    scores = evaluate_models(
        models,
        subject.tokenizer,
        subject.text,
        reference="original",
        window=window,
        max_tokens=subject.max_tokens,
    )
    label = f"{subject.name} W{bits}"
    gap = scores["rtn"].perplexity - scores["original"].perplexity
    setting = {
        "group_size": subject.group_size,
        "samples": samples,
        "tokens": scores["rtn"].tokens,
        "windows": scores["rtn"].windows,
    }
    rows = [Row(f"{label} original", scores["original"].perplexity, "perplexity", setting=setting)]
    for name in models:
        score = scores[name]
        if score.comparison is None:
            continue
        options = dict(peers[name].settings) if name in peers else METHODS[name][1]
        rows.append(Row(f"{label} {name}", score.perplexity, "perplexity", setting={**setting, **options}))
        if subject.name.startswith("SmolLM2"):
            first = score.window_nll[:4].mean().exp().item()
            rows.append(Row(f"{label} {name}, first 4 windows", first, "perplexity"))
        rows.append(Row(f"{label} {name} KL to the original", score.comparison.kl, "nats per token"))
        if name == "rtn":
            continue
        closed = (scores["rtn"].perplexity - score.perplexity) / gap
        rows.append(Row(f"{label} {name} gap closed", closed, "share"))
        for other in ("rtn",) if name == "awq" else ("rtn", "awq"):
            interval = paired_bootstrap(score.window_nll, scores[other].window_nll, seed=run.seed)
            spread = (interval.low, interval.high)
            rows.append(Row(f"{label} {name} minus {other}", interval.estimate, "perplexity", spread))
    return QualityComparison(label, rows, scores, tuple(peers), run.seed)


def shortfalls(comparison: QualityComparison, wanted: float) -> list[str]:
    """What AWQ fell short of, in words.

    Args:
        comparison: of one model at one width.
        wanted: share of the gap to close.
    """
    from tensormill.compress.evaluate import paired_bootstrap

    label, scores = comparison.label, comparison.scores
    awq, rtn = min((scores[name] for name in OURS), key=lambda one: one.perplexity), scores["rtn"]
    missed = []
    interval = paired_bootstrap(awq.window_nll, rtn.window_nll, seed=comparison.seed)
    if not (interval.excludes_zero and interval.estimate < 0):
        missed.append(f"{label}: not significantly better than round-to-nearest")
    closed = (rtn.perplexity - awq.perplexity) / (rtn.perplexity - scores["original"].perplexity)
    if closed < wanted:
        missed.append(f"{label}: {closed:.0%} of the gap closed, {wanted:.0%} wanted")
    if comparison.peers:
        best = min(comparison.peers, key=lambda name: scores[name].perplexity)
        interval = paired_bootstrap(awq.window_nll, scores[best].window_nll, seed=comparison.seed)
        if interval.excludes_zero and interval.estimate > 0:
            missed.append(
                f"{label}: {best} is better ({scores[best].perplexity:.3f}, ours {awq.perplexity:.3f})"
            )
    return missed

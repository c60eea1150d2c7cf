"""C5: what calibrating on another kind of text costs, AWQ beside GPTQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensormill.papers.awq.paper import PAPER
from tensormill.papers.awq.subjects import SOURCES, Subject, builtin_subjects, english_text, smollm2
from tensormill.papers.catalogue import Measurement, Row, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel

    from tensormill.compress.calibration import Calibration
    from tensormill.compress.evaluate import Evaluation, Interval
    from tensormill.compress.peers import Peer

    Compressor = Callable[[PreTrainedModel, Calibration], PreTrainedModel]

BITS = 3
WINDOW = 256
"""Tokens of an evaluation window: short ones, so that there are enough to resample."""


@PAPER.claim(
    "C5",
    figure="calibration-domain",
    statement="Calibrated on another domain, AWQ loses less than GPTQ does",
    criterion=(
        "at 3 bits, on every model, the rise of the log-perplexity by calibrating on another kind of text is smaller "
        "with AWQ than with GPTQ, with a paired 95 % interval of the difference that excludes zero"
    ),
    measures=(
        *SOURCES,
        "tensormill.compress.awq",
        "tensormill.compress.gptq",
        "tensormill.compress.clipping",
        "tensormill.ops.clipping_error",
        "tensormill.compress.output_error",
        "tensormill.ops.quantization_error",
        "tensormill.compress.peers",
    ),
    peers=("llmcompressor", "compressed-tensors"),
)
def robustness(run: Run) -> Measurement:
    """Perplexity on text of one kind after calibrating on it and on another, for AWQ and GPTQ, ours and the peers'.

    The built-in model is judged on Python and calibrated on Python or on English; at full scale also with injected
    outliers, and SmolLM2-135M is judged on WikiText-2 and calibrated on it or on Python. English is public-domain
    books where the optional data lie, else docstrings of the standard library.
    """
    from tensormill.compress.peers import installed
    from tensormill.data.python_source import calibration_text

    full = run.scale == "full"
    name, prose = english_text()
    python = ("Python", calibration_text())
    cases: list[tuple[Subject, str, tuple[str, str]]] = [
        (subject, "Python", (name, prose))
        for subject in builtin_subjects(
            run, ("plain", "outliers") if full else ("plain",), None if full else 8192
        )
    ]
    notes = [f"English is {name}"]
    if full:
        found = smollm2(run)
        if isinstance(found, str):
            notes.append(found)
        else:
            cases.append((found, "WikiText-2", python))
    peers = installed(("awq", "gptq"), options=False) if full else {}
    rows: list[Row] = []
    failures: list[str] = []
    for i, (subject, own, foreign) in enumerate(cases):
        run.progress(subject.name, i / len(cases))
        compressors = our_compressors(subject) | {
            name: peer_compressor(peer, subject.group_size) for name, peer in peers.items()
        }
        made, missed = _measure(
            run, subject, own, foreign, compressors, samples=128 if full else 16, part=(i, len(cases))
        )
        rows += made
        failures += missed
    return Measurement(
        rows, holds=not failures, reason="; ".join([*(failures or ["AWQ's rise is the smaller"]), *notes])
    )


def our_compressors(subject: Subject) -> dict[str, Compressor]:
    """Our AWQ and GPTQ by name, each as a function of a model, which stays as it is, and the calibration.

    With GPTQ's rounding AWQ isn't judged, only shown: it is the more accurate, and what it fits could be lost elsewhere.
    """
    import copy

    from tensormill.compress.methods import METHODS

    def compressor(method: str, **settings: Any) -> Compressor:
        config, apply = METHODS[method]

        def run(model: PreTrainedModel, calibration: Calibration) -> PreTrainedModel:
            made = copy.deepcopy(model)
            apply(made, config(bits=BITS, group_size=subject.group_size, **settings), calibration, None)
            return made

        return run

    return {
        "awq": compressor("awq"),
        "gptq": compressor("gptq", clip=False),
        "awq, gptq rounding": compressor("awq", rounding="gptq"),
    }


def peer_compressor(peer: Peer, group_size: int) -> Compressor:
    """A peer as a function of a model and the calibration."""
    return lambda model, calibration: peer(model, calibration, bits=BITS, group_size=group_size).model


def _measure(
    run: Run,
    subject: Subject,
    own: str,
    foreign: tuple[str, str],
    compressors: Mapping[str, Compressor],
    samples: int,
    part: tuple[int, int],
) -> tuple[list[Row], list[str]]:
    from tensormill.compress.evaluate import evaluate

    name, text = foreign
    calibrations = {own: subject.calibration(samples), name: subject.calibration(samples, text)}
    scores: dict[tuple[str, str], Evaluation] = {}
    steps = len(compressors) * len(calibrations)
    for method, compress in compressors.items():
        for kind, calibration in calibrations.items():
            run.progress(
                f"{subject.name}: {method} calibrated on {kind}", (part[0] + len(scores) / steps) / part[1]
            )
            scores[method, kind] = evaluate(
                compress(subject.model, calibration),
                subject.tokenizer,
                subject.text,
                window=WINDOW,
                max_tokens=subject.max_tokens,
            )
    original = evaluate(
        subject.model, subject.tokenizer, subject.text, window=WINDOW, max_tokens=subject.max_tokens
    )
    setting = {
        "bits": BITS,
        "group_size": subject.group_size,
        "samples": samples,
        "tokens": original.tokens,
        "windows": original.windows,
        "evaluated on": own,
    }
    rows = [Row(f"{subject.name} original", original.perplexity, "perplexity", setting=setting)]
    rises = {}
    for method in compressors:
        rises[method] = rise(scores[method, own], scores[method, name], run.seed)
        for kind in calibrations:
            rows.append(
                Row(
                    f"{subject.name} {method} calibrated on {kind}",
                    scores[method, kind].perplexity,
                    "perplexity",
                )
            )
        interval = rises[method].perplexity
        rows.append(
            Row(
                f"{subject.name} {method}: rise by calibrating on {name}",
                interval.estimate,
                "perplexity",
                (interval.low, interval.high),
            )
        )
    failures = []
    for awq in (method for method in compressors if "awq" in method):
        gptq = awq.removesuffix(", gptq rounding").replace("awq", "gptq")
        if gptq not in rises:
            continue
        difference = difference_of_rises(rises[awq], rises[gptq], run.seed)
        rows.append(
            Row(
                f"{subject.name} {awq} minus {gptq}: rise of the log-perplexity",
                difference.estimate,
                "nats per token",
                (difference.low, difference.high),
            )
        )
        if awq == "awq" and not (difference.excludes_zero and difference.estimate < 0):
            failures.append(
                f"{subject.name}: AWQ's rise ({rises[awq].perplexity.estimate:+.3f}) isn't significantly below "
                f"GPTQ's ({rises[gptq].perplexity.estimate:+.3f})"
            )
    return rows, failures


@dataclass(frozen=True)
class Rise:
    """What calibrating on another text costs a method.

    Attributes:
        perplexity: the difference, with its paired interval.
        window_nll: (windows,) the difference of each window's mean loss, in nats.
    """

    perplexity: Interval
    window_nll: Tensor


def rise(own: Evaluation, foreign: Evaluation, seed: int = 0) -> Rise:
    """The rise from one evaluation to another on the same windows."""
    from tensormill.compress.evaluate import paired_bootstrap

    return Rise(
        paired_bootstrap(foreign.window_nll, own.window_nll, seed=seed), foreign.window_nll - own.window_nll
    )


def difference_of_rises(first: Rise, second: Rise, seed: int = 0) -> Interval:
    """The first rise less the second, in nats per token, over windows drawn for all four models together."""
    from tensormill.compress.evaluate import paired_bootstrap

    return paired_bootstrap(first.window_nll, second.window_nll, statistic="nll", seed=seed)

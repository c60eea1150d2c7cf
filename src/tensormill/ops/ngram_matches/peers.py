"""What else counts clipped n-grams of token ids: NLTK's loop and the official implementation of TensorBLEU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tensormill.operator import requires
from tensormill.ops.ngram_matches import operator


def _lists(
    candidates: Tensor, candidate_lengths: Tensor, references: Tensor, reference_lengths: Tensor
) -> list[tuple[list[int], list[list[int]]]]:
    """Every candidate with its present references, as Python lists."""
    group = candidates.shape[0] // max(1, references.shape[0])
    rows, reference_rows = candidates.tolist(), references.tolist()
    sizes, reference_sizes = candidate_lengths.tolist(), reference_lengths.tolist()
    pairs = []
    for b, row in enumerate(rows):
        sets = zip(reference_rows[b // group], reference_sizes[b // group], strict=True)
        pairs.append((row[: sizes[b]], [reference[:size] for reference, size in sets if size > 0]))
    return pairs


def _nltk(
    candidates: Tensor, candidate_lengths: Tensor, references: Tensor, reference_lengths: Tensor, max_n: int
) -> Callable[[], tuple[Tensor, ...]]:
    from nltk.translate.bleu_score import closest_ref_length, modified_precision

    pairs = _lists(candidates, candidate_lengths, references, reference_lengths)
    device = candidates.device

    def call() -> tuple[Tensor, ...]:
        matches, totals, closest = [], [], []
        for candidate, sets in pairs:
            fractions = [modified_precision(sets, candidate, n) for n in range(1, max_n + 1)]
            matches.append([f.numerator for f in fractions])
            totals.append([f.denominator if len(candidate) >= n else 0 for n, f in enumerate(fractions, 1)])
            closest.append(closest_ref_length(sets, len(candidate)) if sets else 0)
        return tuple(torch.tensor(v, dtype=torch.int32, device=device) for v in (matches, totals, closest))

    return call


def _tensorbleu(
    candidates: Tensor, candidate_lengths: Tensor, references: Tensor, reference_lengths: Tensor, max_n: int
) -> Callable[[], Tensor]:
    """The whole sentence score (its counts are not exposed), so the result isn't compared."""
    from rxlm.metrics.tensorbleu import tensor_sentence_bleu

    group = candidates.shape[0] // references.shape[0]
    weights = torch.full((max_n,), 1 / max_n, device=candidates.device)
    padded = _padded(candidates, candidate_lengths)
    padded_references = _padded(references, reference_lengths).repeat_interleave(group, 0)
    return lambda: tensor_sentence_bleu(padded, padded_references, pad_token_id=-1, weights=weights)


def _padded(ids: Tensor, lengths: Tensor) -> Tensor:
    beyond = torch.arange(ids.shape[-1], device=ids.device) >= lengths[..., None]
    return ids.masked_fill(beyond, -1)


def _dense_counts_fit(
    candidates: Tensor, candidate_lengths: Tensor, references: Tensor, reference_lengths: Tensor, max_n: int
) -> bool:
    """Its three dense count tensors are batch x distinct n-grams of int64; below 4 GiB each."""
    batch = candidates.shape[0]
    positions = batch * (candidates.shape[1] + references.shape[1] * references.shape[2])
    return 0 < 8 * batch * positions < 2**32


operator.peer(
    "nltk modified_precision",
    devices=("cpu", "cuda"),
    make=_nltk,
    missing=requires("nltk"),
    supports=lambda candidates, *rest: 0 < candidates.numel() <= 2**18,
)
operator.peer(
    "rxlm tensor_sentence_bleu",
    devices=("cpu", "cuda"),
    make=_tensorbleu,
    missing=requires("rxlm.metrics.tensorbleu"),
    supports=_dense_counts_fit,
    tolerance=float("inf"),
)

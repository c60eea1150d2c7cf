"""The definition of `ngram_matches`, with dictionaries; obviously right, slow."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor


def reference(
    candidates: Tensor, candidate_lengths: Tensor, references: Tensor, reference_lengths: Tensor, max_n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Count with dictionaries, on the host.

    Args:
        candidates: (batch, length) integers.
        candidate_lengths: (batch,) integers, 0 to length.
        references: (prompts, count, length) integers; prompts divides batch, and candidate b is compared with
            prompt b // (batch // prompts).
        reference_lengths: (prompts, count) integers; below 1: absent.
        max_n: largest order.

    Returns:
        matches (batch, max_n), totals (batch, max_n), reference_length (batch,), all int32.
    """
    batch, group = candidates.shape[0], candidates.shape[0] // max(1, references.shape[0])
    sizes, reference_sizes = candidate_lengths.tolist(), reference_lengths.tolist()
    rows, reference_rows = candidates.tolist(), references.tolist()
    matches, totals, closest = [], [], []
    for b in range(batch):
        candidate = rows[b][: max(0, sizes[b])]
        present = [
            row[:size]
            for row, size in zip(reference_rows[b // group], reference_sizes[b // group], strict=True)
            if size > 0
        ]
        for n in range(1, max_n + 1):
            allowed: Counter[tuple[int, ...]] = Counter()
            for row in present:
                allowed |= _ngrams(row, n)  # the larger count of every n-gram
            matches.append((_ngrams(candidate, n) & allowed).total())
            totals.append(max(0, len(candidate) - n + 1))
        closest.append(
            min((abs(len(row) - len(candidate)), len(row)) for row in present)[1] if present else 0
        )

    def tensor(values: list[int], *shape: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=candidates.device).reshape(shape)

    return tensor(matches, batch, max_n), tensor(totals, batch, max_n), tensor(closest, batch)


def _ngrams(tokens: list[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(zip(*(tokens[k:] for k in range(n)), strict=False))

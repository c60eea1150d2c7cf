"""Compiled CPU implementation: checks and hands over pointers; the kernel is cpu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.ops.ngram_matches import _cpu  # type: ignore[attr-defined]


def count_matches(
    candidates: Tensor, candidate_lengths: Tensor, references: Tensor, reference_lengths: Tensor, max_n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as for `tensormill.ops.ngram_matches.reference.reference`."""
    batch, width = candidates.shape
    prompts, count, longest = references.shape
    group = batch // prompts if prompts else 0
    candidates, references = candidates.contiguous(), references.contiguous()
    candidate_lengths = candidate_lengths.to(torch.int64).contiguous()
    reference_lengths = reference_lengths.to(torch.int64).contiguous()
    matches = torch.empty((batch, max_n), dtype=torch.int32)
    totals, closest = torch.empty_like(matches), torch.empty(batch, dtype=torch.int32)
    if batch == 0:
        return matches, totals, closest
    _cpu.ngram_matches(
        candidates.data_ptr(),
        candidate_lengths.data_ptr(),
        references.data_ptr(),
        reference_lengths.data_ptr(),
        matches.data_ptr(),
        totals.data_ptr(),
        closest.data_ptr(),
        prompts,
        group,
        width,
        count,
        longest,
        max_n,
        candidates.dtype == torch.int64,
        torch.get_num_threads(),
    )
    return matches, totals, closest

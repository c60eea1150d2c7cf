"""Portable implementation in PyTorch: sort, number, compare; memory linear in the tokens, no wait for the device.

Order by order, every position of a prompt (its candidates' and its references') gets the rank of its n-gram among
the prompt's distinct n-grams: the rank for order n comes from sorting pairs (rank of the (n-1)-gram here, rank of
the token n - 1 further on). The sort is stable and a sequence's positions are contiguous, so equal n-grams of one
sequence follow one another in it, and their place in that run is how many equal ones stand before them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_matches(
    candidates: Tensor, candidate_lengths: Tensor, references: Tensor, reference_lengths: Tensor, max_n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as for `tensormill.ops.ngram_matches.reference.reference`."""
    batch, width = candidates.shape
    prompts, count, longest = references.shape
    device = candidates.device
    candidate_lengths = candidate_lengths.to(torch.int64).clamp(0, width)
    reference_lengths = reference_lengths.to(torch.int64).clamp(-1, longest)
    orders = torch.arange(max_n, device=device)
    totals = (candidate_lengths[:, None] - orders).clamp_min(0).to(torch.int32)
    if batch == 0:
        return totals, totals.clone(), totals.new_empty(0)
    group = batch // prompts
    closest = closest_lengths(
        candidate_lengths.view(prompts, group), reference_lengths, max(width, longest)
    ).view(batch)
    tokens = torch.cat([candidates.reshape(prompts, -1), references.reshape(prompts, -1)], 1)  # [P, S]
    if tokens.shape[1] == 0:
        return torch.zeros_like(totals), totals, closest

    def per_position(of_candidates: Tensor, of_references: Tensor) -> Tensor:
        ours = of_candidates.repeat_interleave(width, -1, output_size=group * width)
        theirs = of_references.repeat_interleave(longest, -1, output_size=count * longest)
        return torch.cat([ours, theirs], -1)

    sequence = per_position(
        torch.arange(group, device=device), torch.arange(count, device=device) + group
    )  # [S]
    within = torch.cat(
        [torch.arange(width, device=device).repeat(group), torch.arange(longest, device=device).repeat(count)]
    )
    length = per_position(candidate_lengths.view(prompts, group), reference_lengths)  # [P, S]
    place = torch.arange(tokens.shape[1], device=device)
    matches = torch.zeros((prompts, group, max_n), dtype=torch.int32, device=device)
    token_rank = rank = None
    for n in range(1, max_n + 1):
        if rank is None or token_rank is None:
            keys = tokens
        else:
            # Rolled ranks from the next sequence spoil only n-grams that run past the end: they are not valid.
            keys = rank * tokens.shape[1] + token_rank.roll(1 - n, 1)
        ordered, origin = keys.sort(dim=1, stable=True)
        new = torch.ones_like(ordered, dtype=torch.bool)
        new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        sorted_rank = new.cumsum(1) - 1
        owner = sequence[origin]
        new[:, 1:] |= owner[:, 1:] != owner[:, :-1]
        earlier = place - torch.where(new, place, 0).cummax(1).values
        valid = (within + n <= length).gather(1, origin)
        of_reference = owner >= group
        allowed = torch.zeros_like(sorted_rank).scatter_reduce_(
            1, sorted_rank, torch.where(valid & of_reference, earlier + 1, 0), "amax"
        )
        counted = valid & ~of_reference & (earlier < allowed.gather(1, sorted_rank))
        here = torch.zeros_like(counted).scatter_(1, origin, counted)[:, : group * width]
        matches[:, :, n - 1] = here.view(prompts, group, width).sum(-1)
        rank = torch.empty_like(sorted_rank).scatter_(1, origin, sorted_rank)
        token_rank = rank if token_rank is None else token_rank
    return matches.view(batch, max_n), totals, closest


def closest_lengths(candidate: Tensor, reference: Tensor, longest: int) -> Tensor:
    """The reference length closest to each candidate's, the shorter one at a tie, 0 where none is present.

    Args:
        candidate: (prompts, group) integers.
        reference: (prompts, count) integers; below 1: absent.
        longest: an upper bound of all lengths.

    Returns:
        (prompts, group) int32.
    """
    reference = reference[:, None]  # [P, 1, R]
    distance = (reference - candidate[:, :, None]).abs() * (longest + 1) + reference
    distance = distance.masked_fill(reference < 1, (longest + 1) ** 2)
    nearest = distance.min(-1).values
    return torch.where(nearest < (longest + 1) ** 2, nearest % (longest + 1), 0).to(torch.int32)

"""Finds the range of each group of weights that is worth representing: a smaller one has a finer step."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from tensormill.compress.formats.quantization import (
    QuantSpec,
    fake_quantize,
    group_grid,
    round_to_codes,
    split_groups,
)
from tensormill.compress.output_error import search_numbers, squared_outputs
from tensormill.compress.precision import search_precision
from tensormill.ops.clipping_error import clipping_error

# Rows whose whole error is computed at once.
_ROWS = 2048


def gram_blocks(gram: Tensor, spec: QuantSpec) -> Tensor:
    """(G, group, group) diagonal blocks of a Gram matrix (K, K), one per group, a short last one padded."""
    size, groups = spec.columns_per_group(len(gram)), spec.num_groups(len(gram))
    missing = size * groups - len(gram)
    padded = functional.pad(gram, (0, missing, 0, missing)) if missing else gram
    return padded.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def search_clip(
    weight: Tensor, gram: Tensor, spec: QuantSpec, *, clip_grid: int = 40, clip_max_shrink: float = 0.7
) -> Tensor:
    """For each row and group, the largest magnitude to keep so that the group's output error is least.

    Args:
        weight: (N, K) float32.
        gram: (G, group, group) float32, as `gram_blocks`.
        spec: the quantizer.
        clip_grid: steps between the full range and none.
        clip_max_shrink: share of the range that may go; candidates are 1 - i / clip_grid for i below
            `clip_max_shrink * clip_grid`.

    Returns:
        (N, G) magnitudes; the group's own maximum where nothing is better.

    With 2 bits, a finer step for three weights is worth more than the range of the fourth:

    >>> weight = torch.tensor([[0.0, 0.8, 1.6, 3.0]])
    >>> search_clip(weight, torch.eye(4)[None], QuantSpec(bits=2, group_size=4))
    tensor([[2.7750]])
    """
    ratios = _ratios(clip_grid, clip_max_shrink, weight.device)
    best = []
    for rows in torch.split(weight, max(1, search_numbers(gram.device) // weight.shape[1])):
        with search_precision(gram.device):
            errors = clipping_error(rows, gram, ratios, spec)  # [ratios, rows, G]
        errors.nan_to_num_(nan=math.inf, posinf=math.inf)  # what overflows is never the least
        largest = split_groups(rows, spec).abs().amax(dim=-1)
        best.append(largest * ratios[errors.argmin(dim=0)])
    return torch.cat(best)


def _ratios(clip_grid: int, clip_max_shrink: float, device: torch.device) -> Tensor:
    """The shares of a group's range that a search tries, the whole range first."""
    steps = range(max(1, math.ceil(clip_grid * clip_max_shrink)))
    return torch.tensor([1 - step / clip_grid for step in steps], dtype=torch.float32, device=device)


def search_grid(
    groups: Tensor, cost: Tensor, spec: QuantSpec, *, clip_grid: int = 40, clip_max_shrink: float = 0.7
) -> tuple[Tensor, Tensor]:
    """For each row and group, the grid on which rounding to nearest costs least, of those of smaller and smaller ranges.

    Args:
        groups: (N, G, group) float32 weights.
        cost: (G, group) float32, of the square of an error.
        spec: the quantizer.
        clip_grid, clip_max_shrink: as `search_clip`.

    Returns:
        scales and zero points, (N, G) float32 each, the latter integers.

    With 2 bits, a finer step for three weights is worth more than the range of the fourth:

    >>> weight = torch.tensor([[[0.0, 0.8, 1.6, 3.0]]])
    >>> scale, zero = search_grid(weight, torch.ones(1, 4), QuantSpec(bits=2, group_size=4))
    >>> scale
    tensor([[0.9250]])
    """
    found = []
    for rows in torch.split(groups, max(1, search_numbers(groups.device) // groups[0].numel())):
        largest = rows.abs().amax(dim=-1, keepdim=True)
        best: tuple[Tensor, Tensor] | None = None
        for step in range(max(1, math.ceil(clip_grid * clip_max_shrink))):
            limit = largest * (1 - step / clip_grid)
            scale, zero = group_grid(rows.clamp(-limit, limit), spec)
            # What lies outside of the range may still find a code beyond it, so it isn't clamped here.
            d = round_to_codes(rows, scale, zero, spec).sub_(zero).mul_(scale).sub_(rows)
            error = torch.bmm(d.square_().transpose(0, 1), cost.unsqueeze(-1)).transpose(0, 1)
            if best is None:
                best, least = (scale, zero), error
            else:
                better = error < least
                best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
                least = torch.minimum(error, least)
        found.append(best)
    scales, zeros = (torch.cat(parts).squeeze(-1) for parts in zip(*found, strict=True))
    return scales, zeros


def search_ranges(
    weight: Tensor, gram: Tensor, spec: QuantSpec, *, clip_grid: int = 40, clip_max_shrink: float = 0.7
) -> Tensor:
    """(N, G) magnitudes as `search_clip` finds them for a weight (N, K) and a Gram matrix (K, K), in the rows they help."""
    clip = search_clip(
        weight, gram_blocks(gram, spec), spec, clip_grid=clip_grid, clip_max_shrink=clip_max_shrink
    )
    return keep_helpful_rows(weight, clip, gram, spec)


def keep_helpful_rows(weight: Tensor, clip: Tensor, gram: Tensor, spec: QuantSpec) -> Tensor:
    """Undo the clipping of rows whose whole output error it doesn't lower.

    Groups are clipped one by one, blind to the correlations between them; here they are counted.

    Args:
        weight: (N, K) float32.
        clip: (N, G) magnitudes.
        gram: (K, K) float32.
        spec: the quantizer.

    Returns:
        (N, G) magnitudes, with the groups' own maxima in rows that are better off so.
    """
    largest = split_groups(weight, spec).abs().amax(dim=-1)
    kept = []
    for rows, clipped, whole in zip(*(part.split(_ROWS) for part in (weight, clip, largest)), strict=True):
        errors = [
            squared_outputs(fake_quantize(rows, spec, limit) - rows, gram) for limit in (clipped, whole)
        ]
        kept.append(torch.where((errors[0] < errors[1]).unsqueeze(1), clipped, whole))
    return torch.cat(kept)

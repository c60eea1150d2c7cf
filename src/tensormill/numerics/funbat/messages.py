"""What a factor hears from the data, summed per distinct index in O(N) time and O(D) memory.

For mode k let M^j = V^j + m^j m^j' be the second moments of the functions at an entry's index in mode j. The factor and
core messages of an entry are linear in the outer products of m^j and of M^j over the other modes, so these are summed
over the entries of each index first, and the core meets the sums, not the entries:

    c_t = sum over n at t of w_n y_n  outer(m^j : j != k)       B_t = sum over n at t of w_n outer(M^j : j != k)

In the CP form the core is superdiagonal and outer products become elementwise ones. Symmetric matrices are packed (the
upper half, row by row), so that B_t has prod r_j (r_j + 1) / 2 numbers and not prod r_j^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Packing:
    """The upper half of symmetric (r, r) matrices as vectors of r (r + 1) / 2 numbers.

    Attributes:
        size: r (r + 1) / 2.
        rows, columns: (size,), which element each number is.
        multiplicity: (size,), how often it stands in the matrix: once on the diagonal, else twice.
        position: (r, r), where each element is among the numbers.
    """

    def __init__(self, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.columns = torch.triu_indices(rank, rank, device=device)
        self.size = self.rows.shape[0]
        self.multiplicity = torch.where(self.rows == self.columns, 1, 2).to(dtype)
        position = torch.empty(rank, rank, dtype=torch.long, device=device)
        numbers = torch.arange(self.size, device=device)
        position[self.rows, self.columns] = numbers
        position[self.columns, self.rows] = numbers
        self.position = position

    def pack(self, matrices: Tensor) -> Tensor:
        """(..., r, r) to (..., size)."""
        return matrices[..., self.rows, self.columns]

    def unpack(self, packed: Tensor) -> Tensor:
        """(..., size) to (..., r, r)."""
        return packed[..., self.position]


class Groups:
    """The entries of a data set by their index in one mode, in blocks of equal length.

    A block holds entries of one index; the last of an index is filled up with a dummy entry of weight zero. Sums over
    blocks are matrix products, and only one row per block is left to be added to its index.

    Attributes:
        entries: (blocks, width), positions of entries; N for the dummy.
        index: (blocks,), the distinct index of each block.
        count: number of distinct indices.
    """

    def __init__(self, index: Tensor, count: int) -> None:
        total = index.shape[0]
        width = min(64, 1 << max(0, round(math.log2(max(1.0, total / (2 * count))))))
        sizes = torch.bincount(index, minlength=count)
        blocks = (sizes + width - 1) // width
        self.index = torch.repeat_interleave(torch.arange(count, device=index.device), blocks)
        order = torch.argsort(index, stable=True)
        first_entry, first_block = sizes.cumsum(0) - sizes, blocks.cumsum(0) - blocks
        within = torch.arange(total, device=index.device) - first_entry[index[order]]
        place = (first_block * width)[index[order]] + within
        entries = torch.full((self.index.shape[0] * width,), total, dtype=torch.long, device=index.device)
        entries[place] = order
        self.entries = entries.view(-1, width)
        self.count = count


def outer_rows(rows: Sequence[Tensor]) -> Tensor:
    """Outer product of rows: (..., p_j) for every j to (..., product of p_j), the last fastest."""
    result = rows[0]
    for more in rows[1:]:
        result = (result.unsqueeze(-1) * more.unsqueeze(-2)).flatten(-2)
    return result


def elementwise(rows: Sequence[Tensor]) -> Tensor:
    """Product of rows of equal length."""
    result = rows[0]
    for more in rows[1:]:
        result = result * more
    return result


def grouped_sums(
    groups: Groups,
    indices: Sequence[Tensor],
    rows: Sequence[Tensor],
    weights: Tensor,
    cp: bool,
    chunk: int,
) -> Tensor:
    """Sum over the entries of each group of weight times the (outer or elementwise) product of rows.

    Args:
        groups: of the mode that is summed for.
        indices: per other mode, (N + 1,), the index of each entry; the dummy's is anything valid.
        rows: per other mode, (D_j, p_j), a row per index.
        weights: (N + 1,), zero for the dummy.
        cp: elementwise products, not outer ones.
        chunk: entries at once.

    Returns:
        (D_k, product of p_j); in the CP form (D_k, p); without other modes (D_k, 1).
    """
    if not rows:
        width = 1
    else:
        width = rows[0].shape[1] if cp else math.prod(r.shape[1] for r in rows)
    sums = torch.zeros(groups.count, width, dtype=weights.dtype, device=weights.device)
    half = 1 if cp else max(1, len(rows) // 2)
    step = max(1, chunk // groups.entries.shape[1])
    for start in range(0, groups.entries.shape[0], step):
        entries = groups.entries[start : start + step]
        weight = weights[entries].unsqueeze(-1)  # [blocks, width, 1]
        taken = [row[index[entries]] for row, index in zip(rows, indices, strict=True)]
        if not taken:
            block = weight.sum(1)
        elif cp or len(taken) == 1:
            block = (weight.mT @ (elementwise(taken) if cp else taken[0])).squeeze(1)
        else:
            left, right = outer_rows(taken[:half]), outer_rows(taken[half:])
            block = ((left * weight).mT @ right).flatten(1)
        sums.index_add_(0, groups.index[start : start + step], block)
    return sums

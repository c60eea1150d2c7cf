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

    A block holds entries of one index; the last of an index is filled up with dummies of weight zero. Sums over blocks
    are matrix products, and only one row per block is left to be added to its index.

    Args:
        mode: the mode k.
        indices: per mode, (N,), each entry's place among the distinct indices.
        counts: per mode, D, the number of distinct indices.
        weights: (N,).
        values: (N,), times the weights.

    Attributes:
        count: D_k.
        index: (blocks,), the index of each block.
        others: per other mode, (blocks, width), the entries' indices there.
        weights: (blocks, 2, width), the weights and the weighted values.
    """

    def __init__(
        self, mode: int, indices: Sequence[Tensor], counts: Sequence[int], weights: Tensor, values: Tensor
    ) -> None:
        index, self.count = indices[mode], counts[mode]
        total = index.shape[0]
        width = min(64, 1 << max(0, round(math.log2(max(1.0, total / (2 * self.count))))))
        sizes = torch.bincount(index, minlength=self.count)
        blocks = (sizes + width - 1) // width
        self.index = torch.repeat_interleave(torch.arange(self.count, device=index.device), blocks)
        order = torch.argsort(index, stable=True)
        first_entry, first_block = sizes.cumsum(0) - sizes, blocks.cumsum(0) - blocks
        within = torch.arange(total, device=index.device) - first_entry[index[order]]
        place = (first_block * width)[index[order]] + within

        def arranged(entries: Tensor) -> Tensor:
            blank = torch.zeros(self.index.shape[0] * width, dtype=entries.dtype, device=entries.device)
            blank[place] = entries[order]
            return blank.view(-1, width)

        self.others = [arranged(i.int()) for j, i in enumerate(indices) if j != mode]
        self.weights = torch.stack([arranged(weights), arranged(values)], 1)


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
    groups: Groups, moments: Sequence[Tensor], means: Sequence[Tensor], cp: bool, chunk: int
) -> tuple[Tensor, Tensor]:
    """B_t and c_t of every index t.

    Args:
        groups: of the mode that is summed for.
        moments: per other mode, (D_j, p_j), packed second moments.
        means: per other mode, (D_j, r_j).
        cp: elementwise products, not outer ones.
        chunk: entries at once.

    Returns:
        B (D_k, product of p_j) and c (D_k, product of r_j); in the CP form (D_k, p) and (D_k, r); without other modes both
        (D_k, 1).
    """
    rows = [torch.cat(pair, 1) for pair in zip(moments, means, strict=True)]
    wide = _width([m.shape[1] for m in moments], cp), _width([m.shape[1] for m in means], cp)
    sums = tuple(groups.weights.new_zeros(groups.count, width) for width in wide)
    # Moments and means lie side by side in one row, so that an entry is gathered once and one product sums both.
    inner = [m.shape[1] for m in moments]
    step = max(1, chunk // groups.weights.shape[2])
    for start in range(0, groups.index.shape[0], step):
        part = slice(start, start + step)
        weight = groups.weights[part]
        taken = [
            row.index_select(0, other[part].flatten()).view(-1, other.shape[1], row.shape[1])
            for row, other in zip(rows, groups.others, strict=True)
        ]
        if not taken:
            total = weight.sum(2, keepdim=True)
            blocks = total[:, 0], total[:, 1]
        elif cp or len(taken) == 1:
            total = weight @ (elementwise(taken) if cp else taken[0])
            blocks = total[:, 0, : wide[0]], total[:, 1, wide[0] :]
        else:
            half = len(taken) // 2
            (left, p), (right, q) = _joined(taken[:half], inner[:half]), _joined(taken[half:], inner[half:])
            left[..., :p] *= weight[:, 0].unsqueeze(-1)
            left[..., p:] *= weight[:, 1].unsqueeze(-1)
            total = left.mT @ right
            blocks = total[:, :p, :q].flatten(1), total[:, p:, q:].flatten(1)
        for sum_, block in zip(sums, blocks, strict=True):
            sum_.index_add_(0, groups.index[part], block)
    return sums[0], sums[1]


def _width(sizes: Sequence[int], cp: bool) -> int:
    return 1 if not sizes else sizes[0] if cp else math.prod(sizes)


def _joined(rows: Sequence[Tensor], inner: Sequence[int]) -> tuple[Tensor, int]:
    """Outer products of the modes' moments and, beside them, of their means; and where the latter start."""
    if len(rows) == 1:
        return rows[0], inner[0]
    moments = outer_rows([row[..., :size] for row, size in zip(rows, inner, strict=True)])
    means = outer_rows([row[..., size:] for row, size in zip(rows, inner, strict=True)])
    return torch.cat([moments, means], -1), moments.shape[-1]

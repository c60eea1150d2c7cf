"""Tensors kept in factors: Tucker, CP and tensor train, their arithmetic, and the SVD-based ways to get them.

One index order everywhere, row-major (the last index runs fastest), as NumPy, PyTorch and tensorly have it: the mode-k
unfolding of X (n_0, ..., n_{d-1}) is `X.movedim(k, 0).reshape(n_k, -1)`, and `kronecker` and `khatri_rao` run their last
argument fastest. Hence, for the other modes j in increasing order,

    unfold(X, k) = U_k unfold(G, k) kronecker(U_j : j != k)^T        X a Tucker tensor of core G and factors U
    unfold(X, k) = U_k diag(weights) khatri_rao(U_j : j != k)^T      X a CP tensor

One tolerance rule: `tol` is relative to the Frobenius norm of the whole tensor, ||X - result|| <= tol ||X||, and every
truncation here keeps to it up to rounding. Real and complex dtypes; any number of modes. Evaluation and arithmetic are
differentiable; the decompositions are made of SVDs, whose gradients exist only where singular values differ.

Sources: De Lathauwer, De Moor, Vandewalle 2000 (HOSVD, HOOI); Vannieuwenhoven, Vandebril, Meerbergen 2012 (ST-HOSVD);
Khoromskij, Khoromskaia 2009 (RHOSVD); Oseledets 2011 (TT-SVD and rounding).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument

__all__ = [
    "CPTensor",
    "TTTensor",
    "TuckerTensor",
    "contract_rows",
    "fold",
    "hooi",
    "hosvd",
    "khatri_rao",
    "kronecker",
    "mode_product",
    "rhosvd",
    "sthosvd",
    "tt_svd",
    "unfold",
]

_BLOCK_NUMBERS = 1 << 23
"""Numbers in the largest temporary when a CP tensor is summed in blocks of terms (64 MB in float64)."""

Self = TypeVar("Self", bound="_Factorized")


# Index order


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Mode-`mode` unfolding: (n_mode, product of the others), the other modes in order, the last fastest."""
    mode = _checked_mode(mode, tensor.ndim)
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def fold(matrix: Tensor, mode: int, shape: Sequence[int]) -> Tensor:
    """Inverse of `unfold`: the tensor of this shape whose mode-`mode` unfolding is `matrix`."""
    mode = _checked_mode(mode, len(shape))
    others = [n for k, n in enumerate(shape) if k != mode]
    if tuple(matrix.shape) != (shape[mode], math.prod(others)):
        raise InvalidArgument(
            f"given a matrix {tuple(matrix.shape)}, expected {(shape[mode], math.prod(others))}: the mode-{mode} "
            f"unfolding of a tensor {tuple(shape)}"
        )
    return matrix.reshape(shape[mode], *others).movedim(0, mode)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Multiply mode `mode` by a matrix: tensor (..., n, ...), matrix (m, n) -> (..., m, ...)."""
    mode = _checked_mode(mode, tensor.ndim)
    if matrix.ndim != 2 or matrix.shape[1] != tensor.shape[mode]:
        raise InvalidArgument(
            f"given a matrix {tuple(matrix.shape)} for mode {mode} of a tensor {tuple(tensor.shape)}, "
            f"expected (any, {tensor.shape[mode]})"
        )
    return torch.tensordot(matrix, tensor, dims=([1], [mode])).movedim(0, mode)


def kronecker(matrices: Sequence[Tensor]) -> Tensor:
    """Kronecker product (product of rows, product of columns) of matrices, the last one's indices fastest."""
    if not matrices or any(m.ndim != 2 for m in matrices):
        raise InvalidArgument(f"given {_shapes(matrices)}, expected one or more matrices")
    return functools.reduce(torch.kron, (m.contiguous() for m in matrices))


def khatri_rao(matrices: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product: matrices (n_k, R) -> (product of n_k, R), the last one's rows fastest."""
    if not matrices or any(m.ndim != 2 or m.shape[1] != matrices[0].shape[1] for m in matrices):
        raise InvalidArgument(f"given {_shapes(matrices)}, expected matrices of equally many columns")
    result = matrices[0]
    for matrix in matrices[1:]:
        result = (result[:, None, :] * matrix[None, :, :]).reshape(-1, matrix.shape[1])
    return result


def contract_rows(core: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Contract a core with one row per mode for many points: sum over a, b, ... core[a, b, ...] rows_0[:, a] rows_1[:, b] ...

    Args:
        core: (r_0, ..., r_{d-1}).
        rows: one (M, r_k) per mode.

    Returns:
        (M,). The largest temporary has M times the product of all ranks but the last numbers: cut M into blocks.
    """
    if len(rows) != core.ndim or any(
        r.ndim != 2 or r.shape != (rows[0].shape[0], n) for r, n in zip(rows, core.shape, strict=False)
    ):
        raise InvalidArgument(
            f"given rows {_shapes(rows)} for a core {tuple(core.shape)}, expected one (M, rank) per mode"
        )
    points = rows[0].shape[0]
    result = rows[-1] @ core.reshape(-1, core.shape[-1]).mT  # (M, r_0 ... r_{d-2})
    for k in range(core.ndim - 2, -1, -1):
        width = math.prod(core.shape[:k])
        result = torch.bmm(result.reshape(points, width, core.shape[k]), rows[k][:, :, None])[:, :, 0]
    return result.reshape(points)


# Formats


class _Factorized:
    """What the formats share. A format is a frozen dataclass of tensors; operations return new ones."""

    def _tensors(self) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _map(self: Self, change: Callable[[Tensor], Tensor]) -> Self:
        raise NotImplementedError

    def full(self) -> Tensor:
        """The dense tensor of shape `shape`."""
        raise NotImplementedError

    def at(self, indices: Tensor) -> Tensor:
        """Entries at integer multi-indices (..., d): a tensor (...)."""
        raise NotImplementedError

    def inner(self: Self, other: Self) -> Tensor:
        """Inner product, sum of conj(self) * other over all entries, from the factors alone."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each mode."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Number of modes."""
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of every part."""
        return self._tensors()[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of every part."""
        return self._tensors()[0].device

    @property
    def num_stored(self) -> int:
        """Numbers that the format stores."""
        return sum(t.numel() for t in self._tensors())

    @property
    def nbytes(self) -> int:
        """Bytes that the format stores."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def to(self: Self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same tensor on another device, in another dtype."""
        return self._map(lambda t: t.to(device=device, dtype=dtype))

    def detach(self: Self) -> Self:
        """The same numbers without their history of gradients."""
        return self._map(torch.Tensor.detach)

    def conj(self: Self) -> Self:
        """Complex conjugate."""
        return self._map(torch.conj)

    def norm(self) -> Tensor:
        """Frobenius norm, a 0-dimensional real tensor."""
        return self.inner(self).real.clamp_min(0).sqrt()

    def __add__(self: Self, other: Self) -> Self:
        raise NotImplementedError

    def __mul__(self: Self, scale: Any) -> Self:
        raise NotImplementedError

    def __rmul__(self: Self, scale: Any) -> Self:
        return self * scale

    def __truediv__(self: Self, scale: Any) -> Self:
        return self * (1 / scale)

    def __neg__(self: Self) -> Self:
        return self * -1

    def __sub__(self: Self, other: Self) -> Self:
        return self + (-other)

    def _check_partner(self, other: Any) -> None:
        if type(other) is not type(self) or other.shape != self.shape:
            given = f"{type(other).__name__} {tuple(getattr(other, 'shape', ()))}"
            raise InvalidArgument(f"given {given}, expected a {type(self).__name__} {self.shape}")

    def __repr__(self) -> str:
        ranks = getattr(self, "ranks", None) or getattr(self, "rank", None)
        return f"{type(self).__name__}(shape={self.shape}, ranks={ranks}, dtype={self.dtype})"


@dataclass(frozen=True, eq=False, repr=False)
class TuckerTensor(_Factorized):
    """Core times a matrix in every mode: X[i, j, ...] = sum core[a, b, ...] U_0[i, a] U_1[j, b] ...

    Args:
        core: (r_0, ..., r_{d-1}).
        factors: one (n_k, r_k) per mode; orthonormal columns where a decomposition made them, anything elsewhere.

    Raises:
        InvalidArgument: shapes, dtypes or devices that don't fit.

    Example:
        >>> import torch
        >>> x = TuckerTensor(torch.ones(1, 1), (torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])))
        >>> x.full()
        tensor([[3., 4.],
                [6., 8.]])
        >>> x[1].full()
        tensor([6., 8.])
    """

    core: Tensor
    factors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(self.factors))
        fits = len(self.factors) == self.core.ndim > 0 and all(
            f.ndim == 2 and f.shape[1] == r for f, r in zip(self.factors, self.core.shape, strict=True)
        )
        if not fits:
            raise InvalidArgument(
                f"given a core {tuple(self.core.shape)} and factors {_shapes(self.factors)}, expected one factor "
                "(size, rank) per mode of the core"
            )
        _check_alike(self._tensors())

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.core, *self.factors)

    def _map(self, change: Callable[[Tensor], Tensor]) -> TuckerTensor:
        return TuckerTensor(change(self.core), tuple(change(f) for f in self.factors))

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each mode."""
        return tuple(f.shape[0] for f in self.factors)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Tucker rank of each mode: the shape of the core."""
        return tuple(self.core.shape)

    def full(self) -> Tensor:
        """The dense tensor; modes are expanded in the order that multiplies least."""
        result = self.core
        for k in sorted(range(self.ndim), key=lambda k: self.shape[k] / max(1, self.ranks[k])):
            result = mode_product(result, self.factors[k], k)
        return result

    def at(self, indices: Tensor) -> Tensor:
        """Entries at integer multi-indices (..., d): a tensor (...)."""
        flat = _checked_indices(indices, self.shape)
        rows = [f[flat[:, k]] for k, f in enumerate(self.factors)]
        block = max(1, _BLOCK_NUMBERS // max(1, math.prod(self.ranks[:-1])))
        parts = [
            contract_rows(self.core, [r[start : start + block] for r in rows])
            for start in range(0, max(1, flat.shape[0]), block)
        ]
        return torch.cat(parts).reshape(indices.shape[:-1])

    def inner(self, other: TuckerTensor) -> Tensor:
        """Sum of conj(self) * other over all entries."""
        self._check_partner(other)
        moved = other.core
        for k, (mine, theirs) in enumerate(zip(self.factors, other.factors, strict=True)):
            moved = mode_product(moved, mine.mH @ theirs, k)
        return (self.core.conj() * moved).sum()

    def norm(self) -> Tensor:
        """Frobenius norm; by QR of the factors, so that the norm of a small difference keeps its digits."""
        core = self.core
        for k, factor in enumerate(self.factors):
            core = mode_product(core, torch.linalg.qr(factor).R, k)
        return torch.linalg.vector_norm(core)

    def orthogonalize(self) -> TuckerTensor:
        """The same tensor with orthonormal columns in every factor (ranks above the size shrink to it)."""
        core, factors = self.core, []
        for k, factor in enumerate(self.factors):
            q, r = torch.linalg.qr(factor)
            factors.append(q)
            core = mode_product(core, r, k)
        return TuckerTensor(core, tuple(factors))

    def round(self, tol: float | None = None, rank: int | Sequence[int] | None = None) -> TuckerTensor:
        """Smaller ranks within `tol` of the norm, or of at most `rank`; factors become orthonormal."""
        flat = self.orthogonalize()
        return _expand(sthosvd(flat.core, tol, rank), flat.factors)

    def mode_product(self, matrix: Tensor, mode: int) -> TuckerTensor:
        """Multiply one mode by a matrix (m, n_mode)."""
        mode = _checked_mode(mode, self.ndim)
        factors = list(self.factors)
        factors[mode] = matrix @ factors[mode]
        return TuckerTensor(self.core, tuple(factors))

    def __add__(self, other: TuckerTensor) -> TuckerTensor:
        """Exact sum: ranks add up; `round` makes them small again."""
        self._check_partner(other)
        core = self.core.new_zeros([a + b for a, b in zip(self.ranks, other.ranks, strict=True)])
        core[tuple(slice(0, r) for r in self.ranks)] = self.core
        core[tuple(slice(r, None) for r in self.ranks)] = other.core
        factors = [torch.cat(pair, dim=1) for pair in zip(self.factors, other.factors, strict=True)]
        return TuckerTensor(core, tuple(factors))

    def __mul__(self, scale: Any) -> TuckerTensor:
        return TuckerTensor(self.core * _scalar(scale), self.factors)

    def __getitem__(self, index: Any) -> Any:
        """Part of the tensor: an integer drops its mode, a slice or a list keeps it (lists select independently)."""
        core, factors = self.core, []
        for k, part in reversed(list(enumerate(_checked_index(index, self.shape)))):
            if isinstance(part, int):
                core = torch.tensordot(core, self.factors[k][part], dims=([k], [0]))
            else:
                factors.append(self.factors[k][part])
        return TuckerTensor(core, tuple(factors[::-1])) if factors else core


@dataclass(frozen=True, eq=False, repr=False)
class CPTensor(_Factorized):
    """Sum of R products of vectors (canonical polyadic): X[i, j, ...] = sum_r weights[r] U_0[i, r] U_1[j, r] ...

    Args:
        weights: (R,), real or complex.
        factors: one (n_k, R) per mode.

    Raises:
        InvalidArgument: shapes, dtypes or devices that don't fit.
    """

    weights: Tensor
    factors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(self.factors))
        fits = (
            self.weights.ndim == 1
            and self.factors
            and all(f.ndim == 2 and f.shape[1] == self.weights.shape[0] for f in self.factors)
        )
        if not fits:
            raise InvalidArgument(
                f"given weights {tuple(self.weights.shape)} and factors {_shapes(self.factors)}, expected weights (R,) "
                "and one factor (size, R) per mode"
            )
        _check_alike(self._tensors())

    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.weights, *self.factors)

    def _map(self, change: Callable[[Tensor], Tensor]) -> CPTensor:
        return CPTensor(change(self.weights), tuple(change(f) for f in self.factors))

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each mode."""
        return tuple(f.shape[0] for f in self.factors)

    @property
    def rank(self) -> int:
        """Number of terms R."""
        return self.weights.shape[0]

    @property
    def ranks(self) -> tuple[int, ...]:
        """R for every mode."""
        return (self.rank,) * self.ndim

    def full(self) -> Tensor:
        """The dense tensor, summed over blocks of terms."""
        first, *others = self.factors
        if not others:
            return first @ self.weights
        width = math.prod(self.shape[1:])
        block = max(1, _BLOCK_NUMBERS // max(1, width))
        result = first.new_zeros(first.shape[0], width)
        for start in range(0, self.rank, block):
            part = slice(start, start + block)
            scaled = first[:, part] * self.weights[part]
            result = result + scaled @ khatri_rao([f[:, part] for f in others]).mT
        return result.reshape(self.shape)

    def at(self, indices: Tensor) -> Tensor:
        """Entries at integer multi-indices (..., d): a tensor (...)."""
        flat = _checked_indices(indices, self.shape)
        block = max(1, _BLOCK_NUMBERS // max(1, self.rank))
        parts = []
        for start in range(0, max(1, flat.shape[0]), block):
            piece = flat[start : start + block]
            rows = [f[piece[:, k]] for k, f in enumerate(self.factors)]
            parts.append(functools.reduce(torch.mul, rows) @ self.weights)
        return torch.cat(parts).reshape(indices.shape[:-1])

    def inner(self, other: CPTensor) -> Tensor:
        """Sum of conj(self) * other over all entries, by R x R' Gram matrices in blocks."""
        self._check_partner(other)
        total = self.weights.new_zeros(())
        block = max(1, _BLOCK_NUMBERS // max(1, other.rank))
        for start in range(0, self.rank, block):
            part = slice(start, start + block)
            grams = [a[:, part].mH @ b for a, b in zip(self.factors, other.factors, strict=True)]
            total = total + self.weights[part].conj() @ (functools.reduce(torch.mul, grams) @ other.weights)
        return total

    def normalize(self) -> CPTensor:
        """The same tensor with columns of unit norm and their norms in the weights; terms that vanish stay 0."""
        weights, factors = self.weights, []
        for factor in self.factors:
            norms = torch.linalg.vector_norm(factor, dim=0)
            weights = weights * norms
            factors.append(factor / norms.where(norms > 0, torch.ones_like(norms)))
        return CPTensor(weights, tuple(factors))

    def to_tucker(self) -> TuckerTensor:
        """The same tensor with a superdiagonal core; `rhosvd` gives one of small ranks."""
        core = self.weights.new_zeros((self.rank,) * self.ndim)
        diagonal = torch.arange(self.rank, device=self.device)
        return TuckerTensor(core.index_put((diagonal,) * self.ndim, self.weights), self.factors)

    def __add__(self, other: CPTensor) -> CPTensor:
        """Exact sum: the terms of both."""
        self._check_partner(other)
        factors = [torch.cat(pair, dim=1) for pair in zip(self.factors, other.factors, strict=True)]
        return CPTensor(torch.cat((self.weights, other.weights)), tuple(factors))

    def __mul__(self, scale: Any) -> CPTensor:
        return CPTensor(self.weights * _scalar(scale), self.factors)

    def __getitem__(self, index: Any) -> Any:
        """Part of the tensor: an integer drops its mode, a slice or a list keeps it (lists select independently)."""
        weights, factors = self.weights, []
        for factor, part in zip(self.factors, _checked_index(index, self.shape), strict=True):
            if isinstance(part, int):
                weights = weights * factor[part]
            else:
                factors.append(factor[part])
        return CPTensor(weights, tuple(factors)) if factors else weights.sum()


@dataclass(frozen=True, eq=False, repr=False)
class TTTensor(_Factorized):
    """Tensor train: X[i, j, ...] = C_0[0, i, :] C_1[:, j, :] ... C_{d-1}[:, l, 0].

    Args:
        cores: one (r_k, n_k, r_{k+1}) per mode, with r_0 = r_d = 1.

    Raises:
        InvalidArgument: shapes, dtypes or devices that don't fit.
    """

    cores: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "cores", tuple(self.cores))
        cores = self.cores
        fits = (
            bool(cores)
            and all(c.ndim == 3 for c in cores)
            and cores[0].shape[0] == cores[-1].shape[2] == 1
            and all(a.shape[2] == b.shape[0] for a, b in itertools.pairwise(cores))
        )
        if not fits:
            raise InvalidArgument(
                f"given cores {_shapes(cores)}, expected (rank, size, next rank) per mode, with ranks 1 at both ends"
            )
        _check_alike(cores)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.cores

    def _map(self, change: Callable[[Tensor], Tensor]) -> TTTensor:
        return TTTensor(tuple(change(c) for c in self.cores))

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each mode."""
        return tuple(c.shape[1] for c in self.cores)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks r_0 = 1, ..., r_d = 1: one more than there are modes."""
        return (*(c.shape[0] for c in self.cores), 1)

    def full(self) -> Tensor:
        """The dense tensor."""
        result = self.cores[0].reshape(-1, self.cores[0].shape[2])
        for core in self.cores[1:]:
            result = (result @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[2])
        return result.reshape(self.shape)

    def at(self, indices: Tensor) -> Tensor:
        """Entries at integer multi-indices (..., d): a tensor (...)."""
        flat = _checked_indices(indices, self.shape)
        block = max(1, _BLOCK_NUMBERS // max(1, max(c.shape[0] * c.shape[2] for c in self.cores)))
        parts = []
        for start in range(0, max(1, flat.shape[0]), block):
            piece = flat[start : start + block]
            row = self.cores[0].new_ones(piece.shape[0], 1, 1)
            for k, core in enumerate(self.cores):
                row = torch.bmm(row, core[:, piece[:, k], :].movedim(1, 0))
            parts.append(row[:, 0, 0])
        return torch.cat(parts).reshape(indices.shape[:-1])

    def inner(self, other: TTTensor) -> Tensor:
        """Sum of conj(self) * other over all entries."""
        self._check_partner(other)
        state = self.cores[0].new_ones(1, 1)
        for mine, theirs in zip(self.cores, other.cores, strict=True):
            moved = torch.tensordot(state, theirs, dims=([1], [0]))  # (r, n, s')
            state = torch.tensordot(mine.conj(), moved, dims=([0, 1], [0, 1]))
        return state[0, 0]

    def norm(self) -> Tensor:
        """Frobenius norm; by orthogonalization, so that the norm of a small difference keeps its digits."""
        return torch.linalg.vector_norm(self._right_orthogonal()[0])

    def _right_orthogonal(self) -> list[Tensor]:
        """Cores of the same tensor, all but the first with orthonormal rows: C (r, n s) C^H = 1."""
        cores = list(self.cores)
        for k in range(len(cores) - 1, 0, -1):
            core = cores[k]
            q, r = torch.linalg.qr(core.reshape(core.shape[0], -1).mH)
            cores[k] = q.mH.reshape(-1, *core.shape[1:])
            cores[k - 1] = torch.tensordot(cores[k - 1], r.mH, dims=([2], [0]))
        return cores

    def round(self, tol: float | None = None, rank: int | Sequence[int] | None = None) -> TTTensor:
        """Smaller ranks within `tol` of the norm, or of at most `rank` (one number, or d - 1 inner ranks)."""
        return TTTensor(tuple(_truncate_train(self._right_orthogonal(), tol, rank)))

    def __add__(self, other: TTTensor) -> TTTensor:
        """Exact sum: inner ranks add up; `round` makes them small again."""
        self._check_partner(other)
        if self.ndim == 1:
            return TTTensor((self.cores[0] + other.cores[0],))
        cores = []
        last = self.ndim - 1
        for k, (a, b) in enumerate(zip(self.cores, other.cores, strict=True)):
            if k == 0:
                cores.append(torch.cat((a, b), dim=2))
            elif k == last:
                cores.append(torch.cat((a, b), dim=0))
            else:
                upper = torch.cat((a, a.new_zeros(*a.shape[:2], b.shape[2])), dim=2)
                lower = torch.cat((b.new_zeros(*b.shape[:2], a.shape[2]), b), dim=2)
                cores.append(torch.cat((upper, lower), dim=0))
        return TTTensor(tuple(cores))

    def __mul__(self, scale: Any) -> TTTensor:
        return TTTensor((self.cores[0] * _scalar(scale), *self.cores[1:]))

    def __getitem__(self, index: Any) -> Any:
        """Part of the tensor: an integer drops its mode, a slice or a list keeps it (lists select independently)."""
        cores: list[Tensor] = []
        pending = self.cores[0].new_ones(1, 1)  # product of the matrices of dropped modes
        for core, part in zip(self.cores, _checked_index(index, self.shape), strict=True):
            if isinstance(part, int):
                pending = pending @ core[:, part]
            else:
                cores.append(torch.tensordot(pending, core[:, part], dims=([1], [0])))
                pending = torch.eye(core.shape[2], dtype=core.dtype, device=core.device)
        if not cores:
            return pending[0, 0]
        cores[-1] = torch.tensordot(cores[-1], pending, dims=([2], [0]))
        return TTTensor(tuple(cores))


# Decompositions


def hosvd(tensor: Tensor, tol: float | None = None, rank: int | Sequence[int] | None = None) -> TuckerTensor:
    """Truncated higher-order SVD: each factor from the SVD of its own unfolding.

    Args:
        tensor: (n_0, ..., n_{d-1}), float or complex.
        tol: relative to the Frobenius norm. Mode k drops singular values whose tail is at most tol ||X|| / sqrt(d),
            which bounds the error by tol ||X||.
        rank: largest rank, one number or one per mode. With both, the smaller rank holds and `tol` is no promise.
            With neither, the ranks are the numerical ones.

    Returns:
        Tucker tensor with orthonormal factors; its error is at most sqrt(d) times the best one of its ranks.

    Raises:
        InvalidArgument: not a float or complex tensor, non-finite entries, a bad tol or rank.

    Example:
        >>> import torch
        >>> x = torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 4.0))
        >>> hosvd(x, tol=1e-5).ranks
        (1, 1)
    """
    ranks, tol = _checked_truncation(tensor, tol, rank)
    floor = tol * float(torch.linalg.vector_norm(tensor)) / math.sqrt(tensor.ndim)
    factors, core = [], tensor
    for k in range(tensor.ndim):
        left, values = _left_singular(unfold(tensor, k))
        factors.append(left[:, : min(_kept(values, floor), ranks[k])])
        core = mode_product(core, factors[-1].mH, k)
    return TuckerTensor(core, tuple(factors))


def sthosvd(
    tensor: Tensor, tol: float | None = None, rank: int | Sequence[int] | None = None
) -> TuckerTensor:
    """Sequentially truncated HOSVD: each mode works on what the earlier ones left; cheaper, and never worse bounded.

    Squared errors of the modes add up exactly, so that what a mode leaves of its share is given to the next ones.

    Args, returns and errors: as `hosvd`.
    """
    ranks, tol = _checked_truncation(tensor, tol, rank)
    budget = (tol * float(torch.linalg.vector_norm(tensor))) ** 2
    factors, core = [], tensor
    for k in range(tensor.ndim):
        left, values = _left_singular(unfold(core, k))
        kept = min(_kept(values, math.sqrt(budget / (tensor.ndim - k))), ranks[k])
        budget = max(0.0, budget - float(values[kept:].double().square().sum()))
        factors.append(left[:, :kept])
        core = mode_product(core, factors[-1].mH, k)
    return TuckerTensor(core, tuple(factors))


def hooi(
    tensor: Tensor,
    tol: float | None = None,
    rank: int | Sequence[int] | None = None,
    *,
    sweeps: int = 10,
    init: TuckerTensor | None = None,
) -> TuckerTensor:
    """Higher-order orthogonal iteration: alternating least squares over orthonormal factors, at fixed ranks.

    Args:
        tensor, tol, rank: as `hosvd`; they give the start by `sthosvd`, whose ranks stay. No sweep raises the error.
        sweeps: at most so many; stops when the norm of the core grows by less than the rounding of the dtype.
        init: start from this Tucker tensor instead (its ranks stay; tol and rank are not used then).
    """
    if init is None:
        result = sthosvd(tensor, tol, rank)
    else:
        _checked_truncation(tensor, tol, rank)
        if init.shape != tuple(tensor.shape):
            raise InvalidArgument(f"given init of shape {init.shape}, expected {tuple(tensor.shape)}")
        result = init.orthogonalize()
    if not isinstance(sweeps, int) or sweeps < 0:
        raise InvalidArgument(f"given sweeps={sweeps!r}, expected an integer >= 0")
    factors, core = list(result.factors), result.core
    ranks = result.ranks
    captured = float(torch.linalg.vector_norm(core))
    for _ in range(sweeps):
        for k in range(tensor.ndim):
            core = tensor
            for j in sorted(range(tensor.ndim), key=lambda j: ranks[j] / max(1, tensor.shape[j])):
                if j != k:
                    core = mode_product(core, factors[j].mH, j)
            factors[k] = _left_singular(unfold(core, k))[0][:, : ranks[k]]
            core = mode_product(core, factors[k].mH, k)
        before, captured = captured, float(torch.linalg.vector_norm(core))
        if captured - before <= torch.finfo(tensor.dtype).eps * captured:
            break
    return TuckerTensor(core, tuple(factors))


def rhosvd(
    weights: Tensor,
    factors: Sequence[Tensor],
    tol: float | None = None,
    rank: int | Sequence[int] | None = None,
) -> TuckerTensor:
    """Tucker format of a CP tensor without ever forming it: reduced HOSVD, then ST-HOSVD of the small core.

    Column r of mode k is first scaled to carry its term's whole norm, |weight| times the norms of its columns in all
    modes; so the result does not depend on how a term's size is spread over weight and columns. With V the unit
    columns of the other modes' Khatri-Rao product, dropping a tail of singular values of the scaled factor costs at
    most tail * ||V||_2 <= tail * min_j ||unit columns of mode j||_2: this bound, against the norm of the core that
    comes out, decides the subspaces; they are widened until a quarter of tol^2 is not spent. The core's own
    ST-HOSVD takes the rest. (The paper's released code compares the tails of unscaled factors with an absolute tol.)

    Args:
        weights: (R,).
        factors: one (n_k, R) per mode. Cost O(R n^2) for the factors and O(R r^d) for the core, memory O(R r) plus a
            block of the Khatri-Rao product.
        tol: relative to the Frobenius norm of the tensor. None: the rounding of the dtype.
        rank: largest rank, one number or one per mode.

    Returns:
        Tucker tensor with orthonormal factors. An empty or vanishing sum gives ranks 1 and a zero core.

    Raises:
        InvalidArgument: shapes that don't fit, non-finite numbers, a bad tol or rank.
    """
    given = CPTensor(weights, tuple(factors))
    for name, part in (("weights", weights), *((f"factor {k}", f) for k, f in enumerate(factors))):
        if not bool(torch.isfinite(part).all()):
            raise InvalidArgument(f"given {name} with infinite or NaN entries, expected finite ones")
    eps = torch.finfo(given.dtype).eps
    ranks, tol = _checked_truncation_of(given.shape, given.dtype, tol, rank)
    unit = given.normalize()
    sizes = unit.weights.abs()
    if given.rank == 0 or float(sizes.max()) == 0.0:
        basis = [torch.eye(n, 1, dtype=given.dtype, device=given.device) for n in given.shape]
        return TuckerTensor(weights.new_zeros((1,) * given.ndim), tuple(basis))
    d = given.ndim
    spectral = [float(_left_singular(f)[1][0]) for f in unit.factors]
    svds = [_left_singular(f * sizes) for f in unit.factors]
    spread = [min((s for j, s in enumerate(spectral) if j != k), default=1.0) for k in range(d)]
    scale = float(torch.linalg.vector_norm(sizes))
    while True:
        kept = [
            _kept(values, tol * scale / (2 * math.sqrt(d) * spread[k])) for k, (_, values) in enumerate(svds)
        ]
        lefts = [left[:, :r] for (left, _), r in zip(svds, kept, strict=True)]
        core = CPTensor(
            unit.weights, tuple(left.mH @ f for left, f in zip(lefts, unit.factors, strict=True))
        ).full()
        norm = float(torch.linalg.vector_norm(core))
        tails = [
            float(torch.linalg.vector_norm(values[r:])) for (_, values), r in zip(svds, kept, strict=True)
        ]
        spent = math.hypot(*(t * s for t, s in zip(tails, spread, strict=True)))
        exact = all(t <= 8 * eps * float(values[0]) for t, (_, values) in zip(tails, svds, strict=True))
        if spent <= 0.5 * tol * norm or exact:
            break
        scale *= 0.5 * tol * norm / spent if norm > 0 else 0.0
    rest = math.sqrt(max(0.0, (tol * norm) ** 2 - spent**2)) / norm if norm > 0 else tol
    return _expand(sthosvd(core, max(rest, eps), ranks), lefts)


def tt_svd(tensor: Tensor, tol: float | None = None, rank: int | Sequence[int] | None = None) -> TTTensor:
    """Tensor train by successive SVDs.

    Args:
        tensor: (n_0, ..., n_{d-1}), float or complex.
        tol: relative to the Frobenius norm; each of the d - 1 cuts may lose tol ||X|| / sqrt(d - 1).
        rank: largest inner rank, one number or d - 1 of them.
    """
    _checked_truncation(tensor, tol, None)
    cores, matrix = [], tensor.reshape(1, -1)
    inner = _inner_ranks(rank, tensor.ndim)
    floor = _tolerance(tol, tensor.dtype) * float(torch.linalg.vector_norm(tensor))
    floor /= math.sqrt(max(1, tensor.ndim - 1))
    for k, size in enumerate(tensor.shape[:-1]):
        rows = matrix.shape[0]
        left, values, right = torch.linalg.svd(matrix.reshape(rows * size, -1), full_matrices=False)
        kept = min(_kept(values, floor), inner[k])
        cores.append(left[:, :kept].reshape(rows, size, kept))
        matrix = values[:kept, None] * right[:kept]
    cores.append(matrix.reshape(matrix.shape[0], tensor.shape[-1], 1))
    return TTTensor(tuple(cores))


def _truncate_train(cores: list[Tensor], tol: float | None, rank: int | Sequence[int] | None) -> list[Tensor]:
    """Left-to-right SVD sweep over cores whose rows are orthonormal in all but the first."""
    inner = _inner_ranks(rank, len(cores))
    floor = _tolerance(tol, cores[0].dtype) * float(torch.linalg.vector_norm(cores[0]))
    floor /= math.sqrt(max(1, len(cores) - 1))
    cores = list(cores)
    for k in range(len(cores) - 1):
        core = cores[k]
        left, values, right = torch.linalg.svd(core.reshape(-1, core.shape[2]), full_matrices=False)
        kept = min(_kept(values, floor), inner[k])
        cores[k] = left[:, :kept].reshape(*core.shape[:2], kept)
        cores[k + 1] = torch.tensordot(values[:kept, None] * right[:kept], cores[k + 1], dims=([1], [0]))
    return cores


def _left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values of a wide or tall matrix (n, N)."""
    rows, columns = matrix.shape
    if columns > 2 * rows and not matrix.requires_grad:
        # QR first: the SVD then has n x n, and small singular values stay accurate, as by a Gram matrix they would not.
        matrix = torch.linalg.qr(matrix.mH, mode="r").R.mH
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left, values


def _kept(values: Tensor, floor: float) -> int:
    """Least rank, at least 1, such that the singular values behind it have a norm of at most `floor`."""
    tails = values.double().square().flip(0).cumsum(0).flip(0).sqrt()  # tails[r]: norm of values[r:]
    return max(1, int((tails > floor).sum()))


def _expand(small: TuckerTensor, bases: Sequence[Tensor]) -> TuckerTensor:
    factors = [basis @ factor for basis, factor in zip(bases, small.factors, strict=True)]
    return TuckerTensor(small.core, tuple(factors))


# Checks


def _shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors]


def _check_alike(tensors: Sequence[Tensor]) -> None:
    kinds = {(t.dtype, t.device) for t in tensors}
    if len(kinds) != 1:
        raise InvalidArgument(f"given parts of {sorted(map(str, kinds))}, expected one dtype and one device")
    dtype = tensors[0].dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        raise InvalidArgument(f"given dtype {dtype}, expected a floating-point or complex one")


def _checked_mode(mode: int, ndim: int) -> int:
    if not -ndim <= mode < ndim:
        raise InvalidArgument(f"given mode {mode}, expected -{ndim} to {ndim - 1} for {ndim} modes")
    return mode % ndim


def _scalar(scale: Any) -> Any:
    if isinstance(scale, Tensor) and scale.ndim:
        raise InvalidArgument(f"given a factor of shape {tuple(scale.shape)}, expected a number")
    return scale


def _checked_indices(indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    if indices.dtype != torch.int64 or indices.ndim < 1 or indices.shape[-1] != len(shape):
        raise InvalidArgument(
            f"given indices {tuple(indices.shape)} of {indices.dtype}, expected int64 (..., {len(shape)})"
        )
    return indices.reshape(-1, len(shape))


def _checked_index(index: Any, shape: tuple[int, ...]) -> list[Any]:
    """One int, slice or 1-dimensional index tensor per mode."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(p is Ellipsis for p in parts):
        at = next(i for i, p in enumerate(parts) if p is Ellipsis)
        parts[at : at + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    parts += [slice(None)] * (len(shape) - len(parts))
    if len(parts) != len(shape):
        raise InvalidArgument(f"given {len(parts)} indices, expected at most {len(shape)}")
    result: list[Any] = []
    for part, size in zip(parts, shape, strict=True):
        if isinstance(part, int):
            if not -size <= part < size:
                raise InvalidArgument(f"given index {part}, expected -{size} to {size - 1}")
            result.append(part % size)
        elif isinstance(part, slice):
            if (part.step or 1) < 1:
                raise InvalidArgument(f"given {part}, expected a slice with a positive step")
            result.append(part)
        else:
            chosen = torch.as_tensor(part)
            if chosen.ndim != 1 or chosen.dtype not in (torch.int64, torch.bool):
                raise InvalidArgument(
                    f"given index {part!r}, expected an integer, a slice or a list of integers"
                )
            result.append(chosen)
    return result


def _tolerance(tol: float | None, dtype: torch.dtype) -> float:
    if tol is None:
        return torch.finfo(dtype).eps
    if not (isinstance(tol, (int, float)) and math.isfinite(tol) and tol > 0):
        raise InvalidArgument(f"given tol={tol!r}, expected a positive number relative to the Frobenius norm")
    return float(tol)


def _checked_truncation_of(
    shape: Sequence[int], dtype: torch.dtype, tol: float | None, rank: int | Sequence[int] | None
) -> tuple[list[int], float]:
    if rank is None:
        ranks = list(shape)
    else:
        ranks = [rank] * len(shape) if isinstance(rank, int) else list(rank)
        if len(ranks) != len(shape) or any(not isinstance(r, int) or r < 1 for r in ranks):
            raise InvalidArgument(
                f"given rank={rank!r}, expected a positive integer, or {len(shape)} of them"
            )
    # A rank alone is the only bound: no tolerance then cuts below it, but for what rounding left.
    return ranks, _tolerance(tol, dtype)


def _checked_truncation(
    tensor: Tensor, tol: float | None, rank: int | Sequence[int] | None
) -> tuple[list[int], float]:
    _check_alike([tensor])
    if tensor.ndim < 1 or tensor.numel() == 0:
        raise InvalidArgument(f"given a tensor {tuple(tensor.shape)}, expected one or more entries and modes")
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidArgument("given a tensor with infinite or NaN entries, expected finite ones")
    return _checked_truncation_of(tensor.shape, tensor.dtype, tol, rank)


def _inner_ranks(rank: int | Sequence[int] | None, ndim: int) -> list[int]:
    if rank is None:
        return [2**62] * (ndim - 1)
    ranks = [rank] * (ndim - 1) if isinstance(rank, int) else list(rank)
    if len(ranks) != ndim - 1 or any(not isinstance(r, int) or r < 1 for r in ranks):
        raise InvalidArgument(f"given rank={rank!r}, expected a positive integer, or {ndim - 1} of them")
    return ranks

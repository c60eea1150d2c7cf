"""Random projections whose rows are, each for itself, standard normal: what random features are drawn from.

| kind | rows | cost of a product |
|---|---|---|
| `iid` | independent | m d |
| `orthogonal` | orthogonal within blocks of d, of independent chi lengths (Yu et al., arXiv 1610.09072) | m d |
| `hadamard` | S H G P H D in blocks: exactly normal (Fastfood, Le et al., arXiv 1408.3060) | m log d |
| `sorf` | S H D H D H D in blocks: orthogonal, but only about normal (arXiv 1610.09072) | m log d |
| `qmc` | inverse normal of a scrambled Sobol sequence | m d |

H is the normalized Walsh-Hadamard matrix, D are random signs, G is normal, P is a permutation, S gives every row the
length of a normal vector. A row of `hadamard` is exactly normal: H G is one (signs do not change a normal vector), the
orthogonal P H D after it turns it, and its direction is independent of the length that S gives it. `sorf` only mixes
signs, so its rows have 2^(3d) directions at most and an estimator on top of it is biased.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument
from tensormill.ops.hadamard_transform import hadamard_transform

__all__ = ["KINDS", "DenseProjection", "HadamardProjection", "Kind", "Projection", "draw"]

Kind = Literal["iid", "orthogonal", "hadamard", "sorf", "qmc"]
KINDS: tuple[str, ...] = get_args(Kind)


class Projection(nn.Module):
    """A fixed (m, d) matrix G with rows ~ N(0, I), in the state dict and without gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """G x for every row: (..., d) to (..., m)."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """G as a matrix, (m, d)."""
        raise NotImplementedError


class DenseProjection(Projection):
    """A projection held as a matrix.

    Args:
        matrix: (m, d), float.
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        """G x for every row: (..., d) to (..., m)."""
        return nn.functional.linear(x, self.matrix.to(x.dtype))

    def dense(self) -> Tensor:
        """G as a matrix, (m, d)."""
        return self.matrix


class HadamardProjection(Projection):
    """Blocks of Hadamard products, applied in m log n operations; n is d rounded up to a power of two.

    Args:
        in_features: d.
        diagonals: (transforms, blocks, n), float: factors before each transform, the first one applied first.
        permutation: (blocks, n), integer: applied after the first transform.
        lengths: (m,), float: factor of each row.
    """

    diagonals: Tensor
    permutation: Tensor
    lengths: Tensor

    def __init__(self, in_features: int, diagonals: Tensor, permutation: Tensor, lengths: Tensor) -> None:
        super().__init__()
        self.in_features = in_features
        self.register_buffer("diagonals", diagonals)
        self.register_buffer("permutation", permutation)
        self.register_buffer("lengths", lengths)

    def forward(self, x: Tensor) -> Tensor:
        """G x for every row: (..., d) to (..., m)."""
        n = self.permutation.shape[-1]
        y = nn.functional.pad(x, (0, n - self.in_features)).unsqueeze(-2)
        y = hadamard_transform(y * self.diagonals[0].to(x.dtype), n**-0.5)
        y = y.gather(-1, self.permutation.expand_as(y))
        for diagonal in self.diagonals[1:]:
            y = hadamard_transform(y * diagonal.to(x.dtype), n**-0.5)
        return y.flatten(-2)[..., : self.lengths.shape[0]] * self.lengths.to(x.dtype)

    def dense(self) -> Tensor:
        """G as a matrix, (m, d)."""
        return self(torch.eye(self.in_features, dtype=self.lengths.dtype, device=self.lengths.device)).T


def draw(
    kind: str, num_features: int, in_features: int, generator: torch.Generator
) -> tuple[Projection, Tensor]:
    """A projection, and a uniform number for every row from which a frequency can be drawn.

    Args:
        kind: one of `KINDS`.
        num_features: m, rows.
        in_features: d, columns.
        generator: on the CPU; the same state gives the same projection on every device.

    Returns:
        The projection in float64 on the CPU, and (m,) float64 in (0, 1): independent for `iid`, the last coordinate
        of the sequence for `qmc`, else one in each of m equal intervals, in random order. Each is uniform and
        independent of its row.

    Raises:
        InvalidArgument: an unknown kind, or sizes below 1.
    """
    if kind not in KINDS:
        raise InvalidArgument(f"given projection {kind!r}, expected one of {', '.join(KINDS)}")
    for name, size in (("num_features", num_features), ("in_features", in_features)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InvalidArgument(f"given {name}={size!r}, expected an integer of at least 1")
    m, d = num_features, in_features
    if kind == "qmc":
        return _sobol(m, d, generator)
    uniform = torch.rand(m, generator=generator, dtype=torch.float64)
    if kind == "iid":
        matrix = torch.randn(m, d, generator=generator, dtype=torch.float64)
        return DenseProjection(matrix), _inside(uniform)
    strata = torch.randperm(m, generator=generator)
    uniform = _inside((strata + uniform) / m)
    if kind == "orthogonal":
        return DenseProjection(_orthogonal(m, d, generator)), uniform
    return _hadamard(kind, m, d, generator), uniform


def _inside(uniform: Tensor) -> Tensor:
    """Away from 0 and 1, where inverse distribution functions are infinite."""
    return uniform.clamp(2.0**-53, 1 - 2.0**-53)


def _lengths(m: int, d: int, generator: torch.Generator) -> Tensor:
    """Lengths of m normal vectors of dimension d, by the inverse of their law: m numbers instead of m d."""
    from scipy.special import gammaincinv

    uniform = _inside(torch.rand(m, generator=generator, dtype=torch.float64))
    return torch.from_numpy(2 * gammaincinv(d / 2, uniform.numpy())).sqrt()


def _orthogonal(m: int, d: int, generator: torch.Generator) -> Tensor:
    blocks = torch.randn(math.ceil(m / d), d, d, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(blocks)
    # the signs of R's diagonal make Q uniform over rotations; without them its law depends on the factorization
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return q.flatten(0, 1)[:m] * _lengths(m, d, generator).unsqueeze(-1)


def _hadamard(kind: str, m: int, d: int, generator: torch.Generator) -> HadamardProjection:
    n = 1 << (d - 1).bit_length()
    blocks = math.ceil(m / n)
    diagonals = torch.randint(0, 2, (3, blocks, n), generator=generator).double() * 2 - 1
    lengths = _lengths(m, n, generator)
    if kind == "sorf":
        permutation = torch.arange(n).repeat(blocks, 1)
        return HadamardProjection(d, diagonals, permutation, lengths)
    gains = torch.randn(blocks, n, generator=generator, dtype=torch.float64)
    # rows of H G have the length of the gains over sqrt(n) once H is normalized: divided out, as S sets it
    diagonals[1] = gains / gains.norm(dim=-1, keepdim=True) * n**0.5
    permutation = torch.stack([torch.randperm(n, generator=generator) for _ in range(blocks)])
    return HadamardProjection(d, diagonals[:2], permutation, lengths)


def _sobol(m: int, d: int, generator: torch.Generator) -> tuple[Projection, Tensor]:
    from torch.quasirandom import SobolEngine

    if d + 1 > SobolEngine.MAXDIM:
        raise InvalidArgument(
            f"given in_features={d} with projection 'qmc', expected at most {SobolEngine.MAXDIM - 1}; "
            "use 'orthogonal'"
        )
    seed = int(torch.randint(0, 2**31 - 1, (1,), generator=generator))
    engine = SobolEngine(d + 1, scramble=True, seed=seed)
    # 30 bits a coordinate: half a step keeps the first points away from 0, where the inverse normal is infinite
    points = engine.draw(m, dtype=torch.float64) + 2.0**-31
    return DenseProjection(torch.special.ndtri(_inside(points[:, :d]))), _inside(points[:, d])

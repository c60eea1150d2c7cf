"""Gram matrices of n structured points that multiply, solve and give their determinant in n log n.

Lattice and shift-invariant kernel: circulant up to bit reversal, diagonal under `fftbr`. Digital net and digitally
shift-invariant kernel: entry (i, j) depends on i xor j, diagonal under `fwht`. Eigenvalues are the transform of the
first column. A random shift, digital shift or linear matrix scrambling doesn't matter: differences don't see it.

Source: Sorokin, QMCPy, arXiv 2502.14256, section on fast kernel methods.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.numerics.qmc.kernels import ProductKernel
from tensormill.numerics.qmc.sequence import PointSet
from tensormill.numerics.qmc.transforms import fftbr, fwht, ifftbr, merge_doubling, reverse_bits

_NAMES = {"lattice": "a lattice", "net": "a digital net", None: "points without group structure"}


class FastGram:
    """K + noise I at the first n points of a lattice or digital net; a `Gram` of `gaussian_process`.

    Args:
        points: `sequence.points(n)`, of a lattice in natural order or a digital net that is not scrambled by "nus".
        kernel: `ShiftInvariantKernel` for a lattice, `DigitalShiftInvariantKernel` for a net.
        noise: added to the diagonal, a number or a scalar tensor; gradients flow to it and to the kernel's parameters.

    `eigenvalues` (n,) are in the order of the transform; the first belongs to the constant vector.

    Raises:
        InvalidArgument: kernel and points don't fit, points lack the structure, or an eigenvalue is not positive.

    Example:
        >>> import torch
        >>> from tensormill.numerics import qmc
        >>> kernel = qmc.DigitalShiftInvariantKernel(3, alpha=2)
        >>> gram = qmc.FastGram(qmc.DigitalNet(3, seed=7).points(2**12), kernel, noise=1e-3)
        >>> y = torch.randn(2**12, dtype=torch.float64)
        >>> torch.allclose(gram.matmul(gram.solve(y)), y)
        True
    """

    def __init__(self, points: PointSet, kernel: ProductKernel, noise: float | Tensor = 0.0):
        _check(points, kernel)
        values = points.values
        column = kernel.excess(values, values[:1])
        self._assemble(points, kernel, noise, fwht(column) if self._walsh(points) else fftbr(column))

    @staticmethod
    def _walsh(points: PointSet) -> bool:
        return points.sequence.structure == "net"

    def _assemble(
        self, points: PointSet, kernel: ProductKernel, noise: float | Tensor, transformed: Tensor
    ) -> None:
        self.points, self.kernel = points, kernel
        self.noise = torch.as_tensor(noise, dtype=torch.float64, device=transformed.device)
        if self.noise.dim() > 0:
            raise InvalidArgument(
                f"given noise of shape {tuple(self.noise.shape)}, expected a scalar: unequal noise breaks the structure"
            )
        self._transformed = transformed
        n = len(points)
        excess = transformed.real * math.sqrt(n)  # the kernel's part without its constant, eigenvalues real
        constant = torch.zeros(n, dtype=excess.dtype, device=excess.device)
        constant[0] = n
        scale = kernel.log_scale.exp().to(excess.device)
        self.excess_eigenvalues = scale * excess
        self.eigenvalues = self.excess_eigenvalues + scale * constant + self.noise
        smallest = float(self.eigenvalues.detach().min())
        if not smallest > 0:
            largest = float(self.eigenvalues.detach().max())
            wanted = -smallest + 10 * torch.finfo(excess.dtype).eps * largest
            raise InvalidArgument(
                f"given a Gram matrix whose smallest eigenvalue is {smallest:.2e} (largest {largest:.2e}), expected a "
                f"positive definite one; add noise of {wanted:.1e} or more, or take a kernel of smaller alpha"
            )

    @property
    def size(self) -> int:
        """Rows of the matrix."""
        return len(self.points)

    def _apply(self, y: Tensor, factors: Tensor) -> Tensor:
        if y.dim() not in (1, 2) or y.shape[0] != self.size:
            raise InvalidArgument(
                f"given y of shape {tuple(y.shape)}, expected ({self.size},) or ({self.size}, k)"
            )
        rows = y.mT.contiguous() if y.dim() == 2 else y
        if self._walsh(self.points):
            result = fwht(factors.to(rows.dtype) * fwht(rows))
        elif rows.is_complex():
            result = ifftbr(factors * fftbr(rows))
        elif rows.device.type == "cpu":
            result = ifftbr(factors * fftbr(rows)).real.contiguous()
        else:  # where `fftbr` is a permutation and an FFT, half of the frequencies are worth a path of their own
            half = torch.fft.rfft(reverse_bits(rows)) * factors[: self.size // 2 + 1].to(rows.dtype)
            result = reverse_bits(torch.fft.irfft(half, n=self.size))
        return result.mT if y.dim() == 2 else result

    def matmul(self, y: Tensor) -> Tensor:
        """The matrix, noise included, times y: (n,) or (n, k)."""
        return self._apply(y, self.eigenvalues)

    def solve(self, y: Tensor) -> Tensor:
        """The inverse of the matrix, noise included, times y: (n,) or (n, k)."""
        return self._apply(y, 1 / self.eigenvalues)

    def logdet(self) -> Tensor:
        """Logarithm of the determinant, a scalar."""
        return self.eigenvalues.log().sum()

    def inverse_diagonal(self) -> Tensor:
        """Diagonal of the inverse, (n,): one number n times, as all rows are alike."""
        return (1 / self.eigenvalues).mean().expand(self.size)

    def to_dense(self) -> Tensor:
        """The matrix itself, (n, n)."""
        eye = torch.eye(self.size, dtype=torch.float64, device=self.eigenvalues.device)
        return self.kernel(self.points, self.points) + self.noise * eye

    def extend(self) -> FastGram:
        """The Gram matrix of twice as many points: the old transform is used again, the new points' is merged in."""
        doubled = self.points.doubled()
        n = self.size
        values = doubled.sequence.sample(n, n)
        origin = doubled.sequence.sample(1)
        column = self.kernel.excess(values, origin)
        walsh = self._walsh(doubled)
        second = fwht(column) if walsh else fftbr(column)
        merged = merge_doubling(self._transformed, second, "fwht" if walsh else "fftbr")
        result = FastGram.__new__(FastGram)
        result._assemble(doubled, self.kernel, self.noise, merged)
        return result


def _check(points: PointSet, kernel: ProductKernel) -> None:
    if not isinstance(points, PointSet):
        raise InvalidArgument(
            f"given points of type {type(points).__name__}, expected sequence.points(n), which know their structure"
        )
    sequence = points.sequence
    if not isinstance(kernel, ProductKernel):
        raise InvalidArgument(
            f"given a kernel of type {type(kernel).__name__}, expected ShiftInvariantKernel or "
            "DigitalShiftInvariantKernel"
        )
    if sequence.structure is None:
        randomize = getattr(sequence, "randomize", None)
        raise InvalidArgument(
            f"given {type(sequence).__name__} points (randomize={randomize!r}), expected a lattice, or a digital net "
            'with "lms_ds", "lms", "ds" or None: other points have no group structure'
        )
    if kernel.structure != sequence.structure:
        raise InvalidArgument(
            f"given {type(kernel).__name__} for {_NAMES[sequence.structure]}, expected it for "
            f"{_NAMES[kernel.structure]}; take "
            + ("ShiftInvariantKernel" if sequence.structure == "lattice" else "DigitalShiftInvariantKernel")
        )
    if kernel.d != sequence.d:
        raise InvalidArgument(
            f"given a kernel of {kernel.d} dimensions for points of {sequence.d}, expected the same"
        )
    order = getattr(sequence, "order", "natural")
    if order != "natural":
        raise InvalidArgument(f'given points in order {order!r}, expected "natural"')
    if sequence.dtype != torch.float64:
        raise InvalidArgument(
            f"given points of {sequence.dtype}, expected float64; make them with dtype=torch.float64"
        )

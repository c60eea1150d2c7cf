"""Gaussian-process regression on any Gram matrix that can multiply, solve and give its log-determinant.

`Gram` is what a structured matrix has to offer; `DenseGram` is the matrix itself, by Cholesky. On top of either:
the log marginal likelihood, the posterior, leave-one-out predictions and `GaussianProcess`, whose hyperparameters
are learnt by gradients. A Gram matrix in n log n is `tensormill.numerics.qmc.FastGram`.

Source: Rasmussen and Williams, Gaussian Processes for Machine Learning, MIT Press 2006, sections 2.2, 2.7, 5.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument

_CHUNK = 1 << 24  # elements of the cross-covariance held at a time: 128 MB of doubles


@runtime_checkable
class Gram(Protocol):
    """A symmetric positive definite (size, size) matrix, noise included, known by what it does.

    `y` is (size,) or (size, k): a vector or k columns; results have its shape.
    """

    @property
    def size(self) -> int:
        """Rows of the matrix."""
        ...

    def matmul(self, y: Tensor) -> Tensor:
        """The matrix times y."""
        ...

    def solve(self, y: Tensor) -> Tensor:
        """The inverse of the matrix times y."""
        ...

    def logdet(self) -> Tensor:
        """Logarithm of the determinant, a scalar."""
        ...


class DenseGram:
    """A Gram matrix held in full, factorised once by Cholesky: O(n^3) to make, O(n^2) per column to solve.

    Args:
        matrix: (..., n, n), float32 or float64, symmetric; leading dimensions are a batch.
        noise: added to the diagonal; a number, a scalar tensor, or (..., n) for one per observation.

    Raises:
        InvalidArgument: the matrix is not square or not floating point, or matrix + noise is not positive
            definite; the message gives the smallest eigenvalue and a noise that would do.

    Example:
        >>> import torch
        >>> from tensormill.numerics.gaussian_process import DenseGram
        >>> gram = DenseGram(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> gram.solve(torch.tensor([3.0, 3.0]))
        tensor([1.0000, 1.0000])
    """

    def __init__(self, matrix: Tensor, noise: float | Tensor = 0.0):
        if not isinstance(matrix, Tensor) or matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
            given = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise InvalidArgument(f"given matrix {given}, expected a tensor of shape (..., n, n)")
        if matrix.dtype not in (torch.float32, torch.float64):
            raise InvalidArgument(
                f"given a matrix of dtype {matrix.dtype}, expected float32 or float64; convert it, say with .double()"
            )
        noise = torch.as_tensor(noise, dtype=matrix.dtype, device=matrix.device)
        n = matrix.shape[-1]
        if noise.dim() > 0 and noise.shape[-1] not in (1, n):
            raise InvalidArgument(
                f"given noise of shape {tuple(noise.shape)}, expected a scalar or (..., {n}), one per row"
            )
        self.matrix = matrix + torch.diag_embed(noise.expand(*matrix.shape[:-1]))
        self.factor, info = torch.linalg.cholesky_ex(self.matrix)
        if bool((info != 0).any()):
            raise InvalidArgument(self._why_not())

    def _why_not(self) -> str:
        matrix = self.matrix.detach().double()
        if not bool(torch.isfinite(matrix).all()):
            return "given a matrix with values that are not finite, expected numbers; check the kernel and its inputs"
        eigenvalues = torch.linalg.eigvalsh(matrix)
        smallest, largest = float(eigenvalues.min()), float(eigenvalues.max())
        rounding = torch.finfo(self.matrix.dtype).eps * max(largest, 1e-300) * matrix.shape[-1]
        wanted = max(0.0, -smallest) + 10 * rounding
        return (
            f"given a matrix whose smallest eigenvalue is {smallest:.2e} (largest {largest:.2e}), expected a "
            f"positive definite one; add noise of {wanted:.1e} or more, or use float64"
        )

    @property
    def size(self) -> int:
        """Rows of the matrix."""
        return int(self.matrix.shape[-1])

    def _columns(self, y: Tensor) -> tuple[Tensor, bool]:
        if y.dim() == 0 or self.size not in (y.shape[-1], y.shape[-2] if y.dim() > 1 else -1):
            raise InvalidArgument(
                f"given y of shape {tuple(y.shape)}, expected ({self.size},) or ({self.size}, k), as the matrix has rows"
            )
        vector = y.dim() == self.matrix.dim() - 1
        if (y.shape[-1] if vector else y.shape[-2]) != self.size:
            raise InvalidArgument(
                f"given y of shape {tuple(y.shape)} for a matrix {tuple(self.matrix.shape)}, "
                "expected (..., n) with the matrix' batch or (..., n, k)"
            )
        return (y.unsqueeze(-1) if vector else y), vector

    def matmul(self, y: Tensor) -> Tensor:
        """The matrix, noise included, times y: (n,) or (..., n, k)."""
        columns, vector = self._columns(y)
        result = self.matrix @ columns
        return result.squeeze(-1) if vector else result

    def solve(self, y: Tensor) -> Tensor:
        """The inverse of the matrix, noise included, times y: (n,) or (..., n, k)."""
        columns, vector = self._columns(y)
        result = torch.cholesky_solve(columns, self.factor)
        return result.squeeze(-1) if vector else result

    def logdet(self) -> Tensor:
        """Logarithm of the determinant, (...,)."""
        return 2 * self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def inverse_diagonal(self) -> Tensor:
        """Diagonal of the inverse, (..., n), for `leave_one_out`."""
        return torch.cholesky_inverse(self.factor).diagonal(dim1=-2, dim2=-1)


def _check_targets(gram: Gram, y: Tensor) -> None:
    if y.dim() not in (1, 2) or y.shape[0] != gram.size:
        raise InvalidArgument(
            f"given y of shape {tuple(y.shape)}, expected ({gram.size},) or ({gram.size}, k) for this Gram matrix"
        )


def log_marginal_likelihood(gram: Gram, y: Tensor) -> Tensor:
    """Log density of y under a centred Gaussian with this covariance (Rasmussen and Williams, equation 2.30).

    Args:
        gram: (n, n), noise included.
        y: (n,) or (n, k) for k independent outputs.

    Returns:
        Scalar or (k,), differentiable with respect to y and whatever the Gram matrix was made from.

    Raises:
        InvalidArgument: y has not n rows.
    """
    _check_targets(gram, y)
    fit = (y * gram.solve(y)).sum(0)
    return -0.5 * (fit + gram.logdet() + gram.size * math.log(2 * math.pi))


def leave_one_out(gram: Gram, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every y_i given all others (Rasmussen and Williams, equation 5.12).

    Args:
        gram: (n, n) with a method `inverse_diagonal`, noise included.
        y: (n,) or (n, k).

    Returns:
        Means, y's shape, and variances, (n,) (of noisy observations).

    Raises:
        InvalidArgument: y has not n rows, or this Gram matrix does not give the diagonal of its inverse.
    """
    _check_targets(gram, y)
    diagonal = getattr(gram, "inverse_diagonal", None)
    if diagonal is None:
        raise InvalidArgument(
            f"given a {type(gram).__name__}, expected a Gram matrix with inverse_diagonal(); use DenseGram or FastGram"
        )
    variance = 1 / diagonal()
    weighted = gram.solve(y)
    return y - weighted * (variance if y.dim() == 1 else variance.unsqueeze(-1)), variance


def generalised_mean(gram: Gram, y: Tensor) -> Tensor:
    """Constant mean of the largest likelihood, `1' K^-1 y / 1' K^-1 1`: scalar or (k,) for y (n,) or (n, k)."""
    _check_targets(gram, y)
    ones = torch.ones(gram.size, dtype=y.dtype, device=y.device)
    weights = gram.solve(ones)
    return weights @ y / weights.sum()


class Prediction(NamedTuple):
    """Posterior at new points.

    Args:
        mean: (m,) or (m, k).
        variance: (m,), of the function, without observation noise; None unless asked for.
        covariance: (m, m), the same; None unless asked for.
    """

    mean: Tensor
    variance: Tensor | None = None
    covariance: Tensor | None = None


def posterior(gram: Gram, cross: Tensor, y: Tensor, prior: Tensor | None = None) -> Prediction:
    """Posterior at m new points (Rasmussen and Williams, equations 2.25 and 2.26).

    Args:
        gram: (n, n), noise included.
        cross: (m, n), kernel between new points and observed ones.
        y: (n,) or (n, k) observations.
        prior: kernel among the new points: (m, m) for the covariance, or its diagonal (m,) for the variance alone.

    Raises:
        InvalidArgument: shapes don't fit.
    """
    _check_targets(gram, y)
    if cross.dim() != 2 or cross.shape[-1] != gram.size:
        raise InvalidArgument(f"given cross of shape {tuple(cross.shape)}, expected (m, {gram.size})")
    mean = cross @ gram.solve(y)
    if prior is None:
        return Prediction(mean)
    if prior.shape[0] != cross.shape[0] or prior.dim() not in (1, 2) or prior.shape[-1] != cross.shape[0]:
        m = cross.shape[0]
        raise InvalidArgument(f"given prior of shape {tuple(prior.shape)}, expected ({m},) or ({m}, {m})")
    solved = gram.solve(cross.mT)
    if prior.dim() == 1:
        return Prediction(mean, (prior - (cross * solved.mT).sum(-1)).clamp_min(0))
    covariance = prior - cross @ solved
    return Prediction(mean, covariance.diagonal().clamp_min(0), covariance)


class GaussianProcess(nn.Module):
    """Gaussian-process regression with any kernel, learnt by the marginal likelihood.

    Args:
        kernel: a function of (a, d) and (b, d) that gives (a, b). An `nn.Module` brings parameters to learn. Where
            it has a method `gram(points, noise)`, that makes the Gram matrix, else it is dense.
        noise: variance of the observation noise, above 0 (or 0 exactly for none, which is then not learnt).
        learn_noise: whether `fit` adapts the noise too.
        mean: "zero", or "constant" for the constant mean of the largest likelihood.

    `state_dict` holds the hyperparameters; condition on data again with `fit(x, y)` after loading one.

    Example:
        >>> import torch
        >>> from tensormill.numerics.gaussian_process import GaussianProcess
        >>> x = torch.linspace(0, 1, 20, dtype=torch.float64).unsqueeze(-1)
        >>> process = GaussianProcess(lambda a, b: torch.exp(-8 * torch.cdist(a, b) ** 2), noise=1e-6)
        >>> process.fit(x, x[:, 0] ** 2).predict(torch.tensor([[0.5]], dtype=torch.float64)).mean
        tensor([0.2500], dtype=torch.float64)
    """

    def __init__(
        self,
        kernel: Callable[[Any, Any], Tensor],
        noise: float = 1e-6,
        *,
        learn_noise: bool = False,
        mean: str = "zero",
    ):
        super().__init__()
        if not noise >= 0 or not math.isfinite(noise):
            raise InvalidArgument(f"given noise {noise}, expected a variance of 0 or more")
        if learn_noise and noise == 0:
            raise InvalidArgument("given noise 0 and learn_noise, expected a noise above 0 to start from")
        if mean not in ("zero", "constant"):
            raise InvalidArgument(f'given mean {mean!r}, expected "zero" or "constant"')
        self.kernel = kernel
        self.mean = mean
        start = torch.tensor(noise, dtype=torch.float64).log()
        self.log_noise = nn.Parameter(start, requires_grad=learn_noise)
        self._gram: Gram | None = None

    def gram(self, x: Any) -> Gram:
        """The Gram matrix at the points x, noise included, with gradients to the hyperparameters."""
        noise = self.log_noise.exp()
        structured = getattr(self.kernel, "gram", None)
        if structured is not None and not isinstance(x, Tensor):
            made: Gram = structured(x, noise)
            return made
        return DenseGram(self.kernel(x, x), noise)

    def log_marginal_likelihood(self, x: Any, y: Tensor) -> Tensor:
        """Log marginal likelihood of y at x, summed over outputs; a scalar with gradients."""
        gram = self.gram(x)
        return log_marginal_likelihood(gram, y - self._offset(gram, y)).sum()

    def _offset(self, gram: Gram, y: Tensor) -> Tensor:
        return y.new_zeros(()) if self.mean == "zero" else generalised_mean(gram, y)

    def fit(
        self,
        x: Any,
        y: Tensor,
        steps: int = 0,
        *,
        learning_rate: float = 0.1,
        progress: Callable[[int, float], None] | None = None,
    ) -> GaussianProcess:
        """Condition on observations, after `steps` steps of Adam on the hyperparameters.

        Args:
            x: (n, d) points, or structured points that the kernel's `gram` understands.
            y: (n,) or (n, k) observations, in the kernel's dtype.
            steps: 0 keeps the hyperparameters.
            learning_rate: Adam's.
            progress: called with the step and the negative log marginal likelihood per observation.

        Raises:
            InvalidArgument: shapes don't fit, y is not finite, or the Gram matrix is not positive definite.
        """
        if len(x) != y.shape[0]:
            raise InvalidArgument(f"given {len(x)} points and {y.shape[0]} observations, expected as many")
        if not bool(torch.isfinite(y).all()):
            raise InvalidArgument("given observations that are not finite, expected numbers; drop those rows")
        learnable = [p for p in self.parameters() if p.requires_grad]
        if steps and not learnable:
            raise InvalidArgument(
                f"given {steps} steps and no hyperparameter to learn; pass learn_noise=True or a kernel that is an "
                "nn.Module with parameters"
            )
        optimizer = torch.optim.Adam(learnable, lr=learning_rate) if steps else None
        for step in range(steps):
            assert optimizer is not None
            optimizer.zero_grad()
            loss = -self.log_marginal_likelihood(x, y) / y.numel()
            loss.backward()
            optimizer.step()
            if progress is not None:
                progress(step, float(loss.detach()))
        with torch.no_grad():
            self._x = x
            self._gram = self.gram(x)
            self._constant = self._offset(self._gram, y)
            self._weights = self._gram.solve(y - self._constant)
        return self

    @torch.no_grad()
    def predict(self, x: Tensor, *, variance: bool = False, covariance: bool = False) -> Prediction:
        """Posterior of the function at new points; memory stays bounded however many there are.

        Args:
            x: (m, d).
            variance: also the variance, (m,): one solve per point.
            covariance: also the covariance, (m, m), which needs m x n numbers at once.

        Raises:
            InvalidArgument: `fit` was not called.
        """
        if self._gram is None:
            raise InvalidArgument("given no observations yet, expected a fitted process; call fit(x, y)")
        if covariance:
            cross = self.kernel(x, self._x)
            full = self.kernel(x, x) - cross @ self._gram.solve(cross.mT)
            return Prediction(self._constant + cross @ self._weights, full.diagonal().clamp_min(0), full)
        rows = max(1, _CHUNK // len(self._x))
        means, variances = [], []
        for chunk in x.split(rows):
            cross = self.kernel(chunk, self._x)
            means.append(self._constant + cross @ self._weights)
            if variance:
                explained = (cross.mT * self._gram.solve(cross.mT)).sum(0)
                variances.append((self._prior_variance(chunk) - explained).clamp_min(0))
        return Prediction(torch.cat(means), torch.cat(variances) if variance else None)

    def _prior_variance(self, x: Tensor) -> Tensor:
        diagonal = getattr(self.kernel, "diagonal", None)
        if diagonal is not None:
            values: Tensor = diagonal(x)
            return values
        return torch.cat([self.kernel(part, part).diagonal() for part in x.split(256)])

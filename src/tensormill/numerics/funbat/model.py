"""Functional Bayesian Tucker decomposition of data at real-valued indices.

A tensor's factors are usually matrices, a row per index. Here column r of mode k is a function u^k_r of a real coordinate
with a Matern Gaussian-process prior, and the core W is Gaussian:

    y_n = sum over r_1 .. r_K of W[r_1, .., r_K] u^1_{r_1}(x_n1) .. u^K_{r_K}(x_nK) + noise,   noise ~ N(0, 1 / tau)

The posterior is approximated as q(U^1) .. q(U^K) q(W) q(tau). Every entry sends each factor a Gaussian message
(precision E[tau] E[a a'], information E[tau] y E[a], where a is the core contracted with the other modes), likewise the
core, and tau a Gamma message: conditional expectation propagation (Fang et al., arXiv 2311.04829, section 4). The
messages to a mode are summed per distinct index (`messages`), and a Kalman smoother makes the posterior of its functions
(`tensormill.numerics.state_space`). With second moments in full these are the coordinate updates of mean-field
variational inference, so the evidence bound, which comes for free, never falls without damping, and `fit` watches it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tensormill.errors import CheckpointError, InvalidArgument, OutputError
from tensormill.numerics.factorized import TuckerTensor, contract_rows
from tensormill.numerics.funbat.config import FunctionalTuckerConfig
from tensormill.numerics.funbat.messages import Groups, Packing, elementwise, grouped_sums
from tensormill.numerics.state_space import KERNELS, BundlePosterior, MaternBundle

__all__ = ["FunctionalTucker"]

CORE_BYTES_LIMIT = 4 << 30
"""Most memory that the core's covariance, or the message sums of a mode, may take."""

_FORMAT = "tensormill.functional_tucker/1"
_FEATURES = 64
_WARM_UP, _SCOUTING, _START_PRECISION = 5, 5, 100.0
"""Sweeps at a held noise precision (relative to the values' variance), then sweeps by which starts are compared.

A start at the noise of the raw values often ends in the local optimum where every factor is zero."""


class FunctionalTucker:
    """Bayesian Tucker (or CP) model whose factors are functions of real coordinates.

    Arguments are the fields of `FunctionalTuckerConfig`, where they are explained, and a device.

    Args:
        device: where the fit runs; by default where the coordinates are.

    Attributes (after `fit`; in normalised units where `normalize` is on):
        coordinates_: per mode, (D_k,) distinct coordinates in the data, in the caller's unit.
        factor_mean_, factor_cov_: per mode, (D_k, r_k) and (D_k, r_k, r_k) at those.
        core_, core_cov_: (r_1, .., r_K), and (R, R) with R their product, in row-major order of the ranks; of the CP
            form the superdiagonal of ones, and None.
        tau_: expected precision of the noise.
        offset_, scale_: what normalised the values: value = offset_ + scale_ * model.
        lengthscale_, outputscale_: per mode.
        history_: the evidence bound (nats) after each sweep, of all fits since the model was new.
        converged_: whether the last fit ended by its tolerance.

    Example:
        >>> import torch
        >>> from tensormill.numerics.funbat import FunctionalTucker
        >>> x = torch.rand(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> y = torch.sin(6 * x[:, 0]) * torch.cos(4 * x[:, 1])
        >>> model = FunctionalTucker(rank=2, lengthscale=0.5).fit(x, y)
        >>> mean, variance = model.predict([[0.3, 0.6]], return_var=True)
        >>> bool((mean - math.sin(1.8) * math.cos(2.4)).abs() < 0.02)
        True
    """

    def __init__(
        self,
        rank: int | Sequence[int] = 3,
        kernel: str | Sequence[str] = "matern32",
        lengthscale: float | Sequence[float] = 0.1,
        outputscale: float | Sequence[float] = 1.0,
        mode: str = "tucker",
        *,
        damping: float | Sequence[float] = 0.0,
        noise_prior: tuple[float, float] = (1.0, 1e-3),
        noise_variance: float | None = None,
        core_moments: str = "full",
        starts: int = 3,
        n_iter: int = 100,
        tol: float = 1e-5,
        learn_kernel: int = 0,
        normalize: bool = True,
        rescale: bool = True,
        dtype: torch.dtype = torch.float64,
        chunk: int = 1 << 14,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "device")}
        self.config = FunctionalTuckerConfig(**given)
        self.device = None if device is None else torch.device(device)
        self._fitted = False
        self._posteriors: list[BundlePosterior] = []
        self._precision: list[Tensor] = []
        self._information: list[Tensor] = []

    def __repr__(self) -> str:
        changed = [
            f"{field.name}={getattr(self.config, field.name)!r}"
            for field in dataclasses.fields(self.config)
            if getattr(self.config, field.name) != field.default
        ]
        return f"FunctionalTucker({', '.join(changed)})"

    # Fitting

    def fit(
        self,
        coords: Any,
        values: Any,
        sample_weight: Any = None,
        *,
        warm_start: bool = False,
        n_iter: int | None = None,
    ) -> FunctionalTucker:
        """Learn the posterior.

        Args:
            coords: (N, K), a row of real coordinates per entry; repeated ones are fine.
            values: (N,).
            sample_weight: (N,), at least 0: by how much each entry's noise precision is larger than tau.
            warm_start: go on from where the last fit (or a loaded model) stood; the data may have changed, what is known
                of the functions is carried over to new coordinates. Normalisation and ranges stay as they were.
            n_iter: most sweeps of this call; by default the setting.

        Returns:
            The model.

        Raises:
            InvalidArgument: shapes do not belong together, a number is not finite, settings are for another number of
                modes, or the sums would not fit in memory.
        """
        x, y, weight = self._checked_data(coords, values, sample_weight)
        if n_iter is not None and (isinstance(n_iter, bool) or not isinstance(n_iter, int) or n_iter < 1):
            raise InvalidArgument(f"given n_iter {n_iter!r}, expected a whole number of at least 1")
        most = self.config.n_iter if n_iter is None else n_iter
        if warm_start and self._fitted:
            if x.shape[1] != self._modes:
                raise InvalidArgument(f"given {x.shape[1]} coordinates, expected {self._modes} as before")
            data = self._arrange(x, y, weight)
            self._place(data, self._posteriors)
        else:
            self._prepare(x, y, weight)
            data = self._arrange(x, y, weight)
            most -= self._start(data, min(most, _SCOUTING))
        self._fitted = True
        self.converged_ = False
        for _ in tqdm(range(most), desc="FunctionalTucker", unit="sweep", delay=2, disable=None, leave=False):
            sweeps = len(self.history_) + 1
            if self.config.learn_kernel and sweeps % self.config.learn_kernel == 0:
                self._learn_kernels()
            self._record(self._sweep(data))
            change = abs(self.history_[-1] - self.history_[-2]) if len(self.history_) > 1 else math.inf
            if change < self.config.tol * float(data.count):
                self.converged_ = True
                break
        return self

    def _record(self, bound: Tensor) -> None:
        value = float(bound)
        if not math.isfinite(value):
            raise InvalidArgument(
                "the fit has no finite evidence bound; scale the values (normalize=True), or use dtype float64"
            )
        self.history_.append(value)

    def _start(self, data: _Data, sweeps: int) -> int:
        """Sweeps from several random starts, of which the best is kept; returns how many sweeps it has behind it."""
        best: dict[str, Any] = {}
        for start in range(self.config.starts):
            self._generator = torch.Generator().manual_seed(self.config.seed + 7919 * start)
            self._draw(data)
            for _ in range(_WARM_UP):
                self._sweep(data, warming=True)
            for _ in range(sweeps):
                self._record(self._sweep(data))
            if not best or self.history_[-1] > best["history_"][-1]:
                best = {name: self._copied(name) for name in _LEARNT if hasattr(self, name)}
        self.__dict__.update(best)
        return sweeps

    def _copied(self, name: str) -> Any:
        value = getattr(self, name)
        return list(value) if isinstance(value, list) else value

    def _checked_data(self, coords: Any, values: Any, sample_weight: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = _tensor("coords", coords, self.device), _tensor("values", values, self.device)
        if x.dim() != 2 or x.shape[1] < 1:
            raise InvalidArgument(
                f"given coords of shape {tuple(x.shape)}, expected (N, K); use x[:, None] for K = 1"
            )
        if y.shape != x.shape[:1]:
            raise InvalidArgument(f"given values of shape {tuple(y.shape)}, expected ({x.shape[0]},)")
        if x.shape[0] < 2:
            raise InvalidArgument(f"given {x.shape[0]} entries, expected at least 2")
        y = y.to(x.device)
        if sample_weight is None:
            return x, y, torch.ones_like(y)
        weight = _tensor("sample_weight", sample_weight, self.device).to(x.device)
        if weight.shape != y.shape or bool((weight < 0).any()) or int((weight > 0).sum()) < 2:
            raise InvalidArgument(
                f"given sample_weight of shape {tuple(weight.shape)}, expected ({x.shape[0]},), none negative and at "
                "least two above zero"
            )
        return x, y, weight

    def _prepare(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Forget everything; take ranges, offset and scale from the data."""
        config = self.config
        self._modes = x.shape[1]
        self.rank_: tuple[int, ...] = config.per_mode("rank", self._modes)
        self.kernel_: tuple[str, ...] = config.per_mode("kernel", self._modes)
        self.lengthscale_: list[float] = list(config.per_mode("lengthscale", self._modes))
        self.outputscale_: list[float] = list(config.per_mode("outputscale", self._modes))
        self._check_memory()
        low, high = x.min(0).values, x.max(0).values
        span = torch.where(high > low, high - low, 1.0)
        self._low = low if config.rescale else torch.zeros_like(low)
        self._span = span if config.rescale else torch.ones_like(span)
        mean = (weight * y).sum() / weight.sum()
        deviation = ((weight * (y - mean).square()).sum() / weight.sum()).sqrt()
        if not float(deviation) > 1e-14 * float(y.abs().max()):
            warnings.warn("the values do not vary: the model can learn nothing but their mean", stacklevel=3)
            deviation = torch.ones_like(deviation)
        self.offset_ = float(mean) if config.normalize else 0.0
        self.scale_ = float(deviation) if config.normalize else 1.0
        variance = (float(deviation) / self.scale_) ** 2
        self._variance = variance

    def _draw(self, data: _Data) -> None:
        """Random functions and a random core to start from, no messages."""
        config, device = self.config, data.square.device
        least = config.noise_variance / self.scale_**2 if config.noise_variance is not None else math.inf
        start = min(self._variance / _START_PRECISION, least)
        self._noise = torch.tensor([1.0, start], dtype=torch.float64, device=device)
        self._residual: Tensor | None = None
        self.history_: list[float] = []
        size = math.prod(self.rank_)
        if config.mode == "tucker":
            core = torch.randn(self.rank_, generator=self._generator, dtype=torch.float64)
            self.core_ = core.to(device)
            self.core_cov_: Tensor | None = torch.eye(size, dtype=torch.float64, device=device)
            self._core_precision = torch.zeros_like(self.core_cov_)
            self._core_information = torch.zeros(size, dtype=torch.float64, device=device)
        else:
            self.core_ = torch.zeros(self.rank_, dtype=torch.float64, device=device)
            self.core_[(torch.arange(self.rank_[0], device=device),) * self._modes] = 1.0
            self.core_cov_ = None
        self._place(data, None)

    def _check_memory(self) -> None:
        if self.config.mode == "cp":
            return
        size = math.prod(self.rank_)
        need = 8 * size * size
        if need > CORE_BYTES_LIMIT:
            raise InvalidArgument(
                f"given rank {self.rank_}, whose core of {size} numbers needs a covariance of {need / 2**30:.1f} GiB, "
                f"expected at most {CORE_BYTES_LIMIT / 2**30:.0f} GiB; use lower ranks or mode='cp'"
            )

    def _arrange(self, x: Tensor, y: Tensor, weight: Tensor) -> _Data:
        scaled = (x - self._low) / self._span
        points, indices = [], []
        for k in range(self._modes):
            distinct, index = torch.unique(scaled[:, k], return_inverse=True)
            points.append(distinct)
            indices.append(index)
        if self.config.mode == "tucker":
            packed = [r * (r + 1) // 2 for r in self.rank_]
            for k, distinct in enumerate(points):
                need = 8 * distinct.shape[0] * math.prod(packed) // packed[k]
                if need > CORE_BYTES_LIMIT:
                    raise InvalidArgument(
                        f"given {distinct.shape[0]} distinct coordinates in mode {k} and rank {self.rank_}, whose sums "
                        f"need {need / 2**30:.1f} GiB, expected at most {CORE_BYTES_LIMIT / 2**30:.0f} GiB; use lower "
                        "ranks, mode='cp', or round the coordinates"
                    )
        dtype = self.config.dtype
        normal = (y - self.offset_) / self.scale_
        counts = [distinct.shape[0] for distinct in points]
        return _Data(
            points,
            [
                Groups(k, indices, counts, weight.to(dtype), (weight * normal).to(dtype))
                for k in range(self._modes)
            ],
            (weight * normal.square()).sum(),
            weight[weight > 0].log().sum(),
            (weight > 0).sum().double(),
            [Packing(r, dtype, x.device) for r in self.rank_],
        )

    def _place(self, data: _Data, known: list[BundlePosterior] | None) -> None:
        """Bundles at the data's coordinates, with moments to start from and messages where there are old ones."""
        old = None if known is None else (self._precision, self._information)
        self._bundles = [self._bundle(k, points) for k, points in enumerate(data.points)]
        self._precision, self._information = [], []
        self._posteriors = []
        self.factor_mean_, self.factor_cov_ = [], []
        for k, points in enumerate(data.points):
            r, count = self.rank_[k], points.shape[0]
            precision, information = points.new_zeros(count, r, r), points.new_zeros(count, r)
            if old is None or known is None:
                mean, covariance = self._random_functions(k, points), points.new_zeros(count, r, r)
            else:
                before = known[k].bundle.points
                mean, covariance = known[k].at(points)
                at = torch.searchsorted(before, points).clamp_max(before.shape[0] - 1)
                same = before[at] == points
                precision[same], information[same] = old[0][k][at[same]], old[1][k][at[same]]
                self._posteriors.append(known[k])
            self._precision.append(precision)
            self._information.append(information)
            self.factor_mean_.append(mean)
            self.factor_cov_.append(covariance)

    def _bundle(self, k: int, points: Tensor) -> MaternBundle:
        return MaternBundle(
            points, self.kernel_[k], self.lengthscale_[k], self.outputscale_[k], self.rank_[k]
        )

    def _random_functions(self, k: int, points: Tensor) -> Tensor:
        """(D, r) smooth functions of the prior's size, draws from a Matern process nearly: random cosines.

        Their lengthscale is the whole range at least, since from rough starts components are lost more often.
        """
        r, nu = self.rank_[k], KERNELS[self.kernel_[k]]
        lengthscale = max(self.lengthscale_[k], float(points[-1] - points[0]))

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=self._generator, dtype=torch.float64)

        square = normal(_FEATURES, r, round(2 * nu)).square().sum(-1)
        frequency = (normal(_FEATURES, r) * (2 * nu / square).sqrt() / lengthscale).to(points.device)
        phase = (2 * math.pi * torch.rand(_FEATURES, r, generator=self._generator, dtype=torch.float64)).to(
            points.device
        )
        total = points.new_zeros(points.shape[0], r)
        for f, shift in zip(frequency, phase, strict=True):
            total += torch.cos(points[:, None] * f + shift)
        return total * math.sqrt(2 * self.outputscale_[k] / _FEATURES)

    def _sweep(self, data: _Data, warming: bool = False) -> Tensor:
        """One update of every factor, the core and the noise; returns the evidence bound, ().

        While warming the noise is held and nothing is damped; the bound is then meaningless.
        """
        config = self.config
        damping = config.damping if isinstance(config.damping, tuple) else (config.damping,) * 3
        keep_factor, keep_core, keep_noise = (0.0, 0.0, 0.0) if warming else damping
        tau = self._expected_tau()
        second = self._core_second(data)
        divergence = torch.zeros((), dtype=torch.float64, device=tau.device)
        for k in range(self._modes):
            weights, values = self._sums(data, k)
            if config.mode == "cp":
                fresh = data.packings[k].unpack(weights.expand(-1, data.packings[k].size))
                heard = values.expand(-1, self.rank_[k])
            else:
                facing = (
                    second.movedim(k, 0).reshape(second.shape[k], -1) / data.packings[k].multiplicity[:, None]
                )
                fresh = data.packings[k].unpack(weights @ facing.T)
                heard = values @ self.core_.to(values).movedim(k, 0).reshape(self.rank_[k], -1).T
            self._precision[k] = _damped(self._precision[k], tau * fresh.double(), keep_factor)
            self._information[k] = _damped(self._information[k], tau * heard.double(), keep_factor)
            found = self._bundles[k].smooth(self._precision[k], self._information[k])
            if k < len(self._posteriors):
                self._posteriors[k] = found
            else:
                self._posteriors.append(found)
            self.factor_mean_[k], self.factor_cov_[k] = found.mean, found.covariance
            potential = (self._information[k] * found.mean).sum() - (
                self._precision[k] * self._moment(k)
            ).sum() / 2
            divergence = divergence + potential - found.log_evidence
        bound = self._core_and_noise(data, weights, values, tau, keep_core, keep_noise, warming)
        return bound - divergence

    def _core_and_noise(
        self,
        data: _Data,
        weights: Tensor,
        values: Tensor,
        tau: Tensor,
        keep_core: float,
        keep_noise: float,
        warming: bool,
    ) -> Tensor:
        """Update core and noise from the last mode's sums; returns the bound without the factors' divergence."""
        last = self._modes - 1
        moment = data.packings[last].pack(self._moment(last)).to(weights)
        mean = self.factor_mean_[last].to(values)
        divergence = torch.zeros((), dtype=torch.float64, device=tau.device)
        if self.config.mode == "cp":
            squares = (moment * weights).sum(0).double()  # [p], of sum over n of w M^1 .. M^K
            fitted = (mean * values).sum().double()
            spread = (squares * data.packings[last].multiplicity).sum()
        else:
            sums = (weights.T @ moment).double().reshape([p.size for p in data.packings])
            seen = (values.T @ mean).double().reshape(-1)
            full = sums
            for k, packing in enumerate(data.packings):
                full = full.index_select(2 * k, packing.position.flatten()).unflatten(
                    2 * k, packing.position.shape
                )
            order = [2 * k for k in range(self._modes)] + [2 * k + 1 for k in range(self._modes)]
            size = seen.shape[0]
            full = full.permute(order).reshape(size, size)
            self._core_precision = _damped(self._core_precision, tau * full, keep_core)
            self._core_information = _damped(self._core_information, tau * seen, keep_core)
            identity = torch.eye(size, dtype=torch.float64, device=tau.device)
            factor = torch.linalg.cholesky(identity + (self._core_precision + self._core_precision.T) / 2)
            self.core_cov_ = torch.cholesky_inverse(factor)
            core = self.core_cov_ @ self._core_information
            self.core_ = core.reshape(self.rank_)
            fitted = core @ seen
            spread = (sums * self._core_second(data).double()).sum()
            divergence = (
                self.core_cov_.diagonal().sum() + core @ core - size
            ) / 2 + factor.diagonal().log().sum()
        residual = (data.square / 2 - fitted + spread / 2).clamp_min(torch.finfo(torch.float64).tiny)
        if warming:
            log_tau = self._expected_tau().log()
        elif self.config.noise_variance is None:
            kept = residual if self._residual is None else _damped(self._residual, residual, keep_noise)
            self._residual = kept
            shape, rate = self.config.noise_prior
            a, b = shape + data.count / 2, rate + kept
            self._noise = torch.stack([a, b])
            log_tau = torch.digamma(a) - b.log()
            divergence = divergence + (
                (a - shape) * torch.digamma(a) - torch.lgamma(a) + math.lgamma(shape)
                + shape * (b.log() - math.log(rate)) + a * (rate - b) / b
            )  # fmt: skip
        else:
            known = self.config.noise_variance / self.scale_**2
            self._noise = torch.tensor([1.0, known], dtype=torch.float64, device=residual.device)
            log_tau = self._expected_tau().log()
        likelihood = (data.log_weight + data.count * (log_tau - math.log(2 * math.pi))) / 2
        return likelihood - self._expected_tau() * residual - divergence

    def _expected_tau(self) -> Tensor:
        return self._noise[0] / self._noise[1]

    def _moment(self, k: int) -> Tensor:
        mean = self.factor_mean_[k]
        return self.factor_cov_[k] + mean.unsqueeze(-1) * mean.unsqueeze(-2)

    def _sums(self, data: _Data, k: int) -> tuple[Tensor, Tensor]:
        """Sums over the entries at each index of mode k, of outer second moments and of values times means."""
        others = [j for j in range(self._modes) if j != k]
        dtype = self.config.dtype
        moments = [data.packings[j].pack(self._moment(j)).to(dtype) for j in others]
        means = [self.factor_mean_[j].to(dtype) for j in others]
        return grouped_sums(data.groups[k], moments, means, self.config.mode == "cp", self.config.chunk)

    def _core_second(self, data: _Data) -> Tensor:
        """E[W W'] with every mode's pair of indices packed, an element standing for all that are equal to it."""
        if self.config.mode == "cp":
            return self.core_
        return _packed_second(
            self.core_, self.core_cov_ if self.config.core_moments == "full" else None, data.packings
        ).to(self.config.dtype)

    def _learn_kernels(self) -> None:
        """Raise each mode's evidence over its lengthscale and outputscale, messages held."""
        for k, bundle in enumerate(self._bundles):
            if not bool(self._precision[k].any()):
                continue
            found = _fitted_kernel(bundle, self._precision[k], self._information[k])
            self.lengthscale_[k], self.outputscale_[k] = found
            self._bundles[k] = self._bundle(k, bundle.points)
            posterior = self._bundles[k].smooth(self._precision[k], self._information[k])
            self._posteriors[k] = posterior
            self.factor_mean_[k], self.factor_cov_[k] = posterior.mean, posterior.covariance

    # What was learnt

    @property
    def tau_(self) -> float:
        """Expected precision of the noise of the normalised values."""
        self._check_fitted()
        return float(self._expected_tau())

    @property
    def noise_std_(self) -> float:
        """Standard deviation of the noise in the values' unit, tau_ ** -0.5 times scale_."""
        return self.scale_ / math.sqrt(self.tau_)

    @property
    def coordinates_(self) -> list[Tensor]:
        """Per mode, (D_k,), the distinct coordinates of the data."""
        self._check_fitted()
        return [b.points * self._span[k] + self._low[k] for k, b in enumerate(self._bundles)]

    def _check_fitted(self) -> None:
        if not self._fitted:
            raise InvalidArgument("the model was not fitted, expected a call of fit (or load) before")

    def factor(self, mode: int, coords: Any) -> tuple[Tensor, Tensor]:
        """The functions of a mode at any coordinates.

        Args:
            mode: 0 to K - 1.
            coords: (T,), in the unit of the data; between its points, and beyond them.

        Returns:
            Mean (T, r) and covariance (T, r, r).
        """
        self._check_fitted()
        if isinstance(mode, bool) or not isinstance(mode, int) or not 0 <= mode < self._modes:
            raise InvalidArgument(f"given mode {mode!r}, expected 0 to {self._modes - 1}")
        x = _tensor("coords", coords, self._low.device)
        if x.dim() != 1:
            raise InvalidArgument(f"given coords of shape {tuple(x.shape)}, expected (T,)")
        return self._posteriors[mode].at((x - self._low[mode]) / self._span[mode])

    def predict(
        self, coords: Any, return_var: bool = False, include_noise: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Values at any coordinates.

        Args:
            coords: (M, K).
            return_var: give the variance too.
            include_noise: of a new noisy value, not of the function.

        Returns:
            Mean (M,), float64, and with return_var the variance (M,), in the unit of the values (squared).

        Raises:
            InvalidArgument: coordinates of another width, or not finite; or the model was not fitted.
        """
        self._check_fitted()
        x = _tensor("coords", coords, self._low.device)
        if x.dim() != 2 or x.shape[1] != self._modes:
            raise InvalidArgument(f"given coords of shape {tuple(x.shape)}, expected (M, {self._modes})")
        moments, indices = [], []
        for k in range(self._modes):
            distinct, index = torch.unique(x[:, k], return_inverse=True)
            moments.append(self.factor(k, distinct) if distinct.numel() else None)
            indices.append(index)
        if x.shape[0] == 0:
            return (x.new_zeros(0), x.new_zeros(0)) if return_var else x.new_zeros(0)
        cp = self.config.mode == "cp"
        packings = [Packing(r, torch.float64, x.device) for r in self.rank_]
        second = self.core_ if cp else _packed_second(self.core_, self.core_cov_, packings)
        widest = second.numel() // (1 if cp else second.shape[-1])
        step = max(1, min(x.shape[0], (1 << 23) // max(1, widest)))
        means, variances = [], []
        for start in range(0, x.shape[0], step):
            at = [index[start : start + step] for index in indices]
            rows = [m[0][i] for m, i in zip(moments, at, strict=True)]  # type: ignore[index]
            mean = elementwise(rows).sum(-1) if cp else contract_rows(self.core_, rows)
            means.append(mean)
            if not return_var:
                continue
            squares = [
                p.pack(m[1][i] + r.unsqueeze(-1) * r.unsqueeze(-2))  # type: ignore[index]
                for p, m, i, r in zip(packings, moments, at, rows, strict=True)
            ]
            if cp:
                square = (elementwise(squares) * packings[0].multiplicity).sum(-1)
            else:
                square = contract_rows(second, squares)
            variances.append((square - mean.square()).clamp_min(0))
        mean = self.offset_ + self.scale_ * torch.cat(means)
        if not return_var:
            return mean
        noise = 1 / self._expected_tau() if include_noise else 0.0
        return mean, self.scale_**2 * (torch.cat(variances) + noise)

    def to_grid(self, *axes: Any) -> TuckerTensor:
        """The expected tensor on a grid, in factors: nothing of the grid's size is computed.

        Args:
            axes: K times (n_k,), coordinates of the grid along each mode.

        Returns:
            `TuckerTensor` of shape (n_1, .., n_K), in the values' unit. Where the values were centred, it has one more
            column in each factor, of ones, that carries the mean.
        """
        self._check_fitted()
        if len(axes) != self._modes:
            raise InvalidArgument(f"given {len(axes)} axes, expected {self._modes}, one per mode")
        factors = [self.factor(k, axis)[0] for k, axis in enumerate(axes)]
        core = self.scale_ * self.core_
        if self.offset_ != 0:
            wider = core.new_zeros([r + 1 for r in self.rank_])
            wider[tuple(slice(r) for r in self.rank_)] = core
            wider[(-1,) * self._modes] = self.offset_
            core, factors = wider, [torch.cat([f, torch.ones_like(f[:, :1])], 1) for f in factors]
        return TuckerTensor(core, tuple(factors))

    # Keeping

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors of the fitted model; posteriors follow from the messages."""
        self._check_fitted()
        state = {"low": self._low, "span": self._span, "core": self.core_, "noise": self._noise}
        state["history"] = torch.tensor(self.history_, dtype=torch.float64)
        state["scaling"] = torch.tensor([self.offset_, self.scale_], dtype=torch.float64)
        state["scales"] = torch.tensor([self.lengthscale_, self.outputscale_], dtype=torch.float64)
        if self._residual is not None:
            state["residual"] = self._residual
        if self.core_cov_ is not None:
            state["core_cov"] = self.core_cov_
            state["core_precision"], state["core_information"] = self._core_precision, self._core_information
        for k in range(self._modes):
            state[f"points.{k}"] = self._bundles[k].points
            state[f"precision.{k}"], state[f"information.{k}"] = self._precision[k], self._information[k]
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> FunctionalTucker:
        """Take the tensors of `state_dict`, which a model of the same settings gave.

        Raises:
            CheckpointError: tensors are missing or have other shapes than the settings say.
        """
        try:
            modes = state["low"].shape[0]
            ranks = self.config.per_mode("rank", modes)
            tensors = {name: t.to(self.device or "cpu", torch.float64).clone() for name, t in state.items()}
            self._modes, self.rank_ = modes, ranks
            self.kernel_ = self.config.per_mode("kernel", modes)
            self._low, self._span, self._noise = (tensors[n] for n in ("low", "span", "noise"))
            self.core_ = tensors["core"].reshape(ranks)
            self._residual = tensors.get("residual")
            self.core_cov_ = None
            if self.config.mode == "tucker":
                self.core_cov_ = tensors["core_cov"]
                self._core_precision = tensors["core_precision"]
                self._core_information = tensors["core_information"]
            self.history_ = tensors["history"].tolist()
            self.offset_, self.scale_ = tensors["scaling"].tolist()
            self.lengthscale_, self.outputscale_ = tensors["scales"].tolist()
            self._generator = torch.Generator().manual_seed(self.config.seed)
            self._precision = [tensors[f"precision.{k}"] for k in range(modes)]
            self._information = [tensors[f"information.{k}"] for k in range(modes)]
            self._bundles = [self._bundle(k, tensors[f"points.{k}"]) for k in range(modes)]
            self._posteriors = [
                b.smooth(p, i)
                for b, p, i in zip(self._bundles, self._precision, self._information, strict=True)
            ]
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"given tensors that are not a FunctionalTucker of these settings ({error}); use what state_dict gave"
            ) from error
        self.factor_mean_ = [p.mean for p in self._posteriors]
        self.factor_cov_ = [p.covariance for p in self._posteriors]
        self.converged_ = False
        self._fitted = True
        return self

    def to(self, device: torch.device | str) -> FunctionalTucker:
        """Move the model to a device."""
        self.device = torch.device(device)
        return self.load_state_dict(self.state_dict()) if self._fitted else self

    def save(self, path: str | Path) -> None:
        """Write the fitted model as a safetensors file; it appears whole or not at all.

        Raises:
            OutputError: it could not be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        config = dataclasses.asdict(self.config) | {"dtype": str(self.config.dtype).removeprefix("torch.")}
        tensors = {name: t.contiguous().cpu() for name, t in self.state_dict().items()}
        path = Path(path)
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, beside, metadata={"format": _FORMAT, "config": json.dumps(config)})
            beside.replace(path)
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            raise OutputError(f"given {path}, which could not be written: {error}") from error

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> FunctionalTucker:
        """Read a model that `save` wrote.

        Raises:
            CheckpointError: there is no such file, or it is damaged or something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise CheckpointError(
                        f"given {path}, which is no saved FunctionalTucker; use a file that save wrote"
                    )
                config = json.loads(metadata["config"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            config["dtype"] = getattr(torch, config["dtype"])
            return cls(**config, device=device).load_state_dict(state)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"given {path}, which can't be read as a saved FunctionalTucker: {error}"
            ) from error


_LEARNT = (
    "core_",
    "core_cov_",
    "factor_mean_",
    "factor_cov_",
    "history_",
    "_noise",
    "_residual",
    "_core_precision",
    "_core_information",
    "_precision",
    "_information",
    "_bundles",
    "_posteriors",
)
"""Attributes that sweeps change, and replace rather than write into."""


@dataclasses.dataclass(frozen=True)
class _Data:
    """A data set arranged for sweeps."""

    points: list[Tensor]  # per mode (D_k,)
    groups: list[Groups]
    square: Tensor  # (), sum of w y^2
    log_weight: Tensor  # ()
    count: Tensor  # (), entries of positive weight
    packings: list[Packing]


def _damped(old: Tensor, fresh: Tensor, keep: float) -> Tensor:
    return fresh if keep == 0 else keep * old + (1 - keep) * fresh


def _packed_second(core: Tensor, covariance: Tensor | None, packings: Sequence[Packing]) -> Tensor:
    """E[W W'], (p_1, .., p_K): mode k's pair (a, b) and (b, a) are added up where a < b."""
    modes = core.dim()
    flat = core.reshape(-1)
    second = flat[:, None] * flat if covariance is None else covariance + flat[:, None] * flat
    second = second.reshape(*core.shape, *core.shape)
    second = second.permute([i for k in range(modes) for i in (k, modes + k)])  # r_1 r_1' r_2 r_2' ..
    for k, packing in enumerate(packings):
        r = core.shape[k]
        merged = second.flatten(k, k + 1)
        upper = merged.index_select(k, packing.rows * r + packing.columns)
        lower = merged.index_select(k, packing.columns * r + packing.rows)
        twice = (packing.multiplicity - 1).to(core).reshape([-1] + [1] * (merged.dim() - k - 1))
        second = upper + twice * lower
    return second


def _fitted_kernel(bundle: MaternBundle, precision: Tensor, information: Tensor) -> tuple[float, float]:
    """Lengthscale and outputscale of more evidence, by a few steps of L-BFGS on their logarithms."""
    start = torch.tensor(
        [math.log(float(bundle.lengthscale)), math.log(float(bundle.outputscale))],
        dtype=torch.float64,
        device=precision.device,
    )
    scales = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([scales], max_iter=5, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        lengthscale, outputscale = scales.exp()
        again = MaternBundle(bundle.points, bundle.kernel, lengthscale, outputscale, bundle.count)
        loss = -again.smooth(precision, information).log_evidence
        loss.backward()
        return loss

    optimizer.step(closure)
    moved = torch.where(scales.isfinite(), scales.detach(), start)
    # A mode that the data do not bound would run away: one update changes a scale tenfold at most.
    lengthscale, outputscale = (start + (moved - start).clamp(-2.3, 2.3)).exp().tolist()
    return lengthscale, outputscale


def _tensor(name: str, value: Any, device: torch.device | None) -> Tensor:
    """As float64 on the device (None: where it is), finite."""
    try:
        result = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgument(
            f"given {name} of type {type(value).__name__}, expected an array of numbers"
        ) from error
    if result.is_complex() or result.dtype == torch.bool:
        raise InvalidArgument(f"given {name} of dtype {result.dtype}, expected real numbers")
    result = result.detach().to(torch.float64)
    if not bool(torch.isfinite(result).all()):
        raise InvalidArgument(
            f"given {name} with NaN or infinite numbers, expected finite ones; drop those entries"
        )
    return result

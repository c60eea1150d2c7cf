"""Settings of a functional Tucker model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tensormill.errors import InvalidArgument
from tensormill.numerics.state_space import KERNELS

PerMode = float | Sequence[float]


@dataclass(frozen=True)
class FunctionalTuckerConfig:
    """What a `FunctionalTucker` is; all fields are its arguments of the same name.

    Attributes:
        rank: functions per mode; one number for all modes or one per mode (equal ones in the CP form).
        kernel: "matern12", "matern32" or "matern52"; one for all modes or one per mode.
        lengthscale: of the functions, likewise; in units of each mode's range of data if `rescale`, else of its
            coordinates.
        outputscale: variance of the functions, likewise.
        mode: "tucker" with a random core, or "cp": a fixed superdiagonal core of ones.
        damping: share of the old message that an update keeps, in [0, 1): of the factors, the core and the noise. Zero
            is a coordinate ascent, which never lowers the evidence bound.
        noise_prior: (shape, rate) of the Gamma prior on the noise precision of the (normalised) values. The paper has
            (1, 1), which keeps a small data set's noise above 1 / N.
        noise_variance: a known noise variance in the unit of the values squared, which is then not learnt.
        core_moments: "full", or "plugin": the core's uncertainty is ignored in messages, as the paper's code does.
        starts: random starts, of which the one with the highest bound after some sweeps goes on.
        n_iter: most sweeps of one `fit`.
        tol: `fit` ends when a sweep changes the evidence bound by less than tol nats per entry.
        learn_kernel: sweeps between two updates of lengthscales and outputscales by the evidence; 0 keeps them.
        normalize: subtract the values' mean and divide by their standard deviation.
        rescale: map each mode's range of data to [0, 1].
        dtype: float64 or float32, of the message sums. The chains are always computed in float64.
        chunk: entries at once, which bounds the memory.
        seed: of the starting functions and core.
    """

    rank: int | tuple[int, ...] = 3
    kernel: str | tuple[str, ...] = "matern32"
    lengthscale: float | tuple[float, ...] = 0.1
    outputscale: float | tuple[float, ...] = 1.0
    mode: str = "tucker"
    damping: float | tuple[float, float, float] = 0.0
    noise_prior: tuple[float, float] = (1.0, 1e-3)
    noise_variance: float | None = None
    core_moments: str = "full"
    starts: int = 3
    n_iter: int = 100
    tol: float = 1e-5
    learn_kernel: int = 0
    normalize: bool = True
    rescale: bool = True
    dtype: torch.dtype = torch.float64
    chunk: int = 1 << 14
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "kernel", "lengthscale", "outputscale", "damping", "noise_prior"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for rank in _each(self.rank):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise InvalidArgument(f"given rank {self.rank!r}, expected whole numbers of at least 1")
        for kernel in _each(self.kernel):
            if kernel not in KERNELS:
                raise InvalidArgument(f"given kernel {kernel!r}, expected one of {', '.join(KERNELS)}")
        for name in ("lengthscale", "outputscale"):
            for value in _each(getattr(self, name)):
                if not _is_number(value) or value <= 0:
                    raise InvalidArgument(f"given {name} {value!r}, expected a finite number above zero")
        _choice("mode", self.mode, ("tucker", "cp"))
        _choice("core_moments", self.core_moments, ("full", "plugin"))
        if self.mode == "cp" and len(set(_each(self.rank))) > 1:
            raise InvalidArgument(f"given rank {self.rank} with mode 'cp', expected one rank for all modes")
        for share in _each(self.damping):
            if not _is_number(share) or not 0 <= share < 1:
                raise InvalidArgument(f"given damping {self.damping!r}, expected shares from 0 to below 1")
        if isinstance(self.damping, tuple) and len(self.damping) != 3:
            raise InvalidArgument(
                f"given damping {self.damping!r}, expected (factors, core, noise) or one number"
            )
        if len(self.noise_prior) != 2 or any(not _is_number(v) or v <= 0 for v in self.noise_prior):
            raise InvalidArgument(
                f"given noise_prior {self.noise_prior!r}, expected (shape, rate), both above zero"
            )
        if self.noise_variance is not None and (
            not _is_number(self.noise_variance) or self.noise_variance <= 0
        ):
            raise InvalidArgument(
                f"given noise_variance {self.noise_variance!r}, expected a number above zero"
            )
        for name, least in (("starts", 1), ("n_iter", 1), ("learn_kernel", 0), ("chunk", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidArgument(f"given {name} {value!r}, expected a whole number of at least {least}")
        if not _is_number(self.tol) or self.tol < 0:
            raise InvalidArgument(f"given tol {self.tol!r}, expected a number of at least 0")
        if self.dtype not in (torch.float32, torch.float64):
            raise InvalidArgument(f"given dtype {self.dtype!r}, expected torch.float64 or torch.float32")

    def per_mode(self, name: str, modes: int) -> tuple:
        """The setting of that name for each of so many modes.

        Raises:
            InvalidArgument: it was given for another number of modes.
        """
        value = getattr(self, name)
        if not isinstance(value, tuple):
            return (value,) * modes
        if len(value) != modes:
            raise InvalidArgument(
                f"given {name} {value} for {modes} modes, expected one for each, or a single one"
            )
        return value


def _each(value: object) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _choice(name: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise InvalidArgument(f"given {name} {given!r}, expected one of {', '.join(known)}")

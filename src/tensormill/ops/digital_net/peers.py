"""What the points are timed against: other people's generators of scrambled Sobol' points of the same number.

They have other scramblings, or none that can be given to them, so their points are not compared (tolerance infinity);
they are set up outside the timing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tensormill.operator import Operator, requires

Arguments = tuple[Tensor, "Tensor | None", int, int, int, bool, torch.dtype]


def _torch(*arguments: Any) -> Callable[[], object]:
    matrices, _, start, n, _, _, dtype = arguments
    engine = torch.quasirandom.SobolEngine(matrices.shape[1], scramble=True, seed=1)

    def call() -> object:
        engine.reset()
        return engine.fast_forward(start).draw(n, dtype=dtype) if start else engine.draw(n, dtype=dtype)

    return call


def _scipy(*arguments: Any) -> Callable[[], object]:
    from scipy.stats import qmc

    matrices, _, start, n, _, _, _ = arguments
    engine = qmc.Sobol(matrices.shape[1], scramble=True)

    def call() -> object:
        engine.reset()
        return engine.fast_forward(start).random(n) if start else engine.random(n)

    return call


def _qmcpy(*arguments: Any) -> Callable[[], object]:
    import qmcpy

    matrices, _, _, n, _, _, _ = arguments
    engine = qmcpy.DigitalNetB2(matrices.shape[1], randomize="LMS DS", seed=1, replications=matrices.shape[0])
    return lambda: engine(n, warn=False)


def _one_of_doubles(*arguments: Any) -> bool:
    return arguments[0].shape[0] == 1 and arguments[-1] == torch.float64


def register(operator: Operator) -> None:
    """Add every peer to the operator."""
    operator.peer(
        "torch SobolEngine",
        devices=("cpu",),
        make=_torch,
        supports=lambda *arguments: arguments[0].shape[0] == 1 and arguments[-1] != torch.int64,
        tolerance=math.inf,
    )
    operator.peer(
        "scipy.stats.qmc.Sobol",
        devices=("cpu",),
        make=_scipy,
        missing=requires("scipy"),
        supports=_one_of_doubles,
        tolerance=math.inf,
    )
    operator.peer(
        "qmcpy.DigitalNetB2",
        devices=("cpu",),
        make=_qmcpy,
        missing=requires("qmcpy"),
        supports=lambda *arguments: arguments[-1] == torch.float64 and arguments[2] == 0,
        tolerance=math.inf,
    )

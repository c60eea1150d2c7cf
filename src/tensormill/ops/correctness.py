"""How a result is compared with the float64 reference: relative RMS error, and no single element far off."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

WORST_ELEMENT = 30.0  # an element may be off by this many times the RMS tolerance; noise stays under it


def tensors(result: Any) -> list[Tensor]:
    """An operator's result as a list of tensors."""
    return [result] if isinstance(result, Tensor) else list(result)


def upcast(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """The same (already rounded) arguments in float64, for the reference."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def result_dtype(arguments: Iterable[Any]) -> torch.dtype:
    """The dtype that sets the tolerance: that of the first floating-point argument (float64 if there is none), or the
    result's, the last dtype among the arguments, where that is the coarser one."""
    given = list(arguments)
    first = [a.dtype for a in given if isinstance(a, Tensor) and a.is_floating_point()][:1]
    last = [a for a in given if isinstance(a, torch.dtype)][-1:]
    found = first + [d for d in last if d.is_floating_point and d.itemsize > 1]
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


def deviation(actual: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """What is wrong with `actual`, or None.

    Args:
        actual: the result to judge, any dtype.
        expected: the reference's result in float64 (or integers, which must be equal).
        tolerance: allowed relative RMS error; single elements may be off by `WORST_ELEMENT` times that,
            relative to the larger of their own size and the RMS of all.
    """
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if not expected.is_floating_point():
        wrong = int((actual.to(expected.dtype) != expected).sum())
        return f"{wrong} of {expected.numel()} integers differ" if wrong else None
    if expected.numel() == 0:
        return None
    limit = torch.finfo(actual.dtype).max
    value = actual.double()
    finite = torch.isfinite(expected) & (expected.abs() <= limit)
    if not torch.equal(torch.isfinite(value), finite):
        return f"{int((torch.isfinite(value) != finite).sum())} elements are NaN or Inf, or should be"
    difference = torch.where(finite, value - expected, 0.0)
    reference = torch.where(finite, expected, 0.0)
    size = reference.square().mean().sqrt()
    error = difference.square().mean().sqrt()
    if error > tolerance * size:
        return f"relative RMS error {float(error / size.clamp_min(1e-300)):.2e} exceeds {tolerance:.2e}"
    worst = difference.abs() - WORST_ELEMENT * tolerance * torch.maximum(size, reference.abs())
    if bool((worst > 0).any()):
        return f"{int((worst > 0).sum())} elements are off by up to {float(difference.abs().max()):.2e}"
    return None

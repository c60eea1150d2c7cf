"""What computes the same product from wider numbers, to be timed beside bit_plane_linear.

Both hold their weights in their own format, prepared outside the timing, and only their product is timed: scaling and
the quantization of activations would come on top of int8's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tensormill.operator import Operator, requires
from tensormill.ops.bit_planes import integer_range, step_and_offset, unpack_codes


def register(operator: Operator) -> None:
    operator.peer(
        "torch._int_mm (int8)",
        devices=("cpu", "cuda"),
        make=_int_mm,
        missing=requires("torch"),
        supports=_int_mm_supports,
        tolerance=float("inf"),
    )
    operator.peer(
        "torch.nn.functional.linear (float16)",
        devices=("cuda",),
        make=_dense,
        missing=requires("torch"),
        tolerance=float("inf"),
    )


def _integers(planes: Tensor, length: int, format: str) -> Tensor:
    step, offset = step_and_offset(format, planes.shape[0])
    return step * unpack_codes(planes, length).int() + offset


def _int_mm_supports(*arguments: Any) -> bool:
    x, weight, *_, length, x_format, weight_format, _, _ = arguments
    for planes, format in ((x, x_format), (weight, weight_format)):
        low, high = integer_range(format, planes.shape[0])
        if low < -128 or high > 127:
            return False
    return x.shape[1] > 0 and length % 8 == 0 and weight.shape[1] % 8 == 0


def _int_mm(*arguments: Any) -> Callable[[], Tensor]:
    x, weight, *_, length, x_format, weight_format, _, _ = arguments
    wide = _integers(weight, length, weight_format).to(torch.int8).t()
    activations = _integers(x, length, x_format).to(torch.int8)
    if x.is_cuda and activations.shape[0] <= 16:  # the function takes no fewer than 17 rows
        activations = torch.nn.functional.pad(activations, (0, 0, 0, 32 - activations.shape[0]))
    return lambda: torch._int_mm(activations, wide)


def _dense(*arguments: Any) -> Callable[[], Tensor]:
    x, weight, *_, length, x_format, weight_format, _, _ = arguments
    wide = _integers(weight, length, weight_format).half()
    activations = _integers(x, length, x_format).half()
    return lambda: torch.nn.functional.linear(activations, wide)

"""In which precision the methods multiply: as fast as the device allows without losing what counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tensormill.roofline import has_fast_matmul


def computing_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a model stored in `dtype` runs fast on `device`: its own, or float32 on some CPUs."""
    return dtype if has_fast_matmul(dtype, device) else torch.float32


@contextmanager
def widened(*modules: nn.Module, always: bool = False) -> Iterator[None]:
    """Inside, modules whose 16-bit products this CPU can't compute fast hold the same numbers in float32.

    With `always`, all 16-bit modules do, for what would drown in 16-bit rounding of the activations. Changes to the parameters made inside are lost.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                narrow = always and tensor.dtype in (torch.float16, torch.bfloat16)
                if narrow or computing_dtype(tensor.dtype, tensor.device) != tensor.dtype:
                    kept.append((tensor, tensor.data))
                    tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


@contextmanager
def gram_precision(x: Tensor) -> Iterator[None]:
    """Inside, float32 matrix products take the fastest path that is exact for numbers of x's dtype."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        choice = "medium"
    elif x.dtype in (torch.bfloat16, torch.float16) and x.device.type == "cuda":
        choice = "high"
    else:
        choice = None
    with _float32_products(choice):
        yield


@contextmanager
def search_precision(device: torch.device) -> Iterator[None]:
    """Inside, GPUs may multiply float32 matrices with 10 bits of mantissa: a search needs no more."""
    with _float32_products("high" if device.type == "cuda" else None):
        yield


@contextmanager
def _float32_products(choice: str | None) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    if choice is not None:
        torch.set_float32_matmul_precision(choice)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

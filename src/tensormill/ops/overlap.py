"""Programmatic dependent launch of Triton kernels: a kernel's start overlaps the end of the one before it.

On GPUs from compute capability 9 on, a kernel launched so may start when the one before says that it may, or ends; it
waits (`gdc_wait`) before it touches memory that the one before reads or writes. In a chain of short kernels that saves
most of the gaps between them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tensormill.operator import interpreting


def overlap_options(x: Tensor) -> dict[str, Any]:
    """Launch options of a kernel with the constant OVERLAP, for tensors where x is: on where the GPU can."""
    able = x.is_cuda and not interpreting() and _able(x.device.index)
    return {"OVERLAP": True, "launch_pdl": True} if able else {"OVERLAP": False}


@functools.cache
def _able(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9

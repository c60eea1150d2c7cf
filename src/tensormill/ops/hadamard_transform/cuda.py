"""Transforms of 2^15 to 2^18 values on Hopper: one cluster of blocks per row, see `cluster.cu`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from tensormill.cuda import HOPPER_HEADER, Kernel, Module, cuda_missing

LOG_TILE = 14  # elements of a block's tile; up to 16 blocks make a cluster
_THREADS = 512
_SHARED = (4 << LOG_TILE) + (16 << (LOG_TILE - 7))  # a tile, with 16 bytes more after every 128 elements
# Fewer elements are faster in many small programs than in few clusters.
_LEAST_ELEMENTS = 1 << 23
_TYPES = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("scale", ctypes.c_float),
    )


def missing() -> str | None:
    """Why this can't run here, or None."""
    if (reason := cuda_missing()) is not None:
        return reason
    has_clusters = (9, 0) <= torch.cuda.get_device_capability() < (11, 0)
    return None if has_clusters else "the GPU has no clusters of 16 blocks"


def supports(x: Tensor, scale: float) -> bool:
    """Many rows of 2^15 to 2^18 elements, summed in float32."""
    log_n = x.shape[-1].bit_length() - 1
    return x.dtype in _TYPES and LOG_TILE < log_n <= LOG_TILE + 4 and x.numel() >= _LEAST_ELEMENTS


@functools.cache
def module(dtype: torch.dtype, log_n: int) -> Module:
    """The kernel for rows of 2^log_n elements."""
    return Module(
        Path(__file__).with_name("cluster.cu"), {"IO": _TYPES[dtype], "LOG_N": log_n}, (HOPPER_HEADER,)
    )


def launch(kernel: Kernel, x: Tensor, y: Tensor, scale: float) -> None:
    """Transform the rows of contiguous x into y."""
    blocks = x.shape[-1] >> LOG_TILE
    arguments = _Arguments(x.data_ptr(), y.data_ptr(), scale)
    kernel.launch(x.numel() >> LOG_TILE, _THREADS, _SHARED, arguments, cluster=blocks)


def hadamard_transform(x: Tensor, scale: float) -> Tensor:
    """See `tensormill.ops.hadamard_transform`."""
    source = x.detach().contiguous()
    result = torch.empty_like(source)
    if source.numel() > 0:
        of_length = module(source.dtype, source.shape[-1].bit_length() - 1)
        launch(of_length.kernel("hadamard_cluster", source.get_device()), source, result, scale)
    return result

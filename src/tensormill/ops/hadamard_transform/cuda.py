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
# A tile in float32 with 16 bytes more after every 128 elements, and a barrier; beside the tile that arrives.
_SHARED = (4 << LOG_TILE) + (16 << (LOG_TILE - 7)) + 8
_TYPES = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("scale", ctypes.c_float),
    )


def missing() -> str | None:
    """Why this can't run here, or None."""
    if (reason := cuda_missing()) is not None:
        return reason
    return None if torch.cuda.get_device_capability() >= (9, 0) else "the GPU has no clusters of blocks"


def supports(x: Tensor, scale: float) -> bool:
    """Lengths of 2^15 to 2^18, summed in float32."""
    return x.dtype in _TYPES and LOG_TILE < x.shape[-1].bit_length() - 1 <= LOG_TILE + 4


@functools.cache
def module(dtype: torch.dtype, log_n: int) -> Module:
    """The kernel for rows of 2^log_n elements."""
    return Module(
        Path(__file__).with_name("cluster.cu"), {"IO": _TYPES[dtype], "LOG_N": log_n}, (HOPPER_HEADER,)
    )


def launch(kernel: Kernel, x: Tensor, y: Tensor, scale: float, clusters: int | None = None) -> None:
    """Transform the rows of contiguous x into y with `clusters` clusters at a time; None: as many as fit."""
    blocks = x.shape[-1] >> LOG_TILE
    rows = x.numel() // x.shape[-1]
    shared = _SHARED + (x.element_size() << LOG_TILE)
    clusters = kernel.active_clusters(_THREADS, shared, blocks) if clusters is None else clusters
    arguments = _Arguments(x.data_ptr(), y.data_ptr(), rows, scale)
    kernel.launch(min(rows, clusters) * blocks, _THREADS, shared, arguments, cluster=blocks)


def hadamard_transform(x: Tensor, scale: float) -> Tensor:
    """See `tensormill.ops.hadamard_transform`."""
    source = x.detach().contiguous()
    result = torch.empty_like(source)
    if source.numel() > 0:
        of_length = module(source.dtype, source.shape[-1].bit_length() - 1)
        launch(of_length.kernel("hadamard_cluster", source.get_device()), source, result, scale)
    return result

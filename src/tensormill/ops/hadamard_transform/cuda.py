"""Transforms of 2^15 to 2^18 values on Hopper: one cluster of blocks per row, see `cluster.cu`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from tensormill.cuda import Module, cuda_missing

LOG_TILE = 14  # elements of a block's tile; up to 16 blocks make a cluster
_THREADS = {4: 512, 8: 1024}  # by bytes of an accumulator
_PADDING = {4: 7, 8: 5}  # 16 bytes after every 2^this elements of a tile
_TYPES = {
    torch.float32: "float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float64: "double",
}


class _Arguments(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("scale_rest", ctypes.c_float),
    )


def missing() -> str | None:
    """Why this can't run here, or None."""
    if (reason := cuda_missing()) is not None:
        return reason
    return None if torch.cuda.get_device_capability() >= (9, 0) else "the GPU has no clusters of blocks"


def supports(x: Tensor, scale: float) -> bool:
    """Lengths of 2^15 to 2^18; a float64 scale must be one that two float32 can carry."""
    fits = x.dtype != torch.float64 or scale == 0 or 1e-20 < abs(scale) < 1e20
    return fits and LOG_TILE < x.shape[-1].bit_length() - 1 <= LOG_TILE + 4


@functools.cache
def module(dtype: torch.dtype, log_n: int) -> Module:
    """The kernel for rows of 2^log_n elements."""
    defines = {"IO": _TYPES[dtype], "DOUBLE": int(dtype == torch.float64), "LOG_N": log_n}
    return Module(Path(__file__).with_name("cluster.cu"), defines)


def geometry(dtype: torch.dtype, log_n: int) -> tuple[int, int, int]:
    """(blocks of a cluster, threads of a block, bytes of its shared memory)."""
    size = 8 if dtype == torch.float64 else 4
    return 1 << (log_n - LOG_TILE), _THREADS[size], (size << LOG_TILE) + (16 << (LOG_TILE - _PADDING[size]))


def arguments(x: Tensor, y: Tensor, scale: float) -> ctypes.Structure:
    """The kernel's; its float arguments are float32, and two of them carry a float64's scale."""
    high = float(torch.tensor(scale, dtype=torch.float32))
    return _Arguments(x.data_ptr(), y.data_ptr(), high, scale - high)


def hadamard_transform(x: Tensor, scale: float) -> Tensor:
    """See `tensormill.ops.hadamard_transform`."""
    source = x.detach().contiguous()
    result = torch.empty_like(source)
    rows = source.numel() // source.shape[-1]
    if rows > 0:
        log_n = source.shape[-1].bit_length() - 1
        blocks, threads, shared = geometry(source.dtype, log_n)
        kernel = module(source.dtype, log_n).kernel("hadamard_cluster", source.get_device())
        kernel.launch(rows * blocks, threads, shared, arguments(source, result, scale), cluster=blocks)
    return result

"""CUDA kernels: weights in the tiled layout, streamed through shared memory to the tensor cores."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensormill.cuda import Module, architecture, multiprocessors
from tensormill.ops import tiles
from tensormill.ops.linear_wna16 import wgmma

_FOLDER = Path(__file__).parent
_HEADERS = (_FOLDER / "dequantize.cuh",)
_ACTIVATIONS = {torch.float16: "Half", torch.bfloat16: "BFloat16"}
_KINDS = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}

# Tokens up to which `stream.cu` is used.
MOST_STREAMED_TOKENS = 64
_MOST_STAGES = 16
_BARRIER_BYTES = 256
_ONE_GROUP = 1 << 30  # a group size beyond any row
# Shared memory of a block that kernels may use, by architecture.
_SHARED_BYTES = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_120a": 99 << 10}
_MOST_SHARED_BYTES = 227 << 10


class StreamArguments(ctypes.Structure):
    """Arguments of `stream.cu`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "zero_point", "bias", "x", "y", "workspace")),
        *((name, ctypes.c_int) for name in ("tokens", "rows", "columns", "x_stride", "groups", "group_size")),
        ("stages", ctypes.c_int),
    )


@dataclass(frozen=True)
class Plan:
    """How `stream.cu` runs: its macros, grid, block, shared memory and stages."""

    defines: tuple[tuple[str, int | str], ...]
    grid: int
    block: int
    shared: int
    stages: int
    group_size: int

    @property
    def workspace(self) -> int:
        """Elements of the workspace."""
        defines = dict(self.defines)
        return self.grid * 64 * int(defines["ROW_BLOCKS"]) * int(defines["TOKENS"])


@functools.lru_cache(maxsize=4096)
def plan(
    tokens: int,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    zeros: bool,
    blocks: int,
    shared_bytes: int,
    row_blocks: int = 0,
    row_tiles: int = 0,
) -> Plan:
    """The plan for a product of `tokens` with a weight (rows, columns) on a GPU of `blocks` multiprocessors."""
    one_group = group_size == -1 or group_size >= columns
    span = min(128 if one_group else group_size, 128)
    padded_tokens = next(n for n in (8, 16, 32, 64) if tokens <= n)
    row_blocks = row_blocks or 4
    row_tiles = row_tiles or 2
    spans = 128 // span
    scale_bytes = 4 if scale_dtype == torch.float32 else 2
    stage = row_blocks * (1024 * bits + 64 * spans * (scale_bytes + zeros)) + padded_tokens * 272
    stages = min(_MOST_STAGES, (shared_bytes - _BARRIER_BYTES) // stage)
    units = -(-rows // (64 * row_blocks)) * -(-columns // 128)
    stages = max(1, min(stages, -(-units // min(blocks, units))))
    defines = (
        ("WEIGHT_BITS", bits),
        ("ACTIVATION", _ACTIVATIONS[dtype]),
        ("TOKENS", padded_tokens),
        ("ROW_BLOCKS", row_blocks),
        ("ROW_TILES", row_tiles),
        ("SPAN", span),
        ("ZEROS", int(zeros)),
        ("SCALE", _KINDS[scale_dtype]),
        ("BIAS", 0 if bias_dtype is None else _KINDS[bias_dtype]),
    )
    threads = 32 * (4 * row_blocks // row_tiles + 1)
    return Plan(
        defines,
        min(blocks, units),
        threads,
        _BARRIER_BYTES + stages * stage,
        stages,
        _ONE_GROUP if one_group else group_size,
    )


@functools.cache
def stream_module(defines: tuple[tuple[str, int | str], ...]) -> Module:
    return Module(_FOLDER / "stream.cu", dict(defines), _HEADERS)


def shared_bytes(architecture: str) -> int:
    return _SHARED_BYTES.get(architecture, _MOST_SHARED_BYTES)


def stream_arguments(
    made: Plan,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    workspace: Tensor,
) -> StreamArguments:
    """x: (tokens, K) with rows of whole 16 bytes, aligned."""
    return StreamArguments(
        weight.data_ptr(),
        scale.data_ptr(),
        None if zero_point is None else zero_point.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        workspace.data_ptr(),
        x.shape[0],
        weight.shape[0],
        x.shape[1],
        2 * x.stride(0),
        tiles.tiled_groups(x.shape[1], made.group_size),
        made.group_size,
        made.stages,
    )


def aligned(x: Tensor) -> Tensor:
    """x (tokens, K), copied unless its rows are contiguous, aligned to 16 bytes and whole multiples of them apart."""
    if (x.stride(1) == 1 or x.shape[1] == 1) and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    wide = x.new_empty(x.shape[0], -(-x.shape[1] // 8) * 8)[:, : x.shape[1]]
    return wide.copy_(x)


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """See `reference.linear_wna16`; for layout "tiled"."""
    rows, columns = weight.shape[0], x.shape[-1]
    flat = x.reshape(-1, columns)
    if flat.shape[0] > MOST_STREAMED_TOKENS and architecture(x.device.index) == "sm_90a":
        scale, bias = scale.to(x.dtype), None if bias is None else bias.to(x.dtype)
        y = wgmma.product(flat, weight, scale, zero_point, bias, bits=bits, group_size=group_size)
        return y.view(*x.shape[:-1], rows)
    y = x.new_empty((*x.shape[:-1], rows))
    if flat.shape[0] == 0 or rows == 0:
        return y
    out = y.view(-1, rows)
    for first in range(0, flat.shape[0], MOST_STREAMED_TOKENS):
        part = flat[first : first + MOST_STREAMED_TOKENS]
        _stream(part, weight, scale, zero_point, bias, bits, group_size, out[first : first + MOST_STREAMED_TOKENS])
    return y


def _stream(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    y: Tensor,
) -> None:
    device = x.device.index
    target = architecture(device)
    made = plan(
        x.shape[0],
        weight.shape[0],
        x.shape[1],
        bits,
        group_size,
        x.dtype,
        scale.dtype,
        None if bias is None else bias.dtype,
        zero_point is not None,
        multiprocessors(device),
        shared_bytes(target),
    )
    kernel = stream_module(made.defines).kernel("linear_stream", device)
    x = aligned(x)
    partial = workspace(x.device, made.workspace)
    given = stream_arguments(made, x, weight, scale, zero_point, bias, y, partial)
    kernel.launch(made.grid, made.block, made.shared, given, overlap=target not in ("sm_80", "sm_86", "sm_89"))


_workspaces: dict[tuple[Any, ...], Tensor] = {}


def workspace(device: torch.device, elements: int) -> Tensor:
    """Memory for partial sums, all bits set (`EMPTY`), which kernels leave as they found it.

    Kernels of one stream run one after another and share it. A CUDA graph that is being captured gets its own, filled
    when the graph starts, since it may run beside others.
    """
    stream = torch.cuda.current_stream(device).cuda_stream
    key = (device.index, stream, _capture(stream))
    found = _workspaces.get(key)
    if found is None or found.numel() < elements:
        if key[2]:  # earlier captures on this stream are over
            for old in [k for k in _workspaces if k[:2] == key[:2] and k[2] not in (0, key[2])]:
                del _workspaces[old]
        elements = max(elements, 1 << 20)
        found = torch.full((elements,), -1, dtype=torch.int32, device=device)
        _workspaces[key] = found
    return found


def _capture(stream: int) -> int:
    """A number for the graph that is being captured on the stream, 0 for none."""
    if not torch.cuda.is_current_stream_capturing():
        return 0
    from cuda.bindings import driver

    return int(driver.cuStreamGetCaptureInfo(stream)[2])

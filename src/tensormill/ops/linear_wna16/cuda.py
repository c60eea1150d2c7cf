"""CUDA kernels: weights in the tiled layout, streamed through shared memory to the tensor cores."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensormill.cuda import (
    HOPPER_HEADER,
    Kernel,
    Module,
    architecture,
    multiprocessors,
)
from tensormill.ops.linear_wna16 import wgmma
from tensormill.ops.linear_wna16.wgmma import workspace
from tensormill.ops.tiles import COLUMNS, tiled_groups

_FOLDER = Path(__file__).parent
_HEADERS = (HOPPER_HEADER, _FOLDER / "dequantize.cuh")
_ACTIVATIONS = {torch.float16: "Half", torch.bfloat16: "BFloat16"}
_KINDS = {torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}

# Tokens that `stream.cu` takes at a time, and how many before Hopper, where registers can't be shifted between warps.
MOST_STREAMED_TOKENS = 32
_MOST_STREAMED_TOKENS_BEFORE_HOPPER = 16
# On Hopper `wgmma.cu` takes over; with many rows, whose tiles fill the GPU by themselves, it is faster from here on
# (measured with 4 bits on an H100).
_MANY_ROWS, _MOST_STREAMED_TOKENS_OF_MANY_ROWS = 8192, 16
_MOST_STAGES = 16
# Blocks of 64 rows x 128 columns of a block's run from which on its ring of stages takes all shared memory, not half of
# it. With few, all that the next kernel loads ahead delays the last sums of this one: 12.4 instead of 15.2 us at 60, but
# 66 instead of 60 us at 436 (4 bits, one token, H200).
_BLOCKS_FOR_A_LONG_RING = 192
# Units have 256 rows, or where each row of them would be shared by more blocks than that, 128.
_MOST_SHARERS = 3
_CONSUMERS, _BARRIER_BYTES = 8, 256
_ONE_GROUP = 1 << 30  # a group size beyond any row
# Shared memory of a block that kernels may use, by architecture.
_SHARED_BYTES = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_120a": 99 << 10}
_MOST_SHARED_BYTES = 227 << 10
_BEFORE_HOPPER = ("sm_80", "sm_86", "sm_87", "sm_89")


# The struct of `stream.cu`: weight, scale, zero_point, bias, x, y, workspace; tokens, rows, columns, x_stride, groups,
# group_size, stages, across, units, larger_blocks.
_ARGUMENTS = struct.Struct("7P10i")


@dataclass(frozen=True)
class Plan:
    """How `stream.cu` runs.

    Attributes:
        defines: its macros.
        grid, block, shared: blocks, threads of a block, bytes of shared memory.
        workspace: elements of the workspace.
        sizes: the integers of its arguments.
    """

    defines: tuple[tuple[str, int | str], ...]
    grid: int
    block: int
    shared: int
    workspace: int
    sizes: tuple[int, ...]

    def arguments(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        y: Tensor,
        workspace: Tensor,
    ) -> bytes:
        """The kernel's struct; x is `aligned`."""
        tokens, rows, columns, *others = self.sizes
        return _ARGUMENTS.pack(
            weight.data_ptr(),
            scale.data_ptr(),
            0 if zero_point is None else zero_point.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            workspace.data_ptr(),
            tokens,
            rows,
            columns,
            2 * x.stride(0),
            *others,
        )


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
    multiprocessors: int,
    shared: int,
    row_blocks: int | None = None,
) -> Plan:
    """The plan for a product of `tokens` with a weight (rows, columns) on a GPU of so many multiprocessors, with
    `shared` bytes of shared memory each; `row_blocks` of 64 rows make a unit, 2 or 4, None chooses."""
    one_group = group_size == -1 or group_size >= columns
    span = min(COLUMNS if one_group else group_size, COLUMNS)
    padded_tokens = next(n for n in (8, 16, 32) if tokens <= n)
    scale_bytes = 4 if scale_dtype == torch.float32 else 2
    across = -(-columns // COLUMNS)
    if row_blocks is None:
        row_blocks = 4 if multiprocessors <= _MOST_SHARERS * -(-rows // 256) else 2
    stage = row_blocks * (1024 * bits + 64 * COLUMNS // span * (scale_bytes + zeros))
    stage += padded_tokens * (2 * COLUMNS + 16)
    units = -(-rows // (64 * row_blocks)) * across
    grid = min(multiprocessors, units)
    each = units // grid
    shares = 1 if each * row_blocks >= _BLOCKS_FOR_A_LONG_RING else 2
    kept = row_blocks * padded_tokens // 16  # sums of 16 rows x 8 tokens, of a consumer
    before = _BARRIER_BYTES + 2 * _CONSUMERS * 512
    fitting = (
        (shared + 1024) // shares - 1024 - before
    ) // stage  # 1024 bytes of every block are the system's
    stages = max(1, min(_MOST_STAGES, fitting, -(-units // grid)))
    defines = (
        ("WEIGHT_BITS", bits),
        ("ACTIVATION", _ACTIVATIONS[dtype]),
        ("TOKENS", padded_tokens),
        ("ROW_BLOCKS", row_blocks),
        ("SPAN", span),
        ("ZEROS", int(zeros)),
        ("SCALE", _KINDS[scale_dtype]),
        ("BIAS", 0 if bias_dtype is None else _KINDS[bias_dtype]),
    )
    group_size = _ONE_GROUP if one_group else group_size
    return Plan(
        defines,
        grid,
        32 * (_CONSUMERS + row_blocks),
        before + stages * stage,
        grid * kept * _CONSUMERS * 128,
        (
            tokens,
            rows,
            columns,
            tiled_groups(columns, group_size),
            group_size,
            stages,
            across,
            each,
            units % grid,
        ),
    )


@functools.cache
def stream_module(defines: tuple[tuple[str, int | str], ...]) -> Module:
    return Module(_FOLDER / "stream.cu", dict(defines), _HEADERS)


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
    flat = x if x.dim() == 2 else x.reshape(-1, columns)
    hopper = architecture(x.device.index) == "sm_90a"
    most = _most_streamed_tokens(x.device.index)
    if hopper and bits == 4 and rows > _MANY_ROWS:
        most = _MOST_STREAMED_TOKENS_OF_MANY_ROWS
    if hopper and flat.shape[0] > most and rows > 0:
        bias = None if bias is None else bias.to(x.dtype)
        result = wgmma.product(flat, weight, scale, zero_point, bias, bits=bits, group_size=group_size)
        return result.view(*x.shape[:-1], rows)
    y = x.new_empty((*x.shape[:-1], rows))
    if y.numel() == 0:
        return y
    if flat.shape[0] <= most:
        _stream(flat, weight, scale, zero_point, bias, bits, group_size, y)
        return y
    for tokens, results in zip(flat.split(most), y.view(-1, rows).split(most), strict=True):
        _stream(tokens, weight, scale, zero_point, bias, bits, group_size, results)
    return y


@functools.cache
def _most_streamed_tokens(device: int) -> int:
    before = architecture(device) in _BEFORE_HOPPER
    return _MOST_STREAMED_TOKENS_BEFORE_HOPPER if before else MOST_STREAMED_TOKENS


_planned: dict[tuple[Any, ...], tuple[Plan, Kernel, bool]] = {}


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
    bias_dtype = None if bias is None else bias.dtype
    what = (*x.shape, weight.shape[0], bits, group_size, x.dtype, scale.dtype, bias_dtype, zero_point is None)
    key = (device, what)
    found = _planned.get(key)
    if found is None:
        target = architecture(device)
        made = plan(
            x.shape[0],
            weight.shape[0],
            x.shape[1],
            bits,
            group_size,
            x.dtype,
            scale.dtype,
            bias_dtype,
            zero_point is not None,
            multiprocessors(device),
            _SHARED_BYTES.get(target, _MOST_SHARED_BYTES),
        )
        overlap = target not in _BEFORE_HOPPER
        found = made, stream_module(made.defines).kernel("linear_stream", device), overlap
        _planned[key] = found
    made, kernel, overlap = found
    x, weight, scale = aligned(x), _whole(weight), _whole(scale)
    zero_point = None if zero_point is None else _whole(zero_point)
    bias = None if bias is None else bias.contiguous()
    partial = workspace(x.device, made.workspace)
    given = made.arguments(x, weight, scale, zero_point, bias, y, partial)
    kernel.launch(made.grid, made.block, made.shared, given, overlap=overlap)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, copied unless it is contiguous and starts at a multiple of 16 bytes."""
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)

"""Decode attention over caches of 16 bits and less in CUDA C++: launches `attend.cu`."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensormill.cuda import Module, StreamMemory, multiprocessors
from tensormill.ops.decode_attention.storage import bits_of

MOST_ROWS = 16
WARPS = 4
_LOG2_E = 1.4426950408889634
counters = StreamMemory(0, least=1024)
_NAMES = {torch.float16: "Half", torch.bfloat16: "BFloat16"}


@dataclass(frozen=True)
class Config:
    """How `attend` runs.

    Attributes:
        sixteens: tokens of a warp's step, in sixteens.
        blocks: of a multiprocessor, at a time.
        stages: steps of a warp that are in shared memory or on their way there, 2 or more.
    """

    sixteens: int
    blocks: int
    stages: int


class Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((name, ctypes.c_void_p) for name in ("key_scale", "key_offset", "value_scale", "value_offset")),
        *((name, ctypes.c_void_p) for name in ("lengths", "block_table", "sinks", "output", "lse")),
        *((name, ctypes.c_void_p) for name in ("partial", "statistics", "arrived")),
        *((f"query_stride_{name}", ctypes.c_int64) for name in "bht"),
        *((f"{name}_stride_{of}", ctypes.c_int64) for name in ("key", "value") for of in "ph"),
        *((f"{name}_scale_stride_{of}", ctypes.c_int64) for name in ("key", "value") for of in "ph"),
        *((name, ctypes.c_int32) for name in ("table_stride", "batch", "kv_heads", "span", "window")),
        *((name, ctypes.c_float) for name in ("factor", "cap")),
    )


def supports(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    key_scale: Tensor | None,
    key_offset: Tensor | None,
    value_scale: Tensor | None,
    value_offset: Tensor | None,
    lengths: Tensor,
    block_table: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    value_dim: int,
    window: int,
    softcap: float,
) -> bool:
    """Heads of 64 or 128 channels, up to 16 query rows of a key-value head; keys and values of 16 bits, of 8 bits with
    16-bit scales of a token and head, or of 4 bits with these or in block floating point (bfloat16 queries)."""
    head_dim = query.shape[-1]
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    if value is None or 0 in key.shape or query.dtype not in _NAMES:
        return False
    if sinks is not None and sinks.dtype not in (*_NAMES, torch.float32):
        return False
    if head_dim not in (64, 128) or value_dim != head_dim or not 0 < rows <= MOST_ROWS:
        return False
    if key.dtype != value.dtype:
        return False
    if block_table is not None and key.shape[2] % 16:
        return False
    if any(stride % 4 for stride in query.stride()[:3]) or query.stride(3) != 1 or query.data_ptr() % 8:
        return False
    for stored in (key, value):
        row = stored.element_size()
        if stored.stride(-1) != 1 or any(s * row % 16 for s in stored.stride()[:3]) or stored.data_ptr() % 16:
            return False
        if stored.shape[2] * stored.stride(2) * row >= 1 << 31:
            return False
        if block_table is not None and stored.stride(0) * row >= 1 << 31:
            return False
    if key_scale is None or value_scale is None:
        return key_scale is value_scale
    if key_scale.dtype != value_scale.dtype:
        return False
    groups = key_scale.shape[-1]
    if key_scale.dtype == torch.uint8:
        if bits_of(key) != 4 or query.dtype != torch.bfloat16 or value_scale.shape[-1] != groups:
            return False
        if groups not in (2, 4, 8) or groups > head_dim // 16:
            return False
        for scales in (key_scale, value_scale):  # a token's exponents are loaded as one word
            if (
                scales.stride(3) != 1
                or any(s % groups for s in scales.stride()[:3])
                or scales.data_ptr() % groups
            ):
                return False
    elif groups != 1 or value_scale.shape[-1] != 1 or key_scale.dtype not in _NAMES:
        return False
    for scales, offset in ((key_scale, key_offset), (value_scale, value_offset)):
        if scales.stride(-1) != 1 and scales.shape[-1] > 1:
            return False
        if block_table is not None and scales.stride(0) >= 1 << 31:
            return False
        if offset is not None and (offset.stride() != scales.stride() or offset.dtype != scales.dtype):
            return False
    return True


@functools.cache
def module(**defines: int | str) -> Module:
    """The kernel, with these macros."""
    return Module(Path(__file__).with_name("attend.cu"), defines, [Path(__file__).with_name("work.cuh")])


def defines(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_scale: Tensor | None,
    key_offset: Tensor | None,
    value_scale: Tensor | None,
    value_offset: Tensor | None,
    block_table: Tensor | None,
    sinks: Tensor | None,
    window: int,
    softcap: float,
    config: Config,
) -> dict[str, int | str]:
    """The macros of attend.cu for a call."""
    exponents = key_scale is not None and key_scale.dtype == torch.uint8
    scales = [x for x in (key_scale, value_scale, key_offset, value_offset) if x is not None]
    pairs = not exponents and all(
        x.stride(2) == 1 and x.stride(0) % 2 == 0 and x.stride(1) % 2 == 0 and x.data_ptr() % 4 == 0
        for x in scales
    )
    return {
        "BITS": bits_of(key),
        "HEAD_DIM": query.shape[-1],
        "GROUP": query.shape[1] // key.shape[1],
        "QUERIES": query.shape[2],
        "QUERY_TYPE": _NAMES[query.dtype],
        "SCALE_TYPE": "Half" if exponents or key_scale is None else _NAMES[key_scale.dtype],
        "GROUPS": key_scale.shape[-1] if key_scale is not None and exponents else 0,
        "KEY_OFFSET": int(key_offset is not None),
        "VALUE_OFFSET": int(value_offset is not None),
        "KEY_STRIDE": key.stride(2) * key.element_size(),
        "VALUE_STRIDE": value.stride(2) * value.element_size(),
        "KEY_SCALE_STRIDE": 1 if key_scale is None else key_scale.stride(2),
        "VALUE_SCALE_STRIDE": 1 if value_scale is None else value_scale.stride(2),
        "SCALE_PAIRS": int(pairs),
        "PAGE": 0 if block_table is None else key.shape[2],
        "WINDOW": int(window > 0),
        "CAPPED": int(softcap > 0),
        **sink_macros(sinks),
        "SUB": config.sixteens,
        "BLOCKS": config.blocks,
        "STAGES": config.stages,
    }


def sink_macros(sinks: Tensor | None) -> dict[str, int | str]:
    """SINKS and SINK_TYPE, as the kernels want them."""
    if sinks is None or sinks.dtype == torch.float32:
        return {"SINKS": int(sinks is not None), "SINK_TYPE": "Half"}
    return {"SINKS": 2, "SINK_TYPE": _NAMES[sinks.dtype]}


def arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_scale: Tensor | None,
    key_offset: Tensor | None,
    value_scale: Tensor | None,
    value_offset: Tensor | None,
    lengths: Tensor,
    block_table: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    output: Tensor,
    lse: Tensor,
    partial: Tensor,
    statistics: Tensor,
    arrived: Tensor,
) -> Arguments:
    """The kernel's struct; the tensors must outlive it."""
    read = (query, key, value, key_scale, key_offset, value_scale, value_offset, lengths, block_table, sinks)
    return Arguments(
        *(None if x is None else x.data_ptr() for x in (*read, output, lse, partial, statistics, arrived)),
        *query.stride()[:3],
        *(stride * key.element_size() for stride in key.stride()[:2]),
        *(stride * value.element_size() for stride in value.stride()[:2]),
        *((0, 0) if key_scale is None else key_scale.stride()[:2]),
        *((0, 0) if value_scale is None else value_scale.stride()[:2]),
        0 if block_table is None else block_table.stride(0),
        query.shape[0],
        key.shape[1],
        span(query, window),
        window,
        scale / softcap if softcap else scale * _LOG2_E,
        softcap * _LOG2_E,
    )


def span(query: Tensor, window: int) -> int:
    """Tokens that the newest ones may see."""
    return query.shape[2] + window - 1 if window else 1 << 30


def shared_bytes(rows: int, head_dim: int, bits: int, config: Config) -> int:
    """Shared memory of a block: bases and sums, and every warp's ring, which holds its result, too."""
    step = 2 * 16 * config.sixteens * head_dim * bits // 8
    return 1024 + WARPS * max(config.stages * step, -(-rows // 8) * 8 * head_dim * 4)


def configuration(rows: int, bits: int, exponents: bool) -> Config:
    """As many blocks as registers allow, and shared memory where rows are long."""
    if bits == 16:
        return Config(1, 2, 3)
    if rows > 8:  # twice the sums
        return Config(1, 3, 3)
    if exponents:
        return Config(2, 3, 3)
    return Config(2 if bits == 4 else 1, 4, 3)


def decode_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See `tensormill.ops.decode_attention`."""
    query, key, key_scale = arguments[0], arguments[1], arguments[3]
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    return run(
        configuration(rows, bits_of(key), key_scale is not None and key_scale.dtype == torch.uint8),
        *arguments,
    )


def run(
    config: Config,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_scale: Tensor | None,
    key_offset: Tensor | None,
    value_scale: Tensor | None,
    value_offset: Tensor | None,
    lengths: Tensor,
    block_table: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    value_dim: int,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """`decode_attention` with a given configuration."""
    batch, heads, queries, head_dim = query.shape
    pairs = batch * key.shape[1]
    rows = heads // key.shape[1] * queries
    output = torch.empty(batch, heads, queries, value_dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    if output.numel() == 0:
        return output, lse
    stored = (key, value, key_scale, key_offset, value_scale, value_offset)
    device = query.device.index
    blocks = multiprocessors(device) * config.blocks
    partial, statistics = workspace(blocks + pairs, rows, value_dim, query.device)
    macros = defines(query, *stored, block_table, sinks, window, softcap, config)
    results = (output, lse, partial, statistics, counters(query.device, pairs))
    packed = arguments(query, *stored, lengths, block_table, sinks, scale, window, softcap, *results)
    shared = shared_bytes(rows, head_dim, bits_of(key), config)
    overlap = torch.cuda.get_device_capability(device)[0] >= 9
    module(**macros).kernel("attend", device).launch(blocks, WARPS * 32, shared, packed, overlap=overlap)
    return output, lse


def workspace(slots: int, rows: int, value_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for partial results: (partial, statistics), flat."""
    room = torch.empty(slots * rows * (value_dim + 2), dtype=torch.float32, device=device)
    return room[: slots * rows * value_dim], room[slots * rows * value_dim :]

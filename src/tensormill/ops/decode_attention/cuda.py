"""Decode attention over quantized caches in CUDA C++: launches `attend.cu` and `merge.cu`."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensormill.cuda import Module, multiprocessors
from tensormill.ops.decode_attention.storage import bits_of

MOST_ROWS = 16
WARPS = 4
_LOG2_E = 1.4426950408889634
_NAMES = {torch.float16: "Half", torch.bfloat16: "BFloat16"}


@dataclass(frozen=True)
class Config:
    """How `attend` runs.

    Attributes:
        sixteens: tokens of a warp's step, in sixteens.
        blocks: of a multiprocessor, at a time.
        ahead: tiles by which dense rows are fetched into the second-level cache ahead of their use.
        unroll: steps of the loop, which then needs fewer copies and more registers.
    """

    sixteens: int
    blocks: int
    ahead: int
    unroll: int

    @property
    def block_tokens(self) -> int:
        return WARPS * 16 * self.sixteens


class Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((name, ctypes.c_void_p) for name in ("key_scale", "key_offset", "value_scale", "value_offset")),
        *((name, ctypes.c_void_p) for name in ("lengths", "block_table", "partial", "statistics")),
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
    """Heads of 64 or 128 channels, up to 16 query rows of a key-value head; keys and values of 8 bits with 16-bit scales
    of a token and head, or of 4 bits with these or in block floating point (bfloat16 queries)."""
    head_dim = query.shape[-1]
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    if (
        value is None
        or key_scale is None
        or value_scale is None
        or 0 in key.shape
        or query.dtype not in _NAMES
    ):
        return False
    if sinks is not None and sinks.dtype not in (*_NAMES, torch.float32):
        return False
    if head_dim not in (64, 128) or value_dim != head_dim or not 0 < rows <= MOST_ROWS:
        return False
    if key.dtype != value.dtype or key_scale.dtype != value_scale.dtype:
        return False
    if block_table is not None and key.shape[2] % 16:
        return False
    groups = key_scale.shape[-1]
    if key_scale.dtype == torch.uint8:
        if bits_of(key) != 4 or query.dtype != torch.bfloat16 or value_scale.shape[-1] != groups:
            return False
        if not 2 <= groups <= head_dim // 16:
            return False
    elif groups != 1 or value_scale.shape[-1] != 1 or key_scale.dtype not in _NAMES:
        return False
    if any(stride % 4 for stride in query.stride()[:3]) or query.stride(3) != 1 or query.data_ptr() % 8:
        return False
    for stored, scales, offset in ((key, key_scale, key_offset), (value, value_scale, value_offset)):
        if stored.stride(-1) != 1 or any(s % 16 for s in stored.stride()[:3]) or stored.data_ptr() % 16:
            return False
        if scales.stride(-1) != 1 and scales.shape[-1] > 1:
            return False
        if stored.shape[2] * stored.stride(2) >= 1 << 31:
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
    key_scale: Tensor,
    key_offset: Tensor | None,
    value_scale: Tensor,
    value_offset: Tensor | None,
    block_table: Tensor | None,
    window: int,
    softcap: float,
    config: Config,
) -> dict[str, int | str]:
    """The macros of attend.cu for a call."""
    exponents = key_scale.dtype == torch.uint8
    scales = [key_scale, value_scale, *(x for x in (key_offset, value_offset) if x is not None)]
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
        "SCALE_TYPE": "Half" if exponents else _NAMES[key_scale.dtype],
        "GROUPS": key_scale.shape[-1] if exponents else 0,
        "KEY_OFFSET": int(key_offset is not None),
        "VALUE_OFFSET": int(value_offset is not None),
        "KEY_STRIDE": key.stride(2),
        "VALUE_STRIDE": value.stride(2),
        "KEY_SCALE_STRIDE": key_scale.stride(2),
        "VALUE_SCALE_STRIDE": value_scale.stride(2),
        "SCALE_PAIRS": int(pairs),
        "PAGE": 0 if block_table is None else key.shape[2],
        "WINDOW": int(window > 0),
        "CAPPED": int(softcap > 0),
        "SUB": config.sixteens,
        "BLOCKS": config.blocks,
        "FETCH_AHEAD": config.ahead,
        "UNROLL": config.unroll,
    }


def arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_scale: Tensor,
    key_offset: Tensor | None,
    value_scale: Tensor,
    value_offset: Tensor | None,
    lengths: Tensor,
    block_table: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    partial: Tensor,
    statistics: Tensor,
) -> Arguments:
    """The kernel's struct; the tensors must outlive it."""
    pointers = (query, key, value, key_scale, key_offset, value_scale, value_offset, lengths, block_table)
    return Arguments(
        *(None if x is None else x.data_ptr() for x in (*pointers, partial, statistics)),
        *query.stride()[:3],
        *key.stride()[:2],
        *value.stride()[:2],
        *key_scale.stride()[:2],
        *value_scale.stride()[:2],
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


def shared_bytes(rows: int, head_dim: int) -> int:
    """Shared memory of a block: every warp's result."""
    return WARPS * -(-rows // 8) * 8 * (12 + 4 * head_dim)


def configuration(rows: int, bits: int) -> Config:
    """From measurements on an H200."""
    if rows > 8:  # twice the sums
        return Config(1, 2, 0, 1)
    return Config(2, 2, 0, 1) if bits == 4 else Config(1, 3, 0, 1)


def decode_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See `tensormill.ops.decode_attention`."""
    query, key = arguments[0], arguments[1]
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    return run(configuration(rows, bits_of(key)), *arguments)


def run(
    config: Config,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_scale: Tensor,
    key_offset: Tensor | None,
    value_scale: Tensor,
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
    kv_heads = key.shape[1]
    rows = heads // kv_heads * queries
    output = torch.empty(batch, heads, queries, value_dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    if output.numel() == 0:
        return output, lse
    if query.stride(-1) != 1:
        query = query.contiguous()
    stored = (key, value, key_scale, key_offset, value_scale, value_offset)
    device = query.device.index
    blocks = multiprocessors(device) * config.blocks
    partial, statistics = workspace(blocks + batch * kv_heads, rows, value_dim, query.device)
    chosen = defines(query, *stored, block_table, window, softcap, config)
    kernel = module(**chosen).kernel("attend", device)
    packed = arguments(query, *stored, lengths, block_table, scale, window, softcap, partial, statistics)
    kernel.launch(blocks, WARPS * 32, shared_bytes(rows, head_dim), packed)
    merge(
        partial,
        statistics,
        lengths,
        sinks,
        output,
        lse,
        kv_heads,
        span(query, window),
        blocks,
        config.block_tokens,
    )
    return output, lse


class MergeArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("partial", "statistics", "lengths", "sinks", "output", "lse")),
        *((name, ctypes.c_int32) for name in ("batch", "kv_heads", "span", "programs")),
    )


@functools.cache
def merge_module(
    group: int, queries: int, value_dim: int, tile: int, output: torch.dtype, sinks: torch.dtype | None
) -> Module:
    """The kernel that merges partial results."""
    chosen: dict[str, int | str] = {
        "GROUP": group,
        "QUERIES": queries,
        "VALUE_DIM": value_dim,
        "TILE_TOKENS": tile,
    }
    chosen |= {"OUTPUT_TYPE": _NAMES[output], "SINKS": 0, "SINK_TYPE": "Half"}
    if sinks is not None:
        chosen |= {"SINKS": 1} if sinks == torch.float32 else {"SINKS": 2, "SINK_TYPE": _NAMES[sinks]}
    return Module(Path(__file__).with_name("merge.cu"), chosen, [Path(__file__).with_name("work.cuh")])


def merge(
    partial: Tensor,
    statistics: Tensor,
    lengths: Tensor,
    sinks: Tensor | None,
    output: Tensor,
    lse: Tensor,
    kv_heads: int,
    span: int,
    programs: int,
    tile: int,
) -> None:
    """Launch `merge.cu`: writes output and lse from the partial results of `programs` programs; see triton.py."""
    batch, heads, queries, value_dim = output.shape
    kind = None if sinks is None else sinks.dtype
    module = merge_module(heads // kv_heads, queries, value_dim, tile, output.dtype, kind)
    pointers = (x if x is None else x.data_ptr() for x in (partial, statistics, lengths, sinks, output, lse))
    packed = MergeArguments(*pointers, batch, kv_heads, span, programs)
    device = output.device.index
    grid = (batch * heads * queries, -(-value_dim // 128), 1)
    overlap = torch.cuda.get_device_capability(device)[0] >= 9
    module.kernel("merge", device).launch(grid, 128, 128 * 4 * 4, packed, overlap=overlap)


def workspace(slots: int, rows: int, value_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for partial results: (partial, statistics), flat."""
    room = torch.empty(slots * rows * (value_dim + 2), dtype=torch.float32, device=device)
    return room[: slots * rows * value_dim], room[slots * rows * value_dim :]

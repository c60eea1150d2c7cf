"""Decode attention over a latent cache (MLA) in CUDA C++ for sm_90: launches `latent.cu` and `merge.cu`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from tensormill.cuda import HOPPER_HEADER, Module, multiprocessors, tensor_map
from tensormill.ops.decode_attention.cuda import sink_macros, span, workspace

ROWS = 64  # of a block
TILE = 64  # tokens
THREADS = 384
_BOX = (32, 64)
_LOG2_E = 1.4426950408889634
_NAMES = {torch.float16: "Half", torch.bfloat16: "BFloat16"}
_TensorMap = ctypes.c_uint64 * 16


class Arguments(ctypes.Structure):
    _fields_ = (
        ("keys", _TensorMap),
        *(
            (name, ctypes.c_void_p)
            for name in ("query", "lengths", "block_table", "partial", "statistics", "output", "lse")
        ),
        *((f"query_stride_{name}", ctypes.c_int64) for name in "bht"),
        *((name, ctypes.c_int32) for name in ("page_rows", "table_stride", "batch", "span", "window")),
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
    """One latent for all heads, of at most 576 channels, the first 512 or 256 of them values, in 16 bits; on sm_90."""
    if query.is_cuda and torch.cuda.get_device_capability(query.device)[0] != 9:
        return False  # wgmma exists there only
    if not scale > 0:
        return False  # the largest product is taken for the largest logit
    if value is not None or key_scale is not None or query.dtype not in _NAMES or 0 in key.shape:
        return False
    if sinks is not None and sinks.dtype not in (*_NAMES, torch.float32):
        return False
    head_dim, row = query.shape[-1], key.stride(2)
    if value_dim not in (256, 512) or head_dim < value_dim or head_dim % 64 or head_dim > 576:
        return False
    if key.shape[1] != 1 or key.stride(3) != 1 or row % 8 or key.data_ptr() % 16 or key.stride(0) % row:
        return False
    if any(stride % 8 for stride in query.stride()[:3]) or query.stride(3) != 1 or query.data_ptr() % 16:
        return False
    return block_table is None or key.shape[2] % _BOX[0] == 0


def rows_of(key: Tensor) -> Tensor:
    """The cache's tokens, one after another, as rows: (all, head_dim)."""
    step = key.stride(0) // key.stride(2)
    return key.as_strided(((key.shape[0] - 1) * step + key.shape[2], key.shape[3]), (key.stride(2), 1))


def defines(
    query: Tensor, key: Tensor, block_table: Tensor | None, value_dim: int, window: int, softcap: float
) -> dict[str, int | str]:
    """The macros of latent.cu for a call."""
    return {
        "HEAD_DIM": query.shape[-1],
        "VALUE_DIM": value_dim,
        "GROUP": query.shape[1],
        "QUERIES": query.shape[2],
        "QUERY_TYPE": _NAMES[query.dtype],
        "PAGE": 0 if block_table is None else key.shape[2],
        "WINDOW": int(window > 0),
        "CAPPED": int(softcap > 0),
    }


@functools.cache
def module(**defines: int | str) -> Module:
    """The kernel, with these macros."""
    headers = [HOPPER_HEADER, Path(__file__).with_name("work.cuh")]
    return Module(Path(__file__).with_name("latent.cu"), defines, headers)


def arguments(
    keys: bytes,
    query: Tensor,
    key: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    partial: Tensor,
    statistics: Tensor,
    output: Tensor | None,
    lse: Tensor,
) -> Arguments:
    """The kernel's struct; `keys` is the tensor map of `rows_of(key)`, output None where the merging kernel has to write
    all of it. The tensors must outlive it."""
    pointers = (query, lengths, block_table, partial, statistics, output, lse)
    return Arguments(
        _TensorMap.from_buffer_copy(keys),
        *(None if x is None else x.data_ptr() for x in pointers),
        *query.stride()[:3],
        key.stride(0) // key.stride(2),
        0 if block_table is None else block_table.stride(0),
        query.shape[0],
        span(query, window),
        window,
        scale / softcap if softcap else scale * _LOG2_E,
        softcap * _LOG2_E,
    )


def shared_bytes(head_dim: int) -> int:
    """Shared memory of a block: two tiles, P, Q, bases and sums, barriers."""
    return 3 * TILE * head_dim * 2 + TILE * 128 + 3 * ROWS * 4 + (2 * head_dim // 64 + 6) * 8


def cluster(rows: int) -> int:
    """Blocks with the same tiles that load them together."""
    return 1 if -(-rows // ROWS) % 2 else 2


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: None,
    key_scale: None,
    key_offset: None,
    value_scale: None,
    value_offset: None,
    lengths: Tensor,
    block_table: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    value_dim: int,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """See `tensormill.ops.decode_attention`."""
    batch, heads, queries, head_dim = query.shape
    rows = heads * queries
    output = torch.empty(batch, heads, queries, value_dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    if output.numel() == 0:
        return output, lse
    device = query.device.index
    row_blocks = -(-rows // ROWS)
    programs = max(1, multiprocessors(device) // row_blocks)
    partial, statistics = workspace(programs + batch, rows, value_dim, query.device)
    kernel = module(**defines(query, key, block_table, value_dim, window, softcap)).kernel("latent", device)
    keys = tensor_map(rows_of(key), _BOX)
    results = (partial, statistics, output if sinks is None else None, lse)
    packed = arguments(keys, query, key, lengths, block_table, scale, window, softcap, *results)
    grid, shared = programs * row_blocks, shared_bytes(head_dim)
    kernel.launch(grid, THREADS, shared, packed, overlap=True, cluster=cluster(rows))
    parts = MergeArguments.of(partial, statistics, lengths, sinks, output, lse, span(query, window), programs)
    groups = merge_groups(batch, programs)
    kernel = merge_module(queries, value_dim, output.dtype, sinks, groups).kernel("merge", device)
    kernel.launch(batch * rows, *merge_block(value_dim, groups), parts, overlap=True)
    return output, lse


class MergeArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("partial", "statistics", "lengths", "sinks", "output", "lse")),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "span", "programs")),
    )

    @classmethod
    def of(
        cls,
        partial: Tensor,
        statistics: Tensor,
        lengths: Tensor,
        sinks: Tensor | None,
        output: Tensor,
        lse: Tensor,
        span: int,
        programs: int,
    ) -> MergeArguments:
        """merge.cu's struct; the tensors must outlive it."""
        tensors = (partial, statistics, lengths, sinks, output, lse)
        pointers = (None if x is None else x.data_ptr() for x in tensors)
        return cls(*pointers, output.shape[0], output.shape[1], span, programs)


def merge_groups(batch: int, programs: int) -> int:
    """Threads of a block for the same channels: many where a sequence has many parts and there are few sequences."""
    return 8 if programs >= 16 * batch else 1


def merge_block(value_dim: int, groups: int) -> tuple[int, int]:
    """Threads and shared memory of a block of the merging kernel."""
    return value_dim // 4 * groups, groups * (value_dim * 4 + 8) if groups > 1 else 0


def merge_module(
    queries: int, value_dim: int, output: torch.dtype, sinks: Tensor | None, groups: int
) -> Module:
    """The kernel that merges partial results."""
    sizes = {"QUERIES": queries, "VALUE_DIM": value_dim, "TILE_TOKENS": TILE, "GROUPS": groups}
    return _merge_module(**sizes, OUTPUT_TYPE=_NAMES[output], **sink_macros(sinks))


@functools.cache
def _merge_module(**defines: int | str) -> Module:
    return Module(Path(__file__).with_name("merge.cu"), defines, [Path(__file__).with_name("work.cuh")])

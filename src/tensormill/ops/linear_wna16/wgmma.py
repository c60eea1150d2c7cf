"""Runs `wgmma.cu`: many tokens, on sm_90. Weights are in the tiled layout (`tiles.py`)."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tensormill.cuda import HOPPER_HEADER, Kernel, Module, multiprocessors, tensor_map
from tensormill.ops.tiles import tiled_groups

_FOLDER = Path(__file__).parent
_HEADERS = (
    HOPPER_HEADER,
    _FOLDER / "dequantize.cuh",
    _FOLDER.parent / "linear_wna8" / "dequantize_bytes.cuh",
)
_X_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.int8: 2}
_Y_TYPES = {torch.float16: 0, torch.bfloat16: 1}
_THREADS = 384
_SKEW = 2  # stages by which one warpgroup is ahead of the other
# Of H200: what a multiprocessor reads from the second-level cache in a cycle; what a tile costs beside its products.
_L2_BYTES = 32.0
_TILE_CYCLES = 3000.0
_SPLIT_CYCLES = 1500.0
_MOST_SHARED = 232448  # bytes of shared memory that a block of sm_90 can have


@dataclass(frozen=True)
class Tile:
    """What a block computes, and with whom.

    Attributes:
        rows: of the weight, 128 or 256.
        tokens: 64, 128 or 256, with at most 128 * 256 elements.
        cluster: blocks with neighbouring rows that share their tokens' copies.
        split: blocks that share a tile along K; they run once, so there should be no more than fit the GPU.
    """

    rows: int
    tokens: int
    cluster: int = 1
    split: int = 1

    def count(self, tokens: int, rows: int) -> int:
        """Tiles of a product, those of a cluster counted as one."""
        return -(-rows // (self.rows * self.cluster)) * -(-tokens // self.tokens)


@dataclass(frozen=True)
class Format:
    """What a kernel is compiled for.

    Attributes:
        bits: of a weight.
        x: dtype of the activations: float16, bfloat16 or int8.
        y: dtype of the result and bias: x's, or for int8 x, float16 or bfloat16.
        scale_sets: scales of a row in a stage of 128 bytes of x: 0 for one per row, else 1 or 2.
        zero_points: whether there are any.
        float_scale: whether scales are float32, which they can be for int8 x; otherwise they have y's dtype.
    """

    bits: int
    x: torch.dtype
    y: torch.dtype
    scale_sets: int
    zero_points: bool
    float_scale: bool = False


# `Arguments` of wgmma.cu, after the two tensor maps: addresses; sizes, and the bytes that the struct's alignment adds.
_ADDRESSES = struct.Struct("6Q")
_SIZES = struct.Struct("7i52x")


def shared_bytes(form: Format, tile: Tile) -> tuple[int, int]:
    """(stages of the ring, bytes of shared memory): as many stages as fit, as wgmma.cu lays them out."""
    integer = form.x == torch.int8
    blocks = tile.rows // 64
    sets = blocks * ((256 if form.float_scale else 128) + 64 * (form.zero_points and not integer))
    stage = tile.tokens * 128 + blocks * 512 * form.bits * (2 if integer else 1) + form.scale_sets * sets
    stage = -(-stage // 1024) * 1024
    slice_tokens = tile.tokens // tile.split
    rest = blocks * slice_tokens * 128 + (tile.split - 1) * (blocks // 2) * (slice_tokens // 2) * 1024 + 8
    stages = min((_MOST_SHARED - rest) // (stage + 16), 8)
    return stages, stages * (stage + 16) + rest


@functools.cache
def module(form: Format, tile: Tile) -> Module:
    """The kernel `linear_wgmma` for that."""
    stages, shared = shared_bytes(form, tile)
    defines = {
        "WEIGHT_BITS": form.bits,
        "X_TYPE": _X_TYPES[form.x],
        "Y_TYPE": _Y_TYPES[form.y],
        "TILE_ROWS": tile.rows,
        "TILE_TOKENS": tile.tokens,
        "RING_STAGES": stages,
        "CLUSTER_BLOCKS": tile.cluster,
        "K_SPLITS": tile.split,
        "STAGE_GROUPS": form.scale_sets,
        "HAS_ZERO": int(form.zero_points),
        "SCALE_TYPE": 2 if form.float_scale else _Y_TYPES[form.y],
        "RING_SKEW": min(_SKEW, stages - 2),
        "SHARED_BYTES": shared,
    }
    return Module(_FOLDER / "wgmma.cu", defines, _HEADERS)


def scale_sets(x: torch.dtype, columns: int, group_size: int) -> int:
    """`Format.scale_sets` of weights with that group size."""
    if group_size == -1 or group_size >= columns:
        return 0
    return 2 if group_size % 64 else 1


def can_multiply(x: torch.dtype, columns: int, group_size: int, zero_points: bool) -> bool:
    """Whether the kernel takes such weights; integers are summed over 128 columns before a scale is applied."""
    grouped = scale_sets(x, columns, group_size) > 0
    return x != torch.int8 or not grouped or (group_size % 128 == 0 and not zero_points)


def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    tile: Tile | None = None,
    x_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    overlap: bool = True,
) -> Tensor:
    """`x W^T + bias` for a tiled weight.

    Args:
        x: (M, K) float16 or bfloat16; or int8 codes with `x_scale`.
        weight, scale, zero_point: of `tile_weight`, kind "f16" or, for int8 x, "i8"; N is their first dimension. The
            scale is rounded to x's dtype, unless that is int8.
        bias: (N,) of the result's dtype, or None.
        bits, group_size: of the weight.
        tile: None chooses.
        x_scale: (M,) float32.
        dtype: of the result for int8 x, float16 or bfloat16; otherwise it is x's.
        overlap: the weight was written long ago, so that it may be read before earlier kernels have ended.

    Returns:
        (M, N).
    """
    if x.dtype != torch.int8:
        dtype = x.dtype
    assert dtype is not None
    if scale.dtype != dtype and (x.dtype != torch.int8 or scale.dtype != torch.float32):
        scale = scale.to(dtype if x.dtype != torch.int8 else torch.float32)
    (tokens, columns), rows = x.shape, weight.shape[0]
    zeros, float_scale = zero_point is not None, scale.dtype == torch.float32
    made = _plan(
        x.device.index, tokens, rows, columns, bits, group_size, x.dtype, dtype, zeros, float_scale, tile
    )
    multiple = 16 // x.element_size()  # copies want rows at multiples of 16 bytes
    if x.stride(1) != 1 or x.stride(0) % multiple or x.data_ptr() % 16:
        padded = x.new_empty(tokens, -(-columns // multiple) * multiple)
        padded[:, :columns] = x
        x = padded[:, :columns]
    width = -(-rows // 8) * 8
    y = torch.empty((tokens, width), dtype=dtype, device=x.device)
    result = y if width == rows else y[:, :rows]
    summed = x.sum(1, dtype=torch.int32) if zero_point is not None and x_scale is not None else None
    addresses = _ADDRESSES.pack(
        weight.data_ptr(),
        scale.data_ptr(),
        0 if zero_point is None else zero_point.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if x_scale is None else x_scale.data_ptr(),
        0 if summed is None else summed.data_ptr(),
    )
    maps = _map(x, made.x_box) + _map(result, made.y_box)
    made.kernel.launch(
        made.grid,
        _THREADS,
        made.shared,
        maps + addresses + made.sizes,
        cluster=made.cluster,
        overlap=overlap,
    )
    return result.contiguous()


@dataclass(frozen=True)
class _Plan:
    """A launch, less what changes from call to call."""

    kernel: Kernel
    grid: int
    cluster: int
    shared: int
    x_box: tuple[int, int]
    y_box: tuple[int, int]
    sizes: bytes


@functools.lru_cache(maxsize=4096)
def _plan(
    device: int,
    tokens: int,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    x: torch.dtype,
    y: torch.dtype,
    zero_points: bool,
    float_scale: bool,
    tile: Tile | None,
) -> _Plan:
    form = Format(bits, x, y, scale_sets(x, columns, group_size), zero_points, float_scale)
    if tile is None:
        tile = choose(form, tokens, rows, columns, multiprocessors(device))
    sizes = _SIZES.pack(
        tokens,
        rows,
        -(-rows // 64),
        columns,
        tiled_groups(columns, group_size),
        group_size,
        max(1, 1024 // tile.tokens),
    )
    cluster = tile.cluster * tile.split
    return _Plan(
        kernel=module(form, tile).kernel("linear_wgmma", device),
        grid=_clusters(tile, tokens, rows, multiprocessors(device)) * cluster,
        cluster=cluster,
        shared=shared_bytes(form, tile)[1],
        x_box=(tile.tokens // tile.cluster, 128 // x.itemsize),
        y_box=(tile.tokens // tile.split, 64),
        sizes=sizes,
    )


_MAPS: dict[tuple[object, ...], bytes] = {}


def _map(tensor: Tensor, box: tuple[int, int]) -> bytes:
    """`tensor_map`, which takes longer than a launch, of a tensor that is often at the same place."""
    key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(0), box)
    found = _MAPS.get(key)
    if found is None:
        if len(_MAPS) >= 4096:
            _MAPS.clear()
        found = _MAPS[key] = tensor_map(tensor, box)
    return found


# Rows, tokens, cluster, split.
_TILES = tuple(
    Tile(*sizes)
    for sizes in (
        (256, 128, 1, 1),
        (256, 128, 2, 1),
        (128, 256, 2, 1),
        (128, 128, 2, 1),
        (128, 128, 2, 2),
        (128, 128, 2, 4),
        (256, 64, 1, 1),
        (256, 64, 1, 2),
        (256, 64, 1, 4),
    )
)


@functools.lru_cache(maxsize=4096)
def choose(form: Format, tokens: int, rows: int, columns: int, multiprocessors: int) -> Tile:
    """The tile that should be fastest: a model of a block's cycles, times the tiles that each must do."""
    stages = -(-columns // _stage_columns(form))  # every split needs one
    tiles = [t for t in _tiles(form) if t.cluster * t.split <= multiprocessors and t.split <= stages]
    return min(tiles, key=lambda tile: _cycles(tile, form, tokens, rows, columns, multiprocessors))


def _tiles(form: Format) -> list[Tile]:
    """Tiles that a kernel exists for."""
    if form.x == torch.int8 and form.scale_sets > 0:
        return [tile for tile in _TILES if tile.rows == 128 and tile.tokens <= 128 and tile.split == 1]
    return [tile for tile in _TILES if shared_bytes(form, tile)[0] >= 3]


def _cycles(tile: Tile, form: Format, tokens: int, rows: int, columns: int, multiprocessors: int) -> float:
    """Clock cycles of the product."""
    stage_columns = _stage_columns(form)
    products = tile.rows * tile.tokens / 32  # of a stage: four products of 64 x 256 take 512
    copies = (tile.tokens * 128 / tile.cluster + tile.rows * stage_columns * form.bits / 8) / _L2_BYTES
    stages = -(-columns // stage_columns) / tile.split
    tail = _TILE_CYCLES + (tile.split > 1) * _SPLIT_CYCLES
    together = multiprocessors // (tile.cluster * tile.split)
    turns, rest = divmod(tile.count(tokens, rows), together)
    last = 0.0 if rest == 0 else 0.5 if _halves(tile, rest, together) else 1.0
    return (turns + last) * (stages * max(products, copies) + tail)


def _stage_columns(form: Format) -> int:
    """Columns in a stage: 128 bytes of x."""
    return 128 // form.x.itemsize


def _halves(tile: Tile, rest: int, clusters: int) -> bool:
    """Whether the tiles of the last turn are cut in halves, as wgmma.cu does it."""
    return tile.rows == 256 and tile.split == 1 and 2 * rest <= clusters


def _clusters(tile: Tile, tokens: int, rows: int, multiprocessors: int) -> int:
    """Clusters to launch: for all tiles at once, or as many as fit the GPU and take one tile after another."""
    count, fitting = tile.count(tokens, rows), multiprocessors // (tile.cluster * tile.split)
    if tile.split > 1:
        return count
    return min(fitting, 2 * count if _halves(tile, count, fitting) else count)

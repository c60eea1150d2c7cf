"""Runs `wgmma.cu`: many tokens, on sm_90. Weights are in the tiled layout (`tiles.py`)."""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tensormill.cuda import HOPPER_HEADER, Kernel, Module, StreamMemory, multiprocessors, tensor_map
from tensormill.ops.tiles import tiled_groups

_FOLDER = Path(__file__).parent
_HEADERS = (
    HOPPER_HEADER,
    _FOLDER / "dequantize.cuh",
    _FOLDER.parent / "linear_wna8" / "dequantize_bytes.cuh",
)
_X_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.int8: 2, torch.float8_e4m3fn: 3}
_Y_TYPES = {torch.float16: 0, torch.bfloat16: 1}
_THREADS = 384
_MOST_SHARED = 227 << 10  # bytes of shared memory that a block of sm_90 can have
# Partial sums; all bits set is `EMPTY`.
workspace = StreamMemory(-1, least=1 << 20)


@dataclass(frozen=True)
class Tile:
    """What a block computes, and with how many others.

    Attributes:
        rows: of the weight, 128 or 256.
        tokens: 32, 64, 128 or 256, with at most 256 * 128 elements in a tile.
        split: blocks that share a tile along K, 1, 2, 4 or 8, with at least 16 tokens for each; those of all tiles must
            run at once.
    """

    rows: int
    tokens: int
    split: int = 1

    def count(self, tokens: int, rows: int) -> int:
        """Tiles of a product."""
        return -(-rows // self.rows) * -(-tokens // self.tokens)


@dataclass(frozen=True)
class Format:
    """What a kernel is compiled for.

    Attributes:
        bits: of a weight.
        x: dtype of the activations: float16, bfloat16, int8 or float8_e4m3fn.
        y: dtype of the result and bias: x's, or for 8-bit x, float16 or bfloat16.
        scale_sets: scales of a row in a stage of 128 bytes of x: 0 for one per row, else 1 or 2.
        zero_points: whether there are any.
        float_scale: whether scales are float32, which they can be for 8-bit x; otherwise they have y's dtype.
        x_groups: whether 8-bit x has a scale per token and group of channels, not one per token.
    """

    bits: int
    x: torch.dtype
    y: torch.dtype
    scale_sets: int
    zero_points: bool
    float_scale: bool = False
    x_groups: bool = False

    @property
    def bytes(self) -> bool:
        """Whether activations have 8 bits."""
        return self.x.itemsize == 1

    @property
    def promoted(self) -> bool:
        """Whether sums over 128 columns are added in float32: for scales of groups, or to keep e4m3's bits."""
        return self.x == torch.float8_e4m3fn or self.x_groups or (self.bytes and self.scale_sets > 0)


# `Arguments` of wgmma.cu, after the two tensor maps: addresses; sizes, and the bytes that the struct's alignment adds.
_ADDRESSES = struct.Struct("7Q")
_SIZES = struct.Struct("10i32x")


def shared_bytes(form: Format, tile: Tile) -> tuple[int, int]:
    """(stages of the ring, bytes of shared memory): as many stages as fit, as wgmma.cu lays them out."""
    blocks = tile.rows // 64
    sets = blocks * ((256 if form.float_scale else 128) + 64 * (form.zero_points and not form.bytes))
    stage = tile.tokens * 128 + blocks * 512 * form.bits * (2 if form.bytes else 1) + form.scale_sets * sets
    stage += 4 * tile.tokens * form.x_groups
    stage = -(-stage // 1024) * 1024
    y = blocks * tile.tokens // tile.split * 128
    stages = min((_MOST_SHARED - y) // (stage + 16), 8)
    return stages, stages * (stage + 16) + y


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
        "K_SPLITS": tile.split,
        "STAGE_GROUPS": form.scale_sets,
        "HAS_ZERO": int(form.zero_points),
        "SCALE_TYPE": 2 if form.float_scale else _Y_TYPES[form.y],
        "X_GROUPED": int(form.x_groups),
        "RING_SKEW": min(2, stages // 3),
        "SHARED_BYTES": shared,
    }
    return Module(_FOLDER / "wgmma.cu", defines, _HEADERS)


def scale_sets(x: torch.dtype, columns: int, group_size: int) -> int:
    """`Format.scale_sets` of weights with that group size."""
    if group_size == -1 or group_size >= columns:
        return 0
    return 2 if group_size % 64 else 1


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
    x_group_size: int = -1,
    dtype: torch.dtype | None = None,
    overlap: bool = True,
) -> Tensor:
    """`x W^T + bias` for a tiled weight.

    Args:
        x: (M, K) float16 or bfloat16; or int8 or float8_e4m3fn codes with `x_scale`.
        weight, scale, zero_point: of `tile_weight`, kind "f16" or, for 8-bit x, "i8"; N is their first dimension. The
            scale is rounded to x's dtype, unless that has 8 bits.
        bias: (N,) of the result's dtype, or None.
        bits, group_size: of the weight.
        tile: None chooses.
        x_scale: (M,) float32, or (M, ceil(K / x_group_size)), contiguous.
        x_group_size: columns of 8-bit x that share a scale, a multiple of 128, where weights have no zero points and
            groups of such sizes too, or none; -1 for all.
        dtype: of the result for 8-bit x, float16 or bfloat16; otherwise it is x's.
        overlap: the weight was written long ago, so that it may be read before earlier kernels have ended.

    Returns:
        (M, N).
    """
    narrow = x.dtype.itemsize == 1
    if not narrow:
        dtype = x.dtype
    assert dtype is not None
    if scale.dtype != dtype and not (narrow and scale.dtype == torch.float32):
        scale = scale.to(torch.float32 if narrow else dtype)
    (tokens, columns), rows = x.shape, weight.shape[0]
    zeros, float_scale = zero_point is not None, scale.dtype == torch.float32
    plans = _plans(
        x.device.index,
        tokens,
        rows,
        columns,
        bits,
        group_size,
        x_group_size,
        x.dtype,
        dtype,
        zeros,
        float_scale,
        tile,
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
    for made in plans:
        first, last = made.rows
        addresses = _ADDRESSES.pack(
            weight[first:].data_ptr(),
            scale[first:].data_ptr(),
            0 if zero_point is None else zero_point[first:].data_ptr(),
            0 if bias is None else bias[first:].data_ptr(),
            0 if x_scale is None else x_scale.data_ptr(),
            0 if summed is None else summed.data_ptr(),
            workspace(x.device, made.workspace).data_ptr() if made.workspace else 0,
        )
        made.kernel.launch(
            made.grid,
            _THREADS,
            made.shared,
            _map(x, made.x_box) + _map(result[:, first:last], made.y_box) + addresses + made.sizes,
            overlap=overlap,
            cooperative=made.cooperative,
        )
    return result.contiguous()


@dataclass(frozen=True)
class _Plan:
    """A launch, less what changes from call to call."""

    rows: tuple[int, int]  # the first of the weight, one past the last
    kernel: Kernel
    grid: int
    cooperative: bool  # blocks wait for each other
    workspace: int  # elements
    shared: int
    x_box: tuple[int, int]
    y_box: tuple[int, int]
    sizes: bytes


@functools.lru_cache(maxsize=4096)
def _plans(
    device: int,
    tokens: int,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    x_group_size: int,
    x: torch.dtype,
    y: torch.dtype,
    zero_points: bool,
    float_scale: bool,
    tile: Tile | None,
) -> tuple[_Plan, ...]:
    sets, x_groups = scale_sets(x, columns, group_size), x_group_size != -1
    form = Format(bits, x, y, sets, zero_points, float_scale, x_groups)
    segment = math.gcd(max(x_group_size, 0), group_size if sets else 0) if form.promoted else 0
    assert segment % 128 == 0, f"given groups of {group_size} and {x_group_size} columns"
    there = multiprocessors(device)
    chosen = ((rows, tile),) if tile is not None else parts(form, tokens, rows, columns, there)
    plans, first = [], 0
    for rows, tile in chosen:
        count = tile.count(tokens, rows)
        assert tile.split == 1 or count * tile.split <= there, f"{tile} waits for blocks that can't run"
        sizes = _SIZES.pack(
            tokens,
            rows,
            -(-rows // 64),
            columns,
            tiled_groups(columns, group_size),
            group_size,
            max(1, 1024 // tile.tokens),
            -(-columns // x_group_size) if x_groups else 1,
            x_group_size,
            segment,
        )
        plans.append(
            _Plan(
                rows=(first, first + rows),
                kernel=module(form, tile).kernel("linear_wgmma", device),
                grid=count * tile.split if tile.split > 1 else min(there, count),
                cooperative=tile.split > 1,
                workspace=count * (tile.split - 1) * tile.rows * tile.tokens,
                shared=shared_bytes(form, tile)[1],
                x_box=(tile.tokens, 128 // x.itemsize),
                y_box=(tile.tokens // tile.split, 64),
                sizes=sizes,
            )
        )
        first += rows
    return tuple(plans)


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


_TILES = tuple(
    Tile(rows, tokens, split)
    for rows, tokens in ((128, 32), (128, 64), (128, 128), (128, 256), (256, 32), (256, 64), (256, 128))
    for split in (1, 2, 4, 8)
    if tokens // split >= 16
)
# Fitted to measurements on an H100: cycles that a stage of 128 rows takes beside products, of 16 and 8 bits, and by how
# much longer one of 256 rows does; those of a tile; those of a split, and of 4096 sums that it exchanges. What they choose
# takes 1 % longer than the fastest tile, on average, and 20 % at most.
_STAGE_CYCLES, _BYTE_STAGE_CYCLES, _TALL_STAGE = 470, 300, 1.43
_TILE_CYCLES = 1200
_SPLIT_CYCLES, _EXCHANGE_CYCLES = 5700, 1200
# The same where the sums of stages are scaled, and what a token's scales take; 15 % longer at most.
_SCALED_STAGE_CYCLES, _TALL_SCALED_STAGE, _TOKEN_CYCLES = 240, 1.4, 1.6
_SCALED_SPLIT_CYCLES, _SCALED_EXCHANGE_CYCLES = 3000, 2000
_LAUNCH_CYCLES, _WORTHWHILE = 4000, 0.95  # of a second kernel, and what share of the time of one it may take


@functools.lru_cache(maxsize=4096)
def parts(
    form: Format, tokens: int, rows: int, columns: int, multiprocessors: int
) -> tuple[tuple[int, Tile], ...]:
    """Numbers of rows and their tiles: one for all, or where its last turn would leave most of the GPU idle, two."""
    whole = choose(form, tokens, rows, columns, multiprocessors)
    best: tuple[tuple[int, Tile], ...] = ((rows, whole),)
    least = _WORTHWHILE * _cycles(whole, form, tokens, rows, columns, multiprocessors)
    for tile in _TILES:
        across, count = -(-tokens // tile.tokens), tile.count(tokens, rows)
        # As many rows as all but the last turn can do; a part's rows begin with a block of 64.
        first = (count - 1) // multiprocessors * multiprocessors // across * tile.rows
        if tile.split > 1 or not 0 < first < rows or rows % 64 or not fits(form, tile):
            continue
        rest = choose(form, tokens, rows - first, columns, multiprocessors)
        cycles = _LAUNCH_CYCLES + _cycles(tile, form, tokens, first, columns, multiprocessors)
        cycles += _cycles(rest, form, tokens, rows - first, columns, multiprocessors)
        if cycles < least:
            best, least = ((first, tile), (rows - first, rest)), cycles
    return best


@functools.lru_cache(maxsize=4096)
def choose(form: Format, tokens: int, rows: int, columns: int, multiprocessors: int) -> Tile:
    """The tile that should be fastest: a model of a block's cycles, times the tiles that each must do."""
    stages = -(-columns // _stage_columns(form))  # every split needs one
    tiles = [
        tile
        for tile in _TILES
        if (tile.split == 1 or tile.count(tokens, rows) * tile.split <= multiprocessors)
        and tile.split <= stages
        and fits(form, tile)
    ]
    return min(tiles, key=lambda tile: _cycles(tile, form, tokens, rows, columns, multiprocessors))


def fits(form: Format, tile: Tile) -> bool:
    """Whether a block's sums fit its registers, and its ring of stages shared memory."""
    few = tile.rows * tile.tokens <= 128 * 128
    return shared_bytes(form, tile)[0] >= 3 and (few or not form.promoted)


def _cycles(tile: Tile, form: Format, tokens: int, rows: int, columns: int, multiprocessors: int) -> float:
    """Clock cycles of the product."""
    products = tile.rows * tile.tokens / 32  # of a stage: four products of 64 x 256 take 512
    tall = tile.rows == 256
    if form.promoted:  # a warpgroup's products don't run while its sums are scaled
        stage = products + _SCALED_STAGE_CYCLES * (_TALL_SCALED_STAGE if tall else 1)
        stage += _TOKEN_CYCLES * tile.tokens * form.x_groups
        split, exchange = _SCALED_SPLIT_CYCLES, _SCALED_EXCHANGE_CYCLES
    else:
        beside = _BYTE_STAGE_CYCLES if form.bytes else _STAGE_CYCLES
        stage = math.hypot(products, beside * (_TALL_STAGE if tall else 1))
        split, exchange = _SPLIT_CYCLES, _EXCHANGE_CYCLES
    stages = -(-columns // _stage_columns(form)) / tile.split
    turns = -(-tile.count(tokens, rows) * tile.split // multiprocessors)
    cycles = turns * (stages * stage + _TILE_CYCLES)
    if tile.split > 1:
        cycles += split + exchange * tile.rows * tile.tokens / 4096
    return cycles


def _stage_columns(form: Format) -> int:
    """Columns in a stage: 128 bytes of x."""
    return 128 // form.x.itemsize

"""The CUDA kernels of Hopper GPUs: `stream.cu` for few tokens, `skinny.cu` for dozens, `gemm.cu` for many."""

from __future__ import annotations

import ctypes
import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensormill.cuda import DEVICE_HEADER, Module, cuda_missing, multiprocessors, tensor_map
from tensormill.ops.bit_planes import affine_product

_HEADERS = tuple(DEVICE_HEADER.with_name(name) for name in ("hopper.cuh", "bits.cuh"))
_SCALES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_OUTPUTS = {torch.int32: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_MOST_SHARED = 227 << 10  # bytes of shared memory of a block
_MOST_REGISTERS = 200  # of a thread, for sums and weights in `stream.cu`


@dataclass(frozen=True)
class GemmConfig:
    """Of `gemm.cu`: consumers of 64 tokens each, rows of a tile, planes of a block, buffers, blocks at a time."""

    warpgroups: int
    rows: int
    w_planes: int = 1
    x_planes: int = 1
    stages: int = 4
    blocks: int = 1

    @property
    def stage_bytes(self) -> int:
        return 128 * (64 * self.x_planes * self.warpgroups + self.w_planes * self.rows)

    @property
    def shared(self) -> int:
        return self.stages * self.stage_bytes + 16 * self.rows + 16 * self.stages

    def fits(self, p: int, q: int) -> bool:
        """Whether it takes p-bit weights and q-bit activations, within registers and shared memory."""
        sums = (self.w_planes + self.x_planes - 1) * self.rows // 2
        whole = p % self.w_planes == 0 and q % self.x_planes == 0
        return (
            whole and sums <= 128 // self.blocks and self.blocks * (self.shared + 1024) <= _MOST_SHARED + 1024
        )


@dataclass(frozen=True)
class StreamConfig:
    """Of `stream.cu`: tiles of 16 rows and tokens of a block, its warps, steps along K whose loads are issued at once."""

    row_tiles: int
    tokens: int
    warps: int = 8
    unroll: int = 2

    def fits(self, p: int, q: int) -> bool:
        """Whether it takes p-bit weights and q-bit activations within registers."""
        stacked = self.tokens < 8
        tiles = -(-self.tokens * q // 8) if stacked else self.tokens // 8
        sums = 4 * self.row_tiles * tiles * (p if stacked else p + q - 1)
        return sums + 8 * self.row_tiles * p <= _MOST_REGISTERS


@dataclass(frozen=True)
class SkinnyConfig:
    """Of `skinny.cu`: consumers of 64 rows each, tokens of a block, planes of weights in a stage, buffers."""

    warpgroups: int
    tokens: int
    w_planes: int = 1
    stages: int = 6

    def columns(self, q: int) -> int:
        return max(16, 1 << (self.tokens * q - 1).bit_length())

    def shared(self, q: int) -> int:
        return self.stages * (128 * (64 * self.w_planes * self.warpgroups + self.columns(q)) + 16)

    def fits(self, p: int, q: int) -> bool:
        """Whether it takes p-bit weights and q-bit activations, within registers and shared memory."""
        columns = self.columns(q)
        registers = self.w_planes * columns // 2
        return (
            p % self.w_planes == 0 and columns <= 256 and registers <= 128 and self.shared(q) <= _MOST_SHARED
        )


Config = GemmConfig | SkinnyConfig | StreamConfig
KINDS: dict[str, type[Config]] = {"gemm": GemmConfig, "skinny": SkinnyConfig, "stream": StreamConfig}


@dataclass(frozen=True)
class GroupedConfig:
    """Of `stream_grouped.cu`: tiles of 16 rows and tokens of a block, its warps, groups whose loads are issued at once."""

    row_tiles: int
    tokens: int
    warps: int = 8
    unroll: int = 2

    def fits(self, p: int, q: int, group_size: int) -> bool:
        """Whether it takes p-bit weights and q-bit activations in such groups within registers."""
        sums = self.row_tiles * self.tokens // 2 * (p + q)
        return sums + 2 * self.row_tiles * p <= _MOST_REGISTERS // 2 and group_size <= 1024


class _Common(ctypes.Structure):
    _fields_ = [
        ("y", ctypes.c_void_p),
        ("x_sums", ctypes.c_void_p),
        ("weight_sums", ctypes.c_void_p),
        ("x_scale", ctypes.c_void_p),
        ("weight_scale", ctypes.c_void_p),
    ]


class _GemmArguments(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_ubyte * 128),
        ("weight", ctypes.c_ubyte * 128),
        ("common", _Common),
        ("tokens", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("words", ctypes.c_int),
        ("x_bits", ctypes.c_int),
        ("weight_bits", ctypes.c_int),
        ("affine", ctypes.c_int * 4),
        ("padding", ctypes.c_int * 13),  # to a multiple of 64 bytes
    ]


class _StreamArguments(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("common", _Common),
        ("tokens", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("words", ctypes.c_int),
        ("affine", ctypes.c_int * 4),
    ]


class _GroupedArguments(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("common", _Common),
        ("tokens", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("words", ctypes.c_int),
        ("length", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("affine", ctypes.c_int * 4),
    ]


def missing() -> str | None:
    """Why the kernels can't run here, or None."""
    if (reason := cuda_missing()) is not None:
        return reason
    if torch.cuda.get_device_capability() != (9, 0):
        return "the kernels need a GPU of compute capability 9.0 (Hopper)"
    return None


def supports(
    x: Tensor,
    weight: Tensor,
    x_sums: Tensor,
    weight_sums: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    length: int,
    x_format: str,
    weight_format: str,
    group_size: int,
    dtype: torch.dtype,
) -> bool:
    """Whether the kernels take the call, and are expected to be faster than int8 products."""
    if x.data_ptr() % 16 or weight.data_ptr() % 16:
        return False
    p, q, tokens = weight.shape[0], x.shape[0], x.shape[1]
    if x_sums.shape[1] > 1:
        return choose_grouped(tokens, p, q, group_size) is not None
    return choose(tokens, weight.shape[1], length, p, q) is not None


def bit_plane_linear(
    x: Tensor,
    weight: Tensor,
    x_sums: Tensor,
    weight_sums: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    length: int,
    x_format: str,
    weight_format: str,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `reference.bit_plane_linear`."""
    p, q, tokens = weight.shape[0], x.shape[0], x.shape[1]
    operands = x, weight, x_sums, weight_sums, x_scale, weight_scale
    if x_sums.shape[1] > 1:
        grouped = choose_grouped(tokens, p, q, group_size)
        assert grouped is not None
        return run_grouped(grouped, *operands, length, x_format, weight_format, group_size, dtype)
    config = choose(tokens, weight.shape[1], length, p, q)
    assert config is not None
    return run(config, *operands, length, x_format, weight_format, dtype)


def run(
    config: Config,
    x: Tensor,
    weight: Tensor,
    x_sums: Tensor,
    weight_sums: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    length: int,
    x_format: str,
    weight_format: str,
    dtype: torch.dtype,
) -> Tensor:
    """The product by a given kernel and configuration."""
    x, weight, x_sums, weight_sums = (t.contiguous() for t in (x, weight, x_sums, weight_sums))
    (q, tokens, words), (p, rows, _) = x.shape, weight.shape
    dtype = torch.int32 if x_scale is None else dtype
    y = torch.empty(tokens, rows, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    scales, results = _scales(x_scale, weight_scale, dtype)
    common = _Common(y.data_ptr(), x_sums.data_ptr(), weight_sums.data_ptr(), *(s.data_ptr() for s in scales))
    affine = (ctypes.c_int * 4)(*affine_product(x_format, weight_format, q, p))
    affine[3] *= length
    device = x.device.index
    if isinstance(config, SkinnyConfig):
        maps = _plane_map(x, config.tokens), _plane_map(weight, 64 * config.warpgroups)
        arguments = _GemmArguments(*maps, common, tokens, rows, words, q, p, affine)
        blocks = (-(-rows // (64 * config.warpgroups)), -(-tokens // config.tokens), 1)
        kernel = _skinny(config, q, results).kernel("bit_plane_skinny", device)
        threads = 128 * config.warpgroups + 32
        kernel.launch(blocks, threads, config.shared(q), arguments, overlap=True)
        return y
    if isinstance(config, GemmConfig):
        maps = _plane_map(x, 64 * config.warpgroups), _plane_map(weight, config.rows)
        arguments = _GemmArguments(*maps, common, tokens, rows, words, q, p, affine)
        tiles = -(-tokens // (64 * config.warpgroups)) * -(-rows // config.rows)
        grid = min(tiles, multiprocessors(device) * config.blocks)
        kernel = _gemm(config, results, rows % 4 == 0).kernel("bit_plane_gemm", device)
        threads = 128 * config.warpgroups + 32
        kernel.launch(grid, threads, config.shared, arguments, overlap=True)
        return y
    streamed = _StreamArguments(x.data_ptr(), weight.data_ptr(), common, tokens, rows, words, affine)
    blocks = (-(-rows // (16 * config.row_tiles)), -(-tokens // config.tokens), 1)
    kernel = _stream(config, p, q, results).kernel("bit_plane_stream", device)
    shared = 64 * config.row_tiles * config.tokens
    kernel.launch(blocks, 32 * config.warps, shared, streamed, overlap=True)
    return y


def run_grouped(
    config: GroupedConfig,
    x: Tensor,
    weight: Tensor,
    x_sums: Tensor,
    weight_sums: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    length: int,
    x_format: str,
    weight_format: str,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The product with scales for groups by a given configuration."""
    x, weight, x_sums, weight_sums = (t.contiguous() for t in (x, weight, x_sums, weight_sums))
    (q, tokens, words), (p, rows, _) = x.shape, weight.shape
    y = torch.empty(tokens, rows, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    scales, results = _scales(x_scale, weight_scale, dtype)
    common = _Common(y.data_ptr(), x_sums.data_ptr(), weight_sums.data_ptr(), *(s.data_ptr() for s in scales))
    affine = (ctypes.c_int * 4)(*affine_product(x_format, weight_format, q, p))
    sizes = tokens, rows, words, length, x_sums.shape[1]
    arguments = _GroupedArguments(x.data_ptr(), weight.data_ptr(), common, *sizes, affine)
    blocks = (-(-rows // (16 * config.row_tiles)), -(-tokens // config.tokens), 1)
    module = _grouped(config, p, q, group_size // 128, results)
    kernel = module.kernel("bit_plane_stream_grouped", x.device.index)
    shared = 64 * config.row_tiles * config.tokens * config.warps
    kernel.launch(blocks, 32 * config.warps, shared, arguments, overlap=True)
    return y


@dataclass(frozen=True)
class Results:
    """Types of the result and of the scales, as the kernels' macros have them."""

    output: int
    scale: int


def _scales(
    x_scale: Tensor | None, weight_scale: Tensor | None, dtype: torch.dtype
) -> tuple[list[Tensor], Results]:
    """Contiguous scales of one type, and the types of results and scales."""
    given = [s for s in (x_scale, weight_scale) if s is not None]
    if len({s.dtype for s in given}) > 1:
        given = [s.float() for s in given]
    scale = _SCALES[given[0].dtype] if given else 0
    return [s.contiguous() for s in given], Results(_OUTPUTS[dtype], scale)


_maps: dict[tuple[int, int, int, int], Any] = {}


def _plane_map(planes: Tensor, box: int) -> Any:
    """Tensor map of stacked planes; kept, for it describes memory only and outlives the tensor harmlessly."""
    stacked = planes.view(-1, planes.shape[-1])
    key = (planes.data_ptr(), *stacked.shape, box)
    found = _maps.get(key)
    if found is None:
        if len(_maps) > 4096:
            _maps.clear()
        found = (ctypes.c_ubyte * 128).from_buffer_copy(tensor_map(stacked, (box, 32)))
        _maps[key] = found
    return found


def gemm_defines(config: GemmConfig, results: Results, aligned: bool) -> dict[str, int]:
    return {
        "WARPGROUPS": config.warpgroups,
        "BLOCK_ROWS": config.rows,
        "W_PLANES": config.w_planes,
        "X_PLANES": config.x_planes,
        "STAGES": config.stages,
        "BLOCKS": config.blocks,
        "OUTPUT": results.output,
        "SCALE": results.scale,
        "ALIGNED": int(aligned),
        "SHARED_BYTES": config.shared,
    }


def skinny_defines(config: SkinnyConfig, q: int, results: Results) -> dict[str, int]:
    return {
        "WARPGROUPS": config.warpgroups,
        "TOKENS": config.tokens,
        "X_BITS": q,
        "W_PLANES": config.w_planes,
        "STAGES": config.stages,
        "OUTPUT": results.output,
        "SCALE": results.scale,
        "SHARED_BYTES": config.shared(q),
    }


def stream_defines(config: StreamConfig, p: int, q: int, results: Results) -> dict[str, int]:
    return {
        "ROW_TILES": config.row_tiles,
        "TOKENS": config.tokens,
        "W_BITS": p,
        "X_BITS": q,
        "WARPS": config.warps,
        "UNROLL": config.unroll,
        "OUTPUT": results.output,
        "SCALE": results.scale,
    }


@functools.cache
def _tuned() -> dict[tuple[int, int], dict[int, list[tuple[int, int, dict[str, Any]]]]]:
    """What `tune` found: by widths (p, q) and tokens, (rows, columns, configuration) for each layer."""
    found: dict[tuple[int, int], dict[int, list[tuple[int, int, dict[str, Any]]]]] = {}
    try:
        document = json.loads((Path(__file__).parent / "tuned" / "sm_90.json").read_text())
    except OSError:
        return found
    for key, entry in document["configurations"].items():
        tokens, p, q, rows, columns = map(int, re.findall(r"\d+", key))
        found.setdefault((p, q), {}).setdefault(tokens, []).append((rows, columns, entry))
    return found


def tuning_key(tokens: int, rows: int, length: int, p: int, q: int) -> str:
    return f"m{tokens}/w{p}a{q}/{rows}x{length}"


@functools.lru_cache(maxsize=4096)
def choose(tokens: int, rows: int, length: int, p: int, q: int) -> Config | None:
    """The kernel and its configuration for these sizes, or None where int8 products are expected to be faster.

    Tuned for the same widths, the next larger number of tokens and the layer of the most similar size, if there is one.
    """
    by_tokens = _tuned().get((p, q), {})
    if not by_tokens:
        return heuristic(tokens, rows, p, q)
    nearest = min(by_tokens, key=lambda count: (count < tokens, abs(count - tokens)))
    layers = by_tokens[nearest]
    *_, entry = min(layers, key=lambda r: abs(math.log(r[0] / rows)) + abs(math.log(r[1] / length)))
    if entry["kernel"] == "int8":
        return None
    return KINDS[entry["kernel"]](**{name: value for name, value in entry.items() if name != "kernel"})


def choose_grouped(tokens: int, p: int, q: int, group_size: int) -> GroupedConfig | None:
    """The configuration for scales of groups, or None where int8 products are expected to be faster."""
    if tokens > 32:
        return None
    for config in (GroupedConfig(1, 8 if tokens <= 8 else 16), GroupedConfig(1, 8, unroll=1)):
        if config.fits(p, q, group_size):
            return config
    return None


def heuristic(tokens: int, rows: int, p: int, q: int) -> Config | None:
    """`choose` for widths that are not tuned."""
    if tokens <= 32:
        width = 1 << max(0, tokens - 1).bit_length()
        for count in (width, 8, 4, 1):
            config = StreamConfig(1, count)
            if count <= width and config.fits(p, q):
                return config
    # The ratio of rates is eight; few tokens are bound by bytes.
    if p * q >= (32 if tokens <= 64 else 12):
        return None
    if tokens <= 128:
        return GemmConfig(1, 64, 2 if p % 2 == 0 else 1, 2 if q % 2 == 0 else 1, stages=6)
    return GemmConfig(2, 128, stages=6) if tokens * rows <= 256 * 8192 else GemmConfig(2, 256)


def grouped_defines(config: GroupedConfig, p: int, q: int, pieces: int, results: Results) -> dict[str, int]:
    return {
        "ROW_TILES": config.row_tiles,
        "TOKENS": config.tokens,
        "W_BITS": p,
        "X_BITS": q,
        "WARPS": config.warps,
        "UNROLL": config.unroll,
        "GROUP_PIECES": pieces,
        "OUTPUT": results.output,
        "SCALE": results.scale,
    }


@functools.cache
def _grouped(config: GroupedConfig, p: int, q: int, pieces: int, results: Results) -> Module:
    defines = grouped_defines(config, p, q, pieces, results)
    return Module(Path(__file__).with_name("stream_grouped.cu"), defines, _HEADERS)


@functools.cache
def _gemm(config: GemmConfig, results: Results, aligned: bool) -> Module:
    return Module(Path(__file__).with_name("gemm.cu"), gemm_defines(config, results, aligned), _HEADERS)


@functools.cache
def _skinny(config: SkinnyConfig, q: int, results: Results) -> Module:
    return Module(Path(__file__).with_name("skinny.cu"), skinny_defines(config, q, results), _HEADERS)


@functools.cache
def _stream(config: StreamConfig, p: int, q: int, results: Results) -> Module:
    return Module(Path(__file__).with_name("stream.cu"), stream_defines(config, p, q, results), _HEADERS)

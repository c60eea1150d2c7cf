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

from tensormill.cuda import HOPPER_HEADER, Module, cuda_missing, multiprocessors, tensor_map
from tensormill.ops.bit_planes import affine_product

_HEADERS = (HOPPER_HEADER, HOPPER_HEADER.with_name("bits.cuh"))
_OUTPUTS = {torch.int32: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_MOST_SHARED = 227 << 10  # bytes of shared memory of a block
_MOST_REGISTERS = 200  # of a thread, for sums and weights in `stream.cu`


@dataclass(frozen=True)
class GemmConfig:
    """Of `gemm.cu`: consumers of 64 tokens each, rows of a tile, planes of a block, buffers."""

    warpgroups: int
    rows: int
    w_planes: int = 1
    x_planes: int = 1
    stages: int = 4

    @property
    def stage_bytes(self) -> int:
        return 128 * (64 * self.x_planes * self.warpgroups + self.w_planes * self.rows)

    @property
    def shared(self) -> int:
        return self.stages * self.stage_bytes + 16 * self.rows + 16 * self.stages

    @property
    def sums(self) -> int:
        """Of a thread."""
        return (self.w_planes + self.x_planes - 1) * self.rows // 2

    def fits(self, p: int, q: int) -> bool:
        """Whether it takes p-bit weights and q-bit activations, within registers and shared memory."""
        whole = p % self.w_planes == 0 and q % self.x_planes == 0
        return whole and self.sums <= _MOST_REGISTERS and self.shared <= _MOST_SHARED


@dataclass(frozen=True)
class OverlappedConfig(GemmConfig):
    """Of `gemm_overlapped.cu`: as `GemmConfig`, and blocks of a multiprocessor."""

    blocks: int = 1

    def fits(self, p: int, q: int) -> bool:
        room = self.sums <= 128 // self.blocks and self.blocks * (self.shared + 1024) <= _MOST_SHARED + 1024
        return room and super().fits(p, q)


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
KINDS: dict[str, type[Config]] = {
    "gemm": GemmConfig,
    "overlapped": OverlappedConfig,
    "skinny": SkinnyConfig,
    "stream": StreamConfig,
}


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
    """Whether the kernels take the call (scales for groups are left to int8 products, for all that was measured)."""
    aligned = x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    chosen = choose(x.shape[1], weight.shape[1], length, weight.shape[0], x.shape[0])
    return aligned and x_sums.shape[1] == 1 and chosen is not None


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
    config = choose(x.shape[1], weight.shape[1], length, weight.shape[0], x.shape[0])
    assert config is not None
    scales = x_scale, weight_scale
    return run(config, x, weight, x_sums, weight_sums, *scales, length, x_format, weight_format, dtype)


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
    scales = _float_scales(x_scale, weight_scale)
    common = _Common(y.data_ptr(), x_sums.data_ptr(), weight_sums.data_ptr(), *(s.data_ptr() for s in scales))
    affine = (ctypes.c_int * 4)(*affine_product(x_format, weight_format, q, p))
    affine[3] *= length
    device, output = x.device.index, _OUTPUTS[dtype]
    if isinstance(config, SkinnyConfig):
        maps = _plane_map(x, config.tokens), _plane_map(weight, 64 * config.warpgroups)
        arguments = _GemmArguments(*maps, common, tokens, rows, words, q, p, affine)
        blocks = (-(-rows // (64 * config.warpgroups)), -(-tokens // config.tokens), 1)
        kernel = _skinny(config, q, output).kernel("bit_plane_skinny", device)
        threads = 128 * config.warpgroups + 32
        kernel.launch(blocks, threads, config.shared(q), arguments, overlap=True)
        return y
    if isinstance(config, GemmConfig):
        overlapped = isinstance(config, OverlappedConfig)
        maps = _plane_map(x, 64 * config.warpgroups), _plane_map(weight, config.rows)
        arguments = _GemmArguments(*maps, common, tokens, rows, words, q, p, affine)
        tiles = -(-tokens // (64 * config.warpgroups)) * -(-rows // config.rows)
        name = "bit_plane_gemm_overlapped" if overlapped else "bit_plane_gemm"
        kernel = _gemm(config, output, overlapped and rows % 4 == 0).kernel(name, device)
        blocks_at_once = config.blocks if isinstance(config, OverlappedConfig) else 1
        grid = min(tiles, multiprocessors(device) * blocks_at_once)
        threads = 128 * config.warpgroups + (32 if overlapped else 128)
        kernel.launch(grid, threads, config.shared, arguments, overlap=True)
        return y
    streamed = _StreamArguments(x.data_ptr(), weight.data_ptr(), common, tokens, rows, words, affine)
    blocks = (-(-rows // (16 * config.row_tiles)), -(-tokens // config.tokens), 1)
    kernel = _stream(config, p, q, output).kernel("bit_plane_stream", device)
    shared = 64 * config.row_tiles * config.tokens
    kernel.launch(blocks, 32 * config.warps, shared, streamed, overlap=True)
    return y


def _float_scales(x_scale: Tensor | None, weight_scale: Tensor | None) -> list[Tensor]:
    return [s.float().contiguous() for s in (x_scale, weight_scale) if s is not None]


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


def gemm_defines(config: GemmConfig, output: int, aligned: bool) -> dict[str, int]:
    defines = {
        "WARPGROUPS": config.warpgroups,
        "BLOCK_ROWS": config.rows,
        "W_PLANES": config.w_planes,
        "X_PLANES": config.x_planes,
        "STAGES": config.stages,
        "OUTPUT": output,
        "SHARED_BYTES": config.shared,
    }
    if isinstance(config, OverlappedConfig):
        defines |= {"BLOCKS": config.blocks, "ALIGNED": int(aligned)}
    return defines


def skinny_defines(config: SkinnyConfig, q: int, output: int) -> dict[str, int]:
    return {
        "WARPGROUPS": config.warpgroups,
        "TOKENS": config.tokens,
        "X_BITS": q,
        "W_PLANES": config.w_planes,
        "STAGES": config.stages,
        "OUTPUT": output,
        "SHARED_BYTES": config.shared(q),
    }


def stream_defines(config: StreamConfig, p: int, q: int, output: int) -> dict[str, int]:
    return {
        "ROW_TILES": config.row_tiles,
        "TOKENS": config.tokens,
        "W_BITS": p,
        "X_BITS": q,
        "WARPS": config.warps,
        "UNROLL": config.unroll,
        "OUTPUT": output,
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
    if not by_tokens or tokens < min(by_tokens) // 2 + 1:
        return heuristic(tokens, rows, p, q)
    nearest = min(by_tokens, key=lambda count: (count < tokens, abs(count - tokens)))
    layers = by_tokens[nearest]
    *_, entry = min(layers, key=lambda r: abs(math.log(r[0] / rows)) + abs(math.log(r[1] / length)))
    if entry["kernel"] == "int8":
        return None
    return KINDS[entry["kernel"]](**{name: value for name, value in entry.items() if name != "kernel"})


def heuristic(tokens: int, rows: int, p: int, q: int) -> Config:
    """`choose` for sizes that are not tuned, among configurations that were checked on a GPU."""
    if tokens <= 32:
        width = 1 << max(0, tokens - 1).bit_length()
        for count in (width, 8, 4, 1):
            config = StreamConfig(1, count)
            if count <= width and config.fits(p, q):
                return config
    if tokens <= 128:
        return GemmConfig(1, 64, stages=8)
    return GemmConfig(2, 128, stages=6) if tokens * rows <= 512 * 8192 else GemmConfig(2, 256)


@functools.cache
def _gemm(config: GemmConfig, output: int, aligned: bool) -> Module:
    name = "gemm_overlapped.cu" if isinstance(config, OverlappedConfig) else "gemm.cu"
    return Module(Path(__file__).with_name(name), gemm_defines(config, output, aligned), _HEADERS)


@functools.cache
def _skinny(config: SkinnyConfig, q: int, output: int) -> Module:
    return Module(Path(__file__).with_name("skinny.cu"), skinny_defines(config, q, output), _HEADERS)


@functools.cache
def _stream(config: StreamConfig, p: int, q: int, output: int) -> Module:
    return Module(Path(__file__).with_name("stream.cu"), stream_defines(config, p, q, output), _HEADERS)

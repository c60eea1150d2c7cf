"""llama.cpp's matrix product on the CPU, through the ggml libraries that the package llama-cpp-python ships.

A weight of up to 4 bits in whole groups of 32 without zero points is Q4_0 exactly, up to the rounding of its scales to
float16. The K-quants have scales of scales, TQ2_0 has three values only: for them the dequantized weight is quantized
again by ggml, so that they are yardsticks of speed. Activations are float32, quantized inside the call to 8 bits in
groups of 32 (256 for all but Q4_0). Weights are laid out as llama.cpp lays them out when it loads a model (its "repack" buffers).
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

F32, Q4_0, Q2_K, Q4_K, TQ2_0 = 0, 2, 10, 12, 35


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def missing() -> str | None:
    """Why ggml can't be called here, or None."""
    return None if _folder() is not None else "package llama-cpp-python is not installed"


def _folder() -> Path | None:
    found = importlib.util.find_spec("llama_cpp")
    for place in found.submodule_search_locations or () if found is not None else ():
        if (folder := Path(place) / "lib").joinpath("libggml-cpu.so").exists():
            return folder
    return None


@cache
def _libraries() -> tuple[Any, Any]:
    folder = _folder()
    assert folder is not None
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    signatures: dict[Any, dict[str, tuple[Any, list[Any]]]] = {
        base: {
            "ggml_init": (pointer, [_InitParams]),
            "ggml_new_tensor_2d": (pointer, [pointer, integer, ctypes.c_int64, ctypes.c_int64]),
            "ggml_mul_mat": (pointer, [pointer, pointer, pointer]),
            "ggml_new_graph": (pointer, [pointer]),
            "ggml_build_forward_expand": (None, [pointer, pointer]),
            "ggml_nbytes": (size, [pointer]),
            "ggml_get_data": (pointer, [pointer]),
            "ggml_quantize_chunk": (
                size,
                [integer, pointer, pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer],
            ),
            "ggml_log_set": (None, [pointer, pointer]),
            "ggml_backend_tensor_set": (None, [pointer, pointer, size, size]),
            "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, [pointer, pointer]),
            "ggml_backend_get_default_buffer_type": (pointer, [pointer]),
            "ggml_backend_graph_compute": (integer, [pointer, pointer]),
            "ggml_backend_reg_dev_get": (pointer, [pointer, size]),
            "ggml_backend_reg_get_proc_address": (pointer, [pointer, ctypes.c_char_p]),
        },
        cpu: {
            "ggml_backend_cpu_init": (pointer, []),
            "ggml_backend_cpu_reg": (pointer, []),
            "ggml_backend_cpu_set_n_threads": (None, [pointer, integer]),
        },
    }
    for library, functions in signatures.items():
        for name, (result, arguments) in functions.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    base.ggml_log_set(_quiet, None)
    return base, cpu


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _quiet(level: int, text: bytes, data: Any) -> None:
    """What ggml has to say while it lays out a weight."""


def _pack_q4_0(codes: Tensor, scale: Tensor) -> Tensor:
    """Blocks of 32 codes (N, K) with their scales (N, K / 32): a float16 scale, then codes i and i + 16 in byte i."""
    rows, columns = codes.shape
    blocks = codes.reshape(rows, columns // 32, 2, 16)
    pairs = blocks[:, :, 0] | (blocks[:, :, 1] << 4)
    scales = scale.to(torch.float16).unsqueeze(-1).view(torch.uint8)
    return torch.cat([scales, pairs], dim=-1).contiguous()


def product(
    x: Tensor,
    kind: int,
    *,
    dense: Tensor | None = None,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
) -> Callable[[], Tensor]:
    """A function that multiplies x (M, K) with a weight (N, K) in ggml's format `kind`; it returns (M, N) float32.

    Args:
        x: float.
        kind: Q4_0 (given `codes` and `scale`) or another (given `dense`).
        dense: (N, K) float32, quantized by ggml.
        codes: (N, K) uint8 below 16.
        scale: (N, K / 32) float.
    """
    base, cpu = _libraries()
    backend = cpu.ggml_backend_cpu_init()
    cpu.ggml_backend_cpu_set_n_threads(backend, torch.get_num_threads())
    weight_like = codes if codes is not None else dense
    assert weight_like is not None
    (rows, columns), tokens = weight_like.shape, x.shape[0]

    def context() -> Any:
        return base.ggml_init(_InitParams(1 << 20, None, True))

    weights = context()
    weight = base.ggml_new_tensor_2d(weights, kind, columns, rows)
    base.ggml_backend_alloc_ctx_tensors_from_buft(weights, _weight_buffer(base, cpu, backend, kind, rows))
    if codes is not None and scale is not None:
        packed = _pack_q4_0(codes, scale)
    else:
        assert dense is not None
        dense = dense.float().contiguous()
        packed = torch.empty(base.ggml_nbytes(weight), dtype=torch.uint8)
        base.ggml_quantize_chunk(kind, dense.data_ptr(), packed.data_ptr(), 0, rows, columns, None)
    base.ggml_backend_tensor_set(weight, packed.data_ptr(), 0, packed.numel())
    others = context()
    given = base.ggml_new_tensor_2d(others, F32, columns, tokens)
    result = base.ggml_mul_mat(others, weight, given)
    graph = base.ggml_new_graph(others)
    base.ggml_build_forward_expand(graph, result)
    base.ggml_backend_alloc_ctx_tensors_from_buft(others, base.ggml_backend_get_default_buffer_type(backend))
    values = x.float().contiguous()
    base.ggml_backend_tensor_set(given, values.data_ptr(), 0, values.numel() * 4)
    memory = (ctypes.c_float * (tokens * rows)).from_address(base.ggml_get_data(result))
    y = torch.frombuffer(memory, dtype=torch.float32).view(tokens, rows)

    def run() -> Tensor:
        base.ggml_backend_graph_compute(backend, graph)
        return y

    return run


def _weight_buffer(base: Any, cpu: Any, backend: Any, kind: int, rows: int) -> Any:
    """Where llama.cpp would put the weight: in a repacking buffer if the processor has a kernel for the format."""
    if kind in (Q4_0, Q4_K, Q2_K) and rows % 8 == 0:
        registry = cpu.ggml_backend_cpu_reg()
        address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if address:
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)
            if (first := extra(base.ggml_backend_reg_dev_get(registry, 0))[0]) is not None:
                return first
    return base.ggml_backend_get_default_buffer_type(backend)

"""The CUDA kernels of bit_plane_linear: run in the emulation, compiled for the target."""

from __future__ import annotations

import importlib

import pytest
import torch

from emulation.kernels import compile_or_skip, disassembly, emulate, emulated_tensor_map, resources
from tensormill.ops import OPERATORS
from tensormill.ops.correctness import deviation, upcast

cuda = importlib.import_module("tensormill.ops.bit_plane_linear.cuda")
Gemm, Skinny, Stream = cuda.GemmConfig, cuda.SkinnyConfig, cuda.StreamConfig
OPERATOR = OPERATORS["bit_plane_linear"]
FORMATS = ("unsigned", "signed", "bipolar")


@pytest.fixture
def emulation(monkeypatch):
    """The wrapper launches the emulation: `(config, shape) -> what is wrong, or None`."""
    for name, module in (("_gemm", cuda._gemm), ("_skinny", cuda._skinny), ("_stream", cuda._stream)):
        monkeypatch.setattr(cuda, name, lambda *a, module=module: _Emulated(module(*a)))
    monkeypatch.setattr(cuda, "_grouped", lambda *a, module=cuda._grouped: _Emulated(module(*a)))
    monkeypatch.setattr(cuda, "tensor_map", emulated_tensor_map)
    monkeypatch.setattr(cuda, "_maps", {})
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 3)

    def check(config, shape):
        shape = {
            "group_size": -1,
            "weight_format": "bipolar",
            "x_format": "bipolar",
            "dtype": "int32",
            **shape,
        }
        arguments = OPERATOR.inputs(shape, torch.device("cpu"), torch.Generator().manual_seed(3))
        if isinstance(config, cuda.GroupedConfig):
            result = cuda.run_grouped(config, *arguments)
        else:
            result = cuda.run(config, *arguments[:9], arguments[10])
        expected = OPERATOR.reference(*upcast(arguments))
        dtype = arguments[4].dtype if arguments[4] is not None else torch.float64
        return deviation(result, expected, OPERATOR.tolerance(dtype, shape))

    return check


class _Emulated:
    def __init__(self, module):
        self.module = module

    def kernel(self, name, device):
        self.emulated = emulate(self.module, name)
        return self

    def launch(self, grid, block, shared, arguments, *, overlap):
        self.emulated.launch(grid[:2] if isinstance(grid, tuple) else grid, block, shared, arguments)


def sizes(tokens, rows, length, p, q, **more):
    return {
        "tokens": tokens,
        "out_features": rows,
        "in_features": length,
        "weight_bits": p,
        "x_bits": q,
        **more,
    }


@pytest.mark.parametrize(
    ("config", "p", "q"),
    [
        (Gemm(1, 32, stages=3), 3, 2),
        (Gemm(2, 64, stages=2), 1, 1),
        (Gemm(1, 64, 2, 2, stages=2), 2, 4),
        (Gemm(2, 32, 1, 2, stages=2), 2, 2),
    ],
)
def test_gemm(emulation, config, p, q):
    formats = {"weight_format": FORMATS[p % 3], "x_format": FORMATS[(p + q) % 3]}
    assert emulation(config, sizes(70, 99, 1300, p, q, **formats)) is None
    assert emulation(config, sizes(1, 68, 100, p, q, dtype="float16")) is None


@pytest.mark.parametrize(
    ("config", "p", "q"),
    [
        (Stream(1, 1), 2, 8),
        (Stream(1, 4, 4, 1), 3, 2),
        (Stream(2, 8, 2), 2, 2),
        (Stream(1, 16, 4), 1, 4),
    ],
)
def test_stream(emulation, config, p, q):
    formats = {"weight_format": FORMATS[p % 3], "x_format": FORMATS[(p + q) % 3]}
    assert emulation(config, sizes(config.tokens + 1, 37, 1300, p, q, **formats)) is None
    assert emulation(config, sizes(config.tokens, 32, 130, p, q, dtype="bfloat16")) is None


@pytest.mark.parametrize(
    ("config", "p", "q"),
    [
        (Skinny(1, 16, stages=3), 3, 1),
        (Skinny(2, 8, 2, stages=2), 2, 3),
        (Skinny(1, 64, stages=2), 2, 2),
    ],
)
def test_skinny(emulation, config, p, q):
    formats = {"weight_format": FORMATS[p % 3], "x_format": FORMATS[(p + q) % 3]}
    assert emulation(config, sizes(config.tokens + 3, 99, 1300, p, q, **formats)) is None
    assert emulation(config, sizes(1, 130, 100, p, q, dtype="float16")) is None


@pytest.mark.parametrize(
    ("config", "p", "q", "group_size"),
    [(cuda.GroupedConfig(1, 8, 4, 1), 2, 4, 128), (cuda.GroupedConfig(2, 16, 2, 2), 1, 2, 256)],
)
def test_groups(emulation, config, p, q, group_size):
    formats = {"weight_format": FORMATS[p % 3], "x_format": FORMATS[(p + q) % 3], "group_size": group_size}
    assert emulation(config, sizes(config.tokens + 1, 37, 1300, p, q, dtype="float32", **formats)) is None
    assert emulation(config, sizes(1, 16, 640, p, q, dtype="float16", **formats)) is None


@pytest.mark.parametrize("output", range(4))
def test_gemm_compiles(output):
    """Products of single bits from shared memory, nothing spilled, results written eight bytes at a time."""
    code = compile_or_skip(cuda._gemm(Gemm(2, 256), output, True), "sm_90a")
    assert resources(code)["bit_plane_gemm"].stack == 0
    listing = disassembly(code)
    assert "BGMMA.64x256x256.AND.POPC" in listing and "STG.E.64" in listing


@pytest.mark.parametrize(("p", "q"), [(1, 1), (2, 2), (4, 8)])
def test_stream_compiles(p, q):
    config = cuda.heuristic(16, 4096, p, q)
    assert isinstance(config, Stream)
    code = compile_or_skip(cuda._stream(config, p, q, 2), "sm_90a")
    assert resources(code)["bit_plane_stream"].stack == 0
    listing = disassembly(code)
    assert "BMMA.168256.AND.POPC" in listing and "LDG.E.128" in listing

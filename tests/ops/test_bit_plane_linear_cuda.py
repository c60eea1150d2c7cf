"""The CUDA kernels of bit_plane_linear: run in the emulation, compiled for the target."""

from __future__ import annotations

import ctypes
import importlib

import pytest
import torch

from emulation.kernels import emulate
from tensormill.ops import OPERATORS
from tensormill.ops.correctness import deviation, upcast

cuda = importlib.import_module("tensormill.ops.bit_plane_linear.cuda")
Gemm, Stream = cuda.GemmConfig, cuda.StreamConfig
OPERATOR = OPERATORS["bit_plane_linear"]
FORMATS = ("unsigned", "signed", "bipolar")


class EmulatedMap(ctypes.Structure):
    """A TensorMap of the emulation, as large as a real one."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("box_rows", ctypes.c_int),
        ("box_bytes", ctypes.c_int),
        ("element_bytes", ctypes.c_int),
        ("padding", ctypes.c_ubyte * 92),
    )


def emulated_map(planes: torch.Tensor, box: int) -> ctypes.Array:
    words = planes.shape[-1]
    described = EmulatedMap(planes.data_ptr(), planes.shape[0] * planes.shape[1], 4 * words, box, 128, 4)
    return (ctypes.c_ubyte * 128).from_buffer_copy(bytes(described)[:128])


@pytest.fixture
def emulation(monkeypatch):
    """The wrapper launches the emulation: `(config, shape) -> what is wrong, or None`."""
    for name, module in (("_gemm", cuda._gemm), ("_stream", cuda._stream)):
        monkeypatch.setattr(cuda, name, lambda *a, module=module: _Emulated(module(*a)))
    monkeypatch.setattr(cuda, "_plane_map", emulated_map)
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

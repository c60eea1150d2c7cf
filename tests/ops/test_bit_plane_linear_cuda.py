"""The CUDA kernels of bit_plane_linear: run in the emulation, compiled for the target."""

from __future__ import annotations

import importlib

import pytest
import torch

from emulation.kernels import compile_or_skip, disassembly, emulate, emulated_tensor_map, resources
from tensormill.ops import OPERATORS
from tensormill.ops.correctness import deviation, result_dtype, upcast

cuda = importlib.import_module("tensormill.ops.bit_plane_linear.cuda")
Gemm, Overlapped = cuda.GemmConfig, cuda.OverlappedConfig
Skinny, Stream = cuda.SkinnyConfig, cuda.StreamConfig
OPERATOR = OPERATORS["bit_plane_linear"]
HALF = 2  # OUTPUT of float16
FORMATS = ("unsigned", "signed", "bipolar")


@pytest.fixture
def emulation(monkeypatch):
    """The wrapper launches the emulation: `(config, shape) -> what is wrong, or None`."""
    for name, module in (("_gemm", cuda._gemm), ("_skinny", cuda._skinny), ("_stream", cuda._stream)):
        monkeypatch.setattr(cuda, name, lambda *a, module=module: _Emulated(module(*a)))
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
        result = cuda.run(config, *arguments[:9], arguments[10])
        expected = OPERATOR.reference(*upcast(arguments))
        return deviation(result, expected, OPERATOR.tolerance(result_dtype(arguments), shape))

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


# A build of a kernel takes g++ a second: each has one output type, and sizes that need no second one.
@pytest.mark.parametrize(
    ("config", "p", "q", "rows", "dtype"),
    [
        # several levels, a ring that wraps, odd rows
        (Gemm(1, 32, stages=3), 3, 2, 99, "int32"),
        (Gemm(2, 64, 2, 2, stages=2), 2, 4, 132, "float16"),  # blocks of planes, two consumers, tiles
        (Overlapped(1, 64, 1, 2, stages=2, blocks=2), 2, 2, 99, "int32"),
        (Overlapped(2, 32, stages=3), 3, 2, 132, "float16"),
        (Skinny(1, 16, stages=3), 3, 1, 99, "int32"),
        (Skinny(2, 8, 2, stages=2), 2, 3, 99, "bfloat16"),
        (Stream(1, 4, 4, 1), 3, 2, 37, "int32"),
        (Stream(2, 8, 2), 2, 2, 37, "float32"),
    ],
    ids=str,
)
def test_kernels(emulation, config, p, q, rows, dtype):
    formats = {"weight_format": FORMATS[p % 3], "x_format": FORMATS[(p + q) % 3], "dtype": dtype}
    tokens = 70 if isinstance(config, Gemm) else config.tokens + 3
    assert emulation(config, sizes(tokens, rows, 1300, p, q, **formats)) is None
    assert emulation(config, sizes(1, rows + 4, 100, p, q, **formats)) is None


@pytest.mark.parametrize(
    ("make", "name", "instructions"),
    [
        (
            lambda: cuda._gemm(Gemm(2, 128, stages=6), HALF, False),
            "gemm",
            ["BGMMA.64x128x256.AND.POPC", "STG.E.64"],
        ),
        (
            lambda: cuda._gemm(Overlapped(2, 128, stages=3, blocks=2), HALF, True),
            "gemm_overlapped",
            ["BGMMA.64x128x256.AND.POPC", "STG.E.64"],
        ),
        (lambda: cuda._skinny(Skinny(1, 16, 2, 4), 4, HALF), "skinny", ["BGMMA.64x64x256.AND.POPC"]),
        (lambda: cuda._stream(Stream(1, 16), 2, 2, HALF), "stream", ["BMMA.168256.AND.POPC", "LDG.E.128"]),
    ],
)
def test_compiles(make, name, instructions):
    """Native products of single bits, nothing spilled."""
    code = compile_or_skip(make(), "sm_90a")
    assert resources(code)[f"bit_plane_{name}"].stack == 0
    listing = disassembly(code)
    assert all(instruction in listing for instruction in instructions)


def test_choice():
    """Tuned for the next larger number of tokens and the most similar layer; what fits, for every width."""
    for p in range(1, 9):
        for q in range(1, 9):
            for tokens in (1, 3, 16, 33, 100, 1000, 10000):
                config = cuda.choose(tokens, 4096, 4096, p, q)
                assert config.fits(p, q)
                assert type(config) in (Gemm, Stream)  # what was measured

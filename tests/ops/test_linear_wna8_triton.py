"""The GPU kernels of linear_wna8 by configuration, in Triton's interpreter; `test_interpreted` runs this file."""

import importlib

import pytest
import torch

from tensormill.operator import interpreting
from tensormill.ops import OPERATORS
from tensormill.ops.correctness import deviation, upcast

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
OPERATOR = OPERATORS["linear_wna8"]
kernels = importlib.import_module("tensormill.ops.linear_wna8.triton")
Gemv, Gemm = kernels.GemvConfig, kernels.GemmConfig


def check(config, tokens, rows, columns, bits=4, group_size=-1, width=32, **more):
    shape = {"tokens": tokens, "out_features": rows, "in_features": columns, "bits": bits, "dtype": "float16"}
    shape |= {"group_size": group_size, "x_group_size": -1, "x_dtype": "int8", "symmetric": True, **more}
    arguments = OPERATOR.inputs(shape, torch.device("cpu"), torch.Generator().manual_seed(tokens))
    prepared = list(kernels.prepare(*arguments))
    prepared[2] = kernels.layouts.to_planes(arguments[2], bits, columns, width)
    result = kernels.run(*prepared[:-1], width, config)
    expected = OPERATOR.reference(*upcast(arguments))
    assert deviation(result, expected, OPERATOR.tolerance(torch.float16, shape)) is None


@pytest.mark.parametrize("bits", range(1, 9))
def test_gemv_of_all_widths(bits):
    check(Gemv(1, 1, 2), 1, 70, 600, bits, bias=True)
    check(Gemv(2, 1, 1), 2, 64, 512, bits, 64, 64, symmetric=False)


@pytest.mark.parametrize("tokens", [3, 4])
def test_gemv_of_several_tokens(tokens):
    check(Gemv(2, 1, 3), tokens, 65, 416, symmetric=False)
    check(Gemv(3, 1, 2), tokens, 20, 640, 4, 128, 64, x_group_size=64, quantized=True)


@pytest.mark.parametrize("bits", range(1, 9))
def test_gemm_of_all_widths(bits):
    check(Gemm(16, 64, 1, 2, 1), 5, 70, 600, bits, bias=True)
    check(Gemm(16, 128, 1, 2, 2), 19, 64, 512, bits, 64, 64, symmetric=False)
    check(Gemm(16, 64, 1, 2, 2), 3, 64, 512, bits, symmetric=False)


def test_gemm_with_grouped_activations():
    check(Gemm(16, 64, 1, 2, 1), 17, 64, 512, 4, -1, 32, x_group_size=128)
    check(Gemm(16, 64, 1, 2, 3), 17, 64, 1000, 4, 128, 64, x_group_size=64, symmetric=False, quantized=True)


def test_groups_that_are_no_power_of_two():
    check(Gemm(16, 64, 1, 2, 1), 3, 64, 480, 4, 96)
    check(Gemv(1, 1, 1), 1, 64, 480, 6, 160)

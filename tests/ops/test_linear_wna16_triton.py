"""The GPU kernels of linear_wna16 by configuration, in Triton's interpreter; `test_interpreted` runs this file."""

import importlib
import json

import pytest
import torch

from tensormill.operator import interpreting
from tensormill.ops import OPERATORS
from tensormill.ops.bit_packing import pack_bits
from tensormill.ops.correctness import deviation, upcast

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
OPERATOR = OPERATORS["linear_wna16"]
kernels = importlib.import_module("tensormill.ops.linear_wna16.triton")
Gemv, Gemm = kernels.GemvConfig, kernels.GemmConfig


def check(config, tokens, rows, columns, bits=4, group_size=64, dtype="float16", **more):
    shape = {"tokens": tokens, "out_features": rows, "in_features": columns, "bits": bits, "dtype": dtype}
    shape |= {"group_size": group_size, **more}
    arguments = OPERATOR.inputs(shape, torch.device("cpu"), torch.Generator().manual_seed(tokens))
    result = kernels.run(*arguments, config)
    expected = OPERATOR.reference(*upcast(arguments))
    assert deviation(result, expected, OPERATOR.tolerance(arguments[0].dtype, shape)) is None


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_gemv_with_ragged_rows_and_columns(bits, dtype):
    # 19 rows in steps of 2 x 4, 1000 columns in two splits
    check(Gemv(2, 4, 1, 512, 1), 1, 19, 1000, bits, dtype=dtype, bias=True)
    check(Gemv(2, 2, 2, 1024, 1), 2, 19, 1000, bits, 32, dtype=dtype, symmetric=True)


@pytest.mark.parametrize("tokens", [3, 4, 7, 16])
def test_gemv_of_several_tokens(tokens):
    check(Gemv(1, 2, 1, 256, 1), tokens, 5, 200, bias=True)
    check(Gemv(2, 1, 1, 128, 1), tokens, 5, 200, symmetric=True)


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_gemv_loads_ahead(ahead):
    check(Gemv(2, 4, ahead, 512, 1), 1, 21, 512)


@pytest.mark.parametrize("bits", range(1, 9))
def test_gemm_with_ragged_tiles(bits):
    check(Gemm(16, 16, 64, 1, 2, 1), 5, 23, 300, bits, bias=True)
    check(Gemm(16, 32, 128, 1, 2, 3), 19, 40, 1000, bits, 32, symmetric=True)


@pytest.mark.parametrize("group_size", [8, 16, 24, 40, -1])
def test_groups_shorter_than_a_thread_s_longest_unit(group_size):
    check(Gemv(2, 2, 1, 512, 1), 1, 9, 330, 4, group_size)
    check(Gemm(16, 16, 64, 1, 2, 2), 3, 17, 330, 4, group_size)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_that_share_a_shift_keep_half_precision(bits):
    """x of one sign makes the sums that cancel as large as they get: 2^8 x the result's terms."""
    rows, columns = 8, 8192
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, columns // 128, generator=generator).add(0.5).div(1 << bits).half()
    x = torch.rand(1, columns, generator=generator).add(0.5).mul(0.01).half()
    arguments = (x, pack_bits(codes, bits), scale, None, None, bits, 128, "packed")
    expected = OPERATOR.reference(*upcast(arguments))
    result = kernels.run(*arguments, Gemv(4, 2, 1, columns, 8))
    error = (result.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert float(error) < 5e-4  # of which rounding to float16 makes 2e-4


def test_tuned_configurations_are_used(monkeypatch):
    tuned = {
        "m1/w4/64x512": {"kernel": "dense"},
        "m4/w4/64x512": {"kernel": "gemm", **vars(Gemm(16, 16, 64, 1, 2, 1))},
    }
    monkeypatch.setattr(kernels, "_tuned", lambda: json.loads(json.dumps(tuned)))
    assert kernels.configuration(1, 64, 512, 4) == kernels.DenseConfig()
    assert kernels.configuration(3, 64, 512, 4) == Gemm(16, 16, 64, 1, 2, 1)
    assert isinstance(kernels.configuration(2, 64, 512, 4), Gemv)
    assert isinstance(kernels.configuration(100_000, 64, 512, 4), kernels.DenseConfig)


def test_tuner_writes_what_dispatch_reads(monkeypatch, tmp_path):
    """The tuner's whole course, with times made up."""
    tune = importlib.import_module("tensormill.ops.linear_wna16.tune")
    seconds = iter(range(1, 1000))

    def time_one(run, copies):
        run(*copies[0])
        return float(next(seconds))

    everything = tune.candidates
    monkeypatch.setattr(tune, "candidates", lambda *size: everything(*size)[:2])
    monkeypatch.setattr(tune, "DEVICE", "cpu")
    monkeypatch.setattr(tune, "SHAPES", ((32, 128),))
    monkeypatch.setattr(tune, "time_one", time_one)
    monkeypatch.setattr(tune, "copies_past_cache", lambda *arguments: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    output = tmp_path / "sm_90.json"
    tune.tune(60.0, output, (1, 16), 1)
    tune.layer.cache_clear()
    document = json.loads(output.read_text())
    monkeypatch.setattr(kernels, "_tuned", lambda: document["configurations"])
    assert list(document["configurations"]) == ["m1/w4/32x128", "m16/w4/32x128"]
    assert isinstance(kernels.configuration(1, 32, 128, 4), Gemv)
    assert isinstance(kernels.configuration(16, 32, 128, 4), Gemm)

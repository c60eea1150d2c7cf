"""The CPU kernel of linear_wna8: exact sums, quantization on the way, instruction sets."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from tensormill.operator import use_implementation
from tensormill.ops import OPERATORS, linear_wna8, quantize_activations
from tensormill.ops.bit_packing import pack_bits

OPERATOR = OPERATORS["linear_wna8"]
INSTRUCTION_SETS = ["portable", "avx2", "avx512", "vbmi", "vnni", "amx"]  # each has those before it
pytestmark = pytest.mark.skipif(
    OPERATOR.find("cpu").missing() is not None, reason="the compiled CPU kernels are not installed"
)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 19])
def test_sums_of_integers_are_exact(bits, tokens):
    """With scales of 1 the result is an integer below 2^24, so that nothing may differ; ends of all ranges occur."""
    generator = torch.Generator().manual_seed(bits)
    rows, columns = 37, 499  # codes times x, without zero points, stay below 2^24 too
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[0], codes[1] = 0, (1 << bits) - 1
    x = torch.randint(-128, 128, (tokens, columns), generator=generator, dtype=torch.int8)
    x[-1], x[0] = 127, -128
    for group_size, zeros in itertools.product((-1, 32, 8, 7), (True, False)):
        groups = 1 if group_size == -1 else -(-columns // group_size)
        zero = torch.randint(0, 1 << bits, (rows, groups), generator=generator, dtype=torch.uint8)
        group = torch.arange(columns) // (columns if group_size == -1 else group_size)
        subtracted = zero.long()[:, group] if zeros else 1 << (bits - 1)
        expected = x.long() @ (codes.long() - subtracted).T
        with use_implementation(linear_wna8="cpu"):
            y = linear_wna8(
                x,
                pack_bits(codes, bits),
                torch.ones(rows, groups),
                zero if zeros else None,
                bits=bits,
                group_size=group_size,
                x_scale=torch.ones(tokens, 1),
            )
        assert torch.equal(y.long(), expected)


@pytest.mark.skipif(OPERATOR.find("lut").missing() is not None, reason="no AVX-512 with VBMI and VNNI")
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
def test_sums_looked_up_are_those_of_products(bits, tokens):
    """Table entries have two bytes, so that look-ups lose nothing, at the largest codes and activations too."""
    generator = torch.Generator().manual_seed(tokens)
    rows, columns = 45, 1000
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[0], codes[1] = 0, (1 << bits) - 1
    x = torch.randint(-128, 128, (tokens, columns), generator=generator, dtype=torch.int8)
    x[-1], x[0] = 127, -128
    x_scale = torch.rand(tokens, 1, generator=generator)
    for group_size in (-1, 32, 96):
        groups = 1 if group_size == -1 else -(-columns // group_size)
        scale = torch.rand(rows, groups, generator=generator)
        zero = torch.randint(0, 1 << bits, (rows, groups), generator=generator, dtype=torch.uint8)
        results = []
        for implementation in ("lut", "cpu"):
            with use_implementation(linear_wna8=implementation):
                results.append(
                    linear_wna8(
                        x,
                        pack_bits(codes, bits),
                        scale,
                        zero,
                        bits=bits,
                        group_size=group_size,
                        x_scale=x_scale,
                    )
                )
        if tokens == 1:  # one token is summed in another order
            torch.testing.assert_close(*results, rtol=1e-5, atol=2e-2)
        else:
            assert torch.equal(*results)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("group_size", "x_group_size"), [(-1, 64), (128, 32), (128, 64), (32, 128)])
def test_one_token_with_scales_of_zero(bits, group_size, x_group_size):
    """Scales of activations may change within a group of the weight, zero among them, first and last."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 1 << bits, (9, 512), generator=generator, dtype=torch.uint8)
    x = torch.randint(-127, 128, (1, 512), generator=generator, dtype=torch.int8)
    x_scale = torch.rand(1, 512 // x_group_size, generator=generator)
    x_scale[0, [0, -1]] = 0
    scale = torch.rand(9, 1 if group_size == -1 else 512 // group_size, generator=generator)
    dense = (codes.double() - (1 << (bits - 1))) * scale.double().repeat_interleave(512 // scale.shape[1], 1)
    expected = (x.double() * x_scale.double().repeat_interleave(x_group_size, 1)) @ dense.T
    options = {"bits": bits, "group_size": group_size, "x_group_size": x_group_size, "dtype": torch.float32}
    with use_implementation(linear_wna8="cpu"):
        y = linear_wna8(x, pack_bits(codes, bits), scale, x_scale=x_scale, **options)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_group_size", [-1, 8, 64, 100])
def test_activations_are_quantized_as_by_their_operator(dtype, x_group_size):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 300, generator=generator).to(dtype)
    x[1] *= 1000
    x[2] = 0
    x[3, 7] = torch.inf
    weight = pack_bits(torch.randint(0, 16, (24, 300), generator=generator, dtype=torch.uint8), 4)
    scale = torch.rand(24, 10, generator=generator)
    codes, x_scale = quantize_activations(x, group_size=x_group_size)
    options = {"bits": 4, "group_size": 32, "x_group_size": x_group_size, "dtype": torch.float32}
    with use_implementation(linear_wna8="cpu"):
        at_once = linear_wna8(x, weight, scale, **options)
        given = linear_wna8(codes, weight, scale, x_scale=x_scale, **options)
    assert torch.equal(at_once[:3], given[:3])
    assert at_once[3].isnan().all() and given[3].isnan().all()


_SWEEP = """
import itertools
import torch
from tensormill.ops import OPERATORS
from tensormill.ops.correctness import deviation, upcast
from tensormill.ops.linear_wna8 import _cpu

assert _cpu.instruction_set() in {allowed}
operator = OPERATORS["linear_wna8"]
cpu = operator.find("cpu")
for sample in operator.samples:
    if sample.large or sample.benchmark:
        continue
    arguments = operator.inputs(sample.shape, torch.device("cpu"), torch.Generator().manual_seed(0))
    if cpu.supports(*arguments):
        expected = operator.reference(*upcast(arguments))
        allowed = operator.tolerance(arguments[0].dtype, sample.shape)
        assert deviation(cpu.function(*arguments), expected, allowed) is None, sample.name
print("done")
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "vbmi", "vnni"])
def test_instruction_sets(isa):
    """The variable is read once, so they run in a process of their own."""
    code = _SWEEP.format(allowed=INSTRUCTION_SETS[: INSTRUCTION_SETS.index(isa) + 1])
    environment = {**os.environ, "TENSORMILL_CPU_ISA": isa}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "done", f"{run.returncode} {run.stderr}"

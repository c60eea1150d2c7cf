"""Bit planes and their products: what the battery does not know of."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.errors import InvalidArgument
from tensormill.operator import interpreting, use_implementation
from tensormill.ops import OPERATORS, bit_plane_linear, quantize_bit_planes
from tensormill.ops.bit_planes import (
    FORMATS,
    BitPlanes,
    affine_product,
    code_sums,
    integer_range,
    pack_planes,
    popcount,
    step_and_offset,
    unpack_codes,
)

operator = OPERATORS["bit_plane_linear"]
IMPLEMENTATIONS = [i.name for i in operator.implementations if "cpu" in i.devices and i.missing() is None]
compiled = pytest.mark.skipif("cpu" not in IMPLEMENTATIONS, reason="the C++ kernels are not built")
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
LENGTHS = (1, 31, 33, 127, 128, 129, 256, 511, 513)


def random_planes(rows: int, length: int, bits: int, format: str, seed: int = 0, **more) -> BitPlanes:
    step, offset = step_and_offset(format, bits)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, length), generator=generator)
    return pack_planes(step * codes + offset, bits, format, **more)


def words_of(row: list[int]) -> list[int]:
    """A row of bits as unsigned 32-bit words, bit k in word k // 32 at k % 32, in whole 128 bits."""
    words = [0] * (4 * -(-len(row) // 128))
    for k, bit in enumerate(row):
        words[k // 32] |= bit << (k % 32)
    return words


# --- planes


@given(
    bits=st.integers(1, 8),
    format=st.sampled_from(FORMATS),
    rows=st.integers(0, 4),
    length=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_packing_is_a_bijection(bits, format, rows, length, seed):
    low, high = integer_range(format, bits)
    step = step_and_offset(format, bits)[0]
    generator = torch.Generator().manual_seed(seed)
    integers = low + step * torch.randint(0, (high - low) // step + 1, (rows, length), generator=generator)
    if rows:
        integers[0, 0], integers[-1, -1] = low, high
    packed = pack_planes(integers, bits, format)
    assert torch.equal(packed.integers(), integers.int())
    # every word is a function of the codes alone: packing what was unpacked gives the same words
    again = pack_planes(packed.integers(), bits, format)
    assert torch.equal(again.planes, packed.planes) and torch.equal(again.sums, packed.sums)


@pytest.mark.parametrize("bits", range(1, 9))
def test_layout(bits):
    """As the module says, written out with Python's integers."""
    packed = random_planes(3, 200, bits, "unsigned")
    assert packed.planes.shape == (bits, 3, 8) and packed.planes.dtype == torch.int32
    codes = packed.integers().tolist()
    for j, row in itertools.product(range(bits), range(3)):
        expected = words_of([code >> j & 1 for code in codes[row]])
        assert [w & 0xFFFFFFFF for w in packed.planes[j, row].tolist()] == expected


@pytest.mark.parametrize("bits", range(1, 9))
def test_formats(bits):
    """Two's complement with the top bit flipped; and +-1 for every bit, so that NOT is the negative."""
    codes = torch.arange(1 << bits)[None]
    signed = pack_planes(codes - (1 << (bits - 1)), bits, "signed")
    twos_complement = signed.integers() & ((1 << bits) - 1)
    assert torch.equal(unpack_codes(signed.planes, 1 << bits).int() ^ (1 << (bits - 1)), twos_complement)
    bipolar = pack_planes(2 * codes - (1 << bits) + 1, bits, "bipolar")
    signs = torch.stack([2 * (codes >> j & 1) - 1 for j in range(bits)])
    powers = 2 ** torch.arange(bits)[:, None, None]
    assert torch.equal(bipolar.integers(), (signs * powers).sum(0).int())
    flipped = BitPlanes(~bipolar.planes, bipolar.sums, None, bipolar.length, "bipolar")
    assert torch.equal(flipped.integers(), -bipolar.integers())


def test_popcount():
    words = torch.tensor([0, -1, 1, -(2**31), 2**31 - 1, 0x0F0F0F0F, 0x12345678], dtype=torch.int32)
    words = torch.cat([words, torch.randint(-(2**31), 2**31, (1000,)).int()])
    assert popcount(words).tolist() == [(w & 0xFFFFFFFF).bit_count() for w in words.tolist()]


@pytest.mark.parametrize("group_size", [-1, 128, 384])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_sums(bits, group_size):
    packed = random_planes(3, 1000, bits, "unsigned", group_size=group_size)
    step = 1000 if group_size == -1 else group_size
    expected = [part.sum(1) for part in packed.integers().split(step, dim=1)]
    assert torch.equal(packed.sums, torch.stack(expected, 1).int())
    assert torch.equal(code_sums(packed.planes, 1000, group_size), packed.sums)


def test_regrouped():
    packed = random_planes(3, 1000, 3, "signed", group_size=384, scale=torch.rand(3, 3))
    finer = packed.regrouped(128)
    assert finer.sums.shape == (3, 8) and torch.equal(finer.dequantize(), packed.dequantize())
    assert torch.equal(finer.sums, code_sums(packed.planes, 1000, 128))
    whole = random_planes(2, 300, 2, "bipolar", scale=torch.rand(2)).regrouped(256)
    assert torch.equal(whole.scale[:, 0], whole.scale[:, 1])
    for size in (-1, 256):
        with pytest.raises(InvalidArgument, match="divides"):
            packed.regrouped(size)


# --- products


def test_every_width_and_format():
    """Exact equality with the 64-bit product of the integers, which shares nothing with the planes."""
    for p, q, length in itertools.product(range(1, 9), range(1, 9), (33, 300)):
        w_format, x_format = FORMATS[(p + q) % 3], FORMATS[(p + q // 3 + length) % 3]
        x, w = random_planes(3, length, q, x_format, q), random_planes(5, length, p, w_format, p + 9)
        y = bit_plane_linear(x, w)
        assert y.dtype == torch.int32
        assert torch.equal(y.long(), x.integers().long() @ w.integers().long().T)


@compiled
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_every_length_and_tile(threads):
    for length, tokens in itertools.product(LENGTHS, (1, 7, 67)):
        x, w = random_planes(tokens, length, 2, "bipolar"), random_planes(33, length, 1, "bipolar", 1)
        expected = (x.integers().double() @ w.integers().double().T).int()
        for rows in (3, 33):
            part = pack_planes(w.integers()[:rows], 1, "bipolar")
            with use_implementation(bit_plane_linear="cpu"):
                assert torch.equal(bit_plane_linear(x, part), expected[:, :rows])


@compiled
def test_many_tokens_and_planes_by_bytes():
    """Where the CPU's int8 products take over, codes of 8 bits and sums that wrap on the way included."""
    for (p, q), shift in itertools.product(((8, 8), (3, 8), (4, 4)), range(3)):
        x_format, w_format = FORMATS[shift], FORMATS[(shift + p) % 3]
        x, w = random_planes(40, 259, q, x_format), random_planes(9, 259, p, w_format, 1)
        with use_implementation(bit_plane_linear="cpu"):
            assert torch.equal(
                bit_plane_linear(x, w), (x.integers().double() @ w.integers().double().T).int()
            )
    x = pack_planes(torch.full((8, 130000), -128), 8, "signed")  # codes of 0, which are -128 as bytes
    with use_implementation(bit_plane_linear="cpu"):
        assert bool((bit_plane_linear(x, x) == 130000 * 2**14).all())


@given(length=st.integers(1, 400), seed=st.integers(0, 2**31))
@settings(max_examples=12, deadline=None)
def test_signs_are_a_hamming_distance(length, seed):
    """One bit by one bit, bipolar: K - 2 popcount(a XOR b), the form in which binary networks are written."""
    a, b = (random_planes(2, length, 1, "bipolar", seed + i) for i in range(2))
    different = popcount(a.planes[0][:, None] ^ b.planes[0]).sum(-1)
    assert torch.equal(bit_plane_linear(a, b), (length - 2 * different).int())


@given(p=st.integers(1, 8), q=st.integers(1, 8), seed=st.integers(0, 2**31))
@settings(max_examples=12, deadline=None)
def test_symmetry(p, q, seed):
    x, w = random_planes(3, 150, q, "bipolar", seed), random_planes(4, 150, p, "signed", seed + 1)
    assert torch.equal(bit_plane_linear(x, w), bit_plane_linear(w, x).T)
    negative = pack_planes(-x.integers(), q, "bipolar")
    assert torch.equal(bit_plane_linear(negative, w), -bit_plane_linear(x, w))


@every_implementation
@pytest.mark.parametrize("format", FORMATS)
def test_extreme_sums(implementation, format):
    """All products at one end of their range, as long as int32 allows."""
    low, high = integer_range(format, 8)
    most = ((1 << 31) - 1) // max(abs(low), abs(high)) ** 2
    ends = torch.tensor([[low], [high]]).expand(2, most)
    x = pack_planes(ends, 8, format)
    with use_implementation(bit_plane_linear=implementation):
        expected = [[most * a * b for b in (low, high)] for a in (low, high)]
        assert bit_plane_linear(x, x).tolist() == expected
    longer = pack_planes(torch.full((1, most + 1), high), 8, format)
    with pytest.raises(InvalidArgument, match=f"K <= {most}"):
        bit_plane_linear(longer, longer)


@every_implementation
def test_groups_allow_longer_sums(implementation):
    x = random_planes(2, 40000, 8, "unsigned", scale=torch.rand(2, 313) + 0.5, group_size=128)
    with use_implementation(bit_plane_linear=implementation):
        y = bit_plane_linear(x, x)
    wide = x.integers().double() * x.scale.double().repeat_interleave(128, 1)[:, :40000]
    torch.testing.assert_close(y.double(), wide @ wide.T, rtol=1e-5, atol=0)


@every_implementation
def test_operands_in_different_groups(implementation):
    x = random_planes(3, 700, 4, "signed", scale=torch.rand(3))
    w = random_planes(5, 700, 2, "bipolar", 1, scale=torch.rand(5, 6), group_size=128)
    with use_implementation(bit_plane_linear=implementation):
        y = bit_plane_linear(x, w)
        exact = bit_plane_linear(x, w, dtype=torch.int32)
        half = bit_plane_linear(x, w, dtype=torch.bfloat16)
    torch.testing.assert_close(y, x.dequantize() @ w.dequantize().T, rtol=1e-5, atol=1e-4)
    assert torch.equal(exact.long(), x.integers().long() @ w.integers().long().T)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("q", "p"), [(1, 2), (2, 2), (3, 4), (6, 8), (8, 8)])
def test_and_form(q, p):
    """The identity behind all kernels: products of the integers from the products and sums of the codes."""
    for x_format, w_format in itertools.product(FORMATS, FORMATS):
        x, w = random_planes(2, 77, q, x_format), random_planes(3, 77, p, w_format, 1)
        alpha, beta_x, beta_w, gamma = affine_product(x_format, w_format, q, p)
        ux, uw = unpack_codes(x.planes, 77).long(), unpack_codes(w.planes, 77).long()
        y = alpha * (ux @ uw.T) + beta_x * ux.sum(1)[:, None] + beta_w * uw.sum(1) + 77 * gamma
        assert torch.equal(y, x.integers().long() @ w.integers().long().T)


def test_compiles():
    x, w = random_planes(3, 200, 2, "bipolar"), random_planes(5, 200, 2, "bipolar", 1)
    compiled_product = torch.compile(
        lambda a, b: bit_plane_linear(a, b) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled_product(x, w), bit_plane_linear(x, w) + 1)


def test_refusals():
    x, w = random_planes(2, 200, 2, "bipolar"), random_planes(3, 200, 2, "bipolar")
    with pytest.raises(InvalidArgument, match="expected two BitPlanes"):
        bit_plane_linear(x, w.planes)
    with pytest.raises(InvalidArgument, match="K = 200 and weight with K = 199"):
        bit_plane_linear(x, random_planes(3, 199, 2, "bipolar"))
    with pytest.raises(InvalidArgument, match="without scales"):
        bit_plane_linear(x, w, dtype=torch.float16)
    with pytest.raises(InvalidArgument, match=r"dtype=torch\.int8"):
        bit_plane_linear(x, w, dtype=torch.int8)
    with pytest.raises(InvalidArgument, match="without scales"):
        x.dequantize()
    ones = torch.ones(2, 5, dtype=torch.int64)
    for integers, bits, format, message in [
        (ones, 0, "signed", "1 to 8"),
        (ones, 9, "signed", "1 to 8"),
        (ones, 2, "ternary", "expected one of unsigned, signed, bipolar"),
        (2 * ones, 2, "signed", "expected -2 to 1"),
        (-ones, 3, "unsigned", "expected 0 to 7"),
        (2 * ones, 2, "bipolar", "even"),
        (ones.float(), 2, "signed", "expected an integer matrix"),
        (ones[0], 2, "signed", "expected an integer matrix"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            pack_planes(integers, bits, format)
    with pytest.raises(InvalidArgument, match="multiple of 128"):
        pack_planes(ones, 2, "signed", group_size=64)
    with pytest.raises(InvalidArgument, match=r"expected floats \(2, 1\)"):
        pack_planes(ones, 2, "signed", scale=torch.ones(3))


# --- quantization


@pytest.mark.parametrize("group_size", [-1, 256])
@pytest.mark.parametrize(
    ("format", "bits"), [("bipolar", 2), ("bipolar", 5), ("signed", 2), ("signed", 8), ("unsigned", 3)]
)
def test_quantization_error(format, bits, group_size):
    """Mid-rise: no error above the scale. Rounding: none above half of it."""
    x = torch.randn(5, 1000)
    if format == "unsigned":
        x = x.relu()
    quantized = quantize_bit_planes(x, bits, format, group_size=group_size)
    scale = quantized.scale.repeat_interleave(256, 1)[:, :1000] if group_size > 0 else quantized.scale
    error = (quantized.dequantize() - x).abs()
    assert bool((error <= scale * ((1 if format == "bipolar" else 0.5) + 1e-5)).all())


def test_quantization_of_signs():
    x = torch.randn(4, 333)
    quantized = quantize_bit_planes(x, 1)
    assert torch.equal(quantized.integers(), torch.where(x >= 0, 1, -1).int())
    torch.testing.assert_close(quantized.scale[:, 0], x.abs().mean(1))


@given(exponent=st.integers(-60, 60), seed=st.integers(0, 2**31))
@settings(max_examples=12, deadline=None)
def test_quantization_is_homogeneous_and_odd(exponent, seed):
    x = torch.randn(2, 200, generator=torch.Generator().manual_seed(seed))
    for format, bits in (("bipolar", 3), ("signed", 4)):
        one, other = (
            quantize_bit_planes(x, bits, format),
            quantize_bit_planes(x * 2.0**exponent, bits, format),
        )
        assert torch.equal(one.planes, other.planes)
        assert torch.equal(one.scale * 2.0**exponent, other.scale)
        assert torch.equal(quantize_bit_planes(-x, bits, format).integers(), -one.integers())


def test_zeros_stay_zeros():
    x = torch.randn(3, 256)
    x[1] = 0
    w = quantize_bit_planes(torch.randn(4, 256), 2)
    for format, bits in (("bipolar", 1), ("bipolar", 2), ("signed", 4), ("unsigned", 2)):
        y = bit_plane_linear(quantize_bit_planes(x, bits, format), w)
        assert bool((y[1] == 0).all()) and bool(y.isfinite().all())


def test_quantization_refusals():
    x = torch.randn(2, 5)
    with pytest.raises(InvalidArgument, match="use 'bipolar' for signs"):
        quantize_bit_planes(x, 1, "signed")
    with pytest.raises(InvalidArgument, match="expected floats"):
        quantize_bit_planes(x.int(), 2)
    with pytest.raises(InvalidArgument, match="K > 0"):
        quantize_bit_planes(torch.empty(2, 0), 2)


# --- other processes: instruction sets, the GPU's target


def run(code: str, **environment: str) -> str:
    source = str(Path(operator.reference.__code__.co_filename).parents[3])
    path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**variables, "PYTHONPATH": path, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@compiled
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa):
    code = """
import itertools, torch
from tensormill.ops import bit_plane_linear, use_implementation
from tensormill.ops.bit_planes import pack_planes
from tensormill.ops.bit_plane_linear.cpu import instruction_set
torch.manual_seed(0)
for p, q, length, tokens, rows in itertools.product((1, 3, 8), (1, 4), (1, 129, 1000), (1, 64), (5, 8)):
    x = pack_planes(torch.randint(0, 1 << q, (tokens, length)), q, "unsigned")
    w = pack_planes(2 * torch.randint(0, 1 << p, (rows, length)) - (1 << p) + 1, p, "bipolar")
    with use_implementation(bit_plane_linear="cpu"):
        assert torch.equal(bit_plane_linear(x, w).long(), x.integers().long() @ w.integers().long().T)
print(instruction_set())
"""
    assert run(code, TENSORMILL_CPU_ISA=isa).strip() in (isa, "portable")


COMPILE = """
import importlib, json, re, subprocess, tempfile
from pathlib import Path
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
linear = importlib.import_module("tensormill.ops.bit_plane_linear.triton")
quantize = importlib.import_module("tensormill.ops.quantize_bit_planes.triton")
disassembler = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"

def check(kernel, warps, stages, types, constants):
    names = kernel.arg_names
    signature = {n: types.get(n, "constexpr" if n in constants else "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr") or n == "columns"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    spills = None
    if disassembler.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            text = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True).stdout
        spills = len(re.findall(r"\\b(?:STL|LDL)\\b", text))
    print(json.dumps({"shared": built.metadata.shared, "spills": spills, "wgmma": "wgmma" in built.asm["ptx"]}))

data = {"x_ptr": "*i8", "w_ptr": "*i8", "y_ptr": "*fp16", "x_sums_ptr": "*i32", "w_sums_ptr": "*i32",
        "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32"}
for m, n, warps, stages, steps in ((128, 128, 8, 3, 0),):
    check(linear._gemm_kernel, warps, stages, data,
          {"SCALED": True, "STEPS": steps, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 128, "BAND": 8})
check(quantize._quantize_kernel, 8, 3,
      {"x_ptr": "*bf16", "planes_ptr": "*u8", "sums_ptr": "*i32", "scale_ptr": "*fp32"},
      {"BITS": 2, "FORMAT": 2, "BLOCK": 4096})
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_compile_for_hopper():
    with tempfile.TemporaryDirectory() as folder:
        output = run(COMPILE, TRITON_CACHE_DIR=folder, TRITON_DEFAULT_FP_FUSION="1")
    reports = [json.loads(line) for line in output.splitlines() if re.match(r"\{", line)]
    assert len(reports) == 2
    assert reports[0]["wgmma"]
    for report in reports:
        assert report["shared"] <= 227 << 10, report
        assert report["spills"] in (0, None), report


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a CUDA device")
def test_cuda_graph():
    x = random_planes(33, 1000, 2, "bipolar").to("cuda")
    w = random_planes(300, 1000, 2, "bipolar", 1).to("cuda")
    expected = bit_plane_linear(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bit_plane_linear(x, w)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)

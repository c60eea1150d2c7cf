"""What is special to the Walsh-Hadamard transform; the battery does the comparison with the reference."""

from __future__ import annotations

import importlib.util
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

from emulation.kernels import compile_or_skip, emulate, resources
from tensormill.errors import InvalidArgument
from tensormill.operator import interpreting, use_implementation
from tensormill.ops import OPERATORS, hadamard_transform
from tensormill.ops.correctness import deviation
from tensormill.ops.hadamard_transform import cuda as clusters

operator = OPERATORS["hadamard_transform"]
IMPLEMENTATIONS = [i.name for i in operator.implementations if "cpu" in i.devices and i.missing() is None]
compiled = pytest.mark.skipif("cpu" not in IMPLEMENTATIONS, reason="the C++ kernels are not built")
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def sign_matrix(n: int) -> torch.Tensor:
    """H_n from the closed form (-1)^popcount(i & j), independent of any recursion."""
    index = torch.arange(n)
    common = index[:, None] & index[None, :]
    parity = torch.zeros_like(common)
    while bool(common.any()):
        parity ^= common & 1
        common >>= 1
    return (1 - 2 * parity).double()


def lengths(most_bits: int = 12) -> st.SearchStrategy[int]:
    return st.integers(0, most_bits).map(lambda bits: 1 << bits)


@every_implementation
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 64, 256, 1024])
def test_equals_sign_matrix(implementation, n):
    x = torch.eye(n, dtype=torch.float64)
    with use_implementation(hadamard_transform=implementation):
        assert torch.equal(hadamard_transform(x), sign_matrix(n))


@every_implementation
def test_equals_scipy(implementation):
    linalg = pytest.importorskip("scipy.linalg")
    x = torch.randn(5, 512, dtype=torch.float64)
    expected = x @ torch.from_numpy(linalg.hadamard(512, dtype=float))
    with use_implementation(hadamard_transform=implementation):
        torch.testing.assert_close(hadamard_transform(x), expected, rtol=1e-12, atol=1e-11)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [0, 3, 4, 5, 11, 12, 13, 15, 16, 17])
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_every_split_of_the_compiled_kernel(dtype, bits, threads):
    """Each length at which the C++ kernel changes its plan, alone (threads inside it) and in a batch."""
    for rows in (1, 9):
        x = torch.randn(rows, 1 << bits).to(dtype)
        scale = 2.0 ** (-bits / 2)
        with use_implementation(hadamard_transform="cpu"):
            actual = hadamard_transform(x, scale)
        expected = operator.reference(x.double(), scale)
        assert deviation(actual, expected, operator.tolerance(dtype, {})) is None


@compiled
def test_two_splits():
    """Beyond the second-level cache; impulses, so that the expected values need no second transform."""
    n, at = 1 << 21, 1234567
    x = torch.zeros(2, n)
    x[0, at], x[1, 0] = 3.0, 1.0
    with use_implementation(hadamard_transform="cpu"):
        y = hadamard_transform(x)
    assert torch.equal(y[1], torch.ones(n))
    for j in (0, 1, 4095, 4096, 65537, n - 1):
        assert y[0, j] == 3 * (-1) ** (at & j).bit_count()
    assert torch.equal(y[0].abs(), torch.full((n,), 3.0)) and y[0].sum() == 0


@compiled
@given(n=lengths(13), rows=st.integers(0, 5), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_invariants(n, rows, seed):
    """Involution, linearity, Parseval, symmetry; all exact up to rounding in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, rows, n, generator=generator, dtype=torch.float64)
    with use_implementation(hadamard_transform="cpu"):
        hx, hy = hadamard_transform(x), hadamard_transform(y)
        torch.testing.assert_close(hadamard_transform(hx), n * x)
        torch.testing.assert_close(hadamard_transform(2 * x - 3 * y), 2 * hx - 3 * hy)
        orthonormal = hadamard_transform(x, n**-0.5)
    torch.testing.assert_close(orthonormal.square().sum(), x.square().sum())
    torch.testing.assert_close((hx * y).sum(), (x * hy).sum())


@compiled
@given(bits=st.integers(1, 9), seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_integers_are_exact(bits, seed):
    """Sums of small integers are exact in float32, so all implementations must be equal to the last bit."""
    x = torch.randint(-100, 100, (3, 1 << bits), generator=torch.Generator().manual_seed(seed))
    with use_implementation(hadamard_transform="cpu"):
        actual = hadamard_transform(x.float())
    assert torch.equal(actual.double(), x.double() @ sign_matrix(1 << bits))


@compiled
@given(bits=st.integers(1, 6), seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_dyadic_convolution(bits, seed):
    """H turns convolution over XOR into a product: what makes Gram matrices of digital nets diagonal."""
    n = 1 << bits
    a, b = torch.randn(2, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    index = torch.arange(n)
    direct = (a[index[:, None] ^ index[None, :]] * b[None, :]).sum(-1)
    torch.testing.assert_close(
        hadamard_transform(hadamard_transform(a) * hadamard_transform(b), 1 / n), direct
    )


@every_implementation
def test_gradients(implementation):
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    with use_implementation(hadamard_transform=implementation):
        assert torch.autograd.gradcheck(lambda x: hadamard_transform(x, 0.3), (x,))
        assert torch.autograd.gradgradcheck(lambda x: hadamard_transform(x, 0.3) ** 2, (x,))


@every_implementation
@pytest.mark.parametrize("n", [1, 8, 64])
def test_strided_inputs(implementation, n):
    base = torch.randn(4, n, 6, dtype=torch.float64)
    views = [
        base.transpose(1, 2),
        base.permute(2, 0, 1),
        base.transpose(1, 2)[:, ::2],
        base[:1].transpose(1, 2).expand(5, 6, n),
        base[:, :, 0],
    ]
    with use_implementation(hadamard_transform=implementation):
        for x in views:
            result = hadamard_transform(x)
            torch.testing.assert_close(result, x.contiguous() @ sign_matrix(n))
            assert result.is_contiguous() and result.shape == x.shape


@every_implementation
def test_empty_batch(implementation):
    with use_implementation(hadamard_transform=implementation):
        assert hadamard_transform(torch.empty(3, 0, 8)).shape == (3, 0, 8)


@every_implementation
def test_one_element_is_scaled(implementation):
    with use_implementation(hadamard_transform=implementation):
        assert hadamard_transform(torch.tensor([2.0]), 3).tolist() == [6.0]


@compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_sums_are_rounded_once(dtype):
    """Every bit pattern comes back from length one; sums of many equal the float32 ones, rounded."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    with use_implementation(hadamard_transform="cpu"):
        same = hadamard_transform(patterns[:, None])[:, 0]
        assert torch.equal(same.isnan(), patterns.isnan())
        assert torch.equal(same[~same.isnan()].view(torch.int16), patterns[~same.isnan()].view(torch.int16))
        x = torch.randn(7, 4096).to(dtype)
        actual, wide = hadamard_transform(x, 2**-6), hadamard_transform(x.float(), 2**-6)
    assert torch.equal(actual, wide.to(dtype))


@compiled
def test_subnormal_numbers_are_kept():
    x = torch.full((1, 256), 1e-44)
    with use_implementation(hadamard_transform="cpu"):
        assert hadamard_transform(x)[0, 0] == 256 * x[0, 0]


def test_refusals_say_what_to_do():
    with pytest.raises(
        InvalidArgument, match=r"dimension 12, expected a power of two; .* to 16 or cut it to 8$"
    ):
        hadamard_transform(torch.zeros(2, 12))
    with pytest.raises(InvalidArgument, match=r"to 4 or cut it to 2$"):
        hadamard_transform(torch.zeros(3))
    with pytest.raises(InvalidArgument, match="dimension 0, expected a power of two"):
        hadamard_transform(torch.zeros(3, 0))
    with pytest.raises(
        InvalidArgument, match=r"torch\.int64.*float32, float64, float16, bfloat16.*\.float\(\)"
    ):
        hadamard_transform(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(InvalidArgument, match="complex64"):
        hadamard_transform(torch.zeros(4, dtype=torch.complex64))
    with pytest.raises(InvalidArgument, match="without dimensions"):
        hadamard_transform(torch.tensor(1.0))
    with pytest.raises(InvalidArgument, match="type list"):
        hadamard_transform([1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="scale of type str"):
        hadamard_transform(torch.zeros(4), "1")  # type: ignore[arg-type]


def planted(name: str, y: torch.Tensor) -> torch.Tensor:
    """A result with a mistake that a kernel could make."""
    y = y.clone()
    if name == "tail not written":
        y[-1, -1] = 0
    elif name == "one butterfly's sign":
        y[:, 1] = -y[:, 1]
    elif name == "scale slightly off":
        y *= 1 + 2e-2
    elif name == "a row missed":
        y[3] = 0
    elif name == "sequency order":
        y = y.flip(-1)
    elif name == "a stage skipped":
        y = y.unflatten(-1, (-1, 2)).sum(-1, keepdim=True).expand(-1, -1, 2).flatten(-2)
    return y


@pytest.mark.parametrize(
    "mistake",
    [
        "tail not written",
        "one butterfly's sign",
        "scale slightly off",
        "a row missed",
        "sequency order",
        "a stage skipped",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tolerance_catches_planted_errors(mistake, dtype):
    x = torch.randn(16, 1024, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[-1, :] = x[-1, -1].abs() + 1  # so that the last element is not small by chance
    x[-1, 1::2] *= -1
    x[-1] = x[-1] * torch.from_numpy(1 - 2 * (torch.arange(1024).numpy().astype("int64") >> 1 & 1)).to(dtype)
    correct = hadamard_transform(x, 1 / 32)
    expected = operator.reference(x.double(), 1 / 32)
    tolerance = operator.tolerance(dtype, {})
    assert deviation(correct, expected, tolerance) is None
    if mistake == "tail not written":
        correct[-1, -1] = expected[-1, -1] = 100 * expected.square().mean().sqrt()
    assert deviation(planted(mistake, correct), expected, tolerance) is not None


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
    """The paths of machines without AVX-512, in a process of their own: the choice is made once a process."""
    code = """
import torch
from tensormill.ops import OPERATORS, hadamard_transform, use_implementation
from tensormill.ops.correctness import deviation
from tensormill.ops.hadamard_transform.cpu import instruction_set
operator = OPERATORS["hadamard_transform"]
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for bits in [*range(14), 17]:
        x = torch.randn(1 if bits > 16 else 5, 1 << bits).to(dtype)
        with use_implementation(hadamard_transform="cpu"):
            y = hadamard_transform(x, 2 ** (-bits / 2))
        wrong = deviation(y, operator.reference(x.double(), 2 ** (-bits / 2)), operator.tolerance(dtype, {}))
        assert wrong is None, (dtype, bits, wrong)
for dtype in (torch.float16, torch.bfloat16):
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    with use_implementation(hadamard_transform="cpu"):
        y = hadamard_transform(patterns[:, None], 0.3)[:, 0]
    torch.testing.assert_close(y, (patterns.float() * 0.3).to(dtype), rtol=0, atol=0, equal_nan=True)
print(instruction_set())
"""
    available = run(code, TENSORMILL_CPU_ISA=isa).strip()
    assert available in (isa, "portable")


def test_triton_ring_of_intermediate_results():
    """Columns and rows taken in turn, with as few slots as there can be: what a large batch does on a GPU."""
    pytest.importorskip("triton")
    code = """
import torch
from tensormill.ops.hadamard_transform import triton as kernels
torch.manual_seed(0)
kernels.LONGEST_ROW = {4: 4096, 8: 4096}
for ahead in (0, 1, 2):
    kernels.AHEAD_BYTES = ahead * 8192 * 4
    for dtype in (torch.float16, torch.float32):
        x = torch.randn(5, 8192).to(dtype)
        y = kernels.hadamard_transform(x, 8192**-0.5)
        back = kernels.hadamard_transform(y, 8192**-0.5)
        assert (back - x).abs().max() < (1e-2 if dtype == torch.float16 else 1e-5), (ahead, dtype)
"""
    run(code, TRITON_INTERPRET="1", TRITON_DEFAULT_FP_FUSION="1")


def test_triton_geometry():
    """Every length up to 2^26 has a plan whose tasks cover the transform and whose tiles fit."""
    pytest.importorskip("triton")
    from tensormill.ops.hadamard_transform import triton as kernels

    for size, most in ((4, 26), (8, 24)):
        for bits in range(most + 1):
            n = 1 << bits
            if n <= kernels.LONGEST_ROW[size]:
                for count in (1, 1000, 1 << 20):
                    rows, warps = kernels.row_geometry(n, count)
                    assert rows * n * size <= 128 << 10 and 4 <= warps <= 32
                continue
            n1, n2, warps = kernels.long_geometry(n, size)
            assert (
                n1 * n2 == n and n2 // n1 >= kernels.LEAST_COLUMNS and n2 * size <= 128 << 10 and warps <= 32
            )
        assert kernels.long_geometry(2 << most, size) is None


COMPILE = """
import importlib, json, re, subprocess, sys, tempfile
from pathlib import Path
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
kernels = importlib.import_module("tensormill.ops.hadamard_transform.triton")
disassembler = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"

def check(kernel, dtype, warps, types, constants):
    names = kernel.arg_names
    signature = {n: types.get(n, "constexpr" if n in constants else "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    spills = None
    if disassembler.exists():
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            text = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True).stdout
        spills = len(re.findall(r"\\b(?:STL|LDL)\\b", text))
    exchanges = built.asm["ttgir"].count("ttg.convert_layout")
    wide = bool(re.search(r"ld\\.global\\S*\\.(?:v4\\.b32|v2\\.b64)", built.asm["ptx"]))
    print(json.dumps({"shared": built.metadata.shared, "spills": spills, "exchanges": exchanges, "wide": wide,
                      "target": ".target sm_90" in built.asm["ptx"]}))

def kind(dtype):
    return tl.float64 if dtype == "fp64" else tl.float32

scales = {"scale": "fp32", "scale_rest": "fp32"}
for n, count, dtype in ((128, 65536, "bf16"), (4096, 4096, "fp32"), (4096, 4096, "fp16"), (8192, 64, "fp64")):
    rows, warps = kernels.row_geometry(n, count)
    check(kernels._rows_kernel, dtype, warps, {"x_pointer": "*" + dtype, "y_pointer": "*" + dtype, **scales},
          {"N": n, "STAGES": n.bit_length() - 1, "ROWS": rows, "ACCUMULATOR": kind(dtype)})
for n, dtype in ((1 << 18, "fp32"), (1 << 18, "bf16"), (1 << 24, "fp32"), (1 << 20, "fp64")):
    n1, n2, warps = kernels.long_geometry(n, 8 if dtype == "fp64" else 4)
    work = "*fp64" if dtype == "fp64" else "*fp32"
    ends = {"x_pointer": "*" + dtype, "y_pointer": "*" + dtype}
    types = {**ends, "work_pointer": work, "counters": "*i32", **scales}
    check(kernels._long_kernel, dtype, warps, types,
          {"N1": n1, "N2": n2, "STAGES1": n1.bit_length() - 1, "STAGES2": n2.bit_length() - 1,
           "ACCUMULATOR": kind(dtype), "LIMIT": 1 << 20})
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_compiles_for_hopper():
    """For sm_90, without a GPU: 16-byte loads, few exchanges, nothing spilled, shared memory that fits."""
    with tempfile.TemporaryDirectory() as folder:
        output = run(COMPILE, TRITON_CACHE_DIR=folder, TRITON_DEFAULT_FP_FUSION="1")
    reports = [json.loads(line) for line in output.splitlines() if re.match(r"\{", line)]
    assert len(reports) == 8
    for report in reports:
        assert report["target"] and report["wide"], report
        assert report["shared"] <= 227 << 10, report
        assert report["spills"] in (0, None), report
        assert report["exchanges"] <= 6, report  # three a row; a long transform has columns and rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("log_n", [15, 16, 17, 18])
def test_clusters_emulated(dtype, log_n):
    x = torch.randn(2, 1 << log_n).to(dtype)
    y = torch.full_like(x, float("nan"))
    scale = 0.3 * 2.0 ** (-log_n / 2)
    kernel = emulate(clusters.module(dtype, log_n), "hadamard_cluster")
    clusters.launch(kernel, x, y, scale)
    expected = operator.reference(x.double(), scale)
    assert deviation(y, expected, operator.tolerance(dtype, {})) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("log_n", [15, 16, 17, 18])
def test_clusters_compile_without_spills(dtype, log_n):
    used = resources(compile_or_skip(clusters.module(dtype, log_n), "sm_90a"))["hadamard_cluster"]
    assert used.stack == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a CUDA device")
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("rows", "bits"), [(3, 15), (200, 15), (100, 18), (5, 20), (2, 23), (1, 24)])
    def test_long_transforms(self, dtype, rows, bits):
        x = torch.randn(rows, 1 << bits, device="cuda").to(dtype)
        scale = 2.0 ** (-bits / 2)
        with use_implementation(hadamard_transform="triton"):
            results = [hadamard_transform(x, scale) for _ in range(3)]
        expected = operator.reference(x.double(), scale)
        for result in results:  # several times: a race would not show every time
            assert deviation(result, expected, operator.tolerance(dtype, {})) is None

    def test_longest(self):
        x = torch.zeros(1, 1 << 26, device="cuda")
        x[0, 0] = 1
        with use_implementation(hadamard_transform="triton"):
            assert bool((hadamard_transform(x) == 1).all())

    def test_cuda_graph(self):
        x = torch.randn(20, 1 << 16, device="cuda")
        with use_implementation(hadamard_transform="triton"):
            expected = hadamard_transform(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = hadamard_transform(x)
            for _ in range(3):
                y.zero_()
                graph.replay()
                assert torch.equal(y, expected)

    def test_more_than_two_to_the_31_elements(self):
        if torch.cuda.mem_get_info()[0] < 20 << 30:
            pytest.skip("needs 20 GiB of free device memory")
        x = torch.zeros((1 << 19) + 1, 4096, device="cuda", dtype=torch.float16)
        x[-1, 0] = 1
        with use_implementation(hadamard_transform="triton"):
            y = hadamard_transform(x)
        assert bool((y[-1] == 1).all()) and not bool(y[:-1:4097].any())

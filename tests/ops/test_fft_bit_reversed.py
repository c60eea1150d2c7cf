"""What is special to the bit-reversed Fourier transform; the battery does the comparison with the reference."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.errors import InvalidArgument
from tensormill.operator import use_implementation
from tensormill.ops import OPERATORS, fft_bit_reversed
from tensormill.ops.correctness import deviation

operator = OPERATORS["fft_bit_reversed"]
IMPLEMENTATIONS = [i.name for i in operator.implementations if "cpu" in i.devices and i.missing() is None]
compiled = pytest.mark.skipif("cpu" not in IMPLEMENTATIONS, reason="the C++ kernels are not built")
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
both_directions = pytest.mark.parametrize("inverse", [False, True])


def reverse(i: int, bits: int) -> int:
    return int(f"{i:0{bits}b}"[::-1], 2) if bits else 0


def matrix(n: int, inverse: bool) -> torch.Tensor:
    """The transform by its definition, from exponents reduced to whole turns, independent of any recursion."""
    bits = n.bit_length() - 1
    times = torch.tensor([reverse(i, bits) for i in range(n)])
    turns = (torch.arange(n)[:, None] * times % n).double() / n
    forward = torch.polar(torch.ones_like(turns), -2 * math.pi * turns)
    return forward.mH if inverse else forward


def extended_fft(x: np.ndarray, inverse: bool) -> np.ndarray:
    """A decimation in time in the longest float there is, with an explicit permutation; x is (n,)."""
    sign = 1 if inverse else -1
    n, bits = len(x), len(x).bit_length() - 1
    order = np.array([reverse(i, bits) for i in range(n)])
    y = x.astype(np.clongdouble)[order] if inverse else x.astype(np.clongdouble)
    half = 1
    while half < n:
        angle = np.arange(half, dtype=np.longdouble) / half * (4 * np.arctan(np.longdouble(1)))
        factor = np.cos(angle) + sign * 1j * np.sin(angle)
        blocks = y.reshape(-1, 2, half)
        second = blocks[:, 1] * factor
        y = np.stack([blocks[:, 0] + second, blocks[:, 0] - second], 1).reshape(-1)
        half *= 2
    return y[order] if inverse else y


def complex_normal(
    *shape: int, dtype: torch.dtype = torch.complex128, seed: int | None = None
) -> torch.Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.complex128, generator=generator).to(dtype)


def wrong(actual: torch.Tensor, expected: torch.Tensor) -> str | None:
    parts = torch.view_as_real(actual)
    return deviation(parts, torch.view_as_real(expected), operator.tolerance(parts.dtype, {}))


@every_implementation
@both_directions
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 64, 256, 1024])
def test_equals_its_definition(implementation, inverse, n):
    x = complex_normal(3, n)
    with use_implementation(fft_bit_reversed=implementation):
        actual = fft_bit_reversed(x, inverse, 0.5)
    assert wrong(actual, 0.5 * (x @ matrix(n, inverse).mT)) is None


@compiled
@both_directions
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("bits", [0, 3, 4, 6, 7, 10, 14, 15, 16, 18])
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_every_split_of_the_compiled_kernel(dtype, bits, inverse, threads):
    """Each length at which the C++ kernel changes its plan, alone (threads inside it) and in a batch."""
    for rows in (1, 9) if bits < 18 else (1,):
        x = complex_normal(rows, 1 << bits, dtype=dtype)
        with use_implementation(fft_bit_reversed="cpu"):
            actual = fft_bit_reversed(x, inverse, 2.0 ** (-bits / 2))
        expected = operator.reference(torch.view_as_real(x.to(torch.complex128)), inverse, 2.0 ** (-bits / 2))
        assert wrong(actual, torch.view_as_complex(expected)) is None


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [0, 2, 5, 6, 7, 8, 11, 15, 16, 17, 18])
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_real_samples(dtype, bits, threads):
    """As complex ones without an imaginary part, and symmetric to the last bit."""
    n = 1 << bits
    for rows in (1, 9) if bits < 18 else (1,):
        x = torch.randn(rows, n, dtype=dtype)
        with use_implementation(fft_bit_reversed="cpu"):
            actual, complex_samples = (
                fft_bit_reversed(x, False, n**-0.5),
                fft_bit_reversed(x + 0j, False, n**-0.5),
            )
            back = fft_bit_reversed(actual.real.contiguous(), True)
        assert wrong(actual, complex_samples.to(torch.complex128)) is None
        assert torch.equal(actual[:, 1:], actual[:, 1:].flip(-1).conj()) or n < 64
        torch.testing.assert_close(back, fft_bit_reversed(actual.real + 0j, True))


@compiled
def test_threads_do_not_change_a_bit():
    x = complex_normal(3, 1 << 17)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with use_implementation(fft_bit_reversed="cpu"):
                results.append([fft_bit_reversed(x[:1]), fft_bit_reversed(x), fft_bit_reversed(x, True)])
                results[-1].append(fft_bit_reversed(x[:1].real))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
@both_directions
def test_accuracy_of_a_long_transform(inverse):
    """Against a transform in extended precision: the error grows like the square root of log n, as it should."""
    if np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps:
        pytest.skip("no float longer than float64 here")
    n = 1 << 16
    for dtype in (torch.complex64, torch.complex128):
        x = complex_normal(n, dtype=dtype)
        with use_implementation(fft_bit_reversed="cpu"):
            actual = fft_bit_reversed(x, inverse).to(torch.complex128).numpy()
        expected = extended_fft(x.numpy(), inverse)
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert error < math.sqrt(math.log2(n)) * torch.finfo(dtype).eps


@compiled
@pytest.mark.parametrize("bits", [20, 21])
def test_impulses_of_long_transforms(bits):
    """One sample: every frequency is a root of unity, known without another transform."""
    n, at = 1 << bits, 345678
    x = torch.zeros(n, dtype=torch.complex128)
    x[at] = 1
    with use_implementation(fft_bit_reversed="cpu"):
        y = fft_bit_reversed(x)
        back = fft_bit_reversed(y, True, 1 / n)
    turns = (torch.arange(n) * reverse(at, bits) % n).double() / n
    torch.testing.assert_close(
        y, torch.polar(torch.ones_like(turns), -2 * math.pi * turns), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(back, x, rtol=0, atol=1e-15)


@compiled
@given(bits=st.integers(0, 13), rows=st.integers(0, 5), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_invariants(bits, rows, seed):
    """Inverse, linearity over the complex numbers, Parseval, adjointness."""
    n = 1 << bits
    x, y = complex_normal(2, rows, n, seed=seed)
    with use_implementation(fft_bit_reversed="cpu"):
        fx, fy = fft_bit_reversed(x), fft_bit_reversed(y)
        torch.testing.assert_close(fft_bit_reversed(fx, True, 1 / n), x)
        torch.testing.assert_close(fft_bit_reversed(2j * x - 3 * y), 2j * fx - 3 * fy)
        adjoint = fft_bit_reversed(y, True)
        orthonormal = fft_bit_reversed(x, False, n**-0.5)
    torch.testing.assert_close(orthonormal.abs().square().sum(), x.abs().square().sum())
    torch.testing.assert_close((fx.conj() * y).sum(), (x.conj() * adjoint).sum())


@every_implementation
@both_directions
def test_gradients(implementation, inverse):
    x = complex_normal(3, 16).requires_grad_()
    with use_implementation(fft_bit_reversed=implementation):
        assert torch.autograd.gradcheck(lambda x: fft_bit_reversed(x, inverse, 0.3), (x,))
        assert torch.autograd.gradgradcheck(lambda x: fft_bit_reversed(x, inverse, 0.3) ** 2, (x,))
        real = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: fft_bit_reversed(x, inverse, 0.3), (real,))


@every_implementation
@both_directions
@pytest.mark.parametrize("n", [1, 8, 64])
def test_views(implementation, inverse, n):
    """Strides, expanded dimensions, conjugate views, storage that is not aligned."""
    base = complex_normal(4, n, 6)
    views = [
        base.transpose(1, 2),
        base.transpose(1, 2)[:, ::2],
        base[:1].transpose(1, 2).expand(5, 6, n),
        base[:, :, 0].conj(),
        base.flatten()[1 : 1 + 3 * n].view(3, n),
    ]
    with use_implementation(fft_bit_reversed=implementation):
        for x in views:
            result = fft_bit_reversed(x, inverse)
            torch.testing.assert_close(result, x.resolve_conj() @ matrix(n, inverse).mT)
            assert result.is_contiguous() and result.shape == x.shape


@every_implementation
def test_empty_batch(implementation):
    with use_implementation(fft_bit_reversed=implementation):
        assert fft_bit_reversed(torch.empty(3, 0, 8, dtype=torch.complex64)).shape == (3, 0, 8)


def test_compiles():
    x = complex_normal(2, 64)
    compiled_function = torch.compile(
        lambda x: fft_bit_reversed(x, False, 0.125) * 2, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled_function(x), fft_bit_reversed(x, False, 0.25))


def test_refusals_say_what_to_do():
    z = torch.zeros(2, 12, dtype=torch.complex64)
    with pytest.raises(InvalidArgument, match=r"dimension 12, expected a power of two; take"):
        fft_bit_reversed(z)
    with pytest.raises(InvalidArgument, match="dimension 0, expected a power of two"):
        fft_bit_reversed(z[:, :0])
    with pytest.raises(InvalidArgument, match=r"torch\.int64, expected one of complex64.*\.float\(\)"):
        fft_bit_reversed(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(InvalidArgument, match="without dimensions"):
        fft_bit_reversed(torch.tensor(1j))
    with pytest.raises(InvalidArgument, match="type list"):
        fft_bit_reversed([1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="scale of type str"):
        fft_bit_reversed(z[:, :4], scale="1")  # type: ignore[arg-type]


def planted(name: str, y: torch.Tensor) -> torch.Tensor:
    """A result with a mistake that a kernel could make."""
    y = y.clone()
    if name == "tail not written":
        y[-1, -1] = 0
    elif name == "one factor's sign":
        y[:, 1] = y[:, 1].conj()
    elif name == "real and imaginary parts exchanged":
        y = torch.complex(y.imag, y.real)
    elif name == "conjugate factors":
        y = torch.cat([y[:, :1], y[:, 1:].flip(-1)], -1)
    elif name == "a factor in lower precision":
        y[:, y.shape[-1] // 2 :] *= 1 + 1e-3
    return y


@pytest.mark.parametrize(
    "mistake",
    [
        "tail not written",
        "one factor's sign",
        "real and imaginary parts exchanged",
        "conjugate factors",
        "a factor in lower precision",
    ],
)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_tolerance_catches_planted_errors(mistake, dtype):
    x = complex_normal(16, 1024, dtype=dtype, seed=1)
    correct = fft_bit_reversed(x, False, 1 / 32)
    expected = torch.view_as_complex(
        operator.reference(torch.view_as_real(x.to(torch.complex128)), False, 1 / 32)
    )
    assert wrong(correct, expected) is None
    assert wrong(planted(mistake, correct), expected) is not None


@compiled
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa):
    """The paths of machines without AVX-512, in a process of their own: the choice is made once a process."""
    code = """
import torch
from tensormill.ops import OPERATORS, use_implementation
from tensormill.ops.correctness import deviation
from tensormill.ops.fft_bit_reversed.cpu import instruction_set
operator = OPERATORS["fft_bit_reversed"]
for dtype in (torch.float32, torch.float64):
    for bits in [*range(14), 17]:
        for inverse in (False, True):
            for parts in (1, 2):
                x = torch.randn(1 if bits > 16 else 5, 1 << bits, parts).to(dtype)
                with use_implementation(fft_bit_reversed="cpu"):
                    y = operator(x, inverse, 2 ** (-bits / 2))
                expected = operator.reference(x.double(), inverse, 2 ** (-bits / 2))
                wrong = deviation(y, expected, operator.tolerance(dtype, {}))
                assert wrong is None, (dtype, bits, inverse, parts, wrong)
print(instruction_set())
"""
    source = str(Path(operator.reference.__code__.co_filename).parents[3])
    path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TENSORMILL_CPU_ISA": isa},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() in (isa, "portable")

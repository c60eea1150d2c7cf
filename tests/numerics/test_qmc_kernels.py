import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.errors import InvalidArgument
from tensormill.numerics import qmc
from tensormill.numerics.gaussian_process import DenseGram, GaussianProcess, Gram, leave_one_out
from tensormill.numerics.gaussian_process import log_marginal_likelihood as likelihood

PAIRS = [
    ("lattice", qmc.ShiftInvariantKernel, range(1, 6)),
    ("net", qmc.DigitalShiftInvariantKernel, range(1, 5)),
    ("higher order net", qmc.DigitalShiftInvariantKernel, range(1, 5)),
]
CASES = [(kind, make, alpha) for kind, make, orders in PAIRS for alpha in orders]


def sequence(kind, d, seed=0):
    if kind == "lattice":
        return qmc.Lattice(d, seed=seed)
    return qmc.DigitalNet(d, seed=seed, alpha=2 if kind == "higher order net" else 1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# transforms


@pytest.mark.parametrize("n", [1, 2, 8, 256, 2048])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_fftbr_is_the_transform_of_reordered_samples(n, dtype):
    x = normal(3, n).to(dtype)
    bits = n.bit_length() - 1
    order = [int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(n)]
    expected = torch.fft.fft(x[:, order].to(torch.complex128), norm="ortho")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    ours = qmc.fftbr(x)
    torch.testing.assert_close(ours.to(torch.complex128), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(qmc.ifftbr(ours), x.to(ours.dtype), rtol=tolerance, atol=tolerance)


def test_transforms_equal_qmcpy():
    qmcpy = pytest.importorskip("qmcpy")
    x = normal(2, 512)
    np.testing.assert_allclose(qmc.fftbr(x).numpy(), qmcpy.fftbr(x.numpy()), rtol=0, atol=1e-13)
    np.testing.assert_allclose(qmc.fwht(x).numpy(), qmcpy.fwht(x.numpy()), rtol=0, atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(0, 9), kind=st.sampled_from(["fftbr", "fwht"]), seed=st.integers(0, 1000))
def test_doubling_is_the_transform_of_everything(bits, kind, seed):
    x = normal(2, 2 << bits, seed=seed)
    transform = {"fftbr": qmc.fftbr, "fwht": qmc.fwht}[kind]
    n = 1 << bits
    merged = qmc.merge_doubling(transform(x[:, :n]), transform(x[:, n:]), kind)
    torch.testing.assert_close(merged, transform(x), rtol=1e-12, atol=1e-12)


def test_transforms_have_gradients():
    x = normal(8).requires_grad_()
    assert torch.autograd.gradcheck(qmc.fwht, (x,))
    assert torch.autograd.gradcheck(lambda v: torch.view_as_real(qmc.fftbr(v)), (x,))
    assert torch.autograd.gradgradcheck(lambda v: qmc.fftbr(v).abs().square() * v, (x,))
    z = torch.complex(normal(8), normal(8, seed=1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: torch.view_as_real(qmc.ifftbr(v)), (z,))


# kernels


@pytest.mark.parametrize("alpha", range(1, 6))
def test_bernoulli_kernels_are_their_fourier_series(alpha):
    special = pytest.importorskip("scipy.special")
    delta = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(alpha))
    ours = qmc.bernoulli_kernel(delta, alpha)
    numbers = special.bernoulli(2 * alpha)
    polynomial = sum(
        special.comb(2 * alpha, k) * numbers[2 * alpha - k] * delta**k for k in range(2 * alpha + 1)
    )
    factor = (-1) ** (alpha + 1) * (2 * math.pi) ** (2 * alpha) / math.factorial(2 * alpha)
    torch.testing.assert_close(ours, factor * polynomial, rtol=1e-9, atol=1e-9 * abs(factor))
    h = torch.arange(1, 20_000, dtype=torch.float64)
    series = (2 * h ** (-2 * alpha) * torch.cos(2 * math.pi * h * delta[:, None])).sum(-1)
    tail = 2 * 20_000 ** (1 - 2 * alpha) / (2 * alpha - 1)
    torch.testing.assert_close(ours, series, rtol=0, atol=tail + 1e-11)


@pytest.mark.parametrize("alpha", range(1, 5))
def test_walsh_kernels_are_their_walsh_series(alpha):
    """The sum over k of wal_k weighted by the alpha highest digits; order 1: twice that of 2^(-2 highest)."""
    bits = 12
    delta = torch.cat(
        [torch.tensor([0]), torch.randint(0, 1 << bits, (60,), generator=torch.Generator().manual_seed(3))]
    )
    series = torch.zeros(len(delta), dtype=torch.float64)
    for k in range(1, 1 << bits):
        positions = [p + 1 for p in range(bits) if k >> p & 1][::-1]
        weight = 2.0 ** -sum(positions[:alpha]) if alpha > 1 else 4.0 ** -positions[0]
        sign = torch.zeros(len(delta), dtype=torch.int64)
        for p in positions:
            sign ^= (delta >> (bits - p)) & 1
        series += weight * (1 - 2 * sign)
    ours = qmc.walsh_kernel(delta.double() / (1 << bits), alpha)
    if (
        alpha == 1
    ):  # the series with 2^(-2 mu) sums to a third of it... of the same shape: normalised to 1 at 0
        series = series / series[0]
        torch.testing.assert_close(ours, series, rtol=0, atol=2e-3)
        return
    tail = {1: 5e-4, 2: 2.0e-3, 3: 8e-4, 4: 7e-4}[alpha]
    torch.testing.assert_close(ours, series, rtol=0, atol=tail)


@pytest.mark.parametrize("alpha", range(1, 5))
def test_walsh_kernels_integrate_to_zero_and_have_their_values_at_zero(alpha):
    grid = (torch.arange(1 << 16, dtype=torch.float64)) / (1 << 16)
    assert abs(qmc.walsh_kernel(grid, alpha).mean().item()) < 3e-4
    at_zero = qmc.walsh_kernel(torch.zeros(1, dtype=torch.float64), alpha).item()
    assert at_zero == pytest.approx([1, 3 / 2, 25 / 18, 407 / 294][alpha - 1], abs=1e-15)


@pytest.mark.parametrize("alpha", range(1, 6))
def test_bernoulli_kernels_integrate_to_zero(alpha):
    grid = torch.arange(1 << 12, dtype=torch.float64) / (1 << 12)
    assert abs(qmc.bernoulli_kernel(grid, alpha).mean().item()) < 1e-6


@pytest.mark.parametrize("alpha", range(1, 5))
def test_kernels_equal_qmcpy(alpha):
    qmcpy = pytest.importorskip("qmcpy")
    x = qmc.DigitalNet(3, seed=alpha).sample(32)
    theirs = qmcpy.KernelShiftInvar(3, alpha=alpha)(x.numpy()[:, None], x.numpy()[None])
    ours = qmc.ShiftInvariantKernel(3, alpha)(x, x).detach().numpy()
    np.testing.assert_allclose(ours, np.asarray(theirs), rtol=1e-12, atol=1e-12)
    words = (x.numpy() * 2.0**52).astype(np.uint64)
    theirs = qmcpy.KernelDigShiftInvar(3, t=52, alpha=alpha)(words[:, None], words[None])
    ours = qmc.DigitalShiftInvariantKernel(3, alpha)(x, x).detach().numpy()
    # order 4 of theirs leaves out what is below 1e-8
    np.testing.assert_allclose(ours, np.asarray(theirs), rtol=1e-12, atol=1e-8 if alpha == 4 else 1e-12)


@settings(max_examples=20, deadline=None)
@given(case=st.sampled_from(CASES), seed=st.integers(0, 1000), d=st.integers(1, 4))
def test_kernels_depend_on_differences_alone_and_are_positive(case, seed, d):
    kind, make, alpha = case
    kernel = make(d, alpha)
    x = torch.rand(24, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    shift = torch.rand(d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    if kind == "lattice":
        moved = torch.frac(x + shift)
    else:
        moved = ((x * 2.0**52).long() ^ (shift * 2.0**52).long()).double() / 2.0**52
    matrix = kernel(x, x)
    torch.testing.assert_close(kernel(moved, moved), matrix, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(matrix, matrix.mT)
    torch.testing.assert_close(kernel.diagonal(x), matrix.diagonal())
    eigenvalues = torch.linalg.eigvalsh(matrix.detach())
    assert eigenvalues[0] > -1e-11 * eigenvalues[-1]


def test_mixtures_are_convex_combinations_in_every_dimension():
    x = torch.rand(9, 1, dtype=torch.float64)
    for make in (qmc.ShiftInvariantKernel, qmc.DigitalShiftInvariantKernel):
        kernel = make(1, (1, 2, 4), weights=0.7, scale=3.0)
        single = [make(1, alpha, weights=0.7, scale=3.0)(x, x) for alpha in (1, 2, 4)]
        torch.testing.assert_close(kernel(x, x), sum(single) / 3)
        mixed = make(3, (1, 2))
        points = (qmc.Lattice if mixed.structure == "lattice" else qmc.DigitalNet)(3, seed=1).points(64)
        assert qmc.FastGram(points, mixed).eigenvalues.min() > 0


def test_kernels_have_gradients():
    x, z = torch.rand(4, 2, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    for make in (qmc.ShiftInvariantKernel, qmc.DigitalShiftInvariantKernel):
        kernel = make(2, (2, 3))
        names = ("log_weights", "log_scale", "mixture_logits")

        def matrix(*values, kernel=kernel, names=names):
            return torch.func.functional_call(kernel, dict(zip(names, values, strict=True)), (x, z.detach()))

        start = tuple(getattr(kernel, name).detach().requires_grad_() for name in names)
        assert torch.autograd.gradcheck(matrix, start)
    kernel = qmc.ShiftInvariantKernel(2, 2).requires_grad_(False)
    assert torch.autograd.gradcheck(lambda v: kernel(x, v), (z,))


# Gram matrices


@pytest.mark.parametrize(("kind", "make", "alpha"), CASES)
@pytest.mark.parametrize("n", [1, 2, 64, 512])
def test_fast_equals_dense(kind, make, alpha, n):
    kernel = make(3, alpha, weights=[0.8, 0.3, 0.1], scale=1.7)
    gram = qmc.FastGram(sequence(kind, 3, n).points(n), kernel, 1e-3)
    dense = DenseGram(gram.to_dense())
    assert isinstance(gram, Gram) and gram.size == n
    for y in (normal(n), normal(n, 3)):
        torch.testing.assert_close(gram.matmul(y), dense.matmul(y), rtol=1e-10, atol=1e-10 * n)
        torch.testing.assert_close(
            gram.solve(y), dense.solve(y), rtol=1e-7, atol=1e-7 * float(y.abs().max()) / 1e-3
        )
        torch.testing.assert_close(gram.matmul(gram.solve(y)), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gram.logdet(), dense.logdet(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gram.inverse_diagonal(), dense.inverse_diagonal(), rtol=1e-8, atol=1e-6)
    y = normal(n)
    for ours, expected in zip(leave_one_out(gram, y), leave_one_out(dense, y), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("randomize", ["lms_ds", "lms", "ds", None])
def test_every_linear_randomisation_keeps_the_structure(randomize):
    kernel = qmc.DigitalShiftInvariantKernel(4, 2)
    gram = qmc.FastGram(qmc.DigitalNet(4, randomize=randomize, seed=5).points(256), kernel)
    y = normal(256)
    torch.testing.assert_close(gram.matmul(y), gram.to_dense() @ y, rtol=1e-10, atol=1e-8)
    lattice = qmc.FastGram(qmc.Lattice(4, shift=False).points(256), qmc.ShiftInvariantKernel(4, 2))
    torch.testing.assert_close(lattice.matmul(y), lattice.to_dense() @ y, rtol=1e-10, atol=1e-8)
    complex_y = torch.complex(y, normal(256, seed=1))
    torch.testing.assert_close(lattice.matmul(complex_y), lattice.to_dense().to(complex_y.dtype) @ complex_y)


@pytest.mark.parametrize(("kind", "make", "alpha"), CASES[::2])
def test_extending_is_starting_anew(kind, make, alpha):
    kernel, points = make(2, alpha), sequence(kind, 2).points(64)
    extended = qmc.FastGram(points, kernel, 0.1).extend().extend()
    anew = qmc.FastGram(points.doubled().doubled(), kernel, 0.1)
    torch.testing.assert_close(extended.eigenvalues, anew.eigenvalues, rtol=1e-10, atol=1e-10)
    assert extended.size == 256


@pytest.mark.parametrize(("kind", "make", "alpha"), CASES[1::3])
def test_gradients_reach_every_hyperparameter(kind, make, alpha):
    kernel, points, y = make(2, alpha), sequence(kind, 2).points(16), normal(16)

    def value(log_weights, log_scale, noise, target):
        parameters = {"log_weights": log_weights, "log_scale": log_scale}
        with torch.nn.utils.stateless._reparametrize_module(kernel, parameters):
            return likelihood(qmc.FastGram(points, kernel, noise), target)

    start = (
        kernel.log_weights.detach().requires_grad_(),
        kernel.log_scale.detach().requires_grad_(),
        torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
        y.requires_grad_(),
    )
    assert torch.autograd.gradcheck(value, start)
    expected = likelihood(DenseGram(kernel(points, points), 0.3), y)
    torch.testing.assert_close(value(*start), expected)


@pytest.mark.parametrize("kind", ["lattice", "net"])
def test_gaussian_process_on_structured_points_is_the_dense_one(kind):
    kernel = (qmc.ShiftInvariantKernel if kind == "lattice" else qmc.DigitalShiftInvariantKernel)(2, 2)
    points = sequence(kind, 2).points(128)
    x = points.values
    y = torch.sin(2 * math.pi * x[:, 0]) + x[:, 1] * (1 - x[:, 1])
    new = torch.rand(11, 2, dtype=torch.float64)
    fast = GaussianProcess(kernel, 1e-3, mean="constant").fit(points, y).predict(new, variance=True)
    dense = GaussianProcess(lambda a, b: kernel(a, b).detach(), 1e-3, mean="constant")
    dense = dense.fit(x, y).predict(new, variance=True)
    torch.testing.assert_close(fast.mean, dense.mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(fast.variance, dense.variance, rtol=1e-6, atol=1e-8)


def test_learning_on_structured_points_finds_the_dimension_that_matters():
    kernel = qmc.ShiftInvariantKernel(3, 2)
    points = qmc.Lattice(3, seed=4).points(256)
    y = torch.sin(2 * math.pi * points.values[:, 1])
    process = GaussianProcess(kernel, 1e-4, learn_noise=True)
    before = process.log_marginal_likelihood(points, y).item()
    process.fit(points, y, 60)
    assert process.log_marginal_likelihood(points, y).item() > before
    weights = kernel.log_weights.exp()
    assert weights[1] > 10 * weights[0] and weights[1] > 10 * weights[2]
    again = qmc.ShiftInvariantKernel(3, 2)
    again.load_state_dict(kernel.state_dict())
    assert torch.equal(again.log_weights, kernel.log_weights)


def test_negative_eigenvalues_are_reported():
    kernel = qmc.ShiftInvariantKernel(1, 5, weights=1.0)
    with pytest.raises(InvalidArgument, match=r"smallest eigenvalue.*add noise of"):
        qmc.FastGram(qmc.Lattice(1, seed=1).points(4096), kernel)
    qmc.FastGram(qmc.Lattice(1, seed=1).points(4096), kernel, 1e-6)


SI, DSI = qmc.ShiftInvariantKernel(2), qmc.DigitalShiftInvariantKernel(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: qmc.FastGram(qmc.DigitalNet(2, randomize="nus").points(8), DSI),
            "randomize='nus'.*no group",
        ),
        (lambda: qmc.FastGram(qmc.Halton(2).points(8), DSI), "given Halton points"),
        (lambda: qmc.FastGram(qmc.DigitalNet(2).points(8), SI), "take DigitalShiftInvariantKernel"),
        (lambda: qmc.FastGram(qmc.Lattice(2).points(8), DSI), "take ShiftInvariantKernel"),
        (lambda: qmc.FastGram(qmc.Lattice(3).points(8), SI), "kernel of 2 dimensions for points of 3"),
        (lambda: qmc.FastGram(qmc.Lattice(2, order="gray").points(8), SI), "order 'gray'"),
        (
            lambda: qmc.FastGram(qmc.DigitalNet(2, dtype=torch.float32).points(8), DSI),
            "float32, expected float64",
        ),
        (lambda: qmc.FastGram(torch.rand(8, 2), SI), "know their structure"),
        (lambda: qmc.FastGram(qmc.Lattice(2).points(8), lambda a, b: a), "given a kernel of type"),
        (lambda: qmc.FastGram(qmc.Lattice(2).points(8), SI, torch.ones(8)), "unequal noise"),
        (lambda: qmc.FastGram(qmc.Lattice(2).points(8), SI).solve(torch.ones(4)), r"expected \(8,\)"),
        (lambda: DSI(torch.rand(4, 2), torch.rand(4, 2)), "whose digits"),
        (lambda: SI(torch.rand(4, 3), torch.rand(4, 2)), r"expected \(n, 2\)"),
        (lambda: qmc.ShiftInvariantKernel(2, 6), "orders from 1 to 5"),
        (lambda: qmc.DigitalShiftInvariantKernel(2, 5), "orders from 1 to 4"),
        (lambda: qmc.ShiftInvariantKernel(2, ()), "expected orders"),
        (lambda: qmc.ShiftInvariantKernel(2, weights=[1.0, -1.0]), "positive number"),
        (lambda: qmc.ShiftInvariantKernel(2, scale=0.0), "positive number"),
        (lambda: qmc.ShiftInvariantKernel(0), "1 or more"),
        (lambda: qmc.fwht(torch.ones(6)), "power of two"),
        (lambda: qmc.fftbr(torch.ones(())), "power of two"),
        (lambda: qmc.merge_doubling(torch.ones(4), torch.ones(2), "fwht"), "expected the same"),
        (lambda: qmc.merge_doubling(torch.ones(4), torch.ones(4), "dct"), '"fftbr" or "fwht"'),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()

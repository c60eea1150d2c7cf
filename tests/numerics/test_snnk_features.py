import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.errors import InvalidArgument
from tensormill.numerics.snnk import (
    ACTIVATIONS,
    PROJECTIONS,
    URF,
    FourierSeries,
    HyperbolicSecant,
    ReLUFeatures,
    SpectralDensity,
    arc_cosine_kernel,
    spectrum_of,
)
from tensormill.numerics.snnk.projections import draw

UNBIASED = tuple(kind for kind in PROJECTIONS if kind != "sorf")


def neurons(d, out, x_norm=0.7, w_norm=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, d, generator=generator, dtype=torch.float64)
    w = torch.randn(out, d, generator=generator, dtype=torch.float64)
    b = torch.randn(out, generator=generator, dtype=torch.float64) * 0.5
    return x / x.norm() * x_norm, w / w.norm(dim=-1, keepdim=True) * w_norm, b


def estimates(features_of, repeats, x, w, b):
    return torch.stack([features_of(seed).estimate(x, w, b)[0] for seed in range(repeats)])


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize(("m", "d"), [(1, 1), (5, 3), (64, 16), (100, 13)])
def test_projection_is_its_matrix(kind, m, d):
    projection, uniform = draw(kind, m, d, torch.Generator().manual_seed(1))
    x = torch.randn(3, 2, d, dtype=torch.float64)
    assert projection.dense().shape == (m, d) and uniform.shape == (m,)
    assert bool(((uniform > 0) & (uniform < 1)).all())
    torch.testing.assert_close(projection(x), x @ projection.dense().T)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_rows_are_normal_for_themselves(kind):
    from scipy.stats import kstest

    d = 4
    rows = torch.cat([draw(kind, 8, d, torch.Generator().manual_seed(s))[0].dense()[3:4] for s in range(600)])
    direction = torch.tensor([0.5, -0.5, 0.5, 0.5], dtype=torch.float64)
    if kind != "sorf":  # a fixed direction and the length say that the law is turned into itself
        assert kstest((rows @ direction).numpy(), "norm").pvalue > 1e-3
        assert kstest(rows[:, 1].numpy(), "norm").pvalue > 1e-3
    assert kstest(rows.square().sum(-1).numpy(), "chi2", args=(d,)).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["orthogonal", "sorf"])
def test_rows_of_a_block_are_orthogonal(kind):
    rows = draw(kind, 16, 8, torch.Generator().manual_seed(0))[0].dense()
    directions = torch.nn.functional.normalize(rows, dim=-1)
    for block in directions.split(8):
        torch.testing.assert_close(block @ block.T, torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize("split", ["even", "phase"])
@pytest.mark.parametrize("A", [0.0, -0.1, 0.05])
def test_exponential_identity(split, A):
    """E L_g(u) L_g(v) = exp(u.v) by Gauss-Hermite quadrature in one dimension, through the features' own tables."""
    import numpy as np

    features = URF(1, 1, "cos", split=split, A=A, dtype=torch.float64)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    x, w, b = torch.tensor([[0.6]]).double(), torch.tensor([[-0.4]]).double(), torch.tensor([0.3]).double()
    own = features.projection.matrix.square().sum(-1)
    total = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        features.projection.matrix.fill_(node)
        scale = math.exp(
            2 * A * (node**2 - float(own))
        )  # log_scale of both sides holds A |g|^2 of its own draw
        total += weight * scale * float(features.estimate(x, w, b))
    assert total / math.sqrt(2 * math.pi) == pytest.approx(math.cos(-0.24 + 0.3), abs=1e-10)


@pytest.mark.parametrize("kind", UNBIASED)
@pytest.mark.parametrize("activation", ["cos", "sech", "gelu"])
def test_unbiased(kind, activation):
    x, w, b = neurons(6, 3, 0.5, 0.5)
    repeats = 300
    sample = estimates(
        lambda s: URF(6, 16, activation, projection=kind, norms=(0.5, 0.5), seed=s, dtype=torch.float64),
        repeats, x, w, b,
    )  # fmt: skip
    truth = URF(6, 1, activation).kernel(x, w, b)[0]
    t = (sample.mean(0) - truth) / (sample.std(0) / repeats**0.5)
    assert t.abs().max() < 4.5


@pytest.mark.parametrize("activation", ["sin", "gauss", "tanh"])
@pytest.mark.parametrize(("split", "A"), [("even", 0.0), ("phase", -0.05), ("even", "auto")])
def test_variance_formula(activation, split, A):
    x, w, b = neurons(5, 2, 0.6, 0.4, seed=3)
    features = URF(5, 40_000, activation, split=split, A=A, norms=(0.6, 0.4), seed=1, dtype=torch.float64)
    terms = features.phi(x)[0] * features.psi(w, b)  # real and imaginary products of every draw
    m = features.num_features
    draws = m * (terms[:, :m] + terms[:, m:])
    predicted = features.variance(x, w, b)[0] * m
    kurtosis = (draws - draws.mean(-1, keepdim=True)).pow(4).mean(-1)
    error = ((kurtosis - predicted**2) / m).sqrt()
    assert ((draws.var(-1) - predicted).abs() < 4.5 * error).all()
    torch.testing.assert_close(draws.mean(-1), features.estimate(x, w, b)[0])


def test_variance_is_infinite_where_the_tail_is_too_heavy():
    x = neurons(4, 1, 0.5)[0]
    features = URF(4, 8, "sech")
    assert features.variance(x, x).isfinite().all()  # |x + w|^2 = 1 < pi / 2
    assert features.variance(2 * x, 2 * x).isinf().all()  # |x + w|^2 = 4
    assert URF(4, 8, "gauss").variance(2 * x, 2 * x).isfinite().all()


def test_auto_A_lowers_the_variance_and_equals_the_published_optimum():
    d, phi = 16, 4.0  # |Re(u + v)|^2 = (|x|^2 + |w|^2) / 2 for cos
    features = URF(d, 1, "cos", A="auto", norms=(2.0, 2.0), dtype=torch.float64)
    rho = (math.sqrt((2 * phi + d) ** 2 + 8 * d * phi) - 2 * phi - d) / (4 * phi)
    assert abs(features.A - (1 - 1 / rho) / 8) < 1e-12
    x, w = torch.zeros(1, d, dtype=torch.float64), torch.zeros(1, d, dtype=torch.float64)
    x[0, 0] = w[0, 1] = 2.0
    variances = [
        float(URF(d, 1, "cos", A=features.A + step, norms=(2.0, 2.0), dtype=torch.float64).variance(x, w))
        for step in (0.0, -features.A, -0.01, 0.01)
    ]
    assert variances[0] == min(variances)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_estimates_converge(kind):
    x, w, b = neurons(8, 4)
    features = URF(8, 1 << 14, "cos", projection=kind, dtype=torch.float64)
    bound = 6 * features.variance(x, w, b).sqrt()
    assert ((features.estimate(x, w, b) - torch.cos(x @ w.T + b)).abs() < bound).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_spectra_are_their_functions(activation):
    spectrum = spectrum_of(activation)
    z = torch.linspace(-3, 3, 61, dtype=torch.float64)
    truth = spectrum.function(z)
    if isinstance(spectrum, FourierSeries):
        assert (spectrum(z) - truth).abs().max() <= spectrum.error + 1e-12
        assert spectrum.error < (0.1 if activation == "relu" else 6e-3)
        return
    uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    xi = spectrum.proposal.icdf(uniform)
    ratio = spectrum.tau(xi) / spectrum.proposal.log_prob(xi).exp()
    torch.testing.assert_close(
        (ratio * torch.cos(2 * math.pi * xi * z[:, None])).mean(-1), truth, rtol=0, atol=1e-4
    )


def test_a_density_of_ones_own():
    """tau of exp(-|z|): complex and shifted, from a Cauchy proposal, against the function."""
    shift = 0.4
    spectrum = SpectralDensity(
        "laplace",
        lambda xi: 2 / (1 + (2 * math.pi * xi) ** 2) * torch.exp(2j * math.pi * xi * shift),
        torch.distributions.Cauchy(torch.tensor(0.0).double(), torch.tensor(1 / (2 * math.pi)).double()),
        lambda z: torch.exp(-(z + shift).abs()),
    )
    # u and v are 0 for x = 0: what is left is the spectrum and the bias
    x, w, b = torch.zeros(1, 2).double(), torch.zeros(3, 2).double(), torch.tensor([-1.0, 0.0, 0.7]).double()
    features = URF(2, 200_000, spectrum, dtype=torch.float64, projection="qmc")
    torch.testing.assert_close(features.estimate(x, w, b), features.kernel(x, w, b), rtol=0, atol=5e-3)


def test_hyperbolic_secant_law():
    law, u = HyperbolicSecant(), torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    xi = law.icdf(u)
    density = law.log_prob(xi).exp()
    step = 1e-6
    slope = (law.icdf(u + step) - law.icdf(u - step)) / (2 * step)
    torch.testing.assert_close(density * slope, torch.ones_like(u), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_relu_features_give_the_arc_cosine_kernel(kind):
    x, w, b = neurons(8, 5, 1.5, 0.8)
    features = ReLUFeatures(8, 1 << 15, bias=True, projection=kind, dtype=torch.float64)
    torch.testing.assert_close(features.estimate(x, w, b), features.kernel(x, w, b), rtol=0.03, atol=0.02)


def test_arc_cosine_kernel_by_quadrature():
    x, w = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.6, 0.8], [-0.5, 0.1], [2.0, 0.0]]).double()
    angles = 2 * math.pi * (torch.arange(1 << 18, dtype=torch.float64) + 0.5) / (1 << 18)
    ring = torch.stack([angles.cos(), angles.sin()])
    # E relu(g.x) relu(g.w) is the mean over directions, times E |g|^2 = 2
    expected = 2 * (torch.relu(x @ ring).unsqueeze(1) * torch.relu(w @ ring)).mean(-1)
    torch.testing.assert_close(arc_cosine_kernel(x, w), expected, rtol=1e-6, atol=1e-9)
    assert arc_cosine_kernel(torch.zeros(1, 2), w.float()).abs().max() == 0
    with pytest.raises(InvalidArgument, match="equal last"):
        arc_cosine_kernel(x, torch.zeros(1, 3))


@pytest.mark.parametrize("split", ["even", "phase"])
def test_gradients(split):
    features = URF(3, 4, "tanh", split=split, A=-0.02, dtype=torch.float64)
    x, w, b = (t.requires_grad_() for t in neurons(3, 2))
    assert torch.autograd.gradcheck(features.estimate, (x, w, b))
    relu = ReLUFeatures(3, 5, bias=True, projection="hadamard", normalize=1.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(relu.estimate, (x, w, b))


@settings(max_examples=25, deadline=None)
@given(
    d=st.integers(1, 9),
    m=st.integers(1, 20),
    kind=st.sampled_from(PROJECTIONS),
    activation=st.sampled_from(["cos", "relu", "gauss"]),
    lead=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 1000),
)
def test_shapes_batches_and_seeds(d, m, kind, activation, lead, seed):
    make = ReLUFeatures if activation == "relu" else lambda *a, **k: URF(*a, activation, **k)
    features, again = (make(d, m, projection=kind, seed=seed, dtype=torch.float64) for _ in range(2))
    x = torch.randn(*lead, d, dtype=torch.float64)
    phi = features(x)
    assert phi.shape == (*lead, features.feature_size)
    torch.testing.assert_close(
        phi.reshape(-1, features.feature_size), features(x.reshape(-1, d)), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(phi, again(x))


def test_state_dict_carries_the_draws():
    x, w, b = neurons(5, 3)
    for kind in PROJECTIONS:
        one, other = (URF(5, 7, "gelu", projection=kind, seed=s, dtype=torch.float64) for s in (1, 2))
        assert not torch.equal(one.estimate(x, w, b), other.estimate(x, w, b))
        other.load_state_dict(one.state_dict())
        assert torch.equal(one.estimate(x, w, b), other.estimate(x, w, b))
        assert not list(one.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_agree_with_float64(dtype):
    x, w, b = neurons(16, 4)
    exact = URF(16, 256, "cos", seed=5, dtype=torch.float64)
    narrow = URF(16, 256, "cos", seed=5).estimate(x.to(dtype), w.to(dtype), b.to(dtype))
    assert narrow.dtype == dtype
    error = (narrow.double() - exact.estimate(x, w, b)).abs().max()
    assert error < 16 * torch.finfo(dtype).eps


def test_normalized_inputs():
    x, w, _ = neurons(4, 3, 7.0, 0.1)
    features = URF(4, 64, "cos", normalize=0.8, dtype=torch.float64)
    torch.testing.assert_close(features.estimate(x, w), features.estimate(5 * x, 0.3 * w))
    torch.testing.assert_close(features.kernel(x, w), torch.cos(x @ w.T * (0.64 / 0.7)))


def test_relative_std_grows_with_the_norms():
    features = URF(16, 64, "cos")
    values = [features.relative_std(r, r) for r in (0.5, 1.0, 2.0, 3.0)]
    assert values == sorted(values) and values[0] < 0.1 and values[-1] > 10


def test_fourier_extension_needs_no_window():
    sizes = [FourierSeries.fit(torch.sigmoid, harmonics=h, ridge=1e-12).error for h in (2, 4, 8)]
    assert sizes[0] > 20 * sizes[1] > 400 * sizes[2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: URF(4, 0), "num_features=0"),
        (lambda: URF(0, 4), "in_features=0"),
        (lambda: URF(4, 4, "tan"), "did you mean 'tanh'"),
        (lambda: URF(4, 4, "xyz"), "FourierSeries.fit"),
        (lambda: URF(4, 4, A=0.125), "1/8"),
        (lambda: URF(4, 4, split="odd"), "'phase'"),
        (lambda: URF(4, 4, norms=(0.0, 1.0)), "norms"),
        (lambda: URF(4, 4, projection="haar"), "orthogonal"),
        (lambda: URF(4, 4, normalize=-1.0), "normalize"),
        (lambda: URF(4, 4).phi(torch.zeros(2, 3)), r"\(\.\.\., 4\)"),
        (lambda: URF(4, 4).phi(torch.zeros(2, 4, dtype=torch.complex64)), "real"),
        (lambda: URF(4, 4).phi([1.0]), "Tensor"),
        (lambda: URF(4, 4).psi(torch.zeros(4)), "weight"),
        (lambda: URF(4, 4).psi(torch.zeros(3, 4), torch.zeros(2)), r"expected \(3,\)"),
        (lambda: ReLUFeatures(4, 4).psi(torch.zeros(3, 4), torch.zeros(3)), "bias=True"),
        (lambda: ReLUFeatures(4, 4, shift=-5).kernel(torch.zeros(1, 4), torch.zeros(1, 4)), "closed form"),
        (lambda: ReLUFeatures(4, 4, shift=math.nan), "finite"),
        (lambda: FourierSeries("f", (1.0,), ()), "one coefficient"),
        (lambda: FourierSeries("f", (-1.0,), (1j,)), "half spectrum"),
        (lambda: FourierSeries("f", (1.0,), (0j,)), "all 0"),
        (lambda: FourierSeries.fit(torch.log, bound=1.0), "not finite"),
        (lambda: FourierSeries.fit(torch.exp, stretch=1.0), "stretch"),
        (lambda: SpectralDensity("f", torch.exp, object()), "icdf"),
        (lambda: draw("qmc", 4, 30_000, torch.Generator()), "at most"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(make, message):
    with pytest.raises(InvalidArgument, match=message):
        make()

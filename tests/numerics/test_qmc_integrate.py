import math

import pytest
import torch

from tensormill.errors import InvalidArgument
from tensormill.numerics import qmc
from tensormill.numerics.qmc.integrate import _Cone, _decay_order

RULES = ("net", "lattice", "rqmc", "bayes", "bayes_lattice")


def smooth(x):
    return torch.exp(x).prod(-1)


def cornered(x):
    return (4 * x - 2).abs().prod(-1)


def oscillating(x):
    return torch.cos(math.pi / 2 + (x * torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)).sum(-1))


def oscillating_exact():
    value = complex(0, 1)
    for a in (1.0, 2.0, 3.0):
        value *= (complex(math.cos(a), math.sin(a)) - 1) / complex(0, a)
    return value.real


EXACT = [(smooth, (math.e - 1) ** 3), (cornered, 1.0), (oscillating, oscillating_exact())]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("f", "exact"), EXACT, ids=lambda v: getattr(v, "__name__", ""))
def test_errors_stay_within_the_tolerance(rule, f, exact):
    failed = 0
    for seed in range(12):
        result = qmc.integrate(f, 3, abs_tol=3e-3, rule=rule, seed=seed)
        assert result.converged and result.error_bound <= 3e-3 and result.value.shape == ()
        failed += abs(result.value.item() - exact) > 3e-3
    assert failed == 0  # each bound holds in at least 99 of 100


def test_plain_monte_carlo_keeps_its_tolerance():
    for seed in range(5):
        result = qmc.integrate(smooth, 3, abs_tol=3e-2, rule="mc", seed=seed)
        assert result.converged and abs(result.value.item() - (math.e - 1) ** 3) < 4e-2


def test_relative_tolerance():
    for rule in RULES:
        result = qmc.integrate(lambda x: 1000 * smooth(x), 3, abs_tol=0, rel_tol=1e-3, rule=rule, seed=1)
        assert result.converged and abs(result.value.item() / (1000 * (math.e - 1) ** 3) - 1) < 1e-3
        tight = qmc.integrate(lambda x: 1000 * smooth(x), 3, abs_tol=1e-2, rule=rule, seed=1)
        assert tight.points >= result.points


@pytest.mark.parametrize("rule", [*RULES, "mc"])
def test_several_integrands_at_once_are_those_apart(rule):
    both = qmc.integrate(
        lambda x: torch.stack([smooth(x), cornered(x)], -1), 3, abs_tol=1e-2, rule=rule, seed=4
    )
    assert both.value.shape == both.error_bound.shape == (2,) and both.converged
    expected = torch.tensor([(math.e - 1) ** 3, 1.0], dtype=torch.float64)
    assert (both.value - expected).abs().max() < 1e-2


def test_what_does_not_converge_says_so():
    small = qmc.IntegrationSettings(maximum=512, initial=256)
    for rule in (*RULES, "mc"):
        result = qmc.integrate(cornered, 3, abs_tol=1e-9, rule=rule, seed=0, settings=small)
        assert not result.converged and result.error_bound > 1e-9
        assert result.points <= 512 * (16 if rule == "rqmc" else 1) + 1024 * (rule == "mc") + 1


def test_coefficients_that_contradict_earlier_ones_are_noticed():
    cone = _Cone()
    steady = torch.arange(1, 1025, dtype=torch.float64) ** -2
    for n in (64, 128, 256):
        bound = cone.bound(steady[:n] * math.sqrt(n), n)
        assert bound > 0 and not cone.violated
    cone.bound(steady[:512] * math.sqrt(512) / 100, 512)
    assert cone.violated


def test_the_order_of_coefficients_decays_and_respects_aliasing():
    magnitudes = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = _decay_order(magnitudes, 6)
    assert sorted(order.tolist()) == list(range(64)) and order[0] == 0
    for level in range(1, 6):
        first, second = magnitudes[order[1 : 1 << level]], magnitudes[order[(1 << level) + 1 : 2 << level]]
        if level == 5:
            assert bool((first >= second).all())
        assert torch.equal(order[1 << level : 2 << level] % (1 << level), order[: 1 << level] % (1 << level))


def test_same_seed_same_result_and_progress():
    seen = []
    first = qmc.integrate(smooth, 3, seed=5, progress=lambda points, ratio: seen.append((points, ratio)))
    assert qmc.integrate(smooth, 3, seed=5).value == first.value
    assert seen[-1][0] == first.points and seen[-1][1] <= 1 and all(r > 1 for _, r in seen[:-1])
    torch.manual_seed(3)
    drawn = qmc.integrate(smooth, 3).value
    torch.manual_seed(3)
    assert qmc.integrate(smooth, 3).value == drawn


@pytest.mark.parametrize("rule", [*RULES, "mc"])
def test_the_value_has_gradients(rule):
    power = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    result = qmc.integrate(lambda x: (x**power).sum(-1), 2, abs_tol=1e-2, rule=rule, seed=1)
    (gradient,) = torch.autograd.grad(result.value, power)
    assert gradient.item() == pytest.approx(-2 / 9, abs=2e-2)  # of 2 / (power + 1)
    assert not result.error_bound.requires_grad


def test_chunks_change_nothing():
    sliced = qmc.IntegrationSettings(chunk=100)
    for rule in ("net", "rqmc"):
        whole = qmc.integrate(smooth, 3, rule=rule, seed=2)
        parts = qmc.integrate(smooth, 3, rule=rule, seed=2, settings=sliced)
        torch.testing.assert_close(parts.value, whole.value, rtol=1e-13, atol=0)


def test_asian_option_equals_qmcpy_s_closed_form_of_the_geometric_mean():
    """Geometric-mean Asian call: the logarithm of the mean is normal, which gives the price in closed form."""
    times = torch.linspace(1 / 16, 1, 16, dtype=torch.float64)
    rate, volatility, start, strike = 0.03, 0.4, 100.0, 105.0
    for decomposition in ("pca", "cholesky"):
        motion = qmc.BrownianMotion(
            times, math.log(start), rate - volatility**2 / 2, volatility**2, decomposition
        )
        payoff = lambda x: math.exp(-rate) * (x.mean(-1).exp() - strike).clamp_min(0)  # noqa: E731
        result = qmc.integrate(payoff, motion, abs_tol=2e-2, seed=3)
        mean = float(motion.mean.mean())
        deviation = math.sqrt(float(motion.covariance.mean()))
        normal = torch.distributions.Normal(0.0, 1.0)
        d1 = (mean - math.log(strike) + deviation**2) / deviation
        upper, lower = (float(normal.cdf(torch.tensor(d, dtype=torch.float64))) for d in (d1, d1 - deviation))
        price = math.exp(-rate) * (math.exp(mean + deviation**2 / 2) * upper - strike * lower)
        assert result.converged and abs(result.value.item() - price) < 2e-2


# measures


def test_uniform_and_gaussian_moments():
    u = qmc.DigitalNet(3, seed=1).sample(1 << 14)
    box = qmc.Uniform(3, lower=[0.0, -1.0, 2.0], upper=[1.0, 1.0, 6.0])
    x = box.transform(u)
    torch.testing.assert_close(x.mean(0), torch.tensor([0.5, 0.0, 4.0]).double(), rtol=0, atol=1e-3)
    assert box.volume == 8.0
    covariance = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.5]], dtype=torch.float64)
    for decomposition in ("pca", "cholesky"):
        gaussian = qmc.Gaussian(3, [1.0, 2.0, 3.0], covariance, decomposition)
        torch.testing.assert_close(gaussian.root @ gaussian.root.mT, covariance)
        x = gaussian.transform(u)
        torch.testing.assert_close(x.mean(0), gaussian.mean, rtol=0, atol=3e-3)
        torch.testing.assert_close(torch.cov(x.mT), covariance, rtol=0, atol=5e-3)
    diagonal = qmc.Gaussian(3, 0.0, [1.0, 4.0, 9.0]).transform(u)
    torch.testing.assert_close(diagonal.std(0), torch.tensor([1.0, 2.0, 3.0]).double(), rtol=1e-2, atol=0)
    for dtype in (torch.float32, torch.float64):  # 0 is a point of every net; a periodized one may round to 1
        edges = qmc.Gaussian(1).transform(torch.tensor([[0.0], [1.0]], dtype=dtype))
        assert bool(torch.isfinite(edges).all()) and edges[0] < -5 < 5 < edges[1]
    singular = qmc.Gaussian(2, 0.0, [[1.0, 1.0], [1.0, 1.0]]).transform(u[:, :2])
    torch.testing.assert_close(singular[:, 0], singular[:, 1])


def test_principal_axes_come_largest_first():
    motion = qmc.BrownianMotion(torch.linspace(0.1, 1, 10))
    lengths = motion.root.square().sum(0)
    assert bool((lengths.diff() <= 1e-15).all()) and lengths[0] / lengths.sum() > 0.75


@pytest.mark.parametrize("kind", ["none", "tent", "sidi1", "sidi2", "sidi3", "sidi4"])
def test_periodizing_keeps_the_integral(kind):
    u = torch.linspace(0, 1, 2001, dtype=torch.float64).unsqueeze(-1)
    x, w = qmc.periodize(u, kind)
    assert x.min() >= 0 and x.max() <= 1
    integral = torch.trapezoid(torch.exp(x[:, 0]) * w, u[:, 0])
    assert integral.item() == pytest.approx(math.e - 1, abs=1e-6)
    if kind.startswith("sidi"):  # the weight is the derivative, and vanishes at the ends
        slope = torch.gradient(x[:, 0], spacing=float(u[1] - u[0]))[0]
        torch.testing.assert_close(slope[1:-1], w[1:-1], rtol=0, atol=1e-5)
        assert w[0].abs() < 1e-12 and w[-1].abs() < 1e-12
        assert bool((x[:, 0].diff() >= 0).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: qmc.integrate(smooth, 2, abs_tol=0), "not both 0"),
        (lambda: qmc.integrate(smooth, 2, rel_tol=1.0), "relative below 1"),
        (lambda: qmc.integrate(smooth, 2, rule="sobol"), '"?rule=.*expected one of'),
        (lambda: qmc.integrate(lambda x: x.sum(), 2), r"expected \(256,\) or \(256, k\)"),
        (lambda: qmc.integrate(lambda x: 1.0, 2), "float"),
        (lambda: qmc.integrate(lambda x: x[:, 0] / 0, 2), "not finite"),
        (lambda: qmc.IntegrationSettings(confidence=1.0), "less than 1"),
        (lambda: qmc.IntegrationSettings(replications=1), "2 or more"),
        (lambda: qmc.IntegrationSettings(initial=100), "power of two"),
        (lambda: qmc.IntegrationSettings(maximum=64), "below initial"),
        (lambda: qmc.IntegrationSettings(periodization="sidi9"), "expected one of none"),
        (lambda: qmc.IntegrationSettings(chunk=0), "1 or more"),
        (lambda: qmc.Uniform(2, 1.0, 0.0), "lower < upper"),
        (lambda: qmc.Uniform(2, [1.0, 2.0, 3.0]), "a number or"),
        (lambda: qmc.Gaussian(2, 0.0, [[1.0, 2.0], [2.0, 1.0]]), "positive semidefinite"),
        (lambda: qmc.Gaussian(2, 0.0, [[1.0, 2.0], [2.0, 1.0]], "cholesky"), "not positive definite"),
        (lambda: qmc.Gaussian(2, 0.0, [[1.0, 2.0], [0.0, 1.0]]), "symmetric"),
        (lambda: qmc.Gaussian(2, 0.0, -1.0), "negative variance"),
        (lambda: qmc.Gaussian(2, decomposition="svd"), '"pca" or "cholesky"'),
        (lambda: qmc.BrownianMotion([0.5, 0.5]), "increase"),
        (lambda: qmc.periodize(torch.rand(2, 2), "sidi9"), "expected one of"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()

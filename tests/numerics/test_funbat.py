"""Functional Tucker: one sweep against entry-by-entry sums, dense processes, GPyTorch; invariants; files; refusals."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch

from tensormill.errors import CheckpointError, InvalidArgument, OutputError
from tensormill.numerics.funbat import FunctionalTucker, FunctionalTuckerConfig
from tensormill.numerics.funbat.messages import Groups, Packing, grouped_sums


def field(entries, modes=3, rank=2, noise=0.1, seed=0):
    """Entries of a random Tucker field of unit variance: coordinates, noisy values, clean values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(entries, modes, generator=generator, dtype=torch.float64)
    value = torch.randn((rank,) * modes, generator=generator, dtype=torch.float64).expand(
        entries, *(rank,) * modes
    )
    for k in range(modes):
        shift, speed = 6 * torch.rand(2, rank, generator=generator, dtype=torch.float64)
        value = torch.einsum("nr...,nr->n...", value, torch.sin((2 + speed) * x[:, k : k + 1] + shift))
    value = value / value.std()
    return x, value + noise * torch.randn(entries, generator=generator, dtype=torch.float64), value


def rmse(a, b):
    return float((a - b).square().mean().sqrt())


def brute_force_sweep(model, x, y, weight):
    """The sweep of the paper, an entry at a time, on unpacked moments with named axes; returns what it leaves."""
    modes, axes = x.shape[1], "abcdef"[: x.shape[1]]
    primed = axes.upper()
    tau = torch.as_tensor(model.tau_, dtype=torch.float64)
    core = model.core_
    flat = core.reshape(-1)
    covariance = torch.zeros_like(torch.outer(flat, flat)) if model.core_cov_ is None else model.core_cov_
    second = (covariance + torch.outer(flat, flat)).reshape(*core.shape, *core.shape)
    mean, cov = [m.clone() for m in model.factor_mean_], [c.clone() for c in model.factor_cov_]
    index = [torch.searchsorted(b.points, x[:, k].contiguous()) for k, b in enumerate(model._bundles)]
    messages = []
    for k in range(modes):
        points, r = model._bundles[k].points, core.shape[k]
        precision = torch.zeros(points.shape[0], r, r, dtype=torch.float64)
        information = torch.zeros(points.shape[0], r, dtype=torch.float64)
        for n in range(x.shape[0]):
            m = [mean[j][index[j][n]] for j in range(modes)]
            moments = [cov[j][index[j][n]] + torch.outer(m[j], m[j]) for j in range(modes)]
            others = [j for j in range(modes) if j != k]
            spec = ",".join([axes] + [axes[j] for j in others])
            a = torch.einsum(f"{spec}->{axes[k]}", core, *[m[j] for j in others])
            spec = ",".join([axes + primed] + [axes[j] + primed[j] for j in others])
            aa = torch.einsum(f"{spec}->{axes[k]}{primed[k]}", second, *[moments[j] for j in others])
            precision[index[k][n]] += tau * weight[n] * aa
            information[index[k][n]] += tau * weight[n] * y[n] * a
        found = model._bundles[k].smooth(precision, information)
        mean[k], cov[k] = found.mean, found.covariance
        messages.append((precision, information))
    size = flat.shape[0]
    core_precision, core_information = (
        torch.eye(size, dtype=torch.float64),
        torch.zeros(size, dtype=torch.float64),
    )
    squares = torch.zeros(*core.shape, *core.shape, dtype=torch.float64)
    fitted = torch.zeros_like(core)
    for n in range(x.shape[0]):
        m = [mean[j][index[j][n]] for j in range(modes)]
        moments = [cov[j][index[j][n]] + torch.outer(m[j], m[j]) for j in range(modes)]
        zz = torch.einsum(",".join(axes[j] + primed[j] for j in range(modes)) + f"->{axes}{primed}", *moments)
        z = torch.einsum(",".join(axes) + f"->{axes}", *m)
        squares += weight[n] * zz
        fitted += weight[n] * y[n] * z
    if model.core_cov_ is not None:
        core_precision += tau * squares.reshape(size, size)
        core_information += tau * fitted.reshape(-1)
        covariance = torch.linalg.inv(core_precision)
        flat = covariance @ core_information
        second = (covariance + torch.outer(flat, flat)).reshape(*core.shape, *core.shape)
    residual = (weight * y * y).sum() / 2 - flat @ fitted.reshape(-1) + (second * squares).sum() / 2
    a, b = model.config.noise_prior
    return messages, mean, cov, flat.reshape(core.shape), (a + x.shape[0] / 2) / (b + residual)


@pytest.mark.parametrize(
    ("rank", "mode", "modes"),
    [
        ((2, 3, 2), "tucker", 3),
        (2, "cp", 3),
        ((2, 1), "tucker", 2),
        ((2, 1, 2, 2), "tucker", 4),
        (3, "tucker", 1),
    ],
)
def test_sweep_equals_sums_over_entries(rank, mode, modes):
    x, y, _ = field(40, modes, noise=0.3, seed=modes)
    x[:, 0] = (x[:, 0] * 8).round() / 8  # some indices with many entries, some with one
    weight = torch.rand(40, dtype=torch.float64) + 0.5
    model = FunctionalTucker(
        rank, "matern32", 0.4, 1.2, mode, normalize=False, rescale=False, tol=0, starts=1
    )
    model.fit(x, y, weight, n_iter=4)
    messages, mean, cov, core, tau = brute_force_sweep(model, x, y, weight)
    model.fit(x, y, weight, warm_start=True, n_iter=1)
    for k in range(modes):
        torch.testing.assert_close(model._precision[k], messages[k][0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model._information[k], messages[k][1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.factor_mean_[k], mean[k], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(model.factor_cov_[k], cov[k], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(model.core_, core, rtol=1e-8, atol=1e-9)
    assert model.tau_ == pytest.approx(float(tau), rel=1e-8)


@pytest.mark.parametrize("kernel", ["matern12", "matern32", "matern52"])
def test_one_mode_is_the_exact_process(kernel):
    """K = 1, R = 1, core of one, known noise: predictions equal scikit-learn's dense process everywhere."""
    process = pytest.importorskip("sklearn.gaussian_process")
    nu = {"matern12": 0.5, "matern32": 1.5, "matern52": 2.5}[kernel]
    x, y, _ = field(80, modes=1)
    model = FunctionalTucker(
        1, kernel, 0.3, 1.4, "cp", noise_variance=0.01, normalize=False, rescale=False
    ).fit(x, y)
    asked = torch.linspace(-0.4, 1.4, 57, dtype=torch.float64)[:, None]
    mean, variance = model.predict(asked, return_var=True, include_noise=False)
    dense = process.GaussianProcessRegressor(
        1.4 * process.kernels.Matern(0.3, nu=nu), alpha=0.01, optimizer=None
    ).fit(x.numpy(), y.numpy())
    their_mean, their_std = dense.predict(asked.numpy(), return_std=True)
    torch.testing.assert_close(mean, torch.from_numpy(their_mean), rtol=0, atol=1e-8)
    torch.testing.assert_close(variance, torch.from_numpy(their_std**2), rtol=0, atol=1e-8)
    # The evidence bound is tight here: it is the exact log marginal likelihood.
    assert model.history_[-1] == pytest.approx(dense.log_marginal_likelihood_value_, rel=1e-9)


def test_equals_gpytorch():
    torch_gp = pytest.importorskip("gpytorch")
    x, y, _ = field(60, modes=1, seed=2)

    class Process(torch_gp.models.ExactGP):
        def __init__(self, likelihood):
            super().__init__(x, y, likelihood)
            self.mean_module = torch_gp.means.ZeroMean()
            self.covar_module = torch_gp.kernels.ScaleKernel(torch_gp.kernels.MaternKernel(nu=1.5))

        def forward(self, points):
            return torch_gp.distributions.MultivariateNormal(
                self.mean_module(points), self.covar_module(points)
            )

    likelihood = torch_gp.likelihoods.GaussianLikelihood()
    process = Process(likelihood).double()
    process.covar_module.base_kernel.lengthscale = 0.3
    process.covar_module.outputscale = 1.4
    likelihood.noise = 0.01
    process.eval()
    asked = torch.linspace(-0.2, 1.2, 29, dtype=torch.float64)[:, None]
    with torch_gp.settings.fast_computations(False, False, False), torch.no_grad():
        theirs = process(asked)
        expected = theirs.mean, theirs.variance
    model = FunctionalTucker(
        1, "matern32", 0.3, 1.4, "cp", noise_variance=0.01, normalize=False, rescale=False
    ).fit(x, y)
    for ours, other in zip(model.predict(asked, True, include_noise=False), expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)  # GPyTorch's inputs pass float32 constants


@pytest.mark.parametrize("mode", ["tucker", "cp"])
def test_bound_never_falls(mode):
    x, y, _ = field(300, noise=0.2)
    model = FunctionalTucker(
        (2, 3, 2) if mode == "tucker" else 3, mode=mode, lengthscale=0.3, n_iter=30, tol=0
    )
    history = model.fit(x, y).history_
    assert len(history) == 30
    assert all(b >= a - 1e-7 * abs(a) for a, b in itertools.pairwise(history))


def test_recovers_a_planted_field():
    x, y, clean = field(900, noise=0.1, seed=3)
    model = FunctionalTucker(3, "matern52", 0.4, n_iter=40).fit(x[:700], y[:700])
    mean, variance = model.predict(x[700:], return_var=True)
    assert rmse(mean, clean[700:]) < 0.1
    assert 0.08 < model.noise_std_ < 0.12
    inside = ((mean - y[700:]).abs() < 1.6449 * variance.sqrt()).double().mean()
    assert 0.82 < inside < 0.97
    function_only = model.predict(x[700:], True, include_noise=False)[1]
    torch.testing.assert_close(variance - function_only, torch.full_like(variance, model.noise_std_**2))


def test_order_of_entries_does_not_matter():
    x, y, _ = field(120)
    shuffle = torch.randperm(120)
    models = [FunctionalTucker(2, n_iter=10, starts=1).fit(x[i], y[i]) for i in (torch.arange(120), shuffle)]
    torch.testing.assert_close(models[0].predict(x), models[1].predict(x), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2), (0, 2, 1)])
def test_order_of_modes_does_not_matter(order):
    """The bound of one state is the same for permuted modes; a core read in another order would show (K = 3)."""
    x, y, _ = field(200, noise=0.2)
    rank = (2, 3, 4)
    model = FunctionalTucker(rank, n_iter=400, lengthscale=0.5, tol=1e-9, starts=1).fit(x, y)
    permuted = FunctionalTucker(tuple(rank[k] for k in order), n_iter=1, lengthscale=0.5, starts=1).fit(
        x[:, order], y
    )
    state = model.state_dict()
    size = state["core"].numel()
    numbers = torch.arange(size).reshape(rank).permute(order).reshape(-1)
    moved = {name: value for name, value in state.items() if "." not in name}
    for new, old in enumerate(order):
        for name in ("points", "precision", "information"):
            moved[f"{name}.{new}"] = state[f"{name}.{old}"]
    moved["core"] = state["core"].permute(order)
    moved["core_cov"] = state["core_cov"][numbers][:, numbers]
    moved["core_precision"] = state["core_precision"][numbers][:, numbers]
    moved["core_information"] = state["core_information"][numbers]
    moved["low"], moved["span"] = state["low"][list(order)], state["span"][list(order)]
    moved["scales"] = state["scales"][:, list(order)]
    permuted.load_state_dict(moved)
    asked = torch.rand(50, 3, dtype=torch.float64)
    for ours, theirs in zip(model.predict(asked, True), permuted.predict(asked[:, order], True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    permuted.fit(x[:, order], y, warm_start=True, n_iter=1)
    assert permuted.history_[-1] >= model.history_[-1] - 1e-6 * abs(model.history_[-1])


def test_scale_and_shift_of_values_and_coordinates():
    x, y, _ = field(150)
    asked = torch.rand(20, 3, dtype=torch.float64)
    plain = FunctionalTucker(2, n_iter=15).fit(x, y)
    moved = FunctionalTucker(2, n_iter=15).fit(100 + 7 * x, 5 - 1000 * y)
    mean, variance = plain.predict(asked, return_var=True)
    other_mean, other_variance = moved.predict(100 + 7 * asked, return_var=True)
    assert plain.history_[0] != 0
    if (
        rmse(other_mean, 5 - 1000 * mean) > 1e-3
    ):  # the sign flips the random start's role; the bounds still agree
        assert moved.history_[-1] == pytest.approx(plain.history_[-1], rel=0.05)
    same = FunctionalTucker(2, n_iter=15).fit(100 + 7 * x, 5 + 1000 * y)
    same_mean, same_variance = same.predict(100 + 7 * asked, return_var=True)
    torch.testing.assert_close(same_mean, 5 + 1000 * mean, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(same_variance, 1e6 * variance, rtol=1e-4, atol=1e-6)
    assert bool((other_variance > 0).all())


@pytest.mark.parametrize("mode", ["tucker", "cp"])
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_chunks_do_not_matter(mode, chunk):
    x, y, _ = field(90)
    whole = FunctionalTucker(2, mode=mode, n_iter=5, starts=1).fit(x, y)
    cut = FunctionalTucker(2, mode=mode, n_iter=5, starts=1, chunk=chunk).fit(x, y)
    torch.testing.assert_close(cut.predict(x), whole.predict(x), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("cp", [False, True])
@pytest.mark.parametrize(("entries", "counts"), [(1, (1, 1, 1)), (57, (5, 57, 3)), (400, (2, 13, 7))])
def test_grouped_sums(cp, entries, counts):
    rank = 2 if cp else 3
    indices = [torch.randint(c, (entries,)) for c in counts]
    weight, value = torch.rand(2, entries, dtype=torch.float64)
    packing = Packing(rank, torch.float64, torch.device("cpu"))
    means = [torch.randn(c, rank, dtype=torch.float64) for c in counts]
    moments = [packing.pack(m[:, :, None] * m[:, None, :]) for m in means]
    groups = Groups(1, indices, counts, weight, value)
    found = grouped_sums(groups, [moments[0], moments[2]], [means[0], means[2]], cp, chunk=64)
    spec = "n,np,np->np" if cp else "n,np,nq->npq"
    for rows, by, actual in ((moments, weight, found[0]), (means, value, found[1])):
        each = torch.einsum(spec, by, rows[0][indices[0]], rows[2][indices[2]]).flatten(1)
        expected = torch.zeros(counts[1], each.shape[1], dtype=torch.float64).index_add_(0, indices[1], each)
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(packing.unpack(moments[0]), means[0][:, :, None] * means[0][:, None, :])


def test_weights_are_repetitions_of_precision():
    x, y, _ = field(100)
    ignored = torch.ones(100, dtype=torch.float64)
    ignored[50:] = 0
    kept = FunctionalTucker(2, n_iter=8, rescale=False).fit(x, y, ignored)
    few = FunctionalTucker(2, n_iter=8, rescale=False).fit(x[:50], y[:50])
    assert kept.coordinates_[0].shape == (100,) and few.coordinates_[0].shape == (50,)
    assert kept.offset_ == pytest.approx(few.offset_) and kept.scale_ == pytest.approx(few.scale_)
    doubled = FunctionalTucker(1, mode="cp", noise_variance=0.2, normalize=False).fit(
        x[:, :1], y, 2 * torch.ones(100)
    )
    halved = FunctionalTucker(1, mode="cp", noise_variance=0.1, normalize=False).fit(x[:, :1], y)
    torch.testing.assert_close(doubled.predict(x[:, :1]), halved.predict(x[:, :1]), rtol=1e-9, atol=1e-9)


def test_damping_mixes_old_and_fresh_messages():
    x, y, _ = field(100, noise=0.2)
    plain = FunctionalTucker(2, n_iter=5, starts=1).fit(x, y)
    damped = FunctionalTucker(2, n_iter=5, starts=1, damping=(0.25, 0.5, 0.75)).fit(x, y)
    damped.load_state_dict(plain.state_dict())
    old = plain._precision[0]
    for model in (plain, damped):
        model.fit(x, y, warm_start=True, n_iter=1)
    # The first mode's fresh messages are the same for both: they come before anything that is damped.
    mixed = 0.25 * old + 0.75 * plain._precision[0]
    torch.testing.assert_close(damped._precision[0], mixed, rtol=1e-8, atol=1e-9)
    long = FunctionalTucker(2, n_iter=60, damping=(0.25, 0.5, 0.5)).fit(x, y)
    assert rmse(long.predict(x), y) < 0.6


def test_plugin_core_understates_the_variance():
    x, y, _ = field(60, noise=0.3)
    full, plugin = (
        FunctionalTucker(2, n_iter=20, core_moments=moments, starts=1).fit(x, y)
        for moments in ("full", "plugin")
    )
    assert plugin.tau_ > full.tau_


def test_learning_the_kernel_raises_the_evidence():
    x, y, clean = field(300, modes=2, noise=0.05, seed=1)
    given = FunctionalTucker(2, lengthscale=0.03, n_iter=30, tol=0).fit(x[:200], y[:200])
    learnt = FunctionalTucker(2, lengthscale=0.03, n_iter=30, tol=0, learn_kernel=5).fit(x[:200], y[:200])
    assert learnt.history_[-1] > given.history_[-1] + 50
    assert all(length > 0.06 for length in learnt.lengthscale_)
    assert rmse(learnt.predict(x[200:]), clean[200:]) < rmse(given.predict(x[200:]), clean[200:])


def test_float32_sums():
    x, y, _ = field(200)
    wide, narrow = (
        FunctionalTucker(2, n_iter=10, dtype=dtype, starts=1).fit(x, y)
        for dtype in (torch.float64, torch.float32)
    )
    assert narrow.predict(x).dtype == torch.float64
    assert rmse(wide.predict(x), narrow.predict(x)) < 1e-3


def test_resuming_is_going_on(tmp_path):
    x, y, _ = field(120)
    once = FunctionalTucker(2, n_iter=12, tol=0, damping=0.2).fit(x, y)
    model = FunctionalTucker(2, n_iter=6, tol=0, damping=0.2).fit(x, y)
    model.save(tmp_path / "model.safetensors")
    loaded = FunctionalTucker.load(tmp_path / "model.safetensors")
    assert loaded.config == model.config and loaded.history_ == model.history_
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    for ours, theirs in zip(loaded.predict(x, True), model.predict(x, True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for resumed in (model, loaded):
        resumed.fit(x, y, warm_start=True, n_iter=6)
        assert len(resumed.history_) == 12
        torch.testing.assert_close(resumed.predict(x), once.predict(x), rtol=1e-8, atol=1e-10)


def test_warm_start_on_grown_data():
    x, y, clean = field(500, noise=0.05, seed=3)
    model = FunctionalTucker(3, lengthscale=0.4, n_iter=20).fit(x[:400], y[:400])
    before = rmse(model.predict(x[400:]), clean[400:])
    model.fit(x, y, warm_start=True, n_iter=5)
    assert model.coordinates_[1].shape == (500,)
    assert rmse(model.predict(x[400:]), clean[400:]) < before


def test_grid_is_a_tucker_tensor():
    x, y, _ = field(150)
    for model in (
        FunctionalTucker((2, 3, 1), n_iter=5),
        FunctionalTucker(2, mode="cp", n_iter=5, normalize=False),
    ):
        model.fit(x, y + 3)
        axes = [torch.linspace(-0.1, 1.1, n, dtype=torch.float64) for n in (4, 3, 5)]
        grid = model.to_grid(*axes)
        points = torch.cartesian_prod(*axes)
        torch.testing.assert_close(grid.full().reshape(-1), model.predict(points), rtol=1e-9, atol=1e-9)


def test_factors_between_and_beyond_the_data():
    x, y, _ = field(150)
    model = FunctionalTucker(2, lengthscale=0.05, n_iter=5).fit(x, y)
    mean, covariance = model.factor(1, model.coordinates_[1])
    torch.testing.assert_close(mean, model.factor_mean_[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(covariance, model.factor_cov_[1], rtol=0, atol=1e-9)
    far, spread = model.factor(1, [50.0, -50.0])
    torch.testing.assert_close(far, torch.zeros_like(far), rtol=0, atol=1e-9)
    torch.testing.assert_close(spread, torch.eye(2, dtype=torch.float64).expand(2, 2, 2), rtol=0, atol=1e-9)


def test_numpy_lists_and_empty_queries():
    x, y, _ = field(60, modes=2)
    model = FunctionalTucker(1, n_iter=3).fit(x.numpy(), y.tolist())
    assert model.predict([[0.5, 0.5]]).shape == (1,)
    assert model.predict(torch.zeros(0, 2)).shape == (0,)
    assert [t.shape for t in model.predict(torch.zeros(0, 2), return_var=True)] == [(0,), (0,)]
    assert repr(FunctionalTucker(2, mode="cp")) == "FunctionalTucker(rank=2, mode='cp')"


def test_values_that_do_not_vary():
    x = torch.rand(20, 2, dtype=torch.float64)
    with pytest.warns(UserWarning, match="do not vary"):
        model = FunctionalTucker(1, n_iter=5).fit(x, torch.full((20,), 7.0))
    torch.testing.assert_close(
        model.predict(x), torch.full((20,), 7.0, dtype=torch.float64), rtol=0, atol=0.05
    )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": (2, 3), "mode": "cp"}, "one rank for all"),
        ({"kernel": "rbf"}, "matern12"),
        ({"lengthscale": 0.0}, "lengthscale"),
        ({"outputscale": math.inf}, "outputscale"),
        ({"mode": "tt"}, "tucker, cp"),
        ({"damping": 1.0}, "damping"),
        ({"damping": (0.1, 0.2)}, "factors, core, noise"),
        ({"noise_prior": (0.0, 1.0)}, "noise_prior"),
        ({"noise_variance": -1}, "noise_variance"),
        ({"core_moments": "none"}, "plugin"),
        ({"n_iter": 0}, "n_iter"),
        ({"starts": 1.5}, "starts"),
        ({"tol": -1}, "tol"),
        ({"dtype": torch.float16}, "dtype"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_settings_refused(settings, match):
    with pytest.raises(InvalidArgument, match=match):
        FunctionalTucker(**settings)
    with pytest.raises(InvalidArgument, match=match):
        FunctionalTuckerConfig(**settings)


def test_data_refused():
    x, y, _ = field(30)
    model = FunctionalTucker(2)
    for arguments, match in (
        ((x, y[:5]), "values of shape"),
        ((x[:, 0], y), r"\(N, K\)"),
        ((x[:1], y[:1]), "at least 2"),
        ((x * math.nan, y), "NaN"),
        ((x, y, -torch.ones(30)), "sample_weight"),
        (("text", y), "array of numbers"),
        ((x + 1j, y), "real numbers"),
    ):
        with pytest.raises(InvalidArgument, match=match):
            model.fit(*arguments)
    with pytest.raises(InvalidArgument, match="not fitted"):
        model.predict(x)
    with pytest.raises(InvalidArgument, match="one for each"):
        FunctionalTucker((2, 2)).fit(x, y)
    with pytest.raises(InvalidArgument, match="GiB"):
        FunctionalTucker(60).fit(x, y)
    with pytest.raises(InvalidArgument, match="GiB"):
        FunctionalTucker((8, 8, 8, 8, 8)).fit(torch.rand(30, 5), y)
    model.fit(x, y, n_iter=1)
    for call, match in (
        (lambda: model.predict(x[:, :2]), r"\(M, 3\)"),
        (lambda: model.predict(x * math.inf), "infinite"),
        (lambda: model.factor(3, [0.5]), "0 to 2"),
        (lambda: model.factor(0, [[0.5]]), r"\(T,\)"),
        (lambda: model.to_grid([0.5]), "one per mode"),
        (lambda: model.fit(x[:, :2], y, warm_start=True), "as before"),
        (lambda: model.fit(x, y, n_iter=0), "n_iter"),
    ):
        with pytest.raises(InvalidArgument, match=match):
            call()


def test_files_refused(tmp_path):
    from safetensors.torch import save_file

    x, y, _ = field(30)
    model = FunctionalTucker(2).fit(x, y, n_iter=1)
    with pytest.raises(CheckpointError, match="can't be read"):
        FunctionalTucker.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("text")
    with pytest.raises(CheckpointError, match="can't be read"):
        FunctionalTucker.load(tmp_path / "text")
    save_file({"core": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="no saved FunctionalTucker"):
        FunctionalTucker.load(tmp_path / "other")
    with pytest.raises(OutputError, match="could not be written"):
        model.save(tmp_path / "missing" / "model")
    state = model.state_dict()
    del state["points.1"]
    with pytest.raises(CheckpointError, match=r"points\.1"):
        model.load_state_dict(state)


def test_no_warnings_in_ordinary_use():
    x, y, _ = field(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FunctionalTucker(2, n_iter=3).fit(x, y).predict(x, return_var=True)

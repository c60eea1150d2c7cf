import math

import pytest
import torch
from torch import nn

from tensormill.errors import InvalidArgument
from tensormill.numerics.gaussian_process import (
    DenseGram,
    GaussianProcess,
    Gram,
    generalised_mean,
    leave_one_out,
    log_marginal_likelihood,
    posterior,
)


def covariance(n, seed, dtype=torch.float64):
    root = torch.randn(n, n + 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return root @ root.mT / n


class SquaredExponential(nn.Module):
    def __init__(self, length=0.5, scale=1.0):
        super().__init__()
        self.log_length = nn.Parameter(torch.tensor(math.log(length), dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float64))

    def forward(self, a, b):
        squares = (a[:, None] - b[None]).square().sum(-1)
        return self.log_scale.exp() * torch.exp(-squares / (2 * torch.exp(2 * self.log_length)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-3)])
@pytest.mark.parametrize("n", [1, 7, 64])
def test_dense_gram_is_the_matrix(n, dtype, tolerance):
    matrix = covariance(n, n, dtype)
    gram = DenseGram(matrix, 0.1)
    full = (matrix + 0.1 * torch.eye(n, dtype=dtype)).double()
    assert isinstance(gram, Gram) and gram.size == n
    for y in (torch.randn(n, dtype=dtype), torch.randn(n, 3, dtype=dtype)):
        torch.testing.assert_close(gram.matmul(y).double(), full @ y.double(), rtol=tolerance, atol=tolerance)
        expected = torch.linalg.solve(full, y.double())
        torch.testing.assert_close(gram.solve(y).double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gram.logdet().double(), torch.logdet(full), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        gram.inverse_diagonal().double(), torch.linalg.inv(full).diagonal(), rtol=tolerance, atol=tolerance
    )


def test_dense_gram_in_batches_and_noise_per_row():
    matrices = torch.stack([covariance(9, seed) for seed in range(3)])
    noise = torch.rand(9, dtype=torch.float64)
    gram, y = DenseGram(matrices, noise), torch.randn(3, 9, 2, dtype=torch.float64)
    torch.testing.assert_close(gram.matmul(gram.solve(y)), y)
    torch.testing.assert_close(gram.solve(y[..., 0]), gram.solve(y)[..., 0])
    torch.testing.assert_close(gram.logdet(), torch.logdet(matrices + torch.diag(noise)))


def test_likelihood_is_the_normal_density_and_has_gradients():
    matrix, y = covariance(12, 0), torch.randn(12, 2, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(
        torch.zeros(12, dtype=torch.float64), matrix + 0.2 * torch.eye(12)
    )
    torch.testing.assert_close(log_marginal_likelihood(DenseGram(matrix, 0.2), y), normal.log_prob(y.mT))
    root = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randn(5, dtype=torch.float64, requires_grad=True)
    noise = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda r, s, t: log_marginal_likelihood(DenseGram(r @ r.mT, s), t), (root, noise, target)
    )


def test_leave_one_out_is_leaving_one_out():
    matrix, y = covariance(10, 1) + torch.eye(10), torch.randn(10, dtype=torch.float64)
    means, variances = leave_one_out(DenseGram(matrix), y)
    for i in range(10):
        rest = [j for j in range(10) if j != i]
        row = matrix[i, rest]
        inner = DenseGram(matrix[rest][:, rest])
        torch.testing.assert_close(means[i], row @ inner.solve(y[rest]))
        torch.testing.assert_close(variances[i], matrix[i, i] - row @ inner.solve(row))


def test_posterior_and_the_class_agree_with_scikit_learn():
    gaussian_process = pytest.importorskip("sklearn.gaussian_process")
    generator = torch.Generator().manual_seed(4)
    x, new = torch.rand(30, 2, generator=generator).double(), torch.rand(7, 2, generator=generator).double()
    y = torch.sin(5 * x[:, 0]) + x[:, 1]
    kernel = SquaredExponential(0.4)
    process = GaussianProcess(kernel, 1e-3).fit(x, y)
    oracle = gaussian_process.GaussianProcessRegressor(
        gaussian_process.kernels.RBF(0.4), alpha=1e-3, optimizer=None
    )
    oracle.fit(x.numpy(), y.numpy())
    mean, full = oracle.predict(new.numpy(), return_cov=True)
    ours = process.predict(new, covariance=True)
    torch.testing.assert_close(ours.mean, torch.from_numpy(mean), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.covariance, torch.from_numpy(full), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(process.predict(new, variance=True).variance, full_diagonal(full))
    with torch.no_grad():
        direct = posterior(process.gram(x), kernel(new, x), y, kernel(new, new))
    torch.testing.assert_close(direct.mean, ours.mean)
    torch.testing.assert_close(direct.covariance, ours.covariance, rtol=1e-8, atol=1e-10)
    assert process.log_marginal_likelihood(x, y).item() == pytest.approx(
        oracle.log_marginal_likelihood_value_
    )


def full_diagonal(matrix):
    return torch.from_numpy(matrix.diagonal().copy())


def test_learning_raises_the_likelihood_and_recovers_the_noise():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(150, 1, generator=generator).double()
    y = torch.sin(6 * x[:, 0]) + 0.1 * torch.randn(150, generator=generator).double()
    process = GaussianProcess(SquaredExponential(2.0), 1.0, learn_noise=True, mean="constant")
    before, losses = process.log_marginal_likelihood(x, y).item(), []
    process.fit(x, y, 120, progress=lambda step, loss: losses.append(loss))
    assert process.log_marginal_likelihood(x, y).item() > before + 50 and len(losses) == 120
    assert process.log_noise.exp().item() == pytest.approx(0.01, rel=0.5)
    again = GaussianProcess(SquaredExponential(), 1.0, mean="constant")
    again.load_state_dict(process.state_dict())
    new = torch.rand(5, 1, generator=generator).double()
    torch.testing.assert_close(again.fit(x, y).predict(new).mean, process.predict(new).mean)


def test_constant_mean_follows_a_shift():
    x = torch.rand(20, 1, dtype=torch.float64)
    y, new = torch.sin(4 * x[:, 0]), torch.rand(6, 1, dtype=torch.float64) + 5
    process = GaussianProcess(SquaredExponential(), 1e-4, mean="constant")
    base = process.fit(x, y).predict(new).mean
    torch.testing.assert_close(process.fit(x, y + 100).predict(new).mean, base + 100)
    gram = process.gram(x)
    torch.testing.assert_close(
        generalised_mean(gram, torch.stack([y, y + 3], 1)).diff(), torch.tensor([3.0]).double()
    )


def test_several_outputs_and_chunks(monkeypatch):
    x, y = torch.rand(40, 2).double(), torch.randn(40, 3).double()
    process = GaussianProcess(SquaredExponential(), 0.1).fit(x, y)
    new = torch.rand(33, 2).double()
    whole = process.predict(new, variance=True)
    monkeypatch.setattr("tensormill.numerics.gaussian_process._CHUNK", 200)
    parts = process.predict(new, variance=True)
    assert whole.mean.shape == (33, 3)
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.variance, whole.variance)


def test_a_matrix_that_is_not_positive_definite_says_what_to_add():
    matrix = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    with pytest.raises(InvalidArgument, match=r"smallest eigenvalue is -1\.00e\+00.*add noise of 1\.0e\+00"):
        DenseGram(matrix)
    DenseGram(matrix, 1.01)
    with pytest.raises(InvalidArgument, match="not finite"):
        DenseGram(matrix * float("nan"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DenseGram(torch.ones(2, 3)), r"shape \(\.\.\., n, n\)"),
        (lambda: DenseGram(torch.eye(2).long()), "float32 or float64"),
        (lambda: DenseGram(torch.eye(2), torch.ones(3)), "one per row"),
        (lambda: DenseGram(torch.eye(2)).solve(torch.ones(3)), "as the matrix has rows"),
        (lambda: log_marginal_likelihood(DenseGram(torch.eye(2)), torch.ones(3)), "for this Gram"),
        (lambda: posterior(DenseGram(torch.eye(2)), torch.ones(3, 3), torch.ones(2)), r"\(m, 2\)"),
        (
            lambda: posterior(DenseGram(torch.eye(2)), torch.ones(3, 2), torch.ones(2), torch.ones(2)),
            "given prior",
        ),
        (lambda: GaussianProcess(SquaredExponential(), -1.0), "variance of 0 or more"),
        (lambda: GaussianProcess(SquaredExponential(), 0.0, learn_noise=True), "noise above 0"),
        (lambda: GaussianProcess(SquaredExponential(), mean="linear"), '"zero" or "constant"'),
        (lambda: GaussianProcess(SquaredExponential()).predict(torch.ones(1, 1)), r"call fit\(x, y\)"),
        (lambda: GaussianProcess(SquaredExponential()).fit(torch.ones(2, 1), torch.ones(3)), "as many"),
        (
            lambda: GaussianProcess(SquaredExponential()).fit(torch.ones(1, 1), torch.tensor([float("nan")])),
            "not finite",
        ),
        (
            lambda: GaussianProcess(lambda a, b: a @ b.mT).fit(torch.ones(1, 1), torch.ones(1), 3),
            "no hyperparameter",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call()

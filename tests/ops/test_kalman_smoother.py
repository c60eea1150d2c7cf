"""What is special to the Kalman smoother; the battery does the comparison with the reference."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.errors import InvalidArgument
from tensormill.operator import use_implementation
from tensormill.ops import OPERATORS, kalman_smoother
from tensormill.ops.correctness import deviation

operator = OPERATORS["kalman_smoother"]
IMPLEMENTATIONS = [i.name for i in operator.implementations if "cpu" in i.devices and i.missing() is None]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def problem(steps, states, outputs, seed, **more):
    """Arguments without a batch dimension."""
    shape = {"batch": 1, "steps": steps, "states": states, "outputs": outputs, "dtype": "float64", **more}
    generator = torch.Generator().manual_seed(seed)
    arguments = operator.inputs(shape, torch.device("cpu"), generator)
    return [a if i == 2 else a[0] for i, a in enumerate(arguments)]


def dense(transition, noise, emission, precision, information, mean, covariance):
    """Moments and evidence from the joint Gaussian of all states, (T S, T S)."""
    steps, size, _ = transition.shape
    means, blocks = [], torch.zeros(steps, steps, size, size, dtype=mean.dtype)
    for t in range(steps):
        mean = transition[t] @ mean
        covariance = transition[t] @ covariance @ transition[t].T + noise[t]
        means.append(mean)
        blocks[t, t] = covariance
        for s in range(t):
            blocks[t, s] = transition[t] @ blocks[t - 1, s]
            blocks[s, t] = blocks[t, s].T
    m = torch.cat(means)
    joint = blocks.permute(0, 2, 1, 3).reshape(steps * size, steps * size)
    site = torch.block_diag(*(emission.T @ p @ emission for p in precision))
    seen = (information @ emission).flatten()
    widened = torch.eye(steps * size, dtype=m.dtype) + joint @ site
    posterior = torch.linalg.solve(widened, joint)
    news = seen - site @ m
    evidence = -torch.logdet(widened) / 2 + news @ posterior @ news / 2 + seen @ m - m @ site @ m / 2
    diagonal = posterior.reshape(steps, size, steps, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return (m + posterior @ news).view(steps, size), diagonal, evidence


@every_implementation
@pytest.mark.parametrize(("steps", "states", "outputs"), [(1, 1, 1), (13, 3, 2), (20, 2, 3), (33, 4, 1)])
@pytest.mark.parametrize("values", ["normal", "missing", "still"])
def test_equals_joint_gaussian(implementation, steps, states, outputs, values):
    arguments = problem(steps, states, outputs, seed=steps, values=values)
    with use_implementation(kalman_smoother=implementation):
        found = kalman_smoother(*arguments)
    mean, covariance, evidence = dense(*arguments)
    for actual, expected in (
        (found.mean, mean),
        (found.covariance, covariance),
        (found.log_evidence, evidence),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@every_implementation
@pytest.mark.parametrize("seed", range(12))
def test_singular_precisions(implementation, seed):
    """Few outputs of many states: what the future says is singular, and needs care when it is factored."""
    arguments = problem(9, 6, 2, seed=seed, values="missing")
    with use_implementation(kalman_smoother=implementation):
        found = kalman_smoother(*arguments)
    mean, covariance, _ = dense(*arguments)
    torch.testing.assert_close(found.mean, mean, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.covariance, covariance, rtol=1e-9, atol=1e-10)


@every_implementation
def test_filter_ignores_what_comes_later(implementation):
    arguments = problem(30, 3, 2, seed=0)
    with use_implementation(kalman_smoother=implementation):
        whole = kalman_smoother(*arguments)
        cut = [a[:17] if i in (0, 1, 3, 4) else a for i, a in enumerate(arguments)]
        part = kalman_smoother(*cut)
    torch.testing.assert_close(part.filtered_mean, whole.filtered_mean[:17])
    torch.testing.assert_close(part.mean[-1], whole.filtered_mean[16])
    torch.testing.assert_close(part.covariance[-1], whole.filtered_covariance[16])


@every_implementation
def test_filters_meet_everywhere(implementation):
    """The prediction from the left times all potentials from here on is the smoothed state."""
    arguments = problem(25, 3, 2, seed=1)
    with use_implementation(kalman_smoother=implementation):
        found = kalman_smoother(*arguments)
    t = 9
    mean = arguments[0][t] @ found.filtered_mean[t - 1]
    wide = arguments[0][t] @ found.filtered_covariance[t - 1] @ arguments[0][t].T + arguments[1][t]
    covariance = torch.linalg.inv(torch.linalg.inv(wide) + found.future_precision[t])
    news = found.future_information[t] - found.future_precision[t] @ mean
    torch.testing.assert_close(covariance, found.covariance[t])
    torch.testing.assert_close(mean + covariance @ news, found.mean[t])


def test_batch_is_each_series_alone():
    series = [problem(12, 3, 2, seed=s) for s in range(4)]
    emission = series[0][2]
    for one in series:
        one[2] = emission
    together = [emission if i == 2 else torch.stack([one[i] for one in series]) for i in range(7)]
    found = kalman_smoother(*together)
    for b, one in enumerate(series):
        for actual, expected in zip(found, kalman_smoother(*one), strict=True):
            torch.testing.assert_close(actual[b], expected, rtol=1e-13, atol=1e-13)


def test_evidence_has_the_moments_as_gradients():
    """d log Z / dh = E[u] and d log Z / dL = -E[u u'] / 2 (Fisher's identity): oracle of the backward pass."""
    arguments = problem(21, 4, 2, seed=3)
    arguments[3].requires_grad_()
    arguments[4].requires_grad_()
    found = kalman_smoother(*arguments)
    by_precision, by_information = torch.autograd.grad(found.log_evidence, arguments[3:5])
    emission = arguments[2]
    mean = (found.mean @ emission.T).detach()
    second = (emission @ found.covariance @ emission.T).detach() + mean[:, :, None] * mean[:, None, :]
    torch.testing.assert_close(by_information, mean)
    torch.testing.assert_close(by_precision, -second / 2)


def test_gradients_equal_finite_differences():
    arguments = problem(4, 2, 1, seed=4)

    def symmetric(*leaves):
        leaves = list(leaves)
        for i in (1, 3, 6):
            leaves[i] = (leaves[i] + leaves[i].mT) / 2
        found = kalman_smoother(*leaves)
        return found.mean, found.covariance, found.log_evidence

    assert torch.autograd.gradcheck(symmetric, [a.requires_grad_() for a in arguments])


@every_implementation
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 3),
    st.floats(-6, 10),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_covariances_stay_positive(implementation, steps, states, outputs, magnitude, still, seed):
    arguments = problem(steps, states, outputs, seed, values="still" if still else "normal")
    arguments[3], arguments[4] = arguments[3] * 10**magnitude, arguments[4] * 10**magnitude
    with use_implementation(kalman_smoother=implementation):
        found = kalman_smoother(*arguments)
    # By construction in C++; where systems are solved instead, up to their rounding.
    allowed = 1e-12 if implementation == "cpu" else 1e-4
    for covariance in (found.covariance, found.filtered_covariance, found.future_precision):
        torch.testing.assert_close(covariance, covariance.mT, rtol=1e-12, atol=0)
        least = torch.linalg.eigvalsh(covariance).amin(-1)
        assert bool((least >= -allowed * covariance.abs().amax((-1, -2))).all())
    if implementation == "cpu":
        widest = torch.linalg.eigvalsh(found.filtered_covariance - found.covariance).amin(-1)
        size, future = (x.abs().amax((-1, -2)) for x in (found.filtered_covariance, found.future_precision))
        # A covariance is joined to what the future says by a solve, whose condition is at most 1 + their product.
        rounding = 64 * torch.finfo(torch.float64).eps * size * (1 + size * future)
        assert bool((widest >= -rounding).all()), "smoothing knows no less than filtering"


def test_planted_error_is_seen():
    arguments = operator.inputs(
        operator.samples[0].shape, torch.device("cpu"), torch.Generator().manual_seed(0)
    )
    expected = operator.reference(*arguments)
    wrong = [a.clone() for a in arguments]
    wrong[1][:, 7] *= 1 + 1e-6
    actual = operator(*wrong)
    assert deviation(actual[1], expected[1], operator.tolerance(torch.float64, operator.samples[0].shape))


@pytest.mark.skipif("cpu" not in IMPLEMENTATIONS, reason="the C++ kernels are not built")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa):
    code = (
        "import torch; from tensormill.ops import OPERATORS; from tensormill.ops.kalman_smoother.cpu import *\n"
        "o = OPERATORS['kalman_smoother']\n"
        "for s in o.samples:\n"
        "    if s.large or 'float32' in s.name: continue\n"
        "    a = o.inputs(s.shape, torch.device('cpu'), torch.Generator().manual_seed(1))\n"
        "    for x, y in zip(kalman_smoother(*a), o.reference(*a)):\n"
        "        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)\n"
        "print(instruction_set())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TENSORMILL_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() in (isa, "portable")


def test_refusals():
    arguments = problem(5, 2, 1, seed=0)

    def refused(position, value, match):
        changed = list(arguments)
        changed[position] = value
        with pytest.raises(InvalidArgument, match=match):
            kalman_smoother(*changed)

    refused(0, arguments[0][:, :1], "transition of shape")
    refused(1, arguments[1][:4], "process_noise of shape")
    refused(2, arguments[2][0], "emission of shape")
    refused(3, arguments[3].float(), "one dtype and device")
    refused(4, arguments[4].tolist(), "expected a Tensor")
    refused(4, arguments[4].half(), "float64 or float32")
    refused(5, arguments[5][:1], "initial_mean of shape")
    refused(0, arguments[0][:0], "0 steps")

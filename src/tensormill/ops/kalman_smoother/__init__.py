"""Kalman smoother in information form: all marginals of a Gaussian Markov chain, and its evidence, in O(T).

`x_t = A_t x_{t-1} + q_t`, `q_t ~ N(0, Q_t)`, seen through potentials `exp(-u'L_t u/2 + h_t'u)` of `u = H x_t`. A Gaussian
observation y of noise covariance R is the potential `L = R^-1, h = R^-1 y`; `L = 0` is no observation; L may be singular
(Sarkka, Bayesian Filtering and Smoothing, 2013; the two filters of Fraser and Potter, 1969). Beside the smoothed
moments it returns what both filters know, from which the state between two steps follows exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, native_missing
from tensormill.ops.kalman_smoother import reference
from tensormill.roofline import Cost

SCHEMA = (
    "(Tensor transition, Tensor process_noise, Tensor emission, Tensor precision, Tensor information, "
    "Tensor initial_mean, Tensor initial_covariance) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
DTYPES = (torch.float32, torch.float64)

Shape = Mapping[str, Any]


def cost(shape: Shape) -> Cost:
    """About 24 S^3 operations a step (products and triangular solves); inputs read once, results written once."""
    dtype = getattr(torch, shape["dtype"])
    batch, steps, s, r = (shape[k] for k in ("batch", "steps", "states", "outputs"))
    unit = "fp64" if dtype == torch.float64 else "fp32"
    operations = float(batch * steps * (24 * s**3 + 8 * s * s * r))
    read = batch * steps * (2 * s * s + r * r + r) + r * s + batch * (s * s + s)
    written = batch * steps * 3 * (s * s + s) + batch
    return Cost({unit: operations}, read * dtype.itemsize, written * dtype.itemsize)


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    batch, steps, s, r = (shape[k] for k in ("batch", "steps", "states", "outputs"))
    values = shape.get("values", "normal")

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float64)

    def covariances(*size: int) -> Tensor:
        root = normal(*size, s, s) / s**0.5
        return root @ root.mT + 0.1 * torch.eye(s, dtype=torch.float64, device=device)

    transition = 0.9 * torch.linalg.qr(normal(batch, steps, s, s))[0]
    process_noise = 0.3 * covariances(batch, steps)
    emission = normal(r, s) / s**0.5
    emission = emission + 0.5 * emission.sign()  # near zero nothing is seen: an evidence of rounding alone
    root = normal(batch, steps, r, max(1, r - 1))  # singular for r > 1
    precision = root @ root.mT
    if values == "missing":
        precision[:, ::2] = 0
    elif values == "certain":
        precision = precision * 10
    elif values == "still":
        process_noise[:, 1::2] = 0
    elif values != "normal":
        raise InvalidArgument(f"given values={values!r}, expected normal, missing, certain or still")
    information = (precision @ normal(batch, steps, r, 1)).squeeze(-1)
    arguments = [
        transition,
        process_noise,
        emission,
        precision,
        information,
        normal(batch, s),
        covariances(batch),
    ]
    if shape.get("strided", False):
        arguments = [torch.stack([a, -a], -1)[..., 0] for a in arguments]
    return tuple(a.to(getattr(torch, shape["dtype"])) for a in arguments)


def _sample(kind: str, batch: int, steps: int, states: int, outputs: int, dtype: str, **more: Any) -> Sample:
    benchmark, large = more.pop("benchmark", False), more.pop("large", False)
    described = [str(v) if k == "values" else k for k, v in more.items()]
    name = "-".join([f"{batch}x{steps}-s{states}-r{outputs}", dtype, *described])
    shape = {"batch": batch, "steps": steps, "states": states, "outputs": outputs, "dtype": dtype, **more}
    return Sample(name, shape, kind, benchmark, large)  # type: ignore[arg-type]


def samples() -> list[Sample]:
    """Bundles of Matern functions (states: functions times 1, 2 or 3), long series, many short ones; edge cases.

    The small ones are batches: a single series' evidence can be near zero, where no relative error means anything.
    """
    return [
        _sample("typical", 6, 60, 4, 2, "float64"),
        _sample("typical", 1, 1461, 6, 3, "float64", benchmark=True, large=True),
        _sample("typical", 1, 1461, 21, 7, "float64", benchmark=True, large=True),
        _sample("typical", 1, 1 << 16, 4, 2, "float64", benchmark=True, large=True),
        _sample("typical", 256, 100, 4, 2, "float32", benchmark=True, large=True),
        _sample("typical", 6, 100, 2, 1, "float64", benchmark=True),
        _sample("ragged", 5, 13, 5, 3, "float64"),
        _sample("ragged", 5, 31, 7, 1, "float32"),
        _sample("ragged", 7, 63, 3, 2, "float32", strided=True),
        _sample("ragged", 7, 9, 2, 5, "float64", strided=True),
        _sample("tiny", 8, 1, 1, 1, "float64"),
        _sample("tiny", 8, 2, 1, 1, "float32"),
        _sample("tiny", 0, 3, 2, 1, "float64"),
        _sample("extreme", 6, 40, 4, 2, "float64", values="missing"),
        _sample("extreme", 6, 40, 3, 2, "float64", values="still"),
        _sample("extreme", 6, 20, 2, 1, "float64", values="certain"),
    ]


def _fake(
    transition: Tensor,
    process_noise: Tensor,
    emission: Tensor,
    precision: Tensor,
    information: Tensor,
    initial_mean: Tensor,
    initial_covariance: Tensor,
) -> tuple[Tensor, ...]:
    batch, steps, s, _ = transition.shape
    vectors, matrices = (batch, steps, s), (batch, steps, s, s)
    return tuple(transition.new_empty(shape) for shape in (vectors, matrices) * 3 + ((batch,),))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
    """Gradients of all inputs: the parallel scan is computed again, under autograd."""
    from tensormill.ops.kalman_smoother import associative

    inputs = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [i.detach().requires_grad_() for i in inputs]
        outputs = associative.kalman_smoother(*leaves)
        live = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
        found = torch.autograd.grad([o for o, _ in live], leaves, [g for _, g in live], allow_unused=True)
    return tuple(torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True))


operator = Operator(
    "kalman_smoother",
    schema=SCHEMA,
    reference=reference.kalman_smoother,
    fake=_fake,
    cost=cost,
    inputs=_inputs,
    samples=samples(),
    differentiable=tuple(range(7)),
    setup_context=_setup_context,
    backward=_backward,
    # Errors grow along the chain as in a sum, and with every solve of a step.
    reduction=lambda shape: 100 * max(1, shape["steps"]) * shape["states"],
)
operator.implementation(
    "cpu",
    devices=("cpu",),
    entry="tensormill.ops.kalman_smoother.cpu:kalman_smoother",
    missing=native_missing("tensormill.ops.kalman_smoother._cpu"),
)
operator.implementation(
    "associative",
    devices=("cpu", "cuda"),
    entry="tensormill.ops.kalman_smoother.associative:kalman_smoother",
)


class Smoothed(NamedTuple):
    """What the smoother knows at every step; a batch adds a first dimension B.

    Attributes:
        mean: (T, S), of the state given all potentials.
        covariance: (T, S, S), likewise.
        filtered_mean: (T, S), given the potentials up to and at each step.
        filtered_covariance: (T, S, S), likewise.
        future_information: (T, S), and
        future_precision: (T, S, S): what the potentials at each step and after it say about its state, as the potential
            `exp(-x'Jx/2 + j'x)`.
        log_evidence: (), log of the expectation of the product of all potentials under the chain's prior.
    """

    mean: Tensor
    covariance: Tensor
    filtered_mean: Tensor
    filtered_covariance: Tensor
    future_information: Tensor
    future_precision: Tensor
    log_evidence: Tensor


def kalman_smoother(
    transition: Tensor,
    process_noise: Tensor,
    emission: Tensor,
    precision: Tensor,
    information: Tensor,
    initial_mean: Tensor,
    initial_covariance: Tensor,
) -> Smoothed:
    """Moments of a Gaussian Markov chain given Gaussian potentials at its steps.

    All arguments float32 or all float64 (which the chain of smooth functions at close points wants), on one device; a
    leading batch dimension B is allowed on all but `emission`.

    Args:
        transition: (T, S, S), from the step before; the first one from the initial state (the identity, usually).
        process_noise: (T, S, S), covariance of what is added at each step, positive semidefinite; zero is allowed.
        emission: (r, S), what of the state the potentials see.
        precision: (T, r, r), symmetric, positive semidefinite, singular or zero where little or nothing was seen.
        information: (T, r); precision times what was seen.
        initial_mean: (S,).
        initial_covariance: (S, S), positive semidefinite.

    Returns:
        `Smoothed`. Differentiable once in every argument.

    Raises:
        InvalidArgument: shapes, dtypes or devices do not belong together.

    Example:
        Two sightings of a random walk, at 1 and at 3, of variance 1 each:

        >>> import torch
        >>> from tensormill.ops import kalman_smoother
        >>> one = torch.ones(2, 1, 1)
        >>> seen = torch.tensor([[1.0], [3.0]])
        >>> found = kalman_smoother(one, one, one[0], one, seen, torch.zeros(1), torch.zeros(1, 1))
        >>> found.mean.flatten()
        tensor([1.0000, 2.0000])
    """
    given = {
        "transition": transition,
        "process_noise": process_noise,
        "emission": emission,
        "precision": precision,
        "information": information,
        "initial_mean": initial_mean,
        "initial_covariance": initial_covariance,
    }
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise InvalidArgument(f"given {name} of type {type(value).__name__}, expected a Tensor")
        if value.dtype not in DTYPES:
            raise InvalidArgument(
                f"given {name} of dtype {value.dtype}, expected float64 or float32; convert it"
            )
        if value.dtype != transition.dtype or value.device != transition.device:
            raise InvalidArgument(
                f"given {name} as {value.dtype} on {value.device} and transition as {transition.dtype} on "
                f"{transition.device}, expected one dtype and device; use .to(transition)"
            )
    if transition.dim() not in (3, 4) or transition.shape[-1] != transition.shape[-2]:
        raise InvalidArgument(f"given transition of shape {tuple(transition.shape)}, expected ([B,] T, S, S)")
    if emission.dim() != 2:
        raise InvalidArgument(f"given emission of shape {tuple(emission.shape)}, expected (r, S)")
    *batch, steps, s, _ = transition.shape
    r = emission.shape[0]
    if min(s, r, steps) < 1:
        raise InvalidArgument(
            f"given {steps} steps, {s} states and {r} outputs, expected at least one of each"
        )
    expected = {
        "process_noise": (*batch, steps, s, s),
        "emission": (r, s),
        "precision": (*batch, steps, r, r),
        "information": (*batch, steps, r),
        "initial_mean": (*batch, s),
        "initial_covariance": (*batch, s, s),
    }
    for name, shape in expected.items():
        if tuple(given[name].shape) != shape:
            raise InvalidArgument(
                f"given {name} of shape {tuple(given[name].shape)}, expected {shape} for transition of shape "
                f"{tuple(transition.shape)} and {r} outputs"
            )
    if batch:
        return Smoothed(*operator(*given.values()))
    results = operator(*(v if n == "emission" else v.unsqueeze(0) for n, v in given.items()))
    return Smoothed(*(result.squeeze(0) for result in results))

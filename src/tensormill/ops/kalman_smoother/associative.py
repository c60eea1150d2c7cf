"""The smoother as a parallel scan: depth of the order log T, so that a GPU is busy on one series.

A step is a map from the state before it to a Gaussian with the potentials met on the way: `x' | x ~ N(A x + b, C)`
times `exp(-x'Jx/2 + j'x)`. Composition of such maps is associative (Sarkka and Garcia-Fernandez, Temporal
parallelization of Bayesian smoothers, IEEE Transactions on Automatic Control 66, 2021). Prefixes give the filter; the
potentials of suffixes are what the future says, so that no second kind of element is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.ops.kalman_smoother.gaussians import log_potential, predicted, symmetric, updated

Element = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""A (B, T, S, S), b (B, T, S), C (B, T, S, S), j (B, T, S), J (B, T, S, S)."""


def compose(first: Element, second: Element) -> Element:
    """`second` after `first`, for all steps at once."""
    a1, b1, c1, j1, big_j1 = first
    a2, b2, c2, j2, big_j2 = second
    size = a1.shape[-1]
    identity = torch.eye(size, dtype=a1.dtype, device=a1.device)
    shifted = (b1 + (c1 @ j2.unsqueeze(-1)).squeeze(-1)).unsqueeze(-1)
    solved = torch.linalg.solve(identity + c1 @ big_j2, torch.cat([a1, c1, shifted], -1))
    kept, narrow, middle = solved.split([size, size, 1], -1)
    news = j2.unsqueeze(-1) - big_j2 @ b1.unsqueeze(-1)
    return (
        a2 @ kept,
        (a2 @ middle).squeeze(-1) + b2,
        symmetric(a2 @ narrow @ a2.mT + c2),
        (kept.mT @ news).squeeze(-1) + j1,
        symmetric(kept.mT @ big_j2 @ a1 + big_j1),
    )


def prefixes(elements: Element, backwards: bool = False) -> Element:
    """Composition of elements 0 to t for every t; backwards, of elements t to T - 1."""
    steps = elements[0].shape[1]
    if steps <= 1:
        return elements
    if backwards:
        flipped = prefixes_of(tuple(e.flip(1) for e in elements), lambda a, b: compose(b, a))
        return tuple(e.flip(1) for e in flipped)  # type: ignore[return-value]
    return prefixes_of(elements, compose)


def prefixes_of(elements, combine):  # type: ignore[no-untyped-def]
    """Work-efficient scan along dimension 1: pairs, then their prefixes, then what lies between."""
    steps = elements[0].shape[1]
    if steps == 1:
        return elements
    even = tuple(e[:, 0 : 2 * (steps // 2) : 2] for e in elements)
    odd = tuple(e[:, 1::2] for e in elements)
    at_odd = prefixes_of(combine(even, odd), combine)
    count = (steps - 1) // 2
    between = (
        combine(tuple(e[:, :count] for e in at_odd), tuple(e[:, 2::2] for e in elements)) if count else None
    )
    result = []
    for i, element in enumerate(elements):
        evens = element[:, :1] if between is None else torch.cat([element[:, :1], between[i]], 1)
        paired = torch.stack([evens[:, : steps // 2], at_odd[i]], 2).flatten(1, 2)
        result.append(torch.cat([paired, evens[:, steps // 2 :]], 1))
    return tuple(result)


def kalman_smoother(
    transition: Tensor,
    process_noise: Tensor,
    emission: Tensor,
    precision: Tensor,
    information: Tensor,
    initial_mean: Tensor,
    initial_covariance: Tensor,
) -> tuple[Tensor, ...]:
    """See `tensormill.ops.kalman_smoother.reference`; differentiable by torch's autograd."""
    size = transition.shape[-1]
    process_noise, precision = symmetric(process_noise), symmetric(precision)
    initial_covariance = symmetric(initial_covariance)
    site_precision = emission.T @ precision @ emission
    site_information = information @ emission
    identity = torch.eye(size, dtype=transition.dtype, device=transition.device)
    solved = torch.linalg.solve(
        identity + process_noise @ site_precision, torch.cat([transition, process_noise], -1)
    )
    kept, narrow = solved.split([size, size], -1)
    narrow = symmetric(narrow)
    news = site_information.unsqueeze(-1)
    start = updated(
        *predicted(initial_mean, initial_covariance, transition[:, 0], process_noise[:, 0]),
        site_precision[:, 0],
        site_information[:, 0],
    )
    first_mean, first_covariance = (s.unsqueeze(1) for s in start)
    elements: Element = (
        torch.cat([torch.zeros_like(kept[:, :1]), kept[:, 1:]], 1),
        torch.cat([first_mean, (narrow @ news).squeeze(-1)[:, 1:]], 1),
        torch.cat([first_covariance, narrow[:, 1:]], 1),
        (kept.mT @ news).squeeze(-1),
        symmetric(kept.mT @ site_precision @ transition),
    )
    _, mean, covariance, _, _ = prefixes(elements)
    later: Element = tuple(e[:, 1:] for e in elements)  # type: ignore[assignment]
    *_, later_information, later_precision = prefixes(later, backwards=True)
    end = torch.zeros_like(mean[:, :1])
    later_information = torch.cat([later_information, end], 1)
    later_precision = torch.cat([later_precision, torch.zeros_like(covariance[:, :1])], 1)
    smoothed_mean, smoothed_covariance = updated(mean, covariance, later_precision, later_information)
    before = torch.cat([initial_mean.unsqueeze(1), mean[:, :-1]], 1)
    wide = torch.cat([initial_covariance.unsqueeze(1), covariance[:, :-1]], 1)
    before, wide = predicted(before, wide, transition, process_noise)
    evidence = log_potential(before, wide, emission, precision, information).sum(1)
    return (
        smoothed_mean,
        smoothed_covariance,
        mean,
        covariance,
        later_information + site_information,
        symmetric(later_precision + site_precision),
        evidence,
    )

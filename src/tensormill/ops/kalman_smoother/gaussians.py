"""Steps on batches of Gaussians that the reference and the parallel scan share; leading dimensions are free.

A potential `exp(-x'Jx/2 + j'x)` has a precision J that may be singular, so nothing here inverts one; every matrix that
is solved has eigenvalues of at least one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part of (..., n, n)."""
    return (matrix + matrix.mT) / 2


def predicted(mean: Tensor, covariance: Tensor, transition: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of `transition @ x + noise`."""
    moved = (transition @ mean.unsqueeze(-1)).squeeze(-1)
    return moved, symmetric(transition @ covariance @ transition.mT + noise)


def updated(
    mean: Tensor, covariance: Tensor, precision: Tensor, information: Tensor
) -> tuple[Tensor, Tensor]:
    """N(mean, covariance) times a potential of this precision and information, normalised."""
    identity = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    narrow = symmetric(torch.linalg.solve(identity + covariance @ precision, covariance))
    news = information.unsqueeze(-1) - precision @ mean.unsqueeze(-1)
    return mean + (narrow @ news).squeeze(-1), narrow


def through(
    information: Tensor, precision: Tensor, transition: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """What a potential on `transition @ x + noise` says of x: its information and precision."""
    identity = torch.eye(information.shape[-1], dtype=information.dtype, device=information.device)
    both = torch.cat([precision, information.unsqueeze(-1)], -1)
    both = transition.mT @ torch.linalg.solve(identity + precision @ noise, both)
    return both[..., -1], symmetric(both[..., :-1] @ transition)


def log_potential(
    mean: Tensor, covariance: Tensor, emission: Tensor, precision: Tensor, information: Tensor
) -> Tensor:
    """`log E exp(-u'Lu/2 + h'u)` for u = emission @ x, x ~ N(mean, covariance), L = precision, h = information."""
    at = (emission @ mean.unsqueeze(-1)).squeeze(-1)
    spread = emission @ covariance @ emission.mT
    identity = torch.eye(at.shape[-1], dtype=at.dtype, device=at.device)
    widened = identity + spread @ precision
    news = information - (precision @ at.unsqueeze(-1)).squeeze(-1)
    gain = torch.linalg.solve(widened, spread @ news.unsqueeze(-1)).squeeze(-1)
    there = (information + news) * at / 2  # h'u - u'Lu/2
    return (news * gain / 2 + there).sum(-1) - torch.linalg.slogdet(widened).logabsdet / 2

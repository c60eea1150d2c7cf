"""The definition of the Kalman smoother in plain PyTorch, one step after another."""

import torch
from torch import Tensor

from tensormill.ops.kalman_smoother.gaussians import log_potential, predicted, symmetric, through, updated


def kalman_smoother(
    transition: Tensor,
    process_noise: Tensor,
    emission: Tensor,
    precision: Tensor,
    information: Tensor,
    initial_mean: Tensor,
    initial_covariance: Tensor,
) -> tuple[Tensor, ...]:
    """Filter forwards, collect what the future says backwards, and join the two at every step.

    Args:
        transition: (B, T, S, S), from the step before into this one.
        process_noise: (B, T, S, S), covariance of what is added; of this and the other symmetric matrices the
            symmetric part counts, so that their gradients are symmetric.
        emission: (r, S).
        precision: (B, T, r, r), symmetric, positive semidefinite.
        information: (B, T, r).
        initial_mean: (B, S).
        initial_covariance: (B, S, S).

    Returns:
        Smoothed means (B, T, S) and covariances (B, T, S, S), filtered means and covariances, information (B, T, S)
        and precision (B, T, S, S) of the potentials at each step and after it, log evidence (B,).
    """
    steps = transition.shape[1]
    process_noise, precision = symmetric(process_noise), symmetric(precision)
    initial_covariance = symmetric(initial_covariance)
    site_precision = emission.T @ precision @ emission  # [B, T, S, S]
    site_information = information @ emission  # [B, T, S]
    mean, covariance = initial_mean, initial_covariance
    log_evidence = torch.zeros_like(initial_mean[:, 0])
    means, covariances = [], []
    for t in range(steps):
        mean, covariance = predicted(mean, covariance, transition[:, t], process_noise[:, t])
        before, wide = mean, covariance
        mean, covariance = updated(before, wide, site_precision[:, t], site_information[:, t])
        log_evidence = log_evidence + log_potential(
            before, wide, emission, precision[:, t], information[:, t]
        )
        means.append(mean)
        covariances.append(covariance)
    later_information = torch.zeros_like(initial_mean)
    later_precision = torch.zeros_like(initial_covariance)
    smoothed, information_from, precision_from = [], [], []
    for t in reversed(range(steps)):
        smoothed.append(updated(means[t], covariances[t], later_precision, later_information))
        from_here = later_information + site_information[:, t], later_precision + site_precision[:, t]
        information_from.append(from_here[0])
        precision_from.append(symmetric(from_here[1]))
        later_information, later_precision = through(*from_here, transition[:, t], process_noise[:, t])
    return (
        torch.stack([m for m, _ in reversed(smoothed)], 1),
        torch.stack([c for _, c in reversed(smoothed)], 1),
        torch.stack(means, 1),
        torch.stack(covariances, 1),
        torch.stack(information_from[::-1], 1),
        torch.stack(precision_from[::-1], 1),
        log_evidence,
    )

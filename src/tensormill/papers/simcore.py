"""Chooses from an open set the samples that help to pretrain for a fine-grained task."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="simcore",
    title="Coreset Sampling from Open-Set for Fine-Grained Self-Supervised Learning",
    authors="Kim et al.",
    arxiv="2303.11101",
    room="data",
    figures=(
        Figure(
            "accuracy",
            "Linear-probe accuracy gained over pretraining on the target set alone",
            10.5,
            "% accuracy",
            "mean of 11 fine-grained sets, ImageNet as open set",
        ),
        Figure(
            "cars",
            "Linear probe on Cars",
            60.29,
            "% accuracy",
            "quoted by third parties",
            verified=False,
        ),
        Figure(
            "pets",
            "Linear probe on Pets",
            81.75,
            "% accuracy",
            "quoted by third parties",
            verified=False,
        ),
    ),
)

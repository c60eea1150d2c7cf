"""Convolutions equivariant to affine and projective maps, sampled through group decompositions."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="lie_group_decompositions",
    title="Lie Group Decompositions for Equivariant Neural Networks",
    authors="Mironenco and Forré",
    arxiv="2310.11366",
    room="models",
    figures=(
        Figure(
            "affnist",
            "affNIST accuracy, trained on untransformed digits",
            98.1,
            "%",
            "SL(2) and GL+(2) networks; earlier affConv 95.1, capsules 97.7",
            verified=False,
        ),
        Figure(
            "samples",
            "Group samples per layer that suffice",
            10,
            "samples",
            "official README",
        ),
    ),
)

"""What the paper publishes."""

from __future__ import annotations

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="infinite_width_features",
    title="Feature Learning in Infinite-Width Neural Networks",
    authors="Yang and Hu",
    arxiv="2011.14522",
    room="numerics",
    figures=(
        Figure(
            "omniglot",
            "Omniglot, 1 shot of 5 ways, at infinite width under muP",
            66.4,
            "% accuracy",
            "first-order MAML; NTK of a ReLU network 47.7; read from the official plot",
        ),
        Figure(
            "omniglot-ntk",
            "Omniglot, 1 shot of 5 ways, kernel limit of a ReLU network",
            47.7,
            "% accuracy",
            "read from the official plot",
        ),
        Figure(
            "text8",
            "Word2Vec on text8 at infinite width, word analogies",
            43.4,
            "% accuracy",
            "15 epochs; width 64: 33.4; read from the official plot",
        ),
        Figure(
            "fil9",
            "Word2Vec on fil9 at infinite width, word analogies",
            56.5,
            "% accuracy",
            "5 epochs; width 64: 44.4; read from the official plot",
        ),
    ),
)

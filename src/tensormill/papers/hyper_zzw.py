"""Convolutional network whose full-size kernels are made by small networks, without residual connections."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="hyper_zzw",
    title="HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction",
    authors="Zhang",
    arxiv="2401.17948",
    room="models",
    figures=(
        Figure(
            "cifar10",
            "Best accuracy on CIFAR-10",
            95.32,
            "%",
            "released logs, 102 evaluations",
        ),
        Figure(
            "cifar100",
            "Best accuracy on CIFAR-100",
            75.68,
            "%",
            "released logs",
        ),
        Figure(
            "convergence",
            "Accuracy on CIFAR-10 after 17 epochs",
            92.62,
            "%",
            "released logs",
        ),
    ),
)

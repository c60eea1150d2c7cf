"""The kernel that governs training of infinitely wide networks."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="ntk",
    title="Neural Tangent Kernel: Convergence and Generalization in Neural Networks",
    authors="Jacot et al.",
    arxiv="1806.07572",
    room="numerics",
    figures=(
        Figure(
            "kernel-spread",
            "The kernel's spread over initialisations shrinks from width 500 to this width",
            10000,
            "width",
            "4 ReLU layers on the unit circle, 10 initialisations; curves only",
            verified=False,
        ),
        Figure(
            "regression",
            "Ensembles of finite networks match the Gaussian prediction from width",
            1000,
            "width",
            "4 points, 10/50/90 percentiles; curves only",
            verified=False,
        ),
        Figure(
            "mnist-decay",
            "The error along a principal component of MNIST decays at the predicted rate at width",
            10000,
            "width",
            "second component; curves only",
            verified=False,
        ),
    ),
)

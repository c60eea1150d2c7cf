"""Randomised low-discrepancy points, and kernel methods in n log n on them."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="qmc",
    title=(
        "QMCPy: A Python Software for Randomized Low-Discrepancy Sequences, Quasi-Monte Carlo, and Fast "
        "Kernel Methods"
    ),
    authors="Sorokin",
    arxiv="2502.14256",
    room="numerics",
    figures=(
        Figure(
            "gram-exponent",
            "Gram products and solves cost n log n instead of n^2 and n^3",
            1,
            "exponent",
            "shift-invariant kernels on lattices, digitally so on nets",
        ),
        Figure(
            "rmse-lattice",
            "Integration error with low-discrepancy points decays with this power of n",
            -1.0,
            "exponent",
            "plain Monte Carlo -0.5",
            verified=False,
        ),
        Figure(
            "rmse-scrambled",
            "Integration error with scrambled nets decays with this power of n",
            -1.5,
            "exponent",
            "smooth integrands",
            verified=False,
        ),
        Figure(
            "doubling",
            "Doubling the points updates the transform in linear time",
            1,
            "exponent",
            "derivation",
        ),
    ),
)

"""Functional Tucker decomposition on Chebyshev grids, for long-range potentials of many particles."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="chebyshev_tucker",
    title="A mesh-free hybrid Chebyshev-Tucker tensor format with applications to multi-particle modelling",
    authors="Benner et al.",
    arxiv="2503.01696",
    room="numerics",
    figures=(
        Figure(
            "rank-600",
            "The Tucker rank of the long-range potential saturates as particles are added",
            33,
            "rank",
            "600 particles, n = 2048, m = 129; about 21 at 100; official code's figure",
        ),
        Figure(
            "rank-growth",
            "The rank grows like the logarithm of the number of particles",
            "log N",
            "rank",
            "theory for the long-range part",
        ),
        Figure(
            "interpolation-smooth",
            "Chebyshev interpolation of the 13 smoothest canonical vectors",
            1e-12,
            "absolute error",
            "n = 8192, one fixed degree; official code's figure",
        ),
        Figure(
            "degree-convergence",
            "The error decays exponentially with the degree for the long-range part",
            "exponential",
            "error decay",
            "theory, abstract",
        ),
    ),
)

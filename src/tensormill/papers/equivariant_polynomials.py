"""A basis of permutation-equivariant graph polynomials, and what message passing misses of it."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="equivariant_polynomials",
    title="Equivariant Polynomials for Graph Neural Networks",
    authors="Puny et al.",
    arxiv="2302.11556",
    room="models",
    figures=(
        Figure(
            "degree-4",
            "Equivariant polynomials up to degree 4 that PPGN can't compute",
            0,
            "polynomials",
            "any symmetric input",
        ),
        Figure(
            "degree-5",
            "Equivariant polynomials of degree 5 that PPGN can't compute",
            1,
            "polynomials",
            "any symmetric input",
        ),
        Figure(
            "degree-6",
            "Equivariant polynomials of degree 6 that PPGN can't compute",
            11,
            "polynomials",
            "any symmetric input",
        ),
        Figure(
            "zinc",
            "ZINC-12k test error of PPGN++(6)",
            0.071,
            "MAE",
            "ZINC-12k",
            verified=False,
        ),
        Figure(
            "alchemy",
            "Alchemy test error of PPGN++(6)",
            0.109,
            "MAE",
            "Alchemy",
            verified=False,
        ),
    ),
)

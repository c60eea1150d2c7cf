"""Attention over pairs of keys, and an almost linear algorithm when its entries are bounded."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="kronecker_attention",
    title=(
        "How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker "
        "Computation"
    ),
    authors="Alman and Song",
    arxiv="2310.04064",
    room="models",
    figures=(
        Figure(
            "upper-bound",
            "Exponent of the length when entries are o((log n)^(1/3))",
            1,
            "exponent",
            "theorem, head size O(log n)",
        ),
        Figure(
            "lower-bound",
            "Exponent of the length beyond that bound",
            3,
            "exponent",
            "theorem, under the strong exponential time hypothesis",
        ),
        Figure(
            "order-k",
            "Bound on the entries for attention of order k",
            "(log n)^(1/k)",
            "entry size",
            "theorem",
        ),
    ),
)

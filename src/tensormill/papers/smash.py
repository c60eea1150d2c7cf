"""Row-wise sparse products of sparse matrices, merged by atomic hashing in a scratchpad."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="smash",
    title="SMASH: Sparse Matrix Atomic Scratchpad Hashing",
    authors="Shivdikar",
    arxiv="2105.14156",
    room="ops",
    figures=(
        Figure(
            "speedup",
            "Faster than competing approaches on the same machine",
            9.4,
            "x",
            "simulated Intel PIUMA; the abstract doesn't name the baseline",
        ),
    ),
)

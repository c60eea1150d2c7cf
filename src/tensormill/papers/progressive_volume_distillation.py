"""Converts radiance fields between architectures by distillation in stages."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="progressive_volume_distillation",
    title=(
        "One is All: Bridging the Gap Between Neural Radiance Fields Architectures with Progressive Volume "
        "Distillation"
    ),
    authors="Fang et al.",
    arxiv="2211.15977",
    room="models",
    figures=(
        Figure(
            "hash-to-mlp",
            "An MLP distilled from a hash grid is ready sooner than one trained from scratch, at least",
            10,
            "x",
            "at better quality; up to 20; abstract",
        ),
        Figure(
            "conversions",
            "Conversions between architectures",
            16,
            "pairs",
            "NeRF-Synthetic, LLFF, Tanks and Temples",
        ),
        Figure(
            "follow-up-quality",
            "The follow-up's MLP is better than one trained from scratch, best case",
            2,
            "dB",
            "0.8 at least; abstract of arXiv 2304.04012",
        ),
    ),
)

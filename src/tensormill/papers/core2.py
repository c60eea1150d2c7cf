"""Distils guided sampling of a generative model into a fast weak model and lets slow calls refine it."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="core2",
    title="CoRe^2: Collect, Reflect and Refine to Generate Better and Faster",
    authors="Shao et al.",
    arxiv="2503.09662",
    room="models",
    figures=(
        Figure(
            "faster-sd35",
            "SD3.5 reaches the standard sampler's HPS v2 in less time",
            2.89,
            "s less per image",
            "22.92 s standard; README figure",
        ),
        Figure(
            "better-sd35",
            "SD3.5 scores higher on HPS v2 in equal time",
            0.47,
            "HPS v2",
            "28.70 standard; README figure",
        ),
        Figure(
            "faster-sdxl",
            "SDXL reaches the standard sampler's HPS v2 in less time",
            1.31,
            "s less per image",
            "9.61 s standard; README figure",
        ),
        Figure(
            "z-core2-time",
            "Combined with Z-Sampling, less time per image",
            5.64,
            "s less per image",
            "SD3.5; abstract",
        ),
        Figure(
            "z-core2-pickscore",
            "Combined with Z-Sampling, a higher PickScore",
            0.3,
            "PickScore",
            "abstract",
        ),
    ),
)

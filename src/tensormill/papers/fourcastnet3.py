"""Probabilistic weather model of spherical convolutions, trained as an ensemble."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="fourcastnet3",
    title=(
        "FourCastNet 3: A geometric approach to probabilistic machine-learning weather forecasting at scale"
    ),
    authors="Bonev et al.",
    arxiv="2507.12144",
    room="models",
    figures=(
        Figure(
            "inference",
            "A 60-day forecast, 6-hourly at 0.25 degrees, takes at most",
            4,
            "minutes",
            "one H100, 240 steps; an earlier abstract said 90 days in 20 s",
        ),
        Figure(
            "gencast",
            "It is faster than GenCast",
            8,
            "x",
            "abstract, vendor's blog",
        ),
        Figure(
            "ifs-ens",
            "It is faster than IFS-ENS",
            60,
            "x",
            "abstract, vendor's blog",
        ),
        Figure(
            "spread-skill",
            "Ensemble spread over skill stays near",
            1.0,
            "ratio",
            "ERA5",
        ),
    ),
)

"""Bayesian Tucker decomposition whose factors are Gaussian processes of continuous indices."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="funbat",
    title="Functional Bayesian Tucker Decomposition for Continuous-indexed Tensor Data",
    authors="Fang et al.",
    arxiv="2311.04829",
    room="numerics",
    figures=(
        Figure(
            "us-temp-rmse",
            "US temperature, CP form of rank 1, test error",
            1.171,
            "RMSE",
            "15 x 95 x 267 indices, Matern-3/2, 200 sweeps; official notebook",
        ),
        Figure(
            "us-temp-mae",
            "US temperature, CP form of rank 1, test error",
            0.732,
            "MAE",
            "same run of the official notebook",
        ),
        Figure(
            "us-temp-speed",
            "Sweeps per second",
            5.75,
            "sweeps/s",
            "same run, CPU",
        ),
        Figure(
            "scaling",
            "Cost grows linearly with the number of observations",
            1,
            "exponent",
            "derivation",
        ),
        Figure(
            "beijing-air",
            "Lowest error among six baselines on Beijing air quality",
            1,
            "rank among methods",
            "PM2.5, PM10, SO2, ranks 2 to 7",
            verified=False,
        ),
    ),
)

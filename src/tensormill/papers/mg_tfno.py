"""Fourier neural operator with factorised weights, trained on multi-grid patches."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="mg_tfno",
    title="Multi-Grid Tensorized Fourier Neural Operator for High-Resolution PDEs",
    authors="Kossaifi et al.",
    arxiv="2310.00120",
    room="models",
    figures=(
        Figure(
            "error-ratio",
            "Error, as a share of the baseline operator's, less than",
            0.5,
            "of the baseline's error",
            "Navier-Stokes; abstract",
        ),
        Figure(
            "parameters",
            "Fewer parameters than the baseline operator",
            150,
            "x",
            "abstract",
        ),
        Figure(
            "domain",
            "Smaller input domain per device",
            7,
            "x",
            "abstract",
        ),
        Figure(
            "fno-error",
            "Relative L2 error of the baseline FNO with 67M parameters",
            1.34,
            "%",
            "Navier-Stokes",
            verified=False,
        ),
        Figure(
            "tfno-error",
            "Relative L2 error of the factorised operator with 447K parameters",
            0.47,
            "%",
            "Navier-Stokes, CP weights",
            verified=False,
        ),
    ),
)

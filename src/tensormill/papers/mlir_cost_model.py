"""Learned cost model that reads MLIR as text and predicts what hardware will do with it."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="mlir_cost_model",
    title="ML-driven Hardware Cost Model for MLIR",
    authors="Das and Mannarswamy",
    arxiv="2302.11405",
    room="codegen",
    figures=(
        Figure(
            "rmse-low",
            "Relative error of predicted register pressure, best case",
            5,
            "% RMSE",
            "about 20,000 training graphs; digest of the text",
            verified=False,
        ),
        Figure(
            "rmse-high",
            "Relative error of predicted register pressure and utilisation, worst case",
            7,
            "% RMSE",
            "about 20,000 training graphs; digest of the text",
            verified=False,
        ),
    ),
)

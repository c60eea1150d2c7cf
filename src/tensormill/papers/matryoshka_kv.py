"""Key-value cache compressed along the feature axis by trained, nested orthogonal projections."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="matryoshka_kv",
    title="MatryoshkaKV: Adaptive KV Compression via Trainable Orthogonal Projection",
    authors="Lin et al.",
    arxiv="2410.14731",
    room="compress",
    figures=(
        Figure(
            "budget-50",
            "Llama2-7B with half of the cache, from 61.16",
            59.11,
            "% zero-shot average",
            "six tasks, uniform ranks; PCA 43.07",
        ),
        Figure(
            "budget-37",
            "Llama2-7B with 37.5 % of the cache, from 61.16",
            56.94,
            "% zero-shot average",
            "six tasks, uniform ranks; PCA 33.14",
        ),
        Figure(
            "mistral-50",
            "Mistral-7B-v0.3 with half of the cache, from 66.17",
            63.75,
            "% zero-shot average",
            "six tasks, uniform ranks; PCA 34.98",
        ),
        Figure(
            "kept",
            "Share of the zero-shot average that is kept when 60 % of the cache is removed, at least",
            90,
            "%",
            "abstract",
        ),
    ),
)

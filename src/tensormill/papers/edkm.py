"""Differentiable k-means clustering of weights at train time, with deduplicated and sharded saved tensors."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="edkm",
    title="eDKM: An Efficient and Accurate Train-time Weight Clustering for Large Language Models",
    authors="Cho et al.",
    arxiv="2309.00964",
    room="compress",
    figures=(
        Figure(
            "model-size",
            "LLaMA-7B after 3-bit clustering, from 12.6 GB",
            2.5,
            "GB",
            "abstract",
        ),
        Figure(
            "training-memory",
            "Training memory of one decoder layer",
            130,
            "x less",
            "8 A100-80GB; counts what is offloaded to the CPU, per worker",
        ),
        Figure(
            "piqa",
            "PIQA of the clustered LLaMA-7B",
            77.7,
            "%",
            "abstract",
        ),
        Figure(
            "winogrande",
            "Winogrande of the clustered LLaMA-7B",
            66.1,
            "%",
            "abstract",
        ),
        Figure(
            "slowdown",
            "Time of a training step with all savings over none",
            1.72,
            "x",
            "8.67 to 14.9 s",
            verified=False,
        ),
    ),
)

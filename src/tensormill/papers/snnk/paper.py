"""Layers as linear functions of random features of input and of parameters, bundled and made small."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="snnk",
    title="Scalable Neural Network Kernels",
    authors="Sehanobish et al.",
    arxiv="2310.13225",
    room="numerics",
    figures=(
        Figure(
            "parameters",
            "Fewer trainable parameters at competitive accuracy, best case",
            5,
            "x",
            "adapters on GLUE and ViT; abstract",
        ),
        Figure(
            "bundled-size",
            "ViT after bundling, from 346 MB",
            176,
            "MB",
            "top layers replaced",
            verified=False,
        ),
        Figure(
            "estimation-error",
            "The kernel estimate's error falls with this power of the number of features",
            -0.5,
            "exponent",
            "figures",
            verified=False,
        ),
    ),
)

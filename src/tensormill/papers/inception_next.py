"""ConvNeXt with its large depthwise kernel split into square, band and identity branches."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="inception_next",
    title="InceptionNeXt: When Inception Meets ConvNeXt",
    authors="Yu et al.",
    arxiv="2303.16900",
    room="models",
    figures=(
        Figure(
            "train-throughput",
            "InceptionNeXt-T trains faster than ConvNeXt-T",
            1.57,
            "x",
            "A100, batch 128, 901 against 575 images/s; the abstract rounds to 1.6",
        ),
        Figure(
            "infer-throughput",
            "InceptionNeXt-T infers faster than ConvNeXt-T",
            1.2,
            "x",
            "A100, batch 128, 2900 against 2413 images/s",
        ),
        Figure(
            "top1-tiny",
            "InceptionNeXt-T on ImageNet",
            82.3,
            "% top-1",
            "224 pixels; ConvNeXt-T 82.1",
        ),
        Figure(
            "top1-base-384",
            "InceptionNeXt-B on ImageNet",
            85.2,
            "% top-1",
            "384 pixels",
        ),
        Figure(
            "atto-train-throughput",
            "InceptionNeXt-atto training throughput",
            2661,
            "images/s",
            "A100, batch 128; ConvNeXt-atto 835",
        ),
    ),
)

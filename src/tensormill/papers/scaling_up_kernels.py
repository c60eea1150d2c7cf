"""Guidelines for ConvNets with very large kernels, from 31 x 31 up to universal perception."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="scaling_up_kernels",
    title="Scaling Up Your Kernels: Large Kernel Design in ConvNets towards Universal Representations",
    authors="Zhang et al.",
    arxiv="2410.08049",
    room="models",
    figures=(
        Figure(
            "imagenet",
            "Largest model on ImageNet",
            88.0,
            "% top-1",
            "pretrained on ImageNet-22k",
        ),
        Figure(
            "ade20k",
            "Largest model on ADE20K",
            55.6,
            "mIoU",
            "UperNet",
        ),
        Figure(
            "coco",
            "Largest model on COCO",
            56.4,
            "box AP",
            "Cascade Mask R-CNN",
        ),
        Figure(
            "depthwise-speed",
            "Depthwise 31 x 31 convolution is faster than PyTorch's of 2022, best case",
            20,
            "x",
            "block-wise implicit GEMM; RepLKNet",
        ),
    ),
)

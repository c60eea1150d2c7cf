"""ConvNet with large kernels and merged dilated branches, for images, audio, video, points and series."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="unireplknet",
    title=(
        "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, "
        "Time-Series and Image Recognition"
    ),
    authors="Ding et al.",
    arxiv="2311.15599",
    room="models",
    figures=(
        Figure(
            "imagenet",
            "UniRepLKNet-XL on ImageNet",
            88.0,
            "% top-1",
            "384 pixels, pretrained on ImageNet-22k",
        ),
        Figure(
            "ade20k",
            "UniRepLKNet-XL on ADE20K",
            55.6,
            "mIoU",
            "UperNet, 640 pixels, several scales",
        ),
        Figure(
            "coco",
            "UniRepLKNet-XL on COCO",
            56.4,
            "box AP",
            "Cascade Mask R-CNN",
        ),
        Figure(
            "coco-tiny",
            "UniRepLKNet-T on COCO",
            51.7,
            "box AP",
            "official README",
        ),
        Figure(
            "depthwise-speed",
            "Depthwise 31 x 31 convolution is faster than PyTorch's of 2022",
            20,
            "x",
            "implicit GEMM; 7 x 7: 2",
        ),
    ),
)

"""Hybrid of convolution and attention blocks designed for latency under TensorRT and CoreML."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="next_vit",
    title=(
        "Next-ViT: Next Generation Vision Transformer for Efficient Deployment in Realistic Industrial "
        "Scenarios"
    ),
    authors="Li et al.",
    arxiv="2207.05501",
    room="models",
    figures=(
        Figure(
            "top1-small",
            "Next-ViT-S on ImageNet",
            82.5,
            "% top-1",
            "224 pixels",
        ),
        Figure(
            "top1-large",
            "Next-ViT-L on ImageNet",
            83.6,
            "% top-1",
            "224 pixels",
        ),
        Figure(
            "tensorrt-small",
            "Latency of Next-ViT-S under TensorRT",
            7.7,
            "ms",
            "TensorRT 8.0 fp16, batch 8, taken to be a T4",
            verified=False,
        ),
        Figure(
            "coreml-small",
            "Latency of Next-ViT-S under CoreML",
            3.5,
            "ms",
            "iPhone 12 Pro Max, iOS 16",
        ),
        Figure(
            "coco",
            "COCO box precision over ResNet at similar TensorRT latency, 40.4 to 45.9",
            5.5,
            "AP",
            "Mask R-CNN, 1x schedule; abstract",
        ),
        Figure(
            "ade20k",
            "ADE20K over ResNet at similar TensorRT latency, 38.8 to 46.5",
            7.7,
            "mIoU",
            "Semantic FPN; abstract",
        ),
    ),
)

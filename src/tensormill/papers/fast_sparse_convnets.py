"""Sparse 1 x 1 convolutions that are faster than dense ones on a CPU."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="fast_sparse_convnets",
    title="Fast Sparse ConvNets",
    authors="Elsen et al.",
    arxiv="1911.09723",
    room="compress",
    figures=(
        Figure(
            "mobilenet-v1-ms",
            "Sparse MobileNetV1 1.0 at 90 % sparsity",
            31,
            "ms",
            "Snapdragon 835, one big core, fp32; top-1 68.4 %",
        ),
        Figure(
            "mobilenet-v2-ms",
            "Sparse MobileNetV2 1.4 at 85 % sparsity",
            54,
            "ms",
            "Snapdragon 835, one big core, fp32; top-1 72.0 %",
        ),
        Figure(
            "cache-aware-ms",
            "Cache-aware MobileNetV2 1.0 at 85 % sparsity",
            33,
            "ms",
            "Snapdragon 835, one big core, fp32; top-1 69.7 %",
        ),
        Figure(
            "efficientnet-b0-ms",
            "Sparse EfficientNet-B0 at 80 % sparsity",
            80,
            "ms",
            "Snapdragon 835, one big core, fp32; top-1 75.1 %",
        ),
        Figure(
            "speedup",
            "Sparse over dense networks of equal accuracy, best case",
            2.4,
            "x",
            "Snapdragon 835, one big core, fp32; 1.3 at least",
        ),
    ),
)

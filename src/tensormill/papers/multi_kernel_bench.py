"""Benchmark of generated kernels over 14 categories of operators and three platforms."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="multi_kernel_bench",
    title="MultiKernelBench: A Multi-Platform Benchmark for Kernel Generation",
    authors="Wen et al.",
    arxiv="2507.17773",
    room="codegen",
    figures=(
        Figure(
            "cuda-pass",
            "Correct CUDA kernels of the best model, DeepSeek-R1, one greedy attempt",
            52.6,
            "%",
            "L20; Claude-Sonnet-4 47.0, GPT-4o 23.2",
        ),
        Figure(
            "ascendc-pass",
            "Correct AscendC kernels of the best model, one greedy attempt",
            2.5,
            "%",
            "Ascend 910B2",
        ),
        Figure(
            "pallas-pass",
            "Correct Pallas kernels of the best model, one greedy attempt",
            8.4,
            "%",
            "TPU v2-8",
        ),
        Figure(
            "in-category",
            "More AscendC kernels of GPT-4o are correct with an example of the same category",
            160,
            "%",
            "Ascend 910B2",
        ),
        Figure(
            "mismatch-share",
            "CUDA failures that are wrong outputs",
            53.0,
            "%",
            "L20",
        ),
    ),
)

"""Kernel-generating model trained on a small set of concise reasoning traces."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="concur",
    title="ConCuR: Conciseness Makes State-of-the-Art Kernel Generation",
    authors="Kong et al.",
    arxiv="2510.07356",
    room="codegen",
    figures=(
        Figure(
            "exec-l1",
            "KernelCoder's kernels that run and are correct, KernelBench level 1",
            58,
            "%",
            "one attempt; DeepSeek-R1-0528 52, Kevin-32B 50",
        ),
        Figure(
            "exec-l2",
            "KernelCoder's kernels that run and are correct, KernelBench level 2",
            59,
            "%",
            "one attempt; DeepSeek-R1-0528 55, Kevin-32B 46",
        ),
        Figure(
            "fast-l1",
            "KernelCoder's kernels that are correct and faster than PyTorch, level 1",
            17,
            "%",
            "one attempt; DeepSeek-R1-0528 18",
        ),
        Figure(
            "training-cost",
            "Training cost of KernelCoder",
            64,
            "A100 hours",
            "4,892 samples; Kevin-32B more than 600 H200 hours",
        ),
        Figure(
            "length-correlation",
            "Length of a trace says nothing about the kernel's speed",
            -0.047,
            "correlation",
            "traces of the training set",
        ),
    ),
)

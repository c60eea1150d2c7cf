"""Serving with 4-bit weights, mixed 4- and 8-bit activations in blocks, and a 4-bit cache."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="comet",
    title="COMET: Towards Practical W4A4KV4 LLMs Serving",
    authors="Liu et al.",
    arxiv="2410.12168",
    room="compress",
    figures=(
        Figure(
            "kernel-cublas",
            "The W4Ax kernel is faster than cuBLAS fp16 at large batch",
            2.88,
            "x",
            "A100-80G, mean of batch 16, 64, 256; 75 % of the tiles W4A4; 1.48 at batch 2 to 8",
        ),
        Figure(
            "kernel-w4a16",
            "The W4Ax kernel is faster than TensorRT-LLM's W4A16 at large batch",
            1.77,
            "x",
            "A100-80G; 1.33 over its W8A8",
        ),
        Figure(
            "end-to-end",
            "Throughput over TensorRT-LLM W4A16",
            2.02,
            "x",
            "A100-80G, 1024 tokens in and 512 out, largest batch that fits",
        ),
        Figure(
            "qserve",
            "Throughput over QServe",
            1.17,
            "x",
            "A100-80G",
        ),
        Figure(
            "perplexity",
            "LLaMA-2-7B in W4AxKV4",
            5.73,
            "perplexity",
            "WikiText-2, 4096-token protocol; float 5.12, OmniQuant W4A4 14.26",
        ),
        Figure(
            "zero-shot",
            "LLaMA-3-8B in W4AxKV4 keeps its zero-shot average of 68.6",
            66.5,
            "%",
            "Table 2; W4A16 67.2, QoQ 66.3",
        ),
    ),
)

"""Unstructured sparse weights, loaded compressed and multiplied dense on tensor cores."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="flash_llm",
    title=(
        "Flash-LLM: Enabling Cost-Effective and Highly-Efficient Large Generative Model Inference with "
        "Unstructured Sparsity"
    ),
    authors="Xia et al.",
    arxiv="2309.10285",
    room="compress",
    figures=(
        Figure(
            "sputnik",
            "The kernel is faster than Sputnik, on average",
            2.9,
            "x",
            "A100, OPT shapes, N 8 to 64, 70 to 90 % sparsity",
        ),
        Figure(
            "sparta",
            "The kernel is faster than SparTA, on average",
            1.5,
            "x",
            "A100, OPT shapes, N 8 to 64, 70 to 90 % sparsity",
        ),
        Figure(
            "cublas-80",
            "The kernel is faster than cuBLAS at 80 % sparsity",
            1.7,
            "x",
            "A100; 1.4 at 70 %, 2.1 at 90 %",
        ),
        Figure(
            "deepspeed",
            "Tokens per GPU and second over DeepSpeed, best case",
            3.8,
            "x",
            "A100, OPT-30B, 66B, 175B",
        ),
        Figure(
            "fastertransformer",
            "Tokens per GPU and second over FasterTransformer, best case",
            3.6,
            "x",
            "A100, OPT-30B, 66B, 175B",
        ),
        Figure(
            "accuracy",
            "OPT-30B at 80 % sparsity after fine-tuning",
            -1.44,
            "% accuracy",
            "GPT-NeoX-20B -0.72",
        ),
    ),
)

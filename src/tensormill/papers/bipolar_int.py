"""Matrix products of any bit widths, decomposed into products of bit planes on binary tensor cores."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="bipolar_int",
    title="Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor Cores",
    authors="Ma et al.",
    arxiv="2409.17870",
    room="compress",
    figures=(
        Figure(
            "gemm-cutlass",
            "Low-bit products are faster than CUTLASS",
            2.4,
            "x",
            "abstract, best case; GPU (RTX 3090?) and the baseline's precision not certain",
            verified=False,
        ),
        Figure(
            "inference",
            "Language-model inference is faster than the baseline, best case",
            6.7,
            "x",
            "abstract; taken to be against fp16",
            verified=False,
        ),
        Figure(
            "follow-up-fp16",
            "The follow-up APT-LLM is faster than fp16, best case",
            3.99,
            "x",
            "RTX 3090; abstract of arXiv 2508.19087",
        ),
        Figure(
            "follow-up-int4",
            "The follow-up APT-LLM is faster than CUTLASS INT4, best case",
            2.16,
            "x",
            "RTX 3090; abstract of arXiv 2508.19087",
        ),
    ),
)

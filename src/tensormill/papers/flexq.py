"""Six-bit weights with six- or eight-bit activations, multiplied on binary tensor cores."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="flexq",
    title="FlexQ: Efficient Post-training INT6 Quantization for LLM Serving via Algorithm-System Co-Design",
    authors="Zhang et al.",
    arxiv="2508.04405",
    room="compress",
    figures=(
        Figure(
            "perplexity-increase",
            "Perplexity rises at most by this",
            0.05,
            "perplexity",
            "WikiText-2, LLaMA 1 and 2; the second version says 0.1",
        ),
        Figure(
            "perplexity-l2-7b",
            "LLaMA-2-7B in W6A6/8",
            5.52,
            "perplexity",
            "WikiText-2; float 5.47, DuQuant 5.53, SmoothQuant 6.20; README",
        ),
        Figure(
            "kernel-cublas",
            "The kernel is faster than cuBLAS W8A8 at batch 8",
            1.82,
            "x",
            "LLaMA and OPT-30B layers, GPU not stated; 1.78 at batch 1",
        ),
        Figure(
            "kernel-abq",
            "The kernel is faster than ABQ-LLM's on LLaMA-2-70B layers",
            1.39,
            "x",
            "abstract",
        ),
        Figure(
            "end-to-end",
            "Inference is faster than SmoothQuant",
            1.33,
            "x",
            "abstract",
        ),
        Figure(
            "memory",
            "Inference needs less memory than SmoothQuant",
            1.21,
            "x",
            "abstract",
        ),
    ),
)

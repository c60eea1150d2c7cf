"""Block floating point key-value cache whose channels are sorted offline so that outliers share blocks."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="block_floating_point",
    title="Accurate Block Quantization in LLMs with Outliers",
    authors="Trukhanov and Soloveychik",
    arxiv="2403.20137",
    room="compress",
    figures=(
        Figure(
            "cache-memory",
            "Sorted keys in BFP12 take less memory than with 8-bit mantissas, without loss of accuracy",
            2.0,
            "x",
            "abstract",
        ),
        Figure(
            "latency",
            "Sorting costs no time at inference, because it is folded into the weights",
            0,
            "ms",
            "abstract",
        ),
        Figure(
            "block-size",
            "Largest block size that still gains from sorting",
            64,
            "values per block",
            "Llama2-7B-hf, WikiText-2; 128 shows no gain; summary of the paper",
            verified=False,
        ),
        Figure(
            "baseline-perplexity",
            "Baseline of the paper's own protocol; only differences to it mean something",
            9.4881,
            "perplexity",
            "Llama2-7B-hf, fp16, WikiText-2; summary of the paper",
            verified=False,
        ),
    ),
)

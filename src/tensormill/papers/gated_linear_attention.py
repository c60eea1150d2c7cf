"""Linear attention with data-dependent gates, trained in chunks on tensor cores."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="gated_linear_attention",
    title="Gated Linear Attention Transformers with Hardware-Efficient Training",
    authors="Yang et al.",
    arxiv="2312.06635",
    room="models",
    figures=(
        Figure(
            "layer-speed-length",
            "Sequence length from which the layer is faster than FlashAttention-2",
            1024,
            "tokens",
            "H100, final abstract; the first said 4096",
        ),
        Figure(
            "length-generalisation",
            "Trained on 2K tokens, usable beyond",
            20000,
            "tokens",
            "abstract; the conference's says 28K",
        ),
        Figure(
            "recompute-memory",
            "Memory that materialised states cost and recomputation saves, at most",
            20,
            "%",
            "10 at least",
        ),
        Figure(
            "perplexity",
            "Model of 1.3B parameters, WikiText",
            17.22,
            "perplexity",
            "100B tokens; Transformer++ 16.85, RetNet 18.64, Mamba 17.06",
            verified=False,
        ),
        Figure(
            "ablation-no-gate",
            "Model of 340M parameters without the gate; 14.77 with it",
            23.21,
            "perplexity",
            "7B tokens",
            verified=False,
        ),
    ),
)

"""Splits the cache of multi-head latent attention over devices, after an orthogonal change of basis."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="tpla",
    title="TPLA: Tensor Parallel Latent Attention for Efficient Disaggregated Prefill & Decode Inference",
    authors="Tang et al.",
    arxiv="2508.15881",
    room="parallel",
    figures=(
        Figure(
            "deepseek-v3",
            "DeepSeek-V3 decodes faster at 32K tokens than with a replicated cache",
            1.79,
            "x",
            "2 H800, FlashAttention-3, bf16, without the expert layers",
        ),
        Figure(
            "kimi-k2",
            "Kimi-K2 decodes faster at 32K tokens than with a replicated cache",
            1.93,
            "x",
            "same",
        ),
        Figure(
            "v2-lite-perplexity",
            "DeepSeek-V2-Lite, from 6.31, with aligned bases",
            6.51,
            "perplexity",
            "WikiText-2; plain 7.24, naive split 2212",
        ),
        Figure(
            "v2-lite-separated",
            "DeepSeek-V2-Lite, from 61.75, prefill not split",
            61.44,
            "% commonsense average",
            "split 54.33",
        ),
        Figure(
            "longbench-v3",
            "DeepSeek-V3 on LongBench, from 58.19, prefill not split",
            56.04,
            "% average",
            "split 44.52",
        ),
    ),
)

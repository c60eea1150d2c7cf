"""Schedules the parameter-free core of attention on its own devices, balanced by token shards."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="core_attention_disaggregation",
    title="Efficient Long-context Language Model Training by Core Attention Disaggregation",
    authors="Zhuang et al.",
    arxiv="2510.18121",
    room="parallel",
    figures=(
        Figure(
            "throughput",
            "Training throughput over a balanced baseline (WLB-ideal), best case",
            1.35,
            "x",
            "512 H200, up to 512K tokens, Llama 8B and 34B, tensor parallel 8",
        ),
        Figure(
            "throughput-3d",
            "Throughput without pipeline parallelism, best case",
            1.2,
            "x",
            "pretraining lengths; 1.07 at least",
            verified=False,
        ),
        Figure(
            "idle-dp4",
            "Idle time of variable-length packing with 4 data-parallel ranks",
            19,
            "%",
            "8B, 512K tokens; 55 with 8 ranks",
            verified=False,
        ),
        Figure(
            "no-ping-pong",
            "Latency added when communication is not overlapped, worst case",
            17,
            "%",
            "10 at least",
            verified=False,
        ),
        Figure(
            "shard-size",
            "Shard size from which the attention kernel is saturated",
            128,
            "tokens",
            "FlashAttention-2",
            verified=False,
        ),
    ),
)

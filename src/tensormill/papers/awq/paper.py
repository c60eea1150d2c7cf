"""What the paper publishes."""

from __future__ import annotations

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="awq",
    title="AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
    authors="Lin et al.",
    arxiv="2306.00978",
    room="compress",
    figures=(
        Figure(
            "speedup-cublas",
            "The W4A16 kernel is faster than cuBLAS fp16",
            1.85,
            "x",
            "abstract of the first version; GPU not stated there",
        ),
        Figure(
            "speedup-gptq",
            "The W4A16 kernel is faster than GPTQ's kernel",
            1.45,
            "x",
            "abstract of the first version; GPU not stated there",
        ),
        Figure(
            "int4-perplexity",
            "LLaMA-2-7B at 4 bits keeps its perplexity",
            5.6,
            "perplexity",
            "WikiText-2, groups of 128; float 5.47, round-to-nearest 5.73, GPTQ 5.69",
            verified=False,
        ),
        Figure(
            "int3-perplexity",
            "LLaMA-2-7B at 3 bits loses less than with round-to-nearest or GPTQ",
            6.24,
            "perplexity",
            "WikiText-2, groups of 128; float 5.47, round-to-nearest 6.66, GPTQ 6.43",
            verified=False,
        ),
        Figure(
            "salient-channels",
            "Keeping 1 % of the channels in fp16, chosen by activation, repairs 3-bit rounding",
            11.4,
            "perplexity",
            "OPT-6.7B, 3 bits, groups of 128; round-to-nearest 23.5, about that when chosen by weight norm",
            verified=False,
        ),
        Figure(
            "uniform-scale",
            "Multiplying the 1 % salient channels by 2 before 3-bit rounding repairs most of it; by 4 too much",
            11.92,
            "perplexity",
            "OPT-6.7B, 3 bits, groups of 128; 23.5 at a scale of 1; at 4, 21 % of the groups change their step",
            verified=False,
        ),
        Figure(
            "calibration-domain",
            "Calibrated on another domain, AWQ's perplexity rises by 0.5 to 0.6, GPTQ's by 2.3 to 4.9",
            0.6,
            "perplexity",
            "OPT-6.7B, 3 bits, groups of 128; calibrated on PubMed abstracts, evaluated on Enron emails, and reversed",
            verified=False,
        ),
        Figure(
            "decode-latency",
            "LLaMA-2-7B decodes faster end to end than in fp16",
            2.94,
            "x",
            "RTX 4090, 15.50 to 5.28 ms per token; README of TinyChat",
        ),
    ),
)

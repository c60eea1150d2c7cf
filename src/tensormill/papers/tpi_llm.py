"""Tensor-parallel inference on small devices, with a sliding window of weights in memory."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="tpi_llm",
    title="TPI-LLM: Serving 70B-scale LLMs Efficiently on Low-resource Edge Devices",
    authors="Li et al.",
    arxiv="2410.00531",
    room="parallel",
    figures=(
        Figure(
            "peak-memory",
            "Llama-2-70B, peak memory per device, from 34.9 without the window",
            3.1,
            "GB",
            "8 emulated devices of 8 cores, 300 Mb/s, fp32, window 2",
        ),
        Figure(
            "latency-70b",
            "Llama-2-70B, time per token",
            26.1,
            "s",
            "same",
        ),
        Figure(
            "ttft-70b",
            "Llama-2-70B, time to the first token",
            29.4,
            "s",
            "same",
        ),
        Figure(
            "latency-7b",
            "Llama-2-7B, time per token with the window, 1.2 without",
            2.6,
            "s",
            "same",
        ),
        Figure(
            "laptops-3b",
            "3B model, time per token; Accelerate 16",
            2,
            "s",
            "4 laptops on Wi-Fi, window 4; Transformers 30",
        ),
    ),
)

"""Pipeline, tensor and data parallelism composed for training on thousands of GPUs."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="megatron",
    title="Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
    authors="Narayanan et al.",
    arxiv="2104.04473",
    room="parallel",
    figures=(
        Figure(
            "trillion",
            "Model of 1008B parameters, rate per GPU",
            163,
            "TFLOP/s",
            "3072 A100-80GB, 52 % of peak, 502 PFLOP/s in all",
        ),
        Figure(
            "small",
            "Model of 1.7B parameters, rate per GPU",
            137,
            "TFLOP/s",
            "32 A100-80GB, 44 % of peak",
        ),
        Figure(
            "gpt3",
            "Model of 145.6B parameters, rate per GPU",
            148,
            "TFLOP/s",
            "1536 A100-80GB, tensor 8, pipeline 8",
        ),
        Figure(
            "interleaving",
            "Throughput gained by the interleaved schedule",
            10,
            "%",
            "tensor 8, pipeline 12, 4 chunks, batch 12 to 60",
        ),
        Figure(
            "scatter-gather",
            "Throughput gained by scatter and gather between nodes, best case",
            11,
            "%",
            "same model",
        ),
        Figure(
            "fusion",
            "Throughput gained by fused operators, 175B",
            19,
            "%",
            "530B: 11",
        ),
    ),
)

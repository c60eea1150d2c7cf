"""Two language models in a loop, a coder and a judge who reads profiler counters, that write CUDA kernels."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="cuda_forge",
    title="CudaForge: An Agent Framework with Hardware Feedback for CUDA Kernel Optimization",
    authors="Zhang et al.",
    arxiv="2511.01884",
    room="codegen",
    figures=(
        Figure(
            "correct",
            "Correct kernels",
            97.6,
            "%",
            "KernelBench levels 1 to 3, o3 as coder and judge; one shot 57.6",
        ),
        Figure(
            "speedup-mean",
            "Mean speed-up over PyTorch",
            1.677,
            "x",
            "same; one shot 0.680",
        ),
        Figure(
            "speedup-median",
            "Median speed-up over PyTorch",
            1.107,
            "x",
            "same; one shot 0.390",
        ),
        Figure(
            "faster-share",
            "Kernels faster than PyTorch",
            70.8,
            "%",
            "same; one shot 31.6",
        ),
        Figure(
            "time-per-kernel",
            "Time per kernel",
            26.5,
            "minutes",
            "o3, 10 rounds",
        ),
        Figure(
            "cost-per-kernel",
            "Cost per kernel",
            0.3,
            "USD",
            "o3, 10 rounds",
        ),
    ),
)

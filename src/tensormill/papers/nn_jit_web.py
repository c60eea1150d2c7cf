"""Kernels for inference in the browser, generated and tuned on the client just in time."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="nn_jit_web",
    title=(
        "Empowering In-Browser Deep Learning Inference on Edge Devices with Just-in-Time Kernel Optimizations"
    ),
    authors="Jia et al.",
    arxiv="2309.08978",
    room="codegen",
    figures=(
        Figure(
            "speedup",
            "Inference is faster than the best of the baselines, best case",
            8.2,
            "x",
            "BART, T5, GPT-2, RoBERTa, Llama 2; TensorFlow.js, ONNX Runtime Web, TVM",
        ),
        Figure(
            "tuning-time",
            "Time in which that is reached",
            30,
            "s",
            "laptops and phones",
        ),
        Figure(
            "compile-cost",
            "Cost of compiling one candidate",
            100,
            "x less",
            "against the usual tool chain",
        ),
    ),
)

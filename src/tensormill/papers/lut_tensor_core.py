"""Low-bit matrix products by table look-up, in software and as a simulated tensor core."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="lut_tensor_core",
    title="LUT Tensor Core: A Software-Hardware Co-Design for LUT-Based Low-Bit LLM Inference",
    authors="Mo et al.",
    arxiv="2408.06003",
    room="hardware",
    figures=(
        Figure(
            "compute-density",
            "Compute density of a 4-element dot product, 1-bit weights and fp16 activations",
            61.55,
            "TFLOP/s/mm2",
            "TSMC 28 nm, Design Compiler, 1 GHz; fp16 multiply-accumulate 3.39",
        ),
        Figure(
            "unpu-density",
            "Denser than UNPU, 2-bit weights and 8-bit activations",
            1.44,
            "x",
            "TSMC 28 nm, Design Compiler",
        ),
        Figure(
            "unpu-energy",
            "More energy-efficient than UNPU, same setting",
            1.442,
            "x",
            "TSMC 28 nm, Design Compiler",
        ),
        Figure(
            "a100-bitnet",
            "BitNet 3B on an A100 with 8x tables, faster than the fp16 LLaMA-3B",
            5.51,
            "x",
            "simulated, W2A8",
        ),
        Figure(
            "simulator-error",
            "Mean error of the tile simulator",
            5.21,
            "%",
            "A100 and RTX 3090, single layers of large models",
        ),
        Figure(
            "tmac-cpu",
            "T-MAC on one CPU core, LLaMA-2-7B at 2 bits, from llama.cpp's 3.82",
            16.68,
            "tokens/s",
            "M2 Ultra, May 2024; repository of the sibling paper",
        ),
    ),
)

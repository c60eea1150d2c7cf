"""Multiply-accumulate arrays with the bit-weight dimension moved out of the multipliers (OPT1 to OPT4)."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="bit_weight_tpe",
    title=(
        "Exploring the Performance Improvement of Tensor Processing Engines through Transformation in the "
        "Bit-weight Dimension of MACs"
    ),
    authors="Wu et al.",
    arxiv="2503.06342",
    room="hardware",
    figures=(
        Figure(
            "area-efficiency",
            "Systolic array: more operations per area",
            1.27,
            "x",
            "SMIC 28 nm; cube 1.28, adder tree 1.56, 2-D matrix 1.44",
        ),
        Figure(
            "energy-efficiency",
            "Systolic array: more operations per joule",
            1.04,
            "x",
            "SMIC 28 nm; cube 1.56, adder tree 1.49, 2-D matrix 1.20",
        ),
        Figure(
            "laconic-energy",
            "OPT4E needs less energy than Laconic",
            12.1,
            "x",
            "abstract",
        ),
        Figure(
            "laconic-area",
            "OPT4E is denser than Laconic",
            2.85,
            "x",
            "abstract",
        ),
        Figure(
            "critical-path",
            "OPT1 shortens the critical path of a processing element from 1.95 ns",
            0.92,
            "ns",
            "SMIC 28 nm, 2 ns target; second-hand digest",
            verified=False,
        ),
        Figure(
            "os-array-clock",
            "A 16 x 16 output-stationary OPT1 array clocks higher than 154 MHz",
            322,
            "MHz",
            "SAED32, 0.85 V; the repository's report",
        ),
    ),
)

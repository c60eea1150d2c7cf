"""Factorised convolution layers for wave simulators, small from the first training step."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="a_priori_compression",
    title="A priori compression of convolutional neural networks for wave simulators",
    authors="Boukraichi et al.",
    arxiv="2304.04964",
    room="compress",
    figures=(
        Figure(
            "equal-accuracy",
            "Networks of factorised kernels reach the accuracy of classical convolutions",
            None,
            "relative error",
            "simulated waves from finite elements; the abstract gives no number",
            verified=False,
        ),
        Figure(
            "parameters",
            "They need fewer trainable parameters and less memory than classical convolutions",
            None,
            "x fewer parameters",
            "same networks; the abstract gives no number",
            verified=False,
        ),
    ),
)

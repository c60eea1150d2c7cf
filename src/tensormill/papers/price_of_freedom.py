"""What tensor products of spherical tensors cost, against what they can express."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="price_of_freedom",
    title="The Price of Freedom: Exploring Expressivity and Runtime Tradeoffs in Equivariant Tensor Products",
    authors="Xie et al.",
    arxiv="2506.13523",
    room="models",
    figures=(
        Figure(
            "mace-training",
            "MACE trains faster with the grid Gaunt product than with the Fourier one",
            30,
            "%",
            "abstract",
        ),
        Figure(
            "gpu-grid-l4",
            "Grid Gaunt product at L = 4",
            0.299,
            "ms",
            "RTX GPU, batch 10,000; dense Clebsch-Gordan 0.390, Fourier 1.181; repository",
        ),
        Figure(
            "gpu-grid-l7",
            "Grid Gaunt product at L = 7",
            0.672,
            "ms",
            "RTX GPU, batch 10,000; dense Clebsch-Gordan 1.974, Fourier 6.94; repository",
        ),
        Figure(
            "cpu-grid-l7",
            "Grid Gaunt product at L = 7 on the CPU",
            29.6,
            "ms",
            "batch 10,000; dense Clebsch-Gordan 158, Fourier 1716; repository",
        ),
    ),
)

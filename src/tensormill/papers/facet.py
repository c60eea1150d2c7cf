"""E(3)-equivariant interatomic potential with splines for radii and mixing on a spherical grid."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="facet",
    title="Facet: highly efficient E(3)-equivariant networks for interatomic potentials",
    authors="Miklaucic et al.",
    arxiv="2509.08418",
    room="models",
    figures=(
        Figure(
            "training-compute",
            "Training compute of leading models that matches their accuracy, at most",
            10,
            "%",
            "MPTrj; abstract",
        ),
        Figure(
            "relaxation",
            "Crystal relaxation is faster than with MACE",
            2,
            "x",
            "abstract",
        ),
        Figure(
            "sevennet-parameters",
            "Parameters saved in SevenNet-0 without loss of accuracy",
            25.9,
            "%",
            "842,748 to 624,380; notebook, abstract says over 25",
        ),
        Figure(
            "training-speed",
            "Training of large potentials is faster",
            10,
            "x",
            "abstract",
        ),
    ),
)

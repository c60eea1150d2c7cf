"""Tensor products of spherical tensors as pointwise products in a Fourier basis."""

from tensormill.papers.catalogue import Figure, Paper

PAPER = Paper(
    slug="gaunt_tensor_product",
    title="Enabling Efficient Equivariant Operations in the Fourier Basis via Gaunt Tensor Products",
    authors="Luo et al.",
    arxiv="2401.10216",
    room="models",
    figures=(
        Figure(
            "complexity",
            "Exponent of the degree L in the cost of a full product, from 6",
            3,
            "exponent",
            "derivation",
        ),
        Figure(
            "feature-interaction",
            "Feature interaction is faster than e3nn",
            740,
            "x",
            "largest degree 13, 128 channels, batch 1; notebook without warm-up, counts compilation",
        ),
        Figure(
            "convolution-escn",
            "Convolution is faster than eSCN",
            125,
            "x",
            "L = 12, one edge, one channel; notebook without warm-up",
        ),
        Figure(
            "many-body",
            "Many-body interaction is faster than MACE's contraction, best case",
            5.1,
            "x",
            "L = 6, order 3, batch 32, 128 channels; 2.3 at L = 2",
        ),
        Figure(
            "3bpa-memory",
            "Memory of MACE-Gaunt on 3BPA, of e3nn's",
            5.8,
            "%",
            "Table 2; MACE 32.8",
        ),
        Figure(
            "oc20-force",
            "OC20 2M, force error of EquiformerV2 with the new mixing, from 20.5",
            20.1,
            "meV/Angstrom",
            "L = 6; Table 1",
        ),
    ),
)

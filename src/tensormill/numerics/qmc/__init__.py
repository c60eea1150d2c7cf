"""Quasi-Monte Carlo: low-discrepancy points and their randomisations, integrals to a tolerance, and kernel methods in
n log n on these points.

Method: Sorokin, QMCPy, arXiv 2502.14256. `docs/numerics/qmc.md` is the page of this room.
"""

from tensormill.numerics.qmc.digital_net import DigitalNet, joe_kuo_matrices
from tensormill.numerics.qmc.gram import FastGram
from tensormill.numerics.qmc.halton import Halton
from tensormill.numerics.qmc.integrate import IntegrationResult, IntegrationSettings, integrate
from tensormill.numerics.qmc.kernels import (
    DigitalShiftInvariantKernel,
    ProductKernel,
    ShiftInvariantKernel,
    bernoulli_kernel,
    walsh_kernel,
)
from tensormill.numerics.qmc.lattice import Lattice, shipped_generating_vector
from tensormill.numerics.qmc.lattice_search import component_by_component, korobov, lattice_error
from tensormill.numerics.qmc.measures import BrownianMotion, Gaussian, Measure, Uniform, periodize
from tensormill.numerics.qmc.randomization import interlace, linear_matrix_scramble, nested_uniform_scramble
from tensormill.numerics.qmc.sequence import PointSet, Sequence
from tensormill.numerics.qmc.transforms import fftbr, fwht, ifftbr, merge_doubling, reverse_bits

__all__ = [
    "BrownianMotion",
    "DigitalNet",
    "DigitalShiftInvariantKernel",
    "FastGram",
    "Gaussian",
    "Halton",
    "IntegrationResult",
    "IntegrationSettings",
    "Lattice",
    "Measure",
    "PointSet",
    "ProductKernel",
    "Sequence",
    "ShiftInvariantKernel",
    "Uniform",
    "bernoulli_kernel",
    "component_by_component",
    "fftbr",
    "fwht",
    "ifftbr",
    "integrate",
    "interlace",
    "joe_kuo_matrices",
    "korobov",
    "lattice_error",
    "linear_matrix_scramble",
    "merge_doubling",
    "nested_uniform_scramble",
    "periodize",
    "reverse_bits",
    "shipped_generating_vector",
    "walsh_kernel",
]

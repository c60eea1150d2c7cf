"""Neural-network layers as inner products of random features of inputs and of weights (Sehanobish et al., 2310.13225).

`URF` and `ReLUFeatures` are the features, `SNNKLinear` the layer that takes the place of a linear layer and its
activation, `bundle` turns a network into fixed features and one matrix with a closed-form optimum, and `attach` adds
small adapters to any model.
"""

from tensormill.numerics.snnk.adapter import (
    SNNKAdapter,
    adapter_parameters,
    attach,
    detach,
    load_adapters,
    save_adapters,
)
from tensormill.numerics.snnk.bundle import BundledNet, RidgeRegression, bundle
from tensormill.numerics.snnk.features import URF, RandomFeatures, ReLUFeatures, arc_cosine_kernel
from tensormill.numerics.snnk.layer import SNNKLinear, random_features
from tensormill.numerics.snnk.projections import KINDS as PROJECTIONS
from tensormill.numerics.snnk.spectrum import (
    ACTIVATIONS,
    FourierSeries,
    HyperbolicSecant,
    SpectralDensity,
    Spectrum,
    spectrum_of,
)

__all__ = [
    "ACTIVATIONS",
    "PROJECTIONS",
    "URF",
    "BundledNet",
    "FourierSeries",
    "HyperbolicSecant",
    "RandomFeatures",
    "ReLUFeatures",
    "RidgeRegression",
    "SNNKAdapter",
    "SNNKLinear",
    "SpectralDensity",
    "Spectrum",
    "adapter_parameters",
    "arc_cosine_kernel",
    "attach",
    "bundle",
    "detach",
    "load_adapters",
    "random_features",
    "save_adapters",
    "spectrum_of",
]

"""Neural tangent kernels: infinitely wide networks, empirical kernels of modules, and training as a linear flow."""

from tensormill.numerics.ntk import infinite
from tensormill.numerics.ntk.dynamics import (
    EnsemblePrediction,
    largest_stable_rate,
    predict_mse,
    predict_mse_ensemble,
    predict_ode,
)
from tensormill.numerics.ntk.empirical import empirical_ntk
from tensormill.numerics.ntk.features import RandomFeatures

__all__ = [
    "EnsemblePrediction",
    "RandomFeatures",
    "empirical_ntk",
    "infinite",
    "largest_stable_rate",
    "predict_mse",
    "predict_mse_ensemble",
    "predict_ode",
]

"""Functional Bayesian Tucker decomposition: tensors whose indices are real numbers (Fang et al., arXiv 2311.04829)."""

from tensormill.numerics.funbat.config import FunctionalTuckerConfig
from tensormill.numerics.funbat.model import FunctionalTucker

__all__ = ["FunctionalTucker", "FunctionalTuckerConfig"]

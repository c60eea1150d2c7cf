"""Numerical methods whose structure saves orders of magnitude: quasi-Monte Carlo and kernels in n log n,
infinitely wide networks, tensor decompositions of functions, random-feature layers.

A room each: `qmc`, `snnk`, `ntk`, `infinite_width_features`, `funbat`, `chebyshev_tucker`; between them, written
once, `gaussian_process`, `dual_activations` and `factorized`. Nothing is imported until it is asked for.
"""

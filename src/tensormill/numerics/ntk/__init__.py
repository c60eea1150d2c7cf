"""Neural tangent kernels: infinitely wide networks, empirical kernels of modules, and training as a linear flow."""

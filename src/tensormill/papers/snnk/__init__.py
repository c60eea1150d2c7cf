"""Layers as linear functions of random features of input and of parameters, bundled and made small.

C1 `estimator`: the law of the estimator. C2 and C3 `layers`: a trained layer replaced, and a network bundled and fitted in
closed form. C4 `adapters`: adapters of the built-in model.
"""

from tensormill.papers.snnk import adapters, estimator, layers
from tensormill.papers.snnk.paper import PAPER

for _id in sorted(PAPER.claims):  # listed by id, not in the order of the imports
    PAPER.claims[_id] = PAPER.claims.pop(_id)

__all__ = ["PAPER", "adapters", "estimator", "layers"]

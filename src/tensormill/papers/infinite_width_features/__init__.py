"""Parametrizations in which infinitely wide networks still learn features (muP), and their limits.

C1 `limit`: how fast linear networks approach their exact limit. C2 `dichotomy`: the regimes of abc-parametrizations,
measured. C3 `word_vectors`: Word2Vec by width. C4 `few_shot`: MAML by width, beside kernels, and C6: the kernels among themselves. C5 `transfer`: learning
rates found small hold when wide.
"""

from tensormill.papers.infinite_width_features import dichotomy, few_shot, limit, transfer, word_vectors
from tensormill.papers.infinite_width_features.paper import PAPER

for _id in sorted(PAPER.claims):  # listed by id, not in the order of the imports
    PAPER.claims[_id] = PAPER.claims.pop(_id)

__all__ = ["PAPER", "dichotomy", "few_shot", "limit", "transfer", "word_vectors"]

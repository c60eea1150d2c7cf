"""Weight-only quantization that scales the weights of salient input channels, found by activation size.

C1 `quality`: beside round-to-nearest, GPTQ and other projects' quantizers. C2 `salience`: why it works. C3 and C6
`kernels`: speed of the 4-bit linear layer on a GPU and on a CPU. C4 `search_cost`: what the search takes, up to a model
of 8 billion parameters. C5 `robustness`: calibrated on another kind of text.
C7 `quality`: C1 on SmolLM2-135M. C8 `decoding`: speed of a whole model.
"""

from tensormill.papers.awq import decoding, kernels, quality, robustness, salience, search_cost
from tensormill.papers.awq.paper import PAPER

for _id in sorted(PAPER.claims):  # listed by id, not in the order of the imports
    PAPER.claims[_id] = PAPER.claims.pop(_id)

__all__ = ["PAPER", "decoding", "kernels", "quality", "robustness", "salience", "search_cost"]

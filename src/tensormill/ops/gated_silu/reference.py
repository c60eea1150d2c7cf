"""The definition of the gate in plain PyTorch."""

from torch import Tensor
from torch.nn.functional import silu


def reference(x: Tensor) -> Tensor:
    """See `tensormill.ops.gated_silu`: (..., 2 * intermediate_size) -> (..., intermediate_size)."""
    gate, up = x.chunk(2, dim=-1)
    return silu(gate) * up

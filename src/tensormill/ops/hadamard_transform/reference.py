"""The definition of the Walsh-Hadamard transform in plain PyTorch."""

import torch
from torch import Tensor


def hadamard_transform(x: Tensor, scale: float) -> Tensor:
    """`scale * x @ H_n`, by `H_2m = [[H_m, H_m], [H_m, -H_m]]`, one index bit at a time.

    Args:
        x: (..., n), n a power of two; float64 is kept, other dtypes are summed in float32.
        scale: multiplies the sums.

    Returns:
        (..., n) in x's dtype.
    """
    n = x.shape[-1]
    sums = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    half = 1
    while half < n:
        first, second = sums.unflatten(-1, (n // (2 * half), 2, half)).unbind(-2)
        sums = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    return (sums * scale).to(x.dtype).contiguous()

"""COMET's blocks of mixed widths: which channels lie in which block, and which blocks have 8 bits.

Liu and others, COMET, arXiv 2410.12168, section 3.1 (fine-grained mixed-precision quantization).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument


def plan_blocks(
    magnitude: Tensor, *, block_size: int = 128, wide_blocks: int | None = None, outlier_ratio: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Permutation and widths for `quantize_activations`: channels by falling magnitude, first blocks 8 bits, rest 4.

    The permutation gathers outliers in few blocks. The paper gives no rule for what an outlier is; here it is a
    channel whose magnitude exceeds `outlier_ratio` times the median, unless the number of wide blocks is given.

    Args:
        magnitude: (K,) largest absolute value of each channel of a layer's input in a calibration.
        block_size: channels of a block; the last block may be shorter.
        wide_blocks: how many blocks have 8 bits; None for as many as have outliers.
        outlier_ratio: see above.

    Returns:
        permutation (K,) int32, and block_bits (ceil(K / block_size),) uint8.

    Raises:
        InvalidArgument: magnitudes that are none, or numbers out of range.

    >>> order, bits = plan_blocks(torch.tensor([1.0, 1.0, 90.0, 2.0]), block_size=2)
    >>> order.tolist(), bits.tolist()
    ([2, 3, 0, 1], [8, 4])
    """
    if magnitude.dim() != 1 or magnitude.numel() == 0 or not magnitude.is_floating_point():
        raise InvalidArgument(
            f"given magnitudes of {magnitude.dtype} and shape {tuple(magnitude.shape)}, expected floats (K,), K > 0"
        )
    if not bool((magnitude >= 0).all() & magnitude.isfinite().all()):
        raise InvalidArgument("given magnitudes that are negative, infinite or NaN, expected absolute values")
    if block_size < 1:
        raise InvalidArgument(f"given block_size={block_size}, expected a positive integer")
    blocks = math.ceil(magnitude.numel() / block_size)
    if wide_blocks is None:
        outliers = int((magnitude > outlier_ratio * magnitude.median()).sum())
        wide_blocks = math.ceil(outliers / block_size)
    if not 0 <= wide_blocks <= blocks:
        raise InvalidArgument(f"given wide_blocks={wide_blocks}, expected 0 to {blocks}")
    permutation = torch.argsort(magnitude, descending=True, stable=True).to(torch.int32)
    block_bits = torch.full((blocks,), 4, dtype=torch.uint8, device=magnitude.device)
    block_bits[:wide_blocks] = 8
    return permutation, block_bits

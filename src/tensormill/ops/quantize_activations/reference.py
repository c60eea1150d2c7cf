"""The definition of `quantize_activations` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

# Magnitudes are taken as at least this, so that neither the scale nor its inverse leaves float32's normal range.
SMALLEST = 2.0**-100
LARGEST_FP8 = 448.0


def quantize_activations(
    x: Tensor,
    norm_weight: Tensor | None,
    permutation: Tensor | None,
    block_bits: Tensor | None,
    eps: float,
    norm_offset: float,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Codes and scales with `x ~ code * scale`, one scale per token and group of channels.

    Everything is float32, every operation rounded, but for the mean of squares: that is float64, so that the order
    of its sum does not show in the codes. With `largest` the largest magnitude in a group and `limit` the largest
    code (`2 ** (bits - 1) - 1`, or 448 for fp8), `scale = largest / limit` and `code = x * (limit / largest)`,
    rounded half to even. A group with an infinity or NaN has codes 0 and the scale NaN.

    Args:
        x: (..., K) float.
        norm_weight: (K,) float: x is first `x / rms(x) * (norm_weight + norm_offset)`; or None.
        permutation: (K,) integer: channel k of the result is channel `permutation[k]` of x; or None.
        block_bits: (G,) uint8, widths by group, instead of `bits`; or None.
        eps: added to the mean of squares.
        norm_offset: see `norm_weight`.
        bits: width of a code, 2 to 8; 8 for fp8.
        group_size: channels that share a scale, -1 for all; the last group may be shorter.
        dtype: torch.int8, or torch.float8_e4m3fn.

    Returns:
        codes (..., K) of `dtype` and scales (..., G) float32.
    """
    values = x.float()
    if norm_weight is not None:
        mean_square = values.double().square().mean(-1, keepdim=True)
        factor = (1 / (mean_square + torch.tensor(eps, dtype=torch.float32).double()).sqrt()).float()
        values = values * factor * (norm_weight.float() + norm_offset)
    if permutation is not None:
        values = values[..., permutation]
    columns = values.shape[-1]
    size = max(columns, 1) if group_size == -1 else group_size
    groups = 1 if group_size == -1 else -(-columns // size)
    padded = torch.nn.functional.pad(values, (0, groups * size - columns))
    grouped = padded.unflatten(-1, (groups, size))  # [..., G, size]
    if dtype == torch.float8_e4m3fn:
        limit = torch.tensor(LARGEST_FP8, device=x.device)
    elif block_bits is None:
        limit = torch.tensor(2.0 ** (bits - 1) - 1, device=x.device)
    else:
        limit = (2.0 ** (block_bits.float() - 1) - 1)[:, None]  # [G, 1]
    largest = grouped.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    finite = torch.isfinite(largest)
    codes = torch.where(finite, grouped * (limit / largest), 0.0)
    if dtype == torch.int8:
        codes = codes.round()
    scale = torch.where(finite, largest / limit, torch.nan)
    return codes.to(dtype).flatten(-2)[..., :columns].contiguous(), scale.squeeze(-1)

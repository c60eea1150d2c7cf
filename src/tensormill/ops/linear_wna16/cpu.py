"""CPU kernels: weights are decoded in registers; for many tokens, panels are dequantized for matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.ops.linear_wna16 import _cpu  # type: ignore[attr-defined]
from tensormill.roofline import has_fast_matmul

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Tokens up to which decoding in vector registers beats a product with dequantized panels: with AVX2 they are even at
# 64 for float32 activations.
_MOST_DECODED_TOKENS = 8
_MOST_DECODED_TOKENS_AVX2 = 64
# Tokens, or elements of x, up to which decoding into AMX tiles beats it: x stays in the second-level cache.
_MOST_TILED_TOKENS = 32
_MOST_TILED_ELEMENTS = 3 << 18
# Weights dequantized at a time.
_PANEL_ELEMENTS = 1 << 21


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """See `reference.linear_wna16`."""
    tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
    whole_octets = scale.shape[1] == 1 or group_size % 8 == 0
    avx2 = whole_octets and _cpu.instruction_set() in ("avx2", "avx512")
    most_decoded = _MOST_DECODED_TOKENS_AVX2 if avx2 else _MOST_DECODED_TOKENS
    tiled = tokens <= _MOST_TILED_TOKENS or x.numel() <= _MOST_TILED_ELEMENTS
    amx = _cpu.instruction_set() == "amx"
    if amx and x.dtype == torch.bfloat16:
        direct = tokens <= most_decoded or tiled
    else:
        integers = x.dtype != torch.float32 and _cpu.multiplies_bytes(scale.shape[1], group_size, bits)
        direct = integers or tokens <= most_decoded
    if not direct:
        return _linear_by_panels(x, weight, scale, zero_point, bias, bits, group_size)
    rows, columns = weight.shape[0], x.shape[-1]
    y = x.new_empty((*x.shape[:-1], rows))
    x, weight, scale = x.contiguous(), weight.contiguous(), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    bias = None if bias is None else bias.contiguous()
    _cpu.linear(
        x.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr(),
        0 if zero_point is None else zero_point.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        tokens,
        rows,
        columns,
        weight.shape[1],
        scale.shape[1],
        group_size,
        bits,
        _KINDS[x.dtype],
        _KINDS[scale.dtype],
        0 if bias is None else _KINDS[bias.dtype],
        torch.get_num_threads(),
    )
    return y


def dequantize(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    """See `dequantize_wna16.reference`."""
    dense = torch.empty(weight.shape[0], in_features, dtype=dtype)
    zero_point = None if zero_point is None else zero_point.contiguous()
    _dequantize_into(dense, weight.contiguous(), scale.contiguous(), zero_point, bits, group_size)
    return dense


def _dequantize_into(
    dense: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int
) -> None:
    rows, columns = dense.shape
    _cpu.dequantize(
        weight.data_ptr(),
        scale.data_ptr(),
        0 if zero_point is None else zero_point.data_ptr(),
        dense.data_ptr(),
        rows,
        columns,
        weight.shape[1],
        scale.shape[1],
        group_size,
        bits,
        _KINDS[scale.dtype],
        _KINDS[dense.dtype],
        torch.get_num_threads(),
    )


def _linear_by_panels(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    # float16 weights could overflow, and float16 sums are slow on most CPUs: float32 for float16 activations.
    bfloat16 = x.dtype == torch.bfloat16 and has_fast_matmul(torch.bfloat16, x.device)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    rows, columns = weight.shape[0], x.shape[-1]
    y = x.new_empty((*x.shape[:-1], rows))
    flat, values = y.view(-1, rows), x.reshape(-1, columns).to(dtype)
    weight, scale = weight.contiguous(), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    panel = min(rows, max(64, _PANEL_ELEMENTS // columns))
    dense = torch.empty(panel, columns, dtype=dtype)
    for first in range(0, rows, panel):
        part = slice(first, min(first + panel, rows))
        here = dense[: part.stop - first]
        zero = None if zero_point is None else zero_point[part]
        _dequantize_into(here, weight[part], scale[part], zero, bits, group_size)
        if bias is None:
            flat[:, part] = values @ here.T
        else:
            flat[:, part] = torch.addmm(bias[part].to(dtype), values, here.T)
    return y

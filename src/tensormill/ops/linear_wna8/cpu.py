"""CPU kernels: activations are quantized on the way in, sums are those of integers."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.ops.linear_wna8 import _cpu  # type: ignore[attr-defined]

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def linear(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    x_group_size: int,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    layout: str,
) -> Tensor:
    """See `reference.linear_wna8`; `layout` is "packed" and `x_dtype` torch.int8."""
    return _linear(
        x,
        x_scale,
        weight,
        weight_scale,
        zero_point,
        bias,
        out_features,
        bits,
        x_group_size,
        group_size,
        dtype,
    )


def linear_by_tables(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    x_group_size: int,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    layout: str,
) -> Tensor:
    """As `linear`, with sums of products looked up: for 1 and 2 bits, and groups of whole 32-bit words of codes."""
    return _linear(
        x,
        x_scale,
        weight,
        weight_scale,
        zero_point,
        bias,
        out_features,
        bits,
        x_group_size,
        group_size,
        dtype,
        tables=True,
    )


def tables_missing() -> str | None:
    """Why there are no look-ups on this machine, or None."""
    return None if _cpu.instruction_set() in ("vnni", "amx") else "no AVX-512 with VBMI and VNNI"


def _linear(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    x_group_size: int,
    group_size: int,
    dtype: torch.dtype,
    tables: bool = False,
) -> Tensor:
    columns = x.shape[-1]
    y = x.new_empty((*x.shape[:-1], out_features), dtype=dtype)
    x, weight, weight_scale = x.contiguous(), weight.contiguous(), weight_scale.contiguous()
    x_scale = None if x_scale is None else x_scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    bias = None if bias is None else bias.contiguous()
    _cpu.linear(
        x.data_ptr(),
        0 if x_scale is not None else _KINDS[x.dtype],
        0 if x_scale is None else x_scale.data_ptr(),
        weight.data_ptr(),
        weight_scale.data_ptr(),
        0 if zero_point is None else zero_point.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // columns,
        out_features,
        columns,
        weight.shape[1],
        weight_scale.shape[1],
        group_size,
        1 if x_group_size == -1 else -(-columns // x_group_size),
        x_group_size,
        bits,
        _KINDS[weight_scale.dtype],
        0 if bias is None else _KINDS[bias.dtype],
        _KINDS[dtype],
        tables,
        torch.get_num_threads(),
    )
    return y

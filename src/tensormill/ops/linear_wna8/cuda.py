"""Weights in the tiled layout of kind "i8" on Hopper's integer units: `linear_wna16/wgmma.cu`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensormill.ops.linear_wna16 import wgmma
from tensormill.ops.quantize_activations import operator as quantize_activations
from tensormill.ops.tiles import can_tile, tile_weight


def prepare(
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
) -> tuple[Any, ...]:
    """The canonical arguments with weight, scales and zero points in the tiled layout, ready to be read, if it can hold them."""
    given = (out_features, bits, group_size, x_group_size, x_dtype, dtype)
    if not can_tile(x.shape[-1], group_size):
        return (x, x_scale, weight, weight_scale, zero_point, bias, *given, layout)
    tiled = tile_weight(
        weight,
        weight_scale,
        zero_point,
        in_features=x.shape[-1],
        bits=bits,
        group_size=group_size,
        kind="i8",
    )
    if weight.is_cuda and not torch.cuda.is_current_stream_capturing():
        # The kernel reads weights before the kernel ahead of it has ended.
        torch.cuda.current_stream(weight.device).synchronize()
    return (x, x_scale, *tiled, bias, *given, "tiled")


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
    """See `reference.linear_wna8`; `layout` is "packed", whose weight is converted in each call, or "tiled"."""
    if layout == "packed":
        arguments = (x, x_scale, weight, weight_scale, zero_point, bias, out_features, bits, group_size)
        given = prepare(*arguments, x_group_size, x_dtype, dtype, layout)
        weight, weight_scale, zero_point = given[2:5]
    if x.numel() == 0 or out_features == 0:
        return x.new_empty((*x.shape[:-1], out_features), dtype=dtype)
    if x_scale is None:
        x, x_scale = quantize_activations(x, None, None, None, 0.0, 0.0, 8, x_group_size, x_dtype)
    columns = x.shape[-1]
    one_x_group = x_group_size == -1 or x_group_size >= columns
    y = wgmma.product(
        x.reshape(-1, columns),
        weight,
        weight_scale,
        zero_point,
        None if bias is None else bias.to(dtype),
        bits=bits,
        group_size=group_size,
        x_scale=x_scale.reshape(-1, x_scale.shape[-1]).contiguous(),
        x_group_size=-1 if one_x_group else x_group_size,
        dtype=dtype,
        overlap=layout != "packed",
    )
    return y.view(*x.shape[:-1], out_features)

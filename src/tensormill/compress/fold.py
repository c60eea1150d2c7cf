"""Moves per-channel scales between layers without changing what a model computes.

A producer's output channel is divided by `s`, and the column of every linear layer that reads the channel is
multiplied by `s`. Producers are norms (plain and `1 + weight`, with or without bias) and linear layers;
between a value projection and an output projection with fewer key-value than query heads, the query heads of
a group share their scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensormill.compress.structure import ScaleMapping, linear_in
from tensormill.errors import InvalidArgument, ModelError


@torch.no_grad()
def fold(
    block: nn.Module, mapping: ScaleMapping, scale: Tensor, *, stored_dtype: torch.dtype | None = None
) -> Tensor:
    """Divide a producer's output by `scale` and multiply the columns of its consumers, routers included, in
    place.

    Args:
        block: the module inside which the mapping's names lie.
        mapping: the edge, as found by `tensormill.compress.structure.discover`.
        scale: (channels,) positive, one per scaled output channel of the producer.
        stored_dtype: dtype to which the producer's norm weight will be rounded later. A norm's weight is then
            rounded here, and the consumers take up what the division really was, so that rounding costs
            nothing.

    Returns:
        (in_features,) by what the consumers' columns were multiplied, in float32 or wider.

    Raises:
        InvalidArgument: a scale of the wrong length, or not positive and finite.
        ModelError: the producer is neither a norm nor a linear layer.
    """
    producer: Any = block.get_submodule(mapping.producer)
    consumers = [linear_in(block, name) for name in mapping.consumers]
    expected = consumers[0].in_features // mapping.repeats
    if scale.shape != (expected,) or not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise InvalidArgument(
            f"given scales of shape {tuple(scale.shape)} for {mapping}, expected {expected} positive "
            "finite numbers"
        )
    scale = scale.to(torch.promote_types(producer.weight.dtype, torch.float32))
    if mapping.kind == "norm":
        scale = divide_norm(producer, scale, mapping.offset, stored_dtype)
    elif isinstance(producer, nn.Linear):
        divide_rows(producer, scale, mapping.rows(producer.out_features, scale.numel()))
    else:
        raise ModelError(
            f"given a {type(producer).__name__} as producer of {mapping}, expected a norm or nn.Linear"
        )
    columns = mapping.expand(scale)
    for consumer in [*consumers, *map(block.get_submodule, mapping.readers)]:
        multiply_columns(consumer, columns)
    return columns


def divide_norm(norm: Any, scale: Tensor, offset: float, stored_dtype: torch.dtype | None = None) -> Tensor:
    """Divide the output channels of a norm that multiplies by `offset + weight`; returns the exact divisor.

    Without `stored_dtype` that is `scale`; with it, the nearest one for which the new weight needs no
    rounding.
    """
    weight = norm.weight.data.to(scale.dtype)
    divided = (weight + offset) / scale - offset
    if stored_dtype is not None and stored_dtype != norm.weight.dtype:
        divided = divided.to(stored_dtype).to(scale.dtype)
        exact = (weight + offset) / (divided + offset)
        # A weight of zero lets nothing through, whatever the divisor.
        scale = torch.where(torch.isfinite(exact) & (exact > 0), exact, scale)
    norm.weight.data = divided.to(norm.weight.dtype)
    if getattr(norm, "bias", None) is not None:
        norm.bias.data = (norm.bias.data.to(scale.dtype) / scale).to(norm.bias.dtype)
    return scale


def divide_rows(linear: nn.Linear, scale: Tensor, rows: slice | Tensor) -> None:
    """Divide the output channels `rows` of a linear layer, which are as many as `scale` has numbers.

    Not all of them: fused projections also hold rows that don't pass on linearly (query and key, gate), see
    `ScaleMapping.rows`.
    """
    for values in (linear.weight, linear.bias):
        if values is not None:
            found = values.data[rows].to(scale.dtype)
            values.data[rows] = (found / scale.view(-1, *[1] * (found.dim() - 1))).to(values.dtype)


def multiply_columns(linear: Any, scale: Tensor) -> None:
    """Multiply the input channels of a linear layer, or of a router's matrix, by `scale` (in_features,)."""
    linear.weight.data.copy_(linear.weight.data.to(scale.dtype) * scale)

"""The gate of a Llama-like MLP: `silu(gate) * up` of a stacked projection `x = [gate, up]`.

`silu(v) = v / (1 + exp(-v))`. With gate and up stacked, one matrix product and one pass replace two products and two
passes. (Shazeer, GLU variants improve transformer, 2020, arXiv 2002.05202.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, Shape, triton_missing
from tensormill.ops.gated_silu.reference import reference
from tensormill.roofline import Cost

__all__ = ["gated_silu", "operator"]


def _cost(shape: Shape) -> Cost:
    """An exponential, a division and two more operations per element; two read and one written."""
    dtype = getattr(torch, shape["dtype"])
    elements = shape["rows"] * shape["intermediate_size"]
    unit = "fp64" if dtype == torch.float64 else "fp32"
    return Cost({unit: 4.0 * elements}, 2.0 * elements * dtype.itemsize, elements * dtype.itemsize)


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    size = (shape["rows"], 2 * shape["intermediate_size"])
    x = torch.randn(size, generator=generator, device=device) * shape["magnitude"]
    return (x.to(getattr(torch, shape["dtype"])),)


def _sample(
    name: str, kind: Any, rows: int, width: int, dtype: str, magnitude: float = 1.0, **flags: bool
) -> Sample:
    shape = {"rows": rows, "intermediate_size": width, "dtype": dtype, "magnitude": magnitude}
    return Sample(name, shape, kind, **flags)


def _fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


operator = Operator(
    "gated_silu",
    schema="(Tensor x) -> Tensor",
    reference=reference,
    fake=_fake,
    cost=_cost,
    inputs=_inputs,
    samples=[
        _sample("decode-1", "typical", 1, 14336, "bfloat16", benchmark=True),
        _sample("decode-16", "typical", 16, 14336, "float16", benchmark=True, large=True),
        _sample("prefill-2048", "typical", 2048, 14336, "float16", benchmark=True, large=True),
        _sample("small", "typical", 3, 1280, "float32"),
        _sample("odd", "ragged", 5, 1013, "float16"),
        _sample("one", "tiny", 1, 1, "float64"),
        _sample("no-rows", "tiny", 0, 64, "float32"),
        _sample("large", "extreme", 2, 257, "float32", 1e4),
    ],
)
operator.implementation(
    "triton",
    devices=("cuda",),
    entry="tensormill.ops.gated_silu.triton:gated_silu",
    supports=lambda x: x.dtype != torch.float64,
    missing=triton_missing,
)


def gated_silu(x: Tensor) -> Tensor:
    """`silu(gate) * up` for x = [gate, up] along the last dimension.

    silu is computed in float32 and rounded to x's dtype before the product, as torch rounds it.

    Args:
        x: (..., 2 * intermediate_size) floating point, the gates first.

    Returns:
        (..., intermediate_size) in x's dtype.

    Raises:
        InvalidArgument: no floats, or an odd last dimension.

    >>> gated_silu(torch.tensor([0.0, 20.0, 5.0, 2.0])).tolist()
    [0.0, 40.0]
    """
    if x.dim() == 0 or not x.is_floating_point() or x.shape[-1] % 2:
        raise InvalidArgument(
            f"given x of {x.dtype} and shape {tuple(x.shape)}, expected floats (..., 2 * intermediate_size)"
        )
    gated: Tensor = operator(x)
    return gated

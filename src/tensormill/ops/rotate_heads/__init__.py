"""Rotary position embedding of the heads of a stacked projection: head by head, `x cos + rotate_half(x) sin`.

`rotate_half` swaps the halves of a head and negates the first. Queries and keys are rotated and values copied in one
pass, so that queries, keys and values can come out of one matrix product. (Su et al., RoFormer, 2021, arXiv
2104.09864, in the half-split order of GPT-NeoX and Llama.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, Shape, native_missing, triton_missing
from tensormill.ops.rotate_heads.reference import reference
from tensormill.roofline import Cost

__all__ = ["operator", "rotate_heads"]


def _cost(shape: Shape) -> Cost:
    """Two products and a sum per rotated element; every element in and out once."""
    dtype = getattr(torch, shape["dtype"])
    rows = shape["batch"] * shape["length"]
    size = rows * shape["heads"] * shape["head_dim"] * dtype.itemsize
    unit = "fp64" if dtype == torch.float64 else "fp32"
    tables = 2.0 * shape["length"] * shape["head_dim"] * dtype.itemsize
    return Cost({unit: 3.0 * rows * shape["rotated"] * shape["head_dim"]}, size + tables, float(size))


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    dtype = getattr(torch, shape["dtype"])
    length, head_dim = shape["length"], shape["head_dim"]
    size = (shape["batch"], length, shape["heads"], head_dim)
    x = torch.randn(size, generator=generator, device=device) * shape["magnitude"]
    angles = 6.3 * torch.rand(length, head_dim, generator=generator, device=device)
    return x.to(dtype), angles.cos().to(dtype), angles.sin().to(dtype), shape["rotated"]


def _sample(
    name: str,
    kind: Any,
    batch: int,
    length: int,
    heads: int,
    rotated: int,
    head_dim: int,
    dtype: str,
    magnitude: float = 1.0,
    **flags: bool,
) -> Sample:
    shape = {"batch": batch, "length": length, "heads": heads, "rotated": rotated, "head_dim": head_dim}
    return Sample(name, {**shape, "dtype": dtype, "magnitude": magnitude}, kind, **flags)


operator = Operator(
    "rotate_heads",
    schema="(Tensor x, Tensor cosine, Tensor sine, int rotated) -> Tensor",
    reference=reference,
    fake=lambda x, cosine, sine, rotated: torch.empty_like(x, memory_format=torch.contiguous_format),
    cost=_cost,
    inputs=_inputs,
    samples=[
        _sample("decode-1", "typical", 1, 1, 48, 40, 128, "bfloat16", benchmark=True),
        _sample("decode-16", "typical", 16, 1, 48, 40, 128, "float16", benchmark=True),
        _sample("prefill-2048", "typical", 1, 2048, 48, 40, 128, "float16", benchmark=True, large=True),
        _sample("small", "typical", 2, 5, 10, 8, 64, "float32"),
        _sample("odd", "ragged", 3, 7, 13, 11, 20, "float16"),
        _sample("one", "tiny", 1, 1, 1, 1, 2, "float64"),
        _sample("none-rotated", "tiny", 1, 2, 3, 0, 8, "float32"),
        _sample("empty", "tiny", 0, 4, 3, 2, 8, "float32"),
        _sample("large", "extreme", 2, 3, 5, 4, 16, "float32", 1e30),
    ],
)
operator.implementation(
    "cpu",
    devices=("cpu",),
    entry="tensormill.ops.rotate_heads.cpu:rotate_heads",
    supports=lambda x, cosine, sine, rotated: x.dtype in (torch.float32, torch.bfloat16),
    missing=native_missing("tensormill.ops.rotate_heads._cpu"),
)
operator.implementation(
    "triton",
    devices=("cuda",),
    entry="tensormill.ops.rotate_heads.triton:rotate_heads",
    supports=lambda x, cosine, sine, rotated: x.dtype != torch.float64 and x.shape[-1] <= 1024,
    missing=triton_missing,
)


def rotate_heads(x: Tensor, cosine: Tensor, sine: Tensor, rotated: int) -> Tensor:
    """Rotate the first heads of a stacked projection by their positions' angles and copy the others.

    Both products and the sum are rounded to x's dtype, as transformers' Llama rounds them.

    Args:
        x: (batch, length, heads, head_dim) floating point; head_dim is even.
        cosine, sine: (length, head_dim) of x's dtype: of each position's angles.
        rotated: how many heads are rotated: the queries' and the keys' heads, where the values' come last.

    Returns:
        Like x, contiguous.

    Raises:
        InvalidArgument: shapes, dtypes or devices that don't fit, an odd head_dim, or `rotated` out of range.

    >>> x = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    >>> rotate_heads(x, torch.zeros(1, 2), torch.ones(1, 2), 1).flatten().tolist()  # a quarter turn
    [-2.0, 1.0]
    """
    if x.dim() != 4 or not x.is_floating_point() or x.shape[-1] % 2:
        raise InvalidArgument(
            f"given x of {x.dtype} and shape {tuple(x.shape)}, expected floats (batch, length, heads, head_dim) "
            "with an even head_dim"
        )
    expected = (x.shape[1], x.shape[3])
    for name, table in (("cosine", cosine), ("sine", sine)):
        if tuple(table.shape) != expected or table.dtype != x.dtype or table.device != x.device:
            raise InvalidArgument(
                f"given {name} of {table.dtype} and shape {tuple(table.shape)} on {table.device}, expected "
                f"{x.dtype}, {expected} on {x.device}"
            )
    if not 0 <= rotated <= x.shape[2]:
        raise InvalidArgument(f"given rotated={rotated}, expected 0 to {x.shape[2]}, the number of heads")
    turned: Tensor = operator(x, cosine, sine, rotated)
    return turned

"""Residual sum and RMS norm in one pass: `h = x + residual`, `y = weight * h / sqrt(mean(h^2) + eps)`.

Between two layers of a decoder nothing else happens; alone, the steps take ten launches and as many passes over the
hidden states. (Zhang and Sennrich, Root mean square layer normalization, 2019, arXiv 1910.07467.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, Shape, native_missing, triton_missing
from tensormill.ops.add_rms_norm.reference import reference
from tensormill.roofline import Cost

__all__ = ["add_rms_norm", "operator"]

#: Longest row of the kernel: it is held in one program's registers.
_LONGEST = 1 << 15


def _cost(shape: Shape) -> Cost:
    """An addition, a square, a sum and two products per element; x, residual and weight in, y and h out."""
    dtype = getattr(torch, shape["dtype"])
    elements = shape["rows"] * shape["hidden_size"]
    size = elements * dtype.itemsize
    unit = "fp64" if dtype == torch.float64 else "fp32"
    return Cost({unit: 5.0 * elements}, 2.0 * size + shape["hidden_size"] * dtype.itemsize, 2.0 * size)


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    dtype = getattr(torch, shape["dtype"])
    size = (shape["rows"], shape["hidden_size"])
    x, residual = (
        torch.randn(size, generator=generator, device=device) * shape["magnitude"] for _ in range(2)
    )
    weight = 1 + 0.3 * torch.randn(shape["hidden_size"], generator=generator, device=device)
    return x.to(dtype), residual.to(dtype), weight.to(dtype), 1e-5


def _sample(
    name: str, kind: Any, rows: int, hidden_size: int, dtype: str, magnitude: float = 1.0, **flags: bool
) -> Sample:
    shape = {"rows": rows, "hidden_size": hidden_size, "dtype": dtype, "magnitude": magnitude}
    return Sample(name, shape, kind, **flags)


operator = Operator(
    "add_rms_norm",
    schema="(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    reference=reference,
    fake=lambda x, residual, weight, eps: (torch.empty_like(x), torch.empty_like(x)),
    cost=_cost,
    inputs=_inputs,
    samples=[
        _sample("decode-1", "typical", 1, 4096, "bfloat16", benchmark=True),
        _sample("decode-16", "typical", 16, 4096, "float16", benchmark=True),
        _sample("prefill-2048", "typical", 2048, 4096, "float16", benchmark=True, large=True),
        _sample("small", "typical", 3, 384, "float32"),
        _sample("odd", "ragged", 5, 1013, "float16"),
        _sample("one", "tiny", 1, 1, "float64"),
        _sample("no-rows", "tiny", 0, 64, "float32"),
        _sample("zeros", "extreme", 2, 100, "float16", 0.0),
        _sample("large", "extreme", 2, 257, "float32", 1e15),
    ],
    reduction=lambda shape: shape["hidden_size"],
)
operator.implementation(
    "cpu",
    devices=("cpu",),
    entry="tensormill.ops.add_rms_norm.cpu:add_rms_norm",
    supports=lambda x, residual, weight, eps: x.dtype in (torch.float32, torch.bfloat16),
    missing=native_missing("tensormill.ops.add_rms_norm._cpu"),
)
operator.implementation(
    "triton",
    devices=("cuda",),
    entry="tensormill.ops.add_rms_norm.triton:add_rms_norm",
    supports=lambda x, residual, weight, eps: x.shape[-1] <= _LONGEST and x.dtype != torch.float64,
    missing=triton_missing,
)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add a layer's output to the residual stream and normalize the sum for the next layer.

    The sum is rounded to x's dtype, the norm computed from it in float32 and rounded before it is multiplied by the
    weight: as transformers' Llama rounds.

    Args:
        x: (..., hidden_size) floating point, the layer's output.
        residual: like x, the stream.
        weight: (hidden_size,) of x's dtype.
        eps: added to the mean square.

    Returns:
        `(y, h)`: the normalized sum and the sum, both like x.

    Raises:
        InvalidArgument: shapes, dtypes or devices that don't fit.

    >>> y, h = add_rms_norm(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]), torch.ones(2), 0.0)
    >>> h.tolist(), [round(v, 3) for v in y.tolist()]
    ([3.0, 4.0], [0.849, 1.131])
    """
    if not x.is_floating_point() or x.dim() == 0:
        raise InvalidArgument(
            f"given x of {x.dtype} and shape {tuple(x.shape)}, expected floats (..., hidden_size)"
        )
    for name, tensor, expected in (("residual", residual, x.shape), ("weight", weight, x.shape[-1:])):
        if tensor.shape != expected or tensor.dtype != x.dtype or tensor.device != x.device:
            raise InvalidArgument(
                f"given {name} of {tensor.dtype} and shape {tuple(tensor.shape)} on {tensor.device}, expected "
                f"{x.dtype}, {tuple(expected)} on {x.device}"
            )
    normed, total = operator(x, residual, weight, eps)
    return normed, total

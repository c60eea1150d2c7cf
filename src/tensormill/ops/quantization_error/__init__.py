"""What rounding changes in a weight whose columns are scaled first: `fake_quantize(weight * s) / s - weight`, for many
candidate scales s at once: what a search for scales asks of every candidate.

(Lin and others, AWQ, arXiv 2306.00978, equation 4, of which this is the change of the weight.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, Shape, triton_missing
from tensormill.ops.quantization import GRID_SCHEMA, QuantSpec
from tensormill.ops.quantization_error import reference
from tensormill.roofline import Cost

SCALE_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)
LARGEST_GROUP = 16384
"""Columns of a group that one program holds in registers."""


def cost(shape: Shape) -> Cost:
    """Twelve operations per weight and candidate; weights and scales are read once, differences written once."""
    weights, candidates = shape["out_features"] * shape["in_features"], shape["candidates"]
    read = 4.0 * (weights + candidates * shape["in_features"])
    return Cost({"fp32": 12.0 * weights * candidates}, read, 4.0 * weights * candidates)


def spec_of(shape: Shape) -> QuantSpec:
    """The quantizer of a sample."""
    return QuantSpec(
        bits=shape["bits"],
        group_size=shape["group_size"],
        symmetric=shape.get("symmetric", False),
        scale_rule=shape.get("scale_rule", "absmax/half_range"),
        include_zero=shape.get("include_zero", True),
        scale_dtype=getattr(torch, shape["scale_dtype"]) if shape.get("scale_dtype") else None,
    )


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    rows, columns, candidates = shape["out_features"], shape["in_features"], shape["candidates"]
    weight = torch.randn(rows, columns, generator=generator, device=device) * shape.get("magnitude", 1.0)
    weight = weight + shape.get("offset", 0.0)
    if shape.get("zeros", False):
        weight[::2] = 0
    scales = torch.randn(candidates, columns, generator=generator, device=device).exp()
    return weight, scales, *spec_of(shape).grid


def _sample(
    kind: Any,
    out_features: int,
    in_features: int,
    candidates: int,
    group_size: int,
    bits: int = 4,
    *,
    large: bool = False,
    benchmark: bool = False,
    **more: Any,
) -> Sample:
    sizes = {"out_features": out_features, "in_features": in_features, "candidates": candidates}
    marks = "".join(f"-{key}" if value is True else f"-{key}-{value}" for key, value in more.items())
    name = f"{out_features}x{in_features}-c{candidates}-w{bits}-g{group_size}{marks}"
    return Sample(name, {**sizes, "bits": bits, "group_size": group_size, **more}, kind, benchmark, large)


def samples() -> list[Sample]:
    """Parts of Llama-3-8B's layers with as many candidates as a search hands over; every choice of the grid."""
    found = [
        _sample("typical", 1024, 4096, 8, 128, scale_dtype="bfloat16", benchmark=True, large=True),
        _sample("typical", 292, 14336, 8, 128, scale_dtype="bfloat16", benchmark=True, large=True),
        _sample("typical", 1024, 4096, 8, -1, symmetric=True, benchmark=True, large=True),
        _sample("typical", 5, 512, 3, 128, scale_dtype="bfloat16", benchmark=True),
        _sample("typical", 4, 512, 2, 64, scale_dtype="float16", symmetric=True),
        _sample(
            "typical", 4, 256, 2, 32, 3, symmetric=True, scale_rule="absmax/qmax", scale_dtype="bfloat16"
        ),
        _sample("typical", 3, 1024, 2, -1, 8, scale_dtype="float16"),
        _sample("typical", 3, 128, 2, 16, 2, include_zero=False, offset=3.0),
        _sample("ragged", 13, 1000, 3, 128, scale_dtype="float16"),
        _sample("ragged", 7, 333, 2, -1),
        _sample("ragged", 3, 100, 2, 24, 5, symmetric=True),
        _sample("tiny", 1, 1, 1, 128),
        _sample("tiny", 0, 64, 2, 32),
        _sample("tiny", 2, 64, 0, 32),
        _sample("extreme", 3, 256, 2, 128, magnitude=1e30),
        _sample("extreme", 3, 256, 2, 128, magnitude=1e-30, scale_dtype="float16"),
        _sample("extreme", 3, 256, 2, 128, magnitude=1e-37, scale_dtype="bfloat16"),
        _sample("extreme", 4, 256, 2, 64, zeros=True, scale_dtype="bfloat16"),
        _sample("extreme", 3, 256, 2, 64, include_zero=False, offset=1e6, scale_dtype="bfloat16"),
    ]
    return found


def _fake(weight: Tensor, scales: Tensor, *grid: Any) -> Tensor:
    return weight.new_empty((scales.shape[0], *weight.shape), dtype=torch.float32)


def _triton_supports(weight: Tensor, scales: Tensor, *grid: Any) -> bool:
    spec = QuantSpec(*grid)
    columns = weight.shape[1]
    return (
        weight.dtype == scales.dtype == torch.float32
        and columns > 0
        and spec.columns_per_group(columns) <= LARGEST_GROUP
        and spec.scale_dtype in SCALE_DTYPES
    )


operator = Operator(
    "quantization_error",
    schema=f"(Tensor weight, Tensor scales, {GRID_SCHEMA}) -> Tensor",
    reference=reference.quantization_error,
    fake=_fake,
    cost=cost,
    inputs=_inputs,
    samples=samples(),
    exact=True,
)
operator.implementation(
    "triton",
    devices=("cuda",),
    entry="tensormill.ops.quantization_error.triton:quantization_error",
    supports=_triton_supports,
    missing=triton_missing,
)


def quantization_error(weight: Tensor, scales: Tensor, spec: QuantSpec) -> Tensor:
    """`fake_quantize(weight * s) / s - weight` for each row s of `scales`; it has no gradient.

    Args:
        weight: (N, K) float32, finite (not checked).
        scales: (C, K) float32, positive and finite (not checked).
        spec: the quantizer.

    Returns:
        (C, N, K) float32, the same to the bit on every device.

    Raises:
        InvalidArgument: a shape, dtype or device doesn't fit, or the group size doesn't divide K.

    >>> weight = torch.tensor([[0.0, 0.9, 2.2, 3.0]])
    >>> quantization_error(weight, torch.ones(1, 4), QuantSpec(bits=2, group_size=4))
    tensor([[[ 0.0000,  0.1000, -0.2000,  0.0000]]])
    """
    if weight.dim() != 2 or weight.dtype != torch.float32 or weight.shape[1] == 0:
        raise InvalidArgument(
            f"given weight of {weight.dtype} and shape {tuple(weight.shape)}, expected torch.float32 (N, K), K > 0"
        )
    columns = weight.shape[1]
    if scales.dim() != 2 or scales.shape[1] != columns or scales.dtype != torch.float32:
        raise InvalidArgument(
            f"given scales of {scales.dtype} and shape {tuple(scales.shape)}, expected torch.float32 (C, {columns})"
        )
    if scales.device != weight.device:
        raise InvalidArgument(
            f"given scales on {scales.device} and weight on {weight.device}, expected one device"
        )
    spec.check(columns)
    error: Tensor = operator(weight, scales, *spec.grid)
    return error

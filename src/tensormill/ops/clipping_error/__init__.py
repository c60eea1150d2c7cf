"""The output error of each group of weights at each of many smaller ranges: `d S d^T` with
`d = fake_quantize(clamp(w, -r m, r m)) - w`, m the group's largest magnitude, S its block of the inputs' Gram matrix
and r each of the candidate ratios. What a search for ranges minimizes.

(The clipping of AWQ's published code, arXiv 2306.00978; with a Gram matrix instead of a sample of inputs.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, Shape, triton_missing
from tensormill.ops.clipping_error import reference
from tensormill.ops.quantization import GRID_SCHEMA, QuantSpec
from tensormill.ops.quantization_error import SCALE_DTYPES, spec_of
from tensormill.roofline import Cost

GROUPS = (16, 32, 64, 128)
"""Sizes of groups whose block of the Gram matrix one program keeps."""


def cost(shape: Shape) -> Cost:
    """Twelve operations per weight and ratio, and a product with the group's block; everything is moved once."""
    rows, columns, ratios = shape["out_features"], shape["in_features"], shape["ratios"]
    spec = spec_of(shape)
    size, groups = spec.columns_per_group(columns), spec.num_groups(columns)
    read = 4.0 * (rows * columns + groups * size * size + ratios)
    operations = rows * columns * ratios * (12.0 + 2.0 * size)
    return Cost({"fp32": operations}, read, 4.0 * ratios * rows * groups)


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    rows, columns, ratios = shape["out_features"], shape["in_features"], shape["ratios"]
    spec = spec_of(shape)
    size, groups = spec.columns_per_group(columns), spec.num_groups(columns)
    weight = torch.randn(rows, columns, generator=generator, device=device) * shape.get("magnitude", 1.0)
    if shape.get("zeros", False):
        weight[::2] = 0
    # Inputs with channels of very different size that are correlated.
    x = torch.randn(groups, 2 * size, size, generator=generator, device=device)
    x = x * torch.randn(groups, 1, size, generator=generator, device=device).exp() + x[..., :1]
    x[-1, :, columns - (groups - 1) * size :] = 0
    gram = x.transpose(1, 2) @ x / (2 * size)
    return weight, gram, 1 - torch.arange(ratios, device=device) / 40, *spec.grid


def _sample(
    kind: Any,
    out_features: int,
    in_features: int,
    group_size: int,
    bits: int = 4,
    ratios: int = 28,
    *,
    large: bool = False,
    benchmark: bool = False,
    **more: Any,
) -> Sample:
    sizes = {"out_features": out_features, "in_features": in_features, "ratios": ratios}
    marks = "".join(f"-{key}" if value is True else f"-{key}-{value}" for key, value in more.items())
    name = f"{out_features}x{in_features}-r{ratios}-w{bits}-g{group_size}{marks}"
    return Sample(name, {**sizes, "bits": bits, "group_size": group_size, **more}, kind, benchmark, large)


def samples() -> list[Sample]:
    """Layers of Llama-3-8B with AWQ's ratios; every choice of the grid."""
    return [
        _sample("typical", 4096, 4096, 128, scale_dtype="bfloat16", benchmark=True, large=True),
        _sample("typical", 4096, 14336, 128, scale_dtype="bfloat16", benchmark=True, large=True),
        _sample("typical", 4096, 4096, 64, symmetric=True, benchmark=True, large=True),
        _sample("typical", 6, 256, 128, scale_dtype="bfloat16", benchmark=True),
        _sample("typical", 70, 128, 64, 3, 5, scale_dtype="float16", symmetric=True),
        _sample("typical", 5, 128, 32, 2, 9, symmetric=True, scale_rule="absmax/qmax"),
        _sample("typical", 9, 64, 16, ratios=20, include_zero=False, scale_dtype="bfloat16"),
        _sample("typical", 4, 64, -1, 8, 7),
        _sample("ragged", 13, 200, 128, ratios=4, scale_dtype="bfloat16"),
        _sample("ragged", 131, 50, 16, 3, 3),
        _sample("ragged", 5, 96, 24, ratios=3),
        _sample("tiny", 1, 16, 16, ratios=1),
        _sample("tiny", 0, 64, 32),
        _sample("tiny", 3, 64, 32, ratios=0),
        _sample("extreme", 3, 128, 64, ratios=5, magnitude=1e15),
        _sample("extreme", 3, 128, 64, ratios=5, magnitude=1e-15, scale_dtype="bfloat16"),
        _sample("extreme", 4, 128, 32, ratios=5, zeros=True, scale_dtype="float16"),
    ]


def _fake(weight: Tensor, gram: Tensor, ratios: Tensor, *grid: Any) -> Tensor:
    return gram.new_empty((ratios.shape[0], weight.shape[0], gram.shape[0]))


def _triton_supports(weight: Tensor, gram: Tensor, ratios: Tensor, *grid: Any) -> bool:
    spec = QuantSpec(*grid)
    return (
        weight.dtype == gram.dtype == ratios.dtype == torch.float32
        and weight.shape[1] > 0
        and spec.columns_per_group(weight.shape[1]) in GROUPS
        and spec.scale_dtype in SCALE_DTYPES
    )


operator = Operator(
    "clipping_error",
    schema=f"(Tensor weight, Tensor gram, Tensor ratios, {GRID_SCHEMA}) -> Tensor",
    reference=reference.clipping_error,
    fake=_fake,
    cost=cost,
    inputs=_inputs,
    samples=samples(),
)
operator.implementation(
    "triton",
    devices=("cuda",),
    entry="tensormill.ops.clipping_error.triton:clipping_error",
    supports=_triton_supports,
    missing=triton_missing,
)


def clipping_error(weight: Tensor, gram: Tensor, ratios: Tensor, spec: QuantSpec) -> Tensor:
    """The output error of each group when its range is clipped to each of the ratios; it has no gradient.

    Args:
        weight: (N, K) float32, finite (not checked).
        gram: (G, group, group) float32, symmetric (not checked): the mean over tokens of x x^T for the channels x of each
            group; where the last group is shorter, 0 beyond it.
        ratios: (C,) float32, shares of a group's largest magnitude, above 0 and at most 1 (not checked).
        spec: the quantizer.

    Returns:
        (C, N, G) float32: for each ratio, row and group the mean over tokens of the square of what clipping and
        rounding change in the group's share of the output.

    Raises:
        InvalidArgument: a shape, dtype or device doesn't fit, or the group size doesn't divide K.

    With 2 bits, a finer step for three weights is worth more than the range of the fourth:

    >>> weight = torch.tensor([[0.0, 0.8, 1.6, 3.0]])
    >>> spec = QuantSpec(bits=2, group_size=4)
    >>> clipping_error(weight, torch.eye(4)[None], torch.tensor([1.0, 0.925]), spec).flatten()
    tensor([0.2000, 0.1287])
    """
    if weight.dim() != 2 or weight.dtype != torch.float32 or weight.shape[1] == 0:
        raise InvalidArgument(
            f"given weight of {weight.dtype} and shape {tuple(weight.shape)}, expected torch.float32 (N, K), K > 0"
        )
    columns = weight.shape[1]
    spec.check(columns)
    size = spec.columns_per_group(columns)
    if tuple(gram.shape) != (spec.num_groups(columns), size, size) or gram.dtype != torch.float32:
        raise InvalidArgument(
            f"given gram of {gram.dtype} and shape {tuple(gram.shape)}, expected torch.float32 of shape"
            f" {(spec.num_groups(columns), size, size)}"
        )
    if ratios.dim() != 1 or ratios.dtype != torch.float32:
        raise InvalidArgument(
            f"given ratios of {ratios.dtype} and shape {tuple(ratios.shape)}, expected torch.float32 (C,)"
        )
    for name, tensor in (("gram", gram), ("ratios", ratios)):
        if tensor.device != weight.device:
            raise InvalidArgument(
                f"given {name} on {tensor.device} and weight on {weight.device}, expected one device"
            )
    errors: Tensor = operator(weight, gram, ratios, *spec.grid)
    return errors

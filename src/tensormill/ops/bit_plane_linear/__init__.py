"""Product of matrices of small integers stored as bit planes, exact in int32 and optionally scaled: any p-bit weights
times any q-bit activations, `y[m, n] = sum_g x_scale[m, g] weight_scale[n, g] sum_{k in g} x[m, k] weight[n, k]`.

A p-bit by q-bit product is p q products of single bits weighted by powers of two, and the tensor cores of Hopper GPUs
multiply single bits eight times as fast as bytes: with p q < 8 that beats int8, and few bits are few bytes besides
(APNN-TC, arXiv 2106.12169; Bipolar-INT, arXiv 2409.17870).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, native_missing, triton_missing
from tensormill.ops.bit_plane_linear import peers, reference
from tensormill.ops.bit_planes import (
    FORMATS,
    BitPlanes,
    code_sums,
    group_count,
    integer_range,
    pack_codes,
    words_of_row,
)
from tensormill.roofline import Cost

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor x_sums, Tensor weight_sums, Tensor? x_scale, Tensor? weight_scale, int length,"
    " str x_format, str weight_format, int group_size, ScalarType dtype) -> Tensor"
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Shape = Mapping[str, Any]


def cost(shape: Shape) -> Cost:
    tokens, rows, length = shape["tokens"], shape["out_features"], shape["in_features"]
    p, q = shape["weight_bits"], shape["x_bits"]
    groups = group_count(length, shape["group_size"])
    scaled = shape["dtype"] != "int32"
    read = 4 * words_of_row(length) * (q * tokens + p * rows) + 4 * (1 + scaled) * groups * (tokens + rows)
    return Cost(
        {"b1": 2.0 * tokens * rows * length * p * q},
        read,
        tokens * rows * getattr(torch, shape["dtype"]).itemsize,
    )


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    length, group_size = shape["in_features"], shape["group_size"]
    dtype = getattr(torch, shape["dtype"])
    operands: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for rows, bits in ((shape["tokens"], shape["x_bits"]), (shape["out_features"], shape["weight_bits"])):
        if shape.get("values") == "largest":
            codes = torch.full((rows, length), (1 << bits) - 1, dtype=torch.uint8, device=device)
        elif shape.get("values") == "least":
            codes = torch.zeros((rows, length), dtype=torch.uint8, device=device)
        else:
            codes = torch.randint(0, 1 << bits, (rows, length), generator=generator, device=device).byte()
        planes = pack_codes(codes, bits)
        scale = None
        if dtype != torch.int32:
            groups = group_count(length, group_size)
            scale = torch.rand(rows, groups, generator=generator, device=device) / (1 << bits) / length**0.5
            scale = scale.to(getattr(torch, shape.get("scale_dtype", "float32")))
        operands.append((planes, code_sums(planes, length, group_size), scale))
    (x, x_sums, x_scale), (weight, weight_sums, weight_scale) = operands
    formats = shape["x_format"], shape["weight_format"]
    return x, weight, x_sums, weight_sums, x_scale, weight_scale, length, *formats, group_size, dtype


def _sample(
    kind: str,
    tokens: int,
    rows: int,
    length: int,
    weight_bits: int,
    x_bits: int,
    dtype: str = "int32",
    formats: tuple[str, str] = ("bipolar", "bipolar"),
    group_size: int = -1,
    *,
    large: bool = False,
    benchmark: bool = False,
    **more: Any,
) -> Sample:
    shape: dict[str, Any] = {
        "tokens": tokens,
        "out_features": rows,
        "in_features": length,
        "weight_bits": weight_bits,
        "x_bits": x_bits,
        "weight_format": formats[0],
        "x_format": formats[1],
        "group_size": group_size,
        "dtype": dtype,
    }
    marks = "".join(f"-{value}" for value in more.values())
    name = f"m{tokens}-{rows}x{length}-{formats[0]}{weight_bits}-{formats[1]}{x_bits}-g{group_size}-{dtype}{marks}"
    return Sample(name, {**shape, **more}, kind, benchmark=benchmark, large=large)  # type: ignore[arg-type]


def samples() -> list[Sample]:
    found = [
        _sample("typical", 16, 512, 1024, 2, 2, "float32", benchmark=True),
        _sample("typical", 1, 256, 1024, 1, 1),
        _sample("typical", 70, 128, 512, 2, 4, "float16"),
        _sample("typical", 16, 192, 1024, 1, 2, "bfloat16", scale_dtype="bfloat16"),
        _sample("typical", 4, 128, 1024, 4, 4, "float32", ("signed", "signed"), 128),
        _sample("typical", 20, 64, 1024, 2, 8, "float16", ("bipolar", "signed"), 256),
        _sample("tiny", 0, 24, 64, 1, 1),
        _sample("tiny", 1, 1, 1, 1, 1),
        _sample("tiny", 2, 3, 5, 3, 2, "int32", ("signed", "unsigned")),
        # every product at an end of its range, and as long as int32 allows for 8 by 8 bits
        _sample("extreme", 2, 3, 33024, 8, 8, "int32", ("bipolar", "bipolar"), values="least"),
        _sample("extreme", 1, 2, 2000, 8, 8, "int32", ("signed", "signed"), values="least"),
        _sample("extreme", 1, 2, 2000, 8, 8, "int32", ("unsigned", "unsigned"), values="largest"),
        _sample("extreme", 9, 70, 300, 1, 1, "int32", values="largest"),
        _sample("ragged", 5, 11, 300, 4, 4, "float16", ("signed", "bipolar"), 128, scale_dtype="float16"),
        _sample("ragged", 13, 37, 1000, 3, 5, "float32", ("bipolar", "unsigned"), 384),
        _sample("ragged", 129, 60, 333, 2, 2, "int32"),
        _sample("ragged", 63, 130, 576, 1, 3, "bfloat16", ("unsigned", "signed")),
    ]
    for p in range(1, 9):
        for q in (p, 9 - p):
            formats = FORMATS[(p + q) % 3], FORMATS[(2 * p + q) % 3]
            tokens, rows = (7, 1, 17, 9)[(p + 2 * q) % 4], (19, 33, 64, 1)[p % 4]
            found.append(
                _sample("ragged", tokens, rows, (129, 255, 256, 31)[(p + 3 * q) % 4], p, q, "int32", formats)
            )
    for p, q in ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (2, 8)):
        for tokens in (1, 16, 64, 256, 4096):
            found.append(
                _sample("typical", tokens, 8192, 8192, p, q, "float16", large=True, benchmark=tokens != 64)
            )
    return found


def _fake(
    x: Tensor,
    weight: Tensor,
    x_sums: Tensor,
    weight_sums: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    length: int,
    x_format: str,
    weight_format: str,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    if x_scale is None:
        dtype = torch.int32
    elif torch.float64 in (x_scale.dtype, weight_scale.dtype if weight_scale is not None else None):
        dtype = torch.float64
    return x.new_empty((x.shape[1], weight.shape[1]), dtype=dtype)


def _supports(
    x: Tensor,
    weight: Tensor,
    x_sums: Tensor,
    weight_sums: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    length: int,
    x_format: str,
    weight_format: str,
    group_size: int,
    dtype: torch.dtype,
) -> bool:
    scales = [s for s in (x_scale, weight_scale) if s is not None]
    return all(s.dtype in DTYPES for s in scales)


def _cuda_supports(*arguments: Any) -> bool:
    from tensormill.ops.bit_plane_linear.cuda import supports

    return _supports(*arguments) and supports(*arguments)


def _cuda_missing() -> str | None:
    from tensormill.ops.bit_plane_linear.cuda import missing

    return missing()


operator = Operator(
    "bit_plane_linear",
    schema=SCHEMA,
    reference=reference.bit_plane_linear,
    fake=_fake,
    cost=cost,
    inputs=_inputs,
    samples=samples(),
    reduction=lambda shape: shape["in_features"],
)
operator.implementation(
    "cpu",
    devices=("cpu",),
    entry="tensormill.ops.bit_plane_linear.cpu:bit_plane_linear",
    supports=_supports,
    missing=native_missing("tensormill.ops.bit_plane_linear._cpu"),
)
operator.implementation(
    "cuda",
    devices=("cuda",),
    entry="tensormill.ops.bit_plane_linear.cuda:bit_plane_linear",
    supports=_cuda_supports,
    missing=_cuda_missing,
)
operator.implementation(
    "triton",
    devices=("cuda",),
    entry="tensormill.ops.bit_plane_linear.triton:bit_plane_linear",
    supports=_supports,
    missing=triton_missing,
)
peers.register(operator)


def bit_plane_linear(x: BitPlanes, weight: BitPlanes, *, dtype: torch.dtype | None = None) -> Tensor:
    """`x @ weight.T` of two matrices of bit planes: exact int32, or scaled floats where both have scales.

    Groups may differ, if those of one divide the other's: both are then taken in the finer ones.

    Args:
        x: (M, K) planes of q bits.
        weight: (N, K) planes of p bits.
        dtype: torch.int32 leaves the scales out; torch.float16, bfloat16 or float32 apply them. By default float32
            where both operands have scales, else int32.

    Returns:
        (M, N).

    Raises:
        InvalidArgument: the operands don't fit together, scales are missing, or sums may exceed int32.

    >>> from tensormill.ops.bit_planes import pack_planes
    >>> x = pack_planes(torch.tensor([[1, -1, 1, 1]]), 1, "bipolar")
    >>> weight = pack_planes(torch.tensor([[3, -3, 1, -1], [1, 1, 1, 1]]), 2, "bipolar")
    >>> bit_plane_linear(x, weight)
    tensor([[6, 2]], dtype=torch.int32)
    """
    if not isinstance(x, BitPlanes) or not isinstance(weight, BitPlanes):
        given = type(x).__name__, type(weight).__name__
        raise InvalidArgument(f"given {given[0]} and {given[1]}, expected two BitPlanes; see pack_planes")
    if x.length != weight.length:
        raise InvalidArgument(
            f"given x with K = {x.length} and weight with K = {weight.length}, expected the same"
        )
    if x.planes.device != weight.planes.device:
        raise InvalidArgument(
            f"given x on {x.planes.device} and weight on {weight.planes.device}, expected one device"
        )
    scaled = x.scale is not None and weight.scale is not None
    if dtype is None:
        dtype = torch.float32 if scaled else torch.int32
    if dtype != torch.int32 and dtype not in DTYPES:
        raise InvalidArgument(f"given dtype={dtype}, expected torch.int32, float16, bfloat16 or float32")
    if dtype != torch.int32 and not scaled:
        raise InvalidArgument(
            f"given dtype={dtype} and an operand without scales, expected both scaled, or torch.int32"
        )
    if dtype == torch.int32:
        x, weight = _whole_rows(x), _whole_rows(weight)
    elif x.group_size != weight.group_size:
        finer = min((g for g in (x.group_size, weight.group_size) if g != -1), default=-1)
        x, weight = x.regrouped(finer), weight.regrouped(finer)
    check_sums(x.length if x.group_size == -1 else min(x.group_size, x.length), x, weight)
    scales = (x.scale, weight.scale) if dtype != torch.int32 else (None, None)
    formats = x.format, weight.format
    return operator(
        x.planes, weight.planes, x.sums, weight.sums, *scales, x.length, *formats, x.group_size, dtype
    )


def check_sums(length: int, x: BitPlanes, weight: BitPlanes) -> None:
    """Raises InvalidArgument if a sum of `length` products might not fit int32."""
    largest = max(map(abs, integer_range(x.format, x.bits))) * max(
        map(abs, integer_range(weight.format, weight.bits))
    )
    if length * largest >= 1 << 31:
        raise InvalidArgument(
            f"given K = {length} with {weight.bits}-bit {weight.format} weights and {x.bits}-bit {x.format} activations,"
            f" whose sums may exceed int32; expected K <= {((1 << 31) - 1) // largest}: use groups, or fewer bits"
        )


def _whole_rows(operand: BitPlanes) -> BitPlanes:
    if operand.group_size == -1:
        return operand
    sums = operand.sums.sum(1, keepdim=True, dtype=torch.int32)
    return BitPlanes(operand.planes, sums, None, operand.length, operand.format)

"""The weight matrix of a low-bit linear layer: `W[n, k] = (code[n, k] - zero_point[n, g]) * scale[n, g]`,
with `g = k // group_size`, from codes of 1 to 8 bits packed densely along k.

The backward pass of `linear_wna16` and its product for many tokens are built on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, interpreting, native_missing, triton_missing
from tensormill.ops.bit_packing import packed_width
from tensormill.ops.dequantize_wna16 import reference
from tensormill.ops.tiles import can_tile, tiled_group_shape, tiled_shape
from tensormill.roofline import Cost

SCHEMA = (
    "(Tensor weight, Tensor scale, Tensor? zero_point, int in_features, int bits, int group_size, str layout,"
    " ScalarType dtype) -> Tensor"
)
LAYOUTS = ("packed", "tiled")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Shape = Mapping[str, Any]


def num_groups(in_features: int, group_size: int) -> int:
    """Groups of a row of `in_features`, a shorter last one included."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def check_weight(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    layout: str,
) -> None:
    """Raise `InvalidArgument` unless these describe a weight of `in_features` columns in that layout."""
    if layout not in LAYOUTS:
        raise InvalidArgument(f"given layout={layout!r}, expected one of {list(LAYOUTS)}")
    if not 1 <= bits <= 8:
        raise InvalidArgument(f"given bits={bits}, expected an integer from 1 to 8")
    if group_size != -1 and group_size < 1:
        raise InvalidArgument(
            f"given group_size={group_size}, expected a positive integer, or -1 for one group per row"
        )
    if weight.dtype != torch.int32 or weight.dim() != 2:
        raise InvalidArgument(
            f"given weight of {weight.dtype} and shape {tuple(weight.shape)}, expected packed int32 words"
            " (N, words); pack codes with tensormill.ops.bit_packing.pack_bits"
        )
    tiled = layout == "tiled"
    if tiled and not can_tile(in_features, group_size):
        raise InvalidArgument(
            f"given group_size={group_size}, expected 32, 64, a multiple of 128 or -1 for the tiled layout"
        )
    words = tiled_shape(weight.shape[0], in_features, bits)[1] if tiled else packed_width(in_features, bits)
    if weight.shape[1] != words:
        raise InvalidArgument(
            f"given weight with {weight.shape[1]} words a row, expected {words} for {in_features} input"
            f" features of {bits} bits; check bits and the last dimension of x"
        )
    expected = (weight.shape[0], num_groups(in_features, group_size))
    if tiled:
        expected = tiled_group_shape(weight.shape[0], in_features, group_size)
    if tuple(scale.shape) != expected or not scale.is_floating_point():
        raise InvalidArgument(
            f"given scale of {scale.dtype} and shape {tuple(scale.shape)}, expected a float tensor of shape"
            f" {expected} for {in_features} input features in groups of {group_size}"
        )
    if zero_point is not None and (tuple(zero_point.shape) != expected or zero_point.dtype != torch.uint8):
        raise InvalidArgument(
            f"given zero_point of {zero_point.dtype} and shape {tuple(zero_point.shape)},"
            f" expected torch.uint8 of shape {expected}"
        )
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor is not None and tensor.device != weight.device:
            raise InvalidArgument(
                f"given {name} on {tensor.device} and weight on {weight.device}, expected one device"
            )


def make_weight(
    shape: Shape, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random packed weight, scale and zero point of a sample's shape.

    `shape["values"]` chooses the scales: "normal" makes weights of standard deviation about one, "subnormal"
    and "huge" use the ends of float16, "zero" has groups whose scale is 0, and "ends" puts zero points at 0
    and the largest code.
    """
    rows, columns, bits = shape["out_features"], shape["in_features"], shape["bits"]
    groups = num_groups(columns, shape["group_size"])
    values = shape.get("values", "normal")
    words = packed_width(columns, bits)
    weight = torch.randint(
        -(2**31), 2**31, (rows, words), generator=generator, device=device, dtype=torch.int64
    )
    weight = weight.to(torch.int32)
    spare = words * 32 - columns * bits
    if spare and words:  # as pack_bits leaves them
        weight[:, -1] &= (1 << (32 - spare)) - 1
    scale = torch.rand(rows, groups, generator=generator, device=device) + 0.5
    if values == "subnormal":
        scale = scale * 3e-7
    elif values == "huge":
        scale = scale * 4e4
    else:
        scale = scale * 3.5 / (1 << bits)
    if values == "zero":
        scale = scale * (torch.rand(rows, groups, generator=generator, device=device) > 0.5)
    scale = scale.to(getattr(torch, shape.get("scale_dtype", "float16")))
    if shape.get("symmetric", False):
        # A row of one weight that is 0 has a result of 0, of which no relative error is small.
        code, middle = weight[:, :1] & ((1 << bits) - 1), 1 << (bits - 1)
        weight[:, :1] ^= (code == middle).to(torch.int32)
        return weight, scale, None
    largest = (1 << bits) - 1
    zero_point = torch.randint(0, largest + 1, (rows, groups), generator=generator, device=device)
    if values == "ends":
        zero_point = (zero_point > largest // 2) * largest
    return weight, scale, zero_point.to(torch.uint8)


def weight_bytes(shape: Shape) -> float:
    """Bytes of the packed weight, its scales and zero points."""
    rows, columns = shape["out_features"], shape["in_features"]
    groups = num_groups(columns, shape["group_size"])
    scale_bytes = getattr(torch, shape.get("scale_dtype", "float16")).itemsize
    zero_bytes = 0 if shape.get("symmetric", False) else 1
    return rows * (4 * packed_width(columns, shape["bits"]) + groups * (scale_bytes + zero_bytes))


def cost(shape: Shape) -> Cost:
    elements = shape["out_features"] * shape["in_features"]
    return Cost(
        {"fp32": 2.0 * elements}, weight_bytes(shape), elements * getattr(torch, shape["dtype"]).itemsize
    )


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    weight, scale, zero_point = make_weight(shape, device, generator)
    options = (
        shape["in_features"],
        shape["bits"],
        shape["group_size"],
        "packed",
        getattr(torch, shape["dtype"]),
    )
    return weight, scale, zero_point, *options


def _sample(
    kind: str,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    dtype: str,
    *,
    large: bool = False,
    **more: Any,
) -> Sample:
    shape = {
        "out_features": rows,
        "in_features": columns,
        "bits": bits,
        "group_size": group_size,
        "dtype": dtype,
    }
    marks = "".join(f"-{value}" if key == "values" else f"-{key}" for key, value in more.items() if value)
    benchmark = kind == "typical"
    name = f"{rows}x{columns}-w{bits}-g{group_size}-{dtype}{marks}"
    return Sample(name, {**shape, **more}, kind, benchmark=benchmark, large=large)  # type: ignore[arg-type]


def samples() -> list[Sample]:
    found = [
        _sample("typical", 512, 1024, 4, 128, "bfloat16"),
        _sample("typical", 4096, 4096, 4, 128, "bfloat16", large=True),
        _sample("typical", 14336, 4096, 4, 128, "float16", large=True),
        _sample("tiny", 1, 1, 4, 32, "float32"),
        _sample("tiny", 2, 32, 3, 32, "float32"),
        _sample("extreme", 24, 192, 4, 64, "float32", values="subnormal"),
        _sample("extreme", 24, 192, 4, 64, "float32", values="huge"),
        _sample("extreme", 24, 192, 8, 64, "float16", values="ends"),
        _sample("extreme", 24, 192, 4, 64, "float16", values="zero", symmetric=True),
    ]
    for bits in range(1, 9):
        found.append(_sample("ragged", 37, 1000, bits, 64, "float32", symmetric=bits % 2 == 0))
        found.append(_sample("ragged", 13, 333, bits, -1 if bits > 4 else 24, "float16"))
    found.append(_sample("ragged", 11, 300, 4, 7, "bfloat16"))
    found.append(_sample("ragged", 70, 257, 3, 128, "float32", scale_dtype="bfloat16"))
    return found


def _fake(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    return weight.new_empty((weight.shape[0], in_features), dtype=dtype)


def _supports(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    layout: str,
    dtype: torch.dtype,
) -> bool:
    return layout == "packed" and in_features > 0 and dtype in DTYPES and scale.dtype in DTYPES


def _triton_supports(*arguments: Any) -> bool:
    # Triton's interpreter truncates where bf16 should be rounded.
    return _supports(*arguments) and not (interpreting() and arguments[-1] == torch.bfloat16)


operator = Operator(
    "dequantize_wna16",
    schema=SCHEMA,
    reference=reference.dequantize_wna16,
    fake=_fake,
    cost=cost,
    inputs=_inputs,
    samples=samples(),
)
# The kernels share their decoding with the layer's, and lie beside them.
operator.implementation(
    "cpu",
    devices=("cpu",),
    entry="tensormill.ops.linear_wna16.cpu:dequantize",
    supports=_supports,
    missing=native_missing("tensormill.ops.linear_wna16._cpu"),
)
operator.implementation(
    "triton",
    devices=("cuda",),
    entry="tensormill.ops.linear_wna16.triton:dequantize",
    supports=_triton_supports,
    missing=triton_missing,
)


def dequantize_wna16(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    in_features: int,
    bits: int,
    group_size: int,
    layout: str = "packed",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight matrix of `linear_wna16`; it has no gradient.

    Args:
        weight: (N, ceil(K * bits / 32)) int32, codes packed densely along K (`bit_packing.pack_bits`).
        scale: (N, G) float, G = ceil(K / group_size).
        zero_point: (N, G) uint8, or None for `2 ** (bits - 1)` everywhere.
        in_features: K.
        bits: width of a code, 1 to 8.
        group_size: columns that share a scale, -1 for the whole row; the last group may be shorter.
        layout: "packed", or "tiled" for what `linear_wna16.tiles.tile_weight` makes of these.
        dtype: of the result; the product is computed in float32.

    Returns:
        (N, K) of `dtype`.

    Raises:
        InvalidArgument: shapes, dtypes or devices do not fit together.

    >>> dequantize_wna16(torch.tensor([[0x4321]], dtype=torch.int32), torch.ones(1, 1), in_features=4, bits=4,
    ...                  group_size=-1)
    tensor([[-7., -6., -5., -4.]])
    """
    check_weight(weight, scale, zero_point, in_features, bits, group_size, layout)
    return operator(weight, scale, zero_point, in_features, bits, group_size, layout, dtype)

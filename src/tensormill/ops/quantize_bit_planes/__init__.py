"""Quantizes rows of floats to integers of 1 to 8 bits with one scale per row, or per group of columns, and packs their
bit planes: `x[m, k] = scale[m, g] * integer[m, k]` approximately, in one pass over x.

With b bits and the largest magnitude a in the group, the scale is `a / (2^(b-1) - 1)` for "signed", `a / 2^b` for
"bipolar" (mid-rise: odd multiples of the scale, no error above it; the mean magnitude at 1 bit, where the integers are
signs), and `max(x) / (2^b - 1)` for "unsigned" (negative values become 0). Bipolar quantization: arXiv 2409.17870.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, triton_missing
from tensormill.ops.bit_planes import (
    BitPlanes,
    Format,
    check_format,
    check_group_size,
    group_count,
    words_of_row,
)
from tensormill.ops.quantize_bit_planes import reference
from tensormill.roofline import Cost

SCHEMA = "(Tensor x, int bits, str format, int group_size) -> (Tensor, Tensor, Tensor)"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Shape = Mapping[str, Any]


def cost(shape: Shape) -> Cost:
    rows, length, bits = shape["rows"], shape["length"], shape["bits"]
    groups = group_count(length, shape["group_size"])
    written = rows * (4 * words_of_row(length) * bits + 8 * groups)
    # magnitude, comparison, product, rounding, two bounds, and a shift, a mask and an addition for every bit
    operations = rows * length * (6.0 + 3 * bits)
    return Cost({"fp32": operations}, rows * length * getattr(torch, shape["dtype"]).itemsize, written)


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    x = torch.randn(shape["rows"], shape["length"], generator=generator, device=device)
    values = shape.get("values")
    if values == "zero":
        x = x * 0
    elif values is not None:
        x = x * float(values)
    if shape.get("strided", False):
        x = torch.stack([x, -x], dim=-1)[..., 0]
    return x.to(getattr(torch, shape["dtype"])), shape["bits"], shape["format"], shape["group_size"]


def _sample(
    kind: str,
    rows: int,
    length: int,
    bits: int,
    format: str,
    dtype: str,
    group_size: int = -1,
    *,
    large: bool = False,
    benchmark: bool = False,
    **more: Any,
) -> Sample:
    shape = {
        "rows": rows,
        "length": length,
        "bits": bits,
        "format": format,
        "dtype": dtype,
        "group_size": group_size,
    }
    marks = "".join(f"-{key}" if value is True else f"-{value}" for key, value in more.items())
    name = f"{rows}x{length}-{format}{bits}-g{group_size}-{dtype}{marks}"
    return Sample(name, {**shape, **more}, kind, benchmark=benchmark, large=large)  # type: ignore[arg-type]


def samples() -> list[Sample]:
    found = [
        _sample("typical", 64, 4096, 2, "bipolar", "bfloat16", benchmark=True),
        _sample("typical", 3, 1024, 4, "signed", "float16", 128),
        _sample("typical", 3, 1024, 8, "signed", "float32", 256),
        _sample("typical", 5, 2048, 3, "unsigned", "float16"),
        _sample("tiny", 0, 256, 2, "bipolar", "float32"),
        _sample("tiny", 1, 1, 4, "signed", "float32"),
        _sample("tiny", 2, 5, 1, "bipolar", "float16"),
        _sample("extreme", 3, 300, 4, "signed", "float32", values="1e30"),
        _sample("extreme", 3, 300, 4, "bipolar", "float32", values="1e-36"),
        _sample("extreme", 3, 300, 2, "signed", "float32", values="1e-42"),
        _sample("extreme", 3, 300, 2, "bipolar", "float16", values="zero"),
        _sample("extreme", 3, 300, 5, "unsigned", "float16", values="zero"),
        _sample("ragged", 7, 1000, 4, "signed", "float16", 128),
        _sample("ragged", 7, 333, 1, "bipolar", "float16", 128),
        _sample("ragged", 7, 333, 6, "unsigned", "float32", 256, strided=True),
        _sample("ragged", 3, 5000, 2, "bipolar", "float32", 384),
        _sample("ragged", 1, 17000, 1, "bipolar", "float32"),
        _sample("ragged", 1, 17000, 4, "signed", "float16"),
    ]
    for bits in range(1, 9):
        format = (
            ("bipolar", "unsigned")[bits % 2] if bits == 1 else ("bipolar", "signed", "unsigned")[bits % 3]
        )
        found.append(_sample("ragged", 2, 259, bits, format, "float16"))
    for bits, format in ((1, "bipolar"), (2, "bipolar"), (4, "signed"), (8, "signed")):
        for rows in (16, 4096):
            found.append(_sample("typical", rows, 8192, bits, format, "bfloat16", large=True, benchmark=True))
    return found


def _fake(x: Tensor, bits: int, format: str, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, length = x.shape
    groups = group_count(length, group_size)
    return (
        x.new_empty((bits, rows, words_of_row(length)), dtype=torch.int32),
        x.new_empty((rows, groups), dtype=torch.int32),
        x.new_empty((rows, groups), dtype=torch.float32),
    )


operator = Operator(
    "quantize_bit_planes",
    schema=SCHEMA,
    reference=reference.quantize_bit_planes,
    fake=_fake,
    cost=cost,
    inputs=_inputs,
    samples=samples(),
    reduction=lambda shape: shape["length"],
)
operator.implementation(
    "triton",
    devices=("cuda",),
    entry="tensormill.ops.quantize_bit_planes.triton:quantize_bit_planes",
    supports=lambda x, bits, format, group_size: x.dtype in DTYPES,
    missing=triton_missing,
)


def quantize_bit_planes(
    x: Tensor, bits: int, format: Format = "bipolar", *, group_size: int = -1
) -> BitPlanes:
    """Quantizes each row of x and packs the bit planes.

    Codes are computed in float32 and are the same on every device.

    Args:
        x: (..., K) finite float16, bfloat16 or float32; leading dimensions become rows.
        bits: 1 to 8; 1 bit is not for "signed", whose two values would be -1 and 0.
        format: "bipolar", "signed" or "unsigned"; see `tensormill.ops.bit_planes`.
        group_size: columns that share a scale, a multiple of 128, or -1 for the whole row.

    Returns:
        Planes, sums and float32 scales of (rows, K). A row or group of zeros (or of magnitudes whose scale would be
        below 2^-126) has scale 0.

    Raises:
        InvalidArgument: wrong dtype, format, bits or group size.

    >>> q = quantize_bit_planes(torch.tensor([[0.5, -1.0, 2.0]]), 2)
    >>> q.integers().tolist(), q.scale.tolist()
    ([[1, -1, 3]], [[0.5]])
    """
    check_format(format, bits)
    check_group_size(group_size)
    if format == "signed" and bits == 1:
        raise InvalidArgument("given 1 bit for format 'signed', expected 2 to 8; use 'bipolar' for signs")
    if x.dim() == 0 or not x.is_floating_point() or x.shape[-1] == 0:
        raise InvalidArgument(
            f"given x of {x.dtype} and shape {tuple(x.shape)}, expected floats (..., K), K > 0"
        )
    length = x.shape[-1]
    planes, sums, scale = operator(x.reshape(-1, length), bits, format, group_size)
    return BitPlanes(planes, sums, scale, length, format, group_size)

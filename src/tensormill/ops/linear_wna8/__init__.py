"""Linear layer with low-bit weights and 8-bit activations: `y = (x * x_scale) W^T + bias`, where x are int8 or fp8
codes and `W[n, k] = (code[n, k] - zero_point[n, g]) * weight_scale[n, g]`, `g = k // group_size`.

Weights keep their 1 to 8 bits in memory, products run on 8-bit matrix units, sums of integers are exact: few bytes
with few tokens, twice the rate of 16-bit layers with many (FlexQ, arXiv 2508.04405; COMET, arXiv 2410.12168).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tensormill.cuda import cuda_missing
from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, interpreting, native_missing, triton_missing
from tensormill.ops.dequantize_wna16 import check_weight, make_weight, num_groups, weight_bytes
from tensormill.ops.linear_wna8 import peers, reference
from tensormill.ops.linear_wna16 import autocast
from tensormill.ops.quantize_activations import check_quantization
from tensormill.ops.quantize_activations.reference import quantize_activations
from tensormill.roofline import Cost

SCHEMA = (
    "(Tensor x, Tensor? x_scale, Tensor weight, Tensor weight_scale, Tensor? zero_point, Tensor? bias,"
    " int out_features, int bits, int group_size, int x_group_size, ScalarType x_dtype, ScalarType dtype,"
    " str layout) -> Tensor"
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Shape = Mapping[str, Any]


def cost(shape: Shape) -> Cost:
    tokens, rows, columns = shape["tokens"], shape["out_features"], shape["in_features"]
    dtype = getattr(torch, shape["dtype"])
    unit = "int8" if shape["x_dtype"] == "int8" else "fp8"
    if shape.get("quantized", False):
        x_bytes = columns + 4 * num_groups(columns, shape["x_group_size"])
    else:
        x_bytes = columns * dtype.itemsize
    bias_bytes = rows * dtype.itemsize if shape.get("bias", False) else 0
    return Cost(
        {unit: 2.0 * tokens * rows * columns},
        tokens * x_bytes + weight_bytes(shape) + bias_bytes,
        tokens * rows * dtype.itemsize,
    )


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    dtype, x_dtype = getattr(torch, shape["dtype"]), getattr(torch, shape["x_dtype"])
    leading = shape.get("leading", (shape["tokens"],))
    x = torch.randn(*leading, shape["in_features"], generator=generator, device=device)
    if shape.get("values") == "huge":
        x = x * 1e-4  # keeps the result finite in float16
    if shape.get("outliers", False):
        x[..., ::37] *= 50
    x, x_scale = x.to(dtype), None
    if shape.get("quantized", False):
        x, x_scale = quantize_activations(x, None, None, None, 0.0, 0.0, 8, shape["x_group_size"], x_dtype)
    if shape.get("strided", False):
        x = torch.stack([x, -x], dim=-1)[..., 0]
    weight, scale, zero_point = make_weight(shape, device, generator)
    bias = None
    if shape.get("bias", False):
        bias = torch.randn(shape["out_features"], generator=generator, device=device).to(dtype)
    sizes = (shape["out_features"], shape["bits"], shape["group_size"], shape["x_group_size"])
    return x, x_scale, weight, scale, zero_point, bias, *sizes, x_dtype, dtype, "packed"


def _sample(
    kind: str,
    tokens: int,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    dtype: str,
    x_dtype: str = "int8",
    x_group_size: int = -1,
    *,
    large: bool = False,
    benchmark: bool = False,
    **more: Any,
) -> Sample:
    shape: dict[str, Any] = {
        "tokens": tokens,
        "out_features": rows,
        "in_features": columns,
        "bits": bits,
        "group_size": group_size,
        "x_group_size": x_group_size,
        "x_dtype": x_dtype,
        "dtype": dtype,
        "symmetric": more.pop("symmetric", True),
    }
    marks = "".join(f"-{value}" if key == "values" else f"-{key}" for key, value in more.items() if value)
    marks += "" if shape["symmetric"] else "-zero_points"
    kind_of_x = "a8" if x_dtype == "int8" else "fp8"
    name = f"m{tokens}-{rows}x{columns}-w{bits}-g{group_size}-{kind_of_x}-g{x_group_size}-{dtype}{marks}"
    return Sample(name, {**shape, **more}, kind, benchmark=benchmark, large=large)  # type: ignore[arg-type]


def samples() -> list[Sample]:
    fp8 = "float8_e4m3fn"
    found = [
        _sample("typical", 1, 4096, 4096, 4, -1, "bfloat16", benchmark=True),
        _sample("typical", 16, 4096, 4096, 4, 128, "bfloat16", benchmark=True),
        _sample("typical", 1, 384, 512, 4, -1, "bfloat16"),
        _sample("typical", 16, 384, 512, 4, 128, "float16", outliers=True),
        _sample("typical", 70, 256, 384, 4, 128, "bfloat16", bias=True, symmetric=False),
        _sample("typical", 6, 256, 384, 6, 128, "float16", leading=(2, 3), strided=True),
        _sample("typical", 17, 256, 640, 6, -1, "bfloat16", x_group_size=128),
        _sample("typical", 9, 256, 640, 4, 128, "float16", x_group_size=128, quantized=True),
        _sample("typical", 150, 264, 500, 8, 128, "bfloat16", x_group_size=128, bias=True),
        _sample("typical", 70, 130, 900, 4, 256, "float16", x_group_size=128),
        _sample("typical", 35, 136, 712, 4, -1, "float16", x_group_size=384, quantized=True),
        _sample("typical", 20, 136, 712, 4, 128, "bfloat16", fp8, 128),
        _sample("typical", 33, 256, 512, 8, -1, "float16", quantized=True, bias=True),
        _sample("typical", 8, 256, 512, 4, 32, "float32", x_group_size=64, quantized=True, symmetric=False),
        _sample("typical", 3, 256, 512, 4, 128, "bfloat16", fp8),
        _sample("typical", 20, 256, 512, 4, -1, "float16", fp8, symmetric=False),
        _sample("typical", 20, 128, 512, 6, 64, "float16", fp8, 128),
        _sample("tiny", 0, 24, 64, 4, 32, "float32", bias=True),
        _sample("tiny", 1, 1, 1, 4, 32, "float32"),
        _sample("tiny", 2, 3, 32, 3, 32, "float16"),
        _sample("tiny", 3, 8, 8, 6, -1, "bfloat16", bias=True),
        _sample("extreme", 2, 24, 192, 4, 64, "float32", values="subnormal", symmetric=False),
        _sample("extreme", 2, 24, 192, 4, 64, "float32", values="huge"),
        _sample("extreme", 5, 24, 192, 8, 64, "bfloat16", values="huge", symmetric=False),
        _sample("extreme", 5, 24, 192, 8, 64, "float16", values="ends", symmetric=False),
        _sample("extreme", 1, 24, 192, 2, 64, "float16", values="ends", symmetric=False),
        _sample("extreme", 3, 24, 192, 4, 64, "float16", values="zero"),
        # group sizes that no fast path takes
        _sample("ragged", 2, 11, 300, 4, 7, "float32"),
        _sample("ragged", 3, 11, 300, 3, 24, "float16", x_group_size=128),
        _sample("ragged", 100, 33, 129, 4, 32, "float16", x_group_size=64),
        _sample("ragged", 2, 6, 20000, 4, 128, "float16", scale_dtype="bfloat16"),
    ]
    for bits in range(1, 9):
        for tokens, dtype in ((1, "float32"), (2, "bfloat16"), (13, "float16")):
            symmetric, bias = bits % 2 == 0, bits % 3 == 0
            group_size = 64 if bits != 8 else -1
            found.append(
                _sample("ragged", tokens, 100, 1000, bits, group_size, dtype, symmetric=symmetric, bias=bias)
            )
    for bits in (4, 6, 8):
        for tokens in (1, 16, 256, 4096):
            for rows, columns in ((14336, 4096), (4096, 14336), (8192, 8192), (57344, 8192)):
                found.append(
                    _sample("typical", tokens, rows, columns, bits, -1, "float16", large=True, benchmark=True)
                )
    return found


def _fake(
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
    return x.new_empty((*x.shape[:-1], out_features), dtype=dtype)


def _triton_supports(
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
) -> bool:
    floats = [weight_scale, *(t for t in (bias, x if x_scale is None else None) if t is not None)]
    groups = (group_size == -1 or group_size % 32 == 0) and (x_group_size == -1 or x_group_size % 32 == 0)
    return (
        (layout == "packed" or "planes" in layout)
        and not (x_dtype != torch.int8 and interpreting())
        and 0 < x.shape[-1] <= 65536
        and groups
        and all(t.dtype in DTYPES for t in floats)
        # Triton's interpreter truncates where bf16 should be rounded.
        and (dtype in DTYPES and not (interpreting() and dtype == torch.bfloat16))
    )


def _cuda_supports(
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
) -> bool:
    columns = x.shape[-1]
    floats = [weight_scale, *(t for t in (bias, x if x_scale is None else None) if t is not None)]
    grouped = [size for size in (group_size, x_group_size) if -1 != size < columns]
    exact = x_dtype == torch.int8 or (x_dtype == torch.float8_e4m3fn and bits <= 5 and zero_point is None)
    return (
        layout in ("tiled", "packed")
        and exact
        and 0 < columns <= 65536
        and (not grouped or (zero_point is None and all(size % 128 == 0 for size in grouped)))
        and dtype in (torch.float16, torch.bfloat16)
        and all(t.dtype in DTYPES for t in floats)
    )


def _hopper_missing() -> str | None:
    reason = cuda_missing()
    if reason is None and torch.cuda.get_device_capability() != (9, 0):
        reason = "the GPU's compute capability is not 9.0"
    return reason


def _cpu_supports(
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
) -> bool:
    floats = [weight_scale, *(t for t in (bias, x if x_scale is None else None) if t is not None)]
    kinds = all(t.dtype in DTYPES for t in floats) and dtype in DTYPES
    return layout == "packed" and x_dtype == torch.int8 and x.shape[-1] > 0 and kinds


def _tables_support(*arguments: Any) -> bool:
    x, bits, group_size, x_group_size = arguments[0], *arguments[7:10]
    words = all(size in (-1, x.shape[-1]) or size % (32 // bits) == 0 for size in (group_size, x_group_size))
    return _cpu_supports(*arguments) and bits <= 2 and words


def _tables_missing() -> str | None:
    if (reason := native_missing("tensormill.ops.linear_wna8._cpu")()) is not None:
        return reason
    from tensormill.ops.linear_wna8.cpu import tables_missing

    return tables_missing()


class _LinearWNA8(Operator):
    """The result's type sets the tolerance, not that of the first tensor, which may be codes."""

    def tolerance(self, dtype: torch.dtype, shape: Shape) -> float:
        return super().tolerance(getattr(torch, shape["dtype"]), shape)


def _cuda_prepare(*arguments: Any) -> tuple[Any, ...]:
    from tensormill.ops.linear_wna8.cuda import prepare

    return prepare(*arguments)


def _triton_prepare(*arguments: Any) -> tuple[Any, ...]:
    from tensormill.ops.linear_wna8.triton import prepare

    return prepare(*arguments)


operator = _LinearWNA8(
    "linear_wna8",
    schema=SCHEMA,
    reference=reference.linear_wna8,
    fake=_fake,
    cost=cost,
    inputs=_inputs,
    samples=samples(),
    reduction=lambda shape: shape["in_features"],
)
operator.implementation(
    "cpu",
    devices=("cpu",),
    entry="tensormill.ops.linear_wna8.cpu:linear",
    supports=_cpu_supports,
    missing=native_missing("tensormill.ops.linear_wna8._cpu"),
)
# Slower than "cpu" at nearly all sizes (docs/operators/linear_wna8.md), so never chosen by itself.
operator.implementation(
    "lut",
    devices=("cpu",),
    entry="tensormill.ops.linear_wna8.cpu:linear_by_tables",
    supports=_tables_support,
    missing=_tables_missing,
)
operator.implementation(
    "cuda",
    devices=("cuda",),
    entry="tensormill.ops.linear_wna8.cuda:linear",
    supports=_cuda_supports,
    missing=_hopper_missing,
    prepare=_cuda_prepare,
)
operator.implementation(
    "triton",
    devices=("cuda",),
    entry="tensormill.ops.linear_wna8.triton:linear",
    supports=_triton_supports,
    missing=triton_missing,
    prepare=_triton_prepare,
)
peers.register(operator)


def linear_wna8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    x_scale: Tensor | None = None,
    x_group_size: int = -1,
    x_dtype: torch.dtype = torch.int8,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`(x * x_scale) W^T + bias` with packed low-bit weights and 8-bit activations; it has no gradient.

    Floats are quantized on the way, to 8 bits with a scale per token (and group of `x_group_size` channels), as
    `quantize_activations` does. What several layers read is better quantized once, and given with its scales.
    Under `torch.autocast`, float x is cast to the autocast dtype, as for `torch.nn.functional.linear`.

    Args:
        x: (..., K) float16, bfloat16 or float32; or codes, int8 or float8_e4m3fn, with `x_scale`.
        weight: (N, ceil(K * bits / 32)) int32, codes packed densely along K (`bit_packing.pack_bits`).
        weight_scale: (N, G) float, G = ceil(K / group_size).
        zero_point: (N, G) uint8, or None for `2 ** (bits - 1)` everywhere.
        bias: (N,) float, or None.
        bits: width of a weight's code, 1 to 8.
        group_size: columns that share a weight scale, -1 for the whole row; the last group may be shorter.
        x_scale: (..., Gx) float32, Gx = ceil(K / x_group_size); None for float x.
        x_group_size: channels of x that share a scale, -1 for all of a token.
        x_dtype: for float x, what it is quantized to: torch.int8 or torch.float8_e4m3fn.
        dtype: of the result; None takes x's for float x, else the weight scale's.

    Returns:
        (..., N) of `dtype`. Sums of integers are exact, scales are applied in float32.

    Raises:
        InvalidArgument: shapes, dtypes or devices do not fit together, or sums might leave 32 bits.

    >>> weight = torch.tensor([[0x4321]], dtype=torch.int32)  # codes 1, 2, 3, 4
    >>> linear_wna8(torch.ones(2, 4), weight, torch.ones(1, 1), bits=4, group_size=-1)
    tensor([[-22.],
            [-22.]])
    """
    if x.dim() == 0:
        raise InvalidArgument("given x without dimensions, expected (..., K)")
    columns, rows = x.shape[-1], weight.shape[0]
    check_weight(weight, weight_scale, zero_point, columns, bits, group_size, "packed")
    if x_scale is None:
        if not x.is_floating_point() or x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise InvalidArgument(
                f"given x of {x.dtype} without x_scale, expected floats, or codes and x_scale"
            )
        x = autocast(x)
        dtype = x.dtype if dtype is None else dtype
    else:
        x_dtype = x.dtype
        dtype = weight_scale.dtype if dtype is None else dtype
    check_quantization(x_dtype, 8, x_group_size)
    if x_scale is not None:
        expected = (*x.shape[:-1], num_groups(columns, x_group_size))
        if tuple(x_scale.shape) != expected or x_scale.dtype != torch.float32:
            raise InvalidArgument(
                f"given x_scale of {x_scale.dtype} and shape {tuple(x_scale.shape)}, expected torch.float32 of"
                f" shape {expected} for {columns} channels in groups of {x_group_size}"
            )
    if bias is not None and (tuple(bias.shape) != (rows,) or not bias.is_floating_point()):
        raise InvalidArgument(
            f"given bias of {bias.dtype} and shape {tuple(bias.shape)}, expected floats ({rows},)"
        )
    check_activations(columns, bits, group_size, x_group_size)
    for name, tensor in (("weight", weight), ("bias", bias), ("x_scale", x_scale)):
        if tensor is not None and tensor.device != x.device:
            raise InvalidArgument(f"given {name} on {tensor.device} and x on {x.device}, expected one device")
    options = (rows, bits, group_size, x_group_size, x_dtype, dtype, "packed")
    return operator(x, x_scale, weight, weight_scale, zero_point, bias, *options)  # type: ignore[no-any-return]


def check_activations(in_features: int, bits: int, group_size: int, x_group_size: int) -> None:
    """Raise `InvalidArgument` if sums of products might leave 32 bits before a scale is applied."""
    segment = min(in_features, reference.segment_size(in_features, group_size, x_group_size))
    if segment << (bits + 7) >= 1 << 31:
        raise InvalidArgument(
            f"given {segment} columns of {bits} bits with one scale, whose sums might leave 32 bits; expected at"
            f" most {(1 << (24 - bits)) - 1}: use groups"
        )

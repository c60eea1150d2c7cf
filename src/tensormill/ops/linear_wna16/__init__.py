"""Linear layer with low-bit weights and 16-bit (or float32) activations: `y = x W^T + bias`, where
`W[n, k] = (code[n, k] - zero_point[n, g]) * scale[n, g]` and `g = k // group_size`.

Codes of 1 to 8 bits stay packed in memory and are decoded in registers. With few tokens a linear layer is
bound by the bytes of its weights, so that this is up to 16 / bits times faster than a 16-bit layer (AWQ,
arXiv 2306.00978, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tensormill.cuda import cuda_missing
from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, native_missing, triton_missing
from tensormill.ops import tiles
from tensormill.ops.dequantize_wna16 import check_weight, make_weight, weight_bytes
from tensormill.ops.linear_wna16 import peers, reference
from tensormill.roofline import Cost

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, int bits, int group_size,"
    " str layout) -> Tensor"
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Shape = Mapping[str, Any]


def cost(shape: Shape) -> Cost:
    tokens, rows, columns = shape["tokens"], shape["out_features"], shape["in_features"]
    dtype = getattr(torch, shape["dtype"])
    unit = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    bias_bytes = rows * dtype.itemsize if shape.get("bias", False) else 0
    return Cost(
        {unit: 2.0 * tokens * rows * columns},
        tokens * columns * dtype.itemsize + weight_bytes(shape) + bias_bytes,
        tokens * rows * dtype.itemsize,
    )


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    dtype = getattr(torch, shape["dtype"])
    leading = shape.get("leading", (shape["tokens"],))
    x = torch.randn(*leading, shape["in_features"], generator=generator, device=device)
    if shape.get("values") == "huge":
        x = x * 1e-4  # keeps the result finite in float16
    if shape.get("strided", False):
        x = torch.stack([x, -x], dim=-1)[..., 0]
    weight, scale, zero_point = make_weight(shape, device, generator)
    bias = None
    if shape.get("bias", False):
        bias = torch.randn(shape["out_features"], generator=generator, device=device).to(dtype)
    return x.to(dtype), weight, scale, zero_point, bias, shape["bits"], shape["group_size"], "packed"


def _sample(
    kind: str,
    tokens: int,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    dtype: str,
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
    }
    shape["dtype"] = dtype
    marks = "".join(f"-{value}" if key == "values" else f"-{key}" for key, value in more.items() if value)
    name = f"m{tokens}-{rows}x{columns}-w{bits}-g{group_size}-{dtype}{marks}"
    return Sample(name, {**shape, **more}, kind, benchmark=benchmark, large=large)  # type: ignore[arg-type]


def samples() -> list[Sample]:
    found = [
        _sample("typical", 1, 4096, 4096, 4, 128, "bfloat16", benchmark=True),
        _sample("typical", 16, 4096, 4096, 4, 128, "bfloat16", benchmark=True),
        _sample("typical", 1, 384, 512, 4, 128, "bfloat16"),
        _sample("typical", 16, 384, 512, 4, 128, "float16", symmetric=True),
        _sample("typical", 70, 256, 384, 4, 128, "bfloat16", bias=True),
        _sample("typical", 6, 256, 384, 4, 128, "float16", leading=(2, 3), strided=True),
        _sample("typical", 2, 256, 640, 4, -1, "float32", symmetric=True, scale_dtype="float32"),
        _sample("tiny", 0, 24, 64, 4, 32, "float32", bias=True),
        # one product, symmetric: with a zero point it may cancel to 0, of which no relative error is small
        _sample("tiny", 1, 1, 1, 4, 32, "float32", symmetric=True),
        _sample("tiny", 2, 3, 32, 3, 32, "float16"),
        _sample("tiny", 3, 8, 8, 6, -1, "bfloat16", bias=True),
        # scales and zero points at the ends of their ranges, with finite results
        _sample("extreme", 2, 24, 192, 4, 64, "float32", values="subnormal"),
        _sample("extreme", 2, 24, 192, 4, 64, "float32", values="huge"),
        _sample("extreme", 5, 24, 192, 8, 64, "bfloat16", values="huge"),
        _sample("extreme", 5, 24, 192, 8, 64, "float16", values="ends"),
        _sample("extreme", 1, 24, 192, 2, 64, "float16", values="ends"),
        _sample("extreme", 3, 24, 192, 4, 64, "float16", values="zero", symmetric=True),
        # group sizes that no vector path takes
        _sample("ragged", 2, 11, 300, 4, 7, "float32"),
        _sample("ragged", 3, 11, 300, 3, 24, "float16"),
        _sample("ragged", 1, 11, 300, 6, 8, "bfloat16"),
        _sample("ragged", 1000, 33, 129, 4, 32, "float16"),
        _sample("ragged", 2, 6, 20000, 4, 128, "float16", scale_dtype="bfloat16"),
    ]
    for bits in range(1, 9):
        for tokens, dtype in ((1, "float32"), (2, "bfloat16"), (13, "float16")):
            symmetric, bias = bits % 2 == 0, bits % 3 == 0
            group_size = 64 if bits != 8 else -1
            found.append(
                _sample("ragged", tokens, 100, 1000, bits, group_size, dtype, symmetric=symmetric, bias=bias)
            )
    for bits in (2, 3, 6, 8):
        for group_size in (32, 128):
            found.append(_sample("typical", 1, 256, 512, bits, group_size, "bfloat16"))
    for tokens in (1, 16, 256):
        for rows, columns in ((14336, 4096), (4096, 14336), (8192, 8192), (57344, 8192)):
            found.append(
                _sample("typical", tokens, rows, columns, 4, 128, "float16", large=True, benchmark=True)
            )
    return found


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, zero_point, bias, ctx.bits, ctx.group_size, ctx.layout = inputs
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight, scale, zero_point)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, zero_point = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        # Overflow of a dequantized float16 weight would be infinite; its product with float32 is not.
        dtype = torch.float32 if gradient.dtype == torch.float16 else gradient.dtype
        dense = torch.ops.tensormill.dequantize_wna16(
            weight, scale, zero_point, ctx.in_features, ctx.bits, ctx.group_size, ctx.layout, dtype
        )
        grad_x = (gradient.to(dtype) @ dense).to(gradient.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        compute = torch.promote_types(gradient.dtype, torch.float32)
        grad_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=compute).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None, None


def _supports(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> bool:
    floats = (x, scale) if bias is None else (x, scale, bias)
    return layout == "packed" and x.shape[-1] > 0 and all(t.dtype in DTYPES for t in floats)


def _cuda_supports(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> bool:
    floats = (scale,) if bias is None else (scale, bias)
    half = x.dtype in (torch.float16, torch.bfloat16)
    return layout == "tiled" and half and x.shape[-1] > 0 and all(t.dtype in DTYPES for t in floats)


def _tiled(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> tuple[Any, ...]:
    """Arguments with the weight in the tiled layout, where it has one."""
    if layout == "packed" and tiles.can_tile(x.shape[-1], group_size):
        weight, scale, zero_point = tiles.tile_weight(
            weight, scale, zero_point, in_features=x.shape[-1], bits=bits, group_size=group_size
        )
        layout = "tiled"
        if weight.is_cuda:
            # Kernels may read weights before the kernel ahead of them has ended.
            torch.cuda.current_stream(weight.device).synchronize()
    return x, weight, scale, zero_point, bias, bits, group_size, layout


operator = Operator(
    "linear_wna16",
    schema=SCHEMA,
    reference=reference.linear_wna16,
    fake=_fake,
    cost=cost,
    inputs=_inputs,
    samples=samples(),
    differentiable=(0, 4),
    setup_context=_setup_context,
    backward=_backward,
    reduction=lambda shape: shape["in_features"],
)
operator.implementation(
    "cpu",
    devices=("cpu",),
    entry="tensormill.ops.linear_wna16.cpu:linear",
    supports=_supports,
    missing=native_missing("tensormill.ops.linear_wna16._cpu"),
)
operator.implementation(
    "cuda",
    devices=("cuda",),
    entry="tensormill.ops.linear_wna16.cuda:linear",
    supports=_cuda_supports,
    missing=cuda_missing,
    prepare=_tiled,
)
operator.implementation(
    "triton",
    devices=("cuda",),
    entry="tensormill.ops.linear_wna16.triton:linear",
    supports=_supports,
    missing=triton_missing,
)
peers.register(operator)


def linear_wna16(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    layout: str = "packed",
) -> Tensor:
    """`x W^T + bias` with packed low-bit weights, accumulated in float32.

    Has gradients for `x` and `bias` only: codes are integers, and scales and zero points are constants.
    Under `torch.autocast`, `x` is cast to the autocast dtype, as for `torch.nn.functional.linear`.

    Args:
        x: (..., K) float16, bfloat16 or float32 (float64 runs on the reference).
        weight: (N, ceil(K * bits / 32)) int32, codes packed densely along K (`bit_packing.pack_bits`).
        scale: (N, G) float, G = ceil(K / group_size).
        zero_point: (N, G) uint8, or None for `2 ** (bits - 1)` everywhere.
        bias: (N,) float, or None.
        bits: width of a code, 1 to 8.
        group_size: columns that share a scale, -1 for the whole row; the last group may be shorter.
        layout: "packed", or "tiled" for what `tiles.tile_weight` makes of weight, scale and zero_point: the order
            that the CUDA kernels want.

    Returns:
        (..., N) in x's dtype.

    Raises:
        InvalidArgument: shapes, dtypes or devices do not fit together.

    >>> weight = torch.tensor([[0x4321]], dtype=torch.int32)  # codes 1, 2, 3, 4
    >>> linear_wna16(torch.ones(2, 4), weight, torch.ones(1, 1), bits=4, group_size=-1)
    tensor([[-22.],
            [-22.]])
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise InvalidArgument(f"given x of {x.dtype} and shape {tuple(x.shape)}, expected floats (..., K)")
    check_weight(weight, scale, zero_point, x.shape[-1], bits, group_size, layout)
    if bias is not None and (tuple(bias.shape) != (weight.shape[0],) or not bias.is_floating_point()):
        raise InvalidArgument(
            f"given bias of {bias.dtype} and shape {tuple(bias.shape)}, expected floats ({weight.shape[0]},)"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise InvalidArgument(f"given {name} on {tensor.device} and x on {x.device}, expected one device")
    return operator(autocast(x), weight, scale, zero_point, bias, bits, group_size, layout)


def autocast(x: Tensor) -> Tensor:
    """x as `torch.nn.functional.linear` would take it under `torch.autocast`; itself outside."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))
    return x

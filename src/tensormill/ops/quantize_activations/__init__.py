"""Dynamic quantization of activations, symmetric, a scale per token and group of channels:
`code = round(x * (limit / largest))`, `scale = largest / limit`, with the group's largest magnitude.

Optionally behind an RMS norm and a permutation of the channels, in the same pass; and with a width for each block
of channels, so that blocks of outliers have 8 bits and all others 4 (COMET, arXiv 2410.12168, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, requires, triton_missing
from tensormill.ops.dequantize_wna16 import num_groups
from tensormill.ops.quantize_activations import reference
from tensormill.roofline import Cost

SCHEMA = (
    "(Tensor x, Tensor? norm_weight, Tensor? permutation, Tensor? block_bits, float eps, float norm_offset,"
    " int bits, int group_size, ScalarType dtype) -> (Tensor, Tensor)"
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
CODES = (torch.int8, torch.float8_e4m3fn)

Shape = Mapping[str, Any]


def cost(shape: Shape) -> Cost:
    tokens, columns = shape["tokens"], shape["channels"]
    size = getattr(torch, shape["dtype"]).itemsize
    extra = columns * (size * shape.get("norm", False) + 4 * shape.get("permuted", False))
    written = tokens * (columns + 4 * num_groups(columns, shape["group_size"]))
    return Cost({"fp32": 4.0 * tokens * columns}, tokens * columns * size + extra, written)


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    columns, dtype = shape["channels"], getattr(torch, shape["dtype"])
    groups = num_groups(columns, shape["group_size"])
    x = torch.randn(shape["tokens"], columns, generator=generator, device=device)
    x = x * shape.get("magnitude", 1.0)
    if shape.get("zeros", False):
        x[::2] = 0
    if shape.get("outliers", False):
        x[:, ::37] *= 50
    if shape.get("strided", False):
        x = torch.stack([x, -x], dim=-1)[..., 0]
    norm_weight = permutation = block_bits = None
    if shape.get("norm", False):
        norm_weight = torch.rand(columns, generator=generator, device=device).to(dtype)
    if shape.get("permuted", False):
        permutation = torch.randperm(columns, generator=generator, device=device).to(torch.int32)
    if shape.get("mixed", False):
        wide = torch.rand(groups, generator=generator, device=device) < 0.2
        block_bits = torch.where(wide, 8, 4).to(torch.uint8)
    options = (1e-6, shape.get("norm_offset", 0.0), shape["bits"], shape["group_size"], torch.int8)
    return x.to(dtype), norm_weight, permutation, block_bits, *options


def _sample(
    kind: str,
    tokens: int,
    channels: int,
    dtype: str,
    group_size: int = -1,
    bits: int = 8,
    *,
    large: bool = False,
    benchmark: bool = False,
    **more: Any,
) -> Sample:
    shape = {
        "tokens": tokens,
        "channels": channels,
        "bits": bits,
        "group_size": group_size,
        "dtype": dtype,
    }
    marks = "".join(f"-{key}" if value is True else f"-{key}{value}" for key, value in more.items())
    name = f"m{tokens}-{channels}-a{bits}-g{group_size}-{dtype}{marks}"
    return Sample(name, {**shape, **more}, kind, benchmark=benchmark, large=large)  # type: ignore[arg-type]


def samples() -> list[Sample]:
    found = [
        _sample("typical", 16, 4096, "bfloat16", benchmark=True),
        _sample("typical", 5, 1024, "bfloat16", 128, outliers=True),
        _sample("typical", 3, 1024, "float16", norm=True),
        _sample("typical", 3, 768, "bfloat16", 128, norm=True, norm_offset=1.0, permuted=True),
        _sample("typical", 6, 1280, "float16", 128, permuted=True, mixed=True, outliers=True),
        _sample("typical", 4, 512, "float32", 64, 4),
        _sample("typical", 4, 512, "float32", 32, 6, strided=True),
        _sample("ragged", 13, 1000, "float16", 128),
        _sample("ragged", 7, 333, "float32", -1, permuted=True),
        _sample("ragged", 257, 100, "bfloat16", 64),
        _sample("ragged", 3, 1013, "float32", 32, norm=True),
        _sample("ragged", 5, 300, "float16", 7),
        _sample("tiny", 0, 64, "float16"),
        _sample("tiny", 1, 1, "float32"),
        _sample("tiny", 2, 3, "bfloat16", 128, 2),
        _sample("extreme", 4, 256, "float16", 128, magnitude=3e4),
        _sample("extreme", 4, 256, "float32", 64, magnitude=5e37),
        _sample("extreme", 4, 256, "float32", magnitude=1e-38),
        _sample("extreme", 4, 256, "float16", magnitude=1e-6),
        _sample("extreme", 4, 256, "bfloat16", 32, zeros=True),
        _sample("extreme", 4, 256, "float32", zeros=True, norm=True),
    ]
    for tokens in (1, 1024, 8192):
        found.append(_sample("typical", tokens, 8192, "float16", large=True, benchmark=True))
    found.append(_sample("typical", 8192, 8192, "float16", 128, large=True, benchmark=True))
    found.append(_sample("typical", 8192, 8192, "float16", norm=True, large=True, benchmark=True))
    return found


def _fake(
    x: Tensor,
    norm_weight: Tensor | None,
    permutation: Tensor | None,
    block_bits: Tensor | None,
    eps: float,
    norm_offset: float,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    groups = num_groups(x.shape[-1], group_size)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)


def _compiled(*arguments: Any) -> Callable[[], Any]:
    compiled = torch.compile(reference.quantize_activations, dynamic=False)
    compiled(*arguments)
    return lambda: compiled(*arguments)


def _triton_supports(x: Tensor, *arguments: Any) -> bool:
    return x.dtype in FLOATS and 0 < x.shape[-1] <= 65536


operator = Operator(
    "quantize_activations",
    schema=SCHEMA,
    reference=reference.quantize_activations,
    fake=_fake,
    cost=cost,
    inputs=_inputs,
    samples=samples(),
)
operator.implementation(
    "triton",
    devices=("cuda",),
    entry="tensormill.ops.quantize_activations.triton:quantize",
    supports=_triton_supports,
    missing=triton_missing,
)
operator.peer(
    "torch.compile of the reference",
    devices=("cuda",),
    make=_compiled,
    missing=requires("triton"),
    tolerance=float("inf"),  # its products and sums are fused, which moves some codes by one
)


def quantize_activations(
    x: Tensor,
    *,
    dtype: torch.dtype = torch.int8,
    bits: int = 8,
    group_size: int = -1,
    block_bits: Tensor | None = None,
    permutation: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_offset: float = 0.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Codes and float32 scales with `x ~ code * scale`, one scale per token and group; it has no gradient.

    A group whose values are all zero has codes 0 and a tiny scale; one with an infinity or NaN has codes 0 and the
    scale NaN, so that the error shows in whatever is computed from it.

    Args:
        x: (..., K) float.
        dtype: of the codes: torch.int8, or torch.float8_e4m3fn.
        bits: width of a code, 2 to 8: from `-(2 ** (bits - 1) - 1)` to its negative, in int8 whatever the width.
            8 for float8_e4m3fn.
        group_size: channels that share a scale, -1 for all of a token; the last group may be shorter.
        block_bits: (G,) uint8, a width by group instead of `bits`, each 2 to 8. Values are not checked.
        permutation: (K,) int32 or int64: channel k of the codes is channel `permutation[k]` of x. Values are not
            checked.
        norm_weight: (K,) float: quantizes `x / sqrt(mean(x^2) + eps) * (norm_weight + norm_offset)`, not rounded in
            between; in the order of x.
        norm_offset: 1.0 for Gemma's norms, which store the weight less one.
        eps: of the norm.

    Returns:
        codes (..., K) of `dtype`, and scales (..., G) float32, G = ceil(K / group_size).

    Raises:
        InvalidArgument: a shape, dtype, width or device does not fit.

    >>> codes, scale = quantize_activations(torch.tensor([[-1.0, 0.5, 0.1, 2.54]]))
    >>> codes, round(scale.item(), 4)
    (tensor([[-50,  25,   5, 127]], dtype=torch.int8), 0.02)
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise InvalidArgument(f"given x of {x.dtype} and shape {tuple(x.shape)}, expected floats (..., K)")
    columns = x.shape[-1]
    check_quantization(dtype, bits, group_size)
    groups = num_groups(columns, group_size)
    if block_bits is not None:
        if tuple(block_bits.shape) != (groups,) or block_bits.dtype != torch.uint8:
            raise InvalidArgument(
                f"given block_bits of {block_bits.dtype} and shape {tuple(block_bits.shape)}, expected"
                f" torch.uint8 of shape ({groups},) for {columns} channels in groups of {group_size}"
            )
        if dtype != torch.int8:
            raise InvalidArgument(f"given block_bits and dtype={dtype}, expected torch.int8")
    if permutation is not None and (
        tuple(permutation.shape) != (columns,) or permutation.dtype not in (torch.int32, torch.int64)
    ):
        raise InvalidArgument(
            f"given permutation of {permutation.dtype} and shape {tuple(permutation.shape)}, expected int32 or"
            f" int64 of shape ({columns},)"
        )
    if norm_weight is not None and (
        tuple(norm_weight.shape) != (columns,) or not norm_weight.is_floating_point()
    ):
        raise InvalidArgument(
            f"given norm_weight of {norm_weight.dtype} and shape {tuple(norm_weight.shape)}, expected floats"
            f" ({columns},)"
        )
    given = {"norm_weight": norm_weight, "permutation": permutation, "block_bits": block_bits}
    for name, tensor in given.items():
        if tensor is not None and tensor.device != x.device:
            raise InvalidArgument(f"given {name} on {tensor.device} and x on {x.device}, expected one device")
    options = (float(eps), float(norm_offset), bits, group_size, dtype)
    return operator(x, norm_weight, permutation, block_bits, *options)  # type: ignore[no-any-return]


def check_quantization(dtype: torch.dtype, bits: int, group_size: int) -> None:
    """Raise `InvalidArgument` unless activations can be quantized so."""
    if dtype not in CODES:
        raise InvalidArgument(f"given codes of {dtype}, expected torch.int8 or torch.float8_e4m3fn")
    if not 2 <= bits <= 8 or (bits < 8 and dtype != torch.int8):
        expected = "an integer from 2 to 8" if dtype == torch.int8 else "8 for float8_e4m3fn"
        raise InvalidArgument(f"given activations of bits={bits}, expected {expected}")
    if group_size != -1 and group_size < 1:
        raise InvalidArgument(
            f"given activations in groups of {group_size}, expected a positive integer, or -1 for one group a token"
        )

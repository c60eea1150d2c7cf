"""Attention of a few new tokens over a long cache: `softmax(scale * q k^T) v`, cache contiguous or paged, in 16 bits
or quantized.

A decoding step reads every cached key and value once and computes little with them, so that it is bound by the
bytes of the cache. Heads that share keys and values (GQA, MQA, and the absorbed form of MLA, where values are a part
of the keys) are computed together. The cache's tokens are split over programs and the partial results merged by
their log-sum-exp (Dao, Haziza, Massa and Sizov, Flash-Decoding, 2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tensormill.cuda import cuda_missing
from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, triton_missing
from tensormill.ops.decode_attention import peers, reference
from tensormill.ops.decode_attention.cache import KVCache
from tensormill.ops.decode_attention.merge import merge_attention
from tensormill.ops.decode_attention.storage import (
    BFP12,
    BFP16,
    INT4,
    INT8,
    KVFormat,
    bits_of,
    dequantize_kv,
    quantize_kv,
)
from tensormill.roofline import Cost

__all__ = [
    "BFP12",
    "BFP16",
    "INT4",
    "INT8",
    "KVCache",
    "KVFormat",
    "decode_attention",
    "dequantize_kv",
    "merge_attention",
    "quantize_kv",
]

SCHEMA = (
    "(Tensor query, Tensor key, Tensor? value, Tensor? key_scale, Tensor? key_offset, Tensor? value_scale,"
    " Tensor? value_offset, Tensor lengths, Tensor? block_table, Tensor? sinks, float scale, int value_dim,"
    " int window, float softcap) -> (Tensor, Tensor)"
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Shape = Mapping[str, Any]


def _format(name: str) -> KVFormat | None:
    """ "float", "int8", "int4" or "bfp12" or "bfp16", with "-" and the group size, and "-symmetric"."""
    kind, *more = name.split("-")
    if kind == "float":
        return None
    symmetric = "symmetric" in more
    group_size = next((int(part) for part in more if part.isdigit()), -1)
    if kind.startswith("bfp"):
        return KVFormat(int(kind[3:]) - 8, group_size, symmetric=True, exponents=True)
    return KVFormat(int(kind[3:]), group_size, symmetric=symmetric)


def _element_bits(name: str, head_dim: int, dtype: torch.dtype) -> float:
    """Bits of a stored element, its share of scales included."""
    storage = _format(name)
    if storage is None:
        return dtype.itemsize * 8
    groups = storage.groups(head_dim)
    return storage.bits + groups * (8 if storage.exponents else 16 if storage.symmetric else 32) / head_dim


def _lengths(shape: Shape) -> list[int]:
    """The sequences' lengths: all alike, or from 0 and 1 to the whole context."""
    context, batch = shape["context"], shape["batch"]
    if not shape["ragged"]:
        return [context] * batch
    return [round(context * i / max(batch - 1, 1)) if i != 1 else 1 for i in range(batch)]


def cost(shape: Shape) -> Cost:
    """Every visible key and value once; two products per new token and visible token."""
    dtype = getattr(torch, shape["dtype"])
    tokens = sum(_lengths(shape))
    if shape["window"]:
        tokens = sum(min(n, shape["window"] + shape["queries"] - 1) for n in _lengths(shape))
    heads, head_dim, value_dim = shape["heads"], shape["head_dim"], shape["value_dim"] or shape["head_dim"]
    bits = _element_bits(shape["storage"], head_dim, dtype) * head_dim
    if not shape["shared"]:
        bits += _element_bits(shape["storage"], value_dim, dtype) * value_dim
    unit = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}[
        dtype
    ]
    rows = shape["batch"] * heads * shape["queries"]
    return Cost(
        {unit: 2.0 * tokens * heads * shape["queries"] * (head_dim + value_dim)},
        tokens * shape["kv_heads"] * bits / 8 + rows * head_dim * dtype.itemsize,
        rows * (value_dim * dtype.itemsize + 4),
    )


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    dtype = getattr(torch, shape["dtype"])
    batch, kv_heads, head_dim = shape["batch"], shape["kv_heads"], shape["head_dim"]
    value_dim = shape["value_dim"] or head_dim
    page_size = shape["page_size"]
    capacity = shape["context"]
    if not page_size and capacity < 4096:
        capacity += 3  # large ones are as a user would have them
    lengths = torch.tensor(_lengths(shape), dtype=torch.int32, device=device)
    block_table = None
    count = batch
    if page_size:
        each = max(1, math.ceil(capacity / page_size))
        count, capacity = batch * each + 2, page_size
        order = torch.randperm(count, generator=generator, device=device)[: batch * each]
        block_table = order.to(torch.int32).view(batch, each)
        used = torch.arange(each, device=device) * page_size < lengths[:, None]
        block_table = torch.where(used, block_table, 1 << 30)  # nothing may follow it
    magnitude = float(shape["values"]) if shape["values"] not in ("normal", "tokens_first") else 1.0

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    def stored(width: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        size = (count, kv_heads, capacity, width)
        storage = _format(shape["storage"])
        if storage is None:
            x = (normal(*size) * magnitude).to(dtype)
            if shape["values"] == "tokens_first":  # (pages, page_size, heads, channels) in memory
                x = x.transpose(1, 2).contiguous().transpose(1, 2)
            return x, None, None
        scale_dtype = torch.float32 if dtype in (torch.float32, torch.float64) else dtype
        parts = [
            quantize_kv(page.to(dtype), storage, scale_dtype)  # by page, so that float32 exists of one only
            for page in (normal(*size[1:]) * magnitude for _ in range(count))
        ]
        codes, scale, offset = zip(*parts, strict=True)
        return (
            torch.stack(codes),
            torch.stack(scale),
            None if offset[0] is None else torch.stack(offset),  # type: ignore[arg-type]
        )

    key, key_scale, key_offset = stored(head_dim)
    value, value_scale, value_offset = (None, None, None) if shape["shared"] else stored(value_dim)
    query = normal(batch, shape["heads"], shape["queries"], head_dim)
    if magnitude > 1:
        query = _query_of_one_token(key, key_scale, key_offset, lengths, shape, generator) / magnitude
    query = query.to(dtype)
    sinks = normal(shape["heads"]).to(dtype) if shape["sinks"] else None
    scale = head_dim**-0.5
    return (
        query,
        key,
        value,
        key_scale,
        key_offset,
        value_scale,
        value_offset,
        lengths,
        block_table,
        sinks,
        scale,
        value_dim,
        shape["window"],
        shape["softcap"],
    )


def _query_of_one_token(
    key: Tensor,
    key_scale: Tensor | None,
    key_offset: Tensor | None,
    lengths: Tensor,
    shape: Shape,
    generator: torch.Generator,
) -> Tensor:
    """Queries equal to the key of some token, (batch, heads, queries, head_dim), for caches without pages.

    That token takes all weight by far. Were large logits random, two would tie now and then, and rounding decide.
    """
    dense = reference.dense(key, key_scale, key_offset, torch.float32)
    size = (shape["batch"], shape["heads"], shape["queries"])
    token = torch.randint(1 << 30, size, generator=generator, device=key.device)
    token = token % lengths.clamp_min(1).view(-1, 1, 1)
    heads = dense.repeat_interleave(shape["heads"] // shape["kv_heads"], dim=1)
    return heads.take_along_dim(token[..., None], dim=2)


DEFAULTS: Shape = {
    "batch": 8,
    "context": 8192,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "value_dim": 0,
    "queries": 1,
    "dtype": "bfloat16",
    "storage": "float",
    "page_size": 0,
    "shared": False,
    "ragged": False,
    "window": 0,
    "softcap": 0.0,
    "sinks": False,
    "values": "normal",
}
MLA: dict[str, Any] = {"heads": 128, "kv_heads": 1, "head_dim": 576, "value_dim": 512, "shared": True}


def _sample(kind: str, *, large: bool = False, benchmark: bool = False, **given: Any) -> Sample:
    shape = {**DEFAULTS, **given}
    name = "-".join(f"{k}={v}" for k, v in given.items())
    return Sample(name, shape, kind, benchmark=benchmark, large=large)  # type: ignore[arg-type]


def samples() -> list[Sample]:
    small: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 64}
    ragged: dict[str, Any] = {**small, "ragged": True, "batch": 3}
    found = [
        _sample("typical", batch=1, context=130, heads=4, kv_heads=1, head_dim=128, dtype="float16"),
        _sample("typical", batch=2, context=130, heads=8, kv_heads=2, head_dim=128, dtype="bfloat16"),
        _sample(
            "typical", batch=1, context=100, heads=4, kv_heads=4, head_dim=64, dtype="float16", page_size=16
        ),
        _sample("typical", **MLA, batch=2, context=300, page_size=64, large=True),
        _sample(
            "typical",
            **{**MLA, "heads": 20, "head_dim": 80, "value_dim": 64},
            batch=1,
            context=90,
            dtype="float16",
        ),
        _sample("tiny", **small, batch=1, context=1, dtype="float32"),
        _sample("tiny", **small, batch=2, context=0, dtype="float32"),
        _sample("tiny", **small, batch=0, context=9, dtype="float16"),
        _sample("ragged", **ragged, context=200, dtype="float32", page_size=64),
        _sample("ragged", **ragged, context=150, dtype="float64", page_size=8),
        _sample("ragged", **ragged, context=70, dtype="float32", queries=3, sinks=True),
        _sample("ragged", **ragged, context=150, dtype="float32", queries=2, page_size=24, window=40),
        _sample("ragged", **ragged, context=150, dtype="float16", softcap=5.0, values="tokens_first"),
        # every logit about as large as float16 gets; one token takes all
        _sample("extreme", **ragged, context=70, dtype="float16", values="1e4"),
        _sample("extreme", **ragged, context=70, dtype="float32", values="1e30"),
        _sample("extreme", **ragged, context=70, dtype="bfloat16", values="1e30", storage="bfp12-32"),
        _sample("extreme", **ragged, context=70, dtype="float16", values="3e-5", storage="int8"),
        _sample("extreme", **ragged, context=70, dtype="float16", values="1e4", storage="int4"),
        _sample("extreme", **ragged, context=70, dtype="float32", values="0", storage="int8-symmetric"),
    ]
    single: dict[str, Any] = {**ragged, "heads": 2, "kv_heads": 1, "context": 90}
    for head_dim in (80, 96, 192, 256):
        found.append(_sample("ragged", **{**single, "head_dim": head_dim, "context": 70}, dtype="float16"))
    for storage in ("int8", "int8-32", "int4-symmetric", "int4-32", "bfp12-32", "bfp16-32"):
        found.append(_sample("ragged", **single, dtype="float16", storage=storage, page_size=16))
    for storage in ("int8-symmetric", "int4", "int4-16-symmetric", "bfp12-16"):
        found.append(_sample("ragged", **single, dtype="float32", storage=storage, queries=2))
        found.append(_sample("ragged", **single, dtype="bfloat16", storage=storage, page_size=64))
    for context, batch in ((8192, 1), (32768, 8)):
        for storage in ("float", "int8", "int4", "bfp12-32"):
            found.append(
                _sample("typical", batch=batch, context=context, storage=storage, benchmark=True, large=True)
            )
    for batch in (1, 8):
        found.append(_sample("typical", **MLA, batch=batch, context=32768, benchmark=True, large=True))
    for queries in (4, 16):
        found.append(
            _sample("ragged", batch=7, context=3000, queries=queries, ragged=True, page_size=64, large=True)
        )
    found.append(_sample("ragged", **MLA, batch=5, context=5000, ragged=True, page_size=64, large=True))
    found.append(_sample("typical", batch=1, context=1024, heads=4, kv_heads=1, benchmark=True))
    return found


def _fake(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    value_dim = arguments[10]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((*query.shape[:-1], value_dim)), query.new_empty(query.shape[:-1], dtype=wide)


def _triton_supports(*arguments: Any) -> bool:
    from tensormill.ops.decode_attention.triton import supports

    return supports(*arguments)


def _cuda_supports(*arguments: Any) -> bool:
    from tensormill.ops.decode_attention.cuda import supports

    return supports(*arguments)


def _latent_supports(*arguments: Any) -> bool:
    from tensormill.ops.decode_attention.latent import supports

    return supports(*arguments)


operator = Operator(
    "decode_attention",
    schema=SCHEMA,
    reference=reference.decode_attention,
    fake=_fake,
    cost=cost,
    inputs=_inputs,
    samples=samples(),
    reduction=lambda shape: shape["context"],
    shape_defaults=DEFAULTS,
)
operator.implementation(
    "latent",
    devices=("cuda",),
    entry="tensormill.ops.decode_attention.latent:decode_attention",
    supports=_latent_supports,
    missing=cuda_missing,
)
operator.implementation(
    "cuda",
    devices=("cuda",),
    entry="tensormill.ops.decode_attention.cuda:decode_attention",
    supports=_cuda_supports,
    missing=cuda_missing,
)
operator.implementation(
    "triton",
    devices=("cuda",),
    entry="tensormill.ops.decode_attention.triton:decode_attention",
    supports=_triton_supports,
    missing=triton_missing,
)
peers.register(operator)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    key_scale: Tensor | None = None,
    key_offset: Tensor | None = None,
    value_scale: Tensor | None = None,
    value_offset: Tensor | None = None,
    scale: float | None = None,
    value_dim: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest `queries` tokens of every sequence over its cache, which already holds them.

    Query i of a sequence is its token `length - queries + i` and sees no later token; one that would be before the
    first token sees nothing. What sees nothing has the output 0 and the log-sum-exp -inf. Not differentiable.

    Args:
        query: (batch, heads, queries, head_dim), float16, bfloat16, float32 or float64.
        key: (batch, kv_heads, capacity, head_dim), or with a block table (pages, kv_heads, page_size, head_dim), in
            query's dtype or quantized (int8, or uint8 with two codes in a byte and head_dim / 2; see
            `tensormill.ops.decode_attention.storage`). Any strides, so that a cache with tokens before heads is
            `cache.transpose(1, 2)`. Heads are grouped in order: query head h has key-value head
            h * kv_heads // heads.
        value: the same with value_dim channels; None if values are the first `value_dim` channels of the keys (MLA).
        lengths: (batch,) int32, tokens of every sequence. Memory behind them is never looked at.
        block_table: (batch, n) int32, pages of every sequence in order; entries behind its length may be anything.
        key_scale, value_scale: (..., groups), in front as key and value, float, or uint8 exponents of block
            floating point; for quantized keys and values.
        key_offset, value_offset: as the scales, float; None for symmetric formats.
        scale: of the logits, `head_dim ** -0.5` by default.
        value_dim: with `value=None`, its number of channels.
        window: a token sees the last `window` tokens only, itself included.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        sinks: (heads,) float, a further logit of every head that takes weight but has no value; it counts in the
            log-sum-exp.
        return_lse: also return the log-sum-exp.

    Returns:
        (batch, heads, queries, value_dim) in query's dtype; with `return_lse` also (batch, heads, queries), natural
        log-sum-exp of the logits in float32 (float64 for a float64 query), which `merge_attention` takes.

    Raises:
        InvalidArgument: shapes, dtypes or devices do not fit together.

    >>> query = torch.zeros(1, 2, 1, 4)
    >>> value = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)
    >>> decode_attention(query, torch.randn(1, 1, 3, 4), value, torch.tensor([2], dtype=torch.int32)).flatten()
    tensor([1.5000, 1.5000])
    """
    _check_query(query, lengths, block_table)
    _check_stored("key", key, key_scale, key_offset, query, block_table, query.shape[-1])
    head_dim = query.shape[-1]
    if value is None:
        if value_dim is None or not 0 < value_dim <= head_dim:
            raise InvalidArgument(
                f"given no value and value_dim={value_dim}, expected how many of the keys' {head_dim} channels are"
                " values"
            )
        if value_scale is not None or value_offset is not None:
            raise InvalidArgument("given no value but its scale or offset, expected value")
    else:
        width = value.shape[-1] * (2 if bits_of(value) == 4 else 1)
        if value_dim not in (None, width):
            raise InvalidArgument(
                f"given value_dim={value_dim} and value with {width} channels; leave it out"
            )
        value_dim = width
        _check_stored("value", value, value_scale, value_offset, query, block_table, width)
        if value.shape[:3] != key.shape[:3]:
            raise InvalidArgument(
                f"given value of shape {tuple(value.shape)}, expected {tuple(key.shape[:3])} in front, as key has"
            )
    if query.shape[1] % key.shape[1]:
        raise InvalidArgument(
            f"given {query.shape[1]} query heads and {key.shape[1]} key-value heads, expected a multiple of them"
        )
    if window is not None and window < 1:
        raise InvalidArgument(f"given window={window}, expected at least 1, or None for no window")
    if softcap is not None and not 0 < softcap < math.inf:
        raise InvalidArgument(f"given softcap={softcap}, expected a positive number, or None for no cap")
    if sinks is not None and (tuple(sinks.shape) != (query.shape[1],) or not sinks.is_floating_point()):
        raise InvalidArgument(
            f"given sinks of {sinks.dtype} and shape {tuple(sinks.shape)}, expected floats ({query.shape[1]},)"
        )
    for name, tensor in (("key", key), ("value", value), ("lengths", lengths), ("block_table", block_table)):
        if tensor is not None and tensor.device != query.device:
            raise InvalidArgument(
                f"given {name} on {tensor.device} and query on {query.device}, expected one device"
            )
    output, lse = operator(
        query,
        key,
        value,
        key_scale,
        key_offset,
        value_scale,
        value_offset,
        lengths,
        block_table,
        sinks,
        float(scale) if scale is not None else head_dim**-0.5,
        value_dim,
        window or 0,
        softcap or 0.0,
    )
    return (output, lse) if return_lse else output


def _check_query(query: Tensor, lengths: Tensor, block_table: Tensor | None) -> None:
    if query.dim() != 4 or query.dtype not in FLOATS:
        raise InvalidArgument(
            f"given query of {query.dtype} and shape {tuple(query.shape)}, expected floats"
            " (batch, heads, queries, head_dim)"
        )
    batch = query.shape[0]
    if tuple(lengths.shape) != (batch,) or lengths.dtype != torch.int32:
        raise InvalidArgument(
            f"given lengths of {lengths.dtype} and shape {tuple(lengths.shape)}, expected int32 ({batch},)"
        )
    if block_table is not None and (
        block_table.dim() != 2 or block_table.shape[0] != batch or block_table.dtype != torch.int32
    ):
        raise InvalidArgument(
            f"given block_table of {block_table.dtype} and shape {tuple(block_table.shape)}, expected int32"
            f" ({batch}, pages of a sequence)"
        )


def _check_stored(
    name: str,
    stored: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    query: Tensor,
    block_table: Tensor | None,
    channels: int,
) -> None:
    quantized = stored.dtype in (torch.int8, torch.uint8)
    width = channels // 2 if stored.dtype == torch.uint8 else channels
    front = "pages" if block_table is not None else str(query.shape[0])
    if stored.dim() != 4 or stored.shape[-1] != width or (block_table is None and len(stored) != len(query)):
        raise InvalidArgument(
            f"given {name} of {stored.dtype} and shape {tuple(stored.shape)}, expected ({front}, kv_heads,"
            f" {'page_size' if block_table is not None else 'capacity'}, {width})"
        )
    if not quantized:
        if stored.dtype != query.dtype:
            raise InvalidArgument(
                f"given {name} of {stored.dtype} and query of {query.dtype}, expected the same, or int8 or uint8 codes"
            )
        if scale is not None or offset is not None:
            raise InvalidArgument(f"given {name} of {stored.dtype} with a scale or an offset, expected codes")
        return
    if scale is None:
        raise InvalidArgument(f"given {name} of {stored.dtype} without {name}_scale, expected one")
    for what, tensor in (("scale", scale), ("offset", offset)):
        if tensor is None:
            continue
        allowed = tensor.is_floating_point() or (what == "scale" and tensor.dtype == torch.uint8)
        if tensor.shape[:-1] != stored.shape[:-1] or not allowed or tensor.shape[-1] != scale.shape[-1]:
            raise InvalidArgument(
                f"given {name}_{what} of {tensor.dtype} and shape {tuple(tensor.shape)}, expected floats"
                f" ({', '.join(map(str, stored.shape[:-1]))}, {scale.shape[-1]})"
            )
    if scale.dtype == torch.uint8 and offset is not None:
        raise InvalidArgument(
            f"given {name}_offset beside exponents, expected none: block floating point is symmetric"
        )
    KVFormat(bits_of(stored), channels // max(scale.shape[-1], 1)).groups(channels)
    if scale.shape[-1] < 1 or channels % scale.shape[-1]:
        raise InvalidArgument(
            f"given {scale.shape[-1]} scales of {name} for {channels} channels, expected a divisor"
        )

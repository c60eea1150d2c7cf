"""Who else computes attention of one new token over a cache. They take caches of 16 bits: beside a quantized cache they
are timed on the dequantized one, which is the yardstick that quantizing has to beat.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tensormill.operator import Operator, requires
from tensormill.ops.decode_attention.storage import dequantize_kv


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    key_scale: Tensor | None,
    key_offset: Tensor | None,
    value_scale: Tensor | None,
    value_offset: Tensor | None,
    lengths: Tensor,
    block_table: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    value_dim: int,
    window: int,
    softcap: float,
) -> bool:
    """One new token, contiguous cache, all sequences of one length."""
    uniform = len(lengths) > 0 and bool((lengths == lengths[0]).all()) and int(lengths[0]) > 0
    plain = sinks is None and not window and not softcap and block_table is None
    return plain and uniform and query.shape[2] == 1 and query.dtype in (torch.float16, torch.bfloat16)


def _separate(*arguments: Any) -> bool:
    return arguments[2] is not None and _plain(*arguments)


def _latent(*arguments: Any) -> bool:
    return arguments[2] is None and arguments[3] is None and arguments[1].shape[1] == 1 and _plain(*arguments)


def _dense(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Keys and values in the query's dtype, cut to their length."""
    query, key, value, key_scale, key_offset, value_scale, value_offset, lengths = arguments[:8]

    def dense(stored: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
        stored = stored[:, :, : int(lengths[0])]
        if scale is None:
            return stored
        parts = zip(stored, scale, [None] * len(stored) if offset is None else offset, strict=True)
        # by sequence, so that float32 exists of one only
        return torch.stack([dequantize_kv(*_cut(part, stored.shape[2])).to(query.dtype) for part in parts])

    return dense(key, key_scale, key_offset), dense(value, value_scale, value_offset)


def _cut(part: tuple[Tensor, Tensor, Tensor | None], length: int) -> tuple[Any, ...]:
    codes, scale, offset = part
    return codes, scale[:, :length], None if offset is None else offset[:, :length], torch.float32


def _sdpa(*arguments: Any) -> Callable[[], Any]:
    query, scale = arguments[0], arguments[10]
    key, value = _dense(*arguments)

    def call() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, scale=scale, enable_gqa=True
        )

    return call


def _flex(*arguments: Any) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import flex_attention

    query, scale = arguments[0], arguments[10]
    key, value = _dense(*arguments)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, scale=scale, enable_gqa=True)


def _matmul(*arguments: Any) -> Callable[[], Any]:
    query, key, lengths, scale, value_dim = (arguments[i] for i in (0, 1, 7, 10, 11))
    keys = key[:, 0, : int(lengths[0])]

    def call() -> Tensor:
        weights = torch.softmax(query[:, :, 0] @ keys.transpose(1, 2) * scale, dim=-1)
        return weights @ keys[..., :value_dim]

    return call


def _flashinfer(*arguments: Any) -> Callable[[], Any]:
    import flashinfer

    query, length, scale = arguments[0], int(arguments[7][0]), arguments[10]
    key, value = _dense(*arguments)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    batch, heads, _, head_dim = query.shape
    page_size = math.gcd(length, 64)
    pages = length // page_size
    # pages of 64 tokens of a contiguous cache: (pages, heads, page_size, head_dim)
    paged = tuple(
        x.unflatten(2, (pages, page_size)).transpose(1, 2).flatten(0, 1).contiguous() for x in (key, value)
    )
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * pages
    indices = torch.arange(batch * pages, dtype=torch.int32, device=query.device)
    last = torch.full((batch,), page_size, dtype=torch.int32, device=query.device)
    wrapper.plan(
        indptr,
        indices,
        last,
        heads,
        key.shape[1],
        head_dim,
        page_size,
        q_data_type=query.dtype,
        sm_scale=scale,
    )
    return lambda: wrapper.run(query[:, :, 0], paged)


def register(operator: Operator) -> None:
    """Add every peer to the operator."""
    # they return no log-sum-exp, so that their outputs are not compared here but in the tests
    settings: dict[str, Any] = {"devices": ("cpu", "cuda"), "tolerance": math.inf, "supports": _separate}
    operator.peer("torch scaled_dot_product_attention", make=_sdpa, **settings)
    operator.peer("torch flex_attention", make=_flex, **{**settings, "devices": ("cuda",)})
    operator.peer(
        "flashinfer", make=_flashinfer, **{**settings, "devices": ("cuda",)}, missing=requires("flashinfer")
    )
    operator.peer(
        "torch matmul and softmax",
        make=_matmul,
        **{**settings, "supports": _latent},
    )

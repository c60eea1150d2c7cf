"""Who else computes attention of one new token over a cache: they take 16-bit caches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tensormill.operator import Operator, requires


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
    """One new token, contiguous 16-bit cache, all sequences of one length."""
    uniform = len(lengths) > 0 and bool((lengths == lengths[0]).all()) and int(lengths[0]) > 0
    plain = sinks is None and not window and not softcap and block_table is None and key_scale is None
    return plain and uniform and query.shape[2] == 1 and query.dtype in (torch.float16, torch.bfloat16)


def _separate(*arguments: Any) -> bool:
    return arguments[2] is not None and _plain(*arguments)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Callable[[], Any]:
    length, scale = int(rest[4][0]), rest[7]
    key, value = key[:, :, :length], value[:, :, :length]

    def call() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, scale=scale, enable_gqa=True
        )

    return call


def _flex(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import flex_attention

    length, scale = int(rest[4][0]), rest[7]
    compiled = torch.compile(flex_attention, dynamic=False)
    key, value = key[:, :, :length], value[:, :, :length]
    return lambda: compiled(query, key, value, scale=scale, enable_gqa=True)


def _einsum(query: Tensor, key: Tensor, value: None, *rest: Any) -> Callable[[], Any]:
    length, scale, value_dim = int(rest[4][0]), rest[7], rest[8]
    keys = key[:, 0, :length]

    def call() -> Tensor:
        weights = torch.softmax(query[:, :, 0] @ keys.transpose(1, 2) * scale, dim=-1)
        return weights @ keys[..., :value_dim]

    return call


def _flashinfer(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Callable[[], Any]:
    import flashinfer

    length, scale = int(rest[4][0]), rest[7]
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=query.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    batch, heads, _, head_dim = query.shape
    page_size = math.gcd(length, 64)
    pages = length // page_size
    # pages of 64 tokens of a contiguous cache: (pages, heads, page_size, head_dim)
    paged = tuple(
        x[:, :, :length].unflatten(2, (pages, page_size)).transpose(1, 2).flatten(0, 1).contiguous()
        for x in (key, value)
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
        make=_einsum,
        **{**settings, "supports": lambda *arguments: arguments[2] is None and _plain(*arguments)},
    )

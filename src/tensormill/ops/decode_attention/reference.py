"""The definition of decode attention in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.ops.decode_attention.storage import dequantize_kv


def decode_attention(
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
) -> tuple[Tensor, Tensor]:
    """See `tensormill.ops.decode_attention`; window 0 and softcap 0 mean none.

    Returns:
        (batch, heads, queries, value_dim) in query's dtype, and (batch, heads, queries) natural log-sum-exp in
        float32 (float64 for a float64 query).
    """
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads, queries = query.shape[1:3]
    k = _of_sequences(dense(key, key_scale, key_offset, wide), block_table, lengths)
    if value is None:
        v = k[..., :value_dim]
    else:
        v = _of_sequences(dense(value, value_scale, value_offset, wide), block_table, lengths)
    kv_heads, capacity = k.shape[1], k.shape[2]
    position = torch.arange(capacity, device=query.device)
    # query i of `queries` is token lengths - queries + i of its sequence, and sees no later one
    last = lengths.long()[:, None] - queries + torch.arange(queries, device=query.device)
    visible = position <= last[..., None]  # (batch, queries, capacity)
    if window:
        visible = visible & (position > last[..., None] - window)
    # memory past the length may hold anything, NaN too
    used = (position < lengths.long()[:, None])[:, None, :, None]
    k, v = torch.where(used, k, 0.0), torch.where(used, v, 0.0)

    q = query.to(wide).unflatten(1, (kv_heads, heads // kv_heads))
    logits = torch.einsum("bhgqd,bhnd->bhgqn", q, k) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
    if sinks is not None:  # one more logit, whose value is zero
        sink = sinks.to(wide).view(1, kv_heads, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sink], dim=-1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    if logits.shape[-1] == 0:
        lse = logits.new_full(logits.shape[:-1], -torch.inf)
    else:
        lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    output = torch.einsum("bhgqn,bhnd->bhgqd", weights, v)
    return output.flatten(1, 2).to(query.dtype).contiguous(), lse.flatten(1, 2).contiguous()


def dense(stored: Tensor, scale: Tensor | None, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys or values in `dtype`, dequantized if they are codes."""
    return stored.to(dtype) if scale is None else dequantize_kv(stored, scale, offset, dtype)


def _of_sequences(pages: Tensor, block_table: Tensor | None, lengths: Tensor) -> Tensor:
    """(pages, heads, page_size, head_dim) -> (batch, heads, capacity, head_dim)."""
    if block_table is None:
        return pages
    page_size = pages.shape[2]
    used = torch.arange(block_table.shape[1], device=pages.device) * page_size < lengths.long()[:, None]
    table = torch.where(used, block_table.long(), 0)
    return (
        pages[table].transpose(1, 2).flatten(2, 3)
    )  # (batch, table, heads, ...) -> (batch, heads, capacity, ...)

"""Decoders of Llama's kind, prepared for decoding: stacked projections, fused steps between them, one cache tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormill.errors import ModelError
from tensormill.models.decoding.stacking import stacked
from tensormill.ops import OPERATORS
from tensormill.ops.linear_wna16.module import LinearWNA16

#: Architectures whose blocks are computed as `PreparedDecoder` does.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
#: Rotary embeddings whose angles depend on the position alone.
_ROTARY = ("default", "linear", "llama3", "yarn")
_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass
class Cache:
    """Keys and values of a batch, in memory that is allocated once.

    Attributes:
        layers: a tensor per block, (batch, 2, kv_heads, capacity, head_dim): keys, then values.
        cosine, sine: (capacity, head_dim): of the angles of every position.
    """

    layers: list[Tensor]
    cosine: Tensor
    sine: Tensor

    @property
    def capacity(self) -> int:
        """Positions that fit."""
        return self.layers[0].shape[3]


@dataclass
class _Block:
    qkv: nn.Module
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    output: nn.Module
    norm: nn.Module  # before the MLP
    gate_up: nn.Module
    down: nn.Module
    next_norm: nn.Module  # of the next block, or the last


def why_not_prepared(model: nn.Module) -> str | None:
    """Why `prepare_for_decoding` can't take a model, or None if it can."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        return f"its architecture is {kind or type(model).__name__}, not one of {', '.join(ARCHITECTURES)}"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"its MLP has the activation {config.hidden_act}, not silu"
    kinds = getattr(config, "layer_types", None)
    windowed = (
        set(kinds) != {"full_attention"} if kinds else getattr(config, "sliding_window", None) is not None
    )
    if windowed and (kind != "qwen2" or getattr(config, "use_sliding_window", True)):
        return "some of its attention is over a sliding window"
    rotary = getattr(model.get_submodule("model.rotary_emb"), "rope_type", None)
    if rotary not in _ROTARY:
        return f"its rotary embedding is {rotary!r}, whose angles depend on the length"
    layers = cast(nn.ModuleList, model.get_submodule("model.layers"))
    for layer in layers:
        for name in (*_PROJECTIONS, *_MLP):
            module = layer.get_submodule(name)
            if type(module) not in (nn.Linear, LinearWNA16):
                return f"{name} is a {type(module).__name__}, not a linear layer of torch or tensormill"
            if hasattr(module, "_hf_hook"):
                return "it is dispatched over several devices"
    return None


def prepare_for_decoding(model: nn.Module) -> PreparedDecoder:
    """Makes of a causal language model of Llama's kind a decoder that computes the same in fewer steps.

    What is fused, and what that changes:

    - Queries, keys and values are one product, gate and up another: their weights are stacked row-wise, in place, and
      the model's own become views of the stack. Exact; `state_dict` is untouched and no weight is held twice.
    - On a GPU, low-bit weights are brought into the order that the CUDA kernels read (`LinearWNA16.to_layout`), in
      place. Exact.
    - Residual sum and norm, rotary embedding (with the copy to the cache), and the gate are a kernel each
      (`add_rms_norm`, `rotate_heads`, `gated_silu`), which round where transformers rounds; sums of squares may be added
      in another order.
    - Attention of one new token reads keys and values once for all queries that share them (`decode_attention` on a
      GPU). Exact but for the order of sums.
    - Only the last position's logits are computed.

    The model itself goes on working, prefill and training-free use included; gradients do not flow through the result.

    Args:
        model: of transformers, in memory, dense or with `LinearWNA16` layers, on one device.

    Returns:
        The decoder, which shares the model's weights.

    Raises:
        ModelError: `why_not_prepared` says why.
    """
    if (reason := why_not_prepared(model)) is not None:
        raise ModelError(f"given a model that can't be prepared for decoding: {reason}; use PlainDecoder")
    return PreparedDecoder(model)


class PreparedDecoder:
    """See `prepare_for_decoding`, which makes it.

    Attributes:
        model: the model whose weights it shares.
        device, dtype: of its activations.
        vocabulary: tokens.
    """

    label = "prepared"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        config: Any = model.config
        body = model.get_submodule("model")
        self._embedding = cast(nn.Embedding, body.get_submodule("embed_tokens"))
        self._rotary = body.get_submodule("rotary_emb")
        self._head = model.get_submodule("lm_head")
        self.vocabulary = int(config.vocab_size)
        self.device = self._embedding.weight.device
        self.dtype = self._embedding.weight.dtype
        layers = cast(nn.ModuleList, body.get_submodule("layers"))
        for module in (*layers.modules(), self._head):
            if type(module) is LinearWNA16:
                module.to_fastest_layout(self.dtype)
        attention: Any = layers[0].get_submodule("self_attn")
        self.head_dim = int(attention.head_dim)
        self.scale = float(attention.scaling)
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        norms = [layer.get_submodule("input_layernorm") for layer in layers] + [body.get_submodule("norm")]
        self._first_norm = norms[0]
        self._steps = _Steps.chosen(self.device, self.dtype, self.head_dim)
        self._blocks = [self._block(layer, after) for layer, after in zip(layers, norms[1:], strict=True)]
        if self.device.type == "cuda":
            # Kernels may read weights before the kernel ahead of them has ended.
            torch.cuda.synchronize(self.device)

    def _block(self, layer: nn.Module, after: nn.Module) -> _Block:
        attention: Any = layer.get_submodule("self_attn")
        query, key, value, output = (layer.get_submodule(name) for name in _PROJECTIONS)
        gate, up, down = (layer.get_submodule(name) for name in _MLP)
        return _Block(
            stacked([query, key, value]),
            getattr(attention, "q_norm", None),
            getattr(attention, "k_norm", None),
            output,
            layer.get_submodule("post_attention_layernorm"),
            stacked([gate, up]),
            down,
            after,
        )

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` sequences of up to `capacity` tokens."""
        size = (batch, 2, self.kv_heads, capacity, self.head_dim)
        positions = torch.arange(capacity, device=self.device)[None]
        like = torch.empty((), dtype=self.dtype, device=self.device)
        cosine, sine = self._rotary(like, positions)
        layers = [torch.zeros(size, dtype=self.dtype, device=self.device) for _ in self._blocks]
        return Cache(layers, cosine[0].contiguous(), sine[0].contiguous())

    def cache_bytes(self, batch: int, length: int) -> int:
        """Bytes that the keys and values of `length` tokens take."""
        return 2 * len(self._blocks) * batch * self.kv_heads * length * self.head_dim * self.dtype.itemsize

    @torch.no_grad()
    def prefill(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Read the prompts, (batch, length) int64, into an empty cache; the next token's logits, (batch, vocabulary)."""
        length = tokens.shape[1]

        def attend(query: Tensor, keys_values: Tensor) -> Tensor:
            fresh = keys_values[:, :, :, :length]
            out = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                fresh[:, 0],
                fresh[:, 1],
                is_causal=True,
                scale=self.scale,
                enable_gqa=self.heads != self.kv_heads,
            )
            return out.transpose(1, 2)

        positions = torch.arange(length, device=self.device)
        return self._forward(tokens, positions, cache, cache.cosine[:length], cache.sine[:length], attend)

    @torch.no_grad()
    def step(self, tokens: Tensor, position: Tensor, cache: Cache, length: int | None = None) -> Tensor:
        """One more token of every sequence.

        Args:
            tokens: (batch, 1) int64.
            position: (1,) int64 on the device, where the tokens stand.
            cache: with everything before that.
            length: `position + 1` where the host knows it; None reads the whole cache under a mask, so that the
                call is the same for every position and can be captured.

        Returns:
            (batch, vocabulary) logits.
        """
        batch = tokens.shape[0]
        mask = lengths = None
        if length is None and self._steps.attention is not None:
            lengths = (position + 1).to(torch.int32).repeat(batch)
        elif length is None:
            hidden = torch.arange(cache.capacity, device=self.device) > position
            mask = torch.zeros(cache.capacity, dtype=self.dtype, device=self.device)
            mask = mask.masked_fill(hidden, -torch.inf).expand(
                batch, self.kv_heads, self.heads // self.kv_heads, -1
            )

        def attend(query: Tensor, keys_values: Tensor) -> Tensor:
            if lengths is not None:
                return self._attention(query.transpose(1, 2), keys_values, lengths)
            seen = keys_values if length is None else keys_values[:, :, :, :length]
            # [batch, kv_heads, queries of each, head_dim]
            rows = query.view(batch, self.kv_heads, -1, self.head_dim)
            return F.scaled_dot_product_attention(rows, seen[:, 0], seen[:, 1], mask, scale=self.scale)

        cosine, sine = cache.cosine.index_select(0, position), cache.sine.index_select(0, position)
        return self._forward(tokens, position, cache, cosine, sine, attend)

    def _attention(self, query: Tensor, keys_values: Tensor, lengths: Tensor) -> Tensor:
        """(batch, heads, 1, head_dim), of the newest tokens."""
        attention = OPERATORS["decode_attention"] if torch.compiler.is_compiling() else self._steps.attention
        assert attention is not None
        key, value = keys_values[:, 0], keys_values[:, 1]
        scales = (None, None, None, None)
        options = (None, None, self.scale, self.head_dim, 0, 0.0)
        mixed: Tensor = attention(query, key, value, *scales, lengths, *options)[0]
        return mixed

    def _forward(
        self, tokens: Tensor, positions: Tensor, cache: Cache, cosine: Tensor, sine: Tensor, attend: Any
    ) -> Tensor:
        batch, length = tokens.shape
        # The compiler fuses the definitions with what is around them; kernels it leaves as they are.
        steps = _Steps() if torch.compiler.is_compiling() else self._steps
        stream = self._embedding(tokens)
        x, _ = _add_norm(steps, stream, torch.zeros_like(stream), self._first_norm)
        for block, kept in zip(self._blocks, cache.layers, strict=True):
            heads = block.qkv(x).view(batch, length, -1, self.head_dim)
            if block.query_norm is not None and block.key_norm is not None:
                parts = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
                heads = torch.cat([block.query_norm(parts[0]), block.key_norm(parts[1]), parts[2]], dim=2)
            query = steps.rotate_and_store(heads, cosine, sine, kept, positions)
            mixed = block.output(attend(query, kept).reshape(batch, length, -1))
            x, stream = _add_norm(steps, mixed, stream, block.norm)
            x = block.down(steps.gated_silu(block.gate_up(x)))
            x, stream = _add_norm(steps, x, stream, block.next_norm)
        logits: Tensor = self._head(x[:, -1])
        return logits


def _rotate_and_store(
    heads: Tensor,
    cosine: Tensor,
    sine: Tensor,
    kept: Tensor,
    positions: Tensor,
    rotate_heads: Callable[..., Tensor] = OPERATORS["rotate_heads"].reference,
) -> Tensor:
    """Rotate queries and keys; keys and values go to the cache (batch, 2, kv_heads, capacity, head_dim)."""
    batch, length, count, head_dim = heads.shape
    kv_heads = kept.shape[2]
    heads = rotate_heads(heads, cosine, sine, count - kv_heads)
    fresh = heads[:, :, count - 2 * kv_heads :].view(batch, length, 2, kv_heads, head_dim)
    kept.index_copy_(3, positions, fresh.permute(0, 2, 3, 1, 4))
    return heads[:, :, : count - 2 * kv_heads]


@dataclass(frozen=True)
class _Steps:
    """What computes the steps between the matrix products: the definitions, unless `chosen` finds kernels.

    Attributes:
        add_rms_norm, gated_silu: as the operators.
        rotate_and_store: as `_rotate_and_store`.
        attention: as the operator `decode_attention`; None takes torch's.
    """

    add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = OPERATORS["add_rms_norm"].reference
    gated_silu: Callable[..., Tensor] = OPERATORS["gated_silu"].reference
    rotate_and_store: Callable[..., Tensor] = _rotate_and_store
    attention: Callable[..., tuple[Tensor, Tensor]] | None = None

    @classmethod
    def chosen(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> _Steps:
        """The implementations that take such tensors, chosen once: a choice per call would cost a CPU as much."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        rotate = OPERATORS["rotate_heads"].select(zeros(1, 1, 1, 2), zeros(1, 2), zeros(1, 2), 1)
        store: Callable[..., Tensor] = functools.partial(_rotate_and_store, rotate_heads=rotate.function)
        if rotate.name == "triton":
            from tensormill.ops.rotate_heads.store import rotate_and_store

            store = rotate_and_store
        attention = None
        if device.type == "cuda":
            cache = zeros(1, 1, 1, head_dim)
            lengths = torch.ones(1, dtype=torch.int32, device=device)
            scales = (None, None, None, None)
            found = OPERATORS["decode_attention"].select(
                cache, cache, cache, *scales, lengths, None, None, 1.0, head_dim, 0, 0.0
            )
            attention = None if found.name == "reference" else found.function
        return cls(
            OPERATORS["add_rms_norm"].select(zeros(1, 2), zeros(1, 2), zeros(2), 1e-5).function,
            OPERATORS["gated_silu"].select(zeros(1, 2)).function,
            store,
            attention,
        )


def _add_norm(steps: _Steps, x: Tensor, stream: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    return steps.add_rms_norm(x, stream, norm.weight, norm.variance_epsilon)

"""Decoders of Llama's kind, prepared for decoding: stacked projections, fused steps between them, one cache tensor."""

from __future__ import annotations

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
    - Residual sum and norm, rotary embedding, and the gate are an operator each (`add_rms_norm`, `rotate_heads`,
      `gated_silu`), which round where transformers rounds; sums of squares may be added in another order.
    - Attention of one new token treats the queries of a key-value head as rows of one product instead of repeating
      keys and values. Exact but for the order of sums.
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
        attention: Any = layers[0].get_submodule("self_attn")
        self.head_dim = int(attention.head_dim)
        self.scale = float(attention.scaling)
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        norms = [layer.get_submodule("input_layernorm") for layer in layers] + [body.get_submodule("norm")]
        self._first_norm = norms[0]
        self._steps = _Steps.chosen(self.device, self.dtype)
        self._blocks = [self._block(layer, after) for layer, after in zip(layers, norms[1:], strict=True)]

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
        if length is None:
            visible = torch.arange(cache.capacity, device=self.device) <= position
            mask = torch.zeros(cache.capacity, dtype=self.dtype, device=self.device)
            mask = mask.masked_fill(~visible, -torch.inf)[None, None, None].expand(
                tokens.shape[0], self.kv_heads, self.heads // self.kv_heads, -1
            )
        else:
            mask = None

        def attend(query: Tensor, keys_values: Tensor) -> Tensor:
            batch = query.shape[0]
            seen = keys_values if length is None else keys_values[:, :, :, :length]
            # [batch, kv_heads, queries of each, head_dim]
            rows = query.view(batch, self.kv_heads, -1, self.head_dim)
            return F.scaled_dot_product_attention(rows, seen[:, 0], seen[:, 1], mask, scale=self.scale)

        cosine, sine = cache.cosine.index_select(0, position), cache.sine.index_select(0, position)
        return self._forward(tokens, position, cache, cosine, sine, attend)

    def _forward(
        self, tokens: Tensor, positions: Tensor, cache: Cache, cosine: Tensor, sine: Tensor, attend: Any
    ) -> Tensor:
        batch, length = tokens.shape
        rotated = self.heads + self.kv_heads
        # The compiler fuses the definitions with what is around them; kernels it leaves as they are.
        steps = _DEFINITIONS if torch.compiler.is_compiling() else self._steps
        stream = self._embedding(tokens)
        x = self._first_norm(stream)
        for block, kept in zip(self._blocks, cache.layers, strict=True):
            heads = block.qkv(x).view(batch, length, -1, self.head_dim)
            if block.query_norm is not None and block.key_norm is not None:
                parts = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
                heads = torch.cat([block.query_norm(parts[0]), block.key_norm(parts[1]), parts[2]], dim=2)
            heads = steps.rotate_heads(heads, cosine, sine, rotated)
            fresh = heads[:, :, self.heads :].view(batch, length, 2, self.kv_heads, self.head_dim)
            kept.index_copy_(3, positions, fresh.permute(0, 2, 3, 1, 4))
            mixed = block.output(attend(heads[:, :, : self.heads], kept).reshape(batch, length, -1))
            x, stream = _add_norm(steps.add_rms_norm, mixed, stream, block.norm)
            x = block.down(steps.gated_silu(block.gate_up(x)))
            x, stream = _add_norm(steps.add_rms_norm, x, stream, block.next_norm)
        logits: Tensor = self._head(x[:, -1])
        return logits


def _add_norm(
    add_rms_norm: Callable[..., Any], x: Tensor, stream: Tensor, norm: Any
) -> tuple[Tensor, Tensor]:
    normed, total = add_rms_norm(x, stream, norm.weight, norm.variance_epsilon)
    return normed, total


@dataclass(frozen=True)
class _Steps:
    """What computes the steps between the matrix products."""

    add_rms_norm: Callable[..., Any]
    rotate_heads: Callable[..., Any]
    gated_silu: Callable[..., Any]

    @classmethod
    def chosen(cls, device: torch.device, dtype: torch.dtype) -> _Steps:
        """The implementations that take such tensors, chosen once: a choice per call would cost a CPU as much."""
        row, heads = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((1, 2), (1, 1, 1, 2)))
        return cls(
            OPERATORS["add_rms_norm"].select(row, row, row[0], 1e-5).function,
            OPERATORS["rotate_heads"].select(heads, row, row, 1).function,
            OPERATORS["gated_silu"].select(row).function,
        )


_DEFINITIONS = _Steps(*(OPERATORS[name].reference for name in ("add_rms_norm", "rotate_heads", "gated_silu")))

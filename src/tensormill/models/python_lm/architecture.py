"""Llama as the training runs it: the weights and names of transformers' `LlamaForCausalLM`, fewer launches.

Queries, keys and values are one matrix product, gate and up projections another, by concatenating the
weights on the fly (a few megabytes a step); parameters keep the names and shapes that the checkpoint has.
No attention mask and no cache: training windows are full and causal.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023 (arXiv 2302.13971); grouped-query
attention as in Ainslie et al., 2023 (arXiv 2305.13245).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensormill.errors import InvalidArgument

__all__ = ["Llama", "LlamaShape"]


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of the model.

    Attributes:
        vocabulary: tokens.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        layers: blocks.
        heads: query heads.
        kv_heads: key and value heads; divides `heads`.
        context: longest window in tokens.
        rope_theta: base of the rotary embedding.
        norm_eps: added to the mean square in the norms.
    """

    vocabulary: int = 4096
    hidden_size: int = 384
    intermediate_size: int = 1280
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2
    context: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads or self.heads % self.kv_heads or self.head_dim % 2:
            raise InvalidArgument(
                f"given hidden_size={self.hidden_size}, heads={self.heads}, kv_heads={self.kv_heads}, expected "
                "heads to divide hidden_size into an even head_dim and kv_heads to divide heads"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.heads

    def config(self, end_of_text: int) -> dict[str, Any]:
        """Content of `config.json`.

        Args:
            end_of_text: id of the token that begins and ends documents.
        """
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_text,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.context,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pad_token_id": end_of_text,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }


class _Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


class _Attention(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        width, kv_width = shape.hidden_size, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.expand_kv = False

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, length, _ = x.shape
        shape = self.shape
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        heads = F.linear(x, weight).view(batch, length, -1, shape.head_dim)
        # rotate queries and keys together: [B, T, heads + kv_heads, head_dim]
        turned = heads[:, :, : shape.heads + shape.kv_heads]
        left, right = turned.chunk(2, dim=-1)
        turned = (turned * cosine + torch.cat([-right, left], dim=-1) * sine).to(x.dtype)
        query = turned[:, :, : shape.heads].transpose(1, 2)
        key = turned[:, :, shape.heads :].transpose(1, 2)
        value = heads[:, :, shape.heads + shape.kv_heads :].transpose(1, 2)
        grouped = shape.kv_heads != shape.heads
        if grouped and self.expand_kv:
            repeat = shape.heads // shape.kv_heads
            key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
            grouped = False
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return F.linear(out.transpose(1, 2).reshape(batch, length, -1), self.o_proj.weight)


class _MLP(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, torch.cat([self.gate_proj.weight, self.up_proj.weight])).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj.weight)


class _Block(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.input_layernorm = _Norm(shape.hidden_size, shape.norm_eps)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = _Norm(shape.hidden_size, shape.norm_eps)
        self.mlp = _MLP(shape)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _Body(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden_size)
        self.layers = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        self.norm = _Norm(shape.hidden_size, shape.norm_eps)


class Llama(nn.Module):
    """Llama with tied embeddings; its state dict is that of `LlamaForCausalLM`, less the tied head.

    Args:
        shape: sizes.
        stream: type of the residual stream; None for the weights' own. bfloat16 halves the memory traffic
            of training under autocast.
    """

    cosine: Tensor  # [context, 1, head_dim]
    sine: Tensor

    def __init__(self, shape: LlamaShape, stream: torch.dtype | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.stream = stream
        self.model = _Body(shape)
        angles = torch.outer(
            torch.arange(shape.context, dtype=torch.float64),
            shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim),
        )
        angles = torch.cat([angles, angles], dim=-1)[:, None]  # [T, 1, head_dim]
        self.register_buffer("cosine", angles.cos().float(), persistent=False)
        self.register_buffer("sine", angles.sin().float(), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embeddings normal with deviation 0.02; matrices with 0.5/sqrt(fan-in), and where they write to the
        residual stream with 1/sqrt(2 layers) of that."""
        depth = 1 / math.sqrt(2 * self.shape.layers)
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                nn.init.ones_(weight)
            elif "embed_tokens" in name:
                nn.init.normal_(weight, std=0.02)
            else:
                scale = 0.5 * depth if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.5
                nn.init.normal_(weight, std=scale / math.sqrt(weight.shape[1]))

    def attentions(self) -> list[_Attention]:
        """The attention of each block, first block first."""
        return [module for module in self.modules() if isinstance(module, _Attention)]

    def expand_kv(self, expand: bool) -> None:
        """Whether keys and values are repeated for attention kernels that know no grouped heads."""
        for attention in self.attentions():
            attention.expand_kv = expand

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: (batch, length) int64, length up to the context.

        Returns:
            (batch, length, vocabulary).
        """
        x = self.model.embed_tokens(tokens)
        if self.stream is not None:
            x = x.to(self.stream)
        cosine, sine = self.cosine[: tokens.shape[1]], self.sine[: tokens.shape[1]]
        for block in self.model.layers:
            x = block(x, cosine, sine)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

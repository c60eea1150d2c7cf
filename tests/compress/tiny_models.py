"""Tiny random models for the tests of compression methods, real architectures and deliberately odd ones."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

ARCHITECTURES = ("llama", "qwen2", "mistral", "opt")
VOCABULARY = 97


def tiny_model(architecture: str, *, dtype: torch.dtype = torch.float32, **options: int) -> nn.Module:
    """Two layers, width 64, with norms, biases and weights all away from their initial values."""
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        **options,
    }
    if architecture == "opt":
        config = transformers.OPTConfig(ffn_dim=96, word_embed_proj_dim=64, dropout=0.0, **sizes)
    else:
        names = {
            "llama": "LlamaConfig",
            "qwen2": "Qwen2Config",
            "mistral": "MistralConfig",
            "gemma2": "Gemma2Config",
            "phi3": "Phi3Config",
        }
        if architecture == "gemma2":
            sizes["head_dim"] = 16
        if architecture == "phi3":
            sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        heads = 4 if architecture == "llama" else 2
        config = getattr(transformers, names[architecture])(
            intermediate_size=96, num_key_value_heads=heads, **sizes
        )
    torch.manual_seed(len(architecture))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(5)
    return model.to(dtype).eval()


def tokens(samples: int = 4, length: int = 24, seed: int = 0) -> Tensor:
    """(samples, length) random tokens."""
    return torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """Norm, two linears with an activation between, residual; `leak` lets the norm's output escape."""

    def __init__(self, activation: nn.Module, norm: nn.Module, leak: bool = False, width: int = 32) -> None:
        super().__init__()
        self.norm, self.activation, self.leak = norm, activation, leak
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        normed = self.norm(hidden_states)
        extra = normed if self.leak else 0
        return (hidden_states + self.second(self.activation(self.first(normed))) + extra,)


class HandingBlock(nn.Module):
    """Norm, two linears, residual; the second layer reads half of what the block before gave its own, too."""

    def __init__(self, width: int = 32, *, hands_on: bool = True) -> None:
        super().__init__()
        self.norm, self.hands_on = OnePlusNorm(width), hands_on
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor | None]:
        own = self.first(self.norm(hidden_states))
        read = own if given is None else own + given / 2
        return hidden_states + self.second(read), own if self.hands_on else None


class SharingBlock(HandingBlock):
    """The same, but what it gives lies in a mapping: `role` says whether it leaves its own there, or reads one."""

    def __init__(self, role: str, width: int = 32) -> None:
        super().__init__(width)
        self.role = role

    def forward(self, hidden_states: Tensor, shared: UserDict[str, Tensor]) -> Tensor:
        given = shared["own"] if self.role == "reads" else None
        output, own = super().forward(hidden_states, given)
        if self.role == "leaves":
            shared["own"] = own
        return output


class SharingModel(nn.Module):
    """Blocks that share a mapping; called as a causal language model is."""

    def __init__(self, *roles: str, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(SharingBlock(role, width) for role in roles)
        self.lm_head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x, shared = self.embedding(tokens), UserDict()
        for block in self.blocks:
            x = block(x, shared)
        return self.lm_head(x)


class HandingModel(nn.Module):
    """Blocks that each get something from the one `distance` before; called as a causal language model is."""

    def __init__(self, *blocks: nn.Module, width: int = 32, distance: int = 1) -> None:
        super().__init__()
        self.embedding, self.distance = nn.Embedding(VOCABULARY, width), distance
        self.blocks = nn.ModuleList(blocks)
        self.lm_head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x, given = self.embedding(tokens), [None] * self.distance
        for block in self.blocks:
            x, other = block(x, given[-self.distance])
            given.append(other)
        return self.lm_head(x)


class OnePlusNorm(nn.Module):
    """RMS norm that multiplies by 1 + weight, in the input's own precision."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * (1 + self.weight)


class BlockModel(nn.Module):
    """Embedding, blocks, head; called as a causal language model is. `between` changes what a block reads."""

    def __init__(
        self, *blocks: nn.Module, width: int = 32, between: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        super().__init__()
        self.between = between
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(blocks)
        self.lm_head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(self.between(x))[0]
        return self.lm_head(x)

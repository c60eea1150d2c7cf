"""Any causal language model of transformers as a decoder: its own forward, its static cache, SDPA."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tensormill.errors import ModelError


class PlainDecoder:
    """A model as transformers computes it, behind the same interface as `PreparedDecoder`.

    Args:
        model: a causal language model with a key-value cache, on one device.

    Attributes:
        model: the model.
        device, dtype: of its activations.
        vocabulary: tokens.

    Raises:
        ModelError: its forward takes no cache.
    """

    label = "plain"

    def __init__(self, model: Any) -> None:
        taken = inspect.signature(model.forward).parameters
        if "past_key_values" not in taken:
            raise ModelError(
                f"given a {type(model).__name__}, whose forward takes no past_key_values, expected a causal language "
                "model of transformers"
            )
        self.model = model
        self.config = self.model.config.get_text_config()
        weight = self.model.get_input_embeddings().weight
        self.device, self.dtype = weight.device, weight.dtype
        self.vocabulary = int(self.config.vocab_size)
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self._positions = "position_ids" in taken

    def new_cache(self, batch: int, capacity: int) -> Any:
        """transformers' static cache for sequences of up to `capacity` tokens."""
        from transformers import StaticCache

        return StaticCache(config=self.config, max_cache_len=capacity)

    def cache_bytes(self, batch: int, length: int) -> int:
        """Bytes that the keys and values of `length` tokens take, if every block keeps all of them."""
        config = self.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * batch * heads * width * length * self.dtype.itemsize)

    @torch.no_grad()
    def prefill(self, tokens: Tensor, cache: Any) -> Tensor:
        """See `PreparedDecoder.prefill`."""
        cache.reset()
        return self._forward(tokens, torch.arange(tokens.shape[1], device=self.device), cache)

    @torch.no_grad()
    def step(self, tokens: Tensor, position: Tensor, cache: Any, length: int | None = None) -> Tensor:
        """See `PreparedDecoder.step`; the cache counts its tokens itself."""
        return self._forward(tokens, position, cache)

    def _forward(self, tokens: Tensor, positions: Tensor, cache: Any) -> Tensor:
        options = {"position_ids": positions[None], **self._options} if self._positions else self._options
        output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, **options)
        logits: Tensor = output.logits[:, -1]
        return logits

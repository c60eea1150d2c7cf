"""Tiny random models of several architectures, and low-bit linears in them without calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tensormill.errors import CheckpointError

ARCHITECTURES = ("llama", "qwen2", "mistral", "opt")
TOKENS = torch.arange(3, 43).reshape(2, 20)


def tiny_model(
    architecture: str, *, tied: bool = False, dtype: torch.dtype = torch.float32, mlp: int = 96
) -> nn.Module:
    """A random causal language model of two layers, hidden size 64, vocabulary 128."""
    import transformers

    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }
    if architecture == "opt":
        config = transformers.OPTConfig(ffn_dim=mlp, word_embed_proj_dim=64, dropout=0.0, **sizes)
    else:
        kind = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "mistral": "MistralConfig"}[architecture]
        config = getattr(transformers, kind)(intermediate_size=mlp, num_key_value_heads=2, **sizes)
    torch.manual_seed(len(architecture) + tied)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        # Architectures start biases at zero and norms at one, which would hide an omission.
        if name.endswith("bias") or "norm" in name:
            nn.init.normal_(parameter, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.1)
        elif parameter.dim() == 2 and "embed" not in name:
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def compress_linears(
    model: nn.Module, bits: int, group_size: int, symmetric: bool, *, only: str = "", head: bool = False
) -> nn.Module:
    """Rounds every linear whose name contains `only` to nearest and puts `LinearWNA16` in its place."""
    from tensormill.compress.formats.quantization import QuantSpec, quantize_weight
    from tensormill.ops.linear_wna16.module import LinearWNA16

    spec = QuantSpec(bits, group_size, symmetric)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and only in name and (head or name != "lm_head"):
            found = quantize_weight(module.weight.detach(), spec)
            linear = LinearWNA16.from_codes(
                found.codes, found.scale, found.zero_point, bits=bits, group_size=group_size, bias=module.bias
            )
            model.set_submodule(name, linear)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Logits of the fixed tokens, in float32."""
    return model(TOKENS).logits.float()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of `expected`."""
    return float((found - expected).norm() / expected.norm())


def save_source(model: nn.Module, path: Path, **more: object) -> Path:
    """Writes an uncompressed checkpoint, with a tokenizer and the files that travel along."""
    model.save_pretrained(path, **more)
    save_tokenizer(path)
    (path / "README.md").write_text("a model card\n")
    (path / "LICENSE").write_text("Apache-2.0\n")
    (path / "chat_template.jinja").write_text("{{ messages }}\n")
    return path


def save_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"word{i}": i for i in range(126)} | {"<unk>": 126, "</s>": 127}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(path)


def refused(call: Callable[[], object], error: type[Exception] = CheckpointError) -> str:
    """The one short line with which a call is refused."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    return text

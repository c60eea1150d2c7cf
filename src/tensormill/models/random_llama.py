"""Writes checkpoints of Llama's architecture with random weights, of any size: to measure what a job takes on a model
of that size where no trained one is at hand.

What such a model says is noise. Its sizes, dtypes and files are those of a real one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument


def random_llama_checkpoint(
    path: str | Path,
    *,
    layers: int = 32,
    hidden_size: int = 4096,
    intermediate_size: int = 14336,
    heads: int = 32,
    kv_heads: int = 8,
    vocabulary: int = 128256,
    max_positions: int = 8192,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Path:
    """Write a checkpoint with random weights, a shard per block; the default sizes are those of Llama 3 with 8 billion.

    Weights are normal with the standard deviation `1 / sqrt(in_features)`, so that activations keep their size; a few
    channels of each norm are large, as in trained models. The tokenizer knows bytes only.

    Args:
        path: a directory that doesn't exist, or is empty.
        layers: number of blocks.
        hidden_size, intermediate_size, heads, kv_heads, vocabulary, max_positions: sizes; the vocabulary has at least
            the 256 bytes.
        tied: whether the embedding is the output layer too.
        dtype: of the weights.
        device: where numbers are drawn; a GPU is many times faster.
        seed: of the numbers.

    Returns:
        The directory.

    Raises:
        InvalidArgument: sizes that don't fit together, or a directory that isn't empty.
    """
    if vocabulary < 256 or layers < 1 or hidden_size % heads or heads % kv_heads:
        raise InvalidArgument(
            f"given {layers} layers, {hidden_size} channels, {heads} heads over {kv_heads} and {vocabulary} tokens, "
            "expected at least 1 layer and 256 tokens, and sizes that divide"
        )
    directory = Path(path)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InvalidArgument(f"given {path}, which exists and isn't an empty directory; choose another name")
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32)
        return drawn.mul_(columns**-0.5).to(dtype).cpu()

    def norm() -> Tensor:
        weight = 1 + 0.1 * torch.randn(hidden_size, generator=generator, device=device)
        weight[
            torch.randint(hidden_size, (max(1, hidden_size // 200),), generator=generator, device=device)
        ] *= 8
        return weight.to(dtype).cpu()

    def shards() -> Iterator[dict[str, Tensor]]:
        yield {"model.embed_tokens.weight": normal(vocabulary, hidden_size)}
        narrow = hidden_size // heads * kv_heads
        for layer in range(layers):
            matrices = {
                "self_attn.q_proj": normal(hidden_size, hidden_size),
                "self_attn.k_proj": normal(narrow, hidden_size),
                "self_attn.v_proj": normal(narrow, hidden_size),
                "self_attn.o_proj": normal(hidden_size, hidden_size),
                "mlp.gate_proj": normal(intermediate_size, hidden_size),
                "mlp.up_proj": normal(intermediate_size, hidden_size),
                "mlp.down_proj": normal(hidden_size, intermediate_size),
                "input_layernorm": norm(),
                "post_attention_layernorm": norm(),
            }
            yield {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in matrices.items()}
        last = {"model.norm.weight": norm()}
        yield last if tied else {**last, "lm_head.weight": normal(vocabulary, hidden_size)}

    _write_shards(directory, shards(), layers + 2)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tied,
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_tokenizer(directory)
    return directory


def _write_shards(directory: Path, shards: Iterator[dict[str, Tensor]], count: int) -> None:
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)

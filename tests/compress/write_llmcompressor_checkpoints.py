"""Write checkpoints of a tiny random Llama with llm-compressor, and what they should compute.

python tests/compress/write_llmcompressor_checkpoints.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

CASES = {
    f"{method}-{'sym' if symmetric else 'asym'}": {"method": method, "symmetric": symmetric}
    for method in ("awq", "gptq")
    for symmetric in (False, True)
}


def tiny_llama(seed: int, **sizes: int):
    """Norms and weights away from their initial values, activations of very different sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **sizes,
        }
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.mul_(torch.empty_like(parameter).log_normal_(0, 0.7))
            else:
                parameter.mul_(5)
    return model


def write(
    folder: Path, *, method: str, symmetric: bool, seed: int = 0, group_size: int = 16, **sizes: int
) -> None:
    """One checkpoint, with `expected.safetensors` (tokens and logits) beside its weights."""
    from tensormill.compress.calibration import Calibration
    from tensormill.compress.peers import quantize_with_llmcompressor

    model = tiny_llama(seed, **sizes)
    generator = torch.Generator().manual_seed(seed + 1)
    calibration = torch.randint(0, model.config.vocab_size, (8, 24), generator=generator)
    tokens = torch.randint(0, model.config.vocab_size, (2, 11), generator=generator)
    made = quantize_with_llmcompressor(
        model,
        Calibration(calibration),
        method=method,
        bits=4,
        group_size=group_size,
        symmetric=symmetric,
        output=folder,
    )
    with torch.no_grad():
        logits = made.model(tokens).logits.contiguous()
    save_file({"tokens": tokens, "logits": logits}, folder / "expected.safetensors")


if __name__ == "__main__":
    for name, case in CASES.items():
        write(Path(sys.argv[1], name), **case)

"""Write checkpoints of tiny random models with GPTQModel, and what they should compute.

python tests/compress/write_gptqmodel_checkpoints.py FOLDER [SEED]

Run by hand, where GPTQModel is installed: see the README in `peer_checkpoints`.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from read_with_gptqmodel import read
from safetensors.torch import save_file
from torch import nn
from write_peer_checkpoints import float16_llama, logits_of

CASES: dict[str, dict[str, Any]] = {
    "gptqmodel-v2-4-bits-asym": {"format": "gptq_v2", "bits": 4, "sym": False, "desc_act": False},
    "gptqmodel-v2-3-bits-asym": {
        "format": "gptq_v2",
        "bits": 3,
        "sym": False,
        "desc_act": False,
        "layers": 1,
    },
    "gptqmodel-v1-2-bits-sym": {"format": "gptq", "bits": 2, "sym": True, "desc_act": False, "layers": 1},
    "gptqmodel-order": {"format": "gptq_v2", "bits": 4, "sym": False, "desc_act": True, "layers": 1},
    "gptqmodel-dynamic": {
        "format": "gptq_v2",
        "bits": 4,
        "sym": False,
        "desc_act": True,
        "layers": 2,
        "dynamic": {
            r"+:.*\.1\.mlp\.down_proj": {"bits": 3, "desc_act": False},
            r".*\.down_proj": {"bits": 8, "group_size": 16},
            r".*\.o_proj": {"bits": 2, "sym": True, "group_size": -1},
            r"-:.*\.k_proj": {},
        },
    },
    "gptqmodel-gpt2": {"model": "gpt2", "format": "gptq_v2", "bits": 4, "sym": False, "desc_act": False},
}


def float16_gpt2(seed: int) -> nn.Module:
    """A random GPT-2 of one layer, whose layers but the last are `Conv1D`."""
    config = transformers.GPT2Config(
        vocab_size=37,
        n_embd=64,
        n_inner=96,
        pad_token_id=0,
        n_layer=1,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.endswith(".bias"):
                parameter.normal_(std=0.2)
            parameter.data = parameter.half()
    model.config.dtype = torch.float16
    return model


def save_tokenizer(folder: Path, words: int) -> None:
    """GPTQModel's loader wants one, with a padding token that the model has."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<unk>": 0} | {f"word{i}": i for i in range(1, words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="word1", pad_token="<unk>"
    ).save_pretrained(folder)


def write(folder: Path, *, seed: int = 0, model: str = "llama", layers: int = 2, **settings: Any) -> None:
    """One checkpoint, with `expected.safetensors` (tokens and float32 logits) beside its weights."""
    from gptqmodel import GPTQModel, QuantizeConfig

    made = float16_gpt2(seed) if model == "gpt2" else float16_llama(seed, num_hidden_layers=layers)
    generator = torch.Generator().manual_seed(seed + 1)
    calibration = torch.randint(0, made.config.vocab_size, (16, 64), generator=generator)
    tokens = torch.randint(0, made.config.vocab_size, (2, 11), generator=generator)
    config = QuantizeConfig(
        group_size=32, device="cpu", offload_to_disk=False, pack_impl="original", **settings
    )
    with tempfile.TemporaryDirectory() as source:
        made.save_pretrained(source)
        save_tokenizer(Path(source), made.config.vocab_size)
        peer = GPTQModel.load(source, config, dtype=torch.float16)
        windows = [{"input_ids": window, "attention_mask": [1] * 64} for window in calibration.tolist()]
        peer.quantize(windows, batch_size=1)
        peer.save(str(folder))
    # Its own loader reads the file again.
    versions = {
        "gptqmodel": importlib.metadata.version("gptqmodel"),
        "transformers": transformers.__version__,
    }
    logits = logits_of(read(str(folder)), tokens)
    save_file({"tokens": tokens, "logits": logits}, folder / "expected.safetensors", metadata=versions)
    for file in folder.iterdir():
        if file.name == "quant_log.csv" or file.name.startswith("tokenizer"):
            file.unlink()
        else:
            file.chmod(0o644)


if __name__ == "__main__":
    chosen = sys.argv[3:] or CASES
    for name in chosen:
        write(Path(sys.argv[1], name), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0, **CASES[name])

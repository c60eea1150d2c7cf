"""Logits of checkpoints as GPTQModel computes them, in a process that never sees tensormill.

python tests/compress/read_with_gptqmodel.py LOGITS FOLDER...
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

# Its loader wants two workers, and takes half the cores otherwise.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
TOKENS = torch.arange(3, 25).reshape(2, 11)


def read(folder: str) -> nn.Module:
    """The model that its own loader makes, computing in float32 with what its layers say their weights are."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    for name, packed in list(model.named_modules()):
        if isinstance(packed, BaseQuantLinear):
            packed.scales = packed.scales.float()
            plain = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None)
            plain.weight.data = packed.dequantize_weight().float().T.contiguous()
            if packed.bias is not None:
                plain.bias.data = packed.bias.float()
            model.set_submodule(name, plain)
    return model.float()


if __name__ == "__main__":
    with torch.no_grad():
        found = {Path(folder).name: read(folder)(TOKENS).logits.contiguous() for folder in sys.argv[2:]}
    save_file(found, sys.argv[1])

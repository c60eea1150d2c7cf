"""Quantized matrices for the tests of checkpoint formats, and other projects' code to compare with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch


def quantized(
    bits: int, rows: int, columns: int, group_size: int, seed: int = 0, extreme: str = ""
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (N, K), float16 scale (N, G) and zero point (N, G): random, or "low" or "high" throughout."""
    draw = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else columns // group_size
    top = (1 << bits) - 1
    codes = torch.randint(0, top + 1, (rows, columns), generator=draw, dtype=torch.uint8)
    zero = torch.randint(0, top + 1, (rows, groups), generator=draw, dtype=torch.uint8)
    if extreme:
        codes = torch.full_like(codes, 0 if extreme == "low" else top)
        zero = torch.full_like(zero, 0 if extreme == "low" else top)
    scale = (torch.rand((rows, groups), generator=draw) + 0.01).half()
    return codes, scale, zero


def weight_of(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group_size: int) -> torch.Tensor:
    """(N, K) float32, by the definition."""
    size = codes.shape[1] if group_size == -1 else group_size
    wide = [tensor.float().repeat_interleave(size, dim=1) for tensor in (scale, zero)]
    return (codes.float() - wide[1]) * wide[0]


def word_bits(words: torch.Tensor) -> int:
    """The int32 words of a row as one integer, the first word lowest."""
    return sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words.tolist()))


def source_file(package: str, *parts: str) -> ModuleType:
    """One file of an installed package, without the package's own import; skips where it isn't installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    path = Path(found.submodule_search_locations[0]).joinpath(*parts)
    spec = importlib.util.spec_from_file_location(f"_only_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

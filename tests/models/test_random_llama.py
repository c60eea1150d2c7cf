"""Random checkpoints: transformers loads them, and they have the sizes asked for."""

from __future__ import annotations

import pytest
import torch

from tensormill.compress.checkpoint import open_model
from tensormill.errors import InvalidArgument
from tensormill.models.random_llama import random_llama_checkpoint

SIZES = {
    "layers": 2,
    "hidden_size": 48,
    "intermediate_size": 80,
    "heads": 6,
    "kv_heads": 3,
    "vocabulary": 300,
}


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_it(tied, tmp_path):
    path = random_llama_checkpoint(tmp_path / "model", **SIZES, tied=tied, dtype=torch.float16)
    model, tokenizer = open_model(path)
    assert model.dtype == torch.float16
    assert tuple(model.model.layers[1].self_attn.k_proj.weight.shape) == (24, 48)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    text = "Größe, 大きさ\n\tand sizes"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.shape[1] == len(text.encode())
    assert tokenizer.decode(ids[0]) == text
    assert model.float()(ids).logits.isfinite().all()


def test_activations_keep_their_size(tmp_path):
    path = random_llama_checkpoint(tmp_path / "model", **{**SIZES, "layers": 12, "hidden_size": 192})
    model, _ = open_model(path, dtype=torch.float32)
    with torch.no_grad():
        states = model(torch.arange(200)[None], output_hidden_states=True).hidden_states
    sizes = [state.square().mean().sqrt().item() for state in states[1:-1]]
    assert max(sizes) < 20 * min(sizes)


def test_the_seed_decides(tmp_path):
    models = [
        open_model(random_llama_checkpoint(tmp_path / f"{number}", **SIZES, seed=seed))[0]
        for number, seed in enumerate((1, 1, 2))
    ]
    first, second, third = (model.model.layers[0].mlp.up_proj.weight for model in models)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("change", [{"layers": 0}, {"heads": 5}, {"kv_heads": 4}, {"vocabulary": 255}])
def test_sizes_that_do_not_fit_are_refused(change, tmp_path):
    with pytest.raises(InvalidArgument, match="sizes that divide"):
        random_llama_checkpoint(tmp_path / "model", **{**SIZES, **change})
    assert not (tmp_path / "model").exists()


def test_a_directory_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidArgument, match="isn't an empty directory"):
        random_llama_checkpoint(tmp_path, **SIZES)

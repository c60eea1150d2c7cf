"""Computing in a wider type where the CPU has no 16-bit products: same numbers, everything put back."""

from contextlib import suppress

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from tensormill.compress import precision
from tensormill.compress.awq import AWQConfig, apply
from tensormill.compress.calibration import Calibration
from tensormill.compress.evaluate import compare
from tensormill.roofline import has_fast_matmul


@pytest.fixture
def no_fast_bfloat16(monkeypatch):
    monkeypatch.setattr(precision, "has_fast_matmul", lambda dtype, device: dtype != torch.bfloat16)


def test_only_16_bit_products_on_a_cpu_can_be_slow():
    assert has_fast_matmul(torch.float32, "cpu") and has_fast_matmul(torch.float64, "cpu")
    assert has_fast_matmul(torch.bfloat16, "cuda:0") and has_fast_matmul(torch.float16, "cuda")
    assert isinstance(has_fast_matmul(torch.bfloat16, "cpu"), bool)


def test_a_module_is_wide_inside_and_the_same_tensors_outside(no_fast_bfloat16):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.bfloat16)
    module[1].weight = module[0].weight
    module.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in module.state_dict(keep_vars=True).items()}
    with suppress(KeyError), precision.widened(module):
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert module[1].weight is module[0].weight
        assert module.steps.dtype == torch.int64
        raise KeyError
    after = module.state_dict(keep_vars=True)
    assert all(
        after[name] is tensor and tensor.data_ptr() == place for name, (tensor, place) in before.items()
    )
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_nothing_changes_where_products_are_fast(monkeypatch):
    monkeypatch.setattr(precision, "has_fast_matmul", lambda dtype, device: True)
    module = nn.Linear(4, 4).to(torch.bfloat16)
    with precision.widened(module):
        assert module.weight.dtype == torch.bfloat16


def test_compression_and_evaluation_leave_the_stored_dtype(no_fast_bfloat16):
    model = tiny_model("llama").to(torch.bfloat16)
    original = tiny_model("llama").to(torch.bfloat16)
    original.load_state_dict(model.state_dict())
    tokens = torch.randint(model.config.vocab_size, (8, 32), generator=torch.Generator().manual_seed(0))
    apply(model, AWQConfig(bits=8, group_size=32), Calibration(tokens))
    floating = {p.dtype for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()}
    assert floating <= {torch.bfloat16, torch.float32} and model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.q_proj.weight_scale.dtype == torch.bfloat16
    assert compare(original, model, tokens).kl < 1e-2

"""`add_rms_norm`, `rotate_heads` and `gated_silu` round as transformers' Llama does, and compile for a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tensormill.errors import InvalidArgument
from tensormill.operator import use_implementation
from tensormill.ops import OPERATORS, add_rms_norm, gated_silu, rotate_heads

NAMES = ("add_rms_norm", "rotate_heads", "gated_silu")


def implementations(name: str) -> list[str]:
    return [
        one.name for one in OPERATORS[name].implementations if "cpu" in one.devices and one.missing() is None
    ]


@pytest.mark.parametrize("implementation", implementations("add_rms_norm"))
def test_norm_is_that_of_llama(implementation):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(1000, eps=1e-6).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(1 + torch.randn(1000))
        x, stream = torch.randn(2, 5, 1000).bfloat16(), torch.randn(2, 5, 1000).bfloat16()
        with use_implementation(add_rms_norm=implementation):
            y, total = add_rms_norm(x, stream, norm.weight, 1e-6)
        assert torch.equal(total, x + stream)
        # sums in another order: now and then the next number of 16 bits
        assert (y != norm(total)).float().mean() < 0.01
        torch.testing.assert_close(y, norm(total), rtol=2**-7, atol=0)


@pytest.mark.parametrize("implementation", implementations("rotate_heads"))
def test_rotation_is_that_of_llama(implementation):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = torch.randn(2, 7, 9, 64).bfloat16()
    angles = 6 * torch.rand(7, 64)
    cosine, sine = angles.cos().bfloat16(), angles.sin().bfloat16()
    with use_implementation(rotate_heads=implementation):
        turned = rotate_heads(x, cosine, sine, 6)
    query, key = (x[:, :, part].transpose(1, 2) for part in (slice(0, 4), slice(4, 6)))
    query, key = apply_rotary_pos_emb(query, key, cosine[None], sine[None])
    expected = torch.cat([query.transpose(1, 2), key.transpose(1, 2), x[:, :, 6:]], dim=2)
    assert torch.equal(turned, expected)


def test_gate_is_that_of_llama():
    x = torch.randn(3, 200).half()
    assert torch.equal(gated_silu(x), torch.nn.functional.silu(x[:, :100]) * x[:, 100:])


def test_refusals():
    x = torch.randn(2, 6)
    with pytest.raises(InvalidArgument, match="residual"):
        add_rms_norm(x, x[:1], x[0], 1e-5)
    with pytest.raises(InvalidArgument, match="weight of torch"):
        add_rms_norm(x, x, x[0].double(), 1e-5)
    with pytest.raises(InvalidArgument, match="expected floats"):
        add_rms_norm(x.int(), x, x[0], 1e-5)
    heads = torch.randn(2, 3, 4, 6)
    table = torch.randn(3, 6)
    with pytest.raises(InvalidArgument, match="even head_dim"):
        rotate_heads(heads[..., :5], table[:, :5], table[:, :5], 1)
    with pytest.raises(InvalidArgument, match="sine"):
        rotate_heads(heads, table, table[:2], 1)
    with pytest.raises(InvalidArgument, match="0 to 4"):
        rotate_heads(heads, table, table, 5)
    with pytest.raises(InvalidArgument, match="2 \\* intermediate_size"):
        gated_silu(x[:, :5])


# Triton decides at import whether it interprets, so the compiler runs in a process of its own.
COMPILE = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tensormill.ops.add_rms_norm import triton as norm
from tensormill.ops.gated_silu import triton as gate
from tensormill.ops.rotate_heads import store, triton as rotary

def build(kernel, pointers, scalars, constants):
    signature = {name: "*bf16" for name in pointers} | scalars | {name: "constexpr" for name in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "launch_pdl": True})
    waits = "griddepcontrol.wait" in built.asm["ptx"]
    return {"target": ".target sm_90" in built.asm["ptx"] and waits, "shared": built.metadata.shared}

print(json.dumps([
    build(norm._kernel, ("x", "residual", "weight", "y", "total"), {"N": "i32", "eps": "fp32"}, {"BLOCK": 4096, "OVERLAP": True}),
    build(gate._kernel, ("x", "y"), {"N": "i32"}, {"BLOCK": 1024, "OVERLAP": True}),
    build(rotary._kernel, ("x", "cosine", "sine", "y"),
          {"length": "i32", "heads": "i32", "rotated": "i32"},
          {"HALF": 64, "BLOCK_D": 64, "BLOCK_H": 8, "OVERLAP": True}),
    build(store._kernel, ("x", "cosine", "sine", "query", "cache"), {"positions": "*i64", "length": "i32", "capacity": "i32"},
          {"HEADS": 32, "KV_HEADS": 8, "HALF": 64, "BLOCK_D": 64, "BLOCK_H": 8, "OVERLAP": True}),
]))
"""


def test_kernels_compile_for_hopper(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for built in json.loads(done.stdout.splitlines()[-1]):
        assert built["target"] and built["shared"] < 16384


INTERPRETED = """
import torch
from tensormill.models.decoding.prepared import _rotate_and_store as by_steps
from tensormill.ops.rotate_heads.store import rotate_and_store

for dtype, batch, length, heads, kv_heads, head_dim in (
    (torch.float32, 3, 1, 6, 2, 20), (torch.float16, 2, 5, 4, 4, 16), (torch.float32, 1, 3, 3, 1, 64),
):
    x = torch.randn(batch, length, heads + 2 * kv_heads, head_dim).to(dtype)
    cosine, sine = torch.randn(2, length, head_dim).to(dtype)
    cache = torch.randn(batch, 2, kv_heads, 9, head_dim).to(dtype)
    other, positions = cache.clone(), torch.arange(length) + 4
    query = rotate_and_store(x, cosine, sine, cache, positions)
    assert torch.equal(query, by_steps(x, cosine, sine, other, positions))
    assert torch.equal(cache, other)
"""


def test_rotation_into_the_cache():
    """In Triton's interpreter, so in a process of its own."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]

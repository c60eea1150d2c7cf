"""Every architecture on the list of docs/compress.md, from its edges to the logits of its checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from architectures import CONFIGS, VOCABULARY, architecture_model
from packed_models import relative_error
from safetensors.torch import load_file
from test_compressed_tensors import PLAIN
from test_fold import change, fold_all, outputs
from torch import nn

from tensormill.compress import awq, gptq, rtn
from tensormill.compress.calibration import Calibration
from tensormill.compress.checkpoint import load, save_compressed
from tensormill.compress.experts import unfuse_experts
from tensormill.compress.formats.checkpoint_format import compressed_linears
from tensormill.compress.formats.float16_scales import round_scales
from tensormill.compress.structure import discover

pytestmark = pytest.mark.filterwarnings("ignore:.*zero points:UserWarning", "ignore:.*Conv1D:UserWarning")

GATED = [
    "input_layernorm -> self_attn.q_proj + self_attn.k_proj + self_attn.v_proj",
    "self_attn.v_proj -> self_attn.o_proj",
    "post_attention_layernorm -> mlp.gate_proj + mlp.up_proj",
    "mlp.up_proj -> mlp.down_proj",
]
POST_NORMS = [edge.replace("post_attention", "pre_feedforward") for edge in GATED]
NEOX = [
    "input_layernorm -> attention.query_key_value",
    "attention.query_key_value -> attention.dense",
    "post_attention_layernorm -> mlp.dense_h_to_4h",
]
# Edges of the blocks by first block of each kind.
EDGES = {
    "llama": {0: GATED},
    "qwen3": {0: GATED},
    "gemma2": {0: POST_NORMS},
    "gemma3": {0: POST_NORMS},
    "gpt_neox": {0: NEOX},
    "gpt_neox_sequential": {0: NEOX},
    "phi3": {
        0: [
            "input_layernorm -> self_attn.qkv_proj",
            "self_attn.qkv_proj -> self_attn.o_proj",
            "post_attention_layernorm -> mlp.gate_up_proj",
            "mlp.gate_up_proj -> mlp.down_proj",
        ]
    },
    "gpt2": {0: ["ln_1 -> attn.c_attn", "attn.c_attn -> attn.c_proj", "ln_2 -> mlp.c_fc"]},
    "falcon": {
        0: [
            "input_layernorm -> self_attention.query_key_value + mlp.dense_h_to_4h",
            "self_attention.query_key_value -> self_attention.dense",
        ]
    },
    "falcon_grouped": {
        0: [
            "ln_attn -> self_attention.query_key_value",
            "self_attention.query_key_value -> self_attention.dense",
            "ln_mlp -> mlp.dense_h_to_4h",
        ]
    },
}
LLAMA4_DENSE = [edge.replace("mlp.", "feed_forward.") for edge in GATED]
LLAMA4_MIXED = [
    *GATED[:2],
    "post_attention_layernorm -> feed_forward.experts.*.gate_proj + feed_forward.experts.*.up_proj + "
    "feed_forward.shared_expert.gate_proj + feed_forward.shared_expert.up_proj + feed_forward.router",
    *(
        f"feed_forward.experts.{index}.up_proj -> feed_forward.experts.{index}.down_proj"
        for index in range(4)
    ),
    "feed_forward.shared_expert.up_proj -> feed_forward.shared_expert.down_proj",
]
MOE = {
    "qwen2_moe": {
        0: GATED,
        1: [
            *GATED[:2],
            "post_attention_layernorm -> mlp.shared_expert.gate_proj + mlp.shared_expert.up_proj + "
            "mlp.experts.*.gate_proj + mlp.experts.*.up_proj + mlp.gate + mlp.shared_expert_gate",
            "mlp.shared_expert.up_proj -> mlp.shared_expert.down_proj",
            *(f"mlp.experts.{index}.up_proj -> mlp.experts.{index}.down_proj" for index in range(4)),
        ],
    },
    "qwen3_moe": {
        0: [
            *GATED[:2],
            "post_attention_layernorm -> mlp.experts.*.gate_proj + mlp.experts.*.up_proj + mlp.gate",
            *(f"mlp.experts.{index}.up_proj -> mlp.experts.{index}.down_proj" for index in range(4)),
        ]
    },
    "mixtral": {
        0: [
            *GATED[:2],
            "post_attention_layernorm -> mlp.experts.*.w1 + mlp.experts.*.w3 + mlp.gate",
            *(f"mlp.experts.{index}.w3 -> mlp.experts.{index}.w2" for index in range(4)),
        ]
    },
    "llama4": dict(enumerate([LLAMA4_DENSE, LLAMA4_MIXED] * 2)),
    "deepseek_v3": {
        0: [
            *(
                latent := [
                    "input_layernorm -> self_attn.q_a_proj + self_attn.kv_a_proj_with_mqa",
                    "self_attn.q_a_layernorm -> self_attn.q_b_proj",
                    "self_attn.kv_a_layernorm -> self_attn.kv_b_proj",
                    "self_attn.kv_b_proj -> self_attn.o_proj",
                ]
            ),
            *GATED[2:],
        ],
        1: [
            *latent,
            "post_attention_layernorm -> mlp.experts.*.gate_proj + mlp.experts.*.up_proj + "
            "mlp.shared_experts.gate_proj + mlp.shared_experts.up_proj + mlp.gate",
            *(f"mlp.experts.{index}.up_proj -> mlp.experts.{index}.down_proj" for index in range(8)),
            "mlp.shared_experts.up_proj -> mlp.shared_experts.down_proj",
        ],
    },
}
MOE["deepseek_v32"] = {
    index: [
        "input_layernorm -> self_attn.q_a_proj + self_attn.kv_a_proj_with_mqa + self_attn.indexer.wk + "
        "self_attn.indexer.weights_proj",
        "self_attn.q_a_layernorm -> self_attn.q_b_proj + self_attn.indexer.wq_b",
        *edges[2:],
    ]
    for index, edges in MOE["deepseek_v3"].items()
}
MOE["glm_moe_dsa"] = {0: MOE["deepseek_v32"][0], 1: MOE["deepseek_v3"][1]}
EDGES |= MOE
# An older transformers may lack some.
EDGES = {name: edges for name, edges in EDGES.items() if hasattr(transformers, CONFIGS[name][0])}
# Gemma's norms and all routers compute in float32, whatever the model's dtype.
ROUNDING = dict.fromkeys(["gemma2", "gemma3", *MOE], 1e-6)

TOKENS = torch.randint(0, VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(3))
WITH_ZERO_POINTS = ("gemma3", "gpt_neox", "phi3", "qwen2_moe", "llama4")
WAYS = [(name, True) for name in EDGES] + [(name, False) for name in WITH_ZERO_POINTS]
WAYS = [way for way in WAYS if way[0] in EDGES]
CASES = [f"{name}-{'sym' if symmetric else 'asym'}" for name, symmetric in WAYS]
# Plain transformers has no packed form of Conv1D.
UNREADABLE_LAYERS = ["gpt2-sym"]
# Llama 4's experts it reads as single layers.
UNREADABLE = [case for case in CASES if case.endswith("-asym") and case[:-5] in MOE.keys() - {"llama4"}]
READABLE = [case for case in CASES if case not in UNREADABLE + UNREADABLE_LAYERS]
SMALL = {"group_size": 16, "n_grid": 4, "clip_grid": 8}


def opened(name: str, **options) -> nn.Module:
    model = architecture_model(name, **options)
    unfuse_experts(model)
    return model


def compressed(name: str, **settings) -> nn.Module:
    model = architecture_model(name)
    awq.apply(model, awq.AWQConfig(**{**SMALL, **settings}), Calibration(TOKENS))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS[:2]).logits.float()


@pytest.mark.parametrize("name", EDGES)
def test_edges_are_found(name):
    blocks = discover(opened(name)).blocks
    kinds = sorted(EDGES[name])
    for index, block in enumerate(blocks):
        kind = max(first for first in kinds if first <= index)
        assert [str(edge) for edge in block.mappings] == EDGES[name][kind]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", EDGES)
def test_folding_changes_nothing(name, seed):
    model = opened(name, seed=seed, dtype=torch.float64)
    structure = discover(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    before = outputs(model, structure)
    fold_all(model, structure)
    assert change(before, outputs(model, structure)) < ROUNDING.get(name, 1e-10)
    changed = sum(not torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert (
        changed >= sum(1 + len(edge.consumers) for block in structure.blocks for edge in block.mappings) / 2
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every architecture compressed with AWQ and saved, with and without zero points, and its logits."""
    root = tmp_path_factory.mktemp("architectures")
    models = {
        f"{name}-{'sym' if symmetric else 'asym'}": compressed(name, symmetric=symmetric)
        for name, symmetric in WAYS
    }
    folders = {name: save_compressed(model, None, None, root / name) for name, model in models.items()}
    return folders, {name: logits(model) for name, model in models.items()}


@pytest.fixture(scope="module")
def plain_logits(saved, tmp_path_factory):
    """Logits of plain transformers with compressed-tensors, in a process that never sees tensormill."""
    pytest.importorskip("compressed_tensors")
    out = tmp_path_factory.mktemp("plain") / "logits.safetensors"
    folders = {name: str(saved[0][name]) for name in READABLE}
    request = json.dumps([folders, TOKENS[:2].tolist(), str(out)])
    done = run_plain(request)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


def run_plain(request: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-I", "-c", PLAIN], input=request, text=True, capture_output=True, env=environment
    )


def test_plain_transformers_reads_no_zero_points_of_experts(saved, tmp_path):
    """As docs/compress.md says; a transformers that does must compute our logits."""
    pytest.importorskip("compressed_tensors")
    out = tmp_path / "logits.safetensors"
    folders = {case: str(saved[0][case]) for case in UNREADABLE}
    done = run_plain(json.dumps([folders, TOKENS[:2].tolist(), str(out)]))
    if done.returncode == 0:
        for case, found in load_file(out).items():
            assert relative_error(found, saved[1][case]) < 1e-5
    else:
        assert "automatic conversion of the weights" in done.stderr


@pytest.mark.parametrize("case", READABLE)
def test_plain_transformers_computes_the_same_logits(case, saved, plain_logits):
    assert relative_error(plain_logits[case], saved[1][case]) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_load_computes_the_same_logits(case, saved):
    assert relative_error(logits(load(saved[0][case])), saved[1][case]) < 1e-5


@pytest.mark.parametrize("format", ["awq", "gptq"])
@pytest.mark.parametrize("name", EDGES)
def test_the_other_formats_hold_the_same_model(name, format, tmp_path):
    model = architecture_model(name)
    rtn.apply(model, rtn.RTNConfig(group_size=32, symmetric=True))
    round_scales(model)
    found = load(save_compressed(model, None, None, tmp_path / format, format=format))
    assert set(compressed_linears(found)) == set(compressed_linears(model))
    assert relative_error(logits(found), logits(model)) < 1e-5


@pytest.mark.parametrize("name", EDGES)
def test_methods_beat_rounding_on_the_calibration_data(name):
    """Both minimize a layer's output error, so a wrong Gram matrix would show here."""
    reports = [
        awq.apply(architecture_model(name), awq.AWQConfig(bits=3, **SMALL), Calibration(TOKENS)),
        gptq.apply(
            architecture_model(name),
            gptq.GPTQConfig(bits=3, group_size=16, inputs="original"),
            Calibration(TOKENS),
        ),
    ]
    for report in reports:
        assert len(report.layers) == sum(len(block.linears) for block in discover(opened(name)).blocks)
        assert sum(layer.nmse for layer in report.layers) < 0.9 * sum(
            layer.loss_rtn for layer in report.layers
        )


@pytest.mark.parametrize("name", EDGES)
def test_eight_bits_hardly_change_the_model(name):
    """A scale lost between two layers would."""
    expected = logits(architecture_model(name))
    change = (logits(compressed(name, bits=8, symmetric=True)) - expected).norm(dim=-1)
    # The median over tokens: a router that is nearly undecided may choose another expert for a few.
    assert (change / expected.norm(dim=-1)).median() < 0.03


@pytest.mark.skipif("deepseek_v32" not in EDGES, reason="this transformers has no DeepSeek-V3.2")
def test_a_layer_whose_weight_the_model_reads_keeps_its_precision():
    """DeepSeek-V3.2 asks for its dtype, which a low-bit layer doesn't have; it takes up its norm's scales."""
    structure = discover(opened("deepseek_v32"))
    name = "self_attn.indexer.weights_proj"
    for block in structure.blocks:
        assert block.kept == (name,) and name not in block.linears
        assert f"{block.name}.{name}" in structure.left_out and block.mappings[0].readers == (name,)
    assert not any("weights_proj" in outside for outside in structure.outside)
    before = architecture_model("deepseek_v32").get_submodule(f"model.layers.0.{name}")
    after = compressed("deepseek_v32").get_submodule(f"model.layers.0.{name}")
    assert type(after) is torch.nn.Linear and not torch.equal(after.weight, before.weight)


def test_every_architecture_is_covered():
    assert set(EDGES) <= set(CONFIGS)


OTHERS = {
    "bloom": ("BloomConfig", {"n_head": 4, "n_layer": 2}),
    "cohere": ("CohereConfig", {}),
    "falcon_rw": ("FalconConfig", {"ffn_hidden_size": 96, "multi_query": False, "alibi": True, "bias": True}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 16,
        },
    ),
    "gpt": ("OpenAIGPTConfig", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "gptj": ("GPTJConfig", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("Olmo2Config", {}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "num_hidden_layers": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "starcoder2": ("Starcoder2Config", {}),
}


@pytest.mark.filterwarnings(
    "ignore:the experts in:UserWarning", "ignore:plain transformers reads:UserWarning"
)
@pytest.mark.parametrize("name", OTHERS)
def test_others_are_compressed_and_loaded(name, tmp_path, monkeypatch):
    """Fewer checks than above: the fold, the search, and our own loading."""
    if not hasattr(transformers, OTHERS[name][0]):
        pytest.skip(f"this transformers has no {name}")
    monkeypatch.setitem(CONFIGS, name, OTHERS[name])
    model = opened(name, dtype=torch.float64)
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # the grouped product takes no float64
    structure = discover(model)
    before = outputs(model, structure)
    fold_all(model, structure)
    # Norms and routers in float32, through up to four layers.
    assert change(before, outputs(model, structure)) < 1e-5
    model = architecture_model(name)
    report = awq.apply(model, awq.AWQConfig(symmetric=True, **SMALL), Calibration(TOKENS))
    assert any("producer" in layer.details for layer in report.layers)
    assert sum(layer.nmse for layer in report.layers) < sum(layer.loss_rtn for layer in report.layers)
    folder = save_compressed(model, None, None, tmp_path / "packed")
    assert relative_error(logits(load(folder)), logits(model)) < 1e-5

"""Tiny random models of the architectures that compression is verified on, one configuration each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tensormill.compress.plain_linears import use_plain_linears

VOCABULARY = 97

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LAYER_INPUTS = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY}
_ALTERNATING = {"head_dim": 16, "num_hidden_layers": 3, "sliding_window": 8}
_LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_FALCON = {"ffn_hidden_size": 96, "attention_dropout": 0.0, "hidden_dropout": 0.0}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", _ALTERNATING | _LAYER_TYPES),
    "gemma3": ("Gemma3TextConfig", _ALTERNATING | _LAYER_TYPES),
    # Its last block takes keys and values from an earlier one.
    "gemma3n": (
        "Gemma3nTextConfig",
        _ALTERNATING
        | _LAYER_TYPES
        | _LAYER_INPUTS
        | {"num_kv_shared_layers": 1, "laurel_rank": 16, "activation_sparsity_pattern": [0.0] * 3},
    ),
    "gpt_neox": ("GPTNeoXConfig", {"use_parallel_residual": True}),
    "gpt_neox_sequential": ("GPTNeoXConfig", {"use_parallel_residual": False}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 96}),
    "falcon": ("FalconConfig", _FALCON | {"multi_query": True, "parallel_attn": True, "bias": False}),
    "falcon_grouped": (
        "FalconConfig",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", _EXPERTS | {"num_experts": 4, "head_dim": 32}),
    "granite_moe": ("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    # Dense and mixed layers in turn; each second one attends without positions, over everything.
    "llama4": (
        "Llama4TextConfig",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "intermediate_size": 32,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0, 1, 0],
            "attention_chunk_size": 8,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        _EXPERTS
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
}
# Attends to the tokens that another small attention chooses.
CONFIGS["deepseek_v32"] = (
    "DeepseekV32Config",
    CONFIGS["deepseek_v3"][1] | {"index_n_heads": 8, "index_head_dim": 16, "index_topk": 24},
)
# The second and third block attend to the tokens that the first one chose.
CONFIGS["glm_moe_dsa"] = (
    "GlmMoeDsaConfig",
    CONFIGS["deepseek_v32"][1] | {"indexer_types": ["full", "shared", "shared"], "n_group": 1, "head_dim": 8},
)


def architecture_model(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> nn.Module:
    """Random weights large enough that attention and routing aren't uniform; norms and biases not trivial."""
    import transformers

    config_class, sizes = CONFIGS[name]
    if not hasattr(transformers, config_class):
        pytest.skip(f"this transformers has no {name}")
    accepted = {**_SIZES, **sizes, **options}
    if config_class in ("GPTNeoXConfig", "GPT2Config", "FalconConfig"):
        accepted.pop("num_key_value_heads")
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**accepted))
    model = randomize(model).to(dtype).eval()
    use_plain_linears(model)  # as `open_model` does
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Norms, biases and routing corrections away from their initial values."""
    for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if "correction" in n)]:
        if tensor.dim() == 1:
            tensor.add_(0.3 * torch.randn_like(tensor))
        else:
            tensor.mul_(5)
    return model


IMAGE_TOKEN = 90
IMAGE_SIDE, PATCH = 32, 8


def vision_language_model(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, vision_config: str = "CLIPVisionConfig"
) -> nn.Module:
    """LLaVA with a vision tower that holds more weights than the language model."""
    import transformers

    vision = getattr(transformers, vision_config)(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=PATCH,
    )
    text = transformers.LlamaConfig(**_SIZES)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    return randomize(model).to(dtype).eval()


def stacked_on_disk(**options: Any) -> nn.Module:
    """An architecture whose checkpoints hold the experts of a layer in one tensor; it reads images too."""
    return deepstack_model("Qwen3VLMoeConfig", **options)


def deepstack_model(config_class: str = "Qwen3VLConfig", **options: Any) -> nn.Module:
    """A model that adds features of its images to the hidden states between its blocks, too."""
    import transformers

    text = {"head_dim": 16, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    config = getattr(transformers, config_class)(
        text_config={**_SIZES, **_EXPERTS, "num_experts": 4, **text, "num_hidden_layers": 3, **options},
        vision_config={
            "hidden_size": 32,
            "out_hidden_size": 64,
            "depth": 3,
            "num_heads": 2,
            "intermediate_size": 64,
            "patch_size": PATCH,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    torch.manual_seed(0)
    return randomize(transformers.AutoModelForImageTextToText.from_config(config)).eval()


_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIDE,
    "patch_size": PATCH,
}
_QWEN_TOWER = {
    "hidden_size": 32,
    "out_hidden_size": 64,
    "depth": 2,
    "num_heads": 2,
    "intermediate_size": 48,
    "patch_size": PATCH,
}
_QWEN_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}

# Class of the configuration, what its language model has besides the usual sizes, its vision tower, and the rest.
VISION_LANGUAGE: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "Gemma3Config",
        {"head_dim": 16, "sliding_window": 16},
        _TOWER | {"model_type": "siglip_vision_model"},
        {"mm_tokens_per_image": 4, "boi_token_index": 91, "eoi_token_index": 92},
    ),
    "glm4v": (
        "Glm4vConfig",
        {"rope_parameters": _MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}},
        _QWEN_TOWER | {"image_size": IMAGE_SIDE},
        {"image_token_id": IMAGE_TOKEN, "video_token_id": 91},
    ),
    "idefics3": (
        "Idefics3Config",
        {"model_type": "llama"},
        _TOWER,
        {"image_token_id": IMAGE_TOKEN, "scale_factor": 2},
    ),
    "internvl": (
        "InternVLConfig",
        {"model_type": "qwen2"},
        _TOWER | {"model_type": "internvl_vision", "image_size": [IMAGE_SIDE] * 2, "patch_size": [PATCH] * 2},
        {"image_token_id": IMAGE_TOKEN},
    ),
    "llama4": (
        "Llama4Config",
        {"intermediate_size_mlp": 96, "num_local_experts": 4, "attention_chunk_size": 32, "head_dim": 16},
        _TOWER | {"vision_output_dim": 64, "projector_input_dim": 32, "projector_output_dim": 32},
        {},
    ),
    "llava_next": (
        "LlavaNextConfig",
        {"model_type": "llama"},
        _TOWER | {"model_type": "clip_vision_model", "projection_dim": 32},
        {"image_token_index": IMAGE_TOKEN, "vision_feature_layer": -1},
    ),
    "mistral3": (
        "Mistral3Config",
        {"model_type": "mistral"},
        _TOWER | {"model_type": "pixtral", "head_dim": 16},
        {"image_token_index": IMAGE_TOKEN, "spatial_merge_size": 1},
    ),
    "paligemma": (
        "PaliGemmaConfig",
        {"model_type": "gemma2", "head_dim": 16},
        _TOWER | {"model_type": "siglip_vision_model", "projection_dim": 64},
        {"projection_dim": 64, "image_token_index": IMAGE_TOKEN},
    ),
    "qwen2_vl": (
        "Qwen2VLConfig",
        _MROPE,
        {
            "embed_dim": 32,
            "hidden_size": 64,
            "depth": 2,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": PATCH,
        },
        _QWEN_TOKENS,
    ),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", _MROPE, _QWEN_TOWER | {"fullatt_block_indexes": [1]}, _QWEN_TOKENS),
    "smolvlm": (
        "SmolVLMConfig",
        {"model_type": "llama"},
        _TOWER,
        {"image_token_id": IMAGE_TOKEN, "scale_factor": 2},
    ),
}


def other_vision_language_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of `VISION_LANGUAGE` with random weights."""
    import transformers

    config_class, text, vision, more = VISION_LANGUAGE[name]
    config = getattr(transformers, config_class)(
        text_config={**_SIZES, **text}, vision_config=vision, **more, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = randomize(transformers.AutoModelForImageTextToText.from_config(config)).eval()
    # Not all at once: complex numbers of position encodings would lose their imaginary parts.
    for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
        tensor.data = tensor.data.to(dtype)
    return model

"""Llamas of any size with random weights, made on the device in seconds: for speed, which no weight decides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument
from tensormill.ops.bit_packing import packed_width
from tensormill.ops.linear_wna16.module import LinearWNA16


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder of Llama's kind."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES: Mapping[str, Shape] = {
    "llama-1b": Shape(2048, 8192, 16, 32, 8, 128256),
    "llama-3b": Shape(3072, 8192, 28, 24, 8, 128256),
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-70b": Shape(8192, 28672, 80, 64, 8, 128256),
}


def random_llama(
    shape: str | Shape,
    *,
    bits: int | None = None,
    group_size: int = 128,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    layers: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """A Llama with random weights, dense or packed, drawn where it is to run; what it says is noise.

    Args:
        shape: one of `SHAPES`, or sizes.
        bits: width of the weights in the blocks; None keeps them dense. Codes are drawn directly.
        group_size: columns that share a scale.
        symmetric: without zero points.
        dtype: of everything that isn't packed.
        device: where the model is made.
        layers: blocks, if not the shape's.
        seed: of the numbers.

    Raises:
        InvalidArgument: an unknown shape, or one whose sizes the group size doesn't divide.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if isinstance(shape, str):
        if shape not in SHAPES:
            raise InvalidArgument(f"given the shape {shape!r}, expected one of {', '.join(SHAPES)}")
        shape = SHAPES[shape]
    narrow = group_size != -1 and (shape.hidden_size % group_size or shape.intermediate_size % group_size)
    if bits is not None and narrow:
        raise InvalidArgument(
            f"given group_size {group_size}, expected one that divides {shape.hidden_size} and "
            f"{shape.intermediate_size}"
        )
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers if layers is None else layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = cast(Any, model).to(dtype).eval()
    rotary = type(model.model.rotary_emb)(config=config)  # its angles are computed, not drawn
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and bits is not None and name != "lm_head":
            made = _packed(module, bits, group_size, symmetric, dtype, device, generator)
            model.set_submodule(name, made)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight = nn.Parameter(
                _normal(module.weight, dtype, device, generator), requires_grad=False
            )
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            ones = torch.ones(module.weight.shape, dtype=dtype, device=device)
            module.weight = nn.Parameter(ones, requires_grad=False)
    model.model.rotary_emb = rotary.to(device)
    return cast(nn.Module, model)


def dense_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A model with the same weights, its `LinearWNA16` layers as `nn.Linear`; what isn't packed may be shared.

    Args:
        model: of transformers.
        dtype: of all weights; None keeps the model's.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, LinearWNA16):
            linear = nn.Linear(
                module.in_features, module.out_features, module.bias is not None, device="meta"
            )
            kind = module.weight_scale.dtype if dtype is None else dtype
            linear.weight = nn.Parameter(module.dequantize(kind), requires_grad=False)
            if module.bias is not None:
                linear.bias = nn.Parameter(module.bias.detach().to(kind), requires_grad=False)
            memo[id(module)] = linear
    for tensor in (*model.parameters(), *model.buffers()):
        memo.setdefault(id(tensor), _cast(tensor, dtype))
    import copy

    return cast(nn.Module, copy.deepcopy(model, memo)).eval()


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    made = tensor.detach().to(dtype)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def _normal(
    like: Tensor, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Tensor:
    """Weights that keep the size of activations; in half precision from the start, to be quick on a GPU."""
    drawn = torch.empty(like.shape, dtype=dtype, device=device).normal_(generator=generator)
    return drawn.mul_(like.shape[1] ** -0.5)


def _packed(
    linear: nn.Linear,
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator,
) -> LinearWNA16:
    rows, columns = linear.out_features, linear.in_features
    groups = 1 if group_size == -1 else columns // group_size
    words = torch.randint(
        -(1 << 31),
        1 << 31,
        (rows, packed_width(columns, bits)),
        dtype=torch.int32,
        device=device,
        generator=generator,
    )
    # Uniform codes have the standard deviation 2^bits / sqrt(12).
    size = math.sqrt(12.0) / 2**bits * columns**-0.5
    scale = torch.rand((rows, groups), device=device, generator=generator).add_(0.5).mul_(size).to(dtype)
    zero = None
    if not symmetric:
        zero = torch.full((rows, groups), 1 << (bits - 1), dtype=torch.uint8, device=device)
    return LinearWNA16.from_packed(words, scale, zero, in_features=columns, bits=bits, group_size=group_size)

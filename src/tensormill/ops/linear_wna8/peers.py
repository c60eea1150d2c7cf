"""Other people's linear layers with 8-bit activations, and 16-bit ones, for the benchmark.

Every peer gets the same codes and scales, converted to its own layout outside the timing, and quantizes float
activations inside it where it can (onnxruntime a scale per group of the weight, llama.cpp one per 32 or 256
channels). Names say how many bits llama.cpp's formats take a weight, scales included, which also stand beside weights
of fewer bits than they hold. cuBLAS's 8-bit products are yardsticks of a layer with 8-bit weights: integers
in, integers out, without scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tensormill.operator import Operator, requires
from tensormill.ops.bit_packing import unpack_bits
from tensormill.ops.dequantize_wna16.reference import dequantize_wna16
from tensormill.ops.linear_wna8 import ggml
from tensormill.ops.linear_wna16 import peers as weight_only_peers

# Activations that were not quantized differ from those that were by this much.
_QUANTIZATION = 3e-2

Call = Callable[[], Tensor]


def _linear(dtype: torch.dtype) -> Callable[..., Call]:
    def make(
        x: Tensor,
        x_scale: Tensor | None,
        weight: Tensor,
        weight_scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        out_features: int,
        bits: int,
        group_size: int,
        *rest: Any,
    ) -> Call:
        columns = x.shape[-1]
        dense = dequantize_wna16(weight, weight_scale, zero_point, columns, bits, group_size, "packed", dtype)
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        return lambda: torch.nn.functional.linear(x, dense, bias)

    return make


def _floats(x: Tensor, x_scale: Tensor | None, *rest: Any) -> bool:
    return x_scale is None


def _int_mm(x: Tensor, x_scale: Tensor | None, weight: Tensor, *rest: Any) -> Call:
    rows, columns = weight.shape[0], x.shape[-1]
    left = torch.randint(-127, 128, (x.numel() // columns, columns), dtype=torch.int8, device=x.device)
    right = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=x.device)
    return lambda: torch._int_mm(left, right.T)


def _scaled_mm(x: Tensor, x_scale: Tensor | None, weight: Tensor, *rest: Any) -> Call:
    rows, columns = weight.shape[0], x.shape[-1]
    kind = torch.float8_e4m3fn
    left = torch.randn(x.numel() // columns, columns, device=x.device).to(kind)
    right = torch.randn(rows, columns, device=x.device).to(kind)
    one = torch.ones((), device=x.device)
    return lambda: torch._scaled_mm(left, right.T, one, one, out_dtype=torch.bfloat16)


def _eight_bit_takes(x: Tensor, x_scale: Tensor | None, weight: Tensor, *rest: Any) -> bool:
    columns = x.shape[-1]
    return x.numel() // max(columns, 1) > 16 and columns % 16 == 0 and weight.shape[0] % 16 == 0


def _humming(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    x_group_size: int,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    layout: str,
) -> Call:
    from humming.layer import HummingLayer

    columns = x.shape[-1]
    whole = weight_scale.shape[1] == 1
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if bits < 8 else "int-quantized",
        "type": "int",
        "num_bits": bits,
        "strategy": "channel" if whole else "group",
        "symmetric": True,
        "group_size": None if whole else group_size,
    }
    kind = "int8" if x_dtype == torch.int8 else "float8e4m3"
    layer = HummingLayer(
        shape_n=out_features,
        shape_k=columns,
        weight_config=config,
        input_config={"quant_method": "humming", "dtype": kind},
        torch_dtype=dtype,
        has_bias=bias is not None,
    ).to(x.device)
    tensors = {"weight_scale": weight_scale.to(dtype)}
    if bits < 8:
        tensors["weight_packed"] = weight
        tensors["weight_shape"] = torch.tensor([out_features, columns])
    else:
        tensors["weight"] = (unpack_bits(weight, 8, columns).short() - 128).to(torch.int8)
    if bias is not None:
        tensors["bias"] = bias
    layer.load_from_tensors(tensors)
    layer.transform()
    layer(x)  # compiles at the first call
    return lambda: layer(x)


def _humming_takes(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    x_group_size: int,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    layout: str,
) -> bool:
    columns = x.shape[-1]
    return (
        x_scale is None
        and x_group_size == -1
        and zero_point is None
        and dtype in (torch.float16, torch.bfloat16)
        and out_features % 128 == 0
        and columns % 128 == 0
        and (weight_scale.shape[1] == 1 or columns % group_size == 0)
    )


def _onnxruntime(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    *rest: Any,
) -> Call:
    return weight_only_peers.onnxruntime(4)(
        x, weight, weight_scale, zero_point, bias, bits, group_size, "packed"
    )


def _onnxruntime_takes(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    *rest: Any,
) -> bool:
    return x_scale is None and weight_only_peers.onnxruntime_takes(
        x, weight, weight_scale, zero_point, bias, bits, group_size, "packed"
    )


def _llama_cpp(kind: int) -> Callable[..., Call]:
    def make(
        x: Tensor,
        x_scale: Tensor | None,
        weight: Tensor,
        weight_scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        out_features: int,
        bits: int,
        group_size: int,
        *rest: Any,
    ) -> Call:
        columns = x.shape[-1]
        x = x.reshape(-1, columns)
        if kind != ggml.Q4_0:
            dense = dequantize_wna16(
                weight, weight_scale, zero_point, columns, bits, group_size, "packed", torch.float32
            )
            return ggml.product(x, kind, dense=dense)
        repeated = torch.arange(columns // 32) * 32 // (columns if group_size == -1 else group_size)
        codes = unpack_bits(weight, bits, columns) + (8 - (1 << (bits - 1)))
        return ggml.product(x, kind, codes=codes, scale=weight_scale[:, repeated])

    return make


def _llama_cpp_takes(kind: int) -> Callable[..., bool]:
    def takes(
        x: Tensor,
        x_scale: Tensor | None,
        weight: Tensor,
        weight_scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        out_features: int,
        bits: int,
        group_size: int,
        *rest: Any,
    ) -> bool:
        columns = x.shape[-1]
        if x_scale is not None or bias is not None or x.numel() == 0:
            return False
        if kind == ggml.Q4_0:
            whole = group_size % 32 == 0 if group_size != -1 else True
            return bits <= 4 and zero_point is None and whole and columns % 32 == 0
        return bits <= {ggml.Q2_K: 2, ggml.TQ2_0: 2, ggml.Q4_K: 4}[kind] and columns % 256 == 0

    return takes


def register(operator: Operator) -> None:
    """Add the peers to the operator."""
    operator.peer(
        "onnxruntime MatMulNBits int8",
        devices=("cpu",),
        make=_onnxruntime,
        missing=requires("onnxruntime"),
        supports=_onnxruntime_takes,
        tolerance=_QUANTIZATION,
    )
    for name, kind in (
        ("Q4_0, 4.5 bits", ggml.Q4_0),
        ("Q4_K, 4.5 bits", ggml.Q4_K),
        ("Q2_K, 2.6 bits", ggml.Q2_K),
        ("TQ2_0, 2.1 bits", ggml.TQ2_0),
    ):
        operator.peer(
            f"llama.cpp {name}",
            devices=("cpu",),
            make=_llama_cpp(kind),
            missing=ggml.missing,
            supports=_llama_cpp_takes(kind),
            tolerance=_QUANTIZATION if kind == ggml.Q4_0 else float("inf"),
        )
    for name, dtype, devices in (
        ("bf16", torch.bfloat16, ("cpu", "cuda")),
        ("fp16", torch.float16, ("cuda",)),
    ):
        operator.peer(
            f"torch.nn.functional.linear {name}",
            devices=devices,
            make=_linear(dtype),
            supports=_floats,
            tolerance=_QUANTIZATION,
        )
    for name, make in (("torch._int_mm, 8 x 8 bits", _int_mm), ("torch._scaled_mm, fp8 x fp8", _scaled_mm)):
        operator.peer(name, devices=("cuda",), make=make, supports=_eight_bit_takes, tolerance=float("inf"))
    operator.peer(
        "humming",
        devices=("cuda",),
        make=_humming,
        missing=requires("humming"),
        supports=_humming_takes,
        tolerance=_QUANTIZATION,
    )

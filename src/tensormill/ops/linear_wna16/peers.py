"""Other people's weight-only linear layers, for the benchmark.

Every peer gets the same codes, scales and zero points, converted to its own layout outside the timing. Peers
that hold weights or zero points in bf16 have a tolerance at bf16's level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tensormill.operator import Operator, requires
from tensormill.ops.bit_packing import pack_bits, unpack_bits
from tensormill.ops.dequantize_wna16.reference import dequantize_wna16

_BF16_TOLERANCE = 2e-2

Call = Callable[[], Tensor]


def _linear(dtype: torch.dtype) -> Callable[..., Call]:
    def make(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        bits: int,
        group_size: int,
        layout: str,
    ) -> Call:
        dense = dequantize_wna16(weight, scale, zero_point, x.shape[-1], bits, group_size, layout, dtype)
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        return lambda: torch.nn.functional.linear(x, dense, bias)

    return make


def _group(columns: int, group_size: int) -> int:
    return columns if group_size == -1 else group_size


def _explicit_zero(scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    if zero_point is not None:
        return zero_point
    return torch.full(scale.shape, 1 << (bits - 1), dtype=torch.uint8, device=scale.device)


def _tinygemm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Call:
    columns = x.shape[-1]
    codes = unpack_bits(weight, bits, columns)
    # w = (code - 8) * scale + middle, bf16 both
    middle = (8 - _explicit_zero(scale, zero_point, bits).float()) * scale.float()
    scale_and_middle = torch.stack([scale.float(), middle], dim=-1).transpose(0, 1).contiguous().bfloat16()
    x = x.reshape(-1, columns).bfloat16()
    group = _group(columns, group_size)
    if x.device.type == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        # the even code in the high half of a byte
        pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
        product = torch.ops.aten._weight_int4pack_mm
    if bias is None:
        return lambda: product(x, packed, group, scale_and_middle)
    bias = bias.bfloat16()
    return lambda: product(x, packed, group, scale_and_middle) + bias


def _tinygemm_takes(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> bool:
    columns, rows = x.shape[-1], weight.shape[0]
    fits = rows % 16 == 0 if x.device.type == "cpu" else rows % 8 == 0 and columns % 128 == 0
    group = _group(columns, group_size)
    return bits <= 4 and x.dim() == 2 and group in (32, 64, 128, 256) and columns % group == 0 and fits


def onnxruntime(accuracy_level: int) -> Callable[..., Call]:
    """`make` of MatMulNBits: accuracy level 0 computes in float32, 4 quantizes activations to 8 bits."""

    def make(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        bits: int,
        group_size: int,
        layout: str,
    ) -> Call:
        from onnxruntime import InferenceSession, SessionOptions

        model = _matmul_nbits_model(x, weight, scale, zero_point, bias, bits, group_size, accuracy_level)
        options = SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle threads would otherwise spin on the cores of whoever is timed next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = InferenceSession(model, options, providers=["CPUExecutionProvider"])
        given = {"A": x.float().numpy()}
        return lambda: torch.from_numpy(session.run(None, given)[0])

    return make


def onnxruntime_takes(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> bool:
    """Whether MatMulNBits takes these arguments."""
    group = _group(x.shape[-1], group_size)
    power_of_two = group >= 16 and group & (group - 1) == 0
    return bits in (2, 4, 8) and power_of_two and x.shape[-1] % group == 0


def _field(number: int, value: int | bytes | str) -> bytes:
    """One field of a protocol-buffer message: an integer as a varint, anything else with its length."""

    def varint(n: int) -> bytes:
        out = bytearray()
        while n >= 0x80:
            out.append(n & 0x7F | 0x80)
            n >>= 7
        return bytes(out) + bytes([n])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def _message(fields: Iterable[tuple[int, int | bytes | str]]) -> bytes:
    return b"".join(_field(number, value) for number, value in fields)


def _matmul_nbits_model(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    accuracy_level: int,
) -> bytes:
    """An ONNX model of one com.microsoft::MatMulNBits node, written by hand: the onnx package is not needed.

    Field numbers are those of onnx.proto3. The node's packed weight, (N, K / group, group * bits / 8), has
    the bytes of our rows.
    """
    float32, uint8 = 1, 2
    rows, columns = weight.shape[0], x.shape[-1]
    group = _group(columns, group_size)

    def tensor(name: str, value: Tensor, dtype: int) -> bytes:
        data = value.contiguous().view(torch.uint8).numpy().tobytes()
        return _message([*((1, size) for size in value.shape), (2, dtype), (8, name), (9, data)])

    def value_info(name: str, sizes: Iterable[int]) -> bytes:
        shape = _message((1, _message([(1, size)])) for size in sizes)
        return _message([(1, name), (2, _message([(1, _message([(1, float32), (2, shape)]))]))])

    packed = weight.view(torch.uint8)[:, : columns * bits // 8].reshape(
        rows, columns // group, group * bits // 8
    )
    initializers = [tensor("B", packed, uint8), tensor("scales", scale.float(), float32)]
    inputs = ["A", "B", "scales"]
    if zero_point is not None or bias is not None:
        zeros = pack_bits(_explicit_zero(scale, zero_point, bits), bits).view(torch.uint8)
        zeros = zeros[:, : -(-scale.shape[1] * bits // 8)]
        initializers.append(tensor("zero_points", zeros, uint8))
        inputs.append("zero_points")
    if bias is not None:
        initializers.append(tensor("bias", bias.float(), float32))
        inputs += ["", "bias"]  # the group index in between is left out
    values = {"K": columns, "N": rows, "bits": bits, "block_size": group, "accuracy_level": accuracy_level}
    attributes = [(5, _message([(1, name), (3, value), (20, 2)])) for name, value in values.items()]
    node = _message(
        [*((1, name) for name in inputs), (2, "Y"), (4, "MatMulNBits"), *attributes, (7, "com.microsoft")]
    )
    graph = _message(
        [
            (1, node),
            (2, "linear"),
            *((5, initializer) for initializer in initializers),
            (11, value_info("A", x.shape)),
            (12, value_info("Y", (*x.shape[:-1], rows))),
        ]
    )
    opsets = [(8, _message([(2, 21)])), (8, _message([(1, "com.microsoft"), (2, 1)]))]
    return _message([(1, 10), (7, graph), *opsets])


def _gemlite(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Call:
    from gemlite import DType, GemLiteLinear

    columns, rows = x.shape[-1], weight.shape[0]
    kind = DType.BF16 if x.dtype == torch.bfloat16 else DType.FP16
    layer = GemLiteLinear(
        bits, _group(columns, group_size), columns, rows, input_dtype=kind, output_dtype=kind
    )
    zeros = _explicit_zero(scale, zero_point, bits).to(x.dtype)
    layer.pack(unpack_bits(weight, bits, columns), scale.to(x.dtype), zeros, bias)
    layer(x)  # tunes itself at the first call
    return lambda: layer(x)


def _gemlite_takes(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> bool:
    columns = x.shape[-1]
    group = _group(columns, group_size)
    half = x.dtype in (torch.float16, torch.bfloat16)
    return half and bits in (1, 2, 4, 8) and group >= 16 and columns % group == 0 and columns % 32 == 0


def _humming(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Call:
    from humming.layer import HummingLayer

    columns, rows = x.shape[-1], weight.shape[0]
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "type": "int",
        "num_bits": bits,
        "strategy": "channel" if scale.shape[1] == 1 else "group",
        "symmetric": zero_point is None,
        "group_size": None if scale.shape[1] == 1 else group_size,
    }
    layer = HummingLayer(
        shape_n=rows, shape_k=columns, weight_config=config, torch_dtype=x.dtype, has_bias=bias is not None
    )
    layer = layer.to(x.device)
    tensors = {"weight_packed": weight, "weight_scale": scale.to(x.dtype)}
    tensors["weight_shape"] = torch.tensor([rows, columns])
    if zero_point is not None:
        tensors["weight_zero_point"] = pack_bits(zero_point.T.contiguous(), bits).T.contiguous()
    if bias is not None:
        tensors["bias"] = bias
    layer.load_from_tensors(tensors)
    layer.transform()
    layer(x)  # compiles at the first call
    return lambda: layer(x)


def _humming_takes(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> bool:
    columns, rows = x.shape[-1], weight.shape[0]
    half = x.dtype in (torch.float16, torch.bfloat16)
    return (
        half and rows % 128 == 0 and columns % 128 == 0 and (scale.shape[1] == 1 or columns % group_size == 0)
    )


def register(operator: Operator) -> None:
    """Add the peers to the operator."""
    operator.peer(
        "torch.nn.functional.linear bf16",
        devices=("cpu", "cuda"),
        make=_linear(torch.bfloat16),
        tolerance=_BF16_TOLERANCE,
    )
    operator.peer(
        "torch.nn.functional.linear fp16",
        devices=("cuda",),
        make=_linear(torch.float16),
        tolerance=_BF16_TOLERANCE,
    )
    operator.peer(
        "torch int4 (tinygemm), 4.25 bits",  # with groups of 128
        devices=("cpu", "cuda"),
        make=_tinygemm,
        supports=_tinygemm_takes,
        tolerance=_BF16_TOLERANCE,
    )
    for _level, _kind in ((0, "float32"), (4, "int8")):
        operator.peer(
            f"onnxruntime MatMulNBits {_kind}",
            devices=("cpu",),
            make=onnxruntime(_level),
            missing=requires("onnxruntime"),
            supports=onnxruntime_takes,
            tolerance=_BF16_TOLERANCE,
        )
    operator.peer(
        "gemlite",
        devices=("cuda",),
        make=_gemlite,
        missing=requires("gemlite"),
        supports=_gemlite_takes,
        tolerance=_BF16_TOLERANCE,
    )
    operator.peer(
        "humming",
        devices=("cuda",),
        make=_humming,
        missing=requires("humming"),
        supports=_humming_takes,
        tolerance=_BF16_TOLERANCE,
    )

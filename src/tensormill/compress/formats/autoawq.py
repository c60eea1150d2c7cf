"""The `gemm` checkpoint format of AutoAWQ: `quant_method: "awq"`, `version: "gemm"`, 4 bits.

A linear `name` with weight [N, K] and G groups is stored as

| tensor | shape, dtype | content |
|---|---|---|
| `name.qweight` | [K, N/8] int32 | eight codes of a column of the weight in a word |
| `name.qzeros` | [G, N/8] int32 | zero points, in the same order |
| `name.scales` | [G, N] float16 | `weight = (code - zero_point) * scale` |
| `name.bias` | [N] float | if there is one |

Nibble i of a word, from the lowest, holds output feature `ORDER[i]` of its eight. The order comes from the
kernels: a mask takes nibbles 0 and 4, which are neighbouring outputs, into the halves of a 32-bit word.

A symmetric layer has zero points of 8. The configuration lists what is left alone in
`modules_to_not_convert`, which AutoAWQ matches as parts of names.

Read against AutoAWQ 0.2.9 (`WQLinear_GEMM`, `packing_utils`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from tensormill.compress.formats.checkpoint_format import (
    Layer,
    Scheme,
    compressed_linears,
    in_activation_order,
    uncompressed,
)
from tensormill.compress.formats.uniform import (
    UniformFormat,
    check_multiple,
    full_zero_point,
    matrix_shape,
    parse_number,
)
from tensormill.errors import CheckpointError, ModelError
from tensormill.ops.bit_packing import pack_bits, unpack_bits

if TYPE_CHECKING:
    from tensormill.ops.linear_wna16.module import LinearWNA16

#: Output feature, of eight, that each nibble of a word holds.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(ORDER.index(feature) for feature in range(8))


class AutoAWQFormat(UniformFormat):
    """See the module; as a `CheckpointFormat`."""

    name = "awq"
    method = "awq"
    bits: ClassVar[tuple[int, ...]] = (4,)

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        words, groups = layer.rows // 8, layer.groups()
        return {
            "qweight": (layer.columns, words),
            "qzeros": (groups, words),
            "scales": (groups, layer.rows),
        }

    def check_size(self, name: str, layer: Layer) -> None:
        check_multiple(name, layer, self.name, 8, 1)

    def check_layers(self, layers: Mapping[str, Layer], model: nn.Module) -> None:
        super().check_layers(layers, model)
        output = output_layer(model)
        if output in layers:
            raise ModelError(
                f"{output} is the output layer, which readers of the format awq expect uncompressed; skip it, "
                "or save as compressed-tensors"
            )

    def pack_linear(self, module: LinearWNA16, name: str) -> dict[str, Tensor]:
        self._refuse_order(name, module)
        return super().pack_linear(module, name)

    def pack_weight(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int
    ) -> dict[str, Tensor]:
        layer = Layer(Scheme(bits, group_size, zero_point is None), *codes.shape)
        self.check_layers({"weight": layer}, nn.Module())
        zero = full_zero_point(zero_point, scale, bits)
        return {
            "qweight": _pack_columns(codes.T),
            "qzeros": _pack_columns(zero.T),
            "scales": scale.T.contiguous(),
        }

    def unpack_weight(
        self, tensors: Mapping[str, Tensor], bits: int, group_size: int, name: str = "weight"
    ) -> tuple[Tensor, Tensor, Tensor]:
        columns, words = matrix_shape(tensors, "qweight", name)
        self.layer_of(tensors, bits, group_size, name, 8 * words, columns)
        codes = _unpack_columns(tensors["qweight"]).T.contiguous()
        zero = _unpack_columns(tensors["qzeros"]).T.contiguous()
        return codes, tensors["scales"].T.contiguous(), zero

    def quantization_config(self, model: nn.Module) -> dict[str, Any]:
        scheme = self.model_scheme(model)
        for name, module in compressed_linears(model).items():
            self._refuse_order(name, module)
        left = uncompressed(model)
        for skipped in left:
            for name in compressed_linears(model):
                if skipped in name:
                    raise ModelError(
                        f"{skipped} is left uncompressed and {name}, whose name contains it, is not; the "
                        "format awq can't tell them apart, save as compressed-tensors"
                    )
        return {
            "quant_method": self.method,
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            # True for symmetric models too: their zero points are in the file, and kernels read them.
            "zero_point": True,
            "modules_to_not_convert": left or None,
        }

    def _refuse_order(self, name: str, module: nn.Module) -> None:
        if in_activation_order(module):
            raise ModelError(
                f"{name} has groups in activation order, which {self.name} checkpoints can't hold; save as gptq, "
                "gptq_v2 or compressed-tensors"
            )

    def parse_config(self, config: Mapping[str, Any]) -> Scheme:
        if config.get("quant_method") != self.method:
            raise CheckpointError(
                f"the checkpoint is quantized with {config.get('quant_method')!r}, expected {self.method!r}"
            )
        version = next((config[key] for key in ("version", "format") if config.get(key) is not None), "gemm")
        if str(version).lower() != "gemm" or config.get("backend") == "llm-awq":
            found = version if str(version).lower() != "gemm" else "llm-awq"
            raise CheckpointError(f"the checkpoint has the awq version {found!r}, expected 'gemm'")
        bits = parse_number(config, ("bits", "w_bit"), self.bits)
        return Scheme(
            bits,
            parse_number(config, ("group_size", "q_group_size"), None),
            config.get("zero_point") is False,
        )


def output_layer(model: nn.Module) -> str | None:
    """Name of the layer that gives a model's logits, None if it has none."""
    find = getattr(model, "get_output_embeddings", None)
    output = find() if callable(find) else None
    return next((name for name, module in model.named_modules() if module is output), None)


def _pack_columns(values: Tensor) -> Tensor:
    """(R, N) uint8 below 16 -> (R, N/8) int32."""
    eights = values.reshape(values.shape[0], -1, 8)[..., list(ORDER)]
    return pack_bits(eights.flatten(1), 4)


def _unpack_columns(words: Tensor) -> Tensor:
    """(R, N/8) int32 -> (R, N) uint8."""
    nibbles = unpack_bits(words.contiguous(), 4, 8 * words.shape[1])
    return nibbles.view(words.shape[0], -1, 8)[..., list(_INVERSE)].flatten(1)


AUTOAWQ = AutoAWQFormat()

__all__ = ["AUTOAWQ", "ORDER", "AutoAWQFormat", "output_layer"]

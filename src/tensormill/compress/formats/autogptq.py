"""The GPTQ checkpoint formats of AutoGPTQ and GPTQModel: `quant_method: "gptq"`, 2, 3, 4 or 8 bits.

A linear `name` with weight [N, K], codes of b bits and G groups is stored as

| tensor | shape, dtype | content |
|---|---|---|
| `name.qweight` | [K*b/32, N] int32 | codes along K, dense, lowest bit first |
| `name.qzeros` | [G, N*b/32] int32 | zero points along N, less 1 in version 1 |
| `name.scales` | [G, N] float16 | `weight = (code - zero_point) * scale` |
| `name.g_idx` | [K] int32 | group of each column |
| `name.bias` | [N] float | if there is one |

Three-bit codes straddle words, 32 in three. A symmetric layer has zero points of `2^(b-1)`.

Version 1 (`checkpoint_format: "gptq"`, the one without that key too) subtracts 1 from each zero point, within
its own b bits: 0 becomes all ones. That is how AutoGPTQ's torch code reads 2, 4 and 8 bits. Others read these
fields as `2^b`, or subtract and add word by word with borrows into the next field (GPTQModel), so a zero point
of 0 in version 1 isn't portable: writing and reading one warns. Version 2 (`"gptq_v2"`) stores zero points as
they are.

Activation order (`desc_act`) shows in `g_idx` alone. Columns `k // group_size` are the plain order whatever the
configuration claims; another order would need the inputs permuted, and is refused.

Read against AutoGPTQ 0.7.1 (`qlinear_cuda_old`) and GPTQModel 7.7.0 (`utils/model.py`, `model_dequant.py`).
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tensormill.compress.formats.autoawq import output_layer
from tensormill.compress.formats.checkpoint_format import (
    Layer,
    Scheme,
    Stored,
    compressed_linears,
    uncompressed,
)
from tensormill.compress.formats.uniform import (
    UniformFormat,
    check_multiple,
    codes_per_words,
    full_zero_point,
    matrix_shape,
    parse_number,
)
from tensormill.errors import CheckpointError
from tensormill.ops.bit_packing import pack_bits, unpack_bits

if TYPE_CHECKING:
    from tensormill.ops.linear_wna16.module import LinearWNA16

METHOD = "gptq"


class GPTQFormat(UniformFormat):
    """See the module; as a `CheckpointFormat`.

    Args:
        version: 1 or 2.
    """

    method = METHOD
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    parts: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, version: int) -> None:
        self.version = version
        self.name = "gptq" if version == 1 else f"gptq_v{version}"

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        bits, groups = layer.scheme.bits, layer.groups()
        return {
            "qweight": (layer.columns * bits // 32, layer.rows),
            "qzeros": (groups, layer.rows * bits // 32),
            "scales": (groups, layer.rows),
        }

    def check_size(self, name: str, layer: Layer) -> None:
        unit = codes_per_words(layer.scheme.bits)
        check_multiple(name, layer, self.name, unit, unit)

    def pack_weight(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int
    ) -> dict[str, Tensor]:
        layer = Layer(Scheme(bits, group_size, zero_point is None), *codes.shape)
        self.check_layers({"weight": layer}, nn.Module())
        return self._tensors(pack_bits(codes, bits), scale, zero_point, layer)

    def unpack_weight(
        self, tensors: Mapping[str, Tensor], bits: int, group_size: int, name: str = "weight"
    ) -> tuple[Tensor, Tensor, Tensor]:
        scheme = Scheme(bits, group_size, False)
        packed, columns, scale, zero = self.unpack_words(tensors, scheme, name)
        return unpack_bits(packed, bits, columns), scale, zero

    def pack_module(self, module: LinearWNA16, scale: Tensor, group_size: int) -> dict[str, Tensor]:
        scheme = Scheme(module.bits, group_size, module.symmetric)
        layer = Layer(scheme, module.out_features, module.in_features)
        return self._tensors(module.weight_packed, scale, module.weight_zero_point, layer)

    def unpack_words(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, name: str
    ) -> tuple[Tensor, int, Tensor, Tensor]:
        bits = scheme.bits
        words, rows = matrix_shape(tensors, "qweight", name)
        layer = self.layer_of(tensors, bits, scheme.group_size, name, rows, words * 32 // bits)
        self._check_order(tensors.get("g_idx"), layer, name)
        zero = unpack_bits(tensors["qzeros"].contiguous(), bits, rows).T.contiguous()
        if self.version == 1:
            if bool((zero == (1 << bits) - 1).any()):
                warnings.warn(
                    "the checkpoint has zero points of all ones in the format gptq, which are read as 0; "
                    "writers differ there, compare the model with its original",
                    stacklevel=2,
                )
            zero = _plus_one(zero, bits)
        packed = tensors["qweight"].T.contiguous()
        return packed, layer.columns, tensors["scales"].T.contiguous(), zero

    def _tensors(
        self, packed: Tensor, scale: Tensor, zero_point: Tensor | None, layer: Layer
    ) -> dict[str, Tensor]:
        """A layer's tensors; `packed` is (N, K*b/32) int32, whose rows are this format's columns."""
        bits = layer.scheme.bits
        zero = full_zero_point(zero_point, scale, bits)
        if self.version == 1:
            if bool((zero == 0).any()):
                # Without the layer's name, so that it is shown once and not for every layer.
                warnings.warn(
                    "zero points of 0 are stored as all ones in the format gptq, which other readers take for "
                    "another number; the format gptq_v2 has no such gap",
                    stacklevel=2,
                )
            zero = _minus_one(zero, bits)
        return {
            "qweight": packed.detach().T.contiguous(),
            "qzeros": pack_bits(zero.T.contiguous(), bits),
            "scales": scale.T.contiguous(),
            "g_idx": plain_groups(layer.columns, layer.scheme.group_size).to(packed.device),
        }

    def empty_tensors(
        self,
        name: str,
        linear: nn.Linear,
        scheme: Scheme,
        tensors: Mapping[str, Stored],
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        empty = super().empty_tensors(name, linear, scheme, tensors, dtype)
        order = tensors.get(f"{name}.g_idx")
        if order is not None:
            empty["g_idx"] = torch.empty(order.shape, dtype=torch.int32, device="meta")
        return empty

    def quantization_config(self, model: nn.Module) -> dict[str, Any]:
        scheme = self.model_scheme(model)
        output = output_layer(model)
        left = [name for name in uncompressed(model) if name != output]
        config: dict[str, Any] = {
            "quant_method": self.method,
            "checkpoint_format": self.name,
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "sym": scheme.symmetric,
            "desc_act": False,
            "lm_head": output in compressed_linears(model),
            "meta": {"quantizer": [f"tensormill:{importlib.import_module('tensormill').__version__}"]},
        }
        if left:
            # GPTQModel's way to leave a layer alone; the format itself has none.
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in left}
        return config

    def parse_config(self, config: Mapping[str, Any]) -> Scheme:
        if config.get("quant_method") != self.method:
            raise CheckpointError(
                f"the checkpoint is quantized with {config.get('quant_method')!r}, expected {self.method!r}"
            )
        if version_of(config) is not self:
            raise CheckpointError(
                f"the checkpoint has the format {version_of(config).name!r}, expected {self.name!r}"
            )
        if config.get("pack_dtype") not in (None, "int32", "torch.int32"):
            raise CheckpointError(
                f"the checkpoint is packed in words of {config['pack_dtype']!r}, expected int32"
            )
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise CheckpointError(f"quantization_config has dynamic={dynamic!r}, expected rules by pattern")
        for pattern, rule in dynamic.items():
            if not str(pattern).startswith("-:") and rule:
                raise CheckpointError(
                    f"quantization_config has its own settings for {pattern!r}, expected the same for all layers"
                )
        bits = parse_number(config, ("bits",), self.bits)
        return Scheme(bits, parse_number(config, ("group_size",), None), bool(config.get("sym", True)))

    def _check_order(self, order: Tensor | None, layer: Layer, name: str) -> None:
        if order is None or order.numel() == 0:
            return
        if tuple(order.shape) != (layer.columns,):
            raise CheckpointError(
                f"{name}.g_idx has shape {tuple(order.shape)}, expected {(layer.columns,)}; the file is damaged "
                "or config.json belongs to another checkpoint"
            )
        plain = plain_groups(layer.columns, layer.scheme.group_size).to(order.device)
        if not torch.equal(order.to(torch.int32), plain):
            raise CheckpointError(
                f"{name}.g_idx orders columns by activation (desc_act), expected groups of consecutive columns; "
                "quantize the model with desc_act=False"
            )


def plain_groups(columns: int, group_size: int) -> Tensor:
    """The group of each column, (K,) int32, where groups are of consecutive columns.

    >>> plain_groups(4, 2).tolist()
    [0, 0, 1, 1]
    """
    size = columns if group_size == -1 else group_size
    return torch.div(torch.arange(columns, dtype=torch.int32), size, rounding_mode="floor")


def version_of(config: Mapping[str, Any]) -> GPTQFormat:
    """The version that a `quantization_config` of this method means.

    Raises:
        CheckpointError: another arrangement, such as Marlin's.
    """
    found = next(
        (config[key] for key in ("checkpoint_format", "format") if config.get(key) is not None), "gptq"
    )
    if config.get("is_marlin_format"):
        found = "marlin"
    for version in (GPTQ_V1, GPTQ_V2):
        if version.name == str(found).lower():
            return version
    raise CheckpointError(
        f"the checkpoint has the gptq format {found!r}, expected {GPTQ_V1.name!r} or {GPTQ_V2.name!r}"
    )


def _minus_one(zero: Tensor, bits: int) -> Tensor:
    """Zero points as version 1 stores them: 0 wraps to all ones of its own bits."""
    return (zero - 1) & ((1 << bits) - 1)  # uint8 wraps at 256, a multiple of 2^bits


def _plus_one(stored: Tensor, bits: int) -> Tensor:
    return (stored + 1) & ((1 << bits) - 1)


GPTQ_V1 = GPTQFormat(1)
GPTQ_V2 = GPTQFormat(2)

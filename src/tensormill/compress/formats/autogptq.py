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

Activation order (`desc_act`) shows in `g_idx`: columns `k // group_size` are the plain order whatever the
configuration claims, and any other with equally many columns in each group makes an `ActivationOrderLinear`. A
configuration that claims it needs a `g_idx` in layers of several groups.

Layers with a width or group size of their own are GPTQModel's `dynamic`: rules by pattern, `-:` for layers left
alone, the others for layers with other settings. The first that matches the start of a name counts.

Read against AutoGPTQ 0.7.1 (`qlinear_cuda_old`) and GPTQModel 7.7.0 (`utils/model.py`, `model_dequant.py`,
`quantization/config.py`).
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tensormill.compress.formats.autoawq import output_layer
from tensormill.compress.formats.checkpoint_format import (
    Layer,
    Scheme,
    Stored,
    compressed_linears,
    in_activation_order,
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

#: Settings of GPTQModel with which a layer computes more than its packed weight. Of the many others, those that
#: aren't read here say how the weights were found.
_MORE_THAN_WEIGHTS = ("activation", "adapter")


@dataclass(frozen=True)
class GPTQConfig:
    """A `quantization_config`: the scheme of most layers, and (pattern, scheme) of those with one of their own."""

    scheme: Scheme
    rules: tuple[tuple[re.Pattern[str], Scheme], ...] = ()

    def scheme_of(self, name: str) -> Scheme:
        """The scheme of a layer."""
        return next((scheme for pattern, scheme in self.rules if pattern.match(name)), self.scheme)


class GPTQFormat(UniformFormat):
    """See the module; as a `CheckpointFormat`.

    Args:
        version: 1 or 2.
    """

    method = METHOD
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    mixed: ClassVar[bool] = True
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
        if self._order(tensors, scheme, columns, name) is not None:
            raise CheckpointError(
                f"{name}.g_idx orders columns by activation (desc_act), expected groups of consecutive columns; "
                "unpack_linear reads it"
            )
        return unpack_bits(packed, bits, columns), scale, zero

    def unpack_linear(self, tensors: Mapping[str, Tensor], scheme: Scheme, name: str) -> LinearWNA16:
        linear = super().unpack_linear(tensors, scheme, name)
        order = self._order(tensors, scheme, linear.in_features, name)
        if order is None:
            return linear
        from tensormill.compress.formats.activation_order import sort_columns

        return sort_columns(linear, order)

    def pack_module(self, module: LinearWNA16, scale: Tensor, group_size: int) -> dict[str, Tensor]:
        scheme = Scheme(module.bits, group_size, module.symmetric)
        layer = Layer(scheme, module.out_features, module.in_features)
        if not in_activation_order(module):
            return self._tensors(module.weight_packed, scale, module.weight_zero_point, layer)
        from tensormill.compress.formats.activation_order import ActivationOrderLinear

        assert isinstance(module, ActivationOrderLinear)
        packed = module.packed_in_input_order()
        tensors = self._tensors(packed, scale, module.weight_zero_point, layer)
        return {**tensors, "g_idx": module.group_index()}

    def unpack_words(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, name: str
    ) -> tuple[Tensor, int, Tensor, Tensor]:
        bits = scheme.bits
        words, rows = matrix_shape(tensors, "qweight", name)
        layer = self.layer_of(tensors, bits, scheme.group_size, name, rows, words * 32 // bits)
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
        self._check_index(name, scheme, linear.in_features, None if order is None else order.shape)
        if order is not None:
            if order.dtype not in ("I32", "I64"):
                raise CheckpointError(f"{name}.g_idx is {order.dtype}, expected one of ['I32', 'I64']")
            empty["g_idx"] = torch.empty(order.shape, dtype=torch.int32, device="meta")
        return empty

    def quantization_config(self, model: nn.Module) -> dict[str, Any]:
        layers, compressed = self.model_layers(model), compressed_linears(model)
        (bits, group_size), others = _settings(layers)
        output = output_layer(model)
        left = [name for name in uncompressed(model) if name != output]
        config: dict[str, Any] = {
            "quant_method": self.method,
            "checkpoint_format": self.name,
            "bits": bits,
            "group_size": group_size,
            "sym": all(layer.scheme.symmetric for layer in layers.values()),
            "desc_act": any(map(in_activation_order, compressed.values())),
            "lm_head": output in compressed,
            "meta": {"quantizer": [f"tensormill:{importlib.import_module('tensormill').__version__}"]},
        }
        # GPTQModel's way to treat a layer in its own way; the format itself has none.
        rules: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in left}
        for name, (own_bits, own_size) in others.items():
            rules[f"+:^{re.escape(name)}$"] = {"bits": own_bits, "group_size": own_size}
        if rules:
            config["dynamic"] = rules
        return config

    def scheme_of(self, name: str, config: GPTQConfig) -> Scheme:
        return config.scheme_of(name)

    def parse_config(self, config: Mapping[str, Any]) -> GPTQConfig:
        if config.get("quant_method") != self.method:
            raise CheckpointError(
                f"the checkpoint is quantized with {config.get('quant_method')!r}, expected {self.method!r}"
            )
        if version_of(config) is not self:
            raise CheckpointError(
                f"the checkpoint has the format {version_of(config).name!r}, expected {self.name!r}"
            )
        _check_weights_only(config, "the checkpoint")
        scheme = self._parse_scheme(config)
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise CheckpointError(f"quantization_config has dynamic={dynamic!r}, expected rules by pattern")
        # A layer that a rule leaves alone has no packed weight in the file, which is what counts.
        rules = [(key, rule) for key, rule in dynamic.items() if not str(key).startswith("-:")]
        return GPTQConfig(scheme, tuple(self._parse_rule(str(key), rule, scheme) for key, rule in rules))

    def _parse_rule(self, key: str, rule: Any, scheme: Scheme) -> tuple[re.Pattern[str], Scheme]:
        where = f"the rule {key!r} of quantization_config"
        try:
            pattern = re.compile(key.removeprefix("+:"))
        except re.error as error:
            raise CheckpointError(f"{where} is no pattern: {error}") from error
        if not isinstance(rule, Mapping):
            raise CheckpointError(f"{where} is {rule!r}, expected settings by name")
        _check_weights_only(rule, where)
        try:
            return pattern, self._parse_scheme(
                {
                    "bits": scheme.bits,
                    "group_size": scheme.group_size,
                    "sym": scheme.symmetric,
                    "desc_act": scheme.ordered,
                    **rule,
                }
            )
        except CheckpointError as error:
            raise CheckpointError(f"in {where}, {error}") from None

    def _parse_scheme(self, settings: Mapping[str, Any]) -> Scheme:
        settings = {"quant_method": self.method, **settings}
        for flag in ("sym", "desc_act"):
            if not isinstance(settings.get(flag) or False, bool):
                raise CheckpointError(
                    f"the checkpoint is quantized with {self.method!r} and {flag}={settings[flag]!r}, expected "
                    "true or false"
                )
        return Scheme(
            parse_number(settings, ("bits",), self.bits),
            parse_number(settings, ("group_size",), None),
            bool(settings.get("sym", True)),
            bool(settings.get("desc_act", False)),
        )

    def _order(self, tensors: Mapping[str, Tensor], scheme: Scheme, columns: int, name: str) -> Tensor | None:
        """The input features sorted by group, or None if they are."""
        index = tensors.get("g_idx")
        self._check_index(name, scheme, columns, None if index is None else index.shape)
        if index is None or index.numel() == 0:
            return None
        from tensormill.compress.formats.activation_order import input_order_of

        return input_order_of(index, scheme.group_size, f"{name}.g_idx")

    def _check_index(self, name: str, scheme: Scheme, columns: int, shape: Sequence[int] | None) -> None:
        if shape is None or 0 in shape:
            several = scheme.group_size not in (-1, columns)
            if several and scheme.ordered:
                raise CheckpointError(
                    f"{name} has no g_idx, which says how config.json's desc_act ordered its columns; the "
                    "checkpoint is incomplete, write or download it again"
                )
        elif tuple(shape) != (columns,):
            raise CheckpointError(
                f"{name}.g_idx has shape {tuple(shape)}, expected {(columns,)}; the file is damaged or "
                "config.json belongs to another checkpoint"
            )


def plain_groups(columns: int, group_size: int) -> Tensor:
    """The group of each column, (K,) int32, where groups are of consecutive columns.

    >>> plain_groups(4, 2).tolist()
    [0, 0, 1, 1]
    """
    size = columns if group_size == -1 else group_size
    return torch.div(torch.arange(columns, dtype=torch.int32), size, rounding_mode="floor")


def _settings(layers: Mapping[str, Layer]) -> tuple[tuple[int, int], dict[str, tuple[int, int]]]:
    """Bits and group size that most weights have, and those of the layers that have others."""
    exact = {
        name: (layer.scheme.bits, -1 if layer.groups() == 1 else layer.scheme.group_size)
        for name, layer in layers.items()
    }
    # A row of one group is also a group of the row's size.
    fits = {
        name: {exact[name], (layer.scheme.bits, layer.columns)} if layer.groups() == 1 else {exact[name]}
        for name, layer in layers.items()
    }
    weights: Counter[tuple[int, int]] = Counter()
    for name, layer in layers.items():
        for settings in fits[name] & set(exact.values()):
            weights[settings] += layer.rows * layer.columns
    most = max(weights, key=lambda settings: (weights[settings], settings[1]))
    return most, {name: own for name, own in exact.items() if most not in fits[name]}


def _check_weights_only(settings: Mapping[str, Any], what: str) -> None:
    if settings.get("pack_dtype") not in (None, "int32", "torch.int32"):
        raise CheckpointError(f"{what} has words of {settings['pack_dtype']!r}, expected int32")
    for more in _MORE_THAN_WEIGHTS:
        if settings.get(more):
            raise CheckpointError(f"{what} has {more}={settings[more]!r}, expected packed weights alone")


def version_of(config: Mapping[str, Any]) -> GPTQFormat:
    """The version that a `quantization_config` of this method means.

    Raises:
        CheckpointError: another arrangement, such as Marlin's, or two at once.
    """
    named = [config[key] for key in ("checkpoint_format", "format") if config.get(key) is not None]
    found = named[0] if named else "gptq"
    if len({str(one).lower() for one in named}) > 1:
        raise CheckpointError(
            f"the checkpoint has the checkpoint_format {named[0]!r} and the format {named[1]!r}, expected one of "
            "them; zero points differ by 1 between the two"
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

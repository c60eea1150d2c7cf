"""The `pack-quantized` checkpoint format of compressed-tensors: tensor names, packing, JSON configuration.

A compressed linear `name` with weight [N, K], codes of b bits and G groups is stored as

| tensor | shape, dtype | content |
|---|---|---|
| `name.weight_packed` | [N, ceil(K*b/32)] int32 | unsigned codes along K, dense, lowest bit first |
| `name.weight_scale` | [N, G] float | `weight = (code - zero_point) * scale` |
| `name.weight_zero_point` | [ceil(N*b/32), G] int32 | if asymmetric: unsigned, packed along N |
| `name.weight_shape` | [2] int64 | N, K |
| `name.weight_g_idx` | [K] int32 | group of each column, if they are in activation order (`actorder: "group"`) |
| `name.bias` | [N] float | if there is one |

compressed-tensors itself holds codes and zero points as signed integers and adds `2^(b-1)` when it packs, so
its packed words are the unsigned codes used here; a symmetric layer has the zero point `2^(b-1)` and stores
none. Releases before 0.19 packed 3, 5, 6 and 7 bits with gaps (`tensormill.ops.bit_packing`, layout
"padded"). Nothing in the file says which: readers decide by the packed width.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensormill.compress.experts import expert_lists
from tensormill.compress.formats.checkpoint_format import (
    FLOAT_DTYPES,
    Layer,
    Scheme,
    Stored,
    compressed_linears,
    in_activation_order,
    linear_class,
    packed_state_dict,
    uncompressed,
)
from tensormill.compress.plain_linears import as_linear, subclassed
from tensormill.errors import CheckpointError, ModelError
from tensormill.ops.bit_packing import (
    Layout,
    pack_bits,
    packed_layout,
    packed_width,
    unpack_bits,
    unpack_bits_padded,
)

if TYPE_CHECKING:
    from tensormill.compress.formats.quantization import QuantizedWeight
    from tensormill.ops.linear_wna16.module import LinearWNA16

FORMAT = "pack-quantized"
METHOD = "compressed-tensors"

#: Widths that are read as low-bit linears; a checkpoint with another one is left to transformers.
SUPPORTED_BITS = tuple(range(2, 9))


@dataclass(frozen=True)
class PackedScheme(Scheme):
    """A scheme that this format writes as one of its `config_groups`."""

    def to_config(self, targets: list[str]) -> dict[str, Any]:
        """One entry of `config_groups`, for the modules that `targets` names."""
        return {
            "targets": targets,
            "weights": {
                "num_bits": self.bits,
                "type": "int",
                "symmetric": self.symmetric,
                "strategy": "channel" if self.group_size == -1 else "group",
                "group_size": None if self.group_size == -1 else self.group_size,
                "dynamic": False,
                **({"actorder": "group"} if self.ordered else {}),
            },
            "input_activations": None,
            "output_activations": None,
        }


@dataclass(frozen=True)
class PackedConfig:
    """A `quantization_config` that can be run here: (targets, scheme) in order, and what they leave out."""

    groups: tuple[tuple[tuple[str, ...], PackedScheme], ...]
    ignore: tuple[str, ...]

    @property
    def schemes(self) -> tuple[PackedScheme, ...]:
        """The scheme of each group."""
        return tuple(scheme for _, scheme in self.groups)

    def scheme_of(self, name: str, module: nn.Module) -> PackedScheme | None:
        """The scheme of a module, or None if it stays as it is. A name beats a pattern, a pattern a class."""
        linear = as_linear(module)
        if linear is None or any(_matches(name, linear, target) for target in self.ignore):
            return None
        matches = [
            (_specificity(name, target), scheme)
            for targets, scheme in self.groups
            for target in targets
            if _matches(name, linear, target)
        ]
        return max(matches, key=lambda match: match[0])[1] if matches else None


def scheme_of_linear(name: str, module: LinearWNA16) -> PackedScheme:
    """The scheme of a low-bit linear, as far as the format can say it.

    Raises:
        ModelError: the group size doesn't divide the row; the format has no shorter last group.
    """
    group_size = _group_size(name, module.group_size, module.in_features)
    return PackedScheme(module.bits, group_size, module.symmetric, in_activation_order(module))


def _group_size(name: str, group_size: int, columns: int) -> int:
    # A group of exactly a row stays one: readers want one scheme for all parts of an expert.
    if group_size > columns:
        group_size = -1
    if group_size != -1 and columns % group_size:
        raise ModelError(
            f"{name} has {columns} input features in groups of {group_size} with a shorter last group, which "
            f"{FORMAT} checkpoints can't hold; use a group size that divides {columns}, or -1"
        )
    return group_size


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of a model whose compressed linears are `LinearWNA16`.

    With one scheme, the target is the class `Linear` and every linear left alone is named in `ignore`; with
    several, each group names its modules.

    With zero points, `dequantize` asks plain transformers to unpack while it loads. Its default route sizes
    packed zero points as if they were not packed and refuses them (transformers 5.23 with compressed-tensors
    0.18 to 0.20); other versions and other readers ignore the key. That route knows only one scheme, so a
    checkpoint that has several of them and zero points is for `tensormill.load`. So is one with experts that
    have zero points (a warning says it): transformers 5.17 and 5.23 stack experts from packed codes and scales
    alone. Symmetric experts are read by both. Falcon's layers are no `nn.Linear` of which that route computes
    the weight in time, so its checkpoints ask for unpacking too.

    Raises:
        ModelError: nothing is compressed, or a layer's groups can't be expressed.
    """
    layers: dict[PackedScheme, list[str]] = {}
    for name, module in compressed_linears(model).items():
        layers.setdefault(scheme_of_linear(name, module), []).append(name)
    if not layers:
        raise ModelError(
            "the model has no compressed linear, expected at least one; compress it before saving"
        )
    ignore = uncompressed(model)
    targets = [["Linear"]] if len(layers) == 1 else list(layers.values())
    config: dict[str, Any] = {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": scheme.to_config(names)
            for i, (scheme, names) in enumerate(zip(layers, targets, strict=True))
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    packed_names = compressed_linears(model).keys()
    if [scheme.symmetric for scheme in layers] == [False] or subclassed(model) & packed_names:
        config["dequantize"] = True
    if any(scheme.ordered for scheme in layers):
        warnings.warn(
            "layers in activation order (actorder 'group') can't be read by compressed-tensors from 0.20 on; "
            "tensormill.load reads them, and the formats gptq and gptq_v2 hold them for other readers",
            stacklevel=2,
        )
    merged = {path: each for path, each in expert_lists(model) if METHOD not in each.apart_in}
    experts = tuple(f"{path}." for path in merged)
    packed = {scheme for scheme, names in layers.items() for name in names if name.startswith(experts)}
    if packed and any(each.stacked for each in merged.values()):
        warnings.warn(
            f"plain transformers reads the experts of {type(model).__name__} from stacked tensors only and would "
            "take random numbers for those of this checkpoint; tensormill.load reads them",
            stacklevel=2,
        )
    elif not all(scheme.symmetric for scheme in packed):
        warnings.warn(
            "experts with zero points can't be read by plain transformers, which drops the zero points when it "
            "stacks experts; tensormill.load reads them, and symmetric=True writes none",
            stacklevel=2,
        )
    return config


def parse_config(config: Mapping[str, Any]) -> PackedConfig:
    """Reads a `quantization_config`.

    Raises:
        CheckpointError: another method or format, or a feature that the low-bit linear doesn't compute; the
            message names it.
    """
    method = config.get("quant_method")
    if method != METHOD:
        raise CheckpointError(f"the checkpoint is quantized with {method!r}, expected {METHOD!r}")
    for feature in ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"):
        if config.get(feature):
            raise CheckpointError(f"the checkpoint has a {feature}, expected weight-only {FORMAT}")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("quantization_config has no config_groups, expected at least one")
    parsed = []
    for group_name, group in groups.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise CheckpointError(f"{group_name} of quantization_config doesn't describe weights in full")
        found = group.get("format") or config.get("format")
        if found != FORMAT:
            raise CheckpointError(
                f"{group_name} of quantization_config has the format {found!r}, expected {FORMAT!r}"
            )
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise CheckpointError(
                f"{group_name} of quantization_config has targets {targets!r}, expected names"
            )
        parsed.append((tuple(targets), _parse_scheme(group_name, group)))
    return PackedConfig(tuple(parsed), tuple(config.get("ignore") or ()))


def _parse_scheme(group_name: str, group: Mapping[str, Any]) -> PackedScheme:
    weights = group["weights"]
    for part in ("input_activations", "output_activations"):
        if group.get(part):
            raise CheckpointError(
                f"{group_name} of quantization_config quantizes {part}, expected weights only"
            )
    bits, strategy, group_size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "group" if group_size and group_size > 0 else "channel" if group_size == -1 else "tensor"
    if weights.get("type", "int") != "int" or weights.get("dynamic"):
        raise CheckpointError(f"{group_name} of quantization_config is not static integer quantization")
    if bits not in SUPPORTED_BITS:
        raise CheckpointError(
            f"{group_name} of quantization_config has num_bits={bits!r}, expected {SUPPORTED_BITS}"
        )
    if strategy == "channel":
        group_size = -1
    elif strategy != "group" or not isinstance(group_size, int) or group_size < 1:
        raise CheckpointError(
            f"{group_name} of quantization_config has strategy {strategy!r} with group_size {group_size!r}, "
            "expected 'channel' or 'group' with a positive size"
        )
    # True and "dynamic" are older names. The other orders leave groups of consecutive columns.
    ordered = weights.get("actorder") in ("group", "dynamic", True)
    return PackedScheme(bits, group_size, bool(weights.get("symmetric", True)), ordered)


def pack_weight(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> dict[str, Tensor]:
    """The tensors of one layer, without its name.

    Args:
        codes: (N, K) uint8.
        scale: (N, G) float.
        zero_point: (N, G) uint8, or None if symmetric.
        bits: width of a code.
    """
    return _layer(pack_bits(codes, bits), scale, zero_point, bits, tuple(codes.shape))


def pack_quantized(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a quantized matrix, without the layer's name."""
    return pack_weight(weight.codes, weight.scale, weight.zero_point, weight.spec.bits)


def pack_linear(module: LinearWNA16) -> dict[str, Tensor]:
    """The tensors of a low-bit linear, without its name."""
    shape = (module.out_features, module.in_features)
    packed, more = module.weight_packed, {}
    if in_activation_order(module):
        from tensormill.compress.formats.activation_order import ActivationOrderLinear

        assert isinstance(module, ActivationOrderLinear)
        packed, more = module.packed_in_input_order(), {"weight_g_idx": module.group_index()}
    tensors = _layer(packed, module.weight_scale, module.weight_zero_point, module.bits, shape) | more
    if module.bias is not None:
        tensors["bias"] = module.bias.detach()
    return tensors


def _layer(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, shape: tuple[int, ...]
) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": packed.detach(),
        "weight_scale": scale.detach(),
        "weight_shape": torch.tensor(shape, dtype=torch.int64),
    }
    if zero_point is not None:
        tensors["weight_zero_point"] = pack_bits(zero_point.T, bits).T.contiguous()
    return tensors


def unpack_weight(
    tensors: Mapping[str, Tensor], scheme: PackedScheme, name: str = "weight"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (N, K) uint8, scale (N, G) float and zero point (N, G) uint8 or None, of one layer's tensors.

    Args:
        tensors: `weight_packed`, `weight_scale`, `weight_shape` and, if asymmetric, `weight_zero_point`.
        scheme: from the checkpoint's configuration.
        name: the layer's, for messages.

    Raises:
        CheckpointError: a tensor is missing, its shape contradicts the others or the scheme, or groups aren't of
            consecutive columns.
    """
    rows, columns, layout = _check_tensors(tensors, scheme, name)
    if _input_order(tensors, scheme, name) is not None:
        raise CheckpointError(
            f"{name}.weight_g_idx orders columns by activation (actorder), expected groups of consecutive columns; "
            "unpack_linear reads it"
        )
    unpack = unpack_bits if layout == "dense" else unpack_bits_padded
    codes = unpack(tensors["weight_packed"], scheme.bits, columns)
    zero_point = None
    if not scheme.symmetric:
        zero_point = _unpack_zero_point(tensors["weight_zero_point"], scheme.bits, rows, layout)
    return codes, tensors["weight_scale"], zero_point


def unpack_quantized(
    tensors: Mapping[str, Tensor], scheme: PackedScheme, name: str = "weight"
) -> QuantizedWeight:
    """`unpack_weight` as a `QuantizedWeight`."""
    from tensormill.compress.formats.quantization import QuantizedWeight, QuantSpec

    codes, scale, zero_point = unpack_weight(tensors, scheme, name)
    spec = QuantSpec(scheme.bits, scheme.group_size, scheme.symmetric, scale_dtype=scale.dtype)
    return QuantizedWeight(codes, scale, zero_point, spec)


def unpack_linear(tensors: Mapping[str, Tensor], scheme: PackedScheme, name: str = "weight") -> LinearWNA16:
    """`unpack_weight` as a low-bit linear, with the `bias` that `tensors` may hold."""
    packed, scale, zero_point = tensors["weight_packed"], tensors["weight_scale"], None
    rows, columns, layout = _check_tensors(tensors, scheme, name)
    if layout == "padded":
        packed = pack_bits(unpack_bits_padded(packed, scheme.bits, columns), scheme.bits)
    if not scheme.symmetric:
        zero_point = _unpack_zero_point(tensors["weight_zero_point"], scheme.bits, rows, layout)
    linear = linear_class().from_packed(
        packed,
        scale,
        zero_point,
        in_features=columns,
        bits=scheme.bits,
        group_size=scheme.group_size,
        bias=tensors.get("bias"),
    )
    order = _input_order(tensors, scheme, name)
    if order is None:
        return linear
    from tensormill.compress.formats.activation_order import sort_columns

    return sort_columns(linear, order)


def check_layer(
    name: str, scheme: PackedScheme, shape: Iterable[int], packed: tuple[int, ...], scale: tuple[int, ...]
) -> None:
    """Compares the shapes of one layer's tensors with each other and with the scheme.

    Raises:
        CheckpointError: they disagree.
    """
    shape = tuple(shape)
    if len(shape) != 2 or min(shape) < 1:
        raise CheckpointError(
            f"{name}.weight_shape is {shape}, expected two positive sizes; the file is damaged"
        )
    rows, columns = shape
    dense, padded = (packed_width(columns, scheme.bits, layout) for layout in ("dense", "padded"))
    if packed not in {(rows, dense), (rows, padded)}:
        raise CheckpointError(
            f"{name}.weight_packed has shape {packed}, expected {(rows, dense)} for a {rows} x {columns} "
            f"weight of {scheme.bits} bits; the file is damaged or config.json belongs to another checkpoint"
        )
    groups = 1 if scheme.group_size == -1 else -(-columns // scheme.group_size)
    if scale != (rows, groups):
        raise CheckpointError(
            f"{name}.weight_scale has shape {scale}, expected {(rows, groups)} for groups of "
            f"{scheme.group_size}; the file is damaged or config.json belongs to another checkpoint"
        )


def check_zero_point(
    name: str, scheme: PackedScheme, layout: Layout, unpacked: tuple[int, int], stored: tuple[int, ...]
) -> None:
    """Compares the shape of packed zero points with their unpacked (N, G).

    Raises:
        CheckpointError: they disagree.
    """
    expected = (packed_width(unpacked[0], scheme.bits, layout), unpacked[1])
    if stored != expected:
        raise CheckpointError(
            f"{name}.weight_zero_point has shape {stored}, expected {expected} for {unpacked[0]} rows of "
            f"{scheme.bits}-bit zero points; the file is damaged or config.json belongs to another checkpoint"
        )


def check_index(name: str, columns: int, stored: tuple[int, ...]) -> None:
    """Compares the shape of the groups of K columns with K.

    Raises:
        CheckpointError: they disagree.
    """
    if stored != (columns,):
        raise CheckpointError(
            f"{name}.weight_g_idx has shape {stored}, expected {(columns,)}; the file is damaged or config.json "
            "belongs to another checkpoint"
        )


def _check_tensors(tensors: Mapping[str, Tensor], scheme: PackedScheme, name: str) -> tuple[int, int, Layout]:
    """N, K and the packed layout of a complete and consistent layer."""
    needed = ["weight_packed", "weight_scale", "weight_shape"]
    needed += [] if scheme.symmetric else ["weight_zero_point"]
    needed += ["weight_g_idx"] if scheme.ordered else []
    for part in needed:
        if part not in tensors:
            raise CheckpointError(
                f"{name} has no {part}; the checkpoint is incomplete, write or download it again"
            )
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    shape = [int(size) for size in tensors["weight_shape"].tolist()]
    check_layer(name, scheme, shape, tuple(packed.shape), tuple(scale.shape))
    rows, columns = shape
    if scheme.ordered:
        check_index(name, columns, tuple(tensors["weight_g_idx"].shape))
    layout = packed_layout(packed.shape[1], scheme.bits, columns)
    if not scheme.symmetric:
        stored = tuple(tensors["weight_zero_point"].shape)
        check_zero_point(name, scheme, layout, (rows, scale.shape[1]), stored)
    return rows, columns, layout


def _input_order(tensors: Mapping[str, Tensor], scheme: PackedScheme, name: str) -> Tensor | None:
    """The input features sorted by group, or None if they are."""
    if not scheme.ordered:
        return None
    from tensormill.compress.formats.activation_order import input_order_of

    return input_order_of(tensors["weight_g_idx"], scheme.group_size, f"{name}.weight_g_idx")


def _unpack_zero_point(stored: Tensor, bits: int, rows: int, layout: Layout) -> Tensor:
    unpack = unpack_bits if layout == "dense" else unpack_bits_padded
    return unpack(stored.T.contiguous(), bits, rows).T.contiguous()


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors under their names on disk, in the model's order, compressed linears packed."""
    return packed_state_dict(model, lambda module, name: pack_linear(module), METHOD)


class CompressedTensorsFormat:
    """This module as a `CheckpointFormat`."""

    name = METHOD
    method = METHOD
    parts: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    scale_part = "weight_scale"
    scale_dtype: torch.dtype | None = None

    def check_schemes(self, schemes: Sequence[Scheme]) -> None:
        return None

    def check_layers(self, layers: Mapping[str, Layer], model: nn.Module) -> None:
        for name, layer in layers.items():
            _group_size(name, layer.scheme.group_size, layer.columns)

    def quantization_config(self, model: nn.Module) -> dict[str, Any]:
        return quantization_config(model)

    def parse_config(self, config: Mapping[str, Any]) -> PackedConfig:
        return parse_config(config)

    def check_stored(self, path: Path, tensors: Mapping[str, Stored], config: PackedConfig) -> None:
        for key, packed in tensors.items():
            if not key.endswith(".weight_packed"):
                continue
            name = key.removesuffix(".weight_packed")
            for part in ("weight_scale", "weight_shape"):
                if f"{name}.{part}" not in tensors:
                    raise CheckpointError(
                        f"{path} has no tensor {name}.{part}, which {key} needs; download it again"
                    )
            if len(packed.shape) != 2 or packed.dtype != "I32":
                raise CheckpointError(
                    f"{key} is {packed.dtype} of shape {packed.shape}, expected a matrix of I32"
                )
            if f"{name}.weight_zero_point" not in tensors and not any(s.symmetric for s in config.schemes):
                raise CheckpointError(f"{path} has no tensor {name}.weight_zero_point; download it again")
            if f"{name}.weight_g_idx" not in tensors and all(s.ordered for s in config.schemes):
                raise CheckpointError(f"{path} has no tensor {name}.weight_g_idx; download it again")

    def schemes(
        self, model: nn.Module, tensors: Mapping[str, Stored], config: PackedConfig
    ) -> dict[str, PackedScheme]:
        found = {name: config.scheme_of(name, module) for name, module in model.named_modules()}
        return {name: scheme for name, scheme in found.items() if scheme is not None}

    def empty_tensors(
        self,
        name: str,
        linear: nn.Linear,
        scheme: PackedScheme,
        tensors: Mapping[str, Stored],
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        rows, columns, bits = linear.out_features, linear.in_features, scheme.bits
        packed, scale = tensors.get(f"{name}.weight_packed"), tensors.get(f"{name}.weight_scale")
        width = packed_width(columns, bits)
        if packed is not None and len(packed.shape) == 2:
            width = packed.shape[-1] or width
        groups = 1 if scheme.group_size == -1 else -(-columns // scheme.group_size)
        check_layer(name, scheme, (rows, columns), (rows, width), (rows, groups))
        layout = packed_layout(width, bits, columns)
        if scale is not None:
            dtype = FLOAT_DTYPES.get(scale.dtype, dtype)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight_packed": ((rows, width), torch.int32),
            "weight_scale": ((rows, groups), dtype),
            "weight_shape": ((2,), torch.int64),
        }
        if not scheme.symmetric:
            shapes["weight_zero_point"] = ((packed_width(rows, bits, layout), groups), torch.int32)
        if scheme.ordered:
            index = tensors.get(f"{name}.weight_g_idx")
            check_index(name, columns, (columns,) if index is None else tuple(index.shape))
            shapes["weight_g_idx"] = ((columns,), torch.int32)
        # A checkpoint of another format may have given biases to an architecture that has none.
        bias = tensors.get(f"{name}.bias")
        if linear.bias is None and bias is not None:
            shapes["bias"] = ((rows,), FLOAT_DTYPES.get(bias.dtype, dtype))
        return {part: torch.empty(shape, dtype=kind, device="meta") for part, (shape, kind) in shapes.items()}

    def pack_linear(self, module: LinearWNA16, name: str) -> dict[str, Tensor]:
        return pack_linear(module)

    def unpack_linear(self, tensors: Mapping[str, Tensor], scheme: PackedScheme, name: str) -> LinearWNA16:
        return unpack_linear(tensors, scheme, name)


COMPRESSED_TENSORS = CompressedTensorsFormat()


def _matches(name: str, module: nn.Module, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target == name or any(parent.__name__ == target for parent in type(module).__mro__)


def _specificity(name: str, target: str) -> int:
    return 2 if target == name else 1 if target.startswith("re:") else 0

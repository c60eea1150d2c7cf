"""What AutoAWQ and GPTQ checkpoints share: one width and group size for the model, three tensors a layer.

| tensor | content |
|---|---|
| `name.qweight` | codes, int32 words |
| `name.qzeros` | zero points, int32 words, of symmetric layers too |
| `name.scales` | [G, N] float16 |

Zero points of `2^(bits-1)` throughout a layer are what a symmetric layer has: it is loaded as one.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tensormill.compress.formats.checkpoint_format import (
    FLOAT_DTYPES,
    Layer,
    Scheme,
    Stored,
    compressed_layers,
    linear_class,
)
from tensormill.compress.formats.float16_scales import exact_scales
from tensormill.compress.plain_linears import as_linear
from tensormill.errors import CheckpointError, ModelError
from tensormill.ops.bit_packing import pack_bits

if TYPE_CHECKING:
    from tensormill.ops.linear_wna16.module import LinearWNA16


class UniformFormat(ABC):
    """The part of `CheckpointFormat` that doesn't depend on the order of the codes."""

    name: str
    method: str
    #: Widths that the format has.
    bits: ClassVar[tuple[int, ...]]
    #: Whether the configuration can give layers a width and group size of their own.
    mixed: ClassVar[bool] = False
    parts: tuple[str, ...] = ("qweight", "qzeros", "scales")
    scale_part: str = "scales"
    scale_dtype: torch.dtype | None = torch.float16

    @abstractmethod
    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's required tensors."""

    @abstractmethod
    def pack_weight(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int
    ) -> dict[str, Tensor]:
        """The tensors of one layer, without its name.

        Args:
            codes: (N, K) uint8.
            scale: (N, G) float; kept in its dtype.
            zero_point: (N, G) uint8, or None for `2^(bits-1)` everywhere.
            bits: width of a code.
            group_size: columns that share a scale, or -1 for a whole row.

        Raises:
            ModelError: sizes that don't fill words, or a group size that doesn't divide K.
        """

    @abstractmethod
    def unpack_weight(
        self, tensors: Mapping[str, Tensor], bits: int, group_size: int, name: str = "weight"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (N, K) uint8, scale (N, G) and zero point (N, G) uint8: the inverse of `pack_weight`.

        Raises:
            CheckpointError: a tensor is missing, or its shape or dtype contradicts the others.
        """

    @abstractmethod
    def quantization_config(self, model: nn.Module) -> dict[str, Any]:
        """See `CheckpointFormat`."""

    @abstractmethod
    def parse_config(self, config: Mapping[str, Any]) -> Any:
        """See `CheckpointFormat`. A scheme's `symmetric` is what the configuration claims."""

    def scheme_of(self, name: str, config: Any) -> Scheme:
        """What a parsed configuration says of one layer."""
        scheme: Scheme = config
        return scheme

    @abstractmethod
    def check_size(self, name: str, layer: Layer) -> None:
        """Refuses, as `ModelError`, sizes that don't fill whole words."""

    def check_schemes(self, schemes: Sequence[Scheme]) -> None:
        for scheme in schemes:
            if scheme.bits not in self.bits:
                raise ModelError(
                    f"given {scheme.bits} bits for a checkpoint in the format {self.name}, expected "
                    f"{_one_of(self.bits)}; compressed-tensors holds 2 to 8"
                )
        widths = sorted({scheme.bits for scheme in schemes})
        if len(widths) > 1 and not self.mixed:
            raise ModelError(
                f"given layers of {' and '.join(map(str, widths))} bits, expected one width: checkpoints in "
                f"the format {self.name} have one for the whole model; save as compressed-tensors"
            )

    def check_layers(self, layers: Mapping[str, Layer], model: nn.Module) -> None:
        self.check_schemes([layer.scheme for layer in layers.values()])
        for together in [{name: layer} for name, layer in layers.items()] if self.mixed else [layers]:
            self.group_size(together)
        for name, layer in layers.items():
            self.check_size(name, layer)

    def group_size(self, layers: Mapping[str, Layer]) -> int:
        """The group size of all layers; a layer of one group fits if its row is one group or a whole row.

        Raises:
            ModelError: two layers differ, or a group is shorter than the others of its row.
        """
        found: dict[int, str] = {}
        for name, layer in layers.items():
            if layer.groups() > 1:
                if layer.columns % layer.scheme.group_size:
                    raise ModelError(
                        f"{name} has {layer.columns} input features in groups of {layer.scheme.group_size} "
                        f"with a shorter last group, which {self.name} checkpoints can't hold; use a group "
                        f"size that divides {layer.columns}, or -1"
                    )
                found[layer.scheme.group_size] = name
        if len(found) > 1:
            (a, first), (b, second) = list(found.items())[:2]
            raise ModelError(
                f"{first} has groups of {a} and {second} of {b}, expected one group size: {self.name} "
                "checkpoints have one for the whole model; save as compressed-tensors"
            )
        size = next(iter(found), -1)
        for name, layer in layers.items():
            if size != -1 and layer.groups() == 1 and layer.columns != size:
                raise ModelError(
                    f"{name} has one group of {layer.columns} and {found[size]} groups of {size}, expected one "
                    f"group size: {self.name} checkpoints have one for the whole model; save as "
                    "compressed-tensors"
                )
        return size

    def model_layers(self, model: nn.Module) -> dict[str, Layer]:
        """The compressed layers of a model.

        Raises:
            ModelError: there is none, or they can't be expressed.
        """
        layers = compressed_layers(model)
        if not layers:
            raise ModelError(
                "the model has no compressed linear, expected at least one; compress it before saving"
            )
        self.check_layers(layers, model)
        return layers

    def model_scheme(self, model: nn.Module) -> Scheme:
        """The one scheme of a compressed model, symmetric if every layer is; raises as `model_layers`."""
        layers = self.model_layers(model)
        symmetric = all(layer.scheme.symmetric for layer in layers.values())
        return Scheme(next(iter(layers.values())).scheme.bits, self.group_size(layers), symmetric)

    def check_stored(self, path: Path, tensors: Mapping[str, Stored], config: Any) -> None:
        # Not by "scales", which a model may have of its own.
        names = {key.rpartition(".")[0] for key in tensors if key.endswith((".qweight", ".qzeros"))}
        for name in sorted(names):
            for part in ("qweight", "qzeros", "scales"):
                stored = tensors.get(f"{name}.{part}")
                if stored is None:
                    raise CheckpointError(
                        f"{path} has no tensor {name}.{part}, which its other tensors need; download it again"
                    )
                known = tuple(FLOAT_DTYPES) if part == "scales" else ("I32",)
                if len(stored.shape) != 2 or stored.dtype not in known:
                    raise CheckpointError(
                        f"{name}.{part} is {stored.dtype} of shape {stored.shape}, expected a matrix of "
                        f"{_one_of(known)}"
                    )

    def schemes(self, model: nn.Module, tensors: Mapping[str, Stored], config: Any) -> dict[str, Scheme]:
        """The linears with a `qweight` in the files: readers differ in what the configuration skips."""
        packed = {key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")}
        if not packed:
            raise CheckpointError(
                f"the checkpoint has no qweight, expected the packed weights of the format {self.name} in "
                "safetensors files"
            )
        linears = [name for name, module in model.named_modules() if as_linear(module) is not None]
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        for name in sorted(packed.difference(linears)):
            if any(re.search(pattern, f"{name}.qweight") for pattern in ignored):
                continue
            raise CheckpointError(
                f"the checkpoint has the tensor {name}.qweight, but the model has no linear {name}; "
                "config.json belongs to another checkpoint"
            )
        return {name: self.scheme_of(name, config) for name in linears if name in packed}

    def empty_tensors(
        self,
        name: str,
        linear: nn.Linear,
        scheme: Scheme,
        tensors: Mapping[str, Stored],
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        layer = Layer(scheme, linear.out_features, linear.in_features)
        self._check_columns(name, layer)
        for part, shape in self.shapes(layer).items():
            stored = tensors.get(f"{name}.{part}")
            if stored is not None and stored.shape != shape:
                raise CheckpointError(self._wrong_shape(name, part, stored.shape, shape, layer))
        empty = {
            part: torch.empty(
                shape,
                dtype=_stored_float(tensors, f"{name}.{part}") if part == "scales" else torch.int32,
                device="meta",
            )
            for part, shape in self.shapes(layer).items()
        }
        # Some writers give every layer a bias, of zeros where the architecture has none.
        if linear.bias is None and f"{name}.bias" in tensors:
            empty["bias"] = torch.empty(layer.rows, dtype=dtype, device="meta")
        return empty

    def pack_linear(self, module: LinearWNA16, name: str) -> dict[str, Tensor]:
        layer = Layer(
            Scheme(module.bits, module.group_size, module.symmetric), module.out_features, module.in_features
        )
        self.check_size(name, layer)
        scale = exact_scales(module, name, self.name)
        size = -1 if layer.groups() == 1 else module.group_size
        tensors = self.pack_module(module, scale, size)
        if module.bias is not None:
            tensors["bias"] = module.bias.detach()
        return tensors

    def unpack_linear(self, tensors: Mapping[str, Tensor], scheme: Scheme, name: str) -> LinearWNA16:
        packed, columns, scale, zero = self.unpack_words(tensors, scheme, name)
        symmetric = bool((zero == 1 << (scheme.bits - 1)).all())
        return linear_class().from_packed(
            packed,
            scale,
            None if symmetric else zero,
            in_features=columns,
            bits=scheme.bits,
            group_size=scheme.group_size,
            bias=tensors.get("bias"),
        )

    def pack_module(self, module: LinearWNA16, scale: Tensor, group_size: int) -> dict[str, Tensor]:
        """`pack_weight` of a low-bit linear; a format with our order of codes overrides it."""
        return self.pack_weight(module.codes(), scale, module.weight_zero_point, module.bits, group_size)

    def unpack_words(
        self, tensors: Mapping[str, Tensor], scheme: Scheme, name: str
    ) -> tuple[Tensor, int, Tensor, Tensor]:
        """`unpack_weight` with codes packed (N, ceil(K*b/32)) as low-bit linears have them, and K."""
        codes, scale, zero = self.unpack_weight(tensors, scheme.bits, scheme.group_size, name)
        return pack_bits(codes, scheme.bits), codes.shape[1], scale, zero

    def layer_of(
        self, tensors: Mapping[str, Tensor], bits: int, group_size: int, name: str, rows: int, columns: int
    ) -> Layer:
        """The layer that complete and consistent tensors hold.

        Raises:
            CheckpointError: a tensor is missing, or its shape or dtype contradicts `rows` and `columns`.
        """
        layer = Layer(Scheme(bits, group_size, False), rows, columns)
        self._check_columns(name, layer)
        for part, shape in self.shapes(layer).items():
            if part not in tensors:
                raise CheckpointError(
                    f"{name} has no {part}; the checkpoint is incomplete, write or download it again"
                )
            if tuple(tensors[part].shape) != shape:
                raise CheckpointError(self._wrong_shape(name, part, tuple(tensors[part].shape), shape, layer))
            if part != "scales" and tensors[part].dtype != torch.int32:
                raise CheckpointError(f"{name}.{part} is {tensors[part].dtype}, expected torch.int32")
        return layer

    def _check_columns(self, name: str, layer: Layer) -> None:
        try:
            self.check_size(name, layer)
            self.group_size({name: layer})
        except ModelError as error:
            # The advice after the semicolon is for writers.
            reason = str(error).partition(";")[0]
            raise CheckpointError(
                f"config.json doesn't fit the weights: {reason}; the file is damaged or config.json belongs to "
                "another checkpoint"
            ) from None

    def _wrong_shape(
        self, name: str, part: str, found: tuple[int, ...], expected: tuple[int, ...], layer: Layer
    ) -> str:
        return (
            f"{name}.{part} has shape {found}, expected {expected} for a {layer.rows} x {layer.columns} weight "
            f"of {layer.scheme.bits} bits in groups of {layer.scheme.group_size}; the file is damaged or "
            "config.json belongs to another checkpoint"
        )


def full_zero_point(zero_point: Tensor | None, scale: Tensor, bits: int) -> Tensor:
    """The zero point (N, G) uint8, where None means `2^(bits-1)`."""
    if zero_point is not None:
        return zero_point
    return torch.full(scale.shape, 1 << (bits - 1), dtype=torch.uint8, device=scale.device)


def matrix_shape(tensors: Mapping[str, Tensor], part: str, name: str) -> tuple[int, int]:
    """Shape of a tensor that has to be there and to be a matrix.

    Raises:
        CheckpointError: it isn't.
    """
    if part not in tensors:
        raise CheckpointError(
            f"{name} has no {part}; the checkpoint is incomplete, write or download it again"
        )
    if tensors[part].dim() != 2:
        raise CheckpointError(
            f"{name}.{part} has shape {tuple(tensors[part].shape)}, expected a matrix; the file is damaged"
        )
    rows, columns = tensors[part].shape
    return rows, columns


def check_multiple(name: str, layer: Layer, format_name: str, rows: int, columns: int) -> None:
    """Refuses, as `ModelError`, a layer whose rows and columns aren't multiples of these."""
    for size, unit, what in (
        (layer.rows, rows, "output features"),
        (layer.columns, columns, "input features"),
    ):
        if size % unit or size < 1:
            raise ModelError(
                f"{name} has {size} {what}, expected a multiple of {unit} for {layer.scheme.bits} bits in the "
                f"format {format_name}; skip the layer, or save as compressed-tensors"
            )


def codes_per_words(bits: int) -> int:
    """The fewest codes that fill whole 32-bit words."""
    return 32 // math.gcd(32, bits)


def parse_number(config: Mapping[str, Any], keys: Sequence[str], allowed: Sequence[int] | None) -> int:
    """An integer of a configuration under one of several names.

    Raises:
        CheckpointError: it isn't there, or isn't one of `allowed` (None: positive, or -1).
    """
    value = next((config[key] for key in keys if config.get(key) is not None), None)
    number = value if isinstance(value, int) and not isinstance(value, bool) else 0
    if number in allowed if allowed is not None else number == -1 or number > 0:
        return number
    expected = "a positive integer or -1" if allowed is None else _one_of(allowed)
    raise CheckpointError(
        f"the checkpoint is quantized with {config.get('quant_method')!r} and {keys[0]}={value!r}, expected "
        f"{expected}"
    )


def _stored_float(tensors: Mapping[str, Stored], key: str) -> torch.dtype:
    stored = tensors.get(key)
    return FLOAT_DTYPES.get(stored.dtype, torch.float16) if stored is not None else torch.float16


def _one_of(values: Sequence[Any]) -> str:
    return str(values[0]) if len(values) == 1 else f"one of {list(values)}"

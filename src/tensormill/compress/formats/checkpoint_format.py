"""What a checkpoint format offers to whoever loads and saves models: one interface for all of them.

A format says how a low-bit linear lies on disk, tensor by tensor, and how `quantization_config` describes it.
`registry` lists the formats; nothing outside this package asks which one it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from tensormill.compress.experts import expert_lists, routers, stack_experts
from tensormill.compress.plain_linears import as_linear

if TYPE_CHECKING:
    from tensormill.ops.linear_wna16.module import LinearWNA16


@dataclass(frozen=True)
class Scheme:
    """How one linear's weight is quantized: `group_size` columns (-1: the whole row) share a scale.

    They are consecutive unless the layer is `ordered`: then its file has an index of each column's group.
    """

    bits: int
    group_size: int
    symmetric: bool
    ordered: bool = False


@dataclass(frozen=True)
class Layer:
    """A linear that is compressed, or is to be: `scheme` of a weight of `rows` x `columns`."""

    scheme: Scheme
    rows: int
    columns: int

    def groups(self) -> int:
        """Scales of a row."""
        size = self.scheme.group_size
        return 1 if size == -1 else -(-self.columns // size)


class Stored(Protocol):
    """A tensor in a file: dtype as safetensors names it, and shape."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class CheckpointFormat(Protocol):
    """A format of compressed checkpoints.

    Attributes:
        name: what the user calls it.
        method: the `quant_method` of its configuration.
        parts: names of a packed layer's tensors, the bias left out.
        scale_part: which of them holds the scales.
        scale_dtype: dtype in which the format stores scales, or None if any floating-point dtype will do.
    """

    name: str
    method: str
    parts: tuple[str, ...]
    scale_part: str
    scale_dtype: torch.dtype | None

    def check_schemes(self, schemes: Sequence[Scheme]) -> None:
        """Refuses, as `ModelError`, what no model in this format can have; no model is needed."""

    def check_layers(self, layers: Mapping[str, Layer], model: nn.Module) -> None:
        """Refuses, as `ModelError` with the layer's name, a model whose `layers` can't be expressed."""

    def quantization_config(self, model: nn.Module) -> dict[str, Any]:
        """The configuration of a compressed model; `ModelError` if it can't be expressed."""

    def parse_config(self, config: Mapping[str, Any]) -> Any:
        """Reads a configuration; `CheckpointError` if it can't be run."""

    def check_stored(self, path: Path, tensors: Mapping[str, Stored], config: Any) -> None:
        """Refuses, as `CheckpointError`, files whose packed layers lack a tensor or have a wrong one."""

    def schemes(self, model: nn.Module, tensors: Mapping[str, Stored], config: Any) -> dict[str, Any]:
        """Which linears of an uncompressed `model` are packed in the files, and how."""

    def empty_tensors(
        self, name: str, linear: nn.Linear, scheme: Any, tensors: Mapping[str, Stored], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """A layer's tensors on the meta device, as the file has them, scales without a file in `dtype`."""

    def pack_linear(self, module: LinearWNA16, name: str) -> dict[str, Tensor]:
        """A low-bit linear's tensors; `ModelError` if the format can't hold them."""

    def unpack_linear(self, tensors: Mapping[str, Tensor], scheme: Any, name: str) -> LinearWNA16:
        """The low-bit linear; `CheckpointError` if a tensor is missing or contradicts the others."""


def linear_class() -> type[LinearWNA16]:
    """The module that computes with packed weights, imported when first needed."""
    from tensormill.ops.linear_wna16.module import LinearWNA16

    return LinearWNA16


def in_activation_order(module: nn.Module) -> bool:
    """Whether a low-bit linear's groups aren't of consecutive columns, see `activation_order`."""
    return hasattr(module, "input_order")


def compressed_linears(model: nn.Module) -> dict[str, LinearWNA16]:
    """Name and module of every low-bit linear of a model."""
    low_bit = linear_class()
    return {name: module for name, module in model.named_modules() if isinstance(module, low_bit)}


def uncompressed(model: nn.Module) -> list[str]:
    """Names of the linear layers left as they are, and of the routers of experts, which some readers hold in
    linear layers.
    """
    kept = set(routers(model))
    return [name for name, module in model.named_modules() if as_linear(module) is not None or name in kept]


def compressed_layers(model: nn.Module) -> dict[str, Layer]:
    """The layer of every low-bit linear of a model, by name."""
    return {
        name: Layer(
            Scheme(module.bits, module.group_size, module.symmetric), module.out_features, module.in_features
        )
        for name, module in compressed_linears(model).items()
    }


def packed_state_dict(
    model: nn.Module, pack: Callable[[LinearWNA16, str], Mapping[str, Tensor]], layout: str
) -> dict[str, Tensor]:
    """The model's tensors under their names on disk, in the model's order, low-bit linears as `pack` says.

    Experts that are left as they are go back to one tensor where the architecture's checkpoints have one, unless
    transformers expects them apart in the format `layout`.
    """
    compressed = compressed_linears(model)
    owner = {
        key: name
        for name, module in compressed.items()
        for key in module.state_dict(prefix=f"{name}.", keep_vars=True)
    }
    tensors: dict[str, Tensor] = {}
    packed: set[str] = set()
    for key, tensor in model.state_dict().items():
        name = owner.get(key)
        if name is None:
            tensors[key] = tensor
        elif name not in packed:
            packed.add(name)
            tensors.update({f"{name}.{part}": value for part, value in pack(compressed[name], name).items()})
    for path, experts in expert_lists(model):
        together = experts.stacked and layout not in experts.apart_in
        if together and not any(name.startswith(f"{path}.") for name in compressed):
            stacked = stack_experts(path, experts, tensors)
            tensors = {
                key: value for key, value in tensors.items() if not key.startswith(f"{path}.")
            } | stacked
    return tensors


#: Floating-point dtypes of torch by their names in safetensors files.
FLOAT_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

"""What compression methods share: their settings, which layers they touch, their report, and the registry."""

from __future__ import annotations

import fnmatch
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tensormill.compress.formats.quantization import (
    QuantizedWeight,
    QuantSpec,
    check_weight,
    quantize_weight,
)
from tensormill.compress.residence import Residence
from tensormill.compress.structure import ModelStructure, linear_in, shared_parameters
from tensormill.errors import InvalidArgument, ModelError


@dataclass(frozen=True)
class WeightConfig:
    """Settings of every method that rounds weights.

    Attributes:
        bits: width of a weight's code, 2 to 8.
        bits_by_layer: other widths for some layers: full names, last parts of names, or patterns with `*`, each
            with its width; the first that fits a layer counts.
        group_size: input features that share a scale, or -1 for all.
        symmetric: codes centred on zero instead of a zero point per group.
        tail: "error" or "smaller", for layers whose input features `group_size` doesn't divide.
        skip: layers left as they are: full names, last parts of names, or patterns with `*`.
        only: if given, no other layers than these are touched.
        calibration_samples: token windows to observe.
        calibration_length: tokens of a window.

    Raises:
        InvalidArgument: a field is outside its range.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    tail: str = "error"
    skip: Sequence[str] = ("lm_head",)
    only: Sequence[str] | None = None
    calibration_samples: int = 128
    calibration_length: int = 512
    bits_by_layer: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        widths = self.bits_by_layer
        if not isinstance(widths, Mapping) or not all(isinstance(name, str) for name in widths):
            raise InvalidArgument(
                f"given bits_by_layer={widths!r}, expected layer names or patterns with widths, as in {{'*.o_proj': 8}}"
            )
        for one in fields(self):
            value = getattr(self, one.name)
            if one.type == "bool" and not isinstance(value, bool):  # as written: annotations are strings
                raise InvalidArgument(f"given {one.name}={value!r}, expected true or false")
        for bits in self.widths():
            self.spec_at(bits)
        for name in ("skip", "only"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value or ()):
                raise InvalidArgument(f"given {name}={value!r}, expected a list of layer names or patterns")
        for name in ("calibration_samples", "calibration_length"):
            check_number(self, name, 1)

    def widths(self) -> list[int]:
        """Every width that a layer may get, `bits` first."""
        return list(dict.fromkeys([self.bits, *self.bits_by_layer.values()]))

    def bits_of(self, name: str) -> int:
        """The width of the layer of this full name."""
        return next((bits for key, bits in self.bits_by_layer.items() if _matches(name, [key])), self.bits)

    def spec_of(self, name: str, dtype: torch.dtype | None = None) -> QuantSpec:
        """The quantizer of the layer of this full name, with scales stored in `dtype` (None: the weight's own)."""
        return self.spec_at(self.bits_of(name), dtype)

    def spec_at(self, bits: int, dtype: torch.dtype | None = None) -> QuantSpec:
        """The quantizer for a width."""
        return QuantSpec(
            bits=bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            tail=self.tail,  # type: ignore[arg-type]
            scale_dtype=dtype,
        )

    def touches(self, name: str) -> bool:
        """Whether the layer of this full name is to be compressed."""
        return not _matches(name, self.skip) and (self.only is None or _matches(name, self.only))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    last = name.rpartition(".")[2]
    return any(fnmatch.fnmatchcase(name, pattern) or last == pattern for pattern in patterns)


def check_number(config: Any, name: str, low: float, high: float = float("inf")) -> None:
    """Raise `InvalidArgument` if a numeric field is outside [low, high]; integers where `low` is one."""
    value = getattr(config, name)
    kind = int if isinstance(low, int) else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        noun = "an integer" if isinstance(low, int) else "a number"
        bound = f"of at least {low}" if high == float("inf") else f"from {low} to {high}"
        raise InvalidArgument(f"given {name}={value!r}, expected {noun} {bound}")


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear layer.

    Attributes:
        name: its name in the model.
        bits: width of a code.
        group_size: columns per scale, -1 for all.
        nmse: mean squared error of the layer's output over its mean square, on the calibration inputs that
            the method used; None without calibration.
        loss_rtn: the same after rounding the original weights to nearest.
        seconds: time spent on the layer's weights; linears treated together share it evenly.
        details: what the method chose; numbers, strings and lists only.
    """

    name: str
    bits: int
    group_size: int
    nmse: float | None
    loss_rtn: float | None
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodReport:
    """What a method did to a model: its name, its settings, and a report for each layer it touched.

    `left_out` names linear layers and routers that keep their precision whatever the settings: vision towers,
    projectors, what chooses experts.
    """

    method: str
    config: dict[str, Any]
    layers: list[LayerReport]
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As nested dicts and lists that JSON can hold."""
        return asdict(self)


def finish_report(
    method: str, config: WeightConfig, layers: list[LayerReport], left_out: Sequence[str] = ()
) -> MethodReport:
    """The report of a method; warns if it touched nothing."""
    if not layers:
        warnings.warn(f"{method} compressed no layer: every linear layer was skipped", stacklevel=3)
    settings = {item.name: getattr(config, item.name) for item in fields(config)}
    return MethodReport(method, settings, layers, tuple(left_out))


def check_layers(model: nn.Module, structure: ModelStructure, config: WeightConfig) -> None:
    """Refuse, before anything is changed, weights that can't be compressed.

    Raises:
        InvalidArgument: names the layer whose weights aren't finite or whose size doesn't fit, or what
            `bits_by_layer` names and the model doesn't have.
        ModelError: a layer to compress shares its weight with another module.
    """
    names = [f"{block.name}.{linear}" for block in structure.blocks for linear in block.linears]
    modules = [name for name, _ in model.named_modules()]
    for key in config.bits_by_layer:
        if not any(_matches(name, [key]) for name in modules):
            raise InvalidArgument(f"given bits_by_layer for {key!r}, which fits no layer of the model")
    shared = shared_parameters(model)
    for name in (*names, *structure.outside):
        module = model.get_submodule(name)
        if config.touches(name) and type(module) is nn.Linear:
            check_weight(module.weight, config.spec_of(name), name)
            if id(module.weight) in shared:
                raise ModelError(
                    f"given {name}, which shares its weight with another module, expected its own; "
                    f"add {name.rpartition('.')[2]!r} to skip"
                )


def replace_linear(parent: nn.Module, name: str, quantized: QuantizedWeight, dtype: torch.dtype) -> None:
    """Put a `LinearWNA16` with these weights in the place of a linear layer, its bias in `dtype`."""
    from tensormill.ops.linear_wna16.module import LinearWNA16

    linear = linear_in(parent, name)
    layer = LinearWNA16.from_codes(
        quantized.codes,
        quantized.scale,
        quantized.zero_point,
        bits=quantized.spec.bits,
        group_size=quantized.spec.group_size,
        bias=None if linear.bias is None else linear.bias.detach().to(dtype),
    )
    owner, _, last = name.rpartition(".")
    setattr(parent.get_submodule(owner), last, layer.train(linear.training))


def round_outside(
    model: nn.Module, structure: ModelStructure, config: WeightConfig, residence: Residence
) -> None:
    """Round to nearest the linear layers outside the blocks, which calibration doesn't reach.

    After the blocks, whose inputs some of them compute.
    """
    for name in structure.outside:
        if type(model.get_submodule(name)) is not nn.Linear or not config.touches(name):
            continue
        if residence.is_finished(name):
            continue
        with residence.part(name):
            linear = linear_in(model, name)
            dtype = linear.weight.dtype
            spec = config.spec_of(name, dtype)
            replace_linear(model, name, quantize_weight(linear.weight.detach(), spec), dtype)
            report = LayerReport(name, spec.bits, config.group_size, None, None, 0.0, {"method": "rtn"})
            residence.finish(name, [report])


class _Methods(Mapping[str, tuple[type[WeightConfig], Callable[..., MethodReport]]]):
    """Name -> (settings, `apply(model, config, calibration, progress)`); imported when asked for."""

    _configs: ClassVar = {"rtn": "RTNConfig", "gptq": "GPTQConfig", "awq": "AWQConfig"}

    def __getitem__(self, name: str) -> tuple[type[WeightConfig], Callable[..., MethodReport]]:
        config = self._configs[name]
        module = importlib.import_module(f"tensormill.compress.{name}")
        return getattr(module, config), module.apply

    def rounded(self, name: str) -> Callable[..., dict[str, Tensor]]:
        """What a method would make of some linears of an unchanged block, as weights of the unchanged model.

        Called as `(block, names, bits, config, statistics)`: an observed `CalibrationBlock` in float32, linears in it
        that read one tensor, their width, the method's settings, and what `block.observe()` returned.
        """
        rounded: Callable[..., dict[str, Tensor]] = importlib.import_module(
            f"tensormill.compress.{name}"
        ).rounded
        return rounded

    def __iter__(self) -> Iterator[str]:
        return iter(self._configs)

    def __len__(self) -> int:
        return len(self._configs)


METHODS = _Methods()

"""What `transformers_hook` puts in transformers' tables: configuration and quantizer for packed weights.

Loading goes through placeholders with the tensors' names and shapes on disk; once they are filled, each
becomes a `LinearWNA16`. That uses only what every transformers 5 offers (replace modules before loading,
replace modules after), and the packages that the formats come from aren't needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tensormill.compress.experts import USUAL_NAMES, is_fused, names_on_disk, unfuse_experts
from tensormill.compress.formats.checkpoint_format import (
    CheckpointFormat,
    Stored,
    compressed_linears,
    packed_state_dict,
)
from tensormill.compress.formats.registry import format_of
from tensormill.compress.plain_linears import as_linear, remember_classes, store_transposed, transposed
from tensormill.compress.stored_names import names_in_model
from tensormill.errors import CheckpointError

if TYPE_CHECKING:
    from tensormill.ops.linear_wna16.module import LinearWNA16


def make_entries(
    method: str, original_config: Any, original_quantizer: Any, ours_first: Callable[[], bool]
) -> tuple[type, Any]:
    """Replaces transformers' own table entries for one `quant_method`; they stay the fallback.

    The classes are made here because their bases can only be imported with transformers.

    Args:
        method: the `quant_method`.
        original_config: transformers' entry in the table of configuration classes.
        original_quantizer: transformers' entry in the table of quantizers.
        ours_first: whether checkpoints that we can run are ours when they are opened; asked each time.

    Returns:
        An entry for the table of configuration classes, and one for the table of quantizers.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationMethod

    class PackedWeightsConfig(original_config):  # type: ignore[misc]
        """A `quantization_config` that the low-bit linear can run; keeps its JSON as it is."""

        def __init__(self, raw: Mapping[str, Any]) -> None:
            self.raw = copy.deepcopy(dict(raw))
            self.layout: CheckpointFormat = format_of(self.raw)
            self.packed = self.layout.parse_config(self.raw)
            self.quant_method = QuantizationMethod(method)
            self.quantization_config = None
            # Only a caller's own configuration sets it: in a file it is there for plain transformers.
            self.dequantize = False
            self.use_optimized_inference = False

        @classmethod
        def from_dict(
            cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
        ) -> Any:
            raw = config_dict.get("quantization_config", config_dict)
            try:
                config = cls(raw) if ours_first() else None
            except CheckpointError:
                config = None
            if config is None:
                return original_config.from_dict(
                    config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs
                )
            return (config, kwargs) if return_unused_kwargs else config

        def to_dict(self) -> dict[str, Any]:
            return copy.deepcopy(self.raw)

        def to_diff_dict(self) -> dict[str, Any]:
            return self.to_dict()

        def get_loading_attributes(self) -> dict[str, Any]:
            return {"dequantize": self.dequantize}

    # transformers compares class names when the caller passes a configuration of their own.
    PackedWeightsConfig.__name__ = original_config.__name__

    class PackedWeightsQuantizer(HfQuantizer):
        """Puts placeholders for linears before the weights are read, and low-bit linears for these after."""

        requires_calibration = True
        unfused = False
        quantization_config: Any

        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            return None

        def _convert_model_for_quantization(self, model: Any) -> None:
            """Nothing: transformers would take experts apart for some formats, and run them on zeros."""

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            files = _stored_tensors(kwargs.get("checkpoint_files"))
            stored = {name: files[original] for original, name in names_in_model(model, files).items()}
            dtype = kwargs.get("dtype") or model.dtype
            layout = self.quantization_config.layout
            self.unfused = _unfuse_packed_experts(model, stored, layout)
            remember_classes(model)
            for name, scheme in layout.schemes(model, stored, self.quantization_config.packed).items():
                linear = as_linear(model.get_submodule(name))
                assert linear is not None
                _replace(model, name, _PackedPlaceholder(name, linear, layout, scheme, stored, dtype))

        def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
            # Experts taken apart have the checkpoint's names: nothing is to be merged.
            kept = [one for one in weight_conversions if not (self.unfused and _merges_experts(one))]
            return kept + self.get_weight_conversions()

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            for name, module in list(model.named_modules()):
                if isinstance(module, _PackedPlaceholder):
                    linear = module.to_linear()
                    dense = self.quantization_config.dequantize
                    _replace(model, name, _dense(model, name, linear, model.dtype) if dense else linear)
            return model

        def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
            for name, module in compressed_linears(model).items():
                _replace(model, name, _dense(model, name, module, dtype or model.dtype))
            return model

        def get_state_dict_and_metadata(
            self, model: nn.Module, *args: Any, **kwargs: Any
        ) -> tuple[Any, dict[str, Any]]:
            layout = self.quantization_config.layout
            return packed_state_dict(model, layout.pack_linear, layout.name), {}

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return False

        @property
        def is_compileable(self) -> bool:
            return True

    def make_quantizer(config: Any, **kwargs: Any) -> Any:
        if not isinstance(config, PackedWeightsConfig):
            return original_quantizer(config, **kwargs)
        # How a caller asked for dense weights before transformers had `dequantize`.
        config.dequantize = config.dequantize or getattr(config, "run_compressed", True) is False
        return PackedWeightsQuantizer(config, **kwargs)

    return PackedWeightsConfig, make_quantizer


def _stored_tensors(files: Iterable[str] | None) -> dict[str, Stored]:
    """A checkpoint's tensors by name, from the headers of its files; empty if there are none."""
    from tensormill.compress.checkpoint import read_header

    stored: dict[str, Stored] = {}
    for file in files or ():
        if str(file).endswith(".safetensors"):
            stored.update(read_header(Path(file)))
    return stored


def _unfuse_packed_experts(model: nn.Module, stored: Mapping[str, Stored], layout: CheckpointFormat) -> bool:
    """Take the experts of a model apart if the checkpoint has packed ones, or if transformers doesn't put single ones
    together; whether it was done.
    """
    parts = tuple(f".{part}" for part in layout.parts)
    packed = [name for name in stored if name.endswith(parts)]
    fused = [name for name, module in model.named_modules() if is_fused(module)]
    apart = {path for path in fused if any(name.startswith(f"{path}.0.") for name in stored)}
    if not any(name.startswith(f"{path}.") for name in packed for path in fused) and not (
        apart and names_on_disk(model) is None
    ):
        return False
    # llm-compressor may write the usual names where the architecture's checkpoints have others.
    usual = any(name.startswith(f"{path}.0.{USUAL_NAMES[2]}.") for name in stored for path in apart)
    unfuse_experts(model, apart, USUAL_NAMES if usual else None)
    return True


def _merges_experts(conversion: Any) -> bool:
    return hasattr(conversion, "operations") and all(
        "experts.*." in pattern for pattern in conversion.source_patterns
    )


class _PackedPlaceholder(nn.Module):
    """Holds one compressed layer's tensors as they are on disk, on the meta device until they are loaded."""

    def __init__(
        self,
        name: str,
        linear: nn.Linear,
        layout: CheckpointFormat,
        scheme: Any,
        stored: Mapping[str, Stored],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.name, self.layout, self.scheme = name, layout, scheme
        self.in_features, self.out_features = linear.in_features, linear.out_features
        tensors = layout.empty_tensors(name, linear, scheme, stored, dtype)
        bias = tensors.pop("bias", None)
        for part, tensor in tensors.items():
            self.register_buffer(part, tensor)
        if linear.bias is not None:
            bias = torch.empty((linear.out_features,), dtype=dtype, device="meta")
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        # GPT-2 initializes the weights of its projections by name; nothing is to be drawn for this one.
        self.weight = torch.empty(0)
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]

    def to_linear(self) -> LinearWNA16:
        """The low-bit linear with the loaded tensors."""
        tensors = {**dict(self.named_buffers(recurse=False)), **dict(self.named_parameters(recurse=False))}
        linear = self.layout.unpack_linear(tensors, self.scheme, self.name)
        linear.train(self.training)
        return linear


def _dense(model: nn.Module, name: str, module: LinearWNA16, dtype: torch.dtype) -> nn.Linear:
    weight = module.dequantize(dtype)
    linear = nn.Linear(
        module.in_features, module.out_features, bias=module.bias is not None, device="meta", dtype=dtype
    )
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    if name in transposed(model):
        store_transposed(linear)
    return linear


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, attribute)
    setattr(parent, attribute, module)
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        # Dispatched over several devices: the hook moves inputs to the layer's device.
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(module, hook)

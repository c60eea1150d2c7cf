"""FlexQ: rounds weights to 6 bits, and quantizes every layer's input to 6 bits on the fly, or to 8 where 6 would hurt.

Groups of 128 along the input features share a scale, symmetric and without calibration, in weights and activations
alike. Few layers are sensitive to the width of their input: in the official code every `down_proj`; here those, or
whichever a calibration finds. Attention, the cache, embeddings and the output layer stay as they are.

Zhang and others, FlexQ: Efficient Post-training INT6 Quantization for LLM Serving via Algorithm-System Co-Design,
arXiv 2508.04405. Widths of activations are in no checkpoint format that is written here: the method works on a model in
memory, and `quantize_inputs` on one that was loaded compressed, whatever method rounded its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from tensormill.compress import rtn
from tensormill.compress.calibration import Calibration, Progress
from tensormill.compress.evaluate import evaluating
from tensormill.compress.formats.quantization import QuantSpec
from tensormill.compress.methods import MethodReport, check_number
from tensormill.compress.quantized_inputs import BlockQuantizedLinear, set_linear, with_quantized_input
from tensormill.compress.structure import linear_in
from tensormill.errors import InvalidArgument, ModelError
from tensormill.ops.linear_wna16.module import LinearWNA16
from tensormill.ops.quantize_activations import quantize_activations

_CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class FlexQConfig(rtn.RTNConfig):
    """Settings of FlexQ; `group_size` is that of weights and of activations.

    Attributes:
        activation_bits: width of the layers' inputs, 2 to 8.
        sensitive_bits: width of the inputs of sensitive layers, at least as many.
        sensitive: patterns of the layers' names; or "auto" for the layers whose output the narrow input harms most.
        sensitive_share: with "auto": share of all multiplications that may have the wide input, 0 to 1.

    Raises:
        InvalidArgument: a field is outside its range.
    """

    bits: int = 6
    symmetric: bool = True
    activation_bits: int = 6
    sensitive_bits: int = 8
    sensitive: Sequence[str] | str = ("*.down_proj",)
    sensitive_share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "activation_bits", 2, 8)
        check_number(self, "sensitive_bits", self.activation_bits, 8)
        check_number(self, "sensitive_share", 0.0, 1.0)
        if isinstance(self.sensitive, str) and self.sensitive != "auto":
            raise InvalidArgument(
                f"given sensitive={self.sensitive!r}, expected a list of patterns, or 'auto'"
            )

    def spec_at(self, bits: int, dtype: torch.dtype | None = None) -> QuantSpec:
        """As the official code: the largest weight is exact."""
        return replace(super().spec_at(bits, dtype), scale_rule="absmax/qmax")


@torch.no_grad()
def apply(
    model: nn.Module,
    config: FlexQConfig,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> MethodReport:
    """Round a model's linear layers to nearest and quantize their inputs, in place.

    Args:
        model: a causal language model.
        config: the settings.
        calibration: tokens on which to measure the output errors of rounded weights, and for `sensitive="auto"` of
            narrow inputs; None measures nothing.
        progress: called as `progress(message, fraction)`.

    Raises:
        InvalidArgument: weights or calibration inputs aren't finite, a size doesn't fit, or "auto" has no calibration.
        ModelError: the model has no blocks of linear layers.
    """
    automatic = config.sensitive == "auto"
    if automatic and calibration is None:
        raise InvalidArgument(
            "given sensitive='auto' without a calibration, expected tokens, or patterns of names"
        )
    report = rtn.apply(model, config, calibration, progress)
    names = [layer.name for layer in report.layers]
    errors: Mapping[str, Mapping[int, float]] = {}
    if automatic:
        assert calibration is not None
        widths_wanted = (config.activation_bits, config.sensitive_bits)
        errors = input_errors(model, names, calibration, widths_wanted, config.group_size)
        costs = {
            name: _linear(model, name).weight_packed.shape[0] * _linear(model, name).in_features
            for name in names
        }
        chosen = most_sensitive(
            {name: error[config.activation_bits] for name, error in errors.items()},
            costs,
            config.sensitive_share,
        )
        is_sensitive: Callable[[str], bool] = chosen.__contains__
    else:
        is_sensitive = replace(config, only=tuple(config.sensitive), skip=()).touches
    widths = {name: config.sensitive_bits if is_sensitive(name) else config.activation_bits for name in names}
    quantize_inputs(model, widths, config.group_size)
    layers = [
        replace(
            layer,
            details={
                **layer.details,
                "input_bits": widths[layer.name],
                **{
                    f"input_error_at_{bits}_bits": error for bits, error in errors.get(layer.name, {}).items()
                },
            },
        )
        for layer in report.layers
    ]
    return replace(report, method="flexq", layers=layers)


def quantize_inputs(
    model: nn.Module, widths: int | Mapping[str, int], block_size: int = 128
) -> dict[str, BlockQuantizedLinear]:
    """Make a model's low-bit linears quantize their input, in place, and return them by name.

    Args:
        model: with `LinearWNA16` layers, as `tensormill.load` gives; their weights stay what they are.
        widths: bits of a channel's code, 2 to 8, for all low-bit linears or for those named.
        block_size: channels of a token that share a scale, -1 for all. Fastest where it is the weights' group size.

    Raises:
        InvalidArgument: a width out of range.
        ModelError: there is no low-bit linear, or not under a given name, or one whose columns are in another order.

    >>> from torch import nn
    >>> model = nn.Sequential(LinearWNA16(256, 8, bits=4, group_size=128))
    >>> quantize_inputs(model, 6)["0"].average_input_bits()
    6.0
    """
    if isinstance(widths, int):
        widths = {name: widths for name, module in model.named_modules() if isinstance(module, LinearWNA16)}
    if not widths:
        raise ModelError("given a model without low-bit linear layers, expected some; compress it first")
    made = {}
    for name, bits in widths.items():
        layer = with_quantized_input(_linear(model, name).to_layout("packed"), bits, block_size)
        set_linear(model, name, layer)
        made[name] = layer
    return made


def _linear(model: nn.Module, name: str) -> LinearWNA16:
    found = model.get_submodule(name)
    if not isinstance(found, LinearWNA16) or hasattr(found, "input_order"):
        raise ModelError(
            f"given {name}, which is a {type(found).__name__}, expected a LinearWNA16 with its columns in plain order"
        )
    return found


@torch.no_grad()
def input_errors(
    model: nn.Module,
    names: Iterable[str],
    calibration: Calibration,
    widths: Sequence[int],
    block_size: int = 128,
) -> dict[str, dict[int, float]]:
    """How far each layer's output moves when its input alone is quantized.

    Args:
        model: a causal language model, called as `model(tokens)`.
        names: of linear layers, dense or low-bit.
        calibration: the tokens.
        widths: bits of a channel's code.
        block_size: channels that share a scale.

    Returns:
        By layer and width, the sum of squares of the output's change over that of the output.
    """
    weights: dict[str, Tensor] = {}
    sums: dict[str, dict[int, Tensor]] = {}
    energy: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def watch(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].float()
            weight = weights[name]
            energy[name] = energy.get(name, 0) + functional.linear(x, weight).double().square().sum()
            for bits in widths:
                codes, scale = quantize_activations(x, bits=bits, group_size=block_size)
                moved = codes * _by_channel(scale, x.shape[-1], block_size) - x
                error = functional.linear(moved, weight).double().square().sum()
                sums.setdefault(name, {})[bits] = sums.get(name, {}).get(bits, 0) + error

        return watch

    with ExitStack() as stack:
        stack.enter_context(evaluating([model]))
        for name in names:
            module = model.get_submodule(name)
            if isinstance(module, LinearWNA16):
                weights[name] = module.dequantize(torch.float32)
            else:
                weights[name] = linear_in(model, name).weight.float()
            stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        batch = max(1, _CHUNK_TOKENS // calibration.tokens.shape[1])
        device = next(model.parameters()).device
        for tokens, more in calibration.chunks(batch):
            model(tokens.to(device), **{key: value.to(device) for key, value in more.items()})
    return {
        name: {bits: float(total / energy[name].clamp(min=1e-300)) for bits, total in by_width.items()}
        for name, by_width in sums.items()
    }


def _by_channel(scale: Tensor, channels: int, block_size: int) -> Tensor:
    size = channels if block_size == -1 else block_size
    return scale.repeat_interleave(size, dim=-1)[..., :channels]


def most_sensitive(errors: Mapping[str, float], costs: Mapping[str, float], share: float) -> set[str]:
    """Layers with the largest errors whose costs together are at most a share of all.

    Args:
        errors: by layer.
        costs: by layer, what giving it the wide input costs.
        share: 0 to 1.

    >>> sorted(most_sensitive({"a": 0.1, "b": 0.3, "c": 0.2}, {"a": 1, "b": 2, "c": 1}, 0.5))
    ['b']
    """
    left = math.fsum(costs[name] for name in errors) * share
    chosen = set()
    for name in sorted(errors, key=lambda name: (-errors[name], name)):
        if costs[name] <= left * (1 + 1e-12):
            chosen.add(name)
            left -= costs[name]
    return chosen

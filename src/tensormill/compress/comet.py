"""COMET's mixed precision: rounds weights to 4 bits, and quantizes inputs to 4 bits but for few blocks of outlier channels.

Activations have outliers in few, fixed channels. Sorted by the magnitude that they reach in a calibration, the channels
fall into blocks of 128 of which the first hold all outliers and get 8 bits, the rest 4. The weight's columns are sorted
alike, so that a block of channels and a group of weights are the same columns. Needs calibration.

Liu and others, COMET: Towards Practical W4A4KV4 LLMs Serving, arXiv 2410.12168, section 3.1 (fine-grained
mixed-precision quantization). The paper learns ranges of weights as OmniQuant does; here they are searched (`clip`).
The paper gives no rule for what an outlier is: here `plan_blocks` has one. Its 4-bit cache is `ops.decode_attention`'s.

The order of the channels is what GPTQ calls an activation order, and is saved as such; widths of activations are in no
checkpoint format that is written here, so that the method works on a model in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tensormill.compress.calibration import (
    Calibration,
    CalibrationBlock,
    InputStatistics,
    Progress,
    stream_blocks,
)
from tensormill.compress.clipping import search_ranges
from tensormill.compress.experts import unfuse_experts
from tensormill.compress.formats.quantization import (
    QuantizedWeight,
    QuantSpec,
    fake_quantize,
    quantize_weight,
)
from tensormill.compress.gptq import gptq_quantize
from tensormill.compress.methods import (
    LayerReport,
    MethodReport,
    WeightConfig,
    check_layers,
    check_number,
    finish_report,
    round_outside,
)
from tensormill.compress.output_error import output_error
from tensormill.compress.quantized_inputs import set_linear, with_quantized_input
from tensormill.compress.residence import InMemory
from tensormill.compress.structure import discover, linear_in
from tensormill.errors import InvalidArgument
from tensormill.ops.linear_wna16.module import LinearWNA16
from tensormill.ops.quantize_activations.mixed import plan_blocks


@dataclass(frozen=True)
class COMETConfig(WeightConfig):
    """Settings of COMET; `group_size` is that of weights and the number of channels in a block.

    Attributes:
        wide_share: share of each layer's blocks that have 8 bits, rounded up; None for as many as hold outliers.
        outlier_ratio: an outlier is a channel that reaches so many times the median channel's magnitude; above 1.
        permute: whether channels are sorted. If not, a block with an outlier has 8 bits where it lies.
        clip: whether the range of each group of weights is searched.
        rounding: "nearest", or "gptq": columns still to come absorb the error of each rounded one.

    Raises:
        InvalidArgument: a field is outside its range.
    """

    symmetric: bool = True
    wide_share: float | None = None
    outlier_ratio: float = 10.0
    permute: bool = True
    clip: bool = True
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wide_share is not None:
            check_number(self, "wide_share", 0.0, 1.0)
        check_number(self, "outlier_ratio", 1.0)
        if self.rounding not in ("nearest", "gptq"):
            raise InvalidArgument(f"given rounding={self.rounding!r}, expected 'nearest' or 'gptq'")


def plan_inputs(magnitude: Tensor, config: COMETConfig) -> tuple[Tensor | None, Tensor]:
    """Order of a layer's channels and widths of its blocks.

    Args:
        magnitude: (K,) what each channel of the input reaches.
        config: the settings.

    Returns:
        (K,) int32 order, None for the plain one; (blocks,) uint8 widths, 4 or 8.

    >>> plan_inputs(torch.tensor([1.0, 1.0, 1.0, 1.0, 90.0, 1.0]), COMETConfig(group_size=2, permute=False))[1].tolist()
    [4, 4, 8]
    """
    size = len(magnitude) if config.group_size == -1 else config.group_size
    blocks = -(-len(magnitude) // size)
    wide = None if config.wide_share is None else -int(-config.wide_share * blocks // 1)
    if config.permute:
        return plan_blocks(magnitude, block_size=size, wide_blocks=wide, outlier_ratio=config.outlier_ratio)
    padded = nn.functional.pad(magnitude, (0, blocks * size - len(magnitude)))
    largest = padded.view(blocks, size).amax(1)
    bits = torch.full((blocks,), 4, dtype=torch.uint8, device=magnitude.device)
    if wide is None:
        bits[largest > config.outlier_ratio * magnitude.median()] = 8
    else:
        bits[largest.argsort(descending=True, stable=True)[:wide]] = 8
    return None, bits


@torch.no_grad()
def apply(
    model: nn.Module,
    config: COMETConfig,
    calibration: Calibration,
    progress: Progress | None = None,
    *,
    device: torch.device | str | None = None,
) -> MethodReport:
    """Round a model's linear layers and make them quantize their inputs in blocks of 4 and 8 bits, in place.

    Layers outside the blocks, which calibration doesn't reach, are rounded to nearest and keep their inputs.

    Args:
        model: a causal language model.
        config: the settings.
        calibration: tokens to observe.
        progress: called as `progress(message, fraction)`.
        device: where blocks are calibrated; None stays where the model is.

    Returns:
        The report; a layer's details have `wide_blocks`, `blocks` and `input_bits`, the average over channels.

    Raises:
        InvalidArgument: weights or calibration inputs aren't finite, or a size doesn't fit.
        ModelError: the model has no blocks of linear layers.
    """
    residence = InMemory(model, device)
    unfuse_experts(model)
    structure = discover(model, residence=residence)
    check_layers(model, structure, config)
    round_outside(model, structure, config, residence)
    for block in stream_blocks(model, structure, calibration, progress=progress, residence=residence):
        magnitudes, statistics = observe_magnitudes(block)
        for group in block.structure.input_groups:
            names = [
                name
                for name in group
                if type(block.module.get_submodule(name)) is nn.Linear
                and config.touches(block.full_name(name))
            ]
            if names:
                plan = plan_inputs(magnitudes[group[0]], config)
                block.layers += _compress_group(block, names, statistics[group[0]], plan, config)
    return finish_report("comet", config, residence.layers, structure.left_out)


def observe_magnitudes(block: CalibrationBlock) -> tuple[dict[str, Tensor], dict[str, InputStatistics]]:
    """What each channel of the linears' inputs reaches, (K,) float32 by the first linear of each input group, and the
    statistics of `CalibrationBlock.observe`.

    An expert that no token was routed to gets the magnitudes of its mean squares.
    """
    reached: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def watch(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().flatten(0, -2)
            if len(x):
                largest = x.abs().amax(0).float()
                reached[name] = torch.maximum(reached[name], largest) if name in reached else largest

        return watch

    with ExitStack() as stack:
        for group in block.structure.input_groups:
            part = block.module.get_submodule(group[0])
            stack.callback(part.register_forward_pre_hook(hook(group[0])).remove)
        statistics = block.observe()
    for group in block.structure.input_groups:
        if group[0] not in reached:
            reached[group[0]] = statistics[group[0]].second_moment.sqrt()
    return reached, statistics


def _compress_group(
    block: CalibrationBlock,
    names: list[str],
    seen: InputStatistics,
    plan: tuple[Tensor | None, Tensor],
    config: COMETConfig,
) -> Iterator[LayerReport]:
    """Compress linears that read one tensor, whose channels they need in one order."""
    order, bits = plan
    gram = seen.gram if order is None else seen.gram[order][:, order]
    for name in names:
        start = time.perf_counter()
        full_name = block.full_name(name)
        linear = linear_in(block.module, name)
        dtype = linear.weight.dtype
        spec = config.spec_of(full_name, dtype)
        weight = linear.weight.detach().float()
        weight = weight if order is None else weight[:, order]
        rounded = round_weight(weight, gram, spec, clip=config.clip, rounding=config.rounding)
        plain = LinearWNA16.from_codes(
            rounded.codes,
            rounded.scale,
            rounded.zero_point,
            bits=spec.bits,
            group_size=spec.group_size,
            bias=None if linear.bias is None else linear.bias.detach().to(dtype),
        ).train(linear.training)
        layer = with_quantized_input(plain, bits, config.group_size, order)
        set_linear(block.module, name, layer)
        error = output_error(weight, rounded.dequantize(torch.float32), gram)
        yield LayerReport(
            full_name,
            spec.bits,
            config.group_size,
            nmse=error,
            loss_rtn=output_error(weight, fake_quantize(weight, spec), gram),
            seconds=time.perf_counter() - start,
            details={
                **seen.to_dict(),
                "wide_blocks": int((bits == 8).sum()),
                "blocks": len(bits),
                "input_bits": layer.average_input_bits(),
            },
        )


def round_weight(
    weight: Tensor, gram: Tensor, spec: QuantSpec, *, clip: bool, rounding: str
) -> QuantizedWeight:
    """Round a weight (N, K) float32 whose input has this Gram matrix (K, K)."""
    if rounding == "gptq":
        return gptq_quantize(weight, gram, spec, clip=clip)
    if not clip:
        return quantize_weight(weight, spec)
    return quantize_weight(weight, spec, search_ranges(weight, gram, spec))

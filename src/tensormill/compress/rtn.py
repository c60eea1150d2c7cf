"""Rounds every weight of a model's linear layers to the nearest code: the baseline of all weight
quantization.

Each group of weights gets a scale (and zero point) from its own minimum and maximum, and nothing looks at the
data; a calibration, if given, only measures what the rounding did to the layers' outputs. Needs no
calibration. Composes with methods that touch other layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
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
from tensormill.compress.formats.quantization import fake_quantize, quantize_weight
from tensormill.compress.methods import (
    LayerReport,
    MethodReport,
    WeightConfig,
    check_layers,
    finish_report,
    replace_linear,
    round_outside,
)
from tensormill.compress.output_error import output_error
from tensormill.compress.structure import BlockStructure, ModelStructure, discover, linear_in


@dataclass(frozen=True)
class RTNConfig(WeightConfig):
    """Settings of round-to-nearest: those of `WeightConfig`."""


@torch.no_grad()
def apply(
    model: nn.Module,
    config: RTNConfig,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    *,
    device: torch.device | str | None = None,
    structure: ModelStructure | None = None,
) -> MethodReport:
    """Round a model's linear layers to nearest, in place.

    Args:
        model: a causal language model.
        config: the settings.
        calibration: tokens on which to measure the output error; None measures nothing.
        progress: called as `progress(message, fraction)`.
        device: where blocks are calibrated; None stays where the model is.
        structure: of the model, if known already.

    Raises:
        InvalidArgument: weights or calibration inputs aren't finite, or a size doesn't fit.
        ModelError: the model has no blocks of linear layers.
    """
    structure = structure or discover(model)
    check_layers(model, structure, config)
    layers = list(round_outside(model, structure, config))
    for name, block, module, statistics in _blocks(model, structure, calibration, progress, device):
        for linear_name in block.linears:
            linear = module.get_submodule(linear_name)
            if type(linear) is not nn.Linear or not config.touches(f"{name}.{linear_name}"):
                continue
            start = time.perf_counter()
            dtype = linear.weight.dtype
            full_name = f"{name}.{linear_name}"
            spec = config.spec_of(full_name, dtype)
            quantized = quantize_weight(linear.weight.detach(), spec)
            error = None
            if statistics is not None:
                gram = statistics[linear_name].gram
                error = output_error(linear.weight.float(), quantized.dequantize(torch.float32), gram)
            replace_linear(module, linear_name, quantized, dtype)
            seconds = time.perf_counter() - start
            layers.append(LayerReport(full_name, spec.bits, config.group_size, error, error, seconds))
    return finish_report("rtn", config, layers)


def rounded(
    block: CalibrationBlock,
    names: Sequence[str],
    bits: int,
    config: WeightConfig,
    statistics: Mapping[str, InputStatistics],
) -> dict[str, Tensor]:
    """See `METHODS.rounded`."""
    spec = config.spec_at(bits)
    return {name: fake_quantize(linear_in(block.module, name).weight.detach(), spec) for name in names}


def _blocks(
    model: nn.Module,
    structure: ModelStructure,
    calibration: Calibration | None,
    progress: Progress | None,
    device: torch.device | str | None,
) -> Iterator[tuple[str, BlockStructure, nn.Module, dict[str, InputStatistics] | None]]:
    if calibration is None:
        for block in structure.blocks:
            yield block.name, block, model.get_submodule(block.name), None
    else:
        for step in stream_blocks(model, structure, calibration, device=device, progress=progress):
            yield step.name, step.structure, step.module, step.observe()

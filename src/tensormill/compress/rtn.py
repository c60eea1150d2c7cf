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
from tensormill.compress.experts import unfuse_experts
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
from tensormill.compress.residence import InMemory, Residence
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
    residence: Residence | None = None,
) -> MethodReport:
    """Round a model's linear layers to nearest, in place.

    Args:
        model: a causal language model.
        config: the settings.
        calibration: tokens on which to measure the output error; None measures nothing.
        progress: called as `progress(message, fraction)`.
        device: where blocks are calibrated; None stays where the model is.
        structure: of the model, if known already.
        residence: of the model, with a device of its own; None stands for one in memory.

    Raises:
        InvalidArgument: weights or calibration inputs aren't finite, or a size doesn't fit.
        ModelError: the model has no blocks of linear layers.
    """
    residence = residence or InMemory(model, device)
    if structure is None:
        unfuse_experts(model)
        structure = discover(model, residence=residence)
    check_layers(model, structure, config)
    if calibration is None:
        for block in structure.blocks:
            if not residence.is_finished(block.name):
                with residence.part(block.name) as module:
                    residence.finish(block.name, list(_compress_block(module, block, config, None)))
    else:
        for step in stream_blocks(model, structure, calibration, progress=progress, residence=residence):
            step.layers += _compress_block(step.module, step.structure, config, step.observe())
    round_outside(model, structure, config, residence)
    return finish_report("rtn", config, residence.layers, structure.left_out)


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


def _compress_block(
    module: nn.Module,
    structure: BlockStructure,
    config: RTNConfig,
    statistics: Mapping[str, InputStatistics] | None,
) -> Iterator[LayerReport]:
    for name in structure.linears:
        linear = module.get_submodule(name)
        full_name = f"{structure.name}.{name}"
        if type(linear) is not nn.Linear or not config.touches(full_name):
            continue
        start = time.perf_counter()
        dtype = linear.weight.dtype
        spec = config.spec_of(full_name, dtype)
        quantized = quantize_weight(linear.weight.detach(), spec)
        error, details = None, {}
        if statistics is not None:
            gram, details = statistics[name].gram, statistics[name].to_dict()
            error = output_error(linear.weight.float(), quantized.dequantize(torch.float32), gram)
        replace_linear(module, name, quantized, dtype)
        seconds = time.perf_counter() - start
        yield LayerReport(full_name, spec.bits, config.group_size, error, error, seconds, details)

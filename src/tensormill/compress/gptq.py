"""GPTQ: rounds a layer's columns one after the other, and lets the columns still to come absorb each one's
error.

The layer's output error on the calibration data is quadratic in the weights, with the inputs' Gram matrix H
as its curvature. Once a column is rounded, the best change of the remaining ones follows from H in closed
form; the Cholesky factor of H^-1 holds these changes for all columns at once. Needs calibration. Composes
with methods that touch other layers.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers, arXiv 2210.17323. Beyond the paper, the range of each group is searched when its turn comes: an error
counts as much as the columns to come leave of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tensormill.compress.calibration import (
    Calibration,
    CalibrationBlock,
    InputStatistics,
    Progress,
    stream_blocks,
)
from tensormill.compress.clipping import search_grid
from tensormill.compress.experts import unfuse_experts
from tensormill.compress.formats.quantization import (
    QuantizedWeight,
    QuantSpec,
    fake_quantize,
    group_grid,
    round_to_codes,
    split_groups,
)
from tensormill.compress.methods import (
    LayerReport,
    MethodReport,
    WeightConfig,
    check_layers,
    check_number,
    finish_report,
    replace_linear,
    round_outside,
)
from tensormill.compress.output_error import output_error
from tensormill.compress.residence import InMemory, Residence
from tensormill.compress.structure import ModelStructure, discover, linear_in
from tensormill.errors import InvalidArgument, ModelError

_LAZY_COLUMNS = 128

# An expert's own tokens per input feature that its Gram matrix needs. Columns make up for errors as the matrix
# says they can: on Gaussian inputs (256 features, 3 bits) one from fewer tokens than features lost to the one
# from all tokens of the layer in every setting tried, and to rounding where the spectrum was flat; with two it
# won where the expert's channels differ a lot from the layer's.
_TOKENS_PER_FEATURE = 2.0


@dataclass(frozen=True)
class GPTQConfig(WeightConfig):
    """Settings of GPTQ.

    Attributes:
        damping: added to the Gram matrix's diagonal, as a fraction of its mean; above 0.
        act_order: round columns by falling mean square of their input. Groups keep their place in the row and
            get their scales ahead, so that the checkpoint needs no order.
        inputs: "compressed" calibrates a block on what the compressed blocks before it give, "original" on
            the original model's hidden states.
        true_sequential: within a block, too, calibrate layers on the outputs of those already compressed; one
            more run of the block for each set of layers with the same input.
        clip: search a smaller range for each group; False takes the whole, as the paper does.
        clip_grid: steps between the full range and none, of which those above `1 - clip_max_shrink` are
            tried.
        clip_max_shrink: how much of a group's range may be cut away, from 0 to below 1.
    """

    damping: float = 0.01
    act_order: bool = False
    inputs: str = "compressed"
    true_sequential: bool = False
    clip: bool = True
    clip_grid: int = 40
    clip_max_shrink: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "damping", 1e-8, 1.0)
        check_number(self, "clip_grid", 1)
        check_number(self, "clip_max_shrink", 0.0, 0.99)
        if self.inputs not in ("compressed", "original"):
            raise InvalidArgument(f"given inputs={self.inputs!r}, expected 'compressed' or 'original'")
        if self.true_sequential and self.inputs == "original":
            raise InvalidArgument(
                "given true_sequential with inputs='original', expected inputs='compressed'"
            )


def gptq_quantize(
    weight: Tensor,
    gram: Tensor,
    spec: QuantSpec,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    clip: bool = True,
    clip_grid: int = 40,
    clip_max_shrink: float = 0.7,
) -> QuantizedWeight:
    """Quantize a weight so that its output changes least on inputs with this Gram matrix.

    Args:
        weight: (N, K), any float dtype; computed in float32.
        gram: (K, K) float32, the mean over tokens of x x^T. The columns of inputs that are always zero are
            rounded to nearest.
        spec: the quantizer.
        damping: fraction of the diagonal's mean that is added to it; raised tenfold until the matrix is
            regular.
        act_order: process columns by falling diagonal; groups get their grids ahead, from the weights as they are.
        clip: search the range of each group; an error costs its input's conditional variance.
        clip_grid, clip_max_shrink: of that search.

    Independent inputs leave nothing to absorb, and the result is rounding to nearest:

    >>> weight = torch.tensor([[0.0, 0.9, 2.2, 3.0]])
    >>> gptq_quantize(weight, torch.eye(4), QuantSpec(bits=2, group_size=-1)).dequantize()
    tensor([[0., 1., 2., 3.]])
    """
    spec = replace(spec, scale_dtype=spec.scale_dtype or weight.dtype)
    columns = weight.shape[1]
    size = spec.columns_per_group(columns)
    order, factor, variance = ordered_factor(gram, damping, act_order)

    def grid_of(ahead: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Scales and zero points (N, G) of groups of columns, of which one begins at `first`."""
        groups = split_groups(ahead, spec)
        if not clip:
            scale, zero = group_grid(groups, spec)
            return scale.squeeze(-1), zero.squeeze(-1)
        # A short last group is filled with copies, which cost nothing.
        cost = variance.new_zeros(groups.shape[1:])
        cost.view(-1)[: ahead.shape[1]] = variance[first : first + ahead.shape[1]]
        return search_grid(groups, cost, spec, clip_grid=clip_grid, clip_max_shrink=clip_max_shrink)

    # Transposed, so that a column is contiguous.
    remaining = weight.float().T[order].contiguous()
    codes = torch.empty_like(remaining)
    scales, zeros = (
        torch.empty(spec.num_groups(columns), weight.shape[0], device=weight.device) for _ in range(2)
    )
    if act_order:
        scales, zeros = (values.T.contiguous() for values in grid_of(weight.float(), 0))
    group_of = (order // size).tolist()
    for start, stop in _lazy_blocks(columns, columns if act_order else size):
        block = remaining[start:stop]
        errors = torch.empty_like(block)
        for row, column in enumerate(range(start, stop)):
            group = group_of[column]
            if not act_order and column % size == 0:
                # All earlier errors have reached these columns: a group never spans two lazy blocks, unless
                # it starts with one.
                scale, zero = grid_of(remaining[column : column + size].T, column)
                scales[group], zeros[group] = scale[:, 0], zero[:, 0]
            scale, zero, current = scales[group], zeros[group], block[row]
            code = round_to_codes(current, scale, zero, spec)
            codes[column] = code
            # Eq. 2 of the paper: the error over the factor's diagonal, times the factor's row.
            error = (current - (code - zero) * scale) / factor[column, column]
            block[row + 1 :].addr_(factor[column, column + 1 : stop], error, alpha=-1)
            errors[row] = error
        remaining[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    in_place = torch.empty_like(codes)
    in_place[order] = codes
    return QuantizedWeight(
        codes=in_place.T.to(torch.uint8).contiguous(),
        scale=scales.T.to(spec.scale_dtype).contiguous(),
        zero_point=None if spec.symmetric else zeros.T.to(torch.uint8).contiguous(),
        spec=spec,
    )


def ordered_factor(gram: Tensor, damping: float, act_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """In what order columns are rounded, and how their errors spread.

    Args:
        gram: (K, K) float32.
        damping, act_order: as `gptq_quantize`.

    Returns:
        order: (K,) columns, the first to be rounded first.
        factor: (K, K), `inverse_factor` in that order.
        variance: (K,) of each column's input given those of the columns that are rounded later: what the square of
            its error costs, once they have absorbed what they can.
    """
    order = torch.arange(gram.shape[0], device=gram.device)
    if act_order:
        order = gram.diagonal().argsort(descending=True)
    factor = inverse_factor(gram[order][:, order], damping)
    variance = torch.empty_like(gram.diagonal())
    variance[order] = factor.diagonal() ** -2
    return order, factor, variance


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """The upper triangular U with U^T U = (gram + damping * mean(diagonal) * I)^-1.

    Raises:
        ModelError: not even a damping of 1 makes the matrix regular.
    """
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    mean = diagonal.mean().clamp(min=1e-30)
    identity = torch.eye(gram.shape[0], device=gram.device)
    while damping <= 1:
        regular = gram + torch.diag(damping * mean + dead * mean)
        # With both orders of rows and columns reversed, the lower Cholesky factor turns into an upper one, R
        # R^T, and U is its inverse: one triangular solve instead of an inversion and a second factorization.
        lower, failed = torch.linalg.cholesky_ex(regular.flip(0, 1))
        if not failed:
            factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return factor
        damping *= 10
    raise ModelError(
        "given inputs whose Gram matrix can't be factorized, expected finite, not all equal activations"
    )


def _lazy_blocks(columns: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most 128 columns that hold whole groups of `size`, or lie inside one."""
    step = _LAZY_COLUMNS // size * size or size
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        for inner in range(start, stop, _LAZY_COLUMNS):
            yield inner, min(inner + _LAZY_COLUMNS, stop)


@torch.no_grad()
def apply(
    model: nn.Module,
    config: GPTQConfig,
    calibration: Calibration,
    progress: Progress | None = None,
    *,
    device: torch.device | str | None = None,
    structure: ModelStructure | None = None,
    residence: Residence | None = None,
) -> MethodReport:
    """Compress a model's linear layers with GPTQ, in place.

    Args:
        model: a causal language model.
        config: the settings.
        calibration: tokens to observe.
        progress: called as `progress(message, fraction)`.
        device: where blocks are calibrated and compressed; None stays where the model is.
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
    for block in stream_blocks(
        model, structure, calibration, inputs=config.inputs, progress=progress, residence=residence
    ):
        groups = [
            [
                name
                for name in group
                if _is_target(block.module, name) and config.touches(block.full_name(name))
            ]
            for group in block.structure.input_groups
        ]
        groups = [group for group in groups if group]
        # Naming the layers spares the run what comes after the last of them, and keeping the outputs.
        linears = None if config.inputs == "original" else block.structure.linears
        statistics = (
            {} if config.true_sequential else block.observe(linears, tokens_per_feature=_TOKENS_PER_FEATURE)
        )
        for together in _stages(block, groups):
            seen = statistics or block.observe(
                [name for group in together for name in group], tokens_per_feature=_TOKENS_PER_FEATURE
            )
            for group in together:
                for bits in dict.fromkeys(config.bits_of(block.full_name(name)) for name in group):
                    names = [name for name in group if config.bits_of(block.full_name(name)) == bits]
                    block.layers += _compress_group(block.module, block.name, names, seen[group[0]], config)
    round_outside(model, structure, config, residence)
    return finish_report("gptq", config, residence.layers, structure.left_out)


def _stages(block: CalibrationBlock, groups: list[list[str]]) -> list[list[list[str]]]:
    """Groups to compress before the next ones are observed: one at a time, but all experts at once."""
    stages: dict[Any, list[list[str]]] = {}
    for group in groups:
        path = block.list_of_experts(group[0])
        place = group[0] if path is None else group[0].removeprefix(f"{path}.").partition(".")[2]
        stages.setdefault((path, place), []).append(group)
    return list(stages.values())


def rounded(
    block: CalibrationBlock,
    names: Sequence[str],
    bits: int,
    config: GPTQConfig,
    statistics: Mapping[str, InputStatistics],
) -> dict[str, Tensor]:
    """See `METHODS.rounded`."""
    linears = [linear_in(block.module, name) for name in names]
    together = gptq_quantize(
        torch.cat([linear.weight.detach().float() for linear in linears]),
        statistics[names[0]].gram,
        config.spec_at(bits),
        damping=config.damping,
        act_order=config.act_order,
        clip=config.clip,
        clip_grid=config.clip_grid,
        clip_max_shrink=config.clip_max_shrink,
    )
    rows = [linear.out_features for linear in linears]
    return dict(zip(names, torch.split(together.dequantize(torch.float32), rows), strict=True))


def _is_target(module: nn.Module, name: str) -> bool:
    return type(module.get_submodule(name)) is nn.Linear


def _compress_group(
    module: nn.Module, block: str, names: list[str], seen: InputStatistics, config: GPTQConfig
) -> Iterator[LayerReport]:
    """Compress linears of one width that read one tensor together: their rows are independent."""
    start = time.perf_counter()
    gram = seen.gram
    linears = [linear_in(module, name) for name in names]
    dtype = linears[0].weight.dtype
    spec = config.spec_of(f"{block}.{names[0]}", dtype)
    together = gptq_quantize(
        torch.cat([linear.weight.float() for linear in linears]),
        gram,
        spec,
        damping=config.damping,
        act_order=config.act_order,
        clip=config.clip,
        clip_grid=config.clip_grid,
        clip_max_shrink=config.clip_max_shrink,
    )
    rows = [linear.out_features for linear in linears]
    zeros = [None] * len(rows) if together.zero_point is None else torch.split(together.zero_point, rows)
    seconds = (time.perf_counter() - start) / len(rows)
    for name, linear, codes, scale, zero in zip(
        names,
        linears,
        torch.split(together.codes, rows),
        torch.split(together.scale, rows),
        zeros,
        strict=True,
    ):
        weight = linear.weight.float()
        quantized = QuantizedWeight(codes, scale, zero, together.spec)
        report = LayerReport(
            f"{block}.{name}",
            spec.bits,
            config.group_size,
            nmse=output_error(weight, quantized.dequantize(torch.float32), gram),
            loss_rtn=output_error(weight, fake_quantize(weight, spec), gram),
            seconds=seconds,
            details=seen.to_dict(),
        )
        replace_linear(module, name, quantized, dtype)
        yield report

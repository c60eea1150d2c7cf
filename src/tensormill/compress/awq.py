"""AWQ: before rounding, moves scales between layers so that the input channels that matter most lose least.

A few input channels carry large activations; an error in their weights costs most. Multiplying a channel's
weights by s > 1 and dividing its activation by s changes nothing, but shrinks the channel's relative rounding
error as long as its group's step doesn't grow. One exponent of the mean activation gives s for all channels,
and is found by search; a second search shrinks each group's range where that costs less than the finer step
gains. The scales disappear in the norm or linear layer before. Needs calibration. Composes with methods that
touch other layers.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: AWQ: Activation-aware Weight Quantization for
On-Device LLM Compression and Acceleration, arXiv 2306.00978. Beyond the paper, the error of a linear layer is
computed exactly from its inputs' Gram matrix over all tokens, not from a sample of them; linears that share
scales count by their normalized errors; and the identity is always among the candidates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensormill.compress.block_calls import BlockCall
from tensormill.compress.calibration import (
    Calibration,
    CalibrationBlock,
    InputStatistics,
    Progress,
    stream_blocks,
)
from tensormill.compress.clipping import search_ranges
from tensormill.compress.experts import unfuse_experts
from tensormill.compress.fold import fold
from tensormill.compress.formats.quantization import (
    QuantizedWeight,
    QuantSpec,
    fake_quantize,
    join_groups,
    quantize_weight,
    split_groups,
)
from tensormill.compress.gptq import gptq_quantize, ordered_factor
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
from tensormill.compress.output_error import ScaleLoss, gram_loss, module_loss, output_error, sample_loss
from tensormill.compress.residence import InMemory, Residence
from tensormill.compress.structure import (
    HOW_TO_PASS_MAPPINGS,
    ModelStructure,
    ScaleMapping,
    discover,
    linear_in,
)
from tensormill.errors import InvalidArgument, ModelError


@dataclass(frozen=True)
class AWQConfig(WeightConfig):
    """Settings of AWQ.

    Attributes:
        n_grid: exponents tried, evenly from 0 to below 1.
        duo_scaling: whether scales also fall with the channel's mean weight magnitude; "both" tries a grid
            with and one without.
        refine: steps of golden-section search around the best exponent of the grid; 0 for none. Lowers the
            loss a little, but not, as far as measured, perplexity.
        objective: the error that scales minimize where a norm feeds several linears: "gram", the sum of their
            normalized output errors from the Gram matrix over all tokens; "linear", the same from a sample of
            tokens; "module", the output error of the attention or MLP that holds them, on a sample of tokens:
            the paper's, many times slower.
        objective_samples: token windows in that sample.
        clip: search a smaller range for each group.
        clip_grid: steps between the full range and none, of which those above `1 - clip_max_shrink` are
            tried (20 in the paper's code).
        clip_max_shrink: how much of a group's range may be cut away, from 0 to below 1 (0.5 there).
        clip_scores: clip query and key projections too. The paper's code doesn't, since their errors meet in
            a product; here clipping is kept only in rows whose whole error it lowers, and then it helps.
        rounding: how codes are chosen once scales are: "nearest", the paper's; "gptq" lets the columns still to come
            absorb each one's error (the paper's combination with GPTQ); ranges are then searched as GPTQ does, and with
            the objective "gram", scales for the error that remains. Costs a factorization for each input and N K^2
            operations for each linear.
        damping, act_order: as GPTQ's, for that rounding.
        mappings: "auto", or a list of `{"producer": name, "consumers": [names]}`, names as inside a block.
    """

    n_grid: int = 20
    duo_scaling: bool | str = "both"
    refine: int = 0
    objective: str = "gram"
    objective_samples: int = 8
    clip: bool = True
    clip_grid: int = 40
    clip_max_shrink: float = 0.7
    clip_scores: bool = True
    rounding: str = "nearest"
    damping: float = 0.01
    act_order: bool = True
    mappings: Literal["auto"] | Sequence[Mapping[str, Any]] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("n_grid", 1), ("refine", 0), ("objective_samples", 1), ("clip_grid", 1)):
            check_number(self, name, low)
        check_number(self, "clip_max_shrink", 0.0, 0.99)
        if self.refine == 1:
            raise InvalidArgument("given refine=1, expected 0, or at least 2 steps to narrow an interval")
        if self.duo_scaling not in (True, False, "both"):
            raise InvalidArgument(f"given duo_scaling={self.duo_scaling!r}, expected True, False or 'both'")
        if self.objective not in ("gram", "linear", "module"):
            raise InvalidArgument(
                f"given objective={self.objective!r}, expected 'gram', 'linear' or 'module'"
            )
        if self.rounding not in ("nearest", "gptq"):
            raise InvalidArgument(f"given rounding={self.rounding!r}, expected 'nearest' or 'gptq'")
        check_number(self, "damping", 1e-8, 1.0)
        if self.mappings != "auto" and (isinstance(self.mappings, str) or not self.mappings):
            raise InvalidArgument(
                f"given mappings={self.mappings!r}, expected 'auto'; or {HOW_TO_PASS_MAPPINGS}"
            )


@dataclass(frozen=True)
class ScaleSearch:
    """The outcome of a scale search.

    Attributes:
        scale: (channels,) the best scales found.
        exponent: of the mean activation.
        duo: whether the weight term took part.
        loss: of `scale`.
        loss_identity: of no scaling, which is plain rounding.
        curve: all that was tried, as (exponent, duo, loss).
    """

    scale: Tensor
    exponent: float
    duo: bool
    loss: float
    loss_identity: float
    curve: list[tuple[float, bool, float]] = field(repr=False)


def weight_magnitude(weights: Sequence[Tensor], spec: QuantSpec) -> Tensor:
    """(K,) the mean over rows of |w| over the largest |w| of its group, for weights [(N, K), ...]."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight in weights:
        groups = split_groups(weight.abs().float(), spec)
        groups = groups / groups.amax(dim=-1, keepdim=True).clamp(min=1e-30)
        total += join_groups(groups, weight.shape[1]).sum(dim=0)
    return total / sum(weight.shape[0] for weight in weights)


def candidate_scales(x_mean: Tensor, w_mean: Tensor, exponents: Tensor, duo: bool) -> Tensor:
    """Scales for each exponent r: x_mean^r, with `duo` over w_mean^(1-r), normalized to sqrt(max * min) = 1.

    Args:
        x_mean: (channels,) mean |activation|.
        w_mean: (channels,) mean relative |weight|.
        exponents: (candidates,).
        duo: whether the weights take part.

    Returns:
        (candidates, channels) positive and finite.

    >>> candidate_scales(torch.tensor([1.0, 4.0, 16.0]), torch.ones(3), torch.tensor([0.5]), duo=False)
    tensor([[0.5000, 1.0000, 2.0000]])
    """
    r = exponents.unsqueeze(1)
    scale = x_mean**r
    if duo:
        scale = scale / (w_mean ** (1 - r) + 1e-4)
    scale = scale.clamp(min=1e-4)
    scale = scale / (scale.amax(dim=1, keepdim=True) * scale.amin(dim=1, keepdim=True)).sqrt()
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))


def search_scales(
    x_mean: Tensor,
    w_mean: Tensor,
    loss: ScaleLoss,
    *,
    n_grid: int = 20,
    duo_scaling: bool | str = "both",
    refine: int = 0,
) -> ScaleSearch:
    """Find the exponent whose scales lose least; no scaling is always among the candidates.

    Args:
        x_mean: (channels,) mean |activation| of each channel that gets a scale.
        w_mean: (channels,) as `weight_magnitude`.
        loss: the losses of candidate scales.
        n_grid: exponents of the grid.
        duo_scaling: whether the weights take part, or "both".
        refine: evaluations of the golden-section search around the grid's best.
    """
    grid = torch.arange(n_grid, device=x_mean.device) / n_grid
    kinds = {True: [True], False: [False], "both": [False, True]}[duo_scaling]
    tried = [(0.0, False)] + [(r, duo) for duo in kinds for r in grid.tolist() if r > 0 or duo]
    scales = torch.cat(
        [torch.ones_like(x_mean)[None]]
        + [candidate_scales(x_mean, w_mean, grid if duo else grid[1:], duo) for duo in kinds]
    )
    losses = loss(scales).tolist()
    curve = [(r, duo, value) for (r, duo), value in zip(tried, losses, strict=True)]
    best = min(range(len(losses)), key=losses.__getitem__)
    exponent, duo = tried[best]
    result = ScaleSearch(scales[best], exponent, duo, losses[best], losses[0], curve)
    if refine == 0 or (best == 0 and duo_scaling is True):
        return result

    def evaluate(r: float) -> float:
        nonlocal result
        scale = candidate_scales(x_mean, w_mean, torch.tensor([r], device=x_mean.device), duo)
        value = loss(scale).item()
        curve.append((r, duo, value))
        if value < result.loss:
            result = ScaleSearch(scale[0], r, duo, value, losses[0], curve)
        return value

    golden_section(evaluate, max(0.0, exponent - 1 / n_grid), min(1.0, exponent + 1 / n_grid), refine)
    return result


def golden_section(function: Callable[[float], float], low: float, high: float, evaluations: int) -> None:
    """Narrow [low, high] around a minimum of `function` with so many evaluations, at least two."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(evaluations - 2):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)


@torch.no_grad()
def apply(
    model: nn.Module,
    config: AWQConfig,
    calibration: Calibration,
    progress: Progress | None = None,
    *,
    device: torch.device | str | None = None,
    structure: ModelStructure | None = None,
    residence: Residence | None = None,
) -> MethodReport:
    """Compress a model's linear layers with AWQ, in place.

    Args:
        model: a causal language model.
        config: the settings.
        calibration: tokens to observe.
        progress: called as `progress(message, fraction)`.
        device: where blocks are calibrated and compressed; None stays where the model is.
        structure: of the model, if known already; its mappings then count.
        residence: of the model, with a device of its own; None stands for one in memory.

    Raises:
        InvalidArgument: weights or calibration inputs aren't finite, or a size doesn't fit.
        ModelError: the model has no blocks of linear layers, or no edge along which scales can move.
    """
    residence = residence or InMemory(model, device)
    if structure is None:
        unfuse_experts(model)
        structure = discover(model, config.mappings, residence=residence)
    if config.objective != "gram" and residence.ranks.size > 1:
        raise InvalidArgument(
            f"given objective={config.objective!r} and {residence.ranks.size} processes, expected 'gram', whose "
            "statistics processes can add up"
        )
    if not any(block.mappings for block in structure.blocks):
        raise ModelError(
            f"given a {type(model).__name__} without an edge along which scales can be moved, "
            f"expected norms that feed linear layers (found {structure}); {HOW_TO_PASS_MAPPINGS}"
        )
    check_layers(model, structure, config)
    for block in stream_blocks(model, structure, calibration, progress=progress, residence=residence):
        block.layers += _compress_block(block, config)
    round_outside(model, structure, config, residence)
    return finish_report("awq", config, residence.layers, structure.left_out)


def _compress_block(block: CalibrationBlock, config: AWQConfig) -> list[LayerReport]:
    module = block.module
    linears = {
        name: linear_in(module, name)
        for name in block.structure.linears
        if type(module.get_submodule(name)) is nn.Linear
    }
    targets = {name: linear for name, linear in linears.items() if config.touches(block.full_name(name))}
    mappings = [
        mapping
        for mapping in block.structure.mappings
        if any(name in targets for name in mapping.consumers)
        and linears.keys()
        >= set(mapping.consumers) | ({mapping.producer} if mapping.kind == "linear" else set())
    ]
    sampled = {} if config.objective == "gram" else {mapping.inspected: None for mapping in mappings}
    statistics = block.observe(capture=list(sampled), capture_samples=config.objective_samples)

    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.data = parameter.data.float()
    specs = {name: config.spec_of(block.full_name(name), dtypes[f"{name}.weight"]) for name in targets}
    before = {
        name: output_error(linear.weight, fake_quantize(linear.weight, specs[name]), statistics[name].gram)
        for name, linear in targets.items()
    }
    seconds = dict.fromkeys(targets, 0.0)
    details: dict[str, dict[str, Any]] = {name: {} for name in targets}
    searches = []
    for mapping in mappings:
        start = time.perf_counter()
        found = _search_mapping(block, mapping, targets, specs, statistics, config)
        searches.append((mapping, found.scale))
        names = [name for name in mapping.consumers if name in targets]
        for name in names:
            details[name] = _describe(mapping, found) if name == names[0] else {"scaled_with": names[0]}
            seconds[name] += (time.perf_counter() - start) / len(names)
    for mapping, scale in searches:
        columns = fold(module, mapping, scale, stored_dtype=dtypes.get(f"{mapping.producer}.weight"))
        # Linears that read one tensor share its statistics; so do experts that took those of the whole layer.
        for seen in {id(statistics[name].gram): statistics[name] for name in mapping.consumers}.values():
            seen.divide(columns)

    layers = []
    for name, linear in targets.items():
        start = time.perf_counter()
        weight, gram, spec = linear.weight.data, statistics[name].gram, specs[name]
        quantized, clip = _round(block, name, weight, gram, spec, config)
        if clip is not None:
            largest = split_groups(weight, spec).abs().amax(dim=-1)
            details[name]["clipped_groups"] = (clip < largest).float().mean().item()
        details[name] |= statistics[name].to_dict()
        error = output_error(weight, quantized.dequantize(torch.float32), gram)
        replace_linear(module, name, quantized, dtypes[f"{name}.weight"])
        seconds[name] += time.perf_counter() - start
        layers.append(
            LayerReport(
                block.full_name(name),
                spec.bits,
                config.group_size,
                error,
                before[name],
                seconds[name],
                details[name],
            )
        )
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return layers


def _round(
    block: CalibrationBlock, name: str, weight: Tensor, gram: Tensor, spec: QuantSpec, config: AWQConfig
) -> tuple[QuantizedWeight, Tensor | None]:
    """A scaled weight (N, K) rounded as the settings say, and its ranges (N, G) if they were searched beforehand."""
    clips = config.clip and (config.clip_scores or name not in block.structure.scores)
    search: Any = {"clip_grid": config.clip_grid, "clip_max_shrink": config.clip_max_shrink}
    if config.rounding == "gptq":
        gptq: Any = {"damping": config.damping, "act_order": config.act_order}
        return gptq_quantize(weight, gram, spec, **gptq, clip=clips, **search), None
    if not clips:
        return quantize_weight(weight, spec), None
    own = search_ranges(weight[block.ranks.own(len(weight))], gram, spec, **search)
    clip = block.ranks.collect(own, len(weight))
    return quantize_weight(weight, spec, clip), clip


def rounded(
    block: CalibrationBlock,
    names: Sequence[str],
    bits: int,
    config: AWQConfig,
    statistics: Mapping[str, InputStatistics],
) -> dict[str, Tensor]:
    """See `METHODS.rounded`; scales are searched with the objective "gram" whatever the settings say.

    Rows may be scaled too, where the linears are producers of another edge; that moves their groups' scales and no
    code, and so changes nothing.
    """
    linears = {name: linear_in(block.module, name) for name in names}
    spec, weights = config.spec_at(bits), {name: one.weight.detach() for name, one in linears.items()}
    gram, columns = statistics[names[0]].gram, None
    mapping = next((one for one in block.structure.mappings if set(names) <= set(one.consumers)), None)
    if mapping is not None:
        by_gram, specs = replace(config, objective="gram"), dict.fromkeys(names, spec)
        found = _search_mapping(block, mapping, linears, specs, statistics, by_gram)
        columns = mapping.expand(found.scale)
        gram = gram / torch.outer(columns, columns)
    result = {}
    for name, weight in weights.items():
        scaled = weight if columns is None else weight * columns
        approximation = _round(block, name, scaled, gram, spec, config)[0].dequantize(torch.float32)
        result[name] = approximation if columns is None else approximation / columns
    return result


def _search_mapping(
    block: CalibrationBlock,
    mapping: ScaleMapping,
    targets: Mapping[str, nn.Linear],
    specs: Mapping[str, QuantSpec],
    statistics: Mapping[str, InputStatistics],
    config: AWQConfig,
) -> ScaleSearch:
    """Search the scales of one edge in the unchanged block, with the objective of the settings."""
    names = [name for name in mapping.consumers if name in targets]
    linears, chosen = [targets[name] for name in names], [specs[name] for name in names]
    weights = [linear.weight.data for linear in linears]
    seen = [statistics[name] for name in names]
    # An expert counts as often as it is chosen.
    counts = [each.tokens if each.routed is None else each.routed for each in seen]
    shares = [count / max(counts) if any(counts) else 1.0 for count in counts]
    calls = [call.to(torch.float32) for call in block.captured.get(mapping.inspected, ())]
    module = block.module.get_submodule(mapping.inspected)
    inputs = _inputs_of(linears, module, calls) if config.objective == "linear" else []
    if config.objective == "module" and mapping.inspected not in names:
        per_column = module_loss(module, linears, calls, chosen)
    elif any(x.numel() for x in inputs):
        per_column = sample_loss(weights, inputs, chosen, shares)
    else:
        # An expert that the sample doesn't reach has the statistics of all tokens.
        variances = None
        if config.rounding == "gptq":
            distinct = {id(each.gram): each.gram for each in seen}
            found = {
                key: ordered_factor(gram, config.damping, config.act_order)[2]
                for key, gram in distinct.items()
            }
            variances = [found[id(each.gram)] for each in seen]
        per_column = gram_loss(weights, [each.gram for each in seen], chosen, shares, variances)
    ranks = block.ranks

    def losses(scales: Tensor) -> Tensor:
        own = [mapping.expand(scale) for scale in scales[ranks.own(len(scales))]]
        return ranks.collect(per_column(torch.stack(own)) if own else scales.new_zeros(0), len(scales))

    return search_scales(
        mapping.reduce(_mean_abs(seen)),
        mapping.reduce(weight_magnitude(weights, chosen[0])),
        losses,
        n_grid=config.n_grid,
        duo_scaling=config.duo_scaling,
        refine=config.refine,
    )


def _mean_abs(seen: Sequence[InputStatistics]) -> Tensor:
    """(K,) the mean of |x| over all tokens that some linears see."""
    distinct = list({id(each.gram): each for each in seen}.values())
    total = sum(each.tokens for each in distinct)
    return torch.stack([each.mean_abs * (each.tokens / total) for each in distinct]).sum(dim=0)


def _inputs_of(linears: Sequence[nn.Linear], module: nn.Module, calls: Sequence[BlockCall]) -> list[Tensor]:
    """(tokens, K) what each linear layer reads when `module`, which holds them, is called."""
    inputs: list[list[Tensor]] = [[linear.weight.new_zeros(0, linear.in_features)] for linear in linears]
    with ExitStack() as stack:
        for linear, read in zip(linears, inputs, strict=True):
            hook = linear.register_forward_pre_hook(
                lambda _module, args, read=read: read.append(args[0].flatten(0, -2))
            )
            stack.callback(hook.remove)
        for call in calls:
            module(*call.args, **call.kwargs)
    return [torch.cat(read) for read in inputs]


def _describe(mapping: ScaleMapping, search: ScaleSearch) -> dict[str, Any]:
    scale = max(search.loss_identity, 1e-30)
    return {
        "producer": mapping.producer,
        "exponent": search.exponent,
        "duo_scaling": search.duo,
        "largest_scale": search.scale.max().item(),
        "loss_over_rtn": search.loss / scale,
        "curve": [[exponent, duo, loss / scale] for exponent, duo, loss in sorted(search.curve)],
    }

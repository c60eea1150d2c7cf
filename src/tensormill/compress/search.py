"""Which widths for which layers within a budget: measures what each choice costs, and picks from the Pareto front.

sizes (from the format) -> losses (`sensitivity`) -> times of the kernels -> front (`allocation`) -> the point within the
budget. A perplexity budget bisects along the front with finished compressions. What finished models are measured on is
calibration text that the method doesn't see; the evaluation text takes no part.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tensormill.compress.allocation import (
    Allocation,
    Option,
    Unit,
    pareto_front,
    uniform_allocations,
)
from tensormill.compress.budget import Budget
from tensormill.compress.calibration import Calibration
from tensormill.compress.checkpoint import stored_dtype
from tensormill.compress.evaluate import max_positions
from tensormill.compress.formats.checkpoint_format import CheckpointFormat, Layer, Scheme
from tensormill.compress.methods import METHODS, WeightConfig, check_layers
from tensormill.compress.recipe import Step
from tensormill.compress.search_report import BudgetSearch, FrontPoint, WidthChoice
from tensormill.compress.sensitivity import LayerGroup, Measure, layer_groups, measure_sensitivity
from tensormill.compress.speed import tokens_per_second
from tensormill.compress.stages import Progress, Stages
from tensormill.compress.structure import discover, linear_in
from tensormill.compress.sweep import SAMPLES, sweep
from tensormill.errors import InvalidArgument, ModelError
from tensormill.measure import copies_past_cache, time_together
from tensormill.ops.bit_packing import packed_width
from tensormill.ops.linear_wna16 import linear_wna16

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WIDTHS = (2, 3, 4, 5, 6, 7, 8)

# Calibration windows on which layers are observed, and tokens of each.
_WINDOWS, _LENGTH = 16, 256
# Tokens of the kept-back text on which finished models are measured.
_PROBE_TOKENS = 8192
# Points of the front that a perplexity budget is bisected over, and that are shown.
_SHOWN = 33
# Every so many pieces of the calibration text one is kept back.
_PIECES, _KEPT_BACK = 40, 8
# An entry of a safetensors header, less the tensor's name.
_HEADER_BYTES = 100


@dataclass(frozen=True)
class CalibrationTexts:
    """Calibration text in two parts, from all over it: most for the method, the rest to measure finished models on."""

    method: list[str]
    kept_back: str

    @classmethod
    def of(cls, texts: Sequence[str]) -> CalibrationTexts:
        """Cut texts at line ends (or else spaces) into pieces, every eighth of which is kept back."""
        text = "\n\n".join(texts)
        cuts = [0]
        for index in range(1, _PIECES):
            place = index * len(text) // _PIECES
            found = min((at for at in (text.find(mark, place) for mark in "\n ") if at >= 0), default=place)
            cuts.append(max(cuts[-1], found))
        cuts.append(len(text))
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
        last = _KEPT_BACK - 1
        return cls(
            ["".join(piece for i, piece in enumerate(pieces) if i % _KEPT_BACK != last)],
            "".join(piece for i, piece in enumerate(pieces) if i % _KEPT_BACK == last),
        )

    def calibration(self, step: Step, tokenizer: Any, most: int | None = None) -> Calibration | None:
        """The windows that a step observes, at most `most`; None if it needs none."""
        config = step.config
        if step.method == "rtn":
            return None
        samples = config.calibration_samples if most is None else min(most, config.calibration_samples)
        return Calibration.from_text(
            self.method, tokenizer, samples=samples, length=config.calibration_length
        )


def search_widths(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    step: Step,
    budget: Budget,
    layout: CheckpointFormat,
    texts: CalibrationTexts,
    *,
    source: Path | None = None,
    widths: Sequence[int] | None = None,
    measure: Measure | Literal["auto"] = "auto",
    probe: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> BudgetSearch:
    """Choose the widths of a model's layers within a budget.

    Args:
        model: The original; left unchanged.
        tokenizer: Its tokenizer.
        step: The method and its settings; its `bits` don't count.
        budget: The limits.
        layout: Format of the checkpoint.
        texts: Calibration text.
        source: Where the original lies; None takes its dtype for that of the checkpoint.
        widths: Candidates; None takes 2 to 8, as far as the format has them.
        measure: See `measure_sensitivity`.
        probe: Measure some finished models beside the predictions.
        seed: Of the prompt on which speed is measured.
        progress: Called with a message and the share done.

    Raises:
        InvalidArgument: A budget that nothing meets or everything does, with the range; a width that is none; or
            settings that fix widths.
        TensormillError: What the method or the format refuses.
    """
    began = time.perf_counter()
    if step.config.bits_by_layer:
        raise InvalidArgument(
            "given bits_by_layer and a budget, expected one of them; the budget chooses widths"
        )
    timed = budget.tokens_per_second is not None
    by_perplexity = budget.perplexity is not None
    stages = Stages(
        progress, losses=60, times=8, speed=6 * timed, probes=40 * probe, bisect=120 * by_perplexity
    )
    stages.enter("losses", "sensitivity")
    structure = discover(model, getattr(step.config, "mappings", "auto"))
    check_layers(model, structure, step.config)
    groups = layer_groups(model, structure, step.config)
    candidates, mixed = _candidates(model, groups, widths, layout, step.config)
    sizes = _Sizes(model, groups, layout, step.config, source)
    sizes.check(budget, candidates)

    windows = _observed_windows(model, tokenizer, texts)
    sensitivity = measure_sensitivity(
        model, structure, groups, candidates, step, windows, measure=measure, progress=stages
    )
    stages.enter("times", "timing the kernels")
    times = linear_times(model, groups, candidates, step.config, stages)
    units = [
        Unit(
            group.layers,
            tuple(
                Option(bits, loss, sizes.of_group(group, bits), times[group][bits])
                for bits, loss in sensitivity.losses[group].items()
            ),
        )
        for group in groups
    ]
    rest = max_seconds = None
    if budget.tokens_per_second is not None:
        stages.enter("speed", "measuring decoding speed")
        rest = _seconds_besides(model, step, uniform_allocations(units), seed)
        max_seconds = 1 / budget.tokens_per_second - rest
    uniform = uniform_allocations(units)
    within = [one for one in uniform if max_seconds is None or one.seconds <= max_seconds]
    front = pareto_front(units, max_seconds=max_seconds) if mixed else _best_uniform(within)
    if not front:
        assert rest is not None
        quickest = sum(min(option.seconds for option in unit.options) for unit in units)
        raise InvalidArgument(
            f"given the budget {budget}, which no choice of {_listed(candidates)} bits is expected to meet; the "
            f"fastest decodes {1 / (rest + quickest):.3g} tok/s on this device"
        )

    def point(one: Allocation) -> FrontPoint:
        return FrontPoint(
            bits_per_weight=sizes.bits_per_weight(one.bits),
            bytes=sizes.checkpoint(one),
            predicted_kl=one.loss,
            milliseconds=1e3 * one.seconds,
            tokens_per_second=None if rest is None else 1 / (rest + one.seconds),
            widths=dict(sorted(Counter(one.bits).items())),
            measured=dict(measured[one.bits]) if one.bits in measured else None,
            chosen=one.bits == chosen.bits,
        )

    prober = _Prober(model, tokenizer, step, groups, texts)
    measured: dict[tuple[int, ...], Mapping[str, float]] = {}
    if by_perplexity:
        stages.enter("bisect", "bisecting the front")
        chosen = _bisected(_thinned(front, _SHOWN), budget, prober, measured, stages)
    else:
        fitting = [one for one in front if sizes.fits(one, budget)]
        if not fitting:
            raise InvalidArgument(
                f"given the budget {budget}, which no choice of {_listed(candidates)} bits meets; "
                + (
                    f"what is within the size is expected to be slower ({_megabytes(sizes.checkpoint(front[0]))} is "
                    "fast enough)"
                    if timed
                    else f"{layout.name} checkpoints have one width"
                )
            )
        chosen = min(fitting, key=lambda one: one.loss)
    if probe:
        stages.enter("probes", "measuring points of the front")
        # Methods that calibrate take their time.
        wanted = _probes(front, uniform, chosen, few=step.method != "rtn")
        wanted = [one for one in wanted if one.bits not in measured]
        measured.update(prober.measure(wanted, SAMPLES, stages))
    stages.done()
    shown = _thinned(front, _SHOWN)
    extra = [one for one in front if one.bits in measured or one.bits == chosen.bits]
    shown = sorted({one.bits: one for one in (*shown, *extra)}.values(), key=lambda one: one.bytes)
    return BudgetSearch(
        budget=str(budget),
        method=step.method,
        step=Step(step.method, with_widths(step.config, groups, chosen.bits)),
        widths=tuple(candidates),
        front=[point(one) for one in shown],
        uniform=[point(one) for one in uniform],
        groups=[
            WidthChoice(group.block, group.names, bits, sensitivity.losses[group])
            for group, bits in zip(groups, chosen.bits, strict=True)
        ],
        measure=sensitivity.measure,
        rounding=sensitivity.rounding,
        run=sensitivity.run,
        tokens=sensitivity.tokens,
        probe_tokens=prober.tokens,
        original_perplexity=prober.original,
        seconds=time.perf_counter() - began,
        texts=texts,
    )


def with_widths(config: WeightConfig, groups: Sequence[LayerGroup], bits: Sequence[int]) -> WeightConfig:
    """Settings with a width for each group: the most frequent one as `bits`, the others by layer.

    Example:
        >>> groups = [LayerGroup("0", ("q", "k")), LayerGroup("0", ("o",))]
        >>> with_widths(WeightConfig(), groups, [3, 8]).bits_by_layer
        {'0.o': 8}
    """
    by_layer = {layer: width for group, width in zip(groups, bits, strict=True) for layer in group.layers}
    (common, _), *_ = Counter(by_layer.values()).most_common(1)
    others = {layer: width for layer, width in by_layer.items() if width != common}
    return replace(config, bits=common, bits_by_layer=others)


def linear_times(
    model: nn.Module,
    groups: Sequence[LayerGroup],
    widths: Sequence[int],
    config: WeightConfig,
    progress: Progress | None = None,
) -> dict[LayerGroup, dict[int, float]]:
    """Seconds of each group's low-bit products for one token, by width, timed on the model's device past its caches."""
    shapes: dict[tuple[Any, ...], None] = {}
    for group in groups:
        for name in group.layers:
            shapes[_shape(linear_in(model, name))] = None
    found: dict[tuple[Any, ...], dict[int, float]] = {}
    for index, shape in enumerate(shapes):
        if progress is not None:
            progress("timing the kernels", index / len(shapes))
        calls = {str(bits): _product_calls(shape, bits, config) for bits in widths}
        timings = time_together(calls, shape[3], seconds=0.05)
        found[shape] = {bits: timings[str(bits)].seconds for bits in widths}
    return {
        group: {
            bits: sum(found[_shape(linear_in(model, name))][bits] for name in group.layers) for bits in widths
        }
        for group in groups
    }


def _shape(linear: nn.Linear) -> tuple[int, int, torch.dtype, torch.device]:
    return linear.out_features, linear.in_features, linear.weight.dtype, linear.weight.device


def _product_calls(shape: tuple[Any, ...], bits: int, config: WeightConfig) -> list[Callable[[], object]]:
    rows, columns, dtype, device = shape
    groups = config.spec_at(bits).num_groups(columns)

    def operands() -> tuple[Any, ...]:
        weight = torch.randint(
            -(1 << 31), 1 << 31, (rows, packed_width(columns, bits)), dtype=torch.int32, device=device
        )
        scale = torch.full((rows, groups), 0.01, dtype=dtype, device=device)
        zero = None if config.symmetric else torch.ones(rows, groups, dtype=torch.uint8, device=device)
        return weight, scale, zero

    x = torch.randn(1, columns, device=device).to(dtype)
    first = operands()
    copies = copies_past_cache([part for part in first if part is not None], device, at_most=256 << 20)
    sets = [first, *(operands() for _ in range(copies - 1))]
    return [
        lambda one=one: linear_wna16(x, *one, bits=bits, group_size=config.group_size)  # type: ignore[misc]
        for one in sets
    ]


class _Sizes:
    """Bytes and bits of every group at every width, and of all that stays as it is."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[LayerGroup],
        layout: CheckpointFormat,
        config: WeightConfig,
        source: Path | None,
    ) -> None:
        self.groups, self.layout, self.config = list(groups), layout, config
        self.linears = {name: linear_in(model, name) for group in groups for name in group.layers}
        self.weights = sum(linear.weight.numel() for linear in self.linears.values())
        dtype = None if source is None else stored_dtype(source)
        tensors, names = {}, 0
        for name, tensor in model.state_dict().items():
            if name.removesuffix(".weight") in self.linears:
                names += sum(len(name) + len(part) + _HEADER_BYTES for part in layout.parts)
                continue
            names += len(name) + _HEADER_BYTES
            size = (dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype).itemsize
            tensors[tensor.data_ptr(), tensor.shape] = tensor.numel() * size
        self.fixed = sum(tensors.values()) + names

    def of_group(self, group: LayerGroup, bits: int) -> float:
        """Bytes of a group's packed weights."""
        total = 0
        scheme = Scheme(bits, self.config.group_size, self.config.symmetric)
        for name in group.layers:
            linear = self.linears[name]
            size = scheme.group_size if scheme.group_size < linear.in_features else -1
            empty = self.layout.empty_tensors(
                name, linear, replace(scheme, group_size=size), {}, linear.weight.dtype
            )
            total += sum(tensor.numel() * tensor.element_size() for tensor in empty.values())
            if "g_idx" in self.layout.parts:  # written, but not read back
                total += 4 * linear.in_features
        return float(total)

    def checkpoint(self, allocation: Allocation) -> float:
        """Bytes of the weight files, to within the headers' last kilobytes; never too few."""
        return self.fixed + allocation.bytes

    def bits_per_weight(self, bits: Sequence[int]) -> float:
        """As `footprint.bits_per_weight` of the compressed model, with a width for each group."""
        total = 0.0
        for group, width in zip(self.groups, bits, strict=True):
            for name in group.layers:
                linear = self.linears[name]
                scales = linear.out_features * self.config.spec_at(width).num_groups(linear.in_features)
                dtype = self.layout.scale_dtype or linear.weight.dtype
                total += 32 * linear.out_features * packed_width(linear.in_features, width)
                total += scales * (8 * dtype.itemsize + (0 if self.config.symmetric else width))
        return total / self.weights

    def uniform(self, bits: int) -> Allocation:
        """One width for all, without losses and times."""
        size = sum(self.of_group(group, bits) for group in self.groups)
        return Allocation((bits,) * len(self.groups), 0.0, size, 0.0)

    def fits(self, allocation: Allocation, budget: Budget) -> bool:
        """Whether an allocation is within the budget's size."""
        if budget.bits_per_weight is not None:
            # A part in 10^9, for the user's 4.1875 against the same computed as a sum.
            return self.bits_per_weight(allocation.bits) <= budget.bits_per_weight * (1 + 1e-9)
        return budget.bytes is None or self.checkpoint(allocation) <= budget.bytes

    def check(self, budget: Budget, widths: Sequence[int]) -> None:
        """Refuse, as `InvalidArgument` with the range, a size that nothing or everything is within."""
        low, high = self.uniform(min(widths)), self.uniform(max(widths))
        if budget.bits_per_weight is None and budget.bytes is None:
            return
        if budget.bits_per_weight is not None:
            ends = f"{self.bits_per_weight(low.bits):.4g}bpw to {self.bits_per_weight(high.bits):.4g}bpw"
            above = budget.bits_per_weight > self.bits_per_weight(high.bits) * (1 + 1e-3)
        else:
            assert budget.bytes is not None
            ends = f"{_megabytes(self.checkpoint(low))} to {_megabytes(self.checkpoint(high))}"
            above = budget.bytes > self.checkpoint(high)
        # Where there is no choice, whatever has room for it will do.
        if (above and len(widths) > 1) or not self.fits(low, budget):
            raise InvalidArgument(
                f"given the budget {budget}, expected {ends}: what {_listed(widths)} bits give with groups of "
                f"{self.config.group_size}"
            )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.4g}MB" if size < 1e9 else f"{size / 1e9:.4g}GB"


def _listed(widths: Sequence[int]) -> str:
    words = [str(bits) for bits in widths]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _candidates(
    model: nn.Module,
    groups: Sequence[LayerGroup],
    widths: Sequence[int] | None,
    layout: CheckpointFormat,
    config: WeightConfig,
) -> tuple[list[int], bool]:
    """Widths to choose from, narrow first, and whether the format may mix them.

    Raises:
        InvalidArgument: A width asked for that is none.
        ModelError: The format has not one of them, or not one asked for, for these layers.
    """
    linears = {name: linear_in(model, name) for group in groups for name in group.layers}

    def refusal(bits: int) -> ModelError | None:
        scheme = Scheme(bits, config.group_size, config.symmetric)
        try:
            layout.check_schemes([scheme])
            layout.check_layers(
                {name: Layer(scheme, one.out_features, one.in_features) for name, one in linears.items()},
                model,
            )
        except ModelError as error:
            return error
        return None

    for bits in widths or ():
        config.spec_at(bits)
    refused = {bits: refusal(bits) for bits in sorted(set(widths or WIDTHS))}
    found = [bits for bits, error in refused.items() if error is None]
    errors = [error for error in refused.values() if error is not None]
    if errors and (widths or not found):
        raise errors[-1]
    try:
        layout.check_schemes([Scheme(bits, config.group_size, config.symmetric) for bits in found])
    except ModelError:
        return found, False
    return found, True


def _observed_windows(model: nn.Module, tokenizer: Any, texts: CalibrationTexts) -> Calibration:
    length = min(_LENGTH, max_positions(model) or _LENGTH)
    return Calibration.from_text(texts.method, tokenizer, samples=_WINDOWS, length=length)


def _best_uniform(allocations: Sequence[Allocation]) -> list[Allocation]:
    """One width for all: the front of a format that doesn't mix widths."""
    front: list[Allocation] = []
    for one in sorted(allocations, key=lambda one: one.bytes):
        if not front or one.loss < front[-1].loss:
            front.append(one)
    return front


def _seconds_besides(model: nn.Module, step: Step, uniform: Sequence[Allocation], seed: int) -> float:
    """Seconds that decoding a token takes besides the low-bit products, measured on a model with one width."""
    middle = uniform[len(uniform) // 2]
    shared = ("group_size", "symmetric", "tail", "skip", "only")
    settings = {name: getattr(step.config, name) for name in shared}
    config_class, apply = METHODS["rtn"]
    rounded = copy.deepcopy(model)
    apply(rounded, config_class(bits=middle.bits[0], **settings), None, None)
    speed = tokens_per_second(rounded, prompt_tokens=32, new_tokens=16, repeats=3, seed=seed)
    return max(0.0, 1 / speed.decode - middle.seconds)


def _thinned(front: Sequence[Allocation], most: int) -> list[Allocation]:
    """About `most` points of a front, evenly spread over its sizes, both ends among them."""
    if len(front) <= most:
        return list(front)
    low, high = front[0].bytes, front[-1].bytes
    cells: dict[int, Allocation] = {}
    for one in front:
        cells[int((one.bytes - low) / (high - low) * (most - 2) + 1e-9)] = one
    return list({one.bits: one for one in (front[0], *cells.values(), front[-1])}.values())


def _probes(
    front: Sequence[Allocation], uniform: Sequence[Allocation], chosen: Allocation, *, few: bool
) -> list[Allocation]:
    """What to measure: the choice, the next larger single width and a far point of the front; the next smaller single
    width and a second point too, unless `few`.
    """
    larger = [one for one in uniform if one.bytes >= chosen.bytes and one.bits != chosen.bits]
    smaller = [one for one in uniform if one.bytes < chosen.bytes]
    points = []
    for share in (0.2, 0.6):
        size = front[0].bytes + share * (front[-1].bytes - front[0].bytes)
        points.append(min(front, key=lambda one: abs(one.bytes - size)))
    points.sort(key=lambda one: -abs(one.bytes - chosen.bytes))
    wanted = [chosen, *larger[:1], points[0]]
    if not few:
        wanted += [*smaller[-1:], points[1]]
    return list({one.bits: one for one in wanted}.values())


class _Prober:
    """Measures finished models on the text that was kept back; each model is evaluated beside the original."""

    def __init__(
        self, model: Any, tokenizer: Any, step: Step, groups: Sequence[LayerGroup], texts: CalibrationTexts
    ) -> None:
        self.model, self.tokenizer, self.step, self.groups, self.texts = model, tokenizer, step, groups, texts
        self.original: float | None = None
        self.tokens = 0

    def measure(
        self, allocations: Sequence[Allocation], samples: int | None, progress: Progress | None
    ) -> dict[tuple[int, ...], Mapping[str, float]]:
        """Perplexity and KL by widths, the method calibrated on at most so many windows."""
        if not allocations:
            return {}
        steps = [
            Step(self.step.method, with_widths(self.step.config, self.groups, one.bits))
            for one in allocations
        ]
        calibration = self.texts.calibration(self.step, self.tokenizer, samples)
        first, *found = sweep(
            self.model, self.tokenizer, {"kept back": self.texts.kept_back}, steps, calibration=calibration,
            max_tokens=_PROBE_TOKENS, progress=progress,
        )  # fmt: skip
        self.original, self.tokens = first.evaluation.perplexity, first.evaluation.tokens
        return {
            one.bits: {
                "perplexity": result.evaluation.perplexity,
                "kl": math.nan if result.evaluation.comparison is None else result.evaluation.comparison.kl,
            }
            for one, result in zip(allocations, found, strict=True)
        }


def _bisected(
    front: Sequence[Allocation],
    budget: Budget,
    prober: _Prober,
    measured: dict[tuple[int, ...], Mapping[str, float]],
    stages: Stages,
) -> Allocation:
    """The smallest point of a front whose measured perplexity rises by no more than the budget says."""
    assert budget.perplexity is not None
    low, high = 0, len(front)  # the answer is in [low, high]; high means that none meets it
    tried = 0
    # Where the prediction says: a divergence of log(1 + rise) nats.
    wanted = math.log1p(budget.perplexity)
    guess = next((i for i, one in enumerate(front) if one.loss <= wanted), len(front) - 1)
    expected = max(1, math.ceil(math.log2(len(front) + 1)))
    while low < high:
        at = guess if tried == 0 else (low + high) // 2
        stages.enter("bisect", f"perplexity: compression {tried + 1}", min(tried, expected - 1), expected)
        measured.update(prober.measure([front[at]], None, stages))
        tried += 1
        assert prober.original is not None
        perplexity = measured[front[at].bits]["perplexity"]
        if perplexity <= prober.original * (1 + budget.perplexity):
            high = at
        else:
            low = at + 1
    if high == len(front):
        rise = measured[front[-1].bits]["perplexity"] / (prober.original or math.nan) - 1
        raise InvalidArgument(
            f"given the budget {budget}, which no point of the front meets; the best, of {_megabytes(front[-1].bytes)} "
            f"of packed weights, is at ppl+{rise * 100:.3g}%"
        )
    return front[high]

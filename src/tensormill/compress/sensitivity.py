"""What rounding each layer alone costs the model, measured: KL of its next-token distributions from the unchanged ones.

One block after the other, layers are replaced by what the method would make of them at a width, everything else stays
as it is, and the model runs on from that block on a few windows of calibration text. What lies before the block was
computed once. Layers that read the same tensor (query, key and value; gate and up) get one width, since serving
engines fuse them; so do the experts of a block.

Widths above 4 bits are not run: a divergence is quadratic in a small change, so that of the widest width that was
run is scaled by the ratio of the layers' squared output errors. (On the built-in model the
sum over all layers at 8 bits comes out 2 % below what running them gives.)

Where running every layer at every width would take too long, each block is run once, at one width, and its layers
share that loss in proportion to their normalized output errors, which the inputs' Gram matrix gives for all widths.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensormill.compress.calibration import Calibration, CalibrationBlock, InputStatistics, stream_blocks
from tensormill.compress.evaluate import evaluating
from tensormill.compress.formats.quantization import fake_quantize
from tensormill.compress.methods import METHODS, WeightConfig
from tensormill.compress.output_error import output_error
from tensormill.compress.precision import search_precision, widened
from tensormill.compress.recipe import Step
from tensormill.compress.stages import Progress
from tensormill.compress.structure import ModelStructure, linear_in
from tensormill.errors import InvalidArgument, ModelError

Measure = Literal["layers", "blocks"]

#: The widest width that is run where a narrower one is among the candidates.
WIDEST_RUN = 4

# Of the windows that are observed, which are run. (GPTQ would look too good on no other windows than its own.)
_STRIDE = 4
# Seconds of running above which "auto" takes "blocks".
_PATIENCE = 240.0
# Models of up to so many bytes in float32 are run in it: 16-bit activations hide small losses.
_FLOAT32_BYTES = 16 << 30
_LOGITS_BYTES = 256 << 20


@dataclass(frozen=True)
class LayerGroup:
    """Linear layers that get one width.

    Attributes:
        block: Name of their block, "" outside of all.
        names: As inside the block; outside, as in the model.
    """

    block: str
    names: tuple[str, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Full names."""
        return tuple(f"{self.block}.{name}" if self.block else name for name in self.names)


@dataclass(frozen=True)
class Sensitivity:
    """Losses by group and width.

    Attributes:
        losses: Of each group, by width: mean KL in nats per token, wider widths never above narrower ones.
        measure: "layers" if every group was run, "blocks" if every block was.
        rounding: The method whose rounding it is.
        run: The widths that were run.
        tokens: On how many tokens.
    """

    losses: dict[LayerGroup, dict[int, float]]
    measure: Measure
    rounding: str
    run: tuple[int, ...]
    tokens: int


def layer_groups(model: nn.Module, structure: ModelStructure, config: WeightConfig) -> list[LayerGroup]:
    """The linear layers that the settings touch, grouped, in the model's order.

    Raises:
        ModelError: They touch none.
    """
    groups: dict[tuple[str, Any], list[str]] = {}
    for block in structure.blocks:
        for index, names in enumerate(block.input_groups):
            # Experts differ in their number only; other layers that do (one layer of each kind) stay apart.
            numbered = re.search(r"\.\d+\.", f".{names[0]}.")
            kind = tuple(re.sub(r"\d+", "*", name) for name in names) if numbered else index
            for name in names:
                full = f"{block.name}.{name}"
                if type(model.get_submodule(full)) is nn.Linear and config.touches(full):
                    groups.setdefault((block.name, kind), []).append(name)
    found = [LayerGroup(block, tuple(names)) for (block, _), names in groups.items()]
    for name in structure.outside:
        if type(model.get_submodule(name)) is nn.Linear and config.touches(name):
            found.append(LayerGroup("", (name,)))
    if not found:
        raise ModelError("given settings that skip every linear layer, expected some to compress")
    return found


@torch.no_grad()
def measure_sensitivity(
    model: nn.Module,
    structure: ModelStructure,
    groups: Sequence[LayerGroup],
    widths: Sequence[int],
    step: Step,
    calibration: Calibration,
    *,
    measure: Measure | Literal["auto"] = "auto",
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure the loss of each group at each width, see the module's docstring.

    Args:
        model: Left unchanged.
        structure: Of the model.
        groups: See `layer_groups`.
        widths: Candidates, at least one.
        step: The method whose rounding is measured, with its settings; "blocks" rounds to nearest.
        calibration: Windows on which layers' inputs are observed; every fourth of them is run.
        measure: "auto" takes "layers" where that takes at most a few minutes.
        progress: Called with a message and the share done.

    Raises:
        InvalidArgument: No width, or another measure.
    """
    if not widths:
        raise InvalidArgument("given no width, expected at least one")
    if measure not in ("auto", "layers", "blocks"):
        raise InvalidArgument(f"given measure={measure!r}, expected 'auto', 'layers' or 'blocks'")
    widths = sorted(set(widths))
    run = tuple(bits for bits in widths if bits <= WIDEST_RUN) or (widths[0],)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    home = next(model.parameters()).device
    with (
        evaluating([model]),
        widened(model, always=4 * parameters <= _FLOAT32_BYTES),
        search_precision(home),
    ):
        runner = _Runner(model, structure, calibration.tokens[::_STRIDE])
        if measure == "auto":
            # On average half of the blocks run on from a change.
            expected = runner.seconds * len(groups) * len(run) / 2
            measure = "layers" if expected <= _PATIENCE else "blocks"
        if measure == "blocks":
            run = (min(run, key=lambda bits: abs(bits - 3)),)
        task = _Measurement(runner, structure, list(groups), widths, run, step, measure)
        losses = task.all_losses(calibration, progress)
    return Sensitivity(
        losses, measure, step.method if measure == "layers" else "rtn", run, runner.tokens.numel()
    )


class _Runner:
    """Runs a model on windows from any block on, and compares what comes out with the unchanged model."""

    def __init__(self, model: nn.Module, structure: ModelStructure, tokens: Tensor) -> None:
        self.model = model
        self.modules = [model.get_submodule(block.name) for block in structure.blocks]
        self.outputs = [block.outputs for block in structure.blocks]
        self.tokens = tokens.to(next(model.parameters()).device)
        vocabulary = self._forward(self.tokens[:1, :1]).shape[-1]
        self.batch = max(1, _LOGITS_BYTES // (4 * vocabulary * tokens.shape[1]))
        began = time.perf_counter()
        self.reference = [self._log_probabilities(part) for part in self._parts()]
        self.seconds = time.perf_counter() - began

    def _parts(self) -> Iterator[Tensor]:
        yield from torch.split(self.tokens, self.batch)

    def _forward(self, tokens: Tensor) -> Tensor:
        options = {"use_cache": False} if hasattr(self.model, "config") else {}
        output = self.model(tokens, **options)
        return output if isinstance(output, Tensor) else output.logits

    def _log_probabilities(self, tokens: Tensor) -> Tensor:
        return torch.log_softmax(self._forward(tokens).float(), dim=-1)

    def divergence(self, first: int | None = None, hidden: Tensor | None = None) -> float:
        """Mean KL(unchanged || as it is now) in nats per token.

        Args:
            first: The block from which to run; None runs all.
            hidden: (windows, length, hidden) what that block reads.
        """
        total = 0.0
        for index, tokens in enumerate(self._parts()):
            with ExitStack() as stack:
                if first is not None and hidden is not None:
                    part = hidden[index * self.batch : (index + 1) * self.batch]
                    stack.enter_context(self._resumed(first, part))
                changed = self._log_probabilities(tokens)
            original = self.reference[index]
            terms = original.exp() * (original - changed)
            terms.masked_fill_(original == -torch.inf, 0)
            total += float(terms.sum(-1, dtype=torch.float64).clamp_min(0).sum())
        return total / self.tokens.numel()

    @contextmanager
    def _resumed(self, first: int, hidden: Tensor) -> Iterator[None]:
        """Inside, blocks before `first` are passed by, and that one reads `hidden`."""

        def pass_by(outputs: int) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                given = args[0] if args else kwargs["hidden_states"]
                return (given, *[None] * (outputs - 1)) if outputs else given

            return run

        def resume(forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                kwargs.pop("hidden_states", None)
                return forward(hidden, *args[1:], **kwargs)

            return run

        changed = self.modules[: first + 1]
        for module, outputs in zip(changed[:-1], self.outputs, strict=False):
            module.forward = pass_by(outputs)
        changed[-1].forward = resume(changed[-1].forward)
        try:
            yield
        finally:
            for module in changed:
                del module.forward


@dataclass
class _Measurement:
    runner: _Runner
    structure: ModelStructure
    groups: list[LayerGroup]
    widths: Sequence[int]
    run: tuple[int, ...]
    step: Step
    measure: Measure

    def all_losses(
        self, calibration: Calibration, progress: Progress | None
    ) -> dict[LayerGroup, dict[int, float]]:
        model = self.runner.model
        found: dict[LayerGroup, dict[int, float]] = {}
        for index, block in enumerate(stream_blocks(model, self.structure, calibration)):
            if progress is not None:
                progress(
                    f"sensitivity: block {index + 1} of {len(self.runner.modules)}",
                    index / len(self.runner.modules),
                )
            groups = [group for group in self.groups if group.block == block.name]
            # Observing puts the outputs, which the next block reads, in the place of the inputs.
            hidden = torch.cat(block.hidden)[::_STRIDE]
            statistics = block.observe()
            # What earlier blocks leave for this or later ones is missing where those are passed by.
            start = None if any(call.may_hand_on() for call in block.calls) else index
            if groups:
                found.update(self._block_losses(start, block, groups, hidden, statistics))
        for group in self.groups:
            if not group.block:
                found[group] = self._outside_losses(group)
        return {group: found[group] for group in self.groups}

    def _block_losses(
        self,
        index: int | None,
        block: CalibrationBlock,
        groups: list[LayerGroup],
        hidden: Tensor,
        statistics: Mapping[str, InputStatistics],
    ) -> Iterator[tuple[LayerGroup, dict[int, float]]]:
        errors = {group: self._errors(block.module, group, statistics) for group in groups}

        def rounded(method: str, group: LayerGroup, bits: int) -> dict[str, Tensor]:
            by_input: dict[int, list[str]] = {}  # each expert has its own
            for name in group.names:
                by_input.setdefault(id(statistics[name].gram), []).append(name)
            weights: dict[str, Tensor] = {}
            with widened(block.module, always=True):
                for names in by_input.values():
                    weights |= METHODS.rounded(method)(block, names, bits, self.step.config, statistics)
            return weights

        if self.measure == "blocks":
            width = self.run[0]
            whole: dict[str, Tensor] = {}
            for group in groups:
                whole.update(rounded("rtn", group, width))
            loss = self._loss(block.module, whole, index, hidden)
            factor = loss / max(sum(errors[group][width] for group in groups), 1e-30)
            for group in groups:
                yield group, {bits: factor * error for bits, error in errors[group].items()}
            return
        for group in groups:
            losses = {}
            for bits in self.run:
                weights = rounded(self.step.method, group, bits)
                losses[bits] = self._loss(block.module, weights, index, hidden)
            yield group, self._completed(losses, errors[group])

    def _outside_losses(self, group: LayerGroup) -> dict[int, float]:
        """Layers outside the blocks are rounded to nearest, and the whole model is run."""
        model, losses, errors = self.runner.model, {}, {}
        for bits in self.widths:
            spec = self.step.config.spec_at(bits)
            weights = {name: linear_in(model, name).weight.detach() for name in group.names}
            rounded = {name: fake_quantize(weight, spec) for name, weight in weights.items()}
            errors[bits] = sum(
                float((rounded[name].float() - weight.float()).square().sum())
                for name, weight in weights.items()
            )
            if bits in self.run:
                losses[bits] = self._loss(model, rounded, None, None)
        return self._completed(losses, errors)

    def _loss(
        self, parent: nn.Module, weights: Mapping[str, Tensor], index: int | None, hidden: Tensor | None
    ) -> float:
        """The divergence with other weights in some linears."""
        linears = {name: linear_in(parent, name) for name in weights}
        kept = {name: linear.weight.data for name, linear in linears.items()}
        try:
            for name, linear in linears.items():
                linear.weight.data = weights[name].to(kept[name].dtype)
            return self.runner.divergence(index, hidden)
        finally:
            for name, linear in linears.items():
                linear.weight.data = kept[name]

    def _errors(
        self, module: nn.Module, group: LayerGroup, statistics: Mapping[str, InputStatistics]
    ) -> dict[int, float]:
        """Summed normalized output errors of a group by width, rounded to nearest."""
        found = {}
        for bits in self.widths:
            spec, total = self.step.config.spec_at(bits), 0.0
            for name in group.names:
                weight = linear_in(module, name).weight.detach().float()
                total += output_error(weight, fake_quantize(weight, spec), statistics[name].gram)
            found[bits] = total
        return found

    def _completed(self, losses: Mapping[int, float], errors: Mapping[int, float]) -> dict[int, float]:
        """Losses of all widths: those not run by the ratio of errors; none above that of a narrower width."""
        widest = max(losses)
        done, limit = {}, float("inf")
        for bits in sorted(errors):
            loss = losses.get(bits)
            if loss is None:
                loss = losses[widest] * errors[bits] / max(errors[widest], 1e-30)
            limit = done[bits] = min(loss, limit)
        return done

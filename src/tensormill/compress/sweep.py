"""Several methods at several widths on one model, all measured in the same way on the same windows.

One job behind two results: the curve in `compress`'s report, and `compare`. Calibration text is read once, the
original is evaluated once. To that end all candidates are in memory together: what a method leaves as it is (the
embeddings, say) they share with the original, so that each adds little more than its packed weights.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tensormill.compress.calibration import Calibration
from tensormill.compress.evaluate import Evaluation, evaluate_models
from tensormill.compress.footprint import bits_per_weight, stored_bytes
from tensormill.compress.methods import METHODS
from tensormill.compress.recipe import Step, read_settings
from tensormill.compress.speed import Speed, measure_speed
from tensormill.compress.stages import Progress, Stages
from tensormill.compress.text import read_texts
from tensormill.data import python_source
from tensormill.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ORIGINAL = "original"
METHODS_COMPARED = ("rtn", "gptq", "awq")
# A sweep shows trends and takes minutes: less text and fewer calibration windows than one compression.
SAMPLES, MAX_TOKENS = 16, 8192


@dataclass(frozen=True)
class Measured:
    """What was measured of one model of a sweep.

    Attributes:
        method: What it was asked for as: "awq", or with settings "awq:rounding=gptq"; or "original".
        step: The method's settings; None for the original.
        bytes: Of the tensors as a checkpoint stores them, see `stored_bytes`.
        bits_per_weight: Average over the compressed weights, scales and zero points included; of the original, bits
            of its dtype.
        seconds: Wall time of the method itself; None for the original.
        evaluation: On the sweep's text; its comparison is with the original.
        speed: At batch 1, or None if it was not asked for.
    """

    method: str
    step: Step | None
    bytes: int
    bits_per_weight: float
    seconds: float | None
    evaluation: Evaluation
    speed: Speed | None = None


def plan(methods: Sequence[str], bits: Sequence[int], **settings: Any) -> list[Step]:
    """Every method at every width, narrow widths first, with the same other settings.

    Args:
        methods: Names of methods; settings of its own may follow each, as in "awq:rounding=gptq:n_grid=40".
        bits: Widths of a code, 2 to 8.
        **settings: Fields of `WeightConfig`, for all.

    Raises:
        InvalidArgument: No method or no width, one given twice, or a setting out of range.
        RecipeError: No such method or setting.

    Example:
        >>> [(step.method, step.config.bits) for step in plan(["rtn", "awq"], [4, 3])]
        [('rtn', 3), ('awq', 3), ('rtn', 4), ('awq', 4)]
    """
    for what, given in (("method", methods), ("bit width", bits)):
        if not given:
            raise InvalidArgument(f"given no {what}, expected at least one")
        twice = [item for item in dict.fromkeys(given) if list(given).count(item) > 1]
        if twice:
            raise InvalidArgument(f"given the {what} {twice[0]} more than once, expected each once")
    variants = [(method, *_variant(method)) for method in methods]
    for _, name, own in variants:
        Step.of(name, own)  # an unknown name is the first thing to complain about
    return [
        replace(Step.of(name, {"bits": width, **settings, **own}), name=method)
        for width in sorted(bits)
        for method, name, own in variants
    ]


def _variant(method: str) -> tuple[str, dict[str, Any]]:
    """A method's name and the settings that follow it."""
    name, *items = (part.strip() for part in method.split(":"))
    own = read_settings(items, f"the method {method!r}")
    if "bits" in own:
        raise InvalidArgument(
            f"given the method {method!r}, expected no bits in it: every method gets every width"
        )
    return name, own


def calibration_texts(files: Sequence[str | os.PathLike[str]] | None) -> list[str]:
    """The texts to calibrate on: of the files, or else sources of Python's standard library.

    Raises:
        DataError: a file can't be read.
    """
    return list(read_texts(files).values()) if files is not None else [python_source.calibration_text()]


def calibration_for(
    step: Step, files: Sequence[str | os.PathLike[str]] | None, tokenizer: PreTrainedTokenizerBase
) -> Calibration | None:
    """The windows that a step observes, from files or else Python's standard library; None if it needs none.

    Raises:
        DataError: a file can't be read, or there is too little text.
    """
    if step.method == "rtn":
        return None
    texts = calibration_texts(files)
    config = step.config
    return Calibration.from_text(
        texts, tokenizer, samples=config.calibration_samples, length=config.calibration_length
    )


def sweep(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Mapping[str, str],
    steps: Sequence[Step],
    *,
    calibration_text: Sequence[str | os.PathLike[str]] | None = None,
    calibration: Calibration | None = None,
    max_tokens: int | None = None,
    speed: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Measured]:
    """Apply each step to a copy of a model, and measure the copies beside the original.

    Args:
        model: The original; left unchanged.
        tokenizer: Its tokenizer.
        text: What to evaluate on, by name.
        steps: Different configurations, see `plan`.
        calibration_text: Files to calibrate on; None takes the standard library.
        calibration: Windows for all steps, instead of `calibration_text`.
        max_tokens: Of the evaluation; None takes the whole text.
        speed: Measure speed too, the models' repeats interleaved.
        seed: Of the prompt on which speed is measured.
        progress: Called with a message and the share done.

    Returns:
        The original first, then a result for each step.

    Raises:
        TensormillError: Too little text, or a model that a method can't handle.
    """
    stages = Stages(progress, calibrate=2, compress=60, evaluate=25, speed=13 * speed)
    stages.enter("calibrate", "reading the calibration text")
    calibrations: dict[tuple[int, int], Calibration | None] = {}
    for step in steps:
        key = (step.config.calibration_samples, step.config.calibration_length)
        if step.method != "rtn" and key not in calibrations:
            calibrations[key] = calibration or calibration_for(step, calibration_text, tokenizer)
    models: dict[str, nn.Module] = {ORIGINAL: model}
    seconds: dict[str, float] = {}
    for i, step in enumerate(steps):
        name = f"{step.name} at {step.config.bits} bits"
        if step.config.bits_by_layer:
            name = f"{step.name}, mixture {i + 1}"
        stages.enter("compress", name, i, len(steps))
        key = (step.config.calibration_samples, step.config.calibration_length)
        candidate = copy.deepcopy(model)
        began = time.perf_counter()
        METHODS[step.method][1](
            candidate,
            step.config,
            None if step.method == "rtn" else calibrations[key],
            lambda message, share, name=name: stages(f"{name}: {message}", share),
        )
        seconds[name] = time.perf_counter() - began
        share_unchanged(candidate, model)
        models[name] = candidate
    stages.enter("evaluate", "evaluating")
    evaluations = evaluate_models(
        models, tokenizer, text, reference=ORIGINAL, max_tokens=max_tokens, progress=stages
    )
    speeds: dict[str, Speed] = {}
    if speed:
        stages.enter("speed", "measuring speed")
        speeds = measure_speed(models, seed=seed, progress=stages)
    named: list[Step | None] = [None, *steps]
    return [
        Measured(
            method=ORIGINAL if step is None else step.name,
            step=step,
            bytes=stored_bytes(one),
            bits_per_weight=8.0 * model.dtype.itemsize if step is None else bits_per_weight(one),
            seconds=seconds.get(name),
            evaluation=evaluations[name],
            speed=speeds.get(name),
        )
        for step, (name, one) in zip(named, models.items(), strict=True)
    ]


@torch.no_grad()
def share_unchanged(candidate: nn.Module, original: nn.Module) -> None:
    """Let a changed copy of a model hold the original's own parameters where the two are equal."""
    for name, parameter in original.named_parameters(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        try:
            module = candidate.get_submodule(owner)
        except AttributeError:
            continue
        own = module._parameters.get(last)
        if own is not None and own.shape == parameter.shape and torch.equal(own, parameter):
            module._parameters[last] = parameter

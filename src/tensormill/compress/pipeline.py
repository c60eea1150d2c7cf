"""The main job, from a model on disk to a smaller checkpoint and an honest report.

open -> calibrate -> change the model in place -> evaluate it beside the original and round-to-nearest -> write the
checkpoint and its report.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tensormill.compress import checkpoint, gguf
from tensormill.compress.budget import Budget, parse_budget
from tensormill.compress.calibration import Calibration, read_pairs
from tensormill.compress.evaluate import Evaluation, evaluate_models
from tensormill.compress.experts import unfuse_experts
from tensormill.compress.footprint import (
    available_bytes,
    bits_per_weight,
    checkpoint_bytes,
    peak_memory,
    reset_peak_memory,
    stored_bytes,
)
from tensormill.compress.formats.checkpoint_format import CheckpointFormat, Layer, Scheme
from tensormill.compress.formats.float16_scales import round_scales
from tensormill.compress.formats.registry import DEFAULT, format_named
from tensormill.compress.journal import Journal, JournalElsewhere
from tensormill.compress.methods import METHODS, MethodReport, WeightConfig
from tensormill.compress.ranks import Ranks, joined, started_with_others
from tensormill.compress.recipe import Recipe, Step, read_recipe
from tensormill.compress.report import CompressionReport, CurvePoint, environment
from tensormill.compress.search import CalibrationTexts, search_widths
from tensormill.compress.search_report import BudgetSearch
from tensormill.compress.speed import measure_speed
from tensormill.compress.stages import Progress, Stages
from tensormill.compress.streamed_evaluation import evaluate_on_disk
from tensormill.compress.streaming import compress_on_disk, fingerprint, open_source
from tensormill.compress.structure import left_out
from tensormill.compress.sweep import (
    MAX_TOKENS,
    METHODS_COMPARED,
    SAMPLES,
    calibration_for,
    calibration_texts,
    plan,
    sweep,
)
from tensormill.compress.text import read_texts
from tensormill.data import python_source
from tensormill.errors import InvalidArgument, ModelError, RecipeError, TensormillError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compress(
    model: str | os.PathLike[str],
    method: str = "awq",
    *,
    output: str | os.PathLike[str] | None = None,
    format: str | None = None,
    recipe: str | os.PathLike[str] | None = None,
    budget: str | Budget | None = None,
    widths: Sequence[int] | None = None,
    calibration_text: Sequence[str | os.PathLike[str]] | None = None,
    calibration_pairs: str | os.PathLike[str] | None = None,
    text: Sequence[str | os.PathLike[str]] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    stream: bool | None = None,
    evaluate: bool = True,
    max_tokens: int | None = 65536,
    curve: Sequence[int] = (),
    seed: int = 0,
    progress: Progress | None = None,
    **settings: Any,
) -> CompressionReport:
    """Compress a model: write a smaller checkpoint, and report what it cost and what it bought.

    Args:
        model: a checkpoint directory of transformers, a GGUF file, or "builtin:python-lm".
        method: "rtn", "gptq" or "awq"; ignored if a recipe is given.
        output: directory of the checkpoint; None names it after model and method, in the current directory.
        format: of the checkpoint: "compressed-tensors" (the default), "awq", "gptq" or "gptq_v2". What it can't
            express is refused before anything is computed. The last three hold float16 scales: others are rounded
            before the model is evaluated.
        recipe: a YAML file with a list of steps.
        budget: what the result may cost, e.g. "4.25bpw", "9MB", "ppl+2%" or "3.5bpw,30tok/s"; chooses a width for
            each layer (see `search`), instead of `bits`.
        widths: to choose from with a budget; None takes 2 to 8, as far as the format has them.
        calibration_text: files to calibrate on; None takes sources of Python's standard library.
        calibration_pairs: a file of images and texts to calibrate a model on that reads images, see
            `Calibration.from_pairs`; instead of `calibration_text`.
        text: files to evaluate on; None takes held-out sources of the standard library.
        device: where to compute.
        dtype: of the weights while computing; None keeps the checkpoint's.
        overwrite: replace a checkpoint that lies at `output`.
        stream: read, compress and write one block after the other, so that the model never is in memory, and go on
            with an unfinished run of the same settings; None does so where the checkpoint is larger than a third of
            the device's free memory and the model allows it. Speed is not measured then.
        evaluate: measure quality and speed beside the original and round-to-nearest; holds three copies of the model.
        max_tokens: evaluate on at most so many tokens of the text; None takes all.
        curve: bit widths at which to measure perplexity of every method, for the report's plot; slow.
        seed: of the bootstrap intervals and prompts.
        progress: called with a message and the share done (0 to 1).
        **settings: fields of the method's configuration, e.g. `bits=3, group_size=64`.

    Returns:
        The report; it also lies in `output` as report.json and report.html.

    Raises:
        TensormillError: bad arguments, a damaged or unsuitable model, too little text, an unwritable output; nothing
            is left half-written.

    Example:
        >>> report = compress("builtin:python-lm", "rtn", bits=4, evaluate=False)  # doctest: +SKIP
        >>> report.bits_per_weight  # doctest: +SKIP
        4.1875
    """
    steps = _steps(method, recipe, settings)
    if budget is not None:
        budget = _checked_budget(budget, recipe, settings)
    elif widths:
        raise InvalidArgument("given widths to choose from without a budget; give a budget, or bits")
    layout = _layout(steps, format, free=budget is not None)
    for width in curve:
        replace(steps[-1].config, bits=width)  # refuses a bad width now, not after minutes
    name = "+".join(step.method for step in steps)
    if output is None:
        suffix = _suffix(steps, budget) + ("" if layout.name == DEFAULT else f"-{layout.name}")
        output = f"{short_name(model)}-{suffix}"
    target = Path(output)
    source = checkpoint.resolve_path(model)
    checkpoint.check_output(target, source=source, overwrite=overwrite)
    if calibration_pairs is not None and calibration_text is not None:
        raise InvalidArgument("given calibration texts and pairs of image and text, expected one of them")
    if calibration_pairs is not None and budget is not None:
        raise InvalidArgument(
            "given a budget and pairs of image and text, expected texts to search widths on"
        )
    if calibration_pairs is not None:
        read_pairs(calibration_pairs)
    processor = None if calibration_pairs is None else checkpoint.open_processor(source)
    stages = Stages(
        progress,
        search=120 * (budget is not None),
        calibrate=4,
        compress=40,
        evaluate=40 if evaluate else 0,
        curve=40 * bool(curve),
        write=4,
    )

    reset_peak_memory(device)
    stages.enter("search" if budget is not None else "calibrate", f"opening {os.fspath(model)}")
    stream = True if stream is None and started_with_others() else stream
    in_memory = (
        "a GGUF file" if gguf.is_gguf(source)
        else "a recipe of several steps" if len(steps) > 1
        else "a curve" if curve
        else "a budget" if budget is not None
        else None
    )  # fmt: skip
    unloaded = _unloaded(source, dtype, stream, device, in_memory)
    if unloaded is not None:
        with joined(device) as (ranks, place):
            return _compress_from_disk(
                model, source, *unloaded, steps, layout, target, calibration_text, calibration_pairs, processor,
                device=place, dtype=dtype, ranks=ranks, overwrite=overwrite, seed=seed, stages=stages,
                heldout=evaluation_text(text) if evaluate else None, max_tokens=max_tokens,
            )  # fmt: skip
    original, tokenizer = open_with_tokenizer(model, device, dtype)
    unfuse_experts(original)
    search: BudgetSearch | None = None
    if budget is not None:
        texts = CalibrationTexts.of(calibration_texts(calibration_text))
        search = search_widths(
            original, tokenizer, steps[0], budget, layout, texts, source=source, widths=widths, probe=evaluate,
            seed=seed, progress=stages,
        )  # fmt: skip
        steps = Recipe([search.step], steps.format)
    layout.check_layers(_planned_layers(original, steps), original)
    heldout, heldout_name = evaluation_text(text) if evaluate or curve else ({}, "")
    gguf_source = source_fields(source, original)
    bytes_before = stored_bytes(original) if gguf_source else checkpoint_bytes(source)

    began = time.perf_counter()
    compressed = copy.deepcopy(original) if evaluate or curve else original
    reports = []
    for i, step in enumerate(steps):
        stages.enter("calibrate", f"calibrating {step.method}")
        if search is not None:
            calibration = search.texts.calibration(step, tokenizer)
        else:
            calibration = _calibration(step, calibration_text, calibration_pairs, processor, tokenizer)
        stages.enter("compress", step.method, i, len(steps))
        reports.append(METHODS[step.method][1](compressed, step.config, calibration, stages))
    if layout.scale_dtype == torch.float16:
        round_scales(compressed)
    seconds = time.perf_counter() - began
    memory = peak_memory(device).bytes

    fields: dict[str, Any] = {
        "model": os.fspath(model),
        "method": name,
        "output": str(target),
        "bytes_before": bytes_before,
        "bits_per_weight": bits_per_weight(compressed),
        "seconds": seconds,
        "peak_memory_bytes": memory,
        "recipe": [{"method": made.method, **made.config} for made in reports],
        "environment": environment(device, seed=seed),
        "source": gguf_source,
        "left_out": reports[-1].left_out,
        "few_tokens": _few_tokens(reports),
        "search": search,
    }
    evaluations, speeds = {}, {}
    if evaluate:
        stages.enter("evaluate", "evaluating")
        models = {"original": original, "compressed": compressed}
        if name != "rtn":
            models["rtn"] = round_to_nearest(original, steps[-1].config)
        evaluations = evaluate_models(
            models, tokenizer, heldout, reference="original", max_tokens=max_tokens, progress=stages
        )
        models.pop("rtn", None)
        speeds = measure_speed(models, seed=seed)
    if curve:
        stages.enter("curve", "curve")
        last = steps[-1].config
        shared = {n: getattr(last, n) for n in ("group_size", "symmetric", "tail", "skip", "only")}
        tokens = min(max_tokens or MAX_TOKENS, MAX_TOKENS)
        points = sweep(
            original, tokenizer, heldout,
            plan(METHODS_COMPARED, sorted(set(curve)), calibration_samples=SAMPLES, **shared),
            calibration_text=calibration_text, max_tokens=tokens, progress=stages,
        )  # fmt: skip
        fields["curve"] = [
            CurvePoint(one.method, one.bits_per_weight, one.evaluation.perplexity) for one in points
        ]
        fields["curve_setting"] = f"{SAMPLES} calibration windows, at most the text's first {tokens} tokens"
    stages.enter("write", f"writing {target}")
    layers = [layer for made in reports for layer in made.layers]
    report: CompressionReport | None = None

    def report_files(written: Path) -> dict[str, str]:
        nonlocal report
        fields["bytes_after"] = checkpoint_bytes(written)
        if evaluate:
            report = CompressionReport.from_evaluations(
                evaluations, speeds=speeds, layers=layers, text=heldout_name, seed=seed, **fields
            )
        else:
            report = CompressionReport.without_evaluation(layers=layers, **fields)
        return {"report.json": report.to_json() + "\n", "report.html": report.to_html()}

    checkpoint.save_compressed(
        compressed,
        tokenizer,
        source,
        target,
        format=layout.name,
        overwrite=overwrite,
        extra_files=report_files,
    )
    assert report is not None
    stages.done()
    return report


def _unloaded(
    source: Path,
    dtype: torch.dtype | None,
    stream: bool | None,
    device: str | torch.device,
    reason: str | None,
) -> tuple[PreTrainedModel, checkpoint.CheckpointInfo] | None:
    """The model without its weights if it is to be compressed from disk to disk, else None.

    Args:
        source: the checkpoint.
        dtype, stream, device: as for `compress`.
        reason: what in the job can't be done so, if anything.

    Raises:
        InvalidArgument: `stream` is True, but the job can't be done so.
        ModelError: the same, by the model.
    """
    if stream is None:
        free = available_bytes(device)
        if free is None or 3 * checkpoint_bytes(source) <= free:
            return None
        try:
            if reason is None:
                return open_source(source, dtype)
        except ModelError as error:
            reason = str(error).partition(";")[0].removeprefix("given ")
        warnings.warn(f"{source} is large for the free memory, but compressed there: {reason}", stacklevel=3)
        return None
    if not stream and started_with_others():
        raise InvalidArgument(
            "given several processes, which share the calibration only from disk to disk; use stream=True"
        )
    if stream and reason is not None:
        raise InvalidArgument(f"given {reason}, which isn't compressed from disk to disk; use stream=False")
    return open_source(source, dtype) if stream else None


def _compress_from_disk(
    model: str | os.PathLike[str],
    source: Path,
    empty: PreTrainedModel,
    info: checkpoint.CheckpointInfo,
    steps: Recipe,
    layout: CheckpointFormat,
    target: Path,
    calibration_text: Sequence[str | os.PathLike[str]] | None,
    calibration_pairs: str | os.PathLike[str] | None,
    processor: Any,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    ranks: Ranks,
    heldout: tuple[Mapping[str, str], str] | None,
    max_tokens: int | None,
    overwrite: bool,
    seed: int,
    stages: Stages,
) -> CompressionReport:
    """`compress` of a model that never is in memory whole."""
    (step,) = steps
    tokenizer = checkpoint.open_tokenizer(source)
    if tokenizer is None:
        raise missing_tokenizer(model)
    layout.check_layers(_planned_layers(empty, steps), empty)
    began = time.perf_counter()
    stages.enter("calibrate", f"calibrating {step.method}")
    calibration = _calibration(step, calibration_text, calibration_pairs, processor, tokenizer)
    identity = fingerprint(
        info, step.method, step.config, calibration,
        format=layout.name, dtype=str(empty.dtype), device=device.type, processes=ranks.size,
    )  # fmt: skip
    place = Path(os.path.realpath(target))
    working = place.with_name(f"{place.name}.unfinished")
    journal: Journal | JournalElsewhere
    if ranks.leads:
        journal = Journal(working, identity)
        ranks.agree(journal.parts)
    else:
        journal = JournalElsewhere(ranks.agree(None))
    if isinstance(journal, Journal) and journal.outdated:
        warnings.warn(
            f"{working} holds an unfinished run that differs in {', '.join(journal.outdated)}; starting anew",
            stacklevel=3,
        )
    resumed = len(journal.parts)
    try:
        stages.enter("compress", step.method)
        made, shards = compress_on_disk(
            empty, info, step, calibration, layout, journal, device=device, ranks=ranks, progress=stages
        )
        if not ranks.leads:
            written_elsewhere: CompressionReport = ranks.agree(None)
            return written_elsewhere
        seconds, memory = time.perf_counter() - began, peak_memory(device).bytes
        quantization = layout.quantization_config(empty)
        fields: dict[str, Any] = {
            "layers": made.layers,
            "model": os.fspath(model),
            "method": step.method,
            "output": str(target),
            "bytes_before": checkpoint_bytes(source),
            "bits_per_weight": bits_per_weight(empty),
            "seconds": seconds,
            "peak_memory_bytes": memory,
            "recipe": [{"method": made.method, **made.config}],
            "environment": {**environment(device, seed=seed), "streamed": True, "resumed_parts": resumed},
            "left_out": made.left_out,
            "few_tokens": _few_tokens([made]),
        }
        evaluations: dict[str, Evaluation] = {}
        if heldout is not None and any(layer.details.get("method") == "rtn" for layer in made.layers):
            warnings.warn(
                "layers outside of the blocks are compressed, whose quality isn't measured from disk to disk",
                stacklevel=3,
            )
        elif heldout is not None:
            stages.enter("evaluate", "evaluating")
            evaluations = evaluate_on_disk(
                info, checkpoint.inspect_shards(shards, info, quantization), layout, tokenizer, heldout[0],
                dtype=dtype, rounded=step.config if step.method != "rtn" else None, kept=made.left_out,
                device=device, max_tokens=max_tokens, progress=stages,
            )  # fmt: skip
        stages.enter("write", f"writing {target}")
        report: CompressionReport | None = None

        def report_files(written: Path) -> dict[str, str]:
            nonlocal report
            fields["bytes_after"] = checkpoint_bytes(written)
            if evaluations and heldout is not None:
                report = CompressionReport.from_evaluations(evaluations, text=heldout[1], seed=seed, **fields)
            else:
                report = CompressionReport.without_evaluation(**fields)
            return {"report.json": report.to_json() + "\n", "report.html": report.to_html()}

        checkpoint.save_shards(
            shards,
            quantization,
            source,
            target,
            overwrite=overwrite,
            extra_files=report_files,
        )
    except BaseException as error:
        if not journal.parts:
            journal.remove()
            raise
        journal.close()
        kept = f"{len(journal.parts)} finished parts are kept in {working}, and the same command goes on from there"
        if isinstance(error, (TensormillError, KeyboardInterrupt)):
            raise type(error)(f"{str(error) or 'interrupted'}; {kept}") from error
        raise
    journal.remove()
    assert report is not None
    stages.done()
    return ranks.agree(report)  # type: ignore[no-any-return]


def _calibration(
    step: Step,
    text: Sequence[str | os.PathLike[str]] | None,
    pairs: str | os.PathLike[str] | None,
    processor: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> Calibration | None:
    """The windows that a step observes, of images and texts or of text alone; None if it needs none."""
    if pairs is None or step.method == "rtn":
        return calibration_for(step, text, tokenizer)
    config = step.config
    return Calibration.from_pairs(
        pairs, processor, samples=config.calibration_samples, length=config.calibration_length
    )


def _few_tokens(reports: Sequence[MethodReport]) -> list[str]:
    """Names of the experts' layers that were calibrated on all tokens of their layer."""
    return [layer.name for made in reports for layer in made.layers if "routed_tokens" in layer.details]


def round_to_nearest(model: PreTrainedModel, config: WeightConfig) -> PreTrainedModel:
    """A copy of a model, rounded to nearest with the bits and groups of `config`: every method's baseline."""
    config_class, apply = METHODS["rtn"]
    shared = {
        name: getattr(config, name)
        for name in ("bits", "bits_by_layer", "group_size", "symmetric", "tail", "skip", "only")
    }
    rounded = copy.deepcopy(model)
    apply(rounded, config_class(**shared), None, None)
    return rounded


def _checked_budget(
    budget: str | Budget, recipe: str | os.PathLike[str] | None, settings: Mapping[str, Any]
) -> Budget:
    """The budget, if nothing else says how wide layers shall be."""
    if recipe is not None:
        raise RecipeError("given a recipe and a budget, expected one of them; both choose widths")
    for name in ("bits", "bits_by_layer"):
        if name in settings:
            raise InvalidArgument(
                f"given {name} and a budget, expected one of them; the budget chooses widths"
            )
    return budget if isinstance(budget, Budget) else parse_budget(budget)


def _layout(steps: Recipe, format: str | None, *, free: bool = False) -> CheckpointFormat:
    """The checkpoint's format, asked for by argument or recipe, if it has the widths of all steps, or these are
    `free`.
    """
    if format is not None and steps.format not in (None, format):
        raise RecipeError(f"given the format {format!r} and a recipe with {steps.format!r}; give one of them")
    layout = format_named(format or steps.format or DEFAULT)
    if not free:
        layout.check_schemes([scheme for step in steps for scheme in _schemes(step.config)])
    return layout


def _schemes(config: WeightConfig) -> list[Scheme]:
    return [Scheme(bits, config.group_size, config.symmetric) for bits in config.widths()]


def _planned_layers(model: torch.nn.Module, steps: Sequence[Step]) -> dict[str, Layer]:
    """What the steps will make of the model's linears, by name."""
    layers, kept = {}, set(left_out(model))
    for step in steps:
        for name, module in model.named_modules():
            if type(module) is torch.nn.Linear and name not in kept and step.config.touches(name):
                spec = step.config.spec_of(name)
                spec.check(module.in_features, name)
                scheme = Scheme(spec.bits, spec.group_size, spec.symmetric)
                layers[name] = Layer(scheme, module.out_features, module.in_features)
    return layers


def _steps(method: str, recipe: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> Recipe:
    if recipe is not None:
        if settings:
            raise RecipeError(f"given a recipe and {', '.join(settings)}; put the settings into the recipe")
        return read_recipe(recipe)
    return Recipe([Step.of(method, settings)])


def evaluation_text(files: Sequence[str | os.PathLike[str]] | None) -> tuple[Mapping[str, str], str]:
    """The texts to evaluate on, by name, and what they are called: the given files, else the held-out ones."""
    if files is not None:
        return read_texts(files), ", ".join(os.fspath(file) for file in files)
    texts = python_source.heldout_text()
    return (
        texts,
        f"{len(texts)} held-out modules of Python {python_source.provenance()['python']}'s standard library",
    )


def open_with_tokenizer(
    model: str | os.PathLike[str], device: str | torch.device, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `checkpoint.open_model`, for what can't be done without a tokenizer.

    Raises:
        InvalidArgument: it has none.
    """
    opened, tokenizer = checkpoint.open_model(model, device=device, dtype=dtype)
    if tokenizer is None:
        raise missing_tokenizer(model)
    return opened, tokenizer


def missing_tokenizer(model: str | os.PathLike[str]) -> InvalidArgument:
    """The error for a model without a tokenizer, to be raised."""
    advice = (
        "get a copy with its vocabulary"
        if gguf.is_gguf(checkpoint.resolve_path(model))
        else "put its tokenizer files beside config.json"
    )
    return InvalidArgument(f"given {os.fspath(model)}, which has no tokenizer; {advice}")


def source_fields(source: Path, opened: PreTrainedModel) -> dict[str, Any]:
    """What a report says of a GGUF file and the model opened from it; empty for a directory."""
    if not gguf.is_gguf(source):
        return {}
    return {**gguf.read_header(source).to_dict(), "dtype": str(opened.dtype).removeprefix("torch.")}


def short_name(model: str | os.PathLike[str]) -> str:
    """What outputs are named after by default: the last part of a path, or a built-in model's name."""
    text = os.fspath(model)
    if gguf.is_gguf(text):
        return Path(text).stem
    return text.partition(":")[2] if text.startswith(checkpoint.BUILTIN_PREFIX) else Path(text).resolve().name


def _suffix(steps: Sequence[Step], budget: Budget | None = None) -> str:
    config = steps[-1].config
    width = budget.slug if budget is not None else f"w{config.bits}"
    group = "row" if config.group_size == -1 else f"g{config.group_size}"
    return f"{'-'.join(step.method for step in steps)}-{width}-{group}"

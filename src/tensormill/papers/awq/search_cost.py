"""C4: what the search for scales takes, in seconds and memory, up to a model that is larger than the memory used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensormill.papers.awq.paper import PAPER
from tensormill.papers.awq.subjects import SOURCES, Subject, builtin_subjects
from tensormill.papers.catalogue import ClaimNotMeasurable, Measurement, Row, Run

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from tensormill.compress.calibration import Calibration
    from tensormill.compress.output_error import ScaleLoss
    from tensormill.compress.structure import ScaleMapping

LLAMA_8B: dict[str, Any] = {
    "layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "heads": 32,
    "kv_heads": 8,
    "vocabulary": 128256,
}
"""Sizes of Llama-3-8B: 8.03 billion parameters, 16 GB in bfloat16."""

HALF_AS_WIDE = {
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "heads": 16,
    "kv_heads": 4,
    "vocabulary": 4096,
}
SMALL = {"hidden_size": 384, "intermediate_size": 1024, "heads": 6, "kv_heads": 2, "vocabulary": 512}
LAYERS = (4, 8, 16, 32)
SECONDS_WANTED = 45.0
GIGABYTES_WANTED = 4.0


@PAPER.claim(
    "C4",
    statement="The search takes little time and memory: a model of 8 billion parameters needs no 16 GB GPU",
    paper_value=None,
    unit="seconds per block",
    criterion=(
        "the Gram objective's scales lose at most 1 % more than those of the explicit search over all tokens, in less "
        "time per block than the paper's objective takes; peak memory of the run from disk to disk grows by at most "
        "10 % from 4 to 32 layers; at full scale 8 billion parameters take at most 45 s and 4 GB on the GPU"
    ),
    needs={"full": ("cuda",)},
    measures=(
        *SOURCES,
        "tensormill.compress.awq",
        "tensormill.compress.output_error",
        "tensormill.compress.clipping",
        "tensormill.ops.clipping_error",
        "tensormill.ops.quantization_error",
        "tensormill.compress.footprint",
        "tensormill.compress.pipeline",
        "tensormill.compress.residence",
        "tensormill.compress.streaming",
        "tensormill.compress.unloaded",
        "tensormill.compress.peers",
    ),
    peers=("llmcompressor", "compressed-tensors"),
)
def search_cost(run: Run) -> Measurement:
    """Seconds and memory per block for each objective and llm-compressor, then a run from disk to disk.

    Blocks of the built-in model: all 8 on a GPU, the first 2 on few windows at quick scale. Losses of the chosen scales
    are computed from the activations of all tokens, not from a Gram matrix. The run from disk to disk has random
    weights in the shape of Llama: at full scale that of Llama-3-8B, beside llm-compressor, which holds the whole
    model; at quick scale narrow layers, for the growth of memory with their number.
    """
    full = run.scale == "full"
    if full and not streams():
        raise ClaimNotMeasurable("compress() can't run from disk to disk in this version")
    samples = 128 if full else 4
    (subject,) = builtin_subjects(run, ("plain",), None)
    subject = first_blocks(subject, 8 if full else 2)
    calibration = subject.calibration(samples)

    run.progress("losses of the chosen scales", 0.0)
    losses = chosen_losses(subject.model, calibration)
    rows = losses.rows()
    costs = block_costs(run, subject, calibration)
    rows += costs.rows
    failures = []
    if losses.excess > 0.01:
        failures.append(
            f"the Gram objective's scales lose {losses.excess:.1%} more than the explicit search's"
        )
    if costs.seconds["gram"] >= costs.seconds["module"]:
        failures.append("the Gram objective takes longer than the paper's")
    reason = f"Gram {costs.seconds['gram']:.2f} s per block, the paper's {costs.seconds['module']:.2f} s"
    if not streams():
        failures.append("memory by number of layers not measured: compress() can't run from disk to disk")
    else:
        made, growth = memory_by_layers(run, full)
        rows += made
        reason += f"; memory grows {growth - 1:.1%} from {LAYERS[0]} to {LAYERS[-1]} layers"
        if growth > 1.1:
            failures.append(f"peak memory grows by {growth - 1:.0%} from {LAYERS[0]} to {LAYERS[-1]} layers")
    if full:
        made, seconds, gigabytes = eight_billion(run)
        rows += made
        reason += f"; 8 billion parameters in {seconds:.0f} s and {gigabytes:.1f} GB"
        if seconds > SECONDS_WANTED or gigabytes > GIGABYTES_WANTED:
            failures.append(f"8 billion parameters took {seconds:.0f} s and {gigabytes:.1f} GB")
    return Measurement(rows, holds=not failures, reason="; ".join([*failures, reason]))


def streams() -> bool:
    """Whether this version compresses from disk to disk."""
    import importlib.util
    import inspect

    from tensormill.compress.pipeline import compress

    return "stream" in inspect.signature(compress).parameters and bool(
        importlib.util.find_spec("tensormill.models.random_llama")
    )


def first_blocks(subject: Subject, count: int) -> Subject:
    """The subject with the first blocks of its model only."""
    import copy
    from dataclasses import replace

    model: Any = copy.deepcopy(subject.model)
    model.model.layers = model.model.layers[:count]
    model.config.num_hidden_layers = len(model.model.layers)
    return replace(subject, model=model)


@dataclass(frozen=True)
class ChosenLosses:
    """Losses of the scales that each objective chooses, one number per mapping of the model.

    Attributes:
        explicit: objective to the sums of the linears' normalized squared output errors over all tokens.
        module: objective to the mean squared output errors of the attention or MLP, the paper's loss.
    """

    explicit: Mapping[str, list[float]]
    module: Mapping[str, list[float]]

    @property
    def excess(self) -> float:
        """How much more the Gram objective's scales lose than those of the explicit search, mean over mappings."""
        return _mean_ratio(self.explicit["gram"], self.explicit["linear"]) - 1

    def rows(self) -> list[Row]:
        """Mean ratios over mappings, with the extremes."""
        rows = []
        for kind, losses in (("explicit loss", self.explicit), ("paper's loss", self.module)):
            for name in losses:
                if name in ("identity", "linear"):
                    continue
                for other in ("identity", "linear") if name == "gram" else ("identity",):
                    ratios = [a / b for a, b in zip(losses[name], losses[other], strict=True)]
                    rows.append(
                        Row(
                            f"{kind} of the scales by {name}, over that by {other}",
                            _mean_ratio(losses[name], losses[other]),
                            "x",
                            (min(ratios), max(ratios)),
                            setting={"mappings": len(ratios)},
                        )
                    )
        ratios = [a / b for a, b in zip(self.module["gram"], self.module["module"], strict=True)]
        mean = _mean_ratio(self.module["gram"], self.module["module"])
        rows.append(
            Row(
                "paper's loss of the scales by gram, over that by module",
                mean,
                "x",
                (min(ratios), max(ratios)),
            )
        )
        return rows


def _mean_ratio(numerators: Iterable[float], denominators: Iterable[float]) -> float:
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return sum(ratios) / len(ratios)


def chosen_losses(model: PreTrainedModel, calibration: Calibration, bits: int = 4) -> ChosenLosses:
    """Search every mapping's scales with each objective over all tokens, and judge them by the explicit losses.

    Args:
        model: a causal language model in float32.
        calibration: all its windows are searched over.
        bits: of a weight.
    """
    import torch

    from tensormill.compress.awq import search_scales, weight_magnitude
    from tensormill.compress.calibration import stream_blocks
    from tensormill.compress.formats.quantization import QuantSpec
    from tensormill.compress.output_error import gram_loss, module_loss, sample_loss
    from tensormill.compress.structure import discover, linear_in

    spec = QuantSpec(bits=bits, group_size=128)
    names = ("identity", "gram", "linear", "module")
    explicit: dict[str, list[float]] = {name: [] for name in names}
    module: dict[str, list[float]] = {name: [] for name in names}
    structure = discover(model)
    for block in stream_blocks(model, structure, calibration):
        mappings = block.structure.mappings
        # Both the consumers' own inputs and the calls of the module that holds them.
        wanted = {mapping.inspected for mapping in mappings} | {mapping.consumers[0] for mapping in mappings}
        statistics = block.observe(capture=sorted(wanted), capture_samples=len(calibration.tokens))
        for mapping in mappings:
            linears = [linear_in(block.module, name) for name in mapping.consumers]
            weights = [linear.weight.data.float() for linear in linears]
            seen = statistics[mapping.consumers[0]]
            x = torch.cat(
                [call.args[0].flatten(0, -2).float() for call in block.captured[mapping.consumers[0]]]
            )
            by_sample = sample_loss(weights, x, spec)
            if mapping.inspected in mapping.consumers:
                by_module = by_sample  # one linear layer is its own module
            else:
                calls = [call.to(torch.float32) for call in block.captured[mapping.inspected]]
                by_module = module_loss(block.module.get_submodule(mapping.inspected), linears, calls, spec)
            reduced = mapping.reduce(seen.mean_abs), mapping.reduce(weight_magnitude(weights, spec))
            columns = {"identity": torch.ones_like(seen.mean_abs)}
            for name, loss in (
                ("gram", gram_loss(weights, seen.gram, spec)),
                ("linear", by_sample),
                ("module", by_module),
            ):
                found = search_scales(*reduced, _of_reduced(loss, mapping))
                columns[name] = mapping.expand(found.scale)
            for name in names:
                explicit[name].append(by_sample(columns[name][None]).item())
                module[name].append(by_module(columns[name][None]).item())
    return ChosenLosses(explicit, module)


def _of_reduced(loss: ScaleLoss, mapping: ScaleMapping) -> ScaleLoss:
    """A loss of scales per column as one of scales per channel of the mapping."""
    import torch

    return lambda scales: loss(torch.stack([mapping.expand(scale) for scale in scales]))


@dataclass(frozen=True)
class BlockCosts:
    """Rows, and seconds per block by objective."""

    rows: list[Row]
    seconds: Mapping[str, float]


def block_costs(run: Run, subject: Subject, calibration: Calibration) -> BlockCosts:
    """Seconds and peak memory per block of AWQ with each objective, without clipping, and of llm-compressor."""
    import copy
    import time

    import torch

    from tensormill.compress.awq import AWQConfig, apply
    from tensormill.compress.calibration import Calibration
    from tensormill.compress.footprint import peak_memory, reset_peak_memory
    from tensormill.compress.peers import installed

    blocks = subject.model.config.num_hidden_layers
    samples = len(calibration.tokens)
    setting = {"blocks": blocks, "samples": samples, "length": calibration.tokens.shape[1]}
    rows, seconds = [], {}

    def add(name: str, took: float, memory: float) -> None:
        seconds[name] = took / blocks
        rows.append(Row(f"{name}: time per block", took / blocks, "s", setting=setting))
        rows.append(Row(f"{name}: peak memory beyond the model", memory / 1e6, "MB", setting=setting))

    # The paper's search sees all windows, as llm-compressor's does; ours sees a sample unless told otherwise.
    kinds = {
        "gram": AWQConfig(clip=False),
        "linear": AWQConfig(clip=False, objective="linear", objective_samples=samples),
        "module": AWQConfig(clip=False, objective="module", objective_samples=samples),
        "gram, with clipping": AWQConfig(),
    }
    # Once each on one window before the clock runs: imports and the device's libraries are loaded then.
    warm_up = Calibration(calibration.tokens[:1])
    apply(copy.deepcopy(subject.model), AWQConfig(), warm_up)
    for i, (name, config) in enumerate(kinds.items()):
        run.progress(f"cost of {name}", 0.2 + 0.1 * i)
        model = copy.deepcopy(subject.model)
        before = _memory_in_use(run.device)
        reset_peak_memory(run.device)
        began = time.perf_counter()
        apply(model, config, calibration)
        if run.device != "cpu":
            torch.cuda.synchronize(run.device)
        took = time.perf_counter() - began
        add(name, took, peak_memory(run.device).bytes - before)
        del model
    peers = {name: peer for name, peer in installed(("awq",)).items() if "observer" not in peer.settings}
    for peer in list(peers.values())[:1]:
        peer(subject.model, warm_up, bits=4, group_size=subject.group_size)
    for name, peer in peers.items():
        run.progress(f"cost of {name}", 0.6)
        model = copy.deepcopy(subject.model)
        before = _memory_in_use(run.device)
        made = peer.run(
            model, calibration, bits=4, group_size=subject.group_size, in_place=True, **peer.settings
        )
        add(name, made.seconds, made.memory.bytes - before)
    return BlockCosts(rows, seconds)


def _memory_in_use(device: str) -> int:
    """Bytes in use now, by the same count as `peak_memory`: of torch on a GPU, resident on a CPU."""
    import gc
    from pathlib import Path

    import torch

    gc.collect()
    if device != "cpu":
        return int(torch.cuda.memory_allocated(device))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    import resource

    return pages * resource.getpagesize()


def memory_by_layers(run: Run, full: bool) -> tuple[list[Row], float]:
    """Peak memory of the run from disk to disk for 4 to 32 layers, and the last over the first."""
    import tempfile
    from pathlib import Path

    from tensormill.models.random_llama import random_llama_checkpoint

    shape = HALF_AS_WIDE if full else SMALL
    settings: dict[str, Any] = {"calibration_samples": 32}
    if not full:
        settings = {"calibration_samples": 4, "calibration_length": 128, "n_grid": 2, "clip": False}
    rows, peaks = [], []
    for i, layers in enumerate(LAYERS):
        run.progress(f"{layers} layers from disk to disk", 0.7 + 0.03 * i)
        sizes: dict[str, Any] = {**shape, "layers": layers}
        with tempfile.TemporaryDirectory() as folder:
            source = random_llama_checkpoint(Path(folder, "model"), **sizes, seed=run.seed, device=run.device)
            took = disk_to_disk(source, Path(folder, "out"), run.device, settings)
        peaks.append(took.peak_bytes)
        rows.append(
            Row(
                f"{layers} layers from disk to disk: peak memory",
                took.peak_bytes / 1e6,
                "MB",
                setting={**sizes, **settings, "seconds": took.seconds},
            )
        )
    return rows, peaks[-1] / peaks[0]


@dataclass(frozen=True)
class DiskToDisk:
    """What a run from disk to disk took.

    Attributes:
        total_seconds: from opening the folder to the finished checkpoint.
        seconds: of compressing alone, as the report says.
        peak_bytes: the GPU's high-water mark; on a CPU what the process grew by, since most of what it takes is
            Python and torch.
    """

    total_seconds: float
    seconds: float
    peak_bytes: float


def disk_to_disk(source: Path, output: Path, device: str, settings: Mapping[str, Any]) -> DiskToDisk:
    """Compress a folder to another with AWQ in a process of its own, so that nothing else counts.

    Raises:
        ClaimNotMeasurable: the process failed; with its last line.
    """
    import json
    import os
    import subprocess
    import sys

    # Small tensors come from the allocator's heaps, whose fragments would be counted; a real model's don't.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    job = [sys.executable, "-c", _DISK_TO_DISK, str(source), str(output), device, json.dumps(dict(settings))]
    done = subprocess.run(job, capture_output=True, text=True, timeout=1800, env=environment)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ClaimNotMeasurable(f"the run from disk to disk failed: {last}")
    return DiskToDisk(**json.loads(done.stdout.strip().splitlines()[-1]))


_DISK_TO_DISK = """
import json, sys, time
from transformers import AutoTokenizer, LlamaForCausalLM
from tensormill.compress.pipeline import compress
from tensormill.papers.awq.search_cost import _memory_in_use
source, output, device, settings = sys.argv[1:]
before = _memory_in_use("cpu")
began = time.perf_counter()
report = compress(source, "awq", stream=True, evaluate=False, device=device, output=output, **json.loads(settings))
total = time.perf_counter() - began
peak = report.peak_memory_bytes - (before if device == "cpu" else 0)
print(json.dumps({"total_seconds": total, "seconds": report.seconds, "peak_bytes": peak}))
"""


def eight_billion(run: Run) -> tuple[list[Row], float, float]:
    """Llama-3-8B's shape from disk to disk, beside llm-compressor on the same folder and windows.

    Returns:
        The rows, our total seconds and our peak memory in GB.
    """
    import tempfile
    from pathlib import Path

    from tensormill.compress.calibration import Calibration
    from tensormill.compress.checkpoint import open_model
    from tensormill.compress.peers import installed
    from tensormill.data.python_source import calibration_text
    from tensormill.models.random_llama import random_llama_checkpoint

    setting = {**LLAMA_8B, "samples": 128, "length": 512, "bits": 4, "group_size": 128}
    with tempfile.TemporaryDirectory() as folder:
        run.progress("writing a random model of 8 billion parameters", 0.85)
        source = random_llama_checkpoint(Path(folder, "model"), **LLAMA_8B, seed=run.seed, device=run.device)
        run.progress("8 billion parameters from disk to disk", 0.88)
        ours = disk_to_disk(source, Path(folder, "out"), run.device, {})
        gigabytes = ours.peak_bytes / 1e9
        rows = [
            Row("8B from disk to disk: total", ours.total_seconds, "s", setting=setting),
            Row("8B from disk to disk: compression alone", ours.seconds, "s", setting=setting),
            Row("8B from disk to disk: peak memory", gigabytes, "GB", setting=setting),
        ]
        peer = installed(("awq",)).get("llm-compressor awq")
        if peer is not None:
            run.progress("8 billion parameters with llm-compressor", 0.92)
            model, tokenizer = open_model(source, device=run.device, check_finite=False)
            calibration = Calibration.from_text(calibration_text(), tokenizer, samples=128, length=512)
            # Without duo scaling it tries 20 candidates, half of ours.
            made = peer.run(model, calibration, bits=4, group_size=128, duo_scaling=False, in_place=True)
            setting = {**setting, "duo_scaling": False}
            rows.append(Row("8B by llm-compressor, in memory: time", made.seconds, "s", setting=setting))
            rows.append(
                Row(
                    "8B by llm-compressor, in memory: peak memory",
                    made.memory.bytes / 1e9,
                    "GB",
                    setting=setting,
                )
            )
    return rows, ours.total_seconds, gigabytes

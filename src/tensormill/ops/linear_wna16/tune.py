"""Finds the GPU kernels' configurations: `python -m tensormill.ops.linear_wna16.tune --output sm_90.json`.

For every size the candidates of each kernel are checked, then timed, beside the vendor library's float16
product; the fastest goes into the document that belongs in `tuned/sm_90.json`, rewritten after every size. A
table goes to stderr. Four-bit weights in groups of 128, float16. Compilation takes most of the time: other
processes do it ahead, without the GPU, and leave the results in Triton's cache.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensormill.measure import copies_past_cache, time_together

SHAPES = ((8192, 8192), (14336, 4096), (4096, 14336), (57344, 8192))  # rows x columns
TOKENS = (1, 2, 4, 8, 16, 64, 256, 32, 128)  # the most important first
BITS, GROUP_SIZE = 4, 128

DEVICE = "cuda"

kernels = importlib.import_module("tensormill.ops.linear_wna16.triton")


def candidates(tokens: int, rows: int, columns: int) -> list[Any]:
    """Configurations to try; the heuristics' first."""
    found = []
    steps: Any
    tiles: Any
    if tokens <= 2:
        found.append(kernels.gemv_config(tokens, rows, columns, BITS))
        block_k = found[0].block_k
        warps = [block_k // 1024]
        steps = [(2, 2, 1), (2, 4, 1), (4, 2, 1), (1, 8, 2), (2, 4, 2), (4, 1, 1)]
        if tokens == 1:
            warps += [block_k // 2048]
            steps += [(4, 4, 1), (1, 8, 4), (2, 8, 2), (4, 4, 2), (8, 2, 1), (1, 16, 4), (1, 8, 8), (4, 8, 1)]
        for num_warps, (block_n, count, ahead) in itertools.product(warps, steps):
            found.append(kernels.GemvConfig(block_n, count, ahead, block_k, num_warps))
    if tokens > 1:
        found.append(kernels.gemm_config(tokens, rows, columns, BITS))
        if tokens <= 32:
            tiles = [(64, 128, 4), (64, 256, 4), (32, 128, 4), (128, 128, 8), (32, 256, 4), (128, 64, 8)]
            grid = itertools.product((max(16, tokens),), tiles, (3, 4), (1, 2, 4))
        elif tokens == 64:
            tiles = [(64, 128, 4), (128, 64, 8), (128, 128, 8), (64, 64, 4)]
            grid = itertools.product((64,), tiles, (3, 4), (1, 2, 4))
        else:
            tiles = [(128, 64, 8), (64, 64, 4), (128, 32, 8)]
            grid = itertools.product((64, 128, 256), tiles, (3,), (1, 2))
        for block_m, (block_n, block_k, num_warps), stages, splits in grid:
            if block_m <= max(16, tokens):
                found.append(kernels.GemmConfig(block_m, block_n, block_k, num_warps, stages, splits))
    if tokens >= 16:
        found.append(kernels.DenseConfig())
    return list(dict.fromkeys(found))


class _NoDevice:
    """A driver for compilation only: the GPU is left alone."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Warmup:
    """A kernel that is compiled instead of launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self.kernel.warmup, grid=grid)


def compile_one(tokens: int, rows: int, columns: int, config: Any, capability: int) -> None:
    """Leave a candidate in Triton's cache, in a process of the pool."""
    from triton.runtime import driver

    driver.set_active(_NoDevice(capability))
    for name in ("_gemv_kernel", "_gemm_kernel", "_sum_splits_kernel"):
        if not isinstance(kernel := getattr(kernels, name), _Warmup):
            setattr(kernels, name, _Warmup(kernel))
    # never touched, so that they take no memory
    x = torch.empty(tokens, columns, dtype=torch.float16)
    weight = torch.empty(rows, columns * BITS // 32, dtype=torch.int32)
    scale = torch.empty(rows, columns // GROUP_SIZE, dtype=torch.float16)
    zero_point = torch.empty(rows, columns // GROUP_SIZE, dtype=torch.uint8)
    kernels.run(x, weight, scale, zero_point, None, BITS, GROUP_SIZE, "packed", config)


def signature(tokens: int, columns: int, config: Any) -> tuple[Any, ...]:
    """Equal for candidates that compile to the same kernels."""
    if isinstance(config, kernels.GemmConfig):
        return (replace(config, splits=min(config.splits, 2)),)
    split = isinstance(config, kernels.GemvConfig) and columns > config.block_k
    return tokens, split, config


class Layer(NamedTuple):
    """A layer of one size, with copies enough that no cache serves them."""

    packed: list[tuple[Any, ...]]  # arguments of the kernels from weight to layout
    dense: list[Tensor]


@functools.cache
def layer(rows: int, columns: int) -> Layer:
    from tensormill.ops.linear_wna16 import operator

    device = torch.device(DEVICE)
    shape: dict[str, Any] = {"tokens": 1, "out_features": rows, "in_features": columns, "bits": BITS}
    shape |= {"group_size": GROUP_SIZE, "dtype": "float16"}
    arguments = operator.inputs(shape, device, torch.Generator(device).manual_seed(1))
    weight, scale, zero_point = arguments[1:4]
    more = (zero_point, None, BITS, GROUP_SIZE, "packed")
    count = copies_past_cache([weight, scale], device)
    dense = kernels.dequantize(weight, scale, zero_point, columns, BITS, GROUP_SIZE, "packed", torch.float16)
    return Layer(
        [(weight.clone(), scale.clone(), *more) for _ in range(count)],
        [dense.clone() for _ in range(copies_past_cache([dense], device))],
    )


def time_one(run: Callable[..., Tensor], copies: list[tuple[Any, ...]]) -> float:
    calls = [functools.partial(run, *arguments) for arguments in copies]
    return time_together({"run": calls}, DEVICE, seconds=0.004)["run"].median


def best(
    tokens: int, rows: int, columns: int, compiled: dict[Any, Future[None]], deadline: float
) -> tuple[dict[str, Any], dict[str, float]] | None:
    """Of one size, the entry of the fastest correct candidate, and microseconds by kernel."""
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    x = torch.randn(tokens, columns, generator=generator, device=DEVICE).half()
    packed, dense = layer(rows, columns)
    # The weights are rounded to float16, as in the kernels with tensor cores; sums are not.
    expected = x.float() @ dense[0].float().T
    size = expected.square().mean().sqrt()
    microseconds = {"cublas": time_one(torch.nn.functional.linear, [(x, w) for w in dense]) * 1e6}
    names = {kind: name for name, kind in kernels.KINDS.items()}
    fastest: Any = None
    for config in candidates(tokens, rows, columns):
        left = deadline - time.monotonic()
        if fastest is not None and left < 0:
            break
        if (future := compiled.get(signature(tokens, columns, config))) is not None:
            # If that process failed, this one compiles, and finds out why.
            wait([future], 30.0 if fastest is None else left)
        try:
            copies = [(x, *arguments, config) for arguments in packed]
            error = (kernels.run(*copies[0]).float() - expected).square().mean().sqrt() / size
            if not float(error) < 2e-3:
                raise ValueError(f"wrong result, relative error {float(error):.1e}")
            seconds = time_one(kernels.run, copies)
        except Exception as problem:  # one that does not fit the device is only a candidate less
            print(f"  {config}: {type(problem).__name__}: {str(problem)[:120]}", file=sys.stderr)
            continue
        name = names[type(config)]
        microseconds[name] = min(microseconds.get(name, float("inf")), seconds * 1e6)
        if fastest is None or seconds < fastest[1]:
            fastest = config, seconds
    if fastest is None:
        return None
    entry = {"kernel": names[type(fastest[0])], **asdict(fastest[0])}
    return entry, {name: round(value, 2) for name, value in microseconds.items()}


def tune(
    seconds: float, output: Path, tokens_tuned: tuple[int, ...] = TOKENS, processes: int | None = None
) -> None:
    """Writes the document for `tuned/sm_XX.json` in about `seconds`, compilation included."""
    started = time.monotonic()
    cases = [(tokens, *shape) for tokens in tokens_tuned for shape in SHAPES]
    major, minor = torch.cuda.get_device_capability()
    processes = processes or max(1, (os.cpu_count() or 2) - 2)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensormill.ops.linear_wna16.tune"])
    pool = ProcessPoolExecutor(processes, mp_context=context)
    compiled: dict[Any, Future[None]] = {}
    for tokens, rows, columns in cases:
        for config in candidates(tokens, rows, columns):
            key = signature(tokens, columns, config)
            if key in compiled or isinstance(config, kernels.DenseConfig):
                continue
            with contextlib.suppress(BrokenExecutor):
                compiled[key] = pool.submit(compile_one, tokens, rows, columns, config, 10 * major + minor)
    document: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "microseconds": {},
        "configurations": {},
    }
    deadline = started + seconds
    for i, (tokens, rows, columns) in enumerate(cases):
        if i > 0 and time.monotonic() > deadline:
            break
        name = kernels.tuning_key(tokens, rows, columns, BITS)
        found = best(tokens, rows, columns, compiled, deadline)
        if found is None:
            print(f"{name}: no candidate worked", file=sys.stderr)
            continue
        entry, times = found
        document["configurations"][name] = entry
        document["microseconds"][name] = times
        partial = output.with_name(output.name + ".partial")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(output)
        fastest = times[entry["kernel"]]
        row = "  ".join(f"{kernel} {value:8.2f}" for kernel, value in times.items())
        clock = time.monotonic() - started
        print(f"{clock:5.1f} s  {name:24} {times['cublas'] / fastest:5.2f}x  {row}  {entry}", file=sys.stderr)
    pool.shutdown(wait=False, cancel_futures=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="where the document goes")
    parser.add_argument("--seconds", type=float, default=75.0, help="time budget in all (default 75)")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="batch sizes to tune")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning needs a CUDA device")
    tune(given.seconds, given.output, tuple(given.tokens))


if __name__ == "__main__":
    main()

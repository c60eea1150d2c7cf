"""Finds the GPU kernels' configurations: `python -m tensormill.ops.linear_wna16.tune > sm_90.json`.

Tries a small grid per size, each candidate checked before it is timed, and prints the document that belongs
in `tuned/sm_90.json` on stdout; progress goes to stderr. Four-bit weights in groups of 128, float16.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from tensormill.measure import copies_past_cache, time_together

SHAPES = ((14336, 4096), (4096, 14336), (8192, 8192), (57344, 8192))  # rows x columns
TOKENS = (1, 2, 4, 8, 16, 64, 256)
BITS, GROUP_SIZE = 4, 128

kernels = importlib.import_module("tensormill.ops.linear_wna16.triton")


def gemv_candidates(tokens: int, rows: int, columns: int) -> Iterator[Any]:
    default = kernels.gemv_config(tokens, rows, columns, BITS)
    yield default
    for block_n, stages, programs in itertools.product((2, 4, 8), (1, 3, 4), (264, 528)):
        candidate = replace(default, block_n=block_n, stages=stages, programs=programs)
        if candidate != default:
            yield candidate


def gemm_candidates(tokens: int, rows: int, columns: int) -> Iterator[Any]:
    default = kernels.gemm_config(tokens, rows, columns, BITS)
    yield default
    if tokens <= 16:
        grid = itertools.product((16,), (64, 128), (16, 32), (4,), (3, 4), (1, 2, 4))
    elif tokens <= 64:
        grid = itertools.product((64,), (64, 128), (16, 32), (4, 8), (3,), (1, 2))
    else:
        grid = itertools.product((64, 128, 256), (64, 128), (16,), (4, 8), (2, 3), (1,))
    for values in grid:
        candidate = kernels.GemmConfig(*values)
        if candidate != default:
            yield candidate


def best_of(
    candidates: Iterator[Any],
    run: Callable[..., Tensor],
    copies: list[tuple[Any, ...]],
    expected: Tensor,
    deadline: float,
) -> tuple[Any, float] | None:
    """The fastest correct candidate and its seconds; later candidates are skipped after `deadline`."""
    best: tuple[Any, float] | None = None
    scale = expected.square().mean().sqrt()
    for candidate in candidates:
        if best is not None and time.monotonic() > deadline:
            break
        try:
            result = run(*copies[0], config=candidate).double()
        except Exception as error:  # a tile that does not fit the device is only a candidate less
            print(f"  {candidate}: {type(error).__name__}", file=sys.stderr)
            continue
        if not float((result - expected).square().mean().sqrt() / scale) < 2e-3:
            print(f"  {candidate}: wrong result", file=sys.stderr)
            continue
        calls = [functools.partial(run, *arguments, config=candidate) for arguments in copies]
        seconds = time_together({"run": calls}, "cuda", seconds=0.01)["run"].median
        if best is None or seconds < best[1]:
            best = (candidate, seconds)
    return best


def tune(seconds: float) -> dict[str, Any]:
    """The document for `tuned/sm_XX.json`, in about `seconds` (compilation included)."""
    from tensormill.ops.linear_wna16 import operator

    device = torch.device("cuda")
    cases = list(itertools.product(SHAPES, TOKENS))
    started = time.monotonic()
    configurations: dict[str, dict[str, int]] = {}
    microseconds: dict[str, float] = {}
    for i, ((rows, columns), tokens) in enumerate(cases):
        shape: dict[str, Any] = {"tokens": tokens, "out_features": rows, "in_features": columns, "bits": BITS}
        shape |= {"group_size": GROUP_SIZE, "dtype": "float16"}
        arguments = operator.inputs(shape, device, torch.Generator(device).manual_seed(1))
        x, weight, scale, zero_point, bias = arguments[:5]
        # float32 is exact enough to judge float16 by, and takes half of float64's memory
        dense = torch.ops.tensormill.dequantize_wna16(
            weight, scale, zero_point, columns, BITS, GROUP_SIZE, "packed", torch.float32
        )
        expected = (x.float() @ dense.T).double()
        del dense
        count = copies_past_cache([weight, scale], device)
        copies = [
            (x, weight.clone(), scale.clone(), zero_point, bias, BITS, GROUP_SIZE) for _ in range(count)
        ]
        kernel = "gemv" if tokens <= 2 else "gemm"
        run = kernels.gemv if kernel == "gemv" else kernels.gemm
        candidates = gemv_candidates if kernel == "gemv" else gemm_candidates
        left = seconds - (time.monotonic() - started)
        deadline = time.monotonic() + left / (len(cases) - i)
        found = best_of(candidates(tokens, rows, columns), run, copies, expected, deadline)
        key = kernels.tuning_key(kernel, tokens, rows, columns, BITS)
        if found is None:
            print(f"{key}: no candidate worked", file=sys.stderr)
            continue
        configurations[key] = asdict(found[0])
        microseconds[key] = round(found[1] * 1e6, 2)
        print(f"{key}: {microseconds[key]} us {found[0]}", file=sys.stderr)
    return {
        "device": torch.cuda.get_device_name(device),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "microseconds": microseconds,
        "configurations": configurations,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="time budget in all (default 40)")
    seconds = parser.parse_args().seconds
    if not torch.cuda.is_available():
        sys.exit("tuning needs a CUDA device")
    print(json.dumps(tune(seconds), indent=1))


if __name__ == "__main__":
    main()

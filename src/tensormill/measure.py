"""Timing that can be trusted: warm-up, many repeats, medians, competitors in turn, caches defeated.

On a GPU the calls are captured in a CUDA graph where they can be, so that launch gaps do not count, and timed
with events. On a CPU they are timed by the wall clock. Competitors take turns, so that drift of the machine's
speed hits all of them alike.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[[], object]

# On a CPU a competitor's idle threads wait in busy loops for a while and slow whoever is next: a pause lets them
# fall asleep, and a turn of several rounds makes up for the time that it takes.
_PAUSE, _TURN = 0.01, 0.02


@dataclass(frozen=True)
class Timing:
    """Seconds per call over several rounds.

    Attributes:
        seconds: what to compare: the median on a GPU; on a CPU the 10th percentile, since other processes only
            ever add time.
        median, low, high: median, 10th and 90th percentile of the rounds.
        rounds: their number.
    """

    seconds: float
    median: float
    low: float
    high: float
    rounds: int


def synchronize(device: torch.device | str) -> None:
    """Wait for the device's queued work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def fastest_call(call: Call, device: torch.device | str, *, seconds: float = 0.5) -> float:
    """Seconds of one call, 10th percentile: for ceilings, which a busy machine must not lower."""
    return time_together({"call": [call]}, device, seconds=seconds)["call"].low


def time_together(
    calls: Mapping[str, Sequence[Call]], device: torch.device | str, *, seconds: float = 1.0
) -> dict[str, Timing]:
    """Time several competitors in turn: next is always the one that has had the least time.

    Args:
        calls: by competitor, the same computation on different copies of its inputs; they are rotated through,
            so that with enough copies no cache serves the inputs.
        device: where they run.
        seconds: time budget of each competitor, warm-up left out; at least five rounds are timed.

    Returns:
        By competitor, its `Timing` per call.
    """
    device = torch.device(device)
    timers = {name: _timer(list(copies), device) for name, copies in calls.items()}
    rounds: dict[str, list[float]] = {name: [] for name in timers}
    spent = dict.fromkeys(timers, 0.0)
    on_host = device.type == "cpu"
    while waiting := [name for name in timers if spent[name] < seconds or len(rounds[name]) < 5]:
        name = min(waiting, key=spent.__getitem__)
        if on_host and len(timers) > 1:
            time.sleep(_PAUSE)
        begin = time.perf_counter()
        passed = 0.0
        while passed == 0.0 or (on_host and passed < _TURN):
            rounds[name].append(timers[name]())
            passed = time.perf_counter() - begin
        spent[name] += passed
    return {name: _summary(values, device) for name, values in rounds.items()}


def _summary(values: Sequence[float], device: torch.device) -> Timing:
    ordered = sorted(values)
    last = len(ordered) - 1
    median, low, high = statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    return Timing(low if device.type == "cpu" else median, median, low, high, len(ordered))


def _timer(copies: list[Call], device: torch.device) -> Callable[[], float]:
    """A function that times one round and returns seconds per call; warms up first."""
    for call in copies[:3]:
        call()
    synchronize(device)
    begin = time.perf_counter()
    copies[0]()
    synchronize(device)
    once = time.perf_counter() - begin
    if device.type == "cuda":
        return _cuda_timer(copies, once)
    per_round = max(1, min(10_000, math.ceil(2e-3 / max(once, 1e-7))))
    position = 0

    def wall() -> float:
        nonlocal position
        begin = time.perf_counter()
        for _ in range(per_round):
            copies[position]()
            position = (position + 1) % len(copies)
        return (time.perf_counter() - begin) / per_round

    return wall


def _cuda_timer(copies: list[Call], once: float) -> Callable[[], float]:
    # All copies, so that no cache serves them, unless the call takes so long that caches don't matter.
    rotation = min(len(copies), math.ceil(0.1 / max(once, 1e-6)))
    repeats = max(rotation, min(200, math.ceil(1e-3 / max(once, 1e-6))))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> None:
        for i in range(repeats):
            copies[i % len(copies)]()

    replay: Call = run
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*graph is empty.*")
            with torch.cuda.graph(graph):
                run()
        replay = graph.replay
    except (RuntimeError, Warning):  # the call synchronizes, copies from the host, or computes on the host
        torch.cuda.synchronize()

    replay()
    torch.cuda.synchronize()

    def events() -> float:
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / repeats

    return events


def last_level_cache_bytes(device: torch.device | str) -> int:
    """Size of the largest cache in front of the device's memory."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1:], 0))
    return max(sizes) or 32 << 20


def copies_past_cache(
    tensors: Sequence[Tensor], device: torch.device | str, *, at_most: int = 1 << 30
) -> int:
    """How many copies of these tensors exceed twice the last-level cache, within `at_most` bytes in all."""
    each = max(1, sum(t.numel() * t.element_size() for t in tensors))
    wanted = math.ceil(2 * last_level_cache_bytes(device) / each)
    return max(1, min(wanted, at_most // each, 512))


def warn_if_busy(limit: float = 0.5) -> None:
    """Say on stderr that other processes use the CPU, which makes timings unreliable."""
    try:
        load = os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return
    if load > limit:
        print(
            f"note: the machine is busy (load {load:.1f} per core); timings are unreliable", file=sys.stderr
        )

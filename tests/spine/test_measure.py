"""Timing: competitors take turns, copies are rotated, per-call seconds are right."""

import time

import torch

from tensormill.measure import copies_past_cache, last_level_cache_bytes, time_together


def test_competitors_are_told_apart_and_copies_rotated():
    seen = []

    def wait(duration, copy):
        def call():
            seen.append(copy)
            end = time.perf_counter() + duration
            while time.perf_counter() < end:
                pass

        return call

    timings = time_together(
        {"fast": [wait(1e-3, "a"), wait(1e-3, "b")], "slow": [wait(3e-3, "c")]}, "cpu", seconds=0.05
    )
    assert {"a", "b", "c"} <= set(seen)
    assert 1e-3 <= timings["fast"].median < timings["slow"].median
    assert timings["slow"].low <= timings["slow"].median <= timings["slow"].high
    assert timings["fast"].rounds >= 5


def test_copies_exceed_the_cache_but_not_the_budget():
    tensor = torch.zeros(1 << 20)  # 4 MiB
    copies = copies_past_cache([tensor], "cpu", at_most=64 << 20)
    assert 1 <= copies <= 16
    assert copies_past_cache([torch.zeros(1 << 26)], "cpu", at_most=1 << 20) == 1
    assert last_level_cache_bytes("cpu") >= 1 << 20

"""The roofline: what an operation costs, what this machine can do, and so the least time it can take.

A machine's ceilings (memory bandwidth, arithmetic rate by type) are measured once per device and cached under
the user's cache folder; nothing is typed in. The model is Williams, Waterman and Patterson's roofline (2009):
the limit is the larger of bytes / bandwidth and operations / rate.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tensormill.cache import cache_directory
from tensormill.measure import fastest_call

if TYPE_CHECKING:
    from tensormill.cuda import Kernel, Module

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Cost:
    """What an operation needs, from shapes alone.

    Attributes:
        operations: by unit ("fp64", "fp32", "bf16", "fp16", "int8", "fp8", "b1"); a multiply-add counts two.
        bytes_read: each input once, in bytes.
        bytes_written: each output once, in bytes.
    """

    operations: Mapping[str, float] = field(default_factory=dict)
    bytes_read: float = 0.0
    bytes_written: float = 0.0

    @property
    def bytes_moved(self) -> float:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do, as measured.

    Attributes:
        device: its name.
        read_bandwidth, copy_bandwidth: bytes per second (a copy counts both directions).
        rates: operations per second by unit, from large matrix products; of single bits ("b1", on Hopper), which no
            library multiplies, from the instruction alone.
    """

    device: str
    read_bandwidth: float
    copy_bandwidth: float
    rates: Mapping[str, float]

    @property
    def bandwidth(self) -> float:
        return max(self.read_bandwidth, self.copy_bandwidth)

    def limit_seconds(self, cost: Cost) -> float:
        """The least time this machine needs for `cost`; units whose rate is unknown are left out."""
        arithmetic = sum(n / self.rates[unit] for unit, n in cost.operations.items() if unit in self.rates)
        return max(cost.bytes_moved / self.bandwidth, arithmetic)


def device_name(device: torch.device | str) -> str:
    """What the device is called in caches and records, e.g. "NVIDIA H200" or a CPU model with its threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def has_fast_matmul(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether matrix products of `dtype` are worth computing in it, rather than in float32.

    On CPUs without 16-bit products torch's are a hundred times slower than float32's. Measured once per process, in
    milliseconds and without touching torch's random state; everywhere else the answer is yes.
    """
    device = torch.device(device)
    if device.type != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return True
    return _has_fast_16_bit_matmul(dtype)


@functools.cache
def _has_fast_16_bit_matmul(dtype: torch.dtype) -> bool:
    def least(a: torch.Tensor, b: torch.Tensor) -> float:
        # Short calls, of which the fastest counts, so that a busy machine doesn't decide.
        seconds = []
        for _ in range(40):
            begin = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    return least(a.to(dtype), b.to(dtype)) < 8 * least(a, b)


def ceilings(device: torch.device | str, *, remeasure: bool = False) -> Ceilings:
    """This device's ceilings: from the cache, else measured now (a few seconds) and cached."""
    device = torch.device(device)
    name = device_name(device)
    file = cache_directory() / f"ceilings-{''.join(c if c.isalnum() else '-' for c in name)}.json"
    version = {"schema": SCHEMA_VERSION, "torch": torch.__version__}
    if not remeasure and file.is_file():
        try:
            stored = json.loads(file.read_text())
            if stored.pop("version") == version:
                return Ceilings(**stored)
        except (ValueError, TypeError, KeyError):
            pass  # damaged or foreign: measured again
    measured = measure_ceilings(device)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"version": version, **asdict(measured)}, indent=1))
        temporary.replace(file)
    except OSError:
        pass  # a read-only home only means measuring again next time
    return measured


def measure_ceilings(device: torch.device | str) -> Ceilings:
    """Measure bandwidth and rates of `device` now."""
    device = torch.device(device)
    large = device.type == "cuda"
    read, copy = _bandwidths(device, (1 << 30) if large else (1 << 26))
    sizes = (2048, 8192) if large else (256, 512, 1024, 2048)
    rates: dict[str, float] = {}
    for unit, product in _products(device).items():
        try:
            # A product that the chip emulates would take minutes at the largest size.
            for side in sizes:
                seconds = fastest_call(product(side), device, seconds=0.5 if side == sizes[-1] else 0.01)
                rates[unit] = max(rates.get(unit, 0.0), 2 * side**3 / seconds)
                if seconds > 0.03:
                    break
        except (RuntimeError, NotImplementedError, AttributeError):
            continue  # this build or chip has no such product
    if (rate := _bit_rate(device)) is not None:
        rates["b1"] = rate
    # Narrow numbers can always be widened and multiplied in float32.
    rates = {unit: rate if unit == "fp64" else max(rate, rates["fp32"]) for unit, rate in rates.items()}
    return Ceilings(device_name(device), read, copy, rates)


def _bandwidths(device: torch.device, count: int) -> tuple[float, float]:
    """(read, copy) in bytes per second over `count` float32 elements, which no cache should hold."""
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    copy = 2 * 4 * count / fastest_call(lambda: target.copy_(source), device)
    read = 4 * count / fastest_call(lambda: source.sum(), device)
    return read, copy


def _products(device: torch.device) -> dict[str, Callable[[int], Callable[[], object]]]:
    """Square matrix products by unit, of a given side, on random data (zeros run faster than real data does)."""

    def floating(dtype: torch.dtype) -> Callable[[int], Callable[[], object]]:
        def make(side: int) -> Callable[[], object]:
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            return lambda: a @ b

        return make

    def int8(side: int) -> Callable[[], object]:
        a, b = (torch.randint(-127, 127, (side, side), device=device, dtype=torch.int8) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())

    def fp8(side: int) -> Callable[[], object]:
        a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)

    products = {
        "fp32": floating(torch.float32),
        "bf16": floating(torch.bfloat16),
        "fp16": floating(torch.float16),
        "int8": int8,
    }
    if device.type == "cuda":
        products["fp64"] = floating(torch.float64)
        products["fp8"] = fp8
    return products


class _BitRateArguments(ctypes.Structure):
    """The struct of bit_rate.cu."""

    _fields_ = (("bits", ctypes.c_void_p), ("sums", ctypes.c_void_p), ("repeats", ctypes.c_int))


BIT_RATE_WARPGROUPS = 2


def bit_rate_module() -> Module:
    """The kernel that multiplies single bits and does nothing else."""
    from tensormill import cuda

    native = cuda.DEVICE_HEADER.parent
    headers = (cuda.HOPPER_HEADER, native / "bits.cuh")
    return cuda.Module(Path(__file__).with_name("bit_rate.cu"), {"WARPGROUPS": BIT_RATE_WARPGROUPS}, headers)


def launch_bit_rate(kernel: Kernel, bits: Tensor, sums: Tensor, repeats: int) -> None:
    """Multiply 128 rows of 1024 bits by 256 rows, `repeats` times, in every block.

    Args:
        kernel: of `bit_rate_module`.
        bits: (384, 32) int32.
        sums: (blocks, 256, 128) int32, what each thread summed.
        repeats: at least 1.
    """
    arguments = _BitRateArguments(bits.data_ptr(), sums.data_ptr(), repeats)
    kernel.launch(len(sums), 128 * BIT_RATE_WARPGROUPS, bits.numel() * bits.element_size(), arguments)


def right_bit_sums(bits: Tensor, sums: Tensor) -> bool:
    """Whether the blocks of `launch_bit_rate` summed what one repetition of its products is."""
    places = torch.arange(32, device=bits.device)
    single = (bits[:, :, None] >> places & 1).flatten(1).float()  # [384, 1024]
    left = len(bits) - 256
    product = (single[:left] @ single[left:].T).to(sums.dtype)  # [128, 256]
    thread, register = (torch.arange(n, device=bits.device) for n in sums.shape[1:])
    row = thread // 32 * 16 + thread % 32 // 4
    at = product[
        row[:, None] + 8 * (register >> 1 & 1), register // 4 * 8 + thread[:, None] % 4 * 2 + (register & 1)
    ]
    return bool((sums == at).all())


def _bit_rate(device: torch.device) -> float | None:
    """Operations on single bits per second (AND and a count, two each), or None where there is no such instruction."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    from tensormill import cuda
    from tensormill.errors import BackendError

    index = torch.cuda.current_device() if device.index is None else device.index
    blocks, repeats = cuda.multiprocessors(index), 1024
    bits = torch.randint(-(1 << 31), 1 << 31, (384, 32), device=device).to(torch.int32)
    sums = torch.zeros(blocks, 128 * BIT_RATE_WARPGROUPS, 128, dtype=torch.int32, device=device)
    try:
        kernel = bit_rate_module().kernel("bit_rate", index)
        launch_bit_rate(kernel, bits, sums, 1)
        if not right_bit_sums(bits, sums):
            return None
        seconds = fastest_call(lambda: launch_bit_rate(kernel, bits, sums, repeats), device, seconds=0.2)
    except BackendError:  # no compiler for CUDA
        return None
    return blocks * repeats * 2.0 * (64 * BIT_RATE_WARPGROUPS) * 256 * 1024 / seconds

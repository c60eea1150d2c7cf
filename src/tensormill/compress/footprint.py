"""What a model takes: bytes in memory and on disk, and the high-water mark of a process's memory."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tensormill.errors import CheckpointError

_CONTROL_GROUP = Path("/sys/fs/cgroup")


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers in memory; tensors that share memory count once.

    Example:
        >>> model_bytes(nn.Linear(8, 4, bias=False))
        128
    """
    seen: dict[tuple[Any, ...], dict[tuple[Any, int], int]] = {}
    limits: dict[tuple[Any, ...], int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "meta":
            key: tuple[Any, ...] = ("meta", id(tensor))
            limits[key] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            key = (str(tensor.device), storage.data_ptr())
            limits[key] = storage.nbytes()
        size = tensor.numel() * tensor.element_size()
        seen.setdefault(key, {})[(tensor.storage_offset(), size)] = size
    return sum(min(sum(views.values()), limits[key]) for key, views in seen.items())


def checkpoint_bytes(path: str | Path) -> int:
    """Bytes of a checkpoint's weight files on disk (tokenizer and configuration not counted).

    Args:
        path: A directory with safetensors files (or, failing those, other weight files), or one weight file.

    Raises:
        CheckpointError: There is no weight file.
    """
    place = Path(path)
    if place.is_file():
        return place.stat().st_size
    for pattern in ("*.safetensors", "*.gguf", "*.bin", "*.pt"):
        files = [file for file in place.glob(pattern) if file.name != "training_args.bin"]
        if files:
            return sum(file.stat().st_size for file in files)
    raise CheckpointError(f"{path} holds no weight file, expected *.safetensors; give a model's directory")


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors as a checkpoint stores them: low-bit linears packed, tied weights once.

    A checkpoint's files are larger by their headers, some bytes for each tensor.
    """
    from tensormill.compress.formats import compressed_tensors

    sizes = {}
    for tensor in compressed_tensors.state_dict(model).values():
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        sizes[key] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


def bits_per_weight(model: nn.Module) -> float:
    """Average bits of a compressed weight as stored, scales and zero points included; 0 if nothing is compressed."""
    from tensormill.ops.linear_wna16.module import LinearWNA16

    bits, weights = 0.0, 0
    for layer in model.modules():
        if isinstance(layer, LinearWNA16):
            bits += 8 * sum(t.numel() * t.element_size() for t in (layer.weight_packed, layer.weight_scale))
            if layer.weight_zero_point is not None:
                bits += layer.bits * layer.weight_zero_point.numel()
            weights += layer.in_features * layer.out_features
    return bits / weights if weights else 0.0


@dataclass(frozen=True)
class PeakMemory:
    """High-water marks of memory.

    Attributes:
        host_bytes: Resident memory of the process; since its start where the system can't reset the mark.
        device_bytes: Memory allocated by torch on the GPU since `reset_peak_memory`; 0 on the CPU.
    """

    host_bytes: int
    device_bytes: int

    @property
    def bytes(self) -> int:
        """The mark that limits: the device's where one is used, else the host's."""
        return self.device_bytes or self.host_bytes


def reset_peak_memory(device: str | torch.device | None = None) -> None:
    """Start measuring peak memory anew, as far as the system allows.

    Args:
        device: A CUDA device whose mark is reset too; None or a CPU resets the host's only.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.init()  # or the first use of the device in this process would be refused
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: str | torch.device | None = None) -> PeakMemory:
    """High-water marks since `reset_peak_memory` (of the host since process start, where it can't be
    reset).
    """
    on_gpu = device is not None and torch.device(device).type == "cuda"
    return PeakMemory(_peak_resident_bytes(), torch.cuda.max_memory_allocated(device) if on_gpu else 0)


def available_bytes(device: str | torch.device = "cpu") -> int | None:
    """Memory that could be taken on a device without pushing others out; None where the system doesn't say.

    On the host that respects the limit of the control group, which is how containers bound memory.
    """
    if torch.device(device).type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    found = [size for size in (_free_on_host(), _free_in_control_group()) if size is not None]
    return min(found, default=None)


def _free_on_host() -> int | None:
    with suppress(OSError, KeyError, ValueError):
        return 1024 * _numbers("/proc/meminfo")["MemAvailable:"]
    return None


def _free_in_control_group() -> int | None:
    with suppress(OSError, KeyError, ValueError):  # "max" is no number
        limit = int((_CONTROL_GROUP / "memory.max").read_text())
        used = int((_CONTROL_GROUP / "memory.current").read_text())
        # Cached files count as used, but give way.
        return max(0, limit - used + _numbers(str(_CONTROL_GROUP / "memory.stat"))["inactive_file"])
    return None


def _numbers(file: str) -> dict[str, int]:
    """The number after the first word of every line."""
    return {words[0]: int(words[1]) for words in map(str.split, Path(file).read_text().splitlines())}


def _peak_resident_bytes() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # no such module on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

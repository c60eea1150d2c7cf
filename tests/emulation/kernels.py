"""For tests of CUDA kernels: running them on the CPU, compiling them, and reading what they use."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tensormill.cuda import Module
from tensormill.errors import BackendError

_HERE = Path(__file__).parent


class EmulatedKernel:
    """A kernel built with g++ against the emulation of device.cuh."""

    def __init__(self, run: ctypes._CFuncPtr) -> None:
        self._run = run

    def launch(
        self,
        grid: int | tuple[int, int],
        block: int,
        shared: int,
        arguments: ctypes.Structure | bytes,
        *,
        cluster: int = 1,
        overlap: bool = False,
        cooperative: bool = False,
    ) -> None:
        x, y = grid if isinstance(grid, tuple) else (grid, 1)
        given = bytes(arguments)
        copy = ctypes.create_string_buffer(len(given) + 64)
        aligned = -(-ctypes.addressof(copy) // 64) * 64  # as tensor maps want it
        ctypes.memmove(aligned, given, len(given))
        wrong = self._run(x, y, block, shared, x if cooperative else cluster, aligned)
        assert wrong is None, wrong.decode()


def emulate(module: Module, name: str) -> EmulatedKernel:
    """The kernel `name` of a module, to be launched on CPU tensors' addresses; skips where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    run = getattr(
        _library(module.source, tuple(sorted(module.defines.items())), module.headers), f"{name}_run"
    )
    run.restype, run.argtypes = ctypes.c_char_p, [ctypes.c_int] * 5 + [ctypes.c_void_p]
    return EmulatedKernel(run)


def emulated_tensor_map(tensor: torch.Tensor, box: tuple[int, int]) -> bytes:
    """What the emulation takes in the place of `tensormill.cuda.tensor_map`."""
    rows, columns = tensor.shape
    size = tensor.element_size()
    words = (tensor.data_ptr(), columns, rows, tensor.stride(0) * size, size, box[1], box[0])
    return struct.pack("16Q", *words, *[0] * 9)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="emulated-kernels-")


@functools.cache
def _library(
    source: Path, defines: tuple[tuple[str, int | str], ...], headers: tuple[Path, ...]
) -> ctypes.CDLL:
    name = hashlib.sha256(repr((source, defines)).encode()).hexdigest()[:16]
    output = Path(_folder().name) / f"{name}.so"
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-x", "c++"]
    macros = [f"-D{key}={value}" for key, value in defines]
    # The emulation comes first: it has a device.cuh of its own.
    includes = [f"-I{_HERE}", *(f"-I{file.parent}" for file in headers)]
    command = ["g++", *flags, *macros, *includes, "-o", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(output))


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses: registers of a thread, bytes of its stack (spills), static shared memory."""

    registers: int
    stack: int
    shared: int


def compile_or_skip(module: Module, architecture: str) -> bytes:
    """The module's cubin, none of whose warpgroup products is used early; skips where no compiler for CUDA is installed."""
    try:
        cubin = module.cubin(architecture)
    except BackendError as error:
        if "no compiler" in str(error):
            pytest.skip(str(error))
        raise
    if architecture == "sm_90a" and _find_cuobjdump() is not None:
        early = early_uses(disassembly(cubin))
        assert not early, f"{module.source.name} uses sums before they are there: {early[:3]}"
    return cubin


def resources(cubin: bytes) -> dict[str, Resources]:
    """What each kernel of a cubin uses; skips where there is no cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    return {name: Resources(int(r), int(stack) + int(local), int(s)) for name, r, stack, s, local in found}


def disassembly(cubin: bytes) -> str:
    """The machine instructions of a cubin; skips where there is no cuobjdump and nvdisasm."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def early_uses(instructions: str) -> list[str]:
    """Instructions of a disassembly that touch sums of warpgroup products (GMMA) before the wait for them.

    The compiler takes such sums for finished where the product was issued, and may copy them on the way to the wait.
    """
    found: list[str] = []
    issued: set[int] = set()  # registers of products, since the last commit
    groups: list[set[int]] = []  # and of the groups before
    for line in instructions.splitlines():
        match = re.search(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\d\s+)?([\w.]+)\s*(.*?);", line)
        if match is None:
            continue
        name, operands = match.groups()
        if "GMMA." in name:
            tokens, first = re.search(r"64x(\d+)x", name), re.match(r"R(\d+)", operands)
            assert tokens is not None and first is not None, line
            issued |= set(range(int(first[1]), int(first[1]) + int(tokens[1]) // 2))
            if "gsb0" in operands:
                groups.append(issued)
                issued = set()
        elif name.startswith("WARPGROUP.DEPBAR"):
            pending = int(operands.split(",")[1], 16)
            groups = groups[len(groups) - pending :] if len(groups) > pending else groups
        else:
            used = {int(register) for register in re.findall(r"\bR(\d+)\b", operands)}
            if used & issued.union(*groups):
                found.append(line.strip())
    return found


def _cuobjdump() -> str:
    found = _find_cuobjdump()
    if found is None:
        pytest.skip("no cuobjdump")
    return found


def _find_cuobjdump() -> str | None:
    """On the path, or as triton ships it."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        shipped = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(shipped) if shipped.is_file() else None
    return found

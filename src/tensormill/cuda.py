"""Kernels in CUDA C++, compiled at run time: NVRTC makes a cubin, cached on disk, and the driver launches it.

Users need no toolkit: PyTorch's CUDA builds bring NVRTC and cuda-bindings. Kernels include `device.cuh` (beside
this package's native code) instead of CUDA's headers and take one struct, which a `ctypes.Structure` mirrors:

    module = Module(Path(__file__).with_name("scale.cu"), {"TOKENS": 8})
    module.kernel("scale", device).launch(grid=132, block=256, shared=0, arguments=Arguments(...))
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tensormill.cache import cache_directory
from tensormill.errors import BackendError

DEVICE_HEADER = Path(__file__).with_name("native") / "device.cuh"
HOPPER_HEADER = DEVICE_HEADER.with_name("hopper.cuh")
_LEAST_CAPABILITY = (8, 0)
_DYNAMIC_SHARED_MEMORY = 48 << 10  # bytes a block gets without asking
_PORTABLE_CLUSTER = 8  # blocks a cluster has without asking


def cuda_missing() -> str | None:
    """Why CUDA kernels can't run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
        return "the GPU is older than compute capability 8.0"
    try:
        _compiler()
    except BackendError as error:
        return str(error)
    return None


@functools.cache
def architecture(device: int) -> str:
    """What to compile for on that device: "sm_80", "sm_90a", ...; with the chip's own instructions from sm_90 on."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class Module:
    """Kernels of one source file with given macros.

    Args:
        source: the `.cu` file.
        defines: macros, by name.
        headers: what it includes, beside device.cuh.
    """

    def __init__(
        self, source: Path, defines: Mapping[str, int | str] | None = None, headers: Sequence[Path] = ()
    ) -> None:
        self.source = source
        self.defines = dict(defines or {})
        self.headers = (DEVICE_HEADER, *headers)
        self._kernels: dict[tuple[str, int], Kernel] = {}

    def cubin(self, architecture: str) -> bytes:
        """Machine code for an architecture such as "sm_90a", from the cache or compiled now (about a second).

        Raises:
            BackendError: the source does not compile, or no compiler is installed.
        """
        options = [f"-D{name}={value}" for name, value in sorted(self.defines.items())]
        compiler, version = _compiler()
        digest = hashlib.sha256(repr((compiler, version, architecture, options)).encode())
        for file in (self.source, *self.headers):
            digest.update(file.name.encode() + file.read_bytes())
        cached = cache_directory() / "cuda" / f"{self.source.stem}-{digest.hexdigest()[:32]}.cubin"
        if cached.is_file():
            return cached.read_bytes()
        build = _compile_with_nvrtc if compiler == "nvrtc" else _compile_with_nvcc
        code = build(self.source, self.headers, options, architecture)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            temporary = cached.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_bytes(code)
            temporary.replace(cached)
        except OSError:
            pass  # a read-only home only means compiling again
        return code

    def kernel(self, name: str, device: int) -> Kernel:
        """The kernel of that name, loaded on a device."""
        found = self._kernels.get((name, device))
        if found is None:
            found = self._kernels[name, device] = Kernel(self.cubin(architecture(device)), name, device)
        return found


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("_padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Configuration(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of CUfunction_attribute
_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14
_COOPERATIVE, _CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 2, 4, 6  # of CUlaunchAttributeID


@functools.cache
def _driver() -> ctypes.CDLL:
    """The driver's library, called directly: a launch costs less than through bindings."""
    return ctypes.CDLL("libcuda.so.1")


def _check(error: int, what: str) -> None:
    if error:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(error, ctypes.byref(name))
        raise BackendError(f"{what}: the CUDA driver says {(name.value or b'unknown error').decode()}")


class Kernel:
    """A compiled kernel on one device."""

    def __init__(self, cubin: bytes, name: str, device: int) -> None:
        self.name = name
        self.device = device
        self._cubin = cubin  # the driver may read it until the module is unloaded
        self._configurations: dict[tuple[Any, ...], Any] = {}
        self._most_shared = _DYNAMIC_SHARED_MEMORY
        self._launch = _driver().cuLaunchKernelEx
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream().query()  # makes torch's context current
            _check(_driver().cuModuleLoadData(ctypes.byref(module), cubin), name)
            found = _driver().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode())
            _check(found, name)

    def launch(
        self,
        grid: int | tuple[int, int, int],
        block: int,
        shared: int,
        arguments: ctypes.Structure | bytes,
        *,
        overlap: bool = False,
        cluster: int = 1,
        cooperative: bool = False,
    ) -> None:
        """Launch on torch's current stream; returns at once, and can be captured in a graph.

        Args:
            grid: blocks.
            block: threads of a block.
            shared: bytes of dynamic shared memory.
            arguments: the kernel's struct, or its bytes; copied.
            overlap: the kernel may start before the one before it has ended (programmatic dependent launch,
                sm_90): it calls `wait_for_previous_kernel` before it touches what that one reads or writes.
            cluster: blocks of a cluster along the grid's first dimension, up to 16.
            cooperative: all blocks run at once or not at all: they may wait for each other.

        Raises:
            BackendError: the driver refuses.
        """
        stream = current_stream(self.device)
        key = (grid, block, shared, stream, overlap, cluster, cooperative)
        configuration = self._configurations.get(key)
        if configuration is None:
            configuration = self._configurations[key] = self._configure(*key)
        if isinstance(arguments, bytes):
            arguments = (ctypes.c_char * len(arguments)).from_buffer_copy(arguments)  # type: ignore[assignment]
        pointer = ctypes.c_void_p(ctypes.addressof(arguments))  # type: ignore[arg-type]
        error = self._launch(configuration, self._function, ctypes.byref(pointer), None)
        if error:
            _check(error, self.name)

    def _configure(
        self,
        grid: int | tuple[int, int, int],
        block: int,
        shared: int,
        stream: int,
        overlap: bool,
        cluster: int,
        cooperative: bool,
    ) -> Any:
        if shared > self._most_shared:
            attribute = _MAX_DYNAMIC_SHARED_SIZE_BYTES
            with torch.cuda.device(self.device):
                _check(_driver().cuFuncSetAttribute(self._function, attribute, shared), self.name)
            self._most_shared = shared
        attributes = (_Attribute * 3)()
        count = 0
        if overlap:
            attributes[count].id = _PROGRAMMATIC_STREAM_SERIALIZATION
            attributes[count].value[0] = 1
            count += 1
        if cluster > _PORTABLE_CLUSTER:
            with torch.cuda.device(self.device):
                _check(
                    _driver().cuFuncSetAttribute(self._function, _NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1),
                    self.name,
                )
        if cluster > 1:
            attributes[count].id = _CLUSTER_DIMENSION
            attributes[count].value[:3] = [cluster, 1, 1]
            count += 1
        if cooperative:
            attributes[count].id = _COOPERATIVE
            attributes[count].value[0] = 1
            count += 1
        x, y, z = grid if isinstance(grid, tuple) else (grid, 1, 1)
        return ctypes.byref(
            _Configuration((x, y, z), (block, 1, 1), shared, stream or None, attributes, count)
        )


def current_stream(device: int) -> int:
    """The handle of torch's current stream on a device."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


def capture_number(stream: int) -> int:
    """A number for the graph that is being captured on the current stream, whose handle is given; 0 for none."""
    if not torch.cuda.is_current_stream_capturing():
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    query = _driver().cuStreamGetCaptureInfo_v2
    query.argtypes = [ctypes.c_void_p] * 6
    found = query(stream, ctypes.addressof(status), ctypes.addressof(number), None, None, None)
    _check(found, "graph capture")
    return number.value


class StreamMemory:
    """Memory that kernels leave as they found it, for those of one stream, which run one after another, to share.

    A CUDA graph that is being captured gets its own, filled when the graph starts, since it may run beside others.

    Args:
        fill: what every int32 is at first.
        least: elements to make at least.
    """

    def __init__(self, fill: int, least: int) -> None:
        self.fill, self.least = fill, least
        self._made: dict[tuple[int, int, int], torch.Tensor] = {}

    def __call__(self, device: torch.device, elements: int) -> torch.Tensor:
        """At least (elements,) int32 for the current stream of a device that has an index."""
        assert device.index is not None
        stream = current_stream(device.index)
        key = (device.index, stream, capture_number(stream))
        found = self._made.get(key)
        if found is None or found.numel() < elements:
            if key[2]:  # earlier captures on this stream are over
                for old in [k for k in self._made if k[:2] == key[:2] and k[2] not in (0, key[2])]:
                    del self._made[old]
            size = (max(elements, self.least),)
            found = self._made[key] = torch.full(size, self.fill, dtype=torch.int32, device=device)
        return found


def tensor_map(tensor: torch.Tensor, box: tuple[int, int], swizzle: int = 128) -> bytes:
    """A CUtensorMap (128 bytes, aligned to 64 in the kernel's struct) of a two-dimensional tensor.

    Args:
        tensor: contiguous along its last dimension, rows a multiple of 16 bytes apart; what lies outside reads 0.
        box: (rows, columns) of one copy; a row of it has at most `swizzle` bytes.
        swizzle: 0, 32, 64 or 128 bytes.
    """
    if tensor.stride(1) != 1 or tensor.stride(0) * tensor.element_size() % 16 or tensor.data_ptr() % 16:
        raise BackendError(
            f"given a tensor of strides {tensor.stride()} for a tensor map, expected rows of aligned 16 bytes"
        )
    buffer = (ctypes.c_char * 192)()
    address = -(-ctypes.addressof(buffer) // 64) * 64
    _check(
        _driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(address),
            _TENSOR_MAP_TYPES.get(tensor.dtype, 0),
            2,
            ctypes.c_void_p(tensor.data_ptr()),
            (ctypes.c_uint64 * 2)(tensor.shape[1], tensor.shape[0]),
            (ctypes.c_uint64 * 1)(tensor.stride(0) * tensor.element_size()),
            (ctypes.c_uint32 * 2)(box[1], box[0]),
            (ctypes.c_uint32 * 2)(1, 1),
            0,  # not interleaved
            {0: 0, 32: 1, 64: 2, 128: 3}[swizzle],
            3,  # 256 bytes at a time into the second-level cache
            0,  # what lies outside is 0
        ),
        "tensor map",
    )
    return ctypes.string_at(address, 128)


# CUtensorMapDataType; bytes for all else
_TENSOR_MAP_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9, torch.int32: 3}


@functools.cache
def _compiler() -> tuple[str, str]:
    """("nvrtc" or "nvcc", its version)."""
    try:
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
        return "nvrtc", f"{major}.{minor}"
    except Exception:  # not installed, or without the library it binds
        if shutil.which("nvcc") is None:
            raise BackendError(
                "no compiler for CUDA kernels was found; pip install cuda-bindings nvidia-cuda-nvrtc"
            ) from None
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc", version.strip().rpartition("\n")[2]


def _compile_with_nvrtc(
    source: Path, headers: Sequence[Path], options: Sequence[str], architecture: str
) -> bytes:
    from cuda.bindings import nvrtc

    texts = [file.read_bytes() for file in headers]
    names = [file.name.encode() for file in headers]
    error, program = nvrtc.nvrtcCreateProgram(
        source.read_bytes(), source.name.encode(), len(texts), texts, names
    )
    if error:
        raise BackendError(f"NVRTC says {error.name}")
    try:
        flags = [f"--gpu-architecture={architecture}", "-std=c++17", "-default-device", *options]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
        if error:
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = b" " * size
            nvrtc.nvrtcGetProgramLog(program, log)
            raise BackendError(f"{source.name} does not compile for {architecture}:\n{log.decode()}")
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        code = b" " * size
        nvrtc.nvrtcGetCUBIN(program, code)
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _compile_with_nvcc(
    source: Path, headers: Sequence[Path], options: Sequence[str], architecture: str
) -> bytes:
    number = architecture.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernel.cubin"
        includes = [f"-I{parent}" for parent in sorted({str(file.parent) for file in headers})]
        target = f"-gencode=arch=compute_{number},code=sm_{number}"
        flags = ["-cubin", target, "-std=c++17", "--expt-relaxed-constexpr", *includes, *options]
        done = subprocess.run(
            ["nvcc", *flags, "-o", str(output), str(source)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BackendError(
                f"{source.name} does not compile for {architecture}:\n{done.stdout}{done.stderr}"
            )
        return output.read_bytes()

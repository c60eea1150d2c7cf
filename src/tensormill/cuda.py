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

from tensormill.errors import BackendError
from tensormill.roofline import cache_directory

DEVICE_HEADER = Path(__file__).with_name("native") / "device.cuh"
_LEAST_CAPABILITY = (8, 0)
_DYNAMIC_SHARED_MEMORY = 48 << 10  # bytes a block gets without asking


def cuda_missing() -> str | None:
    """Why CUDA kernels can't run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
        return "the GPU is older than compute capability 8.0"
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401
    except ImportError:
        return "cuda-bindings is not installed; pip install cuda-bindings"
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


class Kernel:
    """A compiled kernel on one device."""

    def __init__(self, cubin: bytes, name: str, device: int) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._cubin = cubin  # the driver may read it until the module is unloaded
        self._configurations: dict[tuple[Any, ...], Any] = {}
        self._most_shared = _DYNAMIC_SHARED_MEMORY
        self.device = device
        with torch.cuda.device(device):
            torch.cuda.current_stream().query()  # makes torch's context current
            self._module = _checked(driver.cuModuleLoadData(cubin))
            self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))

    def launch(
        self,
        grid: int | tuple[int, int, int],
        block: int,
        shared: int,
        arguments: ctypes.Structure,
        *,
        overlap: bool = False,
        cluster: int = 1,
    ) -> None:
        """Launch on torch's current stream; returns at once, and can be captured in a graph.

        Args:
            grid: blocks.
            block: threads of a block.
            shared: bytes of dynamic shared memory.
            arguments: the kernel's struct; copied.
            overlap: the kernel may start before the one before it has ended (programmatic dependent launch,
                sm_90): it calls `wait_for_previous_kernel` before it touches what that one reads or writes.
            cluster: blocks of a cluster along the grid's first dimension.

        Raises:
            BackendError: the driver refuses.
        """
        stream = torch.cuda.current_stream(self.device).cuda_stream
        key = (grid, block, shared, stream, overlap, cluster)
        configuration = self._configurations.get(key)
        if configuration is None:
            configuration = self._configurations[key] = self._configure(*key)
        pointer = ctypes.c_void_p(ctypes.addressof(arguments))
        result = self._driver.cuLaunchKernelEx(
            configuration, self._function, ctypes.addressof(pointer), 0
        )
        if result[0]:
            _checked(result)

    def _configure(
        self,
        grid: int | tuple[int, int, int],
        block: int,
        shared: int,
        stream: int,
        overlap: bool,
        cluster: int,
    ) -> Any:
        driver = self._driver
        if shared > self._most_shared:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self._function, attribute, shared))
            self._most_shared = shared
        attributes = []
        if overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x = cluster
            attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
            attributes.append(attribute)
        configuration = driver.CUlaunchConfig()
        x, y, z = grid if isinstance(grid, tuple) else (grid, 1, 1)
        configuration.gridDimX, configuration.gridDimY, configuration.gridDimZ = x, y, z
        configuration.blockDimX, configuration.blockDimY, configuration.blockDimZ = block, 1, 1
        configuration.sharedMemBytes = shared
        configuration.hStream = stream
        configuration.attrs = attributes
        configuration.numAttrs = len(attributes)
        return configuration


def tensor_map(tensor: torch.Tensor, box: tuple[int, int], swizzle: int = 128) -> bytes:
    """A CUtensorMap (128 bytes, aligned to 64 in the kernel's struct) of a two-dimensional tensor.

    Args:
        tensor: contiguous along its last dimension, rows a multiple of 16 bytes apart; what lies outside reads 0.
        box: (rows, columns) of one copy; a row of it has at most `swizzle` bytes.
        swizzle: 0, 32, 64 or 128 bytes.
    """
    from cuda.bindings import driver

    types = driver.CUtensorMapDataType
    kinds = {
        torch.float16: types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        torch.bfloat16: types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float32: types.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        torch.int32: types.CU_TENSOR_MAP_DATA_TYPE_INT32,
    }
    swizzles = driver.CUtensorMapSwizzle
    made = _checked(
        driver.cuTensorMapEncodeTiled(
            kinds.get(tensor.dtype, types.CU_TENSOR_MAP_DATA_TYPE_UINT8),
            2,
            tensor.data_ptr(),
            [driver.cuuint64_t(tensor.shape[1]), driver.cuuint64_t(tensor.shape[0])],
            [driver.cuuint64_t(tensor.stride(0) * tensor.element_size())],
            [driver.cuuint32_t(box[1]), driver.cuuint32_t(box[0])],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            {
                0: swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
                32: swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
                64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
                128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
            }[swizzle],
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.string_at(int(made.getPtr()), 128)


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a driver call, or None.

    Raises:
        BackendError: it failed.
    """
    error, *values = result
    if error:
        raise BackendError(f"the CUDA driver says {error.name}")
    return values[0] if values else None


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
            raise BackendError(f"{source.name} does not compile for {architecture}:\n{done.stdout}{done.stderr}")
        return output.read_bytes()

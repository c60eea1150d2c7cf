"""The pieces that kernels in CUDA C++ are made of: the emulation, run-time compilation, decoding of tiled weights."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import pytest
import torch

from emulation.kernels import compile_or_skip, emulate, resources
from tensormill import cuda
from tensormill.cuda import DEVICE_HEADER, Module
from tensormill.errors import BackendError
from tensormill.ops import tiles

HEADER = Path(tiles.__file__).parent / "linear_wna16" / "dequantize.cuh"


class Arguments(ctypes.Structure):
    _fields_ = (("words", ctypes.c_void_p), ("zeros", ctypes.c_void_p), ("registers", ctypes.c_void_p))


# One tile: every lane writes its 16 registers of A fragments.
DECODE = """
#include "dequantize.cuh"
struct Arguments { const uint32_t* words; const uint8_t* zeros; uint32_t* registers; };
template <class T, bool ZEROS>
DEVICE void decode_tile(const Arguments& arguments) {
    const int lane = lane_index();
    for (int i = lane; i < 32 * WEIGHT_BITS; i += 32) store_shared(shared_memory() + 4 * i, arguments.words[i]);
    synchronize();
    uint32_t words[WEIGHT_BITS];
    load_tile<WEIGHT_BITS>(shared_memory(), lane, words);
    ZeroPoint<WEIGHT_BITS, T> low, high;
    if constexpr (ZEROS) {
        const int byte = lane % 4;  // of a word whose other bytes are something else
        const uint32_t others = 0x5A5A5A5A & ~(255u << (8 * byte));
        low = ZeroPoint<WEIGHT_BITS, T>(others | uint32_t(arguments.zeros[lane / 4]) << (8 * byte), byte);
        high = ZeroPoint<WEIGHT_BITS, T>(others | uint32_t(arguments.zeros[lane / 4 + 8]) << (8 * byte), byte);
    }
#pragma unroll
    for (int step = 0; step < 4; step++) {
        uint32_t a[4];
        dequantize<WEIGHT_BITS, T>(words, step, low, high, a);
#pragma unroll
        for (int r = 0; r < 4; r++) arguments.registers[16 * lane + 4 * step + r] = a[r];
    }
}
KERNEL(float16_symmetric, 32, 1, Arguments) { decode_tile<Half, false>(arguments); }
KERNEL(float16_zeros, 32, 1, Arguments) { decode_tile<Half, true>(arguments); }
KERNEL(bfloat16_symmetric, 32, 1, Arguments) { decode_tile<BFloat16, false>(arguments); }
KERNEL(bfloat16_zeros, 32, 1, Arguments) { decode_tile<BFloat16, true>(arguments); }
"""


def decode_module(folder: Path, bits: int) -> Module:
    source = folder / "decode.cu"
    source.write_text(DECODE)
    return Module(source, {"WEIGHT_BITS": bits}, [HEADER])


@pytest.mark.parametrize("bits", range(1, 9))
def test_decoding_is_exact(bits, tmp_path):
    """Fragments hold q - z exactly, where the PTX manual says that they lie, for every code and zero point."""
    module = decode_module(tmp_path, bits)
    for dtype, zeros in itertools.product(("float16", "bfloat16"), (False, True)):
        kernel = emulate(module, f"{dtype}_{'zeros' if zeros else 'symmetric'}")
        for _ in range(4):
            codes = torch.randint(0, 1 << bits, (16, 64), dtype=torch.uint8)
            codes[:, 0], codes[:, 1] = 0, (1 << bits) - 1
            zero = torch.randint(0, 1 << bits, (16,), dtype=torch.uint8)
            zero[0], zero[1] = 0, (1 << bits) - 1
            words = tiles._tile_codes(codes, bits, "f16")[0, : 32 * bits].contiguous()
            registers = torch.zeros(32, 4, 4, dtype=torch.int32)
            given = Arguments(words.data_ptr(), zero.data_ptr(), registers.data_ptr())
            kernel.launch(1, 32, 128 * bits, given)
            subtracted = zero if zeros else torch.full((16,), 1 << (bits - 1))
            expected = codes.float() - subtracted.float()[:, None]
            # [lane, step, register, half]
            pairs = registers.view(getattr(torch, dtype)).view(32, 4, 4, 2).float()
            for lane in range(32):
                g, t = divmod(lane, 4)
                for register in range(4):
                    row, column = g + 8 * (register & 1), 2 * t + 8 * (register >> 1)
                    wanted = expected[row].view(4, 16)[:, column : column + 2]
                    assert torch.equal(pairs[lane, :, register], wanted)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100a"])
def test_decoding_compiles(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORMILL_CACHE", str(tmp_path))
    module = decode_module(tmp_path, 3)
    code = compile_or_skip(module, architecture)
    assert module.cubin(architecture) == code  # from the cache
    assert [used.stack for used in resources(code).values()] == [0, 0, 0, 0]


def test_errors_of_a_kernel_are_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORMILL_CACHE", str(tmp_path))
    (tmp_path / "fine.cu").write_text('#include "device.cuh"\nKERNEL(fine, 32, 1, int) {}')
    compile_or_skip(Module(tmp_path / "fine.cu"), "sm_90a")
    (tmp_path / "wrong.cu").write_text('#include "device.cuh"\nKERNEL(wrong, 32, 1, int) { unknown(); }')
    with pytest.raises(BackendError, match=r"wrong\.cu does not compile for sm_90a(.|\n)*unknown"):
        Module(tmp_path / "wrong.cu").cubin("sm_90a")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (thread_index() < 40) synchronize();", "hangs"),
        ("load_shared(shared_memory() + 256);", "outside shared memory"),
        ("load_shared4(shared_memory() + 8);", "unaligned"),
        ("if (lane_index() % 2) synchronize_warp(); else shuffle(1.0f, 0);", "different instructions"),
        ("mbarrier_init(shared_memory(), 1); mbarrier_wait(shared_memory(), 0);", "hangs"),
    ],
)
def test_emulation_reports(body, message, tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text(f'#include "device.cuh"\nKERNEL(wrong, 64, 1, int) {{ {body} }}')
    with pytest.raises(AssertionError, match=message):
        emulate(Module(source), "wrong").launch(2, 64, 256, ctypes.c_int(0))


def test_device_header_is_installed():
    assert DEVICE_HEADER.is_file()


def test_memory_of_a_stream_is_shared_and_a_capture_has_its_own(monkeypatch):
    place, device = [7, 0], torch.device("cpu", 0)  # handle of the stream, number of the capture
    monkeypatch.setattr(cuda, "current_stream", lambda index: place[0])
    monkeypatch.setattr(cuda, "capture_number", lambda stream: place[1])
    memory = cuda.StreamMemory(-1, least=4)
    first = memory(device, 3)
    assert first.tolist() == [-1] * 4 and first.dtype == torch.int32
    assert memory(device, 4) is first
    larger = memory(device, 5)
    assert len(larger) == 5 and memory(device, 2) is larger
    place[1] = 1
    captured = memory(device, 2)
    assert captured is not larger and memory(device, 2) is captured
    place[1] = 2
    assert memory(device, 2) is not captured
    place[1] = 0
    assert memory(device, 2) is larger
    assert len(memory._made) == 2, "an earlier capture's memory is kept"
    place[0] = 8
    assert memory(device, 2) is not larger

"""The kernel for many tokens, `wgmma.cu`: emulated on the CPU, compiled for sm_90a, and run where there is a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from emulation.kernels import (
    compile_or_skip,
    disassembly,
    early_uses,
    emulate,
    emulated_tensor_map,
    resources,
)
from tensormill.cuda import Module
from tensormill.ops.bit_packing import pack_bits
from tensormill.ops.linear_wna16 import reference, wgmma
from tensormill.ops.linear_wna16.wgmma import Format, Tile
from tensormill.ops.tiles import tile_weight

HALF, BFLOAT16, INT8, FP8 = torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn
TOLERANCE = {HALF: 6e-4, BFLOAT16: 5e-3}  # relative RMS error


@pytest.fixture
def emulated(monkeypatch):
    """`wgmma.product` on CPU tensors; the machine has four multiprocessors, so that blocks take several tiles, but for
    tiles that are split, all of whose blocks must run at once."""

    class Emulated:
        def __init__(self, form: Format, tile: Tile) -> None:
            self.module = module(form, tile)

        def kernel(self, name, device):
            return emulate(self.module, name)

    module = wgmma.module
    monkeypatch.setattr(wgmma, "module", Emulated)
    monkeypatch.setattr(wgmma, "tensor_map", emulated_tensor_map)
    monkeypatch.setattr(wgmma, "multiprocessors", lambda device: machine.multiprocessors)
    monkeypatch.setattr(wgmma, "workspace", lambda device, elements: machine.workspace[:elements])
    monkeypatch.setattr(wgmma, "_MAPS", {})
    monkeypatch.setattr(wgmma, "_plans", wgmma._plans.__wrapped__)
    machine = SimpleNamespace(multiprocessors=4, workspace=torch.full((1 << 20,), -1, dtype=torch.int32))
    yield machine
    assert (machine.workspace == -1).all(), "the next launch finds sums of this one"


def errors(
    tokens,
    rows,
    columns,
    group_size,
    x_group_size=-1,
    *,
    form: Format,
    tile: Tile | None,
    device="cpu",
    seed=0,
):
    """(relative RMS error, largest error relative to the largest result) of random inputs."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator, device=device)

    bits = form.bits
    groups = 1 if group_size == -1 else -(-columns // group_size)
    codes = integers(0, 1 << bits, rows, columns).to(torch.uint8)
    scale = (random(rows, groups).abs() * 0.01 + 0.001).to(torch.float32 if form.float_scale else form.y)
    zero = integers(0, 1 << bits, rows, groups).to(torch.uint8) if form.zero_points else None
    bias = random(rows).to(form.y)
    x_scale = None
    if form.bytes:
        x = (
            integers(-127, 128, tokens, columns).to(INT8)
            if form.x == INT8
            else random(tokens, columns).mul(9).to(FP8)
        )
        x_groups = 1 if x_group_size == -1 else -(-columns // x_group_size)
        x_scale = random(tokens, x_groups).abs() * 0.01
    else:
        x = random(tokens, columns).to(form.x)
    packed = pack_bits(codes, bits)
    tiled = tile_weight(
        packed,
        scale,
        zero,
        in_features=columns,
        bits=bits,
        group_size=group_size,
        kind="i8" if form.bytes else "f16",
    )
    options = {"bits": bits, "group_size": group_size, "tile": tile, "dtype": form.y}
    y = wgmma.product(x, *tiled, bias, x_scale=x_scale, x_group_size=x_group_size, **options).double()
    wide = x.double()
    if x_scale is not None:
        size = columns if x_group_size == -1 else x_group_size
        wide *= x_scale.double().repeat_interleave(size, 1)[:, :columns]
    expected = reference.linear_wna16(
        wide, packed, scale.double(), zero, bias.double(), bits, group_size, "packed"
    )
    assert y.shape == expected.shape
    wrong = y - expected
    return (wrong.norm() / expected.norm()).item(), (wrong.abs().max() / expected.abs().max()).item()


CASES = {
    "groups": (100, 328, 464, 128, Format(4, HALF, HALF, 1, False), Tile(256, 128)),
    "groups of 32, zero points": (
        130,
        136,
        328,
        32,
        Format(3, BFLOAT16, BFLOAT16, 2, True),
        Tile(128, 64),
    ),
    "rows, zero points, split by 4": (70, 264, 640, -1, Format(8, HALF, HALF, 0, True), Tile(256, 64, 4)),
    "split": (77, 131, 523, 64, Format(4, HALF, HALF, 1, True), Tile(128, 128, 2)),
    "256 tokens": (257, 200, 200, 128, Format(6, BFLOAT16, BFLOAT16, 1, False), Tile(128, 256)),
    "int8": (257, 200, 453, -1, Format(4, INT8, HALF, 0, False, True), Tile(128, 256)),
    "int8, zero points, split": (77, 136, 640, -1, Format(6, INT8, BFLOAT16, 0, True), Tile(256, 64, 2)),
    "int8, groups": (130, 200, 712, 256, Format(4, INT8, BFLOAT16, 1, False, True), Tile(128, 64)),
    "fp8": (70, 200, 453, -1, Format(4, FP8, HALF, 0, False, True), Tile(128, 64)),
    "fp8, 5 bits, groups, split": (33, 136, 712, 256, Format(5, FP8, BFLOAT16, 1, False), Tile(128, 64, 2)),
    "int8, groups, split within one": (
        35,
        200,
        890,
        384,
        Format(8, INT8, HALF, 1, False, True),
        Tile(128, 64, 4),
    ),
    "int8, groups of both": (
        260,
        200,
        712,
        128,
        128,
        Format(4, INT8, HALF, 1, False, True, True),
        Tile(128, 128),
    ),
    "int8, groups of x alone": (
        70,
        264,
        650,
        -1,
        128,
        Format(8, INT8, BFLOAT16, 0, False, False, True),
        Tile(128, 64),
    ),
    "int8, wide groups of x, split within one": (
        35,
        200,
        1162,
        128,
        256,
        Format(4, INT8, HALF, 1, False, False, True),
        Tile(128, 64, 4),
    ),
    "int8, groups that share no ends, split": (
        21,
        200,
        1162,
        384,
        256,
        Format(8, INT8, HALF, 1, False, True, True),
        Tile(128, 32, 2),
    ),
    "fp8, groups of both": (
        33,
        136,
        712,
        256,
        128,
        Format(5, FP8, BFLOAT16, 1, False, False, True),
        Tile(128, 64, 2),
    ),
    "int8, groups of both, 256 rows": (
        70,
        460,
        712,
        128,
        128,
        Format(4, INT8, HALF, 1, False, True, True),
        Tile(256, 64),
    ),
    "int8, groups of x alone, 256 rows, split": (
        35,
        200,
        650,
        -1,
        128,
        Format(4, INT8, BFLOAT16, 0, False, False, True),
        Tile(256, 32, 2),
    ),
    "fp8, groups, 256 rows": (70, 264, 712, 128, Format(4, FP8, HALF, 1, False), Tile(256, 64)),
}


@pytest.mark.parametrize("tile", [Tile(128, 64, 4), Tile(256, 32, 2), Tile(128, 32)])
def test_sums_of_integers_are_exact(tile, emulated):
    """Codes times codes, with scales of 1, add up to integers that float32 and y hold exactly."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 4, (130, 700), generator=generator, dtype=torch.uint8)
    x = torch.randint(-1, 2, (21, 700), generator=generator, dtype=torch.int8)
    tiled = tile_weight(
        pack_bits(codes, 2), torch.ones(130, 1), None, in_features=700, bits=2, group_size=-1, kind="i8"
    )
    emulated.multiprocessors = 8
    options = {"bits": 2, "group_size": -1, "x_scale": torch.ones(21), "dtype": HALF}
    y = wgmma.product(x, *tiled, None, tile=tile, **options)
    assert torch.equal(y.double(), x.double() @ (codes.double() - 2).T)


@pytest.mark.parametrize("case", CASES)
def test_emulated_kernel_matches_reference(case, emulated):
    """Ragged in every dimension, several tiles a block, stages that the ring takes several times."""
    *sizes, form, tile = CASES[case]
    emulated.multiprocessors = 20 if tile.split > 1 else 4
    rms, most = errors(*sizes, form=form, tile=tile)
    allowed = TOLERANCE[form.y]
    assert rms < allowed and most < 3 * allowed, (rms, most)


@pytest.mark.parametrize(("group_size", "x_group_size"), [(-1, -1), (128, 128), (-1, 256)])
def test_emulated_operator_with_int8(group_size, x_group_size, emulated):
    """Floats are quantized, the packed weight is tiled, leading dimensions stay."""
    from tensormill.ops.linear_wna8 import reference as definition
    from tensormill.ops.linear_wna8.cuda import linear

    generator = torch.Generator().manual_seed(1)
    weight = pack_bits(torch.randint(0, 16, (136, 200), generator=generator, dtype=torch.uint8), 4)
    x = torch.randn(2, 35, 200, generator=generator).half()
    scale = torch.rand(136, 1 if group_size == -1 else 2, generator=generator)
    arguments = (x, None, weight, scale, None, None, 136, 4, group_size, x_group_size)
    y = linear(*arguments, INT8, HALF, "packed").double()
    expected = definition.linear_wna8(*arguments, INT8, HALF, "packed").double()
    assert y.shape == expected.shape and (y - expected).norm() < 1e-3 * expected.norm()


DECODE = """
#include "dequantize.cuh"
#include "dequantize_bytes.cuh"
struct Arguments { const uint32_t* words; uint32_t* registers; };
KERNEL(decode, 32, 1, Arguments) {
    const int lane = lane_index();
    for (int i = lane; i < 32 * WEIGHT_BITS; i += 32) store_shared(shared_memory() + 4 * i, arguments.words[i]);
    synchronize();
    uint32_t words[WEIGHT_BITS], a[4];
    load_tile<WEIGHT_BITS>(shared_memory(), lane, words);
#pragma unroll
    for (int step = 0; step < 2; step++) {
        dequantize_bytes<WEIGHT_BITS>(words, step, a);
        for (int r = 0; r < 4; r++) arguments.registers[8 * lane + 4 * step + r] = a[r];
    }
}
"""


class DecodeArguments(ctypes.Structure):
    _fields_ = (("words", ctypes.c_void_p), ("registers", ctypes.c_void_p))


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_lie_in_the_fragments(bits, tmp_path):
    source = tmp_path / "decode.cu"
    source.write_text(DECODE)
    folder = Path(wgmma.__file__).parent
    headers = [folder / "dequantize.cuh", folder.parent / "linear_wna8" / "dequantize_bytes.cuh"]
    kernel = emulate(Module(source, {"WEIGHT_BITS": bits}, headers), "decode")
    codes = torch.randint(0, 1 << bits, (16, 64), dtype=torch.uint8)
    words, _, _ = tile_weight(
        pack_bits(codes, bits), torch.ones(16, 1), None, in_features=64, bits=bits, group_size=-1, kind="i8"
    )
    registers = torch.zeros(32, 8, dtype=torch.int32)
    kernel.launch(1, 32, 128 * bits, DecodeArguments(words.data_ptr(), registers.data_ptr()))
    found = registers.view(torch.int8).view(8, 4, 2, 2, 2, 4)  # [g, t, step, column half, row half, byte]
    found = found.permute(4, 0, 2, 3, 1, 5).reshape(16, 64)
    expected = (codes.int() - (1 << (bits - 1))) << (8 - bits)
    assert torch.equal(found.int(), expected)


COMPILED = {
    "16 bits": (Format(4, HALF, HALF, 1, True), Tile(256, 128), "HGMMA.64x128x16.F32"),
    "16 bits, split": (
        Format(3, BFLOAT16, BFLOAT16, 2, True),
        Tile(128, 128, 2),
        "HGMMA.64x128x16.F32.BF16",
    ),
    # Here sums were copied before they were there.
    "8 bits, few sums, split": (Format(8, HALF, HALF, 1, True), Tile(128, 32, 2), "HGMMA.64x32x16.F32"),
    "int8": (Format(6, INT8, HALF, 0, False), Tile(128, 256), "IGMMA.64x256x32.S8.S8"),
    "fp8, groups": (Format(4, FP8, HALF, 1, False), Tile(128, 128), "QGMMA.64x128x32.F32.E4M3.E4M3"),
    "int8, groups, split": (Format(4, INT8, HALF, 1, False), Tile(128, 128, 2), "IGMMA.64x128x32.S8.S8"),
    "int8, groups of x": (
        Format(4, INT8, HALF, 1, False, True, True),
        Tile(128, 128),
        "IGMMA.64x128x32.S8.S8",
    ),
    "8 bits, int8, groups of x, split": (
        Format(8, INT8, HALF, 1, False, False, True),
        Tile(128, 128, 2),
        "IGMMA.64x128x32.S8.S8",
    ),
    "int8, groups of x alone": (
        Format(4, INT8, HALF, 0, False, True, True),
        Tile(128, 64),
        "IGMMA.64x64x32.S8.S8",
    ),
    "int8, groups of x, many rows": (
        Format(4, INT8, HALF, 1, False, True, True),
        Tile(256, 64),
        "IGMMA.64x64x32.S8.S8",
    ),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiles_for_sm_90a(case):
    """Without spills, and with products that run while weights are expanded (in one group after another)."""
    form, tile, instruction = COMPILED[case]
    cubin = compile_or_skip(wgmma.module(form, tile), "sm_90a")
    used = resources(cubin)["linear_wgmma"]
    assert used.registers <= 168 and used.stack == 0
    lines = disassembly(cubin).splitlines()
    products = [line for line in lines if "GMMA." in line]
    assert products and all(instruction in line for line in products)
    assert any("WARPGROUP.DEPBAR.LE gsb0, 0x1" in line for line in lines)


def test_sums_that_are_copied_early_would_be_noticed():
    product = "/*0a*/ HGMMA.64x32x16.F32 R24, R40, gdesc[UR8], R24, gsb0 ;"
    copy, wait = "/*0b*/ IMAD.MOV.U32 R8, RZ, RZ, R39 ;", "/*0c*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
    assert early_uses("\n".join((product, copy, wait))) == [copy]
    assert early_uses("\n".join((product, wait, copy))) == []


def test_tiles_fit_the_product():
    """Few tokens take small tiles, splits leave no block without columns, every tile has a ring of stages."""
    form = Format(4, HALF, HALF, 1, False)
    assert wgmma.choose(form, 4096, 8192, 8192, 132).split == 1
    assert wgmma.choose(form, 20, 8192, 8192, 132).tokens <= 64
    assert wgmma.choose(form, 64, 4096, 14336, 132).split > 1
    for columns in (1, 64, 65, 4096):
        for tokens in (1, 33, 500, 5000):
            tile = wgmma.choose(form, tokens, 256, columns, 132)
            assert tile.split <= -(-columns // 64)
            assert tile.rows * tile.tokens <= 1 << 15
            assert tile.split == 1 or tile.count(tokens, 256) * tile.split <= 132


def test_a_last_turn_that_would_idle_is_split():
    """1024 tokens on 14336 rows are 448 large tiles: three turns of 132, and 52 tiles, which share the GPU."""
    (first, tile), (rest, small) = wgmma.parts(Format(4, HALF, HALF, 1, True), 1024, 14336, 4096, 132)
    assert first + rest == 14336 and tile.count(1024, first) <= 3 * 132
    assert small.count(1024, rest) * small.split > 66
    for rows, columns in ((8192, 8192), (4096, 14336)):
        assert len(wgmma.parts(Format(4, HALF, HALF, 1, True), 1024, rows, columns, 132)) == 1


@pytest.mark.parametrize("x", [HALF, INT8])
def test_two_parts_are_one_product(x, emulated, monkeypatch):
    form = Format(4, x, HALF, 1 if x == HALF else 0, x == HALF)
    chosen = ((256, Tile(128, 64)), (192, Tile(128, 64, 2)))
    monkeypatch.setattr(wgmma, "parts", lambda *sizes: chosen)
    emulated.multiprocessors = 8
    rms, most = errors(70, 448, 328, 128 if x == HALF else -1, form=form, tile=None)
    assert rms < TOLERANCE[HALF] and most < 3 * TOLERANCE[HALF]


def test_few_tokens_fill_the_chip_with_int8():
    """Splits of K where there are few tiles; groups keep to tiles whose sums fit registers."""
    rows_scaled = Format(4, INT8, HALF, 0, False, True)
    grouped = [Format(4, INT8, HALF, 1, False, True, x_groups) for x_groups in (False, True)]
    for form in (rows_scaled, *grouped):
        for rows, columns in ((8192, 8192), (14336, 4096), (4096, 14336), (57344, 8192)):
            for tokens in (1, 16, 64, 256, 4096):
                tile = wgmma.choose(form, tokens, rows, columns, 132)
                assert wgmma.fits(form, tile)
                assert tile.count(tokens, rows) * tile.split >= 64, (rows, tokens, tile)
    assert wgmma.choose(rows_scaled, 1, 4096, 14336, 132).split > 1
    assert wgmma.choose(rows_scaled, 4096, 8192, 8192, 132).split == 1


def test_a_wrong_scale_would_be_noticed(emulated, monkeypatch):
    *sizes, form, tile = CASES["split"]
    right = tile_weight

    def wrong(*arguments, **options):
        weight, scale, zero = right(*arguments, **options)
        scale.view(-1)[70] *= 1.5  # of one row and group
        return weight, scale, zero

    monkeypatch.setattr(f"{__name__}.tile_weight", wrong)
    rms, most = errors(*sizes, form=form, tile=tile)
    assert rms > TOLERANCE[HALF] and most > 3 * TOLERANCE[HALF]


def test_a_wrong_scale_of_activations_would_be_noticed(emulated, monkeypatch):
    *sizes, form, tile = CASES["int8, groups of both"]
    right = wgmma.product

    def wrong(*arguments, x_scale, **options):
        x_scale = x_scale.clone()
        x_scale[7, 2] *= 1.5  # of one token and group
        return right(*arguments, x_scale=x_scale, **options)

    monkeypatch.setattr(wgmma, "product", wrong)
    rms, most = errors(*sizes, form=form, tile=tile)
    assert rms > TOLERANCE[HALF] and most > 3 * TOLERANCE[HALF]


def test_shared_memory_is_enough():
    for tile in (Tile(256, 128), Tile(128, 256), Tile(128, 128, 2), Tile(256, 128, 2)):
        for bits in range(1, 9):
            for x, sets in ((HALF, 2), (INT8, 0)):
                stages, size = wgmma.shared_bytes(Format(bits, x, HALF, sets, True), tile)
                assert stages >= 2 and size <= 232448, (tile, bits, x)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_kernel_matches_reference(case):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    *sizes, form, tile = CASES[case]
    rms, most = errors(*sizes, form=form, tile=tile, device="cuda")
    allowed = TOLERANCE[form.y]
    assert rms < allowed and most < 3 * allowed, (rms, most)

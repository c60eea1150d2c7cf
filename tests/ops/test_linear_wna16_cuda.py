"""The CUDA kernel for few tokens: emulated on the CPU against the reference, and compiled for the GPUs it is for."""

from __future__ import annotations

import pytest
import torch

from emulation.kernels import compile_or_skip, disassembly, emulate, resources
from tensormill.ops import tiles
from tensormill.ops.bit_packing import pack_bits
from tensormill.ops.correctness import deviation
from tensormill.ops.linear_wna16 import cuda, operator, reference


def emulated_linear(
    x,
    weight,
    scale,
    zero,
    bias,
    bits,
    group_size,
    *,
    blocks,
    shared=200 << 10,
    launches=1,
    row_blocks=None,
):
    """y of the emulated kernel on `blocks` multiprocessors with `shared` bytes of shared memory."""
    rows, columns = weight.shape[0], x.shape[1]
    tiled = tiles.tile_weight(weight, scale, zero, in_features=columns, bits=bits, group_size=group_size)
    bias_dtype = None if bias is None else bias.dtype
    plan = cuda.plan(
        x.shape[0],
        rows,
        columns,
        bits,
        group_size,
        x.dtype,
        scale.dtype,
        bias_dtype,
        zero is not None,
        blocks,
        shared,
        row_blocks,
    )
    kernel = emulate(cuda.stream_module(plan.defines), "linear_stream")
    workspace = torch.full((plan.workspace,), -1, dtype=torch.int32)
    x, results = cuda.aligned(x), []
    for _ in range(launches):
        y = torch.full((x.shape[0], rows), float("nan"), dtype=x.dtype)
        arguments = plan.arguments(x, *tiled, bias, y, workspace)
        kernel.launch(plan.grid, plan.block, plan.shared, arguments)
        assert (workspace == -1).all(), "the workspace is not as it was found"
        results.append(y)
    assert all(torch.equal(y.nan_to_num(), results[0].nan_to_num()) for y in results)
    return results[0]


def random_arguments(tokens, rows, columns, bits, group_size, dtype, zeros, bias, scale_dtype=torch.float16):
    groups = 1 if group_size == -1 else -(-columns // group_size)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    scale = ((torch.rand(rows, groups) + 0.5) / (1 << bits)).to(scale_dtype)
    zero = torch.randint(0, 1 << bits, (rows, groups), dtype=torch.uint8) if zeros else None
    x = torch.randn(tokens, columns).to(dtype)
    return x, pack_bits(codes, bits), scale, zero, torch.randn(rows).to(dtype) if bias else None


def assert_right(y, arguments, bits, group_size):
    x, weight, scale, zero, bias = arguments
    wide = None if bias is None else bias.double()
    expected = reference.linear_wna16(
        x.double(), weight, scale.double(), zero, wide, bits, group_size, "packed"
    )
    # Sums are in float32 and the result is rounded once: by half a unit at most, by less in the mean of many numbers.
    once = torch.finfo(x.dtype).eps / 2
    wrong = deviation(y, expected, once * (0.8 if y.numel() > 50 else 1.01))
    assert wrong is None, wrong


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "bits", "group_size", "dtype", "zeros", "bias", "blocks"),
    [
        (1, 256, 512, 4, 128, torch.float16, True, False, 3),
        (3, 300, 520, 4, 128, torch.bfloat16, True, True, 5),
        (8, 576, 384, 4, 64, torch.float16, False, True, 4),
        (13, 300, 520, 3, 32, torch.float16, False, True, 2),
        (9, 64, 1000, 2, 128, torch.bfloat16, True, False, 7),
        (32, 200, 300, 4, 64, torch.float16, True, True, 2),
        (20, 200, 300, 8, -1, torch.bfloat16, True, True, 3),
        (5, 200, 640, 6, 256, torch.bfloat16, True, True, 3),
        (2, 100, 640, 1, 256, torch.float16, True, False, 4),
        (2, 65, 129, 5, 32, torch.float16, True, False, 1),
        (17, 65, 130, 7, 128, torch.float16, False, False, 2),
        (1, 1, 1, 4, -1, torch.float16, False, False, 2),
    ],
)
def test_equals_reference(tokens, rows, columns, bits, group_size, dtype, zeros, bias, blocks):
    arguments = random_arguments(tokens, rows, columns, bits, group_size, dtype, zeros, bias)
    y = emulated_linear(*arguments, bits, group_size, blocks=blocks, launches=2)
    assert_right(y, arguments, bits, group_size)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_scale_types(scale_dtype):
    arguments = random_arguments(3, 128, 256, 4, 32, torch.bfloat16, True, True, scale_dtype)
    arguments = (*arguments[:4], arguments[4].to(scale_dtype))
    assert_right(emulated_linear(*arguments, 4, 32, blocks=2), arguments, 4, 32)


def test_every_split_gives_the_sum_of_the_same_parts():
    """However many blocks share a row of units, and however few stages there are."""
    arguments = random_arguments(4, 512, 896, 4, 128, torch.float16, True, False)
    for blocks in (1, 2, 3, 5, 9, 14, 100):
        assert_right(emulated_linear(*arguments, 4, 128, blocks=blocks), arguments, 4, 128)
    assert_right(emulated_linear(*arguments, 4, 128, blocks=3, shared=60 << 10), arguments, 4, 128)


@pytest.mark.parametrize("row_blocks", [2, 4])
@pytest.mark.parametrize(("tokens", "bits", "group_size"), [(3, 3, 384), (9, 4, 64), (20, 4, 32)])
def test_units_of_any_size(row_blocks, tokens, bits, group_size):
    """Units beyond the last row and column, groups that end within units."""
    arguments = random_arguments(tokens, 200, 900, bits, group_size, torch.float16, True, True)
    y = emulated_linear(*arguments, bits, group_size, blocks=3, row_blocks=row_blocks, launches=2)
    assert_right(y, arguments, bits, group_size)


def test_few_blocks_share_rows():
    for rows, row_blocks in ((57344, 4), (14336, 4), (8192, 2), (4096, 2), (100, 2)):
        assert dict(some_plan(1, rows=rows).defines)["ROW_BLOCKS"] == row_blocks


def test_long_runs_have_a_longer_ring():
    few, many = some_plan(1), some_plan(1, rows=57344)
    assert 2 * few.shared < 228 << 10 < 2 * many.shared and many.shared <= 227 << 10
    assert few.grid == many.grid == 132


def test_infinities_and_nans_stay_in_their_token():
    arguments = list(random_arguments(3, 128, 200, 4, 64, torch.float16, True, False))
    arguments[0][1, 7], arguments[0][1, 199] = float("inf"), float("nan")
    y = emulated_linear(*arguments, 4, 64, blocks=2)
    assert y[1].isnan().all()
    arguments[0] = arguments[0][::2].contiguous()
    assert_right(y[::2], arguments, 4, 64)


def test_x_is_copied_only_where_it_must_be():
    x = torch.randn(4, 256).half()
    assert cuda.aligned(x) is x
    assert cuda.aligned(x[:, :200]).data_ptr() == x.data_ptr()
    assert cuda._whole(x) is x and cuda._whole(x.T).is_contiguous()
    assert cuda._whole(x.view(-1)[3:]).data_ptr() % 16 == 0
    for odd in (x[:, 1:], x[:, :100].contiguous()[:, :99].contiguous(), x.T.contiguous().T, x[:, ::2]):
        copied = cuda.aligned(odd)
        assert torch.equal(copied, odd) and copied.stride(0) % 8 == 0 and copied.stride(1) == 1


def some_plan(tokens, bits=4, dtype=torch.float16, rows=8192, row_blocks=None):
    return cuda.plan(
        tokens, rows, 8192, bits, 128, dtype, torch.float16, None, True, 132, 227 << 10, row_blocks
    )


def test_a_tile_that_is_left_out_would_be_noticed():
    arguments = random_arguments(4, 256, 512, 4, 128, torch.float16, True, False)
    y = emulated_linear(*arguments, 4, 128, blocks=3)
    without = arguments[0].clone()
    without[:, 64:80] = 0
    with pytest.raises(AssertionError):
        assert_right(y, (without, *arguments[1:]), 4, 128)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100a"])
def test_compiles_without_spills(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORMILL_CACHE", str(tmp_path))
    for row_blocks in (2, 4):
        for tokens, bits, dtype in ((16, 3, torch.bfloat16), (8, 4, torch.float16), (32, 8, torch.float16)):
            if architecture == "sm_80" and tokens == 32:
                continue  # never taken there
            module = cuda.stream_module(some_plan(tokens, bits, dtype, row_blocks=row_blocks).defines)
            code = compile_or_skip(module, architecture)
            assert resources(code)["linear_stream"].stack == 0, (tokens, bits, row_blocks)
    instructions = disassembly(code)
    assert "HMMA.16816.F32" in instructions
    assert ("UBLKCP" in instructions) == (architecture != "sm_80")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnGPU:
    def weights(self, count, rows, columns):
        found = []
        for _ in range(count):
            arguments = random_arguments(9, rows, columns, 4, 128, torch.float16, True, False)
            x, weight, scale, zero, _ = (None if a is None else a.cuda() for a in arguments)
            tiled = tiles.tile_weight(weight, scale, zero, in_features=columns, bits=4, group_size=128)
            found.append((x, *tiled, None, 4, 128, "tiled"))
        torch.cuda.synchronize()
        return found

    def test_graphs_replay(self):
        """Kernels that overlap, in a graph with a workspace of its own, beside launches outside it."""
        sets = self.weights(3, 4096, 14336)
        expected = [cuda.linear(*s) for s in sets]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [[cuda.linear(*s) for s in sets] for _ in range(5)]
        for _ in range(5):
            for y in (y for part in results for y in part):
                y.fill_(float("nan"))
            graph.replay()
            outside = [cuda.linear(*s) for s in sets]
            assert all(torch.equal(y, e) for y, e in zip(outside, expected, strict=True))
            assert all(torch.equal(y, e) for part in results for y, e in zip(part, expected, strict=True))

    def test_streams_do_not_share_sums(self):
        sets = self.weights(2, 1024, 8192)
        expected = [cuda.linear(*s) for s in sets]
        streams = [torch.cuda.Stream() for _ in sets]
        torch.cuda.synchronize()
        results = [[], []]
        for _ in range(50):
            for stream, arguments, ys in zip(streams, sets, results, strict=True):
                with torch.cuda.stream(stream):
                    ys.append(cuda.linear(*arguments))
        torch.cuda.synchronize()
        for ys, e in zip(results, expected, strict=True):
            assert all(torch.equal(y, e) for y in ys)

    def test_is_what_dispatch_takes(self):
        (arguments,) = self.weights(1, 256, 512)
        assert operator.select(*arguments).name == "cuda"

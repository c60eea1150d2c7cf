"""What the battery does not cover: module, errors, planted errors, instruction sets, compiled GPU code."""

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.errors import InvalidArgument
from tensormill.operator import use_implementation
from tensormill.ops import OPERATORS, linear_wna16
from tensormill.ops.bit_packing import pack_bits, unpack_bits
from tensormill.ops.correctness import deviation, upcast
from tensormill.ops.dequantize_wna16 import dequantize_wna16, num_groups
from tensormill.ops.linear_wna16.module import LinearWNA16
from tensormill.ops.linear_wna16.reference import linear_wna16 as reference

OPERATOR = OPERATORS["linear_wna16"]
INSTRUCTION_SETS = ["portable", "avx2", "avx512", "vbmi", "vnni", "amx"]  # each has those before it
DEQUANTIZE = OPERATORS["dequantize_wna16"]
native = pytest.mark.skipif(
    OPERATOR.find("cpu").missing() is not None, reason="the compiled CPU kernels are not installed"
)


def make(tokens=3, rows=24, columns=200, bits=4, group_size=64, dtype="float32", seed=0, **more):
    shape = {"tokens": tokens, "out_features": rows, "in_features": columns, "bits": bits, "dtype": dtype}
    shape |= {"group_size": group_size, **more}
    return shape, OPERATOR.inputs(shape, torch.device("cpu"), torch.Generator().manual_seed(seed))


def check(shape, arguments, result):
    expected = OPERATOR.reference(*upcast(arguments))
    return deviation(result, expected, OPERATOR.tolerance(arguments[0].dtype, shape))


def layer_of(rows=12, columns=100, bits=4, group_size=32, symmetric=False, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    groups = num_groups(columns, group_size)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, groups, generator=generator).to(dtype)
    zero = torch.randint(0, 1 << bits, (rows, groups), generator=generator, dtype=torch.uint8)
    zero = None if symmetric else zero
    bias = torch.randn(rows, generator=generator).to(dtype) if bias else None
    return codes, LinearWNA16.from_codes(codes, scale, zero, bits=bits, group_size=group_size, bias=bias)


# ---------------------------------------------------------------- values


def test_definition_on_codes_written_out():
    """(code - zero) * scale, group by group, with a ragged last group."""
    codes = torch.arange(10, dtype=torch.uint8).reshape(1, 10)
    scale, zero = torch.tensor([[2.0, 0.5, 1.0]]), torch.tensor([[1, 4, 0]], dtype=torch.uint8)
    dense = dequantize_wna16(pack_bits(codes, 4), scale, zero, in_features=10, bits=4, group_size=4)
    assert dense.tolist() == [[-2, 0, 2, 4, 0, 0.5, 1, 1.5, 8, 9]]
    y = linear_wna16(torch.eye(10), pack_bits(codes, 4), scale, zero, bits=4, group_size=4)
    assert torch.equal(y.flatten(), dense.flatten())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_implementation_agrees_with_the_reference(data):
    bits = data.draw(st.integers(1, 8))
    columns = data.draw(st.integers(1, 400))
    shape, arguments = make(
        tokens=data.draw(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 16, 17])),
        rows=data.draw(st.integers(1, 19)),
        columns=columns,
        bits=bits,
        group_size=data.draw(st.sampled_from([-1, 1, 7, 8, 16, 24, 32, 64, 128, 136, columns])),
        dtype=data.draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        symmetric=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
        scale_dtype=data.draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        seed=data.draw(st.integers(0, 1000)),
    )
    # Relative to what is summed, since a sum of few products may cancel to exactly 0.
    x, _, scale = upcast(arguments)[:3]
    group = torch.arange(columns) // (columns if shape["group_size"] == -1 else shape["group_size"])
    summed = x.abs() @ (scale[:, group] * (1 << bits)).T + 1
    error = (OPERATOR(*arguments).double() - OPERATOR.reference(*upcast(arguments))).abs()
    assert bool((error <= OPERATOR.tolerance(arguments[0].dtype, shape) * summed).all())


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 16, 17, 64, 65, 255, 256, 1000])
def test_token_counts_and_leading_dimensions(tokens):
    shape, arguments = make(tokens=tokens, rows=20, columns=192, dtype="bfloat16")
    result = OPERATOR(*arguments)
    assert check(shape, arguments, result) is None
    spread = arguments[0].reshape(tokens, 1, 1, 192).transpose(0, 1)
    assert torch.equal(OPERATOR(spread, *arguments[1:]), result.reshape(tokens, 1, 1, 20).transpose(0, 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("columns", [32, 96, 128, 384])
def test_one_and_three_groups(bits, columns):
    for group_size in (columns, columns // 3 if columns % 3 == 0 else 32):
        shape, arguments = make(tokens=2, columns=columns, bits=bits, group_size=group_size)
        assert check(shape, arguments, OPERATOR(*arguments)) is None


@native
@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_any_number_of_threads(threads, tokens):
    """Rows split evenly, unevenly, and more threads than there are rows to give each of them some."""
    for rows in (3, 130, 1111):
        shape, arguments = make(tokens=tokens, rows=rows, columns=260)
        with use_implementation(linear_wna16="cpu"):
            result = OPERATOR(*arguments)
        assert check(shape, arguments, result) is None


@native
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_dequantization_is_exact(bits, dtype):
    for group_size, columns, symmetric in (
        (32, 100, False),
        (-1, 333, True),
        (7, 50, False),
        (128, 1000, False),
    ):
        _, arguments = make(rows=5, columns=columns, bits=bits, group_size=group_size, symmetric=symmetric)
        call = (*arguments[1:4], columns, bits, group_size, "packed", dtype)
        with use_implementation(dequantize_wna16="cpu"):
            assert torch.equal(DEQUANTIZE(*call), DEQUANTIZE.reference(*call))


def run_with(isa, code):
    environment = {**os.environ, "TENSORMILL_CPU_ISA": isa}
    environment.pop("TRITON_INTERPRET", None)
    code = textwrap.dedent(code)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "done", f"{run.returncode} {run.stderr}"


@native
@pytest.mark.parametrize("isa", ["portable", "avx2", "vbmi", "vnni"])
def test_other_instruction_sets(isa):
    """The paths for other machines; the variable is read once, so they run in a process of their own."""
    code = """
        import torch
        from tensormill.ops import OPERATORS
        from tensormill.ops.correctness import deviation, upcast
        from tensormill.ops.linear_wna16 import _cpu
        assert _cpu.instruction_set() in {allowed}
        operator, dequantize = OPERATORS["linear_wna16"], OPERATORS["dequantize_wna16"]
        for sample in operator.samples:
            if sample.large or sample.benchmark:
                continue
            generator = torch.Generator().manual_seed(0)
            arguments = operator.inputs(sample.shape, torch.device("cpu"), generator)
            result = operator.find("cpu").function(*arguments)
            expected = operator.reference(*upcast(arguments))
            tolerance = operator.tolerance(arguments[0].dtype, sample.shape)
            assert deviation(result, expected, tolerance) is None, sample.name
        for sample in dequantize.samples:
            if not sample.large:
                arguments = dequantize.inputs(sample.shape, torch.device("cpu"), generator)
                result = dequantize.find("cpu").function(*arguments)
                assert torch.equal(result, dequantize.reference(*arguments)), sample.name
        print("done")
    """
    run_with(isa, code.format(allowed=INSTRUCTION_SETS[: INSTRUCTION_SETS.index(isa) + 1]))


@native
@pytest.mark.parametrize("isa", ["portable", "avx2", "vbmi", "vnni"])
def test_ragged_shapes_of_other_instruction_sets(isa):
    """All widths with tails of every kind, the packed weight right before memory that must not be read."""
    code = """
        import ctypes, itertools, mmap
        import torch
        from tensormill.ops import OPERATORS
        from tensormill.ops.correctness import upcast

        operator, dequantize = OPERATORS["linear_wna16"], OPERATORS["dequantize_wna16"]
        libc, page = ctypes.CDLL(None), mmap.PAGESIZE
        memory = mmap.mmap(-1, 65 * page)
        end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + 64 * page
        assert libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0

        def fenced(tensor):
            fence = (ctypes.c_char * tensor.nbytes).from_address(end - tensor.nbytes)
            return torch.frombuffer(fence, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)

        dtypes = ["float32", "bfloat16", "float16"]
        cases = itertools.product(range(1, 9), [8, 24, 32, 64, 128, -1], [1, 20, 64, 129, 333])
        for number, (bits, group_size, columns) in enumerate(cases):
            shape = dict(tokens=number % 11, out_features=1 + number % 4, in_features=columns)
            shape |= dict(bits=bits, group_size=group_size, dtype=dtypes[number % 3])
            shape |= dict(symmetric=number % 5 < 2, bias=number % 7 < 3)
            generator = torch.Generator().manual_seed(number)
            arguments = list(operator.inputs(shape, torch.device("cpu"), generator))
            arguments[1] = fenced(arguments[1])
            result = operator.find("cpu").function(*arguments)
            expected = operator.reference(*upcast(arguments))
            x, _, scale = upcast(arguments)[:3]
            group = torch.arange(columns) // (columns if group_size == -1 else group_size)
            summed = x.abs() @ (scale[:, group] * (1 << bits)).T + 1
            tolerance = operator.tolerance(arguments[0].dtype, shape)
            assert bool(((result - expected).abs() <= tolerance * summed).all()), shape
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                call = (*arguments[1:4], columns, bits, group_size, "packed", dtype)
                dense = dequantize.find("cpu").function(*call)
                assert torch.equal(dense, dequantize.reference(*call)), (shape, dtype)
        print("done")
    """
    run_with(isa, code)


@native
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_activations_of_any_size(bits, dtype, group_size):
    """Largest codes and activations (sums at their largest), one that dwarfs the others, tiny ones, and none."""
    shape, arguments = make(tokens=5, columns=1000, bits=bits, group_size=group_size, dtype=dtype)
    x, weight, scale, zero, *rest = arguments
    x = x.clone()
    wide = dtype == "bfloat16"
    x[0] = 1e30 if wide else 1.99
    x[1, 77] = 2.0**20 if wide else 2.0**6
    x[2] *= 1e-29 if wide else 2.0**-9
    x[3] = 0
    weight = torch.full_like(weight, -1)
    zero = None if zero is None else torch.zeros_like(zero)
    arguments = (x, weight, scale, zero, *rest)
    for token in range(len(x)):  # each against its own size
        one = (x[token : token + 1], *arguments[1:])
        with use_implementation(linear_wna16="cpu"):
            assert check(shape, one, OPERATOR(*one)) is None, token
    with use_implementation(linear_wna16="cpu"):
        together = OPERATOR(*arguments)
    for token in range(len(x)):  # whatever the others are
        one = (x[token : token + 1], *arguments[1:])
        assert check(shape, one, together[token : token + 1]) is None, token
    x[4, 5], x[2, 9] = torch.inf, torch.nan
    with use_implementation(linear_wna16="cpu"):
        invalid = OPERATOR(*arguments)
    assert not torch.isfinite(invalid[4]).any() and torch.isnan(invalid[2]).all()
    assert torch.isfinite(invalid[[0, 1, 3]]).all()


@native
def test_invalid_scales_stay_invalid():
    _, arguments = make(rows=3, columns=64, group_size=32)
    arguments[2][0, 0], arguments[2][1, 1] = float("nan"), float("inf")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        call = (*arguments[1:4], 64, 4, 32, "packed", dtype)
        with use_implementation(dequantize_wna16="cpu"):
            dense = DEQUANTIZE(*call)
        torch.testing.assert_close(dense, DEQUANTIZE.reference(*call), rtol=0, atol=0, equal_nan=True)


@native
def test_tile_registers_are_left_usable_for_others():
    """AMX has one tile configuration per thread: neither torch's products nor ours may disturb the other."""
    shape, arguments = make(tokens=40, rows=64, columns=256, dtype="bfloat16")
    a, b = torch.randn(96, 256).bfloat16(), torch.randn(256, 80).bfloat16()
    before, first = a @ b, OPERATOR(*arguments)
    for _ in range(3):
        assert torch.equal(OPERATOR(*arguments), first)
        assert torch.equal(a @ b, before)
    assert check(shape, arguments, first) is None


# ---------------------------------------------------------------- planted errors


def planted(name, arguments):
    """The reference's result with one mistake that a kernel could make."""
    x, weight, scale, zero, bias, bits, group_size, layout = arguments
    columns = x.shape[-1]
    x, scale = x.double(), scale.double()
    if name == "dropped tail":
        x = x.clone()
        x[..., -(columns % 8 or 8) :] = 0
    elif name == "zero point off by one in one row":
        zero = zero.clone()
        zero[0] ^= 1
    elif name == "group boundary off by one":
        codes = unpack_bits(weight, bits, columns)
        group = ((torch.arange(columns) + 1) // group_size).clamp(max=scale.shape[1] - 1)
        return x @ ((codes.double() - zero.double()[:, group]) * scale[:, group]).T
    elif name == "scales of neighbouring rows swapped":
        scale = scale.clone()
        scale[[0, 1]] = scale[[1, 0]]
    elif name == "symmetric zero point assumed":
        zero = None
    elif name == "two codes swapped":
        codes = unpack_bits(weight, bits, columns).clone()
        codes[:, [0, 1]] = codes[:, [1, 0]]
        weight = pack_bits(codes, bits)
    return reference(x, weight, scale, zero, bias, bits, group_size, layout)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    [
        "dropped tail",
        "zero point off by one in one row",
        "group boundary off by one",
        "scales of neighbouring rows swapped",
        "symmetric zero point assumed",
        "two codes swapped",
    ],
)
def test_the_tolerance_catches_planted_errors(name, dtype):
    shape, arguments = make(tokens=4, rows=24, columns=1000, group_size=64, dtype=dtype)
    assert check(shape, arguments, OPERATOR(*arguments)) is None
    assert check(shape, arguments, planted(name, arguments).to(arguments[0].dtype)) is not None


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_gradients_of_x_and_bias(implementation):
    if OPERATOR.find(implementation).missing() is not None:
        pytest.skip("not built")
    _, arguments = make(tokens=5, rows=7, columns=40, group_size=16, bias=True)
    x, weight, scale, zero, bias, *options = arguments
    dense = reference(torch.eye(40, dtype=torch.float64), weight, scale.double(), zero, None, *options).T
    x, bias = x.requires_grad_(), bias.requires_grad_()
    with use_implementation(linear_wna16=implementation):
        y = OPERATOR(x, weight, scale, zero, bias, *options)
        cotangent = torch.randn_like(y)
        y.backward(cotangent)
    for actual, expected in ((x.grad, cotangent.double() @ dense), (bias.grad, cotangent.double().sum(0))):
        assert deviation(actual, expected, 1e-5) is None
    assert not scale.requires_grad


def test_gradcheck_in_float64():
    _, (x, weight, scale, zero, bias, *options) = make(tokens=3, rows=4, columns=20, group_size=8, bias=True)
    x, bias = x.double().requires_grad_(), bias.double().requires_grad_()
    function = lambda x, bias: OPERATOR(x, weight, scale, zero, bias, *options)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, bias))
    assert torch.autograd.gradgradcheck(function, (x, bias))


def test_float16_gradient_survives_weights_that_float16_can_not_hold():
    codes = torch.full((2, 16), 15, dtype=torch.uint8)
    layer = LinearWNA16.from_codes(codes, torch.full((2, 1), 6e4).half(), None, bits=4, group_size=-1)
    x = torch.full((1, 16), 1e-3, dtype=torch.float16, requires_grad=True)
    layer(x).backward(torch.full((1, 2), 1e-3, dtype=torch.float16))
    assert torch.isfinite(x.grad).all()


# ---------------------------------------------------------------- the module


def test_module_computes_what_its_dense_weight_computes():
    codes, layer = layer_of()
    assert torch.equal(layer.codes(), codes)
    x = torch.randn(2, 3, 100)
    expected = torch.nn.functional.linear(x, layer.dequantize(torch.float32), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert layer.dequantize().dtype == layer.weight_scale.dtype
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_round_trip(symmetric, bias):
    _, layer = layer_of(symmetric=symmetric, bias=bias, bits=3)
    state = layer.state_dict()
    names = ["weight_packed", "weight_scale"] + ["weight_zero_point"] * (not symmetric) + ["bias"] * bias
    assert sorted(state) == sorted(names)
    other = LinearWNA16(100, 12, bits=3, group_size=32, symmetric=symmetric, bias=bias)
    other.load_state_dict(state, strict=True)
    x = torch.randn(4, 100)
    assert torch.equal(other(x), layer(x))


def test_copies_pickles_and_moves():
    _, layer = layer_of()
    x = torch.randn(2, 100)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.weight_packed.dtype == torch.int32 and half.weight_zero_point.dtype == torch.uint8
    assert half.weight_scale.dtype == half.bias.dtype == torch.bfloat16
    assert half(x.bfloat16()).dtype == torch.bfloat16
    meta = copy.deepcopy(layer).to("meta")
    assert meta(x.to("meta")).shape == (2, 12)
    assert "bits=4" in repr(layer) and "group_size=32" in repr(layer)


def test_meta_construction_allocates_nothing_and_loads_by_assignment():
    _, layer = layer_of()
    empty = LinearWNA16(100, 12, bits=4, group_size=32, device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 100)
    assert torch.equal(empty(x), layer(x))


def test_autocast_casts_like_linear():
    _, layer = layer_of()
    x = torch.randn(2, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert torch.equal(layer(x), layer(x.bfloat16()))
    assert layer(x).dtype == torch.float32


def test_compiles_with_gradients():
    _, layer = layer_of()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 100, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_exports():
    _, layer = layer_of()
    x = torch.randn(3, 100)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 90)}, "13 words a row, expected 12"),
        ({"x": torch.zeros(2, 100, dtype=torch.int32)}, "expected floats"),
        ({"weight": torch.zeros(12, 13)}, "expected packed int32"),
        ({"scale": torch.ones(12, 5)}, r"expected a float tensor of shape \(12, 4\)"),
        ({"zero_point": torch.zeros(12, 4)}, "expected torch.uint8"),
        ({"bias": torch.zeros(11)}, r"expected floats \(12,\)"),
        ({"bits": 9}, "from 1 to 8"),
        ({"bits": 0}, "from 1 to 8"),
        ({"group_size": 0}, "positive integer"),
        ({"layout": "marlin"}, "expected one of"),
        ({"x": torch.zeros(2, 100, device="meta")}, "expected one device"),
        ({"scale": torch.ones(12, 4, device="meta")}, "expected one device"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(change, message):
    given = {
        "x": torch.zeros(2, 100),
        "weight": torch.zeros(12, 13, dtype=torch.int32),
        "scale": torch.ones(12, 4),
        "zero_point": torch.zeros(12, 4, dtype=torch.uint8),
        "bias": torch.zeros(12),
        "bits": 4,
        "group_size": 32,
    }
    linear_wna16(**given)
    with pytest.raises(InvalidArgument, match=message) as caught:
        linear_wna16(**{**given, **change})
    assert "\n" not in str(caught.value)


def test_zero_point_beyond_the_codes_is_refused():
    with pytest.raises(InvalidArgument, match="expected one below 8"):
        LinearWNA16.from_codes(
            torch.zeros(2, 8, dtype=torch.uint8),
            torch.ones(2, 1),
            torch.tensor([[8], [0]], dtype=torch.uint8),
            bits=3,
            group_size=-1,
        )


# ---------------------------------------------------------------- peers and GPU code


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_cpu_peers_compute_the_same_layer(bits, symmetric):
    _, arguments = make(2, 64, 256, bits, 64, "bfloat16", symmetric=symmetric, bias=True)
    expected = OPERATOR.reference(*upcast(arguments))
    ran = 0
    for peer in OPERATOR.peers:
        if "cpu" in peer.devices and peer.missing() is None and peer.supports(*arguments):
            assert deviation(peer.make(*arguments)(), expected, peer.tolerance) is None, peer.name
            ran += 1
    assert ran


COMPILE = """
    import importlib, json, os, re, subprocess, tempfile
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernels = importlib.import_module("tensormill.ops.linear_wna16.triton")
    nvdisasm = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "nvdisasm")
    wide = ("row_words", "groups", "group_size", "one", "N", "K")

    def facts(kernel, pointers, constants, num_warps, num_stages):
        names = kernel.arg_names
        signature = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in names}
        aligned = [i for i, n in enumerate(names) if n in pointers or n in wide]
        attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        found = {"shared": result.metadata.shared}
        if os.path.exists(nvdisasm):
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(result.asm["cubin"])
                file.flush()
                assembly = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True).stdout
            found["spills"] = len(re.findall("STL|LDL", assembly))
            found["wide loads"] = len(re.findall("LDG[^ ]*[.]128", assembly))
            # the rows of a program do not wait for each other
            before = assembly.partition("BAR.SYNC")[0]
            found["wide loads first"] = len(re.findall("LDG[^ ]*[.]128", before))
            found["registers"] = max(map(int, re.findall("[^A-Z]R([0-9]+)", assembly)), default=-1) + 1
            found["wgmma"] = assembly.count("HGMMA")
        return found

    pointers = {n: "*fp16" for n in ("x", "scale", "bias", "y")} | {"weight": "*i32", "zero_point": "*u8"}
    found = {}
    for bits, tokens in ((4, 1), (4, 2), (3, 1), (2, 2), (8, 1)):
        codes, words = kernels.unit(bits, 128)
        c = kernels.gemv_config(tokens, 8192, 8192, bits)
        constants = dict(BITS=bits, UNIT=codes, WORDS=words, TOKENS=tokens, BLOCK_N=c.block_n, STEPS=c.steps,
                         AHEAD=c.ahead, BLOCK_U=c.block_k // codes, CENTERED=False, HAS_ZERO=True,
                         HAS_BIAS=False, SPLIT=False)
        found[f"gemv{bits}-{tokens}"] = facts(kernels._gemv_kernel, pointers, constants, c.num_warps, 3)
    codes, words = kernels.unit(4, 128)
    for tokens in (16, 64, 256):
        c = kernels.gemm_config(tokens, 8192, 8192, 4)
        constants = dict(BITS=4, UNIT=codes, WORDS=words, BLOCK_M=c.block_m, BLOCK_N=c.block_n,
                         BLOCK_U=c.block_k // codes, HAS_ZERO=True, HAS_BIAS=True, SPLIT=False)
        found[f"gemm{tokens}"] = facts(kernels._gemm_kernel, pointers, constants, c.num_warps, c.stages)
    constants = dict(BITS=3, HAS_ZERO=True, BLOCK_N=4, BLOCK_K=512)
    pointers = {"weight": "*i32", "scale": "*fp16", "zero_point": "*u8", "out": "*bf16"}
    found["dequantize3"] = facts(kernels._dequantize_kernel, pointers, constants, 4, 3)
    print(json.dumps(found))
"""


def test_gpu_kernels_compile_for_hopper():
    """Without a GPU: they compile, load 16 bytes at a time, use the tensor cores, and do not spill."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILE)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for name, facts in json.loads(run.stdout).items():
        assert facts["shared"] <= 227 * 1024, name
        assert not facts.get("spills"), name
        if name.startswith(("gemv4", "gemm")):
            assert facts.get("wide loads") != 0, name
        if name.startswith("gemv4"):
            assert facts.get("wide loads first") == facts.get("wide loads"), name
            assert facts.get("registers", 0) <= 128, name  # two programs a multiprocessor
        if name.startswith("gemm"):
            assert facts.get("wgmma") != 0, name

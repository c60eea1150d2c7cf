"""What is special to the errors of clipped groups; the battery does the comparison with the reference."""

from __future__ import annotations

import pytest
import torch

from emulation.triton_kernels import hopper_reports, needs_compiler
from tensormill.errors import InvalidArgument
from tensormill.operator import interpreting
from tensormill.ops import OPERATORS, clipping_error, use_implementation
from tensormill.ops.correctness import deviation, upcast
from tensormill.ops.quantization import QuantSpec, fake_quantize_groups, split_groups

operator = OPERATORS["clipping_error"]
needs_kernel = pytest.mark.skipif(
    not interpreting() and not torch.cuda.is_available(), reason="needs a CUDA device, or the interpreter"
)
DEVICE = "cpu" if interpreting() or not torch.cuda.is_available() else "cuda"


def random_inputs(rows, columns, spec, ratios=28, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size, groups = spec.columns_per_group(columns), spec.num_groups(columns)
    x = torch.randn(groups, 300, size, generator=generator)
    x = x * torch.randn(groups, 1, size, generator=generator).exp() + x[..., :1]
    x[-1, :, columns - (groups - 1) * size :] = 0
    weight = torch.randn(rows, columns, generator=generator)
    tensors = weight, x.transpose(1, 2) @ x / 300, 1 - torch.arange(ratios) / 40
    return tuple(tensor.to(DEVICE) for tensor in tensors)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "group_size"), [(96, 32), (50, 16), (40, -1), (30, 24)])
def test_is_the_output_error_of_each_group_alone(columns, group_size, symmetric):
    spec = QuantSpec(3, group_size, symmetric, scale_dtype=torch.float16, tail="smaller")
    weight, gram, ratios = random_inputs(3, columns, spec, 4)
    errors = clipping_error(weight, gram, ratios, spec)
    size = spec.columns_per_group(columns)
    for n, row in enumerate(weight):
        for g, group in enumerate(row.split(size)):
            for c, ratio in enumerate(ratios):
                limit = group.abs().max() * ratio
                d = (fake_quantize_groups(group.clamp(-limit, limit)[None], spec)[0] - group).double()
                expected = d @ gram[g, : len(d), : len(d)].double() @ d
                assert errors[c, n, g].item() == pytest.approx(expected.item(), rel=1e-5)


def test_refusals_say_what_to_do():
    spec = QuantSpec(bits=4, group_size=32)
    weight, gram, ratios = torch.zeros(2, 64), torch.zeros(2, 32, 32), torch.ones(3)
    with pytest.raises(InvalidArgument, match=r"torch\.float16.*expected torch\.float32 \(N, K\)"):
        clipping_error(weight.half(), gram, ratios, spec)
    with pytest.raises(InvalidArgument, match=r"gram .*\(1, 32, 32\), expected .* \(2, 32, 32\)"):
        clipping_error(weight, gram[:1], ratios, spec)
    with pytest.raises(InvalidArgument, match=r"ratios .*float64.*expected torch\.float32 \(C,\)"):
        clipping_error(weight, gram, ratios.double(), spec)
    with pytest.raises(InvalidArgument, match="ratios on meta and weight on cpu"):
        clipping_error(weight, gram, ratios.to("meta"), spec)
    with pytest.raises(InvalidArgument, match="group_size=48 for weight with 64 input features"):
        clipping_error(weight, gram, ratios, QuantSpec(bits=4, group_size=48))


def test_what_the_kernel_refuses():
    supports = operator.find("triton").supports
    for size in (8, 24, 256):
        weight = torch.zeros(1, 2 * size)
        assert not supports(weight, torch.zeros(2, size, size), torch.ones(1), *QuantSpec(4, size).grid)
    weight, gram = torch.zeros(1, 64), torch.zeros(1, 64, 64)
    assert supports(weight, gram, torch.ones(1), *QuantSpec(4, -1).grid)
    assert not supports(weight, gram, torch.ones(1), *QuantSpec(4, -1, scale_dtype=torch.float8_e5m2).grid)
    assert not supports(weight, gram.double(), torch.ones(1), *QuantSpec(4, -1).grid)


def planted(name, errors, arguments):
    """Errors with a mistake that a kernel could make."""
    weight, gram, ratios, *grid = arguments
    if name == "a group's neighbour":
        return operator.reference(weight, gram.roll(1, 0), ratios, *grid)
    if name == "ratios off by one":
        return errors.roll(1, 0)
    if name == "products of 10 bits":
        # As the tensor cores round one TF32 product.
        pattern = (gram.view(torch.int32) + 0x1000) & -0x2000
        return operator.reference(weight, pattern.view(torch.float32), ratios, *grid)
    if name == "a row missed":
        errors = errors.clone()
        errors[:, -1] = 0
        return errors
    raise AssertionError(name)


@pytest.mark.parametrize(
    "mistake", ["a group's neighbour", "ratios off by one", "products of 10 bits", "a row missed"]
)
def test_tolerance_catches_planted_errors(mistake):
    spec = QuantSpec(bits=4, group_size=32)
    arguments = *random_inputs(40, 128, spec, 6), *spec.grid
    errors, expected = operator.reference(*arguments), operator.reference(*upcast(arguments))
    tolerance = operator.tolerance(torch.float32, {})
    assert deviation(errors, expected, tolerance) is None
    assert deviation(planted(mistake, errors, arguments), expected, tolerance) is not None


def test_two_products_of_10_bits_reach_the_tolerance():
    """What tensor cores make of the kernel's products, which the interpreter computes in float32."""
    spec = QuantSpec(bits=4, group_size=128)
    weight, gram, ratios = random_inputs(40, 512, spec, 1)

    def cut(x):
        return (x.view(torch.int32) & -8192).view(torch.float32)

    groups = split_groups(weight, spec).transpose(0, 1)
    d = fake_quantize_groups(groups, spec) - groups  # [G, N, group]
    fine = cut(gram - cut(gram))
    errors = ((cut(d) @ cut(gram)) * (2 * d - cut(d)) + (cut(d) @ fine) * cut(d)).sum(-1).T[None]
    expected = operator.reference(*upcast((weight, gram, ratios)), *spec.grid)
    assert deviation(errors, expected, operator.tolerance(torch.float32, {}) / 4) is None


@needs_kernel
@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
def test_triton_choices_are_as_good_as_any(group_size):
    """Two ratios of nearly the same error may change places; what is chosen costs no more than the least."""
    spec = QuantSpec(3, group_size, scale_dtype=torch.float16, tail="smaller")
    arguments = random_inputs(64, 200, spec, 9)
    with use_implementation(clipping_error="triton"):
        errors = clipping_error(*arguments, spec)
    exact = operator.reference(*upcast(arguments), *spec.grid)
    least, ordered = exact.amin(dim=0), exact.sort(dim=0).values
    chosen = errors.argmin(dim=0)
    assert (exact.gather(0, chosen[None])[0] <= least * (1 + 1e-5)).all()
    clear = ordered[1] > ordered[0] * (1 + 1e-4)
    assert clear.float().mean() > 0.9
    assert torch.equal(chosen[clear], exact.argmin(dim=0)[clear])


@needs_kernel
def test_triton_extremes_of_a_clipped_group_are_its_clipped_extremes():
    """With an identity for the Gram matrix and codes fine enough, all that remains is what was cut away."""
    spec = QuantSpec(bits=8, group_size=16)
    weight = torch.linspace(-1, 2, 16, device=DEVICE).repeat(3, 2)
    eye = torch.eye(16, device=DEVICE).repeat(2, 1, 1)
    ratios = torch.tensor([1.0, 0.5, 0.25], device=DEVICE)
    with use_implementation(clipping_error="triton"):
        errors = clipping_error(weight, eye, ratios, spec)
    groups = split_groups(weight, spec)
    for error, limit in zip(errors, (2.0, 1.0, 0.5), strict=True):
        cut = (groups - groups.clamp(-limit, limit)).square().sum(-1)
        assert (error - cut).abs().max() < 5e-2


COMPILE = """
from tensormill.ops.quantization import QuantSpec
kernels = import_module("tensormill.ops.clipping_error.triton")
for spec in (QuantSpec(4, 128, scale_dtype=torch.bfloat16), QuantSpec(4, 64, symmetric=True),
             QuantSpec(4, 32, scale_dtype=torch.float16), QuantSpec(4, 16)):
    rows, warps = kernels.geometry(spec.group_size)
    constants = {"ROWS": rows, "GROUP": spec.group_size, "WHOLE": True, **kernels.grid_constants(spec)}
    pointers = {"weight": "*fp32", "gram": "*fp32", "ratios": "*fp32", "result": "*fp32"}
    built = build(kernels._kernel, pointers, constants, even=("K",), num_warps=warps, num_stages=1, enable_fp_fusion=False)
    ptx = built.asm["ptx"]
    print(json.dumps({"size": spec.group_size, "spills": count(built, SPILLS), "shared": built.metadata.shared,
                      "products": bool(re.search(r"mma\\S*\\.tf32", ptx)), "rounded": "div.rn.f32" in ptx}))
"""


@needs_compiler
def test_compiles_for_hopper():
    """Products on the tensor cores, shared memory that fits, at most some scalars spilled."""
    reports = hopper_reports(COMPILE)
    assert [report["size"] for report in reports] == [128, 64, 32, 16]
    for report in reports:
        assert report["products"] and report["rounded"], report
        assert report["shared"] <= 227 << 10, report
        assert (report["spills"] or 0) <= (16 if report["size"] == 128 else 0), report


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a CUDA device")
class TestOnGpu:
    def test_cuda_graph(self):
        spec = QuantSpec(4, 128, scale_dtype=torch.bfloat16)
        arguments = random_inputs(300, 1024, spec)
        with use_implementation(clipping_error="triton"):
            expected = clipping_error(*arguments, spec)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = clipping_error(*arguments, spec)
        graph.replay()
        assert torch.equal(found, expected)

"""What is special to the errors of scaled and rounded weights; the battery does the comparison with the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulation.triton_kernels import hopper_reports, needs_compiler
from tensormill.errors import InvalidArgument
from tensormill.operator import interpreting
from tensormill.ops import OPERATORS, quantization_error, use_implementation
from tensormill.ops.quantization import QuantSpec, fake_quantize_groups

operator = OPERATORS["quantization_error"]
specs = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 1, 7, 16, 32, 48]),
    symmetric=st.booleans(),
    scale_rule=st.sampled_from(["absmax/half_range", "absmax/qmax"]),
    include_zero=st.booleans(),
    scale_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    tail=st.just("smaller"),
)
needs_kernel = pytest.mark.skipif(
    not interpreting() and not torch.cuda.is_available(), reason="needs a CUDA device, or the interpreter"
)
DEVICE = "cpu" if interpreting() or not torch.cuda.is_available() else "cuda"


def assert_same(found, expected):
    """The same bits but for the sign of zeros; NaN where a scale overflows its dtype."""
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)


def random_inputs(rows, columns, candidates, seed, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * spread
    scales = torch.randn(candidates, columns, generator=generator).exp()
    return weight.to(DEVICE), scales.to(DEVICE)


@settings(max_examples=60, deadline=None)
@given(spec=specs, columns=st.sampled_from([1, 13, 32, 63, 100]), seed=st.integers(0, 99))
def test_is_the_rounding_of_each_group_alone(spec, columns, seed):
    weight, scales = random_inputs(3, columns, 2, seed)
    errors = quantization_error(weight, scales, spec)
    size = columns if spec.group_size == -1 else spec.group_size
    for scale, error in zip(scales, errors, strict=True):
        for row, wrong in zip(weight, error, strict=True):
            for w, s, e in zip(row.split(size), scale.split(size), wrong.split(size), strict=True):
                assert torch.equal(e, fake_quantize_groups((w * s)[None], spec)[0] / s - w)


def test_no_error_exceeds_half_a_step():
    weight, scales = random_inputs(5, 256, 3, 1)
    errors = quantization_error(weight, scales, QuantSpec(bits=4, group_size=64))
    scaled = (weight * scales[:, None]).unflatten(-1, (4, 64))
    step = (scaled.amax(-1, keepdim=True).clamp(min=0) - scaled.amin(-1, keepdim=True).clamp(max=0)) / 15
    moved = (errors * scales[:, None]).unflatten(-1, (4, 64)).abs()
    # Half a step by rounding a weight, and half by rounding the zero point where that leaves an end uncovered.
    assert (moved <= step * (1 + 1e-5)).all() and moved.mean() < 0.3 * step.mean()


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_power_of_two_for_all_columns_changes_nothing(symmetric):
    weight, _ = random_inputs(4, 96, 1, 2)
    scales = torch.tensor([1.0, 2.0**-7, 2.0**9], device=DEVICE)[:, None].expand(3, 96)
    errors = quantization_error(weight, scales, QuantSpec(bits=3, group_size=32, symmetric=symmetric))
    assert torch.equal(errors[0], errors[1]) and torch.equal(errors[0], errors[2])


def test_refusals_say_what_to_do():
    weight, scales, spec = torch.zeros(2, 64), torch.ones(3, 64), QuantSpec(bits=4, group_size=32)
    with pytest.raises(InvalidArgument, match=r"torch\.float16.*expected torch\.float32 \(N, K\)"):
        quantization_error(weight.half(), scales, spec)
    with pytest.raises(InvalidArgument, match=r"\(2, 0\), expected torch\.float32 \(N, K\), K > 0"):
        quantization_error(torch.zeros(2, 0), torch.ones(3, 0), spec)
    with pytest.raises(InvalidArgument, match=r"scales .*\(64,\), expected torch\.float32 \(C, 64\)"):
        quantization_error(weight, scales[0], spec)
    with pytest.raises(InvalidArgument, match="scales on meta and weight on cpu"):
        quantization_error(weight, scales.to("meta"), spec)
    with pytest.raises(InvalidArgument, match="group_size=48 for weight with 64 input features"):
        quantization_error(weight, scales, QuantSpec(bits=4, group_size=48))


def test_what_the_kernel_refuses():
    weight, scales = torch.zeros(1, 16385), torch.ones(1, 16385)
    supports = operator.find("triton").supports
    assert not supports(weight, scales, *QuantSpec(bits=4, group_size=-1).grid)
    assert supports(weight[:, 1:], scales[:, 1:], *QuantSpec(bits=4, group_size=-1).grid)
    assert not supports(weight, scales, *QuantSpec(4, 32, scale_dtype=torch.float8_e4m3fn).grid)
    assert not supports(weight.double(), scales, *QuantSpec(bits=4, group_size=32).grid)


@needs_kernel
@settings(max_examples=40, deadline=None)
@given(
    spec=specs,
    columns=st.sampled_from([1, 13, 32, 63, 100]),
    seed=st.integers(0, 999),
    spread=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_triton_equals_the_reference(spec, columns, seed, spread):
    weight, scales = random_inputs(3, columns, 2, seed, spread)
    with use_implementation(quantization_error="triton"):
        found = quantization_error(weight, scales, spec)
    assert_same(found, operator.reference(weight.cpu(), scales.cpu(), *spec.grid))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_rounds_scales_half_to_even(dtype):
    """Weights whose largest, which is twice 1 / (1 + eps) of the scale, lies in the middle between two scales."""
    steps = 1 + torch.arange(32, device=DEVICE) * torch.finfo(dtype).eps / 2
    weight = torch.stack([steps, -steps * 0.6], dim=1)
    spec = QuantSpec(bits=2, group_size=2, symmetric=True, scale_rule="absmax/qmax", scale_dtype=dtype)
    scales = torch.ones(1, 2, device=DEVICE)
    with use_implementation(quantization_error="triton"):
        found = quantization_error(weight, scales, spec)
    assert_same(found, operator.reference(weight.cpu(), scales.cpu(), *spec.grid))
    assert torch.equal(found[0, :, 0], steps.to(dtype).float() - steps)


COMPILE = """
from tensormill.ops.quantization import QuantSpec
kernels = import_module("tensormill.ops.quantization_error.triton")
for columns, spec in (
    (4096, QuantSpec(4, 128, scale_dtype=torch.bfloat16)),
    (4096, QuantSpec(4, 32, symmetric=True, scale_dtype=torch.float16)),
    (4096, QuantSpec(4, -1, symmetric=True)),
    (14336, QuantSpec(8, -1, include_zero=False)),
):
    size = spec.columns_per_group(columns)
    rows, groups, group, _, warps = kernels.geometry(columns, size)
    constants = {"ROWS": rows, "GROUPS": groups, "GROUP": group, "WHOLE": group == size, **kernels.grid_constants(spec)}
    pointers = {"weight": "*fp32", "scales": "*fp32", "result": "*fp32"}
    built = build(kernels._kernel, pointers, constants, even=("K", "plane", "group_size"), num_warps=warps, enable_fp_fusion=False)
    ptx = built.asm["ptx"]
    print(json.dumps({"size": size, "spills": count(built, SPILLS), "wide": bool(re.search(r"st\\.global\\S*\\.v4\\.b32", ptx)),
                      "fused": bool(re.search(r"fma\\.rn\\.f32", ptx)), "rounded": "div.rn.f32" in ptx}))
"""


@needs_compiler
def test_compiles_for_hopper():
    """16-byte stores where groups fill the rows, nothing spilled but by the longest, every operation rounded as in the reference."""
    reports = hopper_reports(COMPILE)
    assert [report["size"] for report in reports] == [128, 32, 4096, 14336]
    for report in reports:
        assert report["rounded"] and not report["fused"], report
        assert report["wide"] or report["size"] == 14336, report
        # A group of 14336 columns has more than the registers of 16 warps.
        assert report["spills"] in (0, None) or report["size"] > 8192, report


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a CUDA device")
class TestOnGpu:
    @pytest.mark.parametrize("group_size", [-1, 24, 32, 128])
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
    def test_every_device_gives_the_same_bits(self, group_size, symmetric, dtype):
        weight, scales = random_inputs(130, 4096, 9, 0)
        spec = QuantSpec(4, group_size, symmetric, scale_dtype=dtype, tail="smaller")
        expected = operator.reference(weight.cpu(), scales.cpu(), *spec.grid)
        for implementation in ("triton", "reference"):
            with use_implementation(quantization_error=implementation):
                assert_same(quantization_error(weight, scales, spec), expected)

    def test_cuda_graph(self):
        weight, scales = random_inputs(64, 4096, 8, 0)
        spec = QuantSpec(4, 128, scale_dtype=torch.bfloat16)
        with use_implementation(quantization_error="triton"):
            expected = quantization_error(weight, scales, spec)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = quantization_error(weight, scales, spec)
        graph.replay()
        assert torch.equal(found, expected)

"""What is special to the quantization of activations; the battery does the comparison with the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulation.triton_kernels import hopper_reports, needs_compiler
from tensormill.errors import InvalidArgument
from tensormill.operator import interpreting
from tensormill.ops import OPERATORS, quantize_activations, use_implementation
from tensormill.ops.quantize_activations.mixed import plan_blocks

operator = OPERATORS["quantize_activations"]


def dequantized(codes, scale, group_size):
    columns = codes.shape[-1]
    size = columns if group_size == -1 else group_size
    return codes.double() * scale.double().repeat_interleave(size, -1)[..., :columns]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(1, 200),
    st.sampled_from([-1, 1, 7, 32, 64, 128]),
    st.integers(2, 8),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.integers(0, 1 << 30),
)
def test_error_is_at_most_half_a_step(rows, columns, group_size, bits, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, columns, generator=generator) * 10 ** (seed % 7 - 3)).to(dtype)
    codes, scale = quantize_activations(x, bits=bits, group_size=group_size)
    size = columns if group_size == -1 else group_size
    step = scale.double().repeat_interleave(size, -1)[:, :columns]
    assert (x.double() - dequantized(codes, scale, group_size)).abs().le(step * (0.5 + 1e-5) + 1e-30).all()
    limit = 2 ** (bits - 1) - 1
    assert codes.abs().max() <= limit
    padded = torch.nn.functional.pad(codes, (0, -columns % size)).unflatten(-1, (-1, size))
    full = torch.nn.functional.pad(x, (0, -columns % size)).unflatten(-1, (-1, size)).abs().amax(-1) > 1e-25
    assert (padded.abs().amax(-1) == limit)[full].all()  # the largest magnitude has the largest code


def test_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    codes, scale = quantize_activations(x)
    assert scale.item() == 1
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


@pytest.mark.parametrize("exponent", [-20, -3, 5, 20])
def test_powers_of_two_change_only_the_scale(exponent):
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    codes, scale = quantize_activations(x, group_size=64)
    scaled_codes, scaled_scale = quantize_activations(x * 2.0**exponent, group_size=64)
    assert torch.equal(codes, scaled_codes)
    assert torch.equal(scale * 2.0**exponent, scaled_scale)


def test_zeros_subnormal_numbers_and_numbers_that_are_none():
    x = torch.randn(5, 256)
    x[0] = 0
    x[1, :] = 1e-42
    x[2, 3] = float("nan")
    x[3, 200] = -float("inf")
    codes, scale = quantize_activations(x, group_size=128)
    assert not codes[0].any() and scale[0].isfinite().all() and (scale[0] > 0).all()
    assert scale[1].isfinite().all() and (dequantized(codes, scale, 128)[1] - 1e-42).abs().max() < 1e-30
    assert scale[2, 0].isnan() and not codes[2, :128].any() and scale[2, 1].isfinite()
    assert scale[3, 1].isnan() and not codes[3, 128:].any() and codes[3, :128].any()


def test_fused_norm_equals_the_norm_before_it():
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(7, 320, generator=generator), torch.randn(320, generator=generator)
    codes, scale = quantize_activations(x, norm_weight=weight, group_size=64)
    normed = torch.nn.functional.rms_norm(x.double(), (320,), weight.double(), 1e-6)
    expected, expected_scale = quantize_activations(normed.float(), group_size=64)
    # one rounding more or less may move a code by one where it stands between two
    assert (codes.int() - expected.int()).abs().max() <= 1
    assert (codes != expected).sum() <= 5
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    gemma, _ = quantize_activations(x, norm_weight=weight - 1, norm_offset=1.0, group_size=64)
    assert (gemma.int() - codes.int()).abs().max() <= 1


def test_permutation_is_a_gather_before():
    x = torch.randn(4, 384)
    order = torch.randperm(384)
    codes, scale = quantize_activations(x, permutation=order, group_size=128)
    expected, expected_scale = quantize_activations(x[:, order].contiguous(), group_size=128)
    assert torch.equal(codes, expected) and torch.equal(scale, expected_scale)


def test_blocks_of_different_widths():
    x = torch.randn(6, 512)
    block_bits = torch.tensor([8, 4, 4, 6], dtype=torch.uint8)
    codes, scale = quantize_activations(x, block_bits=block_bits, group_size=128)
    for block, bits in enumerate(block_bits.tolist()):
        part = slice(128 * block, 128 * block + 128)
        alone, alone_scale = quantize_activations(x[:, part].contiguous(), bits=bits)
        assert torch.equal(codes[:, part], alone)
        assert torch.equal(scale[:, block], alone_scale[:, 0])


def test_plan_of_blocks():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(64, 1000, generator=generator)
    outliers = torch.randperm(1000, generator=generator)[:90]
    x[:, outliers] *= 50
    order, bits = plan_blocks(x.abs().amax(0))
    assert set(order[:90].tolist()) == set(outliers.tolist())
    assert sorted(order.tolist()) == list(range(1000))
    assert bits.tolist() == [8] + [4] * 7
    counts = [
        int((plan_blocks(x.abs().amax(0), outlier_ratio=r)[1] == 8).sum()) for r in (0.5, 1, 2, 20, 1000)
    ]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 0
    assert plan_blocks(x.abs().amax(0), wide_blocks=8)[1].eq(8).all()
    # sorted blocks with few of 8 bits: nearly as good as 8 bits everywhere, far better than 4
    errors = []
    for more in ({"bits": 8}, {"bits": 4}, {"permutation": order, "block_bits": bits}):
        codes, scale = quantize_activations(x, group_size=128, **more)
        exact = x[:, order] if "permutation" in more else x
        usual = ~torch.isin(order if "permutation" in more else torch.arange(1000), outliers)
        errors.append(float((exact - dequantized(codes, scale, 128))[:, usual].square().mean()))
    assert errors[2] < errors[1] / 50
    with pytest.raises(InvalidArgument, match="wide_blocks=9, expected 0 to 8"):
        plan_blocks(x.abs().amax(0), wide_blocks=9)
    with pytest.raises(InvalidArgument, match="negative, infinite or NaN"):
        plan_blocks(x[0])
    with pytest.raises(InvalidArgument, match=r"expected floats \(K,\)"):
        plan_blocks(x)
    with pytest.raises(InvalidArgument, match="block_size=0"):
        plan_blocks(x.abs().amax(0), block_size=0)


def test_fp8_codes():
    x = torch.randn(9, 300, generator=torch.Generator().manual_seed(3)) * 7
    codes, scale = quantize_activations(x, dtype=torch.float8_e4m3fn, group_size=100)
    assert codes.dtype == torch.float8_e4m3fn
    values = codes.double()
    assert values.unflatten(-1, (3, 100)).abs().amax(-1).eq(448).all()
    error = (x.double() - dequantized(codes, scale, 100)).abs()
    steps = scale.double().repeat_interleave(100, -1)
    # 3 bits after the leading one; 2^-9 is the smallest step
    assert error.le(torch.maximum(x.double().abs() * 2.0**-4, steps * 2.0**-10) * (1 + 1e-5)).all()


def test_refusals_say_what_to_do():
    x = torch.zeros(2, 256)
    with pytest.raises(InvalidArgument, match=r"torch\.int64.*expected floats"):
        quantize_activations(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(InvalidArgument, match="bits=9, expected an integer from 2 to 8"):
        quantize_activations(x, bits=9)
    with pytest.raises(InvalidArgument, match="bits=4, expected 8 for float8_e4m3fn"):
        quantize_activations(x, bits=4, dtype=torch.float8_e4m3fn)
    with pytest.raises(InvalidArgument, match=r"torch\.uint8, expected torch\.int8"):
        quantize_activations(x, dtype=torch.uint8)
    with pytest.raises(InvalidArgument, match="groups of 0, expected a positive"):
        quantize_activations(x, group_size=0)
    with pytest.raises(InvalidArgument, match=r"torch\.uint8 of shape \(2,\) for 256 channels"):
        quantize_activations(x, group_size=128, block_bits=torch.ones(3, dtype=torch.uint8))
    with pytest.raises(InvalidArgument, match="block_bits and dtype"):
        quantize_activations(
            x, group_size=128, block_bits=torch.ones(2, dtype=torch.uint8), dtype=torch.float8_e4m3fn
        )
    with pytest.raises(InvalidArgument, match=r"int32 or int64 of shape \(256,\)"):
        quantize_activations(x, permutation=torch.arange(255))
    with pytest.raises(InvalidArgument, match=r"norm_weight .* expected floats \(256,\)"):
        quantize_activations(x, norm_weight=torch.ones(1, 256))
    with pytest.raises(InvalidArgument, match="norm_weight on meta and x on cpu"):
        quantize_activations(x, norm_weight=torch.ones(256, device="meta"))


COMPILE = """
kernels = import_module("tensormill.ops.quantize_activations.triton")
for columns, group_size, norm, integers in ((8192, -1, False, True), (8192, 128, False, True), (4096, -1, True, True),
                                            (4096, 64, False, False)):
    rows, groups, group, _, warps = kernels.geometry(columns, group_size, norm)
    constants = {"ROWS": rows, "GROUPS": groups, "GROUP": group, "CONTIGUOUS": True, "HAS_NORM": norm,
                 "HAS_PERMUTATION": False, "HAS_BITS": False, "INTEGERS": integers, "HAS_COUNTERS": True, "OVERLAP": True,
                 "SMALLEST": kernels._SMALLEST, "INFINITY": kernels._INFINITY}
    types = {"x": "*bf16", "norm_weight": "*bf16", "permutation": "*i32", "block_bits": "*u8", "scales": "*fp32",
             "codes": "*i8" if integers else "*fp8e4nv", "counters": "*i32", "eps": "fp32", "norm_offset": "fp32",
             "limit": "fp32"}
    built = build(kernels._kernel, types, constants, even=("K",), num_warps=warps, enable_fp_fusion=False)
    ptx = built.asm["ptx"]
    print(json.dumps({"spills": count(built, SPILLS), "wide": bool(re.search(r"ld\\.global\\S*\\.v4\\.b32", ptx)),
                      "fused": bool(re.search(r"fma\\.rn\\.f32", ptx)), "early": "launch_dependents" in ptx,
                      "waits": ptx.index("griddepcontrol.wait") < min(ptx.index("ld.global"), ptx.index("st.global"))}))
"""


@needs_compiler
def test_compiles_for_hopper():
    """16-byte loads, nothing spilled, no product fused with a sum: the codes are the reference's, exactly. It lets the next
    kernel start early and waits for the one before."""
    reports = hopper_reports(COMPILE)
    assert len(reports) == 4
    for report in reports:
        assert report == {
            "spills": report["spills"],
            "wide": True,
            "fused": False,
            "early": True,
            "waits": True,
        }
        assert report["spills"] in (0, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a CUDA device")
class TestOnGpu:
    @pytest.mark.parametrize("columns", [64, 1000, 8192, 28672, 65536])
    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
    def test_equals_the_reference(self, columns, dtype):
        x = torch.randn(77, columns, device="cuda").bfloat16()
        weight = torch.rand(columns, device="cuda").bfloat16()
        for more in ({}, {"group_size": 128}, {"norm_weight": weight}):
            with use_implementation(quantize_activations="triton"):
                codes, scale = quantize_activations(x, dtype=dtype, **more)
            with use_implementation(quantize_activations="reference"):
                expected, expected_scale = quantize_activations(x, dtype=dtype, **more)
            assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
            assert torch.equal(scale, expected_scale)

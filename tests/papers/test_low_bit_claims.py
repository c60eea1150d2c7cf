"""The measuring code of FlexQ's, COMET's, Bipolar-INT's and LUT Tensor Core's claims, against slow obvious versions; and every
speed claim at sizes that a CPU takes in a moment, for its structure."""

from __future__ import annotations

import copy
import importlib
import math

import pytest
import torch
from torch.nn import functional

from tensormill.compress import comet, flexq, rtn
from tensormill.compress.calibration import Calibration
from tensormill.compress.evaluate import Comparison, Evaluation
from tensormill.ops.linear_wna16.module import LinearWNA16
from tensormill.papers import _low_bit, bipolar_int, lut_tensor_core
from tensormill.papers import comet as comet_paper
from tensormill.papers import flexq as flexq_paper
from tensormill.papers.catalogue import ClaimNotMeasurable, Row, Run, find_paper
from tensormill.papers.records import make_record


@pytest.fixture(params=range(2))
def generator(request):
    return torch.Generator().manual_seed(request.param + 70)


def integers(low, high, *shape, generator):
    return torch.randint(low, high, shape, generator=generator)


def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def tokens():
    return Calibration(torch.randint(0, 60, (4, 24), generator=torch.Generator().manual_seed(7)))


def recorded(slug, claim, measurement):
    """What a record holds of it: every value a finite number, every row with a unit."""
    found = find_paper(slug).claims[claim]
    record = make_record(found, measurement, scale="full", device="cpu", seconds=1.0, sources={})
    assert record.reason and isinstance(record.holds, bool)
    return {row["what"]: row for row in record.rows}


@pytest.mark.parametrize(
    ("slug", "ids"),
    [
        ("flexq", ["C1", "C2", "C3", "C4", "C5", "C6"]),
        ("comet", ["C1", "C2", "C3", "C4", "C5"]),
        ("bipolar_int", ["C1", "C2", "C3", "C4"]),
        ("lut_tensor_core", ["C1", "C2", "C3"]),
    ],
)
def test_every_claim_is_there_and_gpu_claims_are_full(slug, ids):
    claims = find_paper(slug).claims
    assert list(claims) == ids
    for claim in claims.values():
        on_gpu = any("cuda" in needs for needs in claim.needs.values())
        assert on_gpu == (claim.scales == ("full",))


# Arithmetic


@pytest.mark.parametrize(("q", "p"), [(1, 1), (2, 3), (6, 6), (8, 6)])
def test_forms_of_products_of_planes(q, p, generator):
    x, weight = (integers(0, 1 << bits, 4, 37, generator=generator) for bits in (q, p))
    signed = [t - (1 << (b - 1)) for t, b in ((x, q), (weight, p))]
    assert torch.equal(flexq_paper.signed_plane_product(*signed, q, p), signed[0] @ signed[1].T)
    odd = [bipolar_int.bipolar(t, b) for t, b in ((x, q), (weight, p))]
    assert torch.equal(bipolar_int.xor_product(x, weight, q, p), odd[0] @ odd[1].T)
    assert torch.equal(bipolar_int.and_product(x, weight, q, p), odd[0] @ odd[1].T)


def test_wrong_signs_would_show(generator):
    x, weight = (integers(-32, 32, 4, 37, generator=generator) for _ in range(2))
    unsigned = flexq_paper.signed_plane_product(
        x, weight, 7, 7
    )  # no plane of 6-bit numbers is then the top one
    assert torch.equal(unsigned, x @ weight.T)
    assert not torch.equal(flexq_paper.signed_plane_product(x, weight, 5, 6), x @ weight.T)


def test_converted_codes_are_compared(generator, monkeypatch):
    count, wrong = bipolar_int.conversions(Run(), generator)
    assert wrong == 0 and count == 5 * sum(2**bits for bits in range(1, 9))
    operator = importlib.import_module("tensormill.ops.bit_plane_linear")  # a function has the same name
    right = operator.bit_plane_linear
    monkeypatch.setattr(operator, "bit_plane_linear", lambda x, weight: right(x, weight) + 1)
    assert bipolar_int.conversions(Run(), generator) == (count, count)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_tables_of_eight_and_sixteen(bits, generator):
    x = integers(-127, 128, 3, 20, generator=generator)
    codes = integers(0, 1 << bits, 6, 20, generator=generator)
    stored = lut_tensor_core.plane_indices(codes, bits)
    expected = x @ (2 * codes - ((1 << bits) - 1)).T
    assert torch.equal(lut_tensor_core.look_up(lut_tensor_core.signed_sums(x), stored), expected)
    half = lut_tensor_core.look_up(lut_tensor_core.signed_sums(x, 8), lut_tensor_core.fold_indices(stored))
    assert torch.equal(half, expected)
    for how in ("products", "bits", "tables"):
        found, count = lut_tensor_core.counted_product(x.tolist(), codes.tolist(), bits, how)
        assert found == expected.tolist()
        outputs, weights = 3 * 6, 3 * 6 * 20
        if how == "products":
            assert (count.multiplications, count.additions) == (weights, weights)
        if how == "bits":
            assert count.additions == bits * (weights + outputs) and count.look_ups == 0
        if how == "tables":
            assert count.look_ups == bits * weights // 4 and count.entries == 8 * 3 * 5
            assert (
                count.additions == count.look_ups + bits * outputs + 10 * 3 * 5
            )  # 3 for the first entry, 7 for the rest


def test_a_table_in_its_entries():
    (table,) = lut_tensor_core.signed_sums(torch.tensor([1, 10, 100, 1000]))
    assert table[0] == -1111 and table[0b0001] == -1109 and table[0b1010] == 1010 - 101 and table[15] == 1111


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_layer_by_tables_is_the_layer(bits, symmetric, generator):
    codes = integers(0, 1 << bits, 6, 64, generator=generator).byte()
    zero = None if symmetric else integers(0, 1 << bits, 6, 4, generator=generator).byte()
    scale = torch.rand(6, 4, generator=generator) + 0.5
    layer = LinearWNA16.from_codes(codes, scale, zero, bits=bits, group_size=16, bias=torch.randn(6))
    layer.requires_grad_(False)
    x = torch.randn(5, 64, generator=generator)
    expected = functional.linear(x, layer.dequantize(), layer.bias)
    torch.testing.assert_close(lut_tensor_core.table_linear(layer, None)(x), expected, rtol=1e-4, atol=1e-4)
    errors = [
        float((lut_tensor_core.table_linear(layer, together)(x) - expected).norm() / expected.norm())
        for together in (1, 16)
    ]
    assert 0 < errors[0] < errors[1] < 0.02


def test_rounded_tables_share_scales(generator):
    tables = lut_tensor_core.signed_sums(torch.randn(2, 20, generator=generator), 8)  # [2, 5, 8]
    for together in (1, 2, 5, 16):
        found = lut_tensor_core.quantize_tables(tables, together)
        for first in range(0, 5, together):
            part = tables[:, first : first + together]
            step = part.abs().amax((1, 2), keepdim=True) / 127
            assert ((found[:, first : first + together] - part).abs() <= 0.5001 * step).all()
    assert torch.equal(lut_tensor_core.quantize_tables(torch.zeros(1, 3, 8), 2), torch.zeros(1, 3, 8))


def test_exactness_claims_hold_and_say_what_they_counted():
    for slug in ("flexq", "comet"):
        measurement = find_paper(slug).claims["C3"].function(Run())
        rows = recorded(slug, "C3", measurement)
        assert measurement.holds and rows[next(iter(rows))]["value"] == 0
    measurement = find_paper("lut_tensor_core").claims["C1"].function(Run())
    assert measurement.holds
    rows = recorded("lut_tensor_core", "C1", measurement)
    assert rows["results of tables of 8 that differ from those of 16"]["value"] == 0


# Models


def test_smooth_quant_keeps_the_function_and_tames_outliers():
    model, calibration = tiny(), tokens()
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight[::23] *= 60
            for reader in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                reader.weight[:, ::23] /= 60
        wanted = model(calibration.tokens).logits
        plain = copy.deepcopy(model)
        rtn.apply(plain, rtn.RTNConfig(bits=8, group_size=-1, symmetric=True))
        flexq.quantize_inputs(plain, 8, -1)
        smooth = _low_bit.smooth_quant(model, calibration)
        errors = [
            float((m(calibration.tokens).logits - wanted).norm() / wanted.norm()) for m in (plain, smooth)
        ]
        assert torch.equal(model(calibration.tokens).logits, wanted)
    assert errors[1] < 0.5 * errors[0]


def test_variants_share_their_weights():
    model, calibration = tiny(), tokens()
    made = comet_paper.variants(model, calibration, 16)
    mixed, wide = made["W4Ax, blocks with outliers"], made["W4A8"]
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(mixed.get_submodule(name).weight_packed, wide.get_submodule(name).weight_packed)
    shares = {kind: comet_paper.wide_share(m) for kind, m in made.items() if "A16" not in kind}
    assert shares["W4A8"] == 1 and shares["W4A4"] == 0
    assert 0.16 <= shares[comet_paper._JUDGED] < 0.3
    assert shares[comet_paper._JUDGED] == shares[f"{comet_paper._JUDGED}, not permuted"]
    dense = made[comet_paper._SAME_WEIGHTS].get_submodule(name)
    assert type(dense) is torch.nn.Linear
    assert torch.equal(dense.weight, mixed.get_submodule(name).dequantize())


def test_a_rounded_cache_moves_the_output_a_little():
    model, calibration = tiny(), tokens()
    with torch.no_grad():
        wanted = model(calibration.tokens).logits
        found = comet_paper.with_rounded_cache(model)(calibration.tokens).logits
        assert torch.equal(model(calibration.tokens).logits, wanted)
    assert 1e-4 < float((found - wanted).norm() / wanted.norm()) < 0.2


def test_rises_are_relative_to_the_original():
    def evaluation(nll, kl=None):
        comparison = None if kl is None else Comparison(kl, 1.0)
        return Evaluation(math.exp(nll), 0.0, 10, 10, torch.tensor([nll]), comparison=comparison)

    scores = {"original": evaluation(2.0), "other": evaluation(2.0 + math.log(1.05), 0.1)}
    assert _low_bit.rise(scores, "other") == pytest.approx(5)


def test_memory_of_a_shape_is_what_its_layers_hold():
    model = flexq_paper.llama_shape(
        lambda n, k: LinearWNA16(k, n, bits=6, group_size=128, symmetric=True, bias=False, device="meta"),
        layers=1,
        hidden=256,
        inner=384,
    )
    packed = sum(b.numel() for b in model.buffers() if b.dtype == torch.int32)
    assert packed == (4 * 256 * 256 + 3 * 384 * 256) * 6 // 32
    measurement = find_paper("flexq").claims["C6"].function(Run())
    rows = recorded("flexq", "C6", measurement)
    assert 1 < rows["W6 smaller than W8"]["value"] < 8 / 6


# Speed: structure only


@pytest.fixture
def small(monkeypatch):
    """Sizes that take a moment, and ceilings that are not measured."""
    from tensormill import roofline
    from tensormill.ops import benchmark

    machine = roofline.Ceilings(
        "test", 1e10, 1e10, dict.fromkeys(("fp32", "bf16", "fp16", "int8", "b1"), 1e11)
    )
    for module in (roofline, benchmark):
        monkeypatch.setattr(module, "ceilings", lambda device: machine)
    monkeypatch.setattr(flexq_paper, "GPU_SHAPES", ((128, 256),))
    monkeypatch.setattr(flexq_paper, "GPU_TOKENS", (8, 17))
    monkeypatch.setattr(comet_paper, "GPU_SHAPES", ((128, 256),))
    monkeypatch.setattr(comet_paper, "GPU_TOKENS", (2, 16))
    monkeypatch.setattr(bipolar_int, "GPU_SHAPES", ((128, 256),))
    monkeypatch.setattr(bipolar_int, "GPU_TOKENS", (16, 32))
    monkeypatch.setattr(bipolar_int, "PAIRS", ((1, 2), (2, 2), (2, 8)))
    monkeypatch.setattr(bipolar_int, "CPU_PAIRS", ((1, 1), (2, 2)))
    for module in (flexq_paper, comet_paper, bipolar_int, lut_tensor_core):
        monkeypatch.setattr(module, "CPU_SHAPE", (128, 256))
    time_product, benchmarked = _low_bit.time_product, benchmark.benchmark

    def quick(*arguments, **options):
        return time_product(*arguments, **{**options, "seconds": 0.002})

    for module in (flexq_paper, comet_paper, bipolar_int):
        monkeypatch.setattr(module, "time_product", quick)
    monkeypatch.setattr(
        benchmark, "benchmark", lambda *a, **options: benchmarked(*a, **{**options, "seconds": 0.002})
    )
    # A CPU has no float16 yardstick: its bfloat16 one takes the place in COMET's ratios.
    fastest = _low_bit.fastest
    monkeypatch.setattr(
        comet_paper, "fastest", lambda row, *names: fastest(row, "torch.nn.functional.linear")
    )
    monkeypatch.setattr("tensormill.measure.copies_past_cache", lambda *arguments: 1)
    return Run("full", "cpu")


def test_flexq_on_a_gpu(small):
    rows = recorded("flexq", "C4", flexq_paper.gpu_kernel(small))
    for name in ("M=8 128x256 W6A8", "M=8 128x256 W8A8", "M=8 128x256 W4A8", "M=17 128x256 W6A8"):
        assert rows[name]["limit"] > 0 and rows[name]["unit"] == "us"
    ratio = rows["M=8 128x256 W6A8 faster than the fastest W8A8 layer"]["value"]
    assert ratio == pytest.approx(rows["M=8 128x256 W8A8"]["value"] / rows["M=8 128x256 W6A8"]["value"])
    assert "M=8 128x256 W6A6 by bit planes, activations given as planes" in rows
    assert "M=17 128x256 W6A6 by bit planes, activations given as planes" not in rows
    yardstick = rows[f"M=8 128x256 {_low_bit.INT8_CUBLAS}"]
    assert yardstick["setting"]["rows_given"] == 32 and yardstick["limit"] > 0


def test_comet_on_a_gpu(small):
    rows = recorded("comet", "C4", comet_paper.gpu_kernel(small))
    large, few = rows["mean over layers and 16, 64, 256 tokens"], rows["mean over layers and fewer tokens"]
    assert large["value"] == pytest.approx(
        rows["M=16 128x256 W4A8, groups of 128, faster than cuBLAS float16"]["value"]
    )
    assert few["value"] == pytest.approx(
        rows["M=2 128x256 W4A8, groups of 128, faster than cuBLAS float16"]["value"]
    )


def test_bipolar_int_on_a_gpu(small):
    rows = recorded("bipolar_int", "C3", bipolar_int.gpu_kernel(small))
    assert {
        "W1A2 M=16 128x256",
        "W2A8 M=32 128x256",
        "ceiling of b1",
        "planes of 32 x 256, 4 bits",
    } <= rows.keys()
    eight = rows["W2A8 M=32 128x256"]
    assert not any("_int_mm" in peer for peer in eight.get("peers", {}))  # 8 bipolar bits are no int8
    best = min(rows[f"{pair} M=32 128x256"]["peers"]["torch._int_mm (int8)"] for pair in ("W1A2", "W2A2"))
    assert rows["W2A8 M=32 128x256, faster than int8"]["value"] == pytest.approx(best / eight["value"])


def test_cpu_claims(small):
    rows = recorded("flexq", "C5", flexq_paper.cpu_kernel(small))
    assert rows["M=1 128x256 W6A8 faster than our W8A8"]["value"] > 0
    rows = recorded("comet", "C5", comet_paper.cpu_kernel(small))
    assert rows["M=16 128x256 W4A8 faster than torch bfloat16"]["value"] > 0
    rows = recorded("bipolar_int", "C4", bipolar_int.cpu_kernel(small))
    least = rows["W2A2 M=1 128x256, faster than either product of bytes"]["value"]
    assert least <= rows["W2A2 M=1 128x256, faster than int8"]["value"] * (1 + 1e-9)


def test_look_ups_on_a_cpu(small):
    try:
        measurement = lut_tensor_core.cpu_look_ups(Run("quick", "cpu"))
    except ClaimNotMeasurable as error:
        pytest.skip(str(error))
    rows = recorded("lut_tensor_core", "C3", measurement)
    row = rows["W2A8 M=1 128x256 by look-ups"]
    ratio = rows["W2A8 M=1 128x256: look-ups faster than dequantizing"]["value"]
    assert ratio == pytest.approx(row["peers"]["dequantizing kernel"] / row["value"])


def test_a_missing_peer_is_named():
    row = Row("here", 2.0, "us", peers={"a kernel": 3.0, "a slow kernel": 5.0})
    assert _low_bit.fastest(row, "kernel") == 3.0
    with pytest.raises(ClaimNotMeasurable, match="no peer humming"):
        _low_bit.fastest(row, "humming")


def test_comet_and_flexq_reports_say_what_inputs_have():
    model = tiny()
    report = comet.apply(model, comet.COMETConfig(group_size=16), tokens())
    assert all(layer.details["blocks"] in (4, 6) for layer in report.layers)

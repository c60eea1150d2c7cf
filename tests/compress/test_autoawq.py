"""AutoAWQ's `gemm` layout: known words, its own unpacker, a bijection, and what it can't hold."""

from __future__ import annotations

import pytest
import torch
from format_cases import quantized, source_file, weight_of, word_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import compress_linears, tiny_model

from tensormill.compress.formats.autoawq import AUTOAWQ, ORDER
from tensormill.compress.formats.checkpoint_format import Layer, Scheme
from tensormill.compress.formats.float16_scales import round_scales
from tensormill.errors import CheckpointError, ModelError

CONFIG = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}


def test_a_word_written_out():
    """Codes 0 to 7 of eight outputs: from the lowest nibble 0, 2, 4, 6, 1, 3, 5, 7."""
    codes = torch.arange(8, dtype=torch.uint8).view(8, 1)
    tensors = AUTOAWQ.pack_weight(codes, torch.ones(8, 1).half(), codes + 8, 4, -1)
    assert tensors["qweight"].tolist() == [[0x75316420]]
    assert tensors["qzeros"].tolist() == [[0xFDB9ECA8 - (1 << 32)]]
    assert tensors["qweight"].dtype == tensors["qzeros"].dtype == torch.int32


def test_every_nibble_is_where_the_definition_puts_it():
    codes, scale, zero = quantized(4, 24, 64, 16)
    tensors = AUTOAWQ.pack_weight(codes, scale, zero, 4, 16)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "qweight": (64, 3),
        "qzeros": (4, 3),
        "scales": (4, 24),
    }
    for packed, values in ((tensors["qweight"], codes), (tensors["qzeros"], zero)):
        for row in range(packed.shape[0]):
            stream = word_bits(packed[row])
            for word in range(3):
                for nibble in range(8):
                    found = stream >> (32 * word + 4 * nibble) & 15
                    assert found == values[8 * word + ORDER[nibble], row]
    assert torch.equal(tensors["scales"], scale.T)


@settings(max_examples=60, deadline=None)
@given(
    words=st.integers(1, 5),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([-1, 1, 5, 16, 32]),
    extreme=st.sampled_from(["", "low", "high"]),
    seed=st.integers(0, 2**16),
)
def test_a_bijection(words, groups, group_size, extreme, seed):
    columns = 37 if group_size == -1 else groups * group_size
    found = quantized(4, 8 * words, columns, group_size, seed, extreme)
    tensors = AUTOAWQ.pack_weight(*found, 4, group_size)
    again = AUTOAWQ.unpack_weight(tensors, 4, group_size)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, again, strict=True))
    packed_again = AUTOAWQ.pack_weight(*again, 4, group_size)
    assert all(torch.equal(packed_again[part], tensors[part]) for part in tensors)


def test_symmetric_layers_have_zero_points_of_eight():
    codes, scale, _ = quantized(4, 16, 32, 32)
    tensors = AUTOAWQ.pack_weight(codes, scale, None, 4, 32)
    assert set(tensors["qzeros"].flatten().tolist()) == {0x88888888 - (1 << 32)}
    layer = AUTOAWQ.unpack_linear(tensors, Scheme(4, 32, True), "layer")
    assert layer.symmetric and torch.equal(layer.codes(), codes)
    # The zero points count, not what the configuration claims.
    tensors["qzeros"][0, 0] ^= 1
    layer = AUTOAWQ.unpack_linear(tensors, Scheme(4, 32, True), "layer")
    assert layer.weight_zero_point.unique().tolist() == [8, 9]


@pytest.mark.parametrize("group_size", [16, 32])
def test_autoawq_reads_it(group_size):
    theirs = source_file("awq", "utils", "packing_utils.py")
    found = quantized(4, 40, 64, group_size)
    tensors = AUTOAWQ.pack_weight(*found, 4, group_size)
    weight = theirs.dequantize_gemm(*(tensors[part] for part in AUTOAWQ.parts), 4, group_size)
    torch.testing.assert_close(weight.float().T, weight_of(*found, group_size), rtol=1e-3, atol=0)


def test_compressed_tensors_reads_it():
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    if not hasattr(converters, "AutoAWQConverter"):
        pytest.skip("this compressed-tensors has no converter for AutoAWQ")
    codes, scale, zero = quantized(4, 40, 64, 16)
    tensors = AUTOAWQ.pack_weight(codes, scale, zero, 4, 16)
    theirs = converters.AutoAWQConverter(group_size=16)._convert_gemm_module(
        tensors["qweight"], tensors["scales"], tensors["qzeros"]
    )
    assert torch.equal(theirs[0] + 8, codes) and torch.equal(theirs[1], scale)
    assert torch.equal(theirs[2] + 8, zero)


def test_configuration():
    model = compress_linears(tiny_model("llama"), 4, 32, True)
    assert AUTOAWQ.quantization_config(model) == {**CONFIG, "modules_to_not_convert": ["lm_head"]}
    assert AUTOAWQ.parse_config(CONFIG) == Scheme(4, 32, False)
    old = {"quant_method": "awq", "version": "GEMM", "w_bit": 4, "q_group_size": 64, "zero_point": False}
    assert AUTOAWQ.parse_config(old) == Scheme(4, 64, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quantized with 'gptq', expected 'awq'"),
        ({"version": "gemv"}, "version 'gemv', expected 'gemm'"),
        ({"version": None, "format": "gemv_fast"}, "version 'gemv_fast'"),
        ({"backend": "llm-awq"}, "'llm-awq'"),
        ({"bits": 3}, "bits=3, expected 4"),
        ({"bits": None}, "bits=None"),
        ({"bits": True}, "bits=True"),
        ({"group_size": 0}, "group_size=0, expected a positive integer or -1"),
        ({"group_size": "128"}, "group_size='128'"),
    ],
)
def test_configurations_of_others_are_refused_in_one_line(change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        AUTOAWQ.parse_config({**CONFIG, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("qweight", None, "layer has no qweight"),
        ("qzeros", None, "layer has no qzeros"),
        ("scales", None, "layer has no scales"),
        ("qweight", torch.zeros(64, dtype=torch.int32), "expected a matrix"),
        ("qweight", torch.zeros(65, 3, dtype=torch.int32), "65 input features in groups of 32"),
        ("qweight", torch.zeros(64, 3), "torch.float32, expected torch.int32"),
        ("qzeros", torch.zeros(2, 4, dtype=torch.int32), r"qzeros has shape \(2, 4\), expected \(2, 3\)"),
        ("qzeros", torch.zeros(2, 3, dtype=torch.int64), "torch.int64, expected torch.int32"),
        ("scales", torch.zeros(3, 24), r"scales has shape \(3, 24\), expected \(2, 24\)"),
    ],
)
def test_contradicting_tensors_are_refused(tensor, value, message):
    tensors = AUTOAWQ.pack_weight(*quantized(4, 24, 64, 32), 4, 32)
    tensors[tensor] = value
    if value is None:
        del tensors[tensor]
    with pytest.raises(CheckpointError, match=message) as caught:
        AUTOAWQ.unpack_weight(tensors, 4, 32, "layer")
    assert "\n" not in str(caught.value)


def test_what_the_format_cannot_hold_is_refused():
    def layers(*found: tuple[int, int, int, int]) -> dict[str, Layer]:
        return {
            f"layer{i}": Layer(Scheme(bits, group, False), rows, columns)
            for i, (bits, group, rows, columns) in enumerate(found)
        }

    nothing = torch.nn.Module()
    for found, message in (
        (layers((3, 32, 8, 64)), "given 3 bits for a checkpoint in the format awq, expected 4"),
        (layers((4, 32, 12, 64)), "layer0 has 12 output features, expected a multiple of 8"),
        (layers((4, 32, 8, 72)), "layer0 has 72 input features in groups of 32"),
        (layers((4, 32, 8, 64), (4, 16, 8, 64)), "layer0 has groups of 32 and layer1 of 16"),
        (layers((4, 32, 8, 64), (4, -1, 8, 64)), "layer1 has one group of 64 and layer0 groups of 32"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            AUTOAWQ.check_layers(found, nothing)
        assert "\n" not in str(caught.value)
    # A row that is one group is a group or a whole row, as the others need.
    assert AUTOAWQ.group_size(layers((4, 32, 8, 64), (4, -1, 8, 32))) == 32
    assert AUTOAWQ.group_size(layers((4, 128, 8, 64), (4, -1, 8, 32))) == -1


def test_the_output_layer_and_names_within_names_are_refused():
    head = compress_linears(tiny_model("qwen2"), 4, 32, False, head=True)
    with pytest.raises(ModelError, match="lm_head is the output layer"):
        AUTOAWQ.quantization_config(head)
    model = compress_linears(tiny_model("llama"), 4, 32, False)
    model.model.layers[0].mlp.up = torch.nn.Linear(8, 8)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up is left uncompressed"):
        AUTOAWQ.quantization_config(model)
    with pytest.raises(ModelError, match="no compressed linear"):
        AUTOAWQ.quantization_config(tiny_model("llama"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_are_exact_or_refused(dtype):
    """bfloat16 scales of usual size are float16 numbers; what isn't is refused, not rounded in silence."""
    model = compress_linears(tiny_model("llama", dtype=dtype), 4, 32, False)
    name, layer = "up", model.model.layers[0].mlp.up_proj
    scale = layer.weight_scale.clone()
    assert scale.dtype == dtype
    if dtype == torch.bfloat16:
        assert torch.equal(AUTOAWQ.pack_linear(layer, name)["scales"].T.float(), scale.float())
    else:
        with pytest.raises(ModelError, match="up has scales that float16 doesn't hold exactly"):
            AUTOAWQ.pack_linear(layer, name)
        round_scales(model)
        assert torch.equal(layer.weight_scale, scale.half())
        assert torch.equal(AUTOAWQ.pack_linear(layer, name)["scales"], scale.half().T)
    for value in (1e6, 1e-8):
        layer.weight_scale = scale.clone()
        layer.weight_scale[2, 1] = value
        with pytest.raises(ModelError, match="up has scales that float16 doesn't hold exactly"):
            AUTOAWQ.pack_linear(layer, name)
        with pytest.raises(ModelError, match=r"mlp\.up_proj has the scale (1e|9\.99e|1\.00e)"):
            round_scales(model)
        assert layer.weight_scale.dtype == dtype


def test_groups_of_zeros_may_have_any_scale():
    """Weights of zero get the smallest float32 as their scale, which float16 doesn't have."""
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[3, 32:] = 0
    compress_linears(model, 4, 32, False)
    round_scales(model)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight_scale[3, 1] == 2.0**-24
    assert (layer.dequantize()[3, 32:] == 0).all()

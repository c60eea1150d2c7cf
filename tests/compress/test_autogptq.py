"""GPTQ's layouts, version 1 and 2: known words, AutoGPTQ's own code, a bijection, what they can't hold."""

from __future__ import annotations

import pytest
import torch
from format_cases import quantized, source_file, weight_of, word_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import compress_linears, tiny_model

from tensormill.compress.formats.autogptq import GPTQ_V1, GPTQ_V2, plain_groups, version_of
from tensormill.compress.formats.checkpoint_format import Layer, Scheme, compressed_linears
from tensormill.errors import CheckpointError, ModelError

BITS = (2, 3, 4, 8)
VERSIONS = {"v1": GPTQ_V1, "v2": GPTQ_V2}
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}

pytestmark = pytest.mark.filterwarnings("ignore:.*zero points of:UserWarning")


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def test_three_bit_words_written_out():
    """32 codes 0, 1, ... 7, 0, 1, ...: 24 bits that repeat four times fill three words."""
    codes = torch.arange(32, dtype=torch.uint8).view(1, 32) % 8
    tensors = GPTQ_V2.pack_weight(codes.repeat(32, 1), torch.ones(32, 1).half(), codes.view(32, 1), 3, -1)
    words = [signed(word) for word in (0x88FAC688, 0xC688FAC6, 0xFAC688FA)]
    assert tensors["qweight"].shape == (3, 32)
    assert all(column == words for column in tensors["qweight"].T.tolist())
    assert tensors["qzeros"].tolist() == [words]


def test_version_1_subtracts_one_within_each_field():
    """Zero points 0 to 7 in four bits: F, 0, 1, ... 6, and no borrow from the neighbour."""
    zero = torch.arange(8, dtype=torch.uint8).view(8, 1)
    tensors = [
        version.pack_weight(torch.zeros(8, 8, dtype=torch.uint8), torch.ones(8, 1).half(), zero, 4, -1)
        for version in (GPTQ_V1, GPTQ_V2)
    ]
    assert [found["qzeros"].tolist() for found in tensors] == [[[0x6543210F]], [[0x76543210]]]


@pytest.mark.parametrize("bits", BITS)
def test_zero_wraps_to_all_ones(bits):
    codes, scale, _ = quantized(bits, 32, 32, -1)
    zero = torch.zeros(32, 1, dtype=torch.uint8)
    with pytest.warns(UserWarning, match="gptq_v2 has no such gap"):
        tensors = GPTQ_V1.pack_weight(codes, scale, zero, bits, -1)
    assert (tensors["qzeros"] == -1).all()
    with pytest.warns(UserWarning, match="read as 0"):
        assert torch.equal(GPTQ_V1.unpack_weight(tensors, bits, -1)[2], zero)
    assert (GPTQ_V2.pack_weight(codes, scale, zero, bits, -1)["qzeros"] == 0).all()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("bits", BITS)
def test_every_field_is_where_the_definition_puts_it(bits, version):
    codes, scale, zero = quantized(bits, 32, 64, 16)
    tensors = VERSIONS[version].pack_weight(codes, scale, zero, bits, 16)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "qweight": (64 * bits // 32, 32),
        "qzeros": (4, bits),
        "scales": (4, 32),
        "g_idx": (64,),
    }
    mask, less = (1 << bits) - 1, int(version == "v1")
    for row in range(32):
        stream = word_bits(tensors["qweight"][:, row])
        assert [stream >> (bits * k) & mask for k in range(64)] == codes[row].tolist()
    for group in range(4):
        stream = word_bits(tensors["qzeros"][group])
        expected = [(value - less) & mask for value in zero[:, group].tolist()]
        assert [stream >> (bits * n) & mask for n in range(32)] == expected
    assert tensors["g_idx"].tolist() == [k // 16 for k in range(64)]
    assert tensors["g_idx"].dtype == torch.int32


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    version=st.sampled_from(list(VERSIONS)),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    groups=st.sampled_from([-1, 1, 2]),
    extreme=st.sampled_from(["", "low", "high"]),
    seed=st.integers(0, 2**16),
)
def test_a_bijection(bits, version, rows, columns, groups, extreme, seed):
    unit = {2: 16, 3: 32, 4: 8, 8: 4}[bits]
    found_format, group_size = VERSIONS[version], -1 if groups == -1 else unit // groups
    found = quantized(bits, unit * rows, unit * columns, group_size, seed, extreme)
    tensors = found_format.pack_weight(*found, bits, group_size)
    again = found_format.unpack_weight(tensors, bits, group_size)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, again, strict=True))
    packed_again = found_format.pack_weight(*again, bits, group_size)
    assert all(torch.equal(packed_again[part], tensors[part]) for part in tensors)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("version", VERSIONS)
def test_symmetric_layers_have_zero_points_in_the_middle(bits, version):
    codes, scale, _ = quantized(bits, 32, 64, 32)
    found = VERSIONS[version]
    tensors = found.pack_weight(codes, scale, None, bits, 32)
    middle = (1 << (bits - 1)) - (version == "v1")
    assert word_bits(tensors["qzeros"][0]) == sum(middle << (bits * n) for n in range(32))
    layer = found.unpack_linear(tensors, Scheme(bits, 32, True), "layer")
    assert layer.symmetric and torch.equal(layer.codes(), codes)
    expected = weight_of(codes, scale, torch.full_like(scale, 1 << (bits - 1)), 32)
    assert torch.equal(layer.dequantize(torch.float32), expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_autogptq_reads_it(bits, symmetric):
    """Its torch path, on an identity matrix, gives the dequantized weight."""
    theirs = source_file("auto_gptq", "nn_modules", "qlinear", "qlinear_cuda_old.py")
    codes, scale, zero = quantized(bits, 64, 96, 32)
    if bits == 3:
        zero = zero.clamp(min=1)  # Its three-bit path doesn't wrap.
    given = None if symmetric else zero
    tensors = GPTQ_V1.pack_weight(codes, scale, given, bits, 32)
    layer = theirs.QuantLinear(bits, 32, 96, 64, bias=False)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in layer.named_buffers()
    }
    layer.load_state_dict(tensors)
    weight = layer(torch.eye(96, dtype=torch.float16)).float().T
    middle = torch.full_like(zero, 1 << (bits - 1))
    expected = weight_of(codes, scale, middle if symmetric else zero, 32)
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_autogptq_s_own_packing_is_read(bits):
    """Files that it packed, zero points from 1 on: it spoils a word that holds a zero point of 0."""
    theirs = source_file("auto_gptq", "nn_modules", "qlinear", "qlinear_cuda_old.py")
    codes, scale, zero = quantized(bits, 64, 96, 32)
    zero = zero.clamp(min=1)
    layer = theirs.QuantLinear(bits, 32, 96, 64, bias=False)
    linear = torch.nn.Linear(96, 64, bias=False)
    linear.weight.data = weight_of(codes, scale, zero, 32)
    layer.pack(linear, scale.float(), zero.float(), None)
    found = GPTQ_V1.unpack_weight(dict(layer.named_buffers()), bits, 32)
    assert torch.equal(found[0], codes) and torch.equal(found[2], zero)


def test_plain_order_is_recognised():
    codes, scale, zero = quantized(4, 16, 64, 32)
    tensors = GPTQ_V2.pack_weight(codes, scale, zero, 4, 32)
    for order in (None, torch.empty(0, dtype=torch.int32), tensors["g_idx"].long()):
        given = {**tensors, "g_idx": order} if order is not None else dict(list(tensors.items())[:3])
        assert torch.equal(GPTQ_V2.unpack_weight(given, 4, 32)[0], codes)
    for order, message in (
        (tensors["g_idx"].flip(0), "layer.g_idx orders columns by activation"),
        (torch.zeros(64, dtype=torch.int32), "layer.g_idx puts 64 columns in group 0, expected 32"),
        (tensors["g_idx"] + 1, "layer.g_idx puts 0 columns in group 0, expected 32"),
        (tensors["g_idx"] - 1, "layer.g_idx puts 0 columns in group 1, expected 32"),
        (tensors["g_idx"][:60], r"layer.g_idx has shape \(60,\), expected \(64,\)"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            GPTQ_V2.unpack_weight({**tensors, "g_idx": order}, 4, 32, "layer")
        assert "\n" not in str(caught.value)
    assert plain_groups(5, -1).tolist() == [0] * 5


def test_configuration():
    symmetric = compress_linears(tiny_model("llama"), 4, 32, True)
    config = GPTQ_V1.quantization_config(symmetric)
    assert config.pop("meta")["quantizer"][0].startswith("tensormill:")
    assert config == {**CONFIG, "checkpoint_format": "gptq", "lm_head": False}
    head = compress_linears(tiny_model("qwen2"), 3, 32, False, only="mlp")
    head = compress_linears(head, 3, 32, False, only="lm_head", head=True)
    config = GPTQ_V2.quantization_config(head)
    assert config["checkpoint_format"] == "gptq_v2" and config["lm_head"] and not config["sym"]
    assert r"-:^model\.layers\.0\.self_attn\.q_proj$" in config["dynamic"]
    assert GPTQ_V2.parse_config(config).scheme_of("lm_head") == Scheme(3, 32, False)


def test_settings_of_single_layers_are_written_as_rules():
    """Most weights say what holds for the model; rules are matched as GPTQModel and vLLM match them."""
    model = compress_linears(tiny_model("llama"), 4, 32, True, only="mlp")
    compress_linears(model, 8, 16, True, only="0.self_attn.o_proj")
    compress_linears(model, 3, -1, False, only="1.self_attn")
    config = GPTQ_V2.quantization_config(model)
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, False)
    rules = config["dynamic"]
    assert rules.pop(r"+:^model\.layers\.0\.self_attn\.o_proj$") == {"bits": 8, "group_size": 16}
    assert sorted(set(map(str, rules.values()))) == ["{'bits': 3, 'group_size': -1}", "{}"]
    parsed = GPTQ_V2.parse_config(GPTQ_V2.quantization_config(model))
    for name, module in compressed_linears(model).items():
        scheme = parsed.scheme_of(name)
        assert (scheme.bits, scheme.group_size) == (module.bits, module.group_size), name
    # A row of one group is one of the model's group size, too.
    whole = compress_linears(tiny_model("llama", mlp=128), 4, 64, True, only="down_proj")
    compress_linears(whole, 4, -1, True, only="q_proj")
    config = GPTQ_V2.quantization_config(whole)
    assert config["group_size"] == 64 and not [key for key in config["dynamic"] if key.startswith("+:")]


def test_rules_of_single_layers_are_read():
    """The first that matches the start of a name counts, whatever a rule says beside of how weights were found."""
    dynamic = {
        r"-:.*\.k_proj": {},
        r"+:.*\.1\..*down": {"bits": 3, "desc_act": False, "damp_percent": 0.1},
        r".*\.down_proj": {"bits": 8, "group_size": 64},
        r"up_proj": {"bits": 2},
        r".*\.o_proj$": {"group_size": -1, "sym": False},
    }
    parsed = GPTQ_V1.parse_config({**CONFIG, "desc_act": True, "dynamic": dynamic})
    for name, expected in {
        "model.layers.0.self_attn.q_proj": Scheme(4, 32, True, True),
        "model.layers.0.self_attn.k_proj": Scheme(4, 32, True, True),
        "model.layers.0.self_attn.o_proj": Scheme(4, -1, False, True),
        "model.layers.0.mlp.up_proj": Scheme(4, 32, True, True),
        "model.layers.0.mlp.down_proj": Scheme(8, 64, True, True),
        "model.layers.1.mlp.down_proj": Scheme(3, 32, True, False),
    }.items():
        assert parsed.scheme_of(name) == expected, name


def test_gptqmodel_matches_the_same_rules():
    """Its own look-up, where it is installed."""
    theirs = pytest.importorskip("gptqmodel.quantization.config")
    dynamic = {r"+:.*\.1\..*down": {"bits": 3}, r".*\.down_proj": {"bits": 8}, r"up_proj": {"bits": 2}}
    parsed = GPTQ_V1.parse_config({**CONFIG, "dynamic": dynamic})
    for block in range(3):
        for part in ("down_proj", "up_proj", "gate_proj"):
            name = f"model.layers.{block}.mlp.{part}"
            assert theirs.dynamic_get(dynamic, name, "bits", 4) == parsed.scheme_of(name).bits


def test_versions_are_told_apart():
    assert version_of(CONFIG) is GPTQ_V1
    assert version_of({**CONFIG, "format": "GPTQ_V2"}) is GPTQ_V2
    assert version_of({**CONFIG, "checkpoint_format": "gptq_v2", "format": "gptq_v2"}) is GPTQ_V2
    with pytest.raises(
        CheckpointError, match="checkpoint_format 'gptq' and the format 'gptq_v2', expected one"
    ):
        version_of({**CONFIG, "checkpoint_format": "gptq", "format": "gptq_v2"})
    for change in ({"is_marlin_format": True}, {"checkpoint_format": "marlin"}):
        with pytest.raises(CheckpointError, match="gptq format 'marlin', expected 'gptq' or 'gptq_v2'"):
            version_of({**CONFIG, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quantized with 'awq', expected 'gptq'"),
        ({"checkpoint_format": "gptq_v2"}, "has the format 'gptq_v2', expected 'gptq'"),
        ({"bits": 5}, r"bits=5, expected one of \[2, 3, 4, 8\]"),
        ({"group_size": None}, "group_size=None"),
        ({"bits": "4"}, "bits='4', expected one of"),
        ({"desc_act": "yes"}, "desc_act='yes', expected true or false"),
        ({"sym": 1}, "sym=1, expected true or false"),
        ({"checkpoint_format": "gptq_p"}, "gptq format 'gptq_p', expected 'gptq' or 'gptq_v2'"),
        ({"dynamic": {"up": {"desc_act": "no"}}}, "in the rule 'up' of .*desc_act='no', expected true"),
        ({"pack_dtype": "int16"}, "words of 'int16'"),
        ({"adapter": {"rank": 8}}, "the checkpoint has adapter="),
        ({"activation": {"bits": 8}}, "the checkpoint has activation="),
        ({"dynamic": ["up_proj"]}, "dynamic="),
        (
            {"dynamic": {"+:.*up_proj": {"bits": 5}}},
            r"in the rule '\+:.*up_proj' of .*bits=5, expected one of",
        ),
        ({"dynamic": {"up": {"bits": "8"}}}, r"in the rule 'up' of .*bits='8', expected one of"),
        ({"dynamic": {"up": {"group_size": 0}}}, "in the rule 'up' of .*group_size=0, expected a positive"),
        ({"dynamic": {"up": 8}}, "the rule 'up' of quantization_config is 8, expected settings"),
        ({"dynamic": {"+:(up": {"bits": 8}}}, "is no pattern: missing"),
        ({"dynamic": {"up": {"pack_dtype": "int64"}}}, "the rule 'up' of .* has words of 'int64'"),
        ({"dynamic": {"up": {"adapter": {"rank": 8}}}}, "the rule 'up' of .* has adapter="),
    ],
)
def test_configurations_of_others_are_refused_in_one_line(change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        GPTQ_V1.parse_config({**CONFIG, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("qweight", None, "layer has no qweight"),
        ("qzeros", None, "layer has no qzeros"),
        ("qweight", torch.zeros(7, 32, dtype=torch.int32), "input features"),
        ("qweight", torch.zeros(6, 32, dtype=torch.int16), "torch.int16, expected torch.int32"),
        ("qzeros", torch.zeros(2, 4, dtype=torch.int32), r"qzeros has shape \(2, 4\), expected \(2, 3\)"),
        ("scales", torch.zeros(1, 32), r"scales has shape \(1, 32\), expected \(2, 32\)"),
    ],
)
def test_contradicting_tensors_are_refused(tensor, value, message):
    tensors = GPTQ_V1.pack_weight(*quantized(3, 32, 64, 32), 3, 32)
    tensors[tensor] = value
    if value is None:
        del tensors[tensor]
    with pytest.raises(CheckpointError, match=message) as caught:
        GPTQ_V1.unpack_weight(tensors, 3, 32, "layer")
    assert "\n" not in str(caught.value)


def test_what_the_format_cannot_hold_is_refused():
    nothing = torch.nn.Module()
    for schemes, rows, columns, message in (
        ([Scheme(6, 32, True)], 32, 64, r"given 6 bits for a checkpoint in the format gptq_v2"),
        ([Scheme(4, 32, True), Scheme(8, 24, True)], 32, 64, "layer1 has 64 input features in groups of 24"),
        ([Scheme(3, 16, True)], 48, 64, "layer0 has 48 output features, expected a multiple of 32 for 3"),
        ([Scheme(2, 8, True)], 32, 24, "layer0 has 24 input features, expected a multiple of 16"),
        ([Scheme(8, 16, True)], 4, 24, "layer0 has 24 input features in groups of 16"),
    ):
        layers = {f"layer{i}": Layer(scheme, rows, columns) for i, scheme in enumerate(schemes)}
        with pytest.raises(ModelError, match=message) as caught:
            GPTQ_V2.check_layers(layers, nothing)
        assert "\n" not in str(caught.value)

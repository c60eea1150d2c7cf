import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    Block,
    BlockModel,
    HandingBlock,
    HandingModel,
    OnePlusNorm,
    SharingModel,
    tiny_model,
    tokens,
)
from torch import nn

from tensormill.compress.block_calls import record_calls
from tensormill.compress.structure import discover, find_blocks
from tensormill.errors import ModelError

GATED = [
    "input_layernorm -> self_attn.q_proj + self_attn.k_proj + self_attn.v_proj",
    "self_attn.v_proj -> self_attn.o_proj",
    "post_attention_layernorm -> mlp.gate_proj + mlp.up_proj",
    "mlp.up_proj -> mlp.down_proj",
]
EXPECTED = {
    "llama": GATED,
    "qwen2": GATED,
    "mistral": GATED,
    "gemma2": [edge.replace("post_attention", "pre_feedforward") for edge in GATED],
    "opt": [
        "self_attn_layer_norm -> self_attn.q_proj + self_attn.k_proj + self_attn.v_proj",
        "self_attn.v_proj -> self_attn.out_proj",
        "final_layer_norm -> fc1",
        "fc1 -> fc2",
    ],
    "phi3": [
        "input_layernorm -> self_attn.qkv_proj",
        "self_attn.qkv_proj -> self_attn.o_proj",
        "post_attention_layernorm -> mlp.gate_up_proj",
        "mlp.gate_up_proj -> mlp.down_proj",
    ],
}


@pytest.mark.parametrize("architecture", EXPECTED)
def test_edges_are_found(architecture):
    structure = discover(tiny_model(architecture))
    assert len(structure.blocks) == 2
    for block in structure.blocks:
        assert [str(edge) for edge in block.mappings] == EXPECTED[architecture]
        offset = 1.0 if architecture == "gemma2" else 0.0
        assert all(edge.offset == (offset if edge.kind == "norm" else 0.0) for edge in block.mappings)
        assert block.mappings[1].repeats == (1 if architecture in ("llama", "opt") else 2)
        if architecture != "phi3":
            assert block.scores == ("self_attn.q_proj", "self_attn.k_proj")
            assert [edge.inspected for edge in block.mappings[:2]] == [
                "self_attn",
                block.mappings[1].consumers[0],
            ]
    assert structure.outside == ("lm_head",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_models_own_dtype_does_not_matter(dtype):
    assert discover(tiny_model("qwen2", dtype=dtype)).blocks[0].mappings == (
        discover(tiny_model("qwen2")).blocks[0].mappings
    )


def test_discovery_leaves_the_model_as_it_was():
    model = tiny_model("llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    discover(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def edges(*blocks: nn.Module, mappings="auto") -> list[str]:
    return [str(edge) for edge in discover(BlockModel(*blocks), mappings).blocks[0].mappings]


def test_edges_through_a_nonlinearity_are_dropped():
    torch.manual_seed(0)
    assert edges(Block(nn.GELU(), nn.LayerNorm(32))) == ["norm -> first"]
    assert edges(Block(nn.ReLU(), nn.LayerNorm(32))) == ["norm -> first", "first -> second"]
    assert edges(Block(nn.LeakyReLU(), OnePlusNorm())) == ["norm -> first", "first -> second"]


def test_a_norm_that_something_else_reads_is_dropped():
    assert edges(Block(nn.GELU(), nn.LayerNorm(32), leak=True), Block(nn.GELU(), nn.LayerNorm(32))) == []


def test_a_norm_without_weight_is_dropped():
    assert edges(Block(nn.GELU(), nn.LayerNorm(32, elementwise_affine=False))) == []


def test_shared_weights_are_left_alone():
    first, second = Block(nn.ReLU(), nn.LayerNorm(32)), Block(nn.ReLU(), nn.LayerNorm(32))
    second.first = first.first
    structure = discover(BlockModel(first, second))
    assert [[str(edge) for edge in block.mappings] for block in structure.blocks] == [[], []]


def test_edges_given_by_hand_are_tried():
    given = [{"producer": "norm", "consumers": ["first"]}]
    assert edges(Block(nn.GELU(), nn.LayerNorm(32)), mappings=given) == ["norm -> first"]
    with pytest.raises(ModelError, match=r"first -> second.*would change the output of blocks\.0"):
        edges(Block(nn.GELU(), nn.LayerNorm(32)), mappings=[{"producer": "first", "consumers": ["second"]}])
    with pytest.raises(ModelError, match="name no layers"):
        edges(Block(nn.GELU(), nn.LayerNorm(32)), mappings=[{"producer": "ln_1", "consumers": ["first"]}])
    with pytest.raises(ModelError, match="pass mappings"):
        edges(Block(nn.GELU(), nn.LayerNorm(32)), mappings=[{"from": "norm"}])


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ModelError, match="without a list of blocks"):
        find_blocks(nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10)))


def test_blocks_out_of_order_are_refused():
    class Backwards(BlockModel):
        def forward(self, tokens):
            x = self.embedding(tokens)
            for block in reversed(self.blocks):
                x = block(x)[0]
            return x

    model = Backwards(*(Block(nn.ReLU(), nn.LayerNorm(32)) for _ in range(2)))
    with pytest.raises(ModelError, match="in order"):
        discover(model)


def test_what_a_block_gives_the_next_one_counts_as_its_output():
    """Scaling what the next block reads would change that one, though not this block's hidden states."""
    torch.manual_seed(0)
    alone = discover(HandingModel(*(HandingBlock(hands_on=False) for _ in range(3)))).blocks
    handing = discover(HandingModel(*(HandingBlock() for _ in range(3)))).blocks
    for block in alone:
        assert [str(edge) for edge in block.mappings] == ["norm -> first", "first -> second"]
    for block in handing:
        assert [str(edge) for edge in block.mappings] == ["norm -> first"]
        assert block.outputs == 2


def test_what_a_block_leaves_for_later_ones_counts_as_its_output():
    """Blocks that share keys and values are alike, and differ in which of them leave theirs."""
    torch.manual_seed(0)
    found = discover(SharingModel("neither", "leaves", "neither", "reads")).blocks
    free, bound = ["norm -> first", "first -> second"], ["norm -> first"]
    assert [[str(edge) for edge in block.mappings] for block in found] == [free, bound, free, bound]


def test_what_a_block_gives_a_later_one_than_the_next_is_refused():
    model = HandingModel(*(HandingBlock() for _ in range(3)), distance=2)
    with pytest.raises(ModelError, match=r"blocks\.2 reads what blocks\.0 gives"):
        discover(model)


def test_a_model_that_changes_its_weights_is_refused():
    """RWKV divides them by powers of two before it runs, and what is saved would be divided again."""

    class Rescaling(BlockModel):
        def forward(self, tokens):
            self.blocks[0].first.weight.data.mul_(0.5)
            self.blocks[0].second.weight.div_(2)
            return super().forward(tokens)

    with pytest.raises(ModelError, match=r"changes its own weights.*blocks\.0\.second\.weight"):
        discover(Rescaling(Block(nn.ReLU(), nn.LayerNorm(32))))


def test_nan_names_the_parameter():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = float("nan")
    with pytest.raises(ModelError, match=r"model\.layers\.0\.input_layernorm\.weight"):
        discover(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recorded_calls_run_the_blocks_as_the_model_does(architecture):
    model = tiny_model(architecture)
    batch = tokens()
    hidden, calls, counts = record_calls(model, find_blocks(model), batch)
    with torch.no_grad():
        expected = model(batch, output_hidden_states=True).hidden_states
        assert torch.equal(hidden, expected[0])
        first = calls[0].run(model.get_submodule(find_blocks(model)[0]), hidden)
    assert counts == [0, 0]
    assert torch.allclose(first, expected[1], atol=1e-5)

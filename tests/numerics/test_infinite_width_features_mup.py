"""muP of real models: losses of the package mup, files, saving, compilation, Hugging Face models, coordinate checks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tensormill.errors import CheckpointError, InvalidArgument, ModelError, OutputError
from tensormill.numerics.infinite_width_features import (
    BaseShapes,
    MuReadout,
    WidthScaling,
    attention_scale,
    coord_check,
    parametrize,
    scale_attention,
)

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, "MuSGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, "MuAdam", {"lr": 0.01, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, "MuAdamW", {"lr": 0.01, "weight_decay": 0.05}),
}


def mlp(width, readout=MuReadout, inputs=6, outputs=3):
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, 2 * width),
        nn.ReLU(),
        readout(2 * width, outputs),
    )


class Attention(nn.Module):
    """A one-layer language model with norm, fused query-key-value and a feed-forward part."""

    def __init__(self, width, readout=MuReadout, vocabulary=11, heads=2, base_head_dim=8):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.head = readout(width, vocabulary)
        self.scale = attention_scale(width // heads, base_head_dim)

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        x = x + self.out(mixed.transpose(-3, -2).flatten(-2))
        return self.head(x + self.feed(x))


def mse(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def next_token(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def regression_batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)) for _ in range(count)
    ]


def token_batches(count, seed=0, vocabulary=11, rows=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (rows, 9), generator=generator) for _ in range(count)]


def losses(model, optimizer, loss_fn, batches):
    values = []
    for batch in batches:
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("make", "loss_fn", "batches"),
    [(mlp, mse, regression_batches), (Attention, next_token, token_batches)],
    ids=["mlp", "attention"],
)
def test_losses_of_the_package_mup(name, make, loss_fn, batches):
    mup = pytest.importorskip("mup")
    ours_class, theirs_class, settings = OPTIMIZERS[name]
    torch.manual_seed(0)
    theirs = make(64, mup.MuReadout)
    ours = make(64)
    ours.load_state_dict(theirs.state_dict())  # a plain state: no multiplier in it
    mup.set_base_shapes(theirs, make(16, mup.MuReadout), delta=make(24, mup.MuReadout))
    scaling = parametrize(ours, make(16), make(24))
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    lr, weight_decay = settings["lr"], settings["weight_decay"]
    momentum = {"momentum": settings["momentum"]} if "momentum" in settings else {}
    groups = scaling.param_groups(ours, name, lr, weight_decay=weight_decay)
    one = losses(ours, ours_class(groups, **momentum), loss_fn, batches(8))
    other = losses(theirs, getattr(mup, theirs_class)(theirs.parameters(), **settings), loss_fn, batches(8))
    assert one[-1] != one[0]
    # float32: readouts divide in another order, so that logits differ by rounding
    assert one == pytest.approx(other, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_at_the_base_width_nothing_changes(optimizer):
    torch.manual_seed(1)
    model = mlp(16)
    before = copy.deepcopy(model.state_dict())
    scaling = parametrize(model, mlp(16), mlp(17))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (group,) = scaling.param_groups(model, optimizer, 0.3, weight_decay=0.1)
    assert (group["lr"], group["weight_decay"], group["lr_mult"]) == (0.3, 0.1, 1.0)


def test_multipliers_of_each_kind():
    model = mlp(64)
    scaling = parametrize(model, mlp(16))  # no delta: what differs is width
    kinds = {name: scale.kind for name, scale in scaling.scales.items()}
    assert kinds == {
        "0.weight": "vector",
        "0.bias": "vector",
        "2.weight": "matrix",
        "2.bias": "vector",
        "4.weight": "vector",
        "4.bias": "fixed",
    }
    sgd = {n: s.lr_multiplier("sgd") for n, s in scaling.scales.items()}
    assert sgd == {"0.weight": 4, "0.bias": 4, "2.weight": 1, "2.bias": 4, "4.weight": 4, "4.bias": 1}
    adam = {n: s.lr_multiplier("adam") for n, s in scaling.scales.items()}
    assert adam == {"0.weight": 1, "0.bias": 1, "2.weight": 0.25, "2.bias": 1, "4.weight": 1, "4.bias": 1}
    assert model[4].width_mult == 4.0 and type(model[4].width_mult) is float


def test_own_groups_keep_their_settings():
    model = mlp(32)
    scaling = parametrize(model, mlp(16))
    biases = [w for n, w in model.named_parameters() if n.endswith("bias")]
    weights = [w for n, w in model.named_parameters() if n.endswith("weight")]
    groups = scaling.param_groups(
        model,
        "adamw",
        0.01,
        weight_decay=0.1,
        groups=[
            {"params": biases, "weight_decay": 0.0, "betas": (0.8, 0.9)},
            {"params": iter(weights), "lr": 0.02},
        ],
    )
    assert sum(len(g["params"]) for g in groups) == 6
    assert {(g["lr"], g["weight_decay"]) for g in groups} == {(0.01, 0.0), (0.02, 0.1), (0.01, 0.2)}
    assert all(type(g[key]) is float for g in groups for key in ("lr", "weight_decay", "lr_mult"))
    torch.optim.AdamW(groups)
    with pytest.raises(InvalidArgument, match="parameters of the model"):
        scaling.param_groups(model, "sgd", 0.1, groups=[{"params": [nn.Parameter(torch.ones(3))]}])
    with pytest.raises(InvalidArgument, match="one of"):
        scaling.param_groups(model, "lion", 0.1)
    with pytest.raises(InvalidArgument, match="at least 0"):
        scaling.param_groups(model, "sgd", -0.1)


def test_base_shape_files_are_those_of_mup(tmp_path):
    mup = pytest.importorskip("mup")
    theirs = tmp_path / "theirs.bsh"
    mup.make_base_shapes(mlp(16, mup.MuReadout), mlp(24, mup.MuReadout), savefile=str(theirs))
    shapes = BaseShapes.between(mlp(16), mlp(24))
    assert BaseShapes.load(theirs) == shapes
    assert shapes.dims["2.weight"] == (32, 16) and shapes.dims["4.weight"] == (None, 32)
    ours = tmp_path / "ours.bsh"
    shapes.save(ours)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["ours.bsh", "theirs.bsh"]
    model = mup.set_base_shapes(mlp(64, mup.MuReadout), str(ours))
    assert model[4].width_mult() == 4
    assert parametrize(mlp(64), ours).scales == parametrize(mlp(64), mlp(16), mlp(24)).scales


def test_damaged_base_shape_files(tmp_path):
    for number, text in enumerate(("[1, 2]", "a: [1, x]", "a: 3", "a: [0]", "{", "a: [-1]")):
        path = tmp_path / f"{number}.bsh"
        path.write_text(text)
        with pytest.raises(CheckpointError):
            BaseShapes.load(path)
    with pytest.raises(CheckpointError):
        BaseShapes.load(tmp_path / "none.bsh")
    with pytest.raises(OutputError):
        BaseShapes({}).save(tmp_path / "no" / "folder.bsh")


def test_shapes_come_from_models_without_memory():
    with torch.device("meta"):
        base, delta = mlp(16), mlp(24)
    assert parametrize(mlp(64), base, delta).base_shapes == BaseShapes.between(mlp(16), mlp(24))


def test_saving_and_going_on(tmp_path):
    batches = regression_batches(6)

    def new():
        torch.manual_seed(3)
        model = mlp(64)
        scaling = parametrize(model, mlp(16))
        return model, torch.optim.Adam(scaling.param_groups(model, "adam", 0.01))

    model, optimizer = new()
    losses(model, optimizer, mse, batches[:3])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    expected = losses(model, optimizer, mse, batches[3:])

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = mlp(64)
    other.load_state_dict(saved["model"])
    assert torch.equal(other[4].weight, saved["model"]["4.weight"])
    scaling = parametrize(other, mlp(16), initialized="loaded")
    assert torch.equal(other[4].weight, saved["model"]["4.weight"])
    again = torch.optim.Adam(scaling.param_groups(other, "adam", 1.0))  # rates come from the state
    again.load_state_dict(saved["optimizer"])
    assert losses(other, again, mse, batches[3:]) == expected


def test_a_saved_readout_computes_what_it_computed():
    model = mlp(64)
    parametrize(model, mlp(16))
    x = torch.randn(5, 6)
    fresh = mlp(64)
    fresh.load_state_dict(model.state_dict())  # not parametrized: the multiplier is in the state
    assert torch.equal(fresh(x), model(x))
    plain = mlp(64, nn.Linear)
    plain.load_state_dict(nn.Sequential(*model[:4], model[4].folded()).state_dict())
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-6)


def test_parametrizing_twice_is_refused():
    model = mlp(64)
    parametrize(model, mlp(16))
    with pytest.raises(ModelError, match="before"):
        parametrize(model, mlp(16))


def test_what_mup_can_not_do_is_refused():
    with pytest.raises(ModelError, match="MuReadout"):
        parametrize(mlp(64, nn.Linear), mlp(16, nn.Linear))
    with pytest.raises(InvalidArgument, match="delta"):
        parametrize(mlp(16), mlp(16))
    with pytest.raises(ModelError, match="width only"):
        parametrize(nn.Sequential(*mlp(64), nn.Linear(3, 3)), mlp(16))
    with pytest.raises(ModelError, match="base and delta agree"):
        parametrize(mlp(64, inputs=7), mlp(16), mlp(24))
    with pytest.raises(InvalidArgument, match="one of"):
        parametrize(mlp(64), mlp(16), initialized="kaiming")
    with pytest.raises(InvalidArgument, match="one of the two"):
        parametrize(mlp(64), BaseShapes.between(mlp(16), mlp(24)), mlp(24))
    with pytest.raises(InvalidArgument, match="a module"):
        parametrize(mlp(64), 16)

    class Cube(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(n, n, n))

    with pytest.raises(ModelError, match="at most 2"):
        parametrize(Cube(4), Cube(2))


def test_convolutions_and_experts():
    def make(width):
        net = nn.ModuleDict(
            {
                "conv": nn.Conv2d(3, width, 3),
                "inner": nn.Conv2d(width, 2 * width, 3),
                "head": MuReadout(2 * width, 5),
            }
        )
        net.experts = nn.Parameter(torch.ones(4, 2 * width, width))
        return net

    model, plain = make(8), make(8)
    plain.load_state_dict(model.state_dict())
    scaling = parametrize(model, make(4), make(5))
    assert scaling.scales["inner.weight"].kind == scaling.scales["experts"].kind == "matrix"
    assert scaling.scales["inner.weight"].lr_multiplier("adam") == 0.5
    assert scaling.scales["experts"].lr_multiplier("adam") == 0.5
    torch.testing.assert_close(model["inner"].bias, plain["inner"].bias * math.sqrt(2))
    torch.testing.assert_close(model["conv"].bias, plain["conv"].bias)


def test_tied_readout_keeps_the_embedding():
    class Tied(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed = nn.Embedding(7, width)
            self.head = MuReadout(width, 7, bias=False)
            self.head.weight = self.embed.weight

    model = Tied(32)
    before = model.embed.weight.detach().clone()
    scaling = parametrize(model, Tied(8))
    assert torch.equal(model.embed.weight, before) and model.head.width_mult == 4
    assert set(scaling.scales) == {"embed.weight"}


def llama(width, layers=2, tie=False, seed=0):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=tie,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("tie", [False, True])
def test_hugging_face_llama(tie):
    model, plain = llama(64, tie=tie), llama(64, tie=tie)
    base = llama(16, tie=tie)
    scaling = parametrize(model, base, initialized="constant", convert_readouts=True)
    assert scale_attention(model, base) == scale_attention(model, base) == 2
    layer = model.model.layers[0]
    assert layer.self_attn.scaling == pytest.approx(math.sqrt(8) / 32)
    assert isinstance(model.lm_head, MuReadout) and model.lm_head.width_mult == 4
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tie
    torch.testing.assert_close(layer.mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight / 2)
    torch.testing.assert_close(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    if not tie:
        torch.testing.assert_close(model.lm_head.weight, plain.lm_head.weight)
    tokens = torch.randint(31, (2, 8))
    optimizer = torch.optim.AdamW(scaling.param_groups(model, "adamw", 1e-2, weight_decay=0.1))

    def loss_fn(network, batch):
        return network(input_ids=batch, labels=batch).loss

    values = losses(model, optimizer, loss_fn, [tokens] * 6)
    assert values[-1] < values[0]
    with pytest.raises(ModelError, match="width only"):
        parametrize(llama(64, layers=3), llama(16), initialized="constant", convert_readouts=True)


def test_wrapped_models_keep_their_groups():
    model = mlp(64)
    scaling = parametrize(model, mlp(16))

    class DistributedLike(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner

    expected = [(g["lr"], len(g["params"])) for g in scaling.param_groups(model, "adam", 0.1)]
    for wrapped in (DistributedLike(model), torch.compile(model, backend="eager")):
        groups = scaling.param_groups(wrapped, "adam", 0.1)
        assert [(g["lr"], len(g["params"])) for g in groups] == expected


def test_compiled_in_one_graph():
    model = mlp(32)
    parametrize(model, mlp(16))
    x = torch.randn(4, 6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_deep_copies_keep_the_scaling():
    model = mlp(64)
    parametrize(model, mlp(16))
    twin = copy.deepcopy(model)
    x = torch.randn(3, 6)
    assert torch.equal(twin(x), model(x))
    with pytest.raises(ModelError, match="before"):
        parametrize(twin, mlp(16))


def test_zero_readout_and_output_multiplier():
    readout = MuReadout(8, 3, zero_init=True)
    assert readout(torch.randn(2, 8)).abs().max() == 0
    linear = nn.Linear(8, 3)
    doubled = MuReadout.of(linear, output_mult=2.0)
    x = torch.randn(4, 8)
    torch.testing.assert_close(doubled(x), 2 * (linear(x) - linear.bias) + linear.bias)
    assert doubled.weight is linear.weight and "output_mult=2" in repr(doubled)


def coordinates(parametrization, optimizer_name, widths=(32, 128, 512), seeds=(0, 1, 2)):
    def make(width, seed):
        torch.manual_seed(seed)
        if parametrization == "mup":
            model = Attention(width, heads=2, base_head_dim=16)
            nn.init.zeros_(model.head.weight)  # no initial output, whose gradients would fall as width^(-1/2)
            scaling = parametrize(model, Attention(32), Attention(48))
            if optimizer_name == "sgd":
                return model, torch.optim.SGD(scaling.param_groups(model, "sgd", 0.1))
            return model, torch.optim.Adam(scaling.param_groups(model, "adam", 3e-3))
        model = Attention(width, nn.Linear)
        model.scale = (width // 2) ** -0.5
        return model, torch.optim.Adam(model.parameters(), 3e-3)

    batches = token_batches(3, rows=8)
    return coord_check(make, next_token, batches, widths, seeds=seeds)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_coordinate_check_is_flat_in_mup(optimizer):
    check = coordinates("mup", optimizer)
    slopes = check.slopes("change")
    assert set(slopes) == {"embed", "norm", "qkv", "out", "feed.0", "feed.1", "feed.2", "feed.3", "head"}
    # widths to 512 and three seeds: finite-width terms leave some hundredths
    assert max(abs(slope) for slope in slopes.values()) < 0.15, slopes
    assert all(abs(s) < 0.1 for name, s in check.slopes("size", 0).items() if name != "head")


def test_coordinate_check_shows_the_standard_parametrization_blow_up():
    slopes = coordinates("sp", "adam").slopes("change")
    assert slopes["head"] > 0.4 and slopes["feed.3"] > 0.4


def test_coordinate_table_and_bad_arguments():
    check = coordinates("mup", "adam", widths=(8, 16), seeds=(0,))
    assert {row["step"] for row in check.rows} == {0, 1, 2, 3}
    assert all(row["change"] == 0 for row in check.rows if row["step"] == 0)
    lines = check.table().splitlines()
    assert lines[0].split() == ["module", "8", "16", "slope"] and len(lines) == 10
    assert all(math.isnan(slope) for slope in check.slopes("change", 0).values())
    with pytest.raises(InvalidArgument, match="'size' or 'change'"):
        check.slopes("norm")
    with pytest.raises(InvalidArgument, match="two widths"):
        coord_check(lambda w, s: None, next_token, [1], [8])


def test_attention_scale():
    assert attention_scale(64, 64) == pytest.approx(64**-0.5)
    assert attention_scale(128, 64) == pytest.approx(64**-0.5 / 2)
    with pytest.raises(InvalidArgument):
        attention_scale(0, 1)
    with pytest.raises(ModelError, match="attention_scale"):
        scale_attention(mlp(8), mlp(8))


def test_scaling_is_plain_data():
    scaling = parametrize(mlp(64), mlp(16))
    assert isinstance(scaling, WidthScaling)
    assert copy.deepcopy(scaling) == scaling

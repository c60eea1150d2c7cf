import copy
import itertools
import math
import warnings

import pytest
import torch
from torch import nn

from tensormill.errors import CheckpointError, InvalidArgument, ModelError
from tensormill.numerics.snnk import (
    URF,
    ReLUFeatures,
    RidgeRegression,
    SNNKAdapter,
    SNNKLinear,
    adapter_parameters,
    arc_cosine_kernel,
    attach,
    bundle,
    detach,
    load_adapters,
    random_features,
    save_adapters,
    spectrum_of,
)


class Cosine(nn.Module):
    activation_name = "cos"

    def forward(self, x):
        return x.cos()


def small_linear(d, out, seed=0, scale=0.5):
    torch.manual_seed(seed)
    linear = nn.Linear(d, out)
    with torch.no_grad():
        linear.weight.mul_(scale)
    return linear


# layer


@pytest.mark.filterwarnings("ignore:inputs of length")
@pytest.mark.parametrize("activation", ["cos", "sin", "tanh", "gelu"])
def test_from_linear_converges_to_the_layer(activation):
    linear = small_linear(8, 5, scale=0.7)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)) * 0.3
    truth = spectrum_of(activation)(linear(x).detach().double())
    errors = []
    for m in (1 << 8, 1 << 10, 1 << 12, 1 << 14):
        layer = SNNKLinear.from_linear(linear, activation, m, inputs=x, projection="orthogonal", seed=3)
        errors.append(float((layer(x).detach().double() - truth).square().mean().sqrt()))
    assert errors[-1] < 0.3 * errors[0] and errors[-1] < 0.05
    assert layer.weight.shape == (5, 2 << 14) and layer.weight.dtype == torch.float32


def test_relu_layer_is_the_arc_cosine_layer():
    linear = small_linear(6, 4, scale=1.0)
    layer = SNNKLinear.from_linear(linear, "relu", 1 << 14)
    x = torch.randn(10, 6)
    ones = torch.cat([x, torch.ones(10, 1)], -1)
    expected = arc_cosine_kernel(ones, torch.cat([linear.weight, linear.bias[:, None]], -1))
    torch.testing.assert_close(layer(x), expected, rtol=0.05, atol=0.02)


def test_layer_forms_and_gradients():
    layer = SNNKLinear(6, 3, URF(6, 4, "cos", dtype=torch.float64), dtype=torch.float64)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(layer(x)[1], layer(x[1]))
    assert torch.autograd.gradcheck(
        lambda v, w: torch.func.functional_call(layer, {"weight": w}, v), (x, layer.weight)
    )
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert SNNKLinear(6, 3, 16, init="zero")(torch.randn(4, 6)).abs().max() == 0
    a, b = (SNNKLinear(6, 3, 16, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a.weight, b.weight)


@pytest.mark.parametrize("bias", [True, False])
def test_absorbs_the_linear_layer_behind(bias):
    layer, linear = SNNKLinear(6, 12, 5, bias=bias), nn.Linear(12, 3, bias=bias)
    if bias:
        nn.init.normal_(layer.bias)
    merged, x = layer.absorb(linear), torch.randn(4, 2, 6)
    torch.testing.assert_close(merged(x), linear(layer(x)), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in merged.parameters()) == 3 * 5 + 3
    with pytest.raises(InvalidArgument, match="12 inputs"):
        layer.absorb(nn.Linear(6, 12))


@pytest.mark.parametrize("features", ["relu", "cos"])
def test_layer_is_saved_with_its_draws(tmp_path, features):
    from safetensors.torch import load_file, save_file

    one, other = (
        SNNKLinear(6, 3, random_features(6, 8, features, projection="hadamard", seed=s)) for s in (1, 2)
    )
    save_file({k: v.contiguous() for k, v in one.state_dict().items()}, tmp_path / "layer.safetensors")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(7, 6)
    assert torch.equal(one(x), other(x))


def test_warns_where_the_estimate_is_noise():
    linear = small_linear(16, 4, scale=5.0)
    with pytest.warns(UserWarning, match="predicted standard deviation"):
        SNNKLinear.from_linear(linear, "cos", 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SNNKLinear.from_linear(linear, "relu", 64)
        SNNKLinear.from_linear(small_linear(16, 4, scale=0.1), "cos", 64, inputs=torch.randn(9, 16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SNNKLinear(4, 0, 8), "out_features=0"),
        (lambda: SNNKLinear(4, 2, 8, init="ones"), "'zero'"),
        (lambda: SNNKLinear(4, 2, ReLUFeatures(5, 8)), "5 inputs"),
        (lambda: SNNKLinear.from_linear(nn.Conv1d(1, 1, 1), "cos"), "nn.Linear"),
        (lambda: SNNKLinear.from_linear(nn.Linear(4, 2), "cos", inputs=torch.zeros(3, 5)), "inputs"),
    ],
)
def test_layer_refuses(make, message):
    with pytest.raises(InvalidArgument, match=message):
        make()


# closed form and bundling


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.1, 10.0])
def test_ridge_is_scikit_learns(intercept, ridge):
    from sklearn.linear_model import Ridge

    generator = torch.Generator().manual_seed(0)
    f = torch.randn(200, 12, generator=generator, dtype=torch.float64) + 5
    y = torch.randn(200, 3, generator=generator, dtype=torch.float64) - 2
    solver = RidgeRegression(intercept)
    for start in range(0, 200, 37):
        solver.update(f[start : start + 37], y[start : start + 37])
    weight, bias = solver.solve(ridge)
    peer = Ridge(alpha=ridge, fit_intercept=intercept, solver="svd").fit(f.numpy(), y.numpy())
    torch.testing.assert_close(weight, torch.as_tensor(peer.coef_), rtol=1e-8, atol=1e-9)
    expected = torch.as_tensor(peer.intercept_, dtype=torch.float64).expand(3)
    torch.testing.assert_close(bias, expected, rtol=1e-8, atol=1e-8)


def test_products_in_float32():
    generator = torch.Generator().manual_seed(0)
    f, y = torch.randn(300, 20, generator=generator), torch.randn(300, 2, generator=generator)
    solvers = [RidgeRegression(products=dtype) for dtype in (torch.float32, torch.float64)]
    for solver in solvers:
        solver.update(f, y)
    torch.testing.assert_close(*(solver.solve(0.1)[0] for solver in solvers), rtol=0, atol=1e-5)


def test_ridge_refuses():
    solver = RidgeRegression()
    with pytest.raises(InvalidArgument, match="no rows"):
        solver.solve()
    f = torch.randn(50, 4)
    solver.update(torch.cat([f, f[:, :1]], -1), torch.randn(50, 1))
    with pytest.raises(InvalidArgument, match="linearly dependent"):
        solver.solve(0.0)
    solver.solve(1e-3)
    with pytest.raises(InvalidArgument, match="bfloat16"):
        RidgeRegression(products=torch.bfloat16)
    with pytest.raises(InvalidArgument, match="ridge=-1"):
        solver.solve(-1.0)
    with pytest.raises(InvalidArgument, match="as in the batches before"):
        solver.update(f, torch.randn(50, 1))
    with pytest.raises(InvalidArgument, match=r"\(n, p\)"):
        solver.update(f, torch.randn(49, 1))


def network(*sizes, activation=Cosine, seed=0, scale=0.6):
    modules = []
    for index, (a, b) in enumerate(itertools.pairwise(sizes)):
        modules += [small_linear(a, b, seed + index, scale), activation()]
    return nn.Sequential(*modules[:-1])


def test_bundle_of_one_layer_is_the_layer():
    net = network(6, 5, 3)
    x = torch.randn(40, 6) * 0.4
    bundled = bundle(net, 64, seed=4, norms=(1.0, 1.0))
    layer = SNNKLinear.from_linear(
        net[0], "cos", 64, seed=4, projection="orthogonal", norms=(1.0, 1.0), split="phase"
    )
    torch.testing.assert_close(bundled(x), net[2](layer(x)), rtol=1e-4, atol=1e-5)
    assert {name for name, _ in bundled.named_parameters()} == {"weight", "bias"}
    assert bundled.layer_errors == ()


def test_bundle_estimates_the_network():
    net = network(6, 8, 3)
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(2)) * 0.3
    errors = []
    for m in (64, 1024, 1 << 14):
        bundled = bundle(net, m, calibration=x)
        errors.append(float((bundled(x) - net(x)).detach().square().mean().sqrt()))
        assert len(bundled.layer_errors) == 1
    assert errors[2] < 0.5 * errors[0] and errors[2] < 0.02


def test_linear_layers_in_a_row_are_one():
    net = nn.Sequential(
        small_linear(5, 7, 0),
        nn.Dropout(),
        small_linear(7, 4, 1),
        Cosine(),
        small_linear(4, 6, 2),
        small_linear(6, 2, 3),
    )
    merged = nn.Sequential(nn.Linear(5, 4), Cosine(), nn.Linear(4, 2))
    with torch.no_grad():
        for target, (first, second) in ((merged[0], (net[0], net[2])), (merged[2], (net[4], net[5]))):
            target.weight.copy_(second.weight @ first.weight)
            target.bias.copy_(second.weight @ first.bias + second.bias)
    x = torch.randn(9, 5) * 0.3
    torch.testing.assert_close(
        bundle(net, 32, norms=(1.0, 1.0))(x), bundle(merged, 32, norms=(1.0, 1.0))(x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, Cosine])
def test_fit_of_a_deep_bundle(activation):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(600, 5, generator=generator)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs()], -1)
    net = network(5, 12, 12, 2, activation=activation)
    bundled = bundle(net, [96, 128], calibration=x[:400], scaling="per_input")
    features = bundled.feature_map(x[:400])
    assert float(features.square().sum(-1).mean().sqrt()) == pytest.approx(1.0, rel=1e-3)
    bundled.fit(x[:400], y[:400], ridge=1e-4, batch_size=77)

    def mse(net):
        return float((net(x[400:]).detach() - y[400:]).square().mean())

    assert mse(bundled) < 0.7 * float(y[400:].var(0).mean())
    streamed = copy.deepcopy(bundled).fit(zip(x[:400].split(50), y[:400].split(50), strict=True), ridge=1e-4)
    torch.testing.assert_close(streamed.weight, bundled.weight, rtol=1e-3, atol=1e-3)
    # the optimum: no other matrix does better on the penalized loss
    loss = lambda w: (features @ w.T + bundled.bias - y[:400]).square().sum() + 1e-4 * w.square().sum()  # noqa: E731
    w = bundled.weight.detach()
    assert all(loss(w) <= loss(w + 0.03 * w.std() * torch.randn_like(w)) for _ in range(5))


def test_errors_of_a_deep_bundle_are_told():
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(1)) * 0.2
    errors = [bundle(network(5, 6, 2), 4096, calibration=x).layer_errors]
    with pytest.warns(UserWarning, match="per_input"):
        errors.append(bundle(network(5, 12, 12, 2, scale=2.0), 64, calibration=5 * x).layer_errors)
    assert errors[0][0] < 0.1 and len(errors[1]) == 2 and not errors[1][1] <= 1


def test_bundle_is_saved(tmp_path):
    from safetensors.torch import load_file, save_file

    x = torch.randn(20, 4)
    one, other = (bundle(network(4, 6, 2), 16, calibration=x, seed=s) for s in (0, 1))
    save_file(one.state_dict(), tmp_path / "net.safetensors")
    other.load_state_dict(load_file(tmp_path / "net.safetensors"))
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: bundle(nn.Linear(2, 2), 4), ModelError, "nn.Sequential"),
        (lambda: bundle(nn.Sequential(nn.Linear(2, 2)), 4), ModelError, "activation"),
        (lambda: bundle(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 4), ModelError, "BatchNorm1d at position 1"),
        (lambda: bundle(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), 4), ModelError, "position 0"),
        (lambda: bundle(network(2, 3, 2), 4, scaling="none"), InvalidArgument, "per_input"),
        (lambda: bundle(network(2, 3, 2), [4, 4]), InvalidArgument, "2 numbers"),
        (lambda: bundle(network(2, 3, 2), 4).fit(torch.zeros(3, 2), torch.zeros(3, 5)), InvalidArgument, "targets"),
        (lambda: bundle(network(2, 3, 2), 4).fit(torch.zeros(3, 2)), InvalidArgument, "without targets"),
        (lambda: bundle(network(2, 3, 2), 4).fit([], torch.zeros(3, 2)), InvalidArgument, "within the batches"),
        (lambda: bundle(network(2, 3, 2), 4).fit(torch.zeros(3, 2), torch.zeros(3, 2), batch_size=0), InvalidArgument, "0"),
    ],
)  # fmt: skip
def test_bundle_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


# adapters


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        x = x + self.attention(x, x, x)[0]
        return x + self.mlp(x)


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Block(), Block(), nn.Linear(8, 3))


EVERYWHERE = r"\d+\.(mlp|attention)"


@pytest.mark.parametrize(
    "options",
    [{}, {"init": "weight"}, {"down": 4}, {"feature": "sin"}, {"feature": "cos", "projection": "hadamard"}],
)
def test_attach_starts_as_the_model_and_trains(options):
    torch.manual_seed(1)
    x, y = torch.randn(32, 5, 8), torch.randn(32, 5, 3)
    plain, net = model(), model()
    names = attach(net, EVERYWHERE, 6, **options)
    assert names == ["0.attention", "0.mlp", "1.attention", "1.mlp"]
    torch.testing.assert_close(net(x), plain(x), rtol=0, atol=0)
    trained = adapter_parameters(net)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == set(trained)
    optimizer = torch.optim.Adam(trained.values(), 0.02)
    start = float((net(x) - y).detach().square().mean())
    for _ in range(30):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < start - 0.02
    state = net.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


def test_parameters_of_an_adapter():
    count = lambda adapter: sum(p.numel() for p in adapter.parameters())  # noqa: E731
    assert count(SNNKAdapter(64, 8)) == 64 * 8 + 64
    assert count(SNNKAdapter(64, 8, down=4)) == 4 * 8 + 4 * 64 + 64
    assert count(SNNKAdapter(64, 8, feature="sin")) == 64 * 16 + 64


def test_normalized_adapter_sees_the_direction_only():
    adapter = SNNKAdapter(8, 6, init="weight")
    nn.init.normal_(adapter.snnk.weight)
    x = torch.randn(3, 8)
    torch.testing.assert_close(adapter(10 * x) - 10 * x, adapter(x) - x, rtol=1e-4, atol=1e-4)
    small = SNNKAdapter(8, 6, normalize=None, init="weight")
    nn.init.normal_(small.snnk.weight)
    torch.testing.assert_close(small(10 * x), 10 * small(x), rtol=1e-4, atol=1e-4)  # ReLU features scale


def perturb(net, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(net).values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return net


def test_adapters_are_saved_loaded_copied_and_taken_off(tmp_path):
    x = torch.randn(4, 5, 8)
    plain, net = model(), model()
    attach(net, EVERYWHERE, 6, seed=5)
    perturb(net)
    expected = net(x)
    assert not torch.allclose(expected, plain(x))
    save_adapters(net, tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]

    other = model()
    assert load_adapters(other, tmp_path / "a.safetensors") == [
        "0.attention",
        "0.mlp",
        "1.attention",
        "1.mlp",
    ]
    assert torch.equal(other(x), expected)
    assert {n for n, p in other.named_parameters() if p.requires_grad} == set(adapter_parameters(other))

    whole = model(seed=9)  # the ordinary way: attach, then a state dict
    attach(whole, EVERYWHERE, 6, seed=77)
    whole.load_state_dict(net.state_dict())
    assert torch.equal(whole(x), expected)

    twin = copy.deepcopy(net)
    perturb(twin, 4)
    assert torch.equal(net(x), expected) and not torch.allclose(twin(x), expected)
    assert detach(twin) == 4 and torch.equal(twin(x), plain(x))
    assert torch.equal(net(x), expected) and detach(net) == 4 and detach(net) == 0


def test_attach_keeps_dtype_and_moves_with_the_model():
    net = model().double()
    attach(net, r"1\.mlp", 4)
    assert all(p.dtype == torch.float64 for p in net.parameters())
    assert net(torch.randn(2, 3, 8, dtype=torch.float64)).dtype == torch.float64
    assert net.bfloat16()(torch.randn(2, 3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    net = model()
    attach(net, r"1\.mlp", 4, train_too=r"2\.(weight|bias)")
    assert {n for n, p in net.named_parameters() if p.requires_grad} >= {"2.weight", "2.bias"}
    net = model()
    attach(net, r"1\.mlp", 4, freeze=False)
    assert all(p.requires_grad for p in net.parameters())


def test_adapters_of_a_language_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    net = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, 50, (2, 7))
    before = net(ids).logits
    assert len(attach(net, r"model\.layers\.\d+\.(mlp|self_attn)", 4)) == 4
    torch.testing.assert_close(net(ids).logits, before, rtol=0, atol=0)
    perturb(net)
    assert (net(ids).logits - before).abs().max() > 1e-3


def test_attach_compiles():
    net = model()
    attach(net, r"\d+\.mlp", 4)
    perturb(net)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(torch.compile(net, backend="eager")(x), net(x))


def test_adapters_refuse(tmp_path):
    net = model()
    with pytest.raises(InvalidArgument, match="matches no module, expected one such as: 0"):
        attach(net, "encoder", 4)
    with pytest.raises(InvalidArgument, match="regular expression"):
        attach(net, "(", 4)
    with pytest.raises(InvalidArgument, match="dim="):
        attach(nn.Sequential(nn.LayerNorm(4)), "0", 4)
    with pytest.raises(InvalidArgument, match="init"):
        SNNKAdapter(4, 4, init="ones")
    with pytest.raises(InvalidArgument, match="normalize"):
        SNNKAdapter(4, 4, normalize="unit")
    with pytest.raises(InvalidArgument, match="without adapters"):
        save_adapters(net, tmp_path / "a")
    attach(net, r"0\.mlp", 4)
    with pytest.raises(ModelError, match="detach"):
        attach(net, r"0\.mlp", 4)
    save_adapters(net, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"0\.mlp"):
        load_adapters(nn.Sequential(nn.Linear(8, 3)), tmp_path / "a")
    (tmp_path / "b").write_bytes(b"nonsense")
    for path in (tmp_path / "b", tmp_path / "c"):
        with pytest.raises(CheckpointError, match="save_adapters"):
            load_adapters(model(), path)
    bare = nn.Sequential(nn.LSTM(4, 4))
    attach(bare, "0", 4, dim=4, feature=spectrum_of("cos"))
    bare(torch.zeros(1, 2, 4))
    with pytest.raises(InvalidArgument, match="by name"):
        save_adapters(bare, tmp_path / "d")
    assert math.isfinite(float(adapter_parameters(bare)["0.adapter.gain"].detach().sum()))

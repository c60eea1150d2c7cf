"""The spine: registration, dispatch and its overrides, tolerances that catch planted errors."""

import pytest
import torch

from tensormill.errors import BackendError, InvalidArgument
from tensormill.operator import (
    ENVIRONMENT_VARIABLE,
    OPERATORS,
    Operator,
    Sample,
    _dispatcher_is_needed,
    use_implementation,
)
from tensormill.ops.correctness import deviation
from tensormill.roofline import Cost


@pytest.fixture(scope="module")
def doubled():
    """An operator with a reference, one implementation for even lengths, and one that can't run anywhere."""
    name = "test_doubled"
    if name in OPERATORS:
        return OPERATORS[name]
    operator = Operator(
        name,
        schema="(Tensor x) -> Tensor",
        reference=lambda x: x * 2,
        fake=lambda x: torch.empty_like(x),
        cost=lambda shape: Cost({"fp32": shape["n"]}, 4 * shape["n"], 4 * shape["n"]),
        inputs=lambda shape, device, g: (torch.randn(shape["n"], generator=g, device=device),),
        samples=[Sample("small", {"n": 8}, benchmark=True)],
        differentiable=(0,),
        setup_context=lambda ctx, inputs, output: None,
        backward=lambda ctx, gradient: 2 * gradient,
    )
    operator.implementation(
        "cpu", devices=("cpu",), entry=lambda x: x + x, supports=lambda x: x.numel() % 2 == 0
    )
    operator.implementation("cuda", devices=("cuda",), entry="nowhere:nothing", missing=lambda: "no kernel")
    yield operator
    del OPERATORS[name]


def test_dispatch_takes_the_first_that_supports_the_call(doubled):
    assert doubled.select(torch.ones(4)).name == "cpu"
    assert doubled.select(torch.ones(3)).name == "reference"
    assert torch.equal(doubled(torch.ones(3)), torch.full((3,), 2.0))


def test_override_by_context_manager(doubled):
    with use_implementation(test_doubled="reference"):
        assert doubled.select(torch.ones(4)).name == "reference"
        with use_implementation("cpu"):
            assert doubled.select(torch.ones(4)).name == "cpu"
    assert doubled.select(torch.ones(4)).name == "cpu"


def test_override_by_environment(doubled, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "test_doubled=reference")
    assert doubled.select(torch.ones(4)).name == "reference"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert doubled.select(torch.ones(4)).name == "reference"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")  # for all operators that have one; this one has none
    assert doubled.select(torch.ones(4)).name == "cpu"


def test_an_override_that_can_not_be_met_is_an_error_and_not_a_fallback(doubled):
    with use_implementation(test_doubled="cpu"), pytest.raises(BackendError, match="does not support"):
        doubled(torch.ones(3))
    with use_implementation(test_doubled="cuda"), pytest.raises(BackendError, match="runs on cuda"):
        doubled(torch.ones(4))
    with (
        use_implementation(test_doubled="fpga"),
        pytest.raises(BackendError, match="no implementation 'fpga'"),
    ):
        doubled(torch.ones(4))


def test_gradients_and_compile(doubled):
    x = torch.randn(6, requires_grad=True)
    torch.compile(lambda v: doubled(v).sum(), fullgraph=True, backend="aot_eager")(x).backward()
    assert torch.equal(x.grad, torch.full((6,), 2.0))


def test_a_name_is_defined_once(doubled):
    with pytest.raises(InvalidArgument, match="already defined"):
        Operator(
            "test_doubled",
            schema="(Tensor x) -> Tensor",
            reference=None,
            fake=None,
            cost=None,
            inputs=None,
            samples=[],
        )


@pytest.mark.parametrize(
    "plant",
    [
        lambda y: y * 1.01,  # a wrong scale
        lambda y: torch.cat([y[:-1], torch.zeros_like(y[-1:])]),  # a dropped tail
        lambda y: y.roll(1),  # off by one
        lambda y: torch.where(torch.arange(len(y)) == 5, float("nan"), y),  # an element nobody wrote
        lambda y: y[:-1],  # a wrong shape
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_planted_errors_are_caught(plant, dtype):
    torch.manual_seed(0)
    expected = torch.randn(4096, dtype=torch.float64)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
    assert deviation(expected.to(dtype), expected, tolerance) is None
    assert deviation(plant(expected.to(dtype)), expected, tolerance) is not None


def test_one_wrong_element_in_a_million_shows():
    expected = torch.randn(1_000_000, dtype=torch.float64)
    actual = expected.float()
    actual[123_456] += 0.01
    assert deviation(actual, expected, 1e-5) is not None


def test_integers_must_be_equal():
    assert deviation(torch.tensor([1, 2]), torch.tensor([1, 2]), 0.0) is None
    assert "1 of 2" in deviation(torch.tensor([1, 3]), torch.tensor([1, 2]), 0.0)


def test_the_dispatcher_is_passed_by_only_where_it_has_nothing_to_do(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    from tensormill.ops import OPERATORS

    operator = OPERATORS["hadamard_transform"]
    calls = []
    overload = operator.overload
    monkeypatch.setattr(operator, "overload", lambda *arguments: calls.append(1) or overload(*arguments))
    x = torch.randn(3, 8)
    arguments = operator.inputs(operator.shape_defaults, torch.device("cpu"), torch.Generator())[1:]
    operator(x, *arguments)
    assert not calls
    with torch.no_grad():
        operator(torch.nn.Parameter(x), *arguments)
    assert not calls
    operator(torch.nn.Parameter(x), *arguments)
    with FlopCounterMode(display=False):
        operator(x, *arguments)
    inside = []
    torch.func.vmap(lambda row: inside.append(_dispatcher_is_needed((row,))) or row)(x)
    assert inside == [True]
    with torch._subclasses.FakeTensorMode() as mode:
        assert operator(mode.from_tensor(x), *arguments).shape == x.shape
    assert len(calls) == 3
    assert operator(torch.nn.Parameter(x), *arguments).requires_grad

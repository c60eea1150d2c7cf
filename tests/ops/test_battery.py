"""Every operator x implementation x sample against the reference in float64: nothing to write for a new one.

Run with TRITON_INTERPRET=1 the Triton kernels run interpreted, on CPU tensors (test_interpreted.py does that in
a process of its own).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensormill.operator import Implementation, Operator, Sample, interpreting, use_implementation
from tensormill.ops import OPERATORS
from tensormill.ops.correctness import deviation, result_dtype, tensors, upcast

FEW = 8  # numbers in a gradient
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def cases() -> list:
    found = []
    for operator in OPERATORS.values():
        for implementation in operator.implementations:
            for device in DEVICES:
                emulated = implementation.name == "triton" and interpreting() and device == "cpu"
                if device not in implementation.devices and not emulated:
                    continue
                if interpreting() != emulated:  # the interpreted run is for Triton alone
                    continue
                for sample in operator.samples:
                    if sample.large and device == "cpu":
                        continue
                    marks = [pytest.mark.gpu] if device == "cuda" else []
                    name = f"{operator.name}-{implementation.name}-{device}-{sample.name}"
                    found.append(pytest.param(operator, implementation, device, sample, id=name, marks=marks))
    return found


def build(operator: Operator, sample: Sample, device: str) -> tuple:
    seed = torch.seed() & 0x7FFFFFFF
    print(f"seed {seed}")  # pytest shows it beside a failure
    generator = torch.Generator(device).manual_seed(seed)
    return operator.inputs(sample.shape, torch.device(device), generator)


def takes(implementation: Implementation, arguments: tuple) -> tuple | None:
    """The arguments as this implementation wants them, or None if it does not take them here."""
    if implementation.missing() is not None:
        return None
    prepared = implementation.prepare(*arguments) if implementation.prepare else arguments
    if interpreting() and any(isinstance(a, Tensor) and a.dtype == torch.bfloat16 for a in prepared):
        return None  # the interpreter computes bf16 wrongly, silently
    return prepared if implementation.supports(*prepared) else None


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    wrong = deviation(actual, expected, tolerance)
    assert wrong is None, f"{what}: {wrong}"


@pytest.fixture
def poisoned():
    """torch.empty is filled with NaN, so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(("operator", "implementation", "device", "sample"), cases())
def test_forward_and_gradients(operator, implementation, device, sample, poisoned):
    canonical = build(operator, sample, device)
    arguments = takes(implementation, canonical)
    if arguments is None:
        pytest.skip(f"{implementation.name} does not take this sample here")
    kept = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    tolerance = operator.tolerance(result_dtype(canonical), sample.shape)
    with use_implementation(**{operator.name: implementation.name}):
        results = tensors(operator(*arguments))
        again = tensors(operator(*arguments))
    expected = tensors(operator.reference(*upcast(canonical)))
    for i, (actual, once_more, wanted) in enumerate(zip(results, again, expected, strict=True)):
        assert_close(actual, wanted, tolerance, f"output {i}")
        assert torch.equal(actual.nan_to_num(), once_more.nan_to_num()), "two runs differ"
    for before, after in zip(kept, arguments, strict=True):
        if isinstance(after, Tensor):
            assert torch.equal(before.nan_to_num(), after.nan_to_num()), "an input was changed"
    if operator.differentiable:
        check_gradients(operator, implementation, arguments, canonical, tolerance)


def check_gradients(operator, implementation, arguments, canonical, tolerance):
    dtype = result_dtype(canonical)
    wanted = [i for i in operator.differentiable if isinstance(canonical[i], Tensor)]
    # A gradient of few numbers can be near zero by chance, where no relative error means anything: such ones
    # are compared over several cotangents at once.
    draws = 1 if min(canonical[i].numel() for i in wanted) >= FEW else FEW

    def gradients(call, values):
        leaves = list(values)
        for i in wanted:
            leaves[i] = leaves[i].detach().clone().requires_grad_()
        outputs = [t for t in tensors(call(*leaves)) if t.requires_grad]
        generator = torch.Generator().manual_seed(7)  # the same cotangents, rounded alike, for both sides
        drawn = []
        for left in reversed(range(draws)):
            cotangents = [
                torch.randn(o.shape, generator=generator).to(dtype).to(o.device, o.dtype) for o in outputs
            ]
            drawn.append(
                torch.autograd.grad(outputs, [leaves[i] for i in wanted], cotangents, retain_graph=left > 0)
            )
        return [torch.stack(of_one) for of_one in zip(*drawn, strict=True)]

    with use_implementation(**{operator.name: implementation.name}):
        actual = gradients(operator, arguments)
    expected = gradients(operator.reference, upcast(canonical))
    for i, got, want in zip(wanted, actual, expected, strict=True):
        assert_close(got, want, 2 * tolerance, f"gradient of argument {i}")


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.skipif(interpreting(), reason="the interpreted run is for kernels alone")
def test_opcheck(operator):
    """Schema, fake kernel, autograd registration and AOT dispatch agree with the real kernel."""
    sample = min(
        (s for s in operator.samples if not s.large and s.kind != "extreme"), key=lambda s: s.kind != "tiny"
    )
    arguments = list(build(operator, sample, "cpu"))
    for i in operator.differentiable:
        if isinstance(arguments[i], Tensor):
            arguments[i] = arguments[i].float().requires_grad_()
    torch.library.opcheck(operator.overload, tuple(arguments))


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.skipif(interpreting(), reason="the interpreted run is for kernels alone")
def test_compiles(operator):
    """torch.compile traces through the operator without a graph break and gives the same result."""
    sample = next(s for s in operator.samples if not s.large)
    arguments = build(operator, sample, "cpu")
    torch._dynamo.reset()  # `twice` below is one piece of code, which may be compiled a few times only

    def twice(*values):
        return [t + t for t in tensors(operator(*values))]

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*arguments), twice(*arguments), strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS.keys())
def test_definition(operator):
    """Costs are positive, samples are named once and cover typical, ragged and tiny or extreme input."""
    names = [s.name for s in operator.samples]
    assert len(set(names)) == len(names)
    assert {"typical", "ragged"} <= {s.kind for s in operator.samples}
    assert any(s.benchmark for s in operator.samples)
    for sample in operator.samples:
        cost = operator.cost(sample.shape)
        assert cost.bytes_read >= 0 and cost.bytes_written >= 0
        assert all(n >= 0 for n in cost.operations.values())

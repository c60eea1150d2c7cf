"""The spine: everything that computes is an `Operator`, defined once.

An operator brings its schema, a reference that *is* its definition, its cost, its samples, and any number of
implementations. From these follow `torch.ops.tensormill.*` (with fake kernel and autograd, so `torch.compile`
and `torch.export` work), the dispatch, the correctness sweep, and the benchmark. A new operator is one folder
under `tensormill/ops`; a new kernel is one file beside its operator.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from tensormill.errors import BackendError, InvalidArgument
from tensormill.roofline import Cost

Shape = Mapping[str, Any]
SampleKind = Literal["typical", "ragged", "tiny", "extreme"]

ENVIRONMENT_VARIABLE = "TENSORMILL_IMPLEMENTATION"
OPERATORS: dict[str, Operator] = {}

_library = torch.library.Library("tensormill", "FRAGMENT")
_overrides: list[Mapping[str, str]] = []


@dataclass(frozen=True)
class Sample:
    """One input to check or time an operator on.

    Attributes:
        name: unique within the operator.
        shape: what `Operator.inputs` needs to build the arguments: sizes, dtypes (as strings), options.
        kind: "typical" (a size of a real model), "ragged", "tiny", or "extreme" (values, not sizes).
        benchmark: whether the benchmark times it by default.
        large: too slow for the interpreter and for the fast set of tests.
    """

    name: str
    shape: Shape
    kind: SampleKind = "typical"
    benchmark: bool = False
    large: bool = False


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Attributes:
        name: "reference", "cpu", "triton", "cuda"; unique within the operator.
        devices: device types whose tensors it takes.
        entry: the function, or "module:function", imported at the first call.
        supports: called with the operator's arguments; whether this implementation takes the call.
        missing: why it can't run on this machine, or None if it can.
        prepare: turns canonical arguments into this implementation's own (a repacked weight, say).
    """

    name: str
    devices: tuple[str, ...]
    entry: Callable[..., Any] | str
    supports: Callable[..., bool]
    missing: Callable[[], str | None]
    prepare: Callable[..., tuple[Any, ...]] | None = None

    @cached_property
    def function(self) -> Callable[..., Any]:
        if callable(self.entry):
            return self.entry
        module, _, name = self.entry.partition(":")
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return loaded


@dataclass(frozen=True)
class Peer:
    """Somebody else's implementation, to be timed beside ours.

    Attributes:
        name: the library and function, as users know it.
        devices: device types it runs on.
        make: called with the operator's arguments, returns a function of nothing that computes the result;
            packing and other preparation happens in `make`, outside the timing.
        missing: why it can't run on this machine, or None if it can.
        supports: whether it takes these arguments.
        tolerance: relative RMS error it is allowed against the reference before its time counts
            (a peer may use a coarser representation; None: ours).
    """

    name: str
    devices: tuple[str, ...]
    make: Callable[..., Callable[[], Any]]
    missing: Callable[[], str | None] = lambda: None
    supports: Callable[..., bool] = lambda *arguments: True
    tolerance: float | None = None


def requires(*modules: str) -> Callable[[], str | None]:
    """A `missing` predicate: importable modules (looked up without importing them)."""

    def missing() -> str | None:
        for module in modules:
            try:
                found = importlib.util.find_spec(module) is not None
            except (ImportError, ValueError):
                found = False
            if not found:
                return f"module {module} is not installed"
        return None

    return missing


def triton_missing() -> str | None:
    """Why Triton kernels can't run here, or None: they need Triton and a GPU, or Triton's interpreter."""
    if (reason := requires("triton")()) is not None:
        return reason
    if interpreting() or torch.cuda.is_available():
        return None
    return "no CUDA device"


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class Operator:
    """An operator: schema, reference, cost, samples and implementations.

    Args:
        name: the operator's name; it becomes `torch.ops.tensormill.<name>`.
        schema: torch.library schema without the name, e.g. `"(Tensor x, float scale) -> Tensor"`. Without
            default values: the public function supplies them.
        reference: the definition, in plain PyTorch; takes the schema's arguments on any device, and float64.
        fake: shapes and dtypes of the result without computing it.
        cost: from a sample's shape, the operations by unit and the bytes moved.
        inputs: `(shape, device, generator) -> arguments` builds the arguments of a sample.
        samples: what is checked, and what is timed.
        differentiable: positions of the arguments that have gradients.
        setup_context, backward: as for `torch.library.register_autograd`.
        reduction: length of the longest sum behind one output, from a sample's shape; scales the tolerance.
        exact: results are integers and must be equal.
        shape_defaults: shape of `bench --shape` for whatever is not given.
    """

    def __init__(
        self,
        name: str,
        *,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        cost: Callable[[Shape], Cost],
        inputs: Callable[[Shape, torch.device, torch.Generator], tuple[Any, ...]],
        samples: Sequence[Sample],
        differentiable: Sequence[int] = (),
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        reduction: Callable[[Shape], int] = lambda shape: 1,
        exact: bool = False,
        shape_defaults: Shape | None = None,
    ) -> None:
        if name in OPERATORS:
            raise InvalidArgument(f"operator {name!r} is already defined")
        self.name = name
        self.schema = schema
        self.reference = reference
        self.cost = cost
        self.inputs = inputs
        self.samples = tuple(samples)
        self.differentiable = tuple(differentiable)
        self.reduction = reduction
        self.exact = exact
        self.shape_defaults: Shape = shape_defaults if shape_defaults is not None else self.samples[0].shape
        self.peers: list[Peer] = []
        self.implementations: list[Implementation] = [
            Implementation("reference", ("cpu", "cuda"), reference, lambda *arguments: True, lambda: None)
        ]
        qualified = f"tensormill::{name}"
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, self._dispatch, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=_library)
        if backward is not None:
            torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
        self.overload = getattr(torch.ops.tensormill, name).default
        OPERATORS[name] = self

    def __call__(self, *arguments: Any) -> Any:
        """Compute, through torch's dispatcher (autograd, fake tensors, torch.compile) where it has work to do.

        Where it has none, it is passed by: it takes 25 microseconds, half of a small layer's time.
        """
        if torch.compiler.is_compiling() or _dispatcher_is_needed(arguments):
            return self.overload(*arguments)
        return self._dispatch(*arguments)

    def __repr__(self) -> str:
        return f"Operator({self.name}{self.schema}: {', '.join(i.name for i in self.implementations)})"

    def implementation(
        self,
        name: str,
        *,
        devices: Sequence[str],
        entry: Callable[..., Any] | str,
        supports: Callable[..., bool] = lambda *arguments: True,
        missing: Callable[[], str | None] = lambda: None,
        prepare: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        """Add an implementation; those added first are preferred, the reference always comes last."""
        new = Implementation(name, tuple(devices), entry, supports, missing, prepare)
        self.implementations.insert(len(self.implementations) - 1, new)

    def peer(self, name: str, **settings: Any) -> None:
        """Add a peer to the benchmark; see `Peer`."""
        self.peers.append(Peer(name, **settings))

    def find(self, name: str) -> Implementation:
        """The implementation of that name.

        Raises:
            BackendError: there is none.
        """
        for implementation in self.implementations:
            if implementation.name == name:
                return implementation
        known = ", ".join(i.name for i in self.implementations)
        raise BackendError(f"operator {self.name} has no implementation {name!r}; it has {known}")

    def select(self, *arguments: Any) -> Implementation:
        """The implementation that a call with these arguments runs on.

        Raises:
            BackendError: an override names an implementation that can't take the call.
        """
        device = _device_type(arguments)
        if (name := _overridden(self.name)) is not None and (name[1] or self._has(name[0])):
            chosen = self.find(name[0])
            reason = self._refusal(chosen, device, arguments)
            if reason is not None:
                raise BackendError(f"{self.name}: implementation {chosen.name!r} was asked for, but {reason}")
            return chosen
        for implementation in self.implementations:
            if self._refusal(implementation, device, arguments) is None:
                return implementation
        raise BackendError(f"{self.name} has no implementation for device {device!r}")

    def tolerance(self, dtype: torch.dtype, shape: Shape) -> float:
        """Relative RMS error allowed against the float64 reference on the same rounded inputs."""
        if self.exact:
            return 0.0
        if dtype == torch.float64:
            return 1e-12
        if dtype == torch.float32:
            return max(1e-5, 1e-6 * math.sqrt(self.reduction(shape)))
        return {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]

    def _has(self, name: str) -> bool:
        return any(i.name == name for i in self.implementations)

    def _refusal(self, implementation: Implementation, device: str, arguments: tuple[Any, ...]) -> str | None:
        runs_on = implementation.devices
        if device not in runs_on and not (
            device == "cpu" and implementation.name == "triton" and interpreting()
        ):
            return f"it runs on {', '.join(runs_on)} and the tensors are on {device}"
        if (missing := _missing(implementation)) is not None:
            return missing
        if not implementation.supports(*arguments):
            return "it does not support these arguments"
        return None

    def _dispatch(self, *arguments: Any) -> Any:
        return self.select(*arguments).function(*arguments)


def _dispatcher_is_needed(arguments: tuple[Any, ...]) -> bool:
    """Whether gradients, tensor subclasses, modes or function transforms take part in a call."""
    grad = torch.is_grad_enabled()
    for argument in arguments:
        if isinstance(argument, Tensor) and (
            type(argument) not in _PLAIN_TENSORS or (grad and argument.requires_grad)
        ):
            return True
    return any(count() for count in _active_modes)


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def _mode_counters() -> tuple[Callable[[], Any], ...]:
    """Functions that are true while something intercepts operators; always true where this torch lacks them."""
    found = (
        getattr(torch._C, "_len_torch_dispatch_stack", None),
        getattr(torch._C, "_len_torch_function_stack", None),
        getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None),
    )
    return tuple(f if f is not None else lambda: True for f in found)


_active_modes = _mode_counters()


_missing_cache: dict[int, str | None] = {}


def _missing(implementation: Implementation) -> str | None:
    key = id(implementation)
    if key not in _missing_cache:
        _missing_cache[key] = implementation.missing()
    return _missing_cache[key]


def _device_type(arguments: tuple[Any, ...]) -> str:
    for argument in arguments:
        if isinstance(argument, Tensor):
            return argument.device.type
    raise InvalidArgument("an operator needs at least one tensor among its arguments")


@contextmanager
def use_implementation(name: str | None = None, **by_operator: str) -> Iterator[None]:
    """Run operators on the named implementations inside a `with` block (process-wide, so backward too).

    Args:
        name: implementation for every operator that has one of that name.
        **by_operator: implementation by operator name; an unsupported call is then an error, not a fallback.

    Example:
        >>> from tensormill.operator import use_implementation
        >>> with use_implementation(hadamard_transform="reference"):
        ...     pass
    """
    override = dict(by_operator)
    if name is not None:
        override["*"] = name
    _overrides.append(override)
    try:
        yield
    finally:
        _overrides.remove(override)


def _overridden(operator: str) -> tuple[str, bool] | None:
    """(implementation, whether it was asked for this operator by name), or None."""
    for override in [*reversed(_overrides), _from_environment()]:
        if operator in override:
            return override[operator], True
        if "*" in override:
            return override["*"], False
    return None


def _from_environment() -> Mapping[str, str]:
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not text:
        return {}
    override = {}
    for item in text.split(","):
        operator, separator, implementation = item.partition("=")
        override[operator.strip() if separator else "*"] = (implementation if separator else operator).strip()
    return override


_warned = False


def native_missing(module: str) -> Callable[[], str | None]:
    """A `missing` predicate for a compiled CPU module; warns once if the kernels were not built."""

    def missing() -> str | None:
        global _warned
        if importlib.util.find_spec(module) is not None:
            return None
        if not _warned:
            _warned = True
            warnings.warn(
                "tensormill was installed without its compiled CPU kernels (no C++ compiler was found); "
                "slower PyTorch paths are used",
                stacklevel=2,
            )
        return "the compiled CPU kernels are not installed"

    return missing

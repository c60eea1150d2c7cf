"""The one benchmark of all operators: time, fraction of the roofline limit, ratio to each peer, in one run.

A competitor is timed only after its result agreed with the reference on the same inputs. All competitors run
in turn, over enough copies of the inputs that no cache holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from tensormill.errors import BackendError, InvalidArgument
from tensormill.measure import Timing, copies_past_cache, time_together
from tensormill.operator import Operator, Shape, use_implementation
from tensormill.ops.correctness import deviation, result_dtype, tensors, upcast
from tensormill.roofline import Ceilings, ceilings

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One implementation at one shape.

    Attributes:
        shape: the sample's shape.
        implementation: its name.
        seconds: per call, as `measure.Timing` defines them; `low` and `high` are the 10th and 90th percentile.
        limit_seconds: the roofline limit on this machine.
        ratio_to_peer: by peer, peer's seconds over ours: above 1 we are faster.
        peer_seconds: by peer, its seconds per call.
        skipped: by competitor, why it was not timed.
    """

    shape: dict[str, Any]
    implementation: str
    seconds: float
    low: float
    high: float
    limit_seconds: float
    ratio_to_peer: dict[str, float] = field(default_factory=dict)
    peer_seconds: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def default_shapes(operator: Operator, device: torch.device) -> list[Shape]:
    """The shapes that `bench` times when none is given."""
    return [s.shape for s in operator.samples if s.benchmark and not (s.large and device.type == "cpu")]


def complete_shape(operator: Operator, given: dict[str, Any]) -> Shape:
    """A shape from the command line, completed with the operator's defaults.

    Raises:
        InvalidArgument: a name that this operator's shape does not have, or a value of another type.
    """
    known = operator.shape_defaults
    for name, value in given.items():
        if name not in known:
            raise InvalidArgument(f"{operator.name} has no dimension {name!r}; it has {', '.join(known)}")
        if known[name] is not None and type(value) is not type(known[name]):
            expected = type(known[name]).__name__
            raise InvalidArgument(f"{name}={value!r} given for {operator.name}, expected a {expected}")
    return {**known, **given}


def benchmark(
    operator: Operator,
    shapes: Sequence[Shape],
    device: torch.device | str = "cpu",
    *,
    implementations: Sequence[str] | None = None,
    seconds: float = 1.0,
    progress: Progress | None = None,
) -> list[Row]:
    """Check and time implementations and peers of an operator.

    Args:
        operator: what to time.
        shapes: at which sizes; see `default_shapes` and `complete_shape`.
        device: where.
        implementations: which ones; by default all that take the arguments, the reference left out unless it is
            the only one.
        seconds: time budget per competitor and shape.
        progress: called with a line before each shape.

    Raises:
        BackendError: an implementation that was asked for can't run here, or gave a wrong result.
    """
    device = torch.device(device)
    machine = ceilings(device)
    rows: list[Row] = []
    for shape in shapes:
        if progress is not None:
            progress(f"{operator.name} {format_shape(shape)}")
        rows += _one_shape(operator, shape, device, machine, implementations, seconds)
    return rows


def format_shape(shape: Shape) -> str:
    return " ".join(f"{k}={v}" for k, v in shape.items() if v is not None)


def _one_shape(
    operator: Operator,
    shape: Shape,
    device: torch.device,
    machine: Ceilings,
    implementations: Sequence[str] | None,
    seconds: float,
) -> list[Row]:
    arguments = operator.inputs(shape, device, torch.Generator(device).manual_seed(2))
    expected = tensors(operator.reference(*upcast(arguments)))
    tolerance = operator.tolerance(result_dtype(arguments), shape)
    copies = copies_past_cache([a for a in arguments if isinstance(a, Tensor)], device)
    calls: dict[str, list[Callable[[], Any]]] = {}
    ours: list[str] = []
    skipped: dict[str, str] = {}
    for implementation in operator.implementations:
        name = implementation.name
        if implementations is not None and name not in implementations:
            continue
        if name == "reference" and implementations is None and ours:
            continue
        reason = None
        if device.type not in implementation.devices:
            reason = f"runs on {', '.join(implementation.devices)}"
        reason = reason or implementation.missing()
        if reason is None:
            prepared = implementation.prepare(*arguments) if implementation.prepare else arguments
            if not implementation.supports(*prepared):
                reason = "does not support these arguments"
        if reason is not None:
            if implementations is not None:
                raise BackendError(f"{operator.name}: {name} can't run here: {reason}")
            skipped[name] = reason
            continue
        with use_implementation(**{operator.name: name}):
            results = tensors(operator(*prepared))
        for actual, wanted in zip(results, expected, strict=True):
            if (wrong := deviation(actual, wanted, tolerance)) is not None:
                raise BackendError(f"{operator.name}: {name} is wrong at {format_shape(shape)}: {wrong}")
        ours.append(name)
        # what a user calls, dispatch included, wherever this implementation is the one dispatch takes
        called = operator if operator.select(*prepared) is implementation else implementation.function
        calls[name] = [_bind(called, _cloned(prepared)) for _ in range(copies)]
    for peer in operator.peers:
        if device.type not in peer.devices:
            continue
        reason = peer.missing()
        if reason is None and not peer.supports(*arguments):
            reason = "does not support these arguments"
        if reason is None:
            try:
                made = [peer.make(*_cloned(arguments)) for _ in range(copies)]
                allowed = peer.tolerance if peer.tolerance is not None else tolerance
                if allowed != float("inf"):
                    for actual, wanted in zip(tensors(made[0]()), expected, strict=True):
                        reason = reason or deviation(actual, wanted, allowed)
                else:
                    made[0]()
            except Exception as error:  # a peer that breaks is not timed, and no reason to stop
                reason = f"failed: {' '.join(str(error).split())[:200] or type(error).__name__}"
        if reason is not None:
            skipped[peer.name] = reason
            continue
        calls[peer.name] = made
    timings = time_together(calls, device, seconds=seconds)
    limit = machine.limit_seconds(operator.cost(shape))
    peers = {name: t.seconds for name, t in timings.items() if name not in ours}
    return [_row(shape, name, timings[name], limit, peers, skipped) for name in ours]


def _row(
    shape: Shape, name: str, timing: Timing, limit: float, peers: dict[str, float], skipped: dict[str, str]
) -> Row:
    ratios = {peer: seconds / timing.seconds for peer, seconds in peers.items()}
    return Row(dict(shape), name, timing.seconds, timing.low, timing.high, limit, ratios, peers, skipped)


def _bind(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: function(*arguments)


def _cloned(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)

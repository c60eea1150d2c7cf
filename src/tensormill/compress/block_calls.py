"""What a model passes to its blocks: noted once, so that each block can be run by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensormill.compress.residence import InMemory, Residence
from tensormill.errors import ModelError, TensormillError

#: What a model raises that was taken for another kind of model.
FAILURES = (ValueError, TypeError, LookupError, AttributeError)


@dataclass(eq=False)
class Handed:
    """Stands, among what a block is called with, for something that the block before gives beside hidden states.

    Attributes:
        block: number of the block that gives it.
        place: among what that block returns.
        value: what it gave when it ran last.
    """

    block: int
    place: int
    value: Any = None


@dataclass
class BlockCall:
    """What the model passes to one of its blocks besides the hidden states.

    Attributes:
        args, kwargs: as passed, with a `Handed` for each thing that the block before gives.
        added: what the model adds to the block's output before the next block reads it (features of an image, in
            models with "deepstack"); None if nothing.
        gives: what the next block is called with that this one gives (the tokens to attend to, in GLM-5).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    added: Tensor | None = None
    gives: list[Handed] = field(default_factory=list)

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states, as the next block reads them; what else that one reads is left in
        `gives`.
        """
        output, *others = self.outputs(block, hidden)
        for handed, value in zip(self.gives, others, strict=True):
            handed.value = value
        return output

    def outputs(self, block: nn.Module, hidden: Tensor) -> list[Any]:
        """The block's output hidden states, as the next block reads them, and what `gives` stands for."""
        output = self.returned(block, hidden)
        values = output if isinstance(output, (tuple, list)) else (output,)
        first = values[0] if self.added is None else values[0] + self.added
        return [first, *(values[handed.place] for handed in self.gives)]

    def returned(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """What the block returns."""
        to = (hidden.device, hidden.dtype)
        return block(hidden, *_received(self.args, to), **_received(self.kwargs, to))

    def forget(self) -> None:
        """Let go of what `gives` holds: the next block ran for the last time."""
        for handed in self.gives:
            handed.value = None

    def to(self, *args: Any) -> BlockCall:
        """With every tensor moved to a device, or every floating-point tensor cast to a dtype."""
        return BlockCall(
            _cast(self.args, args), _cast(self.kwargs, args), _cast(self.added, args), self.gives
        )

    def may_hand_on(self) -> bool:
        """Whether blocks may leave more than hidden states for later ones, in `handed` or in `shared`."""
        return any(True for _ in _objects([self.args, self.kwargs]))

    def handed(self) -> list[Handed]:
        """What the block before gives."""
        return [one for one in _objects([self.args, self.kwargs]) if isinstance(one, Handed)]

    def shared(self) -> list[Any]:
        """Objects in which blocks may leave something for any later block: keys and values, say."""
        return [one for one in _objects([self.args, self.kwargs]) if not isinstance(one, Handed)]

    def left(self) -> list[Tensor]:
        """What lies in `shared` now."""
        return list(_tensors_in(self.shared(), set()))


def _objects(value: Any) -> Iterator[Any]:
    """All arguments that are more than values."""
    if type(value) in (list, tuple, dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _objects(item)
    elif not isinstance(value, (Tensor, int, float, str, torch.dtype, torch.device, type(None))):
        yield value


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(item, seen)
    elif not isinstance(value, (type, nn.Module)):
        for item in getattr(value, "__dict__", {}).values():
            yield from _tensors_in(item, seen)


def _received(value: Any, to: tuple[torch.device, torch.dtype]) -> Any:
    """Arguments with what blocks gave in the place of each `Handed`."""
    if isinstance(value, Handed):
        device, dtype = to
        return _cast(_cast(value.value, (device,)), (dtype,))
    if type(value) in (list, tuple):
        return type(value)(_received(item, to) for item in value)
    if type(value) is dict:
        return {key: _received(item, to) for key, item in value.items()}
    return value


def _cast(value: Any, to: tuple[Any, ...]) -> Any:
    if isinstance(value, Tensor):
        return value.to(*to) if value.is_floating_point() or not isinstance(to[0], torch.dtype) else value
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_cast(item, to) for item in value)
    if isinstance(value, dict) and type(value) is dict:
        return {key: _cast(item, to) for key, item in value.items()}
    return value


class Stop(Exception):
    """Ends a forward pass early."""


@torch.no_grad()
def record_calls(
    model: nn.Module,
    blocks: Sequence[str],
    tokens: Tensor,
    outputs: Sequence[int] | None = None,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    residence: Residence | None = None,
    in_between: bool = True,
) -> tuple[Tensor, list[BlockCall], list[int]]:
    """Run what comes before the blocks, and note what each block is called with.

    The blocks themselves are passed by, so the cost is that of the embedding. Nothing after the last block
    runs. Where a block's input isn't what the block before gave, what the model added in between is noted too.

    Args:
        model: a causal language model, called as `model(tokens)`.
        blocks: names of its blocks, in order.
        tokens: (batch, length) int64.
        outputs: how many values each block returns, see `BlockStructure`; None runs one block of each kind to find out.
        inputs: what else the model is called with, by keyword: pixel values, say.
        residence: of the model; None stands for one in memory.
        in_between: note what the model adds to hidden states between blocks; False runs it once, whatever it does
            there.

    Returns:
        The first block's input (batch, length, hidden), each block's call, and how many values it returns.

    Raises:
        ModelError: the blocks don't run once each, in order, on hidden states to which at most something is added
            between them, and on what the block before gives beside them.
    """
    residence = residence or InMemory(model)
    walk = _Walk(model, blocks, tokens, inputs or {}, residence, outputs)
    # Where an image's features are computed on the way, a second walk would cost more than copies.
    first, calls, between = walk.run(torch.clone if inputs else lambda hidden: hidden)
    if between and in_between and not inputs:
        first, calls, between = walk.run(torch.clone)
    if between and in_between:
        # From zeros the model gives what it adds, without rounding.
        _, _, from_zeros = walk.run(torch.zeros_like)
        for index, (left, found) in between.items():
            added = from_zeros[index][1] if index in from_zeros else torch.zeros_like(found)
            if left.shape != found.shape or not _sums_to(left, added, found):
                raise ModelError(
                    f"given a {type(model).__name__} that changes the hidden states between {blocks[index]} and "
                    f"{blocks[index + 1]} by more than adding to them, expected a chain of blocks; use "
                    "method rtn, in memory"
                )
            calls[index].added = added
    return first, calls, walk.outputs


class _Walk:
    """Runs of a model with its blocks passed by, see `record_calls`.

    Attributes:
        outputs: how many values each block returns, 0 for hidden states alone; known after the first run.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        tokens: Tensor,
        inputs: Mapping[str, Tensor],
        residence: Residence,
        outputs: Sequence[int] | None,
    ) -> None:
        self.model, self.blocks, self.tokens, self.inputs = model, blocks, tokens, inputs
        self.residence = residence
        self.modules = [model.get_submodule(name) for name in blocks]
        self._kinds: dict[Any, Sequence[Any]] = {}
        self.outputs = [] if outputs is None else list(outputs)

    def run(
        self, give: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, list[BlockCall], dict[int, tuple[Tensor, Tensor]]]:
        """Run what lies before and between the blocks, each of which gives `give(its input)`.

        Returns:
            The first block's input; each block's call; and by number of a block whose output the model changes
            before it is the next one's input, this block's and the next one's input.
        """
        blocks, modules = self.blocks, self.modules
        calls: list[BlockCall] = []
        between: dict[int, tuple[Tensor, Tensor]] = {}
        first: list[Tensor] = []
        last: list[Any] = []  # the previous block's input, what it gave, and how often that had been changed

        def passing_by(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.pop("hidden_states", None)
                if index != len(calls) or not isinstance(hidden, Tensor):
                    raise ModelError(
                        f"given blocks that the model doesn't run once each and in order ({blocks[index]} was "
                        f"number {len(calls)}), expected a chain of blocks on hidden states"
                    )
                call = BlockCall(args[1:], kwargs)
                for handed in call.handed():
                    if handed.block != index - 1:
                        raise ModelError(
                            f"given blocks of which {blocks[index]} reads what {blocks[handed.block]} gives beside "
                            "hidden states, expected blocks that give such to the next one alone"
                        )
                    if handed not in calls[-1].gives:
                        calls[-1].gives.append(handed)
                calls.append(call)
                if not last:
                    first.append(hidden)
                else:
                    left, given, changes = last
                    same = hidden is given or torch.equal(hidden, given)
                    if not same or times_changed(given) != changes:
                        between[index - 1] = left, hidden
                if index == len(self.outputs):
                    self.outputs.append(len(self._values(index, forward, call, hidden)))
                if len(calls) == len(modules):
                    raise Stop
                given = give(hidden)
                last[:] = hidden, given, times_changed(given)
                # What a block of this kind gave stands for what this one will give.
                seen = self._kinds.get(signature(modules[index]), ())
                others = [
                    Handed(index, place, seen[place] if seen else None)
                    for place in range(1, self.outputs[index])
                ]
                return (given, *others) if self.outputs[index] else given

            return run

        for index, module in enumerate(modules):
            module.forward = passing_by(index, module.forward)
        options = {"use_cache": False} if hasattr(self.model, "config") else {}
        try:
            with _evaluating(self.model):
                self.model(self.tokens, **options, **self.inputs)
        except Stop:
            pass
        except TensormillError:
            raise
        except FAILURES as error:
            raise ModelError(
                f"given a {type(self.model).__name__} that fails outside of its blocks ({of_one_line(error)}), expected "
                "one that runs on token ids, with blocks that give each other hidden states alone"
            ) from error
        finally:
            for module in modules:
                del module.forward
        if len(calls) != len(modules):
            raise ModelError(
                f"given a {type(self.model).__name__} that runs {len(calls)} of {len(modules)} blocks, expected all"
            )
        return first[0], calls, between

    def _values(
        self, index: int, forward: Callable[..., Any], call: BlockCall, hidden: Tensor
    ) -> Sequence[Any]:
        """What a block returns in a tuple, where it returns one; run for one block of each kind."""
        kind = signature(self.modules[index])
        if kind not in self._kinds:
            with self.residence.part(self.blocks[index]):
                there = call.to(self.residence.device)
                output = there.returned(forward, hidden.to(self.residence.device))
            self._kinds[kind] = output if isinstance(output, (tuple, list)) else ()
        return self._kinds[kind]


def of_one_line(error: BaseException) -> str:
    """An error's type and text, without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def times_changed(tensor: Tensor) -> int:
    """How often a tensor was changed in place, where torch counts that."""
    return 0 if tensor.is_inference() else tensor._version


def _sums_to(left: Tensor, added: Tensor, found: Tensor) -> bool:
    """Whether `found` is the sum, but for rounding."""
    largest = torch.stack([part.abs().max() for part in (left, added)]).max()
    rounding = 4 * torch.finfo(found.dtype).eps * largest
    return bool(((left + added - found).abs() <= rounding).all())


def signature(block: nn.Module) -> Any:
    """Equal for blocks of the same parts and shapes."""
    parts = tuple((name, type(part)) for name, part in block.named_modules())
    return parts, tuple((name, tuple(value.shape)) for name, value in block.named_parameters())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

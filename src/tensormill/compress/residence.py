"""Where a model's weights lie while a method works on it: one interface for models in memory and on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from tensormill.compress.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from tensormill.compress.methods import LayerReport


class Residence(Protocol):
    """Lends a model's parts to a method, one at a time, and takes them back.

    A part is a submodule: a block, or a linear layer outside of them.

    Attributes:
        home: where what comes before the blocks runs.
        device: where lent parts lie.
        layers: reports on the layers of all finished parts, those of an earlier run included.
        ranks: the processes that share the calibration.
    """

    home: torch.device
    device: torch.device
    layers: list[LayerReport]
    ranks: Ranks

    def entrance(self) -> AbstractContextManager[None]:
        """Inside, what comes before the blocks (embeddings, position encodings) can run on `home`."""

    def part(self, name: str) -> AbstractContextManager[nn.Module]:
        """Inside, the part of this name has its weights, on `device`."""

    def finish(
        self, name: str, layers: Sequence[LayerReport], reached: Sequence[Tensor] | None = None
    ) -> None:
        """Take a lent part as it is now for its final form.

        Args:
            name: of the part.
            layers: reports on the layers compressed in it.
            reached: the hidden states that reach the next block; None if they aren't all that it needs.
        """

    def is_finished(self, name: str) -> bool:
        """Whether an earlier run finished this part; lent, it then has the weights it had before."""

    def kept_inputs(self) -> tuple[int, list[Tensor] | None]:
        """The block from which to go on and the hidden states that reach it; (0, None) from the beginning."""


class InMemory:
    """A model that is whole in memory; parts visit `device` and return.

    Args:
        model: changed in place.
        device: None stays where the model is.
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None = None) -> None:
        self.model = model
        self.home = next(model.parameters()).device
        self.device = self.home if device is None else torch.device(device)
        self.layers: list[LayerReport] = []
        self.ranks = ALONE

    def entrance(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def part(self, name: str) -> Iterator[nn.Module]:
        try:
            yield self.model.get_submodule(name).to(self.device)
        finally:
            # Looked up again: a layer is replaced by its compressed form.
            self.model.get_submodule(name).to(self.home)

    def finish(
        self, name: str, layers: Sequence[LayerReport], reached: Sequence[Tensor] | None = None
    ) -> None:
        self.layers += layers

    def is_finished(self, name: str) -> bool:
        return False

    def kept_inputs(self) -> tuple[int, list[Tensor] | None]:
        return 0, None

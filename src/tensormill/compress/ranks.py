"""Several processes that share one job through torch.distributed, each with a device of its own.

Started as `torchrun --nproc-per-node N -m tensormill compress ...`, every process observes its share of the
calibration windows. Sums over tokens are added up, so that all see the same statistics; searches are divided. One
process alone is a group of one, in which all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument


@dataclass(frozen=True)
class Ranks:
    """A group of processes, and this one's place in it.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.

    >>> Ranks().own(5)
    slice(0, 5, None)
    >>> [Ranks(rank, 2).own(5) for rank in range(2)]
    [slice(0, 2, None), slice(2, 5, None)]
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def own(self, count: int) -> slice:
        """This process's share of `count` things."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def add(self, values: Tensor) -> None:
        """Replace values by their sum over all processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(values)

    def collect(self, own: Tensor, count: int) -> Tensor:
        """All `count` rows, each from the process that owns it; `own` are this one's."""
        if self.size == 1:
            return own
        rows = own.new_zeros(count, *own.shape[1:])
        rows[self.own(count)] = own
        # Every row is zero but in one process, so that the sum is exact.
        torch.distributed.all_reduce(rows)
        return rows

    def agree(self, value: Any) -> Any:
        """What the leading process gives, in all of them."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]


ALONE = Ranks()

_PATIENCE = timedelta(days=7)
"""The others wait while the leading process measures quality and writes; NCCL's own limit is 10 minutes. A process that
dies doesn't leave them waiting: torchrun ends all."""


def started_with_others() -> bool:
    """Whether torchrun, or something that speaks its language, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def joined(device: str | torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that torchrun started, and leave them at the end.

    Args:
        device: where to compute; "cuda" becomes the GPU of this process's local rank.

    Yields:
        The group and the device; a group of one if there are no others.

    Raises:
        InvalidArgument: more processes than GPUs, or one GPU named for several processes.
    """
    place = torch.device(device)
    if not started_with_others():
        yield ALONE, place
        return
    if place.type == "cuda":
        local, here = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        if place.index is not None and here > 1:
            raise InvalidArgument(
                f"given device={str(device)!r} for {here} processes, expected 'cuda', of which each takes one"
            )
        if place.index is None:
            if local >= torch.cuda.device_count():
                raise InvalidArgument(
                    f"given {local + 1} processes or more on {torch.cuda.device_count()} GPUs, expected one for each"
                )
            place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    ours = not torch.distributed.is_initialized()
    if ours:
        # Objects go through gloo, so that processes wait for the leading one without keeping their GPUs busy.
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=_PATIENCE
        )
    try:
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size()), place
    finally:
        if ours:
            torch.distributed.destroy_process_group()

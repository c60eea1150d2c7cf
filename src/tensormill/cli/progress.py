"""One progress bar on stderr, for anything that takes more than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str, "float | None"], None]


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Report]:
    """A function `report(message, share)` that draws a bar on a terminal, and plain lines elsewhere.

    `share` runs from 0 to 1; None means unknown.
    """
    if quiet:
        yield lambda message, share: None
    elif sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("", total=1.0)

        def report(message: str, share: float | None) -> None:
            if share is None:
                bar.update(task, description=message)
            else:
                bar.update(task, description=message, completed=share)

        yield report


def _lines(every: float = 5.0) -> Report:
    """A line when the message's first word changes, and otherwise every few seconds: logs stay short."""
    last_time, last_stage = 0.0, ""

    def report(message: str, share: float | None) -> None:
        nonlocal last_time, last_stage
        stage, now = message.partition(":")[0], time.monotonic()
        if stage == last_stage and now - last_time < every:
            return
        last_time, last_stage = now, stage
        percent = "" if share is None else f"{share:4.0%} "
        print(f"{percent}{message}", file=sys.stderr, flush=True)

    return report

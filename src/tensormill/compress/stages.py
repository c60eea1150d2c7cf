"""Progress of a job in stages: each stage's own share becomes a share of the whole."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, "float | None"], None]
"""Called as ``progress(message, fraction)``, fraction from 0 to 1 or None where unknown."""


class Stages:
    """Turns each stage's own progress into one share of the whole job; is itself a `Progress`.

    Args:
        progress: Is called with a message and the share of the whole job; None reports to nobody.
        **weights: The stages in order, with the share of time that each takes, in any unit.

    Example:
        >>> stages = Stages(lambda message, share: print(message, share), read=1, write=3)
        >>> stages.enter("write", "writing"); stages("writing", 0.5); stages.done()
        writing 0.25
        writing 0.625
        done 1.0
    """

    def __init__(self, progress: Progress | None, **weights: float) -> None:
        self._progress = progress
        total = sum(weights.values())
        self._spans, start = {}, 0.0
        for name, weight in weights.items():
            self._spans[name] = (start, weight / total)
            start += weight / total
        self._begin = self._length = 0.0

    def enter(self, stage: str, message: str, part: int = 0, parts: int = 1) -> None:
        """Begin a stage, or one of its equal parts."""
        begin, length = self._spans[stage]
        self._begin, self._length = begin + length * part / parts, length / parts
        self(message, 0.0)

    def __call__(self, message: str, share: float | None) -> None:
        if self._progress is not None:
            self._progress(message, None if share is None else self._begin + self._length * share)

    def done(self) -> None:
        """Say that the whole job is done."""
        if self._progress is not None:
            self._progress("done", 1.0)

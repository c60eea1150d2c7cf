"""Decoding speeds side by side: as a table, as JSON, and as one HTML page with a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensormill.models.decoding.speed import DecodingSpeed
from tensormill.page import render_page
from tensormill.plots import Point, Series, format_value, line_plot

if TYPE_CHECKING:
    from rich.console import Console

_TONES = ("awq", "original", "rtn", "gptq", "other")


@dataclass(frozen=True)
class DecodingReport:
    """What `tensormill bench-model` found.

    Attributes:
        title: the model, as the user named it.
        rows: the model's own first, then the baselines'.
        conditions: device, versions and settings.
        bandwidth: of the memory, bytes per second, behind the limits.
    """

    title: str
    rows: Sequence[DecodingSpeed]
    conditions: Mapping[str, str]
    bandwidth: float | None

    def ratios(self, row: DecodingSpeed) -> dict[str, float]:
        """How many times faster a row decodes than every other row of the same batch and prompt."""
        return {
            _label(other): row.decode / other.decode
            for other in self.rows
            if (other.batch, other.prompt_tokens) == (row.batch, row.prompt_tokens)
            and _label(other) != _label(row)
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        rows = [{**row.to_dict(), "faster_than": self.ratios(row)} for row in self.rows]
        conditions = dict(self.conditions)
        return {"model": self.title, "bandwidth": self.bandwidth, "conditions": conditions, "rows": rows}

    def print(self, console: Console) -> None:
        """A table for every setting."""
        from rich.table import Table

        columns = self._columns()
        for batch, length in dict.fromkeys((row.batch, row.prompt_tokens) for row in self.rows):
            table = Table(box=None, padding=(0, 1, 0, 0))
            table.add_column("")
            for column in columns[3:]:
                table.add_column(column, justify="right", no_wrap=True)
            for row in self.rows:
                if (row.batch, row.prompt_tokens) == (batch, length):
                    cells = self._cells(row)
                    table.add_row(cells[0], *cells[3:])
            console.print(f"\nbatch {batch}, prompts of {length} tokens", highlight=False)
            console.print(table)
        for note in self.notes():
            console.print(note, style="dim", markup=False, highlight=False)

    def notes(self) -> list[str]:
        """What a reader must know to read the table."""
        notes = [
            "first: from the prompts to the first new tokens; prefill/s, decode/s: tokens per second of all sequences",
            "prepared: stacked projections, fused norms, rotary embedding and gate; plain: transformers' own forward "
            "with SDPA and a static cache",
            "limit: share of the speed at which the weights and the cache can be read once per step",
        ]
        if any(row.captured for row in self.rows):
            notes.append("every step is the replay of a CUDA graph" + self._uncaptured())
        over = [row.of_the_limit for row in self.rows if row.of_the_limit is not None]
        if over and max(over) > 1:
            notes.append("above 100% of the limit: a cache of the processor holds some of the weights")
        return notes

    def _uncaptured(self) -> str:
        names = sorted({f"{_label(row)} ({row.note})" for row in self.rows if not row.captured})
        return f", but not of {', '.join(names)}" if names else ""

    def to_html(self) -> str:
        """The page: plot, table, conditions."""
        return render_page(
            "report.html.jinja",
            room="tensormill.models.decoding",
            plots={"speed_plot": self._plot()},
            title=self.title,
            columns=self._columns(),
            rows=[self._cells(row) for row in self.rows],
            notes=self.notes(),
            conditions=dict(self.conditions),
        )

    def _columns(self) -> list[str]:
        first = self.rows[0].name
        memory = ["memory"] if any(row.peak_memory_bytes is not None for row in self.rows) else []
        against = [f"{first} faster"] if any(row.name != first for row in self.rows) else []
        return [
            "", "batch", "prompt", "first", "prefill/s", "decode/s", "step", "limit", *against, "weights", *memory
        ]  # fmt: skip

    def _cells(self, row: DecodingSpeed) -> list[str]:
        first = next(r for r in self.rows if (r.batch, r.prompt_tokens) == (row.batch, row.prompt_tokens))
        cells = {
            "": _label(row),
            "batch": str(row.batch),
            "prompt": str(row.prompt_tokens),
            "first": f"{format_value(row.first_token_seconds * 1e3)} ms",
            "prefill/s": format_value(row.prefill),
            "decode/s": format_value(row.decode, 4),
            "step": f"{format_value(row.step_seconds * 1e3)} ms",
            "limit": "-" if row.of_the_limit is None else f"{row.of_the_limit:.0%}",
            f"{first.name} faster": "" if row is first else f"{first.decode / row.decode:.2f}x",
            "weights": _bytes(row.model_bytes),
            "memory": "-" if row.peak_memory_bytes is None else _bytes(row.peak_memory_bytes),
        }
        return [cells[column] for column in self._columns()]

    def _plot(self) -> str:
        lengths = list(dict.fromkeys(row.prompt_tokens for row in self.rows))
        series = []
        for number, name in enumerate(dict.fromkeys(_label(row) for row in self.rows)):
            for length in lengths:
                own = [row for row in self.rows if _label(row) == name and row.prompt_tokens == length]
                points = [Point(float(row.batch), row.decode, _title(row)) for row in own]
                label = name if len(lengths) == 1 else f"{name}, {length} prompt tokens"
                series.append(Series(label, points, _TONES[number % len(_TONES)]))
        return line_plot(
            series,
            x_label="batch size",
            y_label="decoded tokens per second",
            width=900,
            height=380,
            log_x=True,
        )


def _label(row: DecodingSpeed) -> str:
    return f"{row.name} {row.path}"


def _title(row: DecodingSpeed) -> str:
    return f"{_label(row)}, batch {row.batch}: {format_value(row.decode, 4)} tokens/s"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError

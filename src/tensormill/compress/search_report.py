"""What a search for widths found and chose from: as data, as plots, as a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tensormill.compress.recipe import Step
from tensormill.plots import (
    Cell,
    GridRow,
    Point,
    Series,
    format_value,
    grid_plot,
    line_plot,
    method_label,
)

if TYPE_CHECKING:
    from rich.table import Table

_ROWS_ON_TERMINAL = 7


@dataclass(frozen=True)
class FrontPoint:
    """A choice of widths: what it costs, and what is expected of it.

    Attributes:
        bits_per_weight: Average over the compressed weights, scales and zero points included.
        bytes: Of the checkpoint's weight files, to within some kilobytes.
        predicted_kl: Sum of the layers' losses, in nats per token.
        milliseconds: Of all low-bit products for one token, timed alone; no other layer counts.
        tokens_per_second: Expected decoding speed; None where the budget asks for none.
        widths: How many groups of layers have each width.
        measured: "perplexity" and "kl" of the finished model on the kept-back calibration text; None if it was not
            measured.
        chosen: Whether it was taken.
    """

    bits_per_weight: float
    bytes: float
    predicted_kl: float
    milliseconds: float
    tokens_per_second: float | None
    widths: Mapping[int, int]
    measured: Mapping[str, float] | None
    chosen: bool


@dataclass(frozen=True)
class WidthChoice:
    """Layers of one block that got one width, and what each width was measured to cost.

    Attributes:
        block: Name of the block, "" outside of all.
        names: Of the layers, as inside the block.
        bits: The width chosen.
        losses: KL in nats per token by width, with these layers alone rounded.
    """

    block: str
    names: tuple[str, ...]
    bits: int
    losses: Mapping[int, float]


@dataclass(frozen=True)
class BudgetSearch:
    """The outcome of a search.

    Attributes:
        budget: As the user could have written it.
        method: Of the compression.
        step: The method with the widths chosen.
        widths: Candidates.
        front: Points of the Pareto front, small first, thinned.
        uniform: One width for all layers.
        groups: Layers with their widths, in the model's order.
        measure, rounding, run, tokens: See `Sensitivity`.
        probe_tokens: Tokens on which finished models were measured; 0 if none was.
        original_perplexity: Of the original on the same tokens.
        seconds: Wall time of the search.
        texts: The calibration text, for whoever compresses with the result.
    """

    budget: str
    method: str
    step: Step
    widths: tuple[int, ...]
    front: Sequence[FrontPoint]
    uniform: Sequence[FrontPoint]
    groups: Sequence[WidthChoice]
    measure: str
    rounding: str
    run: tuple[int, ...]
    tokens: int
    probe_tokens: int
    original_perplexity: float | None
    seconds: float
    texts: Any = field(repr=False, compare=False, default=None)

    @property
    def chosen(self) -> FrontPoint:
        """The point taken."""
        return next(point for point in self.front if point.chosen)

    def to_dict(self) -> dict[str, Any]:
        """As nested containers that JSON can hold."""
        return {
            "budget": self.budget,
            "candidates": list(self.widths),
            "front": [vars(point) for point in self.front],
            "uniform": [vars(point) for point in self.uniform],
            "groups": [
                {"block": one.block, "layers": list(one.names), "bits": one.bits, "losses": dict(one.losses)}
                for one in self.groups
            ],
            "measure": self.measure,
            "rounding": self.rounding,
            "widths_run": list(self.run),
            "tokens": self.tokens,
            "probe_tokens": self.probe_tokens,
            "original_perplexity": self.original_perplexity,
            "seconds": self.seconds,
        }

    def notes(self) -> list[str]:
        """What the choice rests on, in sentences."""
        point = self.chosen
        counts = ", ".join(f"{count} at {bits} bits" for bits, count in point.widths.items())
        how = {
            "layers": f"Each group of layers was rounded alone ({method_label(self.rounding)}, "
            f"{_listed(self.run)} bits)",
            "blocks": f"Each block was rounded alone (RTN, {_listed(self.run)} bits), its loss shared by its layers' "
            "output errors",
        }[self.measure]
        found = [
            f"Budget {self.budget}: {format_value(point.bits_per_weight)} bits per weight; of {len(self.groups)} "
            f"groups of layers {counts}.",
            f"{how}, on {self.tokens:,} calibration tokens; losses are taken to add up.",
        ]
        if point.measured is not None:
            found.append(
                f"KL of the choice: predicted {format_value(point.predicted_kl)}, measured "
                f"{format_value(point.measured['kl'])} nats per token on {self.probe_tokens:,} calibration tokens kept back."
            )
            if self.original_perplexity:
                rise = point.measured["perplexity"] / self.original_perplexity - 1
                found.append(f"Its perplexity there is {rise * 100:+.3g} % from the original's.")
        better = self._better_uniform()
        if better is not None:
            found.append(
                f"One width for all is nearer to the original on the kept-back text at no larger size "
                f"({format_value(better.bits_per_weight)} bits per weight): prefer it."
            )
        return found

    def _better_uniform(self) -> FrontPoint | None:
        """A single width that is no larger than the choice, and measured to be nearer to the original."""
        mine = self.chosen.measured
        if mine is None:
            return None
        for point in self.uniform:
            if (
                point.measured is not None
                and not point.chosen
                and point.bytes <= self.chosen.bytes
                and point.measured["kl"] < mine["kl"]
            ):
                return point
        return None

    def table(self) -> Table:
        """A short table: points of the front around the choice, and single widths."""
        from rich.table import Table
        from rich.text import Text

        shown = list(self.front)
        if len(shown) > _ROWS_ON_TERMINAL:
            at = next(i for i, point in enumerate(shown) if point.chosen)
            steps = {
                round(i * (len(shown) - 1) / (_ROWS_ON_TERMINAL - 2)) for i in range(_ROWS_ON_TERMINAL - 1)
            }
            shown = [point for i, point in enumerate(shown) if i in steps or i == at]
        table = Table(box=None, pad_edge=False, header_style="dim")
        timed = any(point.tokens_per_second is not None for point in shown)
        columns = ["widths", "bits/w", "size", "KL predicted", "measured", "ppl measured", "ms/token"]
        for name in [*columns, *(["tok/s"] if timed else [])]:
            table.add_column(name, justify="left" if name == "widths" else "right", no_wrap=True)
        rows = [("mixed", point) for point in shown if len(point.widths) > 1]
        rows += [(f"all {next(iter(p.widths))}", p) for p in (*self.uniform,)]
        for name, point in sorted(rows, key=lambda row: row[1].bytes):
            measured = point.measured or {}
            cells = [
                name + (" *" if point.chosen else ""),
                format_value(point.bits_per_weight),
                f"{format_value(point.bytes / 1e6)} MB",
                format_value(point.predicted_kl),
                format_value(measured.get("kl")),
                format_value(measured.get("perplexity"), 4),
                format_value(point.milliseconds),
            ]
            if timed:
                cells.append(format_value(point.tokens_per_second))
            cells = ["-" if cell == "\N{EN DASH}" else cell for cell in cells]
            table.add_row(*map(Text, cells), style="bold" if point.chosen else "")
        return table

    def front_plot(self) -> str:
        """Predicted loss against bits per weight: the front, single widths, and what was measured."""

        def points(found: Sequence[FrontPoint]) -> list[Point]:
            return [Point(p.bits_per_weight, p.predicted_kl, self._title(p), p.chosen) for p in found]

        measured = {id(p): p for p in (*self.front, *self.uniform) if p.measured is not None}
        series = [
            Series("front, predicted", points(self.front), "awq"),
            Series("one width, predicted", points(self.uniform), "rtn", joined=False),
            Series(
                "measured",
                [
                    Point(p.bits_per_weight, p.measured["kl"], self._title(p))
                    for p in measured.values()
                    if p.measured is not None
                ],
                "other",
                joined=False,
            ),
        ]
        return line_plot(
            series,
            x_label="bits per weight",
            y_label="KL to the original, nats per token",
            description="Predicted loss against bits per weight: the front, single widths, and measured points",
            width=720,
        )

    def width_plot(self) -> str:
        """The widths chosen, by kind of layer and block."""
        blocks = list(dict.fromkeys(one.block for one in self.groups))
        rows: dict[str, dict[str, Cell]] = {}
        for one in self.groups:
            title = ", ".join(
                f"{bits} bits: {format_value(loss)}" for bits, loss in sorted(one.losses.items())
            )
            cell = Cell(
                one.bits, f"{one.block} {' + '.join(one.names[:4])}: {one.bits} bits. KL alone: {title}"
            )
            rows.setdefault(_kinds(one.names), {})[one.block] = cell
        return grid_plot(
            [GridRow(label, [cells.get(block) for block in blocks]) for label, cells in rows.items()],
            title="bits by layer, from the first block to the last",
            description="Widths chosen by kind of layer and block",
        )

    def _title(self, point: FrontPoint) -> str:
        widths = ", ".join(f"{count} x {bits} bits" for bits, count in point.widths.items())
        text = (
            f"{format_value(point.bits_per_weight)} bits per weight ({widths}): "
            f"predicted {format_value(point.predicted_kl)}"
        )
        if point.measured is not None:
            text += (
                f", measured {format_value(point.measured['kl'])}, "
                f"perplexity {format_value(point.measured['perplexity'], 4)}"
            )
        return text + (", chosen" if point.chosen else "")


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))


def _kinds(names: Sequence[str]) -> str:
    """The last parts of names, each once: "q_proj + k_proj + v_proj"."""
    return " + ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))

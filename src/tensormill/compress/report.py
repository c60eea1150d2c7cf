"""What a compression did to a model: for people on the terminal and as a page, for programs as JSON.

All three forms say the same, from one list of findings, and claim no more than was measured: a difference
whose confidence interval includes zero is no difference, a slower model is called slower, and a method that
lost to plain rounding is said to have lost.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from tensormill.compress.budget import parse_budget
from tensormill.compress.evaluate import Evaluation, Interval, paired_bootstrap
from tensormill.compress.output import write_files
from tensormill.compress.search_report import BudgetSearch
from tensormill.compress.speed import Speed
from tensormill.errors import InvalidArgument
from tensormill.page import render_page
from tensormill.plots import (
    Bar,
    Pair,
    PairGroup,
    Point,
    bar_plot,
    format_value,
    line_plot,
    method_label,
    method_series,
    pair_plot,
)

if TYPE_CHECKING:
    import torch
    from rich.console import Console

__all__ = [
    "CompressionReport",
    "CurvePoint",
    "Finding",
    "LayerLoss",
    "describe_source",
    "encodable",
    "environment",
    "format_bytes",
    "format_seconds",
    "plain",
]

_MINUS = "\N{MINUS SIGN}"
_TIMES = "\N{MULTIPLICATION SIGN}"
_ARROW = "\N{RIGHTWARDS ARROW}"
_FEW_WINDOWS = 10
_NAMES = {"original": "original", "rtn": "round-to-nearest", "compressed": "compressed"}


@dataclass(frozen=True)
class LayerLoss:
    """Loss of one compressed layer on the calibration data.

    Attributes:
        name: The module's path in the model.
        bits: Bits per code.
        nmse: Squared error of the layer's output over the output's square, dimensionless; None without
            calibration data.
        loss_rtn: The same for plain rounding with the same bits and groups.
    """

    name: str
    bits: int
    nmse: float | None
    loss_rtn: float | None = None

    @property
    def ratio(self) -> float | None:
        """Loss over that of plain rounding; None where either is unknown or the latter is zero."""
        return self.nmse / self.loss_rtn if self.nmse is not None and self.loss_rtn else None


@dataclass(frozen=True)
class CurvePoint:
    """Perplexity of a method at a size. The method "original" is the level that the others are compared with.

    All points of a curve must come from the same windows; those need not be all windows of the report.
    """

    method: str
    bits_per_weight: float
    perplexity: float


@dataclass(frozen=True)
class Finding:
    """One sentence of the report.

    Attributes:
        level: A "warning" is something that the user would want to know before using the model.
        text: The sentence.
        on_card: The page says it with a large figure already.
    """

    level: Literal["good", "note", "warning"]
    text: str
    on_card: bool = False


@dataclass
class CompressionReport:
    """Everything that `compress` reports. The first twelve fields are the stable machine-readable contract.

    Attributes:
        model: The model as the user named it.
        method: Name of the method, e.g. "awq".
        output: Where the compressed checkpoint lies.
        bytes_before: Weight files of the original; of a GGUF file, its dequantized weights, see `source`.
        bytes_after: Weight files of the result.
        bits_per_weight: Average over the compressed weights, scales and zero points included.
        seconds: Wall time of the compression itself.
        peak_memory_bytes: High-water mark of the compression.
        perplexity: By "original", "rtn" and "compressed"; None where it was not measured.
        bits_per_byte: The same keys.
        kl: Mean KL(original || compressed) in nats per token.
        tokens_per_second: Decoding at batch 1, by "original" and "compressed".
        top1_agreement: Share of positions with the original's most likely token.
        recipe: The settings, as anything JSON can hold, or as text.
        difference_to_original: Of the perplexities, compressed - original.
        difference_to_rtn: Of the perplexities, compressed - round-to-nearest.
        layers: Loss of each layer, in the model's order.
        curve: Perplexity against size of several methods.
        curve_setting: On what the curve was measured, where that differs from the report's own figures.
        speed: Settings and spread of the speed measurement, see `Speed`, by "original" and "compressed".
        evaluation: The text (name and SHA-256), windows, scored tokens and bytes.
        environment: Versions, device, date and seed, see `environment`.
        source: Of a GGUF file: its size, its types with their shares of the weights, and the dtype that it was
            dequantized to.
        left_out: Linear layers and routers that keep their precision whatever the settings.
        few_tokens: Layers of experts that few calibration tokens were routed to, and that were therefore
            calibrated on all tokens of their block.
        search: How the layers' widths were chosen, where a budget was given.
    """

    model: str
    method: str
    output: str
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    seconds: float
    peak_memory_bytes: int
    perplexity: Mapping[str, float | None]
    bits_per_byte: Mapping[str, float | None]
    kl: float | None
    tokens_per_second: Mapping[str, float | None]
    top1_agreement: float | None = None
    recipe: Any = None
    difference_to_original: Interval | None = None
    difference_to_rtn: Interval | None = None
    layers: list[LayerLoss] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)
    curve_setting: str = ""
    speed: Mapping[str, Speed] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    few_tokens: Sequence[str] = ()
    search: BudgetSearch | None = None

    @classmethod
    def from_evaluations(
        cls,
        evaluations: Mapping[str, Evaluation],
        *,
        speeds: Mapping[str, Speed] | None = None,
        layers: Iterable[Any] = (),
        text: str = "",
        seed: int = 0,
        confidence: float = 0.95,
        **fields: Any,
    ) -> CompressionReport:
        """A report whose quality fields come from evaluations on the same windows.

        Args:
            evaluations: By "original" and "compressed", and "rtn" where it was measured; see
                `evaluate_models`.
            speeds: By "original" and "compressed", see `measure_speed`.
            layers: Objects with the attributes of `LayerLoss`.
            text: What the evaluation text is called.
            seed: Of the bootstrap intervals.
            confidence: Of the bootstrap intervals.
            **fields: The report's other fields.

        Raises:
            InvalidArgument: The original or the compressed model was not evaluated, or on other windows.
        """
        missing = [name for name in ("original", "compressed") if name not in evaluations]
        if missing:
            raise InvalidArgument(
                f"given evaluations of {sorted(evaluations)}, expected {missing[0]!r} among them"
            )
        measured = dict(evaluations)
        if fields.get("method") == "rtn":
            measured.setdefault("rtn", measured["compressed"])
        compressed = measured["compressed"]

        def difference(other: str) -> Interval | None:
            if other not in measured or measured[other] is compressed:
                return None
            losses = compressed.window_nll, measured[other].window_nll
            return paired_bootstrap(*losses, confidence=confidence, seed=seed)

        speeds = dict(speeds or {})
        comparison = compressed.comparison
        return cls(
            perplexity={name: _attribute(measured, name, "perplexity") for name in _NAMES},
            bits_per_byte={name: _attribute(measured, name, "bits_per_byte") for name in _NAMES},
            kl=comparison.kl if comparison else None,
            top1_agreement=comparison.top1_agreement if comparison else None,
            difference_to_original=difference("original"),
            difference_to_rtn=difference("rtn"),
            tokens_per_second={
                name: _attribute(speeds, name, "decode") for name in ("original", "compressed")
            },
            speed=speeds,
            layers=_layer_losses(layers),
            evaluation={
                "text": text,
                "text_sha256": compressed.text_sha256,
                "tokens": compressed.tokens,
                "bytes": compressed.bytes,
                "windows": compressed.windows,
                "window": compressed.window,
                "byte_rule": compressed.byte_rule,
            },
            **fields,
        )

    @classmethod
    def without_evaluation(cls, *, layers: Iterable[Any] = (), **fields: Any) -> CompressionReport:
        """A report of a compression whose quality and speed were not measured.

        Args:
            layers: Objects with the attributes of `LayerLoss`.
            **fields: The report's other fields.
        """
        unmeasured: dict[str, Any] = {
            "perplexity": dict.fromkeys(_NAMES),
            "bits_per_byte": dict.fromkeys(_NAMES),
            "kl": None,
            "tokens_per_second": dict.fromkeys(("original", "compressed")),
        }
        return cls(layers=_layer_losses(layers), **{**unmeasured, **fields})

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON's types: the contract's keys first; NaN and infinities are None."""
        contract = {
            "model": self.model,
            "method": self.method,
            "output": self.output,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": self.bits_per_weight,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "perplexity": {name: self.perplexity.get(name) for name in _NAMES},
            "bits_per_byte": {name: self.bits_per_byte.get(name) for name in _NAMES},
            "kl": self.kl,
            "tokens_per_second": {
                name: self.tokens_per_second.get(name) for name in ("original", "compressed")
            },
        }
        more = {
            "top1_agreement": self.top1_agreement,
            "perplexity_difference": {
                "to_original": _interval_fields(self.difference_to_original),
                "to_rtn": _interval_fields(self.difference_to_rtn),
            },
            "findings": [{"level": finding.level, "text": finding.text} for finding in self.findings()],
            "layers": [vars(layer) for layer in self.layers],
            "curve": [vars(point) for point in self.curve],
            "curve_setting": self.curve_setting,
            "speed": {name: vars(speed) for name, speed in self.speed.items()},
            "evaluation": dict(self.evaluation),
            "recipe": self.recipe,
            "environment": dict(self.environment),
            "source": dict(self.source),
            "left_out": list(self.left_out),
            "few_tokens": list(self.few_tokens),
            "search": None if self.search is None else self.search.to_dict(),
        }
        result: dict[str, Any] = plain({**contract, **more})
        return result

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as one JSON document."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False, ensure_ascii=False)

    def print(self, console: Console) -> None:
        """Print the report on a rich console."""
        from rich.table import Table
        from rich.text import Text

        def fit(text: str) -> str:
            return encodable(text, console.encoding)

        def line(*parts: str | tuple[str, str], **options: Any) -> None:
            fitted = [fit(part) if isinstance(part, str) else (fit(part[0]), part[1]) for part in parts]
            console.print(Text.assemble(*fitted), **options)

        line(("Compressed ", "bold"), (self.model, "bold cyan"), f" with {self._label()}")
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("")
        for name in ("original", "RTN", "compressed"):
            table.add_column(name, justify="right")
        for row in self._table():
            cells = [row["original"], row["rtn"], row["compressed"]]
            if any(cell != format_value(None) for cell in cells):
                table.add_row(*(Text(fit(cell)) for cell in (row["what"], *cells)))
        console.print(table)
        effort = f"{format_value(self.bits_per_weight)} bits per weight, {format_seconds(self.seconds)}"
        line((f"{effort} to compress, peak memory {format_bytes(self.peak_memory_bytes)}", "dim"))
        marks = {"good": ("+ ", "green"), "note": ("- ", "dim"), "warning": ("! ", "bold yellow")}
        for finding in self.findings():
            line(marks[finding.level], finding.text)
        if self.search is not None:
            console.print()
            for note in self.search.notes():
                line((note, "dim"))
            console.print(self.search.table())
        line("Checkpoint: ", (self.output, "cyan"), soft_wrap=True)

    def to_html(self) -> str:
        """The report as one page that needs no other file, no network and no script."""
        return render_page(
            "report.html.jinja",
            plots={
                "quality_plot": self._quality_plot(),
                "size_plot": self._size_plot(),
                "speed_plot": self._speed_plot(),
                "layer_plot": self._layer_plot(),
                "front_plot": "" if self.search is None else self.search.front_plot(),
                "width_plot": "" if self.search is None else self.search.width_plot(),
            },
            report=self,
            method=self._label(),
            cards=self._cards(),
            findings=[finding for finding in self.findings() if not finding.on_card],
            table=self._table(),
            undrawn=self._undrawn(),
            curve_setting=self.curve_setting,
            layers=[
                {
                    "name": layer.name,
                    "bits": layer.bits,
                    "nmse": format_value(layer.nmse),
                    "rtn": format_value(layer.loss_rtn),
                    "ratio": format_value(layer.ratio),
                    "worse": layer.ratio is not None and layer.ratio > 1,
                }
                for layer in self.layers
            ],
            search_notes=[] if self.search is None else self.search.notes(),
            conditions=self._conditions(),
            recipe=_recipe_text(self.recipe),
        )

    def write(self, directory: str | Path) -> tuple[Path, Path]:
        """Write ``report.json`` and ``report.html``, each whole or not at all.

        Args:
            directory: Where to; it is made if it doesn't exist.

        Returns:
            The two paths.

        Raises:
            OutputError: A file could not be written; no partial file is left.
        """
        first, second = write_files(
            directory, {"report.json": self.to_json() + "\n", "report.html": self.to_html()}
        )
        return first, second

    def findings(self) -> list[Finding]:
        """The report in sentences, warnings among them."""
        found = [
            self._size_finding(),
            *self._source_findings(),
            *self._coverage_findings(),
            *self._original_findings(),
            *self._rtn_findings(),
            *self._agreement_findings(),
            *self._streaming_findings(),
            *self._speed_findings(),
            *self._budget_findings(),
            *self._layer_findings(),
        ]
        windows = max(
            (i.windows for i in (self.difference_to_original, self.difference_to_rtn) if i), default=0
        )
        if 2 <= windows < _FEW_WINDOWS:
            found.append(
                Finding(
                    "note",
                    f"The intervals rest on {windows} windows only and are too narrow; use a longer text.",
                )
            )
        return found

    def _label(self) -> str:
        return method_label(self.method)

    def _size_finding(self) -> Finding:
        sizes = f"{format_bytes(self.bytes_before)} {_ARROW} {format_bytes(self.bytes_after)}"
        if 0 < self.bytes_after < self.bytes_before:
            smaller = format_value(self.bytes_before / self.bytes_after)
            return Finding("good", f"{smaller}{_TIMES} smaller: {sizes}.", on_card=True)
        return Finding("warning", f"Not smaller: {sizes}.")

    def _source_findings(self) -> list[Finding]:
        if not self.source:
            return []
        found = [Finding("note", describe_source(self.source, self.bytes_before))]
        size = self.source["file_bytes"]
        if self.bytes_after >= size:
            sizes = f"{format_bytes(size)} {_ARROW} {format_bytes(self.bytes_after)}"
            found.append(Finding("warning", f"Not smaller than the GGUF file itself: {sizes}."))
        return found

    def _coverage_findings(self) -> list[Finding]:
        found = []
        if self.left_out:
            text = f"{_counted(self.left_out, 'layer')} at full precision by design"
            kinds = "vision, routers, weights that the model's own code reads"
            found.append(Finding("note", f"{text} ({kinds}): {_first_of(self.left_out)}."))
        if self.few_tokens:
            text = f"{_counted(self.few_tokens, 'layer')} of experts saw few calibration tokens"
            found.append(
                Finding("note", f"{text} and took those of the whole block: {_first_of(self.few_tokens)}.")
            )
        return found

    def _streaming_findings(self) -> list[Finding]:
        if not self.environment.get("streamed"):
            return []
        return [Finding("note", "Compressed from disk to disk, block by block; speed was not measured.")]

    def _original_findings(self) -> list[Finding]:
        original, compressed = self.perplexity.get("original"), self.perplexity.get("compressed")
        if compressed is None:
            return [Finding("note", "Quality was not measured.")]
        if not math.isfinite(compressed):
            shown = format_value(compressed)
            return [Finding("warning", f"The compressed model's perplexity is {shown}: it is not usable.")]
        if original is None or not math.isfinite(original):
            return []
        shown = f"{format_value(original, 4)} {_ARROW} {format_value(compressed, 4)}"
        values = f"perplexity {shown}"
        interval = self.difference_to_original
        if not _usable(interval):
            return [
                Finding("note", f"{_capital(values)}; too few windows to say whether that is significant.")
            ]
        if not interval.excludes_zero:
            return [
                Finding("good", f"No significant difference to the original: {values} ({_range(interval)}).")
            ]
        change = f"{abs(compressed / original - 1) * 100:.2g} %"
        if interval.estimate > 0:
            return [Finding("note", f"Perplexity rises by {change}: {shown} ({_range(interval)}).")]
        return [Finding("good", f"Perplexity falls by {change}: {shown} ({_range(interval)}).")]

    def _rtn_findings(self) -> list[Finding]:
        rtn, compressed = self.perplexity.get("rtn"), self.perplexity.get("compressed")
        if self.method == "rtn" or rtn is None or compressed is None or not math.isfinite(compressed):
            return []
        name = "round-to-nearest"
        if not math.isfinite(rtn):
            return [Finding("good", f"Better than {name}, whose perplexity is {format_value(rtn)}.")]
        values = f"perplexity {format_value(compressed, 4)} against {format_value(rtn, 4)}"
        interval = self.difference_to_rtn
        if not _usable(interval):
            return [Finding("note", f"{_capital(name)}: {values}; too few windows to say which is better.")]
        if not interval.excludes_zero:
            return [Finding("note", f"No significant difference to {name}: {values} ({_range(interval)}).")]
        if interval.estimate > 0:
            advice = "use round-to-nearest, or other settings"
            return [Finding("warning", f"Worse than {name}: {values} ({_range(interval)}); {advice}.")]
        original = self.perplexity.get("original")
        closed = ""
        if original is not None and rtn > original:
            closed = (
                f", {min(100.0, (rtn - compressed) / (rtn - original) * 100):.0f} % of its loss recovered"
            )
        return [Finding("good", f"Better than {name}: {values} ({_range(interval)}){closed}.")]

    def _agreement_findings(self) -> list[Finding]:
        parts = []
        if self.top1_agreement is not None:
            parts.append(f"same most likely token at {self.top1_agreement * 100:.1f} % of the positions")
        if self.kl is not None:
            parts.append(f"KL {format_value(self.kl)} nats per token")
        return [Finding("note", f"Against the original: {', '.join(parts)}.", on_card=True)] if parts else []

    def _speed_findings(self) -> list[Finding]:
        before, after = self.tokens_per_second.get("original"), self.tokens_per_second.get("compressed")
        if not before or not after or not math.isfinite(before) or not math.isfinite(after):
            return []
        first, second = self.speed.get("original"), self.speed.get("compressed")
        decoding = "decoding at batch 1"
        if first is None or second is None:
            return [_rate_finding(decoding, before, after, on_card=True)]
        reading = f"reading a prompt of {first.prompt_tokens} tokens"
        return [
            _rate_finding(decoding, before, after, first.decode_spread, second.decode_spread, on_card=True),
            _rate_finding(
                reading, first.prefill, second.prefill, first.prefill_spread, second.prefill_spread
            ),
        ]

    def _budget_findings(self) -> list[Finding]:
        """Where what was measured in the end oversteps the budget."""
        if self.search is None:
            return []
        budget, found = parse_budget(self.search.budget), []
        speed = self.tokens_per_second.get("compressed")
        wanted = budget.tokens_per_second
        if wanted is not None and speed is not None and speed < wanted:
            found.append(f"{format_value(speed)} tokens/s measured, {format_value(wanted)} asked for")
        if budget.bytes is not None and self.bytes_after > budget.bytes:
            found.append(f"{format_bytes(self.bytes_after)} written, {format_bytes(budget.bytes)} asked for")
        return [Finding("warning", f"Not within the budget: {text}.") for text in found]

    def _layer_findings(self) -> list[Finding]:
        compared = [layer for layer in self.layers if layer.ratio is not None]
        # Within one per cent is rounding, not a loss.
        worse = [layer for layer in compared if layer.ratio is not None and layer.ratio > 1.01]
        broken = [
            layer.name for layer in self.layers if layer.nmse is not None and not math.isfinite(layer.nmse)
        ]
        found = []
        if broken:
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            found.append(Finding("warning", f"The loss of layer {broken[0]}{more} is not a number."))
        if worse and self.method != "rtn":
            found.append(
                Finding(
                    "note", f"{len(worse)} of {len(compared)} layers lose more than with round-to-nearest."
                )
            )
        return found

    def _table(self) -> list[dict[str, str]]:
        def row(what: str, values: Mapping[str, float | None], digits: int) -> dict[str, str]:
            return {"what": what} | {name: format_value(values.get(name), digits) for name in _NAMES}

        blank = format_value(None)
        sizes = {"original": format_bytes(self.bytes_before), "compressed": format_bytes(self.bytes_after)}
        return [
            row("perplexity", self.perplexity, 4),
            row("bits per byte", self.bits_per_byte, 4),
            {"what": "weights on disk", "rtn": blank} | sizes,
            row("tokens/s (decode, batch 1)", self.tokens_per_second, 3),
            *(
                [row("tokens/s (prompt, batch 1)", {name: s.prefill for name, s in self.speed.items()}, 3)]
                if self.speed
                else []
            ),
        ]

    def _cards(self) -> list[dict[str, str]]:
        cards = []
        if self.bytes_after > 0 and self.bytes_before > 0:
            smaller = self.bytes_before / self.bytes_after
            value, what = (smaller, "smaller") if smaller >= 1 else (1 / smaller, "larger")
            note = f"{format_bytes(self.bytes_before)} {_ARROW} {format_bytes(self.bytes_after)}"
            cards.append({"value": f"{format_value(value)}{_TIMES}", "what": what, "note": note})
        original, compressed = self.perplexity.get("original"), self.perplexity.get("compressed")
        if compressed is not None:
            interval = self.difference_to_original
            note = "not compared" if not _usable(interval) else _range(interval)
            shown, what = format_value(compressed, 4), "perplexity"
            if original is not None and math.isfinite(original) and math.isfinite(compressed):
                shown, what = _signed(compressed - original), f"perplexity, from {format_value(original, 4)}"
            cards.append({"value": shown, "what": what, "note": note})
        if self.top1_agreement is not None:
            note = f"KL {format_value(self.kl)} nats per token"
            share = f"{self.top1_agreement * 100:.1f} %"
            cards.append({"value": share, "what": "same most likely token", "note": note})
        before, after = self.tokens_per_second.get("original"), self.tokens_per_second.get("compressed")
        if before and after:
            note = f"{format_value(before)} {_ARROW} {format_value(after)} tokens/s"
            cards.append(
                {"value": f"{format_value(after / before)}{_TIMES}", "what": "decoding speed", "note": note}
            )
        return cards

    def _conditions(self) -> list[tuple[str, str]]:
        rows: list[tuple[str, Any]] = [
            ("model", self.model),
            ("checkpoint", self.output),
            ("bits per weight", format_value(self.bits_per_weight)),
            ("compression time", format_seconds(self.seconds)),
            ("peak memory", format_bytes(self.peak_memory_bytes)),
        ]
        if self.search is not None:
            rows.append(("search for widths", format_seconds(self.search.seconds)))
        if self.source:
            rows.append(("original", describe_source(self.source, self.bytes_before)))
        rows += [(key.replace("_", " "), value) for key, value in self.evaluation.items()]
        rows += [
            (
                f"speed, {name}",
                f"median of {s.repeats}: {s.new_tokens} tokens after {s.prompt_tokens}, "
                f"{format_value(s.decode_spread[0])} to {format_value(s.decode_spread[1])} tokens/s",
            )
            for name, s in self.speed.items()
        ]
        rows += [(key.replace("_", " "), value) for key, value in self.environment.items()]
        return [
            (key, f"{value:,}" if isinstance(value, int) else str(value))
            for key, value in rows
            if value != ""
        ]

    def _curve_points(self) -> tuple[float | None, list[CurvePoint]]:
        """Level of the original and the points to draw, all from the same windows."""
        levels = [point.perplexity for point in self.curve if point.method == "original"]
        points = [point for point in self.curve if point.method != "original"]
        if levels:
            return levels[0], points
        for name, method in (("rtn", "rtn"), ("compressed", self.method)):
            perplexity = self.perplexity.get(name)
            if not any(point.method == method for point in self.curve) and perplexity is not None:
                points.append(CurvePoint(method, self.bits_per_weight, perplexity))
        return self.perplexity.get("original"), list(dict.fromkeys(points))

    def _quality_plot(self) -> str:
        original, drawn = self._curve_points()
        series = method_series(
            (
                p.method,
                Point(
                    p.bits_per_weight,
                    p.perplexity,
                    f"{method_label(p.method)}, {format_value(p.bits_per_weight)} bits: {format_value(p.perplexity, 4)}",
                ),
            )
            for p in drawn
        )
        return line_plot(
            series,
            x_label="bits per weight",
            y_label="perplexity",
            reference=None if original is None else ("original", original),
            description="Perplexity against bits per weight",
        )

    def _undrawn(self) -> str:
        lost = [p for p in self._curve_points()[1] if not math.isfinite(p.perplexity)]
        return "; ".join(
            f"{p.method.upper()} at {format_value(p.bits_per_weight)} bits: {format_value(p.perplexity)}"
            for p in lost
        )

    def _size_plot(self) -> str:
        bars = [
            Bar("original", self.bytes_before, format_bytes(self.bytes_before), "original"),
            Bar("compressed", self.bytes_after, format_bytes(self.bytes_after), "awq"),
        ]
        return bar_plot(bars, title="weights on disk")

    def _speed_plot(self) -> str:
        bars = []
        for name, tone in (("original", "original"), ("compressed", "awq")):
            value = self.tokens_per_second.get(name)
            if value is not None and math.isfinite(value):
                bars.append(Bar(name, value, f"{format_value(value)} tokens/s", tone))
        return bar_plot(bars, title="decoding at batch 1, tokens per second")

    def _layer_plot(self) -> str:
        groups: dict[str, list[Pair]] = {}
        for layer in self.layers:
            if layer.nmse is None:
                continue
            rtn = layer.nmse if layer.loss_rtn is None else layer.loss_rtn
            title = (
                f"{layer.name}, {layer.bits} bits: {format_value(layer.nmse)} "
                f"(round-to-nearest {format_value(layer.loss_rtn)})"
            )
            groups.setdefault(_kind(layer.name), []).append(Pair(rtn, layer.nmse, title))
        return pair_plot(
            [PairGroup(kind, pairs) for kind, pairs in groups.items()],
            before="round-to-nearest",
            after=self._label(),
            y_label="normalized output error",
            description="Normalized output error of each layer, by kind of layer and then by depth",
        )


def environment(device: str | torch.device = "cpu", *, seed: int | None = None) -> dict[str, Any]:
    """Versions, device, date and seed: what someone needs to repeat a measurement.

    Args:
        device: Where the model ran.
        seed: Of calibration and intervals.
    """
    import torch

    from tensormill.roofline import device_name

    found: dict[str, Any] = {"device": device_name(device), "threads": torch.get_num_threads()}
    found["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    if seed is not None:
        found["seed"] = seed
    found["python"] = platform.python_version()
    found["system"] = f"{platform.system()} {platform.machine()}"
    for name in ("tensormill", "torch", "transformers", "tokenizers", "compressed-tensors", "triton"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name.replace("-", "_")] = importlib.metadata.version(name)
    return found


def format_bytes(count: float) -> str:
    """Bytes for people, in powers of 1000.

    Example:
        >>> format_bytes(33_012_345), format_bytes(512)
        ('33.0 MB', '512 bytes')
    """
    size = float(count)
    if not math.isfinite(size):
        return format_value(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{format_value(size)} {unit}"
        size /= 1000
    return f"{format_value(size)} TB"


def describe_source(source: Mapping[str, Any], stored: int) -> str:
    """One sentence: of what GGUF file "the original" is the dequantized form.

    Args:
        source: As `CompressionReport.source`.
        stored: Bytes of the dequantized weights.
    """
    before = ", quantized already" if source["quantized"] else ""
    return (
        f"The original is a GGUF file of {format_bytes(source['file_bytes'])}{before}: {source['types']}. "
        f'It was dequantized to {source["dtype"]}, and "original" means that form, of {format_bytes(stored)}.'
    )


def _counted(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"


def _first_of(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (" and others" if len(names) > most else "")


def _layer_losses(layers: Iterable[Any]) -> list[LayerLoss]:
    return [LayerLoss(one.name, one.bits, one.nmse, getattr(one, "loss_rtn", None)) for one in layers]


def format_seconds(seconds: float) -> str:
    """A duration for people: seconds, from two minutes on minutes, from two hours on hours."""
    if not math.isfinite(seconds) or seconds < 120:
        return f"{format_value(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes / 60:.1f} h"


def encodable(text: str, encoding: str) -> str:
    """The text in characters that a terminal of this encoding can show."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = str.maketrans({_MINUS: "-", _TIMES: "x", _ARROW: "->", "\N{EN DASH}": "-"})
        return text.translate(plain).encode(encoding, "replace").decode(encoding)
    return text


def _rate_finding(
    what: str,
    before: float,
    after: float,
    spread_before: tuple[float, float] = (math.inf, -math.inf),
    spread_after: tuple[float, float] = (math.inf, -math.inf),
    *,
    on_card: bool = False,
) -> Finding:
    """Whether `what` became faster, in tokens per second; no difference where the repeats overlap."""
    values = f"{format_value(before)} {_ARROW} {format_value(after)} tokens/s, {what}"
    (low, high), (low_after, high_after) = spread_before, spread_after
    if low <= high_after and low_after <= high:
        return Finding("note", f"No clear difference in speed: {values}; the repeats overlap.")
    if after > 1.05 * before:
        return Finding("good", f"{format_value(after / before)}{_TIMES} faster: {values}.", on_card=on_card)
    if after < before / 1.05:
        return Finding("warning", f"{format_value(before / after)}{_TIMES} slower on this device: {values}.")
    return Finding("note", f"About as fast: {values}.")


def _signed(value: float) -> str:
    return ("+" if value >= 0 else _MINUS) + format_value(abs(value), 2)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _usable(interval: Interval | None) -> TypeGuard[Interval]:
    return interval is not None and math.isfinite(interval.low) and math.isfinite(interval.high)


def _range(interval: Interval) -> str:
    ends = f"{_signed(interval.low)} to {_signed(interval.high)}"
    return f"{interval.confidence * 100:g} % interval of the difference {ends}"


def _interval_fields(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    return {**vars(interval), "significant": interval.excludes_zero}


def _attribute(objects: Mapping[str, Any], name: str, attribute: str) -> float | None:
    return getattr(objects[name], attribute) if name in objects else None


def _kind(name: str) -> str:
    """The part of a layer's path that its like in other blocks share: "model.layers.3.mlp.up_proj" to
    "up_proj".
    """
    parts = [part for part in name.split(".") if not re.fullmatch(r"\d+", part)]
    return parts[-1] if parts else name


def _recipe_text(recipe: Any) -> str:
    if recipe is None or isinstance(recipe, str):
        return recipe or ""
    import yaml

    return str(yaml.safe_dump(plain(recipe), sort_keys=False, allow_unicode=True)).rstrip()


def plain(value: Any) -> Any:
    """JSON's own types: containers copied, NaN and infinities to None, anything unknown to its text."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(one) for one in value]
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a number of torch or numpy
        return plain(value.item())
    return str(value)

"""Which method at which width: quality against bytes and speed, as a table, as a page, and as JSON.

All configurations are measured by one sweep, on the same windows and with interleaved timing. A row is Pareto-optimal if
no other is at most as large, at most as perplexed and not clearly slower, and better in one of them; "clearly" means that
the timed repeats don't overlap, so that noise in a timing moves no mark.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tensormill.compress import checkpoint
from tensormill.compress.evaluate import max_positions
from tensormill.compress.experts import unfuse_experts
from tensormill.compress.methods import check_layers
from tensormill.compress.output import check_files, write_files
from tensormill.compress.pipeline import evaluation_text, open_with_tokenizer, short_name, source_fields
from tensormill.compress.report import (
    describe_source,
    encodable,
    environment,
    format_bytes,
    plain,
)
from tensormill.compress.speed import Speed
from tensormill.compress.stages import Progress, Stages
from tensormill.compress.structure import discover
from tensormill.compress.sweep import MAX_TOKENS, METHODS_COMPARED, ORIGINAL, SAMPLES, Measured, plan, sweep
from tensormill.compress.text import read_texts
from tensormill.errors import InvalidArgument
from tensormill.page import render_page
from tensormill.plots import Point, Series, format_value, line_plot, method_label, method_series

if TYPE_CHECKING:
    from rich.console import Console

BITS = (2, 3, 4)
FILES = ("compare.json", "compare.html")


@dataclass(frozen=True)
class Row:
    """One configuration, or the original.

    Attributes:
        method: As it was given, "awq" or "awq:rounding=gptq", or "original".
        bits: Width of a code; None for the original.
        group_size: Weights that share a scale, -1 for a row; None for the original.
        bytes: Of all tensors as a checkpoint stores them.
        bits_per_weight: Average over the compressed weights, scales and zero points included; of the original, bits
            of its dtype.
        perplexity: On the evaluated windows.
        kl: Mean KL(original || this) in nats per token; None for the original.
        top1_agreement: Share of positions with the original's most likely token, 0 to 1; None for the original.
        tokens_per_second: Decoding at batch 1.
        seconds: Wall time of the method; None for the original.
        pareto: Whether no other row is better in one respect and worse in none, see the module's docstring.
    """

    method: str
    bits: int | None
    group_size: int | None
    bytes: int
    bits_per_weight: float
    perplexity: float
    kl: float | None
    top1_agreement: float | None
    tokens_per_second: float | None
    seconds: float | None
    pareto: bool


@dataclass(frozen=True)
class MethodComparison:
    """What `compare` found.

    Attributes:
        model: As the user named it.
        text: What the evaluation text is called.
        rows: The original first, then the configurations, narrow widths first.
        evaluation: Tokens, bytes and windows evaluated, and the text's SHA-256.
        calibration: Windows and tokens of a window that AWQ and GPTQ observed.
        speed: Settings of the timing, and each row's slowest and fastest repeat.
        environment: Versions, device, date and seed.
        source: Of a GGUF file, as in `CompressionReport`.
        output: Where `compare.json` and `compare.html` lie.
    """

    model: str
    text: str
    rows: list[Row]
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    speed: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    output: str = ""

    @classmethod
    def from_measured(cls, measured: Sequence[Measured], **fields: Any) -> MethodComparison:
        """A comparison of what a sweep measured, speed included.

        Args:
            measured: From `sweep`; the original first.
            **fields: The comparison's other fields.
        """
        best = pareto([(one.bytes, one.evaluation.perplexity, _spread(one.speed)) for one in measured])
        rows = []
        for one, is_best in zip(measured, best, strict=True):
            config = None if one.step is None else one.step.config
            comparison = one.evaluation.comparison
            rows.append(
                Row(
                    method=one.method,
                    bits=None if config is None else config.bits,
                    group_size=None if config is None else config.group_size,
                    bytes=one.bytes,
                    bits_per_weight=one.bits_per_weight,
                    perplexity=one.evaluation.perplexity,
                    kl=None if comparison is None else comparison.kl,
                    top1_agreement=None if comparison is None else comparison.top1_agreement,
                    tokens_per_second=None if one.speed is None else one.speed.decode,
                    seconds=one.seconds,
                    pareto=is_best,
                )
            )
        first = measured[0]
        evaluation = {
            "tokens": first.evaluation.tokens,
            "bytes": first.evaluation.bytes,
            "windows": first.evaluation.windows,
            "window": first.evaluation.window,
            "text_sha256": first.evaluation.text_sha256,
        }
        speed: dict[str, Any] = {}
        if first.speed is not None:
            speed = {
                "prompt_tokens": first.speed.prompt_tokens,
                "new_tokens": first.speed.new_tokens,
                "repeats": first.speed.repeats,
                "spread": [_spread(one.speed) for one in measured],
            }
        return cls(rows=rows, evaluation=evaluation, speed=speed, **fields)

    def to_dict(self) -> dict[str, Any]:
        """As JSON's types: model, text and rows first; NaN and infinities are None."""
        result: dict[str, Any] = plain(
            {
                "model": self.model,
                "text": self.text,
                "rows": [vars(row) for row in self.rows],
                "evaluation": self.evaluation,
                "calibration": self.calibration,
                "speed": self.speed,
                "environment": self.environment,
                "source": self.source,
                "output": self.output,
            }
        )
        return result

    def to_json(self) -> str:
        """`to_dict` as one JSON document."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)

    def print(self, console: Console) -> None:
        """Print the table, and what it rests on, on a rich console."""
        from rich.table import Table
        from rich.text import Text

        def fit(text: str) -> Text:
            return Text(encodable(text, console.encoding))

        table = Table(box=None, pad_edge=False, header_style="dim")
        names = list(self._cells(self.rows[0]))
        for name in names:
            first = name == names[0]
            table.add_column(name, justify="left" if first else "right", no_wrap=not first)
        for row in self.rows:
            style = "bold" if row.pareto else ""
            table.add_row(*map(fit, self._cells(row).values()), style=style)
        console.print(table)
        for sentence in self.notes():
            console.print(fit(sentence), style="dim")

    def to_html(self) -> str:
        """One page with table and plots that needs no other file, no network and no script."""
        return render_page(
            "compare.html.jinja",
            plots={"size_plot": self._size_plot(), "speed_plot": self._speed_plot()},
            comparison=self,
            columns=list(self._cells(self.rows[0])),
            rows=[{"pareto": row.pareto, "cells": list(self._cells(row).values())} for row in self.rows],
            notes=self.notes(),
            undrawn=[_name(row) for row in self.rows if not math.isfinite(row.perplexity)],
            conditions=[
                (key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
                for key, value in self.environment.items()
            ],
        )

    def notes(self) -> list[str]:
        """What the figures rest on, in sentences."""
        found = []
        if self.source:
            found.append(describe_source(self.source, self.rows[0].bytes))
        e = self.evaluation
        if e:
            found.append(
                f"Evaluated on {e['tokens']:,} tokens in {e['windows']} windows ({format_bytes(e['bytes'])}) of "
                f"{self.text}."
            )
        if self.calibration:
            found.append(
                f"Calibrated on {self.calibration['samples']} windows of {self.calibration['length']} tokens of "
                f"{self.calibration['text']}."
            )
        if self.speed:
            found.append(
                f"Speed: decoding {self.speed['new_tokens']} tokens after {self.speed['prompt_tokens']} at batch 1, "
                f"medians of {self.speed['repeats']} interleaved repeats."
            )
        found.append(
            "* Pareto-optimal: no other row is at most as large, at most as perplexed and not clearly slower, "
            "and better in one of them."
        )
        return found

    @staticmethod
    def _cells(row: Row) -> dict[str, str]:
        agreement = "\N{EN DASH}" if row.top1_agreement is None else f"{row.top1_agreement * 100:.1f} %"
        return {
            "method": method_label(row.method) + (" *" if row.pareto else ""),
            "bits": "\N{EN DASH}" if row.bits is None else str(row.bits),
            "size": format_bytes(row.bytes),
            "bits/w": format_value(row.bits_per_weight),
            "perplexity": format_value(row.perplexity, 4),
            "KL": format_value(row.kl),
            "top-1": agreement,
            "tokens/s": format_value(row.tokens_per_second),
            "time": "\N{EN DASH}" if row.seconds is None else f"{format_value(row.seconds)} s",
        }

    def _size_plot(self) -> str:
        original = self.rows[0].perplexity
        return line_plot(
            method_series(
                (row.method, Point(row.bytes / 1e6, row.perplexity, _title(row), row.pareto))
                for row in self.rows[1:]
            ),
            x_label="size in MB",
            y_label="perplexity",
            reference=(ORIGINAL, original),
            description="Perplexity against size",
        )

    def _speed_plot(self) -> str:
        points = [
            (row.method, Point(row.tokens_per_second, row.perplexity, _title(row), row.pareto))
            for row in (*self.rows[1:], self.rows[0])  # the original last: markers as in the other plot
            if row.tokens_per_second is not None
        ]
        # Neighbours in speed are not neighbours in width: points without lines.
        series = [Series(one.name, one.points, one.tone, joined=False) for one in method_series(points)]
        return line_plot(
            series,
            x_label="tokens per second, decoding at batch 1",
            y_label="perplexity",
            description="Perplexity against decoding speed",
        )


def compare(
    model: str | os.PathLike[str],
    *,
    methods: Sequence[str] = METHODS_COMPARED,
    bits: Sequence[int] = BITS,
    group_size: int = 128,
    symmetric: bool = False,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    calibration_text: Sequence[str | os.PathLike[str]] | None = None,
    text: Sequence[str | os.PathLike[str]] | None = None,
    samples: int = SAMPLES,
    max_tokens: int | None = MAX_TOKENS,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> MethodComparison:
    """Measure every method at every width on one model; no checkpoint is written.

    Holds the original and the packed weights of all configurations in memory.

    Args:
        model: A checkpoint directory of transformers, a GGUF file, or "builtin:python-lm".
        methods: Names of methods, each once; settings of its own may follow each, as in "awq:rounding=gptq".
        bits: Widths of a code, 2 to 8, each once.
        group_size: Weights that share a scale; -1 for a row.
        symmetric: Without zero points.
        output: Directory of `compare.json` and `compare.html`; None names it after the model, in the current
            directory.
        overwrite: Replace files of these names that lie there.
        calibration_text: Files to calibrate on; None takes sources of Python's standard library.
        text: Files to evaluate on; None takes held-out sources of the standard library.
        samples: Calibration windows, of 512 tokens each or the model's context.
        max_tokens: Evaluate on at most so many tokens; None takes all.
        device: Where to compute.
        dtype: Of the weights; None keeps the checkpoint's.
        seed: Of the prompt on which speed is measured.
        progress: Called with a message and the share done (0 to 1).

    Returns:
        The comparison; it also lies in `output`.

    Raises:
        TensormillError: Bad arguments, a damaged or unsuitable model, too little text, or an unwritable output;
            nothing is left half-written.

    Example:
        >>> compare("builtin:python-lm", methods=["rtn"], bits=[3, 4])  # doctest: +SKIP
    """
    shared = {"group_size": group_size, "symmetric": symmetric, "calibration_samples": samples}
    steps = plan(methods, bits, **shared)
    if max_tokens is not None and max_tokens < 2:
        raise InvalidArgument(f"given max_tokens {max_tokens}, expected at least 2")
    target = Path(output) if output is not None else Path(f"{short_name(model)}-compare")
    check_files(target, FILES, overwrite=overwrite)
    texts, text_name = evaluation_text(text)
    calibrated = any(step.method != "rtn" for step in steps)
    if calibrated and calibration_text is not None:
        read_texts(calibration_text)  # refuses a missing file before the model is opened
    stages = Stages(progress, open=5, sweep=94, write=1)
    stages.enter("open", f"opening {os.fspath(model)}")
    original, tokenizer = open_with_tokenizer(model, device, dtype)
    unfuse_experts(original)
    check_layers(original, discover(original), steps[0].config)
    length = steps[0].config.calibration_length
    length = min(length, max_positions(original) or length)
    steps = plan(methods, bits, calibration_length=length, **shared)
    stages.enter("sweep", "measuring")
    measured = sweep(
        original, tokenizer, texts, steps, calibration_text=calibration_text, max_tokens=max_tokens, speed=True,
        seed=seed, progress=stages,
    )  # fmt: skip
    stages.enter("write", f"writing {target}")
    calibration_name = (
        "Python's standard library"
        if calibration_text is None
        else ", ".join(os.fspath(file) for file in calibration_text)
    )
    comparison = MethodComparison.from_measured(
        measured,
        model=os.fspath(model),
        text=text_name,
        calibration={"samples": samples, "length": length, "text": calibration_name} if calibrated else {},
        environment=environment(device, seed=seed),
        source=source_fields(checkpoint.resolve_path(model), original),
        output=str(target),
    )
    write_files(target, dict(zip(FILES, (comparison.to_json() + "\n", comparison.to_html()), strict=True)))
    stages.done()
    return comparison


def pareto(rows: Sequence[tuple[float, float, tuple[float, float] | None]]) -> list[bool]:
    """Which rows no other dominates.

    Args:
        rows: Bytes, perplexity, and the slowest and fastest repeat in tokens per second (None: not measured).

    Returns:
        A mark for each row. A perplexity that isn't finite is never optimal.

    Example:
        >>> pareto([(10, 5.0, None), (20, 5.0, None), (20, 4.0, None)])
        [True, False, True]
    """

    def dominates(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
        if not math.isfinite(a[1]) or a[0] > b[0] or a[1] > b[1] or _faster(b[2], a[2]):
            return False
        return bool(a[0] < b[0] or a[1] < b[1] or _faster(a[2], b[2]))

    return [math.isfinite(row[1]) and not any(dominates(other, row) for other in rows) for row in rows]


def _faster(a: tuple[float, float] | None, b: tuple[float, float] | None) -> bool:
    """Whether the slowest repeat of one is faster than the fastest of the other."""
    return a is not None and b is not None and a[0] > b[1]


def _spread(speed: Speed | None) -> tuple[float, float] | None:
    return None if speed is None else speed.decode_spread


def _name(row: Row) -> str:
    return method_label(row.method) if row.bits is None else f"{method_label(row.method)}, {row.bits} bits"


def _title(row: Row) -> str:
    speed = "" if row.tokens_per_second is None else f", {format_value(row.tokens_per_second)} tokens/s"
    best = ", Pareto-optimal" if row.pareto else ""
    return f"{_name(row)}: {format_value(row.perplexity, 4)}, {format_bytes(row.bytes)}{speed}{best}"

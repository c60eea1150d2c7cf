"""C2: the regimes of abc-parametrizations, measured on networks with two hidden layers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tensormill.papers.catalogue import Measurement, Row, Run
from tensormill.papers.curves import Curve, fit_exponent
from tensormill.papers.infinite_width_features.paper import PAPER

if TYPE_CHECKING:
    from torch import Tensor

    from tensormill.numerics.infinite_width_features import ABC

INPUTS, BATCH, OUTPUTS, ETA, STEPS = 4, 4, 8, 1.0, 3
THRESHOLD = 0.125
"""Half the grid's step of exponents: a measured exponent nearer to zero than this counts as zero."""


def grid(full: bool) -> list[ABC]:
    """Exponents in steps of a quarter, with c = 0: a shift of all a, b and c gives all others.

    Mostly with a_1 + b_1 = 0 and a_2 + b_2 = 1/2; a few break these, and are unstable.
    """
    from tensormill.numerics.infinite_width_features import ABC

    first, second = (-0.75, -0.5, -0.25, 0.0, 0.25), (-0.25, 0.0, 0.25, 0.5, 0.75)
    third = (0.25, 0.5, 0.75, 1.0) if full else (0.25, 0.5, 0.75)
    output = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5) if full else (0.5, 0.75, 1.0, 1.25)
    cells = [
        ABC((a1, a2, a3), (-a1, 0.5 - a2, s3 - a3), 0.0)
        for a1, a2, a3, s3 in itertools.product(first, second, third, output)
        if a3 >= 0.5 or s3 == 0.5  # all with a_3 < 1/2 are unstable alike
    ]
    for a1, off1, off2 in itertools.product((-0.5, 0.0), (-0.5, 0.0, 0.5), (-0.5, 0.0, 0.5)):
        if off1 or off2:
            cells.append(ABC((a1, 0.0, 0.5), (-a1 + off1, 0.5 + off2, 0.5), 0.0))
    return cells


def changes(cells: Sequence[ABC], width: int, *, seed: int, device: str) -> dict[str, Tensor]:
    """Train every cell's network on the same data and initial draws; sizes and changes as root mean squares.

    A network of two hidden layers is W1 (n, d), W2 (n, n), W3 (o, n), all effective weights n^(-a_l) w^l: initial sizes
    n^(-a_l - b_l), learning rates eta n^(-c - 2 a_l). W2 is the cells' common Gaussian matrix, times the cell's factor,
    plus the low-rank sum of the steps, so that all cells share two products with it at each step. float64: kernels'
    changes are small differences.

    Returns:
        "h1", "h2", "f" at the start, and the largest changes "dh1", "dh2", "df" over the steps, each (cells,).
    """
    import torch

    options: Any = {"device": device, "dtype": torch.float64}
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    x = draw(INPUTS, BATCH)
    y = draw(OUTPUTS, BATCH)
    g1, g3, g2 = draw(width, INPUTS), draw(OUTPUTS, width), draw(width, width)

    def factor(layer: int, kind: str) -> Tensor:
        powers = [
            -(cell.a[layer] + cell.b[layer]) if kind == "start" else -(cell.c + 2 * cell.a[layer])
            for cell in cells
        ]
        return torch.tensor([width**power for power in powers], **options)[:, None, None]

    count = len(cells)
    w1, w3 = factor(0, "start") * g1, factor(2, "start") * g3  # [cells, n, d], [cells, o, n]
    rates = [ETA * factor(layer, "rate") for layer in range(3)]
    start2 = factor(1, "start")
    left = torch.zeros(count, width, 0, **options)
    right = torch.zeros(count, width, 0, **options)

    def shared(matrix: Tensor, columns: Tensor) -> Tensor:
        """matrix @ columns[cell] for every cell at once; columns (cells, n, batch)."""
        return (matrix @ columns.transpose(0, 1).reshape(width, -1)).view(width, count, -1).transpose(0, 1)

    def rms(value: Tensor) -> Tensor:
        return value.square().mean((1, 2)).sqrt()

    measured: dict[str, Tensor] = {}
    begun: dict[str, Tensor] = {}
    for step in range(STEPS + 1):
        h1 = w1 @ x
        x1 = torch.tanh(h1)
        h2 = start2 * shared(g2, x1) + left @ (right.mT @ x1)
        x2 = torch.tanh(h2)
        f = w3 @ x2
        for name, value in (("h1", h1), ("h2", h2), ("f", f)):
            if step == 0:
                begun[name] = value
                measured[name], measured["d" + name] = rms(value), torch.zeros_like(rms(value))
            else:
                measured["d" + name] = torch.maximum(measured["d" + name], rms(value - begun[name]))
        if step == STEPS:
            break
        delta3 = (f - y) / BATCH
        delta2 = (w3.mT @ delta3) * (1 - x2 * x2)
        delta1 = (start2 * shared(g2.mT, delta2) + right @ (left.mT @ delta2)) * (1 - x1 * x1)
        w3 = w3 - rates[2] * (delta3 @ x2.mT)
        left, right = torch.cat((left, -rates[1] * delta2), 2), torch.cat((right, x1), 2)
        w1 = w1 - rates[0] * (delta1 @ x.mT)
    return measured


def measured_regime(powers: dict[str, float]) -> str:
    """The regime that measured powers of width tell: what must not grow grows; the function, the features move."""
    if any(abs(powers[name]) > THRESHOLD for name in ("h1", "h2")) or any(
        not powers[name] <= THRESHOLD for name in ("f", "dh1", "dh2", "df")
    ):
        return "unstable"
    if powers["df"] < -THRESHOLD:
        return "trivial"
    return "feature learning" if powers["dh2"] >= -THRESHOLD else "kernel"


@PAPER.claim(
    "C2",
    statement="Every stable and nontrivial parametrization either learns features or follows a kernel, as r tells",
    unit="% of parametrizations",
    criterion=(
        "the regime that is measured (unstable, trivial, kernel, feature learning) is the predicted one for at least "
        "95 % of the stable parametrizations on the grid, for 95 % of the unstable ones, and for each named one"
    ),
    measures=("tensormill.numerics.infinite_width_features.parametrization",),
)
def dichotomy(run: Run) -> Measurement:
    """Powers of width, 2^6 to 2^12, of sizes at the start and of the largest changes over three steps of SGD.

    Full scale goes to width 2^13 on a finer grid with three seeds: about ten minutes on a CPU.
    """
    from tensormill.numerics.infinite_width_features import ABC, classify

    full = run.scale == "full"
    widths = [2**k for k in ((6, 8, 10, 12) if not full else (6, 8, 9, 10, 11, 12, 13))]
    seeds = range(run.seed, run.seed + (3 if full else 1))
    named = {
        "standard, lr / n": ABC.preset("sp", 2),
        "standard, lr": ABC((0, 0, 0), (0, 0.5, 0.5), 0),
        "neural tangent": ABC.preset("ntp", 2),
        "muP": ABC.preset("mup", 2),
    }
    cells = [*named.values(), *grid(full)]
    sizes: dict[int, dict[str, list[float]]] = {}
    for number, width in enumerate(widths):
        run.progress(f"{len(cells)} parametrizations at width {width}", number / len(widths))
        per_seed = [changes(cells, width, seed=seed, device=run.device) for seed in seeds]
        sizes[width] = {
            name: [
                math.exp(sum(math.log(max(float(one[name][k]), 1e-300)) for one in per_seed) / len(per_seed))
                for k in range(len(cells))
            ]
            for name in per_seed[0]
        }
    agree, misses, errors, confusion = 0, [], [], Counter[tuple[str, str]]()
    rows, curves = [], []
    names = list(named)
    for k, cell in enumerate(cells):
        powers = {}
        for name in sizes[widths[0]]:
            values = [sizes[width][name][k] for width in widths]
            finite = all(math.isfinite(value) and value > 0 for value in values)
            powers[name] = fit_exponent(widths, values).value if finite else math.inf
        predicted, found = classify(cell), measured_regime(powers)
        confusion[predicted.name, found] += 1
        agree += predicted.name == found
        if predicted.name != found:
            misses.append((cell, predicted.name, found, powers))
        if predicted.stable:
            errors.append(abs(powers["dh2"] + predicted.r))
        if k < len(names) and math.isfinite(powers["dh2"]):
            values = [sizes[width]["dh2"][k] for width in widths]
            exponent = fit_exponent(widths, values)
            rows.append(
                Row(
                    f"{names[k]}: power of width of the features' change (predicted {-predicted.r:g}, measured {found})",
                    exponent.value,
                    "power of width",
                    spread=(exponent.low, exponent.high),
                    setting={"a": cell.a, "b": cell.b, "c": cell.c, "r": predicted.r, "regime": found},
                )
            )
            curves.append(Curve(names[k], widths, values, "width", "change of the hidden features", exponent))
    shares = []
    for kind in (True, False):
        total = sum(n for (name, _), n in confusion.items() if (name != "unstable") == kind)
        right = sum(
            n for (name, found), n in confusion.items() if name == found and (name != "unstable") == kind
        )
        shares.append(100 * right / total)
        what = "stable" if kind else "unstable"
        rows.append(
            Row(f"{what} ones whose regime is the predicted one", shares[-1], "%", setting={"cells": total})
        )
    errors.sort()
    rows.append(
        Row(
            "stable ones: median distance of the measured power to -r",
            errors[len(errors) // 2],
            "power of width",
            spread=(errors[0], errors[-1]),
        )
    )
    for (predicted_name, found), count in sorted(confusion.items()):
        rows.append(Row(f"predicted {predicted_name}, measured {found}", count, "parametrizations"))
    named_agree = all(cell not in cells[: len(names)] for cell, *_ in misses)
    reason = f"{agree} of {len(cells)}"
    if misses:
        cell, predicted_name, found, powers = misses[0]
        reason += (
            f"; first miss a={cell.a}, b={cell.b}, predicted {predicted_name}, measured {found} "
            f"({', '.join(f'{name} {power:.2f}' for name, power in powers.items())})"
        )
    return Measurement(
        rows, holds=min(shares) >= 95 and named_agree, reason=reason, repeats=len(seeds), curves=curves
    )

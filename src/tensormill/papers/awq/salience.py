"""C2: which input channels matter, and what scaling them up before rounding does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensormill.papers.awq.paper import PAPER
from tensormill.papers.awq.subjects import SOURCES, Subject, builtin_and_smollm2
from tensormill.papers.catalogue import Measurement, Row, Run

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from tensormill.compress.evaluate import Evaluation
    from tensormill.compress.formats.quantization import QuantSpec

FRACTION = 0.01
BITS = 3
WINDOW = 256
"""Tokens of an evaluation window: short ones, so that there are enough to resample."""

SCALES = (1.0, 1.25, 1.5, 2.0, 4.0)
PAPER_CURVE = {
    1.0: (23.54, 0.0),
    1.25: (12.87, 0.028),
    1.5: (12.48, 0.044),
    2.0: (11.92, 0.082),
    4.0: (12.36, 0.212),
}
"""Scale to (perplexity, share of groups whose step changes) of OPT-6.7B; recalled, not checked against the text."""


@PAPER.claim(
    "C2",
    figure="salient-channels",
    criterion=(
        "at 3 bits in groups of 128, 1 % of the input channels kept as they are lower perplexity more when chosen by "
        "activation than by weight norm and than at random (mean of several draws), each with a paired 95 % interval "
        "that excludes zero, on every model measured"
    ),
    measures=SOURCES,
)
def salience(run: Run) -> Measurement:
    """Perplexity after 3-bit rounding with 1 % of each linear's input channels spared, or scaled up by s.

    On the built-in model, untouched and with injected outliers, whose salient channels are known by construction;
    at full scale also on SmolLM2-135M. The scaled channels are those that activation chose. Beside the perplexity:
    the share of groups whose step D changes, the mean D'/D, the error of the scaled channels' weights over that
    without scaling, which the paper predicts as (D'/D)/s, and that of all other weights.
    """
    full = run.scale == "full"
    subjects, notes = builtin_and_smollm2(run, ("plain", "outliers"), None if full else 4096)
    rows: list[Row] = []
    failures: list[str] = []
    for i, subject in enumerate(subjects):
        run.progress(subject.name, i / len(subjects))
        made, missed, best = _measure(
            run, subject, samples=128 if full else 8, draws=10 if full else 3, part=(i, len(subjects))
        )
        rows += made
        failures += missed
        notes.append(f"{subject.name}: the best scale is {best:g}")
    return Measurement(
        rows,
        holds=not failures,
        reason="; ".join([*(failures or ["activation finds the channels that matter"]), *notes]),
        repeats=10 if full else 3,
    )


def _measure(
    run: Run, subject: Subject, samples: int, draws: int, part: tuple[int, int]
) -> tuple[list[Row], list[str], float]:
    """Rows, what fell short, and the best scale, on one model."""
    import torch

    from tensormill.compress.evaluate import evaluate, paired_bootstrap
    from tensormill.compress.formats.quantization import QuantSpec, fake_quantize

    spec = QuantSpec(bits=BITS, group_size=subject.group_size)
    magnitudes = activation_magnitudes(subject, samples)
    weights = {name: linear_of(subject.model, name).weight.detach().clone() for name in magnitudes}
    by_activation = {name: salient_channels(values, FRACTION) for name, values in magnitudes.items()}
    by_weight = {name: salient_channels(weight.norm(dim=0), FRACTION) for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(run.seed)
    step = 0
    steps = 4 + draws + len(SCALES) - 1

    def score(what: str, change: Any) -> Evaluation:
        nonlocal step
        run.progress(f"{subject.name}: {what}", (part[0] + step / steps) / part[1])
        step += 1
        with changed_weights(subject.model, {name: change(name, weight) for name, weight in weights.items()}):
            return evaluate(
                subject.model, subject.tokenizer, subject.text, window=WINDOW, max_tokens=subject.max_tokens
            )

    scores = {
        "original": score("original", lambda name, weight: weight),
        "rounded": score("rounded", lambda name, weight: fake_quantize(weight, spec)),
        "by activation": score(
            "by activation", lambda name, weight: round_but(weight, by_activation[name], spec)
        ),
        "by weight norm": score(
            "by weight norm", lambda name, weight: round_but(weight, by_weight[name], spec)
        ),
    }
    random = []
    for draw in range(draws):
        drawn = {
            name: torch.randperm(weight.shape[1], generator=generator)[: len(by_activation[name])]
            for name, weight in weights.items()
        }
        random.append(
            score(
                f"at random, draw {draw + 1}",
                lambda name, weight, drawn=drawn: round_but(weight, drawn[name].to(weight.device), spec),
            )
        )
    setting = {
        "bits": BITS,
        "group_size": subject.group_size,
        "fraction": FRACTION,
        "samples": samples,
        "tokens": scores["rounded"].tokens,
        "windows": scores["rounded"].windows,
    }
    label = subject.name
    rows = [
        Row(f"{label} {name}", value.perplexity, "perplexity", setting=setting)
        for name, value in scores.items()
    ]
    found = [value.perplexity for value in random]
    mean_loss = torch.stack([value.window_nll for value in random]).mean(dim=0)
    rows.append(
        Row(
            f"{label} at random",
            float(mean_loss.mean().exp()),
            "perplexity",
            (min(found), max(found)),
            setting={**setting, "draws": draws},
        )
    )
    failures = []
    losses = {"by weight norm": scores["by weight norm"].window_nll, "at random": mean_loss}
    for other, loss in losses.items():
        interval = paired_bootstrap(scores["by activation"].window_nll, loss, seed=run.seed)
        rows.append(
            Row(
                f"{label} by activation minus {other}",
                interval.estimate,
                "perplexity",
                (interval.low, interval.high),
            )
        )
        if not (interval.excludes_zero and interval.estimate < 0):
            failures.append(f"{label}: not significantly better than {other}")

    curve = {1.0: scores["rounded"].perplexity}
    for scale in SCALES:
        if scale != 1.0:
            curve[scale] = score(
                f"scale {scale:g}",
                lambda name, weight, scale=scale: round_scaled(weight, by_activation[name], scale, spec),
            ).perplexity
        rows += _scale_rows(label, scale, curve[scale], weights, by_activation, spec)
    return rows, failures, min(curve, key=lambda scale: curve[scale])


def _scale_rows(
    label: str,
    scale: float,
    perplexity: float,
    weights: Mapping[str, Tensor],
    channels: Mapping[str, Tensor],
    spec: QuantSpec,
) -> list[Row]:
    changes = StepChanges()
    for name, weight in weights.items():
        changes += step_changes(weight, channels[name], scale, spec)
    perplexity_there, share_there = PAPER_CURVE[scale]
    what = f"{label} scaled by {scale:g}"
    return [
        Row(what, perplexity, "perplexity", setting={"scale": scale, "paper, recalled": perplexity_there}),
        Row(
            f"{what}: groups whose step changes",
            changes.share,
            "share",
            setting={"paper, recalled": share_there},
        ),
        Row(f"{what}: the same of groups with a scaled channel", changes.share_with_channel, "share"),
        Row(f"{what}: mean D'/D", changes.mean_ratio, "x"),
        Row(
            f"{what}: error of the scaled channels",
            changes.error_scaled,
            "x",
            setting={"predicted (D'/D)/s": changes.predicted},
        ),
        Row(f"{what}: error of the other weights", changes.error_others, "x"),
    ]


def activation_magnitudes(subject: Subject, samples: int) -> dict[str, Tensor]:
    """(K,) mean |x| of the input of each linear layer in the model's blocks, by its full name."""
    from tensormill.compress.calibration import stream_blocks
    from tensormill.compress.structure import discover

    found = {}
    structure = discover(subject.model)
    for block in stream_blocks(subject.model, structure, subject.calibration(samples)):
        for name, statistics in block.observe().items():
            found[block.full_name(name)] = statistics.mean_abs
    return found


def linear_of(model: PreTrainedModel, name: str) -> nn.Linear:
    """The linear layer of this name."""
    linear: Any = model.get_submodule(name)
    return linear  # type: ignore[no-any-return]


@contextmanager
def changed_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights, by name of their linear layer, while the context lasts."""
    before = {name: linear_of(model, name).weight.data for name in weights}
    try:
        for name, weight in weights.items():
            linear_of(model, name).weight.data = weight
        yield
    finally:
        for name, weight in before.items():
            linear_of(model, name).weight.data = weight


def salient_channels(score: Tensor, fraction: float) -> Tensor:
    """(count,) int64 the channels of highest score (K,): so large a share of them, and at least one."""
    count = max(1, round(fraction * score.numel()))
    return score.topk(count).indices


def round_but(weight: Tensor, channels: Tensor, spec: QuantSpec) -> Tensor:
    """(N, K) the rounded weight, with the columns `channels` as they were; steps are those of whole groups."""
    from tensormill.compress.formats.quantization import fake_quantize

    rounded = fake_quantize(weight, spec)
    rounded[:, channels] = weight[:, channels]
    return rounded


def round_scaled(weight: Tensor, channels: Tensor, scale: float, spec: QuantSpec) -> Tensor:
    """(N, K) what the weight reads as if columns `channels` are multiplied by `scale`, rounded, and divided again."""
    from tensormill.compress.formats.quantization import fake_quantize

    columns = weight.new_ones(weight.shape[1])
    columns[channels] = scale
    return fake_quantize(weight * columns, spec) / columns


@dataclass
class StepChanges:
    """What scaling some channels does to groups' steps D and to rounding errors, added up over weights.

    Attributes:
        groups: of all weights.
        groups_with_channel: those that hold a scaled channel.
        changed: whose step is another.
        ratios: sum over groups of D'/D.
        ratios_with_channel: the same over groups with a scaled channel.
        errors: sums of |rounded - weight|: scaled channels before and after, the others before and after.
        scale: of the channels.
    """

    groups: int = 0
    groups_with_channel: int = 0
    changed: int = 0
    ratios: float = 0.0
    ratios_with_channel: float = 0.0
    errors: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    scale: float = 1.0

    def __add__(self, other: StepChanges) -> StepChanges:
        a, b, c, d = (mine + its for mine, its in zip(self.errors, other.errors, strict=True))
        return StepChanges(
            self.groups + other.groups,
            self.groups_with_channel + other.groups_with_channel,
            self.changed + other.changed,
            self.ratios + other.ratios,
            self.ratios_with_channel + other.ratios_with_channel,
            (a, b, c, d),
            other.scale,
        )

    @property
    def share(self) -> float:
        """Of all groups, those whose step changes; only groups with a scaled channel can."""
        return self.changed / self.groups

    @property
    def share_with_channel(self) -> float:
        """Of the groups with a scaled channel, those whose step changes."""
        return self.changed / self.groups_with_channel

    @property
    def mean_ratio(self) -> float:
        """Mean D'/D of all groups."""
        return self.ratios / self.groups

    @property
    def predicted(self) -> float:
        """Mean (D'/D)/s of the groups with a scaled channel: the paper's ratio of errors there."""
        return self.ratios_with_channel / self.groups_with_channel / self.scale

    @property
    def error_scaled(self) -> float:
        """Mean |error| of the scaled channels' weights over that without scaling."""
        return self.errors[1] / self.errors[0]

    @property
    def error_others(self) -> float:
        """Mean |error| of the other weights over that without scaling."""
        return self.errors[3] / self.errors[2]


def step_changes(weight: Tensor, channels: Tensor, scale: float, spec: QuantSpec) -> StepChanges:
    """How steps and errors change when the columns `channels` of a weight (N, K) are multiplied by `scale`."""
    import torch

    from tensormill.compress.formats.quantization import fake_quantize, group_grid, split_groups

    columns = weight.new_ones(weight.shape[1])
    columns[channels] = scale
    chosen = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    chosen[channels] = True
    before, _ = group_grid(split_groups(weight.float(), spec), spec)
    after, _ = group_grid(split_groups(weight.float() * columns, spec), spec)
    ratio = (after / before).squeeze(-1)  # [N, G]
    # Not `float` columns: `split_groups` repeats the last column where the last group is short.
    with_channel = split_groups(chosen.float()[None], spec).amax(dim=-1)[0].bool()  # [G]
    errors = [
        (fake_quantize(weight, spec) - weight).abs(),
        (round_scaled(weight, channels, scale, spec) - weight).abs(),
    ]
    sums = [float(error[:, part].double().sum()) for part in (chosen, ~chosen) for error in errors]
    return StepChanges(
        groups=ratio.numel(),
        groups_with_channel=int(with_channel.sum()) * len(weight),
        changed=int((after != before).sum()),
        ratios=float(ratio.double().sum()),
        ratios_with_channel=float(ratio[:, with_channel].double().sum()),
        errors=(sums[0], sums[1], sums[2], sums[3]),
        scale=scale,
    )

"""C5: the best learning rate of a small Transformer does not move with its width in muP."""

from __future__ import annotations

import importlib.util
import lzma
import math
from typing import TYPE_CHECKING, Any

from tensormill.papers._threads import one_thread
from tensormill.papers.catalogue import Measurement, Row, Run
from tensormill.papers.curves import Curve
from tensormill.papers.infinite_width_features.paper import PAPER

if TYPE_CHECKING:
    from torch import Tensor, nn

BASE, HEADS, WINDOW = 32, 4, 64
STEP = 2.0
"""Factor between the learning rates that are tried."""


def text(run: Run) -> tuple[Tensor, int, str]:
    """Token ids (bytes that occur, renumbered), the size of the vocabulary, and what the text is."""
    import torch

    from tensormill.data import real_data_dir
    from tensormill.data.python_source import calibration_text

    root = real_data_dir()
    file = root / "english_public_domain" / "sotu.txt.xz" if root is not None else None
    limit = 400_000 if run.scale == "quick" else 20_000_000
    if file is not None and file.exists():
        with lzma.open(file, "rt", encoding="utf-8") as opened:
            content, what = opened.read(limit), "State of the Union addresses"
    else:
        content, what = calibration_text()[:limit], "Python's standard library (no English text present)"
    raw = torch.frombuffer(bytearray(content.encode("ascii", "replace")), dtype=torch.uint8).long()
    present, ids = torch.unique(raw, return_inverse=True)
    return ids, present.numel(), what


def language_model(width: int, vocabulary: int, readout: Any, layers: int, *, scale: float) -> nn.Module:
    """A causal Transformer on bytes: learnt positions, pre-norm blocks, GELU, `readout` to the vocabulary.

    Args:
        width: of the residual stream; four heads share it.
        vocabulary: number of tokens.
        readout: class of the last layer.
        layers: blocks.
        scale: of the attention logits.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).transpose(1, 3).unbind(2)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
            x = x + self.mix(mixed.transpose(1, 2).flatten(2))
            return x + self.feed(self.feed_norm(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(vocabulary, width)
            self.positions = nn.Parameter(torch.randn(WINDOW, width) * 0.1)
            self.blocks = nn.ModuleList([Block() for _ in range(layers)])
            self.norm = nn.LayerNorm(width)
            self.head = readout(width, vocabulary)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens) + self.positions[: tokens.shape[1]]
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    return Model()


class Subject:
    """The training that every width and parametrization gets."""

    def __init__(self, run: Run) -> None:
        full = run.scale == "full"
        self.run = run
        self.tokens, self.vocabulary, self.what = text(run)
        self.layers = 2 if full else 1
        self.steps, self.batch = (1000, 8192) if full else (40, 512)
        self.seeds = (0, 1, 2) if full else (0,)

    def model(
        self, width: int, parametrization: str, seed: int
    ) -> tuple[nn.Module, list[dict[str, Any]] | None]:
        """A model in a parametrization; for muP with parameter groups for a learning rate of 1."""
        import torch
        from torch import nn

        from tensormill.numerics.infinite_width_features import MuReadout, attention_scale, parametrize

        torch.manual_seed(seed)
        head = width // HEADS
        if parametrization == "sp":
            model = language_model(width, self.vocabulary, nn.Linear, self.layers, scale=head**-0.5)
            return model.to(self.run.device), None
        scale = attention_scale(head, BASE // HEADS)
        model = language_model(width, self.vocabulary, MuReadout, self.layers, scale=scale)
        with torch.device("meta"):
            base, delta = (
                language_model(w, self.vocabulary, MuReadout, self.layers, scale=1.0)
                for w in (BASE, 2 * BASE)
            )
        scaling = parametrize(model, base, delta)
        model = model.to(self.run.device)
        return model, scaling.param_groups(model, "adam", lr=1.0)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of the next byte, in nats."""
        import torch.nn.functional as F

        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    def final_loss(self, width: int, parametrization: str, lr: float) -> float:
        """Training loss over the last fifth of the steps, mean over seeds; infinite where training diverges."""
        import torch

        from tensormill.errors import ModelError
        from tensormill.training import TokenWindows, TrainingConfig, train

        total = 0.0
        for seed in self.seeds:
            model, groups = self.model(width, parametrization, self.run.seed + seed)
            for group in groups or ():
                group["lr"] *= lr
            optimizer = torch.optim.Adam(groups or model.parameters(), lr=lr, betas=(0.9, 0.95))
            batches = TokenWindows(
                self.tokens, window=WINDOW, batch_tokens=self.batch, seed=seed, device=self.run.device
            )
            config = TrainingConfig(
                max_steps=self.steps,
                schedule="linear",
                warmup=0.1,
                gradient_clip=None,
                log_every=self.steps // 5,
                progress="none",
                max_restarts=0,
            )
            try:
                total += train(model, self.loss, batches, optimizer, config).loss
            except ModelError:
                return math.inf
        return total / len(self.seeds)


def optimum(losses: dict[float, float]) -> float:
    """Learning rate of the lowest loss: the vertex of the parabola through the best one and its neighbours."""
    rates = sorted(losses)
    best = min(range(len(rates)), key=lambda k: losses[rates[k]])
    if best in (0, len(rates) - 1):
        return rates[best]
    left, middle, right = (losses[rates[best + k]] for k in (-1, 0, 1))
    if not math.isfinite(left + right):
        return rates[best]
    curvature = left - 2 * middle + right
    shift = 0.5 * (left - right) / curvature if curvature > 0 else 0.0
    return rates[best] * STEP**shift


def search(subject: Subject, width: int, parametrization: str, start: int) -> dict[float, float]:
    """Losses at powers of two around the best learning rate, two beyond it on either side.

    start: power of two to begin with.
    """
    losses: dict[int, float] = {}

    def at(power: int) -> float:
        if power not in losses:
            losses[power] = subject.final_loss(width, parametrization, STEP**power)
        return losses[power]

    best = start
    while True:
        around = min((best - 1, best, best + 1), key=at)
        if around == best:
            break
        best = around
    return {STEP**power: loss for power, loss in losses.items()}


def mup_difference(subject: Subject) -> float | None:
    """Largest relative difference of ten losses to those of the package mup, in float64; None without it."""
    import torch

    from tensormill.training import TokenWindows

    if importlib.util.find_spec("mup") is None:
        return None
    import mup

    width, lr = 3 * BASE, 3e-3
    model, groups = subject.model(width, "mup", 0)
    assert groups is not None
    torch.manual_seed(0)
    scale = (BASE // HEADS) ** 0.5 / (width // HEADS)
    theirs, base, delta = (
        language_model(w, subject.vocabulary, mup.MuReadout, subject.layers, scale=scale)
        for w in (width, BASE, 2 * BASE)
    )
    mup.set_base_shapes(theirs, base, delta=delta)
    for group in groups:
        group["lr"] *= lr
    trajectories = []
    for network, make in (
        (model, lambda net: torch.optim.Adam(groups)),
        (theirs, lambda net: mup.MuAdam(net.parameters(), lr=lr)),
    ):
        network = network.double().to(subject.run.device)
        optimizer = make(network)
        batches = TokenWindows(
            subject.tokens, window=WINDOW, batch_tokens=256, seed=1, device=subject.run.device
        )
        values = []
        for _ in range(10):
            loss = subject.loss(network, batches.next_batch())
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            values.append(float(loss.detach()))
        trajectories.append(values)
    return max(abs(a - b) / abs(b) for a, b in zip(*trajectories, strict=True))


@PAPER.claim(
    "C5",
    statement="A learning rate tuned at a small width is the best one at every width in muP, and not in the standard way",
    unit="x",
    criterion=(
        "over all widths the best learning rate of Adam stays within a factor of 2 in muP and leaves it in the standard "
        "parametrization, and losses are those of the package mup to 1e-6 where it is installed"
    ),
    measures=("tensormill.numerics.infinite_width_features.mup",),
    peers=("mup",),
)
@one_thread()
def learning_rate_transfer(run: Run) -> Measurement:
    """Best learning rate of a small Transformer on bytes of English, by width; the same data and steps for all.

    Quick: one block, widths 32 to 256, 40 steps. Full: two blocks, widths 32 to 2048, 1000 steps of 8192 bytes,
    three seeds: about an hour on a GPU.
    """
    subject = Subject(run)
    widths = [BASE * 2**k for k in range(7 if run.scale == "full" else 4)]
    rows, curves, best = [], [], {}
    for parametrization, name in (("mup", "muP"), ("sp", "standard")):
        start = -6
        found = []
        for number, width in enumerate(widths):
            run.progress(
                f"{name}, width {width}",
                (number + (parametrization == "sp") * len(widths)) / (2 * len(widths)),
            )
            losses = search(subject, width, parametrization, start)
            rate = optimum(losses)
            start = round(math.log(rate, STEP))
            found.append(rate)
            finite = {lr: loss for lr, loss in sorted(losses.items()) if math.isfinite(loss)}
            rows.append(
                Row(
                    f"{name}, width {width}: best learning rate",
                    rate,
                    "learning rate",
                    setting={"parametrization": parametrization, "width": width, "losses": finite},
                )
            )
            rows.append(Row(f"{name}, width {width}: loss there", min(losses.values()), "nats a byte"))
            curves.append(
                Curve(
                    f"{name}, width {width}",
                    list(finite),
                    list(finite.values()),
                    "learning rate",
                    "nats a byte",
                )
            )
        best[parametrization] = max(found) / min(found)
        rows.append(Row(f"{name}: largest over smallest best learning rate", best[parametrization], "x"))
        curves.append(Curve(name, widths, found, "width", "best learning rate"))
    difference = mup_difference(subject)
    if difference is not None:
        rows.append(Row("largest relative difference of losses to the package mup", difference, "relative"))
    same = difference is None or difference <= 1e-6
    return Measurement(
        rows,
        holds=best["mup"] <= 2 < best["sp"] and same,
        reason=f"spread of the best learning rate over widths {widths[0]} to {widths[-1]}: muP {best['mup']:.2f}x, "
        f"standard {best['sp']:.2f}x; text: {subject.what}; "
        + (
            "the package mup is not installed" if difference is None else f"losses of mup to {difference:.0e}"
        ),
        repeats=len(subject.seeds),
        curves=curves,
    )

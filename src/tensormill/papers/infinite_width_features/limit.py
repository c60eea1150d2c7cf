"""C1: linear networks with one hidden layer approach their exact limit as width^(-1/2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensormill.papers._threads import one_thread
from tensormill.papers.catalogue import Measurement, Row, Run
from tensormill.papers.curves import Curve, fit_exponent
from tensormill.papers.infinite_width_features.paper import PAPER

if TYPE_CHECKING:
    from torch import Tensor

    from tensormill.numerics.infinite_width_features import FiniteLinear1, InfiniteLinear1, Linear1Config

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": 1.0},
    "gradient clipping": {"clip": 0.3, "lr": 0.2},
    "momentum": {"momentum": 0.9, "lr": 0.01},
    "weight decay": {"weight_decay": 0.1},
    "all four": {"bias": 1.0, "clip": 0.5, "momentum": 0.9, "weight_decay": 0.05, "lr": 0.02},
}
INPUTS, OUTPUTS, BATCH, STEPS = 12, 4, 16, 30


def trained_outputs(
    network: FiniteLinear1 | InfiniteLinear1, config: Linear1Config, settings: dict[str, Any], seed: int
) -> Tensor:
    """Outputs on fixed inputs after SGD on a linear target with an offset; the data depend on `seed` alone."""
    import torch
    from torch import nn

    choice = {"lr": 0.05, **settings}
    clip = choice.pop("clip", None)
    choice.pop("bias", None)
    optimizer = torch.optim.SGD(network.parameters(), **choice)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(network.u)

    target = draw(config.outputs, config.inputs)
    test = draw(64, config.inputs)
    for _ in range(STEPS):
        x = draw(BATCH, config.inputs)
        optimizer.zero_grad()
        torch.autograd.backward((network(x) - x @ target.mT - 0.5).square().mean())
        if clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
    with torch.no_grad():
        return network(test)


def distances(
    settings: dict[str, Any], widths: list[int], seeds: int, device: str, seed: int
) -> list[tuple[float, list[float]]]:
    """For each width the root-mean-square relative distance to the limit over seeds, and the single distances."""
    import math

    import torch

    from tensormill.numerics.infinite_width_features import FiniteLinear1, InfiniteLinear1, Linear1Config

    config = Linear1Config(INPUTS, OUTPUTS, sigma_v=0.5, bias=settings.get("bias", 0.0))
    options: dict[str, Any] = {"device": device, "dtype": torch.float64}
    expected = trained_outputs(InfiniteLinear1(config, **options), config, settings, seed)
    found = []
    for width in widths:
        single = []
        for number in range(seeds):
            network = FiniteLinear1(config, width, seed=seed * 1000 + number, **options)
            outputs = trained_outputs(network, config, settings, seed)
            single.append(float((outputs - expected).norm() / expected.norm()))
        found.append((math.sqrt(sum(d * d for d in single) / seeds), single))
    return found


@PAPER.claim(
    "C1",
    statement="Trained linear networks approach the exact infinite-width limit as width^(-1/2)",
    paper_value=-0.5,
    unit="power of width",
    criterion=(
        "the power of width with which the distance to the limit falls is -0.5 within 0.05, plain and with a bias, "
        "gradient clipping, momentum, weight decay and all of them"
    ),
    measures=("tensormill.numerics.infinite_width_features.limits",),
)
@one_thread()
def limit_law(run: Run) -> Measurement:
    """Relative distance of outputs after 30 steps of SGD on a regression, root mean square over seeds.

    Full scale takes wider networks and more seeds; minutes on a CPU.
    """
    full = run.scale == "full"
    widths = [2**k for k in (range(8, 17) if full else (8, 10, 12, 14))]
    seeds = 32 if full else 12
    rows, curves, exponents = [], [], []
    for number, (name, settings) in enumerate(SETTINGS.items()):
        run.progress(name, number / len(SETTINGS))
        found = distances(settings, widths, seeds, run.device, run.seed)
        for width, (distance, single) in zip(widths, found, strict=True):
            rows.append(
                Row(
                    f"{name}, width {width}",
                    distance,
                    "relative distance",
                    spread=(min(single), max(single)),
                    setting={"case": name, "width": width, "seeds": seeds},
                )
            )
        values = [distance for distance, _ in found]
        exponent = fit_exponent(widths, values)
        exponents.append((name, exponent.value))
        rows.append(
            Row(
                f"{name}, power of width",
                exponent.value,
                "power of width",
                spread=(exponent.low, exponent.high),
                setting={"case": name},
            )
        )
        curves.append(Curve(name, widths, values, "width", "relative distance to the limit", exponent))
    name, worst = max(exponents, key=lambda item: abs(item[1] + 0.5))
    return Measurement(
        rows,
        holds=abs(worst + 0.5) <= 0.05,
        reason=f"powers from {min(e for _, e in exponents):.3f} to {max(e for _, e in exponents):.3f}; farthest from "
        f"-0.5: {name}",
        repeats=seeds,
        curves=curves,
    )

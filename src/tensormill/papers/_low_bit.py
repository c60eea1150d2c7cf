"""What the claims of FlexQ, COMET, Bipolar-INT and LUT Tensor Core share: models scored side by side, and kernels of
several widths timed in one run."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tensormill.papers.awq.subjects import Subject
from tensormill.papers.catalogue import ClaimNotMeasurable, Row, Run

if TYPE_CHECKING:
    from torch import nn

    from tensormill.compress.calibration import Calibration
    from tensormill.compress.evaluate import Evaluation
    from tensormill.compress.methods import MethodReport

KERNEL_SOURCES = ("tensormill.papers._low_bit", "tensormill.ops.benchmark", "tensormill.measure")
INT8_CUBLAS = "torch._int_mm, 8 x 8 bits"
_FEWEST_ROWS = 32  # torch._int_mm on a GPU takes no fewer than 17 rows


def compressed(
    model: nn.Module, apply: Callable[..., MethodReport], config: Any, calibration: Calibration | None
) -> tuple[nn.Module, MethodReport]:
    """A copy of a model, compressed, and the method's report."""
    made = copy.deepcopy(model)
    return made, apply(made, config, calibration)


def smooth_quant(model: nn.Module, calibration: Calibration, strength: float = 0.5) -> nn.Module:
    """W8A8 as SmoothQuant does it (Xiao and others, arXiv 2211.10438): a copy of the model.

    Channels of the norms are divided by `|x|^strength / |w|^(1 - strength)`, of what channels and the columns that read
    them reach, and the columns multiplied; then weights have 8 bits with a scale per row, inputs one per token.
    """
    import torch

    from tensormill.compress import rtn
    from tensormill.compress.calibration import stream_blocks
    from tensormill.compress.comet import observe_magnitudes
    from tensormill.compress.flexq import quantize_inputs
    from tensormill.compress.fold import fold
    from tensormill.compress.structure import discover, linear_in

    made = copy.deepcopy(model)
    structure = discover(made)
    for block in stream_blocks(made, structure, calibration):
        magnitudes, _ = observe_magnitudes(block)
        reached = {name: magnitudes[group[0]] for group in block.structure.input_groups for name in group}
        for mapping in block.structure.mappings:
            if mapping.kind != "norm":
                continue
            weights = [linear_in(block.module, name).weight.float() for name in mapping.consumers]
            columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
            scale = reached[mapping.consumers[0]] ** strength / columns.clamp(min=1e-5) ** (1 - strength)
            with torch.no_grad():
                fold(block.module, mapping, scale.clamp(min=1e-5))
    rtn.apply(made, rtn.RTNConfig(bits=8, group_size=-1, symmetric=True))
    quantize_inputs(made, 8, -1)
    return made


def score(
    run: Run, subject: Subject, models: Mapping[str, nn.Module], window: int = 256
) -> tuple[dict[str, Evaluation], list[Row]]:
    """Evaluate models beside the subject's own, under the name "original": scores, and rows of what each loses."""
    from tensormill.compress.evaluate import evaluate_models, paired_bootstrap

    run.progress(f"{subject.name}: evaluating {len(models)} models", None)
    scores = evaluate_models(
        {"original": subject.model, **models},
        subject.tokenizer,
        subject.text,
        reference="original",
        window=window,
        max_tokens=subject.max_tokens,
    )
    base = scores["original"]
    setting = {"tokens": base.tokens, "window": base.window}
    rows = [Row(f"{subject.name} original", base.perplexity, "perplexity", setting=setting)]
    for name in models:
        found = scores[name]
        assert found.comparison is not None
        interval = paired_bootstrap(found.window_nll, base.window_nll, seed=run.seed)
        spread = (found.perplexity - interval.estimate + interval.low, base.perplexity + interval.high)
        rows += [
            Row(f"{subject.name} {name}", found.perplexity, "perplexity", spread, setting=setting),
            Row(f"{subject.name} {name}: rise", rise(scores, name), "%"),
            Row(f"{subject.name} {name}: KL to the original", found.comparison.kl, "nats per token"),
        ]
    return scores, rows


def rise(scores: Mapping[str, Evaluation], name: str) -> float:
    """By how much a model's perplexity exceeds the original's, in percent."""
    return 100 * (scores[name].perplexity / scores["original"].perplexity - 1)


def time_product(
    run: Run,
    operator: str,
    shape: Mapping[str, Any],
    what: str,
    *,
    seconds: float = 0.3,
    implementations: Sequence[str] | None = None,
) -> Row:
    """Microseconds of an operator's fastest implementation here, with limit and peers of the same run.

    Raises:
        ClaimNotMeasurable: no implementation runs here.
    """
    from tensormill.ops import OPERATORS
    from tensormill.ops.benchmark import benchmark, complete_shape

    found = OPERATORS[operator]
    complete = complete_shape(found, dict(shape))
    made = benchmark(found, [complete], run.device, implementations=implementations, seconds=seconds)
    if not made:
        raise ClaimNotMeasurable(f"no implementation of {operator} runs here")
    best = min(made, key=lambda row: row.seconds)
    return Row(
        what,
        best.seconds * 1e6,
        "us",
        spread=(best.low * 1e6, best.high * 1e6),
        peers={peer: seconds * 1e6 for peer, seconds in best.peer_seconds.items()},
        limit=best.limit_seconds * 1e6,
        setting={"implementation": best.implementation, **shape},
    )


def linear_shape(
    tokens: int, rows: int, columns: int, bits: int, group_size: int, x_group_size: int, dtype: str
) -> dict[str, Any]:
    """A shape of `linear_wna8`, symmetric, with float activations that are quantized in the call."""
    return {
        "tokens": tokens,
        "out_features": rows,
        "in_features": columns,
        "bits": bits,
        "group_size": group_size,
        "x_group_size": x_group_size,
        "dtype": dtype,
    }


def int8_product(run: Run, tokens: int, rows: int, columns: int, *, seconds: float = 0.3) -> Row:
    """Microseconds of `torch._int_mm` alone, of as many rows as it takes at least: no scales, no quantization."""
    import torch

    from tensormill import measure
    from tensormill.roofline import Cost, ceilings

    given = max(tokens, _FEWEST_ROWS)
    generator = torch.Generator(run.device).manual_seed(run.seed)

    def codes(height: int) -> Any:
        return torch.randint(
            -127, 128, (height, columns), dtype=torch.int8, device=run.device, generator=generator
        )

    operands = [codes(given), codes(rows)]
    count = measure.copies_past_cache(operands, run.device)
    copies = [operands, *([t.clone() for t in operands] for _ in range(count - 1))]
    calls = [lambda a=a, b=b: torch._int_mm(a, b.T) for a, b in copies]
    timing = measure.time_together({"int8": calls}, run.device, seconds=seconds)["int8"]
    size = float(rows * columns)
    cost = Cost({"int8": 2 * tokens * size}, size + tokens * columns, 4 * tokens * rows)
    return Row(
        f"M={tokens} {rows}x{columns} {INT8_CUBLAS}",
        timing.seconds * 1e6,
        "us",
        spread=(timing.low * 1e6, timing.high * 1e6),
        limit=ceilings(run.device).limit_seconds(cost) * 1e6,
        setting={"tokens": tokens, "rows_given": given, "out_features": rows, "in_features": columns},
    )


def fastest(row: Row, *names: str) -> float:
    """Microseconds of the fastest peer whose name contains one of `names`.

    Raises:
        ClaimNotMeasurable: there is none.
    """
    times = [value for peer, value in row.peers.items() if any(name in peer for name in names)]
    if not times:
        raise ClaimNotMeasurable(
            f"{row.what}: no peer {' or '.join(names)} runs here; there are {', '.join(row.peers) or 'none'}"
        )
    return min(times)


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))

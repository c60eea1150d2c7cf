"""C8: how much faster a model of 4 bits decodes from end to end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tensormill.papers.awq.paper import PAPER
from tensormill.papers.catalogue import Measurement, Row, Run

if TYPE_CHECKING:
    from tensormill.models.decoding import DecodingSpeed
    from tensormill.models.decoding.greedy import Decoder

WANTED = {"full": 2.3, "quick": 1.5}  # times transformers' speed with dense weights
BATCHES = {"full": (1, 16), "quick": (1,)}


@PAPER.claim(
    "C8",
    figure="decode-latency",
    statement="A model of 4 bits decodes faster from end to end than its dense original",
    criterion=(
        "with a Llama of 8 billion parameters on a GPU at least 2.3 times as fast as float16 in transformers with SDPA, "
        "for 1 and for 16 sequences; at quick scale, with the built-in model on a CPU, 1.5 times as fast as float32"
    ),
    needs={"quick": ("cpu",), "full": ("cuda",)},
    measures=(
        "tensormill.models.decoding",
        "tensormill.ops.linear_wna16",
        "tensormill.ops.decode_attention",
        "tensormill.ops.add_rms_norm",
        "tensormill.ops.rotate_heads",
        "tensormill.ops.gated_silu",
        "tensormill.measure",
    ),
)
def decoding(run: Run) -> Measurement:
    """What `tensormill bench-model --bits 4` times, prompts of 128 tokens: greedy steps with a static cache, on a GPU
    as replays of a CUDA graph on all sides. The GPU's model has random weights: its speed is that of any others."""
    from tensormill.models.decoding import PlainDecoder, compare_decoding, prepare_for_decoding
    from tensormill.roofline import ceilings

    full = run.scale == "full"
    run.progress("opening the models", 0.0)
    model, dense = _random_llama(run) if full else _builtin(run)
    # Plain first: it takes a model as it is, and preparation only moves the weights together.
    sides: dict[str, Decoder] = {"transformers, dense": PlainDecoder(dense)}
    sides["prepared, dense"] = prepare_for_decoding(dense)
    speeds = compare_decoding(
        {"4 bits": prepare_for_decoding(model), **sides},
        batches=BATCHES[run.scale],
        bandwidth=ceilings(run.device).bandwidth,
        seed=run.seed,
        progress=lambda message, share: run.progress(message, 0.1 + 0.9 * (share or 0.0)),
    )
    rows, ratios = [], []
    for batch in BATCHES[run.scale]:
        found = {speed.name: speed for speed in speeds if speed.batch == batch}
        ratios.append(found["4 bits"].decode / found["transformers, dense"].decode)
        rows += _rows(batch, found)
    times = ", ".join(
        f"batch {batch} {ratio:.2f} times" for ratio, batch in zip(ratios, BATCHES[run.scale], strict=True)
    )
    return Measurement(
        rows, holds=min(ratios) >= WANTED[run.scale], reason=f"{times} as fast as transformers"
    )


def _rows(batch: int, found: dict[str, DecodingSpeed]) -> list[Row]:
    own = found["4 bits"]
    peers = {name: speed for name, speed in found.items() if speed is not own}
    setting: dict[str, Any] = {"batch": batch, "prompt tokens": own.prompt_tokens, "repeats": own.repeats}
    step = Row(
        f"batch {batch}: a step",
        own.step_seconds * 1e3,
        "ms",
        spread=(1e3 * batch / own.decode_spread[1], 1e3 * batch / own.decode_spread[0]),
        peers={name: speed.step_seconds * 1e3 for name, speed in peers.items()},
        limit=None if own.limit is None else 1e3 * batch / own.limit,
        setting={**setting, "graph": own.captured},
    )
    first = Row(
        f"batch {batch}: first token",
        own.first_token_seconds * 1e3,
        "ms",
        peers={name: speed.first_token_seconds * 1e3 for name, speed in peers.items()},
        setting=setting,
    )
    weights = Row(
        f"batch {batch}: weights that a step reads",
        own.weight_bytes / 1e9,
        "GB",
        peers={name: speed.weight_bytes / 1e9 for name, speed in peers.items()},
        setting=setting,
    )
    return [step, first, weights]


def _random_llama(run: Run) -> tuple[Any, Any]:
    import torch

    from tensormill.models.decoding import dense_copy, random_llama

    model = random_llama(
        "llama-8b", bits=4, group_size=128, dtype=torch.float16, device=run.device, seed=run.seed
    )
    return model, dense_copy(model, torch.float16)


def _builtin(run: Run) -> tuple[Any, Any]:
    import torch

    from tensormill.compress import checkpoint, rtn

    model, dense = (
        checkpoint.open_model("builtin:python-lm", device=run.device, dtype=torch.float32)[0]
        for _ in range(2)
    )
    rtn.apply(model, rtn.RTNConfig(bits=4, group_size=128))
    return model, dense

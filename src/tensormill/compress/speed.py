"""How fast a causal language model decodes and reads its prompt."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tensormill.compress.evaluate import embedding, evaluating, input_device, max_positions
from tensormill.errors import InvalidArgument, ModelError
from tensormill.measure import synchronize

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Speed:
    """Tokens per second at batch 1.

    Attributes:
        decode: New tokens per second, one greedy step after another with a key-value cache.
        prefill: Prompt tokens per second in one forward that fills the cache.
        new_tokens: Decoding steps per repeat.
        prompt_tokens: Length of the prompt.
        repeats: Repeats; the figures are their medians.
        decode_spread: Slowest and fastest repeat of `decode`.
        prefill_spread: The same of `prefill`.
    """

    decode: float
    prefill: float
    new_tokens: int
    prompt_tokens: int
    repeats: int
    decode_spread: tuple[float, float]
    prefill_spread: tuple[float, float]


def tokens_per_second(
    model: nn.Module,
    *,
    prompt: Tensor | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    seed: int = 0,
) -> Speed:
    """Decoding and prefill speed of one model at batch 1; see `measure_speed`."""
    return measure_speed(
        {"model": model},
        prompt=prompt,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        seed=seed,
    )["model"]


def measure_speed(
    models: Mapping[str, nn.Module],
    *,
    prompt: Tensor | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Speed]:
    """Decoding and prefill speed of models at batch 1, their repeats interleaved.

    Interleaving makes a change in the machine's load hit all models alike. One repeat per model is warm-up.
    The generated tokens are fed back, none ends the sequence, and every step waits for the device.

    Args:
        models: The models by name, each on the device where it is to be measured.
        prompt: (tokens,) int64; None draws one at random.
        prompt_tokens: Length of a drawn prompt; shortened where the context demands it.
        new_tokens: Decoding steps per repeat.
        repeats: Timed repeats; medians are reported.
        seed: Of the drawn prompt.
        progress: Called with a message and the share done.

    Raises:
        InvalidArgument: A count below 1, or prompt and new tokens exceed a model's context.
        ModelError: A model without a key-value cache.
    """
    for what, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("repeats", repeats)):
        if value < 1:
            raise InvalidArgument(f"given {what} {value}, expected at least 1")
    if prompt is not None and (prompt.ndim != 1 or prompt.numel() < 1):
        raise InvalidArgument(
            f"given a prompt of shape {tuple(prompt.shape)}, expected (tokens,), at least one"
        )
    limit = min((limit for limit in map(max_positions, models.values()) if limit is not None), default=None)
    length = prompt_tokens if prompt is None else prompt.numel()
    if prompt is None and limit is not None:
        length = max(1, min(length, limit - new_tokens))
    if limit is not None and length + new_tokens > limit:
        raise InvalidArgument(
            f"given {length} prompt and {new_tokens} new tokens, expected at most {limit} together "
            "(the context); use fewer"
        )
    if prompt is None:
        generator = torch.Generator().manual_seed(seed)
        rows = min(int(getattr(embedding(model), "num_embeddings", 256)) for model in models.values())
        prompt = torch.randint(rows, (length,), generator=generator)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with evaluating(models.values()):
        for repeat in range(repeats + 1):
            for name, model in models.items():
                pair = _time_generation(model, prompt, new_tokens)
                if repeat:
                    times[name].append(pair)
            if progress is not None and repeat:
                progress("measuring speed", repeat / repeats)
    speeds = {}
    for name, pairs in times.items():
        rates = sorted(new_tokens / decode for _, decode in pairs)
        prefills = sorted(length / prefill for prefill, _ in pairs)
        speeds[name] = Speed(
            decode=statistics.median(rates),
            prefill=statistics.median(prefills),
            new_tokens=new_tokens,
            prompt_tokens=length,
            repeats=repeats,
            decode_spread=(rates[0], rates[-1]),
            prefill_spread=(prefills[0], prefills[-1]),
        )
    return speeds


def _time_generation(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill and of ``new_tokens`` decoding steps."""
    device = input_device(model)
    ids = prompt.to(device)[None]
    # As in generation, only the last position's logits are needed where the model can leave out the others.
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    synchronize(device)
    start = time.perf_counter()
    output = model(input_ids=ids, use_cache=True, **options)
    token = output.logits[:, -1:].argmax(-1)
    if getattr(output, "past_key_values", None) is None:
        raise ModelError(
            f"{type(model).__name__} returns no key-value cache, expected one; can't measure decoding"
        )
    synchronize(device)
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    synchronize(device)
    return prefill, time.perf_counter() - start

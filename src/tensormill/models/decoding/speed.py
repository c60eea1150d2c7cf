"""How fast models decode, side by side: first token, tokens per second, memory, and the limit of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument
from tensormill.measure import synchronize
from tensormill.models.decoding.greedy import Decoder, GreedyRunner

Progress = Callable[[str, "float | None"], None]


@dataclass(frozen=True)
class DecodingSpeed:
    """What was measured of one decoder at one batch size and prompt length.

    Attributes:
        name: of the decoder.
        path: "prepared" or "plain".
        batch: sequences that are decoded together.
        prompt_tokens: of each sequence.
        new_tokens: decoded after the first one, in each repeat.
        repeats: timed repeats; figures are their medians.
        first_token_seconds: from the prompts on the host to the first new tokens on the host.
        prefill: prompt tokens per second, of all sequences, until then.
        decode: new tokens per second, of all sequences.
        decode_spread: slowest and fastest repeat of `decode`.
        step_seconds: of one decoding step.
        weight_bytes: of the weights that a step reads.
        cache_bytes: of the keys and values that a step reads, on average over the steps.
        model_bytes: of all weights and buffers.
        peak_memory_bytes: the model's, its cache's and its activations' largest together; None on a CPU.
        limit: `decode` if only weights and cache had to be read, at the measured bandwidth; None without one.
        captured: whether steps are replays of a CUDA graph.
        setup_seconds: what capturing and compiling took.
        note: why no graph was captured, if that failed.
    """

    name: str
    path: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    first_token_seconds: float
    prefill: float
    decode: float
    decode_spread: tuple[float, float]
    step_seconds: float
    weight_bytes: int
    cache_bytes: int
    model_bytes: int
    peak_memory_bytes: int | None
    limit: float | None
    captured: bool
    setup_seconds: float
    note: str | None

    @property
    def of_the_limit(self) -> float | None:
        """Share of the limit; above 1 where a cache of the processor holds the weights."""
        return None if self.limit is None else self.decode / self.limit

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**asdict(self), "of_the_limit": self.of_the_limit}


def compare_decoding(
    decoders: Mapping[str, Decoder],
    *,
    batches: Sequence[int] = (1,),
    prompt_tokens: Sequence[int] = (128,),
    new_tokens: int = 64,
    repeats: int = 5,
    bandwidth: float | None = None,
    graph: bool | None = None,
    compile: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[DecodingSpeed]:
    """Time greedy decoding of several decoders, their repeats interleaved, so that a change in load hits all alike.

    Args:
        decoders: by name, all on one device.
        batches: sizes.
        prompt_tokens: lengths of the prompts, which are drawn at random.
        new_tokens: decoded after the first.
        repeats: timed ones; one more is warm-up.
        bandwidth: of the device's memory in bytes per second, for the limit.
        graph, compile: see `GreedyRunner`.
        seed: of the prompts.
        progress: called with a message and the share done.

    Raises:
        InvalidArgument: nothing to measure, a count below 1, or more tokens than a model's context has.
    """
    if not decoders or not batches or not prompt_tokens:
        raise InvalidArgument("given no decoder, batch size or prompt length, expected at least one of each")
    for what, values in (
        ("batches", batches),
        ("prompt_tokens", prompt_tokens),
        ("new_tokens", [new_tokens]),
        ("repeats", [repeats]),
    ):
        if min(values) < 1:
            raise InvalidArgument(f"given {min(values)} in {what}, expected at least 1")
    for name, decoder in decoders.items():
        context = getattr(decoder.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and max(prompt_tokens) + new_tokens + 1 > context:
            raise InvalidArgument(
                f"given prompts of {max(prompt_tokens)} tokens and {new_tokens} new ones, expected at most "
                f"{context} together, the context of {name}"
            )
    found = []
    settings = [(batch, length) for length in prompt_tokens for batch in batches]
    for number, (batch, length) in enumerate(settings):

        def report(share: float, number: int = number, batch: int = batch, length: int = length) -> None:
            if progress is not None:
                what = f"decoding: batch {batch}, {length} prompt tokens"
                progress(what, (number + share) / len(settings))

        vocabulary = min(decoder.vocabulary for decoder in decoders.values())
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(vocabulary, (batch, length), generator=generator)
        report(0.0)
        trials = [
            _Trial(name, decoder, prompt, new_tokens, graph, compile) for name, decoder in decoders.items()
        ]
        for repeat in range(repeats):
            report(0.3 + 0.7 * repeat / repeats)
            for trial in trials:
                trial.run()
        found += [trial.result(bandwidth) for trial in trials]
        del trials
    return found


def weight_bytes(model: nn.Module) -> int:
    """Bytes that one decoding step reads of a model's weights: all of them, but of an embedding only single rows."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    return model_bytes(model) - (0 if tied else _size(embedding.weight))


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each once."""
    return sum(
        _size(tensor) for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    )


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Trial:
    """One decoder at one setting: set up and run once for warming up, then timed run by run."""

    def __init__(
        self, name: str, decoder: Decoder, prompt: Tensor, new_tokens: int, graph: bool | None, compile: bool
    ) -> None:
        self.name, self.decoder, self.prompt, self.new_tokens = name, decoder, prompt, new_tokens
        self.firsts: list[float] = []
        self.steps: list[float] = []
        self.cuda = decoder.device.type == "cuda"
        before = 0
        if self.cuda:
            synchronize(decoder.device)
            before = torch.cuda.memory_allocated(decoder.device)
            torch.cuda.reset_peak_memory_stats(decoder.device)
        begin = time.perf_counter()
        batch, length = prompt.shape
        # The prompt, the first new token, and those that are decoded.
        self.runner = GreedyRunner(decoder, batch, length + 1 + new_tokens, graph=graph, compile=compile)
        synchronize(decoder.device)
        self.setup = time.perf_counter() - begin
        self.run()
        self.firsts.clear()
        self.steps.clear()
        self.extra = torch.cuda.max_memory_allocated(decoder.device) - before if self.cuda else 0

    def run(self) -> None:
        device = self.decoder.device
        synchronize(device)
        begin = time.perf_counter()
        self.runner.prefill(self.prompt.to(device))
        self.runner.tokens()[:, -1].tolist()  # the first tokens reach the host
        first = time.perf_counter()
        self.runner.decode(self.new_tokens)
        synchronize(device)
        self.steps.append((time.perf_counter() - first) / self.new_tokens)
        self.firsts.append(first - begin)

    def result(self, bandwidth: float | None) -> DecodingSpeed:
        batch, length = self.prompt.shape
        weights = weight_bytes(self.decoder.model)
        cache = self.decoder.cache_bytes(batch, length + 1 + self.new_tokens // 2)
        step, first = statistics.median(self.steps), statistics.median(self.firsts)
        whole = model_bytes(self.decoder.model)
        return DecodingSpeed(
            name=self.name,
            path=self.decoder.label,
            batch=batch,
            prompt_tokens=length,
            new_tokens=self.new_tokens,
            repeats=len(self.steps),
            first_token_seconds=first,
            prefill=batch * length / first,
            decode=batch / step,
            decode_spread=(batch / max(self.steps), batch / min(self.steps)),
            step_seconds=step,
            weight_bytes=weights,
            cache_bytes=cache,
            model_bytes=whole,
            peak_memory_bytes=whole + self.extra if self.cuda else None,
            limit=None if bandwidth is None else batch * bandwidth / (weights + cache),
            captured=self.runner.captured,
            setup_seconds=self.setup,
            note=self.runner.why_not_captured,
        )

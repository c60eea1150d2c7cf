"""Greedy decoding of a batch of prompts of one length, a CUDA graph per step where the device has them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument
from tensormill.models.decoding.plain import PlainDecoder
from tensormill.models.decoding.prepared import prepare_for_decoding, why_not_prepared


class Decoder(Protocol):
    """What a runner needs of a model; see `PreparedDecoder` for the methods."""

    @property
    def label(self) -> str: ...
    @property
    def model(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def vocabulary(self) -> int: ...
    def new_cache(self, batch: int, capacity: int) -> Any: ...
    def cache_bytes(self, batch: int, length: int) -> int: ...
    def prefill(self, tokens: Tensor, cache: Any) -> Tensor: ...
    def step(self, tokens: Tensor, position: Tensor, cache: Any, length: int | None = None) -> Tensor: ...


class GreedyRunner:
    """Decodes batches of one size greedily: prefill, then a step per token that never waits for the device.

    On a GPU the step, the choice of the most likely token included, is captured once in a CUDA graph and replayed.
    Where that fails the step runs as it is, and `captured` says so.

    Args:
        decoder: a `PreparedDecoder` or a `PlainDecoder`.
        batch: sequences.
        capacity: tokens of a sequence, the prompt's included.
        graph: capture a CUDA graph; None does where there is a GPU.
        compile: compile the step with torch.compile (once, for tens of seconds).
        repetition_penalty: divides the positive logits of tokens that are there already, and multiplies the negative
            ones (Keskar et al., CTRL, 2019, arXiv 1909.05858); 1 is none.

    Raises:
        InvalidArgument: a batch, capacity or penalty that can't be.

    Attributes:
        captured: whether steps are replays of a graph.
        why_not_captured: the reason, if capturing failed.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch: int,
        capacity: int,
        *,
        graph: bool | None = None,
        compile: bool = False,
        repetition_penalty: float = 1.0,
    ) -> None:
        if not repetition_penalty > 0:
            raise InvalidArgument(f"given repetition_penalty {repetition_penalty}, expected one above 0")
        if batch < 1 or capacity < 2:
            raise InvalidArgument(f"given batch {batch} and capacity {capacity}, expected at least 1 and 2")
        device = decoder.device
        if graph and device.type != "cuda":
            raise InvalidArgument(f"given graph=True and a model on {device}, expected one on a GPU")
        self.decoder, self.batch, self.capacity = decoder, batch, capacity
        self._cache = decoder.new_cache(batch, capacity)
        self._token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        self._length = 0
        self._penalty = repetition_penalty
        size = (batch, decoder.vocabulary)
        self._present = (
            None if repetition_penalty == 1 else torch.zeros(size, dtype=torch.bool, device=device)
        )
        # A call that is the same for every position: to be captured, and to be compiled once.
        self._fixed = device.type == "cuda" or compile
        self._step = torch.compile(decoder.step, dynamic=False) if compile else decoder.step
        self._graph: torch.cuda.CUDAGraph | None = None
        self.why_not_captured: str | None = None
        if device.type == "cuda" and graph is not False:
            self._capture()

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def prefill(self, prompt: Tensor) -> Tensor:
        """Read the prompts from the beginning and choose the first new tokens.

        Args:
            prompt: (batch, length) int64, with 1 <= length < capacity.

        Returns:
            (batch, vocabulary), the logits that chose them.
        """
        batch, length = prompt.shape
        if batch != self.batch or not 1 <= length < self.capacity:
            raise InvalidArgument(
                f"given prompts of shape {tuple(prompt.shape)}, expected ({self.batch}, 1 to {self.capacity - 1})"
            )
        logits = self.decoder.prefill(prompt, self._cache)
        if self._present is not None:
            self._present.zero_().scatter_(1, prompt, True)
        chosen = self._choose(logits)
        self._tokens[:, :length] = prompt
        self._tokens[:, length : length + 1] = chosen
        self._token.copy_(chosen)
        self._position.fill_(length)
        self._length = length + 1
        return logits

    def decode(self, steps: int) -> None:
        """Append `steps` tokens to every sequence; returns before the device is done."""
        if self._length + steps > self.capacity:
            raise InvalidArgument(
                f"given {steps} steps after {self._length} tokens, expected at most {self.capacity} tokens in all"
            )
        for _ in range(steps):
            if self._graph is not None:
                self._graph.replay()
            else:
                self._advance(None if self._fixed else self._length)
            self._length += 1

    def tokens(self) -> Tensor:
        """(batch, tokens so far), prompts included."""
        return self._tokens[:, : self._length]

    @torch.no_grad()
    def _advance(self, length: int | None) -> None:
        logits = self._step(self._token, self._position, self._cache, length)
        self._token.copy_(self._choose(logits))
        self._position.add_(1)
        self._tokens.index_copy_(1, self._position, self._token)

    def _choose(self, logits: Tensor) -> Tensor:
        """(batch, 1), the most likely tokens."""
        if self._present is None:
            return logits.argmax(-1, keepdim=True)
        wide = logits.float()
        lowered = torch.where(wide < 0, wide * self._penalty, wide / self._penalty)
        chosen = torch.where(self._present, lowered, wide).argmax(-1, keepdim=True)
        self._present.scatter_(1, chosen, True)
        return chosen

    def _capture(self) -> None:
        # Kernels are compiled, and libraries set up, by a prefill and steps that are forgotten again.
        self.prefill(torch.zeros(self.batch, 1, dtype=torch.int64, device=self._token.device))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(min(2, self.capacity - 2)):
                self._advance(None)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with torch.cuda.graph(graph):
                    self._advance(None)
            self._graph = graph
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.why_not_captured = str(error).strip().splitlines()[0]


def greedy_tokens(
    model: nn.Module, prompt: Tensor, new_tokens: int, *, graph: bool | None = None, compile: bool = False
) -> Tensor:
    """The most likely continuation, token by token, of a batch of prompts of one length.

    Prepares the model where it can (`prepare_for_decoding`) and takes transformers' own forward where it can't. No
    token ends a sequence.

    Args:
        model: a causal language model of transformers.
        prompt: (batch, length) int64.
        new_tokens: tokens to append.
        graph, compile: see `GreedyRunner`.

    Returns:
        (batch, length + new_tokens) int64.

    Raises:
        InvalidArgument: no prompt, or no token asked for.
    """
    if prompt.dim() != 2 or new_tokens < 1:
        raise InvalidArgument(
            f"given prompts of shape {tuple(prompt.shape)} and {new_tokens} new tokens, expected (batch, length) and "
            "at least 1"
        )
    decoder = decoder_of(model)
    batch, length = prompt.shape
    runner = GreedyRunner(decoder, batch, length + new_tokens, graph=graph, compile=compile)
    runner.prefill(prompt.to(decoder.device))
    runner.decode(new_tokens - 1)
    return runner.tokens()


def stream_greedy(
    model: nn.Module,
    prompt: Tensor,
    new_tokens: int,
    *,
    stop: Collection[int] = (),
    repetition_penalty: float = 1.0,
) -> Iterator[int]:
    """The most likely continuation of one prompt, each token as soon as it is known.

    Args:
        model: as for `greedy_tokens`.
        prompt: (length,) int64.
        new_tokens: tokens at most.
        stop: tokens that end the sequence; they are given too.
        repetition_penalty: see `GreedyRunner`.

    Raises:
        InvalidArgument: an empty prompt, or no token asked for.
    """
    if prompt.dim() != 1 or prompt.numel() < 1 or new_tokens < 1:
        raise InvalidArgument(
            f"given a prompt of shape {tuple(prompt.shape)} and {new_tokens} new tokens, expected (length,) and at least 1"
        )
    decoder = decoder_of(model)
    capacity = prompt.numel() + new_tokens
    runner = GreedyRunner(decoder, 1, capacity, repetition_penalty=repetition_penalty)
    runner.prefill(prompt.to(decoder.device)[None])
    for _ in range(new_tokens - 1):
        token = int(runner.tokens()[0, -1])
        yield token
        if token in stop:
            return
        runner.decode(1)
    yield int(runner.tokens()[0, -1])


def decoder_of(model: nn.Module) -> Decoder:
    """The model prepared for decoding where that can be done, else as transformers computes it."""
    return prepare_for_decoding(model) if why_not_prepared(model) is None else PlainDecoder(model)

"""What a causal language model is worth: perplexity, bits per byte, divergence from another model.

Definitions, the same wherever the package reports one of these figures:

* **Windows.** The text is tokenized once with the model's tokenizer and its default handling of special
  tokens, and cut into ``floor(T / window)`` disjoint windows; what is left over is dropped. A text shorter
  than one window is one shorter window. Several texts are first joined with an empty line.
* **Scored tokens.** The first token of a window is context only, so ``n`` tokens score ``n - 1``.
* **Perplexity** is ``exp`` of the mean over windows of the window's mean negative log-likelihood, from logits
  converted to float32.
* **Bits per byte** is the negative log-likelihood of all scored tokens in bits, over the UTF-8 bytes of the
  text that those tokens stand for. The bytes of a window's first token are not counted, because its bits are
  not either. A special token that the tokenizer adds stands for no bytes.
* **KL** is the mean over scored positions of KL(original || other) in nats, over the whole vocabulary.
* **Top-1 agreement** is the share of scored positions where both models rank the same token first.

Memory stays bounded: windows are streamed, and logits exist for a few positions at a time. To that end the
model's own forward is run in two halves (everything below the output head once, then head and whatever
follows it, slice by slice); a model that does not split this way is found out by a check on a few tokens, and
run whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensormill.compress.precision import widened
from tensormill.compress.text import Text, join_texts, split_windows, text_sha256, tokenize_text
from tensormill.errors import DataError, InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, float | None], None]
"""Called as ``progress(message, fraction)``, fraction from 0 to 1."""

_LOGITS_BUDGET_BYTES = 256 << 20
_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text (definitions in the module's docstring).

    Attributes:
        perplexity: exp of the mean window loss.
        bits_per_byte: Bits of all scored tokens over the bytes that they stand for.
        tokens: Scored tokens.
        bytes: UTF-8 bytes of the scored tokens' text.
        window_nll: (windows,) float64 on the CPU, mean negative log-likelihood of each window in nats.
        window: Tokens per window.
        byte_rule: How the bytes were counted, see `TokenizedText`.
        text_sha256: Which text this was.
        comparison: Against the reference model, where there is one.
    """

    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    window_nll: Tensor
    window: int = 0
    byte_rule: str = "pieces"
    text_sha256: str = ""
    comparison: Comparison | None = None

    @property
    def windows(self) -> int:
        """Number of windows."""
        return self.window_nll.numel()


@dataclass(frozen=True)
class Comparison:
    """How far a model's predictions are from the original's.

    Attributes:
        kl: Mean KL(original || other) in nats per scored position.
        top1_agreement: Share of scored positions with the same most likely token, 0 to 1.
        tokens: Scored positions.
        window_kl: (windows,) float64 on the CPU, mean KL of each window.
    """

    kl: float
    top1_agreement: float
    tokens: int = 0
    window_kl: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a difference.

    Attributes:
        low: Lower end; NaN where there are too few windows for any interval.
        high: Upper end.
        estimate: The difference itself.
        confidence: 0 to 1.
        windows: Windows that were resampled. With fewer than about ten the percentile interval is too narrow.
    """

    low: float
    high: float
    estimate: float
    confidence: float
    windows: int

    @property
    def excludes_zero(self) -> bool:
        """True if the difference is significant at this confidence."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    nll_a: Tensor,
    nll_b: Tensor,
    *,
    statistic: Literal["perplexity", "nll"] = "perplexity",
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the difference a - b of two models on the same windows.

    Windows are drawn with replacement, the same ones for both models, so that what makes a window hard for
    both cancels (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

    Args:
        nll_a: (windows,) mean negative log-likelihood of each window under model a, in nats.
        nll_b: (windows,) the same windows under model b.
        statistic: "perplexity" for exp(mean a) - exp(mean b), "nll" for mean a - mean b.
        confidence: Coverage aimed at, between 0 and 1.
        resamples: Number of bootstrap samples.
        seed: The interval is a function of its arguments and this.

    Returns:
        The interval; NaN ends with fewer than two windows or with values that aren't finite.

    Raises:
        InvalidArgument: Different or wrong shapes, or a setting out of range.
    """
    if nll_a.ndim != 1 or nll_a.shape != nll_b.shape or nll_a.numel() == 0:
        raise InvalidArgument(
            f"given window losses of shapes {tuple(nll_a.shape)} and {tuple(nll_b.shape)}, "
            "expected the same number of windows, at least 1, in one dimension"
        )
    if statistic not in ("perplexity", "nll"):
        raise InvalidArgument(f"given statistic {statistic!r}, expected 'perplexity' or 'nll'")
    if not 0 < confidence < 1:
        raise InvalidArgument(f"given confidence {confidence}, expected a number between 0 and 1")
    if resamples < 1:
        raise InvalidArgument(f"given {resamples} resamples, expected at least 1")
    pair = torch.stack([nll_a.detach().double().cpu(), nll_b.detach().double().cpu()])  # [2, windows]
    transform = torch.exp if statistic == "perplexity" else torch.clone
    means = transform(pair.mean(1))
    estimate = float(means[0] - means[1])
    windows = pair.shape[1]
    if windows < 2 or not bool(pair.isfinite().all()):
        return Interval(math.nan, math.nan, estimate, confidence, windows)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, (1 << 21) // windows)
    differences = []
    for first in range(0, resamples, rows):
        count = min(rows, resamples - first)
        drawn = torch.randint(windows, (count, windows), generator=generator)
        a, b = transform(pair[:, drawn].mean(2))
        differences.append(a - b)
    tail = (1 - confidence) / 2
    ends = torch.quantile(torch.cat(differences), torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return Interval(float(ends[0]), float(ends[1]), estimate, confidence, windows)


class _SplitModel:
    """Runs a causal language model's forward as body and head, so that logits exist for a few positions only.

    Both halves are the model's own forward with its inner model's forward replaced for the call, so that
    whatever a family does after its head (soft caps, logit scales) is done here too.
    """

    def __init__(self, model: nn.Module, sample: Tensor) -> None:
        self.model = model
        self.body: nn.Module | None = None
        self.output: Any = None
        if hasattr(model, "_orig_mod"):  # compiled: replacing a forward inside would not be seen
            return
        for body in self._candidates():
            self.body = body
            if self._splits_cleanly(sample):
                return
        self.body = None

    def _candidates(self) -> list[nn.Module]:
        """Inner models whose output may be what the head reads; some families call the decoder in them
        directly.
        """
        base = getattr(self.model, "base_model", None)
        found = [base, getattr(base, "decoder", None)]
        return [body for body in found if isinstance(body, nn.Module) and body is not self.model]

    def _splits_cleanly(self, sample: Tensor) -> bool:
        whole = self.model(input_ids=sample, use_cache=False).logits
        half = max(1, sample.shape[1] // 2)
        try:
            hidden = self.hidden(sample)
            pieces = [self.logits(sample[:, s], hidden[:, s]) for s in (slice(0, half), slice(half, None))]
        except (AttributeError, TypeError, RuntimeError, IndexError, KeyError):
            return False
        split = torch.cat([piece for piece in pieces if piece.shape[1]], dim=1).float()
        whole = whole.float()
        if split.shape != whole.shape or not torch.equal(whole.isfinite(), split.isfinite()):
            return False
        finite = whole.isfinite()
        # The same sums in another blocking: a few units of the working precision, as a share of the logits'
        # size.
        tolerance = (
            1e-4 if next(iter(self.model.parameters())).dtype in (torch.float32, torch.float64) else 3e-2
        )
        error = (whole - split)[finite].square().mean().sqrt()
        return bool(error <= tolerance * whole[finite].square().mean().sqrt())

    @contextmanager
    def _replaced(self, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
        assert self.body is not None
        own = self.body.__dict__.get("forward")
        self.body.forward = make(self.body.forward)
        try:
            yield
        finally:
            if own is None:
                del self.body.forward
            else:
                self.body.forward = own

    @property
    def device(self) -> torch.device:
        """Where tokens go."""
        return input_device(self.model)

    def hidden(self, ids: Tensor) -> Tensor:
        """(batch, length) int64 to (batch, length, hidden); where the model does not split, to its logits."""
        if self.body is None:
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits
        caught: list[Any] = []

        def catch(forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                output = forward(*args, **kwargs)
                caught.append(output)
                return _with_hidden(output, output[0][:, -1:])  # one position: the head costs next to nothing

            return run

        with self._replaced(catch):
            self.model(input_ids=ids, use_cache=False)
        hidden: Tensor = caught[0][0]
        self.output = _with_hidden(
            caught[0], hidden.new_empty(0)
        )  # the container is needed again, its content not
        return hidden

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Float32 logits (batch, slice, vocabulary) of a slice of what `hidden` returned for the slice's
        ids.
        """
        if self.body is None:
            return hidden.float()
        with self._replaced(lambda _: lambda *args, **kwargs: _with_hidden(self.output, hidden)):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits.float()


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(**{**output, "last_hidden_state": hidden})


@contextmanager
def evaluating(models: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode without gradients; each model's mode is restored.

    Not inference mode: an operator may cache repacked weights on first use, and those must stay usable in
    training.
    """
    training = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode


def embedding(model: nn.Module) -> Any:
    find = getattr(model, "get_input_embeddings", None)
    return find() if find is not None else None


def input_device(model: nn.Module) -> torch.device:
    for source in (embedding(model), model):
        if isinstance(source, nn.Module):
            for tensor in (*source.parameters(), *source.buffers()):
                return tensor.device
    return torch.device("cpu")


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def max_positions(model: nn.Module) -> int | None:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        value = getattr(_text_config(model), name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check_vocabulary(model: nn.Module, ids: Tensor) -> None:
    """Refuses, as `DataError`, ids that a model has no embedding for."""
    rows = getattr(embedding(model), "num_embeddings", None)
    if rows is not None and ids.numel() and int(ids.max()) >= rows:
        raise DataError(
            f"the tokenizer gives token id {int(ids.max())}, the model has {rows} embeddings; "
            "use the tokenizer that belongs to the model"
        )


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    *,
    window: int = 2048,
    max_tokens: int | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity and bits per byte of a model on a text.

    Args:
        model: A causal language model of transformers in any floating dtype.
        tokenizer: Its tokenizer.
        text: A text, several, or a mapping from names to texts; several are joined with an empty line.
        window: Tokens per window; the model's own longest context where that is shorter.
        max_tokens: Use only the first so many tokens.
        device: Where to run; the model is moved there and stays there. None leaves it where it is.
        batch_size: Windows per forward; None chooses by the window's length.
        progress: Called with a message and the share done.

    Raises:
        DataError: The text is empty or too short, or the tokenizer does not belong to the model.
        InvalidArgument: A setting is out of range.
    """
    return evaluate_models(
        {"model": model},
        tokenizer,
        text,
        window=window,
        max_tokens=max_tokens,
        device=device,
        batch_size=batch_size,
        progress=progress,
    )["model"]


def evaluate_models(
    models: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    *,
    reference: str | None = None,
    window: int = 2048,
    max_tokens: int | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Evaluate several models on the same windows, and compare each with one of them.

    The models go through the text together, a few windows at a time, so that the reference runs once and none
    of its logits is stored.

    Args:
        models: The models by name; all share the tokenizer.
        tokenizer: Their tokenizer.
        text: As in `evaluate`.
        reference: Name of the model that the others are compared with (KL and top-1 agreement); None compares
            none.
        window: As in `evaluate`; the shortest of the models' contexts bounds it.
        max_tokens: As in `evaluate`.
        device: As in `evaluate`, for all models.
        batch_size: As in `evaluate`.
        progress: As in `evaluate`.

    Returns:
        An evaluation per name; `Evaluation.comparison` is set for all but the reference.

    Raises:
        DataError: As in `evaluate`.
        InvalidArgument: No model, an unknown reference, or a setting out of range.
    """
    if max_tokens is not None and max_tokens < 2:
        raise InvalidArgument(f"given max_tokens {max_tokens}, expected at least 2")
    if not models:
        raise InvalidArgument("given no model, expected at least one")
    windows = Windows.cut(tokenizer, text, list(models.values()), window=window, max_tokens=max_tokens)
    scores = _score(
        models, windows.ids, reference=reference, device=device, batch_size=batch_size, progress=progress
    )
    return {name: windows.evaluation(score) for name, score in scores.items()}


@dataclass(frozen=True)
class Windows:
    """A text in windows of tokens, and what is known of them.

    Attributes:
        ids: (windows, length) int64.
        bytes: UTF-8 bytes of the scored tokens' text.
        byte_rule: How the bytes were counted, see `TokenizedText`.
        text_sha256: Which text this is.
    """

    ids: Tensor
    bytes: int
    byte_rule: str
    text_sha256: str

    @classmethod
    def cut(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        text: Text,
        models: Iterable[nn.Module],
        *,
        window: int = 2048,
        max_tokens: int | None = None,
    ) -> Windows:
        """The windows of a text that all of `models` can take; the rest as for `evaluate`.

        Raises:
            DataError: The text is empty or too short.
        """
        text = join_texts(text)
        tokenized = tokenize_text(tokenizer, text)
        limits = [limit for limit in map(max_positions, models) if limit is not None]
        length = min([window, *limits])
        ids = split_windows(tokenized.ids[:max_tokens], length)
        byte_counts = split_windows(tokenized.byte_counts[:max_tokens], length)
        return cls(ids, int(byte_counts[:, 1:].sum()), tokenized.byte_rule, text_sha256(text))

    def evaluation(self, score: Score) -> Evaluation:
        """What a model's finished score says."""
        tokens = self.ids.shape[0] * (self.ids.shape[1] - 1)
        nats = float(score.nll.mean()) * tokens  # windows have one length, so this is the total
        return Evaluation(
            perplexity=float(score.nll.mean().exp()),
            bits_per_byte=nats / math.log(2) / self.bytes if self.bytes else math.nan,
            tokens=tokens,
            bytes=self.bytes,
            window_nll=score.nll,
            window=self.ids.shape[1],
            byte_rule=self.byte_rule,
            text_sha256=self.text_sha256,
            comparison=score.comparison(tokens),
        )


def compare(
    original: nn.Module,
    other: nn.Module,
    tokens: Tensor,
    *,
    window: int = 2048,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Mean KL(original || other) of the next-token distributions, and top-1 agreement.

    Args:
        original: The model that counts as the truth.
        other: The model to judge.
        tokens: (T,) int64, cut into windows as in `evaluate`; or (windows, length), taken as they are.
        window: Tokens per window for (T,) tokens; bounded by both models' contexts.
        batch_size: Windows per forward; None chooses.
        progress: Called with a message and the share done.

    Raises:
        DataError: Fewer than two tokens, or ids that a model doesn't have.
        InvalidArgument: A tensor of other shape or dtype.
    """
    if tokens.dtype not in (torch.int64, torch.int32) or tokens.ndim not in (1, 2):
        raise InvalidArgument(
            f"given {tokens.dtype} tokens {tuple(tokens.shape)}, expected int64 (tokens,) or (windows, n)"
        )
    tokens = tokens.long()
    if tokens.ndim == 1:
        limits = [limit for limit in map(max_positions, (original, other)) if limit is not None]
        tokens = split_windows(tokens, min([window, *limits]))
    elif tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise DataError(
            f"given windows of shape {tuple(tokens.shape)}, expected at least one window of 2 tokens"
        )
    models = {"original": original, "other": other}
    scores = _score(
        models, tokens, reference="original", batch_size=batch_size, progress=progress, what="comparing"
    )
    comparison = scores["other"].comparison(tokens.shape[0] * (tokens.shape[1] - 1))
    assert comparison is not None
    return comparison


class BodyAndHead(Protocol):
    """A model whose logits are asked for in slices: everything below its head runs once."""

    @property
    def model(self) -> nn.Module:
        """The model, for its configuration."""

    @property
    def device(self) -> torch.device:
        """Where tokens go."""

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head reads, (batch, length, ...), for ids (batch, length)."""

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Float32 logits of a slice of what `hidden` returned for the slice's ids."""


@dataclass
class Score:
    """Sums per window of one model: losses, and against the reference divergences and agreements."""

    nll: Tensor
    kl: Tensor | None = None
    agree: Tensor | None = None

    @classmethod
    def blank(cls, windows: int, *, compared: bool) -> Score:
        """Before anything is scored."""
        sums = [torch.zeros(windows, dtype=torch.float64) for _ in range(3)]
        return cls(sums[0], *(sums[1:] if compared else ()))

    def finish(self, length: int) -> None:
        """Turn sums over windows of `length` tokens into means over scored tokens."""
        for sums in (self.nll, self.kl, self.agree):
            if sums is not None:
                sums /= length - 1

    def comparison(self, tokens: int) -> Comparison | None:
        if self.kl is None or self.agree is None:
            return None
        return Comparison(float(self.kl.mean()), float(self.agree.mean()), tokens, self.kl)


def _score(
    models: Mapping[str, nn.Module],
    ids: Tensor,
    *,
    reference: str | None,
    device: str | torch.device | None = None,
    batch_size: int | None,
    progress: Progress | None,
    what: str = "evaluating",
) -> dict[str, Score]:
    """Mean loss per window of each model on ids (windows, length), and its divergence from the reference."""
    if reference is not None and reference not in models:
        raise InvalidArgument(f"given reference {reference!r}, expected one of {', '.join(models)}")
    if batch_size is not None and batch_size < 1:
        raise InvalidArgument(f"given batch_size {batch_size}, expected at least 1")
    windows, length = ids.shape
    for model in models.values():
        check_vocabulary(model, ids)
        if device is not None and input_device(model) != torch.device(device):
            model.to(device)
    # The reference first, so that its logits are there when the others need them.
    order = sorted(models, key=lambda name: name != reference)
    scores = {
        name: Score.blank(windows, compared=reference is not None and name != reference) for name in order
    }
    kind = input_device(models[order[0]]).type
    batch = batch_size or max(1, _BATCH_TOKENS.get(kind, _BATCH_TOKENS["cuda"]) // length)
    with evaluating(models.values()), widened(*models.values()):
        split = {
            name: _SplitModel(models[name], ids[:1, : min(8, length)].to(input_device(models[name])))
            for name in order
        }
        if progress is not None:
            progress(what, 0.0)
        for first in range(0, windows, batch):
            score_batch(split, scores, ids[first : first + batch], slice(first, first + batch), reference)
            if progress is not None:
                progress(
                    f"{what} {min(first + batch, windows)} of {windows} windows",
                    min(1.0, (first + batch) / windows),
                )
    for score in scores.values():
        score.finish(length)
    return {name: scores[name] for name in models}


def score_batch(
    split: Mapping[str, BodyAndHead],
    scores: Mapping[str, Score],
    ids: Tensor,
    rows: slice,
    reference: str | None,
) -> None:
    """Add what models make of ids (batch, length), windows `rows` of the text, to the sums in `scores`."""
    batch, length = ids.shape
    places = {name: ids.to(part.device) for name, part in split.items()}
    hidden = {name: part.hidden(places[name]) for name, part in split.items()}
    vocabulary = _vocabulary(split)
    live = 3 if reference is None else 6  # float32 copies of the logits that exist at once
    step = max(1, _LOGITS_BUDGET_BYTES // (4 * live * batch * vocabulary))
    for first in range(0, length - 1, step):
        part = slice(first, min(first + step, length - 1))
        targets = ids[:, first + 1 : part.stop + 1]
        reference_logp: Tensor | None = None
        for name, model in split.items():
            logp = F.log_softmax(model.logits(places[name][:, part], hidden[name][:, part]), dim=-1)
            loss = -logp.gather(-1, targets.to(logp.device)[..., None])[..., 0]
            scores[name].nll[rows] += loss.double().sum(1).cpu()
            if name == reference:
                reference_logp = logp
            elif reference_logp is not None:
                _add_divergence(scores[name], rows, reference_logp, logp.to(reference_logp.device))


def _add_divergence(score: Score, rows: slice, original: Tensor, other: Tensor) -> None:
    """Add the KL sums and agreements of two (batch, slice, vocabulary) tensors of log-probabilities."""
    assert score.kl is not None and score.agree is not None
    if original.shape != other.shape:
        raise InvalidArgument(
            f"given models with vocabularies of {original.shape[-1]} and {other.shape[-1]}, expected the same"
        )
    score.agree[rows] += (original.argmax(-1) == other.argmax(-1)).double().sum(1).cpu()
    terms = original.exp() * (original - other)
    # A token that the original rules out adds nothing, whatever the other makes of it (0 * log 0 = 0).
    terms.masked_fill_(original == -math.inf, 0)
    # Rounding can leave a sum just below zero, which no divergence is.
    score.kl[rows] += terms.sum(-1, dtype=torch.float64).clamp_min(0).sum(1).cpu()


def _vocabulary(split: Mapping[str, BodyAndHead]) -> int:
    sizes = (getattr(_text_config(part.model), "vocab_size", None) for part in split.values())
    return max(int(size or 1) for size in sizes)

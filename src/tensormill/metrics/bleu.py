"""BLEU of token ids, per sentence and per corpus, on the device that holds them.

The statistics (clipped matches, totals, lengths) are exact integers from `tensormill.ops.ngram_matches`; the score is
finished in float64, in one of two dialects that differ in nearly every corner case: "nltk" (NLTK 3.10's
`sentence_bleu` and `corpus_bleu`, with all its smoothings) and "sacrebleu" (sacreBLEU 2.6's `BLEU`, as a fraction
unless `percent`). Nothing waits for a GPU, so that scoring fits in a captured graph; checks of values (lengths, padding)
are therefore made for tensors on the CPU only. Idea and use as a reward: TensorBLEU (Filipek, arXiv 2510.05485). BLEU
of token ids depends on the tokenizer: use it in development, and sacreBLEU on text for publication.
"""

from __future__ import annotations

import difflib
import importlib
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument

__all__ = ["Bleu", "Scoring", "bleu_reward", "corpus_bleu", "sentence_bleu"]

DEFAULT_WEIGHTS = (0.25, 0.25, 0.25, 0.25)
MAX_ORDER = 8

_SMOOTHINGS = {
    "nltk": ("method0", "method1", "method2", "method3", "method4", "method5", "method6", "method7"),
    "sacrebleu": ("none", "floor", "add-k", "exp"),
}
_SAME = {"none": "method0", "floor": "method1", "add-k": "method2", "exp": "method3"}
_DEFAULT_SMOOTHING = {"nltk": "method1", "sacrebleu": "exp"}
_SMOOTH_VALUES = {"floor": 0.1, "add-k": 1.0}

Weights = Sequence[float] | Sequence[Sequence[float]]
Ids = Tensor | Sequence[Any]


@dataclass(frozen=True)
class Scoring:
    """How statistics become a score.

    Attributes:
        dialect: "nltk" or "sacrebleu".
        weights: of orders 1, 2, ..., at most 8 of them; or several such sets, and there is a score for each. None:
            a quarter for each of four orders. The sacreBLEU dialect knows equal weights only.
        smoothing: "method0" to "method7" (nltk), "none", "floor", "add-k", "exp" (sacrebleu); the first four of each
            are also known by the other's name. None: "method1", or "exp" for sacrebleu.
        epsilon: numerator in place of 0 in method1.
        alpha: weight of the prior in method6.
        k: divisor in methods 4 and 7.
        smooth_value: sacreBLEU's value for "floor" (None: 0.1) and "add-k" (None: 1).
        effective_order: sacreBLEU's: average only over orders that the candidate has n-grams of. None: yes for
            sentences, no for a corpus.
        auto_reweigh: NLTK's: candidates shorter than 4 under the default weights use 1/length for each of their
            `length` orders.
        strict: method0 gives 0 when an order has no match, as BLEU was defined, where NLTK gives some 1e-77 to 1e-232.
        on_undefined: method6 needs a matching trigram (NLTK asserts it); "nan" gives NaN for those that have none,
            "raise" an error, which waits for the device.
        percent: scores from 0 to 100.
        dtype: of the scores; they are computed in float64.
        several: derived: whether several sets of weights were given; scores then have a last dimension of sets.
        weight_sets: derived: the sets of weights.
        max_n: derived: largest order that is counted (methods 5 and 7 always look at order 5).
    """

    dialect: str = "nltk"
    weights: Weights | None = None
    smoothing: str | None = None
    epsilon: float = 0.1
    alpha: float = 5.0
    k: float = 5.0
    smooth_value: float | None = None
    effective_order: bool | None = None
    auto_reweigh: bool = False
    strict: bool = False
    on_undefined: str = "nan"
    percent: bool = False
    dtype: torch.dtype = torch.float64
    several: bool = field(init=False, repr=False, compare=False)
    weight_sets: tuple[tuple[float, ...], ...] = field(init=False, repr=False, compare=False)
    max_n: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_choice("dialect", self.dialect, tuple(_SMOOTHINGS))
        _check_choice("on_undefined", self.on_undefined, ("nan", "raise"))
        object.__setattr__(self, "smoothing", self._canonical_smoothing())
        for name in ("epsilon", "alpha", "k"):
            _check_number(name, getattr(self, name), positive=name == "k")
        if self.smooth_value is not None:
            _check_number("smooth_value", self.smooth_value)
            if self.smoothing not in _SMOOTH_VALUES:
                raise InvalidArgument(
                    f"given smooth_value={self.smooth_value} with smoothing {self.smoothing!r}, expected it with "
                    "dialect 'sacrebleu' and 'floor' or 'add-k'; NLTK's values are epsilon, alpha and k"
                )
        if self.dialect == "nltk" and self.effective_order is not None:
            raise InvalidArgument("given effective_order with dialect 'nltk', expected dialect 'sacrebleu'")
        if self.dialect == "sacrebleu" and self.auto_reweigh:
            raise InvalidArgument("given auto_reweigh with dialect 'sacrebleu', expected dialect 'nltk'")
        if self.strict and self.smoothing != "method0":
            raise InvalidArgument(f"given strict with smoothing {self.smoothing!r}, expected 'method0'")
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise InvalidArgument(f"given dtype {self.dtype!r}, expected a floating-point torch.dtype")
        several = (
            self.weights is not None and len(self.weights) > 0 and isinstance(self.weights[0], (tuple, list))
        )
        object.__setattr__(self, "several", several)
        sets = self._checked_weights()
        object.__setattr__(self, "weight_sets", sets)
        orders = max(map(len, sets))
        averaged = self.smoothing in ("method5", "method7")
        object.__setattr__(self, "max_n", max(orders, 5) if averaged else orders)
        if self.smoothing == "method6" and orders < 3:
            raise InvalidArgument(
                f"given weights for {orders} orders with method6, expected at least 3: it starts from "
                "trigrams"
            )
        if self.dialect == "sacrebleu" and any(abs(w - one[0]) > 1e-9 for one in sets for w in one):
            raise InvalidArgument(
                f"given weights {self.weights} with dialect 'sacrebleu', expected equal ones"
            )

    def _canonical_smoothing(self) -> str:
        known = _SMOOTHINGS[self.dialect]
        if self.smoothing is None:
            return _DEFAULT_SMOOTHING[self.dialect]
        translated = _SAME if self.dialect == "nltk" else {b: a for a, b in _SAME.items()}
        name = translated.get(self.smoothing, self.smoothing)
        if name in _SMOOTHINGS["nltk"] and self.dialect == "sacrebleu":
            raise InvalidArgument(
                f"given smoothing {name!r} with dialect 'sacrebleu', expected one of {', '.join(known)}; "
                "use dialect 'nltk'"
            )
        if name not in known:
            _check_choice("smoothing", self.smoothing, (*known, *translated))
        return name

    def _checked_weights(self) -> tuple[tuple[float, ...], ...]:
        given: Any = DEFAULT_WEIGHTS if self.weights is None else self.weights
        sets = given if self.several else [given]
        result = []
        for one in sets:
            try:
                values = tuple(float(w) for w in one)
            except (TypeError, ValueError) as error:
                raise InvalidArgument(
                    f"given weights {given!r}, expected numbers or sets of numbers"
                ) from error
            if not 1 <= len(values) <= MAX_ORDER:
                raise InvalidArgument(
                    f"given {len(values)} weights, expected 1 to {MAX_ORDER}: one for each order"
                )
            if not all(math.isfinite(w) for w in values):
                raise InvalidArgument(f"given weights {values}, expected finite numbers")
            result.append(values)
        return tuple(result)

    def signature(self, references: int | None = None) -> str:
        """What identifies these settings in a log, in the style of sacreBLEU.

        Args:
            references: number of references, if it is worth stating.

        Example:
            >>> Scoring(smoothing="exp").signature(references=2).rpartition("|")[0]
            'nrefs:2|tok:ids|dialect:nltk|orders:4|smooth:method3|eff:no'
        """
        value = {
            "method1": self.epsilon,
            "method4": self.k,
            "method6": self.alpha,
            "method7": self.k,
            "floor": self._smooth_value,
            "add-k": self._smooth_value,
        }.get(str(self.smoothing))
        effective = {None: "sentences", True: "yes", False: "no"}[self.effective_order]
        sets = self.weight_sets
        uniform = all(abs(w - 1 / len(one)) < 1e-9 for one in sets for w in one)
        parts = [
            *([f"nrefs:{references}"] if references is not None else []),
            "tok:ids",
            f"dialect:{self.dialect}",
            f"orders:{','.join(str(len(one)) for one in sets)}",
            *([] if uniform else ["weights:" + ";".join(",".join(f"{w:g}" for w in one) for one in sets)]),
            f"smooth:{self.smoothing}" + (f"[{value:g}]" if value is not None else ""),
            f"eff:{effective if self.dialect == 'sacrebleu' else 'no'}",
            *(["reweigh:yes"] if self.auto_reweigh else []),
            *(["strict:yes"] if self.strict else []),
            *(["range:100"] if self.percent else []),
            f"version:tensormill-{getattr(importlib.import_module('tensormill'), '__version__', 'unknown')}",
        ]
        return "|".join(parts)

    @property
    def _smooth_value(self) -> float:
        default = _SMOOTH_VALUES.get(str(self.smoothing), 0.0)
        return default if self.smooth_value is None else float(self.smooth_value)


def sentence_bleu(
    candidates: Ids,
    references: Ids,
    candidate_lengths: Tensor | None = None,
    reference_lengths: Tensor | None = None,
    *,
    pad_id: int | None = None,
    **settings: Any,
) -> Tensor:
    """BLEU of every candidate.

    Args:
        candidates: (batch, length) integer token ids; or (prompts, group, length), every group sharing its prompt's
            references; or a list of lists of ids.
        references: (batch, count, length), or (batch, length) for one each; or a list with, for every candidate, a list
            of references or one reference, of any lengths.
        candidate_lengths: (batch,) or (prompts, group); None: from `pad_id`, or else every row is full.
        reference_lengths: (batch, count) or (batch,); 0 or -1 marks an absent reference.
        pad_id: id of padding at the end of a row, where lengths are not given; the same id inside the text is a token
            like any other.
        **settings: fields of `Scoring`: dialect, weights, smoothing, ...

    Returns:
        Scores in [0, 1] (or to 100 with `percent`): (batch,) or (prompts, group), with a last dimension of sets where
        several sets of weights are given. A candidate without any matching token scores 0 under every smoothing.

    Raises:
        InvalidArgument: ids that are no integers, shapes that don't fit, a length past its row, no references, or
            settings that contradict one another.

    Example:
        >>> import torch
        >>> from tensormill.metrics import sentence_bleu
        >>> candidates = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 1, 1]])
        >>> references = torch.tensor([[[5, 6, 7, 8, 9]], [[5, 6, 7, 8, 9]]])
        >>> [round(score, 4) for score in sentence_bleu(candidates, references).tolist()]
        [1.0, 0.2659]
    """
    scoring = _scoring(settings)
    counted = _statistics(scoring, candidates, references, candidate_lengths, reference_lengths, pad_id, True)
    matches, totals, lengths, closest = _in_float64(*counted)
    if scoring.dialect == "sacrebleu":
        scores = _sacrebleu(scoring, matches, totals, lengths, closest, scoring.effective_order is not False)
    else:
        fifth = _fifth(matches, totals)
        scores = _nltk(scoring, matches, totals.clamp_min(1), lengths, closest, fifth, totals)
    return _finished(scoring, scores)


def corpus_bleu(
    candidates: Ids,
    references: Ids,
    candidate_lengths: Tensor | None = None,
    reference_lengths: Tensor | None = None,
    *,
    pad_id: int | None = None,
    **settings: Any,
) -> Tensor:
    """BLEU of all candidates together: their statistics are summed before the score is taken.

    Arguments, settings and errors are those of `sentence_bleu`. As NLTK does, the nltk dialect counts at least one
    n-gram of every order for each candidate, and methods 5, 6 and 7 take their order-5 precision and n-gram counts
    from the last candidate alone.

    Returns:
        A scalar, or (sets,) where several sets of weights are given.

    Example:
        >>> import torch
        >>> from tensormill.metrics import corpus_bleu
        >>> candidates = [[1, 2, 3, 4, 5], [6, 7, 8]]
        >>> references = [[[1, 2, 3, 4]], [[6, 7, 9, 8], [6, 7]]]
        >>> round(float(corpus_bleu(candidates, references, dialect="sacrebleu")), 4)
        0.618
    """
    metric = Bleu(**settings)
    metric.update(candidates, references, candidate_lengths, reference_lengths, pad_id=pad_id)
    return metric.compute()


class Bleu:
    """Corpus BLEU over many batches: a sum of integer statistics, on the device of the first batch.

    Args:
        **settings: fields of `Scoring`.

    Example:
        >>> from tensormill.metrics import Bleu
        >>> metric = Bleu(dialect="sacrebleu")
        >>> for candidates, references in [([[1, 2, 3, 4, 5]], [[1, 2, 3, 4]]), ([[6, 7, 8]], [[6, 7]])]:
        ...     metric.update(candidates, references)
        >>> round(float(metric.compute()), 4)
        0.5946
    """

    def __init__(self, **settings: Any) -> None:
        self.scoring = _scoring(settings)
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._sums: Tensor | None = (
            None  # int64: candidates, lengths, closest, then matches, totals, denominators
        )
        self._last: Tensor | None = None  # int64: matches and totals of the last candidate

    def update(
        self,
        candidates: Ids,
        references: Ids,
        candidate_lengths: Tensor | None = None,
        reference_lengths: Tensor | None = None,
        *,
        pad_id: int | None = None,
    ) -> None:
        """Add a batch; arguments as for `sentence_bleu`."""
        counted = _statistics(
            self.scoring, candidates, references, candidate_lengths, reference_lengths, pad_id, False
        )
        matches, totals, lengths, closest = counted
        matches, totals = matches.flatten(0, -2).long(), totals.flatten(0, -2).long()
        lengths, closest = lengths.flatten().long(), closest.flatten().long()
        sums = torch.cat(
            [
                torch.stack([torch.ones_like(lengths), lengths, closest]).sum(-1),
                matches.sum(0),
                totals.sum(0),
                totals.clamp_min(1).sum(0),
            ]
        )
        if matches.shape[0]:
            self._last = torch.cat([matches[-1], totals[-1]])
        self._sums = sums if self._sums is None else self._sums + sums.to(self._sums.device)

    def merge(self, other: Bleu) -> None:
        """Add what another metric of the same settings has seen.

        Raises:
            InvalidArgument: its settings differ.
        """
        if other.scoring != self.scoring:
            raise InvalidArgument(
                "given a Bleu with other settings, expected the same; compare their signature()"
            )
        if other._sums is not None:
            self._sums = other._sums if self._sums is None else self._sums + other._sums.to(self._sums.device)
        if other._last is not None:
            self._last = other._last

    def all_reduce(self, group: Any = None, *, device: torch.device | str | None = None) -> None:
        """Sum the statistics of all ranks, on every rank; a rank that has seen no batch takes part too.

        Args:
            group: a torch.distributed process group; None: the default one.
            device: where the statistics are exchanged; None: where they are (the CPU on a rank that has none).
        """
        import torch.distributed as distributed

        orders = self.scoring.max_n
        place = device or (self._sums.device if self._sums is not None else torch.device("cpu"))
        sums = torch.zeros(3 + 3 * orders, dtype=torch.int64) if self._sums is None else self._sums
        sums = sums.to(place, copy=True)
        # The last candidate is that of the highest rank that has one.
        rank = -1 if self._last is None else distributed.get_rank(group)
        highest = torch.tensor([rank], dtype=torch.int64, device=place)
        distributed.all_reduce(highest, op=distributed.ReduceOp.MAX, group=group)
        last = torch.zeros(2 * orders, dtype=torch.int64) if self._last is None else self._last
        last = last.to(place) * ((highest == rank) & (highest >= 0))
        both = torch.cat([sums, last])
        distributed.all_reduce(both, group=group)
        self._sums, self._last = both[: sums.numel()], both[sums.numel() :]

    def compute(self) -> Tensor:
        """The score of everything seen: a scalar, or (sets,); 0 before the first batch."""
        orders = self.scoring.max_n
        sums = torch.zeros(3 + 3 * orders) if self._sums is None else self._sums
        last = torch.zeros(2 * orders) if self._last is None else self._last
        sums, last = sums.to(torch.float64), last.to(sums.device, torch.float64)
        lengths, closest = sums[1], sums[2]
        matches, totals, denominators = sums[3:].view(3, orders)
        if self.scoring.dialect == "sacrebleu":
            effective = self.scoring.effective_order is True
            scores = _sacrebleu(self.scoring, matches, totals, lengths, closest, effective)
        else:
            last_matches, last_totals = last.view(2, orders)
            fifth = _fifth(last_matches, last_totals)
            scores = _nltk(
                self.scoring, matches, denominators.clamp_min(1), lengths, closest, fifth, last_totals
            )
        return _finished(self.scoring, scores)

    def signature(self, references: int | None = None) -> str:
        """As `Scoring.signature`."""
        return self.scoring.signature(references)


def bleu_reward(
    reference_key: str = "reference_ids", *, pad_id: int | None = None, **settings: Any
) -> Callable[..., Any]:
    """A reward function for TRL-style trainers: the BLEU of each completion's token ids with its references.

    Args:
        reference_key: the data set's column that holds the references' ids: for every completion one list of ids, or
            a list of such lists.
        pad_id: as for `sentence_bleu`, where ids come as tensors.
        **settings: fields of `Scoring`.

    Returns:
        A function of `completion_ids` and the data set's columns (others are ignored): list of float for lists, and
        for a tensor a (batch,) float32 tensor on its device.

    Raises:
        InvalidArgument: settings that contradict one another; when called, a missing column.

    Example:
        >>> from tensormill.metrics import bleu_reward
        >>> reward = bleu_reward("answer_ids", smoothing="exp")
        >>> reward(completion_ids=[[1, 2, 3, 4]], prompts=["count"], answer_ids=[[1, 2, 3, 4]])
        [1.0]
    """
    _scoring(settings)
    chosen = {"dtype": torch.float32, **settings}

    def reward(*, completion_ids: Ids, **columns: Any) -> Any:
        if columns.get(reference_key) is None:
            present = ", ".join(sorted(columns)) or "none"
            raise InvalidArgument(
                f"given no column {reference_key!r} (columns: {present}), expected the references' token ids in it; "
                "name the right column in bleu_reward(reference_key)"
            )
        scores = sentence_bleu(completion_ids, columns[reference_key], pad_id=pad_id, **chosen)
        return scores if isinstance(completion_ids, Tensor) else scores.tolist()

    reward.__name__ = "bleu"
    return reward


@torch.compiler.assume_constant_result
def _scoring(settings: dict[str, Any]) -> Scoring:
    known = [one.name for one in fields(Scoring) if one.init]
    for name in settings:
        if name not in known:
            raise InvalidArgument(f"given unknown setting {name!r}, " + _expected(name, known))
    scoring = Scoring(**settings)
    for one in scoring.weight_sets:
        if abs(math.fsum(one) - 1) > 1e-6:
            warnings.warn(f"BLEU weights {one} sum to {math.fsum(one):g}, not to 1", stacklevel=3)
    return scoring


def _check_choice(name: str, given: Any, known: Sequence[str]) -> None:
    if given not in known:
        raise InvalidArgument(f"given {name}={given!r}, " + _expected(str(given), known))


def _expected(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"expected one of {', '.join(known)}" + (f"; did you mean {close[0]!r}?" if close else "")


def _check_number(name: str, given: Any, *, positive: bool = False) -> None:
    good = (
        isinstance(given, (int, float)) and math.isfinite(given) and (given > 0 if positive else given >= 0)
    )
    if not good or isinstance(given, bool):
        raise InvalidArgument(
            f"given {name}={given!r}, expected a {'positive' if positive else 'non-negative'} number"
        )


def _statistics(
    scoring: Scoring,
    candidates: Ids,
    references: Ids,
    candidate_lengths: Tensor | None,
    reference_lengths: Tensor | None,
    pad_id: int | None,
    per_sentence: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Matches and totals (..., max_n), candidate and closest reference lengths (...), all integers."""
    from tensormill.ops.ngram_matches import ngram_matches

    candidates, candidate_lengths = _as_ids("candidates", candidates, candidate_lengths, pad_id)
    references, reference_lengths = _as_ids("references", references, reference_lengths, pad_id)
    if references.device != candidates.device:
        raise InvalidArgument(
            f"given candidates on {candidates.device} and references on {references.device}, expected one device"
        )
    matches, totals, closest = ngram_matches(
        candidates, references, candidate_lengths, reference_lengths, max_n=scoring.max_n
    )
    lengths = totals[..., 0]  # as many unigrams as tokens
    if per_sentence and scoring.smoothing in ("method0", "none") and not scoring.auto_reweigh:
        orders = max(map(len, scoring.weight_sets))
        on_host = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
        if candidates.shape[-1] < orders or (on_host and bool((lengths < orders).any())):
            warnings.warn(
                f"BLEU without smoothing: a candidate has fewer than {orders} tokens and so no {orders}-gram, and "
                "scores (nearly) 0; choose a smoothing such as 'method1', or auto_reweigh",
                stacklevel=3,
            )
    return matches, totals, lengths, closest


def _in_float64(matches: Tensor, totals: Tensor, lengths: Tensor, closest: Tensor) -> tuple[Tensor, ...]:
    """Statistics of candidates as views of one float64 tensor: on a GPU every conversion would be a launch."""
    orders = matches.shape[-1]
    both = torch.cat([matches, totals, closest.unsqueeze(-1)], -1).to(torch.float64)
    totals = both[..., orders : 2 * orders]
    return both[..., :orders], totals, totals[..., 0], both[..., -1]


def _as_ids(name: str, ids: Ids, lengths: Tensor | None, pad_id: int | None) -> tuple[Tensor, Tensor | None]:
    """Token ids as an int32 or int64 tensor, and their lengths."""
    if not isinstance(ids, Tensor) and not hasattr(ids, "__array__"):
        if lengths is not None:
            raise InvalidArgument(f"given {name} as lists and their lengths, expected a tensor with lengths")
        return _padded(name, ids)
    tensor = ids if isinstance(ids, Tensor) else torch.as_tensor(ids)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InvalidArgument(
            f"given {name} of {tensor.dtype}, expected integer token ids; cast with .long()"
        )
    if tensor.is_nested:
        tensor, lengths = tensor.to_padded_tensor(0), tensor.offsets().diff()  # type: ignore[attr-defined]
    if tensor.dtype not in (torch.int32, torch.int64):
        tensor = tensor.long()
    if lengths is None and pad_id is not None:
        place = torch.arange(1, tensor.shape[-1] + 1, device=tensor.device)
        lengths = torch.where(tensor != pad_id, place, 0).amax(-1) if tensor.shape[-1] else None
    elif lengths is None and _looks_padded(tensor):
        warnings.warn(
            f"{name} look padded at the end, and neither pad_id nor lengths are given: padding counts as text; pass "
            "pad_id, lengths, or lists",
            stacklevel=4,
        )
    return tensor, lengths


def _looks_padded(ids: Tensor) -> bool:
    """Negative ids, or rows that end in runs of one id, of different lengths (looked at on the CPU only)."""
    if ids.device.type != "cpu" or ids.numel() == 0 or ids.dim() < 2 or torch.compiler.is_compiling():
        return False
    rows = ids.flatten(0, -2)
    if bool((rows < 0).any()):
        return True
    if rows.shape[1] < 2:
        return False
    ends = rows[rows[:, -1] == rows[:, -2]]  # rows that end in a run
    if len(ends) < 2 or bool((ends[:, -1] != ends[0, -1]).any()):
        return False
    runs = (ends == ends[:, -1:]).flip(-1).long().cumprod(-1).sum(-1)
    return runs.unique().numel() > 1 or len(ends) < len(rows)


def _padded(name: str, ids: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Nested lists of ids, two or three deep, as a tensor and the lengths of its rows (-1: no such row)."""
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise InvalidArgument(
            f"given {name} of type {type(ids).__name__}, expected a tensor or lists of token ids"
        )
    rows = [_plain(name, row) for row in ids]
    deep = any(isinstance(item, list) for row in rows for item in row)
    sets: list[list[Any]] = [
        row if deep and (not row or isinstance(row[0], list)) else [row] for row in rows
    ]  # a flat row of references is the only one of its candidate
    count = max((len(one) for one in sets), default=1)
    if name == "references" and any(len(one) == 0 for one in sets):
        raise InvalidArgument("given 0 references for a candidate, expected at least 1 for each")
    if not all(isinstance(row, list) for one in sets for row in one):
        raise InvalidArgument(
            f"given {name} that mix ids and lists of ids at one level, expected one or the other"
        )
    if name == "candidates" and deep and len({len(one) for one in rows}) > 1:
        raise InvalidArgument("given groups of candidates of different sizes, expected equal ones")
    width = max((len(row) for one in sets for row in one), default=0)
    padded = [
        [row + [0] * (width - len(row)) for row in one] + [[0] * width] * (count - len(one)) for one in sets
    ]
    sizes = [[len(row) for row in one] + [-1] * (count - len(one)) for one in sets]
    if any(isinstance(v, (float, bool)) for one in sets for row in one for v in row):
        raise InvalidArgument(f"given {name} with values that are no integers, expected token ids")
    try:
        tensor = torch.tensor(padded, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InvalidArgument(
            f"given {name} that are no 64-bit integers, expected token ids: {error}"
        ) from error
    tensor, lengths = tensor.reshape(len(sets), count, width), torch.tensor(sizes, dtype=torch.int64)
    lengths = lengths.reshape(len(sets), count)
    return (tensor, lengths) if deep or name == "references" else (tensor[:, 0], lengths[:, 0])


def _plain(name: str, row: Any) -> list[Any]:
    """A row, or a list of rows, with tensors and other sequences turned into lists."""
    if isinstance(row, Tensor) or hasattr(row, "__array__"):
        values = row.tolist()
        if isinstance(values, list):
            return values
    if isinstance(row, (str, bytes)) or not isinstance(row, Sequence):
        raise InvalidArgument(
            f"given {name} with an item of type {type(row).__name__}, expected lists of token ids"
        )
    return [
        _plain(name, item) if isinstance(item, (Sequence, Tensor)) and not _scalar(item) else item
        for item in row
    ]


def _scalar(item: Any) -> bool:
    return isinstance(item, (str, bytes)) or (isinstance(item, Tensor) and item.dim() == 0)


def _fifth(matches: Tensor, totals: Tensor) -> Tensor | None:
    """Precision of order 5 where it was counted."""
    return matches[..., 4] / totals[..., 4].clamp_min(1) if matches.shape[-1] >= 5 else None


def _nltk(
    scoring: Scoring,
    matches: Tensor,
    denominators: Tensor,
    lengths: Tensor,
    closest: Tensor,
    fifth: Tensor | None,
    counted: Tensor,
) -> Tensor:
    """Scores (..., sets) as NLTK takes them.

    Args:
        scoring: the settings.
        matches: (..., max_n) float64.
        denominators: (..., max_n), at least 1.
        lengths: (...) of the candidates.
        closest: (...) closest reference lengths.
        fifth: (...) precision of order 5 for methods 5 and 7.
        counted: (..., max_n) true numbers of n-grams for method6.
    """
    sets = scoring.weight_sets
    orders = max(map(len, sets))
    matches, denominators = matches[..., :orders], denominators[..., :orders]
    precisions = _SMOOTH[str(scoring.smoothing)](scoring, matches, denominators, lengths, fifth, counted)
    nothing = matches[..., 0] == 0
    if scoring.smoothing == "method6":
        precisions = _checked_trigrams(scoring, precisions, matches, nothing)
    logs = torch.xlogy(precisions > 0, precisions)
    penalty = _log_penalty(lengths, closest)
    scores = []
    for weights in sets:
        exponent = _weighted(logs, weights)
        if scoring.auto_reweigh and weights == DEFAULT_WEIGHTS:
            order = torch.arange(4, device=matches.device)
            size = lengths[..., None]
            own = (logs[..., :4] * (order < size)).sum(-1) / lengths.clamp_min(1)
            exponent = torch.where(lengths < 4, own, exponent)
        score = (penalty + exponent).exp()
        if scoring.strict:
            score = score.masked_fill((matches[..., : len(weights)] == 0).any(-1), 0.0)
        scores.append(score.masked_fill(nothing, 0.0))
    return _of_sets(scores)


def _log_penalty(lengths: Tensor, closest: Tensor) -> Tensor:
    """Logarithm of the brevity penalty (...), 0 for candidates at least as long as their closest reference."""
    return (1 - closest / lengths.clamp_min(1)).clamp_max(0.0)


def _of_sets(scores: list[Tensor]) -> Tensor:
    """(..., sets) from the scores (...) of each set of weights."""
    return scores[0].unsqueeze(-1) if len(scores) == 1 else torch.stack(scores, -1)


def _weighted(logs: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Sum of weights times logs, without a tensor of weights: copying one to a GPU can't be captured in a graph."""
    if len(set(weights)) == 1:
        return logs[..., : len(weights)].sum(-1) * weights[0]
    return torch.stack([w * one for w, one in zip(weights, logs.unbind(-1), strict=False)]).sum(0)


def _checked_trigrams(scoring: Scoring, precisions: Tensor, matches: Tensor, nothing: Tensor) -> Tensor:
    undefined = (matches[..., 2] == 0) & ~nothing
    if scoring.on_undefined == "raise" and bool(undefined.any()):
        raise InvalidArgument(
            f"given {int(undefined.sum())} candidates without a matching trigram, expected one: method6 is undefined "
            "there; choose another smoothing or on_undefined='nan'"
        )
    return precisions.masked_fill(undefined[..., None], math.nan)


def _zero_rank(zero: Tensor) -> Tensor:
    """2^j for the j-th order without a match."""
    return torch.exp2(zero.to(torch.float64).cumsum(-1))


def _method0(scoring: Scoring, m: Tensor, d: Tensor, c: Tensor, fifth: Any, counted: Tensor) -> Tensor:
    return (m / d).masked_fill(m == 0, sys.float_info.min)


def _method1(scoring: Scoring, m: Tensor, d: Tensor, c: Tensor, fifth: Any, counted: Tensor) -> Tensor:
    return m.masked_fill(m == 0, scoring.epsilon) / d


def _method2(scoring: Scoring, m: Tensor, d: Tensor, c: Tensor, fifth: Any, counted: Tensor) -> Tensor:
    one = (torch.arange(m.shape[-1], device=m.device) > 0).to(m.dtype)  # unigrams are left alone
    return (m + one) / (d + one)


def _method3(scoring: Scoring, m: Tensor, d: Tensor, c: Tensor, fifth: Any, counted: Tensor) -> Tensor:
    return torch.where(m == 0, 1 / (_zero_rank(m == 0) * d), m / d)


def _method4(scoring: Scoring, m: Tensor, d: Tensor, c: Tensor, fifth: Any, counted: Tensor) -> Tensor:
    size = c[..., None]
    smoothed = size.clamp_min(1).log() / (_zero_rank(m == 0) * scoring.k) / d
    return torch.where((m == 0) & (size > 1), smoothed, m / d)


def _method5(scoring: Scoring, m: Tensor, d: Tensor, c: Tensor, fifth: Any, counted: Tensor) -> Tensor:
    return _averaged(m / d, fifth)


def _method6(scoring: Scoring, m: Tensor, d: Tensor, c: Tensor, fifth: Any, counted: Tensor) -> Tensor:
    precisions = list((m / d).unbind(-1))
    for n in range(2, len(precisions)):
        one, two = precisions[n - 1], precisions[n - 2]
        prior = (one.square() / two).masked_fill(two == 0, 0.0)
        precisions[n] = (m[..., n] + scoring.alpha * prior) / (counted[..., n] + scoring.alpha)
    return torch.stack(precisions, -1)


def _method7(scoring: Scoring, m: Tensor, d: Tensor, c: Tensor, fifth: Any, counted: Tensor) -> Tensor:
    return _averaged(_method4(scoring, m, d, c, fifth, counted), fifth)


def _averaged(precisions: Tensor, fifth: Tensor) -> Tensor:
    """Each precision averaged with the averaged one before and the plain one after (Chen and Cherry, method 5)."""
    following = torch.cat([precisions[..., 1:], fifth[..., None]], -1)
    before = precisions[..., 0] + 1
    averaged = []
    for n in range(precisions.shape[-1]):
        before = (before + precisions[..., n] + following[..., n]) / 3
        averaged.append(before)
    return torch.stack(averaged, -1)


_SMOOTH: dict[str, Callable[..., Tensor]] = {
    "method0": _method0,
    "method1": _method1,
    "method2": _method2,
    "method3": _method3,
    "method4": _method4,
    "method5": _method5,
    "method6": _method6,
    "method7": _method7,
}


def _sacrebleu(
    scoring: Scoring, matches: Tensor, totals: Tensor, lengths: Tensor, closest: Tensor, effective: bool
) -> Tensor:
    """Scores (..., sets) as sacreBLEU takes them; arguments as for `_nltk`, `totals` true numbers of n-grams."""
    penalty = _log_penalty(lengths, closest)
    scores = []
    for weights in scoring.weight_sets:
        m, t = matches[..., : len(weights)], totals[..., : len(weights)]
        nothing = (m == 0).all(-1) | (lengths == 0)
        if scoring.smoothing == "add-k":
            added = (torch.arange(len(weights), device=m.device) > 0).to(m.dtype) * scoring._smooth_value
            m, t = m + added, t + added
        reached = (t > 0).to(torch.float64).cumprod(-1)  # the first order without n-grams ends the product
        zero = (m == 0) & (reached > 0)
        numerator = m
        if scoring.smoothing == "floor":
            numerator = m.masked_fill(zero, scoring._smooth_value)
        elif scoring.smoothing == "exp":
            numerator = torch.where(zero, 1 / _zero_rank(zero), m)
        precisions = numerator / t.clamp_min(torch.finfo(torch.float64).tiny) * reached
        used = reached if effective else torch.ones_like(reached)
        impossible = ((precisions <= 0) & (used > 0)).any(-1)
        logs = torch.xlogy(precisions > 0, precisions) * used
        score = (penalty + logs.sum(-1) / used.sum(-1).clamp_min(1)).exp()
        scores.append(score.masked_fill(nothing | impossible, 0.0))
    return _of_sets(scores)


def _finished(scoring: Scoring, scores: Tensor) -> Tensor:
    scores = scores if scoring.several else scores[..., 0]
    return (100 * scores if scoring.percent else scores).to(scoring.dtype)

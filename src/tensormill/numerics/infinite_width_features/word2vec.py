"""Word2Vec (CBOW with negative sampling) of finite and of infinite width.

CBOW has no nonlinearity between its two embeddings, so that its limit in muP is exact: the input embedding starts as the
identity of the vocabulary and the output embedding at zero, and word vectors of width V are trained as any others
(Yang and Hu, arXiv 2011.14522, section 8). It costs two V x V matrices and O(V) for each word touched: a way to see what
width is worth, not to save time. Updates are those of word2vec's C code, on batches of positions whose gradients are
taken at the same weights.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tensormill.errors import CheckpointError, DataError, InvalidArgument, OutputError

__all__ = [
    "CBOW",
    "CBOWConfig",
    "Corpus",
    "InfiniteCBOW",
    "analogy_accuracy",
    "load_word_vectors",
    "planted_analogies",
    "save_word_vectors",
    "train_cbow",
]


@dataclass(frozen=True)
class CBOWConfig:
    """How CBOW is trained; defaults are the paper's for text8.

    Attributes:
        lr: learning rate at the start; it falls linearly.
        final_lr: at the end, as a share of `lr`.
        window: at most so many words on either side; each position draws its own number from 1 to this.
        negatives: noise words for each position.
        power: noise words are drawn in proportion to counts to this power.
        subsample: threshold t: words of frequency f stay with probability min(1, sqrt(t/f) + t/f); 0: all stay.
        weight_decay: of each row when it is touched.
        logit_clip: logits are cut to this size.
        epochs: passes over the corpus.
        batch: positions whose gradients are taken together. Rows that several of them touch get the sum: keep the batch
            small against the vocabulary.
        shared_negatives: draw so many noise words for a whole batch, weighted to count as `negatives` for each position:
            the same gradient in expectation, by matrix products. None: separate ones for each position, as in word2vec.
    """

    lr: float = 0.05
    final_lr: float = 1e-4
    window: int = 8
    negatives: int = 25
    power: float = 0.75
    subsample: float = 1e-4
    weight_decay: float = 0.001
    logit_clip: float = 12.0
    epochs: int = 15
    batch: int = 256
    shared_negatives: int | None = None

    def __post_init__(self) -> None:
        counts = (self.window, self.negatives, self.epochs, self.batch)
        if min(counts) < 1 or (self.shared_negatives is not None and self.shared_negatives < 1):
            raise InvalidArgument(
                f"given window={self.window}, negatives={self.negatives}, epochs={self.epochs}, batch={self.batch}, "
                f"shared_negatives={self.shared_negatives}, expected at least 1 each"
            )
        if not (self.lr > 0 and 0 <= self.final_lr <= 1 and self.subsample >= 0 and self.logit_clip > 0):
            raise InvalidArgument(
                f"given lr={self.lr}, final_lr={self.final_lr}, subsample={self.subsample}, "
                f"logit_clip={self.logit_clip}, expected lr and logit_clip above 0, final_lr in [0, 1], subsample at "
                "least 0"
            )
        if not 0 <= self.lr * self.weight_decay < 1:
            raise InvalidArgument(
                f"given lr={self.lr}, weight_decay={self.weight_decay}, expected a product in [0, 1)"
            )


@dataclass(frozen=True)
class Corpus:
    """Token ids with their vocabulary.

    Attributes:
        words: the vocabulary, most frequent first.
        counts: (V,) int64 occurrences.
        ids: (length,) int64.
        sentence: (length,) int64, rising: contexts do not reach beyond a sentence.
    """

    words: tuple[str, ...]
    counts: Tensor
    ids: Tensor
    sentence: Tensor

    @classmethod
    def of(
        cls, sentences: Iterable[Sequence[str]], *, min_count: int = 1, max_words: int | None = None
    ) -> Corpus:
        """Count and number the words of a text.

        Args:
            sentences: lists of words.
            min_count: rarer words are left out, as if the text did not have them.
            max_words: keep the most frequent only.

        Raises:
            DataError: nothing is left.

        Example:
            >>> Corpus.of([["a", "b", "a"], ["b", "a"]]).words
            ('a', 'b')
        """
        held = [list(sentence) for sentence in sentences]
        counter = Counter(word for sentence in held for word in sentence)
        ranked = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
        kept = [(word, count) for word, count in ranked if count >= min_count][:max_words]
        number = {word: index for index, (word, _) in enumerate(kept)}
        ids, sentence_of = [], []
        for index, sentence in enumerate(held):
            known = [number[word] for word in sentence if word in number]
            ids.extend(known)
            sentence_of.extend([index] * len(known))
        if not ids:
            raise DataError(
                f"given a text of {sum(counter.values())} words, none of which occurs {min_count} times, expected "
                "more; lower min_count"
            )
        return cls(
            tuple(word for word, _ in kept),
            torch.tensor([count for _, count in kept]),
            torch.tensor(ids),
            torch.tensor(sentence_of),
        )

    def index(self, words: Iterable[str]) -> list[int]:
        """Ids of words.

        Raises:
            DataError: a word is not in the vocabulary.
        """
        number = {word: index for index, word in enumerate(self.words)}
        wanted = list(words)
        missing = [word for word in wanted if word not in number]
        if missing:
            raise DataError(f"given {missing[0]!r}, expected words of the corpus")
        return [number[word] for word in wanted]


class CBOW:
    """Word vectors of a finite width.

    Args:
        vocabulary: V, number of words.
        width: n.
        seed: of the input vectors, uniform with variance 1/n; output vectors start at zero.
        device, dtype: of both.

    Attributes:
        input: (V, n) word vectors.
        output: (V, n) vectors of predicted words.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if vocabulary < 2 or width < 1:
            raise InvalidArgument(
                f"given vocabulary={vocabulary}, width={width}, expected at least 2 words and a width of at least 1"
            )
        dtype = dtype or torch.get_default_dtype()
        _check_memory(vocabulary, width, device, dtype)
        self.input = self._start(vocabulary, width, seed).to(device=device, dtype=dtype)
        self.output = torch.zeros_like(self.input)

    @staticmethod
    def _start(vocabulary: int, width: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (torch.rand(vocabulary, width, generator=generator) * 2 - 1) * math.sqrt(3 / width)

    @property
    def width(self) -> int:
        """n; V for the limit."""
        return self.input.shape[1]

    def step(
        self, context: Tensor, mask: Tensor, target: Tensor, noise: Tensor, lr: float, config: CBOWConfig
    ) -> Tensor:
        """One update from a batch of positions; gradients are taken at the weights before it.

        Args:
            context: (batch, window) int64 ids, anything where mask is 0.
            mask: (batch, window), 1 for words of the context, else 0.
            target: (batch,) int64.
            noise: (batch, negatives) int64, or (shared,) for all positions together. Noise that equals the target is
                left out.
            lr: learning rate of this step.
            config: negatives, weight decay and clipping.

        Returns:
            Mean loss of a position, a scalar on the device; positions without context don't count.
        """
        size = mask.sum(1, keepdim=True)
        present = (size > 0).to(self.input)  # [batch, 1]
        share = mask.to(self.input) / size.clamp_min(1)  # [batch, window]
        hidden = F.embedding_bag(context, self.input, per_sample_weights=share, mode="sum")  # [batch, n]
        shared = noise.ndim == 1
        noise_weight = config.negatives / noise.shape[0] if shared else 1.0
        use = (noise != target[:, None]).to(self.input) * present * noise_weight  # [batch, negatives]
        wanted = self.output[target]
        others = self.output[noise]
        positive = (hidden * wanted).sum(1, keepdim=True).clamp(-config.logit_clip, config.logit_clip)
        if shared:
            negative = hidden @ others.mT
        else:
            negative = torch.einsum("bn,bkn->bk", hidden, others)
        negative = negative.clamp(-config.logit_clip, config.logit_clip)
        loss = (F.softplus(-positive) * present).sum() + (F.softplus(negative) * use).sum()
        pull = torch.sigmoid(-positive) * present * lr  # [batch, 1]
        push = -torch.sigmoid(negative) * use * lr  # [batch, negatives]
        decay = lr * config.weight_decay
        gradient = pull * wanted
        if shared:
            gradient = gradient + push @ others
            change = push.mT @ hidden - decay * use.sum(0)[:, None] * others
        else:
            gradient = gradient + torch.einsum("bk,bkn->bn", push, others)
            change = push[:, :, None] * hidden[:, None, :] - decay * use[:, :, None] * others
        self.output.index_add_(0, target, pull * hidden - decay * present * wanted)
        self.output.index_add_(0, noise.flatten(), change.flatten(0, -2))
        rows, weight, present_word = context.flatten(), share.flatten(), (share > 0).flatten()
        position = torch.arange(context.shape[0], device=context.device).repeat_interleave(context.shape[1])
        if context.device.type == "cpu":  # a GPU would have to wait for the number of words
            rows, weight, position = (x[present_word] for x in (rows, weight, position))
            present_word = present_word[present_word]
        change = weight[:, None] * gradient[position]
        if decay:
            change -= (decay * present_word)[:, None] * self.input[rows]
        self.input.index_add_(0, rows, change)
        return loss / present.sum().clamp_min(1)

    def state_dict(self) -> dict[str, Tensor]:
        """Both embeddings."""
        return {"input": self.input.clone(), "output": self.output.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the embeddings of a state.

        Raises:
            CheckpointError: of another shape.
        """
        for name in ("input", "output"):
            if name not in state or state[name].shape != self.input.shape:
                raise CheckpointError(
                    f"given a state without {name!r} of shape {tuple(self.input.shape)}, expected it"
                )
        self.input.copy_(state["input"])
        self.output.copy_(state["output"])


class InfiniteCBOW(CBOW):
    """CBOW of infinite width: word vectors of width V, the input starting as the identity.

    Args:
        vocabulary: V.
        device, dtype: of the two V x V matrices.

    Raises:
        InvalidArgument: they don't fit in memory.

    Example:
        >>> InfiniteCBOW(4).input.diagonal()
        tensor([1., 1., 1., 1.])
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(vocabulary, vocabulary, device=device, dtype=dtype)

    @staticmethod
    def _start(vocabulary: int, width: int, seed: int) -> Tensor:
        return torch.eye(vocabulary)

    def sample(self, width: int, *, seed: int = 0) -> CBOW:
        """Word vectors of a finite width that are a random instance of the limit's: U Omega^T, V Omega^T.

        Args:
            width: n.
            seed: of Omega (n, V), entries N(0, 1/n).
        """
        vocabulary = self.input.shape[0]
        finite = CBOW(vocabulary, width, device=self.input.device, dtype=self.input.dtype)
        generator = torch.Generator().manual_seed(seed)
        omega = (torch.randn(vocabulary, width, generator=generator) / math.sqrt(width)).to(self.input)
        finite.input.copy_(self.input @ omega)
        finite.output.copy_(self.output @ omega)
        return finite


def _check_memory(vocabulary: int, width: int, device: torch.device | str | None, dtype: torch.dtype) -> None:
    needed = 2 * vocabulary * width * torch.empty(0, dtype=dtype).element_size()
    if torch.device(device or "cpu").type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    else:
        try:
            available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # not told on this system
            return
    if needed > available:
        raise InvalidArgument(
            f"given {vocabulary} words of width {width}, which take {needed / 1e9:.1f} GB, expected at most "
            f"{available / 1e9:.1f} GB; keep fewer words (min_count, max_words), or use bfloat16 or a finite width"
        )


def train_cbow(
    model: CBOW,
    corpus: Corpus,
    config: CBOWConfig,
    *,
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> list[float]:
    """Train word vectors in place.

    Args:
        model: finite or infinite, on its device.
        corpus: of the model's vocabulary.
        config: settings.
        seed: of subsampling, order, windows and noise: models of every width see the same ones.
        progress: called with the share done and the mean loss since the last call, about a hundred times.

    Returns:
        Mean loss of each epoch.

    Raises:
        InvalidArgument: the corpus has another vocabulary.
    """
    vocabulary = len(corpus.words)
    if vocabulary != model.input.shape[0]:
        raise InvalidArgument(
            f"given a model of {model.input.shape[0]} words and a corpus of {vocabulary}, expected as many"
        )
    device = model.input.device
    generator = torch.Generator(device).manual_seed(seed)
    ids, sentence = corpus.ids.to(device), corpus.sentence.to(device)
    counts = corpus.counts.to(device, torch.float64)
    noise_cdf = counts.pow(config.power).cumsum(0)
    noise_cdf = (noise_cdf / noise_cdf[-1]).float()
    keep = torch.ones(vocabulary, device=device)
    if config.subsample:
        ratio = config.subsample / (counts / counts.sum())
        keep = (ratio.sqrt() + ratio).clamp(max=1).float()
    offsets = torch.cat((torch.arange(-config.window, 0), torch.arange(1, config.window + 1))).to(device)
    history = []
    for epoch in range(config.epochs):
        kept = torch.rand(ids.shape[0], generator=generator, device=device) < keep[ids]
        words, of = ids[kept], sentence[kept]
        length = words.shape[0]
        order = torch.randperm(length, generator=generator, device=device)
        losses: list[Tensor] = []
        shown = 0
        every = max(1, length * config.epochs // (100 * config.batch))
        for start in range(0, length, config.batch):
            position = order[start : start + config.batch]
            done = (epoch + start / length) / config.epochs
            lr = config.lr * max(config.final_lr, 1 - done * (1 - config.final_lr))
            reach = torch.randint(
                1, config.window + 1, (position.shape[0], 1), generator=generator, device=device
            )
            where = position[:, None] + offsets
            inside = where.clamp(0, length - 1)
            mask = (where == inside) & (of[inside] == of[position][:, None]) & (offsets.abs() <= reach)
            drawn: tuple[int, ...] = (position.shape[0], config.negatives)
            if config.shared_negatives is not None:
                drawn = (config.shared_negatives,)
            uniform = torch.rand(drawn, generator=generator, device=device)
            noise = torch.searchsorted(noise_cdf, uniform).clamp(max=vocabulary - 1)
            losses.append(model.step(words[inside], mask, words[position], noise, lr, config))
            if progress is not None and len(losses) % every == 0:
                progress(done, float(torch.stack(losses[shown:]).mean()))
                shown = len(losses)
        history.append(float(torch.stack(losses).mean()) if losses else math.nan)
    return history


def analogy_accuracy(
    vectors: Tensor, questions: Tensor, *, restrict: int | None = None, batch: int = 1024
) -> Tensor:
    """Which of the questions "a is to b as c is to ?" are answered right.

    The answer is the word whose vector has the largest cosine with b/|b| - a/|a| + c/|c|, a, b and c excluded.

    Args:
        vectors: (V, n) word vectors.
        questions: (questions, 4) int64 ids a, b, c and the answer.
        restrict: answers come from the first so many words.
        batch: questions at once.

    Returns:
        (questions,) float: 1 where right, else 0.

    Raises:
        InvalidArgument: no (questions, 4) ids, or ids beyond the words that may answer.
    """
    if questions.ndim != 2 or questions.shape[1] != 4 or questions.is_floating_point():
        raise InvalidArgument(
            f"given questions of shape {tuple(questions.shape)} and {questions.dtype}, expected (questions, 4) integers"
        )
    candidates = vectors[:restrict]
    if questions.numel() and not 0 <= int(questions.min()) <= int(questions.max()) < candidates.shape[0]:
        raise InvalidArgument(
            f"given ids up to {int(questions.max())}, expected them below {len(candidates)}"
        )
    unit = F.normalize(candidates.float(), dim=1)
    right = []
    for some in questions.to(vectors.device).split(batch):
        a, b, c, answer = some.unbind(1)
        scores = (unit[b] - unit[a] + unit[c]) @ unit.mT
        scores.scatter_(1, some[:, :3], -math.inf)
        right.append((scores.argmax(1) == answer).float())
    return torch.cat(right) if right else unit.new_zeros(0)


def planted_analogies(
    entities: int = 60,
    attributes: int = 4,
    sentences: int = 10_000,
    *,
    seed: int = 0,
    signs: int = 2,
    fillers: int = 40,
    noise: float = 0.0,
) -> tuple[list[list[str]], list[tuple[str, str, str, str]]]:
    """A text with analogies whose answers are known, and the questions.

    There is a word for each pair of an entity and an attribute ("e3.a1": an animal and a sex, a country and a rank). Its
    sentences hold signs of the entity, signs of the attribute, and fillers that mean nothing; which word stands there
    is told by both kinds of signs together. e3.a0 is to e3.a1 as e7.a0 is to e7.a1.

    Args:
        entities: number of entities, which is about the dimension that word vectors need.
        attributes: number of attributes, at least 2.
        sentences: number of sentences, of seven words each, one of which is a pair's word.
        seed: of the text; questions are 2000 random ones, or all if there are fewer.
        signs: different words that are signs of the same entity or attribute.
        fillers: number of different fillers.
        noise: probability with which a sign is that of a random entity or attribute instead.

    Returns:
        Sentences, and questions (a, b, c, answer).

    Raises:
        InvalidArgument: fewer than two entities or attributes, another number below one, or noise outside [0, 1].
    """
    if not 0 <= noise <= 1:
        raise InvalidArgument(f"given noise={noise}, expected a probability")
    if min(entities, attributes) < 2 or min(sentences, signs, fillers) < 1:
        raise InvalidArgument(
            f"given entities={entities}, attributes={attributes}, sentences={sentences}, signs={signs}, "
            f"fillers={fillers}, expected at least 2 entities and attributes, and 1 of the others"
        )
    generator = torch.Generator().manual_seed(seed)

    def draw(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=generator)

    entity, attribute = draw(entities, sentences, 1), draw(attributes, sentences, 1)

    def shown(meant: Tensor, among: int, times: int) -> list[list[int]]:
        """(sentences, times): what the signs are signs of."""
        wrong = torch.rand(sentences, times, generator=generator) < noise
        return torch.where(wrong, draw(among, sentences, times), meant).tolist()

    of_entity, of_attribute = shown(entity, entities, 3), shown(attribute, attributes, 2)
    sign, filler = draw(signs, sentences, 5).tolist(), draw(fillers, sentences).tolist()
    order = torch.rand(sentences, 7, generator=generator).argsort(1).tolist()
    text = []
    columns = (entity[:, 0].tolist(), attribute[:, 0].tolist(), of_entity, of_attribute, sign, filler, order)
    for e, a, es, as_, s, f, o in zip(*columns, strict=True):
        words = [
            f"e{e}.a{a}",
            *(f"entity{x}.{k}" for x, k in zip(es, s[:3], strict=True)),
            *(f"attribute{x}.{k}" for x, k in zip(as_, s[3:], strict=True)),
            f"filler{f}",
        ]
        text.append([words[k] for k in o])
    pairs = entities * (entities - 1) * attributes * (attributes - 1)
    picked = range(pairs) if pairs <= 2000 else draw(pairs, 2000).tolist()
    questions = []
    for number in picked:
        number, a = divmod(number, attributes)
        number, b = divmod(number, attributes - 1)
        one, other = divmod(number, entities - 1)
        b += b >= a
        other += other >= one
        questions.append((f"e{one}.a{a}", f"e{one}.a{b}", f"e{other}.a{a}", f"e{other}.a{b}"))
    return text, questions


def save_word_vectors(
    path: str | Path, words: Sequence[str], vectors: Tensor, *, binary: bool = False
) -> None:
    """Write word vectors in word2vec's text or binary format.

    Args:
        path: file.
        words: V words without spaces.
        vectors: (V, n).
        binary: float32 after each word instead of decimal numbers.

    Raises:
        InvalidArgument: numbers of words and vectors differ, or a word has a space.
        OutputError: the file can't be written.
    """
    if vectors.ndim != 2 or len(words) != vectors.shape[0]:
        raise InvalidArgument(
            f"given {len(words)} words and vectors of shape {tuple(vectors.shape)}, expected (words, width)"
        )
    spaced = next((word for word in words if not word or any(c.isspace() for c in word)), None)
    if spaced is not None:
        raise InvalidArgument(f"given the word {spaced!r}, expected words without spaces")
    values = vectors.detach().cpu().float().contiguous().numpy()
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            file.write(f"{values.shape[0]} {values.shape[1]}\n".encode())
            for word, row in zip(words, values, strict=True):
                if binary:
                    file.write(word.encode() + b" " + row.tobytes() + b"\n")
                else:
                    file.write(f"{word} {' '.join(repr(float(x)) for x in row)}\n".encode())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(f"word vectors could not be written to {str(path)!r}: {error}") from error


def load_word_vectors(path: str | Path, *, binary: bool = False) -> tuple[tuple[str, ...], Tensor]:
    """Read word2vec's text or binary format.

    Args:
        path: file.
        binary: which of the two.

    Returns:
        Words and float32 vectors (V, n).

    Raises:
        CheckpointError: missing or damaged.
    """
    words: list[str] = []
    try:
        with open(path, "rb") as file:
            count, width = (int(x) for x in file.readline().split())
            vectors = torch.empty(count, width)
            for row in range(count):
                if binary:
                    letters = bytearray()
                    while (letter := file.read(1)) != b" ":
                        if not letter:
                            raise ValueError(f"it ends after {row} of {count} words")
                        letters += letter.strip(b"\n")
                    words.append(letters.decode())
                    raw = bytearray(file.read(4 * width))
                    vectors[row] = torch.frombuffer(raw, dtype=torch.float32)
                else:
                    word, *numbers = file.readline().split()
                    words.append(word.decode())
                    vectors[row] = torch.tensor([float(x) for x in numbers])
    except (OSError, ValueError, RuntimeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"given word vectors {str(path)!r}, expected a complete file of word2vec's "
            f"{'binary' if binary else 'text'} format: {error}"
        ) from error
    return tuple(words), vectors

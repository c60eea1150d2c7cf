"""C3: word analogies by the width of Word2Vec, up to infinity."""

from __future__ import annotations

import importlib.util
import itertools
import lzma
import math
import re
import time
from typing import TYPE_CHECKING, Any

from tensormill.papers._threads import one_thread
from tensormill.papers.catalogue import Measurement, Row, Run
from tensormill.papers.curves import Curve
from tensormill.papers.infinite_width_features.paper import PAPER

if TYPE_CHECKING:
    from torch import Tensor

    from tensormill.numerics.infinite_width_features import CBOWConfig, Corpus


NOISE = 0.4
"""Share of wrong signs in the planted text."""


def with_gensim(sentences: list[list[str]], width: int, config: CBOWConfig, seed: int) -> tuple[Any, float]:
    """gensim's CBOW with the same settings on one thread; its vectors and the seconds of training."""
    from gensim.models import Word2Vec

    model = Word2Vec(
        vector_size=width,
        window=config.window,
        min_count=1,
        sg=0,
        hs=0,
        cbow_mean=1,
        negative=config.negatives,
        ns_exponent=config.power,
        sample=config.subsample,
        alpha=config.lr,
        min_alpha=config.lr * config.final_lr,
        epochs=config.epochs,
        workers=1,
        seed=seed + 1,
    )
    model.build_vocab(sentences)
    start = time.perf_counter()
    model.train(sentences, total_examples=len(sentences), epochs=config.epochs)
    return model.wv, time.perf_counter() - start


def best_of_gensim(
    sentences: list[list[str]], corpus: Corpus, questions: Tensor, width: int, config: CBOWConfig, seed: int
) -> tuple[float, float]:
    """gensim's accuracy in percent at the learning rate that is best on these very questions, and words per second."""
    from dataclasses import replace

    import torch

    from tensormill.numerics.infinite_width_features import analogy_accuracy

    found = []
    for lr in (0.025, 0.05, 0.1):
        vectors, seconds = with_gensim(sentences, width, replace(config, lr=lr), seed)
        matrix = torch.tensor(vectors.vectors[[vectors.key_to_index[word] for word in corpus.words]])
        accuracy = 100 * float(analogy_accuracy(matrix, questions).mean())
        found.append((accuracy, config.epochs * corpus.ids.numel() / seconds))
    return max(found)


def interval(values: Tensor) -> tuple[float, float, float]:
    """Mean of (seeds, questions) and its 95 % interval over questions, in percent."""
    per_question = 100 * values.double().mean(0)
    mean = float(per_question.mean())
    half = 1.959964 * float(per_question.std()) / math.sqrt(per_question.numel())
    return mean, mean - half, mean + half


def real_text(run: Run) -> tuple[Corpus, Tensor] | None:
    """English prose and the usual analogy questions among its 8000 most frequent words; None where they are not present."""
    import torch

    from tensormill.data import real_data_dir
    from tensormill.numerics.infinite_width_features import Corpus

    root = real_data_dir()
    if root is None or importlib.util.find_spec("gensim") is None:
        return None
    texts = [root / "english_public_domain" / name for name in ("sotu.txt.xz", "moby_dick.txt.xz")]
    from gensim.test.utils import datapath

    if not all(path.exists() for path in texts):
        return None
    sentences = []
    for path in texts:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            for sentence in re.split(r"[.!?;]\s", file.read().lower()):
                sentences.append(re.findall(r"[a-z]+", sentence))
    corpus = Corpus.of(sentences, min_count=5, max_words=8000)
    known = {word: index for index, word in enumerate(corpus.words)}
    questions = []
    try:
        with open(datapath("questions-words.txt"), encoding="utf-8") as file:
            for line in file:
                words = line.lower().split()
                if len(words) == 4 and all(word in known for word in words):
                    questions.append([known[word] for word in words])
    except OSError:
        return None
    run.progress(f"English text: {corpus.ids.numel()} words, {len(questions)} questions")
    return corpus, torch.tensor(questions)


@PAPER.claim(
    "C3",
    figure="text8",
    statement="Wider Word2Vec answers more analogies, and infinite width at least as many as the widest",
    criterion=(
        "on a text of planted analogies accuracy rises with each width, with paired 95 % intervals over the questions "
        "that exclude zero, and infinite width is not significantly below the largest finite one"
    ),
    measures=("tensormill.numerics.infinite_width_features.word2vec",),
    peers=("gensim",),
)
@one_thread()
def width_order(run: Run) -> Measurement:
    """CBOW of one learning rate for all widths; gensim's beside it, with the best of three learning rates at each width.

    Four of ten signs in the text are wrong, so that accuracy is limited by what each word's few occurrences tell. Quick:
    408 words, widths 16, 64, 256; two seeds. Full: 9048 words (655 MB for the limit), widths 64, 256, 1024, three seeds,
    and the State of the Union addresses with Moby-Dick where they are present: an hour on a GPU, a day on a CPU.
    """
    import torch

    from tensormill.numerics.infinite_width_features import (
        CBOW,
        CBOWConfig,
        Corpus,
        InfiniteCBOW,
        analogy_accuracy,
        planted_analogies,
        train_cbow,
    )

    full = run.scale == "full"
    entities, sentences, widths = (1500, 150_000, [64, 256, 1024]) if full else (60, 6000, [16, 64, 256])
    seeds = range(run.seed, run.seed + (3 if full else 2))
    text, asked = planted_analogies(entities, 4, sentences, seed=run.seed, noise=NOISE)
    corpus = Corpus.of(text)
    questions = torch.tensor([corpus.index(question) for question in asked])
    vocabulary = len(corpus.words)
    config = CBOWConfig(lr=0.2, window=6, negatives=10, subsample=0, epochs=4, batch=128, shared_negatives=64)
    rows, right, curves = [], {}, []
    peers: dict[int, tuple[float, float]] = {}
    has_gensim = importlib.util.find_spec("gensim") is not None
    words = config.epochs * corpus.ids.numel()
    speeds: dict[int, float] = {}
    sizes = [*widths, vocabulary]
    for number, width in enumerate(sizes):
        single = []
        seconds = 0.0
        limit = width == vocabulary
        for seed in seeds:
            run.progress("infinite width" if limit else f"width {width}", number / len(sizes))
            model = (
                InfiniteCBOW(vocabulary, device=run.device)
                if limit
                else CBOW(vocabulary, width, seed=seed, device=run.device)
            )
            start = time.perf_counter()
            train_cbow(model, corpus, config, seed=seed)
            seconds += time.perf_counter() - start
            single.append(analogy_accuracy(model.input, questions).cpu())
        right[width] = torch.stack(single)
        speeds[width] = words * len(seeds) / seconds
        if has_gensim and not limit:
            peers[width] = best_of_gensim(text, corpus, questions, width, config, run.seed)
        mean, low, high = interval(right[width])
        name = "infinite width" if limit else f"width {width}"
        setting = {"width": width, "vocabulary": vocabulary, "words": words, "seeds": len(seeds)}
        accuracy_peers = {"gensim": peers[width][0]} if width in peers else {}
        speed_peers = {"gensim, one thread": peers[width][1]} if width in peers else {}
        rows.append(Row(name, mean, "% accuracy", spread=(low, high), peers=accuracy_peers, setting=setting))
        rows.append(Row(f"{name}, speed", speeds[width], "words/s", peers=speed_peers, setting=setting))
    gains = []
    for narrow, wide in itertools.pairwise(sizes):
        mean, low, high = interval(right[wide] - right[narrow])
        gains.append((low, high))
        name = "infinite width" if wide == vocabulary else f"width {wide}"
        rows.append(Row(f"{name} over width {narrow}", mean, "% accuracy", spread=(low, high)))
    accuracies = [interval(right[width])[0] for width in sizes]
    curves.append(Curve("planted analogies (last: infinite)", sizes, accuracies, "width", "% accuracy"))
    if peers:
        values = [peers[width][0] for width in widths]
        curves.append(Curve("gensim", widths, values, "width", "% accuracy"))
    if full:
        rows.extend(_real_rows(run, config, widths))
    holds = all(low > 0 for low, _ in gains[:-1]) and gains[-1][1] >= 0
    order = ", ".join(
        f"{size}: {accuracy:.1f}" for size, accuracy in zip(sizes[:-1], accuracies, strict=False)
    )
    return Measurement(
        rows,
        holds=holds,
        reason=f"{order}, infinite: {accuracies[-1]:.1f} % of {len(asked)} questions planted in a generated text of "
        f"{corpus.ids.numel()} words (text8 and fil9 are not at hand)"
        + ("" if has_gensim else "; gensim is not installed"),
        repeats=len(seeds),
        curves=curves,
    )


def _real_rows(run: Run, planted: CBOWConfig, widths: list[int]) -> list[Row]:
    """The same on English prose, without a criterion: it is ten times shorter than text8."""
    from dataclasses import replace

    from tensormill.numerics.infinite_width_features import CBOW, InfiniteCBOW, analogy_accuracy, train_cbow

    found = real_text(run)
    if found is None:
        return []
    corpus, questions = found
    config = replace(
        planted, lr=0.05, window=8, negatives=25, subsample=1e-4, epochs=15, shared_negatives=128
    )
    rows = []
    for width in (*widths, None):
        name = "infinite width" if width is None else f"width {width}"
        run.progress(f"English text, {name}")
        count = len(corpus.words)
        model = (
            InfiniteCBOW(count, device=run.device)
            if width is None
            else CBOW(count, width, seed=run.seed, device=run.device)
        )
        train_cbow(model, corpus, config, seed=run.seed)
        mean, low, high = interval(analogy_accuracy(model.input, questions)[None].cpu())
        setting = {"words": corpus.ids.numel(), "questions": len(questions), "vocabulary": count}
        rows.append(Row(f"English prose, {name}", mean, "% accuracy", spread=(low, high), setting=setting))
    return rows

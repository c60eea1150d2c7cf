"""From folders of Python files to a tokenizer and token sequences, on all cores.

`prepare` is what the training script runs in a process of its own while the model is being compiled: it
gathers and cleans the files, trains the byte-level BPE tokenizer on a sample, encodes everything, and then
measures the baselines. It writes into a working folder:

    tokenizer.json, tokens.npy, validation.npy (uint16), corpus.json, and last of all the file `ready`;
    baselines.json afterwards.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from tensormill.data.python_source import SourceFile, gather_corpus, heldout_text, provenance, read_source
from tensormill.errors import DataError
from tensormill.models.python_lm.baselines import measure_baselines

__all__ = ["END_OF_TEXT", "CorpusPlan", "make_tokenizer", "prepare"]

END_OF_TEXT = "<|endoftext|>"
# Words keep one character before them (a space, a dot, an underscore); digits stand alone; punctuation takes
# the line end and the indentation that follow it, and a line end its indentation, so that a block's opening
# ("):" and eight spaces on the next line) can become a single token.
PRE_TOKENS = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|[\r\n]+[ \t]*|[ \t]+(?= )|\s+"
)


@dataclass(frozen=True)
class CorpusPlan:
    """What `prepare` does.

    Attributes:
        roots: folders of Python files.
        work: folder for the results.
        vocabulary: tokens of the vocabulary.
        workers: processes.
        sample_bytes: text that the tokenizer is trained on.
        stdlib_weight: how often the standard library's own files occur in the training sequence: the text
            the model is used and judged on is of their kind.
        extra_roots: further folders of Python files.
        extra_weight: how often their files occur.
        tokenizer: use this tokenizer instead of training one.
        validation_share: one file in so many is kept for validation.
        split_share: fraction of the tokens " word" that the training sequence writes as " " and "word".
        ngram_tokens: most tokens of the training sequence that the n-gram baseline counts.
    """

    roots: tuple[Path, ...]
    work: Path
    vocabulary: int = 4096
    workers: int = 2
    sample_bytes: int = 48_000_000
    stdlib_weight: int = 3
    extra_roots: tuple[Path, ...] = ()
    extra_weight: int = 1
    tokenizer: Path | None = None
    validation_share: int = 250
    split_share: float = 0.004
    ngram_tokens: int = 150_000_000


def make_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer; it returns every text unchanged from `decode(encode(text))`.

    Args:
        texts: training texts.
        vocabulary: size, the end-of-text token and the 256 bytes included.

    Returns:
        A `tokenizers.Tokenizer` whose id 0 is the end-of-text token.

    Raises:
        DataError: the texts do not hold enough different words for the vocabulary.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise DataError(
            f"given text for {tokenizer.get_vocab_size()} tokens, expected enough for {vocabulary}; "
            "add text or lower the vocabulary"
        )
    return tokenizer


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> tuple[Any, int, np.ndarray]:
    """A tokenizer, its token for one space, and for each token " word" that of "word", or -1."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    vocabulary = tokenizer.get_vocab()
    space = tokenizer.pre_tokenizer.pre_tokenize_str(" ")[0][0]  # the byte-level alphabet's sign for it
    rest = np.full(len(vocabulary), -1, dtype=np.int64)
    for token, index in vocabulary.items():
        if token.startswith(space) and token[1:].isalpha():
            rest[index] = vocabulary.get(token[1:], -1)
    return tokenizer, vocabulary[space], rest


def split_spaces(
    ids: np.ndarray, space: int, rest: np.ndarray, share: float, generator: np.random.Generator
) -> np.ndarray:
    """Write some tokens " word" as " " and "word", so that a prompt that ends in a space is nothing unknown.

    Args:
        ids: (length,) tokens.
        space: token of one space.
        rest: (vocabulary,) for each token " word" the token of "word", -1 for all others.
        share: fraction of the tokens that can be split which are.
        generator: chooses them.

    Returns:
        (length + splits,) tokens of the same text.
    """
    chosen = (rest[ids] >= 0) & (generator.random(len(ids)) < share)
    widths = 1 + chosen
    out = np.repeat(ids, widths)
    first = (np.cumsum(widths) - widths)[chosen]
    out[first] = space
    out[first + 1] = rest[ids[chosen]]
    return out


def _encode(file: SourceFile, tokenizer_path: str, split_share: float) -> bytes:
    """Token ids of one file, uint16, the end-of-text token last."""
    text = read_source(Path(file.path))
    tokenizer, space, rest = _tokenizer(tokenizer_path)
    ids = np.array([*tokenizer.encode(text, add_special_tokens=False).ids, 0], dtype=np.int64)
    if split_share:
        ids = split_spaces(ids, space, rest, split_share, np.random.default_rng(_rank(file)))
    return ids.astype(np.uint16).tobytes()


def _rank(file: SourceFile) -> int:
    """A fixed random number of a file, by name and size, the same wherever it is installed."""
    name = "/".join(Path(file.path).parts[-3:])
    return int.from_bytes(hashlib.sha256(f"{name}:{file.size}".encode()).digest()[:8], "big")


def _packages(files: Sequence[SourceFile]) -> dict[str, int]:
    """Bytes by top-level package, largest first."""
    total: dict[str, int] = {}
    for file in files:
        parts = Path(file.path).parts
        markers = [i for i, part in enumerate(parts) if part in ("site-packages", "dist-packages")]
        if file.stdlib:
            name = "Python standard library"
        elif markers and markers[-1] + 1 < len(parts):
            name = parts[markers[-1] + 1]
        else:
            name = "other"
        total[name] = total.get(name, 0) + file.size
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _write_json(path: Path, content: Any) -> None:
    partial_file = path.with_name(path.name + ".partial")
    partial_file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(partial_file, path)


def prepare(plan: CorpusPlan) -> None:
    """Make tokenizer and token sequences; see the module. An error is written to the file `failed`.

    Args:
        plan: what to do.
    """
    try:
        _prepare(plan)
    except BaseException as error:
        text = f"{error.__class__.__name__}: {error}"
        (plan.work / "failed").write_text(text + "\n" + traceback.format_exc(), encoding="utf-8")
        raise


def _prepare(plan: CorpusPlan) -> None:
    start = time.monotonic()
    last = start

    def say(text: str) -> None:
        print(f"corpus: {time.monotonic() - start:.1f} s, {text}", flush=True)

    def progress(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 5:
            last = time.monotonic()
            say(f"{done} of {total} files")

    plan.work.mkdir(parents=True, exist_ok=True)
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    # the workers are forked before the tokenizers library starts its threads
    with context.Pool(plan.workers) as pool:
        corpus = gather_corpus((*plan.roots, *plan.extra_roots), pool=pool, progress=progress)
        extra = tuple(str(root.resolve()) + os.sep for root in plan.extra_roots)

        def weight(file: SourceFile) -> int:
            if file.path.startswith(extra):
                return plan.extra_weight
            return plan.stdlib_weight if file.stdlib else 1

        say(
            f"kept {len(corpus.files)} files, {corpus.bytes / 1e6:.1f} MB; dropped "
            + ", ".join(f"{count} {reason}" for reason, count in corpus.dropped.items())
        )

        training: list[SourceFile] = []
        validation: list[SourceFile] = []
        for file in corpus.files:
            (validation if _rank(file) % plan.validation_share == 0 else training).append(file)
        if not validation:
            validation = [min(training, key=_rank)]
            training.remove(validation[0])

        sampled = 0
        if plan.tokenizer is not None:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(plan.tokenizer))
        else:
            sample: list[SourceFile] = []
            for file in sorted(training, key=lambda file: (not file.stdlib, _rank(file))):
                if sampled >= plan.sample_bytes:
                    break
                sample.append(file)
                sampled += file.size
            tokenizer = make_tokenizer((read_source(Path(file.path)) for file in sample), plan.vocabulary)
            say(f"tokenizer trained on {sampled / 1e6:.1f} MB")
        tokenizer_path = plan.work / "tokenizer.json"
        tokenizer.save(str(tokenizer_path))

        counts: dict[str, int] = {}
        for name, files in (("tokens", training), ("validation", validation)):
            parts: list[bytes] = []
            share = plan.split_share if name == "tokens" else 0.0
            encode = partial(_encode, tokenizer_path=str(tokenizer_path), split_share=share)
            for index, packed in enumerate(pool.imap(encode, files, chunksize=32)):
                parts.append(packed)
                progress(index + 1, len(files))
            counts[f"{name}_unique"] = sum(map(len, parts)) // 2
            if name == "tokens":
                # whole further passes, so that copies of one file lie far apart
                for turn in range(1, max(plan.stdlib_weight, plan.extra_weight)):
                    parts.extend(
                        [part for part, file in zip(parts, files, strict=False) if weight(file) > turn]
                    )
            sequence = np.frombuffer(b"".join(parts), dtype=np.uint16)
            counts[name] = len(sequence)
            np.save(plan.work / f"{name}.npy", sequence)
        say(f"encoded {counts['tokens']:,} training and {counts['validation']:,} validation tokens")

    heldout = "\n\n".join(heldout_text().values())
    heldout_ids = np.array(tokenizer.encode(heldout, add_special_tokens=False).ids, dtype=np.uint16)
    np.save(plan.work / "heldout.npy", heldout_ids)
    _write_json(
        plan.work / "corpus.json",
        {
            "python": provenance()["python"],
            "files": len(corpus.files),
            "bytes": corpus.bytes,
            "training_files": len(training),
            "training_bytes": sum(file.size for file in training),
            "validation_files": len(validation),
            "validation_bytes": sum(file.size for file in validation),
            "stdlib_bytes": sum(file.size for file in training if file.stdlib),
            "stdlib_weight": plan.stdlib_weight,
            "extra_bytes": sum(file.size for file in training if file.path.startswith(extra)),
            "extra_files": sum(file.path.startswith(extra) for file in training),
            "extra_weight": plan.extra_weight,
            "tokens_per_epoch": counts["tokens"],
            "unique_tokens": counts["tokens_unique"],
            "validation_tokens": counts["validation"],
            "dropped": corpus.dropped,
            "dropped_bytes": corpus.dropped_bytes,
            "contaminated": ["/".join(Path(name).parts[-4:]) for name in corpus.contaminated],
            "packages": _packages(training),
            "tokenizer_sample_bytes": sampled,
            "vocabulary": plan.vocabulary,
            "heldout": {
                **provenance(),
                "tokens": len(heldout_ids),
                "bytes_per_token": len(heldout.encode()) / len(heldout_ids),
            },
            "seconds": round(time.monotonic() - start, 1),
        },
    )
    (plan.work / "ready").touch()
    say("ready")

    tokens = np.load(plan.work / "tokens.npy")
    _write_json(
        plan.work / "baselines.json",
        measure_baselines(heldout, heldout_ids, tokens[: plan.ngram_tokens], tokenizer, plan.vocabulary),
    )
    say("baselines measured")

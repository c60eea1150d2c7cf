"""What the language model is compared with: xz, and an interpolated n-gram model over the same tokens."""

from __future__ import annotations

import lzma
import time
from typing import Any

import numpy as np

from tensormill.errors import InvalidArgument

__all__ = ["measure_baselines", "ngram_bits", "token_byte_lengths", "xz_bits_per_byte"]


def xz_bits_per_byte(text: str) -> float:
    """Size of the text compressed with xz (preset 9, extreme), in bits a byte of UTF-8."""
    data = text.encode()
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def token_byte_lengths(tokenizer: Any, vocabulary: int) -> np.ndarray:
    """Bytes of UTF-8 that each token of a byte-level tokenizer stands for.

    Args:
        tokenizer: a `tokenizers.Tokenizer` with byte-level alphabet, in which every character is a byte.
        vocabulary: its size.

    Returns:
        (vocabulary,) int64; special tokens count as nothing.
    """
    special = set(tokenizer.get_added_tokens_decoder())
    lengths = np.zeros(vocabulary, dtype=np.int64)
    for token in range(vocabulary):
        if token not in special:
            lengths[token] = len(tokenizer.id_to_token(token))
    return lengths


def _windows(tokens: np.ndarray, order: int, bits: int) -> np.ndarray:
    """All runs of `order` tokens as one uint64 each, earliest token in the highest bits."""
    count = len(tokens) - order + 1
    packed = np.zeros(max(count, 0), dtype=np.uint64)
    for offset in range(order if count > 0 else 0):
        packed <<= np.uint64(bits)
        packed |= tokens[offset : offset + count].astype(np.uint64)
    return packed


def ngram_bits(train: np.ndarray, test: np.ndarray, vocabulary: int, order: int = 5) -> np.ndarray:
    """Bits that an interpolated n-gram model spends on each test token.

    Witten-Bell smoothing ("The zero-frequency problem", 1991): with c(h w) the count of a context followed
    by a token, c(h) of the context, T(h) its number of different successors, and h' the context less its
    first token,

        p(w | h) = (c(h w) + T(h) p(w | h')) / (c(h) + T(h)),

    down to the uniform distribution.

    Args:
        train: (length,) token ids to count.
        test: (length,) token ids to predict, each from those before it.
        vocabulary: number of token ids.
        order: tokens in a run, the predicted one included.

    Returns:
        (length of test,) float64.

    Raises:
        InvalidArgument: a run of `order` tokens does not fit 64 bits.
    """
    bits = max(1, int(vocabulary - 1).bit_length())
    if order < 1 or order * bits > 64:
        raise InvalidArgument(
            f"given order={order} with {vocabulary} tokens, expected order times {bits} bits within 64"
        )
    probability = np.full(len(test), 1.0 / vocabulary)
    for size in range(1, order + 1):
        runs = _windows(train, size, bits)
        runs.sort()
        first = (
            np.flatnonzero(np.concatenate([[True], runs[1:] != runs[:-1]])) if len(runs) else np.empty(0, int)
        )
        unique = runs[first]
        queries = _windows(test, size, bits)
        context = queries >> np.uint64(bits) if size > 1 else np.zeros_like(queries)
        low = context << np.uint64(bits)
        high = low + np.uint64((1 << bits) - 1)
        followed = np.searchsorted(runs, queries, "right") - np.searchsorted(runs, queries, "left")
        seen = np.searchsorted(runs, high, "right") - np.searchsorted(runs, low, "left")
        kinds = np.searchsorted(unique, high, "right") - np.searchsorted(unique, low, "left")
        place = slice(size - 1, None)
        known = seen > 0
        mixed = (followed + kinds * probability[place]) / np.maximum(seen + kinds, 1)
        probability[place] = np.where(known, mixed, probability[place])
    bits_spent: np.ndarray = -np.log2(probability)
    return bits_spent


def measure_baselines(
    text: str, ids: np.ndarray, train: np.ndarray, tokenizer: Any, vocabulary: int, order: int = 5
) -> dict[str, Any]:
    """Bits per byte of xz and of the n-gram model on a text.

    Args:
        text: the text.
        ids: its token ids.
        train: token ids the n-gram model counts.
        tokenizer: the byte-level tokenizer of both.
        vocabulary: its size.
        order: of the n-gram model.
    """
    begin = time.monotonic()
    size = int(token_byte_lengths(tokenizer, vocabulary)[ids].sum())
    bits = ngram_bits(train, ids, vocabulary, order)
    return {
        "xz": {"bits_per_byte": xz_bits_per_byte(text), "preset": "9 extreme"},
        "ngram": {
            "bits_per_byte": float(bits.sum() / size),
            "order": order,
            "smoothing": "Witten-Bell, interpolated",
            "training_tokens": len(train),
            "unit": "the model's own tokens",
        },
        "seconds": round(time.monotonic() - begin, 1),
    }

"""Text to evaluate on: files to text, text to tokens with the bytes that each stands for, tokens to windows.

Several texts are first joined with an empty line.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tensormill.errors import DataError, InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = str | Sequence[str] | Mapping[str, str]

_DOCUMENT_SEPARATOR = "\n\n"


def read_texts(paths: Iterable[str | os.PathLike[str]]) -> dict[str, str]:
    """Read UTF-8 text files.

    Args:
        paths: Files, in the order in which they are evaluated.

    Returns:
        The text of each file under its path as given; line ends are kept as they are.

    Raises:
        DataError: No path, a file that is missing, unreadable, not UTF-8, or without any visible character.
    """
    texts: dict[str, str] = {}
    for path in paths:
        try:
            raw = Path(path).read_bytes()
        except FileNotFoundError:
            raise DataError(f"text file {path} does not exist; give the path of a UTF-8 text file") from None
        except IsADirectoryError:
            raise DataError(f"{path} is a directory, expected a UTF-8 text file; name its files") from None
        except OSError as error:
            raise DataError(f"text file {path} can't be read: {error.strerror or error}") from error
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"text file {path} is not UTF-8 at byte {error.start} ({raw[error.start]:#x}); convert it"
            ) from None
        if not text.strip():
            raise DataError(f"text file {path} is empty; give a file with text")
        texts[str(path)] = text
    if not texts:
        raise DataError("no text file was given; give at least one path")
    return texts


def join_texts(text: Text) -> str:
    """The one string that is evaluated: several texts are joined with an empty line between them.

    Args:
        text: A text, a sequence of texts, or a mapping from names to texts.

    Raises:
        DataError: There is no text, or nothing visible in it.
    """
    if isinstance(text, str):
        joined = text
    else:
        parts = list(text.values()) if isinstance(text, Mapping) else list(text)
        joined = _DOCUMENT_SEPARATOR.join(parts)
    if not joined.strip():
        raise DataError("the evaluation text is empty; give a text of at least a few words")
    return joined


def text_sha256(text: Text) -> str:
    """SHA-256 (hexadecimal) of the joined text's UTF-8 bytes: tells two evaluation texts apart."""
    return hashlib.sha256(_encode(join_texts(text))).hexdigest()


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text has a lone surrogate at character {error.start}, expected Unicode; decode it as UTF-8"
        ) from None


@dataclass(frozen=True)
class TokenizedText:
    """A text as token ids, with the number of bytes that each token stands for.

    Attributes:
        ids: (tokens,) int64.
        byte_counts: (tokens,) int64, UTF-8 bytes of the text that each token stands for; 0 for a token that
            the tokenizer added.
        byte_rule: How the bytes were found. "pieces": the tokens' own bytes, checked to spell the text, so
            that the count is exact even where a character is cut in two; "offsets": from the tokenizer's
            character offsets, characters it drops counted with the token after them, tokens that share a
            character sharing its bytes; "estimated": the text's bytes spread over the tokens by the length
            each decodes to.
    """

    ids: Tensor
    byte_counts: Tensor
    byte_rule: Literal["pieces", "offsets", "estimated"]


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: Text) -> TokenizedText:
    """Tokenize a text once, whole, with the tokenizer's default special tokens.

    Args:
        tokenizer: Any tokenizer of transformers.
        text: The text, or several to be joined.

    Raises:
        DataError: The text is empty.
    """
    joined = join_texts(text)
    raw = _encode(joined)
    # verbose=False: a text longer than the model's context is expected here.
    encoded = tokenizer(joined, return_special_tokens_mask=True, truncation=False, verbose=False)
    ids: list[int] = list(encoded["input_ids"])
    added = [bool(flag) for flag in encoded["special_tokens_mask"]]
    rule: Literal["pieces", "offsets", "estimated"] = "pieces"
    counts = _bytes_by_pieces(tokenizer, ids, added, raw)
    if counts is None and tokenizer.is_fast:
        offsets = tokenizer(joined, return_offsets_mapping=True, truncation=False, verbose=False)[
            "offset_mapping"
        ]
        counts, rule = _bytes_by_offsets(joined, offsets), "offsets"
    if counts is None:
        counts, rule = _bytes_by_decoding(tokenizer, ids, added, len(raw)), "estimated"
    return TokenizedText(torch.tensor(ids, dtype=torch.long), torch.tensor(counts, dtype=torch.long), rule)


def _byte_alphabet() -> dict[str, int]:
    """Characters with which byte-level BPE writes bytes: visible Latin-1 as itself, the others from U+0100
    on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in visible)
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


def _byte_level_piece(piece: str, alphabet: Mapping[str, int]) -> bytes | None:
    try:
        return bytes(alphabet[character] for character in piece)
    except KeyError:
        return None


def _sentencepiece_piece(piece: str) -> bytes | None:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes.fromhex(piece[3:5])
        except ValueError:
            return None
    return piece.replace("\u2581", " ").encode("utf-8")


def _bytes_by_pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], added: Sequence[bool], raw: bytes
) -> list[int] | None:
    """Bytes of each token from the vocabulary, or None unless the tokens spell ``raw`` byte by byte."""
    unique = sorted(set(ids))
    pieces = dict(zip(unique, tokenizer.convert_ids_to_tokens(unique), strict=True))
    literal = set(tokenizer.get_added_vocab().values())
    alphabet = _byte_alphabet()
    readings: tuple[Callable[[str], bytes | None], ...] = (
        lambda piece: _byte_level_piece(piece, alphabet),
        _sentencepiece_piece,
    )
    for read in readings:
        table: dict[int, bytes | None] = {}
        for token, piece in pieces.items():
            if isinstance(piece, bytes):
                table[token] = piece
            elif piece is None:
                table[token] = None
            else:
                table[token] = piece.encode("utf-8") if token in literal else read(piece)
        spelled = [b"" if special else table[token] for token, special in zip(ids, added, strict=True)]
        if any(piece is None for piece in spelled):
            continue
        lengths = [len(piece) for piece in spelled if piece is not None]
        whole = b"".join(piece for piece in spelled if piece is not None)
        if whole == raw:
            return lengths
        if whole == b" " + raw:  # the tokenizer puts a space before the text
            first = next(i for i, length in enumerate(lengths) if length)
            lengths[first] -= 1
            return lengths
    return None


def _bytes_by_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    ends = [0]
    for character in text:
        ends.append(ends[-1] + len(character.encode("utf-8")))
    counts: list[int] = []
    covered, run_start = 0, 0
    for i, (start, end) in enumerate(offsets):
        shares = counts and start < end and start < covered
        fresh = ends[end] - ends[covered] if end > covered else 0
        counts.append(fresh)
        covered = max(covered, end)
        if not shares:
            run_start = i
            continue
        total, length = sum(counts[run_start:]), i + 1 - run_start
        counts[run_start:] = [total * (k + 1) // length - total * k // length for k in range(length)]
    return counts


def _bytes_by_decoding(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], added: Sequence[bool], total: int
) -> list[int]:
    lengths = {
        token: max(1, len(str(tokenizer.decode([token])).encode("utf-8", "replace"))) for token in set(ids)
    }
    weights = [0 if special else lengths[token] for token, special in zip(ids, added, strict=True)]
    whole = sum(weights)
    counts, so_far = [], 0
    for weight in weights:
        before = total * so_far // whole if whole else 0
        so_far += weight
        counts.append((total * so_far // whole if whole else 0) - before)
    return counts


def split_windows(tokens: Tensor, window: int) -> Tensor:
    """Cut tokens into disjoint windows.

    Args:
        tokens: (T,) of any dtype.
        window: Tokens per window, at least 2.

    Returns:
        (floor(T / window), window); one shorter window (1, T) if T < window.

    Raises:
        DataError: Fewer than two tokens: nothing can be scored.
        InvalidArgument: ``window`` is below 2, or ``tokens`` is not one-dimensional.

    Example:
        >>> split_windows(torch.arange(7), 3)
        tensor([[0, 1, 2],
                [3, 4, 5]])
    """
    if window < 2:
        raise InvalidArgument(
            f"given window {window}, expected at least 2 tokens (one of context, one scored)"
        )
    if tokens.ndim != 1:
        raise InvalidArgument(
            f"given tokens of shape {tuple(tokens.shape)}, expected one dimension (tokens,)"
        )
    if tokens.numel() < 2:
        raise DataError(f"the text gives {tokens.numel()} token(s), expected at least 2; give a longer text")
    length = min(window, tokens.numel())
    count = tokens.numel() // length
    return tokens[: count * length].view(count, length)

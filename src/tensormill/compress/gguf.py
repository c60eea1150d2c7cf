"""GGUF files as input: the header is checked here, the weights are dequantized by transformers' own reader.

A GGUF file holds metadata, tensors and a vocabulary in one file (format version 2 or 3, little-endian). Most hold
weights that are quantized already: what is opened is their dequantized form. Needs the packages gguf and accelerate,
which the extra `gguf` installs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from tensormill.errors import CheckpointError, TensormillError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MAGIC = b"GGUF"
_FLOATS = ("F64", "F32", "F16", "BF16")
_STRING, _ARRAY = 8, 9
# struct format of the metadata's scalar types, by their number in the file.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufInfo:
    """What the header of a GGUF file says.

    Attributes:
        path: The file.
        architecture: As the file names it, e.g. "llama".
        metadata: Scalars and strings by key; of an array, its length.
        weights: Number of weights by the tensors' type, e.g. {"Q4_1": 106168320, "F32": 35136}.
        nbytes: Size of the file.
    """

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    weights: Mapping[str, int]
    nbytes: int

    @property
    def quantized(self) -> bool:
        """Whether any tensor is stored in a quantized type."""
        return any(kind not in _FLOATS for kind in self.weights)

    def describe(self) -> str:
        """The types with their shares of the weights, most frequent first, e.g. "Q4_1 (79 %), Q8_0 (21 %)"."""
        total = sum(self.weights.values())
        shares = sorted(self.weights.items(), key=lambda item: -item[1])
        return ", ".join(f"{kind} ({_percent(count / total)})" for kind, count in shares)

    def to_dict(self) -> dict[str, Any]:
        """What a report says of its source, as JSON's types."""
        return {
            "format": "gguf",
            "file_bytes": self.nbytes,
            "quantized": self.quantized,
            "types": self.describe(),
            "weights_by_type": dict(self.weights),
        }


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a GGUF file: an existing file whose name ends in ".gguf"."""
    return Path(path).suffix == ".gguf" and Path(path).is_file()


def read_header(path: str | os.PathLike[str]) -> GgufInfo:
    """Reads and checks a GGUF file's header: every tensor must lie inside the file, and none in another.

    Raises:
        CheckpointError: not a GGUF file, truncated, damaged, in parts, or in a version or type that isn't known; or
            the package gguf is missing.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(len(_MAGIC))
            if start == b"vers":
                raise CheckpointError(f"{file} is a Git LFS pointer, expected weights; run 'git lfs pull'")
            if start != _MAGIC:
                raise CheckpointError(f"{file} is not a GGUF file; download it again")
            require_packages(file)
            return _parse(file, _Cursor(stream, size), size)
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror}") from error
    except _Truncated:
        raise CheckpointError(f"{file} is truncated or damaged ({size} bytes); download it again") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{file} has a damaged header; download it again") from None


def require_packages(file: Path) -> None:
    """Raises `CheckpointError` that names the extra, if a package that GGUF files need isn't installed."""
    for name in ("gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise CheckpointError(
                f"{file} is a GGUF file, which needs the package {name}; pip install 'tensormill[gguf]'"
            )


def open_gguf(
    path: str | os.PathLike[str],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Opens a GGUF file as an ordinary model, dequantized, after checking its header.

    Args:
        path: The file; nothing else in its directory is meant.
        device: Where the model goes.
        dtype: Of the weights; None takes float32, which holds every dequantized number exactly.

    Returns:
        The model in evaluation mode, without a trace of GGUF in its configuration, and its tokenizer, or None if the
        file has no vocabulary.

    Raises:
        CheckpointError: As `read_header`; or transformers can't read the architecture, or a tensor is missing or has
            another shape.
    """
    import transformers

    info = read_header(path)
    file = info.path
    folder = file.absolute().parent
    options: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False, "local_files_only": True}
    more: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # versions that have it may keep the weights packed otherwise
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with _without_bars():
            opened: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype or torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
                **more,
            )
        tokenizer = None
        if "tokenizer.ggml.model" in info.metadata:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except TensormillError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{file} (architecture {info.architecture!r}) can't be opened by transformers: {text[:300]}"
        ) from error
    model, found = opened
    for name in sorted(found.get("missing_keys") or ()):
        raise CheckpointError(f"{file} has no tensor for {name}, which the model needs; download it again")
    for name, stored, expected in sorted(found.get("mismatched_keys") or ()):
        raise CheckpointError(
            f"{name} in {file} has shape {tuple(stored)}, expected {tuple(expected)} from its metadata; "
            "download it again"
        )
    _forget_origin(model)
    return model.to(device).eval(), tokenizer


def _forget_origin(model: Any) -> None:
    """Makes a dequantized model an ordinary one, which can be saved and whose configuration is complete."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # The file's `general.name`, which transformers takes for a path.
    model.config.__dict__.pop("_model_name_or_path", None)
    model.config.name_or_path = ""


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Silences a bar of transformers' GGUF reader that its logging settings don't reach."""
    from transformers import modeling_gguf_pytorch_utils

    reader: Any = modeling_gguf_pytorch_utils
    bar = getattr(reader, "tqdm", None)
    if bar is None:
        yield
        return
    reader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar


class _Truncated(Exception):
    """The header asks for bytes beyond the end of the file."""


class _Cursor:
    """Reads a stream of known size; every length that the file claims is checked before it is believed."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size = stream, size

    def _claim(self, count: int) -> None:
        if count > self.size - self.stream.tell():
            raise _Truncated

    def numbers(self, layout: str) -> tuple[Any, ...]:
        count = struct.calcsize("<" + layout)
        self._claim(count)
        return struct.unpack("<" + layout, self.stream.read(count))

    def string(self) -> str:
        (count,) = self.numbers("Q")
        self._claim(count)
        return self.stream.read(count).decode("utf-8")

    def skip(self, count: int) -> None:
        self._claim(count)
        self.stream.seek(count, os.SEEK_CUR)

    def value(self, kind: int) -> Any:
        """A scalar or string; an array is skipped, and its length given."""
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        element, count = self.numbers("IQ") if kind == _ARRAY else (None, 0)
        if element == _STRING:
            for _ in range(count):
                self.skip(self.numbers("Q")[0])
        elif element in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[element]))
        else:
            raise _Truncated
        return count


def _parse(file: Path, cursor: _Cursor, size: int) -> GgufInfo:
    from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

    (version,) = cursor.numbers("I")
    if version not in (2, 3):
        order = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise CheckpointError(f"{file} is a GGUF file {order}, expected little-endian version 2 or 3")
    tensor_count, metadata_count = cursor.numbers("QQ")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.numbers("I")[0])
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise CheckpointError(f"{file} names no architecture in its metadata; get another copy")
    parts = metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise CheckpointError(
            f"{file} is one of {parts} parts; merge them first: llama-gguf-split --merge FIRST_PART MERGED"
        )
    weights: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    names: set[str] = set()
    for _ in range(tensor_count):
        name = cursor.string()
        (dimensions,) = cursor.numbers("I")
        if dimensions > _MAX_DIMENSIONS or name in names:
            raise CheckpointError(f"{file} has a damaged entry for {name!r}; download it again")
        names.add(name)
        *shape, kind, offset = cursor.numbers(f"{dimensions}QIQ")
        try:
            quantization = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[quantization]
        except (ValueError, KeyError):
            raise CheckpointError(
                f"{name} in {file} has the type number {kind}, which this package gguf doesn't know; upgrade it"
            ) from None
        count = math.prod(shape)
        if not shape or count == 0 or shape[0] % block:
            raise CheckpointError(f"{file} has a damaged entry for {name!r}; download it again")
        weights[quantization.name] = weights.get(quantization.name, 0) + count
        spans.append((offset, offset + count // block * block_bytes))
    if not spans:
        raise CheckpointError(f"{file} has no tensors, expected a model; it may hold a vocabulary only")
    _check_blocks(file, metadata.get(f"{architecture}.block_count"), names)
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(f"{file} has a damaged header; download it again")
    begin = -(-cursor.stream.tell() // alignment) * alignment
    end = 0
    for first, last in sorted(spans):
        if first < end:
            raise CheckpointError(
                f"{file} has overlapping tensors at byte {begin + first}; download it again"
            )
        end = last
    if begin + end > size:
        raise CheckpointError(
            f"{file} is truncated: {size} bytes, expected at least {begin + end}; download it again"
        )
    return GgufInfo(file, architecture, metadata, weights, size)


def _check_blocks(file: Path, count: Any, names: Iterable[str]) -> None:
    """Refuses a number of blocks that the tensors contradict: transformers would build them all first."""
    found = [int(match[1]) for match in (re.match(r"blk\.(\d{1,9})\.", name) for name in names) if match]
    if found and isinstance(count, int) and count > max(found) + 1:
        raise CheckpointError(
            f"{file} has tensors of {max(found) + 1} blocks, expected {count} from its metadata; "
            "download it again"
        )


def _percent(share: float) -> str:
    return "under 1 %" if share < 0.01 else f"{share * 100:.0f} %"

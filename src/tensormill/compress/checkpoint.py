"""Opens a model, writes a compressed one, loads it again; every damaged input ends in one `CheckpointError`.

A checkpoint is a directory as Hugging Face writes it: `config.json`, `model.safetensors` or shards with an
index, and a tokenizer; or a GGUF file, see `gguf`. It is checked before any tensor is read: safetensors
headers are parsed here (never a pickle, never remote code), the index is compared with the shards, sizes with
the files.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensormill.compress import gguf
from tensormill.compress.experts import having_stacked
from tensormill.compress.formats.checkpoint_format import (
    CheckpointFormat,
    compressed_linears,
    packed_state_dict,
)
from tensormill.compress.formats.registry import DEFAULT, FORMATS, format_named, format_of
from tensormill.compress.output import check_output, whole_directory
from tensormill.compress.plain_linears import transposed, use_plain_linears
from tensormill.errors import CheckpointError, InvalidArgument, ModelError, TensormillError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUILTIN_PREFIX = "builtin:"

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
#: AutoGPTQ's configuration, in which `config.json` may have no part.
_GPTQ_CONFIG = "quantize_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
#: What travels from the source to the output as it is, beside the tokenizer.
_TRAVELLING = (
    *_TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "*.tiktoken",
    "chat_template.*",
    "additional_chat_templates/*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "README*",
    "LICEN[SC]E*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)

_DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
#: How names of packed tensors end.
PACKED_PARTS = tuple({f".{part}" for found in FORMATS.values() for part in found.parts})
_SCANNED_DTYPES = ("F16", "BF16", "F32", "F64")
_INTEGERS = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
_MAX_HEADER_BYTES = 100_000_000
# Elements whose finiteness is tested at a time: bounds the temporary to 16 MiB.
_SCAN_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: its dtype as the file names it, its shape, its first byte's place, and what
    the file calls it.

    Attributes:
        nbytes: to be read from `start` on.
        turned: None, or the tensor is the transpose of some columns of the matrix that lies there: the first of them,
            and how many columns the matrix has.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int = 0
    name: str = ""
    turned: tuple[int, int] | None = None


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint directory holds, read from `config.json` and the headers alone.

    `weights` names the file with all tensors, or the index of the shards.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    weights: str = _WEIGHTS

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config`, or None for a model in floating point."""
        found = self.config.get("quantization_config") or self.config.get("compression_config")
        text = self.config.get("text_config")
        if not found and isinstance(text, dict):
            found = text.get("quantization_config")
        return found or None


def open_model(
    path_or_builtin: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    check_finite: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Opens a floating-point causal language model and its tokenizer, after checking the whole checkpoint.

    Linear layers of other classes (GPT-2's, Falcon's) become `nn.Linear`, see `plain_linears`.

    Args:
        path_or_builtin: a checkpoint directory, a GGUF file (which is dequantized), or "builtin:python-lm".
        device: where the model goes.
        dtype: of the weights; None keeps the checkpoint's (of a GGUF file: takes float32).
        check_finite: read every weight once to refuse NaN and infinity.

    Returns:
        The model in evaluation mode, and its tokenizer or None if the directory has none.

    Raises:
        CheckpointError: not a model, incomplete, damaged, already quantized, pickled, or needs remote code.
        InvalidArgument: the device doesn't exist.
    """
    if gguf.is_gguf(resolve_path(path_or_builtin)):
        with quiet_transformers():
            opened, tokenizer = gguf.open_gguf(
                resolve_path(path_or_builtin), device=_device(device), dtype=dtype
            )
        use_plain_linears(opened)
        if check_finite:
            for name, tensor in opened.named_parameters():
                if not is_finite(tensor.detach()):
                    raise CheckpointError(
                        f"{name} in {path_or_builtin} has NaN or infinity, expected finite weights; get a sound copy"
                    )
        return opened, tokenizer
    info = inspect_checkpoint(path_or_builtin)
    check_not_quantized(info)
    if check_finite:
        check_finite_tensors(info)
    model = _from_pretrained(info, _device(device), dtype)
    use_plain_linears(model)
    return model, open_tokenizer(info.path)


def load(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Loads a compressed checkpoint as a model whose linears compute with the packed weights.

    On a GPU weights are brought into the order that the kernels there read; saving brings them back.

    Args:
        path: a directory in a format of `formats.registry`, written by `save_compressed` or by others:
            compressed-tensors `pack-quantized`, AutoAWQ `gemm`, GPTQ version 1 or 2 (under AutoGPTQ's own file
            names too).
        device: where the model goes.
        dtype: of everything that isn't packed; None keeps the checkpoint's.

    Raises:
        CheckpointError: not compressed, in another format, incomplete or damaged.
        InvalidArgument: the device doesn't exist.
    """
    from tensormill.compress import transformers_hook
    from tensormill.ops.linear_wna16.module import LinearWNA16

    info = inspect_checkpoint(path)
    if info.quantization is None:
        raise CheckpointError(
            f"{info.path} is not compressed, expected a quantization_config in config.json; "
            "compress it first, or open it with open_model"
        )
    found = format_of(info.quantization)
    found.check_stored(info.path, info.tensors, found.parse_config(info.quantization))
    check_finite_tensors(info)
    transformers_hook.install()
    with transformers_hook.preferring_low_bit():
        model = _from_pretrained(info, _device(device), dtype)
    for module in model.modules():
        if isinstance(module, LinearWNA16):
            module.to_fastest_layout(model.dtype)
    return model


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether a directory's `config.json` has a `quantization_config`; False if it can't be read."""
    try:
        config = _read_config(resolve_path(path))
    except CheckpointError:
        return False
    return CheckpointInfo(Path(path), config, {}).quantization is not None


def resolve_path(path_or_builtin: str | os.PathLike[str]) -> Path:
    """The directory, or GGUF file, that a path or a built-in model's name means.

    Raises:
        CheckpointError: there is no such model.
    """
    text = os.fspath(path_or_builtin)
    if not text.startswith(BUILTIN_PREFIX):
        path = Path(text).expanduser()
        if not path.exists():
            raise CheckpointError(
                f"{path} doesn't exist, expected a model directory; download the model first"
            )
        return path
    if text != "builtin:python-lm":
        raise CheckpointError(f"there is no built-in model {text!r}, expected builtin:python-lm")
    from tensormill.models import python_lm

    return Path(python_lm.path())


def inspect_checkpoint(path_or_builtin: str | os.PathLike[str]) -> CheckpointInfo:
    """Checks a checkpoint without reading a tensor: configuration, index, shards, headers, sizes.

    Raises:
        CheckpointError: the first thing that is wrong, and what to do about it.
    """
    path = resolve_path(path_or_builtin)
    config = _read_config(path)
    weights = next((name for name in _weight_names(config) if (path / name).is_file()), None)
    if weights is None:
        raise CheckpointError(_no_weights(path))
    tensors = (_read_shards if weights.endswith(".json") else read_header)(path / weights)
    if not tensors:
        raise CheckpointError(f"{path} has no tensors; download it again")
    return CheckpointInfo(path, config, tensors, weights)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Reads and checks the header of a safetensors file.

    Raises:
        CheckpointError: not a safetensors file, truncated, or a header that contradicts the file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if start == b"version ":
                raise CheckpointError(f"{file} is a Git LFS pointer, expected weights; run 'git lfs pull'")
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= _MAX_HEADER_BYTES or 8 + length > size:
                raise CheckpointError(
                    f"{file} is truncated or not a safetensors file ({size} bytes); download it again"
                )
            header = json.loads(stream.read(length), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} has a damaged header; download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a damaged header; download it again")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _read_entry(file, name, entry, 8 + length)
        spans.append(span)
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise CheckpointError(f"{file} has overlapping or missing bytes at {first}; download it again")
        end = last
    if size != 8 + length + end:
        what = "truncated" if size < 8 + length + end else "damaged"
        raise CheckpointError(
            f"{file} is {what}: {size} bytes, expected {8 + length + end}; download it again"
        )
    return tensors


def check_finite_tensors(info: CheckpointInfo) -> None:
    """Reads every floating-point tensor once.

    Raises:
        CheckpointError: a tensor, which is named, has NaN or infinity.
    """
    from safetensors import SafetensorError, safe_open

    by_file: dict[Path, list[str]] = {}
    for name, tensor in info.tensors.items():
        if tensor.dtype in _SCANNED_DTYPES:
            by_file.setdefault(tensor.file, []).append(name)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt") as opened:
                for name in names:
                    if not is_finite(opened.get_tensor(name)):
                        raise CheckpointError(
                            f"{name} in {file} has NaN or infinity, expected finite weights; get a sound copy"
                        )
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} can't be read: {one_line(error)}") from error


def open_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a checkpoint directory, or None if it has no tokenizer files.

    Raises:
        CheckpointError: its files are damaged or need remote code.
    """
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"the tokenizer in {path} can't be read: {one_line(error)}") from error


def open_processor(path: Path) -> Any:
    """The processor of a model that reads images: it turns an image and a text into the model's inputs.

    Raises:
        CheckpointError: the directory has none, or its files are damaged or need remote code.
    """
    from transformers import AutoProcessor

    try:
        with quiet_transformers():
            found = AutoProcessor.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"the processor in {path} can't be read: {one_line(error)}") from error
    if getattr(found, "image_processor", None) is None:
        raise CheckpointError(f"{path} has no processor of images, expected preprocessor_config.json")
    return found


def save_compressed(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    source_path: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    format: str = DEFAULT,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    extra_files: Callable[[Path], Mapping[str, str]] | None = None,
) -> Path:
    """Writes a compressed model, whole or not at all.

    `config.json` is the source's with a `quantization_config` added. Its dtype is kept: what isn't quantized
    is stored in it, scales in the dtype they were made in. Tokenizer files, `generation_config.json`, chat
    template, model card and licence are copied from the source.

    Args:
        model: a transformers model with `LinearWNA16` linears.
        tokenizer: written if the source has no tokenizer files.
        source_path: the checkpoint that the model came from ("builtin:..." and GGUF files too), or None if there is
            none.
        output: the directory to write; must not exist, or be empty, unless `overwrite`.
        format: "compressed-tensors" (`pack-quantized`), "awq" (AutoAWQ `gemm`), "gptq" or "gptq_v2".
        overwrite: replace a checkpoint that lies at `output`.
        max_shard_size: bytes, or a string such as "5GB".
        extra_files: called with the directory as written so far, gives more text files for it, by name.

    Returns:
        The directory written.

    Raises:
        OutputError: the destination is refused, or can't be written (nothing is left behind).
        ModelError: nothing is compressed, the format can't express a layer, or a weight isn't finite.
        InvalidArgument: there is no such format.
    """
    layout = format_named(format)
    source = origin = None if source_path is None else resolve_path(source_path)
    if source is not None and gguf.is_gguf(source):
        source = None  # no file in it can travel: configuration and tokenizer come from the opened model
    quantization = layout.quantization_config(model)
    if layout.method != "gptq" and transposed(model) & compressed_linears(model).keys():
        warnings.warn(
            f"the layers of {type(model).__name__} are Conv1D in transformers, for which readers of {layout.name} "
            "have no packed form; tensormill.load reads them, and the formats gptq and gptq_v2 hold them for others",
            stacklevel=2,
        )
    config = _read_config(source) if source is not None else None
    dtype = config_dtype(config) if config is not None else None
    tensors = tensors_to_write(model, layout, dtype, float32=float32_tensors(model, dtype))
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    check_output(output, source=origin, overwrite=overwrite, needed_bytes=needed)
    with whole_directory(output, overwrite=overwrite) as partial:
        _save_pretrained(model, tensors, partial, max_shard_size, keep_generation_config=source is None)
        written = _read_config(partial)
        config = {**(config or written), "quantization_config": quantization}
        tied = getattr(model.config, "tie_word_embeddings", None)
        if tied is not None and tied != config.get("tie_word_embeddings", tied):
            config["tie_word_embeddings"] = tied
        _write_beside_weights(partial, config, source, tokenizer, extra_files)
    return Path(output)


def inspect_shards(
    shards: Sequence[Path], source: CheckpointInfo, quantization: Mapping[str, Any]
) -> CheckpointInfo:
    """What the checkpoint will hold that `save_shards` makes of these files."""
    tensors = {name: stored for shard in shards for name, stored in read_header(shard).items()}
    return CheckpointInfo(source.path, {**source.config, "quantization_config": dict(quantization)}, tensors)


def save_shards(
    shards: Sequence[Path],
    quantization: Mapping[str, Any],
    source: Path,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    extra_files: Callable[[Path], Mapping[str, str]] | None = None,
) -> Path:
    """As `save_compressed`, for a compressed model whose tensors are written already.

    Args:
        shards: safetensors files, which stay where they are too.
        quantization: the `quantization_config`.
        source: the checkpoint that the model came from.
        output, overwrite, extra_files: as for `save_compressed`.

    Raises:
        OutputError: the destination is refused, or can't be written (nothing is left behind).
    """
    config = {**_read_config(source), "quantization_config": dict(quantization)}
    check_output(output, source=source, overwrite=overwrite)
    places: dict[str, str] = {}
    total = 0
    with whole_directory(output, overwrite=overwrite) as partial:
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else _WEIGHTS
            stored = read_header(shard)
            places |= dict.fromkeys(stored, name)
            total += sum(tensor.nbytes for tensor in stored.values())
            try:
                os.link(shard, partial / name)
            except OSError:  # file systems without hard links
                shutil.copyfile(shard, partial / name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            _write_text(partial / _INDEX, json.dumps(index, indent=2) + "\n")
        _write_beside_weights(partial, config, source, None, extra_files)
    return Path(output)


def _write_beside_weights(
    directory: Path,
    config: Mapping[str, Any],
    source: Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    extra_files: Callable[[Path], Mapping[str, str]] | None,
) -> None:
    # Where the source's weights have a name of their own.
    config = {key: value for key, value in config.items() if key != "transformers_weights"}
    _write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")
    travelled = _copy_travelling(source, directory) if source is not None else []
    if tokenizer is not None and not set(travelled) & set(_TOKENIZER_FILES):
        tokenizer.save_pretrained(directory)
    if extra_files is not None:
        for name, text in extra_files(directory).items():
            _write_text(directory / name, text)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        hint = "give the directory that holds it"
        if path.suffix == ".gguf":
            hint = "GGUF files are read by open_model only"
        raise CheckpointError(f"{path} is a file, expected a model directory with config.json; {hint}")
    file = path / "config.json"
    if not file.is_file():
        if (path / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{path} is an adapter, expected a whole model; merge it into its base model first"
            )
        for found in sorted(path.glob("*.gguf")):
            raise CheckpointError(f"{path} is not a model: it has no config.json; give {found.name} itself")
        raise CheckpointError(f"{path} is not a model: it has no config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON; download it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{file} names no model_type, expected a transformers configuration")
    quantization = CheckpointInfo(path, config, {}).quantization
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(
            f"{file} has a quantization_config that is a {type(quantization).__name__}, expected settings by name"
        )
    if not quantization and (path / _GPTQ_CONFIG).is_file():
        config["quantization_config"] = _read_gptq_config(path / _GPTQ_CONFIG)
    return config


def _read_gptq_config(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON; download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is no configuration of AutoGPTQ; download it again")
    return {**found, "quant_method": found.get("quant_method") or "gptq"}


def _weight_names(config: Mapping[str, Any]) -> list[str]:
    """What a checkpoint's weight file or index may be called, the likeliest first."""
    named = [config.get("transformers_weights")]
    names = [_WEIGHTS, _INDEX]
    quantization = CheckpointInfo(Path(), dict(config), {}).quantization
    if isinstance(quantization, Mapping) and quantization.get("quant_method") == "gptq":
        # AutoGPTQ's own names; transformers doesn't know them.
        bits, group_size = quantization.get("bits"), quantization.get("group_size")
        for base in (quantization.get("model_file_base_name"), f"gptq_model-{bits}bit-{group_size}g"):
            names += [f"{base}.safetensors", f"{base}.safetensors.index.json"] if base else []
    return [name for name in (*named, *names) if isinstance(name, str) and Path(name).name == name]


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = list(weight_map.items())
        valid = all(isinstance(shard, str) and Path(shard).name == shard for _, shard in entries)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{index} is damaged; download it again") from error
    if not valid:
        raise CheckpointError(f"{index} names a shard outside the directory; download it again")
    headers: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} names the shard {shard}, which is missing; download it")
        headers[shard] = read_header(index.parent / shard)
    for name, shard in entries:
        if name not in headers[shard]:
            raise CheckpointError(f"{name} is missing from {index.parent / shard}, where the index puts it")
    return {name: headers[shard][name] for name, shard in entries}


def _no_weights(path: Path) -> str:
    pickled = sorted(path.glob("*.bin")) + sorted(path.glob("*.pt")) + sorted(path.glob("*.pth"))
    if pickled:
        return (
            f"{path} has pickled weights ({pickled[0].name}), which can run code and are not read; convert "
            "them once: transformers.AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path)"
        )
    if any(path.glob("model-*-of-*.safetensors")):
        return f"{path} has shards but no {_INDEX}; download it"
    return f"{path} has no weights, expected {_WEIGHTS} or {_INDEX}; download them"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("duplicate keys")
    return dict(pairs)


def _read_entry(file: Path, name: str, entry: Any, base: int) -> tuple[StoredTensor, tuple[int, int]]:
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, first, last)
        valid = all(isinstance(number, int) and number >= 0 for number in numbers) and first <= last
        valid = valid and isinstance(dtype, str)
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} has a damaged entry for {name}; download it again") from error
    if not valid:
        raise CheckpointError(f"{file} has a damaged entry for {name}; download it again")
    if dtype not in _DTYPE_BITS:
        raise CheckpointError(f"{name} in {file} has the dtype {dtype!r}, which is unknown")
    if math.prod(shape) * _DTYPE_BITS[dtype] != 8 * (last - first):
        raise CheckpointError(
            f"{name} in {file} has {last - first} bytes, which don't fit {dtype} of shape {list(shape)}; "
            "download it again"
        )
    return StoredTensor(file, dtype, shape, last - first, base + first, name), (first, last)


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite, at little memory."""
    flat = tensor.reshape(-1)
    return all(bool(torch.isfinite(part).all()) for part in flat.split(_SCAN_ELEMENTS))


def check_not_quantized(info: CheckpointInfo) -> None:
    """Refuses, as `CheckpointError`, a checkpoint that is quantized already."""
    quantization = info.quantization
    if quantization is None:
        for name, tensor in info.tensors.items():
            if name.endswith(".weight") and tensor.dtype in _INTEGERS:
                raise CheckpointError(
                    f"{name} in {tensor.file} holds integers ({tensor.dtype}), expected floating-point numbers; "
                    "start from the original model, or put its quantization_config into config.json"
                )
        return
    method = quantization.get("quant_method", "an unnamed method")
    try:
        format_of(quantization).parse_config(quantization)
    except CheckpointError:
        advice = "start from the original floating-point model"
    else:
        advice = "load it with tensormill.load(path), or start from the original floating-point model"
    raise CheckpointError(f"{info.path} is already quantized ({method}); {advice}")


def _device(device: str | torch.device) -> torch.device:
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise InvalidArgument(f"given device {device!r}, expected for example 'cpu' or 'cuda'") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument(f"given device {device!r}, but torch sees no GPU here; use 'cpu'")
    return resolved


def model_class(info: CheckpointInfo) -> Any:
    """transformers' class that opens a checkpoint: of causal language models, or of those that read images too.

    Raises:
        CheckpointError: transformers knows no such model, or only with code from its repository.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    model_type = info.config["model_type"]
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in info.config:
            raise CheckpointError(f"{info.path} needs code from its own repository, which is not run")
        raise CheckpointError(
            f"{info.path} has the model type {model_type!r}, which this transformers doesn't know; upgrade it"
        )
    kind = CONFIG_MAPPING[model_type]
    # A model with a vision tower may be known as a causal model too, without the tower.
    classes: list[Any] = [AutoModelForCausalLM, AutoModelForImageTextToText]
    if isinstance(info.config.get("vision_config"), dict):
        classes.reverse()
    known = [one for one in classes if kind in one._model_mapping]
    if not known:
        raise CheckpointError(
            f"{info.path} has the model type {model_type!r}, expected a causal language model, or one that "
            "reads images and writes text"
        )
    return known[0]


def _from_pretrained(
    info: CheckpointInfo, device: torch.device, dtype: torch.dtype | None
) -> PreTrainedModel:
    loaded: Any
    found_class = model_class(info)
    try:
        with quiet_transformers():
            loaded = found_class.from_pretrained(
                info.path,
                **_unusual_files(info),
                dtype=dtype or "auto",
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except TensormillError:
        raise
    except Exception as error:
        raise CheckpointError(f"{info.path} can't be opened: {one_line(error)}") from error
    model, found = loaded
    vars(model.config).pop("transformers_weights", None)
    for name in sorted(found.get("missing_keys") or ()):
        raise CheckpointError(f"{info.path} has no tensor {name}, which the model needs; download it again")
    for name, stored, expected in sorted(found.get("mismatched_keys") or ()):
        raise CheckpointError(
            f"{name} in {info.path} has shape {tuple(stored)}, expected {tuple(expected)} from config.json; "
            "they belong to different models"
        )
    unexpected = sorted(found.get("unexpected_keys") or ())
    for name in unexpected:
        if name.endswith(PACKED_PARTS):
            raise CheckpointError(
                f"{info.path} has the tensor {name}, which the quantization_config in config.json doesn't "
                "account for; it belongs to another checkpoint"
            )
    if unexpected:
        warnings.warn(
            f"{info.path} has {len(unexpected)} tensors that the model doesn't use, such as {unexpected[0]}",
            stacklevel=3,
        )
    return model.to(device).eval()


def _unusual_files(info: CheckpointInfo) -> dict[str, Any]:
    """What transformers has to be told of a checkpoint whose files have other names than it looks for."""
    if info.weights in (_WEIGHTS, _INDEX) and not (info.path / _GPTQ_CONFIG).is_file():
        return {}
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(info.path, trust_remote_code=False, local_files_only=True)
    config.quantization_config = info.quantization
    config.transformers_weights = info.weights
    return {"config": config}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and reports from transformers: what matters in them is raised as an error here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def stored_dtype(source: Path) -> torch.dtype | None:
    """The dtype in which a compressed copy of this checkpoint stores what isn't quantized; None: the model's own."""
    return None if gguf.is_gguf(source) else config_dtype(_read_config(source))


def config_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    name = config.get("dtype") or config.get("torch_dtype")
    found = getattr(torch, str(name).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else None


def float32_tensors(model: Any, dtype: torch.dtype | None) -> set[str]:
    """Names of the tensors that a transformers model holds in float32 where its dtype is `dtype`."""
    if dtype is None or not hasattr(model, "_get_dtype_plan"):
        return set()
    patterns = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]
    names = model.state_dict() if patterns else ()
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def tensors_to_write(
    model: nn.Module,
    layout: CheckpointFormat,
    dtype: torch.dtype | None,
    name: str = "",
    float32: Collection[str] = (),
) -> dict[str, Tensor]:
    """The tensors of a model, or of its part `name`, as a checkpoint holds them; names as inside the part.

    What isn't packed is cast to `dtype` (None: stays), but those of the full names `float32`.

    Raises:
        ModelError: the format can't express a layer, or a number isn't finite.
    """
    compressed = compressed_linears(model)
    scales = {f"{name}.{layout.scale_part}" for name in compressed}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for key in tied:
        if key.removesuffix(".weight") in compressed:
            raise ModelError(f"{key} is tied to another weight and can't be compressed alone; leave it out")
    prefix = f"{name}." if name else ""
    tensors = packed_state_dict(
        model, lambda module, inside: layout.pack_linear(module, prefix + inside), layout.name
    )
    # Keyed by storage, not by name: tied weights are tested once, and stay one storage when they are cast.
    seen: dict[tuple[Any, ...], Tensor] = {}
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise ModelError(
                f"{prefix}{key} is not in memory (offloaded), expected the whole model there; load it without"
            )
        if not tensor.is_floating_point():
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if place not in seen:
            if not is_finite(tensor):
                raise ModelError(f"{prefix}{key} has NaN or infinity after compression; nothing was written")
            stays = dtype is None or key in scales or prefix + key in float32
            seen[place] = tensor if stays else tensor.to(dtype)
        tensors[key] = seen[place]
    return tensors


def _save_pretrained(
    model: Any,
    tensors: dict[str, Tensor],
    directory: Path,
    max_shard_size: int | str,
    keep_generation_config: bool,
) -> None:
    """Lets transformers name, untie and shard the tensors as the architecture asks."""
    dtype, architectures = getattr(model.config, "dtype", None), getattr(model.config, "architectures", None)
    generation_config = getattr(model, "generation_config", None)
    quantization = getattr(model.config, "quantization_config", None)
    # A loaded model's quantizer would write the format that it was read from, instead of `tensors`.
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        model.hf_quantizer = None
    if generation_config is not None and not keep_generation_config:
        # The source's own file is copied afterwards; transformers refuses to write some of those it reads.
        model.generation_config = type(generation_config)()
    try:
        with quiet_transformers(), having_stacked(model, tensors):
            model.save_pretrained(directory, state_dict=tensors, max_shard_size=max_shard_size)
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer
        model.generation_config = generation_config
        model.config.dtype, model.config.architectures = dtype, architectures
        if quantization is not None:
            model.config.quantization_config = quantization
    if not keep_generation_config:
        (directory / "generation_config.json").unlink(missing_ok=True)


def _copy_travelling(source: Path, directory: Path) -> list[str]:
    copied = []
    for pattern in _TRAVELLING:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                name = file.relative_to(source)
                (directory / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, directory / name)
                copied.append(str(name))
    return copied


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's text without line breaks, cut at `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyError):  # whose text is the key alone
        text = f"{text} is not known"
    return text if len(text) <= limit else text[: limit - 1] + "…"

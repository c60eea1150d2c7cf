"""A model without its weights, and its checkpoint read part by part.

The model is built from its configuration with parameters on the meta device, which take no memory; what it computes
itself (rotary frequencies, say) is real. Tensors are read from the safetensors files by name, with ordinary reads:
mapped files would count as memory in use, all of them in the end.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensormill.compress.checkpoint import (
    PACKED_PARTS,
    CheckpointInfo,
    StoredTensor,
    model_class,
    one_line,
    quiet_transformers,
)
from tensormill.compress.formats.checkpoint_format import FLOAT_DTYPES
from tensormill.compress.structure import find_blocks, shared_parameters
from tensormill.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {
    **FLOAT_DTYPES,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Enough to keep a solid-state disk busy.
_READERS = 4


def open_unloaded(info: CheckpointInfo, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a checkpoint in evaluation mode, its parameters on the meta device.

    Args:
        info: of the checkpoint.
        dtype: of the parameters; None takes the configuration's, else the checkpoint's.

    Raises:
        CheckpointError: no causal language model, or a configuration that transformers refuses.
    """
    from transformers import AutoConfig

    found_class = model_class(info)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(info.path, trust_remote_code=False, local_files_only=True)
            dtype = dtype or getattr(config, "dtype", None) or _first_float(info)
            with _parameters_on_meta():
                model = found_class.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{info.path} can't be opened: {one_line(error)}") from error
    return model.eval()


def why_not_part_by_part(model: Any, info: CheckpointInfo) -> str | None:
    """Why a checkpoint's tensors can't be taken for the model's one by one, or None if they can.

    Warns of tensors that the model doesn't use.

    Raises:
        CheckpointError: it has packed tensors.
    """
    tied = tied_names(model)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    for name, tensor in expected.items():
        stored = info.tensors.get(name)
        if stored is None:
            return f"the model's {name} has another name in the files, or none"
        if stored.shape != tuple(tensor.shape):
            return f"{name} has the shape {list(stored.shape)} in the files and {list(tensor.shape)} in the model"
        if stored.dtype not in _DTYPES:
            return f"{name} is stored as {stored.dtype}"
    for name in tied:
        if name in info.tensors:
            return f"{name} is tied to another weight and stored all the same"
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        return "some of its modules stay in float32"
    shared = shared_parameters(model)
    for block in find_blocks(model):
        if any(id(parameter) in shared for parameter in model.get_submodule(block).parameters()):
            return f"{block} shares weights with other modules"
    _check_unexpected(model, info, info.tensors.keys() - expected.keys())
    return None


def tied_names(model: Any) -> dict[str, str]:
    """Names of tied weights that a checkpoint doesn't hold, each with the name that it does."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _check_unexpected(model: Any, info: CheckpointInfo, names: Iterable[str]) -> None:
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unexpected = sorted(name for name in names if not any(re.search(pattern, name) for pattern in ignored))
    for name in unexpected:
        if name.endswith(PACKED_PARTS):
            raise CheckpointError(
                f"{info.path} has the tensor {name}, which the quantization_config in config.json doesn't "
                "account for; it belongs to another checkpoint"
            )
    if unexpected:
        warnings.warn(
            f"{info.path} has {len(unexpected)} tensors that the model doesn't use, such as {unexpected[0]}",
            stacklevel=4,
        )


def _first_float(info: CheckpointInfo) -> torch.dtype:
    stored = (tensor.dtype for tensor in info.tensors.values())
    return next((FLOAT_DTYPES[dtype] for dtype in stored if dtype in FLOAT_DTYPES), torch.float32)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, new modules' parameters are made on the meta device, but buffers for real."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def read_tensor(stored: StoredTensor, *, pinned: bool = False) -> Tensor:
    """A tensor of a safetensors file, as stored, on the CPU.

    Args:
        stored: where it is.
        pinned: in memory from which a GPU can copy while it computes.

    Raises:
        CheckpointError: the file is shorter than its header said, or can't be read.
    """
    flat = torch.empty(stored.nbytes, dtype=torch.uint8, pin_memory=pinned)
    view = memoryview(flat.numpy())  # type: ignore[arg-type]
    try:
        with stored.file.open("rb", buffering=0) as stream:
            stream.seek(stored.start)
            done = 0
            while done < stored.nbytes:
                count = stream.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{stored.file} is truncated; download it again")
                done += count
    except OSError as error:
        raise CheckpointError(f"{stored.file} can't be read: {error.strerror}") from error
    return flat.view(_DTYPES[stored.dtype]).view(stored.shape)


class PartReader:
    """Reads the tensors of a part, and those of the next one ahead of time.

    Args:
        info: of the checkpoint.
        pinned: as for `read_tensor`.
    """

    def __init__(self, info: CheckpointInfo, *, pinned: bool) -> None:
        self._info, self._pinned = info, pinned
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="reader")
        self._ahead: dict[str, Future[Tensor]] = {}

    def read(self, names: Sequence[str], ahead: Sequence[str] = ()) -> dict[str, Tensor]:
        """Tensors by name, and a start with those in `ahead`, which are wanted next."""
        futures = {name: self._ahead.get(name) or self._submit(name) for name in names}
        self._ahead = {name: self._ahead.get(name) or self._submit(name) for name in ahead}
        return {name: future.result() for name, future in futures.items()}

    def close(self) -> None:
        """Stop reading."""
        self._ahead = {}
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, name: str) -> Future[Tensor]:
        return self._pool.submit(read_tensor, self._info.tensors[name], pinned=self._pinned)

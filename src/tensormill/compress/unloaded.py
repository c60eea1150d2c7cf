"""A model without its weights, and its checkpoint read part by part.

The model is built from its configuration with parameters on the meta device, which take no memory; what it computes
itself (rotary frequencies, say) is real. Experts are taken apart, and the checkpoint's tensors get the names that the
model has for them, so that one parameter is one tensor in the files, or a run of bytes of one. These are read with
ordinary reads: mapped files would count as memory in use, all of them in the end.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensormill.compress.checkpoint import (
    PACKED_PARTS,
    CheckpointInfo,
    StoredTensor,
    float32_tensors,
    model_class,
    one_line,
    quiet_transformers,
)
from tensormill.compress.experts import expert_lists, stacking_order, unfuse_experts
from tensormill.compress.formats.checkpoint_format import FLOAT_DTYPES
from tensormill.compress.stored_names import names_in_model
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


def open_unloaded(
    info: CheckpointInfo, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, CheckpointInfo]:
    """The model of a checkpoint in evaluation mode, its parameters on the meta device and its experts taken apart.

    Args:
        info: of the checkpoint.
        dtype: of the parameters; None takes the configuration's, else the checkpoint's.

    Returns:
        The model, and `info` with the tensors under the names that the model has for them.

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
    kept = float32_tensors(model, dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in kept:
            tensor.data = tensor.data.float()
    unfuse_experts(model)
    stored = {tensor.name: tensor for tensor in info.tensors.values()}
    tensors = {name: stored[original] for original, name in names_in_model(model, stored).items()}
    return model.eval(), replace(info, tensors=tensors | _experts_in(tensors, model))


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
            path = next((path for path, _ in expert_lists(model) if name.startswith(f"{path}.")), None)
            if path is not None and f"{path}.gate_up_proj" in info.tensors:
                return f"the experts in {path} are stacked in another order in the files than in the model"
            return f"the model's {name} has another name in the files, or none"
        if stored.shape != tuple(tensor.shape):
            return f"{name} has the shape {list(stored.shape)} in the files and {list(tensor.shape)} in the model"
        if stored.dtype not in _DTYPES:
            return f"{name} is stored as {stored.dtype}"
    for name in tied:
        if name in info.tensors:
            return f"{name} is tied to another weight and stored all the same"
    shared = shared_parameters(model)
    for block in find_blocks(model):
        if any(id(parameter) in shared for parameter in model.get_submodule(block).parameters()):
            return f"{block} shares weights with other modules"
    stacked = {f"{path}.{name}" for path, experts in expert_lists(model) for name in stacking_order(experts)}
    _check_unexpected(model, info, info.tensors.keys() - expected.keys() - stacked)
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


def _experts_in(tensors: Mapping[str, StoredTensor], model: nn.Module) -> dict[str, StoredTensor]:
    """The single experts' weights that lie in stacked ones, by the model's names for both.

    One lies after the other, or beside the other in matrices that are transposed, as the model has them (Llama 4) or
    the files alone (Qwen3-VL-MoE), which transformers tells by the shapes, too.
    """
    found = {}
    for path, experts in expert_lists(model):
        for stacked, weights in stacking_order(experts).items():
            stored = tensors.get(f"{path}.{stacked}")
            rows, columns = experts.get_parameter(weights[0]).shape
            count = len(weights) // len(experts)
            shapes = (len(experts), count * rows, columns), (len(experts), columns, count * rows)
            if stored is None or stored.shape not in shapes:
                continue
            transposed = experts.transposed if shapes[0] == shapes[1] else stored.shape == shapes[1]
            apart = 1 if transposed else count
            size = stored.nbytes // (len(experts) * apart)
            owner, _, last = stored.name.rpartition(".")
            for place, weight in enumerate(weights):
                found[f"{path}.{weight}"] = replace(
                    stored,
                    shape=(rows, columns),
                    nbytes=size,
                    start=stored.start + (place * apart // count) * size,
                    name=f"{owner if last == stacked else path}.{weight}",
                    turned=(place % count * rows, count * rows) if transposed else None,
                )
    return found


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
    flat = torch.empty(stored.nbytes, dtype=torch.uint8, pin_memory=pinned and stored.turned is None)
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
    values = flat.view(_DTYPES[stored.dtype])
    if stored.turned is None:
        return values.view(stored.shape)
    first, width = stored.turned
    rows, columns = stored.shape
    turned = torch.empty(stored.shape, dtype=values.dtype, pin_memory=pinned)
    return turned.copy_(values.view(columns, width)[:, first : first + rows].T)


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

"""Compresses a checkpoint from disk to disk, block by block.

The model never is in memory: its modules are on the meta device, and one block at a time is read, observed,
compressed, written to a working directory beside the output, and dropped. What stays is the hidden states between two
blocks. While a block is computed, the next one is read and the last one written by other threads.

The methods are the same as for a model in memory, see `residence`; on the CPU the result is the same bit for bit.
"""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensormill.compress.calibration import Calibration
from tensormill.compress.checkpoint import (
    CheckpointInfo,
    check_not_quantized,
    config_dtype,
    float32_tensors,
    inspect_checkpoint,
    is_finite,
    tensors_to_write,
)
from tensormill.compress.formats.checkpoint_format import CheckpointFormat, compressed_linears
from tensormill.compress.formats.float16_scales import round_scales
from tensormill.compress.journal import Journal, JournalElsewhere
from tensormill.compress.methods import METHODS, LayerReport, MethodReport, WeightConfig
from tensormill.compress.ranks import ALONE, Ranks
from tensormill.compress.recipe import Step
from tensormill.compress.stages import Progress
from tensormill.compress.structure import embedding_name, find_blocks, left_out
from tensormill.compress.unloaded import (
    PartReader,
    open_unloaded,
    read_tensor,
    tied_names,
    why_not_part_by_part,
)
from tensormill.errors import CheckpointError, ModelError, TensormillError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tensors outside of the blocks go into files of about this size, larger ones into files of their own.
_OUTSIDE_BYTES = 1 << 28
# Hidden states are kept again once this many times the time has passed that keeping them took.
_PAUSE = 30.0
# Modules that use their parts' weights without calling the parts.
_USED_WHOLE = (nn.MultiheadAttention,)


class OnDisk:
    """A model on the meta device whose parts are read from a checkpoint and, finished, written to a journal.

    Args:
        model, info: as `open_unloaded` gives them; finished parts stay compressed, on the meta device.
        layout: format of the result.
        journal: where finished parts go, and those of an earlier run are.
        device: where parts are lent to.
        ranks: the processes that share the calibration; the leading one writes, and no hidden states are kept.
        keeps_every_input: keep the hidden states after every block, since they can't be computed again from the
            checkpoint; otherwise now and then.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        info: CheckpointInfo,
        layout: CheckpointFormat,
        journal: Journal | JournalElsewhere,
        device: torch.device | str = "cpu",
        *,
        ranks: Ranks = ALONE,
        keeps_every_input: bool = False,
    ) -> None:
        self.model, self.info, self.layout, self.journal = model, info, layout, journal
        self.home = torch.device("cpu")
        self.device = torch.device(device)
        self.dtype = config_dtype(info.config)
        self.ranks = ranks
        self.blocks = find_blocks(model)
        self._float32 = float32_tensors(model, self.dtype)
        if keeps_every_input:
            journal.forget([name for name in self.blocks if not self._can_go_on_after(name)])
        self.layers = [layer for part in journal.parts.values() for layer in part.layers]
        self._keeps_every_input = keeps_every_input
        self._stored = set(model.state_dict()) - tied_names(model).keys()
        self._reader = PartReader(info, pinned=self.device.type == "cuda")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._writing: Future[Any] | None = None
        # What lies outside of the blocks may be larger than many blocks, which don't wait for it.
        self._outside_writer = ThreadPoolExecutor(1, thread_name_prefix="outside")
        self._writing_outside: list[Future[Any]] = []
        self._last_kept, self._keeping_took = time.monotonic(), 0.0

    def entrance(self) -> Any:
        return self._entrance()

    @contextmanager
    def _entrance(self) -> Iterator[None]:
        """Modules outside of the blocks get their own parameters when they are called, where their input lies, and
        those of their parts where they don't call these.
        """
        from safetensors import safe_open

        inside = tuple(f"{block}." for block in self.blocks)
        table = embedding_name(self.model)
        tied = tied_names(self.model)
        originals: dict[tuple[nn.Module, str], Tensor] = {}

        def load(name: str) -> Callable[..., None]:
            prefix = f"{name}." if name else ""

            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                place = args[0].device if args and isinstance(args[0], Tensor) else self.home
                if name == table.rpartition(".")[0] and module is not self.model.get_submodule(table):
                    # Before it is called: Llama 4 moves its tokens to where the table lies.
                    take(self.model.get_submodule(table), f"{table}.", place)
                parts = module.named_modules() if isinstance(module, _USED_WHOLE) else [("", module)]
                for inner, part in parts:
                    take(part, f"{prefix}{inner}." if inner else prefix, place)

            return hook

        def take(module: nn.Module, prefix: str, place: torch.device) -> None:
            for key, tensor in _own_tensors(module):
                stored = self.info.tensors.get(tied.get(prefix + key, prefix + key))
                if stored is None or (prefix + key not in self._stored and prefix + key not in tied):
                    continue
                if (module, key) in originals:
                    continue
                originals[module, key] = tensor
                # Mapped, so that only those rows of an embedding are read that are looked up.
                with safe_open(stored.file, framework="pt") as opened:
                    found = opened.get_tensor(stored.name)
                _replace(module, key, found.to(place, tensor.dtype))

        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if not f"{name}.".startswith(inside):
                    stack.callback(module.register_forward_pre_hook(load(name)).remove)
            try:
                yield
            finally:
                for (module, key), tensor in originals.items():
                    _replace(module, key, tensor)

    def part(self, name: str) -> Any:
        return self._part(name)

    @contextmanager
    def _part(self, name: str) -> Iterator[nn.Module]:
        originals: dict[str, Tensor] = {}
        try:
            yield self._load(name, originals)
        finally:
            # Looked up again: a layer is replaced by its compressed form.
            module = self.model.get_submodule(name)
            for prefix, owner in module.named_modules():
                for key, tensor in _own_tensors(owner):
                    original = originals.get(f"{prefix}.{key}" if prefix else key)
                    _replace(owner, key, tensor.to("meta") if original is None else original)

    def _load(self, name: str, originals: dict[str, Tensor]) -> nn.Module:
        """Give a part its weights; what it had before goes to `originals`, by name inside the part."""
        module = self.model.get_submodule(name)
        read = self._read(name)
        for prefix, owner in module.named_modules():
            for key, tensor in _own_tensors(owner):
                inside = f"{prefix}.{key}" if prefix else key
                originals[inside] = tensor
                stored = read.pop(f"{name}.{inside}", None)
                source = tensor if stored is None else stored
                _replace(owner, key, source.to(self.device, non_blocking=True).to(tensor.dtype))
                if stored is not None and not is_finite(getattr(owner, key)):
                    raise CheckpointError(_not_finite(self.info, f"{name}.{inside}"))
        return module

    def _read(self, name: str) -> dict[str, Tensor]:
        return self._reader.read(self._names(name), ahead=self._names(self._following(name)))

    def finish(
        self, name: str, layers: Sequence[LayerReport], reached: Sequence[Tensor] | None = None
    ) -> None:
        self.layers += layers
        if isinstance(self.journal, JournalElsewhere):
            return
        journal = self.journal
        owner, dot, last = name.rpartition(".")
        parent = nn.Module()  # of this part alone, which may be a compressed layer itself
        parent.add_module(last, self.model.get_submodule(name))
        if self.layout.scale_dtype == torch.float16:
            round_scales(parent)
        # Into pinned memory, for which the next block doesn't wait; the writing thread does.
        on_gpu = self.device.type == "cuda"
        tensors = {
            self._stored_name(f"{owner}{dot}{key}"): tensor.contiguous().to("cpu", non_blocking=on_gpu)
            for key, tensor in tensors_to_write(parent, self.layout, self.dtype, owner, self._float32).items()
        }
        copied = torch.cuda.current_stream(self.device).record_event() if on_gpu else None
        following = self._following(name)
        if reached is None or not following or not self._is_time_to_keep():
            self._write(lambda: journal.finish(name, tensors, layers), copied)
            return
        hidden = [chunk.cpu() for chunk in reached]
        index = self.blocks.index(following)

        def write() -> None:
            began = time.monotonic()
            journal.finish_block(name, tensors, layers, index, hidden)
            self._last_kept = time.monotonic()
            self._keeping_took = self._last_kept - began

        self._write(write, copied)

    def is_finished(self, name: str) -> bool:
        return name in self.journal.parts

    def kept_inputs(self) -> tuple[int, list[Tensor] | None]:
        from safetensors.torch import load_file

        if self.journal.inputs is None:
            return 0, None
        index, file = self.journal.inputs
        chunks = load_file(file)
        return index, [chunks[key].to(self.device) for key in sorted(chunks)]

    def write_outside(self, compressed: Sequence[str]) -> None:
        """Write what lies outside of the blocks and isn't one of the layers `compressed`, in another thread."""
        if isinstance(self.journal, JournalElsewhere):
            return
        inside = tuple(f"{name}." for name in (*self.blocks, *compressed))
        names = sorted(name for name in self._stored if not name.startswith(inside))
        for number, group in enumerate(_in_files([(name, self.info.tensors[name].nbytes) for name in names])):
            part = f"outside-{number:05d}"
            if not self.is_finished(part):
                self._writing_outside.append(
                    self._outside_writer.submit(self._copy, self.journal, part, group)
                )

    def wait(self) -> None:
        """Return when all that is finished is written.

        Raises:
            TensormillError: what went wrong while writing.
        """
        self._wait_for_block()
        while self._writing_outside:
            self._writing_outside.pop(0).result()

    def close(self) -> None:
        """Stop the threads."""
        self._reader.close()
        self._writer.shutdown(wait=True)
        self._outside_writer.shutdown(wait=True, cancel_futures=True)

    def files(self) -> list[Path]:
        """The files of all parts: what lies outside of the blocks first, then the blocks in order."""
        order = {name: number for number, name in enumerate(self.blocks)}
        parts = sorted(self.journal.parts.items(), key=lambda item: (order.get(item[0], -1), item[0]))
        return [part.file for _, part in parts]

    def show_finished(self, config: WeightConfig) -> None:
        """Put compressed layers, on the meta device, in the place of those that an earlier run compressed."""
        from tensormill.compress.checkpoint import read_header
        from tensormill.compress.formats.checkpoint_format import FLOAT_DTYPES
        from tensormill.ops.linear_wna16.module import LinearWNA16

        shown = compressed_linears(self.model)
        for part in self.journal.parts.values():
            stored = read_header(part.file)
            for layer in part.layers:
                if layer.name in shown:
                    continue
                linear = self.model.get_submodule(layer.name)
                assert isinstance(linear, nn.Linear)
                packed = LinearWNA16(
                    linear.in_features,
                    linear.out_features,
                    bits=layer.bits,
                    group_size=layer.group_size,
                    symmetric=config.symmetric,
                    bias=linear.bias is not None,
                    dtype=FLOAT_DTYPES[
                        stored[self._stored_name(f"{layer.name}.{self.layout.scale_part}")].dtype
                    ],
                    device="meta",
                )
                owner, _, last = layer.name.rpartition(".")
                setattr(self.model.get_submodule(owner), last, packed)

    def _copy(self, journal: Journal, part: str, names: Sequence[str]) -> None:
        tensors = {}
        for name in names:
            tensor = read_tensor(self.info.tensors[name])
            if tensor.is_floating_point():
                if not is_finite(tensor):
                    raise CheckpointError(_not_finite(self.info, name))
                # Through the dtype in which it would lie in memory.
                tensor = tensor.to(_state_dtype(self.model, name))
                if self.dtype is not None and name not in self._float32:
                    tensor = tensor.to(self.dtype)
            tensors[self._stored_name(name)] = tensor
        journal.finish(part, tensors, [])

    def _write(self, job: Callable[[], Any], copied: torch.cuda.Event | None) -> None:
        """Hand a job to the writing thread, after the one before is done: two at most hold memory.

        The job reads what a GPU has copied by the event `copied`.
        """

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            job()

        self._wait_for_block()
        while self._writing_outside and self._writing_outside[0].done():
            self._writing_outside.pop(0).result()
        self._writing = self._writer.submit(write)

    def _wait_for_block(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _can_go_on_after(self, name: str) -> bool:
        """Whether the hidden states that reach what follows a block, or later ones, are kept."""
        reached = self.journal.inputs[0] if self.journal.inputs is not None else 0
        index = self.blocks.index(name)
        return index < reached or (index == reached and self._following(name) is None)

    def _is_time_to_keep(self) -> bool:
        passed = time.monotonic() - self._last_kept
        wanted = self._keeps_every_input or passed >= _PAUSE * self._keeping_took
        return wanted and self.ranks.size == 1

    def _stored_name(self, name: str) -> str:
        """What a tensor of the result is called in the files: a packed layer's lies where its weight lay."""
        found = self.info.tensors.get(name)
        if found is not None:
            return found.name
        owner, _, part = name.rpartition(".")
        return f"{self.info.tensors[f'{owner}.weight'].name.rpartition('.')[0]}.{part}"

    def _names(self, name: str | None) -> list[str]:
        return [key for key in self._stored if key.startswith(f"{name}.")] if name else []

    def _following(self, name: str) -> str | None:
        index = self.blocks.index(name) + 1 if name in self.blocks else len(self.blocks)
        return self.blocks[index] if index < len(self.blocks) else None


def open_source(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, CheckpointInfo]:
    """A checkpoint's model without weights, and where these are, for `OnDisk`.

    Raises:
        CheckpointError: as for `open_model`.
        ModelError: its tensors can't be read part by part.
    """
    info = inspect_checkpoint(path)
    check_not_quantized(info)
    model, info = open_unloaded(info, dtype)
    reason = why_not_part_by_part(model, info)
    if reason is not None:
        raise ModelError(
            f"given {path}, which can't be compressed from disk to disk ({reason}); compress it in memory, "
            "with stream=False"
        )
    return model, info


def compress_on_disk(
    model: PreTrainedModel,
    info: CheckpointInfo,
    step: Step,
    calibration: Calibration | None,
    layout: CheckpointFormat,
    journal: Journal | JournalElsewhere,
    *,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> tuple[MethodReport, list[Path]]:
    """Compress a checkpoint's model; finished parts go into the journal's directory.

    Args:
        model, info: as `open_source` gives them; the model's layers are compressed afterwards, on the meta device.
        step: the method and its settings.
        calibration: tokens to observe; None if the method needs none.
        layout: format of the result.
        journal: of this run, or of one with the same fingerprint that didn't end.
        device: where blocks are computed.
        ranks: the processes that share the calibration; those that don't write have no files of the result.
        progress: called as `progress(message, fraction)`.

    Returns:
        The method's report, and the files of the result.

    Raises:
        TensormillError: a damaged checkpoint, a model that the method can't handle, a full disk.
    """
    config = step.config
    residence = OnDisk(
        model, info, layout, journal, device, ranks=ranks,
        keeps_every_input=getattr(config, "inputs", "original") != "original",
    )  # fmt: skip
    inside = tuple(f"{block}." for block in residence.blocks)
    kept = set(left_out(model))
    outside = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and not name.startswith(inside)
        and name not in kept
        and config.touches(name)
    ]
    try:
        residence.write_outside(outside)
        report = METHODS[step.method][1](model, config, calibration, progress, residence=residence)
        residence.wait()
    except TensormillError:
        residence.wait()  # if writing failed too, that came first
        raise
    finally:
        residence.close()
    if not ranks.leads:
        return report, []
    residence.show_finished(config)
    return report, residence.files()


def fingerprint(
    info: CheckpointInfo,
    method: str,
    config: WeightConfig,
    calibration: Calibration | None,
    **settings: Any,
) -> dict[str, Any]:
    """All that determines the result of a run, as JSON's types.

    Source files count by name, size and time of last change.
    """
    files = sorted({tensor.file for tensor in info.tensors.values()})
    return {
        "source": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "config.json": info.config,
        "method": method,
        "settings": _plain(asdict(config)),
        "calibration": _digest(calibration),
        "versions": [
            importlib.import_module(name).__version__ for name in ("tensormill", "torch", "transformers")
        ],
        **settings,
    }


def _digest(calibration: Calibration | None) -> str:
    digest = hashlib.sha256()
    for tokens, inputs in () if calibration is None else calibration.chunks(len(calibration.tokens)):
        for name, tensor in [("", tokens), *sorted(inputs.items())]:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Name and value of a module's own parameters and buffers."""
    own = [*module._parameters.items(), *module._buffers.items()]
    return [(key, tensor) for key, tensor in own if tensor is not None]


def _replace(module: nn.Module, key: str, tensor: Tensor) -> None:
    if key in module._parameters:
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        module._parameters[key] = tensor
    else:
        module._buffers[key] = tensor


def _state_dtype(model: nn.Module, name: str) -> torch.dtype:
    owner, _, key = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), key)
    return tensor.dtype


def _in_files(sizes: Sequence[tuple[str, int]]) -> list[list[str]]:
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes:
        if not groups or size > room:
            groups.append([])
            room = _OUTSIDE_BYTES
        groups[-1].append(name)
        room -= size
    return groups


def _not_finite(info: CheckpointInfo, name: str) -> str:
    stored = info.tensors[name]
    return f"{stored.name} in {stored.file} has NaN or infinity, expected finite weights; get a sound copy"

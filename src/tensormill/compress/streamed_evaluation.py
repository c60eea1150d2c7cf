"""How well a model predicts a text, original and compressed, both read from disk block by block.

The held-out windows go through a block of the original, through the same block rounded to nearest and through the
compressed one, each on its own hidden states; at the end norm and head give the same figures as `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensormill.compress.block_calls import BlockCall, record_calls
from tensormill.compress.checkpoint import CheckpointInfo
from tensormill.compress.evaluate import Evaluation, Score, Windows, check_vocabulary, score_batch
from tensormill.compress.formats.checkpoint_format import CheckpointFormat
from tensormill.compress.formats.quantization import quantize_weight
from tensormill.compress.journal import JournalElsewhere
from tensormill.compress.methods import WeightConfig, replace_linear
from tensormill.compress.precision import computing_dtype, widened
from tensormill.compress.stages import Progress
from tensormill.compress.streaming import OnDisk
from tensormill.compress.unloaded import open_unloaded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_TOKENS = 4096


class PackedOnDisk(OnDisk):
    """A compressed model on the meta device whose parts are read, and unpacked, from a checkpoint.

    Args:
        info: of the checkpoint.
        layout: its format.
        device: where parts are lent to.
    """

    def __init__(self, info: CheckpointInfo, layout: CheckpointFormat, device: torch.device) -> None:
        model, info = open_unloaded(info)
        super().__init__(model, info, layout, JournalElsewhere({}), device)
        assert info.quantization is not None
        self._schemes = layout.schemes(model, info.tensors, layout.parse_config(info.quantization))

    def _names(self, name: str | None) -> list[str]:
        return [key for key in self.info.tensors if key.startswith(f"{name}.")] if name else []

    @contextmanager
    def _part(self, name: str) -> Iterator[nn.Module]:
        inside = [layer for layer in self._schemes if layer.startswith(f"{name}.")]
        linears = {layer: self.model.get_submodule(layer) for layer in inside}
        try:
            with super()._part(name) as module:
                yield module
        finally:
            for layer, linear in linears.items():
                self._put(layer, linear)

    def _read(self, name: str) -> dict[str, Tensor]:
        """Puts the compressed layers into their places; gives the other tensors."""
        read = super()._read(name)
        for layer, scheme in self._schemes.items():
            packed = {
                key.removeprefix(f"{layer}."): read.pop(key).to(self.device)
                for key in list(read)
                if key.startswith(f"{layer}.")
            }
            if packed:
                self._put(layer, self.layout.unpack_linear(packed, scheme, layer))
        return read

    def _put(self, layer: str, module: nn.Module) -> None:
        owner, _, last = layer.rpartition(".")
        setattr(self.model.get_submodule(owner), last, module)


class _AtHead:
    """A model whose blocks ran already, as `evaluate.BodyAndHead`."""

    def __init__(self, residence: OnDisk, outputs: Sequence[int], hidden: Callable[[], Tensor]) -> None:
        self.model = residence.model
        self.device = residence.home
        self._blocks = [self.model.get_submodule(name) for name in residence.blocks]
        self._outputs, self._hidden, self._computes_on = outputs, hidden, residence.device

    def hidden(self, ids: Tensor) -> Tensor:
        return self._hidden()

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        there = hidden.to(self._computes_on)

        def passing_by(is_last: bool, outputs: int) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                output = there if is_last else args[0] if args else kwargs["hidden_states"]
                return (output, *[None] * (outputs - 1)) if outputs else output

            return run

        for index, block in enumerate(self._blocks):
            block.forward = passing_by(index + 1 == len(self._blocks), self._outputs[index])
        try:
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        finally:
            for block in self._blocks:
                del block.forward
        return logits.float()


@torch.no_grad()
def evaluate_on_disk(
    original: CheckpointInfo,
    compressed: CheckpointInfo,
    layout: CheckpointFormat,
    tokenizer: PreTrainedTokenizerBase,
    text: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    rounded: WeightConfig | None = None,
    kept: Collection[str] = (),
    device: torch.device | str = "cpu",
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Evaluate a model and its compressed form, neither of which is in memory whole.

    Args:
        original: the checkpoint in floating point.
        compressed: the same, compressed inside its blocks only.
        layout: format of `compressed`.
        tokenizer: of both.
        text: by name.
        dtype: of the original's weights; None takes the checkpoint's.
        rounded: bits and groups of the round-to-nearest baseline; None measures none.
        kept: names of the linear layers which that leaves as they are.
        device: where blocks are computed.
        max_tokens: use only the first so many tokens.
        progress: called with a message and the share done.

    Returns:
        Evaluations by "original", "compressed" and "rtn", as of `evaluate_models`.

    Raises:
        DataError: too little text, or ids that the model doesn't have.
    """
    place = torch.device(device)
    source = OnDisk(*open_unloaded(original, dtype), layout, JournalElsewhere({}), place)
    packed = PackedOnDisk(compressed, layout, place)
    runs: dict[str, OnDisk] = {"original": source, "compressed": packed}
    if rounded is not None:
        runs["rtn"] = source
    try:
        windows = Windows.cut(tokenizer, text, [source.model], max_tokens=max_tokens)
        check_vocabulary(source.model, windows.ids)
        batches = windows.ids.split(max(1, _BATCH_TOKENS // windows.ids.shape[1]))
        streams = {name: _Stream(residence, batches) for name, residence in runs.items()}
        for index, block in enumerate(source.blocks):
            if progress is not None:
                progress(f"evaluating: block {index + 1} of {len(source.blocks)}", index / len(source.blocks))
            with source.part(block) as module:
                streams["original"].advance(index, module)
                if rounded is not None:
                    _round(module, block, rounded, kept)
                    streams["rtn"].advance(index, module)
            with packed.part(block) as module:
                streams["compressed"].advance(index, module)
        scores = {
            name: Score.blank(len(windows.ids), compared=name != "original")
            for name in sorted(runs, key=_first)
        }
        with source.entrance(), packed.entrance():
            first = 0
            for number, ids in enumerate(batches):
                heads = {name: streams[name].at_head(number) for name in scores}
                score_batch(heads, scores, ids, slice(first, first + len(ids)), "original")
                first += len(ids)
    finally:
        source.close()
        packed.close()
    for score in scores.values():
        score.finish(windows.ids.shape[1])
    return {name: windows.evaluation(scores[name]) for name in runs}


class _Stream:
    """The hidden states of one model on all windows, on the CPU, between two blocks."""

    def __init__(self, residence: OnDisk, batches: Sequence[Tensor]) -> None:
        self.residence = residence
        self.hidden: list[Tensor] = []
        self.calls: list[list[BlockCall]] = []
        self.outputs: list[int] | None = None
        self._dtype = computing_dtype(next(residence.model.parameters()).dtype, residence.device)
        with residence.entrance():
            for ids in batches:
                hidden, calls, self.outputs = record_calls(
                    residence.model, residence.blocks, ids, self.outputs, residence=residence
                )
                self.hidden.append(hidden)
                self.calls.append(calls)

    def advance(self, index: int, module: nn.Module) -> None:
        """Run block `index`."""
        with widened(module):
            for number, hidden in enumerate(self.hidden):
                if index > 1:
                    self.calls[number][index - 2].forget()
                call = self.calls[number][index].to(self.residence.device).to(self._dtype)
                self.hidden[number] = call.run(module, hidden.to(self.residence.device, self._dtype)).cpu()

    def at_head(self, number: int) -> _AtHead:
        """What is left to compute for batch `number`."""
        assert self.outputs is not None
        dtype = next(self.residence.model.parameters()).dtype
        return _AtHead(self.residence, self.outputs, lambda: self.hidden[number].to(dtype))


def _round(module: nn.Module, block: str, config: WeightConfig, kept: Collection[str]) -> None:
    """Round a block's linears to nearest, but for those of the names in `kept`, in place."""
    for name, linear in list(module.named_modules()):
        full_name = f"{block}.{name}"
        if type(linear) is nn.Linear and full_name not in kept and config.touches(full_name):
            dtype = linear.weight.dtype
            spec = config.spec_of(full_name, dtype)
            replace_linear(module, name, quantize_weight(linear.weight.detach(), spec), dtype)


def _first(name: str) -> bool:
    """Sorts the reference before the others."""
    return name != "original"

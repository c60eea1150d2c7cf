"""Calibration: text to tokens, tokens through a model block by block, and statistics of what linear layers
read.

Blocks run one after the other on all calibration tokens, so that one block and the hidden states between two
blocks are all that computing needs; a model on the CPU can be compressed with a GPU that holds one block at a
time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensormill.compress.block_calls import BlockCall, Stop, record_calls
from tensormill.compress.experts import expert_lists
from tensormill.compress.fold import fold
from tensormill.compress.output_error import search_numbers
from tensormill.compress.precision import computing_dtype, gram_precision, widened
from tensormill.compress.ranks import ALONE, Ranks
from tensormill.compress.residence import InMemory, Residence
from tensormill.compress.structure import (
    BlockStructure,
    ModelStructure,
    ScaleMapping,
    discover,
    linear_in,
    text_config,
)
from tensormill.compress.text import read_texts
from tensormill.errors import DataError, InvalidArgument, ModelError

if TYPE_CHECKING:
    from tensormill.compress.methods import LayerReport

Progress = Callable[[str, float], None]
"""Called as `progress(message, fraction)`, fraction from 0 to 1."""

# Tokens that run through a block at once: enough to fill the device, few enough that an MLP's intermediate
# activations stay small beside its weights.
_CHUNK_TOKENS = {"cpu": 4096, "cuda": 4096}

# Tokens per input feature below which an expert is observed on all tokens of its layer. On Gaussian inputs
# (256 features, 3 bits) AWQ's scales and ranges from an expert's own tokens are better than those from all
# tokens from 1/16 on where the expert's channels differ a lot from the layer's (a factor of e, say), from 1 on
# where they hardly do.
_TOKENS_PER_FEATURE = 1 / 4


@dataclass(frozen=True)
class Calibration:
    """Token windows on which a method observes the model.

    Attributes:
        tokens: (samples, length) int64.
        inputs: what else the model is called with for each window, by keyword and with a batch dimension of 1
            (pixel values, say); None for text alone.
        lengths: how many tokens of each window count, from its beginning; None counts all.

    Raises:
        DataError: no tokens, or inputs or lengths that don't fit them.

    >>> Calibration(torch.arange(1024).view(2, 512)).tokens.shape
    torch.Size([2, 512])
    """

    tokens: Tensor
    inputs: Sequence[Mapping[str, Tensor]] | None = None
    lengths: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2 or self.tokens.dtype != torch.int64 or self.tokens.numel() == 0:
            raise DataError(
                f"given calibration tokens of shape {tuple(self.tokens.shape)} and {self.tokens.dtype}, "
                "expected a non-empty int64 tensor [samples, length]"
            )
        samples, length = self.tokens.shape
        for name, given in (("inputs", self.inputs), ("lengths", self.lengths)):
            if given is not None and len(given) != samples:
                raise DataError(
                    f"given {name} of {len(given)} windows, expected {samples} as there are tokens"
                )
        if self.lengths is not None and not all(1 <= each <= length for each in self.lengths):
            raise DataError(f"given lengths {list(self.lengths)[:8]}, expected 1 to {length} tokens each")

    def part(self, windows: slice) -> Calibration:
        """Some of the windows."""
        return Calibration(
            self.tokens[windows],
            None if self.inputs is None else self.inputs[windows],
            None if self.lengths is None else self.lengths[windows],
        )

    def chunks(self, samples: int) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
        """Tokens (batch, length) and further inputs, up to `samples` windows at a time: one where windows have
        inputs or lengths of their own.
        """
        if self.inputs is None and self.lengths is None:
            for tokens in torch.split(self.tokens, samples):
                yield tokens, {}
            return
        for index, tokens in enumerate(self.tokens):
            length = len(tokens) if self.lengths is None else self.lengths[index]
            yield tokens[None, :length], {} if self.inputs is None else self.inputs[index]

    @classmethod
    def from_text(
        cls, text: str | Sequence[str], tokenizer: Any, *, samples: int = 128, length: int = 512
    ) -> Calibration:
        """Cut text in `samples` windows of `length` tokens, spread evenly over all of it.

        Args:
            text: one text or several, which are joined by an empty line.
            tokenizer: a transformers tokenizer; no special tokens are added, since windows begin anywhere.
            samples: number of windows.
            length: tokens of a window.

        Raises:
            DataError: the text is empty or too short.
        """
        if samples < 1 or length < 1:
            raise InvalidArgument(f"given {samples} samples of {length} tokens, expected at least 1 of each")
        text = text if isinstance(text, str) else "\n\n".join(text)
        if not text.strip():
            raise DataError("given an empty calibration text, expected running text; pass another file")
        pieces = _spread(text, samples, length, tokenizer)
        ids = [number for piece in pieces for number in _tokenize(tokenizer, piece)]
        if len(ids) < samples * length and len(pieces) > 1:
            ids = _tokenize(tokenizer, text)
        windows = len(ids) // length
        if windows < samples:
            raise DataError(
                f"given a calibration text of {len(ids)} tokens, expected at least {samples * length} "
                f"({samples} samples x {length} tokens); pass more text, or at most {windows} samples"
            )
        chosen = torch.arange(samples) * windows // samples
        return cls(torch.tensor(ids[: windows * length]).view(windows, length)[chosen])

    @classmethod
    def from_pairs(
        cls, file: str | os.PathLike[str], processor: Any, *, samples: int = 128, length: int = 512
    ) -> Calibration:
        """Windows of an image and a text each, for models that read images.

        Args:
            file: JSON lines `{"image": path, "text": "..."}`, paths relative to the file.
            processor: a transformers processor. Its chat template is used where it has one, else its image
                token goes before texts that hold none.
            samples: number of windows at most, spread evenly over the file.
            length: tokens of a window at most; an image is never cut.

        Raises:
            DataError: a line or an image can't be read; names it.
            InvalidArgument: Pillow isn't installed.
        """
        if samples < 1 or length < 1:
            raise InvalidArgument(f"given {samples} samples of {length} tokens, expected at least 1 of each")
        pairs = read_pairs(file)
        count = min(samples, len(pairs))
        windows, inputs = [], []
        for index in range(count):
            tokens, more = _process_pair(*pairs[index * len(pairs) // count], processor, length)
            windows.append(tokens)
            inputs.append(more)
        lengths = [len(window) for window in windows]
        return cls(torch.nn.utils.rnn.pad_sequence(windows, batch_first=True), inputs, lengths)


def read_pairs(file: str | os.PathLike[str]) -> list[tuple[Path, str]]:
    """Path of the image and text of every line `{"image": path, "text": "..."}` of a file.

    Raises:
        DataError: the file or a line can't be read, or an image doesn't exist.
    """
    pairs = []
    for number, line in enumerate(read_texts([file])[str(file)].splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            image, text = entry["image"], entry["text"]
        except (ValueError, KeyError, TypeError):
            image = text = None
        if not isinstance(image, str) or not isinstance(text, str):
            raise DataError(f'line {number} of {file} is not {{"image": path, "text": "..."}}; correct it')
        path = Path(file).parent / image
        if not path.is_file():
            raise DataError(f"line {number} of {file} names the image {image}, which doesn't exist")
        pairs.append((path, text))
    return pairs


def _process_pair(path: Path, text: str, processor: Any, length: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Tokens (length,), and what the model is called with besides."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise InvalidArgument(
            "images are read with Pillow, which is not installed; pip install pillow"
        ) from None
    mark = getattr(processor, "image_token", None)
    if mark is None or mark not in text:
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        elif mark is not None:
            text = f"{mark}\n{text}"
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"the image {path} can't be read: {error}") from error
    encoded = dict(processor(images=[image], text=[text], return_tensors="pt"))
    tokens = encoded.pop("input_ids")
    encoded.pop("attention_mask", None)
    held = (tokens[0] == getattr(processor, "image_token_id", -1)).nonzero().flatten()
    kept = min(tokens.shape[1], max(length, int(held.max()) + 1 if held.numel() else 0))
    more = {
        name: value[:, :kept] if value.shape == tokens.shape else value
        for name, value in encoded.items()
        if isinstance(value, Tensor)
    }
    return tokens[0, :kept], more


def _spread(text: str, samples: int, length: int, tokenizer: Any) -> list[str]:
    """Evenly spread slices of about the wanted number of tokens: long texts aren't tokenized whole."""
    probe = text[: 1 << 16]
    tokens = max(1, len(_tokenize(tokenizer, probe)))
    wanted = int(1.25 * samples * length * len(probe) / tokens)
    if wanted * 2 > len(text):
        return [text]
    stride, size = len(text) // samples, wanted // samples
    starts = (text.find("\n", index * stride, index * stride + stride // 4) + 1 for index in range(samples))
    begins = (start or index * stride for index, start in enumerate(starts))
    return [text[begin : begin + size] for begin in begins]


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


@dataclass
class InputStatistics:
    """What is known of the input x (tokens, K) of some linear layers.

    Attributes:
        gram: (K, K) float32, the mean over tokens of x x^T.
        mean_abs: (K,) float32, the mean over tokens of |x|.
        tokens: how many tokens were seen.
        routed: of an expert that too few tokens were routed to: how many. The statistics are then those of
            all tokens that reach its layer.
    """

    gram: Tensor
    mean_abs: Tensor
    tokens: int
    routed: int | None = None

    @property
    def second_moment(self) -> Tensor:
        """(K,) float32, the mean over tokens of x^2."""
        return self.gram.diagonal()

    def to_dict(self) -> dict[str, Any]:
        """What a layer's report says of them: nothing, unless an expert saw too few tokens."""
        if self.routed is None:
            return {}
        return {"calibrated_on": "all tokens of the layer", "routed_tokens": self.routed}

    def divide(self, scale: Tensor) -> None:
        """Make these the statistics of x / scale, for scale (K,), in place."""
        for rows in _panels(len(scale), search_numbers(scale.device) // len(scale)):
            self.gram[rows].div_(torch.outer(scale[rows], scale))
        self.mean_abs.div_(scale)


def _panels(rows: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` rows, or one."""
    step = max(1, step)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class GramAccumulator:
    """Adds up x^T x and |x| over chunks of x (tokens, K) in float32.

    Only panels on and above the diagonal are computed. Activations of 16 bits take the matrix units' 16-bit
    paths where those lose nothing: products of bfloat16 numbers (float16 too, with TF32) are exact in the
    float32 sum.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.gram = torch.zeros(features, features, device=device)
        self.abs_sum = torch.zeros(features, dtype=torch.float64, device=device)
        self.tokens = 0
        self.finished: InputStatistics | None = None
        self.panel = 384 if device.type == "cpu" else 2048

    def add(self, x: Tensor) -> None:
        """Take in x (..., K)."""
        x = x.detach().flatten(0, -2)
        self.tokens += x.shape[0]
        with gram_precision(x):
            x = x.float()
            self.abs_sum += x.abs().sum(dim=0)
            for rows in _panels(x.shape[1], self.panel):
                self.gram[rows, rows.start :].addmm_(x[:, rows].T, x[:, rows.start :])

    def add_others(self, ranks: Ranks) -> None:
        """Take in what all processes of a group saw, once."""
        if self.finished is not None:
            return
        tokens = torch.tensor([self.tokens], device=self.gram.device)
        for values in (self.gram, self.abs_sum, tokens):
            ranks.add(values)
        self.tokens = int(tokens)

    def finish(self) -> InputStatistics:
        """The means over all tokens, one object however often it is asked for; nothing more can be added."""
        if self.finished is None:
            gram = self.gram.div_(self.tokens)
            # The lower triangle is filled in place: beside a large matrix there may be no room for a second one.
            for rows in _panels(len(gram), self.panel):
                gram[rows.stop :, rows] = gram[rows, rows.stop :].T
                corner = gram[rows, rows].triu()
                gram[rows, rows] = corner + corner.triu(1).T
            self.finished = InputStatistics(gram, (self.abs_sum / self.tokens).float(), self.tokens)
        return self.finished


@dataclass
class CalibrationBlock:
    """One block with the hidden states that reach it.

    Attributes:
        structure: the block's names and edges.
        module: the block, on the computing device.
        hidden: the inputs, a list of (batch, length, hidden).
        calls: what the model passes to the block besides, per chunk.
        keeps_inputs: whether `hidden` is needed after all linears were observed once; if not, the outputs take
            its place as they come.
        outputs: the block's outputs as last computed with all chunks, or None.
        captured: inputs of modules, as `observe` was asked to keep.
        ranks: the processes that share the calibration; `hidden` is this one's share.
        layers: reports on the layers compressed in it, for the caller to fill.
    """

    structure: BlockStructure
    module: nn.Module
    hidden: list[Tensor]
    calls: list[BlockCall]
    keeps_inputs: bool = True
    outputs: list[Tensor] | None = None
    captured: dict[str, list[BlockCall]] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    ranks: Ranks = ALONE

    @property
    def name(self) -> str:
        """The block's name in the model."""
        return self.structure.name

    def full_name(self, name: str) -> str:
        """The name in the model of a module of this block."""
        return f"{self.name}.{name}"

    @torch.no_grad()
    def advance(self) -> list[Tensor]:
        """Run the block with its weights as they are now; its outputs take the place of `hidden`."""
        with widened(self.module):
            for chunk, call in enumerate(self.calls):
                self.hidden[chunk] = call.run(self.module, self.hidden[chunk])
        return self.hidden

    @torch.no_grad()
    def observe(
        self,
        linears: Sequence[str] | None = None,
        *,
        capture: Sequence[str] = (),
        capture_samples: int = 0,
        tokens_per_feature: float = _TOKENS_PER_FEATURE,
    ) -> dict[str, InputStatistics]:
        """Run the block on all chunks, and gather statistics of what linear layers read.

        Args:
            linears: names of `nn.Linear`s; None takes all, and keeps the block's outputs in `outputs`. With
                fewer the run ends at the last of them.
            capture: modules whose inputs are kept in `captured` as calls, one per chunk.
            capture_samples: over how many samples at least, in whole chunks.
            tokens_per_feature: an expert is observed on the tokens routed to it. Where these are fewer than
                so many for each input feature, they say too little about the inputs' covariance, and a second
                run shows the expert all tokens that reach its layer.

        Returns:
            Statistics by linear; those that read the same tensor share one object.

        Raises:
            InvalidArgument: an input holds NaN or infinity; names the layer.
        """
        wanted = self.structure.linears if linears is None else tuple(linears)
        groups = [[name for name in group if name in wanted] for group in self.structure.input_groups]
        groups = [group for group in groups if group]
        accumulators: dict[str, GramAccumulator] = {}
        self.captured = {name: [] for name in capture}
        experts = [group[0] for group in groups if self.list_of_experts(group[0])]
        # Experts may have to be shown the inputs once more.
        keeps_inputs = self.keeps_inputs or linears is not None or bool(experts)
        outputs = list(self.hidden) if keeps_inputs else self.hidden
        chunk = 0

        def gather(name: str, last: bool) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0]
                if name not in accumulators:
                    accumulators[name] = GramAccumulator(x.shape[-1], x.device)
                accumulators[name].add(x)
                if last:
                    raise Stop

            return hook

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if chunk * len(self.hidden[0]) < capture_samples:
                    self.captured[name].append(BlockCall(args, kwargs))

            return hook

        with ExitStack() as stack:
            stack.enter_context(widened(self.module))
            for group in groups:
                last = linears is not None and group is groups[-1]
                part = self.module.get_submodule(group[0])
                stack.callback(part.register_forward_pre_hook(gather(group[0], last)).remove)
            for name in capture:
                part = self.module.get_submodule(name)
                stack.callback(part.register_forward_pre_hook(keep(name), with_kwargs=True).remove)
            for chunk, call in enumerate(self.calls):
                with suppress(Stop):
                    outputs[chunk] = call.run(self.module, self.hidden[chunk])
        if linears is None:
            self.outputs = outputs
        routed = torch.tensor([getattr(accumulators.get(name), "tokens", 0) for name in experts])
        routed = routed.to(self.hidden[0].device)
        self.ranks.add(routed)
        starved = {
            name: seen
            for name, seen in zip(experts, routed.tolist(), strict=True)
            if seen < tokens_per_feature * linear_in(self.module, name).in_features
        }
        if starved:
            accumulators |= self._show_all(list(starved))
        return {
            name: statistics
            for group in groups
            for name, statistics in self._finish(group, accumulators, starved.get(group[0]))
        }

    def list_of_experts(self, name: str) -> str | None:
        """The list of experts that a linear belongs to, None if it belongs to none."""
        lists = (path for path, _ in expert_lists(self.module))
        return next((path for path in lists if name.startswith(f"{path}.")), None)

    def _show_all(self, linears: Sequence[str]) -> dict[str, GramAccumulator]:
        """What linears of experts read when every token of their layer is sent to them."""
        accumulators: dict[str, GramAccumulator] = {}
        by_list: dict[str, list[str]] = {}
        for name in linears:
            by_list.setdefault(str(self.list_of_experts(name)), []).append(name)

        def show(path: str, names: Sequence[str]) -> Callable[..., None]:
            experts = self.module.get_submodule(path)

            def gather(name: str, shared: GramAccumulator, source: Tensor) -> Callable[..., None]:
                def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                    x = args[0]
                    if x is source:
                        accumulators[name] = shared
                        return
                    if name not in accumulators:
                        accumulators[name] = GramAccumulator(x.shape[-1], x.device)
                    accumulators[name].add(x)

                return hook

            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                x = args[0].flatten(0, -2)
                # What all experts of a layer read is one tensor, added up once.
                if path not in entries:
                    entries[path] = GramAccumulator(x.shape[-1], x.device)
                entries[path].add(x)
                with ExitStack() as stack:
                    for name in names:
                        part = self.module.get_submodule(name)
                        hook = part.register_forward_pre_hook(gather(name, entries[path], x))
                        stack.callback(hook.remove)
                    for index in sorted({int(name[len(path) + 1 :].partition(".")[0]) for name in names}):
                        experts.get_submodule(str(index))(x)

            return hook

        entries: dict[str, GramAccumulator] = {}
        with ExitStack() as stack:
            stack.enter_context(widened(self.module))
            for path, names in by_list.items():
                part = self.module.get_submodule(path)
                stack.callback(part.register_forward_pre_hook(show(path, names)).remove)
            for call, x in zip(self.calls, self.hidden, strict=True):
                call.run(self.module, x)
        return accumulators

    def _finish(
        self, group: list[str], accumulators: dict[str, GramAccumulator], routed: int | None = None
    ) -> Iterator[tuple[str, InputStatistics]]:
        names = " and ".join(self.full_name(name) for name in group)
        accumulator = accumulators.get(group[0])
        if accumulator is None:  # others may have tokens that reach it
            features = linear_in(self.module, group[0]).in_features
            accumulator = GramAccumulator(features, self.hidden[0].device)
        accumulator.add_others(self.ranks)
        if accumulator.tokens == 0:
            raise InvalidArgument(f"given calibration tokens that never reach {names}, expected other text")
        statistics = accumulator.finish()
        if routed is not None:
            statistics = replace(statistics, routed=routed)
        # The extremes of a matrix with NaN are NaN.
        if not torch.isfinite(torch.stack(torch.aminmax(statistics.gram))).all():
            raise InvalidArgument(
                f"given NaN or infinity in the input of {names}, expected finite activations; check the "
                "checkpoint, or run the model in float32 or bfloat16"
            )
        for name in group:
            yield name, statistics


@torch.no_grad()
def stream_blocks(
    model: nn.Module,
    structure: ModelStructure,
    calibration: Calibration,
    *,
    device: torch.device | str | None = None,
    inputs: str = "original",
    progress: Progress | None = None,
    residence: Residence | None = None,
) -> Iterator[CalibrationBlock]:
    """Yield the blocks in order, each on `device` with the hidden states that reach it.

    The caller may change the block, and notes what it did in its `layers`; it goes back to where it was afterwards.
    Blocks that an earlier run finished are passed over.

    Args:
        model: a causal language model, called as `model(tokens)`.
        structure: of the model.
        calibration: the tokens.
        device: where blocks run; None stays where the model is.
        inputs: "original" feeds the next block what the unchanged block gave (AWQ), "compressed" what the
            changed block gives (GPTQ).
        progress: told after each block.
        residence: of the model, with a device of its own; None stands for one in memory.
    """
    if inputs not in ("original", "compressed"):
        raise InvalidArgument(f"given inputs={inputs!r}, expected 'original' or 'compressed'")
    _check_tokens(model, calibration.tokens)
    names = [block.name for block in structure.blocks]
    residence = residence or InMemory(model, device)
    device = residence.device
    ranks = residence.ranks
    if len(calibration.tokens) < ranks.size:
        raise InvalidArgument(
            f"given {len(calibration.tokens)} calibration samples for {ranks.size} processes, expected at least one "
            "for each"
        )
    share = calibration.part(ranks.own(len(calibration.tokens)))
    batch = max(1, _CHUNK_TOKENS.get(device.type, 4096) // share.tokens.shape[1])
    dtype = computing_dtype(next(model.parameters()).dtype, device)
    beginning, kept = residence.kept_inputs()
    hidden: list[Tensor] = kept or []
    calls: list[list[BlockCall]] = []
    outputs = [block.outputs for block in structure.blocks]
    home, stored = residence.home, next(model.parameters()).dtype
    with residence.entrance():
        for tokens, besides in share.chunks(batch):
            more = {
                name: value.to(home, stored) if value.is_floating_point() else value.to(home)
                for name, value in besides.items()
            }
            first, chunk_calls, _ = record_calls(model, names, tokens.to(home), outputs, inputs=more)
            calls.append(chunk_calls)
            if kept is None:
                hidden.append(first.to(device, dtype))
    # A run that goes on from kept hidden states would miss what earlier blocks left.
    hands_on = any(call.may_hand_on() for call in calls[0])
    training = model.training
    model.eval()
    try:
        for index, block_structure in enumerate(structure.blocks):
            if index < beginning:
                continue
            for chunk in calls if index > 1 else ():
                chunk[index - 2].forget()
            if progress is not None:
                progress(f"block {index + 1} of {len(names)}", index / len(names))
            with residence.part(block_structure.name) as module:
                block_calls = [chunk[index].to(device).to(dtype) for chunk in calls]
                block = CalibrationBlock(
                    block_structure, module, hidden, block_calls, inputs != "original", ranks=ranks
                )
                if residence.is_finished(block.name):
                    block.advance()
                    continue
                yield block
                if inputs != "original":
                    if index + 1 < len(names):
                        block.advance()
                elif block.outputs is None:
                    raise InvalidArgument(
                        "given a block that was not observed, expected observe() before it changes"
                    )
                else:
                    # They lie beside the inputs where experts may have been shown these once more.
                    hidden[:] = block.outputs
                residence.finish(block.name, block.layers, None if hands_on else hidden)
        if progress is not None:
            progress("done", 1.0)
    finally:
        model.train(training)


def _check_tokens(model: nn.Module, tokens: Tensor) -> None:
    config = text_config(model)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and tokens.shape[1] > longest:
        raise DataError(
            f"given calibration windows of {tokens.shape[1]} tokens, expected at most the model's {longest}; "
            "use a smaller calibration length"
        )
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise DataError(
            f"given calibration tokens from {int(tokens.min())} to {int(tokens.max())}, expected 0 to "
            f"{vocabulary - 1}; use the model's own tokenizer"
        )


@torch.no_grad()
def inject_outliers(
    model: nn.Module,
    fraction: float = 0.01,
    factor: float | tuple[float, float] = 32.0,
    seed: int = 0,
    *,
    mixture: bool = False,
) -> list[str]:
    """Give a model the activation outliers of large language models without changing what it computes, in
    place.

    A random `fraction` of the channels of each norm is multiplied by `factor`, and the columns of the linear
    layers that read them are divided by it. This is the transformation that scale-folding methods can undo,
    so results on such a model belong beside those on the untouched one, and beside the adversarial `mixture`:
    there the channels of each value head are mixed by `I + (factor - 1) u u^T` with a random direction u
    spread over all of them, and the output projection by the inverse. One direction dominates the covariance,
    while no channel stands out.

    Args:
        model: a causal language model.
        fraction: of each norm's channels; at least one channel is taken.
        factor: how much larger, or a range from which each channel's factor is drawn log-uniformly.
        seed: of the random choice.
        mixture: mix value heads instead of scaling norm channels.

    Returns:
        The edges changed, as text.

    Raises:
        InvalidArgument: fraction outside (0, 1], or a factor below 1.
        ModelError: the model has no edge that can take outliers.
    """
    low, high = factor if isinstance(factor, tuple) else (factor, factor)
    if not (0 < fraction <= 1 and 1 <= low <= high < math.inf):
        raise InvalidArgument(
            f"given fraction={fraction} and factor={factor}, expected a fraction in (0, 1] "
            "and factors of at least 1"
        )
    generator = torch.Generator().manual_seed(seed)
    changed = []
    for block_structure in discover(model).blocks:
        block = model.get_submodule(block_structure.name)
        for mapping in block_structure.mappings:
            columns = linear_in(block, mapping.consumers[0]).in_features // mapping.repeats
            if mapping.kind == "norm" and not mixture:
                count = max(1, round(fraction * columns))
                chosen = torch.randperm(columns, generator=generator)[:count]
                exponents = torch.rand(count, generator=generator, dtype=torch.float64)
                scale = torch.ones(columns, dtype=torch.float64)
                scale[chosen] = low ** (exponents - 1) * high**-exponents
                fold(block, mapping, scale.to(linear_in(block, mapping.consumers[0]).weight.device))
            elif mapping.kind == "linear" and mapping.head_dim and mixture:
                _mix_heads(block, mapping, math.sqrt(low * high), generator)
            else:
                continue
            changed.append(f"{block_structure.name}: {mapping}")
    if not changed:
        wanted = "value heads that can be mixed" if mixture else "norms that feed linear layers"
        raise ModelError(
            f"given a {type(model).__name__} in which no {wanted} were found, expected a transformer"
        )
    return changed


def _mix_heads(block: nn.Module, mapping: ScaleMapping, factor: float, generator: torch.Generator) -> None:
    """Multiply each head's channels by I + (factor - 1) u u^T, and their readers' columns by the inverse."""
    producer = linear_in(block, mapping.producer)
    size = mapping.head_dim
    channels = linear_in(block, mapping.consumers[0]).in_features // mapping.repeats
    heads = channels // size
    signs = torch.randint(0, 2, (heads, size), generator=generator).double() * 2 - 1
    directions = (signs / math.sqrt(size)).to(producer.weight.device)

    def mixed(vectors: Tensor, strength: float) -> Tensor:
        along = (vectors * directions.unsqueeze(-1)).sum(dim=1, keepdim=True)
        return vectors + (strength - 1) * along * directions.unsqueeze(-1)

    chosen = mapping.rows(producer.out_features, channels)
    for values in (producer.weight, producer.bias):
        if values is not None:
            rows = values.data[chosen].double()
            values.data[chosen] = mixed(rows.reshape(heads, size, -1), factor).reshape(rows.shape).to(values)
    for name in mapping.consumers:
        weight = linear_in(block, name).weight
        by_head = weight.data.double().T.reshape(heads, mapping.repeats, size, -1).transpose(0, 1)
        inverse = torch.stack([mixed(group, 1 / factor) for group in by_head]).transpose(0, 1)
        weight.data.copy_(inverse.flatten(0, 2).T)

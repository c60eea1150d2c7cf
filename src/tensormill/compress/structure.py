"""Finds, in a model, what compression methods need to know: its blocks, and which layer feeds which linear
layers.

Nothing is looked up by architecture. One forward pass of a block on a few tokens shows which module's output
tensor is which linear layer's input. Every edge found so, or guessed from shapes (value -> output projection,
up -> down projection), is then tried: scale what the producer gives by random positive factors, divide what
the consumers take by the same factors, and compare the block's float64 output. Edges that change it are
dropped: a softmax, a gate's nonlinearity or a second reader of the tensor lies between, and folding a scale
there would change the model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensormill.compress.block_calls import (
    FAILURES,
    BlockCall,
    of_one_line,
    record_calls,
    signature,
    times_changed,
)
from tensormill.compress.experts import ExpertList, expert_lists, is_fused, routers
from tensormill.compress.residence import InMemory, Residence
from tensormill.errors import ModelError

# A block's output after an exact fold differs by rounding: about 1e-15 in float64, 1e-7 where a norm or
# softmax computes in float32 whatever its input. A wrong edge changes it by more than 1e-2.
_UNCHANGED = 1e-5

HOW_TO_PASS_MAPPINGS = (
    "pass mappings=[{'producer': 'input_layernorm', 'consumers': ['self_attn.q_proj', ...]}, ...] "
    "with names as inside a block, '*' standing for an expert's number"
)


@dataclass(frozen=True)
class ScaleMapping:
    """A producer whose output can be divided by per-channel scales that its consumers' columns take up.

    Names are relative to the block. The scale vector has one entry per scaled output channel of the producer:
    `in_features / repeats` of the consumers.

    Attributes:
        producer: a norm, or a linear layer.
        consumers: the linear layers that read it.
        inspected: the module whose output error the paper's scale search measures; the smallest that holds
            all consumers, the consumer itself if there is one.
        kind: what the producer is.
        offset: 1.0 for norms that multiply by `1 + weight` (Gemma), else 0.0.
        repeats: consumer channels per producer channel: 1, or query heads per key-value head.
        head_dim: size of the runs of channels (heads) that may even be mixed with one another; 0 if they may
            only be scaled.
        readers: routers and others that read the producer's output too and keep their precision: their columns take
            up the scales as the consumers' do.
        stride: rows of a linear producer from the end of one scaled head to the end of the next, where other
            rows lie between (a query and a key per head); 0 where the scaled rows are its last ones.
    """

    producer: str
    consumers: tuple[str, ...]
    inspected: str
    kind: Literal["norm", "linear"]
    offset: float = 0.0
    repeats: int = 1
    head_dim: int = 0
    stride: int = 0
    readers: tuple[str, ...] = ()

    def rows(self, out_features: int, channels: int) -> slice | Tensor:
        """Which of a linear producer's `out_features` rows are the `channels` that are scaled, in order."""
        if not self.stride:
            return slice(out_features - channels, out_features)
        first = torch.arange(channels // self.head_dim).unsqueeze(1) * self.stride
        within = torch.arange(self.stride - self.head_dim, self.stride)
        return (first + within).flatten()

    def expand(self, scale: Tensor) -> Tensor:
        """Scales of the consumers' columns (K,) from those of the producer's channels (K / repeats,)."""
        if self.repeats == 1:
            return scale
        return scale.view(-1, self.head_dim).repeat_interleave(self.repeats, dim=0).flatten()

    def reduce(self, values: Tensor) -> Tensor:
        """The largest of the `repeats` values (K,) that share a producer channel (K / repeats,)."""
        if self.repeats == 1:
            return values
        return values.view(-1, self.repeats, self.head_dim).amax(dim=1).flatten()

    def __str__(self) -> str:
        return f"{self.producer} -> {' + '.join([*_abbreviated(self.consumers), *self.readers])}"


@dataclass(frozen=True)
class BlockStructure:
    """One block; all names but `name` are relative to it.

    Attributes:
        name: the block's name in the model.
        linears: its `nn.Linear`s in the order in which they run, routers left out.
        input_groups: the same, grouped: linears of a group read the same tensor.
        mappings: edges along which scales can be moved.
        scores: linears whose output enters the model through products of two of them only (query and key).
        outputs: how many values its forward returns in a tuple, hidden states first; 0 where it returns these alone.
        kept: linears that keep their precision, since the model's code reads their weights itself (for a dtype, say),
            which a low-bit layer hasn't.
    """

    name: str
    linears: tuple[str, ...]
    input_groups: tuple[tuple[str, ...], ...]
    mappings: tuple[ScaleMapping, ...]
    scores: tuple[str, ...]
    outputs: int
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        edges = "; ".join(_abbreviated(map(str, self.mappings))) or "no edge"
        groups = "; ".join(_abbreviated(" + ".join(group) for group in self.input_groups))
        return f"{self.name}: {edges} (linear layers by shared input: {groups})"


@dataclass(frozen=True)
class ModelStructure:
    """The blocks of a model in the order in which they run, and the linear layers outside them.

    Attributes:
        blocks: in order.
        outside: linear layers of the language model that are in no block.
        left_out: linear layers and routers that keep their precision, see `left_out` and `BlockStructure.kept`.
    """

    blocks: tuple[BlockStructure, ...]
    outside: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The graph found, one entry per kind of block."""
        kinds: dict[str, str] = {}
        for block in self.blocks:
            kinds.setdefault(str(block).removeprefix(block.name), block.name)
        return " | ".join(name + graph for graph, name in kinds.items())


def linear_in(block: nn.Module, name: str) -> nn.Linear:
    """The linear layer of this name inside a block."""
    part = block.get_submodule(name)
    assert isinstance(part, nn.Linear), f"{name} is a {type(part).__name__}"
    return part


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the model's blocks: the entries of the outermost `ModuleList` that holds most linear weights,
    of those that lie nearest to the token embedding (a vision tower may be larger than the language model).

    Raises:
        ModelError: there is none.
    """

    def linear_weights(module: nn.Module) -> int:
        return sum(part.weight.numel() for part in module.modules() if type(part) is nn.Linear)

    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and not isinstance(module, ExpertList)
        and linear_weights(module)
        and all(linear_weights(entry) or _compressed_parts(entry) for entry in module)
    ]
    if not lists:
        raise ModelError(
            f"given a {type(model).__name__} without a list of blocks that hold linear layers, expected a "
            "transformer with an nn.ModuleList of blocks of nn.Linear; one that is compressed already can't "
            "be compressed again"
        )
    names = {name for name, _ in lists}
    outermost = [
        (name, module)
        for name, module in lists
        if not any(name.startswith(f"{other}.") for other in names if other != name)
    ]
    embedding = embedding_name(model)
    name, blocks = max(
        outermost, key=lambda item: (len(_common_path(item[0], embedding)), linear_weights(item[1]))
    )
    return [f"{name}.{index}" for index in range(len(blocks))]


def _compressed_parts(block: nn.Module) -> bool:
    """Whether an earlier step compressed layers of this block, all of them perhaps."""
    return any(hasattr(part, "dequantize") for part in block.modules())


def left_out(model: nn.Module) -> tuple[str, ...]:
    """Names of the linear layers and routers that no method touches, whatever its settings.

    These are the routers of mixtures of experts and, in a model of several towers, everything but the
    language model: the part that holds the token embedding and the blocks, and the output head.
    """
    kept = set(routers(model))
    blocks = find_blocks(model)
    root = _common_path(embedding_name(model), blocks[0])
    head = getattr(model, "get_output_embeddings", lambda: None)()
    towers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and any(type(part) is nn.Linear for part in module.modules())
        and _common_path(name, ".".join(root)) != root
    ]
    kept |= {
        name
        for name, module in model.named_modules()
        if towers
        and type(module) is nn.Linear
        and module is not head
        and _common_path(name, ".".join(root)) != root
    }
    return tuple(name for name, _ in model.named_modules() if name in kept)


def embedding_name(model: nn.Module) -> str:
    """The name of the token embedding; "" if there is none."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        tables = [part for part in model.modules() if isinstance(part, nn.Embedding)]
        embedding = max(tables, key=lambda part: part.num_embeddings, default=None)
    return next((name for name, part in model.named_modules() if part is embedding), "")


def _common_path(first: str, second: str) -> list[str]:
    """The modules that hold both."""
    common = []
    for one, other in zip(first.split("."), second.split("."), strict=False):
        if one != other:
            break
        common.append(one)
    return common


@torch.no_grad()
def discover(
    model: nn.Module,
    mappings: Literal["auto"] | Sequence[ScaleMapping | Mapping[str, Any]] = "auto",
    *,
    residence: Residence | None = None,
) -> ModelStructure:
    """Find the blocks of a model and the edges along which scales can be moved.

    Args:
        model: a causal language model, called as `model(tokens)` with tokens (batch, length) int64.
        mappings: "auto" finds the edges; a list gives them by hand, as
            `{"producer": name, "consumers": [names]}` with names as inside a block.
            Edges given by hand are tried like found ones.
        residence: of the model; None stands for one in memory.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    >>> print(discover(model).blocks[0].mappings[1])
    self_attn.v_proj -> self_attn.o_proj

    Raises:
        ModelError: no blocks, a model that changes its weights when it runs, or an edge given by hand that doesn't
            exist or would change the model.
    """
    names = find_blocks(model)
    vocabulary = _vocabulary(model)
    residence = residence or InMemory(model)
    tokens = (torch.arange(8, device=residence.home) * 7919 % vocabulary).unsqueeze(0)
    changes = {name: times_changed(parameter) for name, parameter in model.named_parameters()}
    with residence.entrance():
        hidden, calls, outputs = record_calls(model, names, tokens, residence=residence, in_between=False)
    for name, parameter in model.named_parameters():
        if changes.get(name, times_changed(parameter)) != times_changed(parameter):
            raise ModelError(
                f"given a {type(model).__name__} that changes its own weights when it runs ({name}), expected one that "
                "leaves them as they are"
            )
    shared = shared_parameters(model)
    known: dict[Any, BlockStructure] = {}
    blocks = []
    for name, call, count in zip(names, calls, outputs, strict=True):
        module = model.get_submodule(name)
        kind = (
            signature(module),
            any(id(parameter) in shared for parameter in module.parameters()),
            # What passes between blocks decides about edges, too.
            len(call.gives),
            len(call.handed()),
            # Of blocks alike one may leave keys and values for later ones, another not.
            name if call.shared() else None,
        )
        if kind not in known:
            there = residence.device
            with residence.part(name):
                probe = _Probe(
                    name, module, call.to(there), hidden.to(there), shared, _head_dims(model, module)
                )
            known[kind] = BlockStructure(
                name=name,
                linears=tuple(probe.linears),
                input_groups=probe.input_groups,
                mappings=tuple(
                    probe.find_mappings() if mappings == "auto" else probe.check_mappings(mappings)
                ),
                scores=probe.find_scores(),
                outputs=count,
                kept=probe.kept,
            )
            del probe  # holds the block eight bytes a weight
        found = known[kind]
        blocks.append(replace(found, name=name, outputs=count))
    if mappings != "auto" and not any(block.mappings for block in blocks):
        raise ModelError(
            f"given mappings that name no layers of a block, expected names like {blocks[0].linears[0]!r}"
        )
    kept = (*left_out(model), *(f"{block.name}.{linear}" for block in blocks for linear in block.kept))
    inside = {f"{block.name}.{linear}" for block in blocks for linear in block.linears}.union(kept)
    outside = tuple(
        name for name, module in model.named_modules() if type(module) is nn.Linear and name not in inside
    )
    return ModelStructure(tuple(blocks), outside, kept)


@dataclass
class _Probe:
    """A float64 copy of one block, the tensors that flowed through it once, and experiments on it."""

    name: str
    module: nn.Module
    call: BlockCall
    hidden: Tensor
    shared: set[int]
    head_dims: list[int]
    linears: list[str] = field(default_factory=list)
    input_groups: tuple[tuple[str, ...], ...] = ()
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.tied = {
            name
            for name, part in self.module.named_modules()
            if any(id(parameter) in self.shared for parameter in part.parameters(recurse=False))
        }
        self.module = _in_float64(self.module)
        self.call = self.call.to(torch.float64)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.hidden.shape, generator=generator, dtype=torch.float64).to(
            self.hidden.device
        )
        # Trained embeddings can be tiny beside a norm's epsilon or alike for several tokens; noise of their
        # size makes every channel of every layer take part.
        scale = self.hidden.double().square().mean().sqrt().clamp(min=1e-3)
        self.hidden = self.hidden.double() + scale * noise
        self.parts = {name: part for name, part in self.module.named_modules() if name}
        self.routers = tuple(routers(self.module))
        self.lists = dict(expert_lists(self.module))
        try:
            self._trace()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, *FAILURES) as error:
            raise ModelError(
                f"given {self.name}, which fails on hidden states in float64 ({of_one_line(error)}), expected a block "
                "that runs in every precision, on hidden states alone"
            ) from error
        self.output = self._run()
        if not torch.isfinite(self.output[0]).all():
            bad = [
                name for name, weight in self.module.named_parameters() if not torch.isfinite(weight).all()
            ]
            raise ModelError(
                f"given NaN or infinity in {'.'.join([self.name, *bad[:1]])}, expected finite values; "
                "check the checkpoint"
            )

    def _trace(self) -> None:
        """Note which module gave the tensor that each linear, router and list of experts reads."""
        alive: list[Tensor] = []  # a freed tensor's address would be taken again
        inputs: dict[str, Any] = {}
        called: dict[str, Any] = {}
        self.producer_of: dict[Any, str] = {}

        def key(tensor: Tensor) -> Any:
            alive.append(tensor)
            return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.numel()

        def note(name: str, part: nn.Module) -> Callable[..., None]:
            is_linear = type(part) is nn.Linear

            def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if args and isinstance(args[0], Tensor):
                    called[name] = key(args[0])
                if is_linear:
                    inputs[name] = key(args[0])
                elif isinstance(output, Tensor) and not any(True for _ in part.children()):
                    self.producer_of[key(output)] = name

            return hook

        with ExitStack() as stack:
            for name, part in self.parts.items():
                stack.callback(part.register_forward_hook(note(name, part)).remove)
            read = stack.enter_context(_weights_read(self.parts))
            self._run()

        self.kept = tuple(name for name in self.parts if name in read and name not in self.routers)
        readers: dict[Any, list[str]] = {}
        for name in (*self.routers, *self.kept):
            readers.setdefault(called.get(name), []).append(name)
            inputs.pop(name, None)
        # Consumers of an edge read one tensor, experts the rows of it that are theirs; linears of an input
        # group read the same rows.
        together: dict[Any, list[str]] = {}
        groups: dict[Any, list[str]] = {}
        done: set[str] = set()
        for name, tensor in inputs.items():
            path = self._list_of(name)
            if path is None:
                together.setdefault(tensor, []).append(name)
                groups.setdefault(tensor, []).append(name)
                continue
            if path in done:
                continue
            done.add(path)
            # What was multiplied on its way to the experts may come from where their router reads.
            beside = [
                called.get(router)
                for router in self.routers
                if _common_parent((router, path)) == path.rpartition(".")[0]
            ]
            source = next(
                (each for each in (called[path], *beside) if each in self.producer_of), called[path]
            )
            # The experts are alike, but a few tokens don't reach all of them.
            seen = name.removeprefix(f"{path}.").partition(".")[0]
            inner = {
                linear.removeprefix(f"{path}.{seen}."): value
                for linear, value in inputs.items()
                if linear.startswith(f"{path}.{seen}.")
            }
            for index in range(len(self.lists[path])):
                for linear, value in inner.items():
                    full = f"{path}.{index}.{linear}"
                    groups.setdefault((path, index, value), []).append(full)
                    entry = value == called[f"{path}.{seen}"]
                    together.setdefault(source if entry else (path, index, value), []).append(full)
        self.linears = [name for group in groups.values() for name in group]
        self.input_groups = tuple(map(tuple, groups.values()))
        # Linears by the tensor they read, routers and others that read it, and the module it comes from.
        self.readings = [
            (tuple(names), tuple(readers.get(tensor, ())), self.producer_of.get(tensor))
            for tensor, names in together.items()
        ]

    def _run(self) -> list[Tensor]:
        """All that the block gives or leaves later ones in floating point: hidden states first."""
        given = [*self.call.outputs(self.module, self.hidden), *self.call.left()]
        return [value for value in given if isinstance(value, Tensor) and value.is_floating_point()]

    def _is_as_before(self) -> bool:
        return all(
            _difference(found, wanted) < _UNCHANGED
            for found, wanted in zip(self._run(), self.output, strict=True)
        )

    def _list_of(self, name: str) -> str | None:
        """The list of experts that a module belongs to."""
        return next((path for path in self.lists if name.startswith(f"{path}.")), None)

    def _siblings(self, name: str) -> list[str]:
        """The modules with this one's place in every expert of its list; itself if it is in none."""
        path = self._list_of(name)
        if path is None:
            return [name]
        inside = name.removeprefix(f"{path}.").partition(".")[2]
        return [f"{path}.{index}.{inside}" for index in range(len(self.lists[path]))]

    def find_mappings(self) -> list[ScaleMapping]:
        """Every edge that passes the trial, at most one for linears that read the same tensor."""
        found = []
        # Experts are tried all at once, so that one which the few tokens don't reach has its edges too.
        tried: dict[tuple[str, ...], ScaleMapping | None] = {}
        for names, readers, norm in self.readings:
            edge = self._norm_edge(norm, names, readers) if norm else None
            path = self._list_of(names[0])
            if edge is None and (path is None or self._list_of(names[-1]) == path):
                pattern = tuple(self._siblings(names[0]))
                if pattern in tried:
                    first = tried[pattern]
                    edge = None if first is None else self._of_expert(first, names[0])
                else:
                    edge = self._first_linear_edge(names)
                    if path is not None:
                        tried[pattern] = edge
            if edge:
                found.append(edge)
        return found

    def _first_linear_edge(self, names: tuple[str, ...]) -> ScaleMapping | None:
        own = self._list_of(names[0])
        for producer in self.linears[: self.linears.index(names[0])]:
            path = self._list_of(producer)
            # What experts give is weighted and added up before another layer reads it.
            near = path is None if own is None else producer in self._expert_of(names[0])
            if near and (edge := self._linear_edge(producer, names)):
                return edge
        return None

    def _expert_of(self, name: str) -> list[str]:
        """The linears of the expert that a linear belongs to."""
        path = self._list_of(name)
        index = name.removeprefix(f"{path}.").partition(".")[0]
        return [linear for linear in self.linears if linear.startswith(f"{path}.{index}.")]

    def _of_expert(self, edge: ScaleMapping, name: str) -> ScaleMapping:
        """The edge found for one expert, with the names of the expert to which `name` belongs."""
        path = self._list_of(name)
        index = name.removeprefix(f"{path}.").partition(".")[0]

        def renamed(other: str) -> str:
            return f"{path}.{index}.{other.removeprefix(f'{path}.').partition('.')[2]}"

        return replace(
            edge,
            producer=renamed(edge.producer),
            consumers=tuple(map(renamed, edge.consumers)),
            inspected=renamed(edge.inspected) if edge.inspected.startswith(f"{path}.") else edge.inspected,
        )

    def check_mappings(self, mappings: Sequence[ScaleMapping | Mapping[str, Any]]) -> list[ScaleMapping]:
        """The given edges that name layers of this block, each tried."""
        checked = []
        for mapping in mappings:
            try:
                given = mapping if isinstance(mapping, Mapping) else vars(mapping)
                patterns = given["producer"], tuple(given["consumers"])
            except (KeyError, TypeError):
                raise ModelError(
                    f"given mapping {mapping!r}, expected a dict; {HOW_TO_PASS_MAPPINGS}"
                ) from None
            for producer, names in self._expanded(*patterns):
                consumers = tuple(name for name in names if name not in (*self.routers, *self.kept))
                if not {producer, *consumers} <= self.parts.keys():
                    continue
                is_linear = type(self.parts[producer]) is nn.Linear
                if is_linear:
                    edge = self._linear_edge(producer, consumers)
                else:
                    edge = self._norm_edge(producer, consumers, self._readers_beside(consumers))
                if edge is None:
                    raise ModelError(
                        f"given mapping {producer} -> {' + '.join(_abbreviated(consumers))}, which would change "
                        f"the output of {self.name}, expected an edge along which scales cancel; or name all "
                        "readers"
                    )
                checked.append(edge)
        return checked

    def _expanded(self, producer: str, consumers: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Names for patterns; a producer's `*` is the same expert in its consumers."""
        if "*" in producer:
            pattern = re.compile(re.escape(producer).replace(r"\*", r"(\d+)"))
            for match in filter(None, map(pattern.fullmatch, self.parts)):
                yield match[0], tuple(name.replace("*", match[1]) for name in consumers)
            return
        names: list[str] = []
        for name in consumers:
            pattern = re.compile(re.escape(name).replace(r"\*", r"\d+"))
            names += [part for part in self.linears if pattern.fullmatch(part)] if "*" in name else [name]
        if names:
            yield producer, tuple(names)

    def _readers_beside(self, consumers: tuple[str, ...]) -> tuple[str, ...]:
        """The routers, and others that keep their precision, that read what the consumers read."""
        found = [readers for names, readers, _ in self.readings if not set(names).isdisjoint(consumers)]
        return found[0] if len(found) == 1 else ()

    def find_scores(self) -> tuple[str, ...]:
        """Linears that only meet in a product: doubling one and halving the other changes nothing.

        With the sign changed too: else a norm that follows each of two unrelated layers would hide the
        factors.
        """
        scores = set()
        for group in self.input_groups:
            if self._list_of(group[0]) is not None:
                continue  # experts attend to nothing
            for index, first in enumerate(group):
                for second in group[index + 1 :]:
                    if self._unchanged(outputs={first: -2.0, second: -0.5}):
                        scores |= {first, second}
        return tuple(name for name in self.linears if name in scores)

    def _norm_edge(
        self, norm: str, consumers: tuple[str, ...], readers: tuple[str, ...] = ()
    ) -> ScaleMapping | None:
        weight = getattr(self.parts[norm], "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 1:
            return None
        if self._is_tied(norm, (*consumers, *readers)):
            return None
        offset = self._norm_offset(self.parts[norm])
        factors = self._factors(weight.numel())
        if offset is None or not self._cancels([norm], factors, consumers, factors, readers):
            return None
        parent = _common_parent(consumers)
        return ScaleMapping(norm, consumers, parent, "norm", offset=offset, readers=readers)

    def _linear_edge(self, producer: str, consumers: tuple[str, ...]) -> ScaleMapping | None:
        if self._is_tied(producer, consumers):
            return None
        rows = self.parts[producer].out_features
        columns = self.parts[consumers[0]].in_features
        for channels, repeats, head_dim, stride in _channel_layouts(rows, columns, self.head_dims):
            edge = ScaleMapping(
                producer,
                consumers,
                _common_parent(consumers),
                "linear",
                repeats=repeats,
                head_dim=head_dim,
                stride=stride,
            )
            factors = self._factors(channels)
            # A fused projection keeps the scaled part in its last rows (query, key and value, or gate and
            # up), or in the last of each head's.
            scaled = factors.new_ones(rows)
            scaled[edge.rows(rows, channels)] = factors
            alike = [sibling for name in consumers for sibling in self._siblings(name)]
            if self._cancels(self._siblings(producer), scaled, alike, edge.expand(factors)):
                if repeats > 1 or stride or self._list_of(producer) is not None:
                    return edge
                mixable = [size for size in self.head_dims if self._mixes(edge, channels, size)]
                return replace(edge, head_dim=max(mixable, default=0))
        return None

    def _mixes(self, edge: ScaleMapping, channels: int, size: int) -> bool:
        """Whether rotating runs of `size` channels cancels: only linear maps lie between, head by head."""
        producer, consumers = edge.producer, edge.consumers
        if channels % size or size == 1:
            return False
        generator = torch.Generator().manual_seed(size)
        rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        rotation = rotation.to(self.hidden.device)

        def turn(values: Tensor, by: Tensor) -> Tensor:
            head = values[..., : values.shape[-1] - channels]
            tail = values[..., values.shape[-1] - channels :]
            turned = tail.reshape(*tail.shape[:-1], channels // size, size) @ by
            return torch.cat([head, turned.flatten(-2)], dim=-1)

        with ExitStack() as stack:
            part = self.parts[producer]
            hook = part.register_forward_hook(lambda _m, _a, output: turn(output, rotation))
            stack.callback(hook.remove)
            for name in consumers:
                undo = self.parts[name].register_forward_pre_hook(lambda _m, args: turn(args[0], rotation.T))
                stack.callback(undo.remove)
            return self._is_as_before()

    def _is_tied(self, producer: str, consumers: tuple[str, ...]) -> bool:
        return not self.tied.isdisjoint({producer, *consumers})

    def _norm_offset(self, norm: Any) -> float | None:
        """0 for norms that multiply by `weight`, 1 by `1 + weight`, None for those that do neither."""
        weight, bias = norm.weight, getattr(norm, "bias", None)
        factors = self._factors(weight.numel())
        sample = self.hidden if self.hidden.shape[-1] == weight.numel() else factors.log().expand(1, 2, -1)
        try:
            before: Tensor = norm(sample)
        except FAILURES:  # it takes more than one input (a gated norm)
            return None
        old_weight, old_bias = weight.data, torch.zeros(0) if bias is None else bias.data
        for offset in (0.0, 1.0):
            weight.data = (old_weight + offset) * factors - offset
            if bias is not None:
                bias.data = old_bias * factors
            after = norm(sample)
            weight.data = old_weight
            if bias is not None:
                bias.data = old_bias
            if _difference(after, before * factors) < _UNCHANGED:
                return offset
        return None

    def _factors(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(count)
        exponents = torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1
        return (2**exponents).to(self.hidden.device)

    def _cancels(
        self,
        producers: Sequence[str],
        scaled: Tensor,
        consumers: Sequence[str],
        divided: Tensor,
        readers: Sequence[str] = (),
    ) -> bool:
        if any(self.parts[name].in_features != divided.numel() for name in consumers):
            return False
        if any(self.parts[name].weight.shape[1] != divided.numel() for name in readers):
            return False
        outputs = dict.fromkeys(producers, scaled)
        return not self._unchanged(outputs) and self._unchanged(
            outputs, dict.fromkeys(consumers, divided), dict.fromkeys(readers, divided)
        )

    def _unchanged(
        self,
        outputs: dict[str, Any],
        inputs: dict[str, Any] | None = None,
        columns: dict[str, Any] | None = None,
    ) -> bool:
        """Whether the block gives the same when modules' outputs are multiplied, and inputs or weight columns
        divided.
        """
        with ExitStack() as stack:
            for name, factor in outputs.items():
                hook = self.parts[name].register_forward_hook(
                    lambda _m, _a, output, factor=factor: output * factor
                )
                stack.callback(hook.remove)
            for name, factor in (inputs or {}).items():
                hook = self.parts[name].register_forward_pre_hook(
                    lambda _m, args, factor=factor: args[0] / factor
                )
                stack.callback(hook.remove)
            for name, factor in (columns or {}).items():
                weight = self.parts[name].weight
                stack.callback(setattr, weight, "data", weight.data)
                weight.data = weight.data / factor
            return self._is_as_before()


class _FrozenLinear(nn.Linear):
    """Stands for a layer that is already compressed: it runs, but takes part in no edge."""


def _in_float64(block: nn.Module) -> nn.Module:
    """A float64 copy of a block, compressed layers replaced by what their weights read as.

    Experts stay in the block's memory until they are called: of many, a few tokens reach few.
    """
    experts = [parameter for _, part in expert_lists(block) for parameter in part.parameters()]
    lent = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in experts}
    block = copy.deepcopy(block, lent).eval()
    for part in block.modules():
        if is_fused(part) and hasattr(part, "config"):
            # Experts that couldn't be taken apart: transformers' grouped product takes no float64.
            setattr(part.config, "_experts_implementation", "eager")  # noqa: B010
    for name, part in list(block.named_modules()):
        if hasattr(part, "dequantize"):
            weight = part.dequantize(torch.float64)
            linear = _FrozenLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight, linear.bias = nn.Parameter(weight), part.bias
            owner, _, last = name.rpartition(".")
            setattr(block.get_submodule(owner), last, linear)
    inside = set()
    for _, listed in expert_lists(block):
        for expert in listed:
            expert.register_forward_pre_hook(_widen)
            inside |= set(expert.modules())
    for part in set(block.modules()) - inside:
        part._apply(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, recurse=False)
    return block


def _widen(module: nn.Module, args: Any) -> None:
    module.double()


def _channel_layouts(rows: int, columns: int, head_dims: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """How `rows` outputs of a linear may become `columns` inputs: (scaled rows, repeats, head_dim, stride)."""
    if rows >= columns:
        yield columns, 1, 0, 0
    for head_dim in head_dims:
        heads = columns // head_dim
        for repeats in range(2, heads + 1):
            if columns % (head_dim * repeats) == 0 and (
                rows * repeats == columns or rows == columns + 2 * columns // repeats
            ):
                yield columns // repeats, repeats, head_dim, 0
        # Rows ordered by head: query, key and value (GPT-NeoX, BLOOM; Falcon, whose heads share some), key
        # and value (multi-head latent attention).
        for repeats in range(1, heads + 1):
            if columns % (head_dim * repeats):
                continue
            stride, rest = divmod(rows, heads // repeats)
            if not rest and (stride == (repeats + 2) * head_dim or (repeats == 1 and stride > head_dim)):
                yield columns // repeats, repeats, head_dim, stride


def _head_dims(model: nn.Module, block: nn.Module) -> list[int]:
    """Sizes that a head could have, by attributes and the configuration."""
    whole = text_config(model)
    sizes: list[Any] = []
    # Some architectures have a configuration for each layer, and refuse to answer for all.
    for config in {
        id(each): each for each in [*(getattr(whole, "per_layer_config", None) or [whole])]
    }.values():
        sizes.append(getattr(config, "head_dim", None))
        if getattr(config, "num_attention_heads", None):
            sizes.append(config.hidden_size // config.num_attention_heads)
    for part in block.modules():
        sizes += [value for name, value in vars(part).items() if name.endswith("head_dim")]
    return sorted({size for size in sizes if isinstance(size, int) and size > 0})


def _vocabulary(model: nn.Module) -> int:
    embeddings = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if not embeddings:
        raise ModelError(
            f"given a {type(model).__name__} without an nn.Embedding, expected a causal language model"
        )
    return getattr(text_config(model), "vocab_size", None) or max(embeddings)


def text_config(model: nn.Module) -> Any:
    """The configuration of a model's language part; None if it has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that appear under several names (tied embeddings, shared blocks)."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


class _Watched(nn.Linear):
    """A linear layer that notes reads of its weight by others; made of a plain one by assigning the class."""

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and not self.__dict__.get("_at_work"):
            self.__dict__["_is_read"] = True
        return super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:
        self.__dict__["_at_work"] = True
        try:
            return super().forward(input)
        finally:
            self.__dict__["_at_work"] = False


@contextmanager
def _weights_read(parts: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Collects, of modules by name, the linear layers whose weights are read by others than themselves."""
    linears = {name: part for name, part in parts.items() if type(part) is nn.Linear}
    read: set[str] = set()
    for linear in linears.values():
        linear.__class__ = _Watched
    try:
        yield read
    finally:
        for name, linear in linears.items():
            linear.__class__ = nn.Linear
            linear.__dict__.pop("_at_work", None)
            if linear.__dict__.pop("_is_read", False):
                read.add(name)


def _common_parent(names: tuple[str, ...]) -> str:
    if len(names) == 1:
        return names[0]
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _abbreviated(names: Iterable[str]) -> list[str]:
    """Names with an expert's number replaced by `*`, each once; numbers stay where there is only one."""
    names = list(names)
    short = [re.sub(r"\.\d+\.", ".*.", name) for name in names]
    alike = {name: short.count(name) for name in short}
    return list(dict.fromkeys(s if alike[s] > 1 else name for s, name in zip(short, names, strict=True)))


def _difference(first: Tensor, second: Tensor) -> float:
    """Root-mean-square difference over the root mean square of `second`."""
    return float((first - second).norm() / second.norm().clamp(min=1e-300))

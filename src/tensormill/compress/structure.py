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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensormill.compress.residence import InMemory, Residence
from tensormill.errors import ModelError

# A block's output after an exact fold differs by rounding: about 1e-15 in float64, 1e-7 where a norm or
# softmax computes in float32 whatever its input. A wrong edge changes it by more than 1e-2.
_UNCHANGED = 1e-5

HOW_TO_PASS_MAPPINGS = (
    "pass mappings=[{'producer': 'input_layernorm', 'consumers': ['self_attn.q_proj', ...]}, ...] "
    "with names as inside a block"
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
    """

    producer: str
    consumers: tuple[str, ...]
    inspected: str
    kind: Literal["norm", "linear"]
    offset: float = 0.0
    repeats: int = 1
    head_dim: int = 0

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
        return f"{self.producer} -> {' + '.join(self.consumers)}"


@dataclass(frozen=True)
class BlockStructure:
    """One block; all names but `name` are relative to it.

    Attributes:
        name: the block's name in the model.
        linears: its `nn.Linear`s in the order in which they run.
        input_groups: the same, grouped: linears of a group read the same tensor.
        mappings: edges along which scales can be moved.
        scores: linears whose output enters the model through products of two of them only (query and key).
        returns_tuple: whether its forward returns a tuple that starts with the hidden states.
    """

    name: str
    linears: tuple[str, ...]
    input_groups: tuple[tuple[str, ...], ...]
    mappings: tuple[ScaleMapping, ...]
    scores: tuple[str, ...]
    returns_tuple: bool

    def __str__(self) -> str:
        edges = "; ".join(map(str, self.mappings)) or "no edge"
        groups = "; ".join(" + ".join(group) for group in self.input_groups)
        return f"{self.name}: {edges} (linear layers by shared input: {groups})"


@dataclass(frozen=True)
class ModelStructure:
    """The blocks of a model in the order in which they run, and the linear layers outside them."""

    blocks: tuple[BlockStructure, ...]
    outside: tuple[str, ...]

    def __str__(self) -> str:
        """The graph found, one entry per kind of block."""
        kinds: dict[str, str] = {}
        for block in self.blocks:
            kinds.setdefault(str(block).removeprefix(block.name), block.name)
        return " | ".join(name + graph for graph, name in kinds.items())


@dataclass
class BlockCall:
    """What the model passes to one of its blocks besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states."""
        output: Tensor | tuple[Tensor, ...] = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def to(self, *args: Any) -> BlockCall:
        """With every tensor moved to a device, or every floating-point tensor cast to a dtype."""
        return BlockCall(_cast(self.args, args), _cast(self.kwargs, args))


def _cast(value: Any, to: tuple[Any, ...]) -> Any:
    if isinstance(value, Tensor):
        return value.to(*to) if value.is_floating_point() or not isinstance(to[0], torch.dtype) else value
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_cast(item, to) for item in value)
    if isinstance(value, dict) and type(value) is dict:
        return {key: _cast(item, to) for key, item in value.items()}
    return value


def linear_in(block: nn.Module, name: str) -> nn.Linear:
    """The linear layer of this name inside a block."""
    part = block.get_submodule(name)
    assert isinstance(part, nn.Linear), f"{name} is a {type(part).__name__}"
    return part


class Stop(Exception):
    """Ends a forward pass early."""


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the model's blocks: the entries of the outermost `ModuleList` that holds most linear weights.

    Raises:
        ModelError: there is none.
    """

    def linear_weights(module: nn.Module) -> int:
        return sum(part.weight.numel() for part in module.modules() if type(part) is nn.Linear)

    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(linear_weights(entry) for entry in module)
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
    name, blocks = max(outermost, key=lambda item: linear_weights(item[1]))
    return [f"{name}.{index}" for index in range(len(blocks))]


@torch.no_grad()
def record_calls(
    model: nn.Module,
    blocks: Sequence[str],
    tokens: Tensor,
    returns_tuple: Sequence[bool] | None = None,
    *,
    residence: Residence | None = None,
) -> tuple[Tensor, list[BlockCall], list[bool]]:
    """Run what comes before the blocks, and note what each block is called with.

    The blocks themselves are passed by, so the cost is that of the embedding. Nothing after the last block
    runs.

    Args:
        model: a causal language model, called as `model(tokens)`.
        blocks: names of its blocks, in order.
        tokens: (batch, length) int64.
        returns_tuple: whether each block returns a tuple; None runs one block of each kind to find out.
        residence: of the model; None stands for one in memory.

    Returns:
        The first block's input (batch, length, hidden), each block's call, and whether it returns a tuple.

    Raises:
        ModelError: the blocks don't run once each, in order, on hidden states.
    """
    residence = residence or InMemory(model)
    modules = [model.get_submodule(name) for name in blocks]
    calls: list[BlockCall] = []
    kinds: dict[Any, bool] = {}
    answers: list[bool] = []
    first: list[Tensor] = []

    def passing_by(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states", None)
            if index != len(calls) or not isinstance(hidden, Tensor):
                raise ModelError(
                    f"given blocks that the model doesn't run once each and in order ({blocks[index]} was "
                    f"number {len(calls)}), expected a chain of blocks on hidden states"
                )
            call = BlockCall(args[1:], kwargs)
            calls.append(call)
            first.append(hidden) if not first else None
            if returns_tuple is None:
                kind = _signature(modules[index])
                if kind not in kinds:
                    with residence.part(blocks[index]):
                        there = call.to(residence.device)
                        output = forward(hidden.to(residence.device), *there.args, **there.kwargs)
                    kinds[kind] = isinstance(output, tuple)
                answers.append(kinds[kind])
            else:
                answers.append(returns_tuple[index])
            if len(calls) == len(modules):
                raise Stop
            return (hidden,) if answers[-1] else hidden

        return run

    for index, module in enumerate(modules):
        module.forward = passing_by(index, module.forward)
    options = {"use_cache": False} if hasattr(model, "config") else {}
    try:
        with _evaluating(model):
            model(tokens, **options)
    except Stop:
        pass
    finally:
        for module in modules:
            del module.forward
    if len(calls) != len(modules):
        raise ModelError(
            f"given a {type(model).__name__} that runs {len(calls)} of {len(modules)} blocks, expected all"
        )
    return first[0], calls, answers


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
        ModelError: no blocks, or an edge given by hand that doesn't exist or would change the model.
    """
    names = find_blocks(model)
    vocabulary = _vocabulary(model)
    residence = residence or InMemory(model)
    tokens = (torch.arange(8, device=residence.home) * 7919 % vocabulary).unsqueeze(0)
    with residence.entrance():
        hidden, calls, tuples = record_calls(model, names, tokens, residence=residence)
    shared = shared_parameters(model)
    known: dict[Any, BlockStructure] = {}
    blocks = []
    for name, call, returns_tuple in zip(names, calls, tuples, strict=True):
        module = model.get_submodule(name)
        kind = (_signature(module), any(id(parameter) in shared for parameter in module.parameters()))
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
                returns_tuple=returns_tuple,
            )
            del probe  # holds the block eight bytes a weight
        found = known[kind]
        blocks.append(replace(found, name=name, returns_tuple=returns_tuple))
    if mappings != "auto" and not any(block.mappings for block in blocks):
        raise ModelError(
            f"given mappings that name no layers of a block, expected names like {blocks[0].linears[0]!r}"
        )
    inside = {f"{block.name}.{linear}" for block in blocks for linear in block.linears}
    outside = tuple(
        name for name, module in model.named_modules() if type(module) is nn.Linear and name not in inside
    )
    return ModelStructure(tuple(blocks), outside)


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
        self._trace()
        self.output = self.call.run(self.module, self.hidden)
        if not torch.isfinite(self.output).all():
            bad = [
                name for name, weight in self.module.named_parameters() if not torch.isfinite(weight).all()
            ]
            raise ModelError(
                f"given NaN or infinity in {'.'.join([self.name, *bad[:1]])}, expected finite values; "
                "check the checkpoint"
            )

    def _trace(self) -> None:
        """Note which module gave the tensor that each linear reads."""
        alive: list[Tensor] = []  # a freed tensor's address would be taken again
        inputs: dict[str, Any] = {}
        self.producer_of: dict[Any, str] = {}

        def key(tensor: Tensor) -> Any:
            alive.append(tensor)
            return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.numel()

        def note(name: str, part: nn.Module) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if type(part) is nn.Linear:
                    inputs[name] = key(args[0])
                elif isinstance(output, Tensor) and not any(True for _ in part.children()):
                    self.producer_of[key(output)] = name

            return hook

        with ExitStack() as stack:
            for name, part in self.parts.items():
                stack.callback(part.register_forward_hook(note(name, part)).remove)
            self.call.run(self.module, self.hidden)
        self.linears = list(inputs)
        groups: dict[Any, list[str]] = {}
        for name, tensor in inputs.items():
            groups.setdefault(tensor, []).append(name)
        self.input_groups = tuple(map(tuple, groups.values()))
        self.source_of_group = dict(zip(self.input_groups, map(self.producer_of.get, groups), strict=True))

    def find_mappings(self) -> list[ScaleMapping]:
        """Every edge that passes the trial, at most one per group of linears with the same input."""
        found = []
        for group in self.input_groups:
            norm = self.source_of_group[group]
            edge = self._norm_edge(norm, group) if norm else None
            if edge is None:
                earlier = self.linears[: self.linears.index(group[0])]
                edges = (self._linear_edge(producer, group) for producer in earlier)
                edge = next((candidate for candidate in edges if candidate), None)
            if edge:
                found.append(edge)
        return found

    def check_mappings(self, mappings: Sequence[ScaleMapping | Mapping[str, Any]]) -> list[ScaleMapping]:
        """The given edges that name layers of this block, each tried."""
        checked = []
        for mapping in mappings:
            try:
                given = mapping if isinstance(mapping, Mapping) else vars(mapping)
                producer, consumers = given["producer"], tuple(given["consumers"])
            except (KeyError, TypeError):
                raise ModelError(
                    f"given mapping {mapping!r}, expected a dict; {HOW_TO_PASS_MAPPINGS}"
                ) from None
            if not {producer, *consumers} <= self.parts.keys():
                continue
            is_linear = type(self.parts[producer]) is nn.Linear
            edge = (self._linear_edge if is_linear else self._norm_edge)(producer, consumers)
            if edge is None:
                raise ModelError(
                    f"given mapping {producer} -> {' + '.join(consumers)}, which would change the output of "
                    f"{self.name}, expected an edge along which scales cancel; or name all readers"
                )
            checked.append(edge)
        return checked

    def find_scores(self) -> tuple[str, ...]:
        """Linears that only meet in a product: doubling one and halving the other changes nothing.

        (Or doubling one alone, where a norm of its own follows.)
        """
        scores = set()
        for group in self.input_groups:
            for index, first in enumerate(group):
                for second in group[index + 1 :]:
                    if self._unchanged(outputs={first: 2.0, second: 0.5}):
                        scores |= {first, second}
        return tuple(name for name in self.linears if name in scores)

    def _norm_edge(self, norm: str, consumers: tuple[str, ...]) -> ScaleMapping | None:
        weight = getattr(self.parts[norm], "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 1 or self._is_tied(norm, consumers):
            return None
        offset = self._norm_offset(self.parts[norm])
        factors = self._factors(weight.numel())
        if offset is None or not self._cancels(norm, factors, consumers, factors):
            return None
        return ScaleMapping(norm, consumers, _common_parent(consumers), "norm", offset=offset)

    def _linear_edge(self, producer: str, consumers: tuple[str, ...]) -> ScaleMapping | None:
        if self._is_tied(producer, consumers):
            return None
        rows = self.parts[producer].out_features
        columns = self.parts[consumers[0]].in_features
        for channels, repeats, head_dim in _channel_layouts(rows, columns, self.head_dims):
            edge = ScaleMapping(
                producer, consumers, _common_parent(consumers), "linear", repeats=repeats, head_dim=head_dim
            )
            factors = self._factors(channels)
            # A fused projection (query, key and value, or gate and up) keeps the scaled part in its last
            # rows.
            scaled = torch.cat([factors.new_ones(rows - channels), factors])
            if self._cancels(producer, scaled, consumers, edge.expand(factors)):
                if repeats > 1:
                    return edge
                mixable = [
                    size for size in self.head_dims if self._mixes(producer, consumers, channels, size)
                ]
                return replace(edge, head_dim=max(mixable, default=0))
        return None

    def _mixes(self, producer: str, consumers: tuple[str, ...], channels: int, size: int) -> bool:
        """Whether rotating runs of `size` channels cancels: only linear maps lie between, head by head."""
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
            return _difference(self.call.run(self.module, self.hidden), self.output) < _UNCHANGED

    def _is_tied(self, producer: str, consumers: tuple[str, ...]) -> bool:
        return not self.tied.isdisjoint({producer, *consumers})

    def _norm_offset(self, norm: Any) -> float | None:
        """0 for norms that multiply by `weight`, 1 by `1 + weight`, None for those that do neither."""
        weight, bias = norm.weight, getattr(norm, "bias", None)
        factors = self._factors(weight.numel())
        sample = self.hidden if self.hidden.shape[-1] == weight.numel() else factors.log().expand(1, 2, -1)
        before: Tensor = norm(sample)
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

    def _cancels(self, producer: str, scaled: Tensor, consumers: tuple[str, ...], divided: Tensor) -> bool:
        if any(self.parts[name].in_features != divided.numel() for name in consumers):
            return False
        return not self._unchanged({producer: scaled}) and self._unchanged(
            {producer: scaled}, dict.fromkeys(consumers, divided)
        )

    def _unchanged(self, outputs: dict[str, Any], inputs: dict[str, Any] | None = None) -> bool:
        """Whether the block gives the same when modules' outputs are multiplied and inputs divided."""
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
            return _difference(self.call.run(self.module, self.hidden), self.output) < _UNCHANGED


class _FrozenLinear(nn.Linear):
    """Stands for a layer that is already compressed: it runs, but takes part in no edge."""


def _in_float64(block: nn.Module) -> nn.Module:
    """A float64 copy of a block, compressed layers replaced by what their weights read as."""
    block = copy.deepcopy(block).eval()
    for name, part in list(block.named_modules()):
        if hasattr(part, "dequantize"):
            weight = part.dequantize(torch.float64)
            linear = _FrozenLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight, linear.bias = nn.Parameter(weight), part.bias
            owner, _, last = name.rpartition(".")
            setattr(block.get_submodule(owner), last, linear)
    return block.double()


def _channel_layouts(rows: int, columns: int, head_dims: list[int]) -> Iterator[tuple[int, int, int]]:
    """How `rows` outputs of a linear may become `columns` inputs: (scaled rows, repeats, head_dim)."""
    if rows >= columns:
        yield columns, 1, 0
    for head_dim in head_dims:
        heads = columns // head_dim
        for repeats in range(2, heads + 1):
            if columns % (head_dim * repeats) == 0 and (
                rows * repeats == columns or rows == columns + 2 * columns // repeats
            ):
                yield columns // repeats, repeats, head_dim


def _head_dims(model: nn.Module, block: nn.Module) -> list[int]:
    """Sizes that a head could have, by attributes and the configuration."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    sizes = [getattr(part, "head_dim", None) for part in block.modules()] + [
        getattr(config, "head_dim", None)
    ]
    if getattr(config, "num_attention_heads", None):
        sizes.append(config.hidden_size // config.num_attention_heads)
    return sorted({size for size in sizes if isinstance(size, int) and size > 0})


def _vocabulary(model: nn.Module) -> int:
    embeddings = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if not embeddings:
        raise ModelError(
            f"given a {type(model).__name__} without an nn.Embedding, expected a causal language model"
        )
    config = getattr(model, "config", None)
    return getattr(config, "vocab_size", None) or max(embeddings)


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that appear under several names (tied embeddings, shared blocks)."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _signature(block: nn.Module) -> Any:
    parts = tuple((name, type(part)) for name, part in block.named_modules())
    return parts, tuple((name, tuple(value.shape)) for name, value in block.named_parameters())


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


def _difference(first: Tensor, second: Tensor) -> float:
    """Root-mean-square difference over the root mean square of `second`."""
    return float((first - second).norm() / second.norm().clamp(min=1e-300))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

"""Empirical tangent kernels of modules: Theta[x, x', i, j] = sum over parameters of df_i(x)/dp df_j(x')/dp.

Three ways (Novak et al., "Fast finite width neural tangent kernel", ICML 2022): contracting Jacobians, tangent-vector
products (a vjp followed by a jvp for each pair), and structured derivatives. The last never forms a Jacobian of a wide
layer: for pre = W a, the derivative of f_i by W is an outer product of delta_i = df_i/dpre and a, so that

    Theta[x, x', i, j] = sum over positions t, t' of <a_t(x), a_t'(x')> <delta_it(x), delta_jt'(x')>

which costs two Gram matrices of activations instead of one of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument, ModelError
from tensormill.numerics.ntk.finite import ScaledConv1d, ScaledConv2d, ScaledLinear

__all__ = ["empirical_ntk"]

METHODS = ("auto", "jacobian", "ntvp", "structured")

_FORWARDS = (
    nn.Linear.forward,
    ScaledLinear.forward,
    nn.Conv1d.forward,
    nn.Conv2d.forward,
    ScaledConv1d.forward,
    ScaledConv2d.forward,
)
_GRAM_ELEMENTS = 1 << 25  # of the largest array between positions, as a bound on a tile


def empirical_ntk(
    module: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    method: str = "auto",
    trace_outputs: bool = False,
    batch: int | None = None,
) -> Tensor:
    """Tangent kernel of a module at its present parameters, over those that require gradients.

    Example:
        >>> linear = nn.Linear(3, 1, bias=False)
        >>> x = torch.eye(3)
        >>> empirical_ntk(linear, x, trace_outputs=True).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]

    Args:
        module: maps (N, ...) to (N, ...), each input by itself (no batch normalization in training mode).
        x1: (N, ...) inputs.
        x2: (M, ...) inputs; None: x1.
        method: "structured": layer by layer from activations and back-propagated derivatives, for linear layers and
            convolutions without groups; what other parameters there are goes through their Jacobian. "jacobian":
            contraction of the Jacobians of all parameters, any module. "ntvp": tangent-vector products, least memory.
            "auto": structured if the module has a layer for it, else jacobian.
        trace_outputs: the mean over outputs of Theta[.., i, i] instead of all pairs.
        batch: inputs of x1 and of x2 that are handled at once; None: all of them, with each one's derivatives in memory.

    Returns:
        (N, M, O, O) with O the number of outputs of an input, or (N, M) if `trace_outputs`; detached.

    Raises:
        InvalidArgument: an unknown method, or inputs that do not fit.
        ModelError: a module that couples the inputs of a batch, has no parameters that require gradients, or changes
            activations in a way that "structured" can't follow.
    """
    if method not in METHODS:
        raise InvalidArgument(f"given method {method!r}, expected one of {', '.join(METHODS)}")
    for name, x in (("x1", x1), ("x2", x2)):
        if x is not None and (not isinstance(x, Tensor) or x.dim() < 1):
            raise InvalidArgument(
                f"given {name} of type {type(x).__name__}, expected a tensor of (inputs, ...)"
            )
    if x2 is not None and (x1.shape[1:] != x2.shape[1:] or x1.dtype != x2.dtype or x1.device != x2.device):
        raise InvalidArgument(
            f"given inputs of shapes {tuple(x1.shape)} and {tuple(x2.shape)}, {x1.dtype} and {x2.dtype}, expected the "
            "same trailing shape, dtype and device"
        )
    if batch is not None and batch < 1:
        raise InvalidArgument(f"given batch={batch}, expected at least 1, or None")
    parameters: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise ModelError(f"given {type(module).__name__} without parameters that require gradients")
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.training:
            raise ModelError(
                "given batch normalization in training mode, which couples inputs; call module.eval()"
            )
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.training and child.p:
            raise ModelError("given dropout in training mode, whose outputs are random; call module.eval()")
    if method == "auto":
        method = "structured" if any(_supported(child) for child in module.modules()) else "jacobian"
    way: _Way = {"jacobian": _Jacobian, "ntvp": _TangentProducts, "structured": _Structured}[method](
        module, parameters, trace_outputs
    )
    rows = _slices(x1.shape[0], batch)
    columns = rows if x2 is None else _slices(x2.shape[0], batch)
    result: Tensor | None = None
    for i, a in enumerate(rows):
        one = way.prepare(x1[a])
        for j, b in enumerate(columns):
            if x2 is None and j < i:
                continue
            two = one if x2 is None and i == j else way.prepare((x1 if x2 is None else x2)[b])
            block = way.contract(one, two)
            if len(rows) == len(columns) == 1:
                return block
            if result is None:
                shape = (x1.shape[0], (x1 if x2 is None else x2).shape[0], *block.shape[2:])
                result = block.new_empty(shape)
            result[a, b] = block
            if x2 is None and i != j:
                result[b, a] = block.transpose(0, 1) if trace_outputs else block.permute(1, 0, 3, 2)
    if result is None:
        raise InvalidArgument("given no inputs, expected at least one in x1 and in x2")
    return result


def _slices(count: int, batch: int | None) -> list[slice]:
    step = batch or max(1, count)
    return [slice(k, min(k + step, count)) for k in range(0, count, step)]


class _Way:
    """One way to compute a block of the kernel: what each input needs by itself, and the contraction of two."""

    def __init__(self, module: nn.Module, parameters: dict[str, Tensor], trace: bool) -> None:
        self.module, self.parameters, self.trace = module, parameters, trace

    def prepare(self, x: Tensor) -> Any:
        return x

    def contract(self, one: Any, two: Any) -> Tensor:
        raise NotImplementedError

    def call(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """Outputs (O,) of a single input."""
        return torch.func.functional_call(self.module, parameters, (x[None],)).flatten()


class _Jacobian(_Way):
    """Theta = sum over parameters of J J'^T, from the Jacobians of a batch."""

    def prepare(self, x: Tensor) -> list[Tensor]:
        if not self.parameters:
            return []
        detached = {name: p.detach() for name, p in self.parameters.items()}
        rows = torch.func.vmap(torch.func.jacrev(self.call), (None, 0))(detached, x)
        return [j.detach().reshape(*j.shape[:2], -1) for j in rows.values()]  # [N, O, size of the parameter]

    def contract(self, one: list[Tensor], two: list[Tensor]) -> Any:
        return sum(_outer(a, b, self.trace) for a, b in zip(one, two, strict=True))


def _outer(one: Tensor, two: Tensor, trace: bool) -> Tensor:
    """(N, O, k), (M, O, k) -> (N, M, O, O), or the mean of its diagonal (N, M)."""
    if trace:
        return one.flatten(1) @ two.flatten(1).T / one.shape[1]
    product = one.flatten(0, 1) @ two.flatten(0, 1).T
    return product.reshape(*one.shape[:2], *two.shape[:2]).transpose(1, 2)


class _TangentProducts(_Way):
    """Theta v = J (J'^T v), for each pair of inputs and each output."""

    def contract(self, one: Tensor, two: Tensor) -> Tensor:
        parameters = {name: p.detach() for name, p in self.parameters.items()}

        def pair(x: Tensor, y: Tensor) -> Tensor:
            both: Any = torch.func.vjp(lambda p: self.call(p, y), parameters)
            output, pull = both

            def column(v: Tensor) -> Tensor:
                return torch.func.jvp(lambda p: self.call(p, x), (parameters,), pull(v))[1]

            return torch.func.vmap(column, out_dims=1)(
                torch.eye(output.numel(), dtype=output.dtype, device=y.device)
            )

        rows = torch.func.vmap(torch.func.vmap(pair, (None, 0)), (0, None))(one, two).detach()
        return rows.diagonal(dim1=-2, dim2=-1).mean(-1) if self.trace else rows


@dataclass
class _Call:
    """One call of a layer: activations (N, T, fan_in) and derivatives of outputs by its results (N, O, T, fan_out)."""

    activations: Tensor
    derivatives: Tensor


@dataclass
class _LayerRecord:
    """All calls of a layer with these scales of its weight and bias, 0 for what does not count."""

    weight_scale: float
    bias_scale: float
    calls: list[_Call] = field(default_factory=list)


@dataclass
class _Record:
    layers: dict[str, _LayerRecord]
    rest: list[Tensor]


def _supported(module: nn.Module) -> bool:
    if type(module).forward not in _FORWARDS:
        return False
    return not isinstance(module, nn.Conv1d | nn.Conv2d) or module.groups == 1


_AXIS_KEEPERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.AvgPool1d, nn.AvgPool2d, nn.LayerNorm, nn.Identity, nn.Dropout, nn.ReLU,
    nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU,
)  # fmt: skip


def _keeps_first_axis(module: nn.Module) -> bool:
    """Whether a module is a chain of layers that are known to leave the axis of the inputs where it is."""
    if type(module) is nn.Sequential:
        return all(_keeps_first_axis(child) for child in module)
    return type(module) in _AXIS_KEEPERS or (type(module) is nn.Flatten and module.start_dim == 1)


class _Structured(_Way):
    """Layer by layer: Gram matrices of activations times Gram matrices of derivatives."""

    def __init__(self, module: nn.Module, parameters: dict[str, Tensor], trace: bool) -> None:
        super().__init__(module, parameters, trace)
        owners: dict[int, int] = {}
        for child in module.modules():
            for p in child._parameters.values():
                if p is not None:
                    owners[id(p)] = owners.get(id(p), 0) + 1
        self.layers: dict[str, nn.Module] = {}
        for name, child in module.named_modules():
            own = [p for p in child._parameters.values() if p is not None and p.requires_grad]
            # A parameter of several modules has cross terms between them; its Jacobian has them all.
            if _supported(child) and own and all(owners[id(p)] == 1 for p in own):
                self.layers[name] = child
        self.rest: _Jacobian | None = None

    def prepare(self, x: Tensor) -> _Record:
        calls, derivatives, followed = self._derivatives(x)
        if self.rest is None:
            if not _keeps_first_axis(self.module):
                # Once more with a single input: the first axis may have this length by chance.
                with torch.no_grad():
                    followed -= {
                        name for name, activation, *_ in self._calls(x[:1])[1] if activation.shape[0] != 1
                    }
            covered = {id(p) for name in followed for p in self.layers[name]._parameters.values()}
            others = {name: p for name, p in self.parameters.items() if id(p) not in covered}
            self.followed = followed
            self.rest = _Jacobian(self.module, others, self.trace)
        records: dict[str, _LayerRecord] = {}
        for (name, activation), derivative in zip(calls, derivatives, strict=True):
            if name not in self.followed or derivative is None:
                continue
            layer: Any = self.layers[name]
            if name not in records:
                weight = layer._parameters.get("weight")
                bias = layer._parameters.get("bias")
                records[name] = _LayerRecord(
                    getattr(layer, "weight_scale", 1.0)
                    if weight is not None and weight.requires_grad
                    else 0.0,
                    getattr(layer, "bias_scale", 1.0) if bias is not None and bias.requires_grad else 0.0,
                )
            records[name].calls.append(_as_positions(layer, activation, derivative))
        return _Record(records, self.rest.prepare(x))

    def _calls(self, x: Tensor) -> tuple[Tensor, list[tuple[str, Tensor, int, Tensor]]]:
        """Outputs, and of each call of a layer its name, input, version of the input, and result."""
        seen: list[tuple[str, Tensor, int, Tensor]] = []
        names = {child: name for name, child in self.layers.items()}

        def hook(layer: nn.Module, arguments: tuple[Any, ...], result: Tensor) -> Tensor:
            activation = arguments[0]
            seen.append((names[layer], activation, activation._version, result))
            return result.clone()  # what follows may work in place

        handles = [layer.register_forward_hook(hook) for layer in self.layers.values()]
        try:
            return self.module(x), seen
        finally:
            for handle in handles:
                handle.remove()

    def _derivatives(self, x: Tensor) -> tuple[list[tuple[str, Tensor]], list[Tensor | None], set[str]]:
        """Activations that go into the layers' calls, derivatives (O, N, ...) of the outputs by what comes out."""
        with torch.enable_grad():
            outputs, seen = self._calls(x)
            if not isinstance(outputs, Tensor) or outputs.dim() < 1 or outputs.shape[0] != x.shape[0]:
                raise ModelError("given a module whose output is not a tensor of (inputs, ...), expected one")
            outputs = outputs.flatten(1) if outputs.dim() > 1 else outputs[:, None]
        followed = {name for name, *_ in seen}
        for name, activation, version, result in seen:
            if activation._version != version:
                raise ModelError(
                    f"given a module that overwrites the input of layer {name!r}, which method 'structured' needs; "
                    "use method 'jacobian'"
                )
            if activation.dim() < 2 or activation.shape[0] != x.shape[0] or not result.requires_grad:
                followed.discard(name)  # its first axis is not that of the inputs
        results = [result for *_, result in seen]
        return [(name, a.detach()) for name, a, *_ in seen], _by_output(outputs, results), followed

    def contract(self, one: _Record, two: _Record) -> Any:
        assert self.rest is not None
        total = self.rest.contract(one.rest, two.rest)
        for name, layer in one.layers.items():
            for a in layer.calls:
                for b in two.layers[name].calls:
                    total = total + _layer_kernel(layer, a, b, self.trace)
        return total


def _by_output(outputs: Tensor, results: list[Tensor]) -> list[Tensor | None]:
    """Derivatives of each output by each result, (O, *result.shape)."""
    wanted = [result for result in results if result.requires_grad]
    if not wanted:
        return [None] * len(results)
    count = outputs.shape[1]
    if count == 1:  # without what batching costs
        single = torch.autograd.grad(outputs.sum(), wanted, allow_unused=True)
        return _in_place_of(results, (None if one is None else one[None] for one in single))
    seeds = torch.eye(count, dtype=outputs.dtype, device=outputs.device)[:, None].expand(-1, len(outputs), -1)
    try:
        found: Any = torch.autograd.grad(
            outputs, wanted, seeds, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
    except RuntimeError:  # an operation without a batching rule
        rows: list[Any] = [
            torch.autograd.grad(outputs, wanted, seed, retain_graph=True, allow_unused=True) for seed in seeds
        ]
        found = tuple(
            None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)
        )
    return _in_place_of(results, found)


def _in_place_of(results: list[Tensor], derivatives: Iterable[Tensor | None]) -> list[Tensor | None]:
    """One for each result, None for those that need none."""
    given = iter(derivatives)
    return [next(given) if result.requires_grad else None for result in results]


def _as_positions(layer: Any, activation: Tensor, derivative: Tensor) -> _Call:
    if isinstance(layer, nn.Linear):
        n, outputs = activation.shape[0], derivative.shape[0]
        columns = activation.reshape(n, -1, activation.shape[-1])
        return _Call(columns, derivative.transpose(0, 1).reshape(n, outputs, columns.shape[1], -1))
    if layer.padding_mode == "zeros":
        padded = nn.functional.pad(activation, layer._reversed_padding_repeated_twice)
    else:
        padded = nn.functional.pad(
            activation, layer._reversed_padding_repeated_twice, mode=layer.padding_mode
        )
    flat = isinstance(layer, nn.Conv1d)
    kernel, dilation, stride = (
        (1, *size) if flat else size for size in (layer.kernel_size, layer.dilation, layer.stride)
    )
    columns = nn.functional.unfold(padded[:, :, None] if flat else padded, kernel, dilation, 0, stride)
    return _Call(columns.transpose(1, 2), derivative.flatten(3).permute(1, 0, 3, 2).contiguous())


def _layer_kernel(layer: _LayerRecord, one: _Call, two: _Call, trace: bool) -> Tensor:
    """Contribution of one layer's weight and bias."""
    w, b = layer.weight_scale**2, layer.bias_scale**2
    if one.activations.shape[1] == two.activations.shape[1] == 1:
        gram = w * (one.activations[:, 0] @ two.activations[:, 0].T) + b
        product = _outer(one.derivatives[:, :, 0], two.derivatives[:, :, 0], trace)
        return product.mul_(gram if trace else gram[:, :, None, None])
    total = _outer(one.derivatives.sum(2), two.derivatives.sum(2), trace).mul_(b)
    if w:
        n, m, outputs = len(one.activations), len(two.activations), one.derivatives.shape[1]
        t, fan_in = one.activations.shape[1:]
        s, fan_out = two.activations.shape[1], one.derivatives.shape[-1]
        each = outputs if trace else outputs**2
        by_position = n * m * t * s * (fan_in + each * fan_out)
        by_parameter = n * m * each * fan_in * fan_out + (n * t + m * s) * outputs * fan_in * fan_out
        way = _between_positions if by_position < by_parameter else _between_weights
        total.add_(way(one, two, trace), alpha=w)
    return total


def _between_positions(one: _Call, two: _Call, trace: bool) -> Tensor:
    """Gram matrices over all pairs of positions, in tiles of inputs."""
    n, outputs, t, _ = one.derivatives.shape
    m, s = two.activations.shape[:2]
    each = 1 if trace else outputs**2
    step = max(1, math.isqrt(_GRAM_ELEMENTS // (t * s * (1 + each))))
    result = one.activations.new_empty((n, m) if trace else (n, m, outputs, outputs))
    for i in range(0, n, step):
        for j in range(0, m, step):
            a, b = one.activations[i : i + step], two.activations[j : j + step]
            d, e = one.derivatives[i : i + step], two.derivatives[j : j + step]
            gram = (a.flatten(0, 1) @ b.flatten(0, 1).T).reshape(len(a), t, len(b), s)
            if trace:
                d, e = d.transpose(1, 2).flatten(2), e.transpose(1, 2).flatten(2)
                product = (d.flatten(0, 1) @ e.flatten(0, 1).T).reshape(gram.shape)
                result[i : i + step, j : j + step] = product.mul_(gram).sum((1, 3)) / outputs
            else:
                product = (d.flatten(0, 2) @ e.flatten(0, 2).T).reshape(
                    len(a), outputs, t, len(b), outputs, s
                )
                block = product.mul_(gram[:, None, :, :, None]).sum((2, 5))
                result[i : i + step, j : j + step] = block.transpose(1, 2)
    return result


def _between_weights(one: _Call, two: _Call, trace: bool) -> Any:
    """The layer's Jacobian, a few rows of the weight at a time: cheaper where positions outnumber weights."""
    n, outputs, _, fan_out = one.derivatives.shape
    fan_in = one.activations.shape[2]
    step = max(1, _GRAM_ELEMENTS // max(1, (n + len(two.activations)) * outputs * fan_in))
    total: Any = 0.0
    for k in range(0, fan_out, step):
        first = _weight_rows(one, k, step)
        second = first if two is one else _weight_rows(two, k, step)
        total = total + _outer(first, second, trace)
    return total


def _weight_rows(call: _Call, start: int, count: int) -> Tensor:
    """Derivatives of each output by rows of the weight, (N, O, rows x fan_in)."""
    rows = call.derivatives[..., start : start + count].transpose(2, 3)  # [N, O, rows, T]
    return (rows.flatten(1, 2) @ call.activations).reshape(*rows.shape[:2], -1)

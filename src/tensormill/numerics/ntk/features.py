"""Random features of tangent kernels: vectors whose inner products tend to a network's kernels.

An activation of covariance S = <phi, phi'> is drawn at m Gaussian directions w: phi <- f(w phi) / sqrt(m), as random
arc-cosine features do for ReLU (Cho and Saul, NeurIPS 2009). The tangent kernel's factor E[f'(u) f'(v)] T is a product of
kernels, for which f'(w phi) (g psi) / sqrt(m) with an independent Gaussian direction g is an unbiased sketch (the idea of
Zandieh et al., NeurIPS 2021, with a plain sketch). Kernels of independent parts add: their features are put side by side.
Regression on N inputs then costs O(N m^2) instead of O(N^3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument, ModelError
from tensormill.numerics.dual_activations import _derivative, _recognise
from tensormill.numerics.ntk.infinite import (
    Activation,
    Dense,
    Flatten,
    Layer,
    LayerNorm,
    Residual,
    Sequential,
    _check_inputs,
)

__all__ = ["RandomFeatures"]


@dataclass(frozen=True)
class RandomFeatures:
    """A map from inputs to features whose inner products approximate a dense network's NNGP or tangent kernel.

    The same settings give the same map, so that training and test inputs can be mapped apart.

    Example:
        >>> from tensormill.numerics.ntk.infinite import Dense, ReLU, Sequential
        >>> features = RandomFeatures(Sequential(Dense(2**0.5), ReLU(), Dense()), count=512)
        >>> features(torch.eye(2)).shape
        torch.Size([2, 1024])

    Attributes:
        network: dense layers, activations, layer norms and residual sums of them.
        count: m, directions drawn for each activation; errors fall with its root.
        get: "ntk" or "nngp".
        seed: of the directions.
    """

    network: Layer
    count: int
    get: str = "ntk"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InvalidArgument(f"given count={self.count}, expected at least 1")
        if self.get not in ("nngp", "ntk"):
            raise InvalidArgument(f"given get={self.get!r}, expected 'nngp' or 'ntk'")
        for leaf in self.network._leaves():
            if not isinstance(leaf, Dense | Activation | Flatten | LayerNorm):
                raise ModelError(f"given {leaf!r} in a network for random features, expected dense layers")

    def __call__(self, x: Tensor) -> Tensor:
        """Features of inputs.

        Args:
            x: (N, ...), float32 or float64; more than one trailing axis is flattened.

        Returns:
            (N, F), F about `count` ("nngp") or twice that ("ntk").

        Raises:
            InvalidArgument: inputs of another type, or not finite.
        """
        _check_inputs(x, None)
        flat = x.flatten(1)
        generator = torch.Generator().manual_seed(self.seed)
        nngp = flat / math.sqrt(flat.shape[1])
        state = _Features(nngp, nngp[:, :0], self.get == "ntk")
        state = _apply(self.network, state, self.count, generator)
        return state.ntk if self.get == "ntk" else state.nngp


@dataclass(frozen=True)
class _Features:
    nngp: Tensor
    ntk: Tensor
    wanted: bool


def _apply(layer: Layer, state: _Features, count: int, generator: torch.Generator) -> _Features:
    if isinstance(layer, Sequential):
        for inner in layer.layers:
            state = _apply(inner, state, count, generator)
        return state
    if isinstance(layer, Residual):
        branch = _apply(layer.branch, state, count, generator)
        base = state if layer.shortcut is None else _apply(layer.shortcut, state, count, generator)
        return _Features(
            torch.cat([base.nngp, branch.nngp], 1), torch.cat([base.ntk, branch.ntk], 1), state.wanted
        )
    if isinstance(layer, Dense):
        bias = [state.nngp.new_full((len(state.nngp), 1), layer.b_std)] if layer.b_std else []
        nngp = torch.cat([layer.W_std * state.nngp, *bias], 1)
        ntk = torch.cat([layer.W_std * state.ntk, nngp], 1) if state.wanted else state.ntk
        return _Features(nngp, ntk, state.wanted)
    if isinstance(layer, LayerNorm):
        scale = (state.nngp.square().sum(1, keepdim=True) + layer.eps).rsqrt()
        return _Features(state.nngp * scale, state.ntk * scale, state.wanted)
    if isinstance(layer, Activation):
        _, function = _recognise(layer.function)
        drawn = state.nngp @ _directions(state.nngp, count, generator)
        nngp = function(drawn) / math.sqrt(count)
        ntk = state.ntk
        if state.wanted:
            slope = _derivative(function, 1)(drawn).detach()
            ntk = slope * (state.ntk @ _directions(state.ntk, count, generator)) / math.sqrt(count)
        return _Features(nngp, ntk, state.wanted)
    return state


def _directions(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(features of values, count) standard normal, drawn on the host so that every device gets the same."""
    return torch.randn(values.shape[1], count, dtype=torch.float32, generator=generator).to(values)

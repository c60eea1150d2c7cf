"""The SNNK layer: fixed random features of the input, and one trained vector of them for every neuron."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument
from tensormill.numerics.snnk.features import URF, RandomFeatures, ReLUFeatures
from tensormill.numerics.snnk.spectrum import Spectrum

__all__ = ["SNNKLinear", "random_features"]


def random_features(
    in_features: int,
    num_features: int,
    feature: str | Spectrum = "relu",
    *,
    bias: bool = False,
    **settings: Any,
) -> RandomFeatures:
    """Features by name: "relu" gives `ReLUFeatures`, everything else a `URF` of that activation.

    Args:
        in_features: d.
        num_features: m.
        feature: "relu" (arc-cosine features, not the Fourier series of a ReLU: give `spectrum_of("relu")` for that), or
            what `URF` takes as activation.
        bias: whether psi is to take a bias.
        **settings: of `ReLUFeatures` or `URF`.

    Raises:
        InvalidArgument: an unknown feature, or settings out of range.
    """
    if feature == "relu":
        return ReLUFeatures(in_features, num_features, bias=bias, **settings)
    return URF(in_features, num_features, feature, **settings)


class SNNKLinear(nn.Module):
    """Takes the place of a linear layer and its activation: y = phi(x) weight^T + bias.

    A neuron has as many parameters as a feature vector has numbers (m, or 2m for complex features) instead of d; the
    features are fixed. The cost for an input is m d (m log d with Hadamard projections) for the features and
    out * feature_size for the product, against d * out.

    Args:
        in_features: d.
        out_features: neurons.
        features: made for d inputs, or a number m of arc-cosine features.
        init: "psi", features of a Kaiming-uniform dense layer, or "zero".
        bias: add a trained constant, which starts at 0. The dense layer's own bias is within the features.
        generator: of the dense layer; None: the global one.
        device: of the weight.
        dtype: of the weight.

    Raises:
        InvalidArgument: features of another width, sizes below 1, or an unknown init.

    Example:
        >>> import torch
        >>> from tensormill.numerics.snnk import SNNKLinear
        >>> layer = SNNKLinear(64, 10, 16)
        >>> layer(torch.randn(5, 3, 64)).shape, layer.weight.shape
        (torch.Size([5, 3, 10]), torch.Size([10, 16]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        features: RandomFeatures | int,
        *,
        init: str = "psi",
        bias: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(out_features, bool) or not isinstance(out_features, int) or out_features < 1:
            raise InvalidArgument(f"given out_features={out_features!r}, expected an integer of at least 1")
        if init not in ("psi", "zero"):
            raise InvalidArgument(f"given init {init!r}, expected 'psi' or 'zero'")
        if not isinstance(features, RandomFeatures):
            features = ReLUFeatures(in_features, features, device=device, dtype=dtype)
        if features.in_features != in_features:
            raise InvalidArgument(
                f"given features of {features.in_features} inputs, expected {in_features} as the layer has"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.features = features
        weight = torch.zeros(out_features, features.feature_size)
        if init == "psi":
            bound = math.sqrt(1 / in_features)
            dense = (torch.rand(out_features, in_features, generator=generator) * 2 - 1) * bound
            first = next(features.buffers())
            weight = features.psi(dense.to(first.device, first.dtype)).detach()
        self.weight = nn.Parameter(weight.to(device=device, dtype=dtype))
        self.bias = nn.Parameter(self.weight.new_zeros(out_features)) if bias else None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        activation: str | Spectrum | RandomFeatures,
        num_features: int = 256,
        *,
        inputs: Tensor | None = None,
        **settings: Any,
    ) -> SNNKLinear:
        """The layer that estimates activation(linear(x)), with psi of the linear layer's weights.

        Args:
            linear: a trained layer.
            activation: as `random_features` takes it ("relu": arc-cosine features, another function than a ReLU), or
                features of the linear layer's width.
            num_features: m.
            inputs: (..., d) examples, from which the typical length of an input is taken; None: sqrt(d), that of
                normalized activations.
            **settings: of the features: projection, split, A, seed, ...

        Returns:
            A layer on the linear layer's device and of its dtype. It warns where the predicted standard deviation of
            an output is larger than the outputs themselves.

        Raises:
            InvalidArgument: `linear` is no nn.Linear, or settings out of range.
        """
        if not isinstance(linear, nn.Linear):
            raise InvalidArgument(f"given a {type(linear).__name__}, expected nn.Linear")
        weight = linear.weight.detach()
        bias = None if linear.bias is None else linear.bias.detach()
        where: dict[str, Any] = {"device": weight.device, "dtype": torch.float64}
        if isinstance(activation, RandomFeatures):
            features = activation
        else:
            if activation != "relu" and "norms" not in settings:
                settings["norms"] = _norms(linear, inputs)
            features = random_features(
                linear.in_features, num_features, activation, bias=bias is not None, **settings, **where
            )
            if isinstance(features, URF):
                _warn_if_noisy(features)
        layer = cls(linear.in_features, linear.out_features, features, init="zero", **where)
        with torch.no_grad():
            first = next(features.buffers())
            b = None if bias is None else bias.to(first)
            layer.weight.copy_(features.psi(weight.to(first), b))
        return layer.to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return nn.functional.linear(self.features(x), self.weight, self.bias)

    @torch.no_grad()
    def absorb(self, linear: nn.Linear) -> SNNKLinear:
        """This layer and the linear layer that follows it, as one layer of the same features.

        So a Transformer's MLP, its first layer replaced, ends up with one matrix of (hidden, m), and a pooler becomes
        one with the classifier behind it (section 3.3).

        Args:
            linear: takes this layer's outputs.

        Returns:
            A layer that shares the features with this one: linear(self(x)) up to rounding.

        Raises:
            InvalidArgument: no nn.Linear, or one for another width.

        Example:
            >>> import torch
            >>> from tensormill.numerics.snnk import SNNKLinear
            >>> up, down = SNNKLinear(8, 32, 4), torch.nn.Linear(32, 8)
            >>> sum(p.numel() for p in up.absorb(down).parameters())
            40
        """
        if not isinstance(linear, nn.Linear) or linear.in_features != self.out_features:
            raise InvalidArgument(f"given {linear}, expected nn.Linear of {self.out_features} inputs")
        where: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        merged = SNNKLinear(
            self.in_features, linear.out_features, self.features, init="zero", bias=True, **where
        )
        assert merged.bias is not None
        merged.weight.copy_(linear.weight.double() @ self.weight.double())
        if self.bias is not None:
            merged.bias.add_(linear.weight @ self.bias)
        if linear.bias is not None:
            merged.bias.add_(linear.bias)
        return merged

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def _norms(linear: nn.Linear, inputs: Tensor | None) -> tuple[float, float]:
    """Root mean square lengths of inputs and of weight rows."""
    if inputs is None:
        x_norm = linear.in_features**0.5
    else:
        if inputs.shape[-1] != linear.in_features:
            raise InvalidArgument(
                f"given inputs of shape {tuple(inputs.shape)}, expected (..., {linear.in_features})"
            )
        x_norm = float(inputs.detach().double().square().sum(-1).mean().sqrt())
    w_norm = float(linear.weight.detach().double().square().sum(-1).mean().sqrt())
    return max(x_norm, 1e-6), max(w_norm, 1e-6)


def _warn_if_noisy(features: URF) -> None:
    relative = features.relative_std(*features.norms)
    if relative > 1:
        warnings.warn(
            f"inputs of length {features.norms[0]:.3g} and weights of length {features.norms[1]:.3g} with "
            f"{features.num_features} features: the outputs' predicted standard deviation is {relative:.3g} times "
            "their size; use smaller norms (normalize=...), more features, or train the layer afterwards",
            stacklevel=3,
        )

"""Networks of finite width whose infinite-width limit `infinite` knows: layers with explicit scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "ChannelNorm",
    "Elementwise",
    "GlobalAvgPool",
    "ScaledConv1d",
    "ScaledConv2d",
    "ScaledLinear",
    "Sum",
]

PARAMETRIZATIONS = ("ntk", "standard")


class ScaledLinear(nn.Linear):
    """weight_scale W a + bias_scale b."""

    weight_scale: float = 1.0
    bias_scale: float = 1.0

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features) -> (..., out_features)."""
        bias = None if self.bias is None else self.bias_scale * self.bias
        return self.weight_scale * nn.functional.linear(input, self.weight) + (0.0 if bias is None else bias)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, weight_scale={self.weight_scale:.4g}, bias_scale={self.bias_scale:.4g}"
        )


class _ScaledConv:
    """What both convolutions share: the module's convolution of scaled parameters."""

    weight_scale: float = 1.0
    bias_scale: float = 1.0

    def forward(self: Any, input: Tensor) -> Tensor:
        """input: (N, in_channels, *positions) -> (N, out_channels, *positions)."""
        bias = None if self.bias is None else self.bias_scale * self.bias
        return self._conv_forward(input, self.weight_scale * self.weight, bias)  # type: ignore[no-any-return]


class ScaledConv1d(_ScaledConv, nn.Conv1d):
    """Convolution with weight_scale W and bias_scale b."""


class ScaledConv2d(_ScaledConv, nn.Conv2d):
    """Convolution with weight_scale W and bias_scale b."""


class Elementwise(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        return self.function(input)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


class GlobalAvgPool(nn.Module):
    """Mean over all axes after the channels."""

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, channels, *positions) -> (N, channels)."""
        return input.flatten(2).mean(-1)


class ChannelNorm(nn.Module):
    """Normalization to mean 0 and variance 1 along axis 1, without learned scale."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, channels, ...) of any trailing shape."""
        centred = input - input.mean(1, keepdim=True)
        return centred * (centred.square().mean(1, keepdim=True) + self.eps).rsqrt()


class Sum(nn.Module):
    """The sum of two branches."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, input: Tensor) -> Tensor:
        """What both branches take."""
        return self.branch(input) + self.shortcut(input)


@dataclass
class Builder:
    """Draws the layers of a finite network in order."""

    width: int
    out_features: int
    last: int | None
    uses: int  # of the layer that comes last; the same object may also stand earlier
    parametrization: str
    seed: int | None
    dtype: torch.dtype
    generator: torch.Generator | None = field(init=False)

    def __post_init__(self) -> None:
        self.generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def features(self, layer: object) -> int:
        """Width of a layer that states none."""
        if id(layer) != self.last:
            return self.width
        self.uses -= 1
        return self.width if self.uses else self.out_features

    def dense(self, inputs: int, outputs: int, W_std: float, b_std: float) -> nn.Module:
        """A dense layer drawn from its prior."""
        layer = ScaledLinear(inputs, outputs, bias=b_std > 0, dtype=self.dtype)
        return self._drawn(layer, inputs, W_std, b_std)

    def conv(
        self,
        inputs: int,
        outputs: int,
        axes: int,
        size: int,
        stride: int,
        padding: str,
        W_std: float,
        b_std: float,
    ) -> nn.Module:
        """A convolution drawn from its prior."""
        kind: Any = {1: ScaledConv1d, 2: ScaledConv2d}[axes]
        layer = kind(
            inputs,
            outputs,
            size,
            stride,
            padding=0 if padding == "valid" else size // 2,
            padding_mode="circular" if padding == "circular" else "zeros",
            bias=b_std > 0,
            dtype=self.dtype,
        )
        return self._drawn(layer, inputs * size**axes, W_std, b_std)

    def _drawn(self, layer: Any, fan_in: int, W_std: float, b_std: float) -> nn.Module:
        scale = W_std / math.sqrt(fan_in)
        with torch.no_grad():
            for parameter, deviation in ((layer.weight, scale), (layer.bias, b_std)):
                if parameter is not None:
                    parameter.normal_(generator=self.generator)
                    if self.parametrization == "standard":
                        parameter.mul_(deviation)
        if self.parametrization == "ntk":
            layer.weight_scale, layer.bias_scale = scale, b_std
        return layer  # type: ignore[no-any-return]


def deviations(module: Any) -> tuple[float, float]:
    """(W_std, b_std) of a linear or convolutional module: of its scales if it has them, else of its weights."""
    weight, bias = module.weight.detach(), module.bias
    fan_in = weight[0].numel()
    if isinstance(module, ScaledLinear | ScaledConv1d | ScaledConv2d) and module.weight_scale != 1.0:
        return module.weight_scale * math.sqrt(fan_in), 0.0 if bias is None else module.bias_scale
    W_std = math.sqrt(fan_in) * float(weight.square().mean().sqrt())
    return W_std, 0.0 if bias is None else float(bias.detach().square().mean().sqrt())

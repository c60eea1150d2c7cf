"""The exact infinite-width limit of linear networks with one hidden layer in muP, which is a small network.

A network f(x) = alpha V (U x + alpha_b beta) of width n has U (n, d) with entries N(0, sigma_u^2 / n), V (o, n) with
entries N(0, sigma_v^2 / n), a bias beta = 0, and learning rates that do not depend on n. Gradients add to U's columns and
V's rows multiples of one another, so both stay in the span of the d + o initial ones, which become orthogonal as n
grows. Their coefficients are the limit's parameters: U0 = [sigma_u I; 0], V0 = [0, sigma_v I]. Gradients, their norms
(clipping), momentum and weight decay of the coefficients are those of the network (Yang and Hu, arXiv 2011.14522,
section 5 and appendix D; TP4's MetaInfLin1LP). Optimizers that treat every weight on its own (Adam) leave the span,
and nonlinear networks have no finite limit of this kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument, ModelError

__all__ = ["FiniteLinear1", "InfiniteLinear1", "Linear1Config"]


@dataclass(frozen=True)
class Linear1Config:
    """Sizes and constants of a linear network with one hidden layer, of any width.

    Attributes:
        inputs: d.
        outputs: o.
        sigma_u: initial standard deviation of the first layer times sqrt(width).
        sigma_v: of the second layer.
        alpha: factor of the output.
        bias: factor alpha_b of the hidden bias; 0: no bias.
        output_bias: factor of a bias at the output, which starts at zero; 0: none.
    """

    inputs: int
    outputs: int
    sigma_u: float = 1.0
    sigma_v: float = 1.0
    alpha: float = 1.0
    bias: float = 0.0
    output_bias: float = 0.0

    def __post_init__(self) -> None:
        if self.inputs < 1 or self.outputs < 1:
            raise InvalidArgument(
                f"given inputs={self.inputs}, outputs={self.outputs}, expected at least 1 each"
            )
        for name in ("sigma_u", "sigma_v", "alpha", "bias", "output_bias"):
            value = getattr(self, name)
            if not math.isfinite(value) or (name.startswith("sigma") and value < 0):
                raise InvalidArgument(f"given {name}={value}, expected a finite number (sigmas: at least 0)")
        if self.sigma_u == self.sigma_v == 0:
            raise InvalidArgument(
                "given sigma_u = sigma_v = 0, expected one above 0: nothing would ever move"
            )


class _Linear1(nn.Module):
    def __init__(self, config: Linear1Config, u: Tensor, v: Tensor) -> None:
        super().__init__()
        self.config = config
        self.u = nn.Parameter(u)
        self.v = nn.Parameter(v)
        self.beta = nn.Parameter(u.new_zeros(u.shape[0])) if config.bias else None
        self.output_beta = nn.Parameter(u.new_zeros(config.outputs)) if config.output_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        if x.shape[-1] != self.config.inputs:
            raise InvalidArgument(
                f"given inputs of shape {tuple(x.shape)}, expected {self.config.inputs} in the last dimension"
            )
        hidden = x @ self.u.mT
        if self.beta is not None:
            hidden = hidden + self.config.bias * self.beta
        output = self.config.alpha * (hidden @ self.v.mT)
        if self.output_beta is not None:
            output = output + self.config.output_bias * self.output_beta
        return output

    def extra_repr(self) -> str:
        """Settings."""
        return f"{self.config}, coefficients={self.u.shape[0]}"


class FiniteLinear1(_Linear1):
    """The network of a finite width; also what `InfiniteLinear1.sample` returns.

    Args:
        config: sizes and constants.
        width: n.
        seed: of the initial weights.
        device, dtype: of the weights.

    Example:
        >>> FiniteLinear1(Linear1Config(3, 2), width=16)(torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        config: Linear1Config,
        width: int,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if width < 1:
            raise InvalidArgument(f"given width={width}, expected at least 1")
        omega = _omega(width, config.inputs + config.outputs, seed).to(
            device, dtype or torch.get_default_dtype()
        )
        d = config.inputs
        super().__init__(config, config.sigma_u * omega[:, :d], config.sigma_v * omega[:, d:].mT.contiguous())


class InfiniteLinear1(_Linear1):
    """The limit: a network of d + o coefficients instead of a width, trained like any module with SGD.

    Args:
        config: sizes and constants.
        device, dtype: of the parameters.

    Example:
        >>> limit = InfiniteLinear1(Linear1Config(3, 2))
        >>> optimizer = torch.optim.SGD(limit.parameters(), lr=0.1, momentum=0.9)
        >>> limit(torch.ones(1, 3)).tolist()
        [[0.0, 0.0]]
        >>> limit.sample(width=64, seed=1).u.shape
        torch.Size([64, 3])
    """

    def __init__(
        self,
        config: Linear1Config,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        d, o = config.inputs, config.outputs
        identity = torch.eye(d + o, device=device, dtype=dtype or torch.get_default_dtype())
        super().__init__(
            config, config.sigma_u * identity[:, :d], config.sigma_v * identity[:, d:].mT.contiguous()
        )

    @classmethod
    def of(cls, model: nn.Module, *, sigma_u: float = 1.0, sigma_v: float = 1.0) -> InfiniteLinear1:
        """The limit of an ordinary model of two linear layers.

        Args:
            model: `nn.Sequential` of two `nn.Linear` (or modules that do nothing, `nn.Identity`, between them), with
                or without biases.
            sigma_u, sigma_v: see `Linear1Config`.

        Raises:
            ModelError: anything else: the exact limit exists for linear networks with one hidden layer only.
        """
        layers = [m for m in model.modules() if not list(m.children()) and not isinstance(m, nn.Identity)]
        linear = [m for m in layers if isinstance(m, nn.Linear)]
        if not isinstance(model, nn.Sequential) or len(layers) != len(linear) or len(linear) != 2:
            what = ", ".join(type(m).__name__ for m in layers) or type(model).__name__
            raise ModelError(
                f"given a model of {what}, expected nn.Sequential of two linear layers: the exact limit exists for "
                "linear networks with one hidden layer only; approximate others by a wide network in muP"
            )
        config = Linear1Config(
            linear[0].in_features,
            linear[1].out_features,
            sigma_u,
            sigma_v,
            bias=1.0 if linear[0].bias is not None else 0.0,
            output_bias=1.0 if linear[1].bias is not None else 0.0,
        )
        return cls(config, device=linear[0].weight.device, dtype=linear[0].weight.dtype)

    def sample(self, width: int, *, seed: int = 0) -> FiniteLinear1:
        """A network of finite width whose state is a random instance of the limit's present one.

        Its weights are U = Omega U_inf and V = V_inf Omega^T with Omega (width, d + o) of entries N(0, 1 / width):
        before training a freshly initialised network, after training one that has learnt what the limit has, up to
        fluctuations of order width^(-1/2).

        Args:
            width: n.
            seed: of Omega; equal to the seed of a `FiniteLinear1` whose twin this is.

        Raises:
            InvalidArgument: width below one.
        """
        network = FiniteLinear1(self.config, width, seed=seed, device=self.u.device, dtype=self.u.dtype)
        omega = _omega(width, self.u.shape[0], seed).to(self.u)
        with torch.no_grad():
            network.u.copy_(omega @ self.u)
            network.v.copy_(self.v @ omega.mT)
            if self.beta is not None and network.beta is not None:
                network.beta.copy_(omega @ self.beta)
            if self.output_beta is not None and network.output_beta is not None:
                network.output_beta.copy_(self.output_beta)
        return network


def _omega(width: int, coefficients: int, seed: int) -> Tensor:
    """(width, coefficients) float64, entries N(0, 1 / width); nearly orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, coefficients, generator=generator, dtype=torch.float64) / math.sqrt(width)

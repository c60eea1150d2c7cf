"""Kernel limits of networks with one hidden layer, trained by SGD in function space.

In the neural tangent parametrization an infinitely wide network follows its tangent kernel (ntk), or, where only its
last layer is trained, the kernel of its Gaussian process (gp). Its state is a list of inputs and coefficients: f(x) =
sum_j K(x, x_j) c_j starts empty, and a step of SGD appends the batch with the coefficients -lr dloss/df (Yang and Hu,
arXiv 2011.14522, section 9 and TP4's kernel baselines). The norm of a gradient in parameter space, which clipping needs,
is sqrt(tr g^T K g). Moments of the nonlinearity come from `tensormill.numerics.dual_activations`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensormill.errors import CheckpointError, InvalidArgument
from tensormill.numerics.dual_activations import dual_activation

__all__ = ["InfiniteKernel1", "Kernel1Config"]

KINDS = ("ntk", "gp")


@dataclass(frozen=True)
class Kernel1Config:
    """A network f(x) = sigma_v n^(-1/2) v . activation(sigma_u d^(-1/2) u x + sigma_b beta), all weights N(0, 1).

    Attributes:
        inputs: d.
        outputs: o.
        kind: "ntk": both layers are trained; "gp": the last one.
        activation: a name that `dual_activation` knows: "relu", "identity" (a linear network), "erf", ...
        sigma_u, sigma_v, sigma_b: constants; sigma_b = 0: no bias.
        normalize: scale inputs to the norm sqrt(d) first, as TP4 does; the zero input stays zero.
    """

    inputs: int
    outputs: int
    kind: str = "ntk"
    activation: str = "relu"
    sigma_u: float = 1.0
    sigma_v: float = 1.0
    sigma_b: float = 0.0
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.inputs < 1 or self.outputs < 1:
            raise InvalidArgument(
                f"given inputs={self.inputs}, outputs={self.outputs}, expected at least 1 each"
            )
        if self.kind not in KINDS:
            raise InvalidArgument(f"given kind {self.kind!r}, expected one of {', '.join(KINDS)}")
        for name in ("sigma_u", "sigma_v", "sigma_b"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidArgument(f"given {name}={value}, expected a finite number of at least 0")
        dual_activation(self.activation)  # refuses what it doesn't know


class InfiniteKernel1:
    """An infinitely wide network in a kernel regime: its function, and steps of SGD on it.

    Args:
        config: the network.
        device, dtype: of inputs and coefficients.

    Example:
        >>> network = InfiniteKernel1(Kernel1Config(inputs=3, outputs=2))
        >>> x, y = torch.eye(3), torch.tensor([0, 1, 1])
        >>> losses = [network.train_step(x, lambda f: torch.nn.functional.cross_entropy(f, y), lr=1.0) for _ in range(20)]
        >>> round(losses[0], 4), losses[-1] < 0.4
        (0.6931, True)
    """

    def __init__(
        self,
        config: Kernel1Config,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.config = config
        self._value = dual_activation(config.activation, order=(0, 0))
        self._slope = dual_activation(config.activation, order=(1, 1)) if config.kind == "ntk" else None
        options: dict[str, Any] = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        self._inputs = torch.zeros(0, config.inputs, **options)
        self._coefficients = torch.zeros(0, config.outputs, **options)
        self._length = 0
        self._factor = 1.0  # weight decay multiplies all coefficients, those of a checkpoint too

    def __len__(self) -> int:
        return self._length

    @property
    def inputs(self) -> Tensor:
        """(steps x batch, d): all inputs seen, normalised where the network does that."""
        return self._inputs[: self._length]

    @property
    def coefficients(self) -> Tensor:
        """(steps x batch, o)."""
        return self._coefficients[: self._length] * self._factor

    def kernel(self, x1: Tensor, x2: Tensor | None = None) -> Tensor:
        """The kernel between inputs.

        Args:
            x1: (..., N, d).
            x2: (..., M, d), leading dimensions that broadcast with x1's; None: x1.

        Returns:
            (..., N, M).

        Raises:
            InvalidArgument: another last dimension, or other leading dimensions.
        """
        x1 = self._prepared(x1)
        return self._kernel(x1, x1 if x2 is None else self._prepared(x2))

    def _prepared(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[-1] != self.config.inputs:
            raise InvalidArgument(
                f"given inputs of shape {tuple(x.shape)}, expected (..., batch, {self.config.inputs})"
            )
        x = x.to(self._inputs)
        if self.config.normalize:
            norm = x.norm(dim=-1, keepdim=True)
            x = x * torch.where(norm > 0, math.sqrt(self.config.inputs) / norm, 0.0)
        return x

    def _kernel(self, x1: Tensor, x2: Tensor) -> Tensor:
        config = self.config
        scale = config.sigma_u**2 / config.inputs
        shift = config.sigma_b**2
        s = (x1 @ x2.mT) * scale + shift
        q = x1.square().sum(-1)[..., :, None] * scale + shift
        r = x2.square().sum(-1)[..., None, :] * scale + shift
        value = self._value(q, r, s)
        if self._slope is not None:
            value = value + s * self._slope(q, r, s)
        return config.sigma_v**2 * value

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs (..., batch, o) of inputs (..., batch, d)."""
        x = self._prepared(x)
        if not self._length:
            return x.new_zeros(*x.shape[:-1], self.config.outputs)
        flat = x.reshape(-1, x.shape[-1])
        return (self._kernel(flat, self.inputs) @ self.coefficients).unflatten(0, x.shape[:-1])

    def gradient_norm(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Norm of the loss's gradient in all the network's parameters, a scalar.

        Args:
            x: (batch, d).
            gradient: (batch, o), of the loss in the outputs.
        """
        square = (gradient * (self.kernel(x) @ gradient)).sum()
        return square.clamp_min(0).sqrt()

    def step(
        self,
        x: Tensor,
        gradient: Tensor,
        lr: float,
        *,
        clip: float | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        """One step of SGD: append the batch.

        Args:
            x: (batch, d).
            gradient: (batch, o): derivative of the loss in the outputs.
            lr: learning rate.
            clip: largest norm of the gradient in parameter space, to which a larger one is scaled.
            weight_decay: of the distance to the initial function, which is zero.

        Raises:
            InvalidArgument: shapes that don't fit, or lr x weight_decay of 1 or more.
        """
        x = self._prepared(x)
        if x.ndim != 2 or gradient.shape != (x.shape[0], self.config.outputs):
            raise InvalidArgument(
                f"given inputs of shape {tuple(x.shape)} and a gradient of shape {tuple(gradient.shape)}, expected "
                f"(batch, {self.config.inputs}) and (batch, {self.config.outputs})"
            )
        if not 0 <= lr * weight_decay < 1:
            raise InvalidArgument(f"given lr={lr}, weight_decay={weight_decay}, expected a product in [0, 1)")
        gradient = gradient.detach().to(self._coefficients)
        if clip is not None:
            gradient = gradient * (clip / (self.gradient_norm(x, gradient) + 1e-6)).clamp(max=1.0)
        self._factor *= 1 - lr * weight_decay
        end = self._length + x.shape[0]
        if end > self._inputs.shape[0]:
            capacity = max(end, 2 * self._inputs.shape[0])
            for name in ("_inputs", "_coefficients"):
                old = getattr(self, name)
                new = old.new_zeros(capacity, old.shape[1])
                new[: self._length] = old[: self._length]
                setattr(self, name, new)
        self._inputs[self._length : end] = x
        self._coefficients[self._length : end] = gradient * (-lr / self._factor)
        self._length = end

    def train_step(self, x: Tensor, loss_fn: Callable[[Tensor], Tensor], lr: float, **settings: Any) -> float:
        """A step on a loss of the outputs.

        Args:
            x: (batch, d).
            loss_fn: outputs (batch, o) -> scalar loss.
            lr: learning rate.
            **settings: of `step`.

        Returns:
            The loss before the step.
        """
        outputs = self(x).requires_grad_()
        loss = loss_fn(outputs)
        (gradient,) = torch.autograd.grad(loss, outputs)
        self.step(x, gradient, lr, **settings)
        return float(loss.detach())

    def checkpoint(self) -> tuple[int, float]:
        """What `restore` needs to come back to the present function; costs nothing."""
        return self._length, self._factor

    def restore(self, checkpoint: tuple[int, float]) -> None:
        """Forget all steps since a checkpoint.

        Raises:
            InvalidArgument: the checkpoint is longer than the list: it is of another network, or from before `merge`.
        """
        length, factor = checkpoint
        if not 0 <= length <= self._length:
            raise InvalidArgument(
                f"given a checkpoint of {length} inputs, expected at most {self._length}; merge() ends the life of "
                "checkpoints"
            )
        self._length, self._factor = length, factor

    def merge(self) -> None:
        """Add up the coefficients of equal inputs: the function stays, the list becomes as short as the data set."""
        unique, index = torch.unique(self.inputs, dim=0, return_inverse=True)
        coefficients = unique.new_zeros(unique.shape[0], self.config.outputs)
        coefficients.index_add_(0, index, self.coefficients)
        self._inputs, self._coefficients = unique, coefficients
        self._length, self._factor = unique.shape[0], 1.0

    def state_dict(self) -> dict[str, Tensor]:
        """Inputs and coefficients."""
        return {"inputs": self.inputs.clone(), "coefficients": self.coefficients}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the function of a state.

        Raises:
            CheckpointError: sizes that are not this network's.
        """
        inputs, coefficients = state.get("inputs"), state.get("coefficients")
        if (
            inputs is None
            or coefficients is None
            or inputs.shape != (coefficients.shape[0], self.config.inputs)
            or coefficients.shape[1] != self.config.outputs
        ):
            raise CheckpointError(
                f"given a state of other sizes, expected inputs (n, {self.config.inputs}) and coefficients "
                f"(n, {self.config.outputs})"
            )
        self._inputs = inputs.to(self._inputs).clone()
        self._coefficients = coefficients.to(self._coefficients).clone()
        self._length, self._factor = inputs.shape[0], 1.0

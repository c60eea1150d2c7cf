"""abc-parametrizations: how weights, initialisation and learning rate scale with width, and what follows.

A network of width n with layers 1, ..., L+1 has weights W^l = n^(-a_l) w^l with w^l ~ N(0, n^(-2 b_l)) and is trained
by SGD with the learning rate eta n^(-c). The exponents alone decide what happens as n grows: whether training is
stable, whether the function moves, and whether the hidden features move with it or the network follows a fixed
kernel (Yang and Hu, arXiv 2011.14522, sections 3 and H).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument

__all__ = ["ABC", "ABCNetwork", "Regime", "classify"]

PRESETS = ("sp", "ntp", "mfp", "mup")
_EXACT = 1e-9  # exponents are small multiples of simple fractions; sums of a few of them round to about 1e-16


@dataclass(frozen=True)
class ABC:
    """Exponents of width: multiplier n^(-a_l), initial standard deviation n^(-b_l), learning rate eta n^(-c).

    Attributes:
        a: (L + 1) exponents of the weights' multipliers, first layer first.
        b: (L + 1) exponents of the initial standard deviations.
        c: exponent of the learning rate.

    Raises:
        InvalidArgument: a and b differ in length, have fewer than two layers, or hold no finite numbers.

    Example:
        >>> ABC.preset("mup", hidden_layers=2)
        ABC(a=(-0.5, 0.0, 0.5), b=(0.5, 0.5, 0.5), c=0.0)
    """

    a: tuple[float, ...]
    b: tuple[float, ...]
    c: float

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "a", tuple(float(x) for x in self.a))
            object.__setattr__(self, "b", tuple(float(x) for x in self.b))
            object.__setattr__(self, "c", float(self.c))
        except (TypeError, ValueError) as error:
            raise InvalidArgument(
                f"given a={self.a!r}, b={self.b!r}, c={self.c!r}, expected sequences of numbers and a number"
            ) from error
        if len(self.a) != len(self.b) or len(self.a) < 2:
            raise InvalidArgument(
                f"given {len(self.a)} exponents a and {len(self.b)} exponents b, expected as many of both, one for "
                "each layer, at least 2"
            )
        if not all(map(math.isfinite, (*self.a, *self.b, self.c))):
            raise InvalidArgument(f"given {self}, expected finite exponents")

    @classmethod
    def preset(cls, name: str, hidden_layers: int = 1) -> ABC:
        """A parametrization with a name (table 1 of the paper).

        Args:
            name: "sp" (standard, with the largest stable learning rate, c = 1), "ntp" (neural tangent), "mfp" (mean
                field, one hidden layer), "mup" (maximal update).
            hidden_layers: L.

        Raises:
            InvalidArgument: an unknown name, no hidden layer, or mean field with more than one.
        """
        if name not in PRESETS:
            raise InvalidArgument(f"given parametrization {name!r}, expected one of {', '.join(PRESETS)}")
        if hidden_layers < 1 or (name == "mfp" and hidden_layers != 1):
            expected = "1" if name == "mfp" else "at least 1"
            raise InvalidArgument(
                f"given hidden_layers={hidden_layers} for {name!r}, expected {expected}; with more hidden layers, "
                "'mup' is what 'mfp' is with one"
            )
        zero, half = 0.0, 0.5
        inner = hidden_layers - 1
        if name == "sp":
            return cls((zero,) * (inner + 2), (zero,) + (half,) * (inner + 1), 1.0)
        if name == "ntp":
            return cls((zero,) + (half,) * (inner + 1), (zero,) * (inner + 2), 0.0)
        if name == "mfp":
            return cls((0.0, 1.0), (0.0, 0.0), -1.0)
        return cls((-half,) + (zero,) * inner + (half,), (half,) * (inner + 2), 0.0)

    @property
    def hidden_layers(self) -> int:
        """L."""
        return len(self.a) - 1

    def shifted(self, theta: float | Sequence[float]) -> ABC:
        """The same training in other exponents: a_l + theta, b_l - theta, c - 2 theta (equation 5 of the paper).

        Args:
            theta: one number. (Shifting layers by different numbers keeps the initial function but changes the
                learning rates of layers relative to one another, which a single c can't express.)
        """
        if not isinstance(theta, (int, float)):
            raise InvalidArgument(f"given theta={theta!r}, expected one number for all layers")
        return ABC(tuple(x + theta for x in self.a), tuple(x - theta for x in self.b), self.c - 2 * theta)


@dataclass(frozen=True)
class Regime:
    """What an abc-parametrization becomes at infinite width.

    Attributes:
        stable: pre-activations stay of order one, outputs do not grow, during any fixed number of steps.
        nontrivial: the function moves.
        feature_learning: the last hidden features move by an amount of order one (r = 0).
        kernel: stable, nontrivial and r > 0: the function follows kernel gradient descent.
        r: the features move by n^(-r) (definition 3.2 of the paper).
        reasons: one sentence for each inequality that is violated, and for what decides the regime.
    """

    stable: bool
    nontrivial: bool
    feature_learning: bool
    kernel: bool
    r: float
    reasons: tuple[str, ...]

    @property
    def name(self) -> str:
        """ "unstable", "trivial", "kernel" or "feature learning"."""
        if not self.stable:
            return "unstable"
        if not self.nontrivial:
            return "trivial"
        return "feature learning" if self.feature_learning else "kernel"


def classify(abc: ABC) -> Regime:
    """The infinite-width regime of a parametrization (theorems 3.3 and 3.4, corollary 3.9 of the paper).

    Args:
        abc: exponents.

    Returns:
        Flags, the exponent r and the reasons.

    Example:
        >>> classify(ABC.preset("ntp", 2)).name, classify(ABC.preset("mup", 2)).name
        ('kernel', 'feature learning')
        >>> classify(ABC((0, 0, 0), (0, 0.5, 0.5), 0)).reasons[0]
        'r = -1 < 0: the features move by n^1; a larger c, a slower learning rate, raises r'
    """
    a, b, c = abc.a, abc.b, abc.c
    last_a, last_b = a[-1], b[-1]
    r = (
        min(last_a + last_b, 2 * last_a + c)
        + c
        - 1
        + min(2 * a_l + (1 if layer == 0 else 0) for layer, a_l in enumerate(a[:-1]))
    )
    broken = []
    if r < -_EXACT:
        broken.append(
            f"r = {r:g} < 0: the features move by n^{-r:g}; a larger c, a slower learning rate, raises r"
        )
    for layer in range(abc.hidden_layers):
        wanted = 0.0 if layer == 0 else 0.5
        got = a[layer] + b[layer]
        if abs(got - wanted) > _EXACT:
            what = "explode" if got < wanted else "vanish"
            broken.append(
                f"a_{layer + 1} + b_{layer + 1} = {got:g}, not {wanted:g}: its pre-activations {what} at the start"
            )
    last = abc.hidden_layers + 1
    if last_a + last_b < 0.5 - _EXACT:
        broken.append(f"a_{last} + b_{last} = {last_a + last_b:g} < 0.5: the output explodes at the start")
    if 2 * last_a + c < 1 - _EXACT:
        broken.append(
            f"2 a_{last} + c = {2 * last_a + c:g} < 1: training the last layer makes the output explode"
        )
    if last_a + last_b + r < 1 - _EXACT:
        broken.append(
            f"a_{last} + b_{last} + r = {last_a + last_b + r:g} < 1: training the features makes the output explode"
        )
    stable = not broken
    by_last = abs(2 * last_a + c - 1) <= _EXACT
    by_features = abs(last_a + last_b + r - 1) <= _EXACT
    nontrivial = stable and (by_last or by_features)
    feature_learning = nontrivial and abs(r) <= _EXACT
    kernel = nontrivial and r > _EXACT
    reasons = list(broken)
    if stable and not nontrivial:
        reasons.append(
            f"2 a_{last} + c = {2 * last_a + c:g} > 1 and a_{last} + b_{last} + r = {last_a + last_b + r:g} > 1: the "
            "function does not move"
        )
    elif feature_learning:
        reasons.append("r = 0: the features move by an amount of order one")
    elif kernel:
        reasons.append(f"r = {r:g} > 0: the features move by n^-{r:g}, the function follows a kernel")
    return Regime(stable, nontrivial, feature_learning, kernel, r, tuple(reasons))


class ABCNetwork(nn.Module):
    """A multilayer perceptron without biases in an abc-parametrization.

    Args:
        abc: exponents; the number of layers follows from them.
        inputs: input dimension d.
        width: n, of every hidden layer.
        outputs: output dimension o.
        activation: elementwise function of the hidden layers.
        seed: of the initial weights: equal seeds give equal standard normal draws whatever the exponents.
        allow_unstable: accept exponents that blow up as the width grows.
        device, dtype: of the weights.

    Raises:
        InvalidArgument: an unstable parametrization (the message names the inequality), or a size below one.

    Example:
        >>> network = ABCNetwork(ABC.preset("mup"), inputs=3, width=8, outputs=1)
        >>> optimizer = network.sgd(lr=0.1)
        >>> network(torch.ones(2, 3)).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        abc: ABC,
        inputs: int,
        width: int,
        outputs: int,
        activation: Callable[[Tensor], Tensor] = torch.tanh,
        *,
        seed: int = 0,
        allow_unstable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(inputs, width, outputs) < 1:
            raise InvalidArgument(
                f"given inputs={inputs}, width={width}, outputs={outputs}, expected at least 1 each"
            )
        regime = classify(abc)
        if not regime.stable and not allow_unstable:
            raise InvalidArgument(
                f"given an unstable parametrization ({'; '.join(regime.reasons)}), expected a stable one; change the "
                "exponents or pass allow_unstable=True"
            )
        self.abc = abc
        self.width = width
        self.activation = activation
        generator = torch.Generator().manual_seed(seed)
        sizes = [inputs, *[width] * abc.hidden_layers, outputs]
        self.weights = nn.ParameterList()
        for layer, b in enumerate(abc.b):
            draw = torch.randn(sizes[layer + 1], sizes[layer], generator=generator, dtype=torch.float64)
            weight = (draw * width**-b).to(device=device, dtype=dtype or torch.get_default_dtype())
            self.weights.append(nn.Parameter(weight))

    def features(self, x: Tensor) -> list[Tensor]:
        """Pre-activations of every hidden layer.

        Args:
            x: (batch, inputs).

        Returns:
            L tensors (batch, width).
        """
        values = []
        for weight, a in zip(list(self.weights)[:-1], self.abc.a[:-1], strict=True):
            values.append((x @ weight.mT) * self.width**-a)
            x = self.activation(values[-1])
        return values

    def forward(self, x: Tensor) -> Tensor:
        """Outputs.

        Args:
            x: (batch, inputs).

        Returns:
            (batch, outputs).
        """
        hidden = self.activation(self.features(x)[-1])
        return (hidden @ self.weights[-1].mT) * self.width ** -self.abc.a[-1]

    def sgd(self, lr: float, **settings: Any) -> torch.optim.SGD:
        """SGD with the learning rate lr n^(-c).

        Args:
            lr: eta, the same for every width.
            **settings: further arguments of `torch.optim.SGD`.
        """
        return torch.optim.SGD(self.parameters(), lr=lr * self.width**-self.abc.c, **settings)

"""Bundling: a network as fixed random features and one matrix, whose least-squares optimum has a closed form.

A layer f(W x) is about Psi(W) Phi(x). In the next one, g(V f(W x)) is about g((V Psi(W)) Phi(x)), a layer on Phi(x),
and so on (Sehanobish et al., arXiv 2310.13225, section 3.3): all parameters end up in the last matrix, everything
before it is a fixed map. That matrix can then be fitted to data by ridge regression, in one pass and without gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument, ModelError
from tensormill.numerics.snnk.features import RandomFeatures
from tensormill.numerics.snnk.layer import random_features
from tensormill.numerics.snnk.spectrum import Spectrum

__all__ = ["BundledNet", "RidgeRegression", "ScaledFeatures", "bundle"]


class RidgeRegression:
    """Least squares with a penalty, from sums over batches: (F^T F + ridge I) W^T = F^T Y.

    Sums are held in float64 about the first batch's means, so that an intercept costs no digits. Time n p^2 for n rows
    of p features; memory p^2.

    Args:
        intercept: fit a constant as well, which is not penalized.
        products: dtype in which a batch's products are computed: float32 takes half the time of float64, or less, and
            is enough unless the ridge is tiny beside the features' squares.

    Raises:
        InvalidArgument: another dtype of products.

    Example:
        >>> import torch
        >>> solver = RidgeRegression()
        >>> x = torch.linspace(0, 1, 50, dtype=torch.float64).unsqueeze(-1)
        >>> for part in x.split(20):
        ...     solver.update(part, 3 * part + 1)
        >>> weight, bias = solver.solve(0.0)
        >>> round(float(weight), 6), round(float(bias), 6)
        (3.0, 1.0)
    """

    def __init__(self, intercept: bool = True, products: torch.dtype = torch.float64) -> None:
        if products not in (torch.float32, torch.float64):
            raise InvalidArgument(f"given products={products}, expected torch.float32 or torch.float64")
        self.intercept = intercept
        self.products = products
        self.rows = 0
        self._origin: tuple[Tensor, Tensor] | None = None

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Add rows.

        Args:
            features: (n, p), float.
            targets: (n, out), float.

        Raises:
            InvalidArgument: shapes that don't fit one another or the batches before.
        """
        if features.dim() != 2 or targets.dim() != 2 or features.shape[0] != targets.shape[0]:
            raise InvalidArgument(
                f"given features of shape {tuple(features.shape)} and targets of shape {tuple(targets.shape)}, "
                "expected (n, p) and (n, out)"
            )
        if not features.shape[0]:
            return
        f, y = features.double(), targets.double()
        if self._origin is None:
            origins = (
                (f.mean(0), y.mean(0))
                if self.intercept
                else (f.new_zeros(f.shape[1]), y.new_zeros(y.shape[1]))
            )
            self._origin = origins
            self._gram = f.new_zeros(f.shape[1], f.shape[1])
            self._cross = f.new_zeros(f.shape[1], y.shape[1])
            self._sums = (torch.zeros_like(origins[0]), torch.zeros_like(origins[1]))
        if f.shape[1] != self._gram.shape[0] or y.shape[1] != self._cross.shape[1]:
            raise InvalidArgument(
                f"given {f.shape[1]} features and {y.shape[1]} targets, expected {self._gram.shape[0]} and "
                f"{self._cross.shape[1]} as in the batches before"
            )
        f, y = f - self._origin[0], y - self._origin[1]
        narrow, narrow_y = f.to(self.products), y.to(self.products)
        self._gram += narrow.T @ narrow
        self._cross += narrow.T @ narrow_y
        self._sums = (self._sums[0] + f.sum(0), self._sums[1] + y.sum(0))
        self.rows += f.shape[0]

    def solve(self, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
        """The optimum over all rows so far.

        Args:
            ridge: weight of the squared entries beside the sum of squared residuals (scikit-learn's `alpha`).

        Returns:
            weight (out, p) and bias (out,), float64; the bias is 0 without intercept.

        Raises:
            InvalidArgument: no rows, a negative ridge, or ridge 0 with linearly dependent features.
        """
        if not ridge >= 0:
            raise InvalidArgument(f"given ridge={ridge}, expected at least 0")
        if self._origin is None:
            raise InvalidArgument("given no rows, expected update(features, targets) before solve")
        gram, cross = self._gram, self._cross
        means = (self._sums[0] / self.rows, self._sums[1] / self.rows)
        if self.intercept:
            gram = gram - self.rows * torch.outer(means[0], means[0])
            cross = cross - self.rows * torch.outer(means[0], means[1])
        gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(gram)
        diagonal = factor.diagonal()
        # a pivot below rounding of its own column: what is left of a dependent column is noise
        tiny = len(gram) * torch.finfo(gram.dtype).eps * gram.diagonal().clamp_min(0)
        if bool(failed) or (ridge == 0 and bool((diagonal.square() <= tiny).any())):
            raise InvalidArgument(
                f"given ridge={ridge} with linearly dependent features, expected a ridge above 0; try "
                f"{1e-6 * float(self._gram.diagonal().mean()):.1g}"
            )
        weight = torch.cholesky_solve(cross, factor).T
        if not self.intercept:
            return weight, weight.new_zeros(len(weight))
        return weight, self._origin[1] + means[1] - weight @ (self._origin[0] + means[0])


class ScaledFeatures(nn.Module):
    """Features times a number, which keeps their length the same from layer to layer.

    Args:
        features: a feature map.
        scale: positive factor, or with `per_input` the length that every feature vector is given.
        per_input: scale every feature vector for itself.
    """

    scale: Tensor

    def __init__(self, features: RandomFeatures, scale: float, per_input: bool = False) -> None:
        super().__init__()
        self.features = features
        self.per_input = per_input
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))

    @property
    def feature_size(self) -> int:
        """Real numbers in a feature vector."""
        return self.features.feature_size

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., feature_size)."""
        phi = self.features(x)
        if self.per_input:
            phi = nn.functional.normalize(phi, dim=-1)
        return phi * self.scale.to(x.dtype)


class BundledNet(nn.Module):
    """y = feature_map(x) weight^T + bias; only weight and bias are parameters.

    Args:
        feature_map: fixed, from inputs to features.
        weight: (out, features).
        bias: (out,).
        layer_errors: of every bundled layer on the calibration data, the root mean square error of its estimated
            output over the root mean square of the network's own; empty without calibration.
    """

    def __init__(
        self, feature_map: nn.Module, weight: Tensor, bias: Tensor, layer_errors: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.feature_map = feature_map
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.layer_errors = tuple(layer_errors)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., out)."""
        return nn.functional.linear(self.feature_map(x), self.weight, self.bias)

    @torch.no_grad()
    def fit(
        self,
        inputs: Tensor | Iterable[tuple[Tensor, Tensor]],
        targets: Tensor | None = None,
        *,
        ridge: float = 1e-3,
        batch_size: int = 4096,
        products: torch.dtype = torch.float64,
    ) -> BundledNet:
        """Set weight and bias to the ridge regression of targets on features, in one pass over the data.

        Args:
            inputs: (n, d); or batches of (inputs, targets), so that the data need not fit into memory.
            targets: (n, out); None with batches.
            ridge: weight of the squared entries, as scikit-learn's `alpha`.
            batch_size: rows at a time.
            products: as for `RidgeRegression`.

        Returns:
            The net itself.

        Raises:
            InvalidArgument: shapes that don't fit, or ridge 0 with linearly dependent features.
        """
        solver = RidgeRegression(products=products)
        for x, y in _batches(inputs, targets, batch_size):
            if y.shape[-1:] != self.bias.shape:
                raise InvalidArgument(
                    f"given targets of shape {tuple(y.shape)}, expected (n, {self.bias.shape[0]})"
                )
            x = x.to(self.weight.device, self.weight.dtype)
            solver.update(self.feature_map(x), y.to(x.device))
        weight, bias = solver.solve(ridge)
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        return self


def _batches(
    inputs: Tensor | Iterable[tuple[Tensor, Tensor]], targets: Tensor | None, batch_size: int
) -> Iterable[tuple[Tensor, Tensor]]:
    if not isinstance(inputs, Tensor):
        if targets is not None:
            raise InvalidArgument("given batches and targets, expected the targets within the batches")
        yield from inputs
        return
    if targets is None:
        raise InvalidArgument("given inputs without targets, expected both, or batches of (inputs, targets)")
    if inputs.dim() != 2 or targets.dim() != 2 or len(inputs) != len(targets):
        raise InvalidArgument(
            f"given inputs of shape {tuple(inputs.shape)} and targets of shape {tuple(targets.shape)}, expected "
            "(n, d) and (n, out)"
        )
    if batch_size < 1:
        raise InvalidArgument(f"given batch_size={batch_size}, expected at least 1")
    yield from zip(inputs.split(batch_size), targets.split(batch_size), strict=True)


_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Softplus: "softplus",
}


def _activation_name(module: nn.Module) -> str | None:
    """What `random_features` calls a module's function; modules may say it themselves in `activation_name`."""
    named = getattr(module, "activation_name", None)
    return named if isinstance(named, str) else _ACTIVATIONS.get(type(module))


def _layers(network: nn.Sequential) -> list[tuple[list[nn.Linear], nn.Module | None]]:
    """(linear layers in a row, activation) for every layer; the last activation may be missing."""
    layers: list[tuple[list[nn.Linear], nn.Module | None]] = []
    linears: list[nn.Linear] = []
    for name, module in network.named_children():
        if isinstance(module, nn.Linear):
            linears.append(module)
        elif isinstance(module, (nn.Identity, nn.Dropout)):  # what they do when evaluated: nothing
            continue
        elif linears and (isinstance(module, nn.Module) and _activation_name(module)):
            layers.append((linears, module))
            linears = []
        else:
            known = ", ".join(sorted(kind.__name__ for kind in _ACTIVATIONS))
            raise ModelError(
                f"given {type(module).__name__} at position {name}, expected nn.Linear layers, each followed by one "
                f"of {known} or by a module with an attribute activation_name; fold normalizations into the "
                "linear layers first"
            )
    if linears:
        layers.append((linears, None))
    if not layers or layers[0][1] is None:
        raise ModelError(
            "given a network without a linear layer and activation, expected at least one of both"
        )
    return layers


@torch.no_grad()
def bundle(
    network: nn.Sequential,
    num_features: int | Sequence[int],
    *,
    calibration: Tensor | None = None,
    feature: str | Spectrum | None = None,
    projection: str = "orthogonal",
    seed: int = 0,
    length: float = 1.0,
    scaling: Literal["fixed", "per_input"] = "fixed",
    **settings: Any,
) -> BundledNet:
    """Bundle a network of linear layers and activations into fixed features and one matrix.

    Linear layers in a row are one; linear layers after the last activation are absorbed into the matrix. As it comes
    the matrix is the estimate that follows from the network's weights, and each further layer multiplies its error
    (see `BundledNet.layer_errors`); `BundledNet.fit` replaces it by the optimum for data.

    Args:
        network: nn.Linear and activations (ReLU, Tanh, GELU, SiLU, Sigmoid, Softplus, or a module whose attribute
            `activation_name` says what `URF` is to take) in turn. A `SNNKLinear` is bundled already: train it.
        num_features: m of each activation, or one for all.
        calibration: (n, d) inputs, from which lengths are taken: features of layer l are scaled so that their root
            mean square length over the calibration data is `length`. None: nothing is scaled.
        feature: the features of every layer; None: those of its activation. ReLU gives arc-cosine features
            (another function than ReLU: the matrix then only makes sense after `fit`).
        projection: "iid", "orthogonal", "hadamard", "sorf" or "qmc".
        seed: of all draws.
        length: see `calibration`.
        scaling: "fixed", by one number a layer, or "per_input", every feature vector for itself. Fourier features of
            long inputs are exponentially large, so that a deep net of them needs "per_input"; its matrix is no
            estimate of the network, and only makes sense after `fit`.
        **settings: of the features: split ("phase" unless given), A, shift, ...

    Returns:
        The bundled net, on the network's device and of its dtype.

    Raises:
        ModelError: a module that is neither, or no activation.
        InvalidArgument: a number of features for each layer that is not the number of activations; settings.
    """
    if not isinstance(network, nn.Sequential):
        raise ModelError(f"given a {type(network).__name__}, expected nn.Sequential; list its layers in one")
    if scaling not in ("fixed", "per_input"):
        raise InvalidArgument(f"given scaling {scaling!r}, expected 'fixed' or 'per_input'")
    layers = _layers(network)
    hidden = [layer for layer in layers if layer[1] is not None]
    counts = [num_features] * len(hidden) if isinstance(num_features, int) else list(num_features)
    if len(counts) != len(hidden):
        raise InvalidArgument(
            f"given {len(counts)} numbers of features, expected {len(hidden)}, one per activation"
        )
    first = layers[0][0][0].weight
    where: dict[str, Any] = {"device": first.device, "dtype": torch.float64}
    truth = None if calibration is None else calibration.to(**where).reshape(-1, first.shape[1])
    x = truth
    before: Tensor | None = (
        None  # (width, features): estimated outputs of the layer before are features @ before^T
    )
    maps: list[nn.Module] = []
    errors: list[float] = []
    for index, ((linears, activation), count) in enumerate(zip(hidden, counts, strict=True)):
        weight, bias = _merged(linears)
        dense = weight
        if before is not None:
            weight = weight @ before
        assert activation is not None
        name = feature if feature is not None else _activation_name(activation)
        assert name is not None
        chosen = dict(settings)
        if name != "relu":
            chosen.setdefault("split", "phase")  # bounded features: what is fitted to them stays bounded too
            if x is not None and truth is not None:
                # as large as the network's own arguments can be: psi of psi is far longer than what it stands for
                length_x, length_w, length_h = (_length(v) for v in (x, dense, truth))
                chosen.setdefault("norms", (length_x, length_w * length_h / length_x))
        features = random_features(
            weight.shape[1],
            count,
            name,
            bias=True,
            projection=projection,
            seed=seed + index,
            **chosen,
            **where,
        )
        scale = 1.0
        if scaling == "per_input":
            scale = length
        elif x is not None:
            scale = length / _length(features(x))
        layer = ScaledFeatures(features, scale, scaling == "per_input")
        if x is not None:
            x = layer(x)
        before = features.psi(weight, bias) / scale
        maps.append(layer)
        if x is not None and truth is not None:
            truth = activation(nn.functional.linear(truth, dense, bias))
            if scaling == "fixed":
                errors.append(
                    float((x @ before.T - truth).square().mean().sqrt() / truth.square().mean().sqrt())
                )
    assert before is not None
    tail = layers[-1][0] if layers[-1][1] is None else None
    if tail is not None:
        weight, bias = _merged(tail)
        before, end = weight @ before, bias
    else:
        end = before.new_zeros(before.shape[0])
    if errors and not errors[-1] <= 1:
        warnings.warn(
            f"the last bundled layer's estimate is off by {errors[-1]:.3g} times its size; use more features, or "
            "call fit(inputs, targets), for Fourier features with scaling='per_input'",
            stacklevel=2,
        )
    return BundledNet(nn.Sequential(*maps), before, end, errors).to(first.dtype)


def _length(x: Tensor) -> float:
    """Root mean square length of the rows."""
    return max(float(x.square().sum(-1).mean().sqrt()), 1e-6)


def _merged(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """One weight and bias, float64, for linear layers in a row."""
    weight: Tensor | None = None
    bias: Tensor | None = None
    for linear in linears:
        w = linear.weight.detach().double()
        b = w.new_zeros(w.shape[0]) if linear.bias is None else linear.bias.detach().double()
        if weight is None or bias is None:
            weight, bias = w, b
        else:
            weight, bias = w @ weight, w @ bias + b
    assert weight is not None and bias is not None
    return weight, bias

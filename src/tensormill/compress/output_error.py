"""How far the output of linear layers moves when their weights are rounded: what searches minimize and
reports show.

For inputs x the mean over tokens of |d x|^2 is the sum over d's rows of d S d^T, with d the change of the
weight and S the mean of x x^T. With S computed once over all tokens, an error costs N K^2 whatever the number
of tokens, and no activations are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tensormill.compress.block_calls import BlockCall
from tensormill.compress.formats.quantization import QuantSpec
from tensormill.compress.precision import search_precision
from tensormill.ops.quantization_error import quantization_error

ScaleLoss = Callable[[Tensor], Tensor]
"""Losses (candidates,) of column scales (candidates, K)."""

# Numbers in one temporary of a search: large enough to keep the device busy, small enough for a CPU's caches
# and a small part of a GPU's memory.
_SEARCH_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 25}
# Columns of a Gram matrix that are multiplied at once; a CPU, whose products are no faster for being large, takes all.
_PANEL = {"cuda": 2048}
# Rows that are multiplied by a Gram matrix at once: enough for fast products, few beside the matrix.
_ROWS = 2048
# Candidates for which a GPU reads a weight once.
_CANDIDATES = {"cuda": 8}


def search_numbers(device: torch.device) -> int:
    """How many numbers a temporary of a search may hold on a device."""
    return _SEARCH_NUMBERS.get(device.type, 1 << 20)


def output_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """Normalized mean squared output error of a linear layer.

    Args:
        weight: (N, K) float32.
        approximation: (N, K) float32.
        gram: (K, K), the mean over tokens of x x^T.

    Returns:
        The mean over tokens of |(approximation - weight) x|^2 over that of |weight x|^2.

    >>> output_error(torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.eye(1))
    0.25
    """
    error, energy = torch.zeros(2, device=gram.device)
    for rows, approximated in zip(weight.split(_ROWS), approximation.split(_ROWS), strict=True):
        error += squared_outputs(approximated - rows, gram).sum()
        energy += squared_outputs(rows, gram).sum()
    return (error / energy.clamp(min=1e-30)).clamp(min=0).item()


def squared_outputs(weight: Tensor, gram: Tensor) -> Tensor:
    """(..., N) the mean over tokens of the square of each output, for weight (..., N, K) and gram (K, K).

    The matrix is symmetric: in panels, what lies below them counts twice and what lies above needs no product, which
    saves up to half of the work.
    """
    columns = gram.shape[0]
    panel = _PANEL.get(gram.device.type, columns)
    flat = weight.reshape(-1, columns)
    total = flat.new_zeros(len(flat))
    with search_precision(gram.device):
        for start in range(0, columns, panel):
            stop = min(start + panel, columns)
            here = flat[:, start:stop]
            product = here @ gram[start:stop, start:stop]
            if stop < columns:
                product.addmm_(flat[:, stop:], gram[stop:, start:stop], alpha=2)
            total += product.mul_(here).sum(dim=-1)
    return total.view(weight.shape[:-1])


def gram_loss(
    weights: Sequence[Tensor],
    gram: Tensor | Sequence[Tensor],
    spec: QuantSpec | Sequence[QuantSpec],
    shares: Sequence[float] | None = None,
    variances: Sequence[Tensor] | None = None,
) -> ScaleLoss:
    """The sum of linears' normalized squared output errors, exact for all tokens of a Gram matrix.

    Normalized, since a query's output can be far larger than a value's without mattering more. On the
    built-in model at 4 bits this closes 0.44 instead of 0.35 of the perplexity gap between rounding and the
    original.

    Args:
        weights: of the linears whose inputs are scaled together, (N, K) float32 each.
        gram: (K, K) float32, the mean over tokens of x x^T; or one for each linear, where some see other
            tokens than others (experts).
        spec: the quantizer, or each linear's own.
        shares: how much each linear counts, the share of tokens that it sees; None counts all alike.
        variances: (K,) of each linear's inputs, given those of the columns that are rounded later, where these absorb
            errors (GPTQ): the expected error is then the sum of d^2 times the variances.
    """
    grams = [gram] * len(weights) if isinstance(gram, Tensor) else list(gram)
    counts = [1.0] * len(weights) if shares is None else list(shares)
    specs = _each(spec, len(weights))
    device = grams[0].device
    limit = search_numbers(device)
    energies = []
    for weight, seen in zip(weights, grams, strict=True):
        parts = [squared_outputs(rows, seen).sum() for rows in weight.split(_ROWS)]
        energies.append(torch.stack(parts).sum().clamp(min=1e-30))

    def loss(scales: Tensor) -> Tensor:
        total = torch.zeros(len(scales), device=device)
        together = max(1, min(_CANDIDATES.get(device.type, 1), len(scales)))
        for i, (weight, seen, energy, count, spec) in enumerate(
            zip(weights, grams, energies, counts, specs, strict=True)
        ):
            for rows in torch.split(weight, max(1, limit // (together * weight.shape[1]))):
                step = max(1, limit // rows.numel())
                for start in range(0, len(scales), step):
                    d = quantization_error(rows, scales[start : start + step], spec)
                    # Summed over rows: the mean over tokens of |d x|^2, d S d^T where nothing absorbs errors.
                    each = squared_outputs(d, seen) if variances is None else d.square_() @ variances[i]
                    errors = each.sum(dim=1)
                    total[start : start + step] += errors * (count / energy)
        return total

    return loss


def sample_loss(
    weights: Sequence[Tensor],
    x: Tensor | Sequence[Tensor],
    spec: QuantSpec | Sequence[QuantSpec],
    shares: Sequence[float] | None = None,
) -> ScaleLoss:
    """As `gram_loss`, on tokens x (tokens, K), or on other ones for each linear."""
    inputs = [x] * len(weights) if isinstance(x, Tensor) else list(x)
    counts = [1.0] * len(weights) if shares is None else list(shares)
    specs = _each(spec, len(weights))
    energies = [
        (seen @ weight.T).square().sum().clamp(min=1e-30)
        for weight, seen in zip(weights, inputs, strict=True)
    ]

    def loss(scales: Tensor) -> Tensor:
        total = torch.zeros(len(scales), device=scales.device)
        for index, scale in enumerate(scales):
            for weight, seen, energy, count, spec in zip(
                weights, inputs, energies, counts, specs, strict=True
            ):
                difference = quantization_error(weight, scale[None], spec)[0]
                total[index] += (seen @ difference.T).square().sum() * (count / energy)
        return total

    return loss


def module_loss(
    module: nn.Module,
    linears: Sequence[nn.Linear],
    calls: Sequence[BlockCall],
    spec: QuantSpec | Sequence[QuantSpec],
) -> ScaleLoss:
    """The mean squared output error of the module that holds the linears (section 3.2 of the paper).

    Args:
        module: attention or MLP, in float32.
        linears: those of its layers whose input gets scales.
        calls: arguments with which the model called the module.
        spec: the quantizer, or each linear's own.
    """
    specs = _each(spec, len(linears))

    def outputs() -> list[Tensor]:
        results = [module(*call.args, **call.kwargs) for call in calls]
        return [result[0] if isinstance(result, tuple) else result for result in results]

    expected = outputs()
    count = sum(output.numel() // output.shape[-1] for output in expected)

    def loss(scales: Tensor) -> Tensor:
        originals = [linear.weight.data for linear in linears]
        total = torch.zeros(len(scales), device=scales.device)
        try:
            for index, scale in enumerate(scales):
                for linear, weight, spec in zip(linears, originals, specs, strict=True):
                    linear.weight.data = weight + quantization_error(weight, scale[None], spec)[0]
                for output, wanted in zip(outputs(), expected, strict=True):
                    total[index] += (output - wanted).square().sum()
        finally:
            for linear, weight in zip(linears, originals, strict=True):
                linear.weight.data = weight
        return total / count

    return loss


def _each(spec: QuantSpec | Sequence[QuantSpec], count: int) -> Sequence[QuantSpec]:
    return [spec] * count if isinstance(spec, QuantSpec) else spec

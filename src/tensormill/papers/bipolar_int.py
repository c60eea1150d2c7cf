"""Matrix products of any bit widths, decomposed into products of bit planes on binary tensor cores.

Its format and product are `ops/bit_planes.py`, `ops/bit_plane_linear` and `ops/quantize_bit_planes`. C1 exactness, C2 what its
levels without a zero are worth, C3 and C4 speed on a GPU and on a CPU. Inference end to end has no counterpart here: there
is no model trained at 1 or 2 bits to run, and no compression method makes one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tensormill.papers._low_bit import KERNEL_SOURCES, fastest, linear_shape, score, time_product
from tensormill.papers.awq.subjects import SOURCES, builtin_subjects
from tensormill.papers.catalogue import Figure, Measurement, Paper, Row, Run

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from tensormill.ops.bit_planes import Format

PAPER = Paper(
    slug="bipolar_int",
    title="Efficient Arbitrary Precision Acceleration for Large Language Models on GPU Tensor Cores",
    authors="Ma et al.",
    arxiv="2409.17870",
    room="compress",
    figures=(
        Figure(
            "gemm-cutlass",
            "Low-bit products are faster than CUTLASS",
            2.4,
            "x",
            "abstract, best case; GPU (RTX 3090?) and the baseline's precision not certain",
            verified=False,
        ),
        Figure(
            "inference",
            "Language-model inference is faster than the baseline, best case",
            6.7,
            "x",
            "abstract; taken to be against fp16",
            verified=False,
        ),
        Figure(
            "follow-up-fp16",
            "The follow-up APT-LLM is faster than fp16, best case",
            3.99,
            "x",
            "RTX 3090; abstract of arXiv 2508.19087",
        ),
        Figure(
            "follow-up-int4",
            "The follow-up APT-LLM is faster than CUTLASS INT4, best case",
            2.16,
            "x",
            "RTX 3090; abstract of arXiv 2508.19087",
        ),
    ),
)

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)
PAIRS = ((1, 1), (1, 2), (2, 2), (1, 4), (2, 4), (3, 3), (1, 8), (4, 4), (2, 8))
"""Bits of weights and of activations."""
GPU_SHAPES = ((8192, 8192), (4096, 14336))
GPU_TOKENS = (16, 256, 4096)
CPU_SHAPE = (4096, 4096)
CPU_PAIRS = ((1, 1), (1, 2), (2, 2), (2, 4), (4, 4))
_PLANES = ("tensormill.ops.bit_plane_linear", "tensormill.ops.bit_planes")
_INT8 = "torch._int_mm"


@PAPER.claim(
    "C1",
    statement="A p-bit by q-bit product is p q products of single bits, exactly, and other quantizations convert to the format",
    unit="results that differ",
    paper_value=0,
    criterion=(
        "for all widths from 1 to 8, XOR and AND forms and the operator give int64's product; NOT is negation; and codes with "
        "a zero point, or signed ones, are converted without loss"
    ),
    measures=_PLANES,
)
def exactness(run: Run) -> Measurement:
    """The paper's form (XOR), the one that Hopper has (AND, sums of codes), the operator, and int64, over lengths that fill
    words and that don't; codes of every zero point, converted."""
    import torch

    from tensormill.ops.bit_plane_linear import bit_plane_linear
    from tensormill.ops.bit_planes import pack_planes

    generator = torch.Generator().manual_seed(run.seed)
    lengths = (
        (1, 31, 33, 128, 255) if run.scale == "quick" else (1, 31, 32, 33, 127, 128, 255, 256, 1000, 8192)
    )
    differing = {"XOR form": 0, "AND form": 0, "operator": 0}
    sums = 0
    for p in WIDTHS:
        run.progress(f"{p} bits", p / 10)
        for q in WIDTHS:
            for length in lengths:
                x, weight = (
                    torch.randint(0, 1 << bits, (rows, length), generator=generator)
                    for bits, rows in ((q, 5), (p, 6))
                )
                x[0], weight[0] = 0, (1 << p) - 1  # the ends of both ranges
                integers = [bipolar(codes, bits) for codes, bits in ((x, q), (weight, p))]
                exact = integers[0] @ integers[1].T
                sums += exact.numel()
                planes = (
                    pack_planes(values, bits, "bipolar")
                    for values, bits in zip(integers, (q, p), strict=True)
                )
                found = {
                    "XOR form": xor_product(x, weight, q, p),
                    "AND form": and_product(x, weight, q, p),
                    "operator": bit_plane_linear(*(t.to(run.device) for t in planes)).cpu(),
                }
                for name, result in found.items():
                    differing[name] += int((result != exact).sum())
    converted, wrong = conversions(run, generator)
    negated = 0
    for bits in WIDTHS:
        codes = torch.arange(1 << bits)
        negated += int((bipolar(~codes & (1 << bits) - 1, bits) != -bipolar(codes, bits)).sum())
    rows = [
        Row(f"{name}: sums that differ", count, "sums", setting={"sums": sums})
        for name, count in differing.items()
    ]
    rows += [
        Row("codes whose NOT is not the negative number", negated, "codes"),
        Row("converted codes: sums that differ", wrong, "sums", setting={"sums": converted}),
    ]
    holds = not any(differing.values()) and negated == wrong == 0
    return Measurement(rows, holds=holds, reason=f"{sums} sums, {converted} of converted codes")


def bipolar(codes: Tensor, bits: int) -> Tensor:
    """The integers `2 u - (2^bits - 1)` of unsigned codes u: every bit counts +1 or -1."""
    return 2 * codes - ((1 << bits) - 1)


def xor_product(x: Tensor, weight: Tensor, q: int, p: int) -> Tensor:
    """The paper's form: `sum_ij 2^(i+j) (K - 2 popc(x_i XOR w_j))`, for unsigned codes (M, K), (N, K) int64."""
    total = x.new_zeros(len(x), len(weight))
    for i in range(q):
        for j in range(p):
            differ = ((x[:, None] >> i ^ weight >> j) & 1).sum(-1)
            total += (x.shape[1] - 2 * differ) << (i + j)
    return total


def and_product(x: Tensor, weight: Tensor, q: int, p: int) -> Tensor:
    """The same from `popc(x_i AND w_j)` and the sums of the codes."""
    product = x.new_zeros(len(x), len(weight))
    for i in range(q):
        for j in range(p):
            product += ((x >> i & 1) @ (weight >> j & 1).T) << (i + j)
    x_top, w_top = (1 << q) - 1, (1 << p) - 1
    corrections = 2 * w_top * x.sum(1, keepdim=True) + 2 * x_top * weight.sum(1)
    return 4 * product - corrections + x.shape[1] * x_top * w_top


def conversions(run: Run, generator: Generator) -> tuple[int, int]:
    """Products with codes of a zero point, of which 2^(bits - 1) is a signed code's, by the operator on bipolar planes: how
    many, and how many differ from int64's.

    `2 (u - z) = v - (2z + 1 - 2^bits)` for the bipolar `v = 2u - (2^bits - 1)`.
    """
    import torch

    from tensormill.ops.bit_plane_linear import bit_plane_linear
    from tensormill.ops.bit_planes import pack_planes

    count = differing = 0
    for bits in WIDTHS:
        codes = torch.randint(0, 1 << bits, (1 << bits, 100), generator=generator)
        zero = torch.arange(1 << bits)
        x = bipolar(torch.randint(0, 256, (5, 100), generator=generator), 8)
        planes = (pack_planes(x, 8, "bipolar"), pack_planes(bipolar(codes, bits), bits, "bipolar"))
        product = bit_plane_linear(*(t.to(run.device) for t in planes)).cpu().long()
        twice = product - (2 * zero + 1 - (1 << bits)) * x.sum(1, keepdim=True)
        exact = x @ (codes - zero[:, None]).T
        differing += int((twice != 2 * exact).sum())
        count += exact.numel()
    return count, differing


@PAPER.claim(
    "C2",
    statement="Levels at odd multiples, without a zero, lose less than symmetric integers at few bits",
    unit="x the error",
    criterion=(
        "at 2, 3 and 4 bits the squared error of bipolar codes is below that of signed ones with either usual scale, for "
        "Gaussian and Laplace numbers and the built-in model's weights, and so is the model's divergence"
    ),
    measures=(
        *SOURCES,
        "tensormill.papers._low_bit",
        "tensormill.ops.quantize_bit_planes",
        "tensormill.ops.bit_planes",
    ),
)
def levels(run: Run) -> Measurement:
    """Bipolar (mid-rise) beside signed (mid-tread) codes at the same width, all with a scale per group of 128 from the
    largest magnitude; errors relative to the mean square, and the built-in model with weights so rounded.

    Signed scales make the largest magnitude exact, or spread it over half of the range (compressed-tensors).
    """
    import torch
    from torch import nn

    full = run.scale == "full"
    (subject,) = builtin_subjects(run, ("plain",), 65536 if full else 4096)
    linears = {
        name: layer
        for name, layer in subject.model.named_modules()
        if isinstance(layer, nn.Linear) and not name.endswith("lm_head")
    }
    generator = torch.Generator().manual_seed(run.seed)
    uniform = torch.rand(512, 4096, generator=generator) - 0.5
    samples = {
        "Gaussian": [torch.randn(512, 4096, generator=generator)],
        "Laplace": [-uniform.sign() * torch.log1p(-2 * uniform.abs())],
        "the model's weights": [layer.weight.detach().float() for layer in linears.values()],
    }
    rows: list[Row] = []
    models: dict[str, nn.Module] = {}
    ratios: list[float] = []
    for bits in (2, 3, 4):
        for what, tensors in samples.items():
            errors = {name: relative_error(tensors, rule(bits)) for name, rule in RULES.items()}
            ours = errors.pop("bipolar")
            ratios.append(ours / min(errors.values()))
            rows += [
                Row(f"{bits} bits, {what}: bipolar error", ours, "of the mean square", peers=errors),
                Row(f"{bits} bits, {what}: bipolar over the better signed", ratios[-1], "x the error"),
            ]
        for name, rule in RULES.items():
            made = models[f"W{bits} {name}"] = copy.deepcopy(subject.model)
            for linear in linears:
                layer: Any = made.get_submodule(linear)
                layer.weight.data = rule(bits)(layer.weight.data)
    scores, made_rows = score(run, subject, models)
    kl = {name: found.comparison.kl for name, found in scores.items() if found.comparison is not None}
    reasons = []
    better = max(ratios) < 1
    for bits in (2, 3, 4):
        signed = min(kl[f"W{bits} {name}"] for name in RULES if name != "bipolar")
        better = better and kl[f"W{bits} bipolar"] < signed
        reasons.append(f"{kl[f'W{bits} bipolar']:.3g} against {signed:.3g} at {bits} bits")
    reason = f"{min(ratios):.2f} to {max(ratios):.2f}x the error; divergence {', '.join(reasons)}"
    return Measurement([*rows, *made_rows], holds=better, reason=reason)


Rounding = Callable[["Tensor"], "Tensor"]


def _by_planes(format: Format) -> Callable[[int], Rounding]:
    def rule(bits: int) -> Rounding:
        from tensormill.ops.quantize_bit_planes import quantize_bit_planes

        return lambda t: quantize_bit_planes(t, bits, format, group_size=128).dequantize(t.dtype)

    return rule


def _half_range(bits: int) -> Rounding:
    from tensormill.compress.formats.quantization import QuantSpec, fake_quantize

    return lambda t: fake_quantize(t, QuantSpec(bits, 128, symmetric=True))


RULES: dict[str, Callable[[int], Rounding]] = {
    "bipolar": _by_planes("bipolar"),
    "signed, largest exact": _by_planes("signed"),
    "signed, half range": _half_range,
}


def relative_error(tensors: Sequence[Tensor], rounded: Rounding) -> float:
    """Squared error of rounding over the sum of squares, over all tensors."""
    error = energy = 0.0
    for tensor in tensors:
        error += float((rounded(tensor) - tensor).double().square().sum())
        energy += float(tensor.double().square().sum())
    return error / energy


def plane_shape(tokens: int, rows: int, columns: int, bits: tuple[int, int], dtype: str) -> dict[str, Any]:
    """A shape of `bit_plane_linear` in bipolar codes: (weight bits, activation bits)."""
    return {
        "tokens": tokens,
        "out_features": rows,
        "in_features": columns,
        "weight_bits": bits[0],
        "x_bits": bits[1],
        "weight_format": "bipolar",
        "x_format": "bipolar",
        "dtype": dtype,
    }


def crossover(
    run: Run,
    pairs: Sequence[tuple[int, int]],
    shapes: Sequence[tuple[int, int]],
    tokens_wanted: Sequence[int],
    dtype: str,
    seconds: float,
) -> tuple[list[Row], dict[tuple[int, int, int, int, int], float]]:
    """Rows of every pair of widths, with limit and 8-bit product beside, and how many times as fast as that product, by
    (weight bits, activation bits, tokens, rows, columns)."""
    rows: list[Row] = []
    ratios = {}
    cases = [(pair, tokens, shape) for shape in shapes for tokens in tokens_wanted for pair in pairs]
    for i, ((p, q), tokens, (n, k)) in enumerate(cases):
        name = f"W{p}A{q} M={tokens} {n}x{k}"
        run.progress(name, i / len(cases))
        shape = plane_shape(tokens, n, k, (p, q), dtype)
        row = time_product(run, "bit_plane_linear", shape, name, seconds=seconds)
        rows.append(row)
        if max(p, q) < 8:
            int8 = fastest(row, _INT8)
        else:  # bipolar numbers of 8 bits have 9 in two's complement
            int8 = fastest_int8(rows, tokens, n, k)
        ratios[p, q, tokens, n, k] = int8 / float(row.value)
        rows.append(Row(f"{name}, faster than int8", ratios[p, q, tokens, n, k], "x"))
    return rows, ratios


def fastest_int8(rows: Sequence[Row], tokens: int, n: int, k: int) -> float:
    """Microseconds of the 8-bit product at this size, as timed with another pair of widths."""
    size = {"tokens": tokens, "out_features": n, "in_features": k}
    return min(
        fastest(row, _INT8)
        for row in rows
        if size.items() <= dict(row.setting).items() and any(_INT8 in peer for peer in row.peers)
    )


@PAPER.claim(
    "C3",
    figure="gemm-cutlass",
    criterion=(
        "in the best pair of widths of at least 2 bits, at least 2.4 times as fast as `torch._int_mm` at 4096 tokens on "
        "8192 x 8192; and faster than it with every pair whose product of widths is below 8"
    ),
    scales=("full",),
    needs=("cuda", "python:triton"),
    measures=(*KERNEL_SOURCES, *_PLANES),
    peers=("triton",),
)
def gpu_kernel(run: Run) -> Measurement:
    """Products of planes of all widths beside cuBLAS's 8-bit and float16 products, with the roofline of single bits.

    Activations are given as planes; packing them, which an 8-bit layer needs as quantization too, is shown alone. The
    paper compares with CUTLASS on another card.
    """
    from tensormill.roofline import ceilings

    rows, ratios = crossover(run, PAIRS, GPU_SHAPES, GPU_TOKENS, "float16", 0.15)
    n, k = GPU_SHAPES[0]
    tokens = GPU_TOKENS[-1]
    rates = ceilings(run.device).rates
    for unit in ("b1", "int8", "fp16"):
        if unit in rates:
            rows.append(Row(f"ceiling of {unit}", rates[unit] / 1e12, "TOP/s"))
    for bits in (1, 2, 4):
        shape = {"rows": tokens, "length": k, "bits": bits, "format": "bipolar", "dtype": "float16"}
        rows.append(
            time_product(
                run, "quantize_bit_planes", shape, f"planes of {tokens} x {k}, {bits} bits", seconds=0.15
            )
        )
    best = max(
        ratio for (p, q, m, *size), ratio in ratios.items() if min(p, q) >= 2 and (m, *size) == (tokens, n, k)
    )
    slow = [
        f"W{p}A{q}"
        for (p, q, m, *size), ratio in ratios.items()
        if p * q < 8 and (m, *size) == (tokens, n, k) and ratio <= 1
    ]
    reason = f"best {best:.2f}x int8 at {tokens} tokens; slower than int8: {', '.join(slow) or 'none below 8 products'}"
    return Measurement(rows, holds=best >= 2.4 and not slow, reason=reason)


@PAPER.claim(
    "C4",
    statement="On a CPU, products of bit planes are faster than products of bytes where widths are few",
    unit="x",
    criterion="W1A1 and W2A2 are faster than `torch._int_mm` and than our own layer of 8-bit weights at 1 and 16 tokens on "
    "4096 x 4096",
    needs=("cpu",),
    measures=(*KERNEL_SOURCES, *_PLANES, "tensormill.ops.linear_wna8"),
)
def cpu_kernel(run: Run) -> Measurement:
    """Pairs of widths beside torch's 8-bit product and `linear_wna8` with 8-bit weights, weights from memory, float32
    results with a scale per row and token; activations are given as planes, and quantized in the call of the 8-bit layer."""
    tokens_wanted = (1, 16, 256) if run.scale == "full" else (1, 16)
    rows, ratios = crossover(run, CPU_PAIRS, (CPU_SHAPE,), tokens_wanted, "float32", 0.3)
    n, k = CPU_SHAPE
    judged = {}
    for tokens in tokens_wanted:
        shape = linear_shape(tokens, n, k, 8, -1, -1, "float32")
        layer = time_product(
            run, "linear_wna8", shape, f"M={tokens} {n}x{k} linear_wna8, 8-bit weights", seconds=0.3
        )
        rows.append(layer)
        for row in rows[:]:
            size = dict(row.setting)
            if size.get("tokens") != tokens or "x_bits" not in size:
                continue
            p, q = size["weight_bits"], size["x_bits"]
            ratio = min(float(layer.value) / float(row.value), ratios[p, q, tokens, n, k])
            rows.append(Row(f"{row.what}, faster than either product of bytes", ratio, "x"))
            if (p, q) in ((1, 1), (2, 2)) and tokens <= 16:
                judged[f"W{p}A{q} at {tokens}"] = ratio
    reason = ", ".join(f"{name}: {ratio:.2f}x" for name, ratio in judged.items())
    return Measurement(rows, holds=min(judged.values()) > 1, reason=reason)

"""Low-bit matrix products by table look-up, in software and as a simulated tensor core.

The software is here: C1 the tables and their arithmetic, C2 what rounding them to int8 costs, C3 look-ups on a CPU, which
`ops/linear_wna8` has for 1 and 2 bits ("lut"). Not here: the tensor core itself. There is no simulator of its array or of a
GPU with it, no RTL and no synthesis, so that no figure of area, power, density or simulated time is measured; nor is there
a look-up kernel for GPUs, or one that builds tables in the operator before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tensormill.papers._low_bit import compressed, linear_shape, rise, score
from tensormill.papers.awq.subjects import SOURCES, builtin_subjects
from tensormill.papers.catalogue import ClaimNotMeasurable, Figure, Measurement, Paper, Row, Run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tensormill.ops.linear_wna16.module import LinearWNA16

PAPER = Paper(
    slug="lut_tensor_core",
    title="LUT Tensor Core: A Software-Hardware Co-Design for LUT-Based Low-Bit LLM Inference",
    authors="Mo et al.",
    arxiv="2408.06003",
    room="hardware",
    figures=(
        Figure(
            "compute-density",
            "Compute density of a 4-element dot product, 1-bit weights and fp16 activations",
            61.55,
            "TFLOP/s/mm2",
            "TSMC 28 nm, Design Compiler, 1 GHz; fp16 multiply-accumulate 3.39",
        ),
        Figure(
            "unpu-density",
            "Denser than UNPU, 2-bit weights and 8-bit activations",
            1.44,
            "x",
            "TSMC 28 nm, Design Compiler",
        ),
        Figure(
            "unpu-energy",
            "More energy-efficient than UNPU, same setting",
            1.442,
            "x",
            "TSMC 28 nm, Design Compiler",
        ),
        Figure(
            "a100-bitnet",
            "BitNet 3B on an A100 with 8x tables, faster than the fp16 LLaMA-3B",
            5.51,
            "x",
            "simulated, W2A8",
        ),
        Figure(
            "simulator-error",
            "Mean error of the tile simulator",
            5.21,
            "%",
            "A100 and RTX 3090, single layers of large models",
        ),
        Figure(
            "tmac-cpu",
            "T-MAC on one CPU core, LLaMA-2-7B at 2 bits, from llama.cpp's 3.82",
            16.68,
            "tokens/s",
            "M2 Ultra, May 2024; repository of the sibling paper",
        ),
        Figure(
            "table-size",
            "Half of a table's entries suffice, the others being their negatives",
            2.0,
            "x",
            "tables of four activations, weights of one bit at a time: 8 entries for 16",
        ),
        Figure(
            "int8-tables",
            "Tables rounded to int8 raise the perplexity by this",
            0.01,
            "perplexity",
            "LLaMA-2-7B with 2-bit weights (BitDistiller), WikiText-2: 7.68 to 7.69; zero-shot 56.4 to 56.5",
            verified=False,
        ),
    ),
)

GROUP = 4
"""Activations of a table."""
BITS = (1, 2, 3, 4)
CPU_SHAPE = (4096, 4096)
_WEIGHT_GROUP = 32  # of the model with 2-bit weights


def signed_sums(x: Tensor, entries: int = 16) -> Tensor:
    """Tables (..., K / 4, entries): entry `index` is the sum of four activations, each with a plus where its bit of the index
    is set, else a minus. 8 entries are those with the top bit clear; the others are their negatives.

    Args:
        x: (..., K), K a multiple of 4.
        entries: 16 or 8.
    """
    import torch

    index = torch.arange(entries, device=x.device)
    signs = 2 * (index[:, None] >> torch.arange(GROUP, device=x.device) & 1) - 1  # [entries, 4]
    return torch.einsum("...gk,ek->...ge", x.unflatten(-1, (-1, GROUP)), signs.to(x.dtype))


def plane_indices(codes: Tensor, bits: int) -> Tensor:
    """(bits, N, K / 4) indices from 0 to 15 into whole tables, of unsigned codes (N, K)."""
    import torch

    planes = torch.stack([codes >> j & 1 for j in range(bits)]).unflatten(-1, (-1, GROUP))
    return (planes << torch.arange(GROUP, device=codes.device)).sum(-1)


def fold_indices(index: Tensor) -> Tensor:
    """Indices as they are stored for tables of 8: the top bit says that the entry is to be negated, and the others, flipped
    where it is set, say which one."""
    import torch

    return torch.where(index >= 8, 8 | ~index & 7, index)


def look_up(tables: Tensor, stored: Tensor) -> Tensor:
    """(M, N): `sum_j 2^j sum_g` of the entries that the weights' planes choose.

    Args:
        tables: (M, G, 16), or (M, G, 8) with `stored` from `fold_indices`.
        stored: (bits, N, G).
    """
    import torch

    total = torch.zeros(len(tables), stored.shape[1], dtype=tables.dtype, device=tables.device)
    halved = tables.shape[-1] == 8
    groups = torch.arange(tables.shape[1], device=tables.device)
    for j, plane in enumerate(stored):
        chosen = tables[:, groups, plane & 7 if halved else plane]  # [M, N, G]
        if halved:
            chosen = torch.where(plane >= 8, -chosen, chosen)
        total += chosen.sum(-1) * (1 << j)
    return total


@dataclass
class Operations:
    """What a product took, counted while it was computed."""

    multiplications: int = 0
    additions: int = 0
    look_ups: int = 0
    entries: int = 0


def counted_product(
    x: Sequence[Sequence[int]], codes: Sequence[Sequence[int]], bits: int, how: str
) -> tuple[list[list[int]], Operations]:
    """`x V^T` in plain Python with every operation counted, for `V = 2 code - (2^bits - 1)`.

    Args:
        x: M rows of K integers.
        codes: N rows of K codes.
        bits: of a code.
        how: "products": one multiplication and addition a weight; "bits": an addition or subtraction for each of its bits;
            "tables": tables of 8 entries, each one addition from the one before (in Gray's order), and a look-up for every
            plane and four weights. Doublings are shifts and not counted, nor are negations.
    """
    top = (1 << bits) - 1
    count = Operations()
    result = []
    for row in x:
        tables = (
            [_gray_table(row[first : first + GROUP], count) for first in range(0, len(row), GROUP)]
            if how == "tables"
            else []
        )
        outputs = []
        for weights in codes:
            total = 0
            if how == "products":
                for a, code in zip(row, weights, strict=True):
                    total += a * (2 * code - top)
                    count.multiplications += 1
                    count.additions += 1
            for j in range(bits if how != "products" else 0):
                part = 0
                if how == "bits":
                    for a, code in zip(row, weights, strict=True):
                        part += a if code >> j & 1 else -a
                        count.additions += 1
                else:
                    for group, table in enumerate(tables):
                        four = weights[GROUP * group : GROUP * group + GROUP]
                        index = sum((code >> j & 1) << k for k, code in enumerate(four))
                        part += -table[~index & 7] if index >= 8 else table[index]
                        count.look_ups += 1
                        count.additions += 1
                total += part << j
                count.additions += 1
            outputs.append(total)
        result.append(outputs)
    return result, count


def _gray_table(four: Sequence[int], count: Operations) -> list[int]:
    """The 8 entries whose top bit is clear, each from its neighbour by one addition."""
    table = [0] * 8
    entry = -sum(four)
    count.additions += GROUP - 1
    index = 0
    table[0] = entry
    count.entries += 8
    for step in range(1, 8):
        bit = (step & -step).bit_length() - 1  # which bit of Gray's code changes
        index ^= 1 << bit
        entry += 2 * four[bit] if index >> bit & 1 else -2 * four[bit]
        count.additions += 1
        table[index] = entry
    return table


@PAPER.claim(
    "C1",
    figure="table-size",
    criterion=(
        "for 1 to 4 bits and any zero point, products by tables of 8 entries equal int64's and those by tables of 16, and take "
        "fewer additions than bit-serial ones with 64 outputs to a table"
    ),
    measures=("tensormill.papers.lut_tensor_core",),
)
def exactness(run: Run) -> Measurement:
    """Reinterpretation of the weights' bits as -1 and +1, symmetric tables, and what they cost, counted operation by
    operation for 2 tokens, 64 outputs and 64 activations (the paper's array has 2 x 64 x 4).

    The algorithm is written out here: the operator's kernel keeps whole tables, which fill a register either way.
    """
    import torch

    generator = torch.Generator().manual_seed(run.seed)
    differing = unequal = asymmetric = sums = 0
    worst = 0.0
    for bits in BITS:
        run.progress(f"{bits} bits", bits / 6)
        for length in (4, 64, 300, 4096):
            x = torch.randint(-127, 128, (5, length), generator=generator)
            codes = torch.randint(0, 1 << bits, (7, length), generator=generator)
            zero = torch.randint(0, 1 << bits, (7,), generator=generator)
            stored = plane_indices(codes, bits)
            whole, half = signed_sums(x), signed_sums(x, 8)
            asymmetric += int((whole != -whole.flip(-1)).sum())
            found = look_up(half, fold_indices(stored))
            unequal += int((found != look_up(whole, stored)).sum())
            # s (u - z) = (s / 2) (v - z'), and so twice the product of integers
            shift = 2 * zero + 1 - (1 << bits)
            twice = found - shift * x.sum(1, keepdim=True)
            exact = x @ (codes - zero[:, None]).T
            differing += int((twice != 2 * exact).sum())
            sums += exact.numel()
            real = torch.randn(5, length, generator=generator, dtype=torch.float64)
            odd = (2 * codes - ((1 << bits) - 1)).double()
            error = look_up(signed_sums(real, 8), fold_indices(stored)) - real @ odd.T
            worst = max(worst, float(error.norm() / (real @ odd.T).norm()))
    setting = {"results": sums}
    rows = [
        Row("results of integers that differ", differing, "results", setting=setting),
        Row("results of tables of 8 that differ from those of 16", unequal, "results", setting=setting),
        Row("entries that are not the negative of their complement", asymmetric, "entries"),
        Row("relative error with float64 activations", worst, "of the result"),
    ]
    fewer = True
    x_rows = torch.randint(-127, 128, (2, 64), generator=generator)
    for bits in (1, 2, 4):
        codes = torch.randint(0, 1 << bits, (64, 64), generator=generator)
        wanted = (x_rows @ (2 * codes - ((1 << bits) - 1)).T).tolist()
        counts = {}
        for how in ("products", "bits", "tables"):
            found_rows, counts[how] = counted_product(x_rows.tolist(), codes.tolist(), bits, how)
            differing += found_rows != wanted
            per_output = counts[how].additions / codes.shape[0] / len(x_rows)
            rows.append(
                Row(
                    f"{bits} bits by {how}: additions for an output of 64 weights",
                    per_output,
                    "additions",
                    setting=asdict(counts[how]),
                )
            )
        fewer = fewer and counts["tables"].additions < counts["bits"].additions
    holds = differing == unequal == asymmetric == 0 and worst < 1e-13 and fewer
    return Measurement(rows, holds=holds, reason=f"{sums} results; float64 to {worst:.0e}")


TABLES: Mapping[str, int | None] = {
    "a scale per table": 1,
    "a scale per 64 activations": 16,
    "float tables": None,
}
"""Tables that share a scale; None leaves them in float."""


def quantize_tables(tables: Tensor, together: int) -> Tensor:
    """Tables of 8 entries rounded to int8 with a scale for so many neighbouring tables, as the numbers that they stand for.

    The scale is that of the largest entry, the largest sum of four magnitudes. The last tables may be fewer.
    """
    import torch

    groups = tables.shape[-2]
    padded = torch.nn.functional.pad(tables, (0, 0, 0, -groups % together))
    blocks = padded.unflatten(-2, (-1, together))  # [..., G', together, 8]
    scale = blocks.abs().amax((-2, -1), keepdim=True) / 127
    rounded = (blocks / scale.clamp(min=1e-30)).round() * scale
    return rounded.flatten(-3, -2)[..., :groups, :]


def table_linear(layer: LinearWNA16, together: int | None) -> nn.Module:
    """The low-bit layer computed by tables, as a product of a token's tables with how often, weighted and signed, an
    output reads each entry.

    Args:
        layer: with at most 8 bits and K a multiple of 4.
        together: tables that share a scale when rounded to int8; None leaves them as they are.
    """
    import torch
    from torch import nn

    columns, bits = layer.in_features, layer.bits
    size = columns if layer.group_size == -1 else layer.group_size
    half_scale = layer.weight_scale.float().repeat_interleave(size, 1)[:, :columns] / 2
    stored = fold_indices(plane_indices(layer.codes().int(), bits))  # [bits, N, G]
    weights = torch.tensor([1 << j for j in range(bits)], device=stored.device)[:, None, None]
    signed = torch.where(stored >= 8, -weights, weights).float()
    reads = torch.zeros(*stored.shape[1:], 8, device=stored.device)
    for plane, sign in zip(stored & 7, signed, strict=True):
        reads.scatter_add_(2, plane[..., None].long(), sign[..., None])
    reads = (reads * half_scale[:, ::GROUP, None]).flatten(1)  # a group of weights holds whole tables
    zero = layer.weight_zero_point
    if zero is None:
        shift = torch.full_like(half_scale, 1.0)  # 2 * 2^(b-1) + 1 - 2^b
    else:
        shift = (2 * zero.float() + 1 - (1 << bits)).repeat_interleave(size, 1)[:, :columns]
    offset = half_scale * shift

    class TableLinear(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tables = signed_sums(x.float(), 8)
            if together is not None:
                tables = quantize_tables(tables, together)
            y = tables.flatten(-2) @ reads.T - x.float() @ offset.T
            return (y if layer.bias is None else y + layer.bias).to(x.dtype)

    return TableLinear()


@PAPER.claim(
    "C2",
    figure="int8-tables",
    criterion="with 2-bit weights, int8 tables with a scale each raise the perplexity by at most 0.13 % (the paper's 7.68 to 7.69)",
    measures=(
        *SOURCES,
        "tensormill.papers._low_bit",
        "tensormill.papers.lut_tensor_core",
        "tensormill.compress.gptq",
        "tensormill.compress.clipping",
        "tensormill.ops.clipping_error",
        "tensormill.compress.flexq",
        "tensormill.compress.quantized_inputs",
        "tensormill.ops.linear_wna8",
        "tensormill.ops.quantize_activations",
    ),
)
def rounded_tables(run: Run) -> Measurement:
    """Tables in float and in int8, with a scale each or per 64 activations (T-MAC's), and inputs in int8 with a scale per
    token, for the built-in model with weights of 2 and 4 bits; what is compared is the same model with exact products.

    Weights are rounded by GPTQ, in groups of 32 (the paper's 2-bit model was trained so).
    """
    from tensormill.compress import flexq, gptq
    from tensormill.compress.quantized_inputs import set_linear
    from tensormill.ops.linear_wna16.module import LinearWNA16

    full = run.scale == "full"
    (subject,) = builtin_subjects(run, ("plain",), 65536 if full else 4096)
    calibration = subject.calibration(64 if full else 8)
    rows: list[Row] = []
    reasons: list[str] = []
    holds = True
    for i, bits in enumerate((2, 4)):
        run.progress(f"{bits} bits", i / 2)
        exact: Any
        exact, _ = compressed(
            subject.model, gptq.apply, gptq.GPTQConfig(bits=bits, group_size=_WEIGHT_GROUP), calibration
        )
        low_bit = [name for name, layer in exact.named_modules() if isinstance(layer, LinearWNA16)]
        models = {}
        for name, together in TABLES.items():
            made = models[name] = copy.deepcopy(exact)
            for linear in low_bit:
                layer: Any = exact.get_submodule(linear)
                set_linear(made, linear, table_linear(layer, together))
        models["int8 inputs, a scale per token"] = copy.deepcopy(exact)
        flexq.quantize_inputs(models["int8 inputs, a scale per token"], 8, -1)
        scores, made_rows = score(run, replace(subject, name=f"W{bits}", model=exact), models)
        rows += made_rows
        found = {name: rise(scores, name) for name in models}
        if bits == 2:
            holds = found["a scale per table"] <= 0.13
        holds = holds and abs(found["float tables"]) < 0.01
        reasons.append(
            f"W{bits}: {found['a scale per table']:+.3f} % a scale per table, {found['a scale per 64 activations']:+.3f} % per 64 "
            f"activations, {found['int8 inputs, a scale per token']:+.3f} % int8 inputs"
        )
    return Measurement(rows, holds=holds, reason="; ".join(reasons))


@PAPER.claim(
    "C3",
    statement="On a CPU, table look-ups are faster than multiplying dequantized weights (T-MAC: 16.68 against llama.cpp's 3.82 tokens/s)",
    paper_value=4.37,
    unit="x",
    criterion="at 1 and at 2 bits and one token on 4096 x 4096, look-ups are faster than the dequantizing kernel of the same "
    "library, and than every peer",
    needs=("cpu",),
    measures=("tensormill.ops.linear_wna8", "tensormill.ops.benchmark", "tensormill.measure"),
    peers=("onnxruntime", "llama-cpp-python"),
)
def cpu_look_ups(run: Run) -> Measurement:
    """Both kernels of `linear_wna8` in one run, with peers: bfloat16 activations, groups of 128, weights from memory.

    Tables are built in the call, for each token once. The paper's own kernel has int8 entries, which are not exact; these
    have 16 bits.
    """
    from tensormill.ops import OPERATORS
    from tensormill.ops.benchmark import benchmark, complete_shape

    operator = OPERATORS["linear_wna8"]
    missing = operator.find("lut").missing()
    if missing is not None:
        raise ClaimNotMeasurable(f"look-ups: {missing}")
    shapes = [CPU_SHAPE] if run.scale == "quick" else [CPU_SHAPE, (14336, 4096)]
    rows: list[Row] = []
    ratios: dict[int, float] = {}
    for n, k in shapes:
        for bits in (1, 2):
            for tokens in (1,) if run.scale == "quick" else (1, 2, 16):
                name = f"W{bits}A8 M={tokens} {n}x{k}"
                run.progress(name)
                shape = complete_shape(operator, linear_shape(tokens, n, k, bits, 128, -1, "bfloat16"))
                made = {
                    row.implementation: row
                    for row in benchmark(
                        operator, [shape], run.device, implementations=("cpu", "lut"), seconds=0.5
                    )
                }
                table, dense = made["lut"], made["cpu"]
                others = {peer: 1e6 * value for peer, value in table.peer_seconds.items()}
                rows.append(
                    Row(
                        f"{name} by look-ups",
                        1e6 * table.seconds,
                        "us",
                        spread=(1e6 * table.low, 1e6 * table.high),
                        peers={"dequantizing kernel": 1e6 * dense.seconds, **others},
                        limit=1e6 * table.limit_seconds,
                    )
                )
                rows.append(
                    Row(f"{name}: look-ups faster than dequantizing", dense.seconds / table.seconds, "x")
                )
                if tokens == 1 and (n, k) == CPU_SHAPE:
                    ratios[bits] = min(dense.seconds, *table.peer_seconds.values()) / table.seconds
    reason = ", ".join(f"{ratio:.2f}x the fastest other at {bits} bits" for bits, ratio in ratios.items())
    return Measurement(rows, holds=min(ratios.values()) > 1, reason=reason)

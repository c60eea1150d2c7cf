"""Six-bit weights with six- or eight-bit activations, multiplied on binary tensor cores.

The method is `compress/flexq.py`. C1 quality, C2 which layers are sensitive, C3 exactness of the arithmetic, C4 and C5 speed on
a GPU and on a CPU, C6 memory. The kernels multiply bytes: on Hopper 36 products of single bits cost more than one of
bytes; the bit planes of the paper are timed beside. ABQ-LLM's kernel and the end-to-end server have no counterpart here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tensormill.papers._low_bit import (
    KERNEL_SOURCES,
    compressed,
    geometric_mean,
    int8_product,
    linear_shape,
    rise,
    score,
    smooth_quant,
    time_product,
)
from tensormill.papers.awq.subjects import SOURCES, builtin_and_smollm2, builtin_subjects
from tensormill.papers.catalogue import Figure, Measurement, Paper, Row, Run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tensormill.compress.evaluate import Evaluation

PAPER = Paper(
    slug="flexq",
    title="FlexQ: Efficient Post-training INT6 Quantization for LLM Serving via Algorithm-System Co-Design",
    authors="Zhang et al.",
    arxiv="2508.04405",
    room="compress",
    figures=(
        Figure(
            "perplexity-increase",
            "Perplexity rises at most by this",
            0.05,
            "perplexity",
            "WikiText-2, LLaMA 1 and 2; the second version says 0.1",
        ),
        Figure(
            "perplexity-l2-7b",
            "LLaMA-2-7B in W6A6/8",
            5.52,
            "perplexity",
            "WikiText-2; float 5.47, DuQuant 5.53, SmoothQuant 6.20; README",
        ),
        Figure(
            "kernel-cublas",
            "The kernel is faster than cuBLAS W8A8 at batch 8",
            1.82,
            "x",
            "LLaMA and OPT-30B layers, GPU not stated; 1.78 at batch 1",
        ),
        Figure(
            "kernel-abq",
            "The kernel is faster than ABQ-LLM's on LLaMA-2-70B layers",
            1.39,
            "x",
            "abstract",
        ),
        Figure(
            "end-to-end",
            "Inference is faster than SmoothQuant",
            1.33,
            "x",
            "abstract",
        ),
        Figure(
            "memory",
            "Inference needs less memory than SmoothQuant",
            1.21,
            "x",
            "abstract",
        ),
    ),
)

_QUALITY_SOURCES = (
    *SOURCES,
    "tensormill.papers._low_bit",
    "tensormill.compress.flexq",
    "tensormill.compress.quantized_inputs",
    "tensormill.compress.rtn",
    "tensormill.compress.comet",
    "tensormill.ops.linear_wna8",
    "tensormill.ops.quantize_activations",
)
_JUDGED = "W6A6, down_proj A8"
_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GPU_SHAPES = ((12288, 4096), (4096, 11008), (8192, 8192))
GPU_TOKENS = (1, 8, 16, 256, 1024)
_FEW = 8  # tokens up to which the paper measures
CPU_SHAPE = (4096, 4096)
GROUP = 128


@PAPER.claim(
    "C1",
    figure="perplexity-increase",
    criterion=(
        "perplexity of W6A6 with 8-bit inputs of down_proj rises by at most 0.92 % (the paper's 0.05 of 5.47) on every "
        "model judged: the built-in one untouched and, at full scale, SmolLM2-135M; injected outliers are shown beside"
    ),
    measures=_QUALITY_SOURCES,
)
def quality(run: Run) -> Measurement:
    """W6 with 8- and 6-bit inputs, beside W8A8 (plain and SmoothQuant), W4A8 and W4A16, all in integer arithmetic.

    The built-in model is judged on Python, untouched and with injected outliers; at full scale SmolLM2-135M on
    WikiText-2, in groups of 64. The paper's models are LLaMA's.
    """
    from tensormill.compress import flexq, rtn

    full = run.scale == "full"
    subjects, notes = builtin_and_smollm2(run, ("plain", "outliers"), 65536 if full else 4096)
    failures: list[str] = []
    rows: list[Row] = []
    for i, subject in enumerate(subjects):
        run.progress(f"{subject.name}: rounding", i / len(subjects))
        calibration = subject.calibration(64 if full else 4)
        group = subject.group_size
        models = {"W8A8 SmoothQuant": smooth_quant(subject.model, calibration)}
        settings: dict[str, dict[str, Any]] = {
            "W6A8": {"activation_bits": 8},
            _JUDGED: {},
            "W6A6, a quarter chosen for 8": {"sensitive": "auto"},
            "W6A6": {"sensitive": ()},
            "W4A8": {"bits": 4, "activation_bits": 8},
        }
        for name, options in settings.items():
            config = flexq.FlexQConfig(group_size=group, **options)
            models[name], _ = compressed(
                subject.model, flexq.apply, config, calibration if config.sensitive == "auto" else None
            )
        plain = rtn.RTNConfig(bits=8, group_size=-1, symmetric=True)
        models["W8A8"], _ = compressed(subject.model, rtn.apply, plain, None)
        flexq.quantize_inputs(models["W8A8"], 8, -1)
        four = flexq.FlexQConfig(bits=4, group_size=group)
        models["W4A16"], _ = compressed(subject.model, rtn.apply, four, None)
        scores, made = score(run, subject, models, 1024 if full else 256)
        rows += made
        found_rise = rise(scores, _JUDGED)
        text = f"{subject.name}: {found_rise:+.2f} % ({rise(scores, 'W8A8 SmoothQuant'):+.2f} % SmoothQuant W8A8)"
        if subject.name != "outliers" and found_rise > 0.92:
            failures.append(subject.name)
        notes.append(text)
    return Measurement(rows, holds=not failures, reason="; ".join(notes))


@PAPER.claim(
    "C2",
    statement="The layers that need 8-bit inputs are the down projections",
    unit="share of the output's energy",
    criterion=(
        "of the seven kinds of linear layers, down_proj has the largest mean output error with a 6-bit input, and the "
        "largest divergence of the model's output when that kind alone has one"
    ),
    measures=_QUALITY_SOURCES,
)
def sensitivity(run: Run) -> Measurement:
    """Output error of each kind of layer with 6- and 8-bit inputs, and what the model makes of it, on the built-in model.

    The paper's criterion of sensitivity was not to be read; its code knows the rule only.
    """
    from tensormill.compress import flexq, rtn

    full = run.scale == "full"
    (subject,) = builtin_subjects(run, ("plain",), 65536 if full else 4096)
    config = flexq.FlexQConfig(group_size=subject.group_size)
    weights_only, report = compressed(subject.model, rtn.apply, config, None)
    names = [layer.name for layer in report.layers]
    run.progress("errors of the layers", 0.1)
    found = flexq.input_errors(
        weights_only, names, subject.calibration(32 if full else 4), (6, 8), subject.group_size
    )
    rows: list[Row] = []
    models: dict[str, nn.Module] = {"W6A16": weights_only}
    errors: dict[str, float] = {}
    for kind in _KINDS:
        of_kind = [name for name in names if name.endswith(kind)]
        for bits in (6, 8):
            values = [found[name][bits] for name in of_kind]
            mean = sum(values) / len(values)
            rows.append(
                Row(
                    f"{kind}, A{bits}: output error",
                    mean,
                    "share of the output's energy",
                    (min(values), max(values)),
                )
            )
            if bits == 6:
                errors[kind] = mean
        models[kind] = copy.deepcopy(weights_only)
        flexq.quantize_inputs(models[kind], dict.fromkeys(of_kind, 6), subject.group_size)
    scores, made = score(run, subject, models)
    rows += made
    divergence = {kind: _divergence(scores[kind]) for kind in _KINDS}
    worst = max(errors, key=lambda kind: errors[kind]), max(divergence, key=lambda kind: divergence[kind])
    reason = f"largest output error: {worst[0]}; largest divergence: {worst[1]}"
    return Measurement(rows, holds=worst == ("down_proj", "down_proj"), reason=reason)


def _divergence(score: Evaluation) -> float:
    assert score.comparison is not None
    return score.comparison.kl


@PAPER.claim(
    "C3",
    statement="Products of two's-complement bit planes, the top plane negative, are the integer products exactly",
    unit="sums that differ",
    paper_value=0,
    criterion=(
        "no sum differs, for all widths from 1 to 8 on both sides; and W6A6 and W6A8 by planes and by bytes agree to the "
        "rounding of float32, in groups of 128"
    ),
    measures=("tensormill.ops.bit_plane_linear", "tensormill.ops.bit_planes", "tensormill.ops.linear_wna8"),
)
def exactness(run: Run) -> Measurement:
    """The paper's formula with a negative top plane, the operator's (all planes positive, sums corrected) and int64.

    Lengths and values at the ends of their ranges are among them.
    """
    import torch

    from tensormill.ops.bit_packing import pack_bits
    from tensormill.ops.bit_plane_linear import bit_plane_linear
    from tensormill.ops.bit_planes import pack_planes
    from tensormill.ops.linear_wna8 import linear_wna8

    generator = torch.Generator().manual_seed(run.seed)
    lengths = (1, 127, 128, 300) if run.scale == "quick" else (1, 31, 33, 127, 128, 129, 300, 1000, 4096)
    by_formula = by_operator = sums = 0
    for p in range(1, 9):
        run.progress(f"{p} bits", p / 9)
        for q in range(1, 9):
            for length in lengths:
                x, weight = (
                    torch.randint(-(1 << (b - 1)), 1 << (b - 1), (rows, length), generator=generator)
                    for b, rows in ((q, 5), (p, 7))
                )
                x[0], weight[0] = -(1 << (q - 1)), -(1 << (p - 1))
                exact = x @ weight.T
                sums += exact.numel()
                by_formula += int((signed_plane_product(x, weight, q, p) != exact).sum())
                planes = (pack_planes(t.to(run.device), b, "signed") for t, b in ((x, q), (weight, p)))
                by_operator += int((bit_plane_linear(*planes).cpu() != exact).sum())
    rows = [
        Row("top plane negative: sums that differ", by_formula, "sums", setting={"sums": sums}),
        Row("all planes positive, corrected: sums that differ", by_operator, "sums", setting={"sums": sums}),
    ]
    worst = 0.0
    for bits in (6, 8):
        shape = (64, 4 * GROUP)
        codes = torch.randint(-32, 32, shape, generator=generator)
        x = torch.randint(-(1 << (bits - 1)) + 1, 1 << (bits - 1), (9, shape[1]), generator=generator)
        scale, x_scale = (torch.rand(n, 4, generator=generator) + 0.5 for n in (64, 9))
        grouped = torch.einsum("mgk,ngk->mng", x.view(9, 4, -1).double(), codes.view(64, 4, -1).double())
        exact = (grouped * x_scale[:, None].double() * scale.double()).sum(-1)
        size = exact.abs().max()
        by_planes = bit_plane_linear(
            pack_planes(x, bits, "signed", scale=x_scale, group_size=GROUP).to(run.device),
            pack_planes(codes, 6, "signed", scale=scale, group_size=GROUP).to(run.device),
        )
        by_bytes = linear_wna8(
            x.to(torch.int8).to(run.device),
            pack_bits((codes + 32).to(torch.uint8), 6).to(run.device),
            scale.to(run.device),
            bits=6,
            group_size=GROUP,
            x_scale=x_scale.to(run.device),
            x_group_size=GROUP,
        )
        for how, y in (("planes", by_planes), ("bytes", by_bytes)):
            error = float((y.cpu().double() - exact).abs().max() / size)
            rows.append(
                Row(f"W6A{bits} by {how}, groups of {GROUP}: largest error", error, "of the largest result")
            )
            worst = max(worst, error)
    holds = by_formula == by_operator == 0 and worst < 1e-6
    return Measurement(rows, holds, f"{sums} sums; scaled results to {worst:.0e}")


def signed_plane_product(x: Tensor, weight: Tensor, q: int, p: int) -> Tensor:
    """`x @ weight.T` of two's-complement integers as the paper's kernel does it: products of planes of single bits, with
    a minus where exactly one of them is a top plane.

    Args:
        x: (M, K) int64 of q bits.
        weight: (N, K) int64 of p bits.
    """
    total = x.new_zeros(len(x), len(weight))
    for i in range(q):
        for j in range(p):
            counts = (x >> i & 1) @ (weight >> j & 1).T
            sign = -1 if (i == q - 1) != (j == p - 1) else 1
            total += sign * (counts << (i + j))
    return total


@PAPER.claim(
    "C4",
    figure="kernel-cublas",
    criterion=(
        "W6A8 is at least 1.82 times as fast as cuBLAS's 8-bit product in the geometric mean over layers at 8 tokens, and "
        "faster than every W8A8 layer timed"
    ),
    scales=("full",),
    needs=("cuda", "python:triton"),
    measures=(*KERNEL_SOURCES, "tensormill.ops.linear_wna8", "tensormill.ops.bit_plane_linear"),
    peers=("humming-kernels", "triton"),
)
def gpu_kernel(run: Run) -> Measurement:
    """W6A8 beside W8A8 and W4A8, with activations quantized in the call, per row and token; FlexQ's groups and planes too.

    cuBLAS computes 8-bit products alone, of 32 rows at least, without scales or quantization; the paper's kernels, too,
    were timed without quantization. The fastest W8A8 layer is ours or humming's.
    """
    rows: list[Row] = []
    over_cublas: list[float] = []
    over_best: list[float] = []
    cases = [(tokens, shape) for shape in GPU_SHAPES for tokens in GPU_TOKENS]
    for i, (tokens, (n, k)) in enumerate(cases):
        name = f"M={tokens} {n}x{k}"
        run.progress(name, i / len(cases))
        by_bits = {
            bits: time_product(
                run,
                "linear_wna8",
                linear_shape(tokens, n, k, bits, -1, -1, "float16"),
                f"{name} W{bits}A8",
                seconds=0.2,
            )
            for bits in (6, 8, 4)
        }
        cublas = int8_product(run, tokens, n, k, seconds=0.2)
        rows += [*by_bits.values(), cublas]
        ours = float(by_bits[6].value)
        eight = [float(by_bits[8].value), *(v for peer, v in by_bits[8].peers.items() if "humming" in peer)]
        ratios = {
            "cuBLAS's 8-bit product": float(cublas.value) / ours,
            "the fastest W8A8 layer": min(eight) / ours,
        }
        rows += [Row(f"{name} W6A8 faster than {what}", ratio, "x") for what, ratio in ratios.items()]
        if tokens <= _FEW:
            over_best.append(ratios["the fastest W8A8 layer"])
            if tokens == _FEW:
                over_cublas.append(ratios["cuBLAS's 8-bit product"])
            grouped = linear_shape(tokens, n, k, 6, GROUP, GROUP, "float16")
            rows.append(
                time_product(run, "linear_wna8", grouped, f"{name} W6A8, groups of {GROUP}", seconds=0.2)
            )
            for bits in (6, 8):
                planes = {
                    "tokens": tokens,
                    "out_features": n,
                    "in_features": k,
                    "weight_bits": 6,
                    "x_bits": bits,
                    "weight_format": "signed",
                    "x_format": "signed",
                    "dtype": "float16",
                }
                what = f"{name} W6A{bits} by bit planes, activations given as planes"
                rows.append(time_product(run, "bit_plane_linear", planes, what, seconds=0.2))
    mean, least = geometric_mean(over_cublas), min(over_best)
    reason = f"{mean:.2f}x cuBLAS at {_FEW} tokens; at least {least:.2f}x the fastest W8A8 layer up to {_FEW}"
    return Measurement(rows, holds=mean >= 1.82 and least > 1, reason=reason)


@PAPER.claim(
    "C5",
    statement="On a CPU, 6-bit weights are faster than 8-bit ones when one token is decoded",
    unit="x",
    criterion="W6A8 is at least 1.15 times as fast as W8A8 at one token on 4096 x 4096, where bytes allow 1.31, and level "
    "with the fastest W8A8 peer",
    needs=("cpu",),
    measures=(*KERNEL_SOURCES, "tensormill.ops.linear_wna8"),
    peers=("onnxruntime",),
)
def cpu_kernel(run: Run) -> Measurement:
    """W6A8 beside W8A8, W4A8 and, where it is installed, onnxruntime's 8-bit layer, bfloat16 activations quantized inside."""
    n, k = CPU_SHAPE
    rows: list[Row] = []
    ratio, level = {}, {}
    tokens_wanted = (1, 16) if run.scale == "full" else (1,)
    for tokens in tokens_wanted:
        by_bits = {}
        for bits in (6, 8, 4):
            what = f"M={tokens} {n}x{k} W{bits}A8"
            run.progress(what)
            shape = linear_shape(tokens, n, k, bits, GROUP, -1, "bfloat16")
            by_bits[bits] = time_product(
                run, "linear_wna8", shape, what, seconds=1.0, implementations=("cpu",)
            )
        rows += by_bits.values()
        ours = float(by_bits[6].value)
        ratio[tokens] = float(by_bits[8].value) / ours
        peers = [v for peer, v in by_bits[8].peers.items() if "onnxruntime" in peer]
        level[tokens] = min(peers) / ours if peers else None
        rows.append(Row(f"M={tokens} {n}x{k} W6A8 faster than our W8A8", ratio[tokens], "x"))
        if peers:
            rows.append(Row(f"M={tokens} {n}x{k} W6A8 faster than onnxruntime W8A8", min(peers) / ours, "x"))
    beside = level[1]
    note = "no W8A8 peer is installed" if beside is None else f"{beside:.2f}x onnxruntime's"
    return Measurement(
        rows,
        holds=ratio[1] >= 1.15 and (beside is None or beside >= 0.97),
        reason=f"{ratio[1]:.2f}x our W8A8; {note}",
    )


@PAPER.claim(
    "C6",
    figure="memory",
    statement="A model with 6-bit weights needs less memory than with 8-bit ones",
    criterion="the tensors of LLaMA-13B's shape take at least 1.21 times fewer bytes than with 8 bits per row (SmoothQuant's)",
    measures=("tensormill.ops.linear_wna16", "tensormill.papers._low_bit"),
)
def memory(run: Run) -> Measurement:
    """Bytes of the tensors of a model of LLaMA-13B's shape, made on the meta device: layers as they are stored, 16-bit
    embeddings and norms. The cache and activations, which the paper's figure contains, are not in it."""
    from tensormill.ops.linear_wna16.module import LinearWNA16

    def stored(bits: int, group_size: int) -> int:
        model = llama_shape(
            lambda n, k: LinearWNA16(
                k, n, bits=bits, group_size=group_size, symmetric=True, bias=False, dtype=half, device="meta"
            )
        )
        return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))

    import torch

    half = torch.float16
    dense = llama_shape(lambda n, k: torch.nn.Linear(k, n, bias=False, dtype=half, device="meta"))
    sizes = {
        "float16": sum(t.numel() * t.element_size() for t in dense.parameters()),
        "W8, a scale per row": stored(8, -1),
        f"W6, groups of {GROUP}": stored(6, GROUP),
        f"W4, groups of {GROUP}": stored(4, GROUP),
    }
    rows = [Row(f"LLaMA-13B's shape, {name}", size / 2**30, "GiB") for name, size in sizes.items()]
    ours = sizes[f"W6, groups of {GROUP}"]
    ratio = sizes["W8, a scale per row"] / ours
    rows += [
        Row("W6 smaller than W8", ratio, "x"),
        Row("W6 smaller than float16", sizes["float16"] / ours, "x"),
    ]
    return Measurement(rows, holds=ratio >= 1.21, reason=f"{ratio:.3f}x, weights alone")


def llama_shape(
    linear: Callable[[int, int], nn.Module], layers: int = 40, hidden: int = 5120, inner: int = 13824
) -> nn.Module:
    """The tensors of LLaMA-13B, its linear layers as `linear(out_features, in_features)` makes them."""
    import torch
    from torch import nn

    def embedding() -> nn.Module:
        return nn.Embedding(32000, hidden, dtype=torch.float16, device="meta")

    shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    blocks = [nn.ModuleList(linear(n, k) for n, k in shapes) for _ in range(layers)]
    norms = [nn.RMSNorm(hidden, dtype=torch.float16, device="meta") for _ in range(2 * layers + 1)]
    return nn.ModuleList([*blocks, *norms, embedding(), embedding()])

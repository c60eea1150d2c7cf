"""Serving with 4-bit weights, mixed 4- and 8-bit activations in blocks, and a 4-bit cache.

The method is `compress/comet.py`. C1 quality, C2 how many blocks can have 4 bits, C3 exactness of the arithmetic, C4 and C5
speed on a GPU and on a CPU. Not here: the server, so that no throughput is compared; 4-bit tensor cores, which Hopper has
not; and the tile scheduler of the paper's kernel, which balances tiles of unequal cost, where here all cost the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tensormill.papers._low_bit import (
    KERNEL_SOURCES,
    compressed,
    fastest,
    geometric_mean,
    int8_product,
    linear_shape,
    rise,
    score,
    smooth_quant,
    time_product,
)
from tensormill.papers.awq.subjects import SOURCES, builtin_and_smollm2
from tensormill.papers.catalogue import Figure, Measurement, Paper, Row, Run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tensormill.compress.calibration import Calibration
    from tensormill.compress.evaluate import Evaluation, Interval
    from tensormill.compress.quantized_inputs import BlockQuantizedLinear

PAPER = Paper(
    slug="comet",
    title="COMET: Towards Practical W4A4KV4 LLMs Serving",
    authors="Liu et al.",
    arxiv="2410.12168",
    room="compress",
    figures=(
        Figure(
            "kernel-cublas",
            "The W4Ax kernel is faster than cuBLAS fp16 at large batch",
            2.88,
            "x",
            "A100-80G, mean of batch 16, 64, 256; 75 % of the tiles W4A4; 1.48 at batch 2 to 8",
        ),
        Figure(
            "kernel-w4a16",
            "The W4Ax kernel is faster than TensorRT-LLM's W4A16 at large batch",
            1.77,
            "x",
            "A100-80G; 1.33 over its W8A8",
        ),
        Figure(
            "end-to-end",
            "Throughput over TensorRT-LLM W4A16",
            2.02,
            "x",
            "A100-80G, 1024 tokens in and 512 out, largest batch that fits",
        ),
        Figure(
            "qserve",
            "Throughput over QServe",
            1.17,
            "x",
            "A100-80G",
        ),
        Figure(
            "perplexity",
            "LLaMA-2-7B in W4AxKV4",
            5.73,
            "perplexity",
            "WikiText-2, 4096-token protocol; float 5.12, OmniQuant W4A4 14.26",
        ),
        Figure(
            "zero-shot",
            "LLaMA-3-8B in W4AxKV4 keeps its zero-shot average of 68.6",
            66.5,
            "%",
            "Table 2; W4A16 67.2, QoQ 66.3",
        ),
    ),
)

BLOCK = 32
WIDE_SHARE = 0.16
_JUDGED = "W4Ax, 16 % of the blocks with 8 bits"
_METHOD_SOURCES = (
    *SOURCES,
    "tensormill.papers._low_bit",
    "tensormill.compress.comet",
    "tensormill.compress.flexq",
    "tensormill.compress.quantized_inputs",
    "tensormill.compress.gptq",
    "tensormill.compress.clipping",
    "tensormill.ops.clipping_error",
    "tensormill.compress.rtn",
    "tensormill.ops.linear_wna8",
    "tensormill.ops.quantize_activations",
)
GPU_SHAPES = ((4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192))
GPU_TOKENS = (2, 8, 16, 64, 256)
LARGE = (16, 64, 256)
CPU_SHAPE = (4096, 4096)
GROUP = 128


@PAPER.claim(
    "C1",
    figure="perplexity",
    criterion=(
        "with at most 20 % of the activations in 8 bits and a 4-bit cache, perplexity rises by at most 12 % (the paper's: "
        "5.12 to 5.73) on every model, and where there are outliers 4 bits everywhere are significantly worse"
    ),
    measures=(*_METHOD_SOURCES, "tensormill.ops.decode_attention"),
)
def quality(run: Run) -> Measurement:
    """4-bit weights with inputs in blocks of 4 and 8 bits, beside the same weights with 16-, 8- and 4-bit inputs.

    On the built-in model, untouched and with injected outliers; at full scale on SmolLM2-135M and WikiText-2 too. Blocks
    have 32 channels: 128, the paper's of 4096, would be a third of the built-in model's 384; at full scale that is shown
    too. Weights are rounded as GPTQ does on searched ranges, since the paper's learned ranges are not here. The cache has a
    scale per token and head, not the paper's per channel; all keys and values are rounded, the newest too.
    """
    full = run.scale == "full"
    subjects, notes = builtin_and_smollm2(run, ("plain", "outliers"), 65536 if full else 4096)
    rows: list[Row] = []
    failures: list[str] = []
    for i, subject in enumerate(subjects):
        run.progress(f"{subject.name}: rounding", i / len(subjects))
        calibration = subject.calibration(64 if full else 8)
        models = variants(subject.model, calibration, BLOCK)
        judged = models[_JUDGED]
        share = wide_share(judged)
        rows.append(Row(f"{subject.name}: activations in 8 bits", 100 * share, "%"))
        rows.append(
            Row(
                f"{subject.name}: activations in 8 bits, blocks with outliers only",
                100 * wide_share(models["W4Ax, blocks with outliers"]),
                "%",
            )
        )
        models[f"{_JUDGED}, KV4"] = with_rounded_cache(judged)
        models["W8A8 SmoothQuant"] = smooth_quant(subject.model, calibration)
        if full and subject.group_size == GROUP:
            large = variants(subject.model, calibration, GROUP)
            models |= {f"{name}, blocks of {GROUP}": model for name, model in large.items()}
        scores, made = score(run, subject, models, 1024 if full else 256)
        rows += made
        found_rise = rise(scores, f"{_JUDGED}, KV4")
        notes.append(
            f"{subject.name}: {found_rise:+.1f} % with {share:.0%} in 8 bits ({rise(scores, _SAME_WEIGHTS):+.1f} % by the "
            f"weights alone, {rise(scores, 'W4A4'):+.3g} % in W4A4)"
        )
        if found_rise > 12 or share > 0.2:
            failures.append(subject.name)
        if subject.name != "plain":
            interval = paired(run, scores, "W4A4", _JUDGED)
            rows.append(
                Row(
                    f"{subject.name} W4A4 minus W4Ax",
                    interval.estimate,
                    "perplexity",
                    (interval.low, interval.high),
                )
            )
            if not interval.low > 0:
                failures.append(subject.name)
    return Measurement(rows, holds=not failures, reason="; ".join(notes))


_SAME_WEIGHTS = "W4A16, the same weights"


def variants(model: nn.Module, calibration: Calibration, block: int) -> dict[str, nn.Module]:
    """Models with 4-bit weights, rounded once in the order of the permutation, by the widths of their inputs; and one
    without permutation."""
    from tensormill.compress import comet

    settings: dict[str, Any] = {"group_size": block, "rounding": "gptq"}
    mixed, _ = compressed(model, comet.apply, comet.COMETConfig(**settings), calibration)
    in_place = comet.COMETConfig(**settings, permute=False, wide_share=WIDE_SHARE)
    return {
        _SAME_WEIGHTS: with_float_inputs(mixed),
        "W4A8": with_wide_share(mixed, 1.0),
        _JUDGED: with_wide_share(mixed, WIDE_SHARE),
        "W4Ax, blocks with outliers": mixed,
        "W4A4": with_wide_share(mixed, 0.0),
        f"{_JUDGED}, not permuted": compressed(model, comet.apply, in_place, calibration)[0],
    }


def _quantized(model: nn.Module) -> dict[str, BlockQuantizedLinear]:
    from tensormill.compress.quantized_inputs import BlockQuantizedLinear

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BlockQuantizedLinear)}


def with_wide_share(model: nn.Module, share: float) -> nn.Module:
    """A copy whose permuted layers have 8 bits in that share of their blocks, rounded up, the first ones."""
    made = copy.deepcopy(model)
    for layer in _quantized(made).values():
        layer.block_bits.fill_(4)
        layer.block_bits[: math.ceil(share * len(layer.block_bits))] = 8
    return made


def with_float_inputs(model: nn.Module) -> nn.Module:
    """A copy with dense layers of the same weights."""
    import torch
    from torch import nn

    from tensormill.compress.quantized_inputs import set_linear

    made = copy.deepcopy(model)
    for name, layer in _quantized(made).items():
        dense: Any = nn.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )
        dense.weight = nn.Parameter(layer.dequantize(torch.float32))
        dense.bias = layer.bias
        set_linear(made, name, dense)
    return made


def wide_share(model: nn.Module) -> float:
    """Share of all activations that linear layers read in 8 bits."""
    layers = _quantized(model).values()
    total = sum(layer.in_features for layer in layers)
    return sum(layer.in_features * (layer.average_input_bits() - 4) / 4 for layer in layers) / total


def with_rounded_cache(model: nn.Module) -> nn.Module:
    """A copy whose attention reads keys and values as the 4-bit cache of `ops.decode_attention` holds them."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from tensormill.ops.decode_attention import INT4, dequantize_kv, quantize_kv

    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def stored(x: Tensor) -> Tensor:
        return dequantize_kv(*quantize_kv(x, INT4), x.dtype)

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any
    ) -> Any:
        return attend(module, query, stored(key), stored(value), *arguments, **options)

    name = "tensormill_int4_cache"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    made: Any = copy.deepcopy(model)
    made.config._attn_implementation = name
    return made  # type: ignore[no-any-return]


def paired(run: Run, scores: Mapping[str, Evaluation], one: str, other: str) -> Interval:
    """The interval of the difference of two models' perplexities."""
    from tensormill.compress.evaluate import paired_bootstrap

    return paired_bootstrap(scores[one].window_nll, scores[other].window_nll, seed=run.seed)


@PAPER.claim(
    "C2",
    statement="Sorting channels gathers outliers, so that most blocks of activations can have 4 bits",
    paper_value=84,
    unit="% of the blocks",
    criterion=(
        "with channels beyond 10 times the median as outliers, at least 84 % of the blocks of 128 and of 32 channels hold "
        "none once channels are sorted, on every model, and where there are outliers more than as they lie"
    ),
    measures=(*SOURCES, "tensormill.compress.comet", "tensormill.ops.quantize_activations/mixed.py"),
)
def narrow_blocks(run: Run) -> Measurement:
    """Blocks without outliers, with and without the permutation, on the built-in model untouched and with injected outliers;
    at full scale on SmolLM2-135M too. The paper has no rule for what an outlier is; other thresholds are shown."""
    import torch

    from tensormill.compress.calibration import stream_blocks
    from tensormill.compress.comet import COMETConfig, observe_magnitudes, plan_inputs
    from tensormill.compress.structure import discover

    full = run.scale == "full"
    subjects, notes = builtin_and_smollm2(run, ("plain", "outliers"), None)
    rows: list[Row] = []
    holds = True
    for i, subject in enumerate(subjects):
        run.progress(subject.name, i / len(subjects))
        blocks = stream_blocks(subject.model, discover(subject.model), subject.calibration(64 if full else 8))
        inputs = [magnitude for block in blocks for magnitude in observe_magnitudes(block)[0].values()]
        ratios = torch.cat([magnitude / magnitude.median() for magnitude in inputs])
        rows.append(Row(f"{subject.name}: largest channel over the median", float(ratios.max()), "x"))
        for ratio in (5.0, 10.0, 20.0):
            for size in (GROUP, BLOCK):
                share = {}
                for permute in (True, False):
                    config = COMETConfig(group_size=size, outlier_ratio=ratio, permute=permute)
                    bits = torch.cat([plan_inputs(magnitude, config)[1] for magnitude in inputs])
                    share[permute] = 100 * float((bits == 4).double().mean())
                what = f"{subject.name}, beyond {ratio:.0f}x, blocks of {size}: 4 bits"
                rows.append(Row(what, share[True], "% of the blocks", peers={"not permuted": share[False]}))
                if ratio == 10:
                    holds = holds and share[True] >= 84 and share[True] >= share[False]
                    if subject.name != "plain":
                        holds = holds and share[True] > share[False]
                    notes.append(
                        f"{subject.name}, {size}: {share[True]:.0f} % ({share[False]:.0f} % as they lie)"
                    )
    return Measurement(rows, holds, "; ".join(notes))


@PAPER.claim(
    "C3",
    statement="Products with inputs of mixed widths are exact in integers, in one order or another",
    unit="sums that differ",
    paper_value=0,
    criterion="no sum of a block differs from int64's, and "
    "the permuted layer's weight, put back, is the rounded weight",
    measures=(
        "tensormill.compress.quantized_inputs",
        "tensormill.ops.linear_wna8",
        "tensormill.ops.quantize_activations",
    ),
)
def exactness(run: Run) -> Measurement:
    """W4Ax layers of random codes whose blocks have unit scales, one at a time, so that each block's sum shows."""
    import torch

    from tensormill.compress.quantized_inputs import with_quantized_input
    from tensormill.ops.linear_wna16.module import LinearWNA16

    generator = torch.Generator().manual_seed(run.seed)
    differing = sums = moved = 0
    sizes = (
        ((256, 64), (300, 128), (96, 32))
        if run.scale == "quick"
        else ((4096, 128), (11008, 128), (300, 64), (96, 32))
    )
    for columns, size in sizes:
        run.progress(f"{columns} channels in blocks of {size}")
        blocks = -(-columns // size)
        codes = torch.randint(0, 16, (40, columns), generator=generator, dtype=torch.uint8)
        bits = torch.where(torch.rand(blocks, generator=generator) < 0.3, 8, 4)
        order = torch.randperm(columns, generator=generator)
        x = torch.randn(9, columns, generator=generator) * (
            1 + 50 * (torch.rand(columns, generator=generator) < 0.05)
        )
        for block in range(blocks):
            scale = torch.zeros(40, blocks)
            scale[:, block] = 1
            plain = LinearWNA16.from_codes(codes, scale, None, bits=4, group_size=size)
            layer = with_quantized_input(plain, bits, size, order).to(run.device)
            quantized, _ = layer.quantize_input(x.to(run.device))
            units = torch.ones(9, blocks, device=run.device)
            found = layer(quantized, units).cpu()
            part = slice(size * block, size * (block + 1))
            exact = quantized.cpu().long()[:, part] @ (codes.long()[:, part] - 8).T
            differing += int((found.long() != exact).sum())
            sums += exact.numel()
        whole = LinearWNA16.from_codes(codes, torch.ones(40, blocks), None, bits=4, group_size=size)
        layer = with_quantized_input(whole, bits, size, order)
        moved += int((layer.dequantize()[:, order] != whole.dequantize()).sum())
    rows = [
        Row("sums of blocks that differ", differing, "sums", setting={"sums": sums}),
        Row("weights not in their place after permuting back", moved, "weights"),
    ]
    return Measurement(rows, holds=differing == moved == 0, reason=f"{sums} sums of blocks")


@PAPER.claim(
    "C4",
    figure="kernel-cublas",
    criterion=(
        "4-bit weights and 8-bit activations, both in groups of 128 and quantized in the call, are at least 2.88 times as "
        "fast as cuBLAS float16 in the geometric mean over layers and 16, 64 and 256 tokens"
    ),
    scales=("full",),
    needs=("cuda", "python:triton"),
    measures=(*KERNEL_SOURCES, "tensormill.ops.linear_wna8"),
    peers=("humming-kernels", "triton"),
)
def gpu_kernel(run: Run) -> Measurement:
    """W4A8 in COMET's groups, and per row and token, beside cuBLAS float16 and 8-bit products, and humming.

    Blocks of 4 bits are computed in bytes, like those of 8: Hopper has no 4-bit matrix unit, so that W4Ax and W4A8 take the
    same time. The limit over float16 is 3.9 up to the number of tokens at which arithmetic counts, and 2 beyond.
    """
    rows: list[Row] = []
    ratios: dict[bool, list[float]] = {True: [], False: []}
    over_humming: list[float] = []
    cases = [(tokens, shape) for shape in GPU_SHAPES for tokens in GPU_TOKENS]
    for i, (tokens, (n, k)) in enumerate(cases):
        name = f"M={tokens} {n}x{k}"
        run.progress(name, i / len(cases))
        grouped = time_product(
            run,
            "linear_wna8",
            linear_shape(tokens, n, k, 4, GROUP, GROUP, "float16"),
            f"{name} W4A8, groups of {GROUP}",
            seconds=0.2,
        )
        per_row = time_product(
            run,
            "linear_wna8",
            linear_shape(tokens, n, k, 4, -1, -1, "float16"),
            f"{name} W4A8, per row and token",
            seconds=0.2,
        )
        dense = fastest(grouped, "linear fp16")
        rows += [grouped, per_row, int8_product(run, tokens, n, k, seconds=0.2)]
        for row in (grouped, per_row):
            rows.append(Row(f"{row.what}, faster than cuBLAS float16", dense / float(row.value), "x"))
        ratios[tokens in LARGE].append(dense / float(grouped.value))
        if any("humming" in peer for peer in per_row.peers):
            over_humming.append(fastest(per_row, "humming") / float(per_row.value))
    large, small = geometric_mean(ratios[True]), geometric_mean(ratios[False])
    rows += [
        Row(f"mean over layers and {', '.join(map(str, LARGE))} tokens", large, "x"),
        Row("mean over layers and fewer tokens", small, "x"),
    ]
    beside = (
        f"{geometric_mean(over_humming):.2f}x humming per row" if over_humming else "humming is not installed"
    )
    reason = f"{large:.2f}x cuBLAS float16, {small:.2f}x with fewer tokens (the paper: 1.48x); {beside}"
    return Measurement(rows, holds=large >= 2.88, reason=reason)


@PAPER.claim(
    "C5",
    statement="On a CPU, 4-bit weights with 8-bit activations are faster than 16-bit layers and other 4-bit kernels",
    unit="x",
    criterion="on 4096 x 4096 at 1 and 16 tokens, at least twice as fast as torch's bfloat16 layer and level with the fastest "
    "4-bit peer",
    needs=("cpu",),
    measures=(*KERNEL_SOURCES, "tensormill.ops.linear_wna8"),
    peers=("onnxruntime", "llama-cpp-python"),
)
def cpu_kernel(run: Run) -> Measurement:
    """W4A8 in groups of 128, with a scale per token and in COMET's blocks, beside torch, onnxruntime and llama.cpp."""
    n, k = CPU_SHAPE
    rows: list[Row] = []
    reasons: list[str] = []
    holds = True
    for tokens in (1, 16):
        what = f"M={tokens} {n}x{k} W4A8"
        run.progress(what)
        row = time_product(
            run, "linear_wna8", linear_shape(tokens, n, k, 4, GROUP, -1, "bfloat16"), what, seconds=1.0
        )
        blocks = linear_shape(tokens, n, k, 4, GROUP, GROUP, "bfloat16")
        rows += [row, time_product(run, "linear_wna8", blocks, f"{what}, activations in blocks", seconds=0.5)]
        dense = fastest(row, "linear bf16") / float(row.value)
        others = [v for peer, v in row.peers.items() if "onnxruntime" in peer or "llama.cpp" in peer]
        level = min(others) / float(row.value) if others else None
        rows.append(Row(f"{what} faster than torch bfloat16", dense, "x"))
        if level is not None:
            rows.append(Row(f"{what} faster than the fastest 4-bit peer", level, "x"))
        holds = holds and dense >= 2 and (level is None or level >= 0.97)
        beside = "no 4-bit peer is installed" if level is None else f"{level:.2f}x the fastest 4-bit peer"
        reasons.append(f"{tokens} tokens: {dense:.2f}x torch bfloat16, {beside}")
    return Measurement(rows, holds, "; ".join(reasons))

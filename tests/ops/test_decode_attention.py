"""What is special to decode attention; the battery does the comparison with the reference."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulation.kernels import compile_or_skip, disassembly, emulate, emulated_tensor_map, resources
from tensormill.errors import InvalidArgument
from tensormill.operator import interpreting
from tensormill.ops import OPERATORS, decode_attention
from tensormill.ops.correctness import deviation, upcast
from tensormill.ops.decode_attention.cache import KVCache
from tensormill.ops.decode_attention.merge import merge_attention
from tensormill.ops.decode_attention.storage import (
    BFP12,
    BFP16,
    INT4,
    INT8,
    KVFormat,
    bfp_scale,
    dequantize_kv,
    pack_nibbles,
    quantize_kv,
    unpack_nibbles,
)

pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreted run is for kernels alone")
operator = OPERATORS["decode_attention"]
FORMATS = [
    INT8,
    INT4,
    BFP12,
    BFP16,
    KVFormat(8, 16),
    KVFormat(4, 16, symmetric=True),
    KVFormat(8, symmetric=True),
]


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- the definition


@pytest.mark.parametrize("queries", [1, 4])
def test_equals_torch(queries):
    """Grouped heads, new tokens causal among themselves, the default scale."""
    query, key, value = normal(2, 6, queries, 16), normal(2, 3, 20, 16, seed=1), normal(2, 3, 20, 8, seed=2)
    mask = torch.ones(queries, 20, dtype=torch.bool).tril(20 - queries)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    torch.testing.assert_close(decode_attention(query, key, value, lengths(20, 20)), expected)


def test_window_softcap_sinks_and_lse():
    query, key, value = normal(1, 2, 3, 8), normal(1, 1, 9, 8, seed=1), normal(1, 1, 9, 8, seed=2)
    sinks = torch.tensor([0.3, -1.0], dtype=torch.float64)
    output, lse = decode_attention(
        query, key, value, lengths(9), scale=0.7, window=4, softcap=2.0, sinks=sinks, return_lse=True
    )
    for head in range(2):
        for i in range(3):
            at = 9 - 3 + i
            seen = range(at - 3, at + 1)  # four tokens, itself included
            logits = [2.0 * math.tanh(0.7 * float(query[0, head, i] @ key[0, 0, n]) / 2.0) for n in seen]
            total = sum(math.exp(x) for x in logits) + math.exp(float(sinks[head]))
            wanted = sum(math.exp(x) / total * value[0, 0, n] for x, n in zip(logits, seen, strict=True))
            torch.testing.assert_close(output[0, head, i], wanted)
            assert math.isclose(float(lse[0, head, i]), math.log(total))


def test_shared_values_are_the_first_channels_of_keys():
    query, key = normal(2, 4, 1, 24), normal(2, 1, 11, 24, seed=1)
    whole = decode_attention(query, key, key[..., :16].contiguous(), lengths(11, 7))
    assert torch.equal(decode_attention(query, key, None, lengths(11, 7), value_dim=16), whole)


def test_what_sees_nothing_is_zero():
    query, key = normal(3, 2, 2, 8), normal(3, 2, 4, 8, seed=1)
    output, lse = decode_attention(query, key, key, lengths(0, 1, 4), return_lse=True)
    assert not output[0].any() and torch.isinf(lse[0]).all()
    assert not output[1, :, 0].any() and torch.isinf(lse[1, :, 0]).all()  # before the first token
    torch.testing.assert_close(output[1, :, 1], key[1, :, 0])
    assert torch.isfinite(lse[2]).all()


def test_memory_behind_the_lengths_is_never_looked_at():
    query, key, value = normal(2, 2, 1, 8), normal(2, 2, 6, 8, seed=1), normal(2, 2, 6, 8, seed=2)
    expected = decode_attention(query, key, value, lengths(6, 3))
    key[1, :, 3:], value[1, :, 3:] = torch.nan, torch.inf
    assert torch.equal(decode_attention(query, key, value, lengths(6, 3)), expected)


@given(
    length=st.integers(0, 40),
    page_size=st.integers(1, 17),
    window=st.one_of(st.none(), st.integers(1, 50)),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30)
def test_pages_in_any_order_are_the_contiguous_cache(length, page_size, window, seed):
    query = normal(1, 2, 2, 8, seed=seed)
    key, value = normal(1, 1, 40, 8, seed=seed + 1), normal(1, 1, 40, 8, seed=seed + 2)
    each = -(-40 // page_size)
    order = torch.randperm(each + 3, generator=torch.Generator().manual_seed(seed))[:each]
    paged = [torch.full((each + 3, 1, page_size, 8), torch.nan, dtype=torch.float64) for _ in range(2)]
    for n in range(length):
        for pages, x in zip(paged, (key, value), strict=True):
            pages[order[n // page_size], :, n % page_size] = x[0, :, n]
    table = order.int()[None].clone()
    table[:, -(-length // page_size) :] = -7  # nothing may follow these
    expected = decode_attention(query, key, value, lengths(length), window=window)
    actual = decode_attention(query, *paged, lengths(length), block_table=table, window=window)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@given(cuts=st.lists(st.integers(0, 60), max_size=6), seed=st.integers(0, 2**31))
@settings(max_examples=30)
def test_any_split_merges_to_the_whole(cuts, seed):
    """Parts may be empty, and merged parts may be merged again."""
    query, key, value = normal(1, 2, 1, 8, seed=seed), *normal(2, 1, 1, 60, 8, seed=seed + 1).unbind(0)
    whole = decode_attention(query, key, value, lengths(60), return_lse=True)
    edges = [0, *sorted(cuts), 60]
    parts = [
        decode_attention(query, key[:, :, a:b], value[:, :, a:b], lengths(b - a), return_lse=True)
        for a, b in itertools.pairwise(edges)
    ]
    outputs, lse = (torch.stack(x) for x in zip(*parts, strict=True))
    torch.testing.assert_close(merge_attention(outputs, lse), whole)
    first = merge_attention(outputs[:1], lse[:1])
    rest = merge_attention(outputs[1:], lse[1:]) if len(parts) > 1 else first
    again = merge_attention(torch.stack([first[0], rest[0]]), torch.stack([first[1], rest[1]]))
    if len(parts) > 1:
        torch.testing.assert_close(again, whole)


def test_merging_nothing_and_a_refusal():
    output, lse = merge_attention(torch.ones(2, 3, 4), torch.full((2, 3), -torch.inf))
    assert not output.any() and torch.isinf(lse).all()
    with pytest.raises(InvalidArgument, match=r"expected\s+\(parts, ..., value_dim\)"):
        merge_attention(torch.ones(2, 3, 4), torch.ones(2, 4))


# --- formats


@pytest.mark.parametrize("storage", FORMATS, ids=str)
def test_rounding_error_is_half_a_step(storage):
    x = normal(50, 64, dtype=torch.float32)
    codes, scale, offset = quantize_kv(x, storage, torch.float32)
    step = bfp_scale(scale, storage.bits, torch.float32) if storage.exponents else scale
    error = (
        (dequantize_kv(codes, scale, offset, torch.float32) - x).unflatten(-1, (scale.shape[-1], -1)).abs()
    )
    saturated = 1.0 if storage.exponents else 0.5  # a block's largest may lie half a step above the last code
    assert bool((error <= (saturated + 1e-4) * step[..., None]).all())
    assert codes.dtype == (torch.uint8 if storage.bits == 4 else torch.int8)


@given(
    values=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=8, max_size=8),
    bits=st.sampled_from([4, 8]),
    shift=st.integers(-20, 0),
)
@settings(max_examples=100)
def test_block_floating_point_in_rational_arithmetic(values, bits, shift):
    """Exponent, rounding to even and saturation, from the definition; and scaling by a power of two changes nothing."""
    values = [0.0 if abs(v) < 1e-20 else v for v in values]
    storage = KVFormat(bits, 8, symmetric=True, exponents=True)
    codes, exponent, _ = quantize_kv(torch.tensor([values]), storage)
    integers = (unpack_nibbles(codes) if bits == 4 else codes)[0].tolist()
    largest = max(abs(Fraction(v)) for v in values)
    if largest == 0:
        assert integers == [0] * 8 and exponent.item() == 0
        return
    power = math.frexp(float(largest))[1] - 1
    assert exponent.item() == power + 127
    step, top = Fraction(2) ** (power - (bits - 2)), 2 ** (bits - 1) - 1
    assert integers == [max(-top, min(top, round(Fraction(v) / step))) for v in values]
    scaled, lower, _ = quantize_kv(torch.tensor([values]) * 2.0**shift, storage)
    assert torch.equal(scaled, codes) and lower.item() == exponent.item() + shift


@pytest.mark.parametrize("storage", [BFP12, BFP16, KVFormat(8, symmetric=True)], ids=str)
def test_quantizing_again_changes_nothing(storage):
    x = normal(20, 64, dtype=torch.float32)
    once = dequantize_kv(*quantize_kv(x, storage, torch.float32), torch.float32)
    twice = dequantize_kv(*quantize_kv(once, storage, torch.float32), torch.float32)
    torch.testing.assert_close(twice, once, rtol=1e-6 if not storage.exponents else 0, atol=0)


def test_extreme_values():
    for storage in FORMATS:
        zero = dequantize_kv(*quantize_kv(torch.zeros(2, 64), storage), torch.float32)
        assert not zero.any()
        constant = dequantize_kv(
            *quantize_kv(torch.full((1, 64), 3.0), storage, torch.float32), torch.float32
        )
        torch.testing.assert_close(constant, torch.full((1, 64), 3.0), rtol=0.13, atol=0)
    large = torch.full((1, 64), 3e38)
    large[0, ::2] *= -1
    back = dequantize_kv(*quantize_kv(large, INT8, torch.float32), torch.float64)
    torch.testing.assert_close(back, large.double(), rtol=0.01, atol=0)


def test_nibbles_are_halves_of_the_head():
    codes = torch.arange(-8, 8, dtype=torch.int8)[None]
    packed = pack_nibbles(codes)
    assert packed.tolist() == [[i | (i + 8) << 4 for i in range(8)]]
    assert torch.equal(unpack_nibbles(packed), codes)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KVFormat(3), "expected 4 or 8"),
        (lambda: KVFormat(8, 0), "expected a positive number or -1"),
        (lambda: KVFormat(8, 32, exponents=True), "needs symmetric=True"),
        (lambda: INT4.groups(33), "expected an even one"),
        (lambda: KVFormat(4, 32).groups(96), "half of the head's 48 channels"),
        (lambda: KVFormat(8, 5).groups(64), "a divisor of the head's 64"),
        (lambda: quantize_kv(torch.zeros(4, dtype=torch.int32), INT8), "expected floats"),
    ],
)
def test_formats_refuse(build, message):
    with pytest.raises(InvalidArgument, match=message):
        build()


# --- the cache


@pytest.mark.parametrize("page_size", [None, 5])
@pytest.mark.parametrize("storage", [None, INT8, BFP12], ids=str)
def test_appending_in_pieces_equals_attention_over_all(storage, page_size):
    key, value = normal(2, 2, 21, 64, dtype=torch.float32), normal(2, 2, 21, 64, seed=1, dtype=torch.float32)
    cache = KVCache(
        2, 32, 2, 64, key_format=storage, value_format=storage, dtype=torch.float32, page_size=page_size
    )
    for start, stop in ((0, 7), (7, 8), (8, 21)):
        cache.append(key[:, :, start:stop], value[:, :, start:stop])
    query = normal(2, 4, 3, 64, seed=2, dtype=torch.float32)
    if storage is None:
        dense = (key, value)
    else:
        dense = tuple(
            dequantize_kv(*quantize_kv(x, storage, torch.float32), torch.float32) for x in (key, value)
        )
    expected = decode_attention(query, *dense, lengths(21, 21), return_lse=True)
    torch.testing.assert_close(cache.attend(query, return_lse=True), expected)
    bits = 32 if storage is None else storage.bits + (8 / 32 if storage.exponents else 64 / 64)
    tokens = 32 if page_size is None else 35
    assert cache.nbytes == 2 * 2 * 2 * tokens * 64 * bits / 8


def test_ragged_appends_pages_on_demand_and_release():
    cache = KVCache(2, 12, 1, 8, dtype=torch.float64, page_size=4, pages=4)
    cache.reserve(0, 9)
    assert cache.block_table.tolist() == [[0, 1, 2], [-1, -1, -1]]
    key = normal(2, 1, 10, 8)
    cache.append(key, key, lengths(5, 3))
    assert cache.lengths.tolist() == [5, 0]  # the second sequence has no page yet
    cache.reserve(1, 4)
    cache.append(key, key)
    assert cache.lengths.tolist() == [12, 4]  # as many as fit
    expected = torch.cat([key[:1, :, :5], key[:1, :, :7]], dim=2)
    query = normal(2, 1, 1, 8, seed=3)
    torch.testing.assert_close(
        cache.attend(query)[:1], decode_attention(query[:1], expected, expected, lengths(12))
    )
    with pytest.raises(InvalidArgument, match="need 1 more pages and 0 are free"):
        cache.reserve(1, 5)
    cache.release(0)
    cache.reserve(1, 12)
    assert cache.block_table.tolist() == [[-1, -1, -1], [3, 0, 1]] and cache.lengths.tolist() == [0, 4]


def test_latent_cache():
    cache = KVCache(1, 8, 1, 24, value_dim=16, shared_values=True, dtype=torch.float64)
    latent = normal(1, 1, 6, 24)
    cache.append(latent)
    query = normal(1, 4, 1, 24, seed=1)
    expected = decode_attention(query, latent, latent[..., :16].contiguous(), lengths(6))
    torch.testing.assert_close(cache.attend(query), expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KVCache(0, 8, 1, 8), "given batch=0"),
        (lambda: KVCache(1, 8, 1, 8, pages=3), "without page_size"),
        (lambda: KVCache(1, 8, 1, 8, shared_values=True, value_format=INT8), "expected no format"),
        (lambda: KVCache(1, 8, 1, 8).reserve(0, 1), "contiguous cache has no pages"),
        (lambda: KVCache(1, 8, 1, 8, page_size=2).reserve(0, 9), "at most the capacity, 8"),
        (lambda: KVCache(1, 8, 1, 8).append(torch.zeros(1, 1, 1, 8).half()), "none to one that does not"),
        (lambda: KVCache(1, 8, 1, 8).append(*torch.zeros(2, 1, 1, 1, 8)), "expected torch.float16"),
        (lambda: KVCache(1, 8, 1, 8).append(*torch.zeros(2, 1, 1, 1, 9).half()), r"\(1, 1, tokens, 8\)"),
        (
            lambda: KVCache(1, 8, 1, 8).append(*torch.zeros(2, 1, 1, 1, 8).half(), torch.ones(1)),
            r"expected int32 \(1,\)",
        ),
    ],
)
def test_caches_refuse(build, message):
    with pytest.raises(InvalidArgument, match=message):
        build()


def call(**changed):
    good = {
        "query": torch.zeros(1, 4, 1, 8),
        "key": torch.zeros(1, 2, 5, 8),
        "value": torch.zeros(1, 2, 5, 8),
    }
    good |= {"lengths": lengths(5)} | changed
    return decode_attention(**good)


codes = torch.zeros(1, 2, 5, 8, dtype=torch.int8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": torch.zeros(4, 1, 8)}, "expected floats"),
        ({"lengths": torch.tensor([5])}, r"expected int32 \(1,\)"),
        ({"key": torch.zeros(1, 2, 5, 9)}, r"expected \(1, kv_heads, capacity, 8\)"),
        ({"key": torch.zeros(2, 2, 5, 8)}, r"expected \(1, kv_heads, capacity, 8\)"),
        ({"key": torch.zeros(1, 2, 5, 8).half()}, "expected the same, or int8 or uint8"),
        ({"value": torch.zeros(1, 2, 4, 8)}, "as key has"),
        ({"value": torch.zeros(1, 2, 5, 8), "value_dim": 4}, "leave it out"),
        ({"value": None}, "expected how many"),
        ({"query": torch.zeros(1, 3, 1, 8)}, "expected a multiple"),
        ({"key": codes}, "without key_scale"),
        ({"key": codes, "key_scale": torch.ones(1, 2, 5, 3)}, "a divisor"),
        ({"key": codes, "key_scale": torch.ones(1, 2, 4, 1)}, r"expected floats \(1, 2, 5, 1\)"),
        ({"key_scale": torch.ones(1, 2, 5, 1)}, "expected codes"),
        (
            {
                "key": codes,
                "key_scale": torch.ones(1, 2, 5, 1, dtype=torch.uint8),
                "key_offset": torch.ones(1, 2, 5, 1),
            },
            "block floating point is symmetric",
        ),
        ({"window": 0}, "at least 1"),
        ({"softcap": -1.0}, "a positive number"),
        ({"sinks": torch.zeros(3)}, r"expected floats \(4,\)"),
        ({"block_table": torch.zeros(1, 2)}, "expected int32"),
        ({"lengths": lengths(5).to("meta")}, "expected one device"),
    ],
)
def test_refuses(changed, message):
    with pytest.raises(InvalidArgument, match=message):
        call(**changed)


def test_tolerance_catches_planted_errors():
    """A dropped tile of 16 tokens, the newest token unseen, a scale that is one code off."""
    shape = {
        **operator.shape_defaults,
        "context": 2000,
        "batch": 1,
        "kv_heads": 2,
        "heads": 4,
        "storage": "int8",
    }
    arguments = list(upcast(operator.inputs(shape, torch.device("cpu"), torch.Generator().manual_seed(0))))
    expected = operator.reference(*arguments)[0]
    tolerance = operator.tolerance(torch.bfloat16, shape)
    for position, change in ((7, -1), (7, -16), (3, 1 + 1 / 64), (5, 1 + 1 / 64)):
        wrong = list(arguments)
        wrong[position] = wrong[position] + change if change < 0 else wrong[position] * change
        assert deviation(operator.reference(*wrong)[0], expected, tolerance) is not None


# --- the CUDA kernels, emulated and compiled


def emulated(
    blocks: int = 5, sixteens: int = 1, stages: int = 3, **changed: object
) -> tuple[str | None, str | None]:
    """What is wrong with the output and log-sum-exp of a CUDA implementation, run on the CPU."""
    cuda = importlib.import_module("tensormill.ops.decode_attention.cuda")
    latent = importlib.import_module("tensormill.ops.decode_attention.latent")
    small = {"heads": 4, "kv_heads": 2, "head_dim": 64, "batch": 3, "context": 300, "ragged": True}
    shape = {**operator.shape_defaults, **small, **changed}
    arguments = operator.inputs(shape, torch.device("cpu"), torch.Generator().manual_seed(1))
    query, key, *stored, length, table, sinks, scale, value_dim, window, softcap = arguments
    hide_what_is_behind(length, table, key, *stored)
    batch, heads, queries, _ = query.shape
    pairs, rows = batch * key.shape[1], heads // key.shape[1] * queries
    partial = torch.full(((blocks + pairs) * rows * value_dim,), torch.nan)
    statistics = torch.full(((blocks + pairs) * rows * 2,), torch.nan)
    output = torch.full((batch, heads, queries, value_dim), torch.nan, dtype=query.dtype)
    lse = torch.full((batch, heads, queries), torch.nan)
    if shape["shared"]:
        assert latent.supports(*arguments)
        module = latent.module(**latent.defines(query, key, table, value_dim, window, softcap))
        keys = emulated_tensor_map(latent.rows_of(key), (32, 64))
        packed = latent.arguments(
            *(keys, query, key, length, table, scale, window, softcap, partial, statistics),
            *(output if sinks is None else None, lse),
        )
        grid, shared = blocks * -(-rows // latent.ROWS), latent.shared_bytes(query.shape[-1])
        emulate(module, "latent").launch(grid, latent.THREADS, shared, packed, cluster=latent.cluster(rows))
        packed = latent.MergeArguments.of(
            partial, statistics, length, sinks, output, lse, cuda.span(query, window), blocks
        )
        groups = latent.merge_groups(batch, blocks)
        merge = emulate(latent.merge_module(queries, value_dim, query.dtype, sinks, groups), "merge")
        merge.launch(batch * rows, *latent.merge_block(value_dim, groups), packed)
    else:
        assert cuda.supports(*arguments)
        config = cuda.Config(sixteens, 3, stages)
        macros = cuda.defines(query, key, *stored, table, sinks, window, softcap, config)
        counters = torch.zeros(pairs, dtype=torch.int32)
        results = (output, lse, partial, statistics, counters)
        packed = cuda.arguments(query, key, *stored, length, table, sinks, scale, window, softcap, *results)
        shared = cuda.shared_bytes(rows, value_dim, cuda.bits_of(key), config)
        emulate(cuda.module(**macros), "attend").launch(blocks, 128, shared, packed)
        assert not counters.any()
    expected = operator.reference(*upcast(arguments))
    tolerance = operator.tolerance(query.dtype, shape)
    return deviation(output, expected[0], tolerance), deviation(lse, expected[1], tolerance)


def hide_what_is_behind(
    length: torch.Tensor, table: torch.Tensor | None, *stored: torch.Tensor | None
) -> None:
    """NaN, or the largest code or exponent, wherever no sequence has a token."""
    for x in stored:
        if x is None:
            continue
        seen = torch.zeros(x.shape[0], x.shape[2], dtype=torch.bool)
        for i, n in enumerate(length.tolist()):
            at = torch.arange(n)
            page = torch.full_like(at, i) if table is None else table[i, at // x.shape[2]].long()
            seen[page, at if table is None else at % x.shape[2]] = True
        x.transpose(1, 2)[~seen] = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max


LATENT = {"heads": 20, "kv_heads": 1, "head_dim": 320, "value_dim": 256, "shared": True}


@pytest.mark.parametrize(
    "changed",
    [
        {"storage": "int4", "queries": 5, "window": 70, "dtype": "float16"},  # ten rows are two tiles
        {"storage": "int8", "page_size": 32, "softcap": 3.0, "values": "3e-5", "sixteens": 2, "blocks": 1},
        {"storage": "bfp12-16", "page_size": 16, "blocks": 40, "sinks": True},
        {"storage": "float", "page_size": 16, "head_dim": 128, "heads": 20, "blocks": 2, "stages": 2},
        {**LATENT, "queries": 4, "window": 70, "page_size": 32, "softcap": 3.0},  # 80 rows are two blocks
        {
            **LATENT,
            "batch": 1,
            "context": 700,
            "blocks": 16,
            "sinks": True,
        },  # eleven parts, merged by eight groups
        {**LATENT, "batch": 4, "context": 256, "ragged": False, "dtype": "float16"},  # whole sequences
    ],
    ids=lambda changed: changed.get("storage", "latent"),
)
def test_cuda_kernels_emulated(changed):
    assert emulated(**changed) == (None, None)


@pytest.mark.parametrize("storage", ["int4", "int8", "bfp12-32", "float"])
def test_cuda_kernels_compile_without_spills(storage):
    cuda = importlib.import_module("tensormill.ops.decode_attention.cuda")
    latent = importlib.import_module("tensormill.ops.decode_attention.latent")
    shape = {**operator.shape_defaults, "batch": 1, "context": 4096, "storage": storage}
    if storage == "float":
        shape |= {"heads": 128, "kv_heads": 1, "head_dim": 576, "value_dim": 512, "shared": True}
    arguments = operator.inputs(shape, torch.device("cpu"), torch.Generator().manual_seed(1))
    query, key, *stored, _, table, _, _, value_dim, window, softcap = arguments
    if storage == "float":
        module = latent.module(**latent.defines(query, key, table, value_dim, window, softcap))
        code = compile_or_skip(module, "sm_90a")
        assert resources(code)["latent"].stack <= 8  # a word for the two register counts, no spill
        found = disassembly(code)
        assert found.count("HGMMA") == 36 + 16 + 3 * 4
        assert found.count("WARPGROUP.DEPBAR") == 5  # the source's own: products wait for nothing else
        return
    config = cuda.configuration(4, cuda.bits_of(key), stored[1].dtype == torch.uint8)
    module = cuda.module(**cuda.defines(query, key, *stored, table, None, window, softcap, config))
    used = resources(compile_or_skip(module, "sm_90a"))["attend"]
    assert used.stack <= 16  # a word or two outside of the loop, with some compilers
    assert used.registers * 128 * config.blocks <= 65536


# --- the Triton kernels, compiled

COMPILE = """
import importlib, json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
kernels = importlib.import_module("tensormill.ops.decode_attention.triton")
kernel = kernels._attend_kernel
tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
for bits, paged, rows, head_dim in ((16, 64, 4, 128), (4, 0, 4, 128), (16, 0, 4, 80)):
    config = kernels.configuration(rows, head_dim, bits, paged > 0)
    first, rest = kernels.pieces(head_dim * min(bits, 8) // 8 if bits < 16 else head_dim)
    constants = {"KV_HEADS": 8, "GROUP": rows, "QUERIES": 1, "HEAD_DIM": head_dim, "VALUE_DIM": head_dim, "K0": first,
                 "K1": rest, "V0": first, "V1": rest, "KEY_BITS": bits, "KEY_GROUPS": 1, "KEY_OFFSET": bits < 16,
                 "VALUE_BITS": bits, "VALUE_GROUPS": 1, "VALUE_OFFSET": bits < 16, "SHARED": False, "PAGE": paged,
                 "WINDOW": False, "CAPPED": False, "COMPUTE": tl.float16, "ASSEMBLY": True, "PRECISION": "tf32",
                 "BATCH_PAD": 2, "BLOCK_M": 16, "BLOCK_N": config.block_tokens, "STAGES": config.stages}
    stored = {16: "*fp16", 8: "*i8", 4: "*u8"}[bits]
    pointers = {"lengths": "*i32", "block_table": "*i32", "partial": "*fp32", "statistics": "*fp32",
                "key": stored, "value": stored}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers or name in ("query", "key_scale", "key_offset", "value_scale", "value_offset"):
            signature[name], attributes[(i,)] = pointers.get(name, "*fp16"), [["tt.divisibility", 16]]
        elif name in ("factor", "cap"):
            signature[name] = "fp32"
        elif name in ("key_scale_stride_n", "value_scale_stride_n"):
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            if "stride" in name:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    print(json.dumps({"bits": bits, "copies": "cp.async" in built.asm["ptx"], "shared": built.metadata.shared,
                      "mma": built.asm["ptx"].count("mma.sync"), "stack": re.findall(r"STACK:([0-9]+)", text)}))
"""


@pytest.mark.slow
def test_triton_kernels_compile_for_hopper():
    """For sm_90, without a GPU: asynchronous copies, tensor cores, nothing spilled, shared memory that fits."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in done.stdout.splitlines():
        built = json.loads(line)
        assert built["copies"] and built["mma"] > 0 and built["shared"] <= 232448, built
        assert all(int(stack) == 0 for stack in built["stack"]), built


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("storage", [None, INT8, INT4, BFP12], ids=str)
def test_steps_in_a_graph(storage):
    """Appending and attending, captured once and replayed, give what they give step by step."""
    options = {"key_format": storage, "value_format": storage, "page_size": 16, "dtype": torch.bfloat16}
    caches = [KVCache(3, 64, 2, 128, device="cuda", **options) for _ in range(2)]
    key, value = torch.randn(2, 3, 2, 40, 128, device="cuda").bfloat16()
    for cache in caches:
        cache.append(key, value, torch.tensor([40, 1, 17], dtype=torch.int32, device="cuda"))
    query, key, value = (torch.randn(3, n, 1, 128, device="cuda").bfloat16() for n in (8, 2, 2))

    def step(cache):
        cache.append(key, value)
        return cache.attend(query)

    warm = KVCache(3, 64, 2, 128, device="cuda", **options)
    step(warm)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(caches[0])
    for _ in range(3):
        query.normal_(), key.normal_(), value.normal_()
        graph.replay()
        assert torch.equal(output, step(caches[1]))
    assert caches[0].lengths.tolist() == [43, 4, 20]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_on_a_gpu():
    query, key = (
        torch.randn(2, 8, 1, 64, device="cuda").half(),
        torch.randn(2, 2, 100, 64, device="cuda").half(),
    )
    length = torch.tensor([100, 3], dtype=torch.int32, device="cuda")
    torch.library.opcheck(
        operator.overload,
        (query, key, key, None, None, None, None, length, None, None, 0.125, 64, 0, 0.0),
    )
    compiled = torch.compile(lambda q: decode_attention(q, key, key, length) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(query), decode_attention(query, key, key, length) * 2)

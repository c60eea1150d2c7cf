"""GPU kernels of decode attention by configuration, in Triton's interpreter; `test_interpreted` runs this file."""

from __future__ import annotations

import importlib

import pytest
import torch

from tensormill.operator import interpreting
from tensormill.ops import OPERATORS
from tensormill.ops.correctness import deviation, upcast

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")
OPERATOR = OPERATORS["decode_attention"]
kernels = importlib.import_module("tensormill.ops.decode_attention.triton")
storage = importlib.import_module("tensormill.ops.decode_attention.storage")
KVCache = importlib.import_module("tensormill.ops.decode_attention.cache").KVCache
Config = kernels.Config
SMALL = {"heads": 2, "kv_heads": 1, "head_dim": 32, "dtype": "float32"}


def arguments(**given):
    shape = {**OPERATOR.shape_defaults, **SMALL, **given}
    return shape, OPERATOR.inputs(shape, torch.device("cpu"), torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("programs", "block_tokens"), [(1, 16), (5, 16), (2, 64)])
def test_any_split_gives_the_same(programs, block_tokens):
    """More programs than tiles, programs across sequences, sequences across programs."""
    shape, given = arguments(batch=4, context=100, ragged=True, page_size=16, queries=2)
    expected = OPERATOR.reference(*upcast(given))
    actual = kernels.run(Config(block_tokens, 4, 1, programs), *given)  # of 2 interpreted processors
    for got, wanted in zip(actual, expected, strict=True):
        assert deviation(got, wanted, OPERATOR.tolerance(torch.float32, shape)) is None


@pytest.mark.parametrize("page_size", [8, 32, 24])
def test_pages_and_tiles_of_any_relation(page_size):
    shape, given = arguments(batch=2, context=70, page_size=page_size, window=33)
    expected = OPERATOR.reference(*upcast(given))
    for block_tokens in (16, 32):
        actual = kernels.run(Config(block_tokens, 4, 1, 1), *given)
        assert deviation(actual[0], expected[0], OPERATOR.tolerance(torch.float32, shape)) is None


def test_many_rows_take_several_programs():
    shape, given = arguments(batch=1, context=40, heads=9, queries=8)  # 72 rows
    expected = OPERATOR.reference(*upcast(given))
    actual = kernels.run(Config(16, 4, 1, 1), *given)
    assert deviation(actual[0], expected[0], OPERATOR.tolerance(torch.float32, shape)) is None


FORMATS = [
    None,
    *(storage.KVFormat(bits, group, group == -1) for bits in (4, 8) for group in (-1, 16)),
    storage.KVFormat(4, 16, symmetric=True, exponents=True),
    storage.KVFormat(8, 16, symmetric=True, exponents=True),
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_storing_equals_quantize_kv_to_the_bit(format):
    append = importlib.import_module("tensormill.ops.decode_attention.append")
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float32 if format is None or format.symmetric else torch.float16
    options = {"key_format": format, "value_format": format, "dtype": dtype, "value_dim": 96}
    fused, plain = (KVCache(3, 40, 2, 32, page_size=8, **options) for _ in range(2))
    for tokens in (1, 30, 18):  # the last reaches beyond the capacity
        counts = torch.tensor([tokens, 0, tokens // 2], dtype=torch.int32)
        key, value = (torch.randn(3, 2, tokens, n, generator=generator).to(dtype) for n in (32, 96))
        key[0, 0, 0] = 0
        for part, new in (("key", key), ("value", value)):
            buffers = (getattr(fused, f"{part}{name}") for name in ("", "_scale", "_offset"))
            append.store(new, *buffers, format, fused.lengths, counts, fused.block_table, 40)
        plain.append(key, value, counts)
        fused.lengths.copy_(plain.lengths)
    assert plain.lengths.tolist() == [40, 0, 24]
    for name in ("key", "value", "key_scale", "value_scale", "key_offset", "value_offset"):
        if (wanted := getattr(plain, name)) is not None:
            assert torch.equal(getattr(fused, name), wanted), name

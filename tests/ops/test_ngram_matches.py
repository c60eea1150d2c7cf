"""What is special to ngram_matches: every implementation counts alike, arguments are checked, memory stays linear."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormill.errors import InvalidArgument
from tensormill.operator import requires, use_implementation
from tensormill.ops import ngram_matches
from tensormill.ops.ngram_matches import operator
from tensormill.ops.ngram_matches.sort import closest_lengths


def available(device):
    found = [i for i in operator.implementations if device in i.devices and i.missing() is None]
    return [i.name for i in found]


@st.composite
def arguments(draw):
    group, prompts = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    count, width, longest = draw(st.integers(1, 3)), draw(st.integers(0, 40)), draw(st.integers(0, 40))
    vocabulary = draw(st.sampled_from([1, 2, 3, 20, 50_000]))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    offset = draw(st.sampled_from([0, -5, 2**31 - 50_001]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def ids(*shape):
        return (torch.randint(0, vocabulary, shape, generator=generator) + offset).to(dtype)

    def lengths(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=generator)

    batch = prompts * group
    return (
        ids(batch, width),
        lengths(0, width, batch),
        ids(prompts, count, longest),
        lengths(-1, longest, prompts, count),
        draw(st.integers(1, 8)),
    )


@settings(max_examples=80, deadline=None)
@given(arguments())
def test_every_implementation_counts_alike(call):
    expected = operator.reference(*call)
    for name in available("cpu"):
        with use_implementation(ngram_matches=name):
            for i, (actual, wanted) in enumerate(zip(operator(*call), expected, strict=True)):
                assert torch.equal(actual, wanted), f"{name}, output {i}: {actual} and not {wanted}"


@settings(max_examples=40, deadline=None)
@given(arguments())
def test_counts_without_dictionaries(call):
    """The reference, against position by position comparison of tensors."""
    candidates, lengths, references, reference_lengths, max_n = call
    matches = operator.reference(*call)[0]
    group = max(1, candidates.shape[0] // max(1, references.shape[0]))
    for b in range(candidates.shape[0]):
        candidate = candidates[b, : lengths[b]]
        rows = zip(references[b // group], reference_lengths[b // group].clamp_min(0), strict=True)
        sets = [row[:size] for row, size in rows]
        for n in range(1, max_n + 1):
            if len(candidate) < n:
                assert matches[b, n - 1] == 0
                continue
            own = candidate.unfold(0, n, 1)
            earlier = (own[:, None] == own[None]).all(-1).tril(-1).sum(1)
            most = torch.zeros(len(own), dtype=torch.int64)
            for row in sets:
                if len(row) >= n:
                    most = torch.maximum(most, (own[:, None] == row.unfold(0, n, 1)[None]).all(-1).sum(1))
            assert matches[b, n - 1] == (earlier < most).sum()


def test_clipping():
    the = torch.full((1, 7), 9)
    reference = torch.tensor([[[9, 1, 2, 9]]])
    matches, totals, closest = ngram_matches(the, reference)
    assert (
        matches.tolist() == [[2, 0, 0, 0]] and totals.tolist() == [[7, 6, 5, 4]] and closest.tolist() == [4]
    )


def test_the_largest_count_over_references_clips_not_their_sum():
    references = torch.tensor([[[9, 1, 1], [9, 9, 1]]])
    assert ngram_matches(torch.full((1, 7), 9), references, max_n=1)[0].tolist() == [[2]]


def test_closest_length():
    references = torch.tensor([[13, 11, 0], [-1, 0, 0], [5, 30, 7]])
    assert closest_lengths(torch.tensor([[12, 40], [3, 0], [6, 0]]), references, 40).tolist() == [
        [11, 13],
        [0, 0],
        [5, 5],
    ]


def test_lengths_beyond_the_rows_are_clamped_by_every_implementation():
    """On a GPU they can't be refused without waiting; here the operator is called below its checks."""
    candidates, references = torch.randint(0, 3, (3, 9)), torch.randint(0, 3, (3, 2, 8))
    expected = operator(
        candidates, torch.tensor([9, 0, 4]), references, torch.tensor([[8, -1], [8, 8], [0, 3]]), 4
    )
    for name in available("cpu"):
        with use_implementation(ngram_matches=name):
            wild = torch.tensor([99, -7, 4]), torch.tensor([[8, -9], [2**40, 8], [0, 3]])
            for actual, wanted in zip(
                operator(candidates, wild[0], references, wild[1], 4), expected, strict=True
            ):
                assert torch.equal(actual, wanted), name


def test_what_stands_past_a_length_is_ignored():
    candidates, references = torch.randint(0, 3, (4, 20)), torch.randint(0, 3, (4, 2, 25))
    lengths, reference_lengths = (
        torch.tensor([20, 7, 0, 3]),
        torch.tensor([[25, 1], [0, 9], [4, 4], [-1, 25]]),
    )
    expected = ngram_matches(candidates, references, lengths, reference_lengths)
    candidates = candidates.masked_fill(torch.arange(20) >= lengths[:, None], 1)
    references = references.masked_fill(torch.arange(25) >= reference_lengths[..., None], 1)
    for actual, wanted in zip(
        ngram_matches(candidates, references, lengths, reference_lengths), expected, strict=True
    ):
        assert torch.equal(actual, wanted)


def test_mixed_dtypes_one_reference_and_groups():
    candidates, references = torch.randint(0, 4, (6, 12)), torch.randint(0, 4, (6, 15))
    wanted = ngram_matches(candidates, references[:, None])
    for actual, expected in zip(ngram_matches(candidates.int(), references), wanted, strict=True):
        assert torch.equal(actual, expected)
    grouped = ngram_matches(candidates.view(2, 3, 12), references[::3])
    assert [tuple(t.shape) for t in grouped] == [(2, 3, 4), (2, 3, 4), (2, 3)]
    flat = ngram_matches(candidates, references[::3].repeat_interleave(3, 0))
    for actual, expected in zip(grouped, flat, strict=True):
        assert torch.equal(actual.flatten(0, 1), expected)


def test_strided_inputs():
    candidates, references = (
        torch.randint(0, 4, (12, 6)).t(),
        torch.randint(0, 4, (15, 6, 2)).permute(1, 2, 0),
    )
    expected = ngram_matches(candidates.contiguous(), references.contiguous())
    for name in available("cpu"):
        with use_implementation(ngram_matches=name):
            for actual, wanted in zip(ngram_matches(candidates, references), expected, strict=True):
                assert torch.equal(actual, wanted)


@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
def test_any_number_of_threads(threads):
    if operator.find("cpu").missing() is not None:
        pytest.skip("the compiled kernels are not installed")
    call = operator.inputs(
        {**operator.shape_defaults, "batch": 18, "candidate_length": 30, "reference_length": 25, "group": 9},
        torch.device("cpu"),
        torch.Generator().manual_seed(0),
    )
    with use_implementation(ngram_matches="cpu"):
        for actual, wanted in zip(operator(*call), operator.reference(*call), strict=True):
            assert torch.equal(actual, wanted)


def test_repeated_tokens_do_not_degrade():
    """Ids that agree in their low or high bits meet in no long chains: 4096 of them still take milliseconds."""
    for step in (1 << 20, 1 << 32, 1 << 51):
        ids = (torch.arange(4096) * step)[None]
        assert ngram_matches(ids, ids)[0].tolist() == [[4096, 4095, 4094, 4093]]


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


def test_memory_of_the_portable_path_is_linear_in_the_tokens():
    """No tensor is larger than eight bytes for each token, whatever the vocabulary and the batch."""
    from tensormill.ops.ngram_matches.sort import count_matches

    for batch in (4, 32):
        shape = {**operator.shape_defaults, "batch": batch, "candidate_length": 100, "reference_length": 100}
        call = operator.inputs(shape, torch.device("cpu"), torch.Generator().manual_seed(0))
        with LargestTensor() as seen:
            count_matches(*call)
        assert seen.bytes <= 8 * batch * 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": torch.ones(2, 3)}, "expected int32 or int64"),
        ({"candidates": torch.ones(2, 3, dtype=torch.bool)}, "expected int32 or int64"),
        ({"candidates": [[1, 2]]}, "given candidates of list"),
        ({"candidates": torch.ones(3).long()}, "shape"),
        ({"candidates": torch.ones(3, 3).long()}, "3 candidates and 2 sets"),
        ({"references": torch.ones(2, 0, 3).long()}, "0 references"),
        ({"references": torch.ones(3).long()}, "references of shape"),
        ({"candidate_lengths": torch.tensor([1, 4])}, "given 4 in candidate_lengths"),
        ({"candidate_lengths": torch.tensor([1, -1])}, "given -1 in candidate_lengths"),
        ({"reference_lengths": torch.tensor([[1], [-2]])}, "given -2 in reference_lengths"),
        ({"candidate_lengths": torch.tensor([1.0, 2.0])}, "expected integers"),
        ({"candidate_lengths": torch.tensor([1])}, "shape"),
        ({"max_n": 9}, "from 1 to 8"),
        ({"max_n": 0}, "from 1 to 8"),
        ({"max_n": 2.0}, "from 1 to 8"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    call = {"candidates": torch.ones(2, 3).long(), "references": torch.ones(2, 1, 3).long(), **change}
    with pytest.raises(InvalidArgument, match=message):
        ngram_matches(**call)


def test_peers_agree():
    shape = {
        **operator.shape_defaults,
        "batch": 4,
        "candidate_length": 30,
        "reference_length": 20,
        "ragged": True,
    }
    call = operator.inputs(shape, torch.device("cpu"), torch.Generator().manual_seed(5))
    expected = operator.reference(*call)
    for peer in operator.peers:
        if peer.missing() is not None or not peer.supports(*call) or peer.tolerance is not None:
            continue
        for actual, wanted in zip(peer.make(*call)(), expected, strict=True):
            assert torch.equal(actual, wanted), peer.name


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tensormill.ops.ngram_matches.triton import _ngram_matches, unroll
pointers = ["candidates", "candidate_lengths", "references", "reference_lengths", "matches", "totals", "closest"]
for orders, ids, block in ((4, "*i64", 128), (4, "*i32", 128), (8, "*i64", 32)):
    signature = dict(zip(pointers, [ids, "*i64", ids, "*i64", "*i32", "*i32", "*i32"]))
    signature.update(dict.fromkeys(["batch", "group", "width", "count", "longest", "blocks"], "i32"))
    constants = dict(N=orders, ORDERS=orders, WIDE=ids == "*i64", BLOCK=block, UNROLL=unroll(orders))
    signature.update(dict.fromkeys(constants, "constexpr"))
    kernel = triton.compile(ASTSource(fn=_ngram_matches, signature=signature, constexprs=constants),
                            target=GPUTarget("cuda", 90, 32), options={"num_warps": block // 32})
    assert kernel.metadata.shared <= 227 * 1024
    open(f"{sys.argv[1]}/{orders}{ids[1:]}.ptx", "w").write(kernel.asm["ptx"])
    open(f"{sys.argv[1]}/{orders}{ids[1:]}.cubin", "wb").write(kernel.asm["cubin"])
"""


@pytest.mark.skipif(requires("triton")() is not None, reason="needs Triton")
def test_kernels_compile_for_the_h200(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert ".target sm_90" in (tmp_path / "4i64.ptx").read_text()
    import triton

    for disassembler in (Path(triton.__file__).parent / "backends/nvidia/bin").glob("nvdisasm"):
        for cubin in tmp_path.glob("4*.cubin"):
            text = subprocess.run([disassembler, cubin], capture_output=True, text=True).stdout
            walks = [block for block in re.split(r"\bBRA\b", text) if block.count("FADD") >= 32]
            assert walks, f"{cubin.name}: no unrolled walk found"
            # Some values that only the ends of a walk need may be parked in local memory, outside of it.
            assert not any(re.search(r"\b(STL|LDL)\b", walk) for walk in walks), f"{cubin.name} spills"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnGpu:
    SHAPES = (
        {"batch": 8, "candidate_length": 1000, "reference_length": 1023, "references": 3, "vocabulary": 300},
        {"batch": 3, "candidate_length": 8192, "reference_length": 8000, "vocabulary": 50},
        {"batch": 600, "candidate_length": 65, "reference_length": 64, "group": 4, "vocabulary": 7},
        {"batch": 70_000, "candidate_length": 5, "reference_length": 6, "vocabulary": 3},
        {"batch": 40, "candidate_length": 200, "reference_length": 200, "vocabulary": 3, "max_n": 8},
    )

    @pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s['batch']}x{s['candidate_length']}")
    @pytest.mark.parametrize("dtype", ["int32", "int64"])
    def test_equals_the_host(self, shape, dtype):
        whole = {**operator.shape_defaults, "ragged": True, "dtype": dtype, **shape}
        call = operator.inputs(whole, torch.device("cpu"), torch.Generator().manual_seed(1))
        there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in call]
        expected = operator(*call)
        for name in ("triton", "sort"):
            with use_implementation(ngram_matches=name):
                for actual, wanted in zip(operator(*there), expected, strict=True):
                    assert torch.equal(actual.cpu(), wanted), name

    @pytest.mark.parametrize("name", ["triton", "sort"])
    def test_is_captured(self, name):
        shape = {**operator.shape_defaults, "batch": 16, "candidate_length": 200, "reference_length": 200}
        call = operator.inputs(
            {**shape, "ragged": True}, torch.device("cuda"), torch.Generator("cuda").manual_seed(1)
        )
        with use_implementation(ngram_matches=name):
            expected = [t.clone() for t in operator(*call)]
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = operator(*call)
            for _ in range(2):
                graph.replay()
        for actual, wanted in zip(results, expected, strict=True):
            assert torch.equal(actual, wanted)

    def test_memory_is_the_results(self):
        call = operator.inputs(
            {**operator.shape_defaults, "batch": 512},
            torch.device("cuda"),
            torch.Generator("cuda").manual_seed(1),
        )
        operator(*call)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        operator(*call)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 1 << 20

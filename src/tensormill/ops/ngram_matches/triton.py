"""Triton implementation: every pair of positions is compared, without hashing, sorting or waiting for the device.

A program owns one candidate and a block of its positions, one per thread, with the tokens i .. i + N - 1 of each in
registers. It walks over all start positions j of a sequence, whose tokens are the same for all threads: n-grams are
equal iff i + t and j + t hold the same token for every t < n, so a chain of N compares, each ANDed to the one before,
says so for all orders at once, and each order's counter takes its bit. Walked over a reference this gives how often
the n-gram occurs there (the largest count over the references is kept), walked over the candidate up to i how often
it stood before; the position matches iff the second is less than the first. Positions past the ends of the sequences
are masked only in the last steps of a walk. Per block and order one integer is added to the result, so the result
does not depend on the order of the blocks.

The walk is bound by the integer pipe, which the compares need; so the counters are float32 (exact to 2^24, far
above any length taken here): their additions go to the other pipe.

Ids of 64 bits are compared in 32 when all ids of the program's sequences fit, which the program looks up first.
"""

# ruff: noqa: RUF005 (Triton compiles no unpacking inside a tuple)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_COMPARES = 64  # unrolled in a walk; more cost minutes of compilation and gain nothing


@triton.jit
def _length(pointer, width):
    """A length, clamped to its row."""
    return tl.minimum(tl.maximum(tl.load(pointer), 0), width).to(tl.int32)


@triton.jit
def _one_start(
    counts, x, i, at, j, u, end, length, N: tl.constexpr, MASKED: tl.constexpr, EARLIER: tl.constexpr
):
    """Counters of all orders after the n-grams that start at position j + u, whose tokens lie from `at` + u on."""
    new = ()
    for n in tl.static_range(N):
        if MASKED:
            inside = j + (u + n) < length
            token = tl.load(at + (u + n), mask=inside, other=0)
            here = (x[n] == token.to(x[n].dtype)) & inside
        else:
            token = tl.load(at + (u + n))
            here = x[n] == token.to(x[n].dtype)
        if n == 0:
            equal = here
            if MASKED:
                equal = equal & (j + u < end)
                if EARLIER:
                    equal = equal & (j + u < i)
        else:
            equal = equal & here
        new = new + (tl.where(equal, counts[n] + 1.0, counts[n]),)
    return new


@triton.jit
def _occurrences(x, i, row, clear, end, length, N: tl.constexpr, EARLIER: tl.constexpr, UNROLL: tl.constexpr):
    """How often each thread's n-grams start in [0, end) of a sequence, or in [0, min(end, i)) where EARLIER.

    No condition can fail for start positions below `clear`.
    """
    counts = ()
    for _ in tl.static_range(N):
        counts = counts + (tl.zeros(i.shape, tl.float32),)
    unmasked = tl.maximum(clear, 0) // UNROLL * UNROLL
    for j in range(0, unmasked, UNROLL):
        for u in tl.static_range(UNROLL):
            counts = _one_start(counts, x, i, row + j, j, u, end, length, N, False, EARLIER)
    for j in range(unmasked, end, 4):
        for u in tl.static_range(4):
            counts = _one_start(counts, x, i, row + j, j, u, end, length, N, True, EARLIER)
    return counts


@triton.jit
def _count(
    candidate, length, sets, set_lengths, matches, first, width, count, longest,
    ID: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Matches of the positions first .. first + BLOCK - 1 of one candidate, added to its row of the result."""
    i = first + tl.arange(0, BLOCK)
    x = ()
    allowed = ()
    for n in tl.static_range(N):
        x = x + (tl.load(candidate + i + n, mask=i + n < length, other=0).to(ID),)
        allowed = allowed + (tl.zeros((BLOCK,), tl.float32),)
    for r in range(0, count):
        size = _length(set_lengths + r, longest)
        row = sets + r * longest
        found = _occurrences(x, i, row, size - N + 1, size, size, N, False, UNROLL)
        larger = ()
        for n in tl.static_range(N):
            larger = larger + (tl.maximum(allowed[n], found[n]),)
        allowed = larger
    clear = tl.minimum(first, length - N + 1)
    earlier = _occurrences(x, i, candidate, clear, tl.minimum(first + BLOCK, length), length, N, True, UNROLL)
    for n in tl.static_range(N):
        matched = (earlier[n] < allowed[n]) & (i + n < length)
        tl.atomic_add(matches + n, tl.sum(matched.to(tl.int32), axis=0), sem="relaxed")


@triton.jit
def _outside_32_bits(tokens, size, CHUNK: tl.constexpr):
    """Whether any of `size` 64-bit ids does not fit 32 bits."""
    seen = tl.zeros((CHUNK,), tl.int32)
    for s in range(0, size, CHUNK):
        at = s + tl.arange(0, CHUNK)
        token = tl.load(tokens + at, mask=at < size, other=0)
        seen = seen | (token != token.to(tl.int32).to(tl.int64)).to(tl.int32)
    return tl.max(seen, axis=0)


@triton.jit(do_not_specialize=["batch", "group", "width", "count", "longest", "blocks"])
def _ngram_matches(
    candidates, candidate_lengths, references, reference_lengths, matches, totals, closest,
    batch, group, width, count, longest, blocks,
    N: tl.constexpr, ORDERS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    # The last blocks of all candidates first: they walk furthest, and short walks fill the end of the grid.
    b = tl.program_id(0) % batch
    first = (blocks - 1 - tl.program_id(0) // batch) * BLOCK
    prompt = (b // group).to(tl.int64)
    candidate = candidates + b.to(tl.int64) * width
    sets = references + prompt * count * longest
    set_lengths = reference_lengths + prompt * count
    length = _length(candidate_lengths + b, width)
    if first == 0:
        order = tl.arange(0, ORDERS)
        tl.store(totals + b * N + order, tl.maximum(length - order, 0), mask=order < N)
        nearest = 0
        distance = 2147483647
        for r in range(0, count):
            size = _length(set_lengths + r, longest)
            away = tl.abs(size - length)
            better = (size > 0) & ((away < distance) | ((away == distance) & (size < nearest)))
            nearest = tl.where(better, size, nearest)
            distance = tl.where(better, away, distance)
        tl.store(closest + b, nearest)
    if first < length:
        row = matches + b * N
        if WIDE:
            wide = _outside_32_bits(candidate, width, 512) | _outside_32_bits(sets, count * longest, 512)
            if wide != 0:
                _count(
                    candidate, length, sets, set_lengths, row, first, width, count, longest,
                    tl.int64, N, BLOCK, UNROLL,
                )  # fmt: skip
            else:
                _count(
                    candidate, length, sets, set_lengths, row, first, width, count, longest,
                    tl.int32, N, BLOCK, UNROLL,
                )  # fmt: skip
        else:
            _count(
                candidate, length, sets, set_lengths, row, first, width, count, longest,
                tl.int32, N, BLOCK, UNROLL,
            )  # fmt: skip


def count_matches(
    candidates: Tensor, candidate_lengths: Tensor, references: Tensor, reference_lengths: Tensor, max_n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as for `tensormill.ops.ngram_matches.reference.reference`."""
    batch, width = candidates.shape
    prompts, count, longest = references.shape
    matches = torch.zeros((batch, max_n), dtype=torch.int32, device=candidates.device)
    totals = torch.empty_like(matches)
    closest = totals.new_empty(batch)
    if batch == 0:
        return matches, totals, closest
    block = block_size(batch, width)
    blocks = max(1, triton.cdiv(width, block))
    _ngram_matches[(batch * blocks,)](
        candidates.contiguous(),
        candidate_lengths.contiguous(),
        references.contiguous(),
        reference_lengths.contiguous(),
        matches,
        totals,
        closest,
        batch,
        batch // prompts,
        width,
        count,
        longest,
        blocks,
        N=max_n,
        ORDERS=triton.next_power_of_2(max_n),
        WIDE=candidates.dtype == torch.int64,
        BLOCK=block,
        UNROLL=unroll(max_n),
        num_warps=block // 32,
    )
    return matches, totals, closest


def block_size(batch: int, width: int) -> int:
    """Positions per program: 128, fewer where that would leave processors without work."""
    for block in (128, 64):
        if width >= block and batch * triton.cdiv(width, block) >= 512:
            return block
    return 32


def unroll(max_n: int) -> int:
    """Start positions per step of a walk."""
    return min(16, MOST_COMPARES // triton.next_power_of_2(max_n))

"""Triton kernels of the Walsh-Hadamard transform.

All stages use Pease's constant geometry: a stage adds and subtracts the neighbours that differ in the lowest
index bit and then rotates the index, so that the next bit becomes the lowest. After log2(n) stages the order
is natural again. Written that way (`_stages`) Triton sees that five stages at a time need only a thread's own
registers and that the rotations between them are one exchange through shared memory: a row of 4096 costs
three exchanges.

Lengths up to `LONGEST_ROW` are one kernel, read once and written once. A longer row is an n1 x n2 matrix. Its
columns and then its rows are transformed by one launch: every program draws a ticket and does the task of
that number. Tasks of columns run a fixed distance ahead of tasks of rows, so that what the columns wrote is
still in the L2 cache when the rows read it, and memory is again read once and written once. A task waits only
for tasks with smaller tickets, which are done or running, so the launch can't lock up however few programs
run at a time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST_ROW = {
    4: 1 << 14,
    8: 1 << 13,
}  # by bytes of an accumulator: two programs of 64 KiB share one processor
LARGEST_TILE = {4: 1 << 15, 8: 1 << 14}  # what shared memory holds, for the longest of all
LEAST_COLUMNS = 16  # neighbours that a task of columns reads together: two sectors of float32 at least
AHEAD_BYTES = (
    16 << 20
)  # how far columns run ahead of rows: enough to hide every wait, and a third of an H200's L2
TILE = 4096
SPIN_LIMIT = (
    1 << 20
)  # about a second: a wait that ends here is a defect, and shows as a wrong result instead of a hang


@triton.jit
def _stages(
    x, SIZE: tl.constexpr, STAGES: tl.constexpr
):  # [SIZE], its lowest STAGES index bits end up highest
    for _ in tl.static_range(STAGES):
        a, b = tl.split(tl.reshape(x, (SIZE // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (1, 0)), (SIZE,))
    return x


@triton.jit
def _scaled(x, scale, scale_rest):
    if x.dtype == tl.float64:  # a kernel's float arguments are float32: two of them carry 48 bits
        return x * (tl.full((), scale, tl.float64) + tl.full((), scale_rest, tl.float64))
    return x * scale


@triton.jit
def _rows_kernel(
    x_pointer,
    y_pointer,
    scale,
    scale_rest,
    count,
    N: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = row * N + tl.arange(0, N)[None, :]  # [ROWS, N]
    x = tl.load(x_pointer + at, mask=row < count, other=0.0).to(ACCUMULATOR)
    x = _stages(tl.reshape(x, (ROWS * N,)), ROWS * N, STAGES)
    x = tl.permute(tl.reshape(x, (N, ROWS)), (1, 0))
    x = _scaled(x, scale, scale_rest)
    tl.store(y_pointer + at, x.to(y_pointer.dtype.element_ty), mask=row < count)


@triton.jit
def _wait(counter, target, LIMIT: tl.constexpr):
    spins = 0
    while (tl.atomic_add(counter, 0, sem="acquire") < target) & (spins < LIMIT):
        spins += 1
    tl.debug_barrier()


@triton.jit
def _done(counter):
    tl.debug_barrier()  # every thread's stores come before the release below
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _columns_task(
    x_pointer, work, task, N1: tl.constexpr, N2: tl.constexpr, STAGES: tl.constexpr, ACCUMULATOR: tl.constexpr
):
    COLUMNS: tl.constexpr = N2 // N1
    n1 = tl.arange(0, N1)[:, None]
    at = n1 * N2 + (task * COLUMNS + tl.arange(0, COLUMNS))[None, :]  # [N1, COLUMNS]
    x = tl.load(x_pointer + at, eviction_policy="evict_first").to(ACCUMULATOR)
    x = _stages(tl.reshape(tl.permute(x, (1, 0)), (N2,)), N2, STAGES)
    tl.store(work + at, tl.reshape(x, (N1, COLUMNS)))


@triton.jit
def _row_task(work, y_pointer, task, scale, scale_rest, N2: tl.constexpr, STAGES: tl.constexpr):
    at = task * N2 + tl.arange(0, N2)  # [N2]
    x = tl.load(work + at, cache_modifier=".cg")  # other processors wrote it: not from the nearest cache
    x = _scaled(_stages(x, N2, STAGES), scale, scale_rest)
    tl.store(y_pointer + at, x.to(y_pointer.dtype.element_ty))


@triton.jit
def _long_kernel(
    x_pointer,
    y_pointer,
    work_pointer,
    counters,
    scale,
    scale_rest,
    batch,
    ahead,
    slots,
    N1: tl.constexpr,
    N2: tl.constexpr,
    STAGES1: tl.constexpr,
    STAGES2: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    LIMIT: tl.constexpr,
):
    # counters: [0] the next ticket, then of each transform its finished tasks of columns, then of rows. Both
    # kinds of task take N2 elements: one row, or N2 / N1 columns; so there are N1 tasks of each kind.
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    middle = (
        ticket - ahead * N1
    )  # first `ahead` transforms' columns; then columns and rows in turn; then rows
    last = middle - (batch - ahead) * (2 * N1)
    if last >= 0:
        is_columns = False
        transform = batch - ahead + last // N1
        task = last % N1
    elif middle >= 0:
        task = middle % (2 * N1)
        is_columns = task < N1
        transform = middle // (2 * N1)
        if is_columns:
            transform += ahead
        else:
            task -= N1
    else:
        is_columns = True
        transform = ticket // N1
        task = ticket % N1
    columns_done = counters + 1 + transform
    rows_done = columns_done + batch
    work = work_pointer + (transform % slots).to(tl.int64) * (N1 * N2)
    start = transform.to(tl.int64) * (N1 * N2)
    if is_columns:
        if transform >= slots:  # this slot's previous transform must have been read
            _wait(rows_done - slots, N1, LIMIT)
        _columns_task(x_pointer + start, work, task, N1, N2, STAGES1, ACCUMULATOR)
        _done(columns_done)
    else:
        _wait(columns_done, N1, LIMIT)
        _row_task(work, y_pointer + start, task, scale, scale_rest, N2, STAGES2)
        _done(rows_done)


def row_geometry(n: int, count: int) -> tuple[int, int]:
    """(rows per program, warps) for `count` rows that fit in one program each."""
    tile = TILE if n * count >= 1 << 20 else 1024  # few elements are spread over more programs
    tile = max(tile, n)
    return tile // n, max(4, tile // 1024)


def long_geometry(n: int, accumulator_bytes: int) -> tuple[int, int, int] | None:
    """(n1, n2, warps) of a transform that does not fit in one program, or None if it is too long."""
    n2 = TILE
    while n2 <= LARGEST_TILE[accumulator_bytes]:
        n1 = n // n2
        if n2 // n1 >= LEAST_COLUMNS * (2 if n2 < LONGEST_ROW[accumulator_bytes] else 1):
            return n1, n2, n2 // 1024 if n2 > TILE else 8
        n2 *= 2
    return None


def supports(x: Tensor, scale: float) -> bool:
    """Lengths up to 2^26 (2^24 in float64); a float64 scale must be one that two float32 can carry."""
    n = x.shape[-1]
    size = 8 if x.dtype == torch.float64 else 4
    if size == 8 and scale != 0 and not 1e-20 < abs(scale) < 1e20:
        return False
    return n <= LONGEST_ROW[size] or long_geometry(n, size) is not None


def hadamard_transform(x: Tensor, scale: float) -> Tensor:
    """See `tensormill.ops.hadamard_transform`."""
    source = x.detach().contiguous()
    result = torch.empty_like(source)
    if source.numel() == 0:
        return result
    n = source.shape[-1]
    count = source.numel() // n
    exact = source.dtype == torch.float64
    accumulator = torch.float64 if exact else torch.float32
    high = float(torch.tensor(scale, dtype=torch.float32)) if exact else scale
    parts = (high, scale - high)
    kind = tl.float64 if exact else tl.float32
    with _device(source):
        if n <= LONGEST_ROW[accumulator.itemsize]:
            rows, warps = row_geometry(n, count)
            grid = (triton.cdiv(count, rows),)
            _rows_kernel[grid](
                source, result, *parts, count, n, n.bit_length() - 1, rows, kind, num_warps=warps
            )
            return result
        geometry = long_geometry(n, accumulator.itemsize)
        assert geometry is not None, "supports() admits no longer transform"
        n1, n2, warps = geometry
        ahead = min(count, AHEAD_BYTES // (n * accumulator.itemsize))
        work, slots = result, count
        if result.dtype != accumulator:  # sums stay in float32, in a ring that is small enough for L2
            slots = min(count, 2 * ahead + 2)
            work = torch.empty(slots * n, dtype=accumulator, device=source.device)
        counters = torch.zeros(1 + 2 * count, dtype=torch.int32, device=source.device)
        _long_kernel[(2 * n1 * count,)](
            source,
            result,
            work,
            counters,
            *parts,
            count,
            ahead,
            slots,
            n1,
            n2,
            n1.bit_length() - 1,
            n2.bit_length() - 1,
            kind,
            SPIN_LIMIT,
            num_warps=warps,
        )
    return result


def _device(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()

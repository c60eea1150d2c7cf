"""Points of digital nets in base 2: the exclusive or of the columns that the set bits of a point's index choose.

`x_ij = shift_j ^ (xor over the set bits c of i of C_j[c])`, digits that are read as a number in [0, 1). Sobol'
sequences, their linear scramblings and interlaced nets of higher order differ in the matrices alone. (Niederreiter,
Random Number Generation and Quasi-Monte Carlo Methods, 1992, chapter 4; Antonov and Saleev, An economic method of
computing LP_tau-sequences, 1979, for the Gray order.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, native_missing
from tensormill.ops.digital_net import peers, reference
from tensormill.roofline import Cost

SCHEMA = "(Tensor matrices, Tensor? shift, SymInt start, SymInt n, int bits, bool gray, ScalarType dtype) -> Tensor"
DTYPES = (torch.float64, torch.float32, torch.int64)
MAX_BITS = 63
"""Digits of a column: what an int64 holds beside its sign."""

Shape = Mapping[str, Any]


def cost(shape: Shape) -> Cost:
    """Every coordinate is written once; the matrices are next to nothing."""
    itemsize = getattr(torch, shape["dtype"]).itemsize
    replications, d = shape["replications"], shape["d"]
    return Cost({}, replications * d * shape["m"] * 8, replications * shape["n"] * d * itemsize)


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    replications, d, m, bits = (shape[k] for k in ("replications", "d", "m", "bits"))
    values = shape.get("values", "random")

    def digits(*size: int) -> Tensor:
        if values == "ones":
            return torch.full(size, (1 << bits) - 1, dtype=torch.int64, device=device)
        words = torch.randint(-(1 << 63), (1 << 63) - 1, size, generator=generator, device=device)
        return words & ((1 << bits) - 1)

    matrices = digits(replications, d, m)
    shift = digits(replications, d) if shape.get("shift", True) else None
    if shape.get("strided", False):
        matrices = torch.stack([matrices, ~matrices], -1)[..., 0]
    dtype = getattr(torch, shape["dtype"])
    return matrices, shift, shape["start"], shape["n"], bits, shape["order"] == "gray", dtype


def _sample(
    kind: str, d: int, n: int, m: int, dtype: str = "float64", *, order: str = "natural", **more: Any
) -> Sample:
    benchmark, large = more.pop("benchmark", False), more.pop("large", False)
    described = [str(v) if k == "values" else f"{k}{v}" for k, v in more.items()]
    name = "-".join([f"{n}x{d}", dtype, order, *described])
    given = {"d": d, "n": n, "m": m, "dtype": dtype, "order": order}
    shape = {"replications": 1, "bits": 63, "start": 0, **given, **more}
    return Sample(name, shape, kind, benchmark, large)  # type: ignore[arg-type]


def samples() -> list[Sample]:
    """Point sets of integration in several dimensions, replications, parts of sequences; edge cases."""
    return [
        _sample("typical", 4, 1 << 10, 32, benchmark=True),
        _sample("typical", 32, 1 << 16, 32, benchmark=True, large=True),
        _sample("typical", 32, 1 << 16, 32, "float32", benchmark=True, large=True),
        _sample("typical", 2, 1 << 20, 32, benchmark=True, large=True),
        _sample("typical", 4, 1 << 12, 32, replications=16, benchmark=True, large=True),
        _sample("typical", 360, 1 << 12, 32, benchmark=True, large=True),
        _sample("typical", 5, 1 << 11, 32, "float32", replications=3),
        _sample("typical", 16, 1 << 11, 32, order="gray"),
        _sample("typical", 3, 1 << 12, 20, "int64", bits=32),
        _sample("ragged", 1, 1013, 32, start=5),
        _sample("ragged", 1, 5000, 13, order="gray", start=1001, shift=False),
        _sample("ragged", 33, 577, 32, "float32", order="gray", start=100, replications=2),
        _sample("ragged", 7, 100, 52, start=(1 << 45) - 37, strided=True),
        _sample("ragged", 100, 257, 62, "int64", start=1 << 61, order="gray", replications=2),
        _sample("ragged", 2100, 37, 11, start=13),
        _sample("ragged", 13, 1 << 12, 12, shift=False, bits=12),
        _sample("ragged", 3, 2000, 11, "int64", bits=9, replications=5, start=11),
        _sample("tiny", 1, 1, 1),
        _sample("tiny", 2, 2, 1, "float32", order="gray", start=0, bits=1),
        _sample("tiny", 3, 0, 5, start=7),
        _sample("tiny", 3, 3, 40, start=(1 << 40) - 3),
        _sample("extreme", 5, 1 << 10, 32, values="ones"),
        _sample("extreme", 5, 1 << 10, 32, "float32", values="ones"),
        _sample("extreme", 5, 300, 32, "int64", values="ones", bits=63),
        _sample("extreme", 9, 1 << 10, 10, values="ones", bits=52),
        _sample("extreme", 9, 1 << 10, 10, "float32", values="random", bits=52),
    ]


def _fake(
    matrices: Tensor, shift: Tensor | None, start: int, n: int, bits: int, gray: bool, dtype: torch.dtype
) -> Tensor:
    return matrices.new_empty((matrices.shape[0], n, matrices.shape[1]), dtype=dtype)


operator = Operator(
    "digital_net",
    schema=SCHEMA,
    reference=reference.digital_net,
    fake=_fake,
    cost=cost,
    inputs=_inputs,
    samples=samples(),
    exact=True,
)
operator.implementation(
    "cpu",
    devices=("cpu",),
    entry="tensormill.ops.digital_net.cpu:digital_net",
    missing=native_missing("tensormill.ops.digital_net._cpu"),
)
operator.implementation(
    "blocks", devices=("cpu", "cuda"), entry="tensormill.ops.digital_net.blocks:digital_net"
)
peers.register(operator)


def digital_net(
    matrices: Tensor,
    shift: Tensor | None = None,
    *,
    n: int,
    start: int = 0,
    bits: int,
    order: str = "natural",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Points `start` to `start + n - 1` of a digital net in base 2.

    Args:
        matrices: (d, m) or (R, d, m) int64: generating matrices as columns, each with the first digit as the highest
            of `bits` bits. Several are several nets, such as scramblings of one.
        shift: (d,) or (R, d) int64 of `bits` bits, the digital shift; None for none.
        n: number of points.
        start: index of the first; start + n is at most 2^m.
        bits: digits of columns and shift, 1 to 63.
        order: "natural" (radical inverse), or "gray", in which neighbours differ in one column.
        dtype: float64 (the first 52 digits) or float32 (the first 23), as numbers in [0, 1) that are never rounded up;
            or int64, all digits as integers.

    Returns:
        (n, d) or (R, n, d).

    Raises:
        InvalidArgument: shapes, dtypes or ranges are not these.

    Example:
        >>> import torch
        >>> from tensormill.ops import digital_net
        >>> digital_net(torch.tensor([[4, 2, 1], [4, 6, 5]]), n=4, bits=3)  # Sobol' in two dimensions
        tensor([[0.0000, 0.0000],
                [0.5000, 0.5000],
                [0.2500, 0.7500],
                [0.7500, 0.2500]], dtype=torch.float64)
    """
    if not isinstance(matrices, Tensor) or matrices.dtype != torch.int64 or matrices.dim() not in (2, 3):
        given = (
            f"{tuple(matrices.shape)} of {matrices.dtype}" if isinstance(matrices, Tensor) else type(matrices)
        )
        raise InvalidArgument(f"given matrices {given}, expected int64 of shape (d, m) or (R, d, m)")
    if shift is not None and (
        not isinstance(shift, Tensor)
        or shift.dtype != torch.int64
        or shift.shape != matrices.shape[:-1]
        or shift.device != matrices.device
    ):
        given = (
            f"{tuple(shift.shape)} of {shift.dtype} on {shift.device}"
            if isinstance(shift, Tensor)
            else type(shift)
        )
        raise InvalidArgument(
            f"given shift {given}, expected int64 of shape {tuple(matrices.shape[:-1])} on {matrices.device}"
        )
    if not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise InvalidArgument(f"given bits={bits!r}, expected 1 to {MAX_BITS}")
    m = matrices.shape[-1]
    if m >= MAX_BITS:
        raise InvalidArgument(
            f"given {m} columns, expected at most {MAX_BITS - 1}; pass those that indices use"
        )
    if not isinstance(n, int) or not isinstance(start, int) or n < 0 or start < 0 or start + n > 1 << m:
        raise InvalidArgument(
            f"given n={n!r} and start={start!r}, expected integers of 0 or more, and start + n at most {1 << m}, which "
            f"{m} columns have"
        )
    if order not in ("natural", "gray"):
        raise InvalidArgument(f'given order={order!r}, expected "natural" or "gray"')
    if dtype not in DTYPES:
        raise InvalidArgument(f"given dtype {dtype}, expected torch.float64, torch.float32 or torch.int64")
    for name, digits in (("matrices", matrices), ("shift", shift)):
        if digits is not None and digits.numel() > 0:
            low, high = (int(v) for v in torch.aminmax(digits))
            if low < 0 or high >> bits:
                raise InvalidArgument(
                    f"given {name} with numbers from {low} to {high}, expected {bits} bits; pass their bits="
                )
    single = matrices.dim() == 2
    if single:
        matrices, shift = matrices.unsqueeze(0), shift.unsqueeze(0) if shift is not None else None
    points: Tensor = operator(matrices, shift, start, n, bits, order == "gray", dtype)
    return points.squeeze(0) if single else points

"""Fourier transform of samples in bit-reversed order: `y_k = scale * sum_i x_i exp(-2 pi i k r(i) / n)`.

r(i) is i with its log2(n) bits reversed: the time of sample i of a radical-inverse sequence (a lattice in its natural
order). A decimation in time takes its input in that order, and a decimation in frequency leaves its output in it, so
neither direction needs a permutation. (Cooley and Tukey, 1965; Gentleman and Sande, Fast Fourier transforms: for fun
and profit, 1966.)

The operator works on real and imaginary parts, (..., n, 2), or on real parts alone, (..., n, 1); the result has both.
The public function takes real and complex tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, native_missing
from tensormill.ops.fft_bit_reversed import peers, reference
from tensormill.roofline import Cost

SCHEMA = "(Tensor x, bool inverse, float scale) -> Tensor"

DTYPES = (torch.complex64, torch.complex128, torch.float32, torch.float64)

Shape = Mapping[str, Any]


def cost(shape: Shape) -> Cost:
    """5 n log2(n) operations per row, as everybody counts (half for real ones); all is read and written once."""
    dtype = getattr(torch, shape["dtype"])
    elements = shape["rows"] * shape["n"]
    unit = "fp64" if dtype == torch.float64 else "fp32"
    parts = 1 if shape.get("real", False) else 2
    operations = 2.5 * parts * elements * (shape["n"].bit_length() - 1)
    return Cost({unit: operations}, parts * elements * dtype.itemsize, 2 * elements * dtype.itemsize)


def _check_length(n: int) -> None:
    if n < 1 or n & (n - 1):
        raise InvalidArgument(
            f"given x with last dimension {n}, expected a power of two; take the first 2^m samples"
        )


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    rows, n = shape["rows"], shape["n"]
    _check_length(n)
    parts = 1 if shape.get("real", False) else 2
    x = torch.randn(rows, n, parts, generator=generator, device=device) * shape.get("magnitude", 1.0)
    if shape.get("strided", False):
        x = torch.stack([x, -x], dim=-1)[..., 0]
    scale = n**-0.5 if shape.get("normalized", True) else 1.0
    return x.to(getattr(torch, shape["dtype"])), shape.get("inverse", False), scale


def _sample(kind: str, rows: int, n: int, dtype: str, **more: Any) -> Sample:
    benchmark, large = more.pop("benchmark", False), more.pop("large", False)
    name = "-".join([f"{rows}x{n}", dtype, *(f"{k}={v}" for k, v in more.items())])
    return Sample(name, {"rows": rows, "n": n, "dtype": dtype, **more}, kind, benchmark, large)  # type: ignore[arg-type]


def samples() -> list[Sample]:
    """Lengths of lattices in Gram matrices and error estimates, alone and in batches; edge cases."""
    both = (False, True)
    return [
        _sample("typical", 1, 1 << 16, "float64", benchmark=True),
        _sample("typical", 1, 1 << 16, "float64", inverse=True, benchmark=True),
        _sample("typical", 1, 1 << 16, "float64", real=True, benchmark=True),
        _sample("typical", 64, 1 << 12, "float64", benchmark=True),
        _sample("typical", 64, 1 << 12, "float32", benchmark=True),
        _sample("typical", 1, 1 << 20, "float64", benchmark=True, large=True),
        _sample("typical", 1, 1 << 20, "float32", inverse=True, benchmark=True, large=True),
        _sample("typical", 256, 1 << 16, "float32", benchmark=True, large=True),
        *[_sample("ragged", 7, 1 << b, "float32", inverse=bool(b % 2)) for b in range(1, 14)],
        *[_sample("ragged", 3, 1 << b, "float64", inverse=not b % 2) for b in range(1, 14)],
        *[_sample("ragged", 3, 1 << b, "float32", real=True) for b in (3, 4, 5, 6, 7, 9, 12, 15)],
        *[_sample("ragged", 3, 1 << b, "float64", real=True) for b in (2, 5, 6, 8, 10, 13, 16)],
        _sample("ragged", 1, 1 << 17, "float32", real=True),
        _sample("ragged", 3, 64, "float64", real=True, inverse=True),
        _sample("ragged", 3, 64, "float64", real=True, strided=True),
        *[_sample("ragged", 13, 1 << 10, "float64", strided=True, inverse=i) for i in both],
        *[_sample("ragged", 1, 1 << 17, "float32", inverse=i, normalized=False) for i in both],
        _sample("tiny", 1, 1, "float32", normalized=False),
        _sample("tiny", 0, 16, "float32"),
        _sample("tiny", 1000, 1, "float64", inverse=True),
        *[_sample("extreme", 4, 256, "float32", magnitude=m, inverse=i) for m in (1e30, 1e-30) for i in both],
        _sample("extreme", 3, 128, "float64", magnitude=0.0),
    ]


def _fake(x: Tensor, inverse: bool, scale: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], 2)


def _setup_context(ctx: Any, inputs: tuple[Tensor, bool, float], output: Tensor) -> None:
    x, ctx.inverse, ctx.scale = inputs
    ctx.parts = x.shape[-1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    adjoint = operator(gradient, not ctx.inverse, ctx.scale)
    return adjoint[..., : ctx.parts], None, None


operator = Operator(
    "fft_bit_reversed",
    schema=SCHEMA,
    reference=reference.fft_bit_reversed,
    fake=_fake,
    cost=cost,
    inputs=_inputs,
    samples=samples(),
    differentiable=(0,),
    setup_context=_setup_context,
    backward=_backward,
)
operator.implementation(
    "cpu",
    devices=("cpu",),
    entry="tensormill.ops.fft_bit_reversed.cpu:fft_bit_reversed",
    missing=native_missing("tensormill.ops.fft_bit_reversed._cpu"),
)
peers.register(operator)


def fft_bit_reversed(x: Tensor, inverse: bool = False, scale: float = 1.0) -> Tensor:
    """Fourier transform of every row of samples in bit-reversed order, or back.

    Args:
        x: (..., n), complex64, complex128, float32 or float64; n a power of two. Forward, sample i belongs to the time that is i with
            its log2(n) bits reversed; inverse, frequencies in their usual order.
        inverse: take frequencies to samples in bit-reversed order, with exp(+...).
        scale: multiplies the sums: `n ** -0.5` in both directions makes them orthonormal, and inverses of each
            other; so does 1 one way and `1 / n` the other, without the orthonormality.

    Returns:
        (..., n), complex of x's precision, contiguous. Differentiable, any number of times.

    Raises:
        InvalidArgument: x has another dtype or no dimension, or n is not a power of two.

    Example:
        >>> import torch
        >>> from tensormill.ops import fft_bit_reversed
        >>> fft_bit_reversed(torch.tensor([1.0, 3.0, 2.0, 4.0]))  # samples 1, 2, 3, 4 in time
        tensor([10.+0.j, -2.+2.j, -2.+0.j, -2.-2.j])
    """
    if not isinstance(x, Tensor):
        raise InvalidArgument(
            f"given x of type {type(x).__name__}, expected a Tensor; pass torch.as_tensor(x)"
        )
    if x.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise InvalidArgument(
            f"given x of dtype {x.dtype}, expected one of {names}; convert it, say with .float()"
        )
    if x.dim() == 0:
        raise InvalidArgument("given x without dimensions, expected (..., n); use x.reshape(1)")
    _check_length(x.shape[-1])
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise InvalidArgument(
            f"given scale of type {type(scale).__name__}, expected a number; use float(scale)"
        )
    parts = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x.unsqueeze(-1)
    return torch.view_as_complex(operator(parts, bool(inverse), float(scale)))

"""Walsh-Hadamard transform along the last dimension: `y = scale * x H_n`, with H_n in natural order.

`H_1 = [1]`, `H_2m = [[H_m, H_m], [H_m, -H_m]]` (Sylvester), that is `H_n[i, j] = (-1)^popcount(i & j)`. It
takes n log2(n) additions instead of n^2. H_n is symmetric and `H_n H_n = n I`, so with scale `n ** -0.5` the
transform is its own inverse, and the operator is its own gradient. (Fino and Algazi, Unified matrix treatment
of the fast Walsh-Hadamard transform, IEEE Transactions on Computers, 1976.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, native_missing, triton_missing
from tensormill.ops.hadamard_transform import peers, reference
from tensormill.roofline import Cost

SCHEMA = "(Tensor x, float scale) -> Tensor"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

Shape = Mapping[str, Any]


def cost(shape: Shape) -> Cost:
    """n log2(n) additions per row; every element is read once and written once."""
    dtype = getattr(torch, shape["dtype"])
    elements = shape["rows"] * shape["n"]
    unit = "fp64" if dtype == torch.float64 else "fp32"
    additions = float(elements * (shape["n"].bit_length() - 1))
    return Cost({unit: additions}, elements * dtype.itemsize, elements * dtype.itemsize)


def _check_length(n: int) -> None:
    if n < 1 or n & (n - 1):
        above = 1 << n.bit_length() if n > 0 else 1
        below = f" or cut it to {above // 2}" if n > 0 else ""
        raise InvalidArgument(
            f"given x with last dimension {n}, expected a power of two; pad it with zeros to {above}{below}"
        )


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    rows, n = shape["rows"], shape["n"]
    _check_length(n)
    values = shape.get("values", "normal")
    x = torch.randn(rows, n, generator=generator, device=device)
    scale = n**-0.5 if shape["normalized"] else 1.0
    if values == "signs":  # as large as float16 gets; the mean of any signs of it is no larger
        x, scale = torch.copysign(torch.full_like(x, 6e4), x), 1 / n
    elif values == "infinite":
        x[0, n // 3] = torch.inf
        x[-1, n // 2] = torch.nan
    elif values == "zero":
        x = torch.zeros_like(x)
    elif values != "normal":
        x = x * float(values)
    if shape.get("strided", False):
        x = torch.stack([x, -x], dim=-1)[..., 0]
    return x.to(getattr(torch, shape["dtype"])), scale


def _sample(kind: str, rows: int, n: int, dtype: str, normalized: bool = True, **more: Any) -> Sample:
    benchmark, large = more.pop("benchmark", False), more.pop("large", False)
    name = "-".join([f"{rows}x{n}", dtype, *(str(v) if k == "values" else k for k, v in more.items())])
    shape = {"rows": rows, "n": n, "dtype": dtype, "normalized": normalized, **more}
    return Sample(name, shape, kind, benchmark, large)  # type: ignore[arg-type]


def samples() -> list[Sample]:
    """Lengths of quasi-Monte Carlo point sets, random features, rotations of hidden states; edge cases."""
    return [
        _sample("typical", 1, 1 << 18, "float32", benchmark=True),
        _sample("typical", 64, 4096, "float32", benchmark=True),
        _sample("typical", 4096, 128, "bfloat16", benchmark=True),
        _sample("typical", 16384, 4096, "float32", benchmark=True, large=True),
        _sample("typical", 16384, 4096, "bfloat16", benchmark=True, large=True),
        _sample("typical", 256, 1 << 18, "float32", benchmark=True, large=True),
        _sample("typical", 256, 1 << 18, "float16", benchmark=True, large=True),
        _sample("typical", 1, 1 << 24, "float32", benchmark=True, large=True),
        _sample("typical", 3, 1 << 20, "float64", large=True),
        _sample("typical", 2, 1 << 22, "bfloat16", large=True),
        _sample("typical", 40, 1 << 15, "float16", large=True),
        _sample("typical", 1, 1 << 14, "float64", normalized=False),
        _sample("ragged", 3, 1 << 15, "float32"),
        _sample("ragged", 2, 1 << 15, "float16"),
        _sample("ragged", 100, 64, "float16"),
        _sample("ragged", 13, 512, "float64", normalized=False),
        _sample("ragged", 257, 32, "bfloat16", normalized=False),
        _sample("ragged", 13, 1024, "float32", strided=True),
        *[_sample("ragged", 7, 1 << bits, "float32", normalized=False) for bits in range(1, 14)],
        _sample("tiny", 1, 1, "float32", normalized=False),
        _sample("tiny", 1, 2, "float64", normalized=False),
        _sample("tiny", 0, 16, "float32"),
        _sample("tiny", 1000, 1, "float16"),
        _sample("extreme", 4, 256, "float32", values="1e30"),
        _sample("extreme", 4, 256, "float32", values="1e-30"),
        _sample("extreme", 4, 8192, "float16", values="signs"),
        _sample("extreme", 4, 128, "bfloat16", values="zero"),
        _sample("extreme", 3, 2048, "float32", values="infinite"),
    ]


def _fake(x: Tensor, scale: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    ctx.scale = inputs[1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return operator(gradient, ctx.scale), None  # H is symmetric


def _triton_supports(x: Tensor, scale: float) -> bool:
    from tensormill.ops.hadamard_transform.triton import supports

    return supports(x, scale)


def _cuda_supports(x: Tensor, scale: float) -> bool:
    from tensormill.ops.hadamard_transform.cuda import supports

    return supports(x, scale)


def _cuda_missing() -> str | None:
    from tensormill.ops.hadamard_transform.cuda import missing

    return missing()


operator = Operator(
    "hadamard_transform",
    schema=SCHEMA,
    reference=reference.hadamard_transform,
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
    entry="tensormill.ops.hadamard_transform.cpu:hadamard_transform",
    missing=native_missing("tensormill.ops.hadamard_transform._cpu"),
)
operator.implementation(
    "cuda",
    devices=("cuda",),
    entry="tensormill.ops.hadamard_transform.cuda:hadamard_transform",
    supports=_cuda_supports,
    missing=_cuda_missing,
)
operator.implementation(
    "triton",
    devices=("cuda",),
    entry="tensormill.ops.hadamard_transform.triton:hadamard_transform",
    supports=_triton_supports,
    missing=triton_missing,
)
peers.register(operator)


def hadamard_transform(x: Tensor, scale: float = 1.0) -> Tensor:
    """Walsh-Hadamard transform of every row: `scale * x @ H_n`, H_n in natural (Sylvester) order.

    Args:
        x: (..., n), float32, float64, float16 or bfloat16; n a power of two. float16 and bfloat16 are summed
        in
            float32 and rounded once.
        scale: multiplies the result; `n ** -0.5` makes the transform orthonormal and its own inverse.

    Returns:
        (..., n), x's dtype, contiguous. Differentiable, any number of times.

    Raises:
        InvalidArgument: x has another dtype or no dimension, or n is not a power of two.

    Example:
        >>> import torch
        >>> from tensormill.ops import hadamard_transform
        >>> hadamard_transform(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([10., -2., -4.,  0.])
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
    return operator(x, float(scale))

"""`LinearWNA8`: a linear layer with low-bit weights that quantizes its input to 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.ops.linear_wna8 import check_activations, operator
from tensormill.ops.linear_wna16 import autocast
from tensormill.ops.linear_wna16.module import LinearWNA16
from tensormill.ops.quantize_activations import check_quantization


class LinearWNA8(LinearWNA16):
    """A linear layer with weights of 1 to 8 bits and 8-bit activations; see `tensormill.ops.linear_wna8`.

    Buffers, state dict and constructors are those of `LinearWNA16`. Where the fastest implementation wants the
    weight in another order, the first call makes a copy in that order and keeps it (not in the state dict), so that
    the weight is in memory twice; before `torch.compile` or capturing a CUDA graph, call `prepare`.

    Args:
        in_features, out_features, bits, group_size, symmetric, bias, dtype, device: as for `LinearWNA16`.
        x_dtype: what activations are quantized to: torch.int8 or torch.float8_e4m3fn.
        x_group_size: channels of the input that share a scale, -1 for all of a token.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        symmetric: bool = False,
        bias: bool = True,
        x_dtype: torch.dtype = torch.int8,
        x_group_size: int = -1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_quantization(x_dtype, 8, x_group_size)
        check_activations(in_features, bits, group_size, x_group_size)
        super().__init__(
            in_features,
            out_features,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            bias=bias,
            dtype=dtype,
            device=device,
        )
        self.x_dtype = x_dtype
        self.x_group_size = x_group_size
        self._prepared: tuple[Any, ...] | None = None
        self._prepared_from: list[tuple[Tensor, int]] = []

    @classmethod
    def from_wna16(
        cls, layer: LinearWNA16, *, x_dtype: torch.dtype = torch.int8, x_group_size: int = -1
    ) -> LinearWNA8:
        """The layer with the same weight and bias (shared, not copied) and 8-bit activations.

        Raises:
            InvalidArgument: activations can't be quantized so, or sums might leave 32 bits.
        """
        new = cls(
            layer.in_features,
            layer.out_features,
            bits=layer.bits,
            group_size=layer.group_size,
            symmetric=layer.weight_zero_point is None,
            bias=False,
            x_dtype=x_dtype,
            x_group_size=x_group_size,
            device="meta",
        )
        new.weight_packed = layer.weight_packed
        new.weight_scale = layer.weight_scale
        new.weight_zero_point = layer.weight_zero_point
        new.bias = layer.bias
        return new.train(layer.training)

    def forward(self, x: Tensor, x_scale: Tensor | None = None) -> Tensor:
        """(..., K) -> (..., N) in x's dtype; or codes and their scales, to the dtype of the weight's scale."""
        weight = self.weight_packed
        good = x.is_floating_point() if x_scale is None else x.dtype == self.x_dtype
        if x.shape[-1:] != (self.in_features,) or x.device != weight.device or not good:
            kind = "floats" if x_scale is None else str(self.x_dtype)
            raise InvalidArgument(
                f"given x of {x.dtype} and shape {tuple(x.shape)} on {x.device}, expected {kind} "
                f"(..., {self.in_features}) on {weight.device}"
            )
        if x_scale is None:
            x = autocast(x)
        dtype = x.dtype if x_scale is None else self.weight_scale.dtype
        if not torch.compiler.is_compiling():
            self.prepare()
        if self._prepared is None:
            return operator(*self._canonical(x, x_scale, dtype))  # type: ignore[no-any-return]
        weight, scale, zero_point, layout = self._prepared
        arguments = list(self._canonical(x, x_scale, dtype))
        arguments[2:5] = weight, scale, zero_point
        arguments[-1] = layout
        return operator(*arguments)  # type: ignore[no-any-return]

    def prepare(self) -> None:
        """Bring the weight into the order of the implementation that this device uses, unless it is there."""
        now = [t for t in (self.weight_packed, self.weight_scale, self.weight_zero_point) if t is not None]
        before = self._prepared_from
        if len(now) == len(before) and all(
            t is old and t._version == version for t, (old, version) in zip(now, before, strict=True)
        ):
            return
        x = torch.empty(1, self.in_features, dtype=self.weight_scale.dtype, device=self.weight_packed.device)
        canonical = self._canonical(x, None, x.dtype)
        implementation = operator.select(*canonical)
        self._prepared = None
        if implementation.prepare is not None:
            new = implementation.prepare(*canonical)
            self._prepared = (*new[2:5], new[-1])
        self._prepared_from = [(t, t._version) for t in now]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, x_dtype={self.x_dtype}, x_group_size={self.x_group_size}"

    def _canonical(self, x: Tensor, x_scale: Tensor | None, dtype: torch.dtype) -> tuple[Any, ...]:
        return (
            x,
            x_scale,
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            self.bias,
            self.out_features,
            self.bits,
            self.group_size,
            self.x_group_size,
            self.x_dtype,
            dtype,
            "packed",
        )

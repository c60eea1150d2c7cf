"""`LinearWNA8`: a linear layer with low-bit weights that quantizes its input to 8 bits."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.ops.linear_wna8 import check_activations, operator
from tensormill.ops.linear_wna8.planes import to_packed
from tensormill.ops.linear_wna16 import autocast
from tensormill.ops.linear_wna16.module import LinearWNA16
from tensormill.ops.quantize_activations import check_quantization


class LinearWNA8(LinearWNA16):
    """A linear layer with weights of 1 to 8 bits and 8-bit activations; see `tensormill.ops.linear_wna8`.

    State dict and constructors are those of `LinearWNA16`. Where the fastest implementation wants the weight in another
    order, the first call brings it into that order, in place: `layout` says which, buffers have other names,
    `weight_packed`, `weight_scale` and `weight_zero_point` are computed when they are asked for, and state dicts stay
    the same. Before `torch.compile` or capturing a CUDA graph, call `prepare`.

    Args:
        in_features, out_features, bits, group_size, symmetric, bias, dtype, device: as for `LinearWNA16`.
        x_dtype: what activations are quantized to: torch.int8 or torch.float8_e4m3fn.
        x_group_size: channels of the input that share a scale, -1 for all of a token.
    """

    _REORDERED: ClassVar[tuple[str, str, str]] = (
        "weight_ordered",
        "weight_scale_ordered",
        "weight_zero_point_ordered",
    )

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
        self._prepared_for: torch.device | None = None

    @classmethod
    def from_wna16(
        cls, layer: LinearWNA16, *, x_dtype: torch.dtype = torch.int8, x_group_size: int = -1
    ) -> LinearWNA8:
        """The layer with the same weight and bias (shared, not copied, unless it is tiled) and 8-bit activations.

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
        weight, scale, zero_point = self._held()
        good = x.is_floating_point() if x_scale is None else x.dtype == self.x_dtype
        if x.shape[-1:] != (self.in_features,) or x.device != weight.device or not good:
            kind = "floats" if x_scale is None else str(self.x_dtype)
            raise InvalidArgument(
                f"given x of {x.dtype} and shape {tuple(x.shape)} on {x.device}, expected {kind} "
                f"(..., {self.in_features}) on {weight.device}"
            )
        if x_scale is None:
            x = autocast(x)
        dtype = x.dtype if x_scale is None else scale.dtype
        if (
            not torch.compiler.is_compiling()
            and self._prepared_for != weight.device
            and not _capturing(weight)
        ):
            self.prepare()
            weight, scale, zero_point = self._held()
        layout = self.layout
        if layout == "tiled" and dtype == torch.float32:
            weight, scale, zero_point = self._packed()
            layout = "packed"
        return operator(*self._arguments(x, x_scale, weight, scale, zero_point, dtype, layout))  # type: ignore[no-any-return]

    def to_layout(self, layout: Literal["packed", "tiled"]) -> LinearWNA16:
        """Bring the weight back into canonical rows, in place, for "packed", and return the layer.

        Raises:
            InvalidArgument: for "tiled", the order for 16-bit activations; `prepare` makes the one for these.
        """
        if layout != "packed":
            raise InvalidArgument(
                f'given layout={layout!r} for a layer with 8-bit activations, expected "packed"; call prepare()'
            )
        if self.layout != "packed":
            self._hold(self._packed(), "packed")
        self._prepared_for = None
        return self

    def prepare(self) -> None:
        """Bring the weight into the order of the implementation that this device uses, in place.

        The first call of the layer does it by itself, and so does the first one after the weight was loaded or moved to
        another device.
        """
        weight, scale, zero_point = self._packed()
        x = torch.empty(1, self.in_features, dtype=scale.dtype, device=weight.device)
        canonical = self._arguments(x, None, weight, scale, zero_point, x.dtype, "packed")
        implementation = operator.select(*canonical)
        if implementation.prepare is not None:
            new = implementation.prepare(*canonical)
            self._hold(new[2:5], new[-1])
        elif self.layout != "packed":
            self._hold((weight, scale, zero_point), "packed")
        self._prepared_for = weight.device

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, x_dtype={self.x_dtype}, x_group_size={self.x_group_size}"

    def _held(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weight, scale and zero point as they are."""
        if self.layout == "packed":
            return self.weight_packed, self.weight_scale, self.weight_zero_point
        weight, scale, zero_point = (self._buffers[name] for name in self._REORDERED)
        assert weight is not None and scale is not None
        return weight, scale, zero_point

    def _packed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return to_packed(
            *self._held(),
            rows=self.out_features,
            in_features=self.in_features,
            bits=self.bits,
            group_size=self.group_size,
            layout=self.layout,
        )

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self.to_layout("packed")
        super()._load_from_state_dict(*arguments, **options)

    def _arguments(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        dtype: torch.dtype,
        layout: str,
    ) -> tuple[Any, ...]:
        sizes = (self.out_features, self.bits, self.group_size, self.x_group_size)
        return x, x_scale, weight, scale, zero_point, self.bias, *sizes, self.x_dtype, dtype, layout


def _capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, whose memory nothing may keep."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()

"""`LinearWNA16`: the layer that compression puts in place of `nn.Linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tensormill.errors import InvalidArgument
from tensormill.ops import tiles
from tensormill.ops.bit_packing import pack_bits, packed_width, unpack_bits
from tensormill.ops.dequantize_wna16 import check_weight, dequantize_wna16, num_groups
from tensormill.ops.linear_wna16 import autocast, operator

_CANONICAL = ("weight_packed", "weight_scale", "weight_zero_point")
_TILED = ("weight_tiled", "weight_scale_tiled", "weight_zero_point_tiled")


class LinearWNA16(nn.Module):
    """A linear layer with weights of 1 to 8 bits; see `tensormill.ops.linear_wna16`.

    The weights are buffers, not parameters: they have no gradient. `.to(dtype)` converts scales and bias and
    leaves the integers as they are.

    Args:
        in_features: K.
        out_features: N.
        bits: width of a code, 1 to 8.
        group_size: columns that share a scale, -1 for the whole row; the last group may be shorter.
        symmetric: without zero points (`2 ** (bits - 1)` everywhere).
        bias: whether there is a bias.
        dtype: of scales and bias; None takes torch's default.
        device: where the buffers lie; "meta" allocates nothing.

    Attributes:
        weight_packed: (N, ceil(K * bits / 32)) int32.
        weight_scale: (N, G) float.
        weight_zero_point: (N, G) uint8, or None.
        bias: (N,) float parameter, or None.
        layout: "packed", or "tiled" after `to_layout`: then the buffers are in the CUDA kernels' order and have
            other names, the three above are computed when they are asked for, and state dicts stay the same.
    """

    _REORDERED: ClassVar[tuple[str, str, str]] = (
        _TILED  # names of the buffers in any other layout than "packed"
    )
    layout: str = "packed"
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_tiled: Tensor
    weight_scale_tiled: Tensor
    weight_zero_point_tiled: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        symmetric: bool = False,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        dtype = torch.get_default_dtype() if dtype is None else dtype
        words = packed_width(in_features, bits)
        groups = num_groups(in_features, group_size)
        packed = torch.zeros(out_features, words, dtype=torch.int32, device=device)
        self.register_buffer("weight_packed", packed)
        self.register_buffer("weight_scale", torch.ones(out_features, groups, dtype=dtype, device=device))
        zero = None if symmetric else torch.zeros(out_features, groups, dtype=torch.uint8, device=device)
        self.register_buffer("weight_zero_point", zero)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self._check()

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        *,
        bits: int,
        group_size: int,
        bias: Tensor | None = None,
    ) -> LinearWNA16:
        """The layer of a quantized weight.

        Args:
            codes: (N, K) uint8, each below `2 ** bits`.
            scale: (N, G) float.
            zero_point: (N, G) uint8, or None for a symmetric quantizer.
            bits, group_size: as above.
            bias: (N,) float, or None; a parameter stays the same parameter.

        Raises:
            InvalidArgument: shapes, dtypes or devices do not fit together.
        """
        if codes.dim() != 2:
            raise InvalidArgument(f"given codes of shape {tuple(codes.shape)}, expected (N, K)")
        if zero_point is not None and zero_point.numel() and not zero_point.is_meta:
            largest = int(zero_point.max())
            if largest >= 1 << bits:
                raise InvalidArgument(
                    f"given the zero point {largest}, expected one below {1 << bits} for {bits} bits"
                )
        return cls.from_packed(
            pack_bits(codes, bits),
            scale,
            zero_point,
            in_features=codes.shape[1],
            bits=bits,
            group_size=group_size,
            bias=bias,
        )

    @classmethod
    def from_packed(
        cls,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        *,
        in_features: int,
        bits: int,
        group_size: int,
        bias: Tensor | None = None,
    ) -> LinearWNA16:
        """The layer of a packed weight, (N, ceil(K * bits / 32)) int32; the rest as for `from_codes`."""
        check_weight(weight, scale, zero_point, in_features, bits, group_size, "packed")
        layer = cls(
            in_features,
            weight.shape[0],
            bits=bits,
            group_size=group_size,
            symmetric=zero_point is None,
            bias=False,
            device="meta",
        )
        layer.weight_packed = weight
        layer.weight_scale = scale
        layer.weight_zero_point = zero_point
        if bias is not None:
            if tuple(bias.shape) != (weight.shape[0],):
                expected = (weight.shape[0],)
                raise InvalidArgument(f"given bias of shape {tuple(bias.shape)}, expected {expected}")
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in x's dtype."""
        tiled = self.layout == "tiled"
        weight = self.weight_tiled if tiled else self.weight_packed
        if x.shape[-1:] != (self.in_features,) or x.device != weight.device or not x.is_floating_point():
            raise InvalidArgument(
                f"given x of {x.dtype} and shape {tuple(x.shape)} on {x.device}, expected floats "
                f"(..., {self.in_features}) on {weight.device}"
            )
        return operator(  # type: ignore[no-any-return]
            autocast(x),
            weight,
            self.weight_scale_tiled if tiled else self.weight_scale,
            self.weight_zero_point_tiled if tiled else self.weight_zero_point,
            self.bias,
            self.bits,
            self.group_size,
            self.layout,
        )

    def to_layout(self, layout: Literal["packed", "tiled"]) -> LinearWNA16:
        """Reorder the weight in place and return the layer: "tiled" for the CUDA kernels, "packed" as it was.

        Results are the same and the layer holds one copy. A tiled layer runs on other devices too, slowly.

        Raises:
            InvalidArgument: the group size has no tiled form.
        """
        if layout not in ("packed", "tiled"):
            raise InvalidArgument(f'given layout={layout!r}, expected "packed" or "tiled"')
        if layout == self.layout:
            return self
        convert = tiles.tile_weight if layout == "tiled" else tiles.untile_weight
        names = _CANONICAL if layout == "tiled" else _TILED
        weight, scale, zero_point = (getattr(self, name) for name in names)
        made = convert(
            weight,
            scale,
            zero_point,
            in_features=self.in_features,
            bits=self.bits,
            group_size=self.group_size,
        )
        self._hold(made, layout)
        return self

    def _hold(self, tensors: Sequence[Tensor | None], layout: str) -> None:
        """Replace weight, scale and zero point by the same in another layout."""
        for name in _CANONICAL if self.layout == "packed" else self._REORDERED:
            delattr(self, name)
        self.layout = layout
        names = _CANONICAL if layout == "packed" else self._REORDERED
        for name, tensor in zip(names, tensors, strict=True):
            self.register_buffer(name, tensor, persistent=layout == "packed")
        weight = tensors[0]
        if weight is not None and weight.is_cuda:
            # Kernels may read weights before the kernel ahead of them has ended.
            torch.cuda.current_stream(weight.device).synchronize()

    def to_fastest_layout(self, dtype: torch.dtype) -> LinearWNA16:
        """Choose the layout in which activations of `dtype` are multiplied fastest where the weight lies.

        "tiled" where the CUDA kernels run and take it, else "packed".
        """
        kernel = operator.find("cuda")
        weight = self.weight_tiled if self.layout == "tiled" else self.weight_packed
        x = weight.new_empty((1, self.in_features), dtype=dtype)
        if x.is_cuda and kernel.missing() is None and tiles.can_tile(self.in_features, self.group_size):
            self.to_layout("tiled")
            tensors = (self.weight_tiled, self.weight_scale_tiled, self.weight_zero_point_tiled, self.bias)
            if kernel.supports(x, *tensors, self.bits, self.group_size, "tiled"):
                return self
        return self.to_layout("packed")

    def __getattr__(self, name: str) -> Any:
        if name in _CANONICAL and self.__dict__.get("layout", "packed") != "packed":
            return self._packed()[_CANONICAL.index(name)]
        return super().__getattr__(name)

    def _packed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return tiles.untile_weight(
            self.weight_tiled,
            self.weight_scale_tiled,
            self.weight_zero_point_tiled,
            in_features=self.in_features,
            bits=self.bits,
            group_size=self.group_size,
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != "packed":
            for name, tensor in zip(_CANONICAL, self._packed(), strict=True):
                if tensor is not None:
                    destination[prefix + name] = tensor

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        layout: Any = self.layout
        self.to_layout("packed")
        super()._load_from_state_dict(*arguments, **options)
        self.to_layout(layout)

    def codes(self) -> Tensor:
        """The codes, (N, K) uint8."""
        return unpack_bits(self.weight_packed, self.bits, self.in_features)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights (N, K), computed in float32, in `dtype` (None: the scale's)."""
        return dequantize_wna16(
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            in_features=self.in_features,
            bits=self.bits,
            group_size=self.group_size,
            dtype=self.weight_scale.dtype if dtype is None else dtype,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, symmetric={self.symmetric}, bias={self.bias is not None}"
            + (f', layout="{self.layout}"' if self.layout != "packed" else "")
        )

    def _check(self) -> None:
        check_weight(
            self.weight_packed,
            self.weight_scale,
            self.weight_zero_point,
            self.in_features,
            self.bits,
            self.group_size,
            "packed",
        )

"""Low-bit linears that quantize their input, each block of channels to a width of its own.

Blocks share a scale per token and are what groups of the weight are, so that products are integer sums between two
changes of scale (`ops.linear_wna8`). What FlexQ needs (one width for a layer) and COMET needs (outliers gathered in few
8-bit blocks by a permutation) is the same layer, with and without an order of the channels.

No checkpoint format of `formats` holds widths of activations: what `save_compressed` writes of these layers is their
weight alone, to be read as weights of so many bits with 16-bit activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensormill.compress.formats.activation_order import ActivationOrderLinear
from tensormill.errors import InvalidArgument
from tensormill.ops.dequantize_wna16 import num_groups
from tensormill.ops.linear_wna8.module import LinearWNA8
from tensormill.ops.linear_wna16 import autocast
from tensormill.ops.linear_wna16.module import LinearWNA16
from tensormill.ops.quantize_activations import quantize_activations


class BlockQuantizedLinear(LinearWNA8):
    """A linear layer with weights of 1 to 8 bits and an input of 2 to 8 bits, by block of channels.

    Each token's channels are quantized on the fly, symmetrically, with a scale for each block of `x_group_size`.

    Attributes:
        block_bits: (blocks,) uint8, width of each block's codes.
    """

    block_bits: Tensor

    def __init__(self, in_features: int, out_features: int, **settings: Any) -> None:
        super().__init__(in_features, out_features, **settings)
        blocks = num_groups(in_features, self.x_group_size)
        bits = torch.full((blocks,), 8, dtype=torch.uint8, device=settings.get("device"))
        self.register_buffer("block_bits", bits)

    def forward(self, x: Tensor, x_scale: Tensor | None = None) -> Tensor:
        """(..., K) float -> (..., N) in x's dtype; or int8 codes in the layer's order, and their scales."""
        if x_scale is not None:
            return super().forward(x, x_scale)
        x = autocast(x)
        codes, scale = self.quantize_input(x)
        # rounded to the dtype of the weight's scales on the way, which is x's in models of one dtype
        return super().forward(codes, scale).to(x.dtype)

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., K) float -> int8 codes (..., K) in the order of the packed columns, and scales (..., blocks).

        Raises:
            InvalidArgument: x doesn't fit the layer.
        """
        if not x.is_floating_point() or x.shape[-1:] != (self.in_features,):
            raise InvalidArgument(
                f"given x of {x.dtype} and shape {tuple(x.shape)}, expected floats (..., {self.in_features})"
            )
        return quantize_activations(
            x, group_size=self.x_group_size, block_bits=self.block_bits, permutation=self._order()
        )

    def _order(self) -> Tensor | None:
        return None

    def average_input_bits(self) -> float:
        """Bits of a channel's code, averaged over channels."""
        size = self.in_features if self.x_group_size == -1 else self.x_group_size
        channels = [min(size, self.in_features - size * block) for block in range(len(self.block_bits))]
        total = sum(n * bits for n, bits in zip(channels, self.block_bits.tolist(), strict=True))
        return float(total) / self.in_features

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, average_input_bits={self.average_input_bits():.3g}"


class OrderedBlockQuantizedLinear(ActivationOrderLinear, BlockQuantizedLinear):
    """A `BlockQuantizedLinear` whose packed columns, and so whose blocks, are in the order `input_order`."""

    def forward(self, x: Tensor, x_scale: Tensor | None = None) -> Tensor:
        """(..., K) float -> (..., N) in x's dtype; or int8 codes in the order of the packed columns, and their scales."""
        return BlockQuantizedLinear.forward(self, x, x_scale)

    def _order(self) -> Tensor | None:
        return self.input_order


def with_quantized_input(
    layer: LinearWNA16, block_bits: Tensor | int, block_size: int, order: Tensor | None = None
) -> BlockQuantizedLinear:
    """The layer with the same packed weight and bias (shared, not copied), whose input is quantized too.

    Args:
        layer: with its weight in the packed layout, and its columns in `order` if there is one.
        block_bits: width of all blocks, or (blocks,) widths, each 2 to 8.
        block_size: channels of a block; the last may have fewer. -1 for one block.
        order: (K,) integers, the input feature that each packed column belongs to; None for the plain order.

    Raises:
        InvalidArgument: widths, blocks or an order that don't fit the layer.

    >>> plain = LinearWNA16.from_codes(torch.full((4, 64), 9, dtype=torch.uint8), torch.ones(4, 1), None, bits=4, group_size=-1)
    >>> with_quantized_input(plain, 6, 32)(torch.ones(2, 64))[0, 0].round()
    tensor(64.)
    """
    columns = layer.in_features
    blocks = num_groups(columns, block_size)
    device = layer.weight_packed.device
    if isinstance(block_bits, int):
        block_bits = torch.full((blocks,), block_bits)
    if tuple(block_bits.shape) != (blocks,) or not 2 <= int(block_bits.min()) <= int(block_bits.max()) <= 8:
        raise InvalidArgument(
            f"given block_bits {block_bits.tolist()}, expected {blocks} widths from 2 to 8 for {columns} channels in "
            f"blocks of {block_size}"
        )
    if order is not None and not torch.equal(
        order.long().sort().values, torch.arange(columns, device=order.device)
    ):
        raise InvalidArgument(f"given an order that is no permutation of {columns} channels")
    kind = BlockQuantizedLinear if order is None else OrderedBlockQuantizedLinear
    new = kind.from_wna16(layer, x_group_size=block_size)
    assert isinstance(new, BlockQuantizedLinear)
    new.block_bits = block_bits.to(device, torch.uint8)
    if isinstance(new, OrderedBlockQuantizedLinear):
        assert order is not None
        new.input_order = order.to(device, torch.int32)
    return new


def set_linear(model: torch.nn.Module, name: str, layer: torch.nn.Module) -> None:
    """Put a layer in the place of the module of this name."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, layer)

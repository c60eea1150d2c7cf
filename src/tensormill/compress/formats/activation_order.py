"""Low-bit linears whose groups aren't of consecutive columns, as GPTQ's activation order makes them.

With `desc_act` GPTQ rounds the columns with the largest activations first, and consecutive columns *in that
order* share a scale. The files keep the columns where they are and say in an index (`g_idx`) which group each
belongs to. Here the columns are sorted by group once, when a layer is loaded, so that the usual kernels can
compute with it; what is left to do in each call is to put the inputs in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tensormill.errors import CheckpointError
from tensormill.ops.bit_packing import pack_bits, unpack_bits
from tensormill.ops.linear_wna16.module import LinearWNA16


class ActivationOrderLinear(LinearWNA16):
    """A `LinearWNA16` with the columns of its packed weight, and so of `codes`, sorted by group.

    `dequantize` gives the weight with its columns in the order of the input features, as `nn.Linear` has them.

    Attributes:
        input_order: (K,) int32, the input feature that each packed column belongs to.
    """

    input_order: Tensor

    def __init__(self, in_features: int, out_features: int, **settings: Any) -> None:
        super().__init__(in_features, out_features, **settings)
        order = torch.arange(in_features, dtype=torch.int32, device=settings.get("device"))
        self.register_buffer("input_order", order)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in x's dtype."""
        # An input that doesn't fit goes on as it is, to be refused there.
        fits = x.shape[-1:] == (self.in_features,) and x.device == self.input_order.device
        return super().forward(x.index_select(-1, self.input_order) if fits else x)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights (N, K), computed in float32, in `dtype` (None: the scale's)."""
        return super().dequantize(dtype).index_select(1, _inverse(self.input_order))

    def group_index(self) -> Tensor:
        """The group of each input feature, (K,) int32."""
        groups = torch.arange(self.in_features, dtype=torch.int32, device=self.input_order.device)
        return groups.div_(self.group_size, rounding_mode="floor")[_inverse(self.input_order)]

    def packed_in_input_order(self) -> Tensor:
        """`weight_packed` with its columns in the order of the input features."""
        return _reordered(self.weight_packed, self.bits, _inverse(self.input_order))


def sort_columns(linear: LinearWNA16, order: Tensor) -> ActivationOrderLinear:
    """The linear whose groups are those of `order`, from one with the columns still in place.

    Args:
        linear: scales and zero points by group, packed columns in the order of the input features.
        order: (K,), from `input_order_of`.
    """
    made = ActivationOrderLinear.from_packed(
        _reordered(linear.weight_packed, linear.bits, order),
        linear.weight_scale,
        linear.weight_zero_point,
        in_features=linear.in_features,
        bits=linear.bits,
        group_size=linear.group_size,
        bias=linear.bias,
    )
    assert isinstance(made, ActivationOrderLinear)
    made.input_order = order.to(torch.int32)
    return made


def input_order_of(index: Tensor, group_size: int, key: str) -> Tensor | None:
    """The input features sorted by group, (K,) int64, or None if they are so already.

    Args:
        index: (K,) integers, the group of each input feature.
        group_size: features in each group; -1 for a single group.
        key: the tensor's name, for messages.

    Raises:
        CheckpointError: there is a group of another size, or one too many.

    >>> input_order_of(torch.tensor([1, 0, 0, 1]), 2, "g_idx").tolist()
    [1, 2, 0, 3]
    """
    columns = index.shape[0]
    size = columns if group_size == -1 else group_size
    index = index.long()
    plain = torch.arange(columns, device=index.device).div_(size, rounding_mode="floor")
    if torch.equal(index, plain):
        return None
    order = index.argsort(stable=True)
    if not torch.equal(index[order], plain):
        counts = index.clamp(-1, columns).add(1).bincount(minlength=columns + 2)[1:]
        expected = plain.bincount(minlength=columns + 1)
        group = int((counts != expected).nonzero()[0])
        raise CheckpointError(
            f"{key} puts {int(counts[group])} columns in group {group}, expected {int(expected[group])}; the file is damaged or "
            "config.json belongs to another checkpoint"
        )
    return order


def _inverse(order: Tensor) -> Tensor:
    return order.argsort()


def _reordered(packed: Tensor, bits: int, order: Tensor) -> Tensor:
    codes = unpack_bits(packed, bits, order.shape[0])
    return pack_bits(codes.index_select(1, order), bits)

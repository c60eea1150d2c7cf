"""A cache of keys and values: contiguous or paged, in 16 bits or quantized, in buffers that never move.

Appending and attending only launch work on the device and never wait for it, so that both can be captured in a CUDA
graph; what the host has to decide (which sequence owns which page) happens in `reserve` and `release`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.operator import triton_missing
from tensormill.ops.decode_attention.storage import KVFormat, quantize_kv


class KVCache:
    """Keys and values of `batch` sequences of one attention layer.

    Args:
        batch: number of sequences.
        capacity: most tokens of a sequence.
        kv_heads, head_dim: of the keys.
        value_dim: channels of the values, `head_dim` by default.
        shared_values: values are the first `value_dim` channels of the keys and not stored (MLA).
        key_format, value_format: a quantized format, or None for `dtype`.
        dtype: of what is not quantized; scales have it too, unless it is float64, which has float32 scales.
        page_size: tokens of a page; None for a contiguous cache.
        pages: number of pages; by default as many as `batch` full sequences take, each sequence owning its own.
            With another number sequences own none at first: see `reserve`.
        device: where.

    Attributes:
        key, value: codes or values, (batch or pages, kv_heads, capacity or page_size, channels); value is None if
            shared.
        key_scale, key_offset, value_scale, value_offset: of quantized formats, else None.
        lengths: (batch,) int32, tokens of every sequence.
        block_table: (batch, pages of a full sequence) int32, -1 where there is no page; None if contiguous.

    Raises:
        InvalidArgument: sizes below 1, or a format whose groups do not divide the channels.

    Example:
        >>> from tensormill.ops.decode_attention import INT8, KVCache
        >>> cache = KVCache(2, 64, 1, 32, key_format=INT8, value_format=INT8, dtype=torch.float32, page_size=16)
        >>> cache.append(torch.randn(2, 1, 5, 32), torch.randn(2, 1, 5, 32))
        >>> cache.lengths.tolist(), cache.attend(torch.randn(2, 4, 1, 32)).shape
        ([5, 5], torch.Size([2, 4, 1, 32]))
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        shared_values: bool = False,
        key_format: KVFormat | None = None,
        value_format: KVFormat | None = None,
        dtype: torch.dtype = torch.float16,
        page_size: int | None = None,
        pages: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        given = {"batch": batch, "capacity": capacity, "kv_heads": kv_heads, "head_dim": head_dim}
        given |= {"value_dim": value_dim, "page_size": 1 if page_size is None else page_size}
        given |= {"pages": 1 if pages is None else pages}
        for name, size in given.items():
            if size < 1:
                raise InvalidArgument(f"given {name}={size}, expected at least 1")
        if shared_values and (value_format is not None or value_dim > head_dim):
            raise InvalidArgument(
                f"given shared_values with value_format={value_format} and value_dim={value_dim}, expected no format"
                f" and at most {head_dim} channels"
            )
        if pages is not None and page_size is None:
            raise InvalidArgument("given pages without page_size, expected both or page_size alone")
        self.capacity, self.page_size, self.value_dim, self.dtype = capacity, page_size, value_dim, dtype
        self.key_format, self.value_format = key_format, value_format
        device = torch.device(device)
        self.block_table: Tensor | None = None
        count, tokens = batch, capacity
        if page_size is not None:
            each = -(-capacity // page_size)
            count, tokens = batch * each if pages is None else pages, page_size
            table = torch.full((batch, each), -1, dtype=torch.int32)
            if pages is None:
                table = torch.arange(count, dtype=torch.int32).view(batch, each)
            self.block_table = table.to(device)
            owned = each if pages is None else 0
            self._owned = [list(range(i * each, i * each + owned)) for i in range(batch)]
            self._free = [] if pages is None else list(range(count - 1, -1, -1))
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)

        def buffers(width: int, storage: KVFormat | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
            front = (count, kv_heads, tokens)
            if storage is None:
                return torch.zeros(*front, width, dtype=dtype, device=device), None, None
            groups = storage.groups(width)
            stored = torch.uint8 if storage.bits == 4 else torch.int8
            codes = torch.zeros(
                *front, width // 2 if storage.bits == 4 else width, dtype=stored, device=device
            )
            kind = torch.uint8 if storage.exponents else torch.float32 if dtype == torch.float64 else dtype
            scale = torch.zeros(*front, groups, dtype=kind, device=device)
            return codes, scale, None if storage.symmetric else torch.zeros_like(scale)

        self.key, self.key_scale, self.key_offset = buffers(head_dim, key_format)
        self.value: Tensor | None = None
        self.value_scale: Tensor | None = None
        self.value_offset: Tensor | None = None
        if not shared_values:
            self.value, self.value_scale, self.value_offset = buffers(value_dim, value_format)

    def reserve(self, sequence: int, tokens: int) -> None:
        """Give a sequence of a paged cache the pages that `tokens` tokens need.

        Raises:
            InvalidArgument: the cache is contiguous, `tokens` exceeds the capacity, or too few pages are free.
        """
        table = self._table()
        if not 0 <= tokens <= self.capacity:
            raise InvalidArgument(f"given tokens={tokens}, expected at most the capacity, {self.capacity}")
        assert self.page_size is not None
        owned = self._owned[sequence]
        missing = -(-tokens // self.page_size) - len(owned)
        if missing > len(self._free):
            raise InvalidArgument(
                f"{tokens} tokens need {missing} more pages and {len(self._free)} are free; release a sequence"
            )
        if missing > 0:
            new = [self._free.pop() for _ in range(missing)]
            table[sequence, len(owned) : len(owned) + missing] = torch.tensor(new, dtype=torch.int32)
            owned += new

    def release(self, sequence: int) -> None:
        """Empty a sequence and, in a paged cache, give its pages back."""
        self.lengths[sequence] = 0
        if self.block_table is not None:
            self.block_table[sequence] = -1
            self._free += reversed(self._owned[sequence])
            self._owned[sequence] = []

    def _table(self) -> Tensor:
        if self.block_table is None:
            raise InvalidArgument("a contiguous cache has no pages; make one with page_size")
        return self.block_table

    def append(self, key: Tensor, value: Tensor | None = None, counts: Tensor | None = None) -> None:
        """Store new tokens behind those that are there, quantized if the cache is.

        Tokens beyond the capacity or beyond a sequence's pages are dropped, and the sequence stays that long.

        Args:
            key: (batch, kv_heads, tokens, head_dim), the cache's dtype.
            value: (batch, kv_heads, tokens, value_dim); None if values are shared.
            counts: (batch,) int32, how many of `tokens` a sequence really has; None for all.

        Raises:
            InvalidArgument: shapes or dtypes do not fit the cache.
        """
        batch, kv_heads = len(self.lengths), self.key.shape[1]
        tokens = key.shape[2] if key.dim() == 4 else -1
        if (value is None) != (self.value is None):
            raise InvalidArgument("given value to a cache that shares it, or none to one that does not")
        widths = {"key": (key, self.key.shape[-1], self.key_format), "value": (value, self.value_dim, None)}
        for name, (x, width, storage) in widths.items():
            width *= 2 if name == "key" and storage is not None and storage.bits == 4 else 1
            if x is not None and (
                tuple(x.shape) != (batch, kv_heads, tokens, width) or x.dtype != self.dtype
            ):
                raise InvalidArgument(
                    f"given {name} of {x.dtype} and shape {tuple(x.shape)}, expected {self.dtype}"
                    f" ({batch}, {kv_heads}, tokens, {width})"
                )
        if counts is not None and (tuple(counts.shape) != (batch,) or counts.dtype != torch.int32):
            raise InvalidArgument(
                f"given counts of {counts.dtype} and shape {tuple(counts.shape)}, expected int32 ({batch},)"
            )
        parts = [(key, self.key, self.key_scale, self.key_offset, self.key_format)]
        if value is not None:
            assert self.value is not None
            parts.append((value, self.value, self.value_scale, self.value_offset, self.value_format))
        fused = key.is_cuda and triton_missing() is None
        for new, stored, scale, offset, storage in parts:
            if fused:
                from tensormill.ops.decode_attention.append import store

                store(
                    new, stored, scale, offset, storage, self.lengths, counts, self.block_table, self.capacity
                )
            else:
                self._store(new, stored, scale, offset, storage, counts)
        self.lengths.add_(tokens if counts is None else counts).clamp_(max=self._room())

    def _room(self) -> Tensor | int:
        """Tokens that fit in every sequence."""
        if self.block_table is None:
            return self.capacity
        assert self.page_size is not None
        pages = (self.block_table >= 0).sum(1, dtype=torch.int32)
        return (pages * self.page_size).clamp_(max=self.capacity)

    def _store(
        self,
        new: Tensor,
        stored: Tensor,
        scale: Tensor | None,
        offset: Tensor | None,
        storage: KVFormat | None,
        counts: Tensor | None,
    ) -> None:
        """`append` for one of keys and values in plain PyTorch."""
        tokens = new.shape[2]
        order = torch.arange(tokens, device=new.device)
        position = self.lengths.long()[:, None] + order
        fits = position < (room if isinstance(room := self._room(), int) else room[:, None])
        if counts is not None:
            fits = fits & (order < counts[:, None])
        sequence, token = fits.nonzero(as_tuple=True)
        at = position[sequence, token]
        page = sequence
        if self.block_table is not None:
            assert self.page_size is not None
            page, at = self.block_table[sequence, at // self.page_size].long(), at % self.page_size
        rows = new[sequence, :, token]  # (tokens stored, kv_heads, channels)
        targets = [stored, scale, offset]
        values = (rows,) if storage is None else quantize_kv(rows, storage, self._scale_dtype(scale))
        for target, part in zip(targets, values, strict=False):
            if target is not None and part is not None:
                target[page, :, at] = part

    @staticmethod
    def _scale_dtype(scale: Tensor | None) -> torch.dtype:
        return torch.float32 if scale is None or scale.dtype == torch.uint8 else scale.dtype

    def attend(
        self,
        query: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`decode_attention` of the newest tokens, which must have been appended, over this cache."""
        from tensormill.ops.decode_attention import decode_attention

        return decode_attention(
            query,
            self.key,
            self.value,
            self.lengths,
            block_table=self.block_table,
            key_scale=self.key_scale,
            key_offset=self.key_offset,
            value_scale=self.value_scale,
            value_offset=self.value_offset,
            value_dim=self.value_dim if self.value is None else None,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            return_lse=return_lse,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and their scales."""
        parts = (self.key, self.value, self.key_scale, self.key_offset, self.value_scale, self.value_offset)
        return sum(x.nbytes for x in parts if x is not None)

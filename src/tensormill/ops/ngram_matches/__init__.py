"""Clipped n-gram matches of token sequences with their references: the exact integer statistics behind BLEU.

For candidate c, reference set {r} and order n, with #(g, s) the number of times n-gram g occurs in s:

    matches_n = sum over distinct g of min(#(g, c), max_r #(g, r)),    totals_n = max(0, |c| - n + 1)

Equivalently, and this is what the kernels compute: position i of the candidate counts iff fewer equal n-grams
stand before it in the candidate than there are in the reference that has most of them. The reference length is
the length closest to |c| among the references that are present, the shorter one at a tie (Papineni et al.,
2002; batched on token ids in TensorBLEU, Filipek, arXiv 2510.05485).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.operator import Operator, Sample, Shape, native_missing, triton_missing
from tensormill.ops.ngram_matches.reference import reference
from tensormill.roofline import Cost

__all__ = ["MAX_ORDER", "ngram_matches", "operator"]

MAX_ORDER = 8
"""Largest order of n-grams that is counted."""

_BYTES = {"int32": 4, "int64": 8}


def _cost(shape: Shape) -> Cost:
    """Tokens and lengths once; counting itself needs no arithmetic unit that a matrix product could rate."""
    batch, prompts = shape["batch"], shape["batch"] // shape["group"]
    tokens = batch * shape["candidate_length"] + prompts * shape["references"] * shape["reference_length"]
    lengths = batch + prompts * shape["references"]
    return Cost(
        bytes_read=float(_BYTES[shape["dtype"]] * tokens + 8 * lengths),
        bytes_written=4.0 * batch * (2 * shape["max_n"] + 1),
    )


def _shape(
    batch: int,
    length: int,
    *,
    references: int = 1,
    reference_length: int | None = None,
    group: int = 1,
    vocabulary: int = 32000,
    max_n: int = 4,
    dtype: str = "int64",
    ragged: bool = False,
    offset: int = 0,
) -> Shape:
    return {
        "batch": batch,
        "candidate_length": length,
        "references": references,
        "reference_length": length if reference_length is None else reference_length,
        "group": group,
        "vocabulary": vocabulary,
        "max_n": max_n,
        "dtype": dtype,
        "ragged": ragged,
        "offset": offset,
    }


_SAMPLES = (
    Sample("batch256-1024", _shape(256, 1024), benchmark=True, large=True),
    Sample("batch32-256", _shape(32, 256), benchmark=True, large=True),
    Sample("batch512-1024-int32", _shape(512, 1024, dtype="int32"), benchmark=True, large=True),
    Sample("batch64-1024-four-references", _shape(64, 1024, references=4), benchmark=True, large=True),
    Sample("batch128-512-groups-of-8", _shape(128, 512, group=8), benchmark=True, large=True),
    Sample("batch4-8192", _shape(4, 8192, ragged=True), large=True),
    Sample("batch4-40", _shape(4, 40, vocabulary=200)),
    Sample(
        "ragged", _shape(6, 63, references=3, reference_length=45, vocabulary=13, ragged=True), kind="ragged"
    ),
    Sample(
        "ragged-groups",
        _shape(6, 33, references=2, reference_length=50, group=3, vocabulary=5, dtype="int32", ragged=True),
        kind="ragged",
    ),
    Sample("across-blocks", _shape(1, 300, reference_length=257, vocabulary=3, ragged=True), kind="ragged"),
    Sample("orders-8", _shape(2, 40, references=2, vocabulary=2, max_n=8, ragged=True), kind="ragged"),
    Sample("one-token", _shape(3, 1, references=2, vocabulary=2), kind="tiny"),
    Sample("shorter-than-orders", _shape(4, 3, reference_length=2, vocabulary=2), kind="tiny"),
    Sample("empty-batch", _shape(0, 7), kind="tiny"),
    Sample("zero-width", _shape(2, 0, reference_length=5), kind="tiny"),
    Sample("one-token-id", _shape(2, 70, reference_length=50, vocabulary=1, ragged=True), kind="extreme"),
    Sample("ids-near-2-31", _shape(2, 40, vocabulary=9, offset=2**31 - 4), kind="extreme"),
    Sample("ids-differ-above-32-bits", _shape(2, 40, vocabulary=4, offset=2**40), kind="extreme"),
    Sample("negative-ids", _shape(2, 40, vocabulary=4, dtype="int32", offset=-2), kind="extreme"),
)


def _inputs(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
    """References of Zipf-like tokens; candidates are their reference with three tokens in ten replaced."""
    batch, group, count = shape["batch"], shape["group"], shape["references"]
    if group < 1 or batch % group:
        raise InvalidArgument(
            f"given batch {batch} and group {group}, expected a group that divides the batch"
        )
    prompts = batch // group
    longest, width = shape["reference_length"], shape["candidate_length"]

    def random(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator, device=device, dtype=torch.float64)

    def tokens(*sizes: int) -> Tensor:
        ids = (shape["vocabulary"] ** random(*sizes)).long() - 1
        if shape["offset"] == 2**40:  # ids whose low 32 bits are all alike
            return ids << 40
        return ids + shape["offset"]

    references = tokens(prompts, count, longest)
    candidates = tokens(batch, width)
    if longest and width and batch:
        position = torch.arange(width, device=device) % longest
        copied = references[:, 0, position].repeat_interleave(group, 0)
        candidates = torch.where(random(batch, width) < 0.3, candidates, copied)
    candidate_lengths = torch.full((batch,), width, device=device)
    reference_lengths = torch.full((prompts, count), longest, device=device)
    if shape["ragged"]:
        candidate_lengths = (random(batch) * (width + 1)).long()
        reference_lengths = (random(prompts, count) * (longest + 2)).long() - 1
    dtype = getattr(torch, shape["dtype"])
    return candidates.to(dtype), candidate_lengths, references.to(dtype), reference_lengths, shape["max_n"]


def _fake(
    candidates: Tensor, candidate_lengths: Tensor, references: Tensor, reference_lengths: Tensor, max_n: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch = candidates.shape[0]
    counts = candidates.new_empty((batch, max_n), dtype=torch.int32)
    return counts, torch.empty_like(counts), candidates.new_empty((batch,), dtype=torch.int32)


operator = Operator(
    "ngram_matches",
    schema="(Tensor candidates, Tensor candidate_lengths, Tensor references, Tensor reference_lengths, int max_n)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    cost=_cost,
    inputs=_inputs,
    samples=_SAMPLES,
    exact=True,
)


def _in_32_bits(
    candidates: Tensor, candidate_lengths: Tensor, references: Tensor, reference_lengths: Tensor, max_n: int
) -> bool:
    """Positions of one prompt with its candidates are counted in int32."""
    per_prompt = candidates.numel() // max(1, references.shape[0]) + references.shape[1] * references.shape[2]
    return per_prompt < 2**29


def _short_enough(
    candidates: Tensor, candidate_lengths: Tensor, references: Tensor, reference_lengths: Tensor, max_n: int
) -> bool:
    """Up to here comparing every pair of positions beats sorting (the pairs grow with the square)."""
    return candidates.shape[1] <= 8192 and references.shape[1] * references.shape[2] <= 32768


operator.implementation(
    "cpu",
    devices=("cpu",),
    entry="tensormill.ops.ngram_matches.cpu:count_matches",
    supports=_in_32_bits,
    missing=native_missing("tensormill.ops.ngram_matches._cpu"),
)
operator.implementation(
    "triton",
    devices=("cuda",),
    entry="tensormill.ops.ngram_matches.triton:count_matches",
    supports=_short_enough,
    missing=triton_missing,
)
operator.implementation(
    "sort",
    devices=("cpu", "cuda"),
    entry="tensormill.ops.ngram_matches.sort:count_matches",
    supports=_in_32_bits,
)


def ngram_matches(
    candidates: Tensor,
    references: Tensor,
    candidate_lengths: Tensor | None = None,
    reference_lengths: Tensor | None = None,
    *,
    max_n: int = 4,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped n-gram matches of every candidate with its references, in exact integers.

    Args:
        candidates: (batch, length) int32 or int64 token ids; or (prompts, group, length), every group sharing its
            prompt's references, which are then stored and read once. Whatever stands past a length is ignored.
        references: (batch, count, length) of the same dtype, or (batch, length) for one reference each; for
            groups the first dimension is prompts.
        candidate_lengths: (batch,) or (prompts, group) integers; None: every row is full.
        reference_lengths: (batch, count), or (batch,) for one reference each; 0 or -1 marks an absent reference;
            None: every reference is full.
        max_n: largest order, 1 to 8.

    Returns:
        `(matches, totals, reference_length)`: int32 (batch, max_n), the clipped matches of orders 1 to max_n; int32
        (batch, max_n), the number of n-grams in the candidate; int32 (batch,), the length of the reference closest
        in length (the shorter one at a tie, 0 where no reference is present). For groups, (prompts, group, ...).

    Raises:
        InvalidArgument: ids that are no integers, shapes or devices that don't fit, no reference at all, a
            length beyond its tensor (lengths are looked at on the CPU only: on a GPU that would wait for the
            device, and they are clamped instead), or max_n out of range.

    Example:
        >>> import torch
        >>> from tensormill.ops import ngram_matches
        >>> the, cat, sat = 1, 2, 3
        >>> candidate = torch.tensor([[the, the, the, cat]])
        >>> reference = torch.tensor([[[the, cat, sat, the, cat]]])
        >>> matches, totals, reference_length = ngram_matches(candidate, reference, max_n=2)
        >>> matches.tolist(), totals.tolist(), reference_length.tolist()
        ([[3, 1]], [[4, 3]], [5])
    """
    for name, ids in (("candidates", candidates), ("references", references)):
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
            given = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise InvalidArgument(
                f"given {name} of {given}, expected int32 or int64 token ids; cast with .long()"
            )
    if isinstance(max_n, bool) or not isinstance(max_n, int) or not 1 <= max_n <= MAX_ORDER:
        raise InvalidArgument(f"given max_n={max_n!r}, expected an integer from 1 to {MAX_ORDER}")
    if candidates.dtype != references.dtype:
        candidates, references = candidates.long(), references.long()
    leading = candidates.shape[:-1]
    if candidates.dim() not in (2, 3):
        raise InvalidArgument(
            f"given candidates of shape {tuple(candidates.shape)}, expected (batch, length) or "
            "(prompts, group, length)"
        )
    if references.dim() == 2:
        references = references[:, None]
        if reference_lengths is not None and reference_lengths.dim() == 1:
            reference_lengths = reference_lengths[:, None]
    if references.dim() != 3:
        raise InvalidArgument(
            f"given references of shape {tuple(references.shape)}, expected (batch, count, length) or "
            "(batch, length)"
        )
    if references.shape[0] != leading[0]:
        raise InvalidArgument(
            f"given {leading[0]} {'prompts' if len(leading) == 2 else 'candidates'} and {references.shape[0]} sets "
            "of references, expected as many; share references by passing candidates as (prompts, group, length)"
        )
    if references.shape[1] == 0:
        raise InvalidArgument("given 0 references per candidate, expected at least 1")
    candidate_lengths = _checked_lengths("candidate_lengths", candidate_lengths, candidates, lowest=0)
    reference_lengths = _checked_lengths("reference_lengths", reference_lengths, references, lowest=-1)
    if references.device != candidates.device:
        raise InvalidArgument(
            f"given candidates on {candidates.device} and references on {references.device}, expected one device"
        )
    matches, totals, reference_length = operator(
        candidates.reshape(candidate_lengths.numel(), candidates.shape[-1]),
        candidate_lengths.reshape(-1),
        references,
        reference_lengths,
        max_n,
    )
    return (
        matches.reshape(*leading, max_n),
        totals.reshape(*leading, max_n),
        reference_length.reshape(leading),
    )


def _checked_lengths(name: str, lengths: Tensor | None, ids: Tensor, lowest: int) -> Tensor:
    """Lengths as int64 on the device of the ids; implementations clamp them."""
    width = ids.shape[-1]
    if lengths is None:
        return torch.full(ids.shape[:-1], width, dtype=torch.int64, device=ids.device)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise InvalidArgument(f"given {name} of {lengths.dtype}, expected integers")
    if lengths.shape != ids.shape[:-1]:
        raise InvalidArgument(
            f"given {name} of shape {tuple(lengths.shape)}, expected {tuple(ids.shape[:-1])} for ids of shape "
            f"{tuple(ids.shape)}"
        )
    if lengths.device != ids.device:
        raise InvalidArgument(f"given {name} on {lengths.device}, expected {ids.device}, where the ids are")
    lengths = lengths.to(torch.int64)
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and lengths.numel():
        smallest, largest = (int(v) for v in lengths.aminmax())
        if smallest < lowest or largest > width:
            wrong = largest if largest > width else smallest
            raise InvalidArgument(
                f"given {wrong} in {name}, expected {lowest} to {width}, the width of the ids"
            )
    return lengths


from tensormill.ops.ngram_matches import peers  # noqa: E402, F401

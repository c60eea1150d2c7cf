"""Randomisations of low-discrepancy points: what makes their estimates unbiased and gives error bars.

Random numbers are a hash of (seed, purpose, replication, dimension, position): the first k dimensions of a
randomised sequence don't depend on how many follow, a replication doesn't depend on how many there are, and
every device gives the same bits.

Sources: Owen, Randomly permuted (t,m,s)-nets and (t,s)-sequences, 1995 (nested uniform scrambling); Matousek, On
the L2-discrepancy for anchored boxes, 1998 (linear matrix scrambling); Dick, Higher order scrambled digital nets,
2011 (scramble, then interlace); Steele, Lea, Flood, Fast splittable pseudorandom number generators, 2014 (the hash).
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tensormill.errors import InvalidArgument

BITS = 63
"""Bits of a randomised digital net: what an int64 holds beside its sign."""

NESTED_LEVELS = 32
"""Levels of the nested scrambling; below, one random word per node. A net has at most 2^32 points, whose first 32
digits differ in every dimension, so that this has the same distribution as nesting all the way down."""

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LEVELS_PER_HASH = 5  # a subtree of 5 levels has 31 nodes, a bit of a hash each


_Words = TypeVar("_Words", Tensor, np.ndarray)


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def draw_seed(seed: int | None) -> int:
    """The seed given, or one from torch's default generator (so that `torch.manual_seed` decides).

    Raises:
        InvalidArgument: not an integer from 0 to 2^63 - 1.
    """
    if seed is None:
        return int(torch.randint(0, 2**62, ()))
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InvalidArgument(f"given seed {seed!r}, expected an integer from 0 to 2^63 - 1, or None")
    return seed


def mix(x: _Words) -> _Words:
    """A bijection of int64 words that looks random (the finaliser of SplitMix64)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MULTIPLIERS[0]
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MULTIPLIERS[1]
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def random_words(seed: int, purpose: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
    """Hashed int64 words of a shape: the word at an index depends on seed, purpose and that index alone."""
    # On the host, in numpy: few words, many operations, of which each costs a fifth of torch's.
    state = mix(mix(np.array([_signed(seed * 0x632BE59BD9B4E019 + purpose)])) + _GOLDEN)
    for size in shape:
        state = mix(state[..., None] ^ mix(np.arange(1, size + 1) * _GOLDEN))
    return torch.from_numpy(state[0]).to(device)


def random_bits(
    seed: int, purpose: int, *shape: int, bits: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform integers of `bits` (up to 63) random bits."""
    words = random_words(seed, purpose, *shape, device=device)
    return (words >> (64 - bits)) & ((1 << bits) - 1)


def random_unit(seed: int, purpose: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform float64 numbers in [0, 1), multiples of 2^-53."""
    return random_bits(seed, purpose, *shape, bits=53, device=device).double() * 2.0**-53


def linear_matrix_scramble(
    matrices: Tensor, bits: int, scrambled_bits: int, seed: int, replications: int
) -> Tensor:
    """Multiply generating matrices by random lower-triangular ones with unit diagonal, over GF(2).

    Args:
        matrices: (d, m) int64, columns whose `bits` bits have the first digit highest.
        bits: digits of the given columns.
        scrambled_bits: digits of the result, at least `bits`.
        seed: of the random matrices.
        replications: independent results.

    Returns:
        (replications, d, m) int64.
    """
    given = matrices.cpu().numpy()
    words = random_words(seed, 1, replications, len(given), bits).numpy()
    diagonal = 1 << np.arange(scrambled_bits - 1, scrambled_bits - 1 - bits, -1)
    columns = ((words >> (64 - scrambled_bits)) & (diagonal - 1)) | diagonal
    result = np.zeros((replications, *given.shape), dtype=np.int64)
    if result.size <= 1 << 10:  # few enough for one operation: starting them is what takes the time
        chosen = -(
            (given[:, None] >> np.arange(bits - 1, -1, -1)[:, None]) & 1
        )  # (d, bits, m): all bits or none
        result = np.bitwise_xor.reduce(chosen & columns[..., None], axis=-2)
    else:
        for row in range(bits):
            chosen = -((given >> (bits - 1 - row)) & 1)
            result ^= chosen & columns[..., row, None]
    return torch.from_numpy(result).to(matrices.device)


def nested_uniform_scramble(points: Tensor, bits: int, seed: int) -> Tensor:
    """Owen's nested uniform scrambling of integers: each digit is flipped by a bit that all digits before it choose.

    Args:
        points: (replications, n, d) int64 of `bits` bits, all replications alike or not; they are scrambled apart.
        bits: digits, at most 63.
        seed: of the flips. A flip is a hash of (seed, replication, dimension, the digits before), so that no tree
            is held and any point is scrambled alone.

    Returns:
        (replications, n, d) int64.
    """
    replications, _, dimensions = points.shape
    keys = random_words(seed, 2, replications, 1, dimensions, device=points.device)
    result = points.clone()
    for first in range(0, min(NESTED_LEVELS, bits), _LEVELS_PER_HASH):
        prefix = points >> (bits - first)
        nodes = mix(mix(prefix * (2 * first + 1) + first) ^ keys)  # a random bit for every node of a subtree
        for level in range(first, min(first + _LEVELS_PER_HASH, bits)):
            inside = (points >> (bits - level)) & ((1 << (level - first)) - 1)
            flip = (nodes >> (inside + (1 << (level - first)))) & 1
            result ^= flip << (bits - 1 - level)
    done = -(-min(NESTED_LEVELS, bits) // _LEVELS_PER_HASH) * _LEVELS_PER_HASH
    if done < bits:
        rest = mix(mix((points >> (bits - done)) + _GOLDEN) ^ keys)
        result ^= rest & ((1 << (bits - done)) - 1)
    return result


def interlace(digits: Tensor, alpha: int, bits: int, interlaced_bits: int = BITS) -> Tensor:
    """Digital interlacing: digit alpha*l + a of coordinate j is digit l of coordinate alpha*j + a (from 0).

    Args:
        digits: (..., alpha * d) int64 of `bits` bits: points or columns of generating matrices.
        alpha: the order of the net that results.
        bits: digits of the input.
        interlaced_bits: digits of the result.

    Returns:
        (..., d) int64.
    """
    # Small tensors on the CPU as arrays: numpy's operations start faster.
    source = digits.numpy() if digits.device.type == "cpu" and digits.numel() <= 1 << 15 else digits
    parts = [source[..., part::alpha] for part in range(alpha)]
    result = parts[0] & 0
    for position in range(min(alpha * bits, interlaced_bits)):
        digit, part = divmod(position, alpha)
        bit = (parts[part] >> (bits - 1 - digit)) & 1
        result |= bit << (interlaced_bits - 1 - position)
    return torch.as_tensor(result)

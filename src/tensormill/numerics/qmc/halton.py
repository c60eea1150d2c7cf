"""Halton sequences: coordinate j of point i mirrors the digits of i in the j-th prime base behind the point.

Sources: Halton, 1960; Sorokin, QMCPy, arXiv 2502.14256 (digital permutations, linear matrix scrambling and digital
shifts in prime bases); Owen and Pan, Gain coefficients for scrambled Halton points, 2024 (nested scrambling).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tensormill.errors import InvalidArgument
from tensormill.numerics.qmc.randomization import mix, random_bits, random_words
from tensormill.numerics.qmc.sequence import Sequence

RANDOMIZATIONS = ("dp", "lms_ds", "lms", "ds", "nus", None)
_LARGEST = 1 - 2.0**-53
_LOW = 1024  # points in a table of the last digits, about
_CHUNK = 1 << 14


def primes(count: int) -> list[int]:
    """The first `count` primes."""
    if count < 1:
        return []
    limit = max(15, int(count * (math.log(count + 1) + math.log(math.log(count + 2) + 1) + 1)))
    sieve = torch.ones(limit + 1, dtype=torch.bool)
    sieve[:2] = False
    for p in range(2, math.isqrt(limit) + 1):
        if sieve[p]:
            sieve[p * p :: p] = False
    found: list[int] = sieve.nonzero().flatten().tolist()
    return found[:count]


class Halton(Sequence):
    """Halton sequence in the first d prime bases.

    Args:
        d: dimensions.
        randomize: "dp" (a random permutation of the digits at every position), "lms_ds" (random lower-triangular
            matrices and a digital shift), "lms", "ds", "nus" (nested: the permutation of a digit depends on all
            digits before it; its cost grows with the base) or None.
        replications: None, or the number of independent randomisations.
        seed: of the randomisation; None draws one from torch's generator.
        device: where points are made.
        dtype: of the points.

    Digits are randomised until base^digits is about 2^53; a point is exact to rounding and stays below 1.

    Raises:
        InvalidArgument: an argument out of range.

    Example:
        >>> from tensormill.numerics import qmc
        >>> qmc.Halton(1, randomize=None).sample(4)[:, 0]
        tensor([0.0000, 0.5000, 0.2500, 0.7500], dtype=torch.float64)
    """

    max_points = 1 << 40

    def __init__(
        self,
        d: int,
        *,
        randomize: str | None = "dp",
        replications: int | None = None,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ):
        super().__init__(d, replications=replications, seed=seed, device=device, dtype=dtype)
        if randomize not in RANDOMIZATIONS:
            raise InvalidArgument(
                f'given randomize={randomize!r}, expected "dp", "lms_ds", "lms", "ds", "nus" or None'
            )
        self.randomize = randomize
        self.bases = primes(d)
        # as many digits as give 53 bits, as long as an int64 holds them
        self.digits = [min(math.ceil(53 / b), int(62 / b)) for b in map(math.log2, self.bases)]
        self._random = [self._draw(j) for j in range(d)]

    def _draw(self, j: int) -> dict[str, Tensor]:
        """Permutations, matrices and shifts of a dimension, by replication."""
        base, digits, count = self.bases[j], self.digits[j], self._count

        def below(purpose: int, *shape: int, limit: int) -> Tensor:
            words = random_bits(self.seed, purpose + 16 * j, *shape, bits=40, device=self.device)
            return (words * limit) >> 40

        drawn: dict[str, Tensor] = {}
        if self.randomize == "dp":
            words = random_words(self.seed, 6 + 16 * j, count, digits, base, device=self.device)
            drawn["permutations"] = words.argsort(-1)
        if self.randomize in ("lms", "lms_ds"):
            lower = below(7, count, digits, digits, limit=base).tril(-1)
            diagonal = 1 + below(8, count, digits, limit=base - 1)
            drawn["matrices"] = lower + torch.diag_embed(diagonal)
        if self.randomize in ("ds", "lms_ds"):
            drawn["shifts"] = below(9, count, digits, limit=base)
        if self.randomize == "nus":
            drawn["keys"] = random_words(self.seed, 10 + 16 * j, count, device=self.device)
        return drawn

    def _powers(self, j: int) -> Tensor:
        """What a digit is worth in units of base^-digits; sums of them are exact, so their order doesn't matter."""
        base, digits = self.bases[j], self.digits[j]
        return torch.tensor([base ** (digits - 1 - k) for k in range(digits)], device=self.device)

    def _value(self, units: Tensor, j: int) -> Tensor:
        return units.double() * float(self.bases[j]) ** -self.digits[j]

    def _digits_of(self, index: Tensor, j: int) -> Tensor:
        """(n, digits), the last digit of the index first."""
        base = self.bases[j]
        powers = [base**k for k in range(self.digits[j]) if base**k < 1 << 62]
        found = (index.unsqueeze(-1) // torch.tensor(powers, device=self.device)) % base
        return torch.nn.functional.pad(found, (0, self.digits[j] - len(powers)))

    def _separable(self, j: int, n: int, start: int) -> Tensor:
        """Where each digit is changed by itself a point is a sum over digits: a table of the last ones plus another."""
        base, count = self.bases[j], self._count
        split = max(1, round(math.log(_LOW, base)))
        size = base**split
        drawn = self._random[j]
        powers = self._powers(j)
        positions = torch.arange(self.digits[j], device=self.device)

        def total(index: Tensor, part: slice) -> Tensor:
            digits = self._digits_of(index, j)[:, part]
            if "permutations" in drawn:
                changed = drawn["permutations"][:, positions[part], digits]
            elif "shifts" in drawn:
                changed = (digits + drawn["shifts"][:, None, part]) % base
            else:
                changed = digits.expand(count, -1, -1)
            return (changed * powers[part]).sum(-1)

        first, last = start // size, max(start, start + n - 1) // size
        low = total(torch.arange(size, device=self.device), slice(0, split))
        high = total(torch.arange(first, last + 1, device=self.device) * size, slice(split, None))
        offset = start - first * size
        return self._value((high.unsqueeze(-1) + low.unsqueeze(1)).flatten(1)[:, offset : offset + n], j)

    def _linear(self, j: int, n: int, start: int) -> Tensor:
        drawn, powers, base = self._random[j], self._powers(j), self.bases[j]
        used = max(1, math.ceil(math.log(max(2, start + n), base)) + 1)
        used = min(used, self.digits[j])
        parts = []
        for begin in range(start, start + n, _CHUNK):
            index = torch.arange(begin, min(begin + _CHUNK, start + n), device=self.device)
            digits = self._digits_of(index, j)[:, :used].double()
            mixed = digits @ drawn["matrices"][..., :used].double().mT  # exact: sums stay far below 2^53
            if "shifts" in drawn:
                mixed = mixed + drawn["shifts"].unsqueeze(1)
            parts.append((torch.remainder(mixed, base).long() * powers).sum(-1))
        return self._value(torch.cat(parts, 1), j)

    def _nested(self, j: int, n: int, start: int) -> Tensor:
        """A digit becomes its rank among the hashes that (digits before it, digit) have in its base."""
        base, count = self.bases[j], self._count
        keys = self._random[j]["keys"].view(count, 1)
        candidates = torch.arange(base, device=self.device)
        parts = []
        rows = max(1, _CHUNK * 4 // base)
        for begin in range(start, start + n, rows):
            index = torch.arange(begin, min(begin + rows, start + n), device=self.device)
            digits, powers = self._digits_of(index, j), self._powers(j)
            state = keys.expand(count, len(index))
            units = torch.zeros(count, len(index), dtype=torch.int64, device=self.device)
            for position in range(self.digits[j]):
                digit = digits[:, position].expand(count, -1).unsqueeze(-1)
                hashes = mix(mix(candidates + 1) ^ state.unsqueeze(-1))
                own = hashes.gather(-1, digit)
                units += (hashes < own).sum(-1) * powers[position]
                state = mix(own.squeeze(-1) + 1)
            parts.append(units)
        return self._value(torch.cat(parts, 1), j)

    def _values(self, n: int, start: int) -> Tensor:
        result = torch.empty(self._count, n, self.d, dtype=self.dtype, device=self.device)
        make = {"lms": self._linear, "lms_ds": self._linear, "nus": self._nested}
        for j in range(self.d):
            values = make.get(str(self.randomize), self._separable)(j, n, start) if n else None
            if values is not None:
                largest = _LARGEST if self.dtype == torch.float64 else 1 - 2.0**-24
                result[..., j] = values.clamp_max_(largest)
        return result

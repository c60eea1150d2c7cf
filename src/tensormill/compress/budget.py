"""What a compressed model may cost: `4.25bpw`, `9MB`, `ppl+2%`, `30tok/s`, or one of the first three with the last."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from tensormill.errors import InvalidArgument

EXPECTED = (
    "4.25bpw (bits per compressed weight), 9MB or 4.2GB (the checkpoint's weight files), ppl+2% (perplexity), "
    "30tok/s (decoding at batch 1), or one of the first three and a speed with a comma between"
)

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_BYTES = {name.lower(): factor for name, factor in _UNITS.items()}


@dataclass(frozen=True)
class Budget:
    """Limits that a search keeps; None where there is none.

    At most one of the first three. With `perplexity` the search looks for the smallest model, else for the best.

    Attributes:
        bits_per_weight: Average over the compressed weights, scales and zero points included.
        bytes: Of the checkpoint's weight files.
        perplexity: Tolerated increase as a share of the original's, above 0.
        tokens_per_second: Decoding at batch 1.

    Raises:
        InvalidArgument: No limit, two that exclude one another, or one that isn't a positive number.
    """

    bits_per_weight: float | None = None
    bytes: float | None = None
    perplexity: float | None = None
    tokens_per_second: float | None = None

    def __post_init__(self) -> None:
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            raise InvalidArgument(f"given no budget, expected {EXPECTED}")
        for name, value in given.items():
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise InvalidArgument(f"given {name}={value!r} as a budget, expected a number above 0")
        goals = [name for name in given if name != "tokens_per_second"]
        if len(goals) > 1:
            raise InvalidArgument(
                f"given a budget with {' and '.join(goals)}, expected one of them; each alone says how far to go"
            )

    def __str__(self) -> str:
        """As `parse_budget` reads it.

        >>> str(Budget(perplexity=0.02, tokens_per_second=30))
        'ppl+2%,30tok/s'
        """
        parts = []
        if self.bits_per_weight is not None:
            parts.append(f"{_plain(self.bits_per_weight)}bpw")
        if self.bytes is not None:
            unit = next((unit for unit in ("TB", "GB", "MB") if self.bytes >= _UNITS[unit]), "kB")
            parts.append(f"{_plain(self.bytes / _UNITS[unit])}{unit}")
        if self.perplexity is not None:
            parts.append(f"ppl+{_plain(self.perplexity * 100)}%")
        if self.tokens_per_second is not None:
            parts.append(f"{_plain(self.tokens_per_second)}tok/s")
        return ",".join(parts)

    @property
    def slug(self) -> str:
        """As part of a file's name.

        >>> Budget(perplexity=0.02, tokens_per_second=30).slug
        'ppl2-30toks'
        """
        return re.sub(r"[^\w.-]", "", str(self).replace(",", "-"))


def _plain(number: float) -> str:
    """At most twelve decimals and no exponent.

    >>> _plain(1e-05), _plain(30.0)
    ('0.00001', '30')
    """
    return f"{number:.12f}".rstrip("0").rstrip(".")


def parse_budget(text: str) -> Budget:
    """The budget that a user wrote.

    Example:
        >>> parse_budget("4.25bpw")
        Budget(bits_per_weight=4.25, bytes=None, perplexity=None, tokens_per_second=None)
        >>> parse_budget("9 MB, 30 tok/s")
        Budget(bits_per_weight=None, bytes=9000000.0, perplexity=None, tokens_per_second=30.0)

    Raises:
        InvalidArgument: Nothing that it could be; lists what it can.
    """
    found: dict[str, float] = {}
    for part in str(text).split(","):
        name, value = _limit(part.strip())
        if name in found:
            raise InvalidArgument(
                f"given the budget {text!r} with two limits of one kind, expected {EXPECTED}"
            )
        found[name] = value
    return Budget(**found)


def _limit(part: str) -> tuple[str, float]:
    patterns = {
        "bits_per_weight": rf"{_NUMBER}\s*bpw",
        "bytes": rf"{_NUMBER}\s*({'|'.join(_UNITS)})",
        "perplexity": rf"ppl\s*\+\s*{_NUMBER}\s*%",
        "tokens_per_second": rf"{_NUMBER}\s*(?:tok|tokens)/s",
    }
    for name, pattern in patterns.items():
        match = re.fullmatch(pattern, part, re.IGNORECASE)
        if match is not None:
            number = float(match[1])
            if name == "bytes":
                number *= _BYTES[match[2].lower()]
            return name, number / 100 if name == "perplexity" else number
    raise InvalidArgument(f"given {part!r} as a budget, expected {EXPECTED}")

"""Counts as people write them: "2T", "500B", "1.3e12", "4096"."""

from __future__ import annotations

import re

from skymoe.base.errors import printable

_POWERS = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}
_WRITTEN = re.compile(r"(\d{1,20}(?:\.\d{0,12})?(?:e[+]?\d{1,2})?)\s?([kmbgt]?)", re.IGNORECASE)
LARGEST = 1e18


def parse_count(written: object) -> float:
    """A positive count up to 10^18.

    Raises:
        ValueError: no number, not positive, too large.
    """
    if isinstance(written, (int, float)) and not isinstance(written, bool):
        number = float(written)
    else:
        match = _WRITTEN.fullmatch(written.strip().replace(",", "")) if isinstance(written, str) else None
        if match is None:
            raise ValueError(f"{printable(repr(written), 60)} is no count; write 2T, 500B or 1.3e12")
        number = float(match[1]) * 10 ** _POWERS[match[2].lower()]
    if not 0 < number <= LARGEST:
        raise ValueError(f"expected a count greater than 0 and at most {LARGEST:g}, got {printable(repr(written), 60)}")
    return number


def count_words(number: float) -> str:
    """The other way: 5e11 is 500B."""
    for power, unit in ((12, "T"), (9, "B"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.4g}{unit}"
    return f"{number:.4g}"

"""What differs between two JSON values, down to the key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


class Missing:
    """Stands for a key that one side does not have."""

    def __repr__(self) -> str:
        return "-"


MISSING = Missing()


@dataclass(frozen=True)
class Change:
    """One place where two values differ.

    Attributes:
        path: dotted path, list positions in brackets.
        left, right: what stands there; MISSING where there is nothing.
    """

    path: str
    left: Any
    right: Any


def changes(left: Any, right: Any, path: str = "") -> Iterator[Change]:
    """Every difference between two values of dicts, lists and plain items, in order of the keys.

    Items are compared by type and `repr`, which tells -0.0 from 0.0 and 1 from 1.0, and lets NaN equal itself.
    """
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted(left.keys() | right.keys()):
            below = f"{path}.{key}" if path else key
            yield from changes(left.get(key, MISSING), right.get(key, MISSING), below)
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            yield from changes(one, other, f"{path}[{index}]")
    elif type(left) is not type(right) or repr(left) != repr(right):
        yield Change(path, left, right)


def short(value: Any, limit: int = 60) -> str:
    """`repr` of a value, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."

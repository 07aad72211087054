"""Reading a file of published measurements, row by row; nothing in it is trusted.

A row says what was run (model, cluster, parallel, batch, precision, recompute) and what was measured. Rows come from
tables of many papers and vendors, so a field may be absent, null, a word instead of a number, or of a meaning that we
have never seen. A broken *file* is refused as a whole; a broken *row* is set aside with the reason, and so is whatever
a row asks for that nobody here can judge. Fields are read only through `number`, `count`, `text`, `flag`, which bound
what they return and raise `NotJudgedError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skymoe.base.errors import FormatError, printable
from skymoe.base.strict_json import read_json

_MAX_BYTES = 64 * 2**20
_MAX_CASES = 20_000
_LARGEST = 1e18  # beyond any byte, token or FLOP/s count of a row


class NotJudgedError(Exception):
    """Why a case, or one of its figures, cannot be compared. Never reaches the user as an error."""


@dataclass(frozen=True)
class NotJudged:
    """A case that is set aside.

    Attributes:
        case: its id.
        group: its group.
        reason: why.
    """

    case: str
    group: str
    reason: str


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        id, kind, group: as the file has them, printable.
        fields: the row itself, unchecked; read it through the methods, with dotted paths ("model.moe.top_k").
    """

    id: str
    kind: str
    group: str
    fields: Mapping[str, Any] = field(repr=False)

    def get(self, path: str) -> Any:
        """The raw value, None where anything on the way is absent."""
        value: Any = self.fields
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def number(self, path: str, default: float | None = None, *, low: float = 0.0, high: float = _LARGEST) -> float:
        """A number in [low, high]; `default` where there is none. Raises NotJudgedError."""
        value = self.get(path)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise NotJudgedError(f"{path} is {_said(value)}")
        if not low <= value <= high:
            raise NotJudgedError(f"{path} is {_said(value)}, outside [{low:g}, {high:g}]")
        return float(value)

    def count(self, path: str, default: int | None = None, *, low: int = 1, high: int = 10**7) -> int:
        """A whole number in [low, high]; `default` where there is none. Raises NotJudgedError."""
        number = self.number(path, default, low=low, high=high)
        if number != int(number):
            raise NotJudgedError(f"{path} is {_said(number)}, not a whole number")
        return int(number)

    def numbers(self, path: str, *, most: int = 1024) -> tuple[float, ...]:
        """A list of numbers that are not negative. Raises NotJudgedError."""
        value = self.get(path)
        if not isinstance(value, list) or not 1 <= len(value) <= most:
            raise NotJudgedError(f"{path} is {_said(value)}, not a list of 1 to {most} numbers")
        if any(isinstance(item, bool) or not isinstance(item, (int, float)) for item in value):
            raise NotJudgedError(f"{path} holds what is not a number")
        if not all(0 <= item <= _LARGEST for item in value):
            raise NotJudgedError(f"{path} holds a number that is negative or too large")
        return tuple(float(item) for item in value)

    def text(self, path: str, default: str = "") -> str:
        """Words, printable and at most 300 characters; `default` where there are none."""
        value = self.get(path)
        return printable(value) if isinstance(value, str) else default

    def flag(self, path: str, default: bool) -> bool:
        """Yes or no; `default` where there is neither."""
        value = self.get(path)
        return value if isinstance(value, bool) else default

    def has(self, path: str) -> bool:
        """Whether there is a number, a word, a list, .. at all."""
        return self.get(path) is not None


def _said(value: object) -> str:
    return "absent" if value is None else printable(repr(value), 60)


def read_cases(path: Path) -> tuple[tuple[Case, ...], tuple[NotJudged, ...]]:
    """The rows of `path`, and those that are not rows.

    Args:
        path: JSON: a list of objects, or an object with such a list under "cases".

    Raises:
        FormatError: no such file, not strict JSON, no list of rows, or too many of them.
    """
    content = read_json(path, max_bytes=_MAX_BYTES)
    rows = content.get("cases") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise FormatError("there is no list of cases", where=path, hint='a JSON list of objects, or {"cases": [...]}')
    if len(rows) > _MAX_CASES:
        raise FormatError(f"{len(rows)} cases are more than {_MAX_CASES}", where=path)
    return check_cases(rows)


def check_cases(rows: Sequence[object]) -> tuple[tuple[Case, ...], tuple[NotJudged, ...]]:
    """Rows as Cases; what is no object, or has no kind or group, or an id that was there before, is set aside."""
    cases: list[Case] = []
    refused: list[NotJudged] = []
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            refused.append(NotJudged(f"row {number}", "?", "not an object"))
            continue
        names = {key: row.get(key) for key in ("id", "kind", "group")}
        words = {key: printable(name, 120) for key, name in names.items() if isinstance(name, str) and name}
        missing = [key for key in names if key not in words]
        label, group = words.get("id", f"row {number}"), words.get("group", "?")
        if missing:
            refused.append(NotJudged(label, group, f"no {', no '.join(missing)}"))
        elif label in seen:
            refused.append(NotJudged(label, group, "the id appears twice"))
        else:
            seen.add(label)
            cases.append(Case(label, words["kind"], group, row))
    return tuple(cases), tuple(refused)

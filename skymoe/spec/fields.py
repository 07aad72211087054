"""Fields: a foreign mapping read one field at a time, each type-checked.

A `config.json` is written by strangers. Every value we use passes through here, so that a string where a number is
meant, a NaN, a negative size or 1e18 becomes one clear error naming the file and the field, never a crash later or a
model that is silently another one. JSON's booleans are not numbers here, and numbers are not booleans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from skymoe.base.errors import FormatError, printable

MAX_COUNT = 2**31 - 1
_MAX_LIST = 100_000  # entries of a list field: far above any number of layers


class Fields:
    """Read access to `mapping`; remembers which fields were asked for.

    A field that is absent or null takes the default; without a default it is an error.

    Args:
        mapping: parsed JSON object.
        where: the file, named in errors.
        prefix: dotted path of `mapping` within the file, ending in a dot, or empty.
    """

    def __init__(self, mapping: Mapping[str, object], where: object, prefix: str = "") -> None:
        self._mapping, self._where, self._prefix = mapping, where, prefix
        self._asked: set[str] = set()
        self._sections: dict[str, Fields] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the field is present and not null."""
        return self.raw(name) is not None

    def has(self, name: str) -> bool:
        """Whether the field is present, null included."""
        return name in self._mapping

    def raw(self, name: str) -> object:
        """The field as it is, None when absent."""
        self._asked.add(name)
        return self._mapping.get(name)

    def error(self, name: str, problem: str, *, why: str = "", hint: str = "") -> FormatError:
        """An error that names the field and the file. The caller raises it."""
        return FormatError(f"{self._prefix}{name} {problem}", where=self._where, why=why, hint=hint)

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A whole number in [minimum, 2**31 - 1]; 4096.0 is accepted as 4096."""
        value = self._value(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value) if abs(value) <= MAX_COUNT else value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"must be a whole number, got {_show(value)}")
        if not minimum <= value <= MAX_COUNT:
            raise self.error(name, f"must be between {minimum} and {MAX_COUNT}, got {_show(value)}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, f"must be a number, got {_show(value)}")
        if abs(value) > 1e30 or not math.isfinite(value):
            raise self.error(name, f"must be a finite number, got {_show(value)}")
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, got {_show(value)}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A short string."""
        value = self._value(name, default)
        if not isinstance(value, str) or len(value) > 1000:
            raise self.error(name, f"must be a short string, got {_show(value)}")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of non-negative whole numbers; one number counts as a list of one; absent is empty."""
        value = self.raw(name)
        items = [] if value is None else value if isinstance(value, list) else [value]
        self._bound(name, items)
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item <= MAX_COUNT:
                raise self.error(name, f"must hold non-negative whole numbers, found {_show(item)}")
        return tuple(items)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of short strings; absent is empty."""
        value = self.raw(name)
        items = [] if value is None else value
        if not isinstance(items, list):
            raise self.error(name, f"must be a list, got {_show(value)}")
        self._bound(name, items)
        for item in items:
            if not isinstance(item, str) or len(item) > 1000:
                raise self.error(name, f"must hold strings, found {_show(item)}")
        return tuple(items)

    def section(self, name: str) -> Fields | None:
        """A nested object, None when absent."""
        value = self.raw(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"must be an object, got {_show(value)}")
        return self._sections.setdefault(name, Fields(value, self._where, f"{self._prefix}{name}."))

    def unread(self) -> dict[str, object]:
        """The fields nobody asked for, those of sections by their dotted names."""
        own = {name: value for name, value in self._mapping.items() if name not in self._asked}
        for prefix, section in self._sections.items():
            own |= {f"{prefix}.{name}": value for name, value in section.unread().items()}
        return dict(sorted(own.items()))

    def _value(self, name: str, default: object) -> object:
        value = self.raw(name)
        if value is not None:
            return value
        if default is None:
            raise self.error(name, "is missing")
        return default

    def _bound(self, name: str, items: Sequence[object]) -> None:
        if len(items) > _MAX_LIST:
            raise self.error(name, f"has {len(items)} entries, more than {_MAX_LIST}")


def _show(value: object) -> str:
    return printable(repr(value) if not isinstance(value, (list, dict)) else type(value).__name__, 80)

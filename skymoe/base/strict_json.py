"""JSON from strangers: a bounded file, no NaN, no duplicate keys, no runaway nesting.

Python's own parser accepts `NaN` and `Infinity`, and lets the last of two equal keys win; two readers of one file can
then see two different models. A model directory comes from anywhere, so we read it more strictly than the standard
library does. Whatever is wrong becomes a FormatError that names the file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from skymoe.base.errors import FormatError, printable
from skymoe.base.inside import read_bounded

_MAX_DEPTH = 32


def read_json(path: Path, *, max_bytes: int) -> Any:
    """The content of the JSON file `path`.

    Raises:
        FormatError: no regular file, larger than `max_bytes`, not UTF-8, not JSON, NaN or infinity, a duplicate key.
    """
    return parse_json(read_bounded(path, max_bytes=max_bytes), where=path)


def read_json_object(path: Path, *, max_bytes: int) -> dict[str, Any]:
    """Like `read_json`, and the file must hold an object.

    Raises:
        FormatError: as `read_json`, or the file holds a list, a string, a number.
    """
    content = read_json(path, max_bytes=max_bytes)
    if not isinstance(content, dict):
        raise FormatError(f"expected a JSON object, found {type(content).__name__}", where=path)
    return content


def parse_json(data: bytes, *, where: object) -> Any:
    """`data` parsed strictly; `where` is named in errors. Raises FormatError."""
    try:
        value = json.loads(
            data.decode("utf-8"), parse_float=_finite, parse_constant=_refuse_constant, object_pairs_hook=_unique
        )
    except RecursionError as error:
        raise FormatError("this JSON is nested too deeply", where=where) from error
    except UnicodeDecodeError as error:
        raise FormatError(f"this is not UTF-8 (byte {error.start})", where=where) from error
    except ValueError as error:
        raise FormatError(f"this is not valid JSON: {printable(error)}", where=where) from error
    _check_depth(value, where)
    return value


def _check_depth(value: Any, where: object) -> None:
    """Whoever walks the value, or writes it again, may recurse: how deep the parser went depends on its version."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        parts = [item for item in level if type(item) in (dict, list)]
        if not parts:
            return
        level = [child for item in parts for child in (item.values() if type(item) is dict else item)]
    if any(type(item) in (dict, list) for item in level):
        raise FormatError(f"this JSON is nested more than {_MAX_DEPTH} levels deep", where=where)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # 1e400: no number of ours, and it could not be written again
        raise ValueError(f"the number {printable(text, 40)} is too large")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {printable(twice, 60)!r} appears twice in one object")
    return content

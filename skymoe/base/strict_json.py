"""JSON from strangers: a bounded file, no NaN, no duplicate keys, no runaway nesting.

Python's own parser accepts `NaN` and `Infinity`, and lets the last of two equal keys win; two readers of one file can
then see two different models. A model directory comes from anywhere, so we read it more strictly than the standard
library does. Whatever is wrong becomes a FormatError that names the file.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, NoReturn

from skymoe.base.errors import FormatError, printable


def read_json(path: Path, *, max_bytes: int) -> Any:
    """The content of the JSON file `path`.

    Raises:
        FormatError: no regular file, larger than `max_bytes`, not UTF-8, not JSON, NaN or infinity, a duplicate key.
    """
    return parse_json(_read_bounded(path, max_bytes), where=path)


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
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError as error:
        raise FormatError("this JSON is nested too deeply", where=where) from error
    except UnicodeDecodeError as error:
        raise FormatError(f"this is not UTF-8 (byte {error.start})", where=where) from error
    except ValueError as error:
        raise FormatError(f"this is not valid JSON: {printable(error)}", where=where) from error


def _read_bounded(path: Path, max_bytes: int) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a FIFO or a device would never end
            raise FormatError("this is not a regular file", where=path)
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise FormatError("there is no such file", where=path) from error
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", where=path) from error
    if len(data) > max_bytes:
        raise FormatError(f"the file is larger than {max_bytes} bytes", where=path, why="no honest file of its kind is")
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {printable(twice, 60)!r} appears twice in one object")
    return content

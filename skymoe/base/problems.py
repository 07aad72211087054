"""Turns pydantic's list of errors into one message a person can act on.

For example:

    recipe.yaml: 2 problems
      recipe.yaml:7: train.lrr: unknown key; did you mean "lr"?
      command line: steps: expected a whole number, got 'ten'
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from skymoe.base.document import Document, Key
from skymoe.base.errors import ConfigError, SkymoeError, printable

_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section with keys",
    "model_type": "a section with keys",
    "none_required": "null",
}


def explain(error: ValidationError, cls: type[BaseModel], document: Document, name: str) -> ConfigError:
    """The ConfigError that tells everything in `error`; `name` is what was read."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for item in error.errors(include_url=False):
        key = written_key(document.data, item["loc"])
        place = document.place(key)
        if item["type"] == "missing":
            key = (*key, item["loc"][-1])
        grouped.setdefault((place, ".".join(map(str, key))), []).append(_tell(item, cls, key))
    lines = [
        f"{printable(path)}: {' or '.join(dict.fromkeys(told))}"
        if path and not place.startswith("--")
        else " or ".join(dict.fromkeys(told))
        for (place, path), told in grouped.items()
    ]
    places = [place for place, _ in grouped]
    if len(lines) == 1:
        return ConfigError(lines[0], where=places[0] or name)
    listed = [f"  {printable(place or name, 500)}: {line}" for place, line in zip(places, lines, strict=True)]
    return ConfigError(f"{len(lines)} problems\n" + "\n".join(listed), where=name)


def written_key(data: Any, loc: tuple[int | str, ...]) -> Key:
    """The part of pydantic's location that the user wrote; it also names the members of unions."""
    key: Key = ()
    for step in loc:
        there = step in data if isinstance(data, dict) else isinstance(data, list) and isinstance(step, int)
        if there:
            key, data = (*key, step), data[step]
    return key


def _tell(item: ErrorDetails, cls: type[BaseModel], key: Key) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return "unknown key" + _nearest_key(cls, key)
    if kind == "missing":
        return "this key is required"
    cause = context.get("error")
    if isinstance(cause, SkymoeError):
        return cause.what + (f" ({cause.hint})" if cause.hint else "")
    if isinstance(cause, ValueError):
        return str(cause)
    got = printable(repr(item["input"]), 80)
    if kind in ("enum", "literal_error"):
        near = difflib.get_close_matches(str(item["input"]), re.findall(r"'([^']*)'", context["expected"]), n=1)
        return f"expected {context['expected']}, got {got}" + (f'; did you mean "{near[0]}"?' if near else "")
    expected = _EXPECTED.get(kind)
    return f"expected {expected}, got {got}" if expected else f"{item['msg'][:1].lower()}{item['msg'][1:]}, got {got}"


def _nearest_key(cls: type[BaseModel], key: Key) -> str:
    """A hint for an unknown key: a similar name here, the same name in another section, or all names here."""
    valid = _keys_at(cls, key[:-1])
    near = [path for path in _all_keys(cls) if path.rpartition(".")[2] == str(key[-1])]
    near += difflib.get_close_matches(str(key[-1]), valid, n=1, cutoff=0.5)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; the keys here are {', '.join(valid)}" if valid else ""


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The models inside an annotation such as `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]


def _keys_at(cls: type[BaseModel], key: Key) -> list[str]:
    """Valid keys of the section at `key`."""
    here = [cls]
    for step in key:
        if isinstance(step, str):
            fields = [section.model_fields[step] for section in here if step in section.model_fields]
            here = [section for field in fields for section in _sections(field.annotation)]
    return [name for section in here for name in section.model_fields]


def _all_keys(cls: type[BaseModel], prefix: str = "", depth: int = 6) -> Iterator[str]:
    for name, field in cls.model_fields.items():
        yield prefix + name
        for section in _sections(field.annotation) if depth else ():
            yield from _all_keys(section, f"{prefix}{name}.", depth - 1)

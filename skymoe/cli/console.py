"""How results reach standard output: JSON for programs, a table for people. Everything else goes to standard error."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from skymoe.base.errors import printable

_WIDTH_OF_A_PIPE = 120  # rich would cut tables to 80 columns where there is no terminal


def standard_output() -> Console:
    """A console on standard output; colour and width are the terminal's, where there is one."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_OF_A_PIPE)


def print_json(report: object) -> None:
    """Print a report as JSON. Numbers that JSON does not know (NaN, infinity) become null."""
    print(json.dumps(plain(report), indent=2, allow_nan=False, ensure_ascii=False))


def plain(value: object) -> Any:
    """`value` as dicts, lists, text, numbers, truth values and None."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"a report must be plain data, got {type(value).__name__}")


def print_report(report: object) -> None:
    """Print any report as `name  value` lines; what is None or empty is left out."""
    grid = Table.grid(padding=(0, 2))
    for name, value in _pairs(plain(report)):
        grid.add_row(Text(name, style="bold"), Text(_cell(value)))
    standard_output().print(grid)


def _pairs(data: Any, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Leaves of nested data by dotted name; a list of plain items is one line."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _pairs(value, f"{prefix}.{name}" if prefix else name)
    elif isinstance(data, list) and any(isinstance(item, (dict, list)) for item in data):
        for index, value in enumerate(data):
            yield from _pairs(value, f"{prefix}.{index}")
    elif isinstance(data, list):
        if data:
            yield prefix, ", ".join(_cell(item) for item in data)
    elif data is not None and data != "":
        yield prefix, data


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(value, 2000)

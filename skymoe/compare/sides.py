"""Opening the two directories: as models where both are, by the names in their files where neither is."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skymoe.base.dtype import DType
from skymoe.base.errors import FormatError
from skymoe.compare.config import CompareConfig
from skymoe.compare.pairs import logical_names, raw_names
from skymoe.convert.parents import open_parent
from skymoe.convert.plan import Source
from skymoe.spec.hf import CONFIG_NAME, read_config
from skymoe.spec.model import ModelSpec
from skymoe.weights.reader import WeightsReader

_HINT = "--raw compares the tensors by their names alone"


@dataclass(frozen=True)
class Side:
    """One directory, open for reading.

    Attributes:
        directory: where it is.
        spec: what it is; None in raw mode.
        reader: its tensors; in raw mode as they are stored, else FP8 is decoded to fp32, which is exact.
        names: logical place (in raw mode the name in the files) to where the values are.
        document: its config.json; empty when there is none.
    """

    directory: Path
    spec: ModelSpec | None
    reader: WeightsReader
    names: Mapping[str, Source]
    document: Mapping[str, Any]


def open_sides(config: CompareConfig, stack: ExitStack) -> tuple[Side, Side, tuple[str, ...]]:
    """A, B, and notes on how they were opened; `stack` closes them.

    Raises:
        FormatError: a directory is broken or hostile, or only one of the two is a model that we know.
    """
    if config.raw:
        return _open_raw(config.left, 0, stack), _open_raw(config.right, 1, stack), ()
    sides: list[Side] = []
    problems: list[FormatError] = []
    for number, path in enumerate((config.left, config.right)):
        try:
            sides.append(_open_model(path, number, stack))
        except FormatError as error:
            problems.append(error)
    if not problems:
        return sides[0], sides[1], ()
    if sides or config.experts:
        first = problems[0]
        raise FormatError(first.what, where=first.where, why=first.why, hint=first.hint or _HINT) from first
    raw = _open_raw(config.left, 0, stack), _open_raw(config.right, 1, stack)
    notes = (f"compared by the names in the files: {problem.where}: {problem.what}" for problem in problems)
    return *raw, tuple(dict.fromkeys(notes))


def _open_model(path: Path, number: int, stack: ExitStack) -> Side:
    parent = stack.enter_context(open_parent(path, number, decode_to=DType.FLOAT32))
    return Side(path, parent.spec, parent.reader, logical_names(parent.sources), read_config(path))


def _open_raw(path: Path, number: int, stack: ExitStack) -> Side:
    reader = stack.enter_context(WeightsReader(path))
    document = read_config(path) if (path / CONFIG_NAME).exists() else {}
    return Side(path, None, reader, raw_names(reader.names(), number), document)

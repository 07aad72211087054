"""Two states, tensor by tensor and document by document, in constant memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from skymoe.base.errors import CheckpointError, ConfigError
from skymoe.base.json_diff import MISSING, changes, short
from skymoe.base.strict_json import read_json_object
from skymoe.ckpt.places import find_newest, is_generation, is_model
from skymoe.ckpt.result import Difference
from skymoe.ckpt.values import count_different, max_abs_difference
from skymoe.weights.header import TensorFile, TensorInfo
from skymoe.weights.index import ModelFiles
from skymoe.weights.manifest import file_name
from skymoe.weights.stored import catalogue
from skymoe.weights.verify import check_cover, check_files

_MAX_CONFIG_BYTES = 10_000_000


class Readable(Protocol):
    """A whole tensor, however it is stored."""

    @property
    def info(self) -> TensorInfo:
        """Dtype and shape."""
        ...

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes, row-major, in parts of equal sizes for equal dtypes and shapes."""
        ...


@dataclass(frozen=True)
class _InFile:
    """A tensor of a model's file."""

    file: TensorFile
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.file.header.tensors[self.name]

    def chunks(self) -> Iterator[memoryview]:
        return self.file.chunks(self.name)


@dataclass(frozen=True)
class Side:
    """One state, open for reading.

    Attributes:
        path: the directory it is in.
        tensors: `file:tensor` (in a model just the tensor) -> the whole tensor. In a generation `file` is the one that
            a single process would have written, so that two layouts of a state are equal.
        documents: file name -> content.
    """

    path: Path
    tensors: Mapping[str, Readable]
    documents: Mapping[str, Any]


def open_sides(left: Path, right: Path, stack: ExitStack) -> tuple[Side, Side]:
    """Both states; the files are closed by `stack`.

    Raises:
        ConfigError: one is a model and the other a checkpoint.
        CheckpointError, FormatError: there is nothing to compare, or it is broken.
    """
    kinds = [is_model(path) and not is_generation(path) for path in (left, right)]
    if kinds[0] != kinds[1]:
        model, other = (left, right) if kinds[0] else (right, left)
        why = "their tensors have other names"
        raise ConfigError(f"{model} is a model and {other} a checkpoint", why=why, hint="compare like with like")
    if kinds[0]:
        return _open_model(left, stack), _open_model(right, stack)
    return _open_generation(left), _open_generation(right)


def _open_model(path: Path, stack: ExitStack) -> Side:
    files = stack.enter_context(ModelFiles(path))
    config = path / "config.json"
    documents = {"config.json": read_json_object(config, max_bytes=_MAX_CONFIG_BYTES)} if config.exists() else {}
    return Side(path, {name: _InFile(file, name) for name, file in files.shards.items()}, documents)


def _open_generation(path: Path) -> Side:
    one = find_newest(path)
    problems = list(one.problems) or check_cover(one) + check_files(one)
    if problems or one.manifest is None:
        raise CheckpointError(f"cannot be compared: {problems[0]}", where=one.path, hint=f"skymoe ckpt verify {path}")
    stored = catalogue(one.path, one.manifest.files)
    tensors = {
        f"{file_name(stem, None)}:{name}": tensor
        for stem, content in stored.items()
        for name, tensor in content.items()
    }
    documents = {name: _read_document(one.path / name) for name in sorted(one.manifest.files) if name.endswith(".json")}
    return Side(one.path, tensors, documents)


def _read_document(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())  # ours, so NaN may be in it
    except (ValueError, RecursionError) as error:
        raise CheckpointError("damaged: this is not JSON", where=path) from error


def compare_tensors(left: Side, right: Side) -> Iterator[Difference]:
    """What differs among the tensors, in order of name."""
    for name in sorted(left.tensors.keys() | right.tensors.keys()):
        if name not in right.tensors:
            yield Difference(name, "only left")
        elif name not in left.tensors:
            yield Difference(name, "only right")
        else:
            yield from _compare_tensor(name, left.tensors[name], right.tensors[name])


def _compare_tensor(name: str, left: Readable, right: Readable) -> Iterator[Difference]:
    a, b = left.info, right.info
    if a.dtype != b.dtype:
        yield Difference(name, "dtype", f"{a.dtype} / {b.dtype}")
    if a.shape != b.shape:
        yield Difference(name, "shape", f"{list(a.shape)} / {list(b.shape)}")
    if a != b:
        return
    num_different, max_abs = 0, 0.0
    for one, other in zip(left.chunks(), right.chunks(), strict=True):
        if found := count_different(one, other, a.dtype):
            num_different += found
            max_abs = max(max_abs, max_abs_difference(one, other, a.dtype))
    if num_different:
        yield Difference(name, "bits", f"{num_different} of {a.num_elements} elements", max_abs, num_different)


def compare_documents(left: Side, right: Side) -> Iterator[Difference]:
    """What differs among the JSON documents, down to the key."""
    for name in sorted(left.documents.keys() | right.documents.keys()):
        one, other = left.documents.get(name, MISSING), right.documents.get(name, MISSING)
        for change in changes(one, other):
            yield _document_difference(f"{name}:{change.path}", change.left, change.right)


def is_circumstance(difference: Difference, patterns: tuple[str, ...]) -> bool:
    """Whether it is one of the things that may differ between equal states: a clock, a path."""
    key = difference.name.partition(":")[2]
    return any(fnmatchcase(key, pattern) or fnmatchcase(key, f"{pattern}.*") for pattern in patterns)


def _document_difference(name: str, one: Any, other: Any) -> Difference:
    if one is MISSING or other is MISSING:
        return Difference(name, "only right" if one is MISSING else "only left")
    return Difference(name, "value", f"{short(one)} / {short(other)}", _distance(one, other))


def _distance(one: Any, other: Any) -> float | None:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (one, other))
    return abs(float(one) - float(other)) if numbers else None

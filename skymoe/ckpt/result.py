"""The answers of `skymoe ckpt`, schema 1: plain data, printed by `table.show` or as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class GenerationRow:
    """One line of `ckpt ls`.

    Attributes:
        name: the directory.
        step: training step.
        created: when it was published, UTC, ISO 8601.
        num_bytes, num_tensors: of all files.
        newest: resuming would try this one first.
        status: "ok" when manifest, set of files and sizes agree (hashes are read by `verify`), else what is wrong.
    """

    name: str
    step: int
    created: str
    num_bytes: int
    num_tensors: int
    newest: bool
    status: str


@dataclass(frozen=True)
class LsReport:
    """`ckpt ls`: the generations, newest first, and what else lies there (left by a kill, or damaged)."""

    root: str
    generations: tuple[GenerationRow, ...]
    notes: tuple[str, ...]
    schema: int = 1

    @property
    def exit_code(self) -> int:
        """Always 0: a listing is not a verdict."""
        return 0

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class VerifyProblem:
    """One thing that is not as it was saved: the file, the tensor in it (or ""), and what."""

    file: str
    tensor: str
    what: str


@dataclass(frozen=True)
class VerifyReport:
    """`ckpt verify`.

    Attributes:
        path: what was asked for.
        checked: the generations or files that were read.
        num_bytes: how many bytes were read.
        hashed: whether every byte was compared with a hash; a model directory has none, only its form is checked.
        problems: everything found.
        notes: what is no damage but worth knowing.
    """

    path: str
    checked: tuple[str, ...]
    num_bytes: int
    hashed: bool
    problems: tuple[VerifyProblem, ...]
    notes: tuple[str, ...]
    schema: int = 1

    @property
    def exit_code(self) -> int:
        """0 intact, 1 damaged."""
        return 1 if self.problems else 0

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    Attributes:
        name: `file:tensor`, or `file:key.path` of a document.
        what: "only left", "only right", "dtype", "shape", "bits" or "value".
        detail: the two sides in words.
        max_abs: largest absolute difference of numbers (NaN against a number is infinite), else None.
        num_elements: how many elements differ in their bits.
    """

    name: str
    what: str
    detail: str = ""
    max_abs: float | None = None
    num_elements: int = 0


@dataclass(frozen=True)
class DiffReport:
    """`ckpt diff`.

    Attributes:
        left, right: the directories that were compared.
        num_tensors: tensors present on both sides.
        num_bytes: bytes compared.
        differences: everything that differs in the state.
        circumstances: what differs and is no part of the state (`DiffConfig.circumstances`).
    """

    left: str
    right: str
    num_tensors: int
    num_bytes: int
    differences: tuple[Difference, ...]
    circumstances: tuple[Difference, ...] = ()
    schema: int = 1

    @property
    def exit_code(self) -> int:
        """0 bit-equal, 1 different."""
        return 1 if self.differences else 0

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class ReshardReport:
    """`ckpt reshard`.

    Attributes:
        source: the generation that was read.
        out: the generation that was written.
        step: of both.
        layout: of `out`, as its manifest has it.
        num_files, num_bytes, num_tensors: of `out`; tensors are counted whole.
    """

    source: str
    out: str
    step: int
    layout: dict[str, Any]
    num_files: int
    num_bytes: int
    num_tensors: int
    schema: int = 1

    @property
    def exit_code(self) -> int:
        """0: it was written."""
        return 0

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class ExportReport:
    """`ckpt export`.

    Attributes:
        source: the generation that was read.
        out: the model directory.
        step: of the generation.
        architecture: of the model as it was written.
        dtype: of its weights.
        files: names of everything in `out`.
        num_bytes: of all files.
        notes: newer generations that were passed over, a tokenizer that was not found.
    """

    source: str
    out: str
    step: int
    architecture: str
    dtype: str
    files: tuple[str, ...]
    num_bytes: int
    notes: tuple[str, ...]
    schema: int = 1

    @property
    def exit_code(self) -> int:
        """0: it was written."""
        return 0

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)

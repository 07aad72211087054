"""CompareReport: the answer of `skymoe merge-check`. `as_json()` is a stable schema, number 1 (docs/compare.md)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

SCHEMA = 1


class Verdict(StrEnum):
    """How two tensors compare."""

    SAME = "same"  # the same bits
    VALUES = "values"  # the same values in another number format, or +0 for -0
    DIFFERENT = "different"
    SHAPE = "shape"  # cannot be compared
    ONLY_LEFT = "only A"
    ONLY_RIGHT = "only B"
    NOTHING = "adds nothing"  # only in one of the models, where it computes exactly zero


@dataclass(frozen=True)
class TensorRow:
    """One tensor, or one pair of them.

    Attributes:
        name: its place in the model (`layers.3.moe.experts.0.up`), or in raw mode its name in the files.
        verdict: how the two compare.
        equal: it makes no difference for the exit code: same bits, within the tolerance, expected to be missing,
            or without effect.
        left, right: names in the files of A and B; "" where there is none.
        left_dtype, right_dtype, left_shape, right_shape: the same for number format and shape.
        max_abs: largest |A - B|; None where nothing was computed. Infinite: a number against NaN or infinity.
        relative_max: max_abs / largest |A|, what the tolerance is held against.
        relative_rms: |A - B| / |A|, Euclidean norms.
        cosine: of A and B as vectors; 0 where one is all zeros.
        num_different: how many elements differ in value.
    """

    name: str
    verdict: Verdict
    equal: bool
    left: str
    right: str
    left_dtype: str
    right_dtype: str
    left_shape: tuple[int, ...]
    right_shape: tuple[int, ...]
    max_abs: float | None = None
    relative_max: float | None = None
    relative_rms: float | None = None
    cosine: float | None = None
    num_different: int | None = None


@dataclass(frozen=True)
class ExpertRow:
    """One expert of B against the dense feed-forward of A: its three matrices together.

    Attributes:
        layer, expert: which one.
        same: the same bits.
        max_abs, relative_rms, cosine: as in TensorRow.
    """

    layer: int
    expert: int
    same: bool
    max_abs: float
    relative_rms: float
    cosine: float


@dataclass(frozen=True)
class FieldRow:
    """A field that differs between the configs.

    Attributes:
        name: dotted name in ModelSpec, or `config.json:KEY`.
        left, right: the values in words.
        equal: it changes nothing in what the model computes, or is expected; the exit code passes over it.
    """

    name: str
    left: str
    right: str
    equal: bool


@dataclass(frozen=True)
class CompareReport:
    """Everything `skymoe merge-check` found.

    Attributes:
        schema: version of this layout.
        left, right: the directories.
        left_architecture, right_architecture: on disk; "" in raw mode.
        raw: tensors were paired by their names in the files.
        tolerance: as asked.
        tensors: every pair, in the order of A's files, then what only B has.
        experts: one row per expert, when experts were compared with a dense feed-forward and have its shape.
        fields: what differs between the configs.
        notes: what the user should know.
        bytes_read: of both models.
        seconds: in all.
    """

    schema: int
    left: str
    right: str
    left_architecture: str
    right_architecture: str
    raw: bool
    tolerance: float | None
    tensors: tuple[TensorRow, ...]
    experts: tuple[ExpertRow, ...]
    fields: tuple[FieldRow, ...]
    notes: tuple[str, ...]
    bytes_read: int
    seconds: float

    @property
    def equal(self) -> bool:
        """Whether no tensor and no field makes a difference."""
        return all(row.equal for row in self.tensors) and all(row.equal for row in self.fields)

    @property
    def exit_code(self) -> int:
        """0 equal, 1 different."""
        return 0 if self.equal else 1

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors there are of each verdict."""
        found = Counter(row.verdict for row in self.tensors)
        return {verdict.value: found[verdict] for verdict in Verdict if found[verdict]}

    def as_json(self) -> dict[str, Any]:
        """Plain data for `--json`, with `equal` and `counts`; infinite figures are the text "inf"."""
        return _finite({**asdict(self), "equal": self.equal, "counts": self.counts})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return "inf" if isinstance(value, float) and not math.isfinite(value) else value

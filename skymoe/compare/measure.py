"""One pair of tensors, read block of rows by block of rows.

The first pass only asks whether the bits are the same and stops where they are not; only then a second pass computes
how far apart the values are. So equal models are compared at the speed of reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from skymoe.compare.pairs import Pair
from skymoe.compare.result import TensorRow, Verdict
from skymoe.convert.plan import Source
from skymoe.ops.distance import Distance, distance, same_bits
from skymoe.weights.reader import WeightsReader


def compare_pair(
    pair: Pair,
    left: WeightsReader,
    right: WeightsReader,
    *,
    tolerance: float | None,
    block_bytes: int,
    unused: bool = False,
) -> tuple[TensorRow, Distance | None]:
    """The row of `pair`, and the distance of its tensors where they have one shape.

    Args:
        pair: what to compare.
        left, right: the models.
        tolerance: see CompareConfig.
        block_bytes: the most bytes of one tensor held at a time, in fp64.
        unused: the tensor has no partner and adds nothing (`unused.py`).
    """
    if pair.left is None or pair.right is None:
        verdict = Verdict.ONLY_RIGHT if pair.left is None else Verdict.ONLY_LEFT
        return _row(pair, Verdict.NOTHING if unused else verdict, equal=pair.expected or unused), None
    if pair.left.shape != pair.right.shape:
        return _row(pair, Verdict.SHAPE, equal=False), None
    rows = _rows_of_a_block(pair.left.shape, block_bytes)
    if pair.left.dtype == pair.right.dtype and all(same_bits(a, b) for a, b in _blocks(pair, left, right, rows)):
        return _row(pair, Verdict.SAME, equal=True, found=Distance()), _zero(pair, left, right, rows)
    found = sum((distance(a, b) for a, b in _blocks(pair, left, right, rows)), Distance())
    verdict = Verdict.DIFFERENT if found.num_different else Verdict.VALUES
    return _row(pair, verdict, equal=_is_within(found, tolerance), found=found), found


def _zero(pair: Pair, left: WeightsReader, right: WeightsReader, rows: int) -> Distance | None:
    """The distance of equal tensors; its norms are only needed where it is summed up over an expert."""
    if pair.expert is None:
        return None
    return sum((distance(a, b) for a, b in _blocks(pair, left, right, rows)), Distance())


def _is_within(found: Distance, tolerance: float | None) -> bool:
    return tolerance is not None and found.relative_max <= tolerance


def _row(pair: Pair, verdict: Verdict, *, equal: bool, found: Distance | None = None) -> TensorRow:
    row = TensorRow(
        pair.name,
        verdict,
        equal,
        left=str(replace(pair.left, parent=0)) if pair.left else "",
        right=str(replace(pair.right, parent=0)) if pair.right else "",
        left_dtype=pair.left.dtype.value if pair.left else "",
        right_dtype=pair.right.dtype.value if pair.right else "",
        left_shape=pair.left.shape if pair.left else (),
        right_shape=pair.right.shape if pair.right else (),
    )
    if found is None:
        return row
    return replace(
        row,
        max_abs=found.max_abs,
        relative_max=found.relative_max,
        relative_rms=found.relative_rms,
        cosine=found.cosine,
        num_different=found.num_different,
    )


def blocks_of(reader: WeightsReader, source: Source, block_bytes: int) -> Iterator[Tensor]:
    """The tensor at `source`, block of rows by block of rows."""
    num_rows, rows = _num_rows(source), _rows_of_a_block(source.shape, block_bytes)
    for start in range(0, num_rows, rows):
        yield _read(reader, source, range(start, min(start + rows, num_rows)))


def _num_rows(source: Source) -> int:
    return source.shape[0] if source.shape else 1


def _rows_of_a_block(shape: tuple[int, ...], block_bytes: int) -> int:
    return max(1, block_bytes // (8 * max(1, math.prod(shape[1:]))))


def _blocks(pair: Pair, left: WeightsReader, right: WeightsReader, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    assert pair.left is not None and pair.right is not None
    num_rows = _num_rows(pair.left)
    for start in range(0, num_rows, rows):
        part = range(start, min(start + rows, num_rows))
        yield _read(left, pair.left, part), _read(right, pair.right, part)


def _read(reader: WeightsReader, source: Source, rows: range) -> Tensor:
    """Some rows of a source."""
    if not source.shape:
        return reader.tensor(source.name)
    if not source.is_one_of_a_stack:
        first = source.parts[0].start if source.parts else 0
        return reader.slice(source.name, range(first + rows.start, first + rows.stop), *source.parts[1:])
    first = source.parts[1].start if len(source.parts) > 1 else 0
    return reader.slice(source.name, source.parts[0], range(first + rows.start, first + rows.stop))[0]

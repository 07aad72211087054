"""How many layers each stage of a rank runs again: all combinations at once, as arrays with one axis per stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from skymoe.plan.pipeline.loads import Load

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Options:
    """A stage that runs 0, 1, .. of its layers again. Fields as in `Load`, by that number."""

    static: float
    kept: Floats
    running: Floats
    backward: Floats

    @classmethod
    def of(cls, loads: Sequence[Load]) -> Options:
        """From the loads with 0, 1, .. layers."""
        return cls(
            static=loads[0].static,
            kept=np.array([load.kept for load in loads]),
            running=np.array([load.running for load in loads]),
            backward=np.array([load.backward for load in loads]),
        )


def leanest(stages: Sequence[Options], moments: Sequence[Sequence[int]], limit: float) -> tuple[int, ...] | None:
    """The numbers with which a rank fits `limit`, at the least time; fewer layers where that is the same, then fewer in
    the first stages. None when it cannot fit.

    Args:
        stages: of the rank.
        moments: micro-batches alive in each stage, at the worst moments.
        limit: memory.
    """
    kept = reduce(
        np.maximum,
        (_outer(np.add, [count * one.kept for count, one in zip(counts, stages, strict=True)]) for counts in moments),
    )
    peak = sum(one.static for one in stages) + kept + _outer(np.maximum, [one.running for one in stages])
    good = np.flatnonzero(peak <= limit)
    if not len(good):
        return None
    times = _outer(np.add, [one.backward for one in stages])
    layers = _outer(np.add, [np.arange(len(one.kept)) for one in stages])
    best = good[np.lexsort((layers.flat[good], times.flat[good]))[0]]
    return tuple(int(count) for count in np.unravel_index(best, peak.shape))


def _outer(combine: np.ufunc, columns: Sequence[NDArray[np.generic]]) -> Floats:
    """`combine` over all combinations of one number of each column."""
    return np.asarray(reduce(combine.outer, columns))

"""From proposed divisions to better neighbours, in simulation, until there is none: one descent from each start.

Neighbours: one cut moved by a unit, or all cuts between two stages (a unit goes from one to the other through those in
between). Of equally fast divisions, that with fewer layers run again and then the more even one is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from skymoe.plan.pipeline.makespan import makespans
from skymoe.plan.pipeline.problem import Problem
from skymoe.plan.pipeline.ranks import Cuts, Ranks
from skymoe.plan.pipeline.starts import outermost, positions

WORK = 2 * 10**7
"""Simulated passes (tasks times divisions) that the search may take."""
DESCENTS = 3
"""From so many starts, the fastest ones, where nothing else is asked."""

Key = tuple[float, int, float]
"""Makespan, layers run again, unevenness."""


def descend(ranks: Ranks, starts: Sequence[Cuts], descents: int = DESCENTS) -> tuple[Cuts, int] | None:
    """The best division that is found, and how many were looked at; None when no start fits."""
    walk = Walk(ranks)
    measured = sorted(walk.measure(starts))
    if not measured:
        return None
    ends = [walk.down(*start) for start in measured[:descents]]
    return min([measured[0], *ends])[1], walk.examined


class Walk:
    """Divisions that were looked at; none is looked at twice."""

    def __init__(self, ranks: Ranks) -> None:
        self.examined = 0
        self._ranks, self._seen = ranks, set[Cuts]()
        self._tasks = 3 * ranks.problem.num_stages * ranks.problem.num_micro

    def measure(self, options: Sequence[Cuts]) -> list[tuple[Key, Cuts]]:
        """Those of `options` that fit and are new, as far as there is work left."""
        new = [cuts for cuts in dict.fromkeys(options) if cuts not in self._seen]
        self._seen.update(new)
        if not new:
            return []
        edges = self._ranks.edges(new)
        fits, again = self._ranks.again_all(edges)
        chosen = np.flatnonzero(fits)
        # What is looked at first is looked at whatever it takes.
        left = WORK // self._tasks - self.examined if self.examined else max(len(new), WORK // self._tasks)
        chosen = chosen[: max(0, left)]
        if not len(chosen):
            return []
        self.examined += len(chosen)
        forward, backward, weight = self._ranks.times(edges[chosen], again[chosen])
        spans = makespans(self._ranks.problem, forward, backward, weight)
        uneven = ((forward + backward) ** 2).sum(axis=0)
        # Rounded, so that the last bits do not decide.
        keys = zip(spans.tolist(), again[chosen].sum(axis=1).tolist(), uneven.tolist(), strict=True)
        return [
            ((float(f"{span:.10g}"), count, float(f"{spread:.10g}")), new[place])
            for place, (span, count, spread) in zip(chosen.tolist(), keys, strict=True)
        ]

    def down(self, key: Key, cuts: Cuts) -> tuple[Key, Cuts]:
        """To the best neighbour as long as there is a better one."""
        while options := self.measure(neighbours(self._ranks.problem, cuts)):
            best = min(options)
            if best[0] >= key:
                break
            key, cuts = best
        return key, cuts


def neighbours(problem: Problem, cuts: Cuts) -> list[Cuts]:
    """Runs of neighbouring cuts moved by one place; all runs in short pipelines, single cuts and pairs in long ones."""
    places = np.array(positions(problem))
    index = np.searchsorted(places, cuts)
    first, last = outermost(problem, len(places) - 1)
    moves = _moves(len(cuts), len(cuts) if len(cuts) <= 16 else 2)
    moved = index + moves
    legal = (np.diff(moved, axis=1) > 0).all(axis=1) & (moved[:, 0] >= first) & (moved[:, -1] <= last)
    return [tuple(row) for row in places[moved[legal]].tolist()]


@lru_cache(maxsize=16)
def _moves(number: int, longest: int) -> NDArray[np.intp]:
    """Rows of -1 or 1 for a run of at most `longest` of `number` cuts, 0 elsewhere."""
    runs = [(first, length) for length in range(1, longest + 1) for first in range(number - length + 1)]
    moves = np.zeros((2 * len(runs), number), dtype=np.intp)
    for row, (first, length) in enumerate(runs):
        moves[2 * row, first : first + length] = -1
        moves[2 * row + 1, first : first + length] = 1
    return moves

"""Divisions for zbv whose *ranks* are equal: rank r has stage r on the way down and stage 2P-1-r on the way up.

A dynamic program from the outermost rank inwards. After r ranks the units [0, i) and [j, L) are given out; rank r takes
a more from the left and b from the right. With x the time of a rank over the mean one, and d and u the times of its two
stages over their shares of it, a division costs

    sum over ranks of   x^8 + weight (d^8 + u^8)

so that the fullest rank counts most, and equal stages break ties: ranks wait for what their neighbours do in between.
Heavier stages on the way down fill the pipeline better, for nothing else can be done there yet. What is run again and
hops are left out; the simulation that follows has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, product

import numpy as np
from numpy.typing import NDArray

from skymoe.plan.pipeline.loads import stage_ends
from skymoe.plan.pipeline.problem import Problem

TRIED = ((0.5, 0.1), (0.55, 0.01), (0.55, 0.1), (0.6, 0.01))
"""Shares of a rank's time on the way down, with weights of equal stages."""
_REACH = 2
"""Places by which a stage differs from one that is even at most."""

Floats = NDArray[np.float64]


def v_shaped(problem: Problem, places: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Cuts that make ranks equal, one for each of `TRIED`.

    Args:
        problem: under zbv, on several ranks.
        places: units before which a stage may begin; the first and the last one are the ends.
    """
    units = problem.units
    done = [0.0, *accumulate(unit.forward + unit.backward for unit in units)]
    reached = np.array([done[place] for place in places])
    ends = np.array([sum(e.forward + e.backward for e in stage_ends(problem, s)) for s in range(problem.num_stages)])
    for down, weight in TRIED:
        sizes = _sizes(problem, reached, ends, down, weight)
        if sizes is not None:
            yield tuple(places[place] for place in list(accumulate(sizes))[:-1])


def _sizes(problem: Problem, reached: Floats, ends: Floats, down: float, weight: float) -> list[int] | None:
    """Places per stage; None where the stages that are looked at do not make the pipeline."""
    ranks, last = problem.num_ranks, len(reached) - 1
    mean = (reached[-1] + ends.sum()) / ranks
    cost = np.full((last + 1, last + 1), np.inf)
    cost[0, last] = 0.0
    crossed = np.add.outer(np.arange(last + 1), -np.arange(last + 1)) > 0
    chosen: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for rank in range(ranks):
        left, right = rank, 2 * ranks - 1 - rank
        further = np.full_like(cost, np.inf)
        taken = np.zeros(cost.shape, dtype=np.intp), np.zeros(cost.shape, dtype=np.intp)
        known = _window(cost)
        if known is None:
            return None
        for a, b in product(_counts(problem, left, last, down), _counts(problem, right, last, 1 - down)):
            rows, columns = slice(known[0], min(known[1], last - a + 1)), slice(max(known[2], b), known[3])
            if rows.start >= rows.stop or columns.start >= columns.stop:
                continue
            first = reached[rows.start + a : rows.stop + a] - reached[rows] + ends[left]
            second = reached[columns] - reached[columns.start - b : columns.stop - b] + ends[right]
            total = cost[rows, columns] + _eighth((first[:, None] + second) / mean)
            total += weight * (_eighth(first / (down * mean))[:, None] + _eighth(second / ((1 - down) * mean)))
            to = slice(rows.start + a, rows.stop + a), slice(columns.start - b, columns.stop - b)
            better = total < further[to]
            further[to][better] = total[better]
            taken[0][to][better], taken[1][to][better] = a, b
        further[crossed] = np.inf
        cost = further
        chosen.append(taken)
    return _followed(np.diagonal(cost), chosen)


def _followed(cost: Floats, chosen: Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]]) -> list[int] | None:
    """Back from the best place where both ways meet."""
    left = right = int(cost.argmin())
    if not np.isfinite(cost[left]):
        return None
    down, up = [], []
    for first, second in reversed(chosen):
        a, b = int(first[left, right]), int(second[left, right])
        down.append(a)
        up.append(b)
        left, right = left - a, right + b
    return [*reversed(down), *up]


def _counts(problem: Problem, stage: int, last: int, share: float) -> range:
    """Places that a stage may take."""
    even = 2 * share * last / problem.num_stages
    least = 0 if problem.may_be_empty(stage) else 1
    return range(max(least, round(even) - _REACH), round(even) + _REACH + 1)


def _window(cost: Floats) -> tuple[int, int, int, int] | None:
    """Rows and columns outside of which nothing is known."""
    rows, columns = np.nonzero(np.isfinite(cost))
    if not len(rows):
        return None
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


def _eighth(value: Floats) -> Floats:
    square = value * value
    fourth = square * square
    return np.asarray(fourth * fourth)

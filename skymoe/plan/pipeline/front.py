"""Suffix by suffix: which pairs of (rest, bound) the last stages can have.

Two ways to divide the units from a position on are compared by `rest`, what a micro-batch needs down and back through
them, and by `bound`, their part of the lower bound:

    rest'  = t_s + 2c + rest            bound' = max( m t_s + idle_s(rest), t_s + 2c + bound )

Both grow with both, so only pairs that no other pair dominates can be part of a best division (a Pareto front per stage
and position). Where nothing is run again, `rest` is the same for all divisions, and a front is one pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from skymoe.plan.pipeline.bound import stage_bound
from skymoe.plan.pipeline.problem import Problem
from skymoe.plan.pipeline.relaxed import Relaxed
from skymoe.plan.pipeline.tables import Array, Index

_STEP = 1e-12
"""Relative to the makespan: pairs are compared in whole steps, so that sums in other orders are not other pairs."""


@dataclass(frozen=True)
class Front:
    """Undominated pairs of one stage, position after position: those of position i are start[i] .. start[i + 1].

    Within a position `bound` rises and `rest` falls.
    """

    start: Index
    rest: Array
    bound: Array


def fronts(problem: Problem, relaxed: Relaxed, known: float) -> list[Front]:
    """Fronts of stages 0 .. P; pairs that cannot be part of a division faster than `known` are left out."""
    found = [Front(np.array([0, 1], dtype=np.intp), np.zeros(1), np.full(1, -np.inf))]
    for stage in reversed(range(problem.num_ranks)):
        found.append(_front(problem, relaxed, stage, found[-1], known))
    found.reverse()
    return found


def _front(problem: Problem, relaxed: Relaxed, stage: int, after: Front, known: float) -> Front:
    block, there_and_back = relaxed.blocks[stage], 2 * problem.hop
    least = np.maximum(relaxed.cost[stage], relaxed.left[stage][:, None])
    row, column = np.nonzero(np.maximum(least, relaxed.right[stage + 1][None, :]) < known)
    count = after.start[column + 1] - after.start[column]
    pair = np.repeat(after.start[column] - np.cumsum(count) + count, count) + np.arange(count.sum())
    row, column = np.repeat(row, count), np.repeat(column, count)
    forward, backward = block.forward[row, column], block.backward[row, column]
    time = forward + backward + there_and_back
    rest = after.rest[pair] + time
    bound = np.maximum(stage_bound(problem, stage, forward, backward, after.rest[pair]), time + after.bound[pair])
    good = relaxed.before[stage][row] + bound < known
    return _undominated(row[good], rest[good], bound[good], len(block.time), _STEP * known)


def _undominated(row: Index, rest: Array, bound: Array, num_rows: int, step: float) -> Front:
    rests, bounds = (np.rint(values / step).astype(np.int64) for values in (rest, bound))
    order = np.lexsort((rests, bounds, row))
    row, rests = row[order], rests[order]
    below = rests - row * (int(rests.max(initial=0)) + 1)  # every row lies below the one before: one running minimum
    least = np.minimum.accumulate(below)
    keep = np.ones(len(row), dtype=np.bool_)
    keep[1:] = below[1:] < least[:-1]
    order, row = order[keep], row[keep]
    start = np.searchsorted(row, np.arange(num_rows + 1))
    return Front(np.asarray(start, dtype=np.intp), rest[order], bound[order])

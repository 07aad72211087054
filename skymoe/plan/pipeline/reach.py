"""Where stages can begin and end in a division that is at least as fast as a known one, and the blocks in between.

With the bound's first part alone, sum_{i<s} (t_i + 2c) + m t_s <= known, a stage that begins further right may end
further right: the furthest places follow from one another, from the left and from the right.
"""

from __future__ import annotations

import numpy as np

from skymoe.plan.pipeline.loads import stage_ends
from skymoe.plan.pipeline.problem import SLACK, Problem
from skymoe.plan.pipeline.tables import Tables

_WIDTH = 8


def reachable(problem: Problem, tables: Tables, known: float) -> list[range]:
    """Positions at which stage s may begin, s = 0 .. P (P: the end of the last stage)."""
    ranks, last, num_micro = problem.num_ranks, tables.last, problem.num_micro
    work = (tables.forward + tables.backward)[tables.positions]
    ends = [sum(end.forward + end.backward for end in stage_ends(problem, stage)) for stage in range(ranks)]
    before = np.cumsum([0.0, *(end + 2 * problem.hop for end in ends)])
    known += SLACK * abs(known) if np.isfinite(known) else 0.0
    high, low = [0], [last]
    for stage in range(ranks - 1):
        room = (known - before[stage] - work[high[-1]]) / num_micro - ends[stage]
        furthest = int(np.searchsorted(work, work[high[-1]] + room, side="right")) - 1
        high.append(min(last - (ranks - 2 - stage), furthest))
    for stage in range(ranks - 1, 0, -1):
        nearest = stage - 1
        if num_micro > 1:
            least = (before[stage] + num_micro * (work[low[-1]] + ends[stage]) - known) / (num_micro - 1)
            nearest = max(nearest, int(np.searchsorted(work, least - SLACK * abs(work[-1]), side="left")))
        low.append(nearest)
    low.append(0)
    return [range(first, max(first, end) + 1) for first, end in zip(reversed(low), [*high, last], strict=True)]


def around_even(problem: Problem, tables: Tables) -> list[range]:
    """Positions near those that divide the time evenly: at most a stage's width away."""
    ranks, last = problem.num_ranks, tables.last
    work = (tables.forward + tables.backward)[tables.positions]
    width = min(_WIDTH, max(2, last // ranks))
    ranges = [range(0, 1)]
    for stage in range(1, ranks):
        even = int(np.searchsorted(work, work[-1] * stage / ranks))
        ranges.append(
            range(max(stage - 1, even - width), max(stage, min(last - (ranks - 1 - stage), even + width) + 1))
        )
    return [*ranges, range(last, last + 1)]

"""The certificate: every division whose bound is below the best simulated makespan is simulated.

Stages are chosen from the first to the last, the most promising beginning first. A beginning leaves the stages behind
it two conditions: their `bound` must stay below what is left of the best makespan, and their `rest` below what the
chosen stages can wait (`largest_rest`). The fronts tell at once whether any division of the remaining units meets both,
so no beginning is followed that leads nowhere. If the budget ends first, the least bound that was not followed is
proven.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from skymoe.plan.pipeline.bound import largest_rest, stage_bound
from skymoe.plan.pipeline.front import Front
from skymoe.plan.pipeline.makespan import one_f_one_b_makespans
from skymoe.plan.pipeline.problem import SLACK, Problem
from skymoe.plan.pipeline.relaxed import Relaxed

_BATCH = 32
"""Divisions that are simulated together."""


class Beginning(NamedTuple):
    """The first stages of a division. The heap takes the least `bound`, then the longest path.

    Attributes:
        bound: no division that begins so is faster.
        missing: stages that are not chosen yet.
        path: positions of the chosen ones.
        before: their times of one micro-batch in sum, with hops there and back.
        rest: the most that the others may take in sum.
    """

    bound: float
    missing: int
    path: tuple[int, ...]
    before: float
    rest: float


class Found(NamedTuple):
    """What the search ends with.

    Attributes:
        makespan, path: of the best division, its positions.
        lower_bound: proven.
        examined: divisions that were simulated.
        complete: nothing is left that could be faster.
    """

    makespan: float
    path: tuple[int, ...]
    lower_bound: float
    examined: int
    complete: bool


def search(
    problem: Problem, relaxed: Relaxed, fronts: list[Front], makespan: float, path: tuple[int, ...], budget: int
) -> Found:
    """Look for a division faster than `makespan`, that of `path`; open at most `budget` beginnings."""
    heap = [Beginning(relaxed.bound, problem.num_ranks, (0,), 0.0, np.inf)]
    waiting: list[Beginning] = []
    examined = opened = 0
    while heap or waiting:
        if waiting and (len(waiting) >= _BATCH or not heap):
            times = simulate_paths(problem, relaxed, [one.path for one in waiting])
            examined += len(waiting)
            best = int(times.argmin())
            if times[best] < makespan:
                makespan, path = float(times[best]), waiting[best].path
            waiting = []
            continue
        if heap[0].bound >= makespan * (1 - SLACK):
            heap = []
            continue
        if opened >= budget:
            return Found(makespan, path, min(one.bound for one in (*heap, *waiting)), examined, False)
        beginning = heapq.heappop(heap)
        if beginning.missing == 0:
            waiting.append(beginning)
            continue
        opened += 1
        for further in _further(problem, relaxed, fronts, beginning, makespan):
            heapq.heappush(heap, further)
    return Found(makespan, path, makespan, examined, True)


def _further(
    problem: Problem, relaxed: Relaxed, fronts: list[Front], beginning: Beginning, makespan: float
) -> Iterator[Beginning]:
    """`beginning` with one stage more, for every end of that stage behind which the conditions can be met."""
    stage, there_and_back = problem.num_ranks - beginning.missing, 2 * problem.hop
    block, front = relaxed.blocks[stage], fronts[stage + 1]
    row = beginning.path[-1] - block.first
    limit = makespan * (1 - SLACK)
    for column in np.nonzero(np.maximum(relaxed.cost[stage][row], relaxed.right[stage + 1]) < limit)[0]:
        forward, backward = float(block.forward[row, column]), float(block.backward[row, column])
        before = beginning.before + forward + backward + there_and_back
        most = largest_rest(problem, stage, forward, backward, limit - beginning.before)
        most = min(most, beginning.rest - forward - backward - there_and_back)
        rests = front.rest[front.start[column] : front.start[column + 1]]
        bounds = front.bound[front.start[column] : front.start[column + 1]]
        first = int(np.searchsorted(-rests, -most * (1 + SLACK)))  # rests fall, bounds rise
        if first == len(rests) or before + bounds[first] >= limit:
            continue
        own = stage_bound(problem, stage, block.forward[row, column], block.backward[row, column], rests[-1])
        bound = max(beginning.bound, beginning.before + float(own), before + float(bounds[first]))
        path = (*beginning.path, block.end + int(column))
        yield Beginning(bound, beginning.missing - 1, path, before, most)


def simulate_paths(problem: Problem, relaxed: Relaxed, paths: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Makespans of divisions that are given as positions."""
    forward, backward = np.empty((2, problem.num_ranks, len(paths)))
    for number, path in enumerate(paths):
        for stage, block in enumerate(relaxed.blocks):
            at = path[stage] - block.first, path[stage + 1] - block.end
            forward[stage, number], backward[stage, number] = block.forward[at], block.backward[at]
    return one_f_one_b_makespans(forward, backward, problem.num_micro, problem.hop)

"""A lower bound for any schedule: no rank can have less than its share, and it cannot work before its first stage is
reached.

    T >= m X + fill        X: the least possible time of one micro-batch on the fullest rank
    T >= way               way: one micro-batch there and back
    T >= way + (m - 1) t   t: the mean of the stages' times; 1F1B with m > P (proof in docs/pipeline_solver.md)

X is at least the mean over ranks, the largest unit, and, as units are not cut, the least time in which the ranks hold
all units if each took as little as the smallest. `fill`: rank r's first stage has at least r - 1 units' forwards and r
hops before it (the first stage may be empty), and as many backwards after it, which gradients of weights may fill under
zbv; the mean over ranks counts where X is the mean. Where memory forces layers to be run again, X has the least of that
(memory_bound.py).
"""

from __future__ import annotations

from skymoe.plan.pipeline.loads import stage_ends
from skymoe.plan.pipeline.memory_bound import memory_bound
from skymoe.plan.pipeline.problem import Problem
from skymoe.plan.pipeline.schedule import is_one_f_one_b, ranks_of
from skymoe.spec.layout import ScheduleKind


def load_bound(problem: Problem) -> float:
    """No division of the problem's schedule is faster."""
    times = [unit.forward + unit.backward for unit in problem.units]
    ends = [
        sum(end.forward + end.backward for stage in own for end in stage_ends(problem, stage))
        for own in ranks_of(problem)
    ]
    total, num_micro, ranks = sum(times) + sum(ends), problem.num_micro, problem.num_ranks
    apart = problem.schedule is ScheduleKind.ZERO_BUBBLE  # gradients of weights are on no micro-batch's way then
    weights = sum(unit.weight for unit in problem.units)
    weights += sum(end.weight for stage in range(problem.num_stages) for end in stage_ends(problem, stage))
    way = total - (weights if apart else 0.0) + 2 * problem.hop * (ranks - 1)
    before = min(unit.forward for unit in problem.units)
    after = min(unit.backward for unit in problem.units)
    fill = [max(0, rank - 1) * (before + (0.0 if apart else after)) for rank in range(ranks)]
    fill = [idle + (1 if apart else 2) * rank * problem.hop for rank, idle in enumerate(fill)]
    largest = max(max(times), _in_whole_units(times, ends))
    steady = (num_micro - 1) * total / ranks if is_one_f_one_b(problem) and num_micro > ranks else 0.0
    known = max((num_micro * total + sum(fill)) / ranks, num_micro * largest, way + steady)
    return max(known, memory_bound(problem, fill))


def _in_whole_units(times: list[float], ends: list[float]) -> float:
    """The least X with which the ranks have room for all units, each as short as the shortest one."""
    shortest = min(times)
    if shortest <= 0:
        return max(ends)
    held = [0] * len(ends)
    for _ in times:  # each unit to the rank that is then least full
        rank = min(range(len(ends)), key=lambda number: ends[number] + (held[number] + 1) * shortest)
        held[rank] += 1
    return max(end + count * shortest for end, count in zip(ends, held, strict=True))

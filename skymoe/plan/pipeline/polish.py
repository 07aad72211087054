"""Among equally fast divisions, a good one: few layers run again, even, heavy stages early.

Many divisions share the best makespan, for what holds a step up is a part of the stages only. From the best one found,
single cuts are moved as long as nothing gets slower and the order below improves. The result is the same on every machine.
"""

from __future__ import annotations

from skymoe.plan.pipeline.problem import Problem
from skymoe.plan.pipeline.relaxed import Relaxed
from skymoe.plan.pipeline.search import simulate_paths
from skymoe.plan.pipeline.tables import SLACK

_ROUNDS = 64


def polish(problem: Problem, relaxed: Relaxed, path: tuple[int, ...], makespan: float) -> tuple[int, ...]:
    """`path`, or a neighbour's neighbour that is as fast and preferred."""
    own = _preference(relaxed, path)
    for _ in range(_ROUNDS):
        better = sorted((key, other) for other in _neighbours(relaxed, path) if (key := _preference(relaxed, other)) < own)
        if not better:
            return path
        times = simulate_paths(problem, relaxed, [other for _, other in better])
        equal = [number for number, time in enumerate(times) if time <= makespan * (1 + SLACK)]
        if not equal:
            return path
        own, path = better[equal[0]]
    return path


def _neighbours(relaxed: Relaxed, path: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Divisions with one cut moved by one position, within the ranges, all stages fitting."""
    found = []
    for cut in range(1, len(path) - 1):
        for place in (path[cut] - 1, path[cut] + 1):
            left, right = relaxed.blocks[cut - 1], relaxed.blocks[cut]
            if not 0 <= place - right.first < len(right.forward):
                continue
            fit = left.backward[path[cut - 1] - left.first, place - left.end]
            fit = max(fit, right.backward[place - right.first, path[cut + 1] - right.end])
            if fit < float("inf"):
                found.append((*path[:cut], place, *path[cut + 1 :]))
    return found


def _preference(relaxed: Relaxed, path: tuple[int, ...]) -> tuple[int, float, float]:
    """Smaller is better; rounded, so that sums of the last bits do not decide."""
    again, times = 0, []
    for block, start, end in zip(relaxed.blocks, path, path[1:], strict=False):
        at = start - block.first, end - block.end
        again += int(block.again[at])
        times.append(float(block.forward[at] + block.backward[at]))
    scale = sum(times) or 1.0
    uneven = sum((time / scale) ** 2 for time in times)
    late = sum(stage * time / scale for stage, time in enumerate(times))
    return again, round(uneven, 10), round(late, 10)

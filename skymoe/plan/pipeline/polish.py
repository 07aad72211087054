"""From a division to a better one near it: faster, or as fast and preferred.

Many divisions share the best makespan, for what holds a step up is a part of the stages only. Single cuts are moved by
one position, as long as the step gets shorter, or stays as it is while the order below improves: few layers run again,
even, heavy stages early. The result is the same on every machine.
"""

from __future__ import annotations

from skymoe.plan.pipeline.problem import SLACK, Problem
from skymoe.plan.pipeline.relaxed import Relaxed
from skymoe.plan.pipeline.search import simulate_paths

_ROUNDS = 64

Path = tuple[int, ...]


def polish(problem: Problem, relaxed: Relaxed, path: Path, makespan: float) -> tuple[Path, float]:
    """`path`, or a neighbour's neighbour that is faster or preferred; and its makespan."""
    own = _preference(relaxed, path)
    for _ in range(_ROUNDS):
        others = _neighbours(relaxed, path)
        if not others:
            break
        times = simulate_paths(problem, relaxed, others)
        best = min(makespan, float(times.min()))
        keys = [
            (_preference(relaxed, other), other)
            for other, time in zip(others, times, strict=True)
            if time <= best * (1 + SLACK)
        ]
        faster = best < makespan * (1 - SLACK)
        if not keys or not (faster or min(keys)[0] < own):
            break
        own, path = min(keys)
        makespan = best
    return path, makespan


def _neighbours(relaxed: Relaxed, path: Path) -> list[Path]:
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


def _preference(relaxed: Relaxed, path: Path) -> tuple[int, float, float]:
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

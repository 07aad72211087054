"""Divisions from which the search for interleaved and zero-bubble schedules sets out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from skymoe.plan.pipeline.evaluate import uniform_sizes
from skymoe.plan.pipeline.loads import stage_ends
from skymoe.plan.pipeline.problem import Problem
from skymoe.plan.pipeline.ranks import Cuts
from skymoe.plan.pipeline.v_shape import v_shaped
from skymoe.spec.layout import ScheduleKind


def starts(problem: Problem) -> list[Cuts]:
    """Uniform; even in time with and without what the ends take; under zbv, even over the ranks."""
    found = [tuple(accumulate(uniform_sizes(problem)[:-1])), *_even(problem)]
    if problem.schedule is ScheduleKind.ZERO_BUBBLE and problem.num_ranks > 1:
        found += v_shaped(problem, positions(problem))
    return list(dict.fromkeys(found))


def _even(problem: Problem) -> list[Cuts]:
    work = np.array([0.0, *accumulate(unit.forward + unit.backward for unit in problem.units)])
    ends = [
        sum(end.forward + end.backward for end in stage_ends(problem, stage)) for stage in range(problem.num_stages)
    ]
    found = []
    for share in (0.0, 0.5, 1.0):
        target = (work[-1] + share * sum(ends)) / problem.num_stages
        before = [target * (stage + 1) - share * sum(ends[: stage + 1]) for stage in range(problem.num_stages - 1)]
        found.append(_legal(problem, [int(np.abs(work - place).argmin()) for place in before]))
    return found


def _legal(problem: Problem, cuts: Sequence[int]) -> Cuts:
    """Cuts at allowed places, with units in every stage that may not be empty."""
    places = positions(problem)
    first, last = outermost(problem, len(places) - 1)
    chosen: list[int] = []
    for number, cut in enumerate(cuts):
        low = chosen[-1] + 1 if chosen else first
        high = last - (len(cuts) - 1 - number)
        nearest = int(np.abs(np.array(places) - cut).argmin())
        chosen.append(min(max(nearest, low), high))
    return tuple(places[place] for place in chosen)


def outermost(problem: Problem, last: int) -> tuple[int, int]:
    """The first position at which the second stage may begin, and the last at which the last one may."""
    return int(not problem.may_be_empty(0)), last - (not problem.may_be_empty(problem.num_stages - 1))


def positions(problem: Problem) -> list[int]:
    """Units before which a stage may begin."""
    units = problem.units
    inner = [n for n in range(1, len(units)) if not problem.whole_layers or units[n].layer != units[n - 1].layer]
    return [0, *inner, len(units)]

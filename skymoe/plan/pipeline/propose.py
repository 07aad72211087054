"""Interleaved and zero-bubble schedules: propose, simulate, improve.

A rank has several stages here, which share its memory and its time, and the passes of one wait for those of another:
no bound is known that is both valid and close, so divisions are proposed and simulated. From even ones the search goes
to better neighbours: one cut moved by a unit, or all cuts between two stages (a unit goes from one to the other through
those in between). Every division gets the layers run again that its ranks need to fit (`leanest`). The certificate says
how far any division can be from what was found (`load_bound`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from skymoe.base.errors import ConfigError
from skymoe.plan.pipeline.evaluate import evaluate, uniform
from skymoe.plan.pipeline.infeasible import rounded_up
from skymoe.plan.pipeline.load_bound import load_bound
from skymoe.plan.pipeline.loads import stage_ends
from skymoe.plan.pipeline.makespan import makespans
from skymoe.plan.pipeline.problem import SLACK, Answer, Certificate, Problem
from skymoe.plan.pipeline.ranks import Cuts, Ranks
from skymoe.spec.split import Split

WORK = 2 * 10**7
"""Simulated passes (tasks times divisions) that the search may take."""


def propose(problem: Problem) -> Answer:
    """The fastest division that the search finds.

    Raises:
        ConfigError: nothing fits.
    """
    ranks = Ranks(problem)
    found = _descend(ranks, [cuts for cuts in _starts(problem) if ranks.again(cuts) is not None])
    if found is None:
        raise _nothing_fits(problem)
    cuts, examined = found
    sizes = Split(tuple(end - start for start, end in zip((0, *cuts), (*cuts, len(problem.units)), strict=True)))
    answer = evaluate(problem, sizes, ranks.again(cuts) or ())
    bound = min(load_bound(problem), answer.makespan)
    optimal = answer.makespan <= bound * (1 + SLACK)
    certificate = Certificate(
        optimal=optimal,
        lower_bound=bound,
        gap=0.0 if optimal else answer.makespan / bound - 1 if bound else math.inf,
        method="the bound by load is met" if optimal else "local search in simulation, bounded by load, fill and drain",
        examined=examined,
    )
    return replace(answer, certificate=certificate)


def _starts(problem: Problem) -> list[Cuts]:
    """Uniform, and even in time with and without what the ends take."""
    sizes = uniform(replace(problem, memory=None)).stages.sizes
    starts = [tuple(accumulate(sizes[:-1]))]
    work = [0.0, *accumulate(unit.forward + unit.backward for unit in problem.units)]
    ends = [
        sum(end.forward + end.backward for end in stage_ends(problem, stage)) for stage in range(problem.num_stages)
    ]
    for share in (0.0, 0.5, 1.0):
        target = (work[-1] + share * sum(ends)) / problem.num_stages
        before = [target * (stage + 1) - share * sum(ends[: stage + 1]) for stage in range(problem.num_stages - 1)]
        starts.append(_legal(problem, [int(np.abs(np.array(work) - place).argmin()) for place in before]))
    return list(dict.fromkeys(starts))


def _legal(problem: Problem, cuts: Sequence[int]) -> Cuts:
    """Cuts at allowed places, with units in every stage that may not be empty."""
    places = positions(problem)
    first, last = _outermost(problem, len(places) - 1)
    chosen: list[int] = []
    for number, cut in enumerate(cuts):
        low = chosen[-1] + 1 if chosen else first
        high = last - (len(cuts) - 1 - number)
        nearest = int(np.abs(np.array(places) - cut).argmin())
        chosen.append(min(max(nearest, low), high))
    return tuple(places[place] for place in chosen)


def _outermost(problem: Problem, last: int) -> tuple[int, int]:
    """The first position at which the second stage may begin, and the last at which the last one may."""
    return int(not problem.may_be_empty(0)), last - (not problem.may_be_empty(problem.num_stages - 1))


def positions(problem: Problem) -> list[int]:
    """Units before which a stage may begin."""
    units = problem.units
    inner = [n for n in range(1, len(units)) if not problem.whole_layers or units[n].layer != units[n - 1].layer]
    return [0, *inner, len(units)]


def _descend(ranks: Ranks, starts: list[Cuts]) -> tuple[Cuts, int] | None:
    """To the best neighbour as long as there is a better one."""
    if not starts:
        return None
    problem = ranks.problem
    tasks = 3 * problem.num_stages * problem.num_micro
    options, examined, spent = starts, 0, 0
    seen: set[Cuts] = set()
    best: tuple[tuple[float, int, float], Cuts] | None = None
    while options and (best is None or spent < WORK):
        seen.update(options)
        options = options[: max(len(starts), WORK // tasks)]
        keys = _keys(ranks, options)
        examined, spent = examined + len(options), spent + tasks * len(options)
        key, cuts = min(zip(keys, options, strict=True))
        if best is not None and key >= best[0]:
            break
        best = key, cuts
        options = [
            other for other in _neighbours(problem, cuts) if other not in seen and ranks.again(other) is not None
        ]
    assert best is not None
    return best[1], examined


def _keys(ranks: Ranks, options: Sequence[Cuts]) -> list[tuple[float, int, float]]:
    """Makespan, layers run again, unevenness; rounded, so that the last bits do not decide."""
    agains = [ranks.again(cuts) or () for cuts in options]
    loads = [ranks.loads(cuts, again) for cuts, again in zip(options, agains, strict=True)]
    columns = (
        np.array([[getattr(load, name) for load in one] for one in loads]).T
        for name in ("forward", "backward", "weight")
    )
    times = makespans(ranks.problem, *columns)
    return [
        (float(f"{time:.10g}"), sum(again), float(f"{sum((load.forward + load.backward) ** 2 for load in one):.10g}"))
        for time, again, one in zip(times, agains, loads, strict=True)
    ]


def _neighbours(problem: Problem, cuts: Cuts) -> list[Cuts]:
    """Runs of neighbouring cuts moved by one place; all runs in short pipelines, single cuts and pairs in long ones."""
    places = positions(problem)
    index = {place: number for number, place in enumerate(places)}
    outermost = _outermost(problem, len(places) - 1)
    longest = len(cuts) if len(cuts) <= 16 else 2
    found = []
    for length in range(1, longest + 1):
        for first in range(len(cuts) - length + 1):
            for step in (-1, 1):
                moved = [index[cut] for cut in cuts]
                for number in range(first, first + length):
                    moved[number] += step
                if _is_legal(moved, *outermost):
                    found.append(tuple(places[place] for place in moved))
    return found


def _is_legal(places: Sequence[int], first: int, last: int) -> bool:
    ascending = all(after > before for before, after in zip(places, places[1:], strict=False))
    return ascending and places[0] >= first and places[-1] <= last


def _nothing_fits(problem: Problem) -> ConfigError:
    """With the memory that the leanest of the proposed divisions needs."""
    ranks = Ranks(replace(problem, memory=None))
    needed = min(max(ranks.least_peaks(cuts)) for cuts in _starts(problem))
    return ConfigError(
        f"no division that was tried fits memory {problem.memory:g} under {problem.schedule}",
        where="memory",
        why=f"the fullest rank of the leanest one needs {needed:.6g}",
        hint=f"memory of {rounded_up(needed)}, or schedule 1f1b, which keeps less alive",
    )

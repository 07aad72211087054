"""Interleaved and zero-bubble schedules: propose, simulate, improve.

A rank has several stages here, which share its memory and its time, and the passes of one wait for those of another:
no bound is known that is both valid and close, so divisions are proposed and simulated. From even ones the search goes
to better neighbours: one cut moved by a unit, or all cuts between two stages (a unit goes from one to the other through
those in between). Every division gets the layers run again that its ranks need to fit (`leanest`). The certificate says
how far any division can be from what was found (`load_bound`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, product

import numpy as np

from skymoe.base.errors import ConfigError
from skymoe.plan.pipeline.evaluate import evaluate, uniform
from skymoe.plan.pipeline.load_bound import load_bound
from skymoe.plan.pipeline.loads import Load, layers_of, stage_ends, stage_load
from skymoe.plan.pipeline.makespan import makespans
from skymoe.plan.pipeline.problem import Answer, Certificate, Problem
from skymoe.plan.pipeline.schedule import moments_of, ranks_of
from skymoe.plan.pipeline.tables import SLACK
from skymoe.spec.split import Split

WORK = 2 * 10**7
"""Simulated passes (tasks times divisions) that the search may take."""
_COMBINATIONS = 256

Cuts = tuple[int, ...]
"""Units before which stages 1 .. S - 1 begin."""


def propose(problem: Problem) -> Answer:
    """The fastest division that the search finds.

    Raises:
        ConfigError: nothing fits.
    """
    ranks = _Ranks(problem)
    found = _descend(ranks, [cuts for cuts in _starts(problem) if ranks.again(cuts) is not None])
    if found is None:
        raise _nothing_fits(problem, ranks)
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


class _Ranks:
    """What stages and ranks of divisions of one problem need; intervals are shared between divisions, so remembered."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.moments, self.stages = problem, moments_of(problem), ranks_of(problem)
        self._loads: dict[tuple[int, int, int, int], Load] = {}
        self._again: dict[tuple[int, Cuts], tuple[int, ...] | None] = {}

    def load(self, stage: int, first: int, end: int, again: int) -> Load:
        """Of `stage` with units [first, end)."""
        key = stage, first, end, again
        if key not in self._loads:
            self._loads[key] = stage_load(self.problem, stage, self.problem.units[first:end], again)
        return self._loads[key]

    def again(self, cuts: Cuts) -> tuple[int, ...] | None:
        """Layers run again per stage; None when a rank cannot fit."""
        again = [0] * self.problem.num_stages
        for rank, own in enumerate(self.stages):
            ends = tuple(place for stage in own for place in self._interval(cuts, stage))
            key = rank, ends
            if key not in self._again:
                self._again[key] = self._leanest(rank, list(zip(ends[::2], ends[1::2], strict=True)))
            counts = self._again[key]
            if counts is None:
                return None
            for stage, count in zip(own, counts, strict=True):
                again[stage] = count
        return tuple(again)

    def loads(self, cuts: Cuts, again: Sequence[int]) -> list[Load]:
        """Of all stages."""
        return [self.load(stage, *self._interval(cuts, stage), count) for stage, count in enumerate(again)]

    def peak(self, rank: int, intervals: Sequence[tuple[int, int]], counts: Sequence[int]) -> float:
        """Memory of a rank whose stages have these intervals and layers run again."""
        loads = [
            self.load(stage, *interval, count)
            for stage, interval, count in zip(self.stages[rank], intervals, counts, strict=True)
        ]
        extra = self.problem.extra_alive
        kept = max(
            sum((count + extra) * load.kept for count, load in zip(counts_alive, loads, strict=True))
            for counts_alive in self.moments[rank]
        )
        return sum(load.static for load in loads) + kept + max(load.running for load in loads)

    def num_layers(self, interval: tuple[int, int]) -> int:
        """Layers in an interval of units, cut ones included."""
        return len(layers_of(self.problem.units[slice(*interval)]))

    def _interval(self, cuts: Cuts, stage: int) -> tuple[int, int]:
        return cuts[stage - 1] if stage else 0, cuts[stage] if stage < len(cuts) else len(self.problem.units)

    def _leanest(self, rank: int, intervals: list[tuple[int, int]]) -> tuple[int, ...] | None:
        """The layers run again with which the rank fits, at the least time; fewer of them where that is the same."""
        limit = math.inf if self.problem.memory is None else self.problem.memory * (1 + SLACK)
        none = (0,) * len(intervals)
        if self.peak(rank, intervals, none) <= limit:
            return none
        most = [self.num_layers(interval) if self.problem.recompute else 0 for interval in intervals]
        options: Iterable[tuple[int, ...]] = product(*(range(count + 1) for count in most))
        if math.prod(count + 1 for count in most) > _COMBINATIONS:
            options = self._greedily(rank, intervals, most)
        good = [counts for counts in options if self.peak(rank, intervals, counts) <= limit]
        return min(good, key=lambda counts: (self._time(rank, intervals, counts), sum(counts), counts), default=None)

    def _greedily(self, rank: int, intervals: list[tuple[int, int]], most: list[int]) -> list[tuple[int, ...]]:
        """One layer more at a time, in the stage where it saves most; then everything."""
        counts, options = [0] * len(intervals), []
        while any(count < limit for count, limit in zip(counts, most, strict=True)):
            further = [
                (*counts[:place], counts[place] + 1, *counts[place + 1 :])
                for place in range(len(counts))
                if counts[place] < most[place]
            ]
            counts = list(min(further, key=lambda option: self.peak(rank, intervals, option)))
            options.append(tuple(counts))
        return options

    def _time(self, rank: int, intervals: list[tuple[int, int]], counts: Sequence[int]) -> float:
        own = zip(self.stages[rank], intervals, counts, strict=True)
        return sum(self.load(stage, *interval, count).backward for stage, interval, count in own)


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
    """Cuts at allowed places, with no empty stage between the first and the last."""
    places = positions(problem)
    chosen: list[int] = []
    for number, cut in enumerate(cuts):
        low = number if number else 0
        high = len(places) - 1 - (len(cuts) - 1 - number)
        nearest = int(np.abs(np.array(places) - cut).argmin())
        after = chosen[-1] + 1 if chosen else 0
        chosen.append(min(max(nearest, after, min(low, 1) * after), high))
    return tuple(places[place] for place in chosen)


def positions(problem: Problem) -> list[int]:
    """Units before which a stage may begin."""
    units = problem.units
    inner = [n for n in range(1, len(units)) if not problem.whole_layers or units[n].layer != units[n - 1].layer]
    return [0, *inner, len(units)]


def _descend(ranks: _Ranks, starts: list[Cuts]) -> tuple[Cuts, int] | None:
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
        options = [other for other in _neighbours(problem, cuts) if other not in seen and ranks.again(other) is not None]
    assert best is not None
    return best[1], examined


def _keys(ranks: _Ranks, options: Sequence[Cuts]) -> list[tuple[float, int, float]]:
    """Makespan, layers run again, unevenness; rounded, so that the last bits do not decide."""
    agains = [ranks.again(cuts) or () for cuts in options]
    loads = [ranks.loads(cuts, again) for cuts, again in zip(options, agains, strict=True)]
    columns = (
        np.array([[getattr(load, name) for load in one] for one in loads]).T for name in ("forward", "backward", "weight")
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
    longest = len(cuts) if len(cuts) <= 16 else 2
    found = []
    for length in range(1, longest + 1):
        for first in range(len(cuts) - length + 1):
            for step in (-1, 1):
                moved = [index[cut] for cut in cuts]
                for number in range(first, first + length):
                    moved[number] += step
                if _is_legal(moved, len(places) - 1):
                    found.append(tuple(places[place] for place in moved))
    return found


def _is_legal(places: Sequence[int], last: int) -> bool:
    ascending = all(after > before for before, after in zip(places, places[1:], strict=False))
    return ascending and places[0] >= 0 and places[-1] <= last


def _nothing_fits(problem: Problem, ranks: _Ranks) -> ConfigError:
    """With the memory that the leanest of the proposed divisions needs."""
    lean = _Ranks(replace(problem, memory=None))
    needed = math.inf
    for cuts in _starts(problem):
        peaks = []
        for rank, own in enumerate(lean.stages):
            intervals = [lean._interval(cuts, stage) for stage in own]
            most = [lean.num_layers(interval) if problem.recompute else 0 for interval in intervals]
            peaks.append(
                min(lean.peak(rank, intervals, counts) for counts in ((0,) * len(own), *lean._greedily(rank, intervals, most)))
            )
        needed = min(needed, max(peaks))
    return ConfigError(
        f"no division that was tried fits memory {problem.memory:g} under {problem.schedule}",
        where="memory",
        why=f"the fullest rank of the leanest one needs {needed:.6g}",
        hint=f"memory of {math.nextafter(needed, math.inf) * (1 + 5e-6):.6g}, or schedule 1f1b, which keeps less alive",
    )

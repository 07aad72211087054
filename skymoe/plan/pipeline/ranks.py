"""What the ranks of a pipeline need that have several stages each: how many layers to run again, and where.

A rank's stages share its memory, so how many layers each runs again is not its own affair: the numbers are taken that
cost the least time together. With few combinations all are tried; with many, layers are added one by one where they
save most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product

from skymoe.plan.pipeline.loads import Load, layers_of, stage_load
from skymoe.plan.pipeline.problem import SLACK, Problem
from skymoe.plan.pipeline.schedule import moments_of, ranks_of

_COMBINATIONS = 256

Cuts = tuple[int, ...]
"""Units before which stages 1 .. S - 1 begin."""


class Ranks:
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
        kept = max(
            sum(count * load.kept for count, load in zip(counts_alive, loads, strict=True))
            for counts_alive in self.moments[rank]
        )
        return sum(load.static for load in loads) + kept + max(load.running for load in loads)

    def least_peaks(self, cuts: Cuts) -> list[float]:
        """Memory of each rank when layers are run again wherever that makes it smaller."""
        peaks = []
        for rank, own in enumerate(self.stages):
            intervals = [self._interval(cuts, stage) for stage in own]
            most = [self.num_layers(interval) if self.problem.recompute else 0 for interval in intervals]
            options = [(0,) * len(own), *self._greedily(rank, intervals, most)]
            peaks.append(min(self.peak(rank, intervals, counts) for counts in options))
        return peaks

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
            counts = list(min(further, key=lambda option: self.peak(rank, intervals, tuple(option))))
            options.append(tuple(counts))
        return options

    def _time(self, rank: int, intervals: list[tuple[int, int]], counts: Sequence[int]) -> float:
        own = zip(self.stages[rank], intervals, counts, strict=True)
        return sum(self.load(stage, *interval, count).backward for stage, interval, count in own)

"""What the ranks of a pipeline need that have several stages each: how many layers to run again, and where.

A rank's stages share its memory, so how many layers each runs again is not its own affair: the numbers are taken that
cost the least time together. With few combinations all are tried; with many, layers are added one by one where they
save most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from skymoe.plan.pipeline.leanest import Options, leanest
from skymoe.plan.pipeline.loads import Load, layers_of, stage_load
from skymoe.plan.pipeline.problem import SLACK, Problem
from skymoe.plan.pipeline.schedule import moments_of, ranks_of
from skymoe.plan.pipeline.stage_sums import Numbers, StageSums, Times

_COMBINATIONS = 4096

Cuts = tuple[int, ...]
"""Units before which stages 1 .. S - 1 begin."""


class Ranks:
    """What stages and ranks of divisions of one problem need; intervals are shared between divisions, so remembered."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.moments, self.stages = problem, moments_of(problem), ranks_of(problem)
        self._loads: dict[tuple[int, int, int, int], Load] = {}
        self._again: list[dict[tuple[int, ...], tuple[int, ...] | None]] = [{} for _ in self.stages]
        self._of_stage: dict[tuple[int, int, int], Options] = {}
        self._sums = StageSums(problem)

    def load(self, stage: int, first: int, end: int, again: int) -> Load:
        """Of `stage` with units [first, end)."""
        key = stage, first, end, again
        if key not in self._loads:
            self._loads[key] = stage_load(self.problem, stage, self.problem.units[first:end], again)
        return self._loads[key]

    def again(self, cuts: Cuts) -> tuple[int, ...] | None:
        """Layers run again per stage; None when a rank cannot fit."""
        fits, again = self.again_all(self.edges([cuts]))
        return tuple(again[0].tolist()) if fits[0] else None

    def again_all(self, edges: Numbers) -> tuple[NDArray[np.bool_], Numbers]:
        """Of many divisions, which ones fit, and their layers run again [divisions, stages]."""
        fits = np.ones(len(edges), dtype=np.bool_)
        again = np.zeros((len(edges), self.problem.num_stages), dtype=np.intp)
        for rank, own in enumerate(self.stages):
            found = self._leanest_all(rank, edges[:, [edge for stage in own for edge in (stage, stage + 1)]])
            fits &= [counts is not None for counts in found]
            again[:, own] = [counts or (0,) * len(own) for counts in found]
        return fits, again

    def times(self, edges: Numbers, again: Numbers) -> tuple[Times, Times, Times]:
        """Forward, backward and weight of all stages [stages, divisions]."""
        return self._sums.times(edges, again)

    def edges(self, options: Sequence[Cuts]) -> Numbers:
        """Units before which stages begin, and where the last one ends [divisions, stages + 1]."""
        edges = np.zeros((len(options), self.problem.num_stages + 1), dtype=np.intp)
        edges[:, 1:-1] = np.array(options, dtype=np.intp).reshape(len(options), -1)
        edges[:, -1] = len(self.problem.units)
        return edges

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

    def _leanest_all(self, rank: int, intervals: Numbers) -> list[tuple[int, ...] | None]:
        """By starts and ends of the rank's stages [divisions, 2 x stages]; each pair of them is looked at once."""
        known, found = self._again[rank], []
        for row in map(tuple, intervals.tolist()):
            if row not in known:
                known[row] = self._leanest(rank, list(zip(row[::2], row[1::2], strict=True)))
            found.append(known[row])
        return found

    def _leanest(self, rank: int, intervals: list[tuple[int, int]]) -> tuple[int, ...] | None:
        """The layers run again with which the rank fits, at the least time; fewer of them where that is the same."""
        limit = math.inf if self.problem.memory is None else self.problem.memory * (1 + SLACK)
        none = (0,) * len(intervals)
        if self.peak(rank, intervals, none) <= limit:
            return none
        most = [self.num_layers(interval) if self.problem.recompute else 0 for interval in intervals]
        if math.prod(count + 1 for count in most) <= _COMBINATIONS:
            own = zip(self.stages[rank], intervals, most, strict=True)
            return leanest(
                [self._options(stage, *interval, count) for stage, interval, count in own], self.moments[rank], limit
            )
        good = [n for n in self._greedily(rank, intervals, most) if self.peak(rank, intervals, n) <= limit]
        return min(good, key=lambda counts: (self._time(rank, intervals, counts), sum(counts), counts), default=None)

    def _options(self, stage: int, first: int, end: int, most: int) -> Options:
        key = stage, first, end
        if key not in self._of_stage:
            self._of_stage[key] = Options.of([self.load(stage, first, end, count) for count in range(most + 1)])
        return self._of_stage[key]

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

"""Seconds of the stages of many divisions at once, as differences of running sums.

Equal to the sums of loads.py but for the last bits: what a search compares by, not what an answer reports.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from skymoe.plan.pipeline.loads import stage_ends
from skymoe.plan.pipeline.problem import Problem

Numbers = NDArray[np.intp]
Times = NDArray[np.float64]


class StageSums:
    """The running sums of one problem."""

    def __init__(self, problem: Problem) -> None:
        units = problem.units
        names = ("forward", "backward", "weight")
        columns = [[getattr(unit, name) for unit in units] for name in names]
        columns.append([unit.forward if unit.again is None else unit.again for unit in units])
        self._sums = [np.array([0.0, *accumulate(column)]) for column in columns]
        ends = [stage_ends(problem, stage) for stage in range(problem.num_stages)]
        self._ends = [np.array([[sum(getattr(end, name) for end in own)] for own in ends]) for name in names]
        layers = np.array([unit.layer for unit in units])
        first = np.flatnonzero(np.diff(layers, prepend=layers[:1] - 1))
        self._layer = np.searchsorted(first, np.arange(len(units) + 1), side="right") - 1
        self._first = np.concatenate([first, np.full(len(units) + 1, len(units))])

    def times(self, edges: Numbers, again: Numbers) -> tuple[Times, Times, Times]:
        """Forward, backward and weight [stages, divisions].

        Args:
            edges: units before which stages begin, and where the last one ends [divisions, stages + 1].
            again: layers that are run again [divisions, stages].
        """
        start, end = edges[:, :-1].T, edges[:, 1:].T
        forward, backward, weight = (
            part[end] - part[start] + more for part, more in zip(self._sums, self._ends, strict=False)
        )
        if again.any():
            # Layer by layer; the first one may begin within the stage.
            rerun = np.minimum(self._first[self._layer[start] + again.T], end)
            backward = backward + np.where(again.T > 0, self._sums[3][rerun] - self._sums[3][start], 0.0)
        return forward, backward, weight

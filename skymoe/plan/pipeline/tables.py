"""All intervals of units at once: what a stage takes that holds them, and how many layers it must run again to fit.

Fewer layers run again are never slower: a pass only gets shorter, and a schedule in which every task waits for the same
tasks as before cannot end later. So under 1F1B, where each rank has one stage and its memory is its own affair, each
interval has one best number of layers run again: the smallest that fits. (It need not be monotone: the first layers may
keep little, and a layer that is run again needs room while it runs. All numbers are tried, upwards.)

Positions are the places where a stage may begin or end. Sums over units are differences of running sums; they may
differ from loads.py in the last bits, and `SLACK` is wider than that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skymoe.plan.pipeline.loads import layers_of, stage_ends
from skymoe.plan.pipeline.problem import SLACK, Problem
from skymoe.plan.pipeline.schedule import moments_of

Array = NDArray[np.float64]
Index = NDArray[np.intp]


@dataclass(frozen=True)
class Block:
    """One stage on intervals [i, j): rows are positions i from `first`, columns positions j from `end`.

    Attributes:
        forward, backward: time of one micro-batch; `backward` is inf where nothing fits.
        again: layers run again.
    """

    first: int
    end: int
    forward: Array
    backward: Array
    again: Index

    @property
    def time(self) -> Array:
        """Forward and backward."""
        return self.forward + self.backward


class Tables:
    """Running sums over the units of `problem`, and the blocks of its stages."""

    def __init__(self, problem: Problem) -> None:
        units = problem.units
        self.problem = problem
        self.alive = [moments[0][0] for moments in moments_of(problem)]
        layers = [len(layer) for layer in layers_of(units)]
        ends = np.cumsum([0, *layers])
        self.positions: Index = ends if problem.whole_layers else np.arange(len(units) + 1)
        self.layer_end: Index = ends[1:]
        self.layer: Index = np.append(np.repeat(np.arange(len(layers)), layers), len(layers))
        self.forward = _running(unit.forward for unit in units)
        self.backward = _running(unit.backward for unit in units)
        self.again = _running(unit.forward if unit.again is None else unit.again for unit in units)
        self.static = _running(unit.static for unit in units)
        self.activation = _running(unit.activation for unit in units)
        self.checkpoint = np.array([unit.checkpoint for unit in units] + [0.0])
        self.transient = np.array([unit.transient for unit in units])
        self.layer_checkpoint = _running(self.checkpoint[ends[:-1]])
        self.layer_running = np.array(
            [
                self.activation[end] - self.activation[start] + self.transient[start:end].max()
                for start, end in zip(ends[:-1], ends[1:], strict=True)
            ]
        )

    @property
    def last(self) -> int:
        """The last position: behind all units."""
        return len(self.positions) - 1

    def block(self, stage: int, rows: range, columns: range) -> Block:
        """`stage` on all intervals from positions `rows` to positions `columns`."""
        problem, ends = self.problem, stage_ends(self.problem, stage)
        i, j = self.positions[rows.start : rows.stop, None], self.positions[None, columns.start : columns.stop]
        forward = self.forward[j] - self.forward[i] + sum(end.forward for end in ends)
        backward = self.backward[j] - self.backward[i] + sum(end.backward for end in ends)
        again = np.zeros(forward.shape, dtype=np.intp)
        may_be_empty = problem.may_be_empty(stage)
        backward[j < i if may_be_empty else j <= i] = np.inf
        if problem.memory is not None:
            self._fit(stage, i, j, backward, again)
        return Block(rows.start, columns.start, forward, backward, again)

    def least_memory(self, stage: int, rows: range, columns: range) -> Array:
        """The smallest peak of `stage` on the intervals, whatever has to be run again; inf where it may not stand."""
        i, j = self.positions[rows.start : rows.stop, None], self.positions[None, columns.start : columns.stop]
        may_be_empty = self.problem.may_be_empty(stage)
        least = np.full((len(rows), len(columns)), np.inf)
        at = np.nonzero(j >= i if may_be_empty else j > i)
        first, end = i[at[0], 0], j[0, at[1]]
        again = np.zeros(len(first), dtype=np.intp)
        while len(first):
            least[at] = np.minimum(least[at], self._memory(stage, first, end, again))
            more = (again < self._num_layers(first, end)) & self.problem.recompute
            at, first, end, again = (at[0][more], at[1][more]), first[more], end[more], again[more] + 1
        return least

    def _fit(self, stage: int, i: Index, j: Index, backward: Array, again: Index) -> None:
        """Put the smallest number of layers that fits into `again`, its time into `backward` (inf: none fits)."""
        limit = (self.problem.memory or 0.0) * (1 + SLACK)
        at = np.nonzero(np.isfinite(backward))
        first, end = i[at[0], 0], j[0, at[1]]
        count = np.zeros(len(first), dtype=np.intp)
        saved = self._most_saved(stage)
        while len(first):
            excess = self._memory(stage, first, end, count) - limit
            good = excess <= 0
            again[at[0][good], at[1][good]] = count[good]
            backward[at[0][good], at[1][good]] += (
                self.again[self._again_end(first[good], end[good], count[good])] - self.again[first[good]]
            )
            # No number of layers below this one can save the excess.
            step = np.floor(np.minimum(excess, saved * len(self.transient)) / saved * (1 - SLACK))
            count = count + np.maximum(1, step).astype(np.intp)
            never = ~good & ((count > self._num_layers(first, end)) | (not self.problem.recompute))
            backward[at[0][never], at[1][never]] = np.inf
            more = ~good & ~never
            at, first, end, count = (at[0][more], at[1][more]), first[more], end[more], count[more]

    def _most_saved(self, stage: int) -> float:
        """The most that running one more layer again can save."""
        alive = self._alive(stage)
        layers = self.activation[self.layer_end] - np.append(0.0, self.activation[self.layer_end[:-1]])
        return float(max(alive * layers.max(initial=0.0), 1e-100))

    def _memory(self, stage: int, first: Index, end: Index, again: Index) -> Array:
        """Peak with units [first, end), the first `again` layers run again; arrays of equal length."""
        ends, layers = stage_ends(self.problem, stage), self._num_layers(first, end)
        rerun = self._again_end(first, end, again)
        kept = self.activation[end] - self.activation[rerun] + sum(part.activation for part in ends)
        later = np.minimum(self.layer[first] + np.maximum(again, 1), len(self.layer_end))
        before = np.minimum(self.layer[first] + 1, len(self.layer_end))
        points = self.checkpoint[first] + self.layer_checkpoint[later] - self.layer_checkpoint[before]
        kept = kept + np.where(again > 0, points, 0.0)
        static = self.static[end] - self.static[first] + sum(part.static for part in ends)
        running = np.maximum(self._largest_transient(first, end), max(part.transient for part in ends))
        running = np.maximum(running, self._largest_rerun(first, end, again, layers))
        return np.asarray(static + self._alive(stage) * kept + running)

    def _alive(self, stage: int) -> int:
        return self.alive[stage]

    def _num_layers(self, first: Index, end: Index) -> Index:
        return np.asarray(np.where(end > first, self.layer[end - 1] - self.layer[first] + 1, 0), dtype=np.intp)

    def _again_end(self, first: Index, end: Index, again: Index) -> Index:
        """The unit behind the first `again` layers."""
        layer = np.minimum(self.layer[first] + again - 1, len(self.layer_end) - 1)
        return np.asarray(np.where(again > 0, np.minimum(self.layer_end[layer], end), first))

    def _largest_transient(self, first: Index, end: Index) -> Array:
        return _range_max(self.transient, first, end)

    def _largest_rerun(self, first: Index, end: Index, again: Index, layers: Index) -> Array:
        """Of the layers run again, the most that one of them needs: whole ones in the middle, cut ones at the ends."""
        head_end = np.minimum(self.layer_end[np.minimum(self.layer[first], len(self.layer_end) - 1)], end)
        whole = _range_max(self.layer_running, self.layer[first] + 1, self.layer[first] + np.minimum(again, layers - 1))
        tail = np.maximum(np.append(0, self.layer_end)[self.layer[np.maximum(end, 1) - 1]], first)
        largest = np.maximum(np.where(again > 0, self._slice(first, head_end), 0.0), whole)
        return np.maximum(largest, np.where((again > 0) & (again == layers), self._slice(tail, end), 0.0))

    def _slice(self, first: Index, end: Index) -> Array:
        return np.asarray(self.activation[end] - self.activation[first] + _range_max(self.transient, first, end))


def _running(values: Iterable[float]) -> Array:
    return np.concatenate([[0.0], np.cumsum(np.fromiter(values, dtype=np.float64))])


def _range_max(values: Array, first: Index, end: Index) -> Array:
    """The largest of values[first:end], 0 where there is none; both arrays of one shape."""
    if not len(first) or not len(values):
        return np.zeros(len(first))
    if (values == values[0]).all():
        return np.where(end > first, values[0], 0.0)
    levels = [values]  # a sparse table: level l has the largest of 2**l values
    while 2 ** len(levels) <= len(values):
        half = 2 ** (len(levels) - 1)
        levels.append(np.maximum(levels[-1][:-half], levels[-1][half:]))
    largest = np.zeros(len(first))
    length = end - first
    for power, level in enumerate(levels):
        here = (length >= 2**power) & (length < 2 ** (power + 1))
        largest[here] = np.maximum(level[first[here]], level[end[here] - 2**power])
    return largest

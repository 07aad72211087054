"""The bound with what is not known yet made small: two passes over the blocks.

`before[s][i]` and `rest[s][i]` are the least time that stages left of position i, or from it on, can take in sum (what
is run again depends on the cuts, so the sums do). With them every stage on every interval has a bound of its own,
`cost`, and the best division of the relaxed problem is a path whose largest cost is least: `left[s][i]` is the least
possible largest cost of stages 0..s-1 that end at i, `right[s][i]` that of stages s.. that begin there. Where nothing
is run again the sums do not depend on the cuts, and the relaxed problem is the bound itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from skymoe.plan.pipeline.bound import stage_bound
from skymoe.plan.pipeline.problem import SLACK, Problem
from skymoe.plan.pipeline.tables import Array, Block, Tables


@dataclass(frozen=True)
class Relaxed:
    """Arrays per stage; an index is a position minus the first one of its range.

    Attributes:
        blocks: the stages.
        before, rest: least sums, with hops there and back.
        cost: bound of a stage on an interval.
        left, right: least largest cost on either side.
    """

    blocks: list[Block]
    before: list[Array]
    rest: list[Array]
    cost: list[Array]
    left: list[Array]
    right: list[Array]

    @property
    def bound(self) -> float:
        """No division is faster; inf where none fits."""
        return float(self.right[0][0])

    def path(self, limit: float) -> list[int]:
        """Positions of a division all of whose costs are at most `limit`: as even as they allow, heavy stages early."""
        place, path = 0, [0]
        for stage, block in enumerate(self.blocks):
            within = np.maximum(self.cost[stage][place], self.right[stage + 1]) <= limit * (1 + SLACK)
            share = self.rest[stage][place] / (len(self.blocks) - stage)
            uneven = np.abs(block.time[place] - share)
            uneven[~within] = np.inf
            nearest = np.nonzero(uneven <= uneven.min() * (1 + SLACK))[0]
            place = int(nearest[-1])
            path.append(block.end + place)
        return path


def relax(problem: Problem, tables: Tables, ranges: Sequence[range]) -> Relaxed:
    """Blocks and relaxed bounds of all stages that begin and end within `ranges`."""
    ranks, there_and_back = problem.num_ranks, 2 * problem.hop
    blocks = [tables.block(stage, ranges[stage], ranges[stage + 1]) for stage in range(ranks)]
    times = [block.time for block in blocks]
    before, rest = [np.zeros(1)], [np.zeros(1)]
    for time in times:
        before.append((before[-1][:, None] + time).min(axis=0) + there_and_back)
    for time in reversed(times):
        rest.append((time + rest[-1][None, :]).min(axis=1) + there_and_back)
    rest.reverse()
    cost, left, right = [], [np.zeros(1)], [np.zeros(1)]
    for stage, block in enumerate(blocks):
        own = stage_bound(problem, stage, block.forward, _finite(block.backward), _finite(rest[stage + 1])[None, :])
        own += before[stage][:, None]
        own[~np.isfinite(block.backward) | ~np.isfinite(rest[stage + 1])[None, :]] = np.inf
        cost.append(own)
        left.append(np.maximum(left[-1][:, None], own).min(axis=0))
    for own in reversed(cost):
        right.append(np.maximum(own, right[-1][None, :]).min(axis=1))
    right.reverse()
    return Relaxed(blocks, before, rest, cost, left, right)


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, 0.0)

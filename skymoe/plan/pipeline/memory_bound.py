"""A lower bound that knows what memory forces a pipeline to run again, for schedules with several stages per rank.

Let rank r take X_r per micro-batch and keep, in each of its worst moments k, so much that it fits:

    minimise    max_r ( m X_r + fill_r )
    subject to  static_r + sum_{s of r} alive_ks kept_s + what runs  <=  memory      for all r, k

and let, for the bound, every unit be kept or run again on any stage, whatever its neighbours do. Then Lagrange's
multipliers, mu_r >= 0 of the ranks (their sum is 1) and lambda_rk >= 0 of the moments, give

    T  >=  sum_r mu_r (m ends_r + fill_r) + sum_rk lambda_rk (what r has without units - memory)
           + sum_u min over s of r { kept:       m mu_r t_u           + lambda_r static_u + kappa_s activation_u
                                   { run again:  m mu_r (t_u + again) + lambda_r static_u + kappa_s checkpoint_u

with lambda_r = sum_k lambda_rk and kappa_s = sum_k lambda_rk alive_ks, for every choice of multipliers: all of it is
weak duality, so however they are found, the bound holds. They are found by ascent on the same function with soft
minima. Without multipliers of memory and with equal ones of ranks it is the bound of load and fill.

Left out: that stages are contiguous and not empty; of cut layers, the second checkpoint; room for layers made again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skymoe.plan.pipeline.evaluate import uniform_sizes
from skymoe.plan.pipeline.loads import layers_of, loads_of, peak_memory, stage_ends
from skymoe.plan.pipeline.problem import SLACK, Problem
from skymoe.plan.pipeline.schedule import moments_of, ranks_of

Array = NDArray[np.float64]

_ROUNDS = 200
_STEPS = np.geomspace(0.1, 0.001, _ROUNDS)
_SOFT = np.geomspace(0.03, 0.0003, _ROUNDS)
"""Temperatures of the minima, as shares of a rank's time."""
_MOMENTUM = 0.9


@dataclass(frozen=True)
class _Dual:
    """Times in shares of the mean rank's step, bytes in shares of the memory.

    Attributes:
        number: of units of each kind [kinds].
        time, again, static, kept, point: of a unit of each kind [kinds].
        rank: that has each stage [stages].
        load: of each rank without units [ranks].
        moment: rank of each worst moment [moments].
        alive: [moments, stages], 0 on other ranks' stages.
        over: what each moment has without units, less the memory [moments].
        reruns: whether layers may be run again.
    """

    number: Array
    time: Array
    again: Array
    static: Array
    kept: Array
    point: Array
    rank: NDArray[np.intp]
    load: Array
    moment: NDArray[np.intp]
    alive: Array
    over: Array
    reruns: bool

    def choices(self, ranks: Array, moments: Array) -> Array:
        """What a unit costs [kept or run again, stages, kinds]."""
        room = np.bincount(self.moment, moments, len(ranks))[self.rank]
        share, alive = ranks[self.rank], moments @ self.alive
        both = np.outer(share, self.time) + np.outer(room, self.static)
        kept = both + np.outer(alive, self.kept)
        if not self.reruns:
            return kept[None]
        return np.stack([kept, both + np.outer(share, self.again) + np.outer(alive, self.point)])

    def value(self, ranks: Array, moments: Array) -> float:
        """The bound with these multipliers."""
        least = self.choices(ranks, moments).min(axis=(0, 1))
        return float(ranks @ self.load + moments @ self.over + self.number @ least)

    def ascent(self, ranks: Array, moments: Array, soft: float) -> tuple[Array, Array]:
        """Where the soft bound rises: each rank's load, and each moment's excess, of a division in proportions."""
        costs = self.choices(ranks, moments)
        weights = np.exp((costs.min(axis=(0, 1)) - costs) / soft)
        parts = self.number * weights / weights.sum(axis=(0, 1))
        took, held = parts.sum(axis=0) @ self.time, parts.sum(axis=0) @ self.static
        kept = parts[0] @ self.kept
        if self.reruns:
            took, kept = took + parts[1] @ self.again, kept + parts[1] @ self.point
        loads = self.load + np.bincount(self.rank, took, len(ranks))
        static = np.bincount(self.rank, held, len(ranks))
        return loads, self.over + static[self.moment] + self.alive @ kept


def memory_bound(problem: Problem, fill: Sequence[float]) -> float:
    """No division that fits is faster; `fill` is the idle time that each rank has at least. 0 without a memory."""
    mean = problem.num_micro * sum(unit.forward + unit.backward for unit in problem.units) / problem.num_ranks
    if not problem.memory or mean <= 0:
        return 0.0
    sizes = uniform_sizes(problem)
    if max(peak_memory(problem, loads_of(problem, sizes, [0] * len(sizes)))) <= problem.memory:
        return 0.0  # nothing is forced
    dual = _dual(problem, fill, mean, problem.memory * (1 + SLACK))
    ranks = np.full(problem.num_ranks, 1.0 / problem.num_ranks)
    moments = np.zeros(len(dual.moment))
    speed, size = moments, problem.num_ranks * np.bincount(dual.moment)[dual.moment]
    best = dual.value(ranks, moments)
    for step, soft in zip(_STEPS, _SOFT, strict=True):
        loads, excess = dual.ascent(ranks, moments, soft / problem.num_ranks)
        ranks = ranks * np.exp(step * (loads - loads.max()))
        ranks /= ranks.sum()
        speed = _MOMENTUM * speed + excess / size
        moments = np.maximum(0.0, moments + step * speed)
        best = max(best, dual.value(ranks, moments))
    return best * mean * (1 - SLACK)


def _dual(problem: Problem, fill: Sequence[float], mean: float, memory: float) -> _Dual:
    owned, worst = ranks_of(problem), moments_of(problem)
    ends = [stage_ends(problem, stage) for stage in range(problem.num_stages)]
    rank = np.zeros(problem.num_stages, dtype=np.intp)
    load, moment, alive, over = [], [], [], []
    for number, own in enumerate(owned):
        rank[list(own)] = number
        parts = [end for stage in own for end in ends[stage]]
        load.append(problem.num_micro * sum(end.forward + end.backward for end in parts) + fill[number])
        always = sum(end.static for end in parts) + max(end.transient for end in parts)
        for counts in worst[number]:
            row = np.zeros(problem.num_stages)
            row[list(own)] = counts
            kept = sum(row[stage] * end.activation for stage in own for end in ends[stage])
            moment.append(number)
            alive.append(row)
            over.append((always + kept - memory) / memory)
    kinds = Counter(_kinds(problem))
    columns = np.array(list(kinds)).T
    return _Dual(
        number=np.array(list(kinds.values()), dtype=np.float64),
        time=columns[0] * problem.num_micro / mean, again=columns[1] * problem.num_micro / mean,
        static=columns[2] / memory, kept=columns[3] / memory, point=columns[4] / memory,
        rank=rank, load=np.array(load) / mean, moment=np.array(moment), alive=np.array(alive), over=np.array(over),
        reruns=problem.recompute,
    )  # fmt: skip


def _kinds(problem: Problem) -> list[tuple[float, ...]]:
    """Time, time when run again, static, activation, checkpoint: of a layer that of its first unit, of others none."""
    return [
        (
            unit.forward + unit.backward, unit.forward if unit.again is None else unit.again, unit.static,
            unit.activation, 0.0 if place else unit.checkpoint,
        )
        for layer in layers_of(problem.units)
        for place, unit in enumerate(layer)
    ]  # fmt: skip

"""Makespans of many divisions at once, without spans: the simulator's recurrence on arrays.

    end = max(end of the rank's task before, end of what the task needs + hop) + duration

The same operations in the same order as plan/simulator.py, so the results are equal to the last bit (a test holds them
together). What is gained: the order is walked once for all divisions, and tasks that do not wait for one another are
computed together. Under 1F1B their places are known without walking: with slots of unit length, stage s does forward j
in slot s + 2j and backward j in slot 2P - 1 - s + 2j, so that a slot's forwards are on stages of one parity, its
backwards on those of the other, and everything that they need lies in earlier slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from skymoe.plan.orders import Order
from skymoe.plan.pipeline.cache import Key, remembered
from skymoe.plan.pipeline.loads import Load
from skymoe.plan.pipeline.problem import Problem
from skymoe.plan.pipeline.schedule import is_one_f_one_b, key_of, order_of_key
from skymoe.plan.timeline import Task

Times = NDArray[np.float64]
"""[stages, divisions]"""


def makespans(problem: Problem, forward: Times, backward: Times, weight: Times) -> NDArray[np.float64]:
    """Seconds of a step, per division. The columns of the arguments are divisions; `backward` includes `weight`."""
    if is_one_f_one_b(problem):
        return one_f_one_b_makespans(forward, backward, problem.num_micro, problem.hop)
    durations = np.concatenate([forward, backward, backward - weight, weight])
    return _run(_levels(key_of(problem)), durations, problem.hop)


def makespan_of(problem: Problem, loads: Sequence[Load]) -> float:
    """Of one division."""
    columns = (np.array([[getattr(load, name)] for load in loads]) for name in ("forward", "backward", "weight"))
    return float(makespans(problem, *columns)[0])


def one_f_one_b_makespans(forward: Times, backward: Times, num_micro: int, hop: float) -> NDArray[np.float64]:
    """1F1B with stage s on rank s, slot by slot."""
    stages, last = forward.shape[0], 2 * num_micro - 2
    # Row s + 1 is stage s; the rows around them are never waited for.
    down, up = np.full((2, stages + 2, forward.shape[1]), -np.inf)
    free = np.zeros((stages + 2, forward.shape[1]))
    for slot in range(2 * stages - 1 + last + 1):
        low, high = max(0, slot - last), min(stages - 1, slot)
        low += (low ^ slot) & 1
        if low <= high:
            end = np.maximum(free[low + 1 : high + 2 : 2], down[low : high + 1 : 2] + hop)
            end += forward[low : high + 1 : 2]
            down[low + 1 : high + 2 : 2] = free[low + 1 : high + 2 : 2] = end
        low, high = max(0, 2 * stages - 1 - slot), min(stages - 1, 2 * stages - 1 - slot + last)
        low += (low ^ slot ^ 1) & 1
        if low <= high:
            end = np.maximum(free[low + 1 : high + 2 : 2], up[low + 2 : high + 3 : 2] + hop)
            end += backward[low : high + 1 : 2]
            up[low + 1 : high + 2 : 2] = free[low + 1 : high + 2 : 2] = end
    return np.asarray(free.max(axis=0))


Name = tuple[str, int, int]
"""What others wait for: kind ("B" also for the half towards the input), stage, micro-batch."""


class Placed(NamedTuple):
    """A task of the order: how many tasks wait for one another before it, and which two it waits for."""

    level: int
    rank: int
    kind: str
    name: Name
    before: Name | None
    needed: Name | None


class Level(NamedTuple):
    """Tasks `start` to `end` by number; rows of durations; whether what is needed is a hop away. Number 0 is none."""

    start: int
    end: int
    before: NDArray[np.intp]
    needed: NDArray[np.intp]
    row: NDArray[np.intp]
    hops: NDArray[np.float64]


def _run(levels: Sequence[Level], durations: Times, hop: float) -> NDArray[np.float64]:
    ends = np.zeros((levels[-1].end, durations.shape[1]))
    for level in levels:
        arrival = ends[level.needed]
        if hop:
            arrival += level.hops * hop
        ends[level.start : level.end] = np.maximum(ends[level.before], arrival) + durations[level.row]
    return np.asarray(ends.max(axis=0))


@remembered
def _levels(key: Key) -> tuple[Level, ...]:
    placed = sorted(_placed(order_of_key(key)), key=lambda one: one.level)
    number = {one.name: index + 1 for index, one in enumerate(placed)}
    owner = {one.name[1]: one.rank for one in placed}
    levels, start = [], 0
    for _, group in groupby(placed, key=lambda one: one.level):
        part = list(group)
        levels.append(
            Level(
                start=start + 1,
                end=start + len(part) + 1,
                before=np.array([number[one.before] if one.before else 0 for one in part], dtype=np.intp),
                needed=np.array([number[one.needed] if one.needed else 0 for one in part], dtype=np.intp),
                row=np.array(["FBIW".index(one.kind) * len(owner) + one.name[1] for one in part], dtype=np.intp),
                hops=np.array([[float(one.needed is not None and owner[one.needed[1]] != one.rank)] for one in part]),
            )
        )
        start += len(part)
    return tuple(levels)


def _placed(order: Order) -> list[Placed]:
    last = max(task.stage for tasks in order for task in tasks)
    level: dict[Name, int] = {}
    placed: list[Placed] = []
    place: list[int] = [0] * len(order)
    before: list[Name | None] = [None] * len(order)
    while len(placed) < sum(map(len, order)):
        known = len(placed)
        for rank, tasks in enumerate(order):
            while place[rank] < len(tasks):
                task, own = tasks[place[rank]], before[rank]
                needed = _needed(task, last)
                if needed is not None and needed not in level:
                    break
                name = ("B" if task.kind == "I" else task.kind, task.stage, task.micro)
                level[name] = 1 + max(level[own] if own else 0, level[needed] if needed else 0)
                placed.append(Placed(level[name], rank, task.kind, name, own, needed))
                before[rank] = name
                place[rank] += 1
        assert len(placed) > known, "the orders of plan/orders.py can be finished"
    return placed


def _needed(task: Task, last: int) -> Name | None:
    stage, kind, micro = task
    if kind == "W":
        return "B", stage, micro
    if kind == "F":
        return ("F", stage - 1, micro) if stage else None
    return ("F", stage, micro) if stage == last else ("B", stage + 1, micro)

"""How many micro-batches are alive: between forward and backward, per stage, at the worst moments of a rank.

A rank works through its tasks one after the other, so what is alive does not depend on how long they take: it is read
off the order itself (plan/orders.py). A rank with several stages has several counts at once, and which moment is the
worst depends on what a micro-batch leaves in each stage; therefore all moments are kept that no other dominates.
1F1B: min(P - s, m). Interleaved: 2(P - s - 1) + (V - 1)P + 1 chunks (Narayanan et al. 2021). An activation is let go
by the gradient of the weights, where that is apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from skymoe.plan.orders import interleaved, one_rank, zbv
from skymoe.plan.timeline import Task
from skymoe.spec.layout import ScheduleKind

Counts = tuple[int, ...]
"""Micro-batches alive in each stage of a rank, in ascending order of stages."""


@lru_cache(maxsize=4096)
def alive_counts(schedule: ScheduleKind, pp: int, num_stages: int, num_micro: int) -> tuple[tuple[Counts, ...], ...]:
    """Per pipeline rank, the worst moments; no one of them dominates another."""
    if pp == 1:
        return (worst_moments(one_rank(num_stages, 1)[0]),)
    if schedule is ScheduleKind.ONE_F_ONE_B:
        return tuple(((min(pp - rank, num_micro),),) for rank in range(pp))
    enough = min(num_micro, 3 * pp)  # warm-up takes at most two rounds; then rounds of pp repeat
    if schedule is ScheduleKind.ZERO_BUBBLE:
        return tuple(worst_moments(tasks) for tasks in zbv(pp, enough))
    if num_micro % pp == 0:
        num_micro = enough
    return tuple(worst_moments(tasks) for tasks in interleaved(pp, num_stages // pp, num_micro))


def vocabulary_alive(pp: int, num_micro: int, *, barriers: int = 1) -> tuple[int, ...]:
    """Micro-batches alive per stage when embedding and head are divided over all stages.

    Every time that the ranks meet over the loss, the backward pass of a micro-batch begins one later: Vocabulary
    Parallelism's second algorithm meets once, its first twice (Yeung et al. 2025, section 5).
    """
    return tuple(min(pp - rank + barriers, num_micro) for rank in range(pp))


def worst_moments(tasks: Sequence[Task]) -> tuple[Counts, ...]:
    """The undominated counts of a rank that works through `tasks`."""
    place = {stage: index for index, stage in enumerate(sorted({task.stage for task in tasks}))}
    alive, worst = [0] * len(place), set[Counts]()
    growing = False
    for stage, kind, _ in tasks:
        if kind == "F":
            alive[place[stage]] += 1
            growing = True
        elif kind in ("B", "W"):
            if growing:  # only a moment before something is let go can be the worst
                worst.add(tuple(alive))
                growing = False
            alive[place[stage]] -= 1
    return tuple(one for one in sorted(worst) if not any(one != other and _within(one, other) for other in worst))


def _within(one: Counts, other: Counts) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))

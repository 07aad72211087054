"""The schedule of a problem: which rank has which stages, in which order it works, what is alive at its worst moments.

Fewer micro-batches than ranks are run as they are. What no order exists for is refused, with the nearest numbers that
would do.
"""

from __future__ import annotations

from functools import lru_cache

from skymoe.base.errors import ConfigError
from skymoe.plan.memory.alive import Counts, worst_moments
from skymoe.plan.orders import Order, check_micro_batches, interleaved, one_f_one_b, one_rank, zbv
from skymoe.plan.pipeline.problem import Problem
from skymoe.spec.layout import Layout, ScheduleKind
from skymoe.spec.split import Split

Key = tuple[ScheduleKind, int, int, int]


def key_of(problem: Problem) -> Key:
    """All that the order depends on: schedule, ranks, stages per rank, micro-batches."""
    return problem.schedule, problem.num_ranks, problem.chunks, problem.num_micro


def is_one_f_one_b(problem: Problem) -> bool:
    """Whether the exact solver's objective is that of the schedule. On one rank all schedules are the same."""
    return problem.chunks == 1 and (problem.num_ranks == 1 or problem.schedule is ScheduleKind.ONE_F_ONE_B)


def check_schedule(problem: Problem) -> None:
    """Raises ConfigError when the schedule cannot have these chunks or micro-batches."""
    wanted = {ScheduleKind.ONE_F_ONE_B: (1, 1), ScheduleKind.ZERO_BUBBLE: (2, 2)}.get(problem.schedule, (1, 1024))
    if not wanted[0] <= problem.chunks <= wanted[1]:
        raise ConfigError(
            f"{problem.schedule} has {wanted[0]} stage(s) per rank, not {problem.chunks}",
            where="chunks",
            hint=f"chunks {wanted[0]}" + ("" if problem.chunks == 1 else ", or the schedule interleaved"),
        )
    if problem.schedule is ScheduleKind.INTERLEAVED:
        layout = Layout(pp=problem.num_ranks, schedule=problem.schedule, stages=Split((1,) * problem.num_stages))
        check_micro_batches(layout, problem.num_micro)


@lru_cache(maxsize=64)
def order_of_key(key: Key) -> Order:
    """The order, task by task."""
    schedule, ranks, chunks, num_micro = key
    if ranks == 1:
        return one_rank(chunks, num_micro)
    if schedule is ScheduleKind.ONE_F_ONE_B:
        return one_f_one_b(ranks, num_micro)
    return zbv(ranks, num_micro) if schedule is ScheduleKind.ZERO_BUBBLE else interleaved(ranks, chunks, num_micro)


def ranks_of(problem: Problem) -> list[tuple[int, ...]]:
    """The stages of each rank, ascending."""
    ranks, stages = problem.num_ranks, problem.num_stages
    if problem.schedule is ScheduleKind.ZERO_BUBBLE and ranks > 1:
        return [(rank, stages - 1 - rank) for rank in range(ranks)]
    return [tuple(range(rank, stages, ranks)) for rank in range(ranks)]


def moments_of(problem: Problem) -> list[tuple[Counts, ...]]:
    """Per rank, the micro-batches alive in each of its stages at the worst moments."""
    if is_one_f_one_b(problem):
        return [((min(problem.num_ranks - rank, problem.num_micro),),) for rank in range(problem.num_ranks)]
    return _moments(key_of(problem))


@lru_cache(maxsize=256)
def _moments(key: Key) -> list[tuple[Counts, ...]]:
    return [worst_moments(tasks) for tasks in order_of_key(key)]

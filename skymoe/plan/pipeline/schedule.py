"""The schedule of a problem: which rank has which stages, in which order it works, what is alive at its worst moments.

Fewer micro-batches than ranks are run as they are. What no order exists for is refused, with the nearest numbers that
would do.
"""

from __future__ import annotations

from skymoe.base.errors import ConfigError
from skymoe.plan.memory.alive import Counts, alive_counts
from skymoe.plan.orders import Order, check_micro_batches, order_on
from skymoe.plan.pipeline.cache import Key, remembered
from skymoe.plan.pipeline.problem import Problem
from skymoe.spec.layout import Layout, ScheduleKind, stages_of_rank
from skymoe.spec.split import Split


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


@remembered
def order_of_key(key: Key) -> Order:
    """The order, task by task."""
    return order_on(*key)


def ranks_of(problem: Problem) -> list[tuple[int, ...]]:
    """The stages of each rank, ascending."""
    ranks, stages = problem.num_ranks, problem.num_stages
    return [stages_of_rank(problem.schedule, ranks, stages, rank) for rank in range(ranks)]


def moments_of(problem: Problem) -> list[tuple[Counts, ...]]:
    """Per rank, the micro-batches alive in each of its stages at the worst moments; never more than there are."""
    extra, most = problem.extra_alive, problem.num_micro
    counted = alive_counts(problem.schedule, problem.num_ranks, problem.num_stages, most)
    if not extra:
        return list(counted)
    return [tuple(tuple(min(count + extra, most) for count in counts) for counts in moments) for moments in counted]

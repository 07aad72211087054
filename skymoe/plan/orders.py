"""In which order each rank of a pipeline works through its tasks.

    1f1b          warm-up: rank r forwards pp - r - 1 micro-batches; steady: one forward, one backward; cool-down: the
                  backwards that are left (PipeDream-flush; Narayanan et al. 2021, figure 4)
    interleaved   the same with several chunks per rank: forwards take `pp` micro-batches through chunk after chunk,
                  backwards from the last chunk to the first (Narayanan et al. 2021, figure 4, below)
    zbv           two stages per rank, down the ranks and up again, the backward cut in two (Qi et al. 2024, section 6)

These are the orders that torch's schedules run (a test holds them together); where an order says nothing about waiting,
the tasks wait for their inputs. No torch here.
"""

from __future__ import annotations

from skymoe.base.errors import ConfigError
from skymoe.plan.timeline import Kind, Task
from skymoe.spec.layout import Layout, ScheduleKind

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741

Order = tuple[tuple[Task, ...], ...]
"""Tasks per pipeline rank."""


def check_micro_batches(layout: Layout, num_micro: int) -> None:
    """Raises ConfigError when the schedule cannot run `num_micro` micro-batches; says which numbers it can."""
    pp, schedule = layout.pp, layout.schedule
    if num_micro < 1:
        raise ConfigError(f"a step needs at least one micro-batch, got {num_micro}")
    if pp == 1:
        return
    if schedule is ScheduleKind.ONE_F_ONE_B and num_micro < pp:
        raise ConfigError(
            f"1f1b over pp {pp} needs at least {pp} micro-batches per step and replica, there are {num_micro}",
            where="parallel.schedule",
            why="with fewer the stages cannot all work at once",
            hint=f"a smaller micro-batch, so that a replica has {pp} of them, or parallel.pp={num_micro}",
        )
    rounds = max(1, num_micro // pp)
    if schedule is ScheduleKind.INTERLEAVED and num_micro % rounds:
        near = [m for m in range(1, 2 * num_micro + pp) if m % max(1, m // pp) == 0]
        below, above = max(m for m in near if m < num_micro), min(m for m in near if m > num_micro)
        raise ConfigError(
            f"interleaved over pp {pp} cannot divide {num_micro} micro-batches into {rounds} equal rounds",
            where="parallel.schedule",
            hint=f"{below} or {above} micro-batches per step and replica; a multiple of {pp} always goes",
        )

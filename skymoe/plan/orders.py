"""In which order each rank of a pipeline works through its tasks.

    1f1b          warm-up: rank r forwards pp - r - 1 micro-batches; steady: one forward, one backward; cool-down: the
                  backwards that are left (PipeDream-flush; Narayanan et al. 2021, figure 4)
    interleaved   the same with several chunks per rank: forwards take `pp` micro-batches through chunk after chunk,
                  backwards from the last chunk to the first (Narayanan et al. 2021, figure 4, below)
    gpipe         all forwards, then all backwards (Huang et al. 2019): the same bubble as 1f1b, with every micro-batch
                  alive at once; for comparison only
    zbv           two stages per rank, down the ranks and up again, the backward cut in two (Qi et al. 2024, section 6)

Beside them, made for given times: plan/zero_bubble.py and plan/eager.py. 1f1b, interleaved and zbv are the orders that
torch's schedules run (a test holds them together); where an order says nothing about waiting,
the tasks wait for their inputs. No torch here.
"""

from __future__ import annotations

from typing import Final

from skymoe.base.errors import ConfigError
from skymoe.plan.timeline import Task
from skymoe.spec.layout import Layout, ScheduleKind
from skymoe.spec.timeline import PassKind

F: Final[PassKind] = "F"
B: Final[PassKind] = "B"
I: Final[PassKind] = "I"  # noqa: E741
W: Final[PassKind] = "W"

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


def order_of(layout: Layout, num_micro: int) -> Order:
    """The order of the layout's schedule. Raises ConfigError when it cannot run `num_micro` micro-batches."""
    check_micro_batches(layout, num_micro)
    return order_on(layout.schedule, layout.pp, layout.num_stages // layout.pp, num_micro)


def order_on(schedule: ScheduleKind, pp: int, chunks: int, num_micro: int) -> Order:
    """The order of `schedule` on `pp` ranks of `chunks` stages; any number of micro-batches is run as it is."""
    if pp == 1:
        return one_rank(chunks, num_micro)
    if schedule is ScheduleKind.ONE_F_ONE_B:
        return one_f_one_b(pp, num_micro)
    return zbv(pp, num_micro) if schedule is ScheduleKind.ZERO_BUBBLE else interleaved(pp, chunks, num_micro)


def one_rank(num_stages: int, num_micro: int) -> Order:
    """One micro-batch after the other, forward through all stages and back."""
    stages = range(num_stages)
    there_and_back: list[tuple[int, PassKind]] = [(stage, F) for stage in stages] + [
        (stage, B) for stage in reversed(stages)
    ]
    return (tuple(Task(stage, kind, micro) for micro in range(num_micro) for stage, kind in there_and_back),)


def one_f_one_b(pp: int, num_micro: int) -> Order:
    """Stage r is on rank r."""
    order = []
    for rank in range(pp):
        warm_up = min(pp - rank - 1, num_micro)
        tasks = [Task(rank, F, micro) for micro in range(warm_up)]
        for micro in range(warm_up, num_micro):
            tasks += [Task(rank, F, micro), Task(rank, B, micro - warm_up)]
        tasks += [Task(rank, B, micro) for micro in range(num_micro - warm_up, num_micro)]
        order.append(tuple(tasks))
    return tuple(order)


def gpipe(pp: int, num_micro: int) -> Order:
    """Stage r is on rank r."""
    micros = range(num_micro)
    return tuple(
        (*(Task(rank, F, micro) for micro in micros), *(Task(rank, B, micro) for micro in micros)) for rank in range(pp)
    )


def interleaved(pp: int, chunks: int, num_micro: int) -> Order:
    """Stage s is on rank s mod pp.

    Micro-batches go in rounds: as many as there are ranks, or a few more so that the rounds are equal. Forwards take a
    round through the first chunk, then through the second, ..; backwards begin with the last.
    """
    per_round = num_micro // max(1, num_micro // pp)
    whole = [(start, chunk) for start in range(0, num_micro, per_round) for chunk in range(chunks)]
    places = [(chunk, start + number) for start, chunk in whole for number in range(per_round)]
    order = []
    for rank in range(pp):
        forwards = [Task(chunk * pp + rank, F, micro) for chunk, micro in places]
        backwards = [Task((chunks - 1 - chunk) * pp + rank, B, micro) for chunk, micro in places]
        warm_up = min((chunks - 1) * per_round + 2 * (pp - 1 - rank), len(forwards))
        tasks = forwards[:warm_up]
        for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
            tasks += [forward, backward]
        order.append((*tasks, *backwards[len(forwards) - warm_up :]))
    return tuple(order)


def zbv(pp: int, num_micro: int) -> Order:
    """Stages r and 2 pp - 1 - r are on rank r, which is down the V and up again.

    The order is that of at least 2 pp - 1 micro-batches; with fewer, those that do not exist are left out of it.
    """
    return tuple(
        tuple(task for task in _zbv_rank(pp, rank, max(2 * pp - 1, num_micro)) if task.micro < num_micro)
        for rank in range(pp)
    )


def _zbv_rank(pp: int, rank: int, num_micro: int) -> list[Task]:
    down, up = rank, 2 * pp - 1 - rank
    tasks: list[Task] = []
    count: dict[tuple[int, PassKind], int] = {}

    def add(*pairs: tuple[int, PassKind]) -> None:
        for pair in pairs:
            micro = count.get(pair, 0)
            count[pair] = micro + 1
            tasks.append(Task(*pair, micro))

    # Warm-up: down the V, the first forwards of the way up, the first backwards.
    add(*[(down, F)] * (2 * (pp - rank) - 1))
    for _ in range(rank):
        add((up, F), (down, F))
    for _ in range(pp - rank):
        add((up, F), (up, I), (up, W))
    # Steady: each stage one forward and one backward with its weight gradients.
    while count.get((up, F), 0) < count[down, F] or count[down, F] < num_micro:
        if count[down, F] < num_micro:
            add((down, F))
        add((down, I), (down, W), (up, F), (up, I), (up, W))
    # Cool-down: input gradients first, for others wait for them; weight gradients fill the gaps.
    for _ in range(rank):
        add((down, I), (up, I))
    for _ in range(pp - rank):
        add((down, I), (down, W))
    for stage in (up, down):
        add(*[(stage, W)] * (num_micro - count.get((stage, W), 0)))
    return tasks

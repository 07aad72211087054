"""Schedules with the backward pass cut in two, one stage per rank (Qi et al. 2024, "Zero Bubble Pipeline Parallelism").

    I   the gradient of a stage's input: the stage before waits for it           (the paper's B)
    W   the gradients of its weights: nobody waits; it may fill a gap later      (the paper's W)

    zb_h1   by hand, figure 2: as 1f1b, but rank r keeps its W back by r micro-batches. Memory of 1f1b,
            bubble (P - 1)(T_F + T_I - T_W)
    zb_h2   by hand, figure 3: twice the warm-up, W kept back by 2 r. Bubble (P - 1)(T_F + T_I - 2 T_W) of the longest
            rank (`Timeline.longest_rank_s`)
    zero_bubble_order   found for given times and a memory limit: the heuristic of section 3.1. ZB-1p is the limit P,
            ZB-2p the limit 2 P

A zero bubble needs T_F = T_I = T_W or enough memory, and ranks that start the next step without waiting for each other
(section 4); with a barrier at the end of a step the last rank waits for the first one.

Left out: the integer program of appendix G, which starts from this heuristic and improves small cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from skymoe.base.errors import ConfigError
from skymoe.plan.orders import F, I, Order, W
from skymoe.plan.timeline import Task
from skymoe.plan.zero_bubble_ranks import Ranks, Times


def zb_h1(pp: int, num_micro: int) -> Order:
    """Stage r is on rank r. Alive on rank r: P - r micro-batches, and r that wait for their weights' gradients."""
    return tuple(_by_hand(rank, num_micro, warm_up=pp - rank, late=rank) for rank in range(pp))


def zb_h2(pp: int, num_micro: int) -> Order:
    """Stage r is on rank r. Alive on rank r: 2 (P - r) - 1 micro-batches, and 2 r that wait for their weights."""
    return tuple(_by_hand(rank, num_micro, warm_up=2 * (pp - rank) - 1, late=2 * rank) for rank in range(pp))


def _by_hand(rank: int, num_micro: int, *, warm_up: int, late: int) -> tuple[Task, ...]:
    """`warm_up` forwards, then in turn a backward, the weights of `late` micro-batches before it, a forward."""
    tasks = [Task(rank, F, micro) for micro in range(min(warm_up, num_micro))]
    for micro in range(num_micro):
        tasks.append(Task(rank, I, micro))
        if micro >= late:
            tasks.append(Task(rank, W, micro - late))
        if micro + warm_up < num_micro:
            tasks.append(Task(rank, F, micro + warm_up))
    return (*tasks, *(Task(rank, W, micro) for micro in range(max(0, num_micro - late), num_micro)))


def zero_bubble_order(
    pp: int,
    num_micro: int,
    forward: float | Sequence[float],
    input: float | Sequence[float],
    weight: float | Sequence[float],
    hop: float = 0.0,
    memory_limit_in_micro_batches: float | None = None,
    *,
    kept_for_weights: float = 1.0,
    barrier: bool = False,
) -> Order:
    """The best of eight greedy schedules under a memory limit (section 3.1). Stage r is on rank r.

    Args:
        pp, num_micro: P and m.
        forward, input, weight: T_F, T_B (towards the input) and T_W, one for all stages or one for each.
        hop: T_comm.
        memory_limit_in_micro_batches: activations that a rank may hold, in those of one micro-batch; None for 2 P.
        kept_for_weights: the part of them that stays between I and W (M_W / M_B of table 1).
        barrier: all ranks wait for the last one at the end of a step; without it a step costs the longest rank's time.

    Raises:
        ConfigError: the limit is below one micro-batch.
    """
    limit = 2.0 * pp if memory_limit_in_micro_batches is None else memory_limit_in_micro_batches
    if limit < 1:
        raise ConfigError(
            f"a rank must have room for the activations of one micro-batch, the limit is {limit:g}",
            hint="a limit of 1 or more, better of the number of stages",
        )
    times = Times(
        forward=_each(forward, pp), input=_each(input, pp), weight=_each(weight, pp), hop=hop,
        limit=limit, kept=kept_for_weights,
    )  # fmt: skip
    made = [_greedy(times, num_micro, *switches) for switches in product((True, False), repeat=3)]
    best = min(made, key=lambda ranks: (ranks.end, ranks.longest) if barrier else (ranks.longest, ranks.end))
    return best.order()


def _greedy(times: Times, num_micro: int, delay_first: bool, skip_forwards: bool, greedy: bool) -> Ranks:
    """One schedule: warm-up, then in turn a forward and a backward on every rank, then the weights that are left."""
    ranks = Ranks(times, num_micro)
    _warm_up(ranks, delay_first)
    for _ in range(1, num_micro):
        for rank in _ranks_that_forward(ranks, skip_forwards):
            ranks.make_room(rank)
            if rank:
                ranks.fill(rank, ranks.arrival(rank, F), greedy)
            ranks.put(rank, F)
        for rank in reversed(range(ranks.pp)):
            if rank < ranks.pp - 1:
                ranks.fill(rank, ranks.arrival(rank, I), greedy)
            if rank == 0 and ranks.forwards[0] == num_micro:  # nobody waits for the first rank's backward
                ranks.weigh_all(0)
            ranks.put(rank, I)
    for rank in range(ranks.pp):
        ranks.weigh_all(rank)
    return ranks


def _warm_up(ranks: Ranks, delay_first: bool) -> None:
    """Forwards while the first micro-batch goes down and comes back, as many as time and memory allow.

    With `delay_first` also the one that makes the first backward late by less than a forward.
    """
    for rank in range(ranks.pp):
        ranks.put(rank, F)
    more = [0] * ranks.pp
    first_back = ranks.free[-1] + ranks.times.input[-1]
    for rank in reversed(range(ranks.pp - 1)):
        room = ranks.times.limit - ranks.held[rank]
        comes, free, forward = first_back + ranks.times.hop, ranks.free[rank], ranks.times.forward[rank]
        while 1 + more[rank] < ranks.num_micro and more[rank] + 1 <= room:
            if free >= comes if delay_first else free + forward > comes:
                break
            free += forward
            more[rank] += 1
        first_back = max(free, comes) + ranks.times.input[rank]
    for rank in range(1, ranks.pp):  # one forward more than the next rank, or that one would wait for us
        if 1 + more[rank - 1] < ranks.num_micro:
            more[rank] = max(0, min(more[rank], more[rank - 1] - 1))
    for rank in range(ranks.pp):
        for _ in range(more[rank]):
            ranks.put(rank, F)
    for rank in reversed(range(ranks.pp)):
        ranks.put(rank, I)


def _ranks_that_forward(ranks: Ranks, skip_forwards: bool) -> list[int]:
    """The ranks whose next pass is a forward.

    With `skip_forwards` a rank that is two ahead of the next one leaves it out where its backward could come first and
    that makes no gap, or none that counts. Who is skipped by the next rank is skipped as well.
    """
    chosen = [ranks.forwards[rank] < ranks.num_micro for rank in range(ranks.pp)]
    if skip_forwards:
        for rank in range(ranks.pp - 1):
            if chosen[rank] and ranks.forwards[rank] >= ranks.forwards[rank + 1] + 2:
                chosen[rank] = ranks.should_forward(rank)
    for rank in reversed(range(ranks.pp - 1)):
        chosen[rank] = chosen[rank] and chosen[rank + 1]
    return [rank for rank in range(ranks.pp) if chosen[rank]]


def _each(value: float | Sequence[float], pp: int) -> tuple[float, ...]:
    values = (float(value),) * pp if isinstance(value, (int, float)) else tuple(value)
    if len(values) != pp:
        raise ValueError(f"{pp} stages, {len(values)} times")
    return values

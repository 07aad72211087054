"""1f1b for unequal stages: warm-up by the clock instead of by count.

Plain 1f1b lets rank r run P - r forwards before its first backward, whatever they cost. When a later stage is slow, or
hops take time, a rank then waits for its first backward with memory to spare. Here a rank takes what it can do: a
backward that is there; else a forward, while fewer than `limit` micro-batches are alive and (`patient`) unless its
first backward would have to wait for that. This is what Fig. 6 of the Skywork-MoE report draws: 4, 4, 4, 1
forwards before the first backward on [6, 6, 6, 6] layers, 5, 5, 5, 3, 1 on [5, 5, 5, 5, 4].

It costs memory: up to `limit` micro-batches alive on a rank, where 1f1b has P - r. It is not always faster: a rank that
runs ahead keeps backwards waiting when all are busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from skymoe.plan.orders import B, F, Order
from skymoe.plan.timeline import Task


def eager_one_f_one_b(
    num_micro: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    *,
    hop_s: float = 0.0,
    limit: int | Sequence[int] | None = None,
    patient: bool = True,
) -> Order:
    """Stage r is on rank r, for as many ranks as there are times.

    Args:
        num_micro: m.
        forward_s, backward_s: of each stage.
        hop_s: from rank to rank.
        limit: micro-batches that may be alive on a rank, for all or for each; None for as many as ranks.
        patient: leave out the forward that would keep a rank's first backward waiting.

    Raises:
        ValueError: a limit below 1.
    """
    return _list_schedule(num_micro, forward_s, backward_s, hop_s, _limits(len(forward_s), limit), patient)


def _limits(pp: int, limit: int | Sequence[int] | None) -> list[int]:
    limits = [pp if limit is None else limit] * pp if limit is None or isinstance(limit, int) else list(limit)
    if len(limits) != pp or min(limits) < 1:
        raise ValueError(f"{pp} ranks need limits of at least one micro-batch, not {limits}")
    return limits


def _list_schedule(
    num_micro: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    hop_s: float,
    limits: Sequence[int],
    patient: bool,
) -> Order:
    """Ranks choose in the order of time; what is not there yet is looked at again when it comes."""
    pp = len(forward_s)
    tasks: list[list[Task]] = [[] for _ in range(pp)]
    forwards, backwards, free = [0] * pp, [0] * pp, [0.0] * pp
    comes_down = [
        [0.0] * num_micro if rank == 0 else [] for rank in range(pp)
    ]  # when inputs are there, as far as known
    comes_back: list[list[float]] = [[] for _ in range(pp)]
    events = [(0.0, 0)]
    while events:
        now, rank = heappop(events)
        if now < free[rank]:  # busy: it will look again when it is done
            continue
        at_f = comes_down[rank][forwards[rank]] if forwards[rank] < len(comes_down[rank]) else None
        at_b = comes_back[rank][backwards[rank]] if backwards[rank] < len(comes_back[rank]) else None
        if at_b is not None and at_b <= now:
            free[rank] = now + backward_s[rank]
            tasks[rank].append(Task(rank, B, backwards[rank]))
            backwards[rank] += 1
            heappush(events, (free[rank], rank))
            if rank:
                comes_back[rank - 1].append(free[rank] + hop_s)
                heappush(events, (free[rank] + hop_s, rank - 1))
            continue
        may = at_f is not None and at_f <= now and forwards[rank] - backwards[rank] < limits[rank]
        if not may or (patient and not backwards[rank] and at_b is not None and at_b < now + forward_s[rank]):
            continue
        free[rank] = now + forward_s[rank]
        tasks[rank].append(Task(rank, F, forwards[rank]))
        forwards[rank] += 1
        heappush(events, (free[rank], rank))
        if rank < pp - 1:
            comes_down[rank + 1].append(free[rank] + hop_s)
            heappush(events, (free[rank] + hop_s, rank + 1))
        else:
            comes_back[rank].append(free[rank])
    return tuple(map(tuple, tasks))

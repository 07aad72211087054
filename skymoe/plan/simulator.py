"""How long a step of a pipeline takes, stage by stage, when stages take unequal times.

Each rank works through its tasks in the order given (plan/orders.py) and waits for what a task needs: a forward for the
forward of the stage before, a backward for the backward of the stage after. The hop from rank to rank takes its time on
top. It is either hidden (no rank's work: sends run beside the passes) or `exposed`: the rank that sends is held up
until the hop is over, as with blocking sends. This is exact for a machine that does what it is told; what it leaves out
is said by the name of its arguments: every micro-batch takes the same time, and a hop never waits for another.

A rank runs until it must wait; the end of what it waits for wakes it up. So every task is looked at once or twice,
whatever the order: 32 stages with 256 micro-batches, 16 384 tasks, are some hundredths of a second. `makespan` is the
same without the spans, for those who compare many divisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from skymoe.plan.orders import Order
from skymoe.plan.timeline import Timeline
from skymoe.spec.timeline import PassKind, Span

# What others wait for: forward, gradient of the input (a whole backward or its half), or nothing (weights).
_RESULT: Final[dict[PassKind, int]] = {"F": 0, "B": 1, "I": 1, "W": 2}


def simulate(
    order: Order,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    weight_s: Sequence[float] | None = None,
    *,
    hop_s: float | Sequence[float] = 0.0,
    exposed: bool = False,
) -> Timeline:
    """Place every task of `order` in time.

    Args:
        order: tasks per rank.
        forward_s: of each stage, for one micro-batch.
        backward_s: of each stage: the whole backward where `weight_s` is None, else the part towards the input.
        weight_s: of each stage: the weight gradients. Needed where the order has them apart.
        hop_s: from the end of a task to the moment in which its result is on the next rank: for all boundaries of
            stages, or one for each (stages - 1). Stages on one rank need no hop.
        exposed: the rank that sends does nothing else until the hop is over.

    Returns:
        The spans of the ranks of one pipeline, numbered along it.

    Raises:
        ValueError: the order can never be finished: a task stands before one that it needs.
    """
    seconds = _seconds(order, forward_s, backward_s, weight_s)
    spans = [
        Span(stage, rank, kind, micro, start, start + seconds[kind][stage])
        for rank, (tasks, starts) in enumerate(zip(order, _starts(order, seconds, hop_s, exposed), strict=True))
        for (stage, kind, micro), start in zip(tasks, starts, strict=True)
    ]
    return Timeline.of(spans, max((span.end_s for span in spans), default=0.0))


def makespan(
    order: Order,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    weight_s: Sequence[float] | None = None,
    *,
    hop_s: float | Sequence[float] = 0.0,
    exposed: bool = False,
) -> float:
    """The end of the step that `simulate` would draw."""
    seconds = _seconds(order, forward_s, backward_s, weight_s)
    starts = _starts(order, seconds, hop_s, exposed)
    lasts = [(tasks[-1], times[-1]) for tasks, times in zip(order, starts, strict=True) if tasks]
    return max((start + seconds[task.kind][task.stage] for task, start in lasts), default=0.0)


def _starts(
    order: Order, seconds: dict[PassKind, Sequence[float]], hop_s: float | Sequence[float], exposed: bool
) -> list[list[float]]:
    """When every task begins, rank by rank."""
    owner = {task.stage: rank for rank, tasks in enumerate(order) for task in tasks}
    down = _hops(owner, hop_s)
    leaving = (down, [0.0, *down[:-1]], [0.0] * len(down))  # forwards, backwards, weights
    width = 1 + max((task.micro for tasks in order for task in tasks), default=0)
    per_result = len(owner) * width
    arrived: list[float | None] = [None] * (3 * per_result)  # when a result is where it is needed next
    waiting: dict[int, int] = {}  # the rank that waits for a result
    free = [0.0] * len(order)
    starts: list[list[float]] = [[] for _ in order]
    last, awake = len(owner) - 1, list(range(len(order) - 1, -1, -1))
    while awake:
        rank = awake.pop()
        tasks, own, now = order[rank], starts[rank], free[rank]
        for place in range(len(own), len(tasks)):
            stage, kind, micro = tasks[place]
            here = stage * width + micro
            if kind == "F":
                need = here - width if stage else -1
            elif kind == "W":
                need = per_result + here
            else:
                need = here if stage == last else per_result + here + width
            if need >= 0:
                ready = arrived[need]
                if ready is None:
                    waiting[need] = rank
                    break
                if kind == "W" or (kind != "F" and stage == last):  # made here: no hop
                    ready = now
                if ready > now:
                    now = ready
            own.append(now)
            now += seconds[kind][stage]
            result = _RESULT[kind]
            hop = leaving[result][stage]
            key = result * per_result + here
            arrived[key] = now + hop
            if exposed:
                now += hop
            if key in waiting:
                awake.append(waiting.pop(key))
        free[rank] = now
    _check_done(order, starts)
    return starts


def _seconds(
    order: Order, forward_s: Sequence[float], backward_s: Sequence[float], weight_s: Sequence[float] | None
) -> dict[PassKind, Sequence[float]]:
    """Of each kind of pass, by stage."""
    if weight_s is None and any(task.kind == "W" for tasks in order for task in tasks):
        raise ValueError("the order has weight gradients apart: weight_s is needed")
    weights = [0.0] * len(backward_s) if weight_s is None else weight_s
    whole = [towards_input + w for towards_input, w in zip(backward_s, weights, strict=True)]
    return {"F": forward_s, "B": whole, "I": backward_s, "W": weights}


def _hops(owner: dict[int, int], hop_s: float | Sequence[float]) -> list[float]:
    """Of each stage to the next; the last entry, to nowhere, is 0."""
    last = len(owner) - 1
    hops = [float(hop_s)] * last if isinstance(hop_s, (int, float)) else list(hop_s)
    if len(hops) != max(0, last):
        raise ValueError(f"{last + 1} stages have {last} boundaries, not {len(hops)}")
    return [0.0 if owner[stage] == owner[stage + 1] else hop for stage, hop in enumerate(hops)] + [0.0]


def _check_done(order: Order, starts: Sequence[Sequence[float]]) -> None:
    stuck = [tasks[len(times)] for tasks, times in zip(order, starts, strict=True) if len(times) < len(tasks)]
    if stuck:
        raise ValueError(f"the order cannot go on: {stuck[0]} waits for a task that comes later")

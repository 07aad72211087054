"""How long a step of a pipeline takes, stage by stage, when stages take unequal times.

Each rank works through its tasks in the order given (plan/orders.py) and waits for what a task needs: a forward for the
forward of the stage before, a backward for the backward of the stage after; the hop from rank to rank takes its time on
top and no rank's work. This is exact for a machine that does what it is told; what it leaves out is said by the name of
its arguments: every micro-batch takes the same time, and a hop never waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence

from skymoe.plan.orders import Order
from skymoe.plan.timeline import Task, Timeline
from skymoe.spec.timeline import PassKind, Span


def simulate(
    order: Order,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    weight_s: Sequence[float] | None = None,
    *,
    hop_s: float = 0.0,
) -> Timeline:
    """Place every task of `order` in time.

    Args:
        order: tasks per rank.
        forward_s: of each stage, for one micro-batch.
        backward_s: of each stage: the whole backward where `weight_s` is None, else the part towards the input.
        weight_s: of each stage: the weight gradients. Needed where the order has them apart.
        hop_s: from the end of a task to the moment in which its result is on the next rank.

    Returns:
        The spans of the ranks of one pipeline, numbered along it.

    Raises:
        ValueError: the order can never be finished: a task stands before one that it needs.
    """
    owner = {task.stage: rank for rank, tasks in enumerate(order) for task in tasks}
    num_stages = len(owner)
    weights = [0.0] * num_stages if weight_s is None else weight_s
    seconds: dict[PassKind, Sequence[float]] = {
        "F": forward_s,
        "B": [input_s + w for input_s, w in zip(backward_s, weights, strict=True)],
        "I": backward_s,
        "W": weights,
    }
    if weight_s is None and any(task.kind == "W" for tasks in order for task in tasks):
        raise ValueError("the order has weight gradients apart: weight_s is needed")
    done: dict[tuple[str, int, int], float] = {}
    free, position = [0.0] * len(order), [0] * len(order)
    spans: list[Span] = []
    while len(spans) < sum(map(len, order)):
        before = len(spans)
        for rank, tasks in enumerate(order):
            while position[rank] < len(tasks):
                task = tasks[position[rank]]
                ready = _ready(task, owner, num_stages, done, hop_s)
                if ready is None:
                    break
                start = max(free[rank], ready)
                end = start + seconds[task.kind][task.stage]
                free[rank], done[_what(task)] = end, end
                spans.append(Span(task.stage, rank, task.kind, task.micro, start, end))
                position[rank] += 1
        if len(spans) == before:
            stuck = [str(tasks[place]) for tasks, place in zip(order, position, strict=True) if place < len(tasks)]
            raise ValueError(f"the order cannot go on: {stuck[0]} waits for a task that comes later")
    return Timeline.of(spans, max(free))


def _what(task: Task) -> tuple[str, int, int]:
    """What others wait for: forward, the gradient of the input (whole backward or its half), or nothing (weights)."""
    return "B" if task.kind == "I" else task.kind, task.stage, task.micro


def _ready(
    task: Task, owner: dict[int, int], num_stages: int, done: dict[tuple[str, int, int], float], hop_s: float
) -> float | None:
    """When what `task` needs is on its rank; None while that is not known."""
    stage, kind, micro = task
    if kind == "W":
        return done.get(("B", stage, micro))
    if kind == "F":
        if stage == 0:
            return 0.0
        source, what = stage - 1, "F"
    elif stage == num_stages - 1:
        return done.get(("F", stage, micro))
    else:
        source, what = stage + 1, "B"
        if ("F", stage, micro) not in done:
            return None
    sent = done.get((what, source, micro))
    if sent is None:
        return None
    return sent + (hop_s if owner[source] != owner[stage] else 0.0)

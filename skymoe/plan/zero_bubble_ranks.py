"""The state of all ranks while a zero-bubble schedule is made (plan/zero_bubble.py): when each is free, what it holds,
how long it has been idle. Tasks are put at the end of a rank's list, in the order of micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

from skymoe.plan.orders import F, I, Order, W
from skymoe.plan.timeline import Task
from skymoe.spec.timeline import PassKind


@dataclass(frozen=True, kw_only=True)
class Times:
    """What the schedule is made for: times of each stage, of a hop; memory in activations of one micro-batch.

    Attributes:
        forward, input, weight, hop: seconds.
        limit: that a rank may hold.
        kept: what stays between I and W, of 1.
    """

    forward: tuple[float, ...]
    input: tuple[float, ...]
    weight: tuple[float, ...]
    hop: float
    limit: float
    kept: float


class Ranks:
    """All ranks, one stage each.

    Attributes:
        free: when each rank has done its tasks.
        held: memory of each, in activations of one micro-batch.
        forwards, inputs, weights: how many of each kind a rank has done.
    """

    def __init__(self, times: Times, num_micro: int) -> None:
        self.times, self.num_micro, self.pp = times, num_micro, len(times.forward)
        self.free = [0.0] * self.pp
        self.held = [0.0] * self.pp
        self.forwards, self.inputs, self.weights = [0] * self.pp, [0] * self.pp, [0] * self.pp
        self._forward_ends: list[list[float]] = [[] for _ in range(self.pp)]
        self._input_ends: list[list[float]] = [[] for _ in range(self.pp)]
        self._idle = [0.0] * self.pp
        self._most_idle = 0.0
        self._begins = [0.0] * self.pp
        self._tasks: list[list[Task]] = [[] for _ in range(self.pp)]

    def put(self, rank: int, kind: PassKind) -> None:
        """The next task of `kind`, as soon as what it needs is there."""
        start = max(self.free[rank], self.arrival(rank, kind))
        if self.forwards[rank]:  # what comes before a rank's first task is no gap: its step begins with it
            self._idle[rank] += start - self.free[rank]
            self._most_idle = max(self._most_idle, self._idle[rank])
        else:
            self._begins[rank] = start
        if kind == F:
            self._tasks[rank].append(Task(rank, F, self.forwards[rank]))
            self.free[rank] = start + self.times.forward[rank]
            self.held[rank] += 1
            self.forwards[rank] += 1
            self._forward_ends[rank].append(self.free[rank])
        elif kind == I:
            self._tasks[rank].append(Task(rank, I, self.inputs[rank]))
            self.free[rank] = start + self.times.input[rank]
            self.held[rank] += self.times.kept - 1
            self.inputs[rank] += 1
            self._input_ends[rank].append(self.free[rank])
        else:
            self._tasks[rank].append(Task(rank, W, self.weights[rank]))
            self.free[rank] = start + self.times.weight[rank]
            self.held[rank] -= self.times.kept
            self.weights[rank] += 1

    def arrival(self, rank: int, kind: PassKind) -> float:
        """When what the next task of `kind` needs of a neighbour is there; 0 where it needs nothing."""
        if kind == F and rank:
            return self._forward_ends[rank - 1][self.forwards[rank]] + self.times.hop
        if kind == I and rank < self.pp - 1:
            return self._input_ends[rank + 1][self.inputs[rank]] + self.times.hop
        return 0.0

    def make_room(self, rank: int) -> None:
        """Gradients of weights until the activations of one more micro-batch fit."""
        while self.held[rank] + 1 > self.times.limit + 1e-9 and self._late(rank):
            self.put(rank, W)

    def fill(self, rank: int, until: float, greedy: bool) -> None:
        """Gradients of weights in the gap before `until`.

        One that is longer than what is left of the gap is put there too if the gap would make the idlest rank idler
        still, or if `greedy`.
        """
        while self._late(rank) and self.free[rank] + self.times.weight[rank] <= until:
            self.put(rank, W)
        gap = until - self.free[rank]
        if self._late(rank) and gap > 0 and (greedy or gap > self._most_idle - self._idle[rank]):
            self.put(rank, W)

    def weigh_all(self, rank: int) -> None:
        """All gradients of weights that are late."""
        while self._late(rank):
            self.put(rank, W)

    def should_forward(self, rank: int) -> bool:
        """Whether a rank that is two forwards ahead of the next one should do another before its next backward."""
        following = self.free[rank + 1] + self.times.forward[rank + 1] + self.times.input[rank + 1] + self.times.hop
        if self.free[rank] >= following:
            return False
        late, held, seconds = self._late(rank), self.held[rank] + 1, 0.0
        while held > self.times.limit + 1e-9 and late:
            late, held, seconds = late - 1, held - self.times.kept, seconds + self.times.weight[rank]
        if self.free[rank] + self.times.forward[rank] + seconds <= following:
            return True
        return following - self.free[rank] > self._most_idle - self._idle[rank]

    @property
    def end(self) -> float:
        """When the last rank has done its tasks."""
        return max(self.free)

    @property
    def longest(self) -> float:
        """From the first task to the last one of the rank for which that is longest."""
        return max(end - begin for begin, end in zip(self._begins, self.free, strict=True))

    def order(self) -> Order:
        """What was put."""
        return tuple(map(tuple, self._tasks))

    def _late(self, rank: int) -> int:
        """Micro-batches whose gradients of weights are still to be done."""
        return self.inputs[rank] - self.weights[rank]

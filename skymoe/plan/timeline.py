"""Timeline: what each stage of a pipeline does when. The same data whether it was simulated or measured, so that the
two can be laid beside each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """A piece of work on one micro-batch: forward, backward (whole, or only towards the input), weight gradients."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"


class Task(NamedTuple):
    """A piece of work, not yet placed in time."""

    stage: int
    kind: Kind
    micro: int


class Action(NamedTuple):
    """A piece of work and when it ran, in seconds from the start of the step."""

    stage: int
    kind: Kind
    micro: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """One step of a pipeline, or the part of it that one rank has seen.

    Attributes:
        actions: in the order in which they started.
        span_s: from the start of the step to the end of it, on the slowest rank.
        ranks: the stages of each rank in it. A rank is idle when none of its stages works; waiting for a neighbour is
            idle time.
    """

    actions: tuple[Action, ...]
    span_s: float
    ranks: tuple[tuple[int, ...], ...]

    @property
    def busy_s(self) -> Mapping[int, float]:
        """Seconds of work per stage."""
        busy = {stage: 0.0 for stages in self.ranks for stage in stages}
        for action in self.actions:
            busy[action.stage] += action.end_s - action.start_s
        return busy

    @property
    def idle_s(self) -> tuple[float, ...]:
        """Seconds without work per rank."""
        busy = self.busy_s
        return tuple(self.span_s - sum(busy[stage] for stage in stages) for stages in self.ranks)

    @property
    def bubble(self) -> float:
        """Idle part of all ranks' time."""
        whole = self.span_s * len(self.ranks)
        return sum(self.idle_s) / whole if whole else 0.0

    def period_s(self, stage: int, kind: Kind = Kind.FORWARD) -> float:
        """Seconds between micro-batches in the middle of the step, as `stage` starts them."""
        starts = [action.start_s for action in self.actions if action.stage == stage and action.kind is kind]
        third = len(starts) // 3
        middle = starts[third : len(starts) - third]
        return (middle[-1] - middle[0]) / (len(middle) - 1) if len(middle) > 1 else 0.0


def in_order(actions: Iterable[Action]) -> tuple[Action, ...]:
    """By start, then by stage."""
    return tuple(sorted(actions, key=lambda action: (action.start_s, action.stage, action.end_s)))

"""When a rank worked on what: start and end of every pass of its stages, in each step.

Always on: two readings of the clock per pass on a CPU, two recorded events on a GPU (they are read only when somebody
asks). Time between passes is idle time, waiting for a neighbour included; collectives within a stage (tensor and
expert parallelism) count as work of the stage.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

from skymoe.plan.timeline import Timeline
from skymoe.spec.timeline import PassKind, Span

Mark = float | torch.cuda.Event
_WORDS: dict[PassKind, str] = {"F": "forward", "B": "backward", "I": "backward of the input", "W": "weight gradients"}


class Clock:
    """The passes of the running, or of the last, step.

    Args:
        rank: in the world.
        device: whose time it is.

    Attributes:
        tell: called with what this rank turns to, and whether there it waits for others (`Heartbeat.phase`).
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.tell: Callable[[str, bool], None] = _nobody
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[int, PassKind, int, Mark, Mark]] = []
        self._begin: Mark = 0.0
        self._end: Mark = 0.0
        self._met: Mark = 0.0

    def mark(self) -> Mark:
        """Now."""
        if not self._cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """A step starts; what was kept of the one before is dropped."""
        self._marks.clear()
        self._begin = self.mark()

    def end(self) -> None:
        """The step is over, waiting included."""
        self._end = self.mark()

    def meet(self) -> None:
        """All ranks are here: they leave a sum over the world that followed the step."""
        self._met = self.mark()

    def start(self, stage: int, kind: PassKind, micro: int) -> Mark:
        """A pass begins."""
        self.tell(f"{_WORDS[kind]}, micro-batch {micro}, stage {stage}", False)
        return self.mark()

    def add(self, stage: int, kind: PassKind, micro: int, start: Mark) -> None:
        """A pass that began at `start` ends now."""
        self._marks.append((stage, kind, micro, start, self.mark()))
        self.tell("wait for a neighbour", True)

    def prolong(self) -> None:
        """The pass added last ends only now: the loss belongs to the forward pass of the last stage."""
        stage, kind, micro, start, _ = self._marks[-1]
        self._marks[-1] = (stage, kind, micro, start, self.mark())

    def timeline(self) -> Timeline:
        """What this rank did in the last step, in seconds from its start. On a GPU it waits for the step to end."""
        spans = [
            Span(stage, self.rank, kind, micro, self._seconds(start), self._seconds(end))
            for stage, kind, micro, start, end in self._marks
        ]
        return Timeline.of(spans, self._seconds(self._end))

    @property
    def until_meeting_s(self) -> float:
        """Seconds from the start of the step to the meeting after it."""
        return self._seconds(self._met)

    def _seconds(self, mark: Mark) -> float:
        if isinstance(mark, float):
            assert isinstance(self._begin, float)
            return mark - self._begin
        mark.synchronize()
        assert isinstance(self._begin, torch.cuda.Event)
        return self._begin.elapsed_time(mark) / 1000


def _nobody(phase: str, waits: bool) -> None:
    """Nobody wants to know."""

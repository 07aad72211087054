"""Ranks that are slower than the others who do the same work.

One slow rank slows everybody: the others wait for it in the next collective, and by the wall clock all look alike. So
each rank counts its *busy* seconds (computing, not waiting); on log steps they are exchanged, and a rank that needs
more than 1.3 times the median of the ranks of its own stage is named. Other stages have other work and are no measure.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from skymoe.parallel.mesh import Mesh
from skymoe.spec.layout import Coordinate

SLOW = 1.3
_PHASE_BYTES = 56
_RECORD = f"<d{_PHASE_BYTES}s"


@dataclass(frozen=True)
class RankTime:
    """Busy seconds of a rank since the last exchange, and the phase that took most of them."""

    rank: int
    coordinate: Coordinate
    seconds: float
    phase: str = ""


@dataclass(frozen=True)
class Straggler:
    """A slow rank: its busy seconds, their ratio to the median of its stage, and the phase that took most of them."""

    rank: int
    coordinate: Coordinate
    seconds: float
    ratio: float
    phase: str


def stragglers(times: Sequence[RankTime], *, slow: float = SLOW) -> list[Straggler]:
    """The ranks whose busy time is more than `slow` x the median of the ranks with the same stages, slowest first.

    Of two ranks the median is the mean, so that the slower is named when it needs 1.86 times the other (slow 1.3).
    """
    found = []
    for pp in sorted({time.coordinate.pp for time in times}):
        stage = [time for time in times if time.coordinate.pp == pp]
        usual = median(time.seconds for time in stage)
        for time in stage:
            if usual > 0 and time.seconds > slow * usual:
                found.append(Straggler(time.rank, time.coordinate, time.seconds, time.seconds / usual, time.phase))
    return sorted(found, key=lambda one: -one.ratio)


class StepTimes:
    """Exchanges the busy seconds of a window on log steps: one all-gather of 64 bytes per rank.

    Busy seconds are those of `Heartbeat.busy()`: of all phases that were not marked as waiting.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def exchange(self, busy: Mapping[str, float]) -> list[RankTime]:
        """The window of every rank, in the order of ranks; every rank calls at the same step.

        Args:
            busy: seconds by phase of this rank.
        """
        group, layout = self._mesh.world, self._mesh.layout
        seconds = sum(busy.values())
        phase = max(busy, key=lambda name: busy[name], default="")
        packed = struct.pack(_RECORD, seconds, phase.encode()[:_PHASE_BYTES])
        records = [packed]
        if group.handle is not None:
            own = torch.tensor(list(packed), dtype=torch.uint8, device=self._mesh.device)
            all_ranks = [torch.empty_like(own) for _ in group.ranks]
            dist.all_gather(all_ranks, own, group=group.handle)
            records = [bytes(record.tolist()) for record in all_ranks]
        times = []
        for rank, record in enumerate(records):
            seconds, name = struct.unpack(_RECORD, record)
            times.append(RankTime(rank, layout.coordinate(rank), seconds, name.rstrip(b"\0").decode(errors="replace")))
        return times

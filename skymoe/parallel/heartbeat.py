"""Signs of life: what each rank is doing, for itself and for the others.

The training thread says `phase("forward, micro-batch 2", step=17)` whenever it turns to something else: an assignment
and an event, no message. A thread of watch.py publishes the latest word to the store, every second at least. A process
that is stopped or dead publishes nothing; one that hangs publishes the same phase, with a growing age.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from skymoe.parallel.launch import World
from skymoe.spec.layout import Coordinate


class _Phase(NamedTuple):
    name: str
    step: int
    began: float  # time.monotonic()
    waits: bool


class Beat(NamedTuple):
    """The last word of a rank, as others read it.

    Attributes:
        rank: whose.
        coordinate: pp, dp, tp; empty when the layout was not known yet.
        step, phase: what it was doing.
        waits: whether in that phase it waits for others.
        seconds: how long it had been doing it.
        wall: its clock when it said so (seconds since 1970).
        told: how often it has said anything; what grows, lives.
    """

    rank: int
    coordinate: tuple[int, ...]
    step: int
    phase: str
    waits: bool
    seconds: float
    wall: float
    told: int

    @property
    def who(self) -> str:
        """`rank 3 (pp 1, dp 0, tp 1)`."""
        return named(self.rank, self.coordinate)

    @property
    def where(self) -> str:
        """`"forward, micro-batch 2" of step 17`."""
        return f'"{self.phase}" of step {self.step}'


def named(rank: int, coordinate: Sequence[int] | None) -> str:
    """`rank 3 (pp 1, dp 0, tp 1)`, or `rank 3`."""
    if not coordinate:
        return f"rank {rank}"
    axes = ", ".join(f"{axis} {place}" for axis, place in zip(Coordinate._fields, coordinate, strict=True))
    return f"rank {rank} ({axes})"


class Heartbeat:
    """What this rank is doing. Written by the training thread, read by the watch.

    Attributes:
        changed: set with every new phase; the watch clears it when it has published.
    """

    def __init__(self, rank: int = 0, coordinate: Coordinate | None = None) -> None:
        self.rank = rank
        self.coordinate = coordinate
        self._now = _Phase("start", 0, time.monotonic(), False)
        self.changed = threading.Event()
        self._busy: dict[str, float] = {}
        self._count = 0

    def phase(self, name: str, step: int, *, waits: bool = False) -> None:
        """The training thread turns to `name`.

        Args:
            name: a few words; they stand in messages.
            step: of training.
            waits: other ranks decide when it ends. Such a rank is not the one that hangs, and the time is not busy.
        """
        before, now = self._now, time.monotonic()
        if not before.waits:
            self._busy[before.name] = self._busy.get(before.name, 0.0) + now - before.began
        self._now = _Phase(name, step, now, waits)
        self.changed.set()

    def busy(self) -> dict[str, float]:
        """Seconds by phase since the last call, waiting left out; the phase under way counts when it ends."""
        busy, self._busy = self._busy, {}
        return busy

    @property
    def seconds(self) -> float:
        """How long the phase has lasted."""
        return time.monotonic() - self._now.began

    def beat(self) -> Beat:
        """The word to publish."""
        now = self._now
        self._count += 1
        seconds = time.monotonic() - now.began
        return Beat(
            self.rank, tuple(self.coordinate or ()), now.step, now.name, now.waits, seconds, time.time(), self._count
        )


def publish(store: dist.Store, beat: Beat) -> None:
    """Leave `beat` where others find it."""
    store.set(f"heartbeat/{beat.rank}", json.dumps(beat._asdict()))


def read_beat(store: dist.Store, rank: int) -> Beat | None:
    """The last word of one rank; None when it has said nothing."""
    key = f"heartbeat/{rank}"
    return _parsed(json.loads(store.get(key))) if store.check([key]) else None


def read_beats(store: dist.Store, world: World) -> dict[int, Beat]:
    """The last word of every rank that has said anything."""
    keys = [f"heartbeat/{rank}" for rank in range(world.size)]
    if not store.check(keys):
        keys = [key for key in keys if store.check([key])]
    beats = [_parsed(json.loads(text)) for text in (store.multi_get(keys) if keys else [])]
    return {beat.rank: beat for beat in beats}


def _parsed(fields: dict[str, Any]) -> Beat:
    return Beat(**{**fields, "coordinate": tuple(fields["coordinate"])})

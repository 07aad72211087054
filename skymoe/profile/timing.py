"""Tasks, and how they are timed: in turns, so that a disturbance of some seconds touches a little of everything.

What counts is the median over rounds. On a CPU, with one thread, the clock is that of the thread: what other programs
do on the machine is not counted, unless they compete for memory. Otherwise it is the wall's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Passes = Callable[[], Tensor | None]
WARM_UP = 2


@dataclass(frozen=True)
class Task:
    """Something to be timed.

    Attributes:
        forward: what is run; a tensor that it returns is run backward from, and timed apart.
        repeats: runs in a row per round, the mean of which is one time.
    """

    forward: Passes
    repeats: int = 1


@dataclass(frozen=True)
class Timed:
    """Median seconds, and half the distance between the quartiles over the median (of both passes together)."""

    forward_s: float
    backward_s: float
    spread: float


class Clock:
    """Seconds on a device."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device = device
        self.is_thread = device.type == "cpu" and threads == 1

    def now(self) -> float:
        """Now, when all that was asked of the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.thread_time() if self.is_thread else time.perf_counter()

    def passes(self, task: Task) -> tuple[float, float]:
        """Seconds of one forward and one backward."""
        forward_s = backward_s = 0.0
        for _ in range(task.repeats):
            start = self.now()
            out = task.forward()
            middle = self.now()
            if out is not None:
                out.backward(None if out.dim() == 0 else torch.ones_like(out))
            forward_s, backward_s = forward_s + middle - start, backward_s + self.now() - middle
        return forward_s / task.repeats, backward_s / task.repeats


def interleaved(
    tasks: Mapping[str, Task], rounds: int, clock: Clock, before: Callable[[str], None]
) -> dict[str, Timed]:
    """Time every task once per round; the first rounds warm up. `before` is called with the name of each."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for number in range(WARM_UP + rounds):
        for name, task in tasks.items():
            before(name)
            found = clock.passes(task)
            if number >= WARM_UP:
                times[name].append(found)
    return {name: _summary(found) for name, found in times.items()}


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles over the median."""
    middle = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle if middle else 0.0


def _summary(found: list[tuple[float, float]]) -> Timed:
    forward, backward = zip(*found, strict=True)
    both = [sum(pair) for pair in found]
    return Timed(statistics.median(forward), statistics.median(backward), spread(both))

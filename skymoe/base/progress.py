"""Progress of long work: a bar for a person, a line now and then for a log.

    with progress("train", total=400, unit="step") as bar:
        for step in range(400):
            ...
            bar.advance(loss=3.21, drop_rate=0.02)

Everything goes to standard error; standard output is for results. On a terminal it is a rich bar (one at a time moves,
bars inside bars stack up); elsewhere one plain line every few seconds and one at the end, through the package's logger.
Quiet is decided there too: `skymoe -q`, or a program that never asked for our log lines, sees nothing.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from skymoe.base.log import logger

_SECONDS_BETWEEN_LINES = 5.0


class Progress(Protocol):
    """What a job holds while it works."""

    def advance(self, n: float = 1, /, **fields: object) -> None:
        """`n` more units are done; `fields` are shown beside the bar until replaced."""

    def status(self, **fields: object) -> None:
        """Change what is shown beside the bar; nothing more is done."""


@contextmanager
def progress(
    description: str, total: float | None, unit: str = "", *, done: float = 0.0, speed: bool = False
) -> Iterator[Progress]:
    """Show the progress of the work in the block, and how long the rest will take.

    Args:
        description: a word or two.
        total: units in all; None when nobody knows.
        unit: what one unit is ("step", "GB"), for the plain lines and for the speed.
        done: units that were done before the block began; they say nothing about the speed.
        speed: show units per second.
    """
    if not logger.isEnabledFor(logging.INFO):
        yield _Silent()
    elif sys.stderr.isatty():
        with _rich_progress() as bars:
            yield _Bar(bars, description, _Pace(total, done, unit if speed else ""))
    else:
        lines = _Lines(description, unit, _Pace(total, done, unit if speed else ""))
        yield lines
        lines.finish()


def render_fields(fields: dict[str, object]) -> str:
    """`loss 3.214  drop_rate 0.02`: floats to four significant digits."""
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items())


def _count(done: float, total: float | None) -> str:
    """`1,200/4,000`, or `1,200` when nobody knows the total."""
    shown = [f"{n:,.0f}" if n >= 100 or n == round(n) else f"{n:.1f}" for n in (done, total) if n is not None]
    return "/".join(shown)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class _Pace:
    """How much is done, how fast, and how long the rest will take at that speed."""

    def __init__(self, total: float | None, done: float, unit: str) -> None:
        self.total, self.done = total, done
        self._unit, self._before, self._start = unit, done, time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def speed(self) -> str:
        """`0.412 GB/s`; empty when nobody wants to see it, or nothing is done yet."""
        rate = (self.done - self._before) / max(self.seconds(), 1e-6)
        return f"{rate:.3g} {self._unit}/s" if self._unit and rate else ""

    def left(self) -> str:
        """`12 s left`; empty when nobody knows, or nothing is left."""
        if not self.total or not self._before < self.done < self.total:
            return ""
        return f"{_duration(self.seconds() * (self.total - self.done) / (self.done - self._before))} left"


class _Silent:
    def advance(self, n: float = 1, /, **fields: object) -> None:
        pass

    def status(self, **fields: object) -> None:
        pass


class _Bar:
    """One row of a rich display."""

    def __init__(self, bars: RichProgress, description: str, pace: _Pace) -> None:
        self._bars, self._pace, self._fields = bars, pace, dict[str, object]()
        self._task = bars.add_task(escape(description), total=pace.total, completed=int(pace.done), shown="", pace=pace)

    def advance(self, n: float = 1, /, **fields: object) -> None:
        self._pace.done += n
        self.status(**fields)

    def status(self, **fields: object) -> None:
        self._fields |= fields
        shown = escape(render_fields(self._fields))
        self._bars.update(self._task, completed=self._pace.done, shown=shown)


class _Count(ProgressColumn):
    """`120/400`, or `120` when there is no total."""

    def render(self, task: Task) -> Text:
        return Text(_count(task.completed, task.total), style="progress.percentage")


class _PaceColumn(ProgressColumn):
    """`0.412 GB/s 12 s left`."""

    def render(self, task: Task) -> Text:
        pace = task.fields["pace"]
        return Text(" ".join(part for part in (pace.speed(), pace.left()) if part), style="progress.remaining")


def _rich_progress() -> RichProgress:
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        _Count(),
        TimeElapsedColumn(),
        _PaceColumn(),
        TextColumn("[dim]{task.fields[shown]}"),
    )
    # Standard output may be a pipe that carries data: rich must not wrap it.
    return RichProgress(*columns, console=Console(stderr=True), redirect_stdout=False, refresh_per_second=4)


class _Lines:
    """Plain lines for logs, at most one every few seconds."""

    def __init__(self, description: str, unit: str, pace: _Pace) -> None:
        self._description, self._unit, self._pace = description, unit, pace
        self._fields: dict[str, object] = {}
        self._printed: tuple[float, dict[str, object]] | None = None
        self._last_line = time.monotonic()

    def advance(self, n: float = 1, /, **fields: object) -> None:
        self._pace.done += n
        self.status(**fields)

    def status(self, **fields: object) -> None:
        self._fields |= fields
        if time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._print()

    def finish(self) -> None:
        """Print the last state, unless it is printed already."""
        self._print()

    def _print(self) -> None:
        state = self._pace.done, dict(self._fields)
        if state != self._printed:
            self._printed = state
            logger.info(self._line())

    def _line(self) -> str:
        count = f"{self._description}: {_count(self._pace.done, self._pace.total)} {self._unit}".rstrip()
        fields = render_fields(self._fields)
        parts = (count, _duration(self._pace.seconds()), self._pace.speed(), self._pace.left(), fields)
        return ", ".join(part for part in parts if part)

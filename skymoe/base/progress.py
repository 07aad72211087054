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
def progress(description: str, total: float | None, unit: str = "") -> Iterator[Progress]:
    """Show the progress of the work in the block.

    Args:
        description: a word or two.
        total: units in all; None when nobody knows.
        unit: what one unit is, for the plain lines ("step", "MB").
    """
    if not logger.isEnabledFor(logging.INFO):
        yield _Silent()
    elif sys.stderr.isatty():
        with _rich_progress() as bars:
            yield _Bar(bars, description, total)
    else:
        lines = _Lines(description, total, unit)
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


class _Silent:
    def advance(self, n: float = 1, /, **fields: object) -> None:
        pass

    def status(self, **fields: object) -> None:
        pass


class _Bar:
    """One row of a rich display."""

    def __init__(self, bars: RichProgress, description: str, total: float | None) -> None:
        self._bars, self._fields = bars, dict[str, object]()
        self._task = bars.add_task(escape(description), total=total, shown="")

    def advance(self, n: float = 1, /, **fields: object) -> None:
        self._bars.advance(self._task, n)
        self.status(**fields)

    def status(self, **fields: object) -> None:
        self._fields |= fields
        self._bars.update(self._task, shown=escape(render_fields(self._fields)))


class _Count(ProgressColumn):
    """`120/400`, or `120` when there is no total."""

    def render(self, task: Task) -> Text:
        return Text(_count(task.completed, task.total), style="progress.percentage")


def _rich_progress() -> RichProgress:
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        _Count(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[shown]}"),
    )
    # Standard output may be a pipe that carries data: rich must not wrap it.
    return RichProgress(*columns, console=Console(stderr=True), redirect_stdout=False, refresh_per_second=4)


class _Lines:
    """Plain lines for logs, at most one every few seconds."""

    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done = 0.0
        self._fields: dict[str, object] = {}
        self._printed: tuple[float, dict[str, object]] | None = None
        self._start = self._last_line = time.monotonic()

    def advance(self, n: float = 1, /, **fields: object) -> None:
        self._done += n
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
        state = self._done, dict(self._fields)
        if state != self._printed:
            self._printed = state
            logger.info(self._line())

    def _line(self) -> str:
        seconds = time.monotonic() - self._start
        parts = [f"{self._description}: {_count(self._done, self._total)} {self._unit}".rstrip(), _duration(seconds)]
        if self._total and 0 < self._done < self._total:
            parts.append(f"{_duration(seconds * (self._total / self._done - 1))} left")
        if self._fields:
            parts.append(render_fields(self._fields))
        return ", ".join(parts)

"""`skymoe report`: read the runs, draw the page, write it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from skymoe.report.config import ReportConfig


@dataclass(frozen=True)
class ReportFile:
    """What was written.

    Attributes:
        path: the HTML file.
        num_bytes: its size.
        sections: ids of the sections on the page, in order.
        notes: what could not be shown and why, one line each.
    """

    path: Path
    num_bytes: int
    sections: tuple[str, ...]
    notes: tuple[str, ...]


def run(config: ReportConfig) -> ReportFile:
    """Write the report of `config.runs`. Raises FormatError for a directory that is no run."""
    raise NotImplementedError

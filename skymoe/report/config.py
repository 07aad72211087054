"""What the user asks of `skymoe report`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from skymoe.base.config import Config


class ReportConfig(Config):
    """One page from one or several runs.

    Attributes:
        runs: run directories (with `metrics.jsonl`), or one demo directory that holds several.
        out: the HTML file; None writes `report.html` into the first directory.
        title: heading of the page; None makes one from the runs.
        max_points: a curve longer than this is thinned out (evenly, keeping both ends).
    """

    runs: tuple[Path, ...] = Field(min_length=1)
    out: Path | None = None
    title: str | None = None
    max_points: int = Field(default=600, ge=2, le=20_000)

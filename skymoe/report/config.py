"""What the user asks of `skymoe report`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from skymoe.base.config import Config


class ReportConfig(Config):
    """One page from one or several runs."""

    runs: tuple[Path, ...] = Field(min_length=1)
    """run directories (with `metrics.jsonl`), or one demo directory that holds several"""
    out: Path | None = None
    """the HTML file; without it `report.html` in the first directory"""
    title: str | None = None
    """heading of the page; without it the result is the heading"""
    max_points: int = Field(default=600, ge=2, le=20_000)
    """a longer curve is thinned out evenly, keeping both ends"""

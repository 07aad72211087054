"""What the user asks of `skymoe plan validate`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from skymoe.base.config import Config


class ValidateConfig(Config):
    """A file of measured cases."""

    cases: Path
    """JSON: a list of cases, see docs/plan_accuracy.md"""
    groups: tuple[str, ...] = ()
    """only these groups; empty means all"""
    worst: int = Field(default=10, ge=0, le=10_000)
    """how many comparisons with the largest errors to show"""
    write_docs: Path | None = None
    """write the accuracy page (Markdown) to this file"""
    write_accuracy: Path | None = None
    """write the promises' figures (JSON) to this file: what plans say about their own accuracy"""

"""The human form of an InspectReport: rich tables."""

from __future__ import annotations

from rich.console import Console

from skymoe.inspect.result import InspectReport


def show(report: InspectReport, console: Console | None = None) -> None:
    """Print `report` to standard output (or `console`)."""
    raise NotImplementedError

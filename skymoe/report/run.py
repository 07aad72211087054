"""`skymoe report`: read the runs, draw the page, write it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from skymoe.base.files import write_atomic
from skymoe.report import documents, sections
from skymoe.report.charts import run_colors
from skymoe.report.config import ReportConfig
from skymoe.report.data import Material, read_material
from skymoe.report.page import page
from skymoe.report.ranks import ranks
from skymoe.report.speed import speed
from skymoe.report.verdict import compare


@dataclass(frozen=True)
class ReportFile:
    """What was written.

    Attributes:
        path: the HTML file.
        num_bytes: its size.
        sections: ids of the sections that have content, in order.
        notes: what could not be shown and why, one line each.
    """

    path: Path
    num_bytes: int
    sections: tuple[str, ...]
    notes: tuple[str, ...]


def run(config: ReportConfig) -> ReportFile:
    """Write the report of `config.runs`. The same inputs give the same bytes.

    Raises:
        FormatError: a directory that is no run.
        MissingExtraError: plotly is not installed.
    """
    material = read_material(config.runs)
    parts = build_sections(material, config.max_points)
    content = page(material, compare(material), parts, config.title).encode()
    out = config.out or config.runs[0] / "report.html"
    write_atomic(out, content)
    shown = tuple(part.id for part in parts if part.body)
    notes = tuple(f"{part.title}: {part.note}" for part in parts if part.note) + material.notes
    return ReportFile(out, len(content), shown, notes)


def build_sections(material: Material, max_points: int) -> tuple[sections.Section, ...]:
    """The page's parts, top to bottom."""
    colors, runs = run_colors(material.runs), material.runs
    return (
        sections.result(material, compare(material), colors),
        sections.loss(material, colors, max_points),
        sections.balance(material, colors, max_points),
        sections.gates(material, colors, max_points),
        sections.experts(material, colors, max_points),
        speed(material, colors, max_points),
        ranks(runs, colors),
        documents.receipt(material),
        documents.samples(material),
        documents.configuration(runs, colors),
        documents.environment(runs, colors),
        documents.reproduce(material),
    )

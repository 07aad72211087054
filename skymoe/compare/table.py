"""The human form of a CompareReport. Tensors that differ in their numbers only (layer, expert) share a line."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from skymoe.base.errors import printable
from skymoe.base.tables import plain_table
from skymoe.compare.result import CompareReport, ExpertRow, TensorRow, Verdict

_MAX_LINES = 60
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_WORDS = {
    Verdict.SAME: "the same bits",
    Verdict.VALUES: "the same values",
    Verdict.DIFFERENT: "different",
    Verdict.SHAPE: "of another shape",
    Verdict.ONLY_LEFT: "only in A",
    Verdict.ONLY_RIGHT: "only in B",
    Verdict.NOTHING: "without a partner, adding nothing",
}


def show(report: CompareReport, console: Console) -> None:
    """Print `report`."""
    for letter, path, kind in (
        ("A", report.left, report.left_architecture),
        ("B", report.right, report.right_architecture),
    ):
        console.print(Text(f"{letter}  {printable(path, 2000)}" + (f" ({kind})" if kind else ""), style="bold"))
    for note in report.notes:
        console.print(Text(f"note: {printable(note, 1000)}", style="dim"))
    if groups := _groups(report.tensors):
        console.print(_tensors(groups))
    if report.experts:
        console.print(_experts(report.experts))
    if report.fields:
        console.print(_fields(report))
    told = ", ".join(f"{count:,} {_WORDS[Verdict(name)]}" for name, count in report.counts.items())
    verdict, style = ("equal", "bold green") if report.equal else ("different", "bold red")
    within = "" if report.tolerance is None else f" (tolerance {report.tolerance:g})"
    console.print(Text(f"{verdict}{within}: {told or 'no tensors'}", style=style))


def _groups(rows: Iterable[TensorRow]) -> list[tuple[str, list[TensorRow]]]:
    """Tensors that are not the same bits, by name without numbers, verdict, and whether they count."""
    groups: dict[tuple[str, Verdict, bool], list[TensorRow]] = {}
    for row in rows:
        if row.verdict is not Verdict.SAME:
            groups.setdefault((_NUMBER.sub("*", row.name), row.verdict, row.equal), []).append(row)
    return [(key[0] if len(group) > 1 else group[0].name, group) for key, group in groups.items()]


def _tensors(groups: list[tuple[str, list[TensorRow]]]) -> Table:
    columns = ("tensor", "how many", "", "max |A-B|", "of max |A|", "relative RMS", "cosine")
    table = plain_table("tensors", columns, left=("tensor", ""))
    for name, group in groups[:_MAX_LINES]:
        table.add_row(Text(printable(name, 120)), str(len(group)), Text(_verdict(group)), *_worst(group))
    if len(groups) > _MAX_LINES:
        table.add_row(f"... and {len(groups) - _MAX_LINES} more lines (--json lists all)")
    return table


def _verdict(group: list[TensorRow]) -> str:
    first = group[0]
    if first.verdict is Verdict.NOTHING:
        return f"only in {'A' if first.left else 'B'}, adds nothing"
    told = _WORDS[first.verdict]
    if first.verdict is Verdict.SHAPE:
        told += f" {list(first.left_shape)} / {list(first.right_shape)}"
    elif first.left_dtype != first.right_dtype and first.left_dtype and first.right_dtype:
        told += f", {first.left_dtype} / {first.right_dtype}"
    if first.equal and first.verdict in (Verdict.ONLY_LEFT, Verdict.ONLY_RIGHT):
        return f"{told}, as expected"
    return f"{told}, within tolerance" if first.equal and first.verdict is Verdict.DIFFERENT else told


def _worst(group: list[TensorRow]) -> list[str]:
    largest = [
        max((value for value in values if value is not None), default=None)
        for values in zip(*((row.max_abs, row.relative_max, row.relative_rms) for row in group), strict=True)
    ]
    cosines = [row.cosine for row in group if row.cosine is not None]
    return [*("" if value is None else f"{value:.3g}" for value in largest), f"{min(cosines):.6f}" if cosines else ""]


def _experts(rows: tuple[ExpertRow, ...]) -> Table:
    columns = ("layer", "experts", "the same bits", "relative RMS", "largest", "cosine", "smallest")
    table = plain_table("experts of B against the dense feed-forward of A", columns, left=())
    layers = sorted({row.layer for row in rows})
    for layer in layers[:_MAX_LINES]:
        some = [row for row in rows if row.layer == layer]
        drift, cosine = [row.relative_rms for row in some], [row.cosine for row in some]
        figures = (sum(drift) / len(some), max(drift), sum(cosine) / len(some), min(cosine))
        cells = (f"{value:.4g}" if index < 2 else f"{value:.6f}" for index, value in enumerate(figures))
        table.add_row(str(layer), str(len(some)), str(sum(row.same for row in some)), *cells)
    if len(layers) > _MAX_LINES:
        table.add_row(f"... and {len(layers) - _MAX_LINES} more layers (--json lists all)")
    return table


def _fields(report: CompareReport) -> Table:
    table = plain_table("config", ("field", "A", "B", ""), left=("field", "A", "B", ""))
    for row in sorted(report.fields, key=lambda row: row.equal)[:_MAX_LINES]:
        effect = "" if not row.equal else "no effect" if not report.experts else "no effect, or expected"
        cells = (Text(printable(cell, 120)) for cell in (row.name, row.left, row.right, effect))
        table.add_row(*cells, style="dim" if row.equal else "")
    if len(report.fields) > _MAX_LINES:
        table.add_row(f"... and {len(report.fields) - _MAX_LINES} more (--json lists all)")
    return table

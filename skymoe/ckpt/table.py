"""The human form of the reports of `skymoe ckpt`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from skymoe.base.errors import printable
from skymoe.ckpt.result import DiffReport, ExportReport, LsReport, ReshardReport, VerifyReport

_WIDTH_OF_A_PIPE = 120
_MAX_LINES = 50


Report = LsReport | VerifyReport | DiffReport | ReshardReport | ExportReport


def show(report: Report, console: Console | None = None) -> None:
    """Print `report` to standard output (or `console`)."""
    out = console or Console(highlight=False)
    if not out.is_terminal:
        out = console or Console(highlight=False, width=_WIDTH_OF_A_PIPE)
    if isinstance(report, LsReport):
        _show_ls(report, out)
    elif isinstance(report, VerifyReport):
        _show_verify(report, out)
    elif isinstance(report, DiffReport):
        _show_diff(report, out)
    elif isinstance(report, ReshardReport):
        _show_reshard(report, out)
    else:
        _show_export(report, out)


def human_bytes(count: int) -> str:
    """`count` in decimal units, three digits."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count} B"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _show_ls(report: LsReport, out: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("generation", "step", "saved (UTC)", "size", "tensors", "status"):
        table.add_column(heading, justify="right" if heading in ("step", "size", "tensors") else "left")
    for row in report.generations:
        status = f"{row.status}, resume starts here" if row.newest else printable(row.status)
        saved = row.created.replace("T", " ").removesuffix("+00:00")
        cells = (row.name, str(row.step), saved, human_bytes(row.num_bytes), str(row.num_tensors), status)
        table.add_row(*(Text(printable(cell)) for cell in cells))
    out.print(Text(printable(report.root, 2000), style="bold"))
    out.print(table)
    _show_notes(report.notes, out)


def _show_verify(report: VerifyReport, out: Console) -> None:
    _show_notes(report.notes, out)
    lines = [": ".join(filter(None, (problem.file, problem.tensor, problem.what))) for problem in report.problems]
    _show_lines(lines, out)
    what = f"{_count(len(report.checked), 'generation' if report.hashed else 'file')}, {human_bytes(report.num_bytes)}"
    verdict = f"damaged: {_count(len(lines), 'problem')} in {what}" if lines else f"intact: {what}"
    out.print(Text(verdict, style="bold red" if lines else "bold green"))


def _show_diff(report: DiffReport, out: Console) -> None:
    out.print(Text(f"A {printable(report.left, 2000)}\nB {printable(report.right, 2000)}"))
    _show_notes(
        tuple(f"{one.name}: {one.detail or one.what} (not part of the state)" for one in report.circumstances), out
    )
    lines = []
    for one in report.differences:
        distance = "" if one.max_abs is None else f", max |A - B| = {one.max_abs:.4g}"
        lines.append(f"{one.name}: {one.what} {one.detail}{distance}".replace(" ,", ","))
    _show_lines(lines, out)
    shared = f"{_count(report.num_tensors, 'tensor')}, {human_bytes(report.num_bytes)}"
    verdict = f"different: {_count(len(lines), 'difference')}; {shared} compared" if lines else f"bit-equal: {shared}"
    out.print(Text(verdict, style="bold red" if lines else "bold green"))


def _show_reshard(report: ReshardReport, out: Console) -> None:
    sizes = (
        f"{_count(report.num_tensors, 'tensor')}, {human_bytes(report.num_bytes)} in {_count(report.num_files, 'file')}"
    )
    layout = report.layout
    ranks = f"pp {layout['pp']} x dp {layout['dp']} x tp {layout['tp']}, experts by {layout['expert']}"
    out.print(Text(f"{printable(report.source, 2000)}\n-> {printable(report.out, 2000)}", style="bold"))
    out.print(Text(f"step {report.step} for {ranks}: {sizes}"))


def _show_export(report: ExportReport, out: Console) -> None:
    _show_notes(report.notes, out)
    out.print(Text(f"{printable(report.source, 2000)}\n-> {printable(report.out, 2000)}", style="bold"))
    sizes = f"{human_bytes(report.num_bytes)} in {_count(len(report.files), 'file')}"
    out.print(Text(f"step {report.step} as {report.architecture}, {report.dtype}: {sizes}"))


def _show_lines(lines: list[str], out: Console) -> None:
    for line in lines[:_MAX_LINES]:
        out.print(Text(printable(line)))
    if len(lines) > _MAX_LINES:
        out.print(Text(f"... and {len(lines) - _MAX_LINES} more (--json lists all)"))


def _show_notes(notes: tuple[str, ...], out: Console) -> None:
    for note in notes[:_MAX_LINES]:
        out.print(Text(f"note: {printable(note)}", style="dim"))

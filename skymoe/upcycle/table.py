"""The human form of an upcycling: what was written and what the receipt says, or every tensor of a dry run."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from skymoe.base.errors import printable
from skymoe.convert.measured import receipt_lines
from skymoe.upcycle.result import PlannedUpcycle, UpcycleReport


def show(report: UpcycleReport, console: Console) -> None:
    """Print `report`."""
    size = f"{report.bytes_written / 1e9:.3f} GB in {len(report.files)} files, {report.seconds:.1f} s"
    console.print(Text(f"{printable(report.out, 2000)}  {_head(report)}", style="bold"))
    console.print(Text(f"{_counts(report)}, {size}"))
    _remarks(report, console)
    for line in receipt_lines(report.receipt):
        console.print(Text(printable(line, 1500)))


def show_plan(planned: PlannedUpcycle, console: Console) -> None:
    """Print a dry run: every tensor, then the totals. Lines are not wrapped."""
    for line in planned.plan.lines():
        console.out(printable(line, 2000), highlight=False)
    plan = planned.plan
    console.print(Text(f"{printable(planned.out, 2000)}  {_head(planned)}: {len(plan.tensors)} tensors", style="bold"))
    console.print(Text(_counts(planned)))
    sizes = f"{plan.bytes_read / 1e9:.3f} GB to read, {planned.disk_bytes / 1e9:.3f} GB to write"
    assert planned.disk_free is not None  # OUT is always named
    free = f"({planned.disk_free / 1e9:.1f} GB free), at most {plan.peak_bytes / 1e6:.1f} MB of tensors in memory"
    console.print(Text(f"{sizes} {free}"))
    if planned.lack_of_space:
        console.print(Text(planned.lack_of_space, style="bold red"))
    _remarks(planned, console)
    console.print(Text(f"exact: {'yes' if planned.exact else 'no'}: {printable(planned.reason, 1000)}"))


def _head(result: UpcycleReport | PlannedUpcycle) -> str:
    return f"{result.source_architecture} -> {result.architecture}, method {result.method}"


def _counts(result: UpcycleReport | PlannedUpcycle) -> str:
    parameters = f"{result.parameters / 1e6:,.1f}M parameters, {result.active_parameters / 1e6:,.1f}M per token"
    return f"{result.experts} experts, top-{result.top_k}, {parameters}"


def _remarks(result: UpcycleReport | PlannedUpcycle, console: Console) -> None:
    for remark in result.remarks:
        console.print(Text(f"note: {printable(remark, 1000)}", style="dim"))

"""The human form of an export: what was written, what was adapted, what a fold costs."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from skymoe.base.errors import printable
from skymoe.convert.measured import receipt_lines
from skymoe.export.result import ExportReport, Fold, PlannedExport


def show(report: ExportReport, console: Console) -> None:
    """Print `report`."""
    size = f"{report.bytes_written / 1e9:.3f} GB in {len(report.files)} files, {report.seconds:.1f} s"
    where = printable(report.out, 2000)
    console.print(Text(f"{where}  {report.source_architecture} -> {report.architecture}, {size}", style="bold"))
    _notes(report, console)
    for line in receipt_lines(report.receipt):
        console.print(Text(printable(line, 1500)))
    if report.fold is not None:
        _fold(report.fold, console)


def show_plan(planned: PlannedExport, console: Console) -> None:
    """Print a dry run: every tensor, then the totals. Lines are not wrapped."""
    for line in planned.plan.lines():
        console.out(printable(line, 2000), highlight=False)
    plan = planned.plan
    sizes = f"{plan.bytes_read / 1e9:.3f} GB read, {plan.bytes_written / 1e9:.3f} GB written"
    head = f"{planned.source_architecture} -> {planned.architecture}: {len(plan.tensors)} tensors, {sizes}"
    console.print(Text(f"{head}, at most {plan.peak_bytes / 1e6:.1f} MB of tensors in memory", style="bold"))
    if planned.lack_of_space:
        console.print(Text(planned.lack_of_space, style="bold red"))
    _notes(planned, console)
    console.print(Text(f"exact: {'yes' if planned.exact else 'no'}: {printable(planned.reason, 1000)}"))


def _notes(report: ExportReport | PlannedExport, console: Console) -> None:
    for adapter in report.adapters:
        console.print(Text(f"adapted: {adapter}"))
    for remark in report.remarks:
        console.print(Text(f"note: {remark}", style="dim"))


def _fold(fold: Fold, console: Console) -> None:
    before, after = fold.perplexity_before, fold.perplexity_after
    console.print(
        Text(
            f"folded on {fold.fit_tokens} tokens; on {fold.held_out_tokens} others: KL {fold.kl:.3g} nats per token "
            f"(limit {fold.max_kl:g}), perplexity {before:.5g} -> {after:.5g} ({after / before - 1:+.2%})"
        )
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in (
        "layer",
        "temperature",
        "true factor 5 %",
        "50 %",
        "95 %",
        "mean |dweight|",
        "KL of weights",
        "same experts",
    ):
        table.add_column(title, justify="right")
    for layer in fold.layers:
        true = (layer.true_low, layer.true_median, layer.true_high)
        costs = (f"{layer.mean_abs_dweight:.4f}", f"{layer.kl:.2g}", f"{layer.same_experts:.2%}")
        table.add_row(str(layer.layer), f"{layer.temperature:.4g}", *(f"{value:.4g}" for value in true), *costs)
    console.print(table)

"""The human form of a quantization: what was written, what it costs."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from skymoe.base.errors import printable
from skymoe.quantize.result import Counts, PlannedQuantize, QuantizeReport


def show(report: QuantizeReport, console: Console) -> None:
    """Print `report`."""
    size = f"{report.bytes_written / 1e9:.3f} GB in {len(report.files)} files, {report.seconds:.1f} s"
    console.print(Text(f"{printable(report.out, 2000)}  FP8 by {report.scheme}, {size}", style="bold"))
    _counts(report, console)
    console.print(Text(f"rounding: {report.mean_rms:.2%} of the weights in the mean, {report.max_rms:.2%} at worst"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("the matrices that lost most", "error", "largest error"):
        table.add_column(title, justify="left" if "lost" in title else "right")
    for error in report.worst:
        table.add_row(printable(error.name), f"{error.rms:.2%}", f"{error.max:.2%}")
    console.print(table)
    if report.max_abs_dlogit is not None and report.kl is not None:
        loss = "" if report.loss_change is None else f", loss {report.loss_change:+.4f} nats per token"
        console.print(Text(f"logits: differ by up to {report.max_abs_dlogit:.3g}, KL {report.kl:.3g}{loss}"))


def show_plan(planned: PlannedQuantize, console: Console) -> None:
    """Print a dry run: every tensor, then the totals. Lines are not wrapped."""
    for line in planned.plan.lines():
        console.out(printable(line, 2000), highlight=False)
    plan = planned.plan
    head = f"FP8 by {planned.scheme}: {len(plan.tensors)} tensors, {plan.bytes_read / 1e9:.3f} GB read"
    console.print(Text(f"{head}, at most {plan.peak_bytes / 1e6:.1f} MB of tensors in memory", style="bold"))
    _counts(planned, console)
    if planned.lack_of_space:
        console.print(Text(planned.lack_of_space, style="bold red"))


def _counts(counts: Counts, console: Console) -> None:
    kinds = ", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in counts.weight_bytes_by_kind.items())
    console.print(Text(f"weights: {counts.weight_bytes / 1e9:.3f} GB ({kinds})"))
    same, rounded = counts.tensors_kept - len(counts.rounded), len(counts.rounded)
    told = f"{counts.tensors_quantized} matrices are FP8, {same} tensors stay as they are"
    console.print(Text(f"{told}, {rounded} are rounded" if rounded else told))
    for remark in counts.remarks:
        console.print(Text(f"note: {printable(remark, 1000)}", style="dim"))

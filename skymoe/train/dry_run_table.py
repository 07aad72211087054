"""The human form of a DryRunReport."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from skymoe.base.tables import plain_table
from skymoe.train.dry_run_result import DryRunReport, RankFigures


def show(report: DryRunReport, console: Console) -> None:
    """Print `report`."""
    layout, own = report.layout, report.rank
    sizes = f"pp {layout['pp']} x dp {layout['dp']} x tp {layout['tp']}"
    console.print(Text(f"{report.world_size} ranks: {sizes}", style="bold"))
    console.print(Text(f"experts {layout['expert']}, dispatch {layout['dispatch']}, schedule {layout['schedule']}"))
    console.print(Text(_batch(report)))
    console.print(Text(_parameters(report)))
    console.print()
    place = f"pp {own.pp}, dp {own.dp}, tp {own.tp}"
    stages = ", ".join(map(str, own.stages))
    console.print(Text(f"rank {own.rank}: {place}; stage {stages}; {own.parameters:,} parameters", style="bold"))
    for table in (_memory(report), _groups(own), _stages(report)):
        console.print(table)
    console.print(Text("Not counted: activations, buffers of communication, what kernels need while they run."))


def _batch(report: DryRunReport) -> str:
    tokens = report.sequences * report.sequence_length
    words = [f"step: {report.sequences} sequences of {report.sequence_length}, {tokens / 1e6:.2f}M tokens"]
    words.append(f"{report.num_micro} micro-batches of {report.micro_sequences} per replica")
    if report.bubble is not None:
        words.append(f"bubble {report.bubble:.1%} if all stages take the same time")
    return "; ".join(words)


def _parameters(report: DryRunReport) -> str:
    mean, most = report.mean_parameters / 1e9, report.most_parameters / 1e9
    return f"{report.parameters:,} parameters over all ranks; on one rank {mean:.3f}B on average, {most:.3f}B at most"


def _memory(report: DryRunReport) -> Table:
    own = report.rank
    table = plain_table("memory of this rank between steps", ("", "bytes", "GB"))
    rows = {
        f"weights, {report.weights}": own.weights,
        f"gradients, {report.gradients}": own.gradients,
        f"moments, 1/{report.layout['dp']} where dp ranks share them": own.moments,
        "fp32 copy of the weights, likewise": own.master,
    }
    for name, size in rows.items():
        table.add_row(name, f"{size:,}", f"{size / 1e9:.3f}")
    table.add_section()
    table.add_row("all", f"{own.total:,}", f"{own.total / 1e9:.3f}", style="bold")
    return table


def _groups(own: RankFigures) -> Table:
    table = plain_table("groups of this rank", ("axis", "ranks", "members"))
    table.columns[-1].justify = "left"
    for group in own.groups:
        table.add_row(group.kind, str(len(group.ranks)), _members(group.ranks))
    return table


def _stages(report: DryRunReport) -> Table:
    columns = ("stage", "pipeline rank", "layers", "recomputed", "parameters", "FLOPs", "of the mean", "holds")
    table = plain_table("stages", columns, left=())
    table.columns[-1].justify = "left"
    for row in report.stages:
        own = row.stage in report.rank.stages
        table.add_row(
            str(row.stage), str(row.owner), f"{row.layers:g}", str(row.recompute), f"{row.parameters:,}",
            f"{row.flops_share:.2%}", f"{row.flops_share * len(report.stages):.3f}", row.holds,
            style="bold" if own else None,
        )  # fmt: skip
    return table


def _members(ranks: Sequence[int]) -> str:
    """All of few; of many the first ones and the last."""
    if len(ranks) <= 12:
        return ", ".join(map(str, ranks))
    return f"{', '.join(map(str, ranks[:6]))}, ..., {ranks[-1]}"

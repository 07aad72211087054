"""The human form of a GuideReport."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from skymoe.plan.guide.facts import HOURS, Fact
from skymoe.plan.guide.result import GuideReport, Verdict
from skymoe.plan.guide.units import count_words


def show(report: GuideReport, console: Console) -> None:
    """Print `report`."""
    console.print(Text(report.summary, style="bold"))
    console.print(_figures(report))
    _section(console, "the rule", report.rule)
    if report.verdict is not Verdict.FROM_SCRATCH:
        _section(console, "for upcycling", report.for_upcycling)
    if report.verdict is not Verdict.UPCYCLE:
        _section(console, "for training from scratch", report.for_from_scratch)
    if report.verdict is not Verdict.FROM_SCRATCH:
        _section(console, "learning rate", report.learning_rate.facts)
        _section(console, "method and data", (report.method, report.data))
        _section(console, "watch", report.watch)
        console.print("  skymoe inspect MODEL shows expert similarity; skymoe train logs it with every evaluation")
        _section(console, "did not help", report.negative_results)
    for warning in report.warnings:
        console.print(Text(f"note: {warning}", style="yellow"))


def _figures(report: GuideReport) -> Table:
    table = Table.grid(padding=(0, 2))
    compute, cost, rate = report.compute, report.cost, report.learning_rate
    rows = [
        ("tokens", f"{count_words(report.dense_tokens)} dense, {count_words(report.moe_tokens)} of the mixture"),
        ("compute per token", f"{compute.ratio:.2f} times the dense model's ({compute.origin})"),
        ("C_MoE / C_dense", f"{report.budget_ratio:.3g}"),
        ("the rule changes at", f"{count_words(report.upcycle_up_to_tokens)} and "
                                f"{count_words(report.from_scratch_from_tokens)} tokens of the mixture"),
    ]  # fmt: skip
    if rate.low is not None and rate.high is not None:
        rows.append(("peak learning rate", f"{rate.low:.3g} to {rate.high:.3g}"))
    if cost is not None:
        days = "" if cost.days is None else f", {cost.days:.3g} days"
        rows += [
            ("rate", f"{cost.tokens_per_s_per_gpu:.4g} tokens/s per GPU ({cost.origin})"),
            ("cost", f"{cost.gpu_hours:,.0f} GPU hours{days}"),
            ("dense model", f"about {cost.dense_gpu_hours:,.0f} GPU hours at the same utilisation ({HOURS.says})"),
        ]
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _section(console: Console, title: str, entries: Iterable[Fact]) -> None:
    console.print(Text(f"\n{title}", style="bold"))
    for fact in entries:
        console.print(Text(f"  {fact.says}").append(f"  [{fact.source}]", style="dim"))

"""The human form of a ValidateReport."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table
from rich.text import Text

from skymoe.base.tables import plain_table
from skymoe.plan.validate.report import ValidateReport
from skymoe.plan.validate.result import GroupResult


def show(report: ValidateReport, console: Console, *, worst: int = 10) -> None:
    """Print `report` to `console`."""
    console.print(
        Text(f"{report.cases}: {report.num_cases} cases, {len(report.comparisons)} figures compared", style="bold")
    )
    console.print(_gates(report))
    console.print(_groups(report))
    if worst and report.comparisons:
        console.print(_worst(report, worst))
    if report.not_judged:
        console.print(_aside(report))


def _gates(report: ValidateReport) -> Table:
    table = plain_table("promises", ("", "found", "limit", "n", ""))
    for gate in report.gates:
        found = "-" if gate.value is None else _value(gate.name, gate.value)
        holds = {True: "holds", False: "broken", None: "no case"}[gate.holds]
        table.add_row(gate.name, found, _value(gate.name, gate.limit), str(gate.num_cases), holds)
    return table


def _value(name: str, value: float) -> str:
    return f"{value:.0f}" if "sign" in name else f"{value:.1%}"


def _groups(report: ValidateReport) -> Table:
    table = plain_table(
        "groups", ("group", "quantity", "n", "mean error", "bias", "worst", ""), left=("group", "quantity", "")
    )
    for group in report.groups:
        if group.comparisons:
            table.add_row(*group_row(group))
    return table


def group_row(group: GroupResult) -> tuple[str, ...]:
    """Of a group with comparisons."""
    worst = group.worst
    assert worst is not None
    return (
        group.group, group.quantity, str(len(group.comparisons)), f"{group.mape:.1%}", f"{group.bias:+.1%}",
        f"{worst.error:+.1%}", worst.case,
    )  # fmt: skip


def _worst(report: ValidateReport, number: int) -> Table:
    table = plain_table(
        "largest errors",
        ("case", "quantity", "predicted", "measured", "error", "layout known"),
        left=("case", "layout known"),
    )
    for c in report.worst(number):
        table.add_row(
            c.case, c.quantity, f"{c.predicted:.4g} {c.unit}", f"{c.measured:.4g} {c.unit}", f"{c.error:+.1%}",
            "yes" if c.known else "no",
        )  # fmt: skip
    return table


def _aside(report: ValidateReport) -> Table:
    table = plain_table("not judged", ("group", "cases", "reason"), left=("group", "reason"))
    for (group, reason), count in sorted(Counter((case.group, case.reason) for case in report.not_judged).items()):
        table.add_row(group, str(count), reason)
    return table

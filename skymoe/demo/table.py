"""The demo's result as a table on standard output, and what to try next."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table

from skymoe.demo.recipes import DOMAINS, PROMPTS
from skymoe.demo.run import DemoReport


def show(report: DemoReport, console: Console) -> None:
    """Print the comparison, the stage times and the next commands; only how to go on when it was interrupted."""
    out = shlex.quote(str(report.out))
    if report.exit_code:
        console.print(f"Interrupted and saved. The same command goes on:  skymoe demo --out {out}")
        return
    summary = report.summary
    title = "held-out bits per byte (lower is better)"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("", *DOMAINS, "all", "tokens/s"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {"dense parent": "parent", "dense, continued": "dense", "mixture of experts": "moe"}
    for label, key in rows.items():
        values = summary["bits_per_byte"][key]
        speed = summary["tokens_per_s"].get(key)
        cells = [f"{values[domain]:.4f}" for domain in (*DOMAINS, "all")]
        table.add_row(label, *cells, f"{speed:,.0f}" if speed else "")
    console.print(table)
    gain = summary["dense_bits_per_byte"] - summary["moe_bits_per_byte"]
    side = "below" if gain > 0 else "above: no gain this time over"
    console.print(f"The mixture of experts ends {abs(gain):.4f} bits per byte {side}")
    console.print("the dense parent continued on the same tokens.")
    if (change := summary["moe_change_at_equal_compute"]) is not None:
        side = "fewer" if change < 0 else "more"
        console.print(f"At equal compute (the dense model saw more tokens) it needs {abs(change):.1%} {side} bits.")
    receipt = summary["receipt"]
    exact = "exactly the parent's function" if receipt["exact"] else "not exactly the parent's function"
    console.print(f"It started as {exact} (max |dlogit| {receipt['max_abs_dlogit']:.1e}).")
    seconds = "  ".join(f"{stage} {value:.0f}" for stage, value in summary["seconds"].items())
    console.print(f"seconds: {seconds}\n\nreport: {report.out / 'report.html'}\n\nnext:")
    for command in _next_commands(report.out):
        console.print(f"  {command}", soft_wrap=True)


def _next_commands(out: Path) -> list[str]:
    moe, dense = shlex.quote(str(out / "moe")), shlex.quote(str(out / "dense"))
    return [
        f"skymoe generate {moe} {shlex.quote(PROMPTS['docs'])}",
        f"skymoe inspect {moe}",
        f"skymoe upcycle {dense} my-moe --method copy --experts 16 --top-k 2 --gate-norm",
        f"skymoe ckpt verify {shlex.quote(str(out / 'moe-train'))}",
        "skymoe inspect skywork-moe",
    ]

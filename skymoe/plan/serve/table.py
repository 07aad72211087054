"""The human form of a ServeReport."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from skymoe.base.errors import printable
from skymoe.base.tables import plain_table
from skymoe.plan.serve.report import GpuMemory, Rival, ServeReport

_TITLES = {
    "heads": "heads", "kv_groups": "kv heads", "ffn_blocks": "ffn blocks", "experts": "experts", "vocabulary": "rows",
}  # fmt: skip


def show(report: ServeReport, console: Console) -> None:
    """Print `report`."""
    words = f"{printable(report.model)} in {report.weights}, keys and values in {report.kv}, context {report.context}"
    console.print(Text(words, style="bold"))
    console.print(Text(_rotation(report)))
    console.print()
    console.print(_gpus(report))
    room = f"{report.kv_tokens:,} tokens of keys and values have room: "
    console.print(Text(f"{room}{report.max_sequences} sequences of {report.context}{_both_ways(report)}"))
    console.print()
    console.print(_sweep(report))
    for line in report.limits:
        console.print(Text(line))
    _alternatives(report, console)
    for note in report.notes:
        console.print(Text(note, style="dim"))


def _rotation(report: ServeReport) -> str:
    if report.replicas > 1:
        return f"key/value heads are replicated on up to {report.replicas} GPUs"
    if report.rotated:
        return "units of layer 0; the remainder goes round the equal GPUs layer by layer"
    return "the same units in every layer"


def _both_ways(report: ServeReport) -> str:
    turning, fixed = report.kv_tokens_rotated, report.kv_tokens_not_rotated
    if not turning or fixed is None or turning == fixed:
        return ""
    if not fixed:
        return "; without rotation none"
    return f"; {fixed:,} without rotation ({turning / fixed - 1:+.0%} with it)"


def _gpus(report: ServeReport) -> Table:
    names = list(report.splits)
    table = plain_table("", ["GPU", *(_TITLES[name] for name in names), "weights GB", "reserve", "kv room", "of"])
    rows = [_row(report, names, index, memory) for index, memory in enumerate(report.memory)]
    start = 0
    for index in range(1, len(rows) + 1):
        if index == len(rows) or rows[index] != rows[start]:
            ranks = f"{start}" if index - start == 1 else f"{start}-{index - 1}"
            table.add_row(f"{ranks} {report.gpus[start]}", *rows[start])
            start = index
    return table


def _row(report: ServeReport, names: Sequence[str], index: int, memory: GpuMemory) -> list[str]:
    units = [f"{report.splits[name][index]:,}" for name in names]
    return [*units, *(f"{value:.2f}" for value in (memory.weights, memory.reserve, memory.kv_room, memory.memory))]


def _sweep(report: ServeReport) -> Table:
    table = plain_table(
        "", ["batch", "step ms", "decoding tok/s", "with prompts tok/s", "gap ms", "first ms", ""], left=("",)
    )
    for point in report.sweep:
        mark = "best" if point.batch == report.best_batch else ""
        mark = mark if point.fits else "no room"
        table.add_row(
            f"{point.batch}", f"{point.step_s * 1e3:.1f}", f"{point.tokens_per_s:,.0f}",
            f"{point.mixed_tokens_per_s:,.0f}" if point.fits else "", f"{point.inter_token_s * 1e3:.1f}",
            f"{point.ttft_s * 1e3:.0f}", mark, style=None if point.fits else "dim",
        )  # fmt: skip
    return table


def _alternatives(report: ServeReport, console: Console) -> None:
    if report.cost is not None:
        money = "" if report.cost.money is None else f", {report.cost.money:.2f} in money"
        console.print(Text(f"a million output tokens: {report.cost.gpu_hours:.2f} GPU hours{money} (predicted)"))
    choice = report.pipeline
    if choice is not None:
        rate = "no batch fits" if choice.best_batch is None else (
            f"{choice.mixed_tokens_per_s:,.0f} tok/s with prompts at batch {choice.best_batch}"
        )  # fmt: skip
        layers = ",".join(map(str, choice.layers))
        console.print(Text(f"layers over GPUs instead, {layers}: {choice.kv_tokens:,} tokens have room, {rate}"))
    if report.rival is not None:
        console.print(Text(_rival(report.rival)))


def _rival(rival: Rival) -> str:
    name = printable(rival.model)
    if not rival.fits:
        return f"{name}: {rival.why}"
    words = f"{name} on the same GPUs: {rival.active_ratio:.1f} times the active parameters"
    if rival.times_cheaper is not None:
        words += f"; {rival.mixed_tokens_per_s:,.0f} tok/s with prompts at batch {rival.best_batch}"
        words += f", a token costs {rival.times_cheaper:.2f} times as much"
    if rival.times_cheaper_same_batch is not None:
        words += f"; decoding at batch {rival.same_batch}: {rival.same_batch_tokens_per_s:,.0f} tok/s"
        words += f", {rival.times_cheaper_same_batch:.2f} times as much"
    return words + " (predicted)"

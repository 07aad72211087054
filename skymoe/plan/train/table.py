"""The human form of a TrainPlan: the answer first, then stages, what limits it, who came next, how far to trust it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from skymoe.base.errors import printable
from skymoe.base.tables import plain_table
from skymoe.plan.train.result import Figures, Row, TrainPlan
from skymoe.spec.layout import ScheduleKind, stage_owner


def show(report: TrainPlan, console: Console | None = None) -> None:
    """Print `report` to standard output (or `console`)."""
    console = console or Console(highlight=False)
    console.print(Text(_question(report), style="dim"))
    console.print(_answer(report))
    console.print(_stages(report))
    console.print(_limits(report))
    if report.candidates:
        console.print(_rows("other layouts", report.candidates, "against the best"))
    if len(report.pareto) > 1:
        console.print(_rows("memory against speed", report.pareto, "against the best"))
    for line in _notes(report):
        console.print(Text(line))


def _question(report: TrainPlan) -> str:
    return (
        f"{printable(report.model)} on {report.gpus} x {report.gpu}, nodes of {report.nodes_of}, "
        f"{report.memory_limit_gb:.1f} GB each; {report.precision}, sequences of {report.sequence_length}, "
        f"{report.global_batch_tokens:,} tokens a step"
    )


def _answer(report: TrainPlan) -> Table:
    best, plain = report.best, report.uniform
    grid = Table.grid(padding=(0, 2))
    rows = [
        ("layout", report.layout.words),
        ("split", counts(best.split)),
        ("recompute", counts(best.recompute) if any(best.recompute) else "nothing"),
        (
            "step",
            f"{best.step_time_s:.3g} s in {report.layout.num_micro} micro-batches; bubble {best.bubble_fraction:.1%}",
        ),
        ("speed", f"{best.tokens_per_s_per_gpu:,.0f} tokens/s per GPU"),
        ("MFU", f"{best.mfu_causal:.1%} causal, {best.mfu_full:.1%} full attention; HFU {best.hfu:.1%}"),
        ("memory", f"{max(best.memory_gb):.1f} GB on the fullest rank, {min(best.memory_gb):.1f} on the emptiest"),
        (
            "uniform split",
            f"{counts(plain.split)}: {report.gain_vs_uniform:+.1%} gained on equal whole layers{_unfit(plain)}",
        ),
        ("proof", _proof(report)),
    ]
    for name, value in rows:
        grid.add_row(Text(name, style="bold"), Text(value, style="bold green" if name in ("layout", "speed") else ""))
    return grid


def _unfit(plain: Figures) -> str:
    return "" if plain.fits else f" (and it does not fit: {max(plain.memory_gb):.1f} GB)"


def _proof(report: TrainPlan) -> str:
    proof = report.certificate
    word = "this split is the fastest" if proof.optimal else f"at most {proof.gap:.1%} from the fastest split"
    bound = f"the pipeline alone takes at least {proof.pipeline_lower_bound_s:.3g} s"
    return f"{word} of this layout; {bound} ({proof.method})"


def _stages(report: TrainPlan) -> Table:
    best, layout = report.best, report.layout
    table = plain_table(
        "stages", ("stage", "rank", "layers", "run again", "forward ms", "backward ms", "rank's memory GB")
    )
    for stage, size in enumerate(best.split):
        rank = stage_owner(ScheduleKind(layout.schedule), layout.pp, stage)
        table.add_row(
            str(stage), str(rank), f"{size:g}", str(best.recompute[stage] or ""),
            f"{1e3 * best.stage_forward_s[stage]:.1f}", f"{1e3 * best.stage_backward_s[stage]:.1f}",
            f"{best.memory_gb[rank]:.1f}" if stage < layout.pp else "",
        )  # fmt: skip
    return table


def _limits(report: TrainPlan) -> Table:
    table = plain_table("where a step's time goes", ("", "s per step", "share"))
    useful = report.time_by_cause_s["arithmetic"]
    table.add_row("the model's arithmetic, at the peak", f"{useful:.3f}", f"{useful / report.best.step_time_s:.1%}")
    for limit in report.limits:
        table.add_row(limit.words, f"{limit.seconds:.3f}", f"{limit.share:.1%}")
    return table


def _rows(title: str, rows: Sequence[Row], last: str) -> Table:
    columns = ("pp x dp x tp", "experts", "batch", "schedule", "tokens/s", "GB", "run again", last)
    table = plain_table(title, columns)
    for index in (1, 3, -1):
        table.columns[index].justify = "left"
    for row in rows:
        one = row.layout
        table.add_row(
            f"{one.pp} x {one.dp} x {one.tp}", f"{one.expert}/{one.dispatch}", str(one.micro_batch), one.schedule_words,
            f"{row.tokens_per_s_per_gpu:,.0f}", f"{row.memory_gb:.1f}", str(sum(row.recompute) or ""), row.reason,
        )  # fmt: skip
    return table


def _notes(report: TrainPlan) -> list[str]:
    seen = report.examined
    lines = [
        f"{seen['legal']} layouts are legal: {seen['divided']} divided and simulated, {seen['bounded']} bounded away, "
        f"{seen['estimated']} left out by an estimate, {seen['too_large']} too large."
    ]
    others = [report.vocabulary_parallel] if report.vocabulary_parallel is not None else []
    if (plain := report.portable) is not None:
        lines.append(
            f"with whole layers under 1F1B, which other programs run too (--schedule 1f1b --whole-layers): "
            f"{plain.tokens_per_s_per_gpu:,.0f} tokens/s per GPU, {plain.layout.words}, split {counts(plain.split)}."
        )
    lines += [f"{other.what}: {other.gain:+.1%} ({other.note})." for other in (*others, *report.alternatives)]
    nearest = [f"{one.layout.words}: {one.reason}" for one in report.rejected if one.why == "memory"][:3]
    lines += [f"does not fit: {line}." for line in nearest]
    lines += [f"assumed: {line}." for line in report.assumptions]
    return lines + [f"trust: {line}." for line in report.accuracy]


def counts(numbers: Sequence[float]) -> str:
    """5, 5, 5, 4 as 5x3 4."""
    words, start = [], 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[start]:
            words.append(f"{numbers[start]:g}" + (f"x{end - start}" if end - start > 1 else ""))
            start = end
    return " ".join(words)

"""The page of a TrainPlan: schedule uniform | planned, memory, what limits it, who came next, how far to trust it."""

from __future__ import annotations

from collections.abc import Sequence

from skymoe.base.html import Html
from skymoe.plan.draw.page import (
    Card,
    Page,
    Section,
    code,
    folded,
    html_page,
    memory_section,
    paragraph,
    points_section,
    rows,
    said,
    schedule_section,
)  # fmt: skip
from skymoe.plan.draw.panel import Bars, Panel, Point
from skymoe.plan.draw.words import GB, figures, percent, time
from skymoe.plan.timeline import Timeline
from skymoe.plan.train.result import Figures, Row, TrainPlan


def plan_page(report: TrainPlan) -> str:
    """The whole HTML document, offline."""
    best = report.best
    question = (
        f"{report.model} on {report.gpus} x {report.gpu}, nodes of {report.nodes_of}, "
        f"{report.memory_limit_gb:.1f} GB each; {report.precision}, sequences of {report.sequence_length}, "
        f"{report.global_batch_tokens:,} tokens a step"
    )
    return html_page(
        Page(
            kind="training",
            title=report.layout.words,
            lede=question,
            cards=_cards(report),
            sections=(
                schedule_section(_panels(report)),
                memory_section([_bars("uniform", report.uniform), _bars("planned", best)], report.memory_limit_gb * GB),
                _stages(report),
                _limits(report),
                _candidates(report),
                Section(title="Certificate", body=(paragraph(_certificate(report)),)),
                _beyond(report),
                _emitted(report),
                Section(title="What was assumed", body=(said(report.assumptions),)),
                Section(title="How far to trust it", body=(said(report.accuracy),)),
            ),
        )
    )


def _cards(report: TrainPlan) -> tuple[Card, ...]:
    best, plain = report.best, report.uniform
    unfit = "" if plain.fits else "; that does not fit"
    shares = f"causal; {percent(best.mfu_full)} full, HFU {percent(best.hfu)}"
    memory = f"of {report.memory_limit_gb:.1f} GB, fullest rank"
    return (
        Card(name="Speed", value=f"{best.tokens_per_s_per_gpu:,.0f}", unit="tokens/s per GPU"),
        Card(name="Step", value=time(best.step_time_s), unit=f"{report.layout.num_micro} micro-batches per replica"),
        Card(name="MFU", value=percent(best.mfu_causal), unit=shares),
        Card(name="Bubble", value=percent(best.bubble_fraction), unit=f"uniform {percent(plain.bubble_fraction)}"),
        Card(
            name="Over uniform", value=f"{100 * report.gain_vs_uniform:+.1f} %", unit=f"tokens/s{unfit}",
            tone="good" if report.gain_vs_uniform > 0 else "",
        ),
        Card(
            name="Memory", value=f"{max(best.memory_gb):.1f} GB", unit=memory,
            tone="" if best.fits else "bad",
        ),
    )  # fmt: skip


def _panels(report: TrainPlan) -> list[Panel]:
    pairs = (("uniform", report.uniform, report.uniform_timeline), ("planned", report.best, report.timeline))
    return [_panel(report, title, one, timeline) for title, one, timeline in pairs]


def _panel(report: TrainPlan, title: str, one: Figures, timeline: Timeline) -> Panel:
    ranks = sorted({span.rank for span in timeline.spans})
    of_rank = {rank: sorted({span.stage for span in timeline.spans if span.rank == rank}) for rank in ranks}
    labels = [f"{rank} · {' + '.join(f'{one.split[s]:g}' for s in stages)} layers" for rank, stages in of_rank.items()]
    note = "" if one.fits else f"{figures(Panel(title=title, timeline=timeline))} · does not fit"
    return Panel(title=title, timeline=timeline, labels=tuple(labels), again_s=one.stage_again_s, note=note)


def _bars(title: str, one: Figures) -> Bars:
    ranks = [
        {
            "weights": m.weights * GB, "gradients": m.gradients * GB, "optimizer": m.optimizer * GB,
            "activations": m.activations * GB, "transient": m.transient * GB, "reserve": m.reserve * GB,
        }
        for m in one.memory
    ]  # fmt: skip
    return Bars(title=title, ranks=tuple(ranks))


def _stages(report: TrainPlan) -> Section:
    best, plain = report.best, report.uniform
    lines = [
        (
            str(stage), f"{size:g}", f"{plain.split[stage]:g}", str(best.recompute[stage] or "none"),
            time(best.stage_forward_s[stage]), time(best.stage_backward_s[stage]),
        )
        for stage, size in enumerate(best.split)
    ]  # fmt: skip
    head = ("stage", "layers", "uniform", "run again", "forward", "backward")
    return Section(title="Stages", body=(rows(head, lines, "Stages of the pipeline"),))


def _limits(report: TrainPlan) -> Section:
    lines = [(limit.words, time(limit.seconds), percent(limit.share)) for limit in report.limits]
    return Section(title="What limits you", body=(rows(("cause", "of a step", "share"), lines, "Causes of lost time"),))


def _candidates(report: TrainPlan) -> Section:
    front = {_key(row) for row in report.pareto}
    chosen = max((row.tokens_per_s_per_gpu for row in report.pareto), default=0.0)
    every = {_key(row): row for row in (*report.candidates, *report.pareto)}
    points = [
        Point(
            x=row.memory_gb, y=row.tokens_per_s_per_gpu, name=row.layout.words.split(", micro")[0],
            chosen=key in front and row.tokens_per_s_per_gpu == chosen, frontier=key in front,
        )
        for key, row in every.items()
    ]  # fmt: skip
    refused = [(one.layout.words, one.reason) for one in report.rejected]
    return points_section(
        points,
        title="Other layouts",
        chart="Memory against speed",
        x_name="GB on the fullest rank",
        y_name="tokens/s per GPU",
        below=(
            _rows(report.candidates, "Runners-up"),
            folded("Memory against speed", _rows(report.pareto, "Memory against speed")),
            folded(f"Left out: {len(refused)}", rows(("layout", "why"), refused, "Left out")) if refused else Html(""),
        ),
    )


def _rows(candidates: Sequence[Row], label: str) -> Html:
    lines = [
        (
            row.layout.words, f"{row.tokens_per_s_per_gpu:,.0f}", f"{row.memory_gb:.1f}",
            percent(row.bubble_fraction), row.reason,
        )
        for row in candidates
    ]  # fmt: skip
    return rows(("layout", "tokens/s per GPU", "GB", "bubble", "against the best"), lines, label)


def _certificate(report: TrainPlan) -> str:
    proof = report.certificate
    if proof.optimal:
        word = "No other division of the layers is faster in this layout"
    else:
        word = f"No other division of the layers can be faster than this one by more than {percent(proof.gap)}"
    least = time(proof.pipeline_lower_bound_s)
    found = f"{proof.examined} divided and simulated; the pipeline alone cannot take less than {least}"
    return f"{word}: {proof.method}. {found}."


def _beyond(report: TrainPlan) -> Section:
    others = [*report.alternatives, *([report.vocabulary_parallel] if report.vocabulary_parallel else [])]
    lines = [
        (
            one.what, f"{one.tokens_per_s_per_gpu:,.0f}", f"{100 * one.gain:+.1f} %",
            f"{max(one.memory_gb):.1f}", one.note,
        )
        for one in others
    ]  # fmt: skip
    if (plain := report.portable) is not None:
        gain = plain.tokens_per_s_per_gpu / report.best.tokens_per_s_per_gpu - 1
        note = f"{plain.layout.words}, split {' '.join(f'{size:g}' for size in plain.split)}; other programs run it too"
        lines.insert(
            0,
            (
                "whole layers, 1F1B",
                f"{plain.tokens_per_s_per_gpu:,.0f}",
                f"{100 * gain:+.1f} %",
                f"{plain.memory_gb:.1f}",
                note,
            ),
        )
    head = ("change", "tokens/s per GPU", "gain", "GB", "note")
    return Section(title="Beyond the plan", body=(rows(head, lines, "Alternatives"),))


def _emitted(report: TrainPlan) -> Section:
    """Settings for other programs that are text or lists of text."""
    parts = []
    for program, settings in sorted(report.emit.items()):
        if program in ("plan_file", "notes") or not isinstance(settings, dict):
            continue
        lines = [
            f"{key}: {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
            for key, value in settings.items()
        ]
        parts.append(folded(program, code("\n".join(lines))))
    return Section(title="For other programs", body=tuple(parts))


def _key(row: Row) -> tuple[object, ...]:
    return row.layout, row.split, row.recompute

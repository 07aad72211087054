"""The page of a ServeReport: memory of each GPU, the sweep over batches, the division, what bounds it."""

from __future__ import annotations

from skymoe.plan.draw.page import (
    Card,
    Page,
    Section,
    code,
    curves_section,
    html_page,
    memory_section,
    rows,
    said,
)
from skymoe.plan.draw.panel import Bars, Curve
from skymoe.plan.draw.words import GB, percent, short, time
from skymoe.plan.serve.report import BatchPoint, ServeReport


def plan_page(report: ServeReport) -> str:
    """The whole HTML document, offline."""
    best = _best(report)
    speed = f"{best.mixed_tokens_per_s:,.4g} tokens/s at batch {best.batch}" if best else "no batch fits"
    return html_page(
        Page(
            kind="serving",
            title=f"{report.model} on {_gpus(report)}: {speed}",
            lede=f"weights {report.weights}, keys and values {report.kv}, "
            f"context {report.context}, for {report.objective}",
            cards=_cards(report, best),
            sections=(
                memory_section([_bars(report)], None, chart="Memory of each GPU"),
                _curves(report),
                _sweep(report),
                _division(report),
                Section(title="What limits you", body=(said(report.limits),)),
                _beyond(report),
                Section(title="What was assumed", body=(said(report.notes),)),
            ),
        )
    )


def _best(report: ServeReport) -> BatchPoint | None:
    return next((point for point in report.sweep if point.batch == report.best_batch), None)


def _gpus(report: ServeReport) -> str:
    """4 x rtx4090 and 2 x rtx3090, in the order of the ranks."""
    names = list(dict.fromkeys(report.gpus))
    return " and ".join(f"{report.gpus.count(name)} x {name}" for name in names)


def _cards(report: ServeReport, best: BatchPoint | None) -> tuple[Card, ...]:
    fullest = max(report.memory, key=lambda one: one.needed / one.memory)
    cards = [
        Card(
            name="Memory", value=f"{fullest.needed:.1f} GB", unit=f"of {fullest.memory:.1f} GB with one sequence",
            tone="" if report.fits else "bad",
        ),
        Card(
            name="Room", value=f"{report.kv_tokens:,}",
            unit=f"tokens of keys and values: {report.max_sequences} sequences of {report.context}",
        ),
    ]  # fmt: skip
    if best is None:
        return tuple(cards)
    served = f"output tokens/s at batch {best.batch}, prompts included"
    return (
        Card(name="Served", value=f"{best.mixed_tokens_per_s:,.4g}", unit=served),
        Card(name="Decoding", value=f"{best.tokens_per_s:,.4g}", unit=f"tokens/s; a step takes {time(best.step_s)}"),
        Card(name="First token", value=time(best.ttft_s), unit="after a prompt arrives"),
        *cards,
    )


def _bars(report: ServeReport) -> Bars:
    ranks = [
        {"weights": one.weights * GB, "keys and values": one.kv_room * GB, "reserve": one.reserve * GB}
        for one in report.memory
    ]
    return Bars(
        title="weights, and what is left for keys and values",
        ranks=tuple(ranks),
        labels=tuple(one.gpu for one in report.memory),
        capacities=tuple(one.memory * GB for one in report.memory),
    )


def _curves(report: ServeReport) -> Section:
    fits = [point for point in report.sweep if point.fits]
    curves = [
        Curve(name="decoding alone", points=tuple((float(p.batch), p.tokens_per_s) for p in fits)),
        Curve(name="with prompts", points=tuple((float(p.batch), p.mixed_tokens_per_s) for p in fits)),
    ]
    return curves_section(
        curves if len(fits) > 1 else [], title="Throughput", chart="Output tokens by batch",
        x_name="sequences at a time", y_name="tokens/s",
    )  # fmt: skip


def _sweep(report: ServeReport) -> Section:
    lines = [
        (
            str(point.batch), "yes" if point.fits else "no", time(point.step_s), f"{point.tokens_per_s:,.4g}",
            f"{point.mixed_tokens_per_s:,.4g}", time(point.inter_token_s), time(point.ttft_s),
            ", ".join(f"{cause} {percent(share)}" for cause, share in _largest(point)),
        )
        for point in report.sweep
    ]  # fmt: skip
    head = ("batch", "fits", "step", "decoding tokens/s", "with prompts", "between tokens", "first token", "a step is")
    return Section(title="Batch by batch", body=(rows(head, lines, "Sweep over batches"),))


def _largest(point: BatchPoint) -> list[tuple[str, float]]:
    return sorted(point.parts.items(), key=lambda part: -part[1])[:3]


def _division(report: ServeReport) -> Section:
    lines = [(unit.replace("_", " "), ", ".join(map(str, shares))) for unit, shares in report.splits.items()]
    return Section(title="Division", body=(rows(("unit", "per GPU, layer 0"), lines, "Units per GPU"),))


def _beyond(report: ServeReport) -> Section:
    told = []
    pipeline, cost, rival = report.pipeline, report.cost, report.rival
    if cost is not None:
        money = f", {cost.money:.3g} of money" if cost.money is not None else ""
        told.append(f"a million output tokens take {cost.gpu_hours:.3g} GPU hours{money}")
    if pipeline is not None:
        rate = pipeline.mixed_tokens_per_s
        speed = f"{rate:,.4g} tokens/s at batch {pipeline.best_batch}" if rate is not None else "no batch fits"
        told.append(f"layers over GPUs instead, {', '.join(map(str, pipeline.layers))}: {speed}")
    if rival is not None and rival.times_cheaper is not None:
        active = f"{short(rival.active_ratio)} of our active parameters"
        told.append(f"{rival.times_cheaper:.2f} times the tokens per second of {rival.model}, which has {active}")
    body = (said(told), code(pipeline.vllm) if pipeline is not None else said(()))
    return Section(title="Instead", body=body)

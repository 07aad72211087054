"""Charts as data: what lines there are, in which colour, over which axes. `assets/page.js` gives them to plotly.

Colours are names of the page's CSS variables ("moe", "dense"), so that one chart serves the light and the dark page, or
"#rrggbb" for the layers, which run from indigo (first) over teal to amber (last). Legends are HTML, not plotly's: they
wrap on a phone and never cover a curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skymoe.report.data import Run
from skymoe.report.metrics import number
from skymoe.report.series import Floats, Points, bits_per_byte, mean, points, smooth, thin

AXES = {"tokens": "training tokens", "flops": "training compute (FLOPs)"}
_DENSE = ("dense", "dense2", "dense3")
_MOE = ("moe", "run2", "run3", "run4", "run5", "run6", "run7")
_MAX_CHART_POINTS = 12_000
_RAMP = ((0x4C, 0x6E, 0xF5), (0x0C, 0x97, 0x8F), (0xF0, 0x8C, 0x00))


@dataclass(frozen=True)
class Line:
    """One curve. `xs` has one list per axis of its chart; `end_label` is written at the last point."""

    name: str
    xs: tuple[Points, ...]
    y: Points
    color: str
    width: float = 2
    dash: str = "solid"
    opacity: float = 1
    markers: bool = False
    hover: bool = True
    legend: bool = True
    end_label: str = ""
    end_above: bool = True


@dataclass(frozen=True)
class Chart:
    """One drawing with its words.

    Attributes:
        id, title, caption: its place on the page, its heading, and one sentence on how to read it.
        axes: "tokens" and "flops"; with two of them the reader switches.
        lines: the curves, drawn in order.
        y_title, y_format: the vertical axis; d3 format of its numbers.
        from_zero: the vertical axis includes 0.
        heat: a heat map in place of lines, see `load_heat`.
    """

    id: str
    title: str
    caption: str
    axes: tuple[str, ...] = ("tokens",)
    lines: tuple[Line, ...] = ()
    y_title: str = ""
    y_format: str = ".3~f"
    from_zero: bool = False
    height: int = 320
    heat: dict[str, Any] = field(default_factory=dict)


def run_colors(runs: Sequence[Run]) -> dict[str, str]:
    """A colour for each run by name: dense ones grey-blue, mixtures of experts from the accent onwards."""
    dense = [run.name for run in runs if not run.is_moe]
    moe = [run.name for run in runs if run.is_moe]
    shades = [(name, _DENSE[i % len(_DENSE)]) for i, name in enumerate(dense)]
    return dict(shades + [(name, _MOE[i % len(_MOE)]) for i, name in enumerate(moe)])


def layer_color(index: int, count: int) -> str:
    """Colour of layer `index` of `count`."""
    place = 2 * index / max(1, count - 1)
    low, high = (_RAMP[0], _RAMP[1]) if place <= 1 else (_RAMP[1], _RAMP[2])
    part = place if place <= 1 else place - 1
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(low, high, strict=True))


def bits_chart(runs: Sequence[Run], parent: Run | None, colors: dict[str, str]) -> Chart | None:
    """Held-out bits per byte over tokens or compute; None without evaluations."""
    curves = [(run, curve) for run in runs if len(curve := bits_per_byte(run))]
    if not curves:
        return None
    best = min(curve.value_S[-1] for _, curve in curves)
    lines = [
        Line(
            run.name,
            (points(curve.tokens_S), points(curve.flops_S)),
            points(curve.value_S),
            colors[run.name],
            width=3,
            markers=True,
            end_label=f"{curve.last:.3f}" if len(curves) <= 2 else "",
            end_above=len(curves) < 2 or bool(curve.value_S[-1] > best),
        )
        for run, curve in curves
    ]
    start = bits_per_byte(parent).last if parent else None
    if start is not None:
        ends = [max((x for line in lines for x in line.xs[axis] if x is not None), default=1.0) for axis in (0, 1)]
        spans: tuple[Points, ...] = tuple([0.0, end] for end in ends)
        lines.insert(0, Line("dense parent", spans, [start, start], "muted", width=1.5, dash="dot"))
    caption = "Held-out text, never trained on. Lower is better."
    if start is not None:
        caption += " Both runs start from the dense parent."
    return Chart(
        "bits", "Bits per byte on held-out text", caption, tuple(AXES), tuple(lines), "bits per byte", height=310
    )


def loss_chart(runs: Sequence[Run], colors: dict[str, str], max_points: int) -> Chart | None:
    """Training loss, each step faint and its running mean strong; None without training records."""
    lines: list[Line] = []
    for run in runs:
        loss_S = run.train["loss"]
        if not np.isfinite(loss_S).any():
            continue
        keep = thin(len(loss_S), max_points)
        xs = tuple(points(run.train[axis][keep]) for axis in AXES)
        mean_S = smooth(loss_S, _span(len(loss_S)))[keep]
        if _span(len(loss_S)) >= 2:
            faint = points(loss_S[keep])
            lines.append(Line(run.name, xs, faint, colors[run.name], 1, opacity=0.25, hover=False, legend=False))
        lines.append(Line(run.name, xs, points(mean_S), colors[run.name], 2.5))
    caption = "Cross-entropy of the training batches."
    if any(not line.legend for line in lines):
        caption += " Faint: each logged step. Strong: running mean over 2 % of the run."
    return Chart("loss", "Training loss", caption, tuple(AXES), tuple(lines), "nats per token") if lines else None


def layer_chart(
    runs: Sequence[Run], column: str, *, colors: dict[str, str], max_points: int, title: str, caption: str,
    y_format: str = ".3~f", y_title: str = "", steady: bool = False, from_zero: bool = False,
) -> Chart | None:  # fmt: skip
    """A router figure over time: every layer of one MoE run, or the mean over layers of each of several runs.

    Args:
        steady: the column is no noisy measurement (a coefficient); draw it unsmoothed.
    """
    runs = [run for run in runs if column in run.layers]
    lines: list[Line] = []
    for run in runs:
        value_SN = run.layers[column]
        if not steady:
            value_SN = smooth(value_SN, _span(len(value_SN)))
        keep = thin(len(value_SN), min(max_points, max(120, _MAX_CHART_POINTS // value_SN.shape[1])))
        lines += _layer_lines(run, value_SN[keep], points(run.train["tokens"][keep]), colors, alone=len(runs) == 1)
    if not lines:
        return None
    return Chart(f"layer-{column}", title, caption, ("tokens",), tuple(lines), y_title, y_format, from_zero, height=300)


def similarity_chart(runs: Sequence[Run], colors: dict[str, str]) -> Chart | None:
    """Expert similarity over time, from the evaluations."""
    found = [
        (run, rows)
        for run in runs
        if (rows := [r for r in run.evals if isinstance(r.get("expert_similarity"), list) and r["expert_similarity"]])
    ]
    lines: list[Line] = []
    for run, rows in found:
        width = len(rows[0]["expert_similarity"])
        value_SN = np.array([_row(r["expert_similarity"], width) for r in rows])
        tokens_S = np.array([np.nan if (t := number(r.get("tokens"))) is None else t for r in rows])
        lines += _layer_lines(run, value_SN, points(tokens_S), colors, alone=len(found) == 1, markers=width < 10)
    caption = "Mean pairwise cosine between the weights of a layer's experts; 1 means copies of the dense parent."
    return Chart("similarity", "Expert similarity", caption, ("tokens",), tuple(lines), height=300) if lines else None


def speed_chart(runs: Sequence[Run], colors: dict[str, str], max_points: int) -> Chart | None:
    """Training speed over tokens."""
    lines = []
    for run in runs:
        speed_S = run.train["tokens_per_s"]
        if np.isfinite(speed_S).any():
            keep = thin(len(speed_S), max_points)
            value_S = smooth(speed_S, _span(len(speed_S)))[keep]
            lines.append(Line(run.name, (points(run.train["tokens"][keep]),), points(value_S), colors[run.name]))
    caption = (
        "Raw tokens per second of the training loop, without evaluations and saves; running mean over 2 % of the run."
    )
    title = "Training speed"
    return (
        Chart("speed", title, caption, ("tokens",), tuple(lines), "tokens per second", ".3~s", True, 280)
        if lines
        else None
    )


def load_heats(run: Run) -> tuple[Chart, ...]:
    """The last measured load of every expert as multiples of the fair share 1/E, one heat map per domain."""
    record = next((r for r in reversed(run.evals) if isinstance(r.get("expert_load"), dict)), None)
    loads: dict[str, Any] = record["expert_load"] if record else {}
    charts = []
    for index, (domain, rows) in enumerate(loads.items()):
        rows = [row for row in rows if isinstance(row, list) and row] if isinstance(rows, list) else []
        if not rows:
            continue
        experts = len(rows[0])
        share_NE = np.array([_row(row, experts) for row in rows]) * experts
        ids = run.moe_layers if len(run.moe_layers) == len(rows) else tuple(range(len(rows)))
        heat = {
            "z": [points(row) for row in share_NE],
            "x": [str(e) for e in range(experts)],
            "y": [str(i) for i in ids],
        }
        charts.append(Chart(f"load-{index}", domain, "", height=90 + 22 * min(len(rows), 20), heat=heat))
    return tuple(charts)


def _layer_lines(
    run: Run, value_SN: Floats, x: Points, colors: dict[str, str], *, alone: bool, markers: bool = False
) -> list[Line]:
    width = value_SN.shape[1]
    average = points(mean(value_SN, axis=1))
    if not alone:
        return [Line(run.name, (x,), average, colors[run.name], 2.5, markers=markers)]
    ids = run.moe_layers if len(run.moe_layers) == width else tuple(range(width))
    lines = [
        Line(f"layer {layer}", (x,), points(value_SN[:, i]), layer_color(i, width), 1.5, opacity=0.9, markers=markers)
        for i, layer in enumerate(ids)
    ]
    return lines + ([Line("mean", (x,), average, "text", 2.5, dash="dash")] if width > 1 else [])


def _row(values: Any, width: int) -> list[float]:
    numbers = [np.nan if (v := number(x)) is None else v for x in (values if isinstance(values, list) else ())]
    return (numbers + [np.nan] * width)[:width]


def _span(length: int) -> float:
    return max(1.0, length / 50)

"""The parts of the page that are drawn: result, loss, balance, gates, experts.

A part without its data is one line that says what is missing; it never disappears silently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from skymoe.base.html import Html, el, join, table
from skymoe.report import charts
from skymoe.report.charts import Chart
from skymoe.report.data import Material, Run
from skymoe.report.figure import figure, heat_figure, layer_key
from skymoe.report.series import bits_per_byte, domains, mean, tail_mean
from skymoe.report.verdict import Comparison, fixed, pair, percent


@dataclass(frozen=True)
class Section:
    """One part of the page: an anchor, a heading, its inside, the charts in it, and what is missing from it."""

    id: str
    title: str
    body: Html
    charts: tuple[Chart, ...] = ()
    note: str = ""


def result(material: Material, comparison: Comparison | None, colors: dict[str, str]) -> Section:
    """Bits per byte: the curve and the table by domain."""
    chart = charts.bits_chart(material.runs, material.parent, colors)
    if chart is None:
        return missing("result", "Result", "These runs were not evaluated, so there are no bits per byte to show.")
    rows = [
        (swatch(run.name, colors[run.name]), *(fixed(bits_per_byte(run, d).last) for d in _columns(material.runs)))
        for run in material.runs
    ]
    if comparison:
        rows += _difference_rows(comparison, material.runs, _columns(material.runs))
    note = (
        ""
        if comparison
        else "There is no pair of a dense run and a mixture of experts to compare; give both run directories."
    )
    body = figure(chart), table(["bits per byte", *_columns(material.runs)], rows, label="Bits per byte by domain")
    return Section("result", "Result", join(body), (chart,), note)


def loss(material: Material, colors: dict[str, str], max_points: int) -> Section:
    """Training loss."""
    chart = charts.loss_chart(material.runs, colors, max_points)
    if chart is None:
        return missing("loss", "Loss", "No training steps were logged.")
    return Section("loss", "Loss", figure(chart), (chart,))


def balance(material: Material, colors: dict[str, str], max_points: int) -> Section:
    """Drop rate and auxiliary-loss coefficient per layer."""
    plots = (
        _Plot("drop_rate", "Token drop rate", ".1~%", "share of assignments above capacity",
              "What would be dropped at the nominal capacity. Training itself may be dropless.", from_zero=True),
        _Plot("alpha", "Coefficient α of the balance loss", ".3~f", "α",
              "Follows its layer's drop rate: it fades where little is left to balance.", steady=True, from_zero=True),
    )  # fmt: skip
    intro = "How evenly tokens spread over the experts, and how hard training pushes for it, layer by layer."
    section = _router_section("balance", "Balance", intro, plots, material.runs, colors, max_points)
    return section if not section.charts else _with_router_table(section, material.runs, colors)


def gates(material: Material, colors: dict[str, str], max_points: int) -> Section:
    """How decided the router is."""
    plots = (
        _Plot("max1_max2", "Max1 / Max2", ".2f", "ratio", "Largest gate probability over the second, mean over tokens"),
        _Plot("max2_max3", "Max2 / Max3", ".2f", "ratio", "Second over third: how clearly the chosen two stand out"),
    )  # fmt: skip
    intro = (
        "A ratio of 1 means that the router cannot tell its experts apart. Gate normalization keeps the ratios above 1."
    )
    return _router_section("gates", "Gate sharpness", intro, plots, material.runs, colors, max_points)


def experts(material: Material, colors: dict[str, str], max_points: int) -> Section:
    """Do the experts become different, and what does each of them read?"""
    moe = [run for run in material.runs if run.is_moe]
    if not moe:
        return missing("experts", "Experts", NO_MOE)
    spread = _Plot("load_cov", "Spread of the load", ".2f", "coefficient of variation",
                   "Deviation of the experts' loads over their mean; 0 is perfectly even.", from_zero=True)  # fmt: skip
    found = [charts.similarity_chart(moe, colors), _draw(spread, moe, colors, max_points)]
    drawn = tuple(chart for chart in found if chart)
    heats = [(run, charts.load_heats(run)) for run in moe]
    parts = [_grid(drawn)] + [_load_block(run, maps, len(moe) > 1) for run, maps in heats if maps]
    everything = drawn + tuple(chart for _, maps in heats for chart in maps)
    if not everything:
        return missing("experts", "Experts", "Neither expert similarity nor expert load was logged.")
    note = "" if any(maps for _, maps in heats) else "The load of the experts by domain was not measured in these runs."
    return Section("experts", "Experts", join([_key_of(drawn), *parts]), everything, note)


NO_MOE = "None of these runs trains a mixture of experts."


def missing(id: str, title: str, note: str) -> Section:
    """A section that only says what is not there."""
    return Section(id, title, Html(""), (), note)


def swatch(name: str, color: str) -> Html:
    """A run's name with its colour."""
    return el("span", el("i", class_="swatch", style=f"--c:var(--{color})", aria_hidden="true"), name, class_="run")


@dataclass(frozen=True)
class _Plot:
    """A router column and how it is shown."""

    column: str
    title: str
    y_format: str
    y_title: str
    caption: str
    steady: bool = False
    from_zero: bool = False


def _draw(plot: _Plot, runs: Sequence[Run], colors: dict[str, str], max_points: int) -> Chart | None:
    return charts.layer_chart(
        runs, plot.column, colors=colors, max_points=max_points, title=plot.title, caption=plot.caption,
        y_format=plot.y_format, y_title=plot.y_title, steady=plot.steady, from_zero=plot.from_zero,
    )  # fmt: skip


def _router_section(
    id: str,
    title: str,
    intro: str,
    plots: Sequence[_Plot],
    runs: Sequence[Run],
    colors: dict[str, str],
    max_points: int,
) -> Section:
    if not any(run.is_moe for run in runs):
        return missing(id, title, NO_MOE)
    drawn = tuple(chart for plot in plots if (chart := _draw(plot, runs, colors, max_points)))
    if not drawn:
        return missing(id, title, "The runs logged no router figures.")
    lost = [plot.title for plot in plots if f"layer-{plot.column}" not in {chart.id for chart in drawn}]
    note = f"Not logged: {', '.join(lost)}." if lost else ""
    return Section(id, title, join([el("p", intro), _key_of(drawn), _grid(drawn)]), drawn, note)


def _grid(drawn: Sequence[Chart]) -> Html:
    return el("div", *(figure(chart, legend=False) for chart in drawn), class_="grid") if drawn else Html("")


def _key_of(drawn: Sequence[Chart]) -> Html:
    """One legend for several charts with the same lines."""
    return layer_key(max(drawn, key=lambda chart: len(chart.lines)).lines) if drawn else Html("")


def _columns(runs: Sequence[Run]) -> tuple[str, ...]:
    return ("all", *domains(runs)[:12])


def _difference_rows(comparison: Comparison, runs: Sequence[Run], columns: Sequence[str]) -> list[tuple[Html, ...]]:
    """The change of every mixture of experts against the dense run, at equal tokens and at equal compute."""
    moe = [run for run in runs if run.is_moe]
    rows = []
    for axis, words in (("tokens", "at equal tokens"), ("flops", "at equal compute")):
        for run in moe:
            pairs = [pair(comparison.dense, run, domain, axis) for domain in columns]
            name = f"{run.name} {words}" if len(moe) > 1 else words
            if pairs[0]:
                heading = el("span", name, class_="difference")
                rows.append((heading, *(_change(p.change if p else None) for p in pairs)))
    return rows


def _change(change: float | None) -> Html:
    tone = "" if change is None else "good" if change < 0 else "bad"
    return el("span", percent(change), class_=tone)


def _with_router_table(section: Section, runs: Sequence[Run], colors: dict[str, str]) -> Section:
    words: dict[str, tuple[str, Callable[[Any], str]]] = {
        "drop_rate": ("drop rate", lambda x: fixed(x * 100, 2) + "\N{NARROW NO-BREAK SPACE}%"),
        "alpha": ("α", lambda x: fixed(x, 5)),
        "max1_max2": ("Max1/Max2", lambda x: fixed(x, 2)),
        "max2_max3": ("Max2/Max3", lambda x: fixed(x, 2)),
        "load_cov": ("load CoV", lambda x: fixed(x, 2)),
        "dead_experts": ("dead experts", lambda x: fixed(x, 1)),
        "gate_entropy": ("gate entropy", lambda x: fixed(x, 2)),
    }
    moe = [run for run in runs if run.is_moe]
    shown = [name for name in words if any(name in run.layers for run in moe)]
    rows = []
    for run in moe:
        ends = [tail_mean(mean(run.layers[name], axis=1)) if name in run.layers else None for name in shown]
        cells = ["–" if end is None else words[name][1](end) for name, end in zip(shown, ends, strict=True)]
        rows.append((swatch(run.name, colors[run.name]), *cells))
    caption = el("p", "Mean over layers and over the last tenth of the run.", class_="small")
    figures = table(["at the end", *(words[name][0] for name in shown)], rows, label="Router figures at the end")
    return Section(section.id, section.title, join([section.body, figures, caption]), section.charts, section.note)


def _load_block(run: Run, maps: Sequence[Chart], named: bool) -> Html:
    title = f"Expert load by domain: {run.name}" if named else "Expert load by domain"
    caption = "Tokens that each expert receives, as a multiple of the fair share. Rows: layers. Columns: experts."
    scale = el(
        "div",
        el("span", "0×"),
        el("i", class_="ramp load", aria_hidden="true"),
        el("span", "2× and more"),
        class_="scale",
    )
    head = el("figcaption", el("h3", title), el("p", caption))
    inside = el("div", *(heat_figure(chart) for chart in maps), class_="heats")
    return el("figure", el("div", head, scale, class_="head"), inside, class_="card")

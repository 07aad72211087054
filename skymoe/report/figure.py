"""A chart's frame on the page: heading, how to read it, the switch between axes, the legend, the place to draw in."""

from __future__ import annotations

import math
from collections.abc import Sequence

from skymoe.base.html import Html, el
from skymoe.report.charts import AXES, Chart, Line

_SWITCH = {"tokens": "equal tokens", "flops": "equal compute"}
_CHIPS = 9  # with more lines than this the layers' legend becomes a ramp


def figure(chart: Chart, *, legend: bool = True) -> Html:
    """A chart with everything around it."""
    head = el("figcaption", el("h3", chart.title), el("p", chart.caption))
    parts = [el("div", head, _switch(chart), class_="head"), chips(chart.lines) if legend else Html(""), _canvas(chart)]
    return el("figure", *parts, class_="card")


def heat_figure(chart: Chart) -> Html:
    """A heat map with its domain's name."""
    return el("div", el("h4", chart.title), _canvas(chart))


def chips(lines: Sequence[Line]) -> Html:
    """A legend with one entry for each name."""
    entries = {line.name: line for line in lines if line.legend}
    return el("ul", *(_chip(line) for line in entries.values()), class_="legend")


def layer_key(lines: Sequence[Line]) -> Html:
    """The legend of a layer chart: an entry for each line, or a ramp when there are many layers."""
    layers = [line for line in lines if line.color.startswith("#")]
    if len(layers) <= _CHIPS:
        return chips(lines)
    ramp = el("i", class_="ramp layers", aria_hidden="true")
    scale = el("li", el("span", layers[0].name), ramp, el("span", layers[-1].name), class_="scale")
    return el("ul", scale, *(_chip(line) for line in lines if line not in layers), class_="legend")


def describe(chart: Chart) -> str:
    """The chart in words, for those who do not see it: where each curve begins and ends."""
    if chart.heat:
        size = f"{len(chart.heat['y'])} layers by {len(chart.heat['x'])} experts"
        return f"Heat map of expert load for {chart.title}, {size}"
    words = []
    for line in chart.lines[-12:]:
        known = [y for y in line.y if y is not None and math.isfinite(y)]
        if known and line.legend:
            words.append(f"{line.name} from {known[0]:.4g} to {known[-1]:.4g}")
    return f"{chart.title} over {AXES[chart.axes[0]]}: {'; '.join(words)}"


def chip(name: str, color: str, kind: str) -> Html:
    """An entry of a legend: a mark of class `kind` in `color`, a name of the page's or "#rrggbb"."""
    value = color if color.startswith("#") else f"var(--{color})"
    return el("li", el("i", class_=kind, style=f"--c:{value}", aria_hidden="true"), name)


def _chip(line: Line) -> Html:
    return chip(line.name, line.color, "line" if line.dash == "solid" else f"line {line.dash}")


def _switch(chart: Chart) -> Html:
    if len(chart.axes) < 2:
        return Html("")
    compares = len({line.name for line in chart.lines if line.legend}) > 1
    buttons = [
        el(
            "button",
            _SWITCH[axis] if compares else AXES[axis].split(" (")[0],
            type="button",
            data_axis=str(i),
            aria_pressed="true" if i == 0 else "false",
        )
        for i, axis in enumerate(chart.axes)
    ]
    return el("div", *buttons, class_="switch", role="group", aria_label="Compare at", data_for=chart.id)


def _canvas(chart: Chart) -> Html:
    style = f"height:{chart.height}px"
    return el("div", class_="plot", id=f"plot-{chart.id}", role="img", aria_label=describe(chart), style=style)

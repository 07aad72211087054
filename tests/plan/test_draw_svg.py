"""Drawings: well-formed, escaped, bounded, and they show what the timeline says."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from skymoe.plan.draw.bars import memory_svg
from skymoe.plan.draw.charts import curves_svg, points_svg
from skymoe.plan.draw.panel import Bars, Curve, Panel, Point
from skymoe.plan.draw.svg import timeline_svg
from skymoe.plan.draw.window import MAX_MARKS, MAX_RANKS, left_out, windows
from skymoe.plan.draw.words import percent, ticks, time
from skymoe.plan.eager import eager_one_f_one_b
from skymoe.plan.orders import interleaved, one_f_one_b, zbv
from skymoe.plan.simulator import simulate
from skymoe.plan.timeline import Timeline
from skymoe.spec.timeline import Span

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</title><script>alert(1)</script>\x00\x1b[31m \"&' " + "x" * 500


def figure_6(layers: list[int]) -> Panel:
    forward, backward = [float(n) for n in layers], [2.0 * n for n in layers]
    forward[-1], backward[-1] = forward[-1] + 2 / 3, backward[-1] + 4 / 3
    timeline = simulate(eager_one_f_one_b(10, forward, backward), forward, backward)
    return Panel(title=f"{layers}", timeline=timeline, unit="", again_s=(1.0, *[0.0] * (len(layers) - 1)))


def parse(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg" and root.attrib["role"] == "img"
    assert root.find(f"{SVG}title") is not None and root.find(f"{SVG}desc") is not None
    assert not any(element.tag == f"{SVG}script" for element in root.iter())
    assert not any(word in svg.lower() for word in ("http://", "https://") if word not in "http://www.w3.org/2000/svg")
    return root


def texts(root: ElementTree.Element) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


def test_figure_6_uniform_and_planned() -> None:
    """Both panels, one row per rank with its idle share, one block per pass, the numbers of micro-batches."""
    panels = [figure_6([6, 6, 6, 6]), figure_6([5, 5, 5, 5, 4])]
    root = parse(timeline_svg(panels, title="uniform | planned"))
    words = texts(root)
    assert [word for word in words if word.startswith("rank")] == [f"rank {r}" for n in (4, 5) for r in range(n)]
    assert words.count("9") == 2 * (4 + 5), "the last micro-batch, forward and backward, on every rank"
    assert any("step 254 · bubble 27 %" in word for word in words)
    blocks = {kind: 0 for kind in ("F", "B", "again")}
    for element in root.iter(f"{SVG}path"):
        if element.attrib["class"] in blocks:
            blocks[element.attrib["class"]] += element.attrib["d"].count("z")
    assert blocks == {"F": 90, "B": 90, "again": 20}, "10 micro-batches on 9 ranks; 10 backwards begin with a rerun"
    lengths = [_axis_length(root, index) for index in range(2)]
    ratio = panels[0].timeline.span_s / panels[1].timeline.span_s
    assert lengths[0] / lengths[1] == pytest.approx(ratio, rel=1e-3), "the same scale"


def _axis_length(root: ElementTree.Element, index: int) -> float:
    lines = [e.attrib["d"] for e in root.iter(f"{SVG}path") if e.attrib["class"] == "axis" and "h" in e.attrib["d"]]
    return float(lines[index].split("h")[1])


@pytest.mark.parametrize("kind", ["1f1b", "zbv", "interleaved"])
def test_a_huge_step_is_cut_and_bounded(kind: str) -> None:
    stages, micros = {"1f1b": (48, 384), "zbv": (64, 128), "interleaved": (96, 96)}[kind]
    ones = [1.0] * stages
    order = {
        "1f1b": lambda: one_f_one_b(48, micros),
        "zbv": lambda: zbv(32, micros),
        "interleaved": lambda: interleaved(24, 4, micros),
    }[kind]()
    timeline = simulate(order, ones, ones, ones if kind == "zbv" else None)
    panel = Panel(title=kind, timeline=timeline, unit="")
    svg = timeline_svg([panel])
    words = texts(parse(svg))
    assert len(svg) < 500_000
    assert any("is left out: the steady state goes on alike" in word for word in words)
    assert sum(bool(re.fullmatch(r"rank \d+", word)) for word in words) == min(MAX_RANKS, len(order))
    assert ("16 ranks are not drawn" in words) == (len(order) == 48)
    (window,) = windows([panel], 1000.0, pass_width=9.0, gap=20.0)
    gone = left_out(panel, window)
    assert gone is not None and 0 < gone[0] < gone[1] < timeline.span_s
    drawn = sum(bool(window.pieces(span)) for span in timeline.spans if span.rank in window.ranks)
    assert drawn <= 1.2 * MAX_MARKS
    assert window.width <= 1000.0 + 1e-6


def test_a_short_step_is_whole() -> None:
    panel = figure_6([6, 6, 6, 6])
    (window,) = windows([panel], 1000.0, pass_width=9.0, gap=20.0)
    assert left_out(panel, window) is None
    assert window.width == pytest.approx(1000.0)
    assert window.pieces(panel.timeline.spans[0]) == [(0.0, pytest.approx(1000 * 6 / 254))]


def test_hostile_names_are_text() -> None:
    timeline = simulate(one_f_one_b(2, 3), [1.0, 1.0], [2.0, 2.0])
    panel = Panel(title=HOSTILE, timeline=timeline, labels=(HOSTILE, "b"), note=HOSTILE)
    memory = {"weights": 1e9, "gradients": 1e9, "optimizer": 0, "activations": 3e9, "transient": 0, "reserve": 1e9}
    drawings = [
        timeline_svg([panel], title=HOSTILE),
        memory_svg([Bars(title=HOSTILE, ranks=(memory,), labels=(HOSTILE,))], 5e9, title=HOSTILE),
        points_svg([Point(x=1, y=2, name=HOSTILE, chosen=True)], title=HOSTILE, x_name="x", y_name="y"),
        curves_svg([Curve(name=HOSTILE, points=((1.0, 2.0), (2.0, 3.0)))], title=HOSTILE, x_name="x", y_name="y"),
    ]
    for svg in drawings:
        parse(svg)
        assert "<script" not in svg and "\x00" not in svg and "\x1b" not in svg
        assert "&lt;/title&gt;" in svg
        assert "x" * 300 not in svg, "bounded"


def test_memory_bars_say_what_is_too_much() -> None:
    small = {"weights": 10e9, "gradients": 20e9, "optimizer": 5e9, "activations": 20e9, "transient": 0, "reserve": 5e9}
    large = {**small, "activations": 50e9, "transient": 2e9}
    both = [Bars(title="uniform", ranks=(large, small)), Bars(title="planned", ranks=(small,) * 70)]
    root = parse(memory_svg(both, 80e9))
    words = texts(root)
    assert any("uniform12 GB too much" in word for word in words)
    assert any("at most 60 GB, 75 %, the first 64 of 70 ranks" in word for word in words)
    bars = [e for e in root.iter(f"{SVG}rect") if e.attrib.get("class") == "activations" and e.attrib["width"] != "11"]
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert len(heights) == 2 + 64 and heights[0] / heights[1] == pytest.approx(2.5, rel=0.01)


def test_nothing_to_draw() -> None:
    assert "No passes to draw." in texts(parse(timeline_svg([Panel(title="empty", timeline=Timeline((), 0.0))])))
    parse(memory_svg([], None))
    parse(points_svg([], title="none", x_name="x", y_name="y"))
    parse(curves_svg([], title="none", x_name="x", y_name="y"))
    parse(timeline_svg([Panel(title="a moment", timeline=Timeline.of([Span(0, 0, "F", 0, 0.0, 0.0)], 0.0))]))


def test_points_name_the_answer_and_the_frontier() -> None:
    points = [Point(x=40.0 + i, y=100.0 * (i % 7), name=f"layout {i}", frontier=i in (1, 6)) for i in range(20)]
    points.append(Point(x=70.0, y=700.0, name="the answer", chosen=True, frontier=True))
    root = parse(points_svg(points, title="speed", x_name="GB", y_name="tokens/s"))
    kinds = [circle.attrib["class"] for circle in root.iter(f"{SVG}circle")]
    assert (kinds.count("dot"), kinds.count("dot frontier"), kinds.count("dot chosen")) == (18, 2, 1)
    assert {"the answer", "layout 1", "layout 6"} <= set(texts(root))


def test_words() -> None:
    assert [time(x) for x in (0.0, 2.5e-5, 0.0123, 1.234, 1234.0)] == ["0", "25 µs", "12.3 ms", "1.23 s", "1234 s"]
    assert time(20.0, "") == "20"
    assert [percent(x) for x in (0.1, 0.034, 0.0)] == ["10 %", "3.4 %", "0 %"]
    assert ticks(0.0, 10.0, 5) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert ticks(3.0, 3.0, 5) == [3.0] and ticks(float("nan"), 1.0, 5) == []

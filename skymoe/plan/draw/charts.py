"""Two small charts: candidates by memory and speed, with those that nothing beats in both; and curves over a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from skymoe.base.html import Html, el, join
from skymoe.plan.draw.frame import drawing, number, path, text
from skymoe.plan.draw.panel import Curve, Point
from skymoe.plan.draw.words import name, short, ticks

MAX_POINTS: Final = 400
MAX_CURVES: Final = 4
_WIDTH: Final = 1120.0
_HEIGHT: Final = 260.0
_LEFT: Final = 74.0
_RIGHT: Final = 150.0
_TOP: Final = 62.0


class _Axes:
    """Where values lie in the drawing."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], *, from_zero: bool) -> None:
        low, high = min(xs, default=0.0), max(xs, default=1.0)
        margin = 0.04 * (high - low) or 0.5
        self.x_range = (low - margin, high + margin)
        below, above = (0.0 if from_zero else min(ys, default=0.0)), max(ys, default=1.0)
        room = 0.06 * (above - below) or 0.5
        self.y_range = (below if from_zero else below - room, above + room)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return _TOP + _HEIGHT - (value - low) / (high - low) * _HEIGHT

    def frame(self, x_name: str, y_name: str, x_marks: Sequence[float]) -> list[Html]:
        children = []
        for mark in ticks(*self.y_range, 5):
            children.append(path("rule", f"M{_LEFT:g} {number(self.y(mark))}H{_WIDTH - _RIGHT:g}"))
            children.append(text(short(mark), _LEFT - 8, self.y(mark) + 4, "soft small end"))
        bottom = _TOP + _HEIGHT
        children.append(path("axis", f"M{_LEFT:g} {bottom:g}H{_WIDTH - _RIGHT:g}"))
        for mark in x_marks:
            children.append(path("axis", f"M{number(self.x(mark))} {bottom:g}v4"))
            children.append(text(short(mark), self.x(mark), bottom + 18, "soft small mid"))
        children.append(text(name(x_name), (_LEFT + _WIDTH - _RIGHT) / 2, bottom + 38, "soft mid"))
        children.append(text(name(y_name), 16, _TOP - 6, "soft"))
        return children


def points_svg(
    points: Sequence[Point], *, title: str, x_name: str, y_name: str, standalone: bool = True
) -> Html:  # fmt: skip
    """Draw candidates. The frontier is joined by steps; names stand beside it where they do not overlap."""
    shown = sorted(points, key=lambda point: (not point.chosen, not point.frontier))[:MAX_POINTS]
    axes = _Axes([point.x for point in shown], [point.y for point in shown], from_zero=False)
    children = [text(name(title), 16, 28, "title"), *axes.frame(x_name, y_name, ticks(*axes.x_range, 8))]
    front = sorted((p for p in shown if p.frontier), key=lambda point: point.x)
    if len(front) > 1:
        steps = "".join(f"H{number(axes.x(p.x))}V{number(axes.y(p.y))}" for p in front[1:])
        children.append(path("axis c0", f"M{number(axes.x(front[0].x))} {number(axes.y(front[0].y))}{steps}"))
    taken: list[tuple[float, float, float]] = []
    for point in reversed(shown):
        kind = "dot chosen" if point.chosen else "dot frontier" if point.frontier else "dot"
        radius = "6.5" if point.chosen else "4.5" if point.frontier else "3.2"
        told = el("title", f"{name(point.name)}: {short(point.y)} at {short(point.x)}")
        children.append(
            el("circle", told, class_=kind, cx=number(axes.x(point.x)), cy=number(axes.y(point.y)), r=radius)
        )  # fmt: skip
    for point in shown:
        if point.chosen or point.frontier:
            children.append(_label(point, axes, taken))
    words = f"{name(title)}: {len(points)} candidates. " + "; ".join(
        f"{name(p.name)}: {short(p.y)} {name(y_name)} at {short(p.x)} {name(x_name)}"
        for p in shown[:8]
        if p.chosen or p.frontier
    )
    return drawing(
        children, width=_WIDTH, height=_TOP + _HEIGHT + 50, title=title, description=words, standalone=standalone
    )  # fmt: skip


def curves_svg(
    curves: Sequence[Curve], *, title: str, x_name: str, y_name: str, standalone: bool = True
) -> Html:  # fmt: skip
    """Draw up to four lines from zero on, each named at its end."""
    shown = [curve for curve in curves[:MAX_CURVES] if curve.points]
    xs = sorted({x for curve in shown for x, _ in curve.points})
    axes = _Axes(xs, [y for curve in shown for _, y in curve.points], from_zero=True)
    children = [text(name(title), 16, 28, "title"), *axes.frame(x_name, y_name, ticks(*axes.x_range, 8))]
    for index, curve in enumerate(shown):
        line = "L".join(f"{number(axes.x(x))} {number(axes.y(y))}" for x, y in curve.points)
        children.append(path(f"curve c{index}", f"M{line}"))
        for x, y in curve.points:
            told = el("title", f"{name(curve.name)}: {short(y)} at {short(x)}")
            children.append(el("circle", told, class_=f"d{index}", cx=number(axes.x(x)), cy=number(axes.y(y)), r="3"))
        last_x, last_y = curve.points[-1]
        children.append(text(name(curve.name, 22), axes.x(last_x) + 10, axes.y(last_y) + 4, f"small d{index} strong"))
    words = f"{name(title)}. " + " ".join(
        f"{name(c.name)}: from {short(c.points[0][1])} to {short(c.points[-1][1])}." for c in shown
    )
    return drawing(
        children, width=_WIDTH, height=_TOP + _HEIGHT + 50, title=title, description=words, standalone=standalone
    )  # fmt: skip


def _label(point: Point, axes: _Axes, taken: list[tuple[float, float, float]]) -> Html:
    """The name of a point to its right, unless another name is there."""
    words = name(point.name, 34)
    x, y, width = axes.x(point.x) + 10, axes.y(point.y) + (4 if point.chosen else 15), 6.2 * len(words)
    if x + width > _WIDTH - 4:
        x -= width + 20
    if any(abs(y - other_y) < 13 and x < other_x + other and other_x < x + width for other_x, other_y, other in taken):
        return join([])
    taken.append((x, y, width))
    return text(words, x, y, "small strong halo" if point.chosen else "small soft halo")

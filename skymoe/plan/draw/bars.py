"""Memory of ranks as stacked bars with the line of what a GPU has, side by side for several divisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from skymoe.base.html import Html, join
from skymoe.plan.draw.frame import box, drawing, legend, number, path, runs, text
from skymoe.plan.draw.panel import PARTS, Bars
from skymoe.plan.draw.words import GB, gigabytes, name, percent, ticks

MAX_BARS: Final = 64
_WIDTH: Final = 1120.0
_HEIGHT: Final = 190.0
_LEFT: Final = 58.0


def memory_svg(
    groups: Sequence[Bars], capacity: float | None = None, *, title: str = "Memory per rank", standalone: bool = True
) -> Html:
    """Draw one bar per rank, groups beside each other with one scale.

    Args:
        groups: at least one; of each the first 64 ranks are drawn.
        capacity: of a GPU; bytes. None for no line.
        title: above.
        standalone: as a file of its own; False for a page that has the style sheet.
    """
    shown = [group for group in groups if group.ranks]
    top = max([GB, capacity or 0.0, *(size for group in shown for size in (*group.totals, *group.capacities))])
    top *= 1.08
    children = [text(name(title), 16, 28, "title")]
    children.append(legend(((_kind(part), part) for part in PARTS if _occurs(shown, part)), 16, 52))
    base = 86 + _HEIGHT
    children += _scale(top, base)
    bars = sum(min(len(group.ranks), MAX_BARS) for group in shown)
    slot = min(64.0, (_WIDTH - _LEFT - 16 - 40 * len(shown)) / max(1, bars))
    x, names = _LEFT + 12, []
    for group in shown:
        drawn, named, x = _group(group, capacity, top, base, slot, x)
        children.append(drawn)
        names.append(named)
        x += 40
    if capacity:
        y = base - capacity / top * _HEIGHT
        children.append(path("cap", f"M{number(_LEFT)} {number(y)}H{number(_WIDTH - 16)}"))
        children.append(text(f"{gigabytes(capacity)} GB", _WIDTH - 16, y - 5, "alarm small end"))
    children += names  # above the line
    words = f"{name(title)} in GB. " + " ".join(_describe(group, capacity) for group in shown)
    return drawing(
        children, width=_WIDTH, height=base + 46, title=title, description=words, standalone=standalone
    )  # fmt: skip


def _kind(part: str) -> str:
    """Its colour."""
    return "activations" if part == "keys and values" else part


def _occurs(groups: Sequence[Bars], part: str) -> bool:
    return any(rank.get(part) for group in groups for rank in group.ranks)


def _scale(top: float, base: float) -> list[Html]:
    marks: list[Html] = []
    for mark in ticks(0.0, top / GB, 5):
        y = base - mark * GB / top * _HEIGHT
        marks.append(path("rule", f"M{number(_LEFT)} {number(y)}H{number(_WIDTH - 16)}"))
        marks.append(text(f"{mark:g}", _LEFT - 8, y + 4, "soft small end"))
    return [*marks, text("GB", _LEFT - 8, base - _HEIGHT - 12, "soft small end")]


def _group(
    group: Bars, capacity: float | None, top: float, base: float, slot: float, x: float
) -> tuple[Html, Html, float]:
    """The bars of one division from `x` on, the numbers above them, and where they end."""
    children, numbers = [], []
    shown = group.ranks[:MAX_BARS]
    labels = group.labels if len(group.labels) == len(group.ranks) else tuple(map(str, range(len(group.ranks))))
    every = 1 if slot >= 22 else 2 if slot >= 13 else 8
    for index, rank in enumerate(shown):
        at = x + index * slot
        y = base
        for part, amount in rank.items():
            height = max(0.0, amount) / top * _HEIGHT
            y -= height
            if height > 0:
                children.append(box(_kind(part), at, y, slot * 0.78, height))
        over = group.is_over(index, capacity)
        if group.capacities:
            y_cap = base - group.capacities[index] / top * _HEIGHT
            children.append(path("cap", f"M{number(at - 2)} {number(y_cap)}h{number(slot * 0.78 + 4)}"))
        if slot >= 22:
            kind = "alarm small mid halo" if over else "small mid halo"
            numbers.append(text(gigabytes(group.totals[index]), at + slot * 0.39, y - 4, kind))
        if index % every == 0:
            children.append(text(name(labels[index], 12), at + slot * 0.39, base + 15, "soft small mid"))
    note = _note(group, capacity)
    children.append(runs(x, base + 36, ("head", name(group.title, 60)), ("soft", note)))
    return join(children), join(numbers), max(x + len(shown) * slot, x + 240 if len(shown) < 6 else 0)


def _note(group: Bars, capacity: float | None) -> str:
    most = max(group.totals)
    more = f", the first {MAX_BARS} of {len(group.ranks)} ranks" if len(group.ranks) > MAX_BARS else ""
    if not capacity:
        return f"at most {gigabytes(most)} GB{more}"
    if most > capacity * (1 + 1e-9):
        return f"{gigabytes(most - capacity)} GB too much{more}"
    return f"at most {gigabytes(most)} GB, {percent(most / capacity)}{more}"


def _describe(group: Bars, capacity: float | None) -> str:
    totals = ", ".join(gigabytes(total) for total in group.totals[:MAX_BARS])
    return f"{name(group.title)}: {totals}; {_note(group, capacity)}."

"""A step of a pipeline in the terminal.

Each rank is a row, each column a bit of time with the letter of what fills most of it: F forward, B backward, r layers
run again in it, W gradients of weights, a point idle. Letters carry the meaning and colours only help, so it reads the
same with NO_COLOR, in a pipe and for those who do not see colours. A long step is cut in the middle, as in the SVG.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.text import Text

from skymoe.plan.draw.panel import Panel
from skymoe.plan.draw.window import MAX_RANKS, Window, left_out, windows
from skymoe.plan.draw.words import figures, name, percent, time
from skymoe.plan.timeline import Timeline
from skymoe.spec.timeline import Span

_STYLES: Final = {
    "F": "white on blue", "B": "black on yellow", "r": "white on red", "W": "black on green", ".": "dim", "~": "dim",
}  # fmt: skip
_WORDS: Final = {"F": "forward", "B": "backward", "r": "run again", "W": "gradients of weights", ".": "idle"}


def show_timeline(
    timeline: Timeline | Panel, console: Console | None = None, width: int | None = None, *, title: str = "step"
) -> None:
    """Print one step.

    Args:
        timeline: or a panel, with labels and the parts that are run again.
        console: where to; standard output without one.
        width: in characters; that of the console without it.
        title: of a plain timeline.
    """
    show_timelines([timeline if isinstance(timeline, Panel) else Panel(title=title, timeline=timeline)], console, width)


def show_timelines(panels: Sequence[Panel], console: Console | None = None, width: int | None = None) -> None:
    """Print one step per panel, all with the same scale of time."""
    console = console or Console(highlight=False)
    shown = [panel for panel in panels if panel.timeline.spans]
    if not shown:
        return
    labels = [_labels(panel) for panel in shown]
    left = max(len(label) for own in labels for label in own) + 1
    columns = max(20, (width or console.width) - left - 7)
    views = windows(shown, columns, pass_width=2.0, gap=2.0)
    letters: set[str] = set()
    for panel, own, window in zip(shown, labels, views, strict=True):
        note = name(panel.note, 160) or figures(panel)
        _print(console, Text(name(panel.title), style="bold").append(f"  {note}", style="default not bold"))
        by_rank: defaultdict[int, list[Span]] = defaultdict(list)
        for span in panel.timeline.spans:
            by_rank[span.rank].append(span)
        for index, rank in enumerate(window.ranks):
            if len(panel.ranks) > MAX_RANKS and index == MAX_RANKS // 2:
                _print(console, Text(f"{len(panel.ranks) - MAX_RANKS} ranks are not shown".rjust(left + 26), "dim"))
            cells = _cells(panel, by_rank[rank], window, columns)
            letters |= set(cells)
            line = Text(own[panel.ranks.index(rank)].rjust(left - 1) + " ")
            _append(line, cells)
            _print(console, line.append(f" {_idle(panel, by_rank[rank]):>5}"))
        gone = left_out(panel, window)
        if gone:
            words = f"~ {time(gone[0], panel.unit)} to {time(gone[1], panel.unit)} left out"
            _print(console, Text(" " * left + words, style="dim"))
    _print(console, _legend([(letter, _WORDS[letter], _STYLES[letter]) for letter in _WORDS if letter in letters]))


def _cells(panel: Panel, spans: Sequence[Span], window: Window, columns: int) -> str:
    """One letter per column: what fills most of it."""
    filled: list[defaultdict[str, float]] = [defaultdict(float) for _ in range(columns)]
    for span in spans:
        again = panel.again_s[span.stage] if panel.again_s and span.kind in ("B", "I") else 0.0
        middle = min(span.end_s, span.start_s + again)
        letter = "B" if span.kind == "I" else span.kind
        for piece, kind in ((span._replace(end_s=middle), "r"), (span._replace(start_s=middle), letter)):
            for x, wide in window.pieces(piece):
                _fill(filled, x, wide, kind)
    inside = [(segment.x, segment.x + (segment.end_s - segment.start_s) * window.scale) for segment in window.segments]
    return "".join(
        _letter(cell, any(first < column + 0.5 < last for first, last in inside), column < window.width)
        for column, cell in enumerate(filled)
    )


def _fill(filled: list[defaultdict[str, float]], x: float, wide: float, kind: str) -> None:
    column, end = int(x), x + wide
    while x < end - 1e-9 and column < len(filled):
        until = min(end, column + 1.0)
        filled[column][kind] += until - x
        x, column = until, column + 1


def _letter(cell: dict[str, float], inside: bool, drawn: bool) -> str:
    if not cell:
        return " " if not drawn else "." if inside else "~"
    return max(sorted(cell), key=lambda key: cell[key]) if sum(cell.values()) >= 0.5 else "."


def _append(line: Text, cells: str) -> None:
    """Runs of the same letter at once."""
    start = 0
    for index in range(1, len(cells) + 1):
        if index == len(cells) or cells[index] != cells[start]:
            line.append(cells[start:index], style=_STYLES.get(cells[start], ""))
            start = index


def _legend(entries: Sequence[tuple[str, str, str]]) -> Text:
    line = Text()
    for letter, words, style in entries:
        line.append(letter, style=style).append(f" {words}   ")
    return line


def _labels(panel: Panel) -> list[str]:
    if len(panel.labels) == len(panel.ranks):
        return [name(label, 20) for label in panel.labels]
    return [f"rank {rank}" for rank in panel.ranks]


def _idle(panel: Panel, spans: Sequence[Span]) -> str:
    whole = panel.timeline.span_s
    return percent(max(0.0, 1 - sum(span.end_s - span.start_s for span in spans) / whole)) if whole else ""


def _print(console: Console, line: Text) -> None:
    line.rstrip()
    console.print(line, no_wrap=True, overflow="crop", crop=True, soft_wrap=False)

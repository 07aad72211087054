"""The same in letters: readable in a pipe, without colours, at any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from skymoe.plan.draw.panel import Panel
from skymoe.plan.draw.terminal import show_timeline, show_timelines
from skymoe.plan.orders import one_f_one_b, zbv
from skymoe.plan.simulator import simulate
from skymoe.plan.timeline import Timeline


def printed(show, *, width: int = 80, color: bool = False) -> str:
    out = io.StringIO()
    show(Console(file=out, width=width, force_terminal=color, color_system="standard" if color else None))
    return out.getvalue()


def test_a_step_by_hand() -> None:
    """Two ranks, two micro-batches: 12 units over 24 columns, two columns a unit."""
    timeline = simulate(one_f_one_b(2, 2), [2.0, 2.0], [2.0, 2.0])
    lines = printed(lambda console: show_timeline(timeline, console, width=24 + 7 + 7)).splitlines()
    assert lines[0] == "step  step 12 s · bubble 33 %"
    assert lines[1] == "rank 0 FFFFFFFF....BBBB....BBBB  33 %"
    assert lines[2] == "rank 1 ....FFFFBBBBFFFFBBBB....  33 %"
    assert lines[3] == "F forward   B backward   . idle"


def test_what_is_run_again_and_weights_have_their_letters() -> None:
    plain = simulate(one_f_one_b(2, 2), [2.0, 2.0], [4.0, 4.0])
    panel = Panel(title="planned", timeline=plain, again_s=(2.0, 0.0), labels=("stage 0", "stage 1"), unit="")
    text = printed(lambda console: show_timelines([panel], console))
    assert "stage 0 FF" in text and "rrr" in text.splitlines()[1] and "r" not in text.splitlines()[2][8:]
    halves = [1.0] * 4
    text = printed(lambda console: show_timeline(simulate(zbv(2, 4), halves, halves, halves), console))
    assert "W gradients of weights" in text and "WW" in text


@pytest.mark.parametrize("width", [40, 80, 160])
def test_a_long_step_is_cut_and_fits(width: int) -> None:
    timeline = simulate(one_f_one_b(8, 256), [1.0] * 8, [2.0] * 8)
    text = printed(lambda console: show_timeline(timeline, console, title="x" * 400), width=width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "left out" in text and "~" in text.splitlines()[1]


def test_colours_only_help() -> None:
    timeline = simulate(one_f_one_b(4, 8), [1.0] * 4, [2.0] * 4)
    plain = printed(lambda console: show_timeline(timeline, console))
    coloured = printed(lambda console: show_timeline(timeline, console), color=True)
    assert "\x1b[" in coloured and "\x1b" not in plain
    assert Console(file=io.StringIO(), width=80).render_str("") is not None
    stripped = "".join(part.split("m", 1)[1] if index else part for index, part in enumerate(coloured.split("\x1b[")))
    assert [line.rstrip() for line in stripped.splitlines()] == [line.rstrip() for line in plain.splitlines()]


def test_control_characters_and_nothing_at_all() -> None:
    timeline = simulate(one_f_one_b(2, 2), [1.0, 1.0], [1.0, 1.0])
    text = printed(lambda console: show_timeline(timeline, console, title="\x1b[31m[bold]red[/bold]"))
    assert "\x1b" not in text and "\\x1b[31m[bold]red[/bold]" in text
    assert printed(lambda console: show_timeline(Timeline((), 0.0), console)) == ""

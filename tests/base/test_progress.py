from __future__ import annotations

import io
import logging
import sys

import pytest

from skymoe.base import progress as module
from skymoe.base.log import logger, setup_logging
from skymoe.base.progress import progress


@pytest.fixture(autouse=True)
def restore_logger():
    state = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = state


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_on_standard_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    setup_logging()
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0.0)
    with progress("train", total=3, unit="step") as bar:
        bar.advance(loss=3.14159, phase="[warm]")
        bar.advance(2)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 2
    assert lines[0].startswith("train: 1/3 step, 0 s, 0 s left, loss 3.142  phase [warm]")
    assert lines[-1] == "train: 3/3 step, 0 s, loss 3.142  phase [warm]"


def test_few_lines_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    with progress("read", total=None, unit="MB") as bar:
        for _ in range(1000):
            bar.advance(0.5)
    assert capsys.readouterr().err == "read: 500 MB, 0 s\n"


def test_speed_and_time_left_are_those_of_this_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 of 10 GB lay there before: one more in 2 s is 0.5 GB/s and leaves 2 s, not a quarter of a second."""
    setup_logging()
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with progress("copy", total=10, unit="GB", done=8, speed=True) as bar:
        now += 2.0
        bar.advance(1)
        now += 7.0
        bar.advance(0.5)
        bar.advance(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["copy: 9.5/10 GB, 9 s, 0.167 GB/s, 3 s left", "copy: 10/10 GB, 9 s, 0.222 GB/s"]


@pytest.mark.parametrize(
    ("done", "total", "shown"),
    [(0, 3, "0/3"), (1e6, 2e6, "1,000,000/2,000,000"), (0.25, 20.9925, "0.2/21.0"), (7, None, "7")],
)
def test_counts_are_readable(done: float, total: float | None, shown: str) -> None:
    assert module._count(done, total) == shown
    assert [module._duration(s) for s in (0.4, 119, 600, 9000)] == ["0 s", "119 s", "10 min", "2.5 h"]


def test_quiet_and_unasked_programs_see_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(-1)
    with progress("a", total=1) as bar:
        bar.advance(loss=1.0)
        bar.status(loss=2.0)
    logger.setLevel(logging.NOTSET)
    with progress("a", total=1) as bar:
        bar.advance()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_and_log_lines_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    setup_logging()
    with progress("outer [1]", total=2) as outer, progress("inner", total=None) as inner:
        inner.advance(5, loss=0.25)
        logger.info("a line of the log")
        outer.advance()
    shown = terminal.getvalue()
    assert "outer [1]" in shown
    assert "1/2" in shown
    assert "loss 0.25" in shown
    assert any(line.strip().endswith("a line of the log") for line in shown.splitlines())


def test_a_terminal_shows_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    setup_logging()
    with progress("copy", total=10, unit="GB", done=4, speed=True) as bar:
        module.time.sleep(0.02)
        bar.advance(3)
        module.time.sleep(0.3)  # the display is drawn four times a second
    shown = terminal.getvalue()
    assert "7/10" in shown
    assert " GB/s 0 s left" in shown


def test_an_error_passes_through() -> None:
    with pytest.raises(ZeroDivisionError), progress("a", total=1):
        raise ZeroDivisionError

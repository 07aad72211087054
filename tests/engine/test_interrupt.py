"""Ctrl-C comes after the step that runs; the second one at once."""

from __future__ import annotations

import signal
import threading

import pytest

from skymoe.engine.interrupt import whole_step


def test_ctrl_c_is_raised_when_the_step_has_ended() -> None:
    before = signal.getsignal(signal.SIGINT)
    done = []
    with pytest.raises(KeyboardInterrupt), whole_step():
        signal.raise_signal(signal.SIGINT)
        done.append("the rest of the step")
    assert done and signal.getsignal(signal.SIGINT) is before
    with whole_step():
        done.append("without Ctrl-C nothing is raised")


def test_a_second_one_does_not_wait() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), whole_step():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
        signal.raise_signal(signal.SIGINT)
        done.append(2)
    assert done == [1]


def test_an_error_of_the_step_is_told_as_it_is() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), whole_step():
        signal.raise_signal(signal.SIGINT)
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) is before


def test_where_it_is_ignored_it_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with whole_step():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def step() -> None:
        with whole_step():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert seen == [before]

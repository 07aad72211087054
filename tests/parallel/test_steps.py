"""Turns: the youngest goes first, everybody ends, results in order."""

from __future__ import annotations

from skymoe.parallel.steps import Steps, interleave, run


def work(name: str, pauses: int, log: list[str]) -> Steps[str]:
    for step in range(pauses):
        log.append(f"{name}{step}")
        yield
    log.append(f"{name} ends")
    return name


def test_run_goes_straight_on() -> None:
    log: list[str] = []
    assert run(work("a", 2, log)) == "a"
    assert log == ["a0", "a1", "a ends"]


def test_what_one_sends_travels_while_the_one_before_multiplies() -> None:
    log: list[str] = []
    assert interleave([work(name, 2, log) for name in "abc"]) == ["a", "b", "c"]
    assert log == ["a0", "b0", "a1", "c0", "b1", "a ends", "c1", "b ends", "c ends"]


def test_nothing_and_no_pauses() -> None:
    log: list[str] = []
    assert interleave([]) == []
    assert interleave([work(name, 0, log) for name in "ab"]) == ["a", "b"]

"""Work that pauses wherever something has been put on its way.

A function that starts a collective, and has nothing to do until it is done, yields. `run` goes straight on: start,
wait, start, wait. `interleave` has several pieces of work and gives each a turn:

    turn    0          1          2          3
    work 0  send       multiply   collect
    work 1             send       multiply   collect
    work 2                        send       multiply   ...

Within a turn the youngest goes first, so that what it sends travels while an older one multiplies. The order depends
on nothing but the number of pieces and of pauses, so it is the same on every rank; and because autograd walks the
same path backwards, the backward pass overlaps in the same way.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]


def run(steps: Steps[T]) -> T:
    """To the end, without a pause."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def interleave(works: Sequence[Steps[T]]) -> list[T]:
    """All to the end, each a turn behind the one before it. Results in the order of `works`."""
    results: dict[int, T] = {}
    turn = 0
    while len(results) < len(works):
        for index in range(min(turn, len(works) - 1), -1, -1):
            if index in results:
                continue
            try:
                next(works[index])
            except StopIteration as end:
                results[index] = end.value
        turn += 1
    return [results[index] for index in range(len(works))]

"""What is remembered between divisions of pipelines with the same order: bounded by tasks, not by how many orders.

An order of a million tasks takes a hundred megabytes, one of a thousand nothing, so a number of entries bounds neither.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

from skymoe.spec.layout import ScheduleKind

MOST_TASKS = 2**20
"""Of all that a function remembers; its last result stays, however large."""

Key = tuple[ScheduleKind, int, int, int]
"""All that an order depends on: schedule, ranks, stages per rank, micro-batches."""

T = TypeVar("T")


def num_tasks(key: Key) -> int:
    """Of the order: two per stage and micro-batch, three where the backward is cut in two."""
    schedule, ranks, chunks, num_micro = key
    return (3 if schedule is ScheduleKind.ZERO_BUBBLE else 2) * ranks * chunks * num_micro


def remembered(function: Callable[[Key], T]) -> Callable[[Key], T]:
    """`function` with its results of the latest keys, as many as MOST_TASKS allow."""
    known: OrderedDict[Key, T] = OrderedDict()

    @wraps(function)
    def answer(key: Key) -> T:
        if key not in known:
            known[key] = function(key)
        known.move_to_end(key)
        while len(known) > 1 and sum(map(num_tasks, known)) > MOST_TASKS:
            known.popitem(last=False)
        return known[key]

    return answer

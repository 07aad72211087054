"""When nothing fits: the error, with the smallest change that would do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from skymoe.base.errors import ConfigError
from skymoe.plan.pipeline.problem import Problem
from skymoe.plan.pipeline.tables import Tables

_WIDTH = 12
"""Cuts are looked for this many positions around even ones, in pipelines of more than `_SMALL` positions."""
_SMALL = 100
_MORE_RANKS = 16


def nothing_fits(problem: Problem) -> ConfigError:
    """The error for a 1F1B pipeline of which no division fits the memory."""
    needed = smallest_memory(problem)
    hints = [f"memory of {rounded_up(needed)}"]
    if not problem.recompute:
        again = smallest_memory(replace(problem, recompute=True))
        if again < needed:
            hints.append(
                "layers run again in the backward pass (recompute)"
                + ("" if again <= (problem.memory or 0.0) else f" and memory of {rounded_up(again)}")
            )
    ranks = _enough_ranks(problem)
    hints += [f"{ranks} stages"] if ranks else []
    return ConfigError(
        f"no division of {len(problem.units)} units over {problem.num_ranks} stages fits memory {problem.memory:g}",
        where="memory",
        why=f"the fullest rank of the leanest division needs {needed:.6g}"
        + (", with layers run again where that helps" if problem.recompute else ""),
        hint=", or ".join(hints),
    )


def smallest_memory(problem: Problem) -> float:
    """The least memory with which a division is found: the least possible peak of the fullest rank.

    Exact up to `_SMALL` positions; beyond, cuts far from even ones are not looked at.
    """
    tables = Tables(problem)
    ranges = _around_even(problem.num_ranks, tables.last)
    peak = np.zeros(1)
    for stage in range(problem.num_ranks):
        least = tables.least_memory(stage, ranges[stage], ranges[stage + 1])
        peak = np.maximum(peak[:, None], least).min(axis=0)
    return float(peak[0])


def _around_even(ranks: int, last: int) -> list[range]:
    width = last if last <= _SMALL else _WIDTH
    ranges = [range(0, 1)]
    for stage in range(1, ranks):
        even = round(stage * last / ranks)
        ranges.append(range(max(0, even - width), min(last, even + width) + 1))
    return [*ranges, range(last, last + 1)]


def _enough_ranks(problem: Problem) -> int | None:
    """The smallest larger number of ranks over which the units fit; None when there is none nearby."""
    for ranks in range(problem.num_ranks + 1, min(problem.num_ranks + _MORE_RANKS, len(problem.units) + 2) + 1):
        more = replace(problem, num_ranks=ranks)
        if smallest_memory(more) <= (problem.memory or 0.0):
            return ranks
    return None


def rounded_up(value: float) -> str:
    """`value` in six digits, none of them making it smaller."""
    text = f"{value:.6g}"
    return text if float(text) >= value else f"{value * (1 + 5e-6):.6g}"

"""1F1B, exactly: the fastest division in simulation, with its certificate.

    1. a known division (even, or uniform) bounds where stages can begin and end      reach.py
    2. the bound with least sums gives a division to start from; often it is the best  relaxed.py
    3. what lies between its simulated makespan and the least bound is enumerated      front.py, search.py

Among divisions that are equally fast the evenest one near the first found is taken (polish.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from skymoe.plan.pipeline.evaluate import evaluate, fits, uniform
from skymoe.plan.pipeline.front import fronts
from skymoe.plan.pipeline.infeasible import nothing_fits
from skymoe.plan.pipeline.load_bound import load_bound
from skymoe.plan.pipeline.polish import Path, polish
from skymoe.plan.pipeline.problem import SLACK, Answer, Certificate, Problem
from skymoe.plan.pipeline.reach import around_even, reachable
from skymoe.plan.pipeline.relaxed import Relaxed, relax
from skymoe.plan.pipeline.search import Found, search, simulate_paths
from skymoe.plan.pipeline.tables import Tables
from skymoe.spec.split import Split

BUDGET = 4000
"""Beginnings of divisions that are opened for the proof."""
_LARGE, _TOO_LARGE, _HOPELESS = 10**5, 5 * 10**6, 2 * 10**7
"""Intervals of all stages: from which on a better known division pays, and from which on there are too many."""

_MET = "its makespan is a lower bound of all divisions"
_SIMULATED = "every division with a lower bound below its makespan was simulated, and none is faster"
_STOPPED = "the search ended at its budget; the bound is of all that was not simulated"
_NEAR_EVEN = "too many divisions to bound each; cuts near even ones were tried, and the bound is that of load"


def solve_exactly(problem: Problem, budget: int = BUDGET) -> Answer:
    """The fastest division of a 1F1B pipeline that fits.

    Raises:
        ConfigError: nothing fits.
    """
    tables = Tables(problem)
    known = _known(problem)
    ranges = reachable(problem, tables, known)
    if _area(ranges) > _LARGE:
        near = _near_even(problem, tables)
        if near is not None and near[2] < known:
            known = near[2]
            ranges = reachable(problem, tables, known)
        if _area(ranges) > (_HOPELESS if near is None else _TOO_LARGE):
            return _unproven(problem, tables, near)
    relaxed = relax(problem, tables, ranges)
    if not math.isfinite(relaxed.bound):
        raise nothing_fits(problem)
    path, makespan = _first(problem, relaxed)
    met = makespan <= relaxed.bound * (1 + SLACK)
    found = Found(makespan, path, relaxed.bound, 0, met)
    if not met:
        found = search(problem, relaxed, fronts(problem, relaxed, makespan), makespan, path, budget)
    if found.path != path:
        path, makespan = polish(problem, relaxed, found.path, found.makespan)
    method = _MET if not found.examined else _SIMULATED
    if not found.complete:
        method = _STOPPED
    return _answer(problem, tables, relaxed, path, found._replace(examined=found.examined + 1), method)


def _known(problem: Problem) -> float:
    """The makespan of a division that fits, without search; inf when the obvious one does not."""
    plain = uniform(problem)
    return plain.makespan if fits(problem, plain) else math.inf


def _first(problem: Problem, relaxed: Relaxed) -> tuple[Path, float]:
    """The best division of the relaxed problem, and its descent."""
    path = tuple(relaxed.path(relaxed.bound))
    return polish(problem, relaxed, path, float(simulate_paths(problem, relaxed, [path])[0]))


def _near_even(problem: Problem, tables: Tables) -> tuple[Relaxed, Path, float] | None:
    """The relaxed problem, a division and its makespan with cuts near even ones only; None when none of them fits."""
    relaxed = relax(problem, tables, around_even(problem, tables))
    return (relaxed, *_first(problem, relaxed)) if math.isfinite(relaxed.bound) else None


def _area(ranges: Sequence[range]) -> int:
    return sum(len(rows) * len(columns) for rows, columns in pairwise(ranges))


def _unproven(problem: Problem, tables: Tables, near: tuple[Relaxed, Path, float] | None) -> Answer:
    """Too many intervals to look at: the best division near even ones, bounded by load."""
    if near is None:
        raise nothing_fits(problem)
    relaxed, path, makespan = near
    return _answer(problem, tables, relaxed, path, Found(makespan, path, load_bound(problem), 1, False), _NEAR_EVEN)


def _answer(problem: Problem, tables: Tables, relaxed: Relaxed, path: Path, found: Found, method: str) -> Answer:
    again = [
        int(block.again[start - block.first, end - block.end])
        for block, start, end in zip(relaxed.blocks, path, path[1:], strict=False)
    ]
    places = [int(tables.positions[place]) for place in path]
    sizes = tuple(end - start for start, end in zip(places, places[1:], strict=False))
    answer = evaluate(problem, Split(sizes), again)
    bound = answer.makespan if found.complete else found.lower_bound
    gap = 0.0 if found.complete else max(0.0, answer.makespan / bound - 1)
    certificate = Certificate(
        optimal=found.complete, lower_bound=bound, gap=gap, method=method, examined=found.examined
    )
    return replace(answer, certificate=certificate)

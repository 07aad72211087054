"""1F1B, exactly: the fastest division in simulation, with its certificate.

    1. a known division (even, or uniform) bounds where stages can begin and end      reach.py
    2. the bound with least sums gives a division to start from; often it is the best  relaxed.py
    3. what lies between its simulated makespan and the least bound is enumerated      front.py, search.py

Among divisions that are equally fast the evenest one near the first found is taken (polish.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

from skymoe.plan.pipeline.evaluate import evaluate, fits, uniform
from skymoe.plan.pipeline.front import fronts
from skymoe.plan.pipeline.infeasible import nothing_fits
from skymoe.plan.pipeline.polish import polish
from skymoe.plan.pipeline.problem import Answer, Certificate, Problem
from skymoe.plan.pipeline.reach import reachable
from skymoe.plan.pipeline.relaxed import Relaxed, relax
from skymoe.plan.pipeline.search import Found, search, simulate_paths
from skymoe.plan.pipeline.tables import SLACK, Tables
from skymoe.spec.split import Split

BUDGET = 4000
"""Beginnings of divisions that are opened for the proof."""


def solve_exactly(problem: Problem, budget: int = BUDGET) -> Answer:
    """The fastest division of a 1F1B pipeline that fits.

    Raises:
        ConfigError: nothing fits.
    """
    tables = Tables(problem)
    known = _known(problem)
    relaxed = relax(problem, tables, reachable(problem, tables, known))
    if not math.isfinite(relaxed.bound):
        raise nothing_fits(problem)
    path = tuple(relaxed.path(relaxed.bound))
    makespan = float(simulate_paths(problem, relaxed, [path])[0])
    path, makespan = polish(problem, relaxed, path, makespan)
    met = makespan <= relaxed.bound * (1 + SLACK)
    found = Found(makespan, path, relaxed.bound, 0, met)
    if not met:
        found = search(problem, relaxed, fronts(problem, relaxed, makespan), makespan, path, budget)
    if found.path != path:
        path, makespan = polish(problem, relaxed, found.path, found.makespan)
    return _answer(problem, tables, relaxed, path, found._replace(examined=found.examined + 1))


def _known(problem: Problem) -> float:
    """The makespan of a division that fits, without search; inf when the obvious one does not."""
    plain = uniform(problem)
    return plain.makespan if fits(problem, plain) else math.inf


def _answer(problem: Problem, tables: Tables, relaxed: Relaxed, path: tuple[int, ...], found: Found) -> Answer:
    again = [
        int(block.again[start - block.first, end - block.end])
        for block, start, end in zip(relaxed.blocks, path, path[1:], strict=False)
    ]
    places = [int(tables.positions[place]) for place in path]
    sizes = tuple(end - start for start, end in zip(places, places[1:], strict=False))
    answer = evaluate(problem, Split(sizes), again)
    gap = 0.0 if found.complete else max(0.0, answer.makespan / found.lower_bound - 1)
    if found.complete:
        method = "the bound of the 1F1B schedule is met" if found.examined == 1 else "every division whose bound is lower was simulated"
    else:
        method = "best found; the rest is bounded by the 1F1B schedule's lower bound"
    bound = answer.makespan if found.complete else found.lower_bound
    certificate = Certificate(optimal=found.complete, lower_bound=bound, gap=gap, method=method, examined=found.examined)
    return replace(answer, certificate=certificate)

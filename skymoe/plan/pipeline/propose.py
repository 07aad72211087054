"""Interleaved and zero-bubble schedules: propose, simulate, improve.

A rank has several stages here, which share its memory and its time, and the passes of one wait for those of another:
no bound is known that is both valid and close, so divisions are proposed and simulated. From even ones (starts.py) the
search goes to better neighbours (descent.py). Every division gets the layers run again that its ranks need to fit
(ranks.py). The certificate says how far any division can be from what was found (`load_bound`).
"""

from __future__ import annotations

import math
from dataclasses import replace

from skymoe.base.errors import ConfigError
from skymoe.plan.pipeline.descent import DESCENTS, descend
from skymoe.plan.pipeline.evaluate import evaluate
from skymoe.plan.pipeline.infeasible import rounded_up
from skymoe.plan.pipeline.load_bound import load_bound
from skymoe.plan.pipeline.problem import SLACK, Answer, Certificate, Problem
from skymoe.plan.pipeline.ranks import Ranks
from skymoe.plan.pipeline.starts import starts
from skymoe.spec.split import Split


def propose(problem: Problem, descents: int = DESCENTS) -> Answer:
    """The fastest division that the search finds, with so many descents.

    Raises:
        ConfigError: nothing fits.
    """
    ranks = Ranks(problem)
    found = descend(ranks, starts(problem), descents)
    if found is None:
        raise _nothing_fits(problem)
    cuts, examined = found
    sizes = Split(tuple(end - start for start, end in zip((0, *cuts), (*cuts, len(problem.units)), strict=True)))
    answer = evaluate(problem, sizes, ranks.again(cuts) or ())
    bound = min(load_bound(problem), answer.makespan)
    optimal = answer.makespan <= bound * (1 + SLACK)
    certificate = Certificate(
        optimal=optimal,
        lower_bound=bound,
        gap=0.0 if optimal else answer.makespan / bound - 1 if bound else math.inf,
        method="the bound by load is met" if optimal else "local search in simulation, bounded by load, fill and drain",
        examined=examined,
    )
    return replace(answer, certificate=certificate)


def _nothing_fits(problem: Problem) -> ConfigError:
    """With the memory that the leanest of the proposed divisions needs."""
    ranks = Ranks(replace(problem, memory=None))
    needed = min(max(ranks.least_peaks(cuts)) for cuts in starts(problem))
    return ConfigError(
        f"no division that was tried fits memory {problem.memory:g} under {problem.schedule}",
        where="memory",
        why=f"the fullest rank of the leanest one needs {needed:.6g}",
        hint=f"memory of {rounded_up(needed)}, or schedule 1f1b, which keeps less alive",
    )

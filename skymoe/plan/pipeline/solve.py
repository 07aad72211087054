"""`solve`: the best division of a pipeline, with its certificate."""

from __future__ import annotations

from skymoe.plan.pipeline.check import check
from skymoe.plan.pipeline.descent import DESCENTS
from skymoe.plan.pipeline.evaluate import evaluate, fits, uniform
from skymoe.plan.pipeline.exact import solve_exactly
from skymoe.plan.pipeline.problem import Answer, Problem
from skymoe.plan.pipeline.propose import propose
from skymoe.plan.pipeline.schedule import is_one_f_one_b
from skymoe.plan.pipeline.vocabulary import with_vocabulary_parallel

__all__ = ["evaluate", "fits", "solve", "uniform", "with_vocabulary_parallel"]


def solve(problem: Problem, descents: int = DESCENTS) -> Answer:
    """The fastest division that fits: proven for 1F1B, searched with a bound for the other schedules.

    Args:
        problem: what is divided.
        descents: how long the search for the other schedules is; 0 takes the best of what it would set out from.

    Raises:
        ConfigError: impossible numbers, or nothing fits; the hint says what would.
    """
    check(problem)
    if is_one_f_one_b(problem):
        return solve_exactly(problem)
    return propose(problem, descents)

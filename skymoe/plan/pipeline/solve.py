"""`solve`: the best division of a pipeline, with its certificate."""

from __future__ import annotations

from skymoe.plan.pipeline.evaluate import evaluate, fits, uniform
from skymoe.plan.pipeline.problem import Answer, Problem
from skymoe.plan.pipeline.vocabulary import with_vocabulary_parallel

__all__ = ["evaluate", "fits", "solve", "uniform", "with_vocabulary_parallel"]


def solve(problem: Problem) -> Answer:
    """The fastest division that fits."""
    return uniform(problem)

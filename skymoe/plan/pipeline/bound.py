"""A lower bound of the makespan of 1F1B, stage by stage; proof in docs/pipeline_solver.md.

With t_s = F_s + B_s, hops c, k = min(P - s, m) and R_s = sum_{i>s} (t_i + 2c), what micro-batch 0 needs from the end
of its forward on stage s to the start of its backward there,

    T >= max_s [ sum_{i<s} (t_i + 2c) + m t_s + idle_s(R_s) ]
    idle_s(R) = (R - (k-1) F_s)^+ + (R - (k-1) B_s)^+ + (floor((m-1)/k) - 1)^+ (R - (k-1) t_s)^+       m > P - s

The stage waits for its first backward, for its last one, and in every round of k micro-batches if the way down and up
is longer than their work. With m = P - s the first two waits overlap in one hop there and back; with fewer only the
longer one counts. The bound grows with R, so divisions are compared by it suffix by suffix.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from skymoe.plan.pipeline.problem import Problem

Times = NDArray[np.float64] | np.float64


def stage_bound(problem: Problem, stage: int, forward: Times, backward: Times, rest: Times) -> NDArray[np.float64]:
    """m t_s + idle_s(rest): from the first forward of `stage` to the end of its last backward."""
    below, num_micro = problem.num_ranks - stage, problem.num_micro
    others = min(below, num_micro) - 1
    start = np.maximum(rest - others * forward, 0.0)
    end = np.maximum(rest - others * backward, 0.0)
    work = num_micro * (forward + backward)
    if num_micro < below:
        return np.asarray(work + np.maximum(start, end))
    if num_micro == below:
        return np.asarray(work + np.maximum(np.maximum(start, end), start + end - 2 * problem.hop))
    rounds = max(0, (num_micro - 1) // below - 1)
    return np.asarray(work + start + end + rounds * np.maximum(rest - others * (forward + backward), 0.0))


def largest_rest(problem: Problem, stage: int, forward: float, backward: float, limit: float) -> float:
    """The largest `rest` with which `stage_bound` is at most `limit`; -inf when there is none."""
    below, num_micro = problem.num_ranks - stage, problem.num_micro
    others = min(below, num_micro) - 1
    idle = limit - num_micro * (forward + backward)
    if idle < 0:
        return float("-inf")
    low, high = sorted((others * forward, others * backward))
    both = (idle + low + high) / 2
    if num_micro < below:
        return low + idle
    if num_micro == below:
        return min(low + idle, max(both + problem.hop, high))
    if idle <= high - low:
        return low + idle
    rounds = max(0, (num_micro - 1) // below - 1)
    return both if both <= low + high else (idle + (1 + rounds) * (low + high)) / (2 + rounds)

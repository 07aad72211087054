"""Vocabulary parallelism: the other action against a heavy head.

Instead of moving layers away from the stage that has the head, the head and the embedding are divided over all ranks
(Yeung et al., Balancing Pipeline Parallelism with Vocabulary Parallelism, MLSys 2025): each rank multiplies every
micro-batch's last hidden states with its rows of the head, and one barrier joins the softmax. Its price in memory is
one more micro-batch alive on every rank (their second algorithm).

Left out: the barrier's communication (hidden in the paper's measurements), and the order of the added passes within a
rank: their time is added to the forward and the backward of the rank's stage.
"""

from __future__ import annotations

from dataclasses import replace

from skymoe.plan.pipeline.problem import End, Problem


def with_vocabulary_parallel(problem: Problem) -> Problem:
    """The same pipeline with embedding and head divided evenly over all ranks."""
    ranks, stages = problem.num_ranks, problem.num_stages
    if ranks == 1:
        return problem
    ends = (problem.embedding, problem.head)
    shared = End(
        forward=problem.shared.forward + sum(end.forward for end in ends) / stages,
        backward=problem.shared.backward + sum(end.backward for end in ends) / stages,
        weight=problem.shared.weight + sum(end.weight for end in ends) / stages,
        static=problem.shared.static + (sum(end.static for end in ends) - problem.tied_static) / stages,
        activation=problem.shared.activation + sum(end.activation for end in ends) / stages,
        transient=max(problem.shared.transient, *(end.transient / ranks for end in ends)),
    )
    return replace(
        problem, embedding=End(), head=End(), shared=shared, tied_static=0.0, extra_alive=problem.extra_alive + 1
    )  # fmt: skip

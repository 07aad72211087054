"""The bound that knows what memory forces: below every division that fits, and above the bound of load."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan.pipeline_cases import amounts, best_makespan, plain, units

from skymoe.plan.pipeline.load_bound import load_bound
from skymoe.plan.pipeline.memory_bound import memory_bound
from skymoe.plan.pipeline.problem import End, Problem
from skymoe.plan.pipeline.solve import fits, solve
from skymoe.spec.layout import ScheduleKind

CHUNKED = [ScheduleKind.INTERLEAVED, ScheduleKind.ZERO_BUBBLE]


@st.composite
def chunked(draw: st.DrawFn) -> Problem:
    """With little memory."""
    ranks = draw(st.integers(1, 2))
    end = st.builds(
        End, forward=amounts(2), backward=amounts(2), static=amounts(2), activation=amounts(1), transient=amounts(2)
    )
    return Problem(
        units=draw(units(draw(st.integers(2 * ranks, 6)))), num_ranks=ranks, num_micro=ranks * draw(st.integers(1, 4)),
        schedule=draw(st.sampled_from(CHUNKED)), chunks=2, embedding=draw(end), head=draw(end),
        memory=draw(amounts(40)), hop=draw(st.sampled_from([0.0, 0.5])), recompute=draw(st.booleans()),
        extra_alive=draw(st.sampled_from([0, 0, 1])),
    )  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(chunked())
def test_no_division_that_fits_is_faster(problem: Problem) -> None:
    best = best_makespan(problem)
    if best is not None:
        assert load_bound(problem) <= best * (1 + 1e-9)


@pytest.mark.parametrize(
    ("schedule", "ranks", "chunks", "memory", "more"),
    [
        (ScheduleKind.ZERO_BUBBLE, 8, 2, 30.0, 0.005),
        (ScheduleKind.ZERO_BUBBLE, 8, 2, 20.0, 0.08),
        (ScheduleKind.INTERLEAVED, 8, 2, 30.0, 0.05),
        (ScheduleKind.INTERLEAVED, 13, 4, 30.0, 0.002),
    ],
)
def test_what_must_be_run_again_is_in_the_bound(
    schedule: ScheduleKind, ranks: int, chunks: int, memory: float, more: float
) -> None:
    problem = plain(
        52, ranks, 8 * ranks, head=End(forward=0.5, backward=1.0), schedule=schedule, chunks=chunks, memory=memory
    )
    answer, free = solve(problem), load_bound(replace(problem, memory=None))
    certificate = answer.certificate
    assert fits(problem, answer) and sum(answer.recompute) > 0
    assert free * (1 + more) < certificate.lower_bound <= answer.makespan


def test_nothing_is_forced_without_a_limit_that_is_met() -> None:
    problem = plain(16, 4, 16, schedule=ScheduleKind.ZERO_BUBBLE, chunks=2)
    assert memory_bound(problem, [0.0] * 4) == 0
    assert memory_bound(replace(problem, memory=1e6), [0.0] * 4) == 0


def test_all_layers_run_again_by_hand() -> None:
    """One rank of two layers of 3, one micro-batch alive: each keeps 1 and has 1 for good. With 3.5 both at once fit
    with one run again (0.1 + 1 + 2, and 1 while it is made: 4.1 in truth): the bound asks for the share 0.5 / 0.9.
    """
    problem = plain(2, 1, 10, schedule=ScheduleKind.INTERLEAVED, chunks=1, memory=3.5)
    assert memory_bound(problem, [0.0]) == pytest.approx(10 * (6 + 0.5 / 0.9), rel=1e-3)

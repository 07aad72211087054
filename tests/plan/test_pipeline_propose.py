"""Interleaved and zero-bubble pipelines: the search against every division of small ones, and its claims."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plan.pipeline_cases import best_makespan, plain, simulated

from skymoe.base.errors import ConfigError
from skymoe.plan.pipeline.loads import loads_of
from skymoe.plan.pipeline.problem import End, Problem, Unit
from skymoe.plan.pipeline.solve import evaluate, fits, solve, uniform
from skymoe.spec.layout import ScheduleKind
from skymoe.spec.split import Split

CHUNKED = [ScheduleKind.INTERLEAVED, ScheduleKind.ZERO_BUBBLE]


def drawn(seed: int, schedule: ScheduleKind) -> Problem:
    random = np.random.default_rng(seed)
    ranks = int(random.integers(1, 4))
    units = tuple(
        Unit(
            forward=random.uniform(0.5, 1.5), backward=1 + random.random(), weight=random.random(), activation=1.0,
            checkpoint=0.2, static=1.0, layer=number,
        )
        for number in range(int(random.integers(max(1, 2 * ranks - 2), 7)))
    )  # fmt: skip
    return Problem(
        units=units, num_ranks=ranks, num_micro=ranks * int(random.integers(1, 4)), schedule=schedule, chunks=2,
        head=End(forward=random.random(), backward=random.random()), hop=float(random.choice([0.0, 0.3])),
        memory=None if random.random() < 0.5 else float(random.uniform(8, 20)),
    )  # fmt: skip


@pytest.mark.parametrize("schedule", CHUNKED)
def test_near_the_best_of_all_divisions(schedule: ScheduleKind) -> None:
    """20 small pipelines: most are the best there is, none is far off, and the bound is below all of them."""
    regrets = []
    for seed in range(20):
        problem = drawn(seed, schedule)
        best = best_makespan(problem)
        if best is None:
            with pytest.raises(ConfigError, match="fits memory|stages for"):
                solve(problem)
            continue
        answer = solve(problem)
        assert fits(problem, answer) and answer.certificate.lower_bound <= best * (1 + 1e-9)
        assert answer.makespan == simulated(problem, loads_of(problem, answer.stages.sizes, answer.recompute))
        regrets.append(answer.makespan / best - 1)
    assert len(regrets) >= 12 and sum(regret < 1e-9 for regret in regrets) >= 0.8 * len(regrets)
    assert min(regrets) > -1e-9 and max(regrets) < 0.03


@pytest.mark.parametrize("schedule", CHUNKED)
@pytest.mark.parametrize("memory", [None, 60.0])
def test_better_than_uniform_and_honest(schedule: ScheduleKind, memory: float | None) -> None:
    problem = plain(52, 8, 64, head=End(forward=0.5, backward=1.0), schedule=schedule, chunks=2, memory=memory)
    answer, even = solve(problem), uniform(problem)
    assert answer.makespan < even.makespan
    certificate = answer.certificate
    assert certificate.lower_bound <= answer.makespan and certificate.examined > 100
    assert certificate.gap == pytest.approx(answer.makespan / certificate.lower_bound - 1)
    assert answer == solve(problem), "the same again"


def test_an_even_pipeline_is_proven() -> None:
    """zbv on one rank has no bubble: the bound by load is met."""
    answer = solve(plain(4, 1, 8, schedule=ScheduleKind.ZERO_BUBBLE, chunks=2))
    assert answer.certificate.optimal and answer.makespan == pytest.approx(8 * 12)


def test_memory_of_a_rank_with_two_stages() -> None:
    """Interleaved, 2 ranks of 2 stages, 4 micro-batches: rank 0 keeps 2 (P - 1) + P + 1 = 5 chunks of one layer."""
    problem = plain(4, 2, 4, schedule=ScheduleKind.INTERLEAVED, chunks=2)
    answer = evaluate(problem, Split((1, 1, 1, 1)), (0, 0, 0, 0))
    assert answer.memory == (2 + 5, 2 + 3)
    rerun = evaluate(problem, Split((1, 1, 1, 1)), (1, 1, 0, 0))
    # Rank 0: of its 5 chunks, at most 4 are of the first stage and those keep a tenth; one layer is made again.
    assert rerun.memory[0] < answer.memory[0] and rerun.makespan > answer.makespan


def test_what_does_not_fit_says_what_would() -> None:
    problem = plain(24, 4, 8, schedule=ScheduleKind.ZERO_BUBBLE, chunks=2, memory=5.0)
    with pytest.raises(ConfigError, match="fits memory 5") as error:
        solve(problem)
    enough = float(error.value.hint.removeprefix("memory of ").split(",")[0])
    wider = replace(problem, memory=enough)
    assert fits(wider, solve(wider))

"""Makespans on arrays are those of the simulator, to the last bit; the bounds never exceed them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan.pipeline_cases import plain, simulated

from skymoe.base.errors import ConfigError
from skymoe.plan.pipeline.bound import largest_rest, stage_bound
from skymoe.plan.pipeline.load_bound import load_bound
from skymoe.plan.pipeline.loads import Load
from skymoe.plan.pipeline.makespan import makespan_of, one_f_one_b_makespans
from skymoe.plan.pipeline.problem import Problem, Unit
from skymoe.plan.pipeline.schedule import check_schedule
from skymoe.spec.layout import ScheduleKind

TIMES = st.floats(0.0, 4.0)


def load(forward: float, backward: float, weight: float) -> Load:
    return Load(forward=forward, backward=backward, weight=weight, static=0.0, kept=0.0, running=0.0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equal_to_the_simulator(data: st.DataObject) -> None:
    schedule = data.draw(st.sampled_from(list(ScheduleKind)))
    ranks, micro = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    chunks = {"1f1b": 1, "zbv": 2}.get(schedule.value) or data.draw(st.integers(1, 3))
    problem = plain(
        ranks * chunks, ranks, micro, schedule=schedule, chunks=chunks, hop=data.draw(st.sampled_from([0.0, 0.3]))
    )
    try:
        check_schedule(problem)
    except ConfigError:
        return
    loads = [load(data.draw(TIMES), data.draw(TIMES) + 1, data.draw(st.floats(0, 1))) for _ in range(ranks * chunks)]
    assert makespan_of(problem, loads) == simulated(problem, loads)


def test_columns_are_divisions() -> None:
    """Equal stages: 3 (m + P - 1); the second column is twice as slow."""
    forward = np.array([[1.0, 2.0]] * 4)
    assert one_f_one_b_makespans(forward, 2 * forward, 8, 0.0).tolist() == [33.0, 66.0]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(1, 16), st.sampled_from([0.0, 0.25, 1.0, 4.0]), st.data())
def test_no_stage_bound_exceeds_the_makespan(ranks: int, micro: int, hop: float, data: st.DataObject) -> None:
    pairs = [(data.draw(TIMES), data.draw(TIMES)) for _ in range(ranks)]
    problem = plain(ranks, ranks, micro, hop=hop)
    makespan = makespan_of(problem, [load(f, b, 0.0) for f, b in pairs])
    times = np.array(pairs).sum(axis=1) + 2 * hop
    for stage, (f, b) in enumerate(pairs):
        rest = times[stage + 1 :].sum()
        bound = times[:stage].sum() + stage_bound(problem, stage, np.float64(f), np.float64(b), np.float64(rest))
        assert bound <= makespan * (1 + 1e-12) + 1e-12


def test_the_bound_is_exact_when_stages_are_alike() -> None:
    """The closed form meets the simulation of 1F1B where stages differ by a tenth (seeded)."""
    random = np.random.default_rng(0)
    for _ in range(50):
        ranks, micro = int(random.integers(2, 9)), int(random.integers(16, 40))
        times = random.uniform(0.9, 1.1, (ranks, 1)) * np.array([[1.0, 2.0]])
        problem, total = plain(ranks, ranks, micro), times.sum(axis=1)
        bounds = [
            total[:stage].sum()
            + stage_bound(problem, stage, times[stage, 0], times[stage, 1], np.float64(total[stage + 1 :].sum()))
            for stage in range(ranks)
        ]
        assert max(bounds) == pytest.approx(makespan_of(problem, [load(f, b, 0.0) for f, b in times.tolist()]))


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(1, 16), st.integers(0, 4), TIMES, TIMES, st.floats(0, 90), st.booleans())
def test_largest_rest_is_the_inverse(
    ranks: int, micro: int, stage: int, forward: float, backward: float, limit: float, hops: bool
) -> None:
    stage = min(stage, ranks - 2)  # the last one waits for nobody
    problem = plain(ranks, ranks, micro, hop=0.5 * hops)

    def bound(rest: float) -> float:
        return float(stage_bound(problem, stage, *(np.float64(value) for value in (forward, backward, rest))))

    most = largest_rest(problem, stage, forward, backward, limit)
    if most < 0:
        assert bound(0.0) >= limit - 1e-9
    else:
        assert bound(most) <= limit + 1e-9 and bound(most + 1e-6) > limit


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(ScheduleKind)), st.integers(1, 4), st.integers(1, 12), st.booleans(), st.data())
def test_no_load_bound_exceeds_a_makespan(
    schedule: ScheduleKind, ranks: int, micro: int, hops: bool, data: st.DataObject
) -> None:
    chunks = 1 if schedule is ScheduleKind.ONE_F_ONE_B else 2
    count = ranks * chunks  # one unit per stage: the units are the loads
    times = [(data.draw(TIMES), data.draw(TIMES), data.draw(st.floats(0, 1))) for _ in range(count)]
    units = tuple(Unit(forward=f, backward=b + w, weight=w, layer=n) for n, (f, b, w) in enumerate(times))
    problem = Problem(
        units=units, num_ranks=ranks, num_micro=micro, schedule=schedule, chunks=chunks, hop=0.5 * hops
    )  # fmt: skip
    try:
        check_schedule(problem)
    except ConfigError:
        return
    makespan = makespan_of(problem, [load(f, b + w, w) for f, b, w in times])
    assert load_bound(problem) <= makespan * (1 + 1e-12) + 1e-12

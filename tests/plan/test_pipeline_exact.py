"""The solver of 1F1B against every division, by hand, and at size."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan.pipeline_cases import best_makespan, plain, problems, simulated

from skymoe.base.errors import ConfigError
from skymoe.plan.pipeline.exact import solve_exactly
from skymoe.plan.pipeline.loads import Load, loads_of, stage_load
from skymoe.plan.pipeline.problem import Answer, End, Problem, Unit
from skymoe.plan.pipeline.run import period_of
from skymoe.plan.pipeline.solve import evaluate, fits, solve, uniform, with_vocabulary_parallel
from skymoe.plan.pipeline.table import certificate_sentence
from skymoe.plan.pipeline.tables import Tables
from skymoe.spec.split import Split


def check_against_all(problem: Problem, *, by_simulator: bool) -> None:
    best = best_makespan(problem, by_simulator=by_simulator)
    try:
        answer = solve(problem)
    except ConfigError as error:
        impossible = "stages for" in str(error)  # more stages than pieces
        assert best is None, "refused, and there is a division"
        assert impossible or "fits memory" in str(error)
        return
    assert best is not None and fits(problem, answer)
    assert answer.certificate.optimal and answer.certificate.gap == 0
    assert answer.makespan == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert answer.makespan == simulated(problem, loads_of(problem, answer.stages.sizes, answer.recompute))


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(most_units=6))
def test_no_division_is_better(problem: Problem) -> None:
    check_against_all(problem, by_simulator=False)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(most_units=5, most_ranks=4))
def test_no_division_is_better_in_thousands_of_cases(problem: Problem) -> None:
    check_against_all(problem, by_simulator=True)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(most_units=9, most_ranks=4))
def test_no_division_of_nine_units_is_better(problem: Problem) -> None:
    check_against_all(problem, by_simulator=False)


@settings(max_examples=80, deadline=None)
@given(problems(most_units=7))
def test_tables_are_the_loads(problem: Problem) -> None:
    """Every interval of every stage: times, the smallest number of layers that fits, the least memory."""
    tables = Tables(problem)
    everything = range(tables.last + 1)
    for stage in range(problem.num_ranks):
        block, least = tables.block(stage, everything, everything), tables.least_memory(stage, everything, everything)
        alive = min(problem.num_ranks - stage + problem.extra_alive, problem.num_micro)
        for i in everything:
            for j in range(i + (not problem.may_be_empty(stage)), tables.last + 1):
                units = problem.units[tables.positions[i] : tables.positions[j]]
                most = len({unit.layer for unit in units}) if problem.recompute else 0
                loads = [stage_load(problem, stage, units, again) for again in range(most + 1)]
                peaks = [load.static + alive * load.kept + load.running for load in loads]
                assert least[i, j] == min(peaks)
                fitting = [n for n, peak in enumerate(peaks) if problem.memory is None or peak <= problem.memory]
                if fitting:
                    load = loads[fitting[0]]
                    found = block.forward[i, j], block.backward[i, j], block.again[i, j]
                    assert found == (load.forward, load.backward, fitting[0])
                else:
                    assert block.backward[i, j] == float("inf")


HEAD = End(forward=2 / 3, backward=4 / 3)


@pytest.mark.parametrize(("ranks", "sizes", "period"), [(4, (6, 6, 6, 6), 20.0), (5, (5, 5, 5, 5, 4), 15.0)])
def test_figure_6(ranks: int, sizes: tuple[int, ...], period: float) -> None:
    """Skywork-MoE, figure 6: a loss block of 2. On 4 stages no division beats the even one; 5 stages need no longer
    than their layers.
    """
    problem = plain(24, ranks, 48, head=HEAD)
    answer = solve(problem)
    assert answer.stages.sizes == sizes
    assert period_of(problem, loads_of(problem, sizes, (0,) * ranks)) == pytest.approx(period)
    assert answer.certificate.optimal
    # The busiest stage works all the time but for the way of a micro-batch down to it and back.
    assert answer.makespan == pytest.approx(48 * period + (54 if ranks == 4 else 58))


def test_52_layers_on_12_stages() -> None:
    """Head of half a layer, embedding of a thirtieth: the remainder first is good, last is bad, neither is best."""
    problem = plain(52, 12, 64, head=End(forward=0.5, backward=1.0), embedding=End(forward=0.03, backward=0.07))
    answer = solve(problem)
    assert answer.makespan == pytest.approx(1083.1) and answer.certificate.optimal
    assert uniform(problem).makespan == pytest.approx(1085.3)
    last = evaluate(problem, Split((4,) * 8 + (5,) * 4), (0,) * 12)
    assert last.makespan == pytest.approx(1197.1)
    assert not last.certificate.optimal


def test_memory_pushes_layers_to_the_back() -> None:
    """Two stages, two and one micro-batches alive. n layers kept need 3 n and 2 n; by hand."""
    problem = plain(6, 2, 8, memory=10.0, recompute=False)
    answer = solve(problem)
    assert answer.stages.sizes == (3, 3) and answer.memory == (9.0, 6.0)
    tight = replace(problem, memory=8.0)
    assert solve(tight).stages.sizes == (2, 4)
    assert solve(replace(tight, recompute=True)).recompute == (2, 0), (
        "with one, 8.2: a layer that is made again needs room"
    )
    with pytest.raises(ConfigError, match="the leanest division needs 8") as error:
        solve(replace(problem, memory=7.0))
    assert "memory of 8" in error.value.hint and "run again" in error.value.hint and "3 stages" in error.value.hint


@settings(max_examples=30, deadline=None)
@given(problems(most_units=6, most_ranks=3))
def test_the_hint_is_the_smallest_memory(problem: Problem) -> None:
    problem = replace(problem, memory=0.0)
    try:
        solve(problem)
    except ConfigError as error:
        if "fits memory" not in str(error):
            return
        needed = float(error.why.split(" needs ")[1].split(",")[0])
        assert best_makespan(replace(problem, memory=needed)) is not None
        assert best_makespan(replace(problem, memory=needed - 0.25)) is None


def big(count: int, ranks: int, *, halves: bool = False, spread: float = 0.0, **more: object) -> Problem:
    """Layers or halves at size; `spread` makes each layer its own."""
    drawn = random.Random(5)
    units = []
    for layer in range(count):
        size = 1 + spread * drawn.uniform(-1, 1)
        for part in (0.35, 0.65) if halves else (1.0,):
            share = part * size
            units.append(
                Unit(forward=share, backward=2 * share, static=share, activation=share, checkpoint=0.1, layer=layer)
            )
    ends = {"head": End(forward=0.5, backward=1.0, static=1.0), "embedding": End(static=1.0)}
    return Problem(units=tuple(units), num_ranks=ranks, num_micro=64, **ends, **more)


def check_certificate(problem: Problem, answer: Answer) -> None:
    loads = loads_of(problem, answer.stages.sizes, answer.recompute)
    assert fits(problem, answer) and sum(answer.stages.sizes) == len(problem.units)
    assert answer.makespan == simulated(problem, loads)
    plain_answer = uniform(problem)
    assert not fits(problem, plain_answer) or answer.makespan <= plain_answer.makespan * (1 + 1e-9)
    certificate = answer.certificate
    assert certificate.lower_bound <= answer.makespan
    assert certificate.optimal or certificate.gap == pytest.approx(answer.makespan / certificate.lower_bound - 1)


@pytest.mark.parametrize(
    ("problem", "gap"),
    [
        (big(128, 32), 0.0),
        (big(128, 32, hop=0.5), 0.0),
        (big(128, 32, memory=60.0), 0.0),
        (big(128, 32, spread=0.3, memory=80.0), 0.0),
        (big(128, 32, spread=0.3, memory=40.0), 0.01),
        (big(256, 32, halves=True), 0.0),
        (big(256, 32, halves=True, memory=160.0), 0.005),
        (big(4096, 32), 0.005),
    ],
    ids=["equal", "hop", "memory", "unequal", "unequal, tight", "halves", "halves, memory", "4096"],
)
def test_at_size(problem: Problem, gap: float) -> None:
    answer = solve(problem)
    check_certificate(problem, answer)
    assert answer.certificate.gap <= gap


def test_without_a_budget_the_gap_is_told() -> None:
    problem = big(128, 32, spread=0.3, memory=80.0)
    answer, proven = solve_exactly(problem, budget=0), solve(problem)
    check_certificate(problem, answer)
    assert proven.certificate.optimal and not answer.certificate.optimal
    assert 0 < answer.certificate.lower_bound <= proven.makespan <= answer.makespan
    assert answer == solve_exactly(problem, budget=0), "the same again"


def test_among_equals_the_even_one_with_heavy_stages_early() -> None:
    """Of (0, 3, 3, 4), (0, 1, 2, 7) and others of the same makespan, and of (3, 3, 2, 2) and (3, 3, 1, 3)."""
    problem = plain(10, 4, 8, embedding=End(forward=10.0, backward=20.0))
    best = solve(problem)
    assert best.makespan == evaluate(problem, Split((0, 1, 2, 7)), (0,) * 4).makespan == 240.0
    assert best.stages.sizes == (0, 3, 3, 4)
    assert solve(plain(10, 4, 200)).stages.sizes == (3, 3, 2, 2)


def test_vocabulary_parallelism_takes_the_head_away() -> None:
    """A head of four layers over 8 ranks: nothing that moves layers divides it."""
    problem = plain(16, 8, 64, head=End(forward=4.0, backward=8.0, static=4.0), memory=40.0)
    parallel = with_vocabulary_parallel(problem)
    loads: list[Load] = loads_of(parallel, (2,) * 8, (0,) * 8)
    assert {(load.forward, load.backward, load.static) for load in loads} == {(2.5, 5.0, 2.5)}
    assert sum(answer := evaluate(parallel, Split((2,) * 8), (0,) * 8).memory) and answer[0] == 2.5 + 2 * (8 + 1)
    assert solve(parallel).makespan < 0.7 * solve(problem).makespan
    alone = replace(problem, num_ranks=1)
    assert with_vocabulary_parallel(alone) == alone


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_ranks": 7}, "at most 6 stages"),
        ({"num_ranks": 8, "head": End(forward=1.0)}, "the last, with the head, may\n  try: at most 7 stages"),
        ({"num_ranks": 9, "head": End(forward=1.0), "embedding": End(static=1.0)}, "at most 8 stages"),
        ({"num_ranks": 0}, "1 to 1024 stages"),
        ({"num_micro": 0}, "micro-batches, got 0"),
        ({"units": ()}, "1 to 4096 units, got 0"),
        ({"num_ranks": 8, "num_micro": 2**18}, "at most 131072 micro-batches"),
        ({"hop": -1.0}, "hop: must be a number, 0 or more"),
        ({"memory": float("nan")}, "memory must be a number"),
        ({"head": End(forward=float("inf"))}, "head: forward"),
        ({"units": (Unit(forward=-1.0, backward=1.0, layer=0),)}, "unit 0: forward"),
        ({"units": (Unit(forward=1.0, backward=1.0, weight=2.0, layer=0),)}, "is a part of backward"),
        ({"units": tuple(Unit(forward=1.0, backward=1.0, layer=n) for n in (1, 0))}, "ascending order"),
        ({"chunks": 2}, "1f1b has 1 stage"),
    ],
)
def test_what_is_no_pipeline_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        solve(replace(plain(6, 2, 8), **change))


@pytest.mark.parametrize(("head", "embedding", "sizes"), [(1.0, 0.0, (1, 1, 0)), (0.0, 1.0, (0, 1, 1))])
def test_only_a_stage_with_an_end_may_be_empty(head: float, embedding: float, sizes: tuple[int, ...]) -> None:
    ends = {"head": End(forward=head, backward=head), "embedding": End(forward=embedding, backward=embedding)}
    problem = plain(2, 3, 8, **ends)
    assert solve(problem).stages.sizes == uniform(problem).stages.sizes == sizes


@settings(max_examples=40, deadline=None)
@given(problems(most_units=6, most_ranks=3), st.integers(0, 3))
def test_more_layers_run_again_are_never_faster(problem: Problem, stage: int) -> None:
    """The reason why the smallest number that fits is enough."""
    problem = replace(problem, memory=None)
    answer = uniform(problem)
    stage = min(stage, problem.num_ranks - 1)
    more = [count + (number == stage) for number, count in enumerate(answer.recompute)]
    assert evaluate(problem, answer.stages, more).makespan >= answer.makespan


def test_no_more_micro_batches_are_alive_than_there_are() -> None:
    """3 of them on 4 ranks: with 2 kept longer, every rank keeps 3, and not 5."""
    problem = plain(8, 4, 3, extra_alive=2)
    answer = evaluate(problem, Split((2,) * 4), (0,) * 4)
    assert answer.memory == (2 + 2 * 3,) * 4
    assert evaluate(replace(problem, num_micro=5), Split((2,) * 4), (0,) * 4).memory == (12, 12, 10, 8)
    assert solve(replace(problem, memory=8.0)).makespan == solve(problem).makespan


def test_a_certificate_says_what_is_proven() -> None:
    met, searched = solve(plain(52, 12, 64)), solve(big(128, 32, spread=0.3, memory=80.0))
    assert met.certificate.method == "its makespan is a lower bound of all divisions"
    assert searched.certificate.method.startswith("every division with a lower bound below its makespan was simulated")
    assert certificate_sentence(met).startswith("Proven optimal: its makespan is a lower bound")
    stopped = solve_exactly(big(128, 32, spread=0.3, memory=80.0), budget=0)
    assert "search ended at its budget" in stopped.certificate.method
    assert certificate_sentence(stopped).startswith("Not proven optimal: at most ")

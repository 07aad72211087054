"""What the search for zero-bubble and interleaved divisions sets out from and counts with."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, product

import numpy as np
import pytest

from skymoe.plan.pipeline.leanest import Options, leanest
from skymoe.plan.pipeline.loads import Load, loads_of
from skymoe.plan.pipeline.problem import End, Problem, Unit
from skymoe.plan.pipeline.ranks import Ranks
from skymoe.plan.pipeline.solve import evaluate, solve
from skymoe.plan.pipeline.starts import positions, starts
from skymoe.plan.pipeline.v_shape import TRIED, v_shaped
from skymoe.spec.layout import ScheduleKind
from skymoe.spec.split import Split


def halves(layers: int, ranks: int, num_micro: int) -> Problem:
    """Attention and feed-forward in turn, the latter twice as long; an embedding and a head."""
    units = tuple(
        Unit(forward=1.0 + number % 2, backward=2.0 + 2 * (number % 2), weight=0.4 + 0.6 * (number % 2),
             activation=1.0, checkpoint=0.2, layer=number // 2)
        for number in range(2 * layers)
    )  # fmt: skip
    return Problem(
        units=units, num_ranks=ranks, num_micro=num_micro, embedding=End(forward=0.1, backward=0.2),
        head=End(forward=2.2, backward=3.0, weight=1.2), schedule=ScheduleKind.ZERO_BUBBLE, chunks=2,
    )  # fmt: skip


def rank_times(problem: Problem, cuts: tuple[int, ...]) -> list[float]:
    """Of one micro-batch: stage r and stage 2P-1-r together."""
    edges = (0, *cuts, len(problem.units))
    sizes = [end - start for start, end in zip(edges, edges[1:], strict=False)]
    loads = loads_of(problem, sizes, [0] * len(sizes))
    times = [load.forward + load.backward for load in loads]
    return [times[rank] + times[-1 - rank] for rank in range(problem.num_ranks)]


@pytest.mark.parametrize(("layers", "ranks"), [(52, 16), (52, 12), (32, 8), (24, 4)])
def test_ranks_of_the_v_are_as_equal_as_units_allow(layers: int, ranks: int) -> None:
    problem = halves(layers, ranks, 2 * ranks)
    found = list(v_shaped(problem, positions(problem)))
    assert len(found) == len(TRIED)
    times = [rank_times(problem, cuts) for cuts in found]
    largest = max(unit.forward + unit.backward for unit in problem.units)
    assert max(times[0]) < np.mean(times[0]) + largest
    sizes = solve(problem).stages.sizes
    assert max(rank_times(problem, tuple(accumulate(sizes[:-1])))) < np.mean(times[0]) + 2 * largest


def test_whole_layers_are_not_cut() -> None:
    problem = replace(halves(24, 4, 8), whole_layers=True)
    assert all(cut % 2 == 0 for cuts in v_shaped(problem, positions(problem)) for cut in cuts)


def test_the_search_ends_below_what_it_sets_out_from() -> None:
    """52 layers of a mixture on 16 ranks: far better than equal stages, and near the fullest rank's share."""
    problem = halves(52, 16, 32)
    first = min(
        evaluate(problem, Split(tuple(np.diff([0, *cuts, 104]).tolist())), [0] * 32).makespan
        for cuts in starts(problem)
    )
    quick, answer = solve(problem, 0), solve(problem)
    assert answer.makespan <= quick.makespan == pytest.approx(first)
    share = 32 * sum(unit.forward + unit.backward for unit in problem.units) / 16
    assert share < answer.makespan < 1.25 * share


@pytest.mark.parametrize("schedule", [ScheduleKind.INTERLEAVED, ScheduleKind.ZERO_BUBBLE])
def test_running_sums_are_the_sums_of_the_units(schedule: ScheduleKind) -> None:
    problem = replace(halves(12, 3, 6), schedule=schedule)
    random, ranks = np.random.default_rng(1), Ranks(problem)
    for _ in range(20):
        cuts = tuple(sorted(random.choice(range(1, 24), size=5, replace=False).tolist()))
        again = random.integers(0, 3, size=6).tolist()
        edges = (0, *cuts, 24)
        expected = loads_of(problem, np.diff(edges).tolist(), again)
        columns = ranks.times(ranks.edges([cuts]), np.array([again]))
        for name, column in zip(("forward", "backward", "weight"), columns, strict=True):
            assert column[:, 0] == pytest.approx([getattr(load, name) for load in expected])


def test_the_leanest_is_the_fastest_of_all_combinations() -> None:
    random = np.random.default_rng(2)
    for _ in range(30):
        counts = random.integers(1, 5, size=2)
        stages = [[_load(random, again) for again in range(count + 1)] for count in counts]
        moments = [(3, 1), (2, 2)]
        limit = float(random.uniform(5, 30))
        fitting = [
            (sum(stage[n].backward for stage, n in zip(stages, chosen, strict=True)), sum(chosen), chosen)
            for chosen in product(*(range(count + 1) for count in counts))
            if _peak(stages, chosen, moments) <= limit
        ]
        found = leanest([Options.of(stage) for stage in stages], moments, limit)
        assert found == (min(fitting)[2] if fitting else None)


def _load(random: np.random.Generator, again: int) -> Load:
    return Load(
        forward=1.0, backward=float(random.integers(1, 4)) + again, weight=0.0, static=1.0,
        kept=float(random.uniform(0, 5)), running=float(random.uniform(0, 2)),
    )  # fmt: skip


def _peak(stages: list[list[Load]], chosen: tuple[int, ...], moments: list[tuple[int, ...]]) -> float:
    own = [stage[n] for stage, n in zip(stages, chosen, strict=True)]
    kept = max(sum(count * load.kept for count, load in zip(counts, own, strict=True)) for counts in moments)
    return sum(load.static for load in own) + kept + max(load.running for load in own)

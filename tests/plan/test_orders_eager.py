"""1f1b that warms up by the clock: Fig. 6 of the Skywork-MoE report; the best is never slower than 1f1b itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.plan.alive import peak_alive
from skymoe.plan.eager import eager_one_f_one_b
from skymoe.plan.orders import B, F, one_f_one_b
from skymoe.plan.simulator import makespan, simulate
from skymoe.plan.timeline import Task


@pytest.mark.parametrize(
    ("layers", "warm_up", "period", "busy"),
    [
        ([6, 6, 6, 6], [4, 4, 4, 1], 20.0, [18, 18, 18, 20]),
        ([5, 5, 5, 5, 4], [5, 5, 5, 3, 1], 15.0, [15, 15, 15, 15, 14]),
    ],
)
def test_figure_6(layers: list[int], warm_up: list[int], period: float, busy: list[int]) -> None:
    """Block widths measured in the figure: forwards before the first backward, period, what a stage works in it."""
    forward, backward = [float(n) for n in layers], [2.0 * n for n in layers]
    forward[-1], backward[-1] = forward[-1] + 2 / 3, backward[-1] + 4 / 3
    order = eager_one_f_one_b(64, forward, backward)
    assert [[task.kind for task in tasks].index(B) for tasks in order] == warm_up
    timeline = simulate(order, forward, backward)
    assert timeline.period_s(len(layers) - 1) == pytest.approx(period)
    assert timeline.period_s(0) == pytest.approx(period)
    assert [f + b for f, b in zip(forward, backward, strict=True)] == pytest.approx(busy)
    plain = makespan(one_f_one_b(len(layers), 64), forward, backward)
    assert timeline.span_s == pytest.approx(plain), "the longer warm-up changes nothing here"


@given(
    st.integers(1, 6), st.integers(1, 20), st.integers(1, 8), st.booleans(), st.sampled_from([0.0, 0.2]),
    st.randoms(use_true_random=False),
)  # fmt: skip
@settings(max_examples=80)
def test_every_order_is_complete_and_keeps_its_limit(
    pp: int, num_micro: int, limit: int, patient: bool, hop: float, random
) -> None:
    forward, backward = ([random.uniform(0.5, 2.0) for _ in range(pp)] for _ in range(2))
    order = eager_one_f_one_b(num_micro, forward, backward, hop_s=hop, limit=limit, patient=patient)
    tasks = [task for tasks in order for task in tasks]
    assert len(tasks) == 2 * pp * num_micro
    assert set(tasks) == {
        Task(rank, kind, micro) for rank in range(pp) for kind in (F, B) for micro in range(num_micro)
    }
    assert max(peak_alive(simulate(order, forward, backward, hop_s=hop))) <= limit


def test_faster_than_1f1b_where_hops_are_slow() -> None:
    forward, backward = [1.0] * 4, [1.0] * 4
    plain = makespan(one_f_one_b(4, 24), forward, backward, hop_s=0.5)
    eager = eager_one_f_one_b(24, forward, backward, hop_s=0.5, limit=[6, 5, 4, 3])
    assert makespan(eager, forward, backward, hop_s=0.5) < 0.95 * plain
    with pytest.raises(ValueError, match="at least one micro-batch"):
        eager_one_f_one_b(4, forward, backward, limit=0)

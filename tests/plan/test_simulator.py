"""The simulator against results worked out by hand and published ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skymoe.base.errors import ConfigError
from skymoe.plan.orders import B, F, I, W, check_micro_batches, interleaved, one_f_one_b, order_of, zbv
from skymoe.plan.simulator import simulate
from skymoe.plan.timeline import Task, Timeline
from skymoe.spec.layout import Layout, ScheduleKind
from skymoe.spec.split import Split
from skymoe.spec.timeline import Span


@pytest.mark.parametrize(("pp", "num_micro"), [(2, 2), (2, 7), (4, 4), (4, 16), (5, 9)])
def test_1f1b_bubble(pp: int, num_micro: int) -> None:
    """Equal stages: (P - 1) / (m + P - 1) of the time, for any ratio of backward to forward."""
    timeline = simulate(one_f_one_b(pp, num_micro), [1.0] * pp, [2.0] * pp)
    assert timeline.span_s == pytest.approx(3 * (num_micro + pp - 1))
    assert timeline.bubble == pytest.approx((pp - 1) / (num_micro + pp - 1))
    for times in timeline.times.values():
        assert times.busy_s == pytest.approx(3 * num_micro)
        assert times.idle_s == pytest.approx(3 * (pp - 1))


@pytest.mark.parametrize(("pp", "chunks", "num_micro"), [(2, 2, 4), (4, 2, 8), (4, 3, 12)])
def test_interleaved_bubble(pp: int, chunks: int, num_micro: int) -> None:
    """The same work in v pieces: a bubble of (P - 1) / v micro-batches (Narayanan et al. 2021, 2.2)."""
    num_stages = pp * chunks
    order = interleaved(pp, chunks, num_micro)
    timeline = simulate(order, [1 / chunks] * num_stages, [2 / chunks] * num_stages)
    assert timeline.span_s == pytest.approx(3 * (num_micro + (pp - 1) / chunks))


@pytest.mark.parametrize(("pp", "num_micro"), [(2, 4), (3, 8), (4, 12)])
def test_zbv_bubble(pp: int, num_micro: int) -> None:
    """F = I = W: a rank is idle only while the first micro-batch comes down the V, or the last (Qi et al. 2024)."""
    num_stages = 2 * pp
    halves = [0.5] * num_stages
    timeline = simulate(zbv(pp, num_micro), halves, halves, halves)
    assert timeline.span_s == pytest.approx(3 * num_micro + 0.5 * (pp - 1))
    whole = simulate(one_f_one_b(pp, num_micro), [1.0] * pp, [1.0] * pp, [1.0] * pp)
    assert timeline.bubble < whole.bubble / 3


def test_by_hand() -> None:
    """Two stages of 1 and 2, hops of a half, two micro-batches."""
    timeline = simulate(one_f_one_b(2, 2), [1.0, 2.0], [2.0, 3.0], hop_s=0.5)
    assert timeline.spans == (
        Span(0, 0, F, 0, 0.0, 1.0),
        Span(0, 0, F, 1, 1.0, 2.0),
        Span(1, 1, F, 0, 1.5, 3.5),
        Span(1, 1, B, 0, 3.5, 6.5),
        Span(1, 1, F, 1, 6.5, 8.5),
        Span(0, 0, B, 0, 7.0, 9.0),
        Span(1, 1, B, 1, 8.5, 11.5),
        Span(0, 0, B, 1, 12.0, 14.0),
    )
    assert timeline.span_s == 14.0
    assert [times.idle_s for times in timeline.times.values()] == [8.0, 4.0]
    assert {span.rank for span in timeline.on(Layout(pp=2, dp=2, tp=3, stages=Split((2, 2)))).spans} == {0, 6}


def test_a_hop_within_a_rank_takes_no_time() -> None:
    """zbv turns on the last rank."""
    timeline = simulate(zbv(2, 3), [1.0] * 4, [1.0] * 4, [1.0] * 4, hop_s=100.0)
    start = {(a.stage, a.kind, a.micro): a for a in timeline.spans}
    assert start[2, F, 0].start_s == start[1, F, 0].end_s
    assert start[1, F, 0].start_s == start[0, F, 0].end_s + 100


def stage_times(layers: list[int], *, head: tuple[float, float]) -> tuple[list[float], list[float]]:
    forward, backward = [float(n) for n in layers], [2.0 * n for n in layers]
    return [*forward[:-1], forward[-1] + head[0]], [*backward[:-1], backward[-1] + head[1]]


@pytest.mark.parametrize(("layers", "period"), [([6, 6, 6, 6], 20.0), ([5, 5, 5, 5, 4], 15.0)])
def test_figure_6(layers: list[int], period: float) -> None:
    """Skywork-MoE, figure 6: 24 layers of F 1 and B 2, a loss block of F 2/3 and B 4/3.

    [6, 6, 6, 6] is held up by its last stage, 18 + 2; [5, 5, 5, 5, 4] by its first ones, 15.
    """
    timeline = simulate(one_f_one_b(len(layers), 48), *stage_times(layers, head=(2 / 3, 4 / 3)))
    assert timeline.period_s(len(layers) - 1) == pytest.approx(period)
    assert timeline.period_s(0) == pytest.approx(period)


@given(
    st.sampled_from(list(ScheduleKind)),
    st.integers(1, 4),
    st.integers(2, 3),
    st.integers(1, 12),
    st.randoms(use_true_random=False),
)
def test_every_order_is_complete_and_runs(schedule: ScheduleKind, pp: int, chunks: int, num_micro: int, random) -> None:
    per_rank = {ScheduleKind.ONE_F_ONE_B: 1, ScheduleKind.INTERLEAVED: chunks, ScheduleKind.ZERO_BUBBLE: 2}[schedule]
    layout = Layout(pp=pp, schedule=schedule, stages=Split((2,) * (pp * per_rank)))
    try:
        order = order_of(layout, num_micro)
    except ConfigError:
        return
    splits = pp > 1 and schedule is ScheduleKind.ZERO_BUBBLE
    kinds = (F, I, W) if splits else (F, B)
    tasks = [task for tasks in order for task in tasks]
    every = {Task(s, kind, m) for s in range(layout.num_stages) for kind in kinds for m in range(num_micro)}
    assert len(tasks) == len(every) and set(tasks) == every
    assert all(layout.stage_owner(task.stage) == rank for rank, tasks in enumerate(order) for task in tasks)
    forward_s, backward_s, weight_s = ([random.uniform(0.1, 2) for _ in range(layout.num_stages)] for _ in range(3))
    timeline = simulate(order, forward_s, backward_s, weight_s, hop_s=0.1)
    check_causes(layout, timeline)
    assert timeline.span_s >= sum(forward_s) + sum(backward_s) - 1e-9, "the way of one micro-batch"


def check_causes(layout: Layout, timeline: Timeline) -> None:
    """Nothing starts before what it needs, and a rank does one thing at a time."""
    at = {(a.stage, "B" if a.kind == I else a.kind, a.micro): a for a in timeline.spans}
    for (stage, kind, micro), action in at.items():
        needs = {"F": ("F", stage - 1), "B": ("B", stage + 1), "W": ("B", stage)}[kind]
        other = at.get((needs[1], needs[0], micro), at[stage, "F", micro] if kind != "F" else None)
        if other is not None:
            hop = 0.1 if layout.stage_owner(other.stage) != layout.stage_owner(stage) else 0.0
            assert action.start_s >= other.end_s + hop - 1e-9
    for rank in range(layout.pp):
        own = [span for span in timeline.spans if span.rank == rank]
        assert all(a.end_s <= b.start_s + 1e-9 for a, b in zip(own, own[1:], strict=False))


@pytest.mark.parametrize(
    ("schedule", "num_micro", "said"),
    [
        (ScheduleKind.ONE_F_ONE_B, 3, "at least 4 micro-batches per step and replica, there are 3"),
        (ScheduleKind.INTERLEAVED, 9, "8 or 10 micro-batches"),
        (ScheduleKind.INTERLEAVED, 13, "12 or 15 micro-batches"),
        (ScheduleKind.ZERO_BUBBLE, 0, "at least one"),
    ],
)
def test_numbers_of_micro_batches_that_do_not_go(schedule: ScheduleKind, num_micro: int, said: str) -> None:
    num_stages = 4 if schedule is ScheduleKind.ONE_F_ONE_B else 8
    layout = Layout(pp=4, schedule=schedule, stages=Split((2,) * num_stages))
    with pytest.raises(ConfigError, match=said):
        check_micro_batches(layout, num_micro)


def test_an_order_that_locks_up_is_named() -> None:
    order = ((Task(0, B, 0), Task(0, F, 0)), (Task(1, F, 0), Task(1, B, 0)))
    with pytest.raises(ValueError, match="cannot go on"):
        simulate(order, [1.0, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="weight_s is needed"):
        simulate(zbv(2, 3), [1.0] * 4, [1.0] * 4)

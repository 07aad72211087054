"""Zero-bubble schedules against the tables of Qi et al. 2024 (arXiv:2401.10241)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.base.errors import ConfigError
from skymoe.plan.alive import peak_memory
from skymoe.plan.orders import F, I, Order, W, interleaved, one_f_one_b
from skymoe.plan.simulator import simulate
from skymoe.plan.timeline import Task
from skymoe.plan.zero_bubble import zb_h1, zb_h2, zero_bubble_order

# Table 6, profiled: model, stages p, micro-batches m, T_F, T_B, T_W, T_comm. The memory that W needs, of what B needs,
# is 32 / (34 + 5 a s / h) (table 1). Beside them table 5, calculated from those: 1F1B, ZB-H1, ZB-H2, ZB-1p, ZB-2p.
SLOW = pytest.mark.slow
SCORES_1_5B, SCORES = 32 / (34 + 5 * 24 * 1024 / 2304), 32 / 74
TABLE_5_AND_6 = [
    ((8, 24, 18.522, 18.086, 9.337, 0.601, SCORES_1_5B), (0.2431, 0.1585, 0.1083, 0.1585, 0.0433)),
    ((8, 32, 18.513, 18.086, 9.331, 0.626, SCORES_1_5B), (0.1985, 0.1242, 0.0837, 0.1242, 0.0039)),
    ((8, 64, 18.546, 18.097, 9.321, 0.762, SCORES_1_5B), (0.1240, 0.0674, 0.0444, 0.0674, 0.0026)),
    ((8, 24, 29.718, 29.444, 19.927, 0.527, SCORES), (0.2347, 0.1323, 0.0698, 0.1323, 0.0029)),
    ((8, 64, 29.935, 29.621, 19.388, 0.535, SCORES), (0.1091, 0.0554, 0.0294, 0.0554, 0.0010)),
    ((16, 48, 11.347, 11.248, 8.132, 0.377, SCORES), (0.2552, 0.1397, 0.0672, 0.1397, 0.0066)),
    pytest.param((8, 32, 29.802, 29.428, 19.530, 0.577, SCORES), (0.1898, 0.1045, 0.0559, 0.1045, 0.0022), marks=SLOW),
    pytest.param((16, 128, 11.325, 11.308, 8.109, 0.378, SCORES), (0.1251, 0.0576, 0.0266, 0.0576, 0.0028), marks=SLOW),
    pytest.param((32, 96, 10.419, 10.207, 7.715, 0.408, SCORES), (0.2646, 0.1421, 0.0641, 0.1421, 0.0038), marks=SLOW),
    pytest.param((32, 128, 10.408, 10.204, 7.703, 0.408, SCORES), (0.2168, 0.1106, 0.0490, 0.1106, 0.0029), marks=SLOW),
    pytest.param((32, 256, 10.402, 10.248, 7.698, 0.460, SCORES), (0.1352, 0.0594, 0.0257, 0.0594, 0.0018), marks=SLOW),
    ((16, 64, 11.307, 11.254, 8.101, 0.379, SCORES), (0.2082, 0.1088, 0.0516, 0.1088, 0.0054)),
]


@pytest.mark.parametrize(("setting", "published"), TABLE_5_AND_6)
def test_table_5(setting: tuple[int, int, float, float, float, float, float], published: tuple[float, ...]) -> None:
    """Bubble rates, all four digits."""
    pp, num_micro, *times, hop, kept = setting
    orders = [one_f_one_b(pp, num_micro), zb_h1(pp, num_micro), zb_h2(pp, num_micro)] + [
        zero_bubble_order(pp, num_micro, *times, hop, limit, kept_for_weights=kept) for limit in (pp, 2 * pp)
    ]
    rates = [rate(order, times, hop) for order in orders]
    assert rates == pytest.approx(published, abs=6e-5)


def rate(order: Order, times: list[float], hop: float) -> float:
    return simulate(order, *([seconds] * len(order) for seconds in times), hop_s=hop).bubble_of_longest_rank


def test_table_5_interleaved() -> None:
    """1.5B, one layer per chunk. We count one hop per rank more than the paper: 0.1090 for its 0.1055."""
    thirds = [[seconds / 3] * 24 for seconds in (18.522, 18.086, 9.337)]
    timeline = simulate(interleaved(8, 3, 24), *thirds, hop_s=0.601)
    assert timeline.bubble_of_longest_rank == pytest.approx(0.1090, abs=6e-5)
    without = timeline.longest_rank_s - 8 * 0.601
    assert 1 - 24 * (18.522 + 18.086 + 9.337) / without == pytest.approx(0.1055, abs=1e-4)


@pytest.mark.parametrize(("pp", "num_micro"), [(2, 6), (4, 8), (4, 20), (6, 12)])
@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0), (1.0, 1.0, 0.75)])
def test_table_2(pp: int, num_micro: int, times: tuple[float, float, float]) -> None:
    """Bubbles and memory of the schedules made by hand, T_W <= T_B (and T_F + T_B >= 2 T_W)."""
    forward, towards_input, weight = times
    each = [[seconds] * pp for seconds in times]
    work = num_micro * sum(times)
    h1, h2 = simulate(zb_h1(pp, num_micro), *each), simulate(zb_h2(pp, num_micro), *each)
    assert h1.longest_rank_s - work == pytest.approx((pp - 1) * (forward + towards_input - weight))
    assert h2.longest_rank_s - work == pytest.approx((pp - 1) * (forward + towards_input - 2 * weight))
    kept = 0.5
    for timeline, expected in (
        (h1, [pp - rank + rank * kept for rank in range(pp)]),
        (h2, [min(num_micro, 2 * (pp - rank) - 1 + 2 * rank * kept) for rank in range(pp)]),
    ):
        measured = peak_memory(timeline, [1.0] * pp, weight_bytes=[kept] * pp)
        assert all(m <= e + 1e-9 for m, e in zip(measured, expected, strict=True))
        assert measured[0] == pytest.approx(expected[0])


@pytest.mark.parametrize(("pp", "num_micro"), [(2, 8), (4, 12), (8, 32)])
def test_zb_2p_has_no_bubble(pp: int, num_micro: int) -> None:
    """F = B = W and memory for 2 P micro-batches: no rank waits between its first pass and its last."""
    order = zero_bubble_order(pp, num_micro, 1.0, 1.0, 1.0, 0.0, 2 * pp)
    ones = [1.0] * pp
    assert simulate(order, ones, ones, ones).bubble_of_longest_rank == pytest.approx(0.0)


@given(
    st.integers(1, 5),
    st.integers(1, 14),
    st.floats(1, 12),
    st.floats(0.2, 1),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60)
def test_every_order_is_complete_runs_and_keeps_its_limit(
    pp: int, num_micro: int, limit: float, kept: float, barrier: bool, random
) -> None:
    """Unequal stages, any limit: each pass once, no lock, memory as promised."""
    times = [[random.uniform(0.2, 2.0) for _ in range(pp)] for _ in range(3)]
    order = zero_bubble_order(pp, num_micro, *times, 0.1, limit, kept_for_weights=kept, barrier=barrier)
    every = {Task(rank, kind, micro) for rank in range(pp) for kind in (F, I, W) for micro in range(num_micro)}
    tasks = [task for tasks in order for task in tasks]
    assert len(tasks) == len(every) and set(tasks) == every
    assert all(task.stage == rank for rank, tasks in enumerate(order) for task in tasks)
    timeline = simulate(order, *times, hop_s=0.1)
    assert max(peak_memory(timeline, [1.0] * pp, weight_bytes=[kept] * pp)) <= limit + 1e-6
    for made in (zb_h1(pp, num_micro), zb_h2(pp, num_micro)):
        assert {task for tasks in made for task in tasks} == every
        simulate(made, *times, hop_s=0.1)


def test_more_memory_never_hurts_much_and_less_than_one_is_refused() -> None:
    each = [[2.0] * 4, [2.0] * 4, [1.5] * 4]
    costs = [
        simulate(zero_bubble_order(4, 16, 2.0, 2.0, 1.5, 0.1, limit), *each, hop_s=0.1).longest_rank_s
        for limit in (1, 2, 4, 8)
    ]
    assert costs == sorted(costs, reverse=True) and costs[0] > 1.5 * costs[-1]
    with pytest.raises(ConfigError, match="room for the activations of one micro-batch"):
        zero_bubble_order(4, 16, 2.0, 2.0, 1.5, 0.1, 0.5)

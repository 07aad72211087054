"""What the solver remembers of orders is bounded by their tasks."""

import skymoe.plan.pipeline.cache as cache
from skymoe.plan.pipeline.cache import num_tasks, remembered
from skymoe.plan.pipeline.schedule import order_of_key
from skymoe.spec.layout import ScheduleKind


def keys(*numbers: int) -> list[cache.Key]:
    return [(ScheduleKind.ONE_F_ONE_B, 1, 1, number) for number in numbers]


def test_tasks_are_counted():
    for schedule, chunks in ((ScheduleKind.ONE_F_ONE_B, 1), (ScheduleKind.ZERO_BUBBLE, 2)):
        key = schedule, 3, chunks, 6
        assert num_tasks(key) == sum(map(len, order_of_key(key)))


def test_many_small_ones_are_remembered_and_large_ones_replace_each_other(monkeypatch):
    monkeypatch.setattr(cache, "MOST_TASKS", 100)
    asked = []

    @remembered
    def answer(key):
        asked.append(key[3])
        return key[3]

    for key in [*keys(*range(1, 9)), *keys(*range(1, 9))]:  # 72 tasks in all
        assert answer(key) == key[3]
    assert asked == list(range(1, 9))
    for key in keys(40, 40, 1, 60, 60, 40):  # 80 tasks, 120: the last one stays whatever it has
        assert answer(key) == key[3]
    assert asked[8:] == [40, 1, 60, 40]

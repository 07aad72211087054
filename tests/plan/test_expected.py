"""The schedule with measured times: equal to the simulation that has them, also when single passes were slow."""

from __future__ import annotations

import pytest

from skymoe.plan.expected import expected_timeline
from skymoe.plan.orders import order_of
from skymoe.plan.simulator import simulate
from skymoe.plan.timeline import Timeline
from skymoe.spec.layout import Layout, ScheduleKind
from skymoe.spec.split import Split


@pytest.mark.parametrize("schedule", list(ScheduleKind))
def test_medians_of_what_was_measured(schedule: ScheduleKind) -> None:
    stages = 2 if schedule is ScheduleKind.ONE_F_ONE_B else 4
    layout = Layout(pp=2, dp=2, schedule=schedule, stages=Split((4,) * stages))
    forward, backward = [1.0 + stage for stage in range(stages)], [2.0] * stages
    weights = [0.5] * stages if schedule is ScheduleKind.ZERO_BUBBLE else None
    true = simulate(order_of(layout, 8), forward, backward, weights).on(layout)
    slow = max(true.spans, key=lambda span: span.start_s)
    measured = Timeline.of(
        [*(span for span in true.spans if span is not slow), slow._replace(end_s=slow.end_s + 9)], true.span_s + 9
    )
    assert expected_timeline(measured, layout, 8) == true

"""What the schedule says beside what the clocks measured: the same passes, each with the usual time of its stage.

The difference between the two is what a plan does not know: unequal micro-batches, neighbours on the same cores,
transfers that are not hidden.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import median

from skymoe.plan.orders import order_of
from skymoe.plan.simulator import simulate
from skymoe.plan.timeline import Timeline
from skymoe.spec.layout import Layout
from skymoe.spec.timeline import PassKind


def expected_timeline(measured: Timeline, layout: Layout, num_micro: int) -> Timeline:
    """Simulate the step with the median time of each stage's passes, on the ranks of the first replica."""
    seconds: dict[tuple[PassKind, int], list[float]] = defaultdict(list)
    for span in measured.spans:
        seconds[span.kind, span.stage].append(span.end_s - span.start_s)

    def usual(kind: PassKind) -> list[float]:
        return [median(seconds.get((kind, stage), [0.0])) for stage in range(layout.num_stages)]

    order = order_of(layout, num_micro)
    apart = any(task.kind == "W" for tasks in order for task in tasks)
    backward, weights = (usual("I"), usual("W")) if apart else (usual("B"), None)
    if apart:  # some passes are left whole by the schedule, and take both times
        backward = [i or b for i, b in zip(backward, usual("B"), strict=True)]
    return simulate(order, usual("F"), backward, weights).on(layout)

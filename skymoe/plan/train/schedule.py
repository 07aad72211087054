"""Which order a schedule means on a number of ranks, and what it looks like in time."""

from __future__ import annotations

from skymoe.base.errors import ConfigError
from skymoe.plan.orders import Order, order_on
from skymoe.plan.simulator import simulate
from skymoe.plan.timeline import Timeline
from skymoe.plan.train.stages import StageTimes
from skymoe.spec.layout import ScheduleKind


def order_for(schedule: ScheduleKind, num_ranks: int, num_stages: int, num_micro: int) -> Order:
    """The order of the schedule; fewer micro-batches than ranks are run as they are, with a larger bubble.

    Raises:
        ConfigError: no such schedule has this many stages on this many ranks.
    """
    per_rank, rest = divmod(num_stages, num_ranks)
    wanted = {ScheduleKind.ONE_F_ONE_B: per_rank == 1, ScheduleKind.ZERO_BUBBLE: per_rank == 2}
    if num_ranks > 1 and (rest or not wanted.get(schedule, per_rank >= 1)):
        raise ConfigError(f"{schedule} on {num_ranks} ranks cannot have {num_stages} stages", where="stages")
    return order_on(schedule, num_ranks, per_rank, num_micro)


def run_order(order: Order, times: StageTimes, hop_s: float) -> Timeline:
    """Place the passes in time; where the order has weight gradients apart, their share of the backward is apart."""
    apart = any(task.kind == "W" for tasks in order for task in tasks)
    if apart:
        return simulate(order, times.forward_s, times.input_s, times.weight_s, hop_s=hop_s)
    return simulate(order, times.forward_s, times.backward_s, hop_s=hop_s)

"""What one step of one division takes: prices -> passes of stages -> simulated schedule -> and the end of the step.

This is the one function that the search, the validation against published runs and the comparison with our own runs
ask. Nothing in it knows a model or a machine by name. MFU and HFU are those of `spec/utilisation.py`:

    MFU = model FLOPs per token * tokens/s / peak        forward once, backward twice; causal or full attention
    HFU = the same with what is run again, causal        layer by layer, as far as the stages really do it

`bubble_fraction` is the idle part of the ranks' time in the pipeline, before gradients are reduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skymoe.base.errors import ConfigError
from skymoe.plan.cost.flops import flops
from skymoe.plan.cost.model import prices, step_end
from skymoe.plan.cost.prices import Prices, StepEnd
from skymoe.plan.memory.model import rank_memory, sizes
from skymoe.plan.memory.sizes import RankMemory, Sizes
from skymoe.plan.orders import Order
from skymoe.plan.timeline import Timeline
from skymoe.plan.train.again import again_flops
from skymoe.plan.train.schedule import order_for, run_order
from skymoe.plan.train.stages import stage_times
from skymoe.plan.work import Work
from skymoe.spec.layout import ScheduleKind
from skymoe.spec.split import Split


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A step on paper. Seconds and bytes.

    Attributes:
        step_s: from step to step; the pipeline's time and the end of the step.
        pipeline_s: until the last backward is done on all ranks.
        end: what follows.
        tokens_per_s_per_gpu: of all GPUs, busy or not.
        mfu_causal, mfu_full, hfu: shares of the peak.
        bubble_fraction: idle part of the pipeline's time.
        memory: peak of each pipeline rank.
        stage_forward_s, stage_backward_s: passes of one micro-batch; the backward with weights and with what is run
            again.
        stage_again_s: the part of the backward that is run again.
        timeline: when each pass runs, one rank per pipeline rank.
    """

    step_s: float
    pipeline_s: float
    end: StepEnd
    tokens_per_s_per_gpu: float
    mfu_causal: float
    mfu_full: float
    hfu: float
    bubble_fraction: float
    memory: tuple[RankMemory, ...]
    stage_forward_s: tuple[float, ...]
    stage_backward_s: tuple[float, ...]
    stage_again_s: tuple[float, ...]
    timeline: Timeline


def estimate(
    work: Work,
    stages: Split,
    recompute: Sequence[int],
    *,
    schedule: ScheduleKind = ScheduleKind.ONE_F_ONE_B,
    order: Order | None = None,
    priced: Prices | None = None,
    sized: Sizes | None = None,
    simulated: tuple[float, float] | None = None,
    update_s: float | None = None,
) -> Estimate:
    """Estimate a step.

    Args:
        work: the micro-batch, the division, the machine.
        stages: halves per stage, over all stages.
        recompute: per stage, how many of its layers (the first ones) are run again whole.
        schedule: of the pipeline; fewer micro-batches than ranks are simulated as they are.
        order: of the passes, where it is another than the schedule's (zero-bubble variants).
        priced, sized: of `work`, where the caller has them already.
        simulated: seconds and bubble of the pipeline, where the caller has them; then there is no timeline.
        update_s: of the optimizer per parameter, where it was measured.

    Raises:
        ConfigError: stages that are not those of the model or the schedule.
    """
    _check(work, stages, recompute)
    price_list = prices(work) if priced is None else priced
    times = stage_times(price_list, stages, recompute)
    if simulated is not None:
        timeline, bubble = Timeline((), simulated[0]), simulated[1]
    else:
        order = order or order_for(schedule, work.division.pp, stages.num_ranks, work.num_micro)
        timeline = run_order(order, times, price_list.hop_s)
        bubble = timeline.bubble
    end = step_end(work, stages, pipeline_s=timeline.span_s, schedule=schedule, update_s=update_s)
    step_s = timeline.span_s + end.total_s
    rate = work.step_tokens / step_s / work.division.world_size
    causal, full = (flops(work.shape, work.sequence_length, causal=triangle) for triangle in (True, False))
    again = again_flops(work, causal, stages, recompute)
    peak = work.cluster.gpu.flops(work.precision)
    size_list = sizes(work) if sized is None else sized
    return Estimate(
        step_s=step_s,
        pipeline_s=timeline.span_s,
        end=end,
        tokens_per_s_per_gpu=rate,
        mfu_causal=3 * causal.total * rate / peak,
        mfu_full=3 * full.total * rate / peak,
        hfu=(3 * causal.total + again) * rate / peak,
        bubble_fraction=bubble,
        memory=rank_memory(work, size_list, stages, recompute, schedule=schedule),
        stage_forward_s=times.forward_s,
        stage_backward_s=times.backward_s,
        stage_again_s=times.again_s,
        timeline=timeline,
    )


def _check(work: Work, stages: Split, recompute: Sequence[int]) -> None:
    """Raises ConfigError for a division of another model."""
    units = 2 * work.shape.num_layers
    if stages.num_units != units:
        raise ConfigError(f"the stages hold {stages.num_units} halves, the model has {units}", where="stages")
    if len(recompute) != stages.num_ranks or min(recompute) < 0:
        raise ConfigError(f"recompute needs a count for each of the {stages.num_ranks} stages, got {list(recompute)}")

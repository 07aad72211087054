"""A training case as the planner sees it: Work, stages, recomputation, and one call of `estimate`.

The same code that plans answers here; of sources only `has_flash` knows names. What a published run does and `estimate`
does not know is translated into prices (published.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from skymoe.base.errors import ConfigError
from skymoe.plan.alive import peak_alive
from skymoe.plan.hardware.gpu import Precision
from skymoe.plan.memory.model import rank_memory
from skymoe.plan.memory.sizes import Sizes
from skymoe.plan.orders import Order, order_on
from skymoe.plan.train.estimate import Estimate, estimate
from skymoe.plan.train.stages import StageTimes, stage_times
from skymoe.plan.validate.cases import Case, NotJudgedError
from skymoe.plan.validate.layouts import (
    ZERO_BUBBLE,
    CaseLayout,
    Pipeline,
    case_layout,
)
from skymoe.plan.validate.levels import case_precision
from skymoe.plan.validate.machines import case_cluster
from skymoe.plan.validate.models import CaseModel, case_model
from skymoe.plan.validate.published import published_prices, published_sizes
from skymoe.plan.validate.software import on_software, software_of
from skymoe.plan.validate.stages import case_stages
from skymoe.plan.work import Recompute, Work
from skymoe.plan.zero_bubble import zb_h1, zb_h2, zero_bubble_order
from skymoe.spec.layout import ScheduleKind
from skymoe.spec.split import Split

_NEAR = 1.25
_MOST_TASKS = 400_000  # of a simulated step; more micro-batches than that repeat themselves


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A case on paper.

    Attributes:
        model, layout: what was understood.
        work, stages, recompute: what was asked.
        estimate: the answer.
        assumed: in words.
    """

    model: CaseModel
    layout: CaseLayout
    work: Work
    stages: Split
    recompute: tuple[int, ...]
    estimate: Estimate
    assumed: tuple[str, ...]


def predict(case: Case) -> Prediction:
    """Predict `case`. Raises NotJudgedError with the reason when that is not possible."""
    try:
        return _predict(case)
    except ConfigError as error:
        raise NotJudgedError(f"refused by the planner: {error.what}") from error


def _predict(case: Case) -> Prediction:
    model, cluster = case_model(case), case_cluster(case)
    cluster = replace(cluster, gpu=on_software(case, cluster.gpu))
    is_moe = any(layer.ffn.is_moe for layer in model.shape.layers)
    layout = case_layout(case, cluster, is_moe=is_moe)
    software = software_of(case, cluster.gpu)
    if software is not None and software.hidden:
        layout = replace(layout, division=replace(layout.division, expert_overlap=True))
    if software is not None and model.clamped:  # passes are of the catalogue's streams
        layout = replace(layout, unfused_passes=software.passes * software.memory)
    work = Work(
        shape=model.shape, division=layout.division, cluster=cluster,
        sequence_length=case.count("batch.seq_len", high=2**24), micro_batch=layout.micro_batch,
        num_micro=layout.num_micro, precision=case_precision(case), recompute=layout.again.base,
        flash=has_flash(case), chunks=layout.chunks,
    )  # fmt: skip
    if 4 * work.num_micro * layout.division.pp * layout.chunks > _MOST_TASKS:
        raise NotJudgedError(
            f"{work.num_micro} micro-batches over {layout.division.pp} stages are too many to simulate"
        )
    stages, recompute, answer = _answer(work, model, layout)
    answer = _with_owners(case, work, answer)
    return Prediction(
        model=model, layout=layout, work=work, stages=stages, recompute=recompute, estimate=answer,
        assumed=(*model.assumed, *layout.assumed),
    )  # fmt: skip


@lru_cache(maxsize=512)  # tables repeat their setups from release to release
def _answer(work: Work, model: CaseModel, layout: CaseLayout) -> tuple[Split, tuple[int, ...], Estimate]:
    stages = case_stages(model.shape, layout, work.sequence_length, model.predicts_two)
    priced, sized = published_prices(work, model, layout), published_sizes(work, layout)
    recompute = _again(work, sized, stages, layout)
    kind = layout.schedule
    order = order_of_case(layout, stage_times(priced, stages, recompute), priced.hop_s)
    answer = estimate(work, stages, recompute, schedule=kind, order=order, priced=priced, sized=sized)
    if layout.pipeline in ZERO_BUBBLE:
        answer = _without_barrier(work, stages, recompute, sized, answer)
    elif layout.alive is not None:
        memory = rank_memory(work, sized, stages, recompute, schedule=kind, alive=layout.alive)
        answer = replace(answer, memory=memory)
    return stages, recompute, answer


def _with_owners(case: Case, work: Work, answer: Estimate) -> Estimate:
    """Software that sends weights owner by owner (see software.py), where owners are in several nodes."""
    software, division = software_of(case, work.cluster.gpu), work.division
    owners = min(division.dp * division.cp, division.zero_ranks or division.dp * division.cp)
    if software is None or not software.owner_s or owners * division.tp <= work.cluster.gpus_per_node:
        return answer
    return replace(answer, step_s=answer.step_s + owners * software.owner_s)


def has_flash(case: Case) -> bool:
    """Whether attention is fused: not in Megatron-LM of 2021 and 2022 and what was built on it in 2023.

    Scores of Qi et al. (zero_bubble) are not fused: their memory has the 5 a s^2 b of them.
    """
    old = case.text("framework").lower() == "megatron-lm" and case_precision(case) is Precision.BF16
    return not (case.group in {"narayanan2021", "korthikanti2022", "zero_bubble"} or old)


def order_of_case(layout: CaseLayout, times: StageTimes, hop_s: float) -> Order:
    """Of the passes; those of zero-bubble schedules are found for the times of the stages."""
    pp, number = layout.division.pp, layout.num_micro
    if pp == 1 or layout.pipeline not in ZERO_BUBBLE:
        return order_on(layout.schedule, pp, layout.chunks, number)
    limit = {Pipeline.ZB_1P: 1.0, Pipeline.ZB_2P: 2.0}.get(layout.pipeline)
    if limit is None:
        return zb_h1(pp, number) if layout.pipeline is Pipeline.ZB_H1 else zb_h2(pp, number)
    return zero_bubble_order(pp, number, times.forward_s, times.input_s, times.weight_s, hop_s, limit * pp)


def _without_barrier(work: Work, stages: Split, recompute: Sequence[int], sized: Sizes, answer: Estimate) -> Estimate:
    """Ranks begin the next step without waiting for each other, and keep what the order itself keeps."""
    pipeline_s = answer.timeline.longest_rank_s
    alive = peak_alive(answer.timeline)
    kind = ScheduleKind.ONE_F_ONE_B
    memory = rank_memory(work, sized, stages, recompute, schedule=kind, alive=alive)
    return replace(answer, pipeline_s=pipeline_s, step_s=pipeline_s + answer.end.total_s, memory=memory)


def _again(work: Work, sized: Sizes, stages: Split, layout: CaseLayout) -> tuple[int, ...]:
    """Layers per stage that are run again whole: as stated, or the fewest per stage that come near what fits.

    Who publishes a speed has tuned it: no recomputation unless our memory is clearly more than there is.
    """
    layers = [len({unit // 2 for unit in part}) for part in stages]
    if layout.again.share is not None:
        return tuple(round(layout.again.share * count) for count in layers)
    kind = layout.schedule
    low, high = 0, max(layers)
    while low < high:
        middle = (low + high) // 2
        recompute = tuple(min(middle, count) for count in layers)
        memory = rank_memory(work, sized, stages, recompute, schedule=kind)
        fits = max(rank.allocated for rank in memory) <= _NEAR * work.cluster.gpu.memory
        low, high = (low, middle) if fits else (middle + 1, high)
    return tuple(min(low, count) for count in layers)


def share_again(prediction: Prediction) -> float:
    """The share of layers that are run again whole: 1 under full recomputation."""
    if prediction.work.recompute is Recompute.FULL:
        return 1.0
    return min(1.0, sum(prediction.recompute) / prediction.work.shape.num_layers)

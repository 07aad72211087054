"""From a found division to the figures of the report."""

from __future__ import annotations

from dataclasses import replace

from skymoe.plan.memory.sizes import RankMemory
from skymoe.plan.pipeline.problem import Answer, Certificate
from skymoe.plan.train.asked import Asked
from skymoe.plan.train.estimate import Estimate, estimate
from skymoe.plan.train.lost import time_by_cause
from skymoe.plan.train.priced import Priced
from skymoe.plan.train.result import Figures, LayoutFacts, MemoryGB, Proof
from skymoe.plan.train.search import GB, Found
from skymoe.plan.work import Recompute
from skymoe.spec.split import Split


def recompute_counts(priced: Priced, answer: Answer) -> tuple[int, ...]:
    """Layers run again per stage, as a plan file says it; the base level `full` is all of them."""
    if priced.work.recompute is not Recompute.FULL:
        return answer.recompute
    return tuple(len({unit // 2 for unit in part}) for part in answer.stages)


def estimate_of(priced: Priced, answer: Answer, *, drawn: bool = True) -> Estimate:
    """A step of this division; with a timeline where it is `drawn`, which takes longer."""
    return estimate(
        priced.work, answer.stages, answer.recompute, schedule=priced.candidate.schedule, priced=priced.prices,
        sized=priced.sizes, simulated=None if drawn else (answer.makespan, answer.bubble),
        update_s=priced.update_s,
    )  # fmt: skip


def causes_of(priced: Priced, answer: Answer, result: Estimate) -> dict[str, float]:
    """Where its time goes."""
    layout = priced.candidate.layout(answer.stages, answer.recompute)
    return time_by_cause(priced.work, priced.prices, layout, answer.stages, answer.recompute, result)


def figures(asked: Asked, priced: Priced, answer: Answer, result: Estimate) -> Figures:
    """For the report."""
    totals = [rank.total for rank in result.memory]
    return Figures(
        split=layers(answer.stages),
        recompute=recompute_counts(priced, answer),
        step_time_s=result.step_s,
        tokens_per_s_per_gpu=result.tokens_per_s_per_gpu,
        mfu_causal=result.mfu_causal,
        mfu_full=result.mfu_full,
        hfu=result.hfu,
        bubble_fraction=result.bubble_fraction,
        memory_gb=tuple(total / GB for total in totals),
        memory=tuple(_memory(rank) for rank in result.memory),
        stage_forward_s=result.stage_forward_s,
        stage_backward_s=result.stage_backward_s,
        stage_again_s=result.stage_again_s,
        fits=max(totals) <= asked.memory * (1 + 1e-9),
    )


def layers(stages: Split) -> tuple[float, ...]:
    """Halves as layers."""
    return tuple(size / 2 for size in stages.sizes)


def layout_facts(found: Found | Priced) -> LayoutFacts:
    """The division of the GPUs."""
    one = found.candidate
    priced = found.priced if isinstance(found, Found) else found
    return LayoutFacts(
        pp=one.pp, dp=one.dp, tp=one.tp, expert=str(one.expert), dispatch=str(one.dispatch),
        schedule=str(one.schedule), chunks=one.chunks, micro_batch=one.micro_batch, num_micro=one.num_micro,
        recompute=str(priced.work.recompute),
    )  # fmt: skip


def proof(certificate: Certificate) -> Proof:
    """In the report's words."""
    return Proof(
        optimal=certificate.optimal, pipeline_lower_bound_s=certificate.lower_bound, gap=certificate.gap,
        method=certificate.method, examined=certificate.examined,
    )  # fmt: skip


def _memory(rank: RankMemory) -> MemoryGB:
    parts = {
        name: getattr(rank, name) / GB
        for name in ("weights", "gradients", "optimizer", "activations", "transient", "reserve", "total")
    }
    return MemoryGB(**parts)


def with_memory(priced: Priced, memory: float) -> Priced:
    """The same with less memory per GPU, in bytes."""
    return replace(priced, problem=replace(priced.problem, memory=memory - priced.sizes.reserve))

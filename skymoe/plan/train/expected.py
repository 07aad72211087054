"""What a plan file carries along of what was foretold, for those who compare it with what happened."""

from __future__ import annotations

from typing import Any

from skymoe.plan.train.result import TrainPlan
from skymoe.spec.layout import DispatchMode, ExpertAxis, Layout, ScheduleKind
from skymoe.spec.split import Split


def layout_of(report: TrainPlan) -> Layout:
    """The layout of a report."""
    facts = report.layout
    return Layout(
        pp=facts.pp, dp=facts.dp, tp=facts.tp, expert=ExpertAxis(facts.expert), dispatch=DispatchMode(facts.dispatch),
        schedule=ScheduleKind(facts.schedule), stages=Split(tuple(round(2 * size) for size in report.best.split)),
        recompute=report.best.recompute,
    )  # fmt: skip


def expected_of(report: TrainPlan) -> dict[str, Any]:
    """Seconds, GB, shares; and the batch that they are for."""
    best = report.best
    return {
        "gpu": report.gpu,
        "sequence_length": report.sequence_length,
        "sequences": report.global_batch_tokens // report.sequence_length,
        "micro_sequences": report.layout.micro_batch,
        "step_s": best.step_time_s,
        "tokens_per_s_per_gpu": best.tokens_per_s_per_gpu,
        "bubble_fraction": best.bubble_fraction,
        "memory_gb": list(best.memory_gb),
        "stage_forward_s": list(best.stage_forward_s),
        "stage_backward_s": list(best.stage_backward_s),
        "uniform_step_s": report.uniform.step_time_s,
    }

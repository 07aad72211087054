"""The planned division beside the uniform one, for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from skymoe.base.tables import plain_table
from skymoe.plan.pipeline.problem import Answer, Problem
from skymoe.plan.pipeline.run import PipelineReport
from skymoe.spec.layout import stage_owner


def show(report: PipelineReport, console: Console) -> None:
    """Print `report`."""
    problem = report.problem
    per_rank = f", {problem.chunks} stages each" if problem.chunks > 1 else ""
    console.print(
        f"{len(problem.units)} units over {problem.num_ranks} ranks{per_rank}, {problem.num_micro} micro-batches, "
        f"{problem.schedule}"
    )
    console.print(_stages(report))
    console.print(_steps(report))
    console.print(certificate_sentence(report.planned.answer))
    if not report.uniform.fits:
        console.print("The uniform division does not fit the memory.", style="bold")


def certificate_sentence(answer: Answer) -> str:
    """How good, in words."""
    certificate = answer.certificate
    if certificate.optimal:
        count = certificate.examined
        return f"Proven optimal: {certificate.method} ({count} division{'s' if count > 1 else ''} simulated)."
    return (
        f"Not proven optimal: at most {certificate.gap:.2%} slower than the fastest division, for none takes less than "
        f"{_number(certificate.lower_bound)} ({certificate.method}; {certificate.examined} simulated)."
    )


def _stages(report: PipelineReport) -> Table:
    planned, uniform = report.planned, report.uniform
    table = plain_table(
        "stages", ("stage", "rank", "units", "uniform", "run again", "forward", "backward", "busy", "memory")
    )
    problem = report.problem
    for stage, load in enumerate(planned.loads):
        rank = stage_owner(problem.schedule, problem.num_ranks, stage)
        first = stage < problem.num_ranks
        table.add_row(
            str(stage),
            str(rank),
            str(planned.answer.stages.sizes[stage]),
            str(uniform.answer.stages.sizes[stage]),
            _pair(planned.answer.recompute[stage], uniform.answer.recompute[stage]),
            _number(load.forward),
            _number(load.backward),
            f"{_share(planned.answer, rank):.1%}" if first else "",
            _memory(report.problem, planned.answer, rank) if first else "",
        )
    return table


def _steps(report: PipelineReport) -> Table:
    table = plain_table("step", ("", "makespan", "period", "bubble", "largest memory", "against uniform"))
    rows = [("planned", report.planned), ("uniform", report.uniform)]
    rows += [("with vocabulary parallelism", report.vocabulary)] if report.vocabulary else []
    for name, division in rows:
        gain = report.uniform.answer.makespan / division.answer.makespan - 1 if division.answer.makespan else 0.0
        table.add_row(
            name,
            _number(division.answer.makespan),
            _number(division.period),
            f"{division.answer.bubble:.1%}",
            _number(max(division.answer.memory)) + ("" if division.fits else " (too much)"),
            "" if division is report.uniform else f"{gain:+.2%}",
        )
    return table


def _share(answer: Answer, rank: int) -> float:
    return answer.busy[rank] / answer.makespan if answer.makespan else 0.0


def _memory(problem: Problem, answer: Answer, rank: int) -> str:
    own = _number(answer.memory[rank])
    return own if not problem.memory else f"{own} ({answer.memory[rank] / problem.memory:.0%})"


def _pair(planned: int, uniform: int) -> str:
    return f"{planned}" if planned == uniform else f"{planned} ({uniform})"


def _number(value: float) -> str:
    return f"{value:.6g}"

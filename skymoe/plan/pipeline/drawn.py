"""Answers of the solver as panels of a drawing: the schedule of each, in the problem's units of time.

panels = panels_of(problem, {"uniform": uniform(problem), "planned": solve(problem)})
path.write_text(timeline_svg(panels, title=...))      # or show_timelines(panels, console)
"""

from __future__ import annotations

from collections.abc import Mapping

from skymoe.plan.draw.panel import Panel
from skymoe.plan.draw.svg import timeline_svg
from skymoe.plan.draw.words import figures
from skymoe.plan.pipeline.loads import loads_of
from skymoe.plan.pipeline.problem import Answer, Problem
from skymoe.plan.pipeline.run import PipelineReport
from skymoe.plan.pipeline.schedule import key_of, order_of_key, ranks_of
from skymoe.plan.simulator import simulate
from skymoe.plan.timeline import Timeline
from skymoe.spec.layout import ScheduleKind


def panels_of(problem: Problem, answers: Mapping[str, Answer], unit: str = "") -> list[Panel]:
    """One panel per answer; `unit` is that of times, "" for abstract ones."""
    return [_panel(problem, answer, title, unit) for title, answer in answers.items()]


def report_svg(report: PipelineReport) -> str:
    """Both divisions of a report as one SVG file."""
    answers = {"uniform": report.uniform.answer, "planned": report.planned.answer}
    what = f"{len(report.problem.units)} units on {report.problem.num_ranks} ranks, {report.problem.schedule}"
    return timeline_svg(panels_of(report.problem, answers), title=f"{what}: uniform | planned") + "\n"


def timeline_of(problem: Problem, answer: Answer) -> Timeline:
    """The simulated step of an answer."""
    loads = loads_of(problem, answer.stages.sizes, answer.recompute)
    order = order_of_key(key_of(problem))
    forward, backward, weight = zip(*((load.forward, load.backward, load.weight) for load in loads), strict=True)
    if problem.schedule is ScheduleKind.ZERO_BUBBLE and problem.num_ranks > 1:
        towards_input = [b - w for b, w in zip(backward, weight, strict=True)]
        return simulate(order, forward, towards_input, weight, hop_s=problem.hop)
    return simulate(order, forward, backward, hop_s=problem.hop)


def _panel(problem: Problem, answer: Answer, title: str, unit: str) -> Panel:
    sizes = answer.stages.sizes
    loads = loads_of(problem, sizes, answer.recompute)
    plain = loads_of(problem, sizes, [0] * len(sizes))
    again = tuple(load.backward - without.backward for load, without in zip(loads, plain, strict=True))
    labels = tuple(
        f"{rank} · {' + '.join(str(sizes[stage]) for stage in stages)} units"
        for rank, stages in enumerate(ranks_of(problem))
    )
    timeline = timeline_of(problem, answer)
    panel = Panel(title=title, timeline=timeline, labels=labels, again_s=again, unit=unit)
    over = problem.memory is not None and max(answer.memory) > problem.memory * (1 + 1e-9)
    return Panel(
        title=title, timeline=timeline, labels=labels, again_s=again, unit=unit,
        note=f"{figures(panel)} · does not fit" if over else "",
    )  # fmt: skip

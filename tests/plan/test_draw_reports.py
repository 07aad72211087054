"""What the commands draw of their reports: the page of a training plan, of a serving plan, the SVG of a pipeline."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from skymoe.plan.pipeline.drawn import panels_of, timeline_of
from skymoe.plan.pipeline.evaluate import uniform
from skymoe.plan.pipeline.problem import End, Problem, Unit
from skymoe.plan.pipeline.solve import solve
from skymoe.plan.serve.config import PlanServeConfig
from skymoe.plan.serve.page import plan_page as serve_page
from skymoe.plan.serve.run import run as serve
from skymoe.plan.train.config import PlanTrainConfig
from skymoe.plan.train.page import plan_page as train_page
from skymoe.plan.train.run import run as train
from skymoe.spec.layout import ScheduleKind


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def drawings(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_a_training_plan() -> None:
    report = train(
        PlanTrainConfig(
            model="skywork-moe",
            gpus=1536,
            pp=12,
            tp=4,
            memory=45,
            micro_batch=1,
            schedule=ScheduleKind.ONE_F_ONE_B,
            vocabulary_parallel=False,
        )  # fmt: skip
    )
    page = train_page(report)
    assert {"Schedule", "Memory", "Stages", "What limits you", "Certificate", "What was assumed"} <= set(headings(page))
    schedule, memory, *_ = drawings(page)
    words = ["".join(text.itertext()) for text in schedule.iter("text")]
    assert any(word.startswith("uniform") for word in words) and any(word.startswith("planned") for word in words)
    assert "run again" in words, "45 GB are not enough to keep everything"
    assert sum(report.best.recompute) > 0
    assert "45 GB" in ["".join(text.itertext()) for text in memory.iter("text")]
    for limit in report.limits:
        assert limit.words in page
    assert f"{report.best.tokens_per_s_per_gpu:,.4g}" in page


def test_a_serving_plan_on_unequal_gpus() -> None:
    report = serve(PlanServeConfig(model="skywork-moe", gpus="6xrtx4090,4xrtx3090", weights="fp8", batch=(1, 16, 64)))
    page = serve_page(report)
    assert {"Memory", "Throughput", "Batch by batch", "Division", "What limits you"} <= set(headings(page))
    memory, curves = drawings(page)
    labels = ["".join(text.itertext()) for text in memory.iter("text")]
    assert (labels.count("rtx4090"), labels.count("rtx3090")) == (6, 4)
    assert sum(path.attrib["class"] == "cap" for path in memory.iter("path")) == 10, "each GPU has its own memory"
    fits = sum(point.fits for point in report.sweep)
    assert len(list(curves.iter("circle"))) == 2 * fits
    assert "skywork-moe on 6 x rtx4090 and 4 x rtx3090" in page


@pytest.mark.parametrize("schedule", list(ScheduleKind))
def test_a_pipeline(schedule: ScheduleKind) -> None:
    """The drawing is the simulation that the solver's makespan comes from; what is run again is drawn."""
    units = tuple(
        Unit(forward=1, backward=2, weight=1, activation=1, checkpoint=0.1, layer=layer) for layer in range(12)
    )
    chunks = 1 if schedule is ScheduleKind.ONE_F_ONE_B else 2
    problem = Problem(
        units=units, num_ranks=3, num_micro=6, head=End(forward=0.5, backward=1), memory=10.0, hop=0.1,
        schedule=schedule, chunks=chunks,
    )  # fmt: skip
    answers = {"uniform": uniform(problem), "planned": solve(problem)}
    panels = panels_of(problem, answers)
    for panel, answer in zip(panels, answers.values(), strict=True):
        assert timeline_of(problem, answer).span_s == pytest.approx(answer.makespan)
        assert panel.timeline.bubble == pytest.approx(answer.bubble)
        assert sum(panel.again_s) == pytest.approx(sum(answer.recompute))
        assert len(panel.labels) == 3


def test_the_command_writes_the_drawing(tmp_path: Path) -> None:
    from skymoe.cli.plan import app

    arguments = ["pipeline", "--forward", "1x8", "--backward", "2", "--stages", "2", "--microbatches", "4", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--svg", str(tmp_path / "plan.svg")])
    assert result.exit_code == 0, result.output
    root = ElementTree.fromstring((tmp_path / "plan.svg").read_text(encoding="utf-8"))
    assert root.attrib["role"] == "img" and "8 units on 2 ranks" in (root[0].text or "")

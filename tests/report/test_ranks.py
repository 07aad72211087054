"""The section on many ranks: what it draws, what it leaves out, and that it survives any file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from report.fake_ranks import write_parallel_run
from report.fake_runs import write_run
from report.test_report import EVIL, Page, make

from skymoe.report.timeline import draw, read_timeline
from skymoe.spec.layout import Layout, ScheduleKind
from skymoe.spec.split import Split
from skymoe.spec.timeline import Span, timeline_record

UNEVEN = Layout(pp=3, tp=2, stages=Split((5, 4, 3)), recompute=(2, 1, 0))
ZBV = Layout(pp=2, stages=Split((3, 3, 3, 3)), schedule=ScheduleKind.ZERO_BUBBLE)


def boxes(page: Page) -> list[dict[str, str | None]]:
    return [attributes for tag, attributes in page.tags if tag == "rect" and "pass" in str(attributes.get("class"))]


def edit(path: Path, change: Any) -> None:
    """Pass every record through `change`, which returns the record to write."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    (path / "metrics.jsonl").write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


def test_the_last_timeline_is_drawn_measured_beside_planned(tmp_path: Path):
    path = write_parallel_run(tmp_path / "r", UNEVEN, num_micros=5)
    report, page = make(tmp_path / "a.html", path)
    assert report.sections.index("ranks") == report.sections.index("speed") + 1
    assert len(boxes(page)) == 2 * 6 * 5 * 2  # measured and planned, ranks, micro-batches, forward and backward
    assert "Measured in step 20" in page.text and "Planned" in page.text
    labels = [str(a["aria-label"]) for tag, a in page.tags if tag == "svg"]
    assert len(labels) == 2 and all("6 ranks over" in label and "rank 5" in label for label in labels)
    record = json.loads(
        [line for line in (path / "metrics.jsonl").read_text().splitlines() if '"timeline"' in line][-1]
    )
    assert f"{100 * record['bubble']:.1f}" in page.text
    for words in ("6: pp 3 × dp 1 × tp 2", "edp, G, 1f1b", "HFU", "stage 2: ", "backward of micro-batch 4"):
        assert words in page.text


def test_boxes_lie_where_the_passes_were(tmp_path: Path):
    """Rows by rank, times on one scale: the widest drawing ends where its last pass does."""
    write_parallel_run(tmp_path / "r", Layout(pp=2, stages=Split((4, 4))), num_micros=3, planned=False)
    _, page = make(tmp_path / "a.html", tmp_path / "r")
    record = json.loads(re.findall(r"\{.kind.: .timeline.*\}", (tmp_path / "r" / "metrics.jsonl").read_text())[-1])
    lane = next(a for tag, a in page.tags if tag == "rect" and a.get("class") == "lane")
    left, width = float(str(lane["x"])), float(str(lane["width"]))
    end = max(row[5] for row in record["spans"])
    for row, box in zip(record["spans"], boxes(page), strict=True):
        assert float(str(box["x"])) == pytest.approx(left + width * row[4] / end, abs=0.06)
        assert float(str(box["width"])) == pytest.approx(width * (row[5] - row[4]) / end - 0.8, abs=0.11)
    assert len({box["y"] for box in boxes(page)}) == 2


def test_two_stages_on_a_rank_are_told_apart(tmp_path: Path):
    write_parallel_run(tmp_path / "r", ZBV, num_micros=4, planned=False)
    _, page = make(tmp_path / "a.html", tmp_path / "r")
    classes = {str(box["class"]) for box in boxes(page)}
    assert classes == {"pass F", "pass F later", "pass I", "pass W later"}
    assert "later stage of the same rank" in page.text and "Rank by rank" in page.text and "0, 3" in page.text


def test_runs_of_one_process_are_as_they_were(tmp_path: Path):
    write_run(tmp_path / "r", moe=True, steps=10)
    report, page = make(tmp_path / "a.html", tmp_path / "r")
    assert "ranks" not in report.sections and not any(note.startswith("Ranks") for note in report.notes)
    assert "HFU" not in page.text and "devices" not in page.text
    assert not [tag for tag, _ in page.tags if tag == "svg"]


def test_ranks_without_a_timeline_are_told(tmp_path: Path):
    path = write_parallel_run(tmp_path / "r", UNEVEN)
    edit(path, lambda line: {"kind": "event", "event": "x"} if line["kind"] == "timeline" else line)
    report, page = make(tmp_path / "a.html", path)
    assert "Ranks: No timeline was logged by r." in report.notes
    assert "devices" in page.text and "per device" in page.text and "HFU" in page.text


def test_several_runs_are_named(tmp_path: Path):
    runs = [write_parallel_run(tmp_path / name, UNEVEN, planned=False) for name in ("one", "two")]
    _, page = make(tmp_path / "a.html", *runs, write_run(tmp_path / "alone", moe=False, steps=5))
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 2


def test_a_long_step_is_drawn_within_bounds(tmp_path: Path):
    """Many micro-batches: the first thousand passes, no numbers in the boxes, and the page says so."""
    path = write_parallel_run(tmp_path / "r", Layout(pp=4, tp=2, stages=Split((2, 2, 2, 2))), num_micros=400, steps=5)
    assert (path / "metrics.jsonl").stat().st_size < 400_000
    report, page = make(tmp_path / "a.html", path)
    assert len(boxes(page)) == 2 * 1024
    assert "Drawn are the first 1024 of 6400 passes." in page.text
    assert report.num_bytes < make(tmp_path / "b.html", write_run(tmp_path / "s", moe=True, steps=5))[0].num_bytes + 8e5


def test_many_ranks_have_a_bounded_number_of_rows():
    spans = [Span(rank, rank, "F", 0, rank, rank + 1.0) for rank in range(50)]
    drawing = draw(spans)
    assert drawing.ranks == tuple(range(32)) and drawing.left_out == 18 and len(drawing.spans) == 32


GOOD = timeline_record(Layout(pp=2, stages=Split((2, 2))), [Span(0, 0, "F", 0, 0.0, 1.0)], step=1)


@pytest.mark.parametrize(
    "change",
    [
        {"spans": None}, {"spans": []}, {"spans": [[0, 0, "F", 0, 1.0, 0.5]]}, {"spans": [[0, 0, EVIL, 0, 0, 1]]},
        {"stages": [1]}, {"stages": [{"stage": 0}]}, {"planned_spans": "x"}, {"spans": [[0, 10**30, "F", 0, 0, 1]]},
        {"stages": [{"stage": 0, "rank": 0, "busy_s": -1.0, "idle_s": 0.0}]},
    ],
)  # fmt: skip
def test_a_timeline_that_is_none_is_a_note(change: dict[str, Any]):
    notes: list[str] = []
    assert read_timeline({**GOOD, **change}, notes) is None
    assert len(notes) == 1 and notes[0].startswith("the timeline of step 1 could not be read")


def test_a_timeline_of_passes_alone_is_enough():
    notes: list[str] = []
    timeline = read_timeline({"kind": "timeline", "step": 3, "spans": GOOD["spans"]}, notes)
    assert timeline is not None and not notes
    assert timeline.bubble == 0.0 and timeline.planned_bubble is None and timeline.stages[0].busy_s == 1.0


def test_text_of_a_timeline_is_never_markup(tmp_path: Path):
    path = write_parallel_run(tmp_path / "r", UNEVEN)
    evil = {"layout": {EVIL: EVIL, "pp": EVIL, "expert": [EVIL]}, "step": 10**40, "world_size": EVIL, "bubble": EVIL}
    edit(path, lambda line: {**line, **evil} if line["kind"] == "timeline" else line)
    _, page = make(tmp_path / "a.html", path)
    assert len(page.scripts) == 3 and not [tag for tag, _ in page.tags if tag == "img"]
    assert "alert(1)" in page.text

"""Plan files: what is written is read back; what is no plan is refused with the key that is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.base.errors import FormatError
from skymoe.spec.layout import DispatchMode, ExpertAxis, Layout, ScheduleKind
from skymoe.spec.plan_file import Plan, read_plan, write_plan
from skymoe.spec.split import Split

DOCUMENT: dict[str, Any] = {
    "format": "skymoe-plan",
    "version": 1,
    "model": {"layers": 7},
    "layout": {
        "pp": 3, "dp": 2, "tp": 2, "expert": "ep", "dispatch": "A", "schedule": "1f1b", "split": [3, 2.5, 1.5],
        "recompute": [1, 0, 2],
    },
    "expected": {"step_s": 1.25, "stage_s": [0.4, 0.4, 0.45], "by": {"name": "a planner"}},
}  # fmt: skip


def changed(path: str, value: object) -> dict[str, Any]:
    """The document with one key changed; ... takes it away."""
    document = json.loads(json.dumps(DOCUMENT))
    *parents, last = path.split(".")
    place = document
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return document


def read(tmp_path: Path, document: object) -> Plan:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    return read_plan(path)


def test_read(tmp_path: Path) -> None:
    plan = read(tmp_path, DOCUMENT)
    assert plan.num_layers == 7 and plan.expected == DOCUMENT["expected"]
    assert plan.layout == Layout(
        pp=3, dp=2, tp=2, expert=ExpertAxis.EP, dispatch=DispatchMode.ALL_TO_ALL, stages=Split((6, 5, 3)),
        recompute=(1, 0, 2),
    )  # fmt: skip
    assert read(tmp_path, changed("expected", ...)).expected == {}


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    schedule = data.draw(st.sampled_from(list(ScheduleKind)))
    pp = data.draw(st.integers(1, 4))
    stages = pp * {"1f1b": 1, "zbv": 2, "interleaved": data.draw(st.integers(2, 3))}[schedule]
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=stages, max_size=stages))
    sizes[-1] += sum(sizes) % 2
    split = Split(tuple(sizes))
    layers = [len({unit // 2 for unit in part}) for part in split]
    layout = Layout(
        pp=pp, dp=data.draw(st.integers(1, 9)), tp=data.draw(st.integers(1, 9)), schedule=schedule, stages=split,
        expert=data.draw(st.sampled_from(list(ExpertAxis))), dispatch=data.draw(st.sampled_from(list(DispatchMode))),
        recompute=tuple(data.draw(st.integers(0, count)) for count in layers),
    )  # fmt: skip
    plan = Plan(sum(sizes) // 2, layout, {"bubble": data.draw(st.floats(0, 1))})
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    write_plan(plan, path)
    assert read_plan(path) == plan


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("format", "skymoe-recipe", "no plan of skymoe"),
        ("format", ..., "no plan of skymoe"),
        ("version", 2, "only version 1"),
        ("version", True, "only version 1"),
        ("version", ..., "only version 1"),
        ("model", ..., "model: this key is required"),
        ("model.layers", 8, "split holds 7 layers, model.layers is 8"),
        ("model.layers", 10**9, "model.layers"),
        ("layout.pp", ..., "layout.pp: this key is required"),
        ("layout.pp", "3", "layout.pp: expected a whole number"),
        ("layout.pp", True, "layout.pp: expected a whole number"),
        ("layout.pp", 0, "layout.pp"),
        ("layout.pp", 2, "3 stages are not a multiple of pp 2"),
        ("layout.dp", 1 << 19, "more than 1048576 ranks"),
        ("layout.expert", "edb", "did you mean"),
        ("layout.schedule", "zbv", "two stages per rank"),
        ("layout.schedule", "interleaved", "at least two stages per rank"),
        ("layout.split", [], "layout.split"),
        ("layout.split", [3, 2.4, 1.6], "in halves"),
        ("layout.split", [1e308, 1e308, 1e308], "in halves"),
        ("layout.split", [9, -3, 1], "in halves"),
        ("layout.split", [0.5] * 5000, "layout.split: "),
        ("layout.recompute", [1, 0], "2 counts for 3 stages"),
        ("layout.recompute", [4, 0, 0], "4 layers of the 3 in stage 0"),
        ("layout.recompute", [-1, 0, 0], "recompute"),
        ("layout.chunks", 2, "unknown key"),
        ("surprise", 1, "surprise: unknown key"),
        ("expected", [1], "expected: expected a section"),
    ],
)
def test_no_plan_is_refused(tmp_path: Path, path: str, value: object, told: str) -> None:
    with pytest.raises(FormatError, match=re.escape(told)) as error:
        read(tmp_path, changed(path, value))
    assert str(tmp_path / "plan.json") in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "skymoe-plan", "format": "skymoe-plan"}', "[" * 10**5])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(FormatError):
        read_plan(path)
    with pytest.raises(FormatError):
        read_plan(tmp_path)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(DOCUMENT).replace("1.25", "NaN"))
    with pytest.raises(FormatError, match="NaN"):
        read_plan(path)


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "plan_file.md").read_text("utf-8")
    example = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert example is not None
    plan = read(tmp_path, json.loads(example[1]))
    assert plan.layout.world_size == 1536 and plan.layout.stages.num_units == 2 * plan.num_layers

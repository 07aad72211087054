"""The file of a serving plan: read strictly, and its rotation is fair."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skymoe.base.errors import FormatError
from skymoe.spec.serving_plan import ServingPlan, read_serving_plan, turned, write_serving_plan
from skymoe.spec.split import Split

PLAN = {
    "format": "skymoe-serving-plan", "version": 1,
    "model": {"layers": 4, "heads": 9, "kv_heads": 9, "columns": 200, "experts": 6, "vocabulary": 100},
    "weights": "fp8", "kv": "bf16", "context": 128, "max_batch": 4, "kv_tokens": 4096,
    "split": {"heads": [3, 2, 2, 2], "kv_heads": [3, 2, 2, 2], "columns": [56, 48, 48, 48], "experts": [6, 6, 6, 6],
              "vocabulary": [25, 25, 25, 25]},
    "block": 8, "rotate": [[0, 1, 2, 3]],
}  # fmt: skip


def changed(**changes):
    """PLAN with `section__key` changed."""
    data = json.loads(json.dumps(PLAN))
    for name, value in changes.items():
        *sections, key = name.split("__")
        place = data
        for section in sections:
            place = place[section]
        place[key] = value
    return data


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    extra=st.integers(0, 9),
    layers=st.integers(1, 40),
)
def test_over_the_layers_nobody_has_more_than_one_unit_more(sizes, extra, layers):
    num = len(sizes)
    split = Split.remainder_first(sum(sizes) + extra, num)
    parts = [turned(split, (tuple(range(num)),), layer).sizes for layer in range(layers)]
    assert parts[0] == split.sizes
    assert all(sum(part) == split.num_units and max(part) - min(part) <= 1 for part in parts)
    totals = [sum(part[rank] for part in parts) for rank in range(num)]
    assert max(totals) - min(totals) <= 1


def test_sets_turn_by_themselves():
    assert turned(Split((5, 4, 2, 1, 1)), ((0, 1), (2, 3, 4)), 1).sizes == (4, 5, 1, 2, 1)


def test_there_and_back(tmp_path):
    plan = ServingPlan.model_validate_json(json.dumps(PLAN))
    write_serving_plan(plan, tmp_path / "plan.json")
    assert read_serving_plan(tmp_path / "plan.json") == plan
    assert plan.heads(1).sizes == (2, 3, 2, 2)
    assert plan.columns(1).sizes == (48, 56, 48, 48)
    assert plan.experts(3).sizes == (6, 6, 6, 6)


@pytest.mark.parametrize(
    "data",
    [
        changed(format="skymoe-plan"),
        changed(version=2),
        changed(version=True),
        changed(split__heads=[3, 2, 2, 3]),
        changed(split__heads=[9, 2, 0, -2]),
        changed(split__columns=[50, 50, 50]),
        changed(split__experts=[6, 6, 6, 5]),
        changed(split__vocabulary=[25, 25, 25, 24]),
        changed(split__experts=[2, 2, 1, 1]),  # whole ones, with a part of their columns
        changed(rotate=[[0, 1], [1, 2]]),
        changed(rotate=[[4]]),
        changed(rotate=[[]]),
        changed(block=0),
        changed(more=1),
        changed(model__layers=10**9),
        {**PLAN, "split": None},
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, data):
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(FormatError):
        read_serving_plan(tmp_path / "plan.json")

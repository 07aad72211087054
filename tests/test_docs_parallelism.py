"""The figures of docs/parallelism.md are those of the formulas."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from skymoe.spec.layout import Coordinate, DispatchMode, ExpertAxis, Layout
from skymoe.spec.split import Split
from skymoe.spec.traffic import DispatchShape, dispatch_bytes

PAGE = (Path(__file__).parent.parent / "docs" / "parallelism.md").read_text(encoding="utf-8")
SHAPE = DispatchShape(num_tokens=8192, hidden_size=4608, itemsize=2, num_experts=16, top_k=2)


@pytest.mark.parametrize("expert", ExpertAxis)
def test_the_table_of_bytes(expert: ExpertAxis):
    row = re.search(rf"^\| `{expert}` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert row is not None
    for told, mode in zip(row.groups(), DispatchMode, strict=True):
        layout = Layout(dp=4, tp=4, expert=expert, dispatch=mode, stages=Split((2,)))
        for rank in range(layout.world_size):
            place: Coordinate = layout.coordinate(rank)
            assert dispatch_bytes(layout, place, SHAPE) / 1e6 == pytest.approx(float(told), abs=0.05)

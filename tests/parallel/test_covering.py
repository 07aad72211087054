"""The subset of the equivalence matrix really covers what it says; counted here by hand, not by its own bookkeeping."""

from __future__ import annotations

from dataclasses import asdict
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from parallel.covering import AXES, Case, all_cases, covering_subset
from parallel.equivalence_table import write_table

from skymoe.base.errors import ConfigError
from skymoe.parallel.config import ParallelConfig, layout_of
from skymoe.spec.layout import DispatchMode, ExpertAxis, ScheduleKind
from skymoe.spec.presets import PRESETS


@pytest.fixture(scope="module")
def subset() -> list[Case]:
    return covering_subset()


def test_all_cases_are_the_legal_part_of_the_product():
    cases = all_cases()
    assert len(set(cases)) == len(cases) == 1620
    # 14 meshes of at most 8 ranks; the 6 without a pipeline have one schedule, the other 8 three
    assert len({(case.pp, case.tp, case.dp) for case in cases}) == 14
    assert len(cases) == (6 * 1 + 8 * 3) * 3 * 3 * 3 * 2
    assert {case.world_size for case in cases} == {1, 2, 3, 4, 6, 8}
    assert [case.world_size for case in cases] == sorted(case.world_size for case in cases)


def test_every_case_is_a_layout_and_what_is_left_out_is_none_or_too_large():
    spec = PRESETS["mixtral-8x7b"]
    legal = set(all_cases())
    for case in (Case(*values) for values in product(*AXES.values())):
        config = ParallelConfig(
            pp=case.pp, tp=case.tp, dp=case.dp, expert=case.expert, dispatch=case.dispatch, schedule=case.schedule
        )
        if case in legal:
            assert layout_of(config, spec, world_size=case.world_size).world_size == case.world_size
        elif case.world_size <= 8:
            assert case.pp == 1 and case.schedule != "1f1b"


def test_every_pair_occurs_and_where_it_makes_a_difference(subset: list[Case]):
    cases = all_cases()
    assert set(subset) <= set(cases)
    for first, second in combinations(AXES, 2):
        for values in product(AXES[first], AXES[second]):
            legal = [c for c in cases if (getattr(c, first), getattr(c, second)) == values]
            chosen = [c for c in subset if (getattr(c, first), getattr(c, second)) == values]
            assert bool(chosen) == bool(legal), (first, second, values)
            if "dispatch" in (first, second) and any(c.tp > 1 for c in legal):
                assert any(c.tp > 1 or (c.dp > 1 and c.expert != "edp") for c in chosen), (first, second, values)
            if ("expert", "ep") in ((first, values[0]), (second, values[1])) and any(c.dp > 1 for c in legal):
                assert any(c.dp > 1 for c in chosen), (first, second, values)


def test_each_expert_axis_meets_each_dispatch_where_the_axes_are_three_different_things(subset: list[Case]):
    plane = {(case.expert, case.dispatch) for case in subset if (case.dp, case.tp) == (2, 2)}
    assert plane == set(product(ExpertAxis, DispatchMode))


def test_the_subset_is_small_and_the_same_every_time(subset: list[Case]):
    assert subset == covering_subset() and len(subset) <= 24
    assert sum(case.world_size for case in subset) <= 110
    assert [case.world_size for case in subset] == sorted(case.world_size for case in subset)


def test_another_seed_covers_as_well_with_other_cases(subset: list[Case]):
    other = covering_subset(seed=1)
    assert set(other) != set(subset)
    for axes in combinations(AXES, 2):
        wanted, found = ({tuple(getattr(c, axis) for axis in axes) for c in these} for these in (all_cases(), other))
        assert wanted == found, axes


def test_strength_three_holds_every_triple():
    subset, cases = covering_subset(strength=3), all_cases()
    for axes in combinations(AXES, 3):
        wanted, found = ({tuple(getattr(c, axis) for axis in axes) for c in these} for these in (cases, subset))
        assert wanted == found, axes


def test_one_tensor_rank_makes_no_difference_to_dispatch():
    case = Case(1, 1, 2, ExpertAxis.EDP, DispatchMode.ALL_TO_ALL, ScheduleKind.ONE_F_ONE_B, "none", "dropless")
    assert not case.is_live("dispatch") and not case.is_live("expert") and not case.is_live("schedule")
    assert str(case) == "pp1-tp1-dp2-edp-A-1f1b-none-dropless"


def results(cases: list[Case]) -> list[dict[str, Any]]:
    """Errors that tell the case they belong to."""
    return [
        {**asdict(case), "loss": 1e-8, "gradients": index * 1e-8, "weights": 2e-8, "alpha": 0.0, "seconds": 1.5}
        for index, case in enumerate(cases)
    ]


def test_the_table_names_its_command_its_count_and_its_worst_case(subset: list[Case], tmp_path: Path):
    cases = subset
    write_table(results(cases), tmp_path / "table.md", command="python x.py --full", tolerance=1e-5)
    text = (tmp_path / "table.md").read_text()
    assert "python x.py --full" in text and f"{len(cases)} cases" in text
    top = text.split("\n## ")[0]
    assert f"{(len(cases) - 1) * 1e-8:.1e}" in top and str(cases[-1]) in top and "1.0e-05" in top
    rows = [line for line in text.split("## Every case")[1].splitlines() if " | 1f1b | " in line]
    assert len(rows) == sum(case.schedule == "1f1b" for case in cases)
    assert text.count("\n### ") == len({(case.pp, case.tp, case.dp) for case in cases})
    assert max(map(len, text.splitlines())) < 140


def test_the_table_tells_what_failed_and_holds_nothing_back(subset: list[Case], tmp_path: Path):
    rows = results(subset)
    rows[3]["gradients"], rows[5]["loss"] = 3e-2, float("nan")
    write_table(rows, tmp_path / "table.md", command="x", tolerance=1e-5)
    text = (tmp_path / "table.md").read_text()
    assert f"2 of {len(rows)} cases do not hold" in text and "**3.0e-02**" in text and "**nan**" in text
    assert "nan" in text.split("\n## ")[0]  # the worst figure at the top is not hidden by a comparison with NaN


def test_a_table_of_nothing_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no results"):
        write_table([], tmp_path / "table.md", command="x")
